"""Causal self-attention: the weights of one head as a picture, before and after training.

Opens minigpt/model/gpt2.py (CausalSelfAttention).

    python examples/04_attention.py
"""

import math

import torch
from torch import Tensor

from minigpt import GPT, GPTConfig

LETTERS = "abcdefghijklmnop"
PERIOD = 6
T = 2 * PERIOD - 1  # positions: one round, and the next without its last letter
torch.manual_seed(0)
torch.set_num_threads(1)  # on tensors this small, more threads are slower
model = GPT(GPTConfig(len(LETTERS), n_positions=T, n_embd=64, n_layer=1, n_head=1)).eval()  # eval: no dropout
attention = model.h[0].attn


def rounds(count: int) -> Tensor:
    """(count,T+1) ids: six different letters, then the same six again."""
    return torch.rand(count, len(LETTERS)).argsort()[:, :PERIOD].repeat(1, 2)


@torch.no_grad()
def look(idx: Tensor) -> tuple[Tensor, Tensor]:
    """The head's (T,T) weights on (T,) ids, and its (T,C) output, by hand from the model's own matrices."""
    x = model.wte(idx) + model.wpe(torch.arange(T))  # (T,C): token and position embeddings
    q, k, v = attention.c_attn(model.h[0].ln_1(x)).chunk(3, dim=-1)  # (T,3*C) -> 3 x (T,C); one head, so hs = C
    scores = q @ k.T / math.sqrt(k.shape[-1])  # (T,T): the score of each query with each key
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)  # e^-inf = 0: no weight on the future
    return weights, attention.c_proj(weights @ v)  # each position's weighted mean of the values


def draw(weights: Tensor) -> list[str]:
    """One line per position: a darker cell is a larger weight, a dot nearly 0, an empty one is masked."""
    return ["".join("·░▒▓█"[min(4, int(5 * w))] * 2 for w in row[: at + 1]) for at, row in enumerate(weights)]


row = rounds(1)[0]
before, _ = look(row[:-1])

# The task: in the second round, predict the next letter. It is five positions back, which the model has to learn.
optimizer = torch.optim.AdamW(model.parameters())
for step in range(201):
    optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 200)  # linear decay to 0, so that training converges
    text = rounds(32)
    nll_sum, n_tokens = model(text[:, :-1], text[:, 1:])  # (32,T) inputs, and the next letter of each
    (nll_sum / n_tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"   step {step:3}, loss {nll_sum / n_tokens:.3f}")

seen: list[Tensor] = []
attention.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
says = model(row[None, :-1])[0].argmax(-1)  # (1,T) -> (1,T,V) -> (T,)
after, output = look(row[:-1])

print("\n   One row per query position, one cell per key position; darker: larger weight.")
print(f"\n   reads   {'before training':26}{'after':26}predicts")
for at, (old, new) in enumerate(zip(draw(before), draw(after))):
    print(f"   {LETTERS[row[at]]:8}{old:26}{new:26}{LETTERS[says[at]]}")
print()
for name, weights in (("before", before), ("after", after)):
    print(f"   row 9 {name:7}{' '.join(f'{w:.2f}' for w in weights[9])}")

assert torch.allclose(output, seen[0], atol=1e-5)  # by hand and by the model's fused kernel
assert torch.allclose(after.sum(-1), torch.ones(T)) and bool((after.triu(1) == 0).all())
assert says[PERIOD - 1 :].equal(row[PERIOD:]) and float(after.diagonal(1 - PERIOD).min()) > 0.5
print("\n=> Each row is a distribution over the past; after training it peaks five back.")
