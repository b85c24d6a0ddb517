"""What a run writes while it trains: metrics, exports, checkpoints. The loop calls it; it never calls the loop.

It keeps the run's counters (`result`, `losses`), decides which weights are the best, and ends a preempted run. Nothing
in it computes a gradient or changes a weight, so whoever reads the training step may skip this file.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from minigpt.distributed import all_or_none, is_main
from minigpt.files import remove
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import Engine
from minigpt.training.optim import StepInfo
from minigpt.training.run.checkpoint import save_checkpoint
from minigpt.training.run.folder import EXPORT, EXPORT_BEST, write_preempted_marker
from minigpt.training.run.metrics import Metrics
from minigpt.training.run.preemption import Preempted, Preemption
from minigpt.training.run.resume import recipe, start_or_resume
from minigpt.training.run.trackers import Reports

Export = Callable[[dict[str, Tensor], Path], None]


class Recorder:
    """Every rank makes one and calls its methods in the same order; rank 0 alone writes metrics and exports.

    Construction loads the checkpoint that `config.resume` names, if any. As a context manager it listens for SIGTERM
    and Ctrl-C and keeps metrics.jsonl open.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        order: dict[str, Any],
        total_steps: int,
        eval_steps: int | None = None,
        export: Export | None = None,
    ):
        """`eval_steps`: None without evaluations."""
        self.config = config
        self.engine = engine
        self.order = order
        self.total_steps = total_steps
        self.eval_steps = eval_steps
        self.export = export
        self.output_dir = Path(config.output_dir) if config.output_dir else None
        self.result, self.losses = start_or_resume(config, engine, self.output_dir, order, total_steps)
        self.first_step = self.result.steps
        if self.result.best_step == self.first_step < total_steps:  # that run ended with its best: only in export/
            self._export(EXPORT_BEST)
        self.started = time.perf_counter() - self.result.seconds

    def __enter__(self) -> "Recorder":
        with ExitStack() as stack:
            self.preemption = stack.enter_context(Preemption(listen=self.output_dir is not None))
            self.metrics = stack.enter_context(
                Metrics(
                    self.output_dir,
                    self.total_steps,
                    self.config.logging_steps,
                    self.first_step,
                    Reports(self.config, self.output_dir, self.first_step),
                    self.eval_steps,
                )
            )
            self.stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stack.__exit__(kind, error, traceback)

    def evaluated_before(self, val_loss: float) -> None:
        """The evaluation before the first step."""
        self.result.val_loss_before = val_loss
        self.metrics.evaluated(val_loss)

    def step_line(
        self,
        step: int,
        epoch: float,
        means: dict[str, float],
        lr: float,
        info: StepInfo,
        tokens: int,
        weight: int,
        seconds: float,
    ) -> dict[str, Any]:
        """Adds a step to the counters and returns its line of metrics.jsonl, to which the loop may add `val_loss`.

        Args:
            means: the loss and the objective's extras.
            tokens: tokens read, padding not counted.
            weight: the step's denominator.
        """
        self.losses.append(means["loss"])
        result = self.result
        result.steps, result.epochs = step, epoch
        result.tokens += tokens
        result.supervised_tokens += weight
        line: dict[str, Any] = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": means["loss"],
            "lr": lr,
            "grad_norm": info.grad_norm,
            "tokens": result.tokens,
            "tokens_per_s": round(tokens / seconds, 1),
        }
        line |= {name: mean for name, mean in means.items() if name != "loss"}
        if self.config.fp16:
            line |= {"loss_scale": info.loss_scale, "skipped": info.skipped}
        if step == 1 and result.val_loss_before is not None:
            line["val_loss_before"] = result.val_loss_before
        return line

    def write(self, line: dict[str, Any], seconds: float) -> None:
        """Writes and prints a step's line. `seconds` are the step's own, without its evaluation."""
        if "val_loss" in line:
            self.result.val_loss = line["val_loss"]
        self.metrics.log(line, seconds)

    def export_if_best(self, step: int, val_loss: float) -> None:
        """Exports the weights with the lowest validation loss so far; the last step's are exported by `finish`."""
        if self.result.best_val_loss is None or val_loss < self.result.best_val_loss:
            self.result.best_val_loss, self.result.best_step = val_loss, step
            if step < self.total_steps:
                self._export(EXPORT_BEST)

    def save_checkpoint(self, step: int) -> None:
        """Writes a checkpoint, if one is due or the run was asked to end. Every rank calls after every step.

        Raises:
            Preempted: SIGTERM or Ctrl-C came, on any rank, and the checkpoint is written.
        """
        self.result.seconds = time.perf_counter() - self.started
        last, every = step == self.total_steps, self.config.save_steps
        preempted = not last and self.preemption.requested()
        due = every is not None and (step % every == 0 or last)
        if self.output_dir is None or not (due or preempted):
            return
        progress = {
            "order": self.order,
            "recipe": recipe(self.config),
            "metrics_bytes": self.metrics.bytes_on_disk(),
            "result": asdict(self.result),
        }
        folder = save_checkpoint(self.output_dir, step, self.engine, progress, self.config.save_total_limit)
        if preempted:
            with all_or_none():  # a barrier: torchrun kills all ranks once one exits, so wait for preempted.json
                write_preempted_marker(self.output_dir, folder, self.preemption.heard)
            raise Preempted

    def finish(self) -> None:
        """After the last step: its export, and the training loss of the result."""
        self._export(EXPORT)
        if self.output_dir is not None and self.result.best_step == self.total_steps and is_main():
            remove(self.output_dir / EXPORT_BEST)  # the last weights are the best: one folder is enough
        last_losses = self.losses[-math.ceil(self.total_steps / 10) :]
        finite = [loss for loss in last_losses if math.isfinite(loss)]
        self.result.train_loss = float(np.mean(finite)) if finite else math.nan

    def _export(self, name: str) -> None:
        if self.export is not None and self.output_dir is not None:
            weights = self.engine.full_state_dict()
            with all_or_none():
                if is_main():
                    self.export(weights, self.output_dir / name)
