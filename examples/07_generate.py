"""Generation: greedy, sampling and beam search; and the time that the KV cache saves.

Opens minigpt/inference/generate.py, sampling.py and beams.py in the same folder, and minigpt/model/cache.py.

    python examples/07_generate.py
"""

import math
import time

import torch

from minigpt import GPT, GPTConfig, Tokenizer, collate, generate

# Twelve of twenty texts begin with "I drink", but no single drink is as frequent as the run.
CORPUS = 5 * ["I drink tea."] + 4 * ["I drink milk."] + 3 * ["I drink water."] + 8 * ["I run to the river."]
tokenizer = Tokenizer.tiny()
eot = tokenizer.eot_id
torch.manual_seed(0)
torch.set_num_threads(1)  # on tensors this small, more threads are slower
model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=256, n_embd=128, n_layer=3, n_head=4)).eval()  # no dropout
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
inputs, targets = collate([tokenizer.encode(text) for text in CORPUS], eot)  # plain ids: collate appends the end
for _ in range(60):
    nll_sum, n_tokens = model(inputs, targets)
    optimizer.zero_grad()
    (nll_sum / n_tokens).backward()
    optimizer.step()
floor = sum(math.log(len(CORPUS) / CORPUS.count(text)) for text in CORPUS) / n_tokens  # the corpus's entropy
print(f"Twenty texts, memorized: loss {nll_sum.item() / n_tokens:.3f}; the lowest possible is {floor:.3f}")

# ---- the distribution
prompt = tokenizer.encode("I")
logits = model(torch.tensor([prompt]), last_only=True)[0, 0].detach()  # (1,T) -> (1,1,V) -> (V,)
print("\n1. What follows 'I': softmax(logits / temperature)")
print(f"   {'temperature':13}{0.5:<22}{1.0:<22}{2.0}")
for id in logits.topk(3).indices.tolist():
    chances = [(logits / temperature).softmax(-1)[id].item() for temperature in (0.5, 1.0, 2.0)]
    bars = "".join(f"{chance:5.3f} {'█' * round(14 * chance):16}" for chance in chances)
    print(f"   {tokenizer.decode([id]):13}{bars.rstrip()}")


# ---- three decoding methods
def text_of(ids: list[int]) -> str:
    return tokenizer.decode(prompt + ids).removesuffix("<|endoftext|>")


def chance_of(ids: list[int]) -> float:
    """The product of its tokens' probabilities: exp(-summed loss)."""
    whole = torch.tensor([prompt + ids])
    nll_sum, _ = model(whole[:, :-1], whole[:, 1:])
    return math.exp(-nll_sum.item())


[greedy] = generate(model, [prompt], max_new_tokens=10, eos_id=eot)
beams = generate(model, [prompt], max_new_tokens=10, eos_id=eot, num_beams=4, num_return_sequences=4, length_penalty=0)
drawn = generate(model, [prompt], max_new_tokens=10, eos_id=eot, temperature=1.0, num_return_sequences=200, seed=0)
print("\n2. Greedy: the likeliest token at each step")
print(f"   p = {chance_of(greedy):.3f}  {text_of(greedy)}")
print("\n3. Beam search with 4 beams;             and the share of each in 200 samples")
for ids in beams:
    share = drawn.count(ids) / len(drawn)
    print(f"   p = {chance_of(ids):.3f}  {text_of(ids):28} {share:5.3f} {'█' * round(40 * share)}")

# ---- the KV cache: keys and values of earlier tokens do not change, so a new token computes only its own position
started = time.perf_counter()
[cached] = generate(model, [prompt], max_new_tokens=200)  # without eos_id it does not stop early
seconds = time.perf_counter() - started
ids = list(prompt)
for _ in range(200):
    with torch.no_grad():
        ids.append(int(model(torch.tensor([ids]), last_only=True).argmax()))  # recomputes all positions
without = time.perf_counter() - started - seconds
print(f"\n4. 200 tokens: {seconds:.2f} s with the cache, {without:.2f} s without: {without / seconds:.1f} times")

assert text_of(greedy).startswith("I drink") and text_of(beams[0]) == "I run to the river."
assert chance_of(beams[0]) > chance_of(greedy) and sum(map(chance_of, beams)) > 0.9
assert prompt + cached == ids  # the same text, to the token
print("\n=> The likeliest token may lead to a less likely text; a cache only saves time.")
