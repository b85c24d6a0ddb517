"""A run of a few steps, small enough to be ended in a hundred ways: what a script does between its data and export.

Each function runs on every rank of a world that `on_ranks` forks. Dropout is on, windows have several micro-batches,
the last one of an epoch is short, and evaluations and exports fall in between.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from minigpt.data.encode import Example
from minigpt.distributed import rank, world_size
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import Engine, make_engine
from minigpt.training.loop import train
from minigpt.training.run import checkpoint, metrics
from minigpt.training.run.checkpoint import checkpoints, find_checkpoint
from minigpt.training.run.folder import run_folder
from minigpt.training.run.preemption import Preempted

STEPS = 20
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "max_steps": STEPS,
    "eval_steps": 7,
    "save_steps": 3,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


def places(step: int) -> list[str]:
    """Where in a step a run can be killed."""
    names = ["micro-batch", "optimizer", "line", "metrics"]
    if step % SETTINGS["save_steps"] == 0 or step == STEPS:
        names += ["files", "manifest", "renamed"]
        if step > SETTINGS["save_steps"] * SETTINGS["save_total_limit"]:
            names.append("rotation")
    return [*names, "export"] if step == STEPS else names


def examples(count: int, seed: int = 0) -> list[Example]:
    """Unequal lengths, and unequal shares of supervised tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, 30, count)
    return [Example(random.integers(0, 61, n), np.arange(n) >= random.integers(1, n - 1)) for n in lengths]


def small_model(dropout: float = 0.1, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT(GPTConfig(61, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2, **dropouts))


def small_run(
    folder: Path,
    settings: dict[str, Any],
    before: Callable[[Engine, Path], None] | None = None,
    dropout: float = 0.1,
    count: int = 27,
) -> tuple[int, list[list[int]]]:
    """Trains into `folder`. A run that goes on starts from other weights, so that all of it comes from its checkpoint.

    Args:
        before: gets engine and folder before the first step, to lay a mine.
        count: examples there are.

    Returns:
        The exit code, and the examples that this rank read in each step.
    """
    config = TrainConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    (folder.parent / f"{folder.name}.pid-{rank()}").write_text(str(os.getpid()))
    seen: list[list[int]] = [[]]

    class Watched(list):
        lengths = np.array([len(example) for example in examples(count)])

        def __getitem__(self, index: Any) -> Any:
            seen[-1].append(index)
            return super().__getitem__(index)

    undrawn = mock.patch.object(metrics, "draw_losses", lambda *_: False)  # drawing takes longer than all the rest
    with undrawn, run_folder(config, "unused"):
        model = small_model(dropout, seed=1 if find_checkpoint(folder, config.resume) else 0)
        engine = make_engine(model, config)
        real_step = engine.step
        engine.step = lambda lr: (seen.append([]), real_step(lr))[1]
        try:
            if before is not None:
                before(engine, folder)
            train(
                config,
                engine,
                Watched(examples(count)),
                examples(5, seed=1),
                export=lambda weights, to: model.save_pretrained(to, weights),
            )
        except Preempted as preempted:
            return int(preempted.code), seen[:-1]
        finally:
            engine.close()
    return 0, seen[:-1]


def at_step(step: int, act: Callable[[], None], micro_batch: int = 1) -> Callable[[Engine, Path], None]:
    """For `before`: calls `act` within a step, after the backward of a micro-batch, counted from 1."""

    def lay(engine: Engine, folder: Path) -> None:
        found = find_checkpoint(folder, "auto")
        now = {"step": 1 + (int(found.name.removeprefix("step-")) if found else 0), "micro_batch": 0}
        real_backward = engine.backward

        def backward(loss: torch.Tensor, last: bool) -> None:
            real_backward(loss, last)
            now["micro_batch"] += 1
            if (now["step"], now["micro_batch"]) == (step, micro_batch):
                act()
            if last:
                now.update(step=now["step"] + 1, micro_batch=0)

        engine.backward = backward

    return lay


def killed_at(step: int, place: str) -> Callable[[Engine, Path], None]:
    """For `before`: SIGKILL for all ranks at this place of this step, as the first of them comes there."""

    def lay(engine: Engine, folder: Path) -> None:
        def die(*_: Any) -> None:
            for other in range(world_size()):
                if other != rank():
                    os.kill(int((folder.parent / f"{folder.name}.pid-{other}").read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        def arm() -> None:  # in this step, and so before it comes there
            if place == "micro-batch":
                die()
            elif place == "optimizer":
                engine.step = _then(engine.step, die)
            elif place == "line":
                metrics.Metrics.log = lambda self, line, _: (
                    _then(_half_of_a_line, die)(self, line) if self.file else None
                )
            elif place == "metrics":
                metrics.Metrics.log = _then(metrics.Metrics.log, die)
            elif place == "export":
                engine.full_state_dict = die
            elif place == "files":  # of the engine's, and nothing else yet
                checkpoint._save_random_state = die
            elif place == "manifest":  # all of it written, and nothing renamed
                checkpoint.to_disk = die
            elif place == "renamed":
                checkpoint.to_disk = lambda path: die() if path.name == "checkpoints" else None
            elif place == "rotation":
                checkpoint.remove = lambda path: _then(_half_removed, die)(path) if path.exists() else None

        at_step(step, arm)(engine, folder)

    return lay


def _then(function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., None]:
    def both(*args: Any) -> None:
        function(*args)
        act()

    return both


def _half_of_a_line(self: metrics.Metrics, line: dict[str, Any]) -> None:
    assert self.file is not None
    self.file.write(json.dumps(line)[:20])
    self.file.flush()


def _half_removed(path: Path) -> None:
    (path / "model.safetensors").unlink()


def evidence(folder: Path) -> dict[str, Any]:
    """All that two equal runs must have in common: bytes, and what was measured apart from time."""
    last = checkpoints(folder)[-1]
    files = [*folder.glob("export*/*"), *last.glob("*.safetensors"), last / "engine.json"]
    found: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]
    found["trainer.json"] = json.loads((last / "trainer.json").read_text())
    del found["trainer.json"]["result"]["seconds"], found["trainer.json"]["metrics_bytes"]
    kept = [path.name for path in checkpoints(folder)][-SETTINGS["save_total_limit"] :]  # one more: no save since
    found["checkpoints"] = [*kept, *(path.name for path in (folder / "checkpoints").glob("*.tmp"))]
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The names that differ, instead of a page of bytes."""
    differing = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    assert not differing, differing
