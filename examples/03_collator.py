"""The collator: append end-of-text, pad to one length, shift by one for the targets, ignore the padding in the loss.

Opens minigpt/data/collate.py.

    python examples/03_collator.py
"""

import torch

from minigpt import GPT, Example, GPTConfig, collate

torch.set_num_threads(1)  # on tensors this small, more threads are slower
END, IGNORED = 50256, -100  # GPT-2's end-of-text, also used as padding; the target that the loss ignores
a, b, c, d, e = 1, 2, 3, 4, 5
NAMES = {a: "a", b: "b", c: "c", d: "d", e: "e", END: "END", IGNORED: "-100"}


def show(step: str, rows: list[list[int]]) -> None:
    cells = ["".join(f"{NAMES[id]:>5}" for id in row) for row in rows]
    print(f"   {step:32}" + "   ".join(f"{row:20}" for row in cells).rstrip())


print("1. Two sequences, by hand")
rows = [[a, b, c], [d, e]]
show("the batch", rows)
rows = [[*row, END] for row in rows]
show("append END: it is supervised too", rows)
longest = max(map(len, rows))
padded = [row + [END] * (longest - len(row)) for row in rows]
show("pad to the longest", padded)
inputs = [row[:-1] for row in padded]
show("inputs: all but the last", inputs)
shifted = [row[1:] for row in padded]  # the target of a position is the next token
show("targets: all but the first", shifted)
targets = [row[: len(own) - 1] + [IGNORED] * (longest - len(own)) for row, own in zip(shifted, rows)]
show("ignore the padding after END", targets)

batch = collate([[a, b, c], [d, e]])
print("\n2. The same by collate: Batch(inputs, targets), (B,T) int64 each")
print(f"inputs  {tuple(batch.inputs.shape)}\n{batch.inputs}\ntargets {tuple(batch.targets.shape)}\n{batch.targets}")
# In the second row 50256 is once a target and once padding: the same id at different positions. Masking by value would
# hide the real end-of-text as well, and the model would never learn to stop.
print(f"   row 1 learns to stop: {batch.targets[1].tolist()} has {END} once, then {IGNORED}")

print("\n3. An Example marks supervised tokens; here a b c is the prompt, d e the answer")
example = Example([a, b, c, d, e, END], [False, False, False, True, True, True])
masked = collate([example, [d, e]])
for row, (row_inputs, row_targets) in enumerate(zip(*masked)):
    show(f"row {row}, inputs", [row_inputs.tolist()])
    show(f"row {row}, targets", [row_targets.tolist()])
# The position of c, the prompt's last token, is the first with a target: d.

print("\n4. Padding costs time and changes nothing")
torch.manual_seed(0)
model = GPT(GPTConfig(n_positions=8, n_embd=16, n_layer=2, n_head=2)).eval()
together, n_tokens = model(*masked)  # the sum of the losses in nats, and the number of targets
alone = [model(*collate([sequence])) for sequence in (example, [d, e])]
print(f"   one batch of 2: loss {together:.5f} over {n_tokens} targets")
print(f"   row by row:     loss {alone[0][0]:.5f} + {alone[1][0]:.5f} over {alone[0][1]} + {alone[1][1]}")

assert torch.equal(batch.inputs, torch.tensor([[a, b, c], [d, e, END]]))
assert torch.equal(batch.targets, torch.tensor([[b, c, END], [e, END, IGNORED]]))
assert (inputs, targets) == (batch.inputs.tolist(), batch.targets.tolist())
assert torch.allclose(together, alone[0][0] + alone[1][0]) and n_tokens == alone[0][1] + alone[1][1] == 5
print("\n=> [a,b,c],[d,e] -> inputs [a,b,c],[d,e,END], targets [b,c,END],[e,END,-100].")
