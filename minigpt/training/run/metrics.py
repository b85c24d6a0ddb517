"""A run's output: progress line or bar, `metrics.jsonl` with every step, and `loss.png`."""

import contextlib
import json
import math
import os
import statistics
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

from minigpt.distributed import clock, is_main, print0, progress_bar
from minigpt.training.run.folder import LOSS_PICTURE, METRICS
from minigpt.training.run.trackers import Reports, numbers_of

TIMED_STEPS = 200  # most recent steps whose median estimates the time of a step
FIRST_ESTIMATE = 5.0  # seconds of steps after which a line with the time left is printed, even if none is due
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # tqdm's own time left counts pauses
PICTURE_SECONDS = 10.0  # a run draws loss.png at most this often: a drawing takes half a second


class Metrics:
    """Writes each step's numbers on rank 0, into `folder` if given. A context manager, which draws loss.png at the end.

    A run resumed after `first_step` steps appends to the existing file. `reports` get the same numbers.
    `eval_steps`: steps between evaluations, which the time left includes; None without evaluations.
    """

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        logging_steps: int,
        first_step: int = 0,
        reports: Reports | None = None,
        eval_steps: int | None = None,
    ):
        self.total_steps = total_steps
        self.logging_steps = logging_steps
        self.first_step = first_step
        self.reports = reports
        self.eval_steps = eval_steps
        self.step_seconds: deque[float] = deque(maxlen=TIMED_STEPS)
        self.pause_seconds = 0.0  # between steps since the last evaluation
        self.eval_seconds = 0.0  # of the last evaluation, the sample answers and the checkpoints since the one before
        self.estimated = False
        self.folder = folder if is_main() else None
        self.file: IO[str] | None = None

    def __enter__(self) -> "Metrics":
        if self.folder is not None:
            self.file = open(self.folder / METRICS, "a", encoding="utf-8")
        self.bar = progress_bar(self.total_steps, "step", "training", initial=self.first_step)
        self.bar.bar_format = BAR
        self.mark = self.drawn = time.perf_counter()
        return self

    def evaluated(self, val_loss: float) -> None:
        """Prints the evaluation before the first step."""
        self.bar.clear()
        print0(f"step 0/{self.total_steps:,}  val_loss {val_loss:.4f}")
        if self.reports is not None:
            self.reports.log(0, numbers_of({"val_loss": val_loss}))
        self.eval_seconds, self.mark = time.perf_counter() - self.mark, time.perf_counter()

    def log(self, line: dict[str, Any], seconds: float) -> None:
        """A step: all of it to the file, the bar moved on, a line printed where one is due.

        `seconds` are the step's own. The rest of the time since the last call went into an evaluation, sample
        answers or a checkpoint.
        """
        first = line["step"] == self.first_step + 1
        if not first:  # which prepares kernels and memory
            self.step_seconds.append(seconds)
        self.pause_seconds += time.perf_counter() - self.mark - seconds
        if "val_loss" in line:
            self.eval_seconds, self.pause_seconds = self.pause_seconds, 0.0
        if self.file is not None:
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
            self.file.write(json.dumps(finite) + "\n")  # JSON knows no infinity, which an overflow in fp16 is
            self.file.flush()
        step = line["step"]
        if self.reports is not None:
            self.reports.log(step, numbers_of(line))
        text = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  grad {line['grad_norm']:.2f}"
        evaluated = f"  val_loss {line['val_loss']:.4f}" if "val_loss" in line else ""
        left = "" if first and step < self.total_steps else f"  {clock(self._seconds_left(step))} left"
        speed = f"{line['tokens_per_s']:,.0f} tok/s{left}"
        self.bar.set_postfix_str(f"{text}  {speed}", refresh=False)
        self.bar.update(step - self.bar.n)
        due = step % self.logging_steps == 0 or first
        if not (self.estimated or first) and sum(self.step_seconds) > FIRST_ESTIMATE:
            due = self.estimated = True
        if evaluated or (self.bar.disable and due):
            self.bar.clear()
            scale = f"  scale {line['loss_scale']:g}" if "loss_scale" in line else ""
            skipped = "  skipped" if line.get("skipped") else ""
            print0(f"step {step:,}/{self.total_steps:,}  {text}{scale}{skipped}{evaluated}  {speed}")
        if evaluated and self.folder is not None and time.perf_counter() - self.drawn >= PICTURE_SECONDS:
            draw_losses(self.folder / METRICS, self.folder / LOSS_PICTURE)
            self.drawn = time.perf_counter()
        self.mark = time.perf_counter()

    def _seconds_left(self, step: int) -> float:
        """Of the remaining steps, each as long as the median of the newest ones, and of their evaluations.

        Not the mean, because one slow step would distort the estimate for the rest of the run.
        """
        evaluations = 0
        if self.eval_steps:
            evaluations = math.ceil(self.total_steps / self.eval_steps) - step // self.eval_steps
        steps = self.total_steps - step
        return steps and steps * statistics.median(self.step_seconds) + evaluations * self.eval_seconds

    def bytes_on_disk(self) -> int:
        """Length of metrics.jsonl, which a checkpoint records. A run that goes on from there tells nothing twice, so
        what was told until now must be on disk."""
        if self.reports is not None:
            self.reports.flush()
        if self.file is None:
            return 0
        os.fsync(self.file.fileno())
        return self.file.tell()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if self.reports is not None:
            self.reports.close(failed=error is not None)
        if self.file is not None and self.folder is not None:
            self.file.close()
            with contextlib.suppress(OSError):  # a full disk: the error that ends the run is the one to show
                draw_losses(self.folder / METRICS, self.folder / LOSS_PICTURE)


def losses_of(metrics: Path) -> list[float]:
    """The loss of every step so far. Raises `ValueError` for a line that is none."""
    if not metrics.exists():
        return []
    losses = []
    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), 1):
        try:
            losses.append(_number(json.loads(line)["loss"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{metrics}:{number}: not a step's metrics; remove the file to resume without it"
            ) from error
    return losses


def draw_losses(metrics: Path, picture: Path) -> bool:
    """Training and validation loss over steps, with the tokens read along the top. False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        return False
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if not steps:
        return False
    before = [(0, line["val_loss_before"]) for line in steps[:1] if "val_loss_before" in line]
    evaluations = before + [(line["step"], line["val_loss"]) for line in steps if "val_loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per supervised token)")
    xs = [line["step"] for line in steps]
    losses = [_number(line["loss"]) for line in steps]
    axes.plot(xs, losses, color="tab:blue", alpha=0.35, linewidth=1)
    axes.plot(xs, _smooth(losses), color="tab:blue", label="training")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
    tokens_per_step = steps[-1]["tokens"] / steps[-1]["step"]
    top = axes.secondary_xaxis("top", functions=(lambda x: x * tokens_per_step, lambda x: x / tokens_per_step))
    top.set_xlabel("tokens")
    top.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1.2M
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    return True


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _smooth(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average without the pull of its start; what is no number is passed over."""
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        if not math.isnan(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(mean / weight if weight else math.nan)
    return smooth
