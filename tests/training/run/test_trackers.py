"""A run's numbers in TensorBoard, read back with its own reader, and in a stand-in for wandb."""

import doctest
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from minigpt.settings.command_line import parse
from minigpt.settings.groups import TrainConfig
from minigpt.training.run import trackers as report_to
from minigpt.training.run.trackers import Reports

from ...ranks import on_ranks
from ...small_run import STEPS, killed_at, small_run

WITHOUT = "tensorboard is not installed: what it would read cannot be seen"


def read_back(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], str]:
    """What TensorBoard shows: each scalar's steps and values, and the text of the configuration."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=WITHOUT)
    found = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    [*_, text] = found.Tensors("config/text_summary")
    return scalars, text.tensor_proto.string_val[0].decode()


def check_scalars(folder: Path) -> None:
    """They are metrics.jsonl's, each step once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scalars, _ = read_back(folder)
    names = ("epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s")
    assert set(scalars) == {*(f"train/{name}" for name in names), "val/loss"}
    for name in names:
        assert [step for step, _ in scalars[f"train/{name}"]] == list(range(1, STEPS + 1))
        assert [value for _, value in scalars[f"train/{name}"]] == pytest.approx([line[name] for line in lines])
    evaluated = [(line["step"], pytest.approx(line["val_loss"])) for line in lines if "val_loss" in line]
    assert scalars["val/loss"] == [(0, pytest.approx(lines[0]["val_loss_before"])), *evaluated]


def test_docstring_example():
    assert doctest.testmod(report_to) == doctest.TestResults(failed=0, attempted=1)


def test_tensorboard_reads_every_step(tmp_path):
    pytest.importorskip("tensorboard", reason=WITHOUT)
    on_ranks(2, small_run, tmp_path / "run", {"report_to": ["tensorboard"]})
    check_scalars(tmp_path / "run")
    assert "    learning_rate: 0.003\n" in read_back(tmp_path / "run")[1]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1  # rank 0's


def test_a_killed_run_goes_on_without_gap_or_double(tmp_path):
    """What was told before the checkpoint is on disk, also where the process was killed right behind it."""
    pytest.importorskip("tensorboard", reason=WITHOUT)
    settings = {"report_to": ["tensorboard"], "resume": "auto"}
    for step, place in ((10, "micro-batch"), (14, "metrics")):
        with pytest.raises(AssertionError, match="SIGKILL|-9"):
            on_ranks(1, small_run, tmp_path / "run", settings, killed_at(step, place))
    on_ranks(1, small_run, tmp_path / "run", settings)
    check_scalars(tmp_path / "run")


def line(step: int, loss: float) -> dict[str, float]:
    return {"train/loss": loss * step}


def test_what_was_told_past_the_checkpoint_is_hidden(tmp_path):
    pytest.importorskip("tensorboard", reason=WITHOUT)
    config = TrainConfig(report_to=["tensorboard"])
    for first_step, last, loss in ((0, 12, 1.0), (9, 14, 2.0), (11, 15, 3.0)):
        reports = Reports(config, tmp_path, first_step)
        if first_step == 0:
            reports.log(0, {"val/loss": 5.0})
        for step in range(first_step + 1, last + 1):
            reports.log(step, line(step, loss))
        reports.close(failed=step != 15)
    expected = [(s, 1.0 * s) for s in range(1, 10)] + [(s, 2.0 * s) for s in (10, 11)]
    expected += [(s, 3.0 * s) for s in range(12, 16)]
    assert read_back(tmp_path)[0] == {"val/loss": [(0, 5.0)], "train/loss": expected}
    reports = Reports(config, tmp_path, 0)  # another run takes the place
    reports.log(1, {"train/loss": math.inf})  # an overflow in fp16
    reports.close(failed=False)
    assert read_back(tmp_path)[0] == {"train/loss": [(1, math.inf)]}


def test_what_was_told_before_a_checkpoint_is_on_disk_with_it(tmp_path):
    """TensorBoard's writer is a thread with a queue: what a killed run had in it would be a gap."""
    pytest.importorskip("tensorboard", reason=WITHOUT)
    reports = Reports(TrainConfig(report_to=["tensorboard"]), tmp_path, 0)
    for step in range(1, 100):
        reports.log(step, line(step, 1.0))
        reports.flush()
        if step % 20 == 0:
            assert len(read_back(tmp_path)[0]["train/loss"]) == step
    reports.close(failed=False)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_said_once_and_left_out(name, tmp_path, monkeypatch, capsys):
    for module in [module for module in sys.modules if module.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    reports = Reports(TrainConfig(report_to=[name]), tmp_path, 0)
    reports.log(1, line(1, 1.0))
    reports.flush()
    reports.close(failed=False)
    said = f"--report_to {name}: {name} is not installed (pip install -c constraints.txt -e '.[{name}]'); left out\n"
    assert capsys.readouterr().out == said


def test_the_flag(tmp_path, monkeypatch, capsys):
    assert parse(TrainConfig, []).report_to == []
    assert parse(TrainConfig, ["--report_to", "tensorboard", "wandb"]).report_to == ["tensorboard", "wandb"]
    with pytest.raises(ValueError, match="--report_to: expected one of none, tensorboard, wandb, got 'wandbb'"):
        parse(TrainConfig, ["--report_to", "wandbb"])
    Reports(parse(TrainConfig, ["--report_to", "none"]), tmp_path, 0).log(1, line(1, 1.0))
    monkeypatch.setenv("RANK", "1")
    Reports(TrainConfig(report_to=["tensorboard", "wandb"]), tmp_path, 0).log(1, line(1, 1.0))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("RANK")
    Reports(TrainConfig(report_to=["tensorboard"]), None, 0)
    assert capsys.readouterr().out == "--report_to tensorboard: needs an output_dir; left out\n"


# ---- wandb


class FakeWandB(ModuleType):
    """Keeps what it is told in a file, because it lives in another process than the test."""

    def __init__(self, file: Path, broken: str = ""):
        super().__init__("wandb")
        self.tell = lambda *call: file.open("a").write(json.dumps(call) + "\n")
        self.broken = broken

    def init(self, **settings):
        self._call("init", settings)
        return self

    def log(self, numbers, step):
        self._call("log", step, numbers)

    def finish(self, exit_code):
        self._call("finish", exit_code)

    def _call(self, name, *arguments):
        self.tell(name, *arguments)
        if name == self.broken:
            raise ConnectionError("api.wandb.ai cannot be reached")


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """`wandb(broken="log")` puts a stand-in into place, and gives a function that reads what it was told."""
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def put(broken: str = ""):
        file = tmp_path / "calls.jsonl"
        file.unlink(missing_ok=True)
        monkeypatch.setitem(sys.modules, "wandb", FakeWandB(file, broken))
        return lambda: [json.loads(text) for text in file.read_text().splitlines()]

    return put


def test_wandb_is_told_every_step(wandb, tmp_path):
    calls = wandb()
    on_ranks(2, small_run, tmp_path / "run", {"report_to": ["wandb"]})
    [_, settings], *logged, last = calls()
    assert settings["config"]["learning_rate"] == 0.003
    assert {**settings, "config": 0, "id": 0} == {
        **{"project": "minigpt", "name": "run", "dir": str(tmp_path / "run"), "resume": "allow"},
        **{"config": 0, "id": 0},
    }  # no mode: WANDB_MODE=offline is wandb's to read
    assert [step for _, step, _ in logged] == list(range(STEPS + 1))
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0][2] == {"val/loss": lines[0]["val_loss_before"]}
    assert [numbers["train/loss"] for _, _, numbers in logged[1:]] == [line["loss"] for line in lines]
    assert last == ["finish", 0]


def test_a_run_that_goes_on_is_the_same_one_at_wandb(wandb, tmp_path):
    calls = wandb()
    settings = {"report_to": ["wandb"], "resume": "auto"}
    with pytest.raises(AssertionError):
        on_ranks(1, small_run, tmp_path / "run", settings, killed_at(8, "metrics"))
    on_ranks(1, small_run, tmp_path / "run", settings)
    starts = [call[1]["id"] for call in calls() if call[0] == "init"]
    assert len(starts) == 2
    assert starts[0] == starts[1]
    assert [call[1] for call in calls() if call[0] == "log"] == [*range(9), *range(7, 21)]
    on_ranks(1, small_run, tmp_path / "run", {"report_to": ["wandb"], "overwrite_output_dir": True})
    assert calls()[-STEPS - 3][1]["id"] not in starts  # another run


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_no_run_ends_because_of_wandb(wandb, broken, tmp_path, capfd):
    calls = wandb(broken)
    assert on_ranks(1, small_run, tmp_path / "run", {"report_to": ["wandb"]})[0][0] == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert [name for name, *_ in calls()].count(broken) == 1  # asked once
    assert capfd.readouterr().out.count("--report_to wandb: api.wandb.ai cannot be reached; left out") == 1


def test_wandbs_own_settings_count(wandb, tmp_path, monkeypatch):
    calls = wandb()
    for name, value in {"WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_RUN_ID": "r"}.items():
        monkeypatch.setenv(name, value)
    Reports(TrainConfig(report_to=["wandb"]), tmp_path, 0).close(failed=True)
    [_, settings], last = calls()
    assert (settings["project"], settings["name"], settings["id"]) == ("p", "n", "r")
    assert last == ["finish", 1]
