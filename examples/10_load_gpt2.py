"""GPT-2's weights as the hub keeps them, mapped to ours name by name: a prefix goes, and four matrices a layer turn.

Opens minigpt/model/weights.py (the files) and the end of minigpt/model/gpt2.py (from_pretrained, save_pretrained).

    python examples/10_load_gpt2.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from minigpt import GPT, GPTConfig

torch.set_num_threads(1)  # on tensors this small, more threads only wait for each other

# GPT-2's widths, two of its twelve layers and random weights: the same names and shapes, without a download. The
# weights are large (GPT-2 begins at 0.02), or a wrong one would hardly show in the logits.
torch.manual_seed(0)
config = GPTConfig.preset("gpt2", n_layer=2, vocab_size=1000, initializer_range=0.2)
original = GPT(config).eval()

with TemporaryDirectory() as folder:
    original.save_pretrained(folder)  # as transformers writes it, and reads it
    print("1. The folder")
    for path in sorted(Path(folder).iterdir()):
        print(f"   {path.stat().st_size:12,} bytes  {path.name}")
    hub = load_file(Path(folder) / "model.safetensors")
    loaded = GPT.from_pretrained(folder)

# OpenAI's code had no linear layers but convolutions of width 1. Those keep (in,out) and compute x @ W, where
# nn.Linear keeps (out,in) and computes x @ W.T: the same numbers, lying the other way.
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
print(f"\n2. {len(hub)} tensors. Our names lack 'transformer.' alone; layer 1 is as layer 0")
print(f"   {'on the hub':38}{'shape':14}shape here")
mapped = {}
for name, parameter in loaded.named_parameters():
    tensor = hub[f"transformer.{name}"]
    turned = name.endswith(TURNED)
    mapped[name] = tensor.T if turned else tensor
    if not name.startswith("h.1."):
        shapes = [str(tuple(each.shape)) for each in (tensor, parameter)]
        print(f"   transformer.{name:26}{shapes[0]:14}{shapes[1]:13}{'turned' if turned else ''}".rstrip())
# There is no lm_head: the output layer is the token embedding, once more (tied). And gpt2's own file, older than the
# prefix, leaves it out and keeps each layer's causal mask too, as attn.bias; from_pretrained reads both kinds.

# c_proj is square. Not turned, it has the right shape, loads without a word, and computes something else.
square = "h.0.attn.c_proj.weight"
idx = torch.randint(config.vocab_size, (1, 16))
by_hand, wrong = GPT(config).eval(), GPT(config).eval()
by_hand.load_state_dict(mapped)
wrong.load_state_dict({**mapped, square: hub[f"transformer.{square}"]})
with torch.no_grad():
    expected = original(idx)
    print(f"\n3. How far {tuple(expected.shape)} logits are from the original's, whose spread is {expected.std():.1f}")
    for what, model in (
        ("GPT.from_pretrained", loaded),
        ("mapped by hand", by_hand),
        (f"{square} not turned", wrong),
    ):
        print(f"   {what:36}{(model(idx) - expected).abs().max():8.4f}")

with torch.device("meta"):  # shapes without memory
    gpt2 = GPT(GPTConfig.preset("gpt2"))
count = sum(1 for _ in gpt2.parameters())
print(f"\n4. The real gpt2, by the same names: {count} tensors, {gpt2.num_parameters():,} parameters")

x, weight = torch.randn(5, 768), hub["transformer.h.0.attn.c_attn.weight"]
with torch.no_grad():
    assert hub.keys() == {f"transformer.{name}" for name in mapped}
    assert torch.allclose(x @ weight, torch.nn.functional.linear(x, loaded.h[0].attn.c_attn.weight), atol=1e-3)
    assert all(torch.allclose(model(idx), expected, atol=1e-3) for model in (loaded, by_hand))
    assert (wrong(idx) - expected).abs().max() > 1 and gpt2.num_parameters() == 124_439_808
print("\n=> Names and shapes that fit prove nothing: the logits have to agree.")
