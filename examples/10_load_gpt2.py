"""Loading GPT-2's weights from the hub's format: remove a prefix, transpose four matrices per layer.

Opens minigpt/model/weights.py (reads the files) and minigpt/model/base.py (from_pretrained, save_pretrained).

    python examples/10_load_gpt2.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from minigpt import GPT, GPTConfig

torch.set_num_threads(1)  # on tensors this small, more threads are slower

# GPT-2's widths, two of its twelve layers and random weights: the same names and shapes, without a download. Their std
# is large (GPT-2's initial std is 0.02), so that a wrong weight shows in the logits.
torch.manual_seed(0)
config = GPTConfig.preset("gpt2", n_layer=2, vocab_size=1000, initializer_range=0.2)
original = GPT(config).eval()

with TemporaryDirectory() as folder:
    original.save_pretrained(folder)  # in the format of transformers
    print("1. The folder")
    for path in sorted(Path(folder).iterdir()):
        print(f"   {path.stat().st_size:12,} bytes  {path.name}")
    hub = load_file(Path(folder) / "model.safetensors")
    loaded = GPT.from_pretrained(folder)

# OpenAI's code used convolutions of width 1 as linear layers. They store (in,out) and compute x @ W; nn.Linear stores
# (out,in) and computes x @ W.T, so these matrices are transposed.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
print(f"\n2. {len(hub)} tensors. Our names only lack 'transformer.'; layer 1 is like layer 0")
print(f"   {'on the hub':38}{'shape':14}shape here")
mapped = {}
for name, parameter in loaded.named_parameters():
    tensor = hub[f"transformer.{name}"]
    transposed = name.endswith(TRANSPOSED)
    mapped[name] = tensor.T if transposed else tensor
    if not name.startswith("h.1."):
        shapes = [str(tuple(each.shape)) for each in (tensor, parameter)]
        print(f"   transformer.{name:26}{shapes[0]:14}{shapes[1]:13}{'transposed' if transposed else ''}".rstrip())
# There is no lm_head: the output layer is tied to the token embedding. The file of openai-community/gpt2 is older: it
# has no prefix, and each layer's causal mask as attn.bias; from_pretrained reads both formats.

# c_proj is square, so without the transpose it has the right shape and loads without an error, but is wrong.
square = "h.0.attn.c_proj.weight"
idx = torch.randint(config.vocab_size, (1, 16))
by_hand, wrong = GPT(config).eval(), GPT(config).eval()
by_hand.load_state_dict(mapped)
wrong.load_state_dict({**mapped, square: hub[f"transformer.{square}"]})
with torch.no_grad():
    expected = original(idx)
    print(f"\n3. Largest error of {tuple(expected.shape)} logits; the original's have std {expected.std():.1f}")
    for what, model in (
        ("GPT.from_pretrained", loaded),
        ("mapped by hand", by_hand),
        (f"{square} not transposed", wrong),
    ):
        print(f"   {what:38}{(model(idx) - expected).abs().max():8.4f}")

with torch.device("meta"):  # shapes without memory
    gpt2 = GPT(GPTConfig.preset("gpt2"))
count = sum(1 for _ in gpt2.parameters())
print(f"\n4. The real gpt2, with the same names: {count} tensors, {gpt2.num_parameters():,} parameters")

x, weight = torch.randn(5, 768), hub["transformer.h.0.attn.c_attn.weight"]
with torch.no_grad():
    assert hub.keys() == {f"transformer.{name}" for name in mapped}
    assert torch.allclose(x @ weight, torch.nn.functional.linear(x, loaded.h[0].attn.c_attn.weight), atol=1e-3)
    assert all(torch.allclose(model(idx), expected, atol=1e-3) for model in (loaded, by_hand))
    assert (wrong(idx) - expected).abs().max() > 1 and gpt2.num_parameters() == 124_439_808
print("\n=> Matching names and shapes are not enough: the logits must agree.")
