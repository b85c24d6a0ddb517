"""The training loop: pretraining and instruction tuning, written once.

It reads examples, not formats, and drives an engine, not a device. What a step does stands in `train` from top to
bottom: data, forward and backward, optimizer, metrics, evaluation.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minigpt.arguments import TrainConfig
from minigpt.data.collate import collate
from minigpt.data.dataset import Example
from minigpt.data.order import deal, epoch_windows, replay_rows
from minigpt.distributed import is_main
from minigpt.training.engine import TorchEngine
from minigpt.training.metrics import Metrics
from minigpt.training.optim import learning_rate
from minigpt.training.run import EXPORT, EXPORT_BEST, LOSS_PICTURE, remove, start_run

PAD = 0  # any id of the vocabulary: padding stands behind all that counts, and its targets are ignored


@dataclass
class TrainResult:
    """What a run came to. Losses are means over supervised tokens, in nats."""

    steps: int
    epochs: float
    tokens: int
    """Tokens read, padding not counted."""
    supervised_tokens: int
    train_loss: float
    """Over the last tenth of the steps."""
    seconds: float
    val_loss_before: float | None = None
    val_loss: float | None = None
    """At the last step."""
    best_val_loss: float | None = None
    best_step: int | None = None

    def table(self, folder: Path) -> str:
        """The run as a small table, with where its results lie."""
        rows = [
            ("steps", f"{self.steps:,} ({self.epochs:.2f} epochs)"),
            ("data seen", f"{self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"),
            ("training loss", f"{self.train_loss:.4f} (perplexity {_perplexity(self.train_loss)})"),
        ]
        if self.val_loss is not None and self.val_loss_before is not None:
            change = f"{self.val_loss_before:.4f} -> {self.val_loss:.4f} (perplexity {_perplexity(self.val_loss)})"
            rows.append(("validation loss", f"{change}, lowest {self.best_val_loss:.4f} at step {self.best_step:,}"))
        rows += [
            ("time", f"{self.seconds:,.0f} s"),
            ("export", str(folder / EXPORT)),
        ]
        if self.best_step not in (None, self.steps):
            rows.append(("lowest loss", str(folder / EXPORT_BEST)))
        if (folder / LOSS_PICTURE).exists():
            rows.append(("picture", str(folder / LOSS_PICTURE)))
        else:
            rows.append(("picture", f"none: {LOSS_PICTURE} needs matplotlib (pip install 'minigpt[plot]')"))
        rows.append(("chat", f"python chat.py --model_name_or_path {folder / EXPORT}"))
        return "\n".join(f"{name:16} {value}" for name, value in rows)


def train(
    config: TrainConfig,
    engine: TorchEngine,
    train_data: Sequence[Example],
    eval_data: Sequence[Example] | None = None,
    on_eval: Callable[[Any, int], None] | None = None,
    export: Callable[[dict[str, Tensor], Path], None] | None = None,
    *,
    replay_data: Sequence[Example] | None = None,
    replay_ratio: float = 0.25,
) -> TrainResult:
    """Trains the engine's model.

    Args:
        config: how. `output_dir` None writes nothing to disk.
        engine: from `make_engine`.
        train_data: each example once per epoch.
        eval_data: its loss is taken before the first step, every `eval_steps`, and after the last.
        on_eval: called after each evaluation with the module in eval mode and the step, to show sample answers.
        export: called with the weights and a folder, at the end and whenever the validation loss is the lowest yet.
        replay_data: examples from earlier training, against forgetting. Each step reads some beside its own: about
            `replay_ratio` for each example of a full window, and at least one.

    Raises:
        ValueError: there is nothing to train on.
        FileExistsError: `output_dir` holds a run, and `overwrite_output_dir` is not set.
        FloatingPointError: the loss or the gradient is no longer a number.
    """
    window_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    lengths = _lengths(train_data)
    if len(lengths) == 0:
        raise ValueError("the training data is empty: give more of it, or hold out less (--validation_split)")
    if replay_data is not None and len(replay_data) == 0:
        raise ValueError("the replay data is empty")
    steps_per_epoch = math.ceil(len(lengths) / window_size)
    total_steps = config.max_steps or config.num_train_epochs * steps_per_epoch
    eval_steps = config.eval_steps or max(1, math.ceil(total_steps / 10))
    replayed = max(1, round(window_size * replay_ratio)) if replay_data is not None and replay_ratio > 0 else 0

    torch.manual_seed(config.seed)  # dropout
    output_dir = Path(config.output_dir) if config.output_dir else None
    if output_dir is not None and is_main():
        start_run(config, output_dir)
    result = TrainResult(0, 0.0, 0, 0, math.nan, 0.0)
    losses: list[float] = []
    applied_steps = 0
    started = time.perf_counter()

    def show_samples(step: int) -> None:
        if on_eval is not None:
            engine.module.eval()
            on_eval(engine.module, step)
            engine.module.train()

    with Metrics(output_dir, total_steps, config.logging_steps) as metrics:
        engine.module.train()
        if eval_data:
            result.val_loss_before = evaluate(engine, eval_data, config.per_device_eval_batch_size)
            metrics.evaluated(result.val_loss_before)
            show_samples(0)

        for step in range(1, total_steps + 1):
            step_started = time.perf_counter()

            # ---- data: one window of examples, cut into micro-batches of similar length
            epoch, place = divmod(step - 1, steps_per_epoch)
            if place == 0:
                windows = epoch_windows(lengths, window_size, config.seed, epoch, config.group_by_length)
            examples = [train_data[int(index)] for index in windows[place]]
            if replay_data is not None and replayed:
                examples += [
                    replay_data[int(i)] for i in replay_rows(len(replay_data), replayed, config.seed, step - 1)
                ]
            batches = [
                collate([examples[index] for index in micro_batch], PAD)
                for micro_batch in deal([len(e) for e in examples], config.per_device_train_batch_size)
            ]
            n_tokens = sum(int((batch.targets != -100).sum()) for batch in batches)

            # ---- forward and backward: the mean over all of the window's supervised tokens, not a mean of means
            window_nll: Tensor | float = 0.0
            for batch in batches:
                nll_sum, _ = engine(batch)
                engine.backward(nll_sum / max(1, n_tokens), last=batch is batches[-1])
                window_nll = window_nll + nll_sum.detach()

            # ---- optimizer
            lr = learning_rate(applied_steps, total_steps, config)
            loss = float(window_nll) / max(1, n_tokens)
            if not math.isfinite(loss):
                raise FloatingPointError(_why_not_finite(engine.module, step, f"the loss is {loss}", lr, losses))
            info = engine.step(lr)
            applied_steps += not info.skipped
            if info.skipped and info.loss_scale == 1.0:  # nothing was scaled, so a smaller scale will not help
                reason = f"the gradient norm is {info.grad_norm}"
                raise FloatingPointError(_why_not_finite(engine.module, step, reason, lr, losses))

            # ---- metrics and evaluation
            losses.append(loss)
            tokens = sum(len(example) - 1 for example in examples)
            result.tokens += tokens
            result.supervised_tokens += n_tokens
            line: dict[str, Any] = {
                "step": step,
                "epoch": round(step / steps_per_epoch, 4),
                "loss": loss,
                "lr": lr,
                "grad_norm": info.grad_norm,
                "tokens": result.tokens,
                "tokens_per_s": round(tokens / (time.perf_counter() - step_started), 1),
            }
            if step == 1 and result.val_loss_before is not None:
                line["val_loss_before"] = result.val_loss_before
            if eval_data and (step % eval_steps == 0 or step == total_steps):
                val_loss = evaluate(engine, eval_data, config.per_device_eval_batch_size)
                if not math.isfinite(val_loss):  # the step just made broke the weights: nothing of them is to be kept
                    reason = f"the validation loss is {val_loss}"
                    raise FloatingPointError(_why_not_finite(engine.module, step, reason, lr, losses))
                result.val_loss = line["val_loss"] = val_loss
            metrics.log(line)
            if "val_loss" in line:
                show_samples(step)
                if result.best_val_loss is None or line["val_loss"] < result.best_val_loss:
                    result.best_val_loss, result.best_step = line["val_loss"], step
                    if export is not None and output_dir is not None and step < total_steps:
                        export(engine.full_state_dict(), output_dir / EXPORT_BEST)

    result.steps, result.epochs = total_steps, total_steps / steps_per_epoch
    result.train_loss = float(np.mean(losses[-math.ceil(total_steps / 10) :]))
    result.seconds = time.perf_counter() - started
    if export is not None and output_dir is not None:
        export(engine.full_state_dict(), output_dir / EXPORT)
        if result.best_step == total_steps:  # the last is the best: one folder will do
            remove(output_dir / EXPORT_BEST)
    return result


@torch.no_grad()
def evaluate(engine: TorchEngine, data: Sequence[Example], batch_size: int) -> float:
    """The mean loss over all supervised tokens of `data`, in nats. Leaves the module in train mode."""
    engine.module.eval()
    nll, n_tokens = 0.0, 0
    for rows in deal(_lengths(data), batch_size):
        nll_sum, n = engine(collate([data[int(row)] for row in rows], PAD))
        nll, n_tokens = nll + nll_sum.item(), n_tokens + int(n)
    engine.module.train()
    return nll / max(1, n_tokens)


def _lengths(data: Sequence[Example]) -> np.ndarray:
    """Ids of each example; a store knows them without reading the examples."""
    return np.asarray(data.lengths if hasattr(data, "lengths") else [len(data[i]) for i in range(len(data))])


def _why_not_finite(model: nn.Module, step: int, reason: str, lr: float, losses: list[float]) -> str:
    if losses:
        return (
            f"step {step}: {reason} at learning rate {lr:.2e}; the loss before was {losses[-1]:.3f} "
            "(a lower --learning_rate, more --warmup_steps or a smaller --max_grad_norm help)"
        )
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    cause = f"are not finite themselves ({', '.join(broken[:3])})" if broken else "are finite, but too large"
    return f"step {step}: {reason}, at the very first: the weights that it starts from {cause}"


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):,.2f}"
