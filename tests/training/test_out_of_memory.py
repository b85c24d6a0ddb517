"""A GPU that is too small, faked: one line says what the run takes and what to change, and nothing is lost."""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from minigpt import GPTConfig
from minigpt.distributed import OutOfMemory, explained_if_out_of_memory, fails_alone, is_out_of_memory, rank
from minigpt.settings.command_line import in_one_line, run
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import make_engine
from minigpt.training.loop import train
from minigpt.training.out_of_memory import explain_out_of_memory, next_changes
from minigpt.training.run.checkpoint import checkpoints, save_checkpoint

from ..ranks import on_ranks
from ..small_run import assert_equal, at_step, evidence, examples, small_model, small_run

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.90 GiB of which 1 GiB is free."
GPT2, LENGTHS = GPTConfig.preset("gpt2"), [513] * 64


def raise_cuda(*_):
    raise torch.OutOfMemoryError(CUDA)


@dataclass
class Config(TrainConfig):
    """A run of `small_run`."""


def script(folder: Path, settings: dict, step: int | None, failing: int = 0, path: Path | None = None) -> int:
    """What a script does around `small_run`, on every rank: the exit code of `run`. `path` receives standard error."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(sys, "argv", ["script"])
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    if path is not None:
        monkeypatch.setattr(sys, "stderr", open(f"{path}-{rank()}", "w"))  # noqa: SIM115
    act = raise_cuda if rank() == failing else lambda: None
    try:
        run(lambda _: small_run(folder, settings, at_step(step, act) if step else None), Config)
    except SystemExit as leaving:
        codes.append(leaving.code)
    finally:
        sys.stderr.flush()
        monkeypatch.undo()
    return codes[0] if codes else 0


def test_the_line_the_exit_code_and_the_resume(tmp_path, capfd):
    folder = tmp_path / "run"
    assert script(folder, {"resume": "auto"}, step=5) == 1
    line = (
        r"error: step 5: out of memory: this run takes about 0\.00 GiB a process by --plan's estimate; "
        r"next: --per_device_train_batch_size 1 --gradient_accumulation_steps 4 \(0\.00 GiB, the same steps\), "
        r"then .*; \S+/run/checkpoints/step-3 is intact \(--resume latest\)\n"
    )
    assert re.fullmatch(line, capfd.readouterr().err)
    assert [path.name for path in checkpoints(folder)] == ["step-3"]

    advised = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "resume": "latest"}
    assert script(folder, advised, step=None) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))


def test_the_same_command_goes_on_as_if_nothing_had_been(tmp_path):
    assert script(tmp_path / "run", {"resume": "auto"}, step=5) == 1
    on_ranks(1, small_run, tmp_path / "run", {"resume": "auto"})
    on_ranks(1, small_run, tmp_path / "undisturbed", {})
    assert_equal(evidence(tmp_path / "run"), evidence(tmp_path / "undisturbed"))


@pytest.mark.parametrize("stage", [None, 1])
def test_one_rank_without_memory_ends_all(tmp_path, stage):
    """The others wait for it in a collective call; none hangs, and each says in a line why it ends."""
    settings = {"per_device_train_batch_size": 1, "resume": "auto"}
    if stage is not None:
        settings["deepspeed"] = str(tmp_path / "deepspeed.json")
        (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    folder, told = tmp_path / "run", tmp_path / "err"
    assert on_ranks(2, script, folder, settings, 5, 1, told) == [1, 1]
    own, others = (tmp_path / f"err-{number}" for number in (1, 0))
    assert re.fullmatch(
        r"rank 1: error: step 5: out of memory: .*step-3 is intact \(--resume latest\)\n", own.read_text()
    )
    assert re.fullmatch(r"error: another rank exited; .*\n", others.read_text())
    assert on_ranks(2, script, folder, settings, None) == [0, 0]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 20


def test_nccl_is_not_said_farewell_where_the_others_would_not_hear(monkeypatch):
    def in_error(device: str, error: type[BaseException]) -> bool:
        try:
            raise error
        except BaseException:
            return fails_alone(device)

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert in_error("cuda", torch.OutOfMemoryError)
    assert not in_error("cpu", torch.OutOfMemoryError)  # gloo tells them
    assert not in_error("cuda", SystemExit)  # preempted: all ranks leave together
    assert not fails_alone("cuda")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not in_error("cuda", torch.OutOfMemoryError)


def advised(config: TrainConfig, shape: GPTConfig = GPT2) -> list[str]:
    """The flags alone."""
    return [re.sub(r" \(.*", "", text) for text in next_changes(config, shape, LENGTHS)[1]]


def test_the_next_flag_is_one_that_changes_something(monkeypatch):
    offload = "--deepspeed configs/deepspeed/zero3_offload.json"
    checkpointing = "--gradient_checkpointing"
    assert advised(TrainConfig(bf16=True)) == [
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2",
        checkpointing,
        f"{offload} --bf16",
    ]
    assert advised(TrainConfig(bf16=True, per_device_train_batch_size=9, gradient_accumulation_steps=2))[0] == (
        "--per_device_train_batch_size 3 --gradient_accumulation_steps 6"
    )
    small = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    assert advised(TrainConfig(bf16=True, **small)) == [f"{offload} --bf16"]  # one GPU divides nothing
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert advised(TrainConfig(fp16=True, **small), GPTConfig.preset("gpt2-xl")) == [
        "--deepspeed configs/deepspeed/zero2_fp16.json",
        "--deepspeed configs/deepspeed/zero3_fp16.json",
        f"{offload} --fp16",
    ]
    assert "--deepspeed configs/deepspeed/zero3_fp16.json" not in advised(
        TrainConfig(fp16=True, **small)
    )  # its buffers
    assert advised(TrainConfig(deepspeed="configs/deepspeed/zero3_offload.json", bf16=True, **small)) == []


def test_a_batch_that_the_deepspeed_file_fixes_is_not_advised(tmp_path):
    (tmp_path / "x.json").write_text('{"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}')
    assert advised(TrainConfig(deepspeed=str(tmp_path / "x.json"), bf16=True))[0] == "--gradient_checkpointing"


def test_each_estimate_is_less_than_the_one_before():
    needed, changes = next_changes(TrainConfig(bf16=True), GPT2, LENGTHS)
    amounts = [needed / 2**30, *(float(re.search(r"\((\S+) GiB", text)[1]) for text in changes)]
    assert amounts == sorted(set(amounts), reverse=True)


@pytest.mark.parametrize(
    ("foreign", "told"), [(0.2, ""), (3.0, r", 3\.00 GiB of it held outside this PyTorch")], ids=["", "others"]
)
def test_on_a_gpu_the_line_says_what_is_there(monkeypatch, foreign, told):
    total, ours = int(11.9 * 2**30), 8 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - ours - int(foreign * 2**30), total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: ours)
    with pytest.raises(OutOfMemory) as error, explain_out_of_memory(TrainConfig(), GPT2, "cuda:0", LENGTHS):
        raise_cuda()
    line = (
        r"setting up: out of GPU memory: this run takes about \S+ GiB a GPU by --plan's estimate; "
        r"the GPU has 11\.90 GiB"
    )
    assert re.match(line + told + "; next: --per_device_train", str(error.value))


def test_in_an_evaluation_its_own_batch_is_what_to_change():
    engine = make_engine(small_model(), TrainConfig())
    real_call = type(engine).__call__

    class Failing(type(engine)):
        def __call__(self, batch):
            return real_call(self, batch) if self.module.training else raise_cuda()

    engine.__class__ = Failing
    config = TrainConfig(max_steps=2, per_device_eval_batch_size=6)
    with pytest.raises(
        OutOfMemory, match="^evaluation at step 0: out of memory; next: --per_device_eval_batch_size 3$"
    ):
        train(config, engine, examples(8), examples(3))


def test_an_unfinished_checkpoint_is_no_full_disk(tmp_path, monkeypatch):
    engine = make_engine(small_model(), TrainConfig())
    monkeypatch.setattr(engine, "save", raise_cuda)
    with pytest.raises(torch.OutOfMemoryError):
        save_checkpoint(tmp_path, 1, engine, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^a bug$"), explain_out_of_memory(TrainConfig(), GPT2, "cpu", LENGTHS):
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="^a bug$"), explained_if_out_of_memory("less"):
        raise RuntimeError("a bug")


def test_what_a_cpu_says_counts_too():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)
    assert in_one_line(error.value).startswith("out of memory (tried to allocate 4503599627370496 bytes): use a ")
    assert in_one_line(torch.OutOfMemoryError(CUDA)).startswith("out of memory (tried to allocate 2.00 GiB): use a ")


def test_the_suggestions_fit_into_a_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(OutOfMemory) as error, explain_out_of_memory(TrainConfig(fp16=True), GPT2, "cpu", LENGTHS):
        raise_cuda()
    assert str(error.value).count(", then ") == 2
