"""minigpt: GPT-2 from raw text to a model that follows instructions, in plain PyTorch.

The names that a custom loop needs. Each is imported when it is first asked for, so that a script's `--help` need
not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minigpt.moved import refuse_old_paths
from minigpt.version import __version__

if TYPE_CHECKING:
    from minigpt.data.collate import Batch, collate
    from minigpt.data.encode import Example, encode_example
    from minigpt.data.prompts import get_template
    from minigpt.data.read.records import Conversation, read_records
    from minigpt.data.tokenizer import Tokenizer
    from minigpt.inference.generate import generate, stream
    from minigpt.model.families import load_model
    from minigpt.model.gpt2 import GPT, GPTConfig
    from minigpt.settings.groups import TrainConfig
    from minigpt.training.engines.torch_engine import make_engine
    from minigpt.training.loop import train

refuse_old_paths()

_HOMES = {
    "minigpt.settings.groups": ["TrainConfig"],
    "minigpt.data.collate": ["Batch", "collate"],
    "minigpt.data.encode": ["Example", "encode_example"],
    "minigpt.data.prompts": ["get_template"],
    "minigpt.data.read.records": ["Conversation", "read_records"],
    "minigpt.data.tokenizer": ["Tokenizer"],
    "minigpt.inference.generate": ["generate", "stream"],
    "minigpt.model.families": ["load_model"],
    "minigpt.model.gpt2": ["GPT", "GPTConfig"],
    "minigpt.training.engines.torch_engine": ["make_engine"],
    "minigpt.training.loop": ["train"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "GPT",
    "Batch",
    "Conversation",
    "Example",
    "GPTConfig",
    "Tokenizer",
    "TrainConfig",
    "__version__",
    "collate",
    "encode_example",
    "generate",
    "get_template",
    "load_model",
    "make_engine",
    "read_records",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'minigpt' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
