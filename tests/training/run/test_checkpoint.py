"""The exported folder, opened by minigpt and by transformers; checkpoints on a disk that is full."""

import gc
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from minigpt.data.collate import collate
from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import OtherRankFailed, is_main, sum_over_ranks
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import Engine, make_engine
from minigpt.training.run.checkpoint import SPARE_BYTES, export, load_checkpoint, save_checkpoint

from ...ranks import on_ranks

TEMPLATE = get_template("alpaca", output="Answer")
FILES = [
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "model.safetensors"),
    *("prompt_template.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.tiny()


@pytest.fixture(scope="module")
def model(tokenizer):
    """Every weight is drawn at std 0.2, so that nothing is lost unseen: no bias is 0, no gain is 1."""
    torch.manual_seed(0)
    eot = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=96, n_embd=48, n_layer=3, n_head=4, **eot)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "export"
    export(folder, model, tokenizer, TEMPLATE, training="Trained on air.")
    return folder


def test_the_folder_holds_what_the_design_lists(folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_transformers_opens_the_model(folder, model):
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(judge) is transformers.GPT2LMHeadModel
    ids = torch.randint(model.config.vocab_size, (4, 96), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = judge(ids).logits, model(ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert judge.generation_config.eos_token_id == judge.config.eos_token_id == model.config.eos_token_id
    assert judge.config.n_positions == 96


def test_transformers_opens_the_tokenizer(folder, tokenizer):
    judge = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (
        "The capital of France is Paris.",
        "  a\n\n\tb  ",
        "日本語 😀 e\u0301",
        "don't 12345 ###",
        "<|endoftext|",
    ):
        assert judge(text)["input_ids"] == tokenizer.encode(text)
        assert judge.decode(tokenizer.encode(text)) == text
    assert (judge.eos_token_id, judge.model_max_length, len(judge)) == (tokenizer.eot_id, 96, tokenizer.vocab_size)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]], ids=["", "system"])
def test_transformers_renders_the_template(folder, system):
    judge = transformers.AutoTokenizer.from_pretrained(folder)
    assert judge.chat_template == (folder / "chat_template.jinja").read_text() == TEMPLATE.to_jinja()
    messages = [
        *system,
        {"role": "user", "content": "Add.", "input": "2 and 3"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "Why?"},
    ]
    expected = "".join(segment.text for segment in TEMPLATE.render(messages, add_generation_prompt=True))
    assert judge.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    assert "### Answer:\n5<|endoftext|>\n\n### Instruction:\nWhy?\n\n### Answer:\n" in expected


def test_minigpt_opens_all_of_it(folder, model, tokenizer):
    again = GPT.from_pretrained(folder)
    assert again.config == model.config
    assert Tokenizer.from_pretrained(folder).fingerprint == tokenizer.fingerprint
    assert get_template(folder) == TEMPLATE
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_tied_head_is_not_written(folder, model):
    tensors = load_file(folder / "model.safetensors")
    assert not any("lm_head" in name for name in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == model.num_parameters()
    assert torch.equal(tensors["transformer.wte.weight"], model.wte.weight)
    assert torch.equal(tensors["transformer.h.1.mlp.c_fc.weight"], model.h[1].mlp.c_fc.weight.t())


def test_loaded_and_written_again_is_the_same_to_the_byte(folder, tmp_path):
    export(tmp_path, GPT.from_pretrained(folder), Tokenizer.from_pretrained(folder), get_template(folder))
    for name in FILES:
        if name != "README.md":  # which says how the model came about
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_weights_that_an_engine_gathered_go_before_the_models_own(model, tokenizer, tmp_path):
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    export(tmp_path, model, tokenizer, TEMPLATE, gathered)
    again = GPT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in gathered.items())


def test_an_older_export_is_replaced(model, tokenizer, folder, tmp_path):
    export(
        tmp_path,
        GPT(GPTConfig(tokenizer.vocab_size, n_positions=8, n_embd=4, n_layer=1, n_head=1)),
        tokenizer,
        get_template("none"),
    )
    opened = GPT.from_pretrained(tmp_path)  # memory-mapped: the file it stands on is replaced, not written into
    before = opened.wte.weight.clone()
    export(tmp_path, model, tokenizer, TEMPLATE, training="Trained on air.")
    assert torch.equal(opened.wte.weight, before)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_card(folder, model):
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {"pipeline_tag": "text-generation", "tags": ["gpt2", "minigpt"]}
    shape = "3 layers, 48 wide, 4 heads, context 96, vocabulary"
    assert f"{shape} {model.config.vocab_size:,}: {model.num_parameters():,} parameters." in body
    assert "\n\nTrained on air.\n\n" in body
    assert "### Instruction:\nName the capital of France.\n\n### Answer:\nParis.<|endoftext|>\n```" in body


def test_numbers_in_the_files(folder, tokenizer):
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["dtype"]) == ("gpt2", ["GPT2LMHeadModel"], "float32")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}


# ---- random numbers


def test_the_random_numbers_are_those_of_the_runs_device(tmp_path, monkeypatch):
    """Of `--device cuda:1` under plain python, those of cuda:0 were kept, which is the current device there."""
    kept = {0: torch.zeros(16, dtype=torch.uint8), 1: torch.arange(16, dtype=torch.uint8)}

    def index(device: object = "cuda") -> int:
        return torch.device(device).index or 0

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": kept[index(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": kept.update({index(device): state}))
    engine = stepped_engine({})
    engine.device = torch.device("cuda", 1)
    folder = save_checkpoint(tmp_path, 1, engine, {})
    drawn = torch.rand(3)
    kept[1] = torch.ones(16, dtype=torch.uint8)
    monkeypatch.setattr(engine, "load", lambda folder: None)  # there is no such device here
    load_checkpoint(folder, engine, seed=0)
    assert kept[0].tolist() == [0] * 16
    assert kept[1].tolist() == list(range(16))
    assert torch.rand(3).equal(drawn)


# ---- a full disk


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here, which takes root: a full disk is not tried")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def stepped_engine(settings: dict) -> Engine:
    """An engine of 0.1 million parameters, after a step: all that a checkpoint has is there."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(61, n_positions=32, n_embd=64, n_layer=2, n_head=2))
    engine = make_engine(model, TrainConfig(**settings))
    engine.backward(engine(collate([[1, 2, 3, 4]], 0)).sum / 4, last=True)
    engine.step(1e-3)
    return engine


def save_while_the_disk_fills(disk: Path, settings: dict) -> list[tuple[int, str, list[str]]]:
    """Another process fills the disk but for so many tenths of what a save takes, once its space was checked.

    Returns what became of each save, and what lay in the folder then.
    """
    engine = stepped_engine(settings)
    run, ballast = disk / "run", disk / "ballast"
    files = list(save_checkpoint(run, 1, engine, {}).rglob("*"))
    size = sum(path.stat().st_blocks * 512 for path in files if path.is_file())
    assert size - SPARE_BYTES < engine.checkpoint_bytes <= size  # what an error will say of it
    found, real_save = [], engine.save

    def save(folder: Path) -> None:
        gc.collect()  # the error of the save before keeps its file open, and so on the disk
        sum_over_ranks(0)
        if is_main():
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - size * tenths // 10))
        sum_over_ranks(0)
        real_save(folder)

    engine.save = save
    for tenths in range(10):
        try:
            save_checkpoint(run, 2, engine, {})
            message = "saved"
        except (OSError, OtherRankFailed) as error:
            message = f"{type(error).__name__}: {error}"
        sum_over_ranks(0)
        found.append((tenths, message, sorted(path.name for path in (run / "checkpoints").iterdir())))
        sum_over_ranks(0)
        if is_main():
            ballast.unlink()
    engine.save = real_save
    assert load_checkpoint(run / "checkpoints" / "step-1", engine, seed=0)["step"] == 1
    assert save_checkpoint(run, 2, engine, {}, keep=1).name == "step-2"
    engine.close()
    return found


@pytest.mark.parametrize(("ranks", "stage"), [(1, None), (2, None), (2, 0), (2, 2), (2, 3)])
def test_a_disk_that_fills_in_the_middle_of_a_save_costs_that_save_alone(disk, tmp_path, ranks, stage):
    """On every rank: one that failed alone left the others waiting for it."""
    settings = {}
    if stage is not None:
        settings["deepspeed"] = str(tmp_path / "deepspeed.json")
        (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    results = on_ranks(ranks, save_while_the_disk_fills, disk, settings, timeout=60)
    for outcomes in zip(*results, strict=True):
        for tenths, message, names in outcomes:
            assert names == ["step-1"], (tenths, message)
        messages = [message for _, message, _ in outcomes]
        assert not {"saved"} & {*messages}
        errors = [message for message in messages if not message.startswith("OtherRankFailed: ")]
        for message in errors:
            assert re.fullmatch(
                rf"OSError: {disk}/run/checkpoints/step-2: cannot be written \((.|\n)+\); it needs [\d,]+ bytes, "
                r"and [\d,]+ are free; earlier checkpoints stand \(--save_total_limit keeps fewer\)",
                message,
            )
        assert errors
    assert sorted(path.name for path in (disk / "run" / "checkpoints").iterdir()) == ["step-2"]


def test_too_little_space_is_told_before_anything_is_written(disk, monkeypatch):
    engine = stepped_engine({})
    save_checkpoint(disk, 1, engine, {})
    monkeypatch.setattr(engine, "save", None)  # not reached
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(free - engine.checkpoint_bytes - SPARE_BYTES + 4096))
    with pytest.raises(OSError) as caught:
        save_checkpoint(disk, 2, engine, {})
    parameters = engine.module.num_parameters()
    assert str(caught.value) == (
        f"{disk}/checkpoints/step-2: cannot be written (too little space); it needs {12 * parameters + 2**20:,} bytes, "
        f"and {shutil.disk_usage(disk).free:,} are free; earlier checkpoints stand (--save_total_limit keeps fewer)"
    )
    assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step-1"]
    (disk / "ballast").unlink()
    monkeypatch.undo()
    assert save_checkpoint(disk, 2, engine, {}).is_dir()
