"""A run's numbers in TensorBoard and in Weights & Biases, beside metrics.jsonl: `--report_to`.

Neither is needed, and neither can end a run: what is not installed, cannot be reached or breaks on the way is told
once, and left out.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from minigpt.distributed import is_main, print0
from minigpt.files import remove
from minigpt.settings.groups import TrainConfig


class Tracker(Protocol):
    """What takes a run's numbers."""

    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def flush(self) -> None:
        """What was logged is on disk, or on its way."""

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in the run folder's `tensorboard/`. A resumed run hides what was written after its checkpoint."""

    def __init__(self, config: TrainConfig, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        place = folder / "tensorboard"
        if first_step == 0:
            remove(place)  # of a run whose place this one takes
        self.writer = SummaryWriter(str(place), purge_step=first_step + 1)
        settings = "".join(f"    {name}: {value}\n" for name, value in asdict(config).items())  # four blanks: verbatim
        self.writer.add_text("config", settings, first_step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb's, in the run folder's `wandb/`; a resumed run continues the same wandb run.

    wandb's own environment counts: `WANDB_PROJECT`, `WANDB_MODE=offline`, `WANDB_API_KEY`, ...
    """

    def __init__(self, config: TrainConfig, folder: Path, first_step: int):
        import wandb  # type: ignore[import-not-found]  # an extra

        kept = folder / "wandb" / "id"
        kept.parent.mkdir(exist_ok=True)
        if first_step == 0 or not kept.exists():
            kept.write_text(os.environ.get("WANDB_RUN_ID") or uuid4().hex[:8], encoding="utf-8")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minigpt"),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=asdict(config),
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)  # wandb passes over steps that it has

    def flush(self) -> None:
        """wandb has a process of its own for that."""

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


_TRACKERS: dict[str, Callable[[TrainConfig, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


class Reports:
    """The trackers that a run reports to; on rank 0 alone."""

    def __init__(self, config: TrainConfig, folder: Path | None, first_step: int):
        """`first_step`: the last one done before this start; what was logged beyond it counts no longer."""
        self._trackers: dict[str, Tracker] = {}
        for name in dict.fromkeys(config.report_to if is_main() else ()):
            if name == "none":
                continue
            try:
                if folder is None:
                    raise ValueError("needs an output_dir")
                self._trackers[name] = _TRACKERS[name](config, folder, first_step)
            except ModuleNotFoundError as error:
                fix = f"pip install -c constraints.txt -e '.[{name}]'"
                print0(f"--report_to {name}: {error.name} is not installed ({fix}); left out")
            except Exception as error:
                print0(f"--report_to {name}: {_in_one_line(error)}; left out")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, numbers))

    def flush(self) -> None:
        self._each(lambda tracker: tracker.flush())

    def close(self, failed: bool) -> None:
        self._each(lambda tracker: tracker.close(failed))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # a full disk, a lost connection, anything: the run is worth more
                print0(f"--report_to {name}: {_in_one_line(error)}; left out from here on")
                del self._trackers[name]


def numbers_of(line: dict[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl by the names that trackers group by.

    >>> numbers_of({"step": 3, "loss": 2.5, "lr": 1e-4, "val_loss": 2.75})
    {'train/loss': 2.5, 'train/lr': 0.0001, 'val/loss': 2.75}

    `val_loss_before` belongs to step 0, where it is logged by itself.
    """
    passed_over = ("step", "val_loss_before")
    return {
        "val/loss" if name == "val_loss" else f"train/{name}": float(value)
        for name, value in line.items()
        if name not in passed_over
    }


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
