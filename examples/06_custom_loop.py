"""The library in 30 lines: your own data, your own optimizer, your own loop.

Opens minigpt/__init__.py, which lists the public names; this example imports most of those that a loop needs.

    python examples/06_custom_loop.py
"""

import torch

from minigpt import GPT, Conversation, GPTConfig, Tokenizer, collate, encode_example, generate, get_template

OPPOSITES = {"hot": "cold", "day": "night", "old": "young", "open": "closed", "early": "late", "full": "empty"}

# ---- data: lists of messages (read_records reads them from files in all the usual formats)
tokenizer, template = Tokenizer.tiny(), get_template("hugchat")
talks = [[{"role": "user", "content": f"Not {a}?"}, {"role": "assistant", "content": b}] for a, b in OPPOSITES.items()]
examples = [encode_example(Conversation(talk), template, tokenizer, max_seq_length=64) for talk in talks]
inputs, targets = collate(examples, tokenizer.eot_id)  # (B,T) each; -100 is ignored by the loss
print(f"   inputs {tuple(inputs.shape)}, {int((targets != -100).sum())} supervised targets")

# ---- model and optimizer state
torch.manual_seed(0)
torch.set_num_threads(1)  # on tensors this small, more threads are slower
model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=64, n_embd=64, n_layer=2, n_head=4)).eval()  # no dropout
momenta = [torch.zeros_like(p) for p in model.parameters()]

# ---- training. The optimizer is Lion (Chen et al. 2023, arXiv:2302.06675): each weight moves by the same amount, up or
# down by the sign of the momentum.
for step in range(101):
    nll_sum, n_tokens = model(inputs, targets)
    loss = nll_sum / n_tokens
    loss.backward()
    with torch.no_grad():
        for p, momentum in zip(model.parameters(), momenta):
            p -= 2e-3 * (0.9 * momentum + 0.1 * p.grad).sign()
            momentum.lerp_(p.grad, 0.01)
            p.grad = None
    if step % 20 == 0:
        print(f"   step {step:3}, loss {loss.item():.4f}")

# ---- the answers, with the same template as in training
for question, answer in talks:
    prompt = template.render([question], add_generation_prompt=True)[0].text
    [ids] = generate(model, [tokenizer.encode(prompt)], max_new_tokens=8, eos_id=tokenizer.eot_id)
    print(f"   {question['content']:12}{tokenizer.decode(ids)}")
    assert tokenizer.decode(ids) == f" {answer['content']}<|endoftext|>"
assert loss.item() < 0.1
print("\n=> Batches in, (nll_sum, n_tokens) out: the rest of the loop is short to write.")
