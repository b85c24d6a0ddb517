"""Rank, world and device of this process, and output that only rank 0 writes."""

import os
import sys


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def say(text: str = "") -> None:
    """Prints a line, on rank 0 only, at once. A reader that went away (`| head`) does not end the work."""
    if is_main():
        try:
            print(text, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def pick_device(name: str | None = None) -> str:
    """The device of this name; None is the best there is. Raises `ValueError` where PyTorch cannot use it."""
    import torch

    if name is not None:
        try:
            torch.empty(0, device=name)
        except (AssertionError, RuntimeError) as error:  # built without CUDA; no such device
            raise ValueError(f"--device {name}: this PyTorch has no such device here (cuda, cpu or mps)") from error
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def progress_bar(total: int | None, unit: str, description: str, unit_scale: bool = False):
    """A tqdm bar on standard error: on rank 0, and only where that is a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit=unit,
        unit_scale=unit_scale,
        desc=description,
        disable=not (is_main() and sys.stderr.isatty()),
        dynamic_ncols=True,
        leave=False,
    )
