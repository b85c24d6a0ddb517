"""Self-Instruct: generates an instruction dataset with a model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.selfinstruct.novelty import Novelty, NoveltyFilter

__all__ = ["Novelty", "NoveltyFilter"]


def __getattr__(name: str) -> Any:
    """Imports novelty.py lazily, so that a script's `--help` does not import numpy."""
    if name not in __all__:
        raise AttributeError(f"module 'minigpt.selfinstruct' has no attribute {name!r}")
    from minigpt.selfinstruct import novelty

    return getattr(novelty, name)
