"""The training loop: pretraining, instruction tuning and any other objective, written once.

It reads examples, not formats, and drives an engine, not a device. `train` is a step's whole order of effects, from
top to bottom: data, forward and backward, optimizer, metrics and evaluation, checkpoint. What is minimised is in
objectives.py, the device in engines/, and what is written to disk in run/recorder.py.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minigpt.data.order import epoch_global_batches, lengths_of, replay_indices, shard
from minigpt.distributed import rank, sum_over_ranks, world_size
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import Engine
from minigpt.training.objectives import Objective
from minigpt.training.optim import learning_rate
from minigpt.training.out_of_memory import explain_out_of_memory
from minigpt.training.run.recorder import Export, Recorder
from minigpt.training.run.result import TrainResult
from minigpt.training.run.resume import data_order

MAX_SKIPPED_IN_A_ROW = 25  # a loss scale of 65536 takes 16 halvings to reach 1; DeepSpeed's patience adds some steps


def train(
    config: TrainConfig,
    engine: Engine,
    train_data: Sequence[Any],
    eval_data: Sequence[Any] | None = None,
    on_eval: Callable[[Any, int], None] | None = None,
    export: Export | None = None,
    *,
    replay_data: Sequence[Any] | None = None,
    replay_ratio: float = 0.25,
    objective: Objective | None = None,
) -> TrainResult:
    """Trains the engine's model.

    Args:
        config: the settings. `output_dir` None writes nothing to disk.
        engine: from `make_engine`.
        train_data: Examples, or what else the objective's `collate` takes; each is read once per epoch.
        eval_data: evaluated before the first step, every `eval_steps`, and after the last.
        on_eval: called after each evaluation with the module in eval mode and the step, to show sample answers.
        export: called with the weights and a folder, at the end and whenever the validation loss is the lowest yet.
        replay_data: examples of earlier training, against forgetting. Each step reads some in addition to its own:
            about `replay_ratio` for each example of a full global batch, and at least one.
        objective: what to minimise; None is the engine's, which is `NextToken()` unless `make_engine` was given one.

    Raises:
        ValueError: there is nothing to train on.
        FileExistsError: `output_dir` holds a run, and neither `resume` nor `overwrite_output_dir` is set.
        Preempted: SIGTERM or Ctrl-C came, and a checkpoint was written; exits with code 75 if nobody catches it.
        FloatingPointError: the loss or the gradient is not finite.
        OutOfMemory: the device's memory is too small; the message says what the plan is and which flag comes next.
    """
    n_examples = len(train_data)
    if n_examples == 0:
        raise ValueError("the training data is empty: give more of it, or hold out less (--validation_split)")
    if replay_data is not None and len(replay_data) == 0:
        raise ValueError("the replay data is empty: give more of it (--replay_data)")
    if objective is None:
        objective = engine.objective
    engine.objective = objective

    global_batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()
    steps_per_epoch = math.ceil(n_examples / global_batch_size)
    total_steps = config.max_steps or config.num_train_epochs * steps_per_epoch
    eval_steps = config.eval_steps or max(1, math.ceil(total_steps / 10))
    if replay_data is None or replay_ratio == 0:
        replay_data, n_replayed = (), 0
    else:
        n_replayed = max(1, round(global_batch_size * replay_ratio))
    lengths = np.concatenate([lengths_of(train_data), lengths_of(replay_data)])  # index n_examples: first replayed one
    order = data_order(config, global_batch_size, n_replayed, lengths, train_data, replay_data, eval_data or ())

    torch.manual_seed((config.seed + rank()) % 2**63)  # dropout
    recorder = Recorder(config, engine, order, total_steps, eval_steps if eval_data else None, export)
    result = recorder.result
    first_step, skipped_in_a_row = result.steps, 0

    with (
        explain_out_of_memory(
            *(config, engine.module.config, engine.device, lengths[:n_examples], lengths[n_examples:], replay_ratio),
            step=lambda: result.steps,
            evaluating=lambda: not engine.module.training,
        ),
        recorder,
    ):
        engine.module.train()
        if eval_data and first_step == 0:
            recorder.evaluated_before(evaluate(engine, eval_data, config.per_device_eval_batch_size))
            _show_samples(engine, on_eval, 0)

        for step in range(first_step + 1, total_steps + 1):
            step_started = time.perf_counter()

            # ---- data: one global batch of examples, cut into micro-batches of similar length; this rank's share
            epoch, index = divmod(step - 1, steps_per_epoch)
            if index == 0 or step == first_step + 1:
                global_batches = epoch_global_batches(
                    lengths[:n_examples], global_batch_size, config.seed, epoch, config.group_by_length
                )
            global_batch = global_batches[index]
            if n_replayed:
                replayed = replay_indices(len(replay_data), n_replayed, config.seed, step - 1)
                global_batch = np.append(global_batch, n_examples + replayed)
            batches = []
            for indices in shard(lengths[global_batch], config.per_device_train_batch_size, rank(), world_size()):
                items = [
                    train_data[i] if i < n_examples else replay_data[i - n_examples]
                    for i in global_batch[indices].tolist()
                ]
                batches.append(objective.collate(items))  # no items: a filler of weight zero
            weight = int(sum_over_ranks(sum(objective.weight(batch) for batch in batches))[0])

            # ---- forward and backward: the mean over the whole global batch, not a mean of micro-batches' means
            sums: dict[str, Tensor | float] = defaultdict(float)
            for batch in batches:
                loss = engine(batch)
                engine.backward(loss.sum / max(1, weight) * world_size(), last=batch is batches[-1])
                for name, value in {"loss": loss.sum, **loss.extras}.items():
                    sums[name] = sums[name] + value.detach()

            # ---- optimizer
            lr = learning_rate(step - 1 - result.skipped_steps, total_steps, config)
            totals = sum_over_ranks(*(float(value) for value in sums.values()))
            means = {name: total / max(1, weight) for name, total in zip(sums, totals)}
            if not math.isfinite(means["loss"]) and not config.fp16:
                raise _not_finite(engine.module, step, f"the loss is {means['loss']}", lr, recorder.losses)
            info = engine.step(lr)
            result.skipped_steps += info.skipped
            skipped_in_a_row = skipped_in_a_row + 1 if info.skipped else 0
            if info.skipped and (not config.fp16 or skipped_in_a_row == MAX_SKIPPED_IN_A_ROW):
                reason = f"the gradient norm is {info.grad_norm}"
                if config.fp16:
                    reason += f", {skipped_in_a_row} times in a row, at loss scale {info.loss_scale:g} now"
                raise _not_finite(engine.module, step, reason, lr, recorder.losses)

            # ---- metrics and evaluation
            tokens = int(lengths[global_batch].sum()) - len(global_batch)  # the shift drops one of each example
            seconds = time.perf_counter() - step_started
            line = recorder.step_line(step, step / steps_per_epoch, means, lr, info, tokens, weight, seconds)
            if eval_data and (step % eval_steps == 0 or step == total_steps):
                line["val_loss"] = evaluate(engine, eval_data, config.per_device_eval_batch_size)
                if not math.isfinite(line["val_loss"]):  # this step broke the weights: write nothing of them
                    reason = f"the validation loss is {line['val_loss']}"
                    raise _not_finite(engine.module, step, reason, lr, recorder.losses)
            recorder.write(line, seconds)
            if "val_loss" in line:
                _show_samples(engine, on_eval, step)
                recorder.export_if_best(step, line["val_loss"])

            # ---- checkpoint, if one is due; ends a preempted run
            recorder.save_checkpoint(step)

        recorder.finish()
    return result


@torch.no_grad()
def evaluate(engine: Engine, data: Sequence[Any], batch_size: int) -> float:
    """The mean loss on `data` per supervised token (or per whatever the objective counts), in nats.

    Every rank calls and reads its own share. Leaves the module in train mode.
    """
    engine.module.eval()
    loss_sum, weight = 0.0, 0.0
    for indices in shard(lengths_of(data), batch_size, rank(), world_size()):
        batch = engine.objective.collate([data[i] for i in indices.tolist()])
        loss_sum, weight = loss_sum + engine(batch).sum.item(), weight + engine.objective.weight(batch)
    engine.module.train()
    loss_sum, weight = sum_over_ranks(loss_sum, weight)
    return loss_sum / max(1, weight)


def _show_samples(engine: Engine, on_eval: Callable[[Any, int], None] | None, step: int) -> None:
    if on_eval is not None:
        engine.module.eval()
        on_eval(engine.module, step)
        engine.module.train()


def _not_finite(model: nn.Module, step: int, reason: str, lr: float, losses: list[float]) -> FloatingPointError:
    """The error that ends the run, with the likely cause: the learning rate, or, at the first step, the weights."""
    if losses:
        return FloatingPointError(
            f"step {step}: {reason} at learning rate {lr:.2e}; the loss before was {losses[-1]:.3f} "
            "(a lower --learning_rate, more --warmup_steps or a smaller --max_grad_norm help)"
        )
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    cause = f"are not finite themselves ({', '.join(broken[:3])})" if broken else "are finite, but too large"
    return FloatingPointError(f"step {step}: {reason}, at the very first: the weights that it starts from {cause}")
