"""Asked to end: the step is finished, the run is saved, all ranks go, and nothing is lost."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from minigpt.distributed import rank
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import make_engine
from minigpt.training.loop import train
from minigpt.training.optim import StepInfo, learning_rate
from minigpt.training.run.checkpoint import checkpoints
from minigpt.training.run.preemption import Preempted, Preemption

from ...ranks import on_ranks
from ...small_run import assert_equal, at_step, evidence, examples, small_model, small_run


def ended_after(run: Path, settings: dict, step: int, numbers: list[int], signalled: int) -> tuple[int, float]:
    """On every rank: one of them gets the signals in the middle of the step. The exit code, and the seconds it took."""
    heard = [0.0]

    def send() -> None:
        heard[0] = time.monotonic()
        if rank() == signalled:
            for number in numbers:
                os.kill(os.getpid(), number)

    code, _ = small_run(run, settings, at_step(step, send))
    return code, time.monotonic() - heard[0]


@pytest.mark.parametrize(
    ("ranks", "signalled", "stage", "number"),
    [
        (1, 0, None, signal.SIGTERM),
        (1, 0, None, signal.SIGINT),
        (2, 0, None, signal.SIGTERM),
        (2, 1, None, signal.SIGINT),
        (2, 1, 2, signal.SIGTERM),
        pytest.param(2, 0, 2, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, 1, 3, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_one_rank_is_asked_and_all_save_and_go(tmp_path, ranks, signalled, stage, number):
    """One rank that left alone would have left the others waiting for it for ever."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 2 // ranks, "resume": "auto"}
    if stage is not None:
        settings["deepspeed"] = str(tmp_path / "deepspeed.json")
        (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    run = tmp_path / "run"
    outcomes = on_ranks(ranks, ended_after, run, settings, 5, [number], signalled)
    assert [code for code, _ in outcomes] == [75] * ranks
    assert max(seconds for _, seconds in outcomes) < 10
    assert [path.name for path in checkpoints(run)] == ["step-3", "step-5"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5  # the step it came in was finished
    assert json.loads((run / "preempted.json").read_text()) == {
        "checkpoint": f"{run}/checkpoints/step-5",
        "signal": signal.Signals(number).name if signalled == 0 else "on another rank",
        "exit_code": 75,
    }
    assert not (run / "export").exists()

    on_ranks(ranks, small_run, run, settings)  # the same command again
    assert not (run / "preempted.json").exists()
    on_ranks(ranks, small_run, tmp_path / "undisturbed", settings)
    assert_equal(evidence(run), evidence(tmp_path / "undisturbed"))


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGINT, signal.SIGINT], [signal.SIGINT, signal.SIGTERM, signal.SIGINT]],
    ids=["", "TERM between"],
)
def test_the_second_interrupt_is_immediate(tmp_path, numbers):
    with pytest.raises(AssertionError, match=r"KeyboardInterrupt\n$"):
        on_ranks(1, ended_after, tmp_path / "run", {}, 5, numbers, 0)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-3"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path):
    ((code, _),) = on_ranks(1, ended_after, tmp_path / "run", {}, 20, [signal.SIGTERM], 0)
    assert code == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "preempted.json").exists()


def test_without_a_folder_there_is_nothing_to_save_and_an_interrupt_is_an_interrupt():
    """It was swallowed: the run told that it would end, and went on."""
    config = TrainConfig(max_steps=4)
    engine = make_engine(small_model(), config)
    real_step = engine.step

    def step(lr: float) -> StepInfo:
        if lr == learning_rate(2, 4, config):
            os.kill(os.getpid(), signal.SIGINT)
        return real_step(lr)

    engine.step = step
    with pytest.raises(KeyboardInterrupt):
        train(config, engine, examples(8))


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Preempted), Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested()
        raise Preempted
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
