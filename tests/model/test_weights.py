"""A checkpoint in all the forms that it comes in."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt.model.gpt2 import GPT

SHAPE = {"vocab_size": 120, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0, initializer_range=0.2))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def rewrite(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(change(tensors), path)


def same(a: GPT, b: GPT) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_with_and_without_the_prefix_and_old_buffers(folder, copy):
    """OpenAI's upload has no `transformer.` prefix and saves the causal mask as `attn.bias`."""

    def as_openai(tensors):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(16, 16).tril()[None, None]
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return {**tensors, "lm_head.weight": tensors["wte.weight"].clone()}

    rewrite(copy, as_openai)
    assert same(GPT.from_pretrained(copy), GPT.from_pretrained(folder))


def test_shards_with_an_index(folder, copy):
    model = GPT2LMHeadModel.from_pretrained(folder)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    assert same(GPT.from_pretrained(copy), GPT.from_pretrained(folder))
    index = copy / "model.safetensors.index.json"
    whole = index.read_text()
    for text, message in (("{", ":1: not JSON: "), ("[]", ": expected a JSON object"), ("{}", ': no "weight_map", ')):
        index.write_text(text)
        with pytest.raises(ValueError) as error:
            GPT.from_pretrained(copy)
        assert str(error.value).startswith(f"{index}{message}")
    index.write_text(whole)
    next(copy.glob("model-00001-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors.index.json: names model-00001-of-.*not there"):
        GPT.from_pretrained(copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_fp32_unless_asked(copy, dtype):
    rewrite(copy, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    model = GPT.from_pretrained(copy)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = load_file(copy / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(model.wte.weight, stored.float())
    asked = GPT.from_pretrained(copy, dtype=dtype)
    assert {parameter.dtype for parameter in asked.parameters()} == {dtype}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps, which Linux has")
def test_fp32_weights_are_the_file_mapped_and_writing_them_leaves_the_file_alone(copy):
    before = (copy / "model.safetensors").read_bytes()
    model = GPT.from_pretrained(copy)
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in maps if str(copy) in line]
    spans = [range(int(start, 16), int(end, 16)) for start, end in mapped]
    assert all(any(weight.data_ptr() in span for span in spans) for weight in model.parameters())
    with torch.no_grad():
        model.wte.weight.add_(1)
    assert (copy / "model.safetensors").read_bytes() == before


def test_saving_over_the_folder_it_was_loaded_from(copy):
    model = GPT.from_pretrained(copy)
    expected = [parameter.clone() for parameter in model.parameters()]
    model.save_pretrained(copy)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))
    assert same(GPT.from_pretrained(copy), model)


def test_missing_unexpected_and_misshapen_tensors_are_named(copy):
    def damage(tensors):
        del tensors["transformer.ln_f.bias"]
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:8].clone()
        return {**tensors, "score.weight": torch.zeros(2)}

    rewrite(copy, damage)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(copy)
    assert str(error.value) == (
        f"{copy}: the weights do not fit its config.json: missing ln_f.bias; unexpected score.weight; "
        "wpe.weight is (8, 32), not (16, 32)"
    )


def test_a_square_projection_is_transposed_by_name(folder):
    """attn.c_proj is square, so forgetting its transpose passes every check of shapes."""
    stored = load_file(folder / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    assert torch.equal(GPT.from_pretrained(folder).h[0].attn.c_proj.weight, stored.t())


def test_a_pickle_is_refused_with_the_way_out(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only a pickle .* --revision refs/pr/1"):
        GPT.from_pretrained(copy)


def test_broken_files_are_named(copy):
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        GPT.from_pretrained(copy)
    (copy / "config.json").write_text('{\n"n_embd": ,')
    with pytest.raises(ValueError, match=r"config.json:2: not JSON"):
        GPT.from_pretrained(copy)
    (copy / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=f"^{copy}: config.json: model_type 'llama' is not 'gpt2'"):
        GPT.from_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json, so this is not a model"):
        GPT.from_pretrained(copy)


def test_the_exported_config_opens_in_transformers(folder, tmp_path):
    GPT.from_pretrained(folder).save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float32"
    idx = torch.randint(0, 120, (2, 16))
    with torch.no_grad():
        ours, theirs = GPT.from_pretrained(folder)(idx), model.eval()(idx).logits
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
