"""Model in, dataset out: instruction data that a model writes itself."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.selfinstruct.novelty import Novelty, NoveltyFilter

__all__ = ["Novelty", "NoveltyFilter"]


def __getattr__(name: str) -> Any:
    """Imported when first asked for, so that a script's `--help` need not wait for numpy."""
    if name not in __all__:
        raise AttributeError(f"module 'minigpt.selfinstruct' has no attribute {name!r}")
    from minigpt.selfinstruct import novelty

    return getattr(novelty, name)
