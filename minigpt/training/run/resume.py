"""Starting a run, from nothing or from a checkpoint, and the checks that a resumed run must pass.

A resumed run must read its data in the same order, or which examples were read and which are still to come would no
longer be known. The learning rate and the like (`RECIPE`) may change; each change is printed.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.data.order import lengths_of
from minigpt.distributed import all_or_none, is_main, print0, rank, sum_over_ranks, world_size
from minigpt.files import wait_until_visible
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import Engine
from minigpt.training.run.checkpoint import find_checkpoint, load_checkpoint
from minigpt.training.run.folder import CONFIG, METRICS, is_resume_of, start_run
from minigpt.training.run.metrics import losses_of
from minigpt.training.run.result import TrainResult

SHARED = "--output_dir must lie on storage that all ranks share"

RECIPE = (
    *("learning_rate", "lr_scheduler_type", "min_lr_ratio", "warmup_steps", "num_train_epochs", "max_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "dropout", "bf16", "fp16"),
)

ORDER = {  # names in a checkpoint's trainer.json -> what the user can set back
    "window_size": "--per_device_train_batch_size x --gradient_accumulation_steps x ranks",
    "replayed": "--replay_data or --replay_ratio",
    "seed": "--seed",
    "group_by_length": "--group_by_length",
    "data": "the data, or how it is cut into examples,",
    "validation": "the validation data",
}


def data_order(
    config: TrainConfig,
    global_batch_size: int,
    n_replayed: int,
    lengths: np.ndarray,
    train_data: Sequence[Any],
    replay_data: Sequence[Any],
    eval_data: Sequence[Any],
) -> dict[str, Any]:
    """All that decides which examples a step reads, by the names of `ORDER`; saved in every checkpoint.

    `lengths` are those of the training data, then of the replayed data.
    """
    return {
        "window_size": global_batch_size,
        "replayed": n_replayed,
        "seed": config.seed,
        "group_by_length": config.group_by_length,
        "data": _fingerprint(lengths, train_data, replay_data),
        "validation": _fingerprint(lengths_of(eval_data), eval_data),
    }


def recipe(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run may change."""
    return {name: getattr(config, name) for name in RECIPE}


def start_or_resume(
    config: TrainConfig, engine: Engine, output_dir: Path | None, order: dict[str, Any], total_steps: int
) -> tuple[TrainResult, list[float]]:
    """Loads the checkpoint that `config.resume` names, if any, and prepares the run folder. Every rank calls.

    Returns:
        The result and the loss of every step so far.

    Raises:
        ValueError: the ranks read different data, or the checkpoint is of another order of data or past this run's end.
        FileNotFoundError: there is no such checkpoint, or the ranks do not share the folder.
        FileExistsError: the folder holds another run.
    """
    result = TrainResult(0, 0.0, 0, 0, math.nan, 0.0)
    fingerprint = int(order["data"][:8], 16)
    if sum_over_ranks(fingerprint)[0] != fingerprint * world_size():
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
        if not is_resume_of(output_dir, checkpoint) and result.best_step != result.steps:
            result.best_val_loss = result.best_step = None  # export-best/ is in the other run's folder
        if result.steps > total_steps:
            raise ValueError(f"{checkpoint}: at step {result.steps:,} already, behind the {total_steps:,} of this run")
        print0(f"{checkpoint}: resuming after step {result.steps:,} of {total_steps:,}")
        for name, value in recipe(config).items():
            if progress["recipe"][name] != value:
                print0(f"{checkpoint}: --{name} {progress['recipe'][name]} then, {value} now")
    with all_or_none():
        if is_main():
            start_run(config, output_dir, checkpoint, metrics_bytes)
    with all_or_none():
        if not wait_until_visible(output_dir / CONFIG):
            raise FileNotFoundError(f"{output_dir}: rank 0 wrote into it, and rank {rank()} does not see it: {SHARED}")
    return result, losses_of(output_dir / METRICS)


def _check_order(checkpoint: Path, saved: dict[str, Any], order: dict[str, Any]) -> None:
    """Raises `ValueError` if this run would read its data in another order than the checkpoint's run."""
    for name, what in ORDER.items():
        if saved[name] != order[name]:
            values = f" ({saved[name]} then, {order[name]} now)" if name not in ("data", "validation") else ""
            raise ValueError(f"{checkpoint}: cannot resume from it, because {what} changed{values}: set it back")


def _fingerprint(lengths: np.ndarray, *datasets: Sequence[Any]) -> str:
    """A hash of the lengths and, for token stores, of what they were built from: nothing is read for it."""
    contents = [getattr(data, "fingerprint", "") for data in datasets]
    return hashlib.sha256(lengths.tobytes() + repr(contents).encode()).hexdigest()
