"""The training loop: pretraining and instruction tuning, written once.

It reads examples, not formats, and drives an engine, not a device. What a step does stands in `train` from top to
bottom: data, forward and backward, optimizer, metrics, evaluation.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minigpt.data.collate import Batch, collate
from minigpt.data.encode import Example
from minigpt.data.order import epoch_global_batches, lengths_of, replay_indices, shard
from minigpt.distributed import all_or_none, is_main, print0, rank, sum_over_ranks, world_size
from minigpt.files import remove, wait_until_visible
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import Engine
from minigpt.training.optim import learning_rate
from minigpt.training.out_of_memory import explain_out_of_memory
from minigpt.training.run.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from minigpt.training.run.folder import (
    CONFIG,
    EXPORT,
    EXPORT_BEST,
    LOSS_PICTURE,
    METRICS,
    is_resume_of,
    start_run,
    write_preempted_marker,
)
from minigpt.training.run.metrics import Metrics, losses_of
from minigpt.training.run.preemption import Preempted, Preemption
from minigpt.training.run.trackers import Reports

PAD = 0  # any id of the vocabulary: padding stands behind all that counts, and its targets are ignored
FILLER = Batch(torch.tensor([[PAD]]), torch.tensor([[-100]]))  # where a rank has nothing left: it weighs nothing
SHARED = "--output_dir must lie on storage that all ranks share"
MAX_SKIPPED_IN_A_ROW = 25  # from a loss scale of 65536 down to 1 it is 16, with DeepSpeed's patience some more


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
    skipped_steps: int = 0
    """Steps of fp16 that were not applied, because their gradients overflowed."""

    def table(self, folder: Path) -> str:
        """The run as a small table, with where its results lie."""
        skipped = f", {self.skipped_steps:,} of them skipped" if self.skipped_steps else ""
        rows = [
            ("steps", f"{self.steps:,} ({self.epochs:.2f} epochs){skipped}"),
            ("data seen", f"{self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"),
            ("training loss", f"{self.train_loss:.4f} (perplexity {perplexity(self.train_loss)})"),
        ]
        if self.val_loss is not None and self.val_loss_before is not None:
            change = f"{self.val_loss_before:.4f} -> {self.val_loss:.4f} (perplexity {perplexity(self.val_loss)})"
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
            rows.append(
                ("picture", f"none: {LOSS_PICTURE} needs matplotlib (pip install -c constraints.txt -e '.[plot]')")
            )
        rows.append(("chat", f"python chat.py --model_name_or_path {folder / EXPORT}"))
        return "\n".join(f"{name:16} {value}" for name, value in rows)


def train(
    config: TrainConfig,
    engine: Engine,
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
        FileExistsError: `output_dir` holds a run, and neither `resume` nor `overwrite_output_dir` is set.
        Preempted: SIGTERM or Ctrl-C came, and a checkpoint was written; leaves with exit code 75 if nobody catches it.
        FloatingPointError: the loss or the gradient is no longer a number.
        OutOfMemory: the device's memory is too small; the message says what the plan is and which flag comes next.
    """
    window_size = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()
    n_examples = len(train_data)
    if n_examples == 0:
        raise ValueError("the training data is empty: give more of it, or hold out less (--validation_split)")
    if replay_data is not None and len(replay_data) == 0:
        raise ValueError("the replay data is empty: give more of it (--replay_data)")
    steps_per_epoch = math.ceil(n_examples / window_size)
    total_steps = config.max_steps or config.num_train_epochs * steps_per_epoch
    eval_steps = config.eval_steps or max(1, math.ceil(total_steps / 10))
    if replay_data is None or replay_ratio == 0:
        replay_data, replayed = (), 0
    else:
        replayed = max(1, round(window_size * replay_ratio))
    lengths = np.concatenate([lengths_of(train_data), lengths_of(replay_data)])  # replayed examples are numbered behind
    order = {
        "window_size": window_size,
        "replayed": replayed,
        "seed": config.seed,
        "group_by_length": config.group_by_length,
        "data": _fingerprint(lengths, train_data, replay_data),
        "validation": _fingerprint(lengths_of(eval_data or ()), eval_data or ()),
    }
    output_dir = Path(config.output_dir) if config.output_dir else None

    def show_samples(step: int) -> None:
        if on_eval is not None:
            engine.module.eval()
            on_eval(engine.module, step)
            engine.module.train()

    def export_to(name: str) -> None:
        if export is not None and output_dir is not None:
            weights = engine.full_state_dict()
            with all_or_none():
                if is_main():
                    export(weights, output_dir / name)

    torch.manual_seed((config.seed + rank()) % 2**63)  # dropout
    result, losses = _begin(config, engine, output_dir, order, total_steps)
    first_step = result.steps
    if result.best_step == first_step < total_steps:  # a run that ended with its best has it in export/ alone
        export_to(EXPORT_BEST)
    started = time.perf_counter() - result.seconds
    skipped_in_a_row = 0

    with (
        explain_out_of_memory(
            *(config, engine.module.config, engine.device, lengths[:n_examples], lengths[n_examples:], replay_ratio),
            step=lambda: result.steps,
            evaluating=lambda: not engine.module.training,
        ),
        Preemption(listen=output_dir is not None) as preemption,
        Metrics(
            output_dir,
            total_steps,
            config.logging_steps,
            first_step,
            Reports(config, output_dir, first_step),
            eval_steps if eval_data else None,
        ) as metrics,
    ):
        engine.module.train()
        if eval_data and first_step == 0:
            result.val_loss_before = evaluate(engine, eval_data, config.per_device_eval_batch_size)
            metrics.evaluated(result.val_loss_before)
            show_samples(0)

        for step in range(first_step + 1, total_steps + 1):
            step_started = time.perf_counter()

            # ---- data: one window of examples, cut into micro-batches of similar length, and of them this rank's
            epoch, place = divmod(step - 1, steps_per_epoch)
            if place == 0 or step == first_step + 1:
                windows = epoch_global_batches(
                    lengths[:n_examples], window_size, config.seed, epoch, config.group_by_length
                )
            rows = windows[place]
            if replayed:
                rows = np.append(rows, n_examples + replay_indices(len(replay_data), replayed, config.seed, step - 1))
            batches = []
            for places in shard(lengths[rows], config.per_device_train_batch_size, rank(), world_size()):
                micro_batch = [
                    train_data[row] if row < n_examples else replay_data[row - n_examples]
                    for row in rows[places].tolist()
                ]
                batches.append(collate(micro_batch, PAD) if micro_batch else FILLER)
            n_tokens = int(sum_over_ranks(sum(int((batch.targets != -100).sum()) for batch in batches))[0])

            # ---- forward and backward: the mean over all of the window's supervised tokens, not a mean of means
            window_nll: Tensor | float = 0.0
            for batch in batches:
                nll_sum, _ = engine(batch)
                engine.backward(nll_sum / max(1, n_tokens) * world_size(), last=batch is batches[-1])
                window_nll = window_nll + nll_sum.detach()

            # ---- optimizer
            lr = learning_rate(step - 1 - result.skipped_steps, total_steps, config)
            loss = sum_over_ranks(float(window_nll))[0] / max(1, n_tokens)
            if not math.isfinite(loss) and not config.fp16:
                raise FloatingPointError(_why_not_finite(engine.module, step, f"the loss is {loss}", lr, losses))
            info = engine.step(lr)
            result.skipped_steps += info.skipped
            skipped_in_a_row = skipped_in_a_row + 1 if info.skipped else 0
            if info.skipped and (not config.fp16 or skipped_in_a_row == MAX_SKIPPED_IN_A_ROW):
                reason = f"the gradient norm is {info.grad_norm}"
                if config.fp16:
                    reason += f", {skipped_in_a_row} times in a row, at loss scale {info.loss_scale:g} now"
                raise FloatingPointError(_why_not_finite(engine.module, step, reason, lr, losses))

            # ---- metrics and evaluation
            losses.append(loss)
            tokens = int(lengths[rows].sum()) - len(rows)
            step_seconds = time.perf_counter() - step_started
            result.steps, result.epochs = step, step / steps_per_epoch
            result.tokens += tokens
            result.supervised_tokens += n_tokens
            line: dict[str, Any] = {
                "step": step,
                "epoch": round(step / steps_per_epoch, 4),
                "loss": loss,
                "lr": lr,
                "grad_norm": info.grad_norm,
                "tokens": result.tokens,
                "tokens_per_s": round(tokens / step_seconds, 1),
            }
            if config.fp16:
                line |= {"loss_scale": info.loss_scale, "skipped": info.skipped}
            if step == 1 and result.val_loss_before is not None:
                line["val_loss_before"] = result.val_loss_before
            if eval_data and (step % eval_steps == 0 or step == total_steps):
                val_loss = evaluate(engine, eval_data, config.per_device_eval_batch_size)
                if not math.isfinite(val_loss):  # the step just made broke the weights: nothing of them is to be kept
                    reason = f"the validation loss is {val_loss}"
                    raise FloatingPointError(_why_not_finite(engine.module, step, reason, lr, losses))
                result.val_loss = line["val_loss"] = val_loss
            metrics.log(line, step_seconds)
            if "val_loss" in line:
                show_samples(step)
                if result.best_val_loss is None or line["val_loss"] < result.best_val_loss:
                    result.best_val_loss, result.best_step = line["val_loss"], step
                    if step < total_steps:
                        export_to(EXPORT_BEST)

            # ---- checkpoint
            result.seconds = time.perf_counter() - started
            preempted = step < total_steps and preemption.requested()
            due = config.save_steps is not None and (step % config.save_steps == 0 or step == total_steps)
            if output_dir is not None and (due or preempted):
                progress = {
                    "order": order,
                    "recipe": _recipe(config),
                    "metrics_bytes": metrics.bytes_on_disk(),
                    "result": asdict(result),
                }
                saved = save_checkpoint(output_dir, step, engine, progress, config.save_total_limit)
                if preempted:
                    with all_or_none():  # nobody leaves before the file is there: the first to go ends them all
                        write_preempted_marker(output_dir, saved, preemption.heard)
                    raise Preempted

        # ---- the end
        export_to(EXPORT)
        if output_dir is not None and result.best_step == total_steps and is_main():
            remove(output_dir / EXPORT_BEST)  # the last is the best: one folder will do
    last = [loss for loss in losses[-math.ceil(total_steps / 10) :] if math.isfinite(loss)]
    result.train_loss = float(np.mean(last)) if last else math.nan
    return result


def _begin(
    config: TrainConfig, engine: Engine, output_dir: Path | None, order: dict[str, Any], total_steps: int
) -> tuple[TrainResult, list[float]]:
    """How far the run is: nowhere, or where its checkpoint left it. The run folder is ready for what comes.

    Returns:
        The result so far, and the loss of every step so far.
    """
    result = TrainResult(0, 0.0, 0, 0, math.nan, 0.0)
    seen = int(order["data"][:8], 16)
    if sum_over_ranks(seen)[0] != seen * world_size():
        raise ValueError("the ranks read different data: it must lie on storage that all share, or be copied whole")
    if output_dir is None:
        if config.resume:
            raise ValueError(f"--resume {config.resume} needs an output_dir, where the checkpoints are")
        return result, []
    with all_or_none():
        checkpoint = find_checkpoint(output_dir, config.resume)
    if sum_over_ranks(checkpoint is not None)[0] not in (0, world_size()):
        raise FileNotFoundError(f"{output_dir}: some ranks see checkpoints in it, others none: {SHARED}")
    metrics_bytes = 0
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, engine, config.seed)
        _check_order(checkpoint, progress["order"], order)
        metrics_bytes = progress["metrics_bytes"]
        result = TrainResult(**progress["result"])
        if not is_resume_of(output_dir, checkpoint) and result.best_step != result.steps:  # it lies in the other folder
            result.best_val_loss = result.best_step = None
        if result.steps > total_steps:
            raise ValueError(f"{checkpoint}: at step {result.steps:,} already, behind the {total_steps:,} of this run")
        print0(f"{checkpoint}: going on after step {result.steps:,} of {total_steps:,}")
        for name, value in _recipe(config).items():
            if progress["recipe"][name] != value:
                print0(f"{checkpoint}: --{name} {progress['recipe'][name]} then, {value} now")
    with all_or_none():
        if is_main():
            start_run(config, output_dir, checkpoint, metrics_bytes)
    with all_or_none():
        if not wait_until_visible(output_dir / CONFIG):
            raise FileNotFoundError(f"{output_dir}: rank 0 wrote into it, and rank {rank()} does not see it: {SHARED}")
    return result, losses_of(output_dir / METRICS)


@torch.no_grad()
def evaluate(engine: Engine, data: Sequence[Example], batch_size: int) -> float:
    """The mean loss over all supervised tokens of `data`, in nats. Leaves the module in train mode.

    Every rank calls it, and reads its own part.
    """
    engine.module.eval()
    nll, n_tokens = 0.0, 0.0
    for rows in shard(lengths_of(data), batch_size, rank(), world_size()):
        nll_sum, n = engine(collate([data[int(row)] for row in rows], PAD) if len(rows) else FILLER)
        nll, n_tokens = nll + nll_sum.item(), n_tokens + int(n)
    engine.module.train()
    nll, n_tokens = sum_over_ranks(nll, n_tokens)
    return nll / max(1, n_tokens)


def _fingerprint(lengths: np.ndarray, *datasets: Sequence[Example]) -> str:
    """What tells one set of data from another: the lengths, and of stores what they were built from."""
    contents = [getattr(data, "fingerprint", "") for data in datasets]
    return hashlib.sha256(lengths.tobytes() + repr(contents).encode()).hexdigest()


def _recipe(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run may change when it goes on, but not without a word."""
    names = (
        *("learning_rate", "lr_scheduler_type", "min_lr_ratio", "warmup_steps", "num_train_epochs", "max_steps"),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "dropout", "bf16", "fp16"),
    )
    return {name: getattr(config, name) for name in names}


def _check_order(checkpoint: Path, before: dict[str, Any], order: dict[str, Any]) -> None:
    """Refuses to go on in another order of data: what was read, and what is still to come, would no longer be known."""
    flags = {
        "window_size": "--per_device_train_batch_size x --gradient_accumulation_steps x ranks",
        "replayed": "--replay_data or --replay_ratio",
        "seed": "--seed",
        "group_by_length": "--group_by_length",
        "data": "the data, or how it is cut into examples,",
        "validation": "the validation data",
    }
    for name, what in flags.items():
        if before[name] != order[name]:
            values = f" ({before[name]} then, {order[name]} now)" if name not in ("data", "validation") else ""
            raise ValueError(f"{checkpoint}: cannot go on from it, because {what} changed{values}: set it back")


def _why_not_finite(model: nn.Module, step: int, reason: str, lr: float, losses: list[float]) -> str:
    if losses:
        return (
            f"step {step}: {reason} at learning rate {lr:.2e}; the loss before was {losses[-1]:.3f} "
            "(a lower --learning_rate, more --warmup_steps or a smaller --max_grad_norm help)"
        )
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    cause = f"are not finite themselves ({', '.join(broken[:3])})" if broken else "are finite, but too large"
    return f"step {step}: {reason}, at the very first: the weights that it starts from {cause}"


def perplexity(loss: float) -> str:
    """e to the loss, to be read; where that is too much for a float, what a float can hold."""
    return f"{math.exp(min(loss, 700.0)):,.2f}"
