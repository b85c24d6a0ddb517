"""One training step in full: logits, the loss at each position, gradients by layer, AdamW recomputed by hand.

Opens minigpt/training/loop.py (the loop), minigpt/training/objectives.py (what it minimises),
minigpt/training/engines/torch_engine.py (forward, backward, step) and minigpt/training/optim.py.

    python examples/05_training_step.py
"""

import math

import torch

import minigpt
from minigpt import GPT, GPTConfig, Tokenizer, TrainConfig

tokenizer, template = Tokenizer.tiny(), minigpt.get_template("hugchat")
torch.set_num_threads(1)  # on tensors this small, more threads are slower
QUESTION = {"role": "user", "content": "Name the capital of France."}
ANSWER = {"role": "assistant", "content": "Paris, of course."}
example = minigpt.encode_example(minigpt.Conversation([QUESTION, ANSWER]), template, tokenizer, max_seq_length=64)
batch = minigpt.collate([example], tokenizer.eot_id)
torch.manual_seed(0)
model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=64, n_embd=64, n_layer=2, n_head=4)).eval()  # no dropout
config = TrainConfig(learning_rate=1e-3)
engine = minigpt.make_engine(model, config)

# At every position the model gives each token of the vocabulary a probability; the loss uses that of the target.
log_p = model(batch.inputs)[0].detach().log_softmax(-1)  # (1,T) -> (1,T,V) -> (T,V)
print(f"1. Forward: inputs {tuple(batch.inputs.shape)} -> log-probabilities {tuple(log_p.shape)}")
print(f"   {'reads':14} {'target':16} {'p(target)':>9} {'loss = -ln p':>13}")
losses = []
for at, (read, target) in enumerate(zip(batch.inputs[0].tolist(), batch.targets[0].tolist())):
    if target == -100:  # the prompt: no loss here
        print(f"   {tokenizer.decode([read])!r:14} -")
        continue
    loss = -log_p[at, target].item()
    print(f"   {tokenizer.decode([read])!r:14} {tokenizer.decode([target])!r:16} {math.exp(-loss):9.5f} {loss:13.4f}")
    losses.append(loss)
n_tokens = len(losses)
nll_sum = engine(batch).sum  # computes logits only at supervised targets, never the whole (T,V)
print(f"   mean over {n_tokens}: {sum(losses) / n_tokens:.4f}, the engine's {nll_sum / n_tokens:.4f};", end="")
print(f" a uniform guess: ln {tokenizer.vocab_size:,} = {math.log(tokenizer.vocab_size):.4f}")
assert math.isclose(sum(losses), nll_sum.item(), rel_tol=1e-5)

# Two steps, compared with AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) by hand in float64.
beta1, beta2, lr = config.adam_beta1, config.adam_beta2, config.learning_rate
mean = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
square = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
for t in (1, 2):
    loss = engine(batch)  # the objective's forward: Loss(sum, extras)
    engine.backward(loss.sum / n_tokens, last=True)
    weight = {name: p.detach().double() for name, p in model.named_parameters()}
    gradient = {name: p.grad.double() for name, p in model.named_parameters()}
    square_sums = {name: g.square().sum().item() for name, g in gradient.items()}
    norm = math.sqrt(sum(square_sums.values()))
    print(f"\n{t + 1}. Step {t}: loss {loss.sum / n_tokens:.4f}, gradient norm {norm:.3f}; by layer (squares add up):")
    for layer in ("wte", "wpe", "h.0", "h.1", "ln_f"):
        own = math.sqrt(sum(value for name, value in square_sums.items() if name.startswith(layer)))
        print(f"   {layer:5} {own:6.3f} {'█' * round(50 * own / norm)}")

    info = engine.step(lr)  # clips the gradients, applies them and clears them
    error = moved = 0.0
    for name, p in model.named_parameters():
        g = gradient[name] * min(1.0, config.max_grad_norm / norm)  # clipping: a scale, so the direction stays
        mean[name] = beta1 * mean[name] + (1 - beta1) * g
        square[name] = beta2 * square[name] + (1 - beta2) * g**2
        m, v = mean[name] / (1 - beta1**t), square[name] / (1 - beta2**t)  # bias correction: both averages begin at 0
        decay = config.weight_decay if p.dim() >= 2 else 0.0  # matrices only; biases and gains have no decay
        by_hand = weight[name] * (1 - lr * decay) - lr * m / (v.sqrt() + config.adam_epsilon)
        error = max(error, (by_hand - p).abs().max().item())
        moved = max(moved, (p - weight[name]).abs().max().item())
    print(f"   the engine's norm {info.grad_norm:.3f}; its weights and ours differ by {error:.0e} at most")
    print(f"   the largest change of a weight is {moved:.6f}; the learning rate is {lr}")
    assert error < 1e-6 and math.isclose(norm, info.grad_norm, rel_tol=1e-3)
engine.close()
print("\n=> A step is only this arithmetic; AdamW's first steps are about lr long.")
