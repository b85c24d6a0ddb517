"""The run folder: claimed by one process, and what lies in it.

config.yaml     the resolved configuration; `--config` on it repeats the run
metrics.jsonl   one JSON object per optimizer step
loss.png        drawn from it
checkpoints/    what --resume goes on from
preempted.json  left by a run that was asked to end, and was saved
export/         the last step's weights and everything that goes with them
export-best/    the lowest validation loss, where it is not the last
.lock           held by the operating system while the run lives; a killed run leaves nothing to clean
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from minigpt.distributed import is_main, print0
from minigpt.files import lock_folder, remove, whole_file, writing_to
from minigpt.settings.command_line import save_yaml
from minigpt.settings.groups import TrainConfig
from minigpt.training.run.checkpoint import CHECKPOINTS, find_checkpoint, keep_newest, remove_unfinished
from minigpt.training.run.preemption import EXIT_CODE

CONFIG, METRICS, LOSS_PICTURE, EXPORT, EXPORT_BEST = "config.yaml", "metrics.jsonl", "loss.png", "export", "export-best"
PREEMPTED = "preempted.json"
OTHER = "give another --output_dir"


@contextmanager
def run_folder(config: TrainConfig, default: str) -> Iterator[Path]:
    """Claims `config.output_dir` (set to `default` where it is unset) for this process.

    Nothing is lost or written before `start_run`, and a run that fails before its first step leaves no trace of one.

    Raises:
        FileExistsError: another run is writing into the folder, or what `start_run` refuses.
    """
    config.output_dir = config.output_dir or default
    folder = Path(config.output_dir)
    if not is_main() or config.plan:
        yield folder
        return
    with writing_to(folder, "--output_dir"), _lock_file(folder) as lock:
        lock_folder(folder, lock, OTHER)
        remove(folder / PREEMPTED)  # an earlier start's: whoever looks shall see this one's
        if not is_resume_of(folder, find_checkpoint(folder, config.resume)):  # refused now, not after the data was read
            _held(folder, config)
        try:
            yield folder
        except BaseException:
            if not _stepped(folder / METRICS):  # no memory, say: the same command, mended, need not be forced
                remove(folder / CONFIG)
                remove(folder / METRICS)
            raise


def _lock_file(folder: Path) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / ".lock", "a+", encoding="utf-8")


def start_run(config: TrainConfig, folder: Path, resumed_from: Path | None = None, metrics_bytes: int = 0) -> None:
    """Writes config.yaml, where an earlier run's files lay; or, in a run that goes on, cuts what it had written past
    its checkpoint.

    Args:
        resumed_from: a checkpoint, of this folder's run or of another one, whose metrics are then copied.
        metrics_bytes: length of metrics.jsonl when the checkpoint was written.

    Raises:
        FileExistsError: the folder holds a run, and `overwrite_output_dir` is not set, or this run reads from that one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not is_resume_of(folder, resumed_from):
        held = _held(folder, config)
        if METRICS in held and config.resume:
            print0(f"{folder}: holds a run that ended before its first checkpoint; starting anew in its place")
        for name in held:
            remove(folder / name)
    elif config.save_total_limit:
        keep_newest(folder, config.save_total_limit)  # room for the next one
    if resumed_from is not None:
        history = resumed_from.parent.parent / METRICS
        lines = history.read_bytes()[:metrics_bytes] if history.exists() else b""
        with whole_file(folder / METRICS) as path:
            path.write_bytes(lines)
    remove(folder / LOSS_PICTURE)
    remove_unfinished(folder)
    # How this start came about is not the run's.
    save_yaml(replace(config, resume=None, overwrite_output_dir=False), folder / CONFIG)


def write_preempted_marker(folder: Path, checkpoint: Path, signal: str | None) -> None:
    """Tells whoever looks at the folder, because torchrun turns every exit code into 1."""
    print0(f"{checkpoint}: saved; --resume auto goes on from it")
    if is_main():
        content = {"checkpoint": str(checkpoint), "signal": signal or "on another rank", "exit_code": EXIT_CODE}
        with whole_file(folder / PREEMPTED) as path:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_resume_of(folder: Path, checkpoint: Path | None) -> bool:
    """Whether the checkpoint is one of this folder's own run."""
    return checkpoint is not None and checkpoint.resolve().parent.parent == folder.resolve()


def _held(folder: Path, config: TrainConfig) -> list[str]:
    """What a run that starts anew would replace."""
    names = (CONFIG, METRICS, CHECKPOINTS, EXPORT, EXPORT_BEST)
    held = [name for name in names if (folder / name).exists()]
    if CHECKPOINTS in held and not any((folder / CHECKPOINTS).iterdir()):
        held.remove(CHECKPOINTS)
    killed_early = config.resume == "auto" and EXPORT not in held  # before its first checkpoint, or it would go on
    if held and not config.overwrite_output_dir and not killed_early:
        hint = "--resume latest goes on from its checkpoint" if CHECKPOINTS in held else OTHER
        raise FileExistsError(f"{folder}: holds a run ({', '.join(held)}); {hint}, or --overwrite_output_dir")
    sources = [Path(value).resolve() for value in vars(config).values() if isinstance(value, str)]
    for name in held:
        if any(source.is_relative_to((folder / name).resolve()) for source in sources):
            raise FileExistsError(f"{folder / name}: this run starts from it, so it cannot take its place; {OTHER}")
    return held


def _stepped(metrics: Path) -> bool:
    """Whether the run came as far as a step."""
    return metrics.exists() and metrics.stat().st_size > 0
