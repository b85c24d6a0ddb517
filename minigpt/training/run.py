"""The run folder: claimed by one process, and what lies in it.

config.yaml    the resolved configuration; `--config` on it repeats the run
metrics.jsonl  one JSON object per optimizer step
loss.png       drawn from it
export/        the last step's weights and everything that goes with them
export-best/   the lowest validation loss, where it is not the last
.lock          held by the operating system while the run lives; a killed run leaves nothing to clean
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minigpt.arguments import TrainConfig
from minigpt.config import save_yaml
from minigpt.distributed import is_main

CONFIG, METRICS, LOSS_PICTURE, EXPORT, EXPORT_BEST = "config.yaml", "metrics.jsonl", "loss.png", "export", "export-best"


@contextmanager
def run_folder(config: TrainConfig, default: str) -> Iterator[Path]:
    """Claims `config.output_dir` (set to `default` where it is unset) for this run, and writes config.yaml.

    Raises:
        FileExistsError: the folder holds a run, and `overwrite_output_dir` is not set; or another run is in it.
    """
    config.output_dir = config.output_dir or default
    folder = Path(config.output_dir)
    if not is_main():
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(
                f"{folder}: another run is writing into this folder; give another --output_dir"
            ) from None
        held = [name for name in (CONFIG, METRICS, EXPORT, EXPORT_BEST) if (folder / name).exists()]
        if held and not config.overwrite_output_dir:
            raise FileExistsError(
                f"{folder}: holds a run ({', '.join(held)}); give another --output_dir, or --overwrite_output_dir"
            )
        for name in (*held, LOSS_PICTURE):
            remove(folder / name)
        save_yaml(config, folder / CONFIG)
        yield folder


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
