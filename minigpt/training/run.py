"""The run folder: claimed by one process, and what lies in it.

config.yaml    the resolved configuration; `--config` on it repeats the run
metrics.jsonl  one JSON object per optimizer step
loss.png       drawn from it
export/        the last step's weights and everything that goes with them
export-best/   the lowest validation loss, where it is not the last
.lock          held by the operating system while the run lives; a killed run leaves nothing to clean
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from minigpt.arguments import TrainConfig
from minigpt.config import save_yaml
from minigpt.distributed import is_main
from minigpt.files import writing_to

CONFIG, METRICS, LOSS_PICTURE, EXPORT, EXPORT_BEST = "config.yaml", "metrics.jsonl", "loss.png", "export", "export-best"
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
    if not is_main():
        yield folder
        return
    with writing_to(folder, "--output_dir"), _lock_file(folder) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise FileExistsError(
                f"{folder}: another run, process {lock.read()}, is writing into this folder; {OTHER}"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _held(folder, config)  # refused now, and not after the data was read
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


def start_run(config: TrainConfig, folder: Path) -> None:
    """Writes config.yaml, where an earlier run's files lay.

    Raises:
        FileExistsError: the folder holds a run, and `overwrite_output_dir` is not set, or this run reads from that one.
    """
    held = _held(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*held, LOSS_PICTURE):
        remove(folder / name)
    save_yaml(config, folder / CONFIG)


def _held(folder: Path, config: TrainConfig) -> list[str]:
    held = [name for name in (CONFIG, METRICS, EXPORT, EXPORT_BEST) if (folder / name).exists()]
    if held and not config.overwrite_output_dir:
        raise FileExistsError(f"{folder}: holds a run ({', '.join(held)}); {OTHER}, or --overwrite_output_dir")
    sources = [Path(value).resolve() for value in vars(config).values() if isinstance(value, str)]
    for name in held:
        if any(source.is_relative_to((folder / name).resolve()) for source in sources):
            raise FileExistsError(f"{folder / name}: this run starts from it, so it cannot take its place; {OTHER}")
    return held


def _stepped(metrics: Path) -> bool:
    """Whether the run came as far as a step."""
    return metrics.exists() and metrics.stat().st_size > 0


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
