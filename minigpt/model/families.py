"""The families of decoders: `model_type` of a config.json -> the class that computes it.

A new family is one file in this folder and one line here.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from minigpt.model.base import CausalLM, ModelConfig
from minigpt.model.weights import read_config

FAMILIES = {"gpt2": "minigpt.model.gpt2:GPT"}  # module:class


def family_of(name_or_folder: str | Path, revision: str | None = None) -> type[CausalLM]:
    """The class for a checkpoint's `model_type`; GPT-2's if config.json does not name one.

    Raises:
        FileNotFoundError: no such folder or repository, or no config.json in it.
        ValueError: no such family.
    """
    model_type = read_config(name_or_folder, revision).get("model_type", "gpt2")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{name_or_folder}: config.json: model_type {model_type!r} is not supported; one of {known}")
    return _class(model_type)


def _class(model_type: str) -> type[CausalLM]:
    module, _, name = FAMILIES[model_type].partition(":")
    return getattr(import_module(module), name)


def model_from_config(config: ModelConfig) -> CausalLM:
    """A new model of that shape, with its family's initialisation."""
    return _class(config.MODEL_TYPE)(config)


def load_config(name_or_folder: str | Path, revision: str | None = None, **changes: Any) -> ModelConfig:
    """A checkpoint's config, with some fields changed. Errors: those of `load_model`."""
    return family_of(name_or_folder, revision).CONFIG.from_pretrained(name_or_folder, revision, **changes)


def load_model(
    name_or_folder: str | Path,
    revision: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> CausalLM:
    """A checkpoint of any family, in eval mode. Arguments and errors are those of `CausalLM.from_pretrained`."""
    family = family_of(name_or_folder, revision)
    return family.from_pretrained(name_or_folder, revision, device=device, dtype=dtype, **changes)
