"""The run folder: locked by one process, with these files.

config.yaml     the resolved configuration; `--config` on it repeats the run
metrics.jsonl   one JSON object per optimizer step
loss.png        drawn from it
checkpoints/    for --resume
preempted.json  written if the run was interrupted after saving a checkpoint
export/         the last step's weights, with tokenizer, template and model card
export-best/    the weights with the lowest validation loss, if those are not the last
.lock           an OS file lock, released when the process ends, so a killed run needs no cleanup
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
    """Locks `config.output_dir` (set to `default` if unset) for this process.

    Nothing is deleted or written before `start_run`, and a run that fails before its first step leaves no run files.

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
        remove(folder / PREEMPTED)  # of an earlier start
        if not is_resume_of(folder, find_checkpoint(folder, config.resume)):  # fail now, not after reading the data
            _held(folder, config)
        try:
            yield folder
        except BaseException:
            if not _stepped(
                folder / METRICS
            ):  # e.g. out of memory: the corrected command must not need --overwrite_output_dir
                remove(folder / CONFIG)
                remove(folder / METRICS)
            raise


def _lock_file(folder: Path) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / ".lock", "a+", encoding="utf-8")


def start_run(config: TrainConfig, folder: Path, resumed_from: Path | None = None, metrics_bytes: int = 0) -> None:
    """Prepares the folder: a new run deletes an earlier run's files; a resumed run truncates metrics.jsonl to its
    checkpoint. Then writes config.yaml.

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
        keep_newest(folder, config.save_total_limit)  # frees disk space for the next one
    if resumed_from is not None:
        history = resumed_from.parent.parent / METRICS
        lines = history.read_bytes()[:metrics_bytes] if history.exists() else b""
        with whole_file(folder / METRICS) as path:
            path.write_bytes(lines)
    remove(folder / LOSS_PICTURE)
    remove_unfinished(folder)
    # How this process was started does not belong to the run's configuration.
    save_yaml(replace(config, resume=None, overwrite_output_dir=False), folder / CONFIG)


def write_preempted_marker(folder: Path, checkpoint: Path, signal: str | None) -> None:
    """Writes preempted.json for job scripts to check, because torchrun turns every exit code into 1."""
    print0(f"{checkpoint}: saved; --resume auto resumes from it")
    if is_main():
        content = {"checkpoint": str(checkpoint), "signal": signal or "on another rank", "exit_code": EXIT_CODE}
        with whole_file(folder / PREEMPTED) as path:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_resume_of(folder: Path, checkpoint: Path | None) -> bool:
    """Whether the checkpoint belongs to this folder's run, not to another one."""
    return checkpoint is not None and checkpoint.resolve().parent.parent == folder.resolve()


def _held(folder: Path, config: TrainConfig) -> list[str]:
    """The files that a new run would replace."""
    names = (CONFIG, METRICS, CHECKPOINTS, EXPORT, EXPORT_BEST)
    held = [name for name in names if (folder / name).exists()]
    if CHECKPOINTS in held and not any((folder / CHECKPOINTS).iterdir()):
        held.remove(CHECKPOINTS)
    killed_early = (
        config.resume == "auto" and EXPORT not in held
    )  # killed before its first checkpoint, else it would resume
    if held and not config.overwrite_output_dir and not killed_early:
        hint = "--resume latest resumes from its checkpoint" if CHECKPOINTS in held else OTHER
        raise FileExistsError(f"{folder}: holds a run ({', '.join(held)}); {hint}, or --overwrite_output_dir")
    sources = [Path(value).resolve() for value in vars(config).values() if isinstance(value, str)]
    for name in held:
        if any(source.is_relative_to((folder / name).resolve()) for source in sources):
            raise FileExistsError(f"{folder / name}: this run starts from it, so it cannot take its place; {OTHER}")
    return held


def _stepped(metrics: Path) -> bool:
    """Whether the run has logged a step."""
    return metrics.exists() and metrics.stat().st_size > 0
