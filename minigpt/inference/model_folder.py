"""One name, such as --model_name_or_path, and everything that belongs to it: config, tokenizer, template, weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch

from minigpt.data.prompts import Template, get_template, template_of
from minigpt.data.tokenizer import Tokenizer
from minigpt.model.base import CausalLM, ModelConfig
from minigpt.model.families import load_config, load_model
from minigpt.settings.groups import ModelArguments, PromptArguments


@dataclass(frozen=True)
class ModelFolder:
    """A folder or hub repository. Each part is read once, when it is first asked for.

    Errors are those of `Tokenizer.from_pretrained`, `load_config`, `load_model` and `get_template`.
    """

    name: str
    revision: str | None = None
    tokenizer_name: str | None = None
    """Another tokenizer than the model's own."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config to change, such as dropout."""

    @classmethod
    def of(cls, settings: ModelArguments, **changes: Any) -> Self:
        """From flags, of which `model_name_or_path` must be set."""
        return cls(str(settings.model_name_or_path), settings.revision, settings.tokenizer_name, changes)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        revision = None if self.tokenizer_name else self.revision  # the revision is of the model's repository
        return Tokenizer.from_pretrained(self.tokenizer_name or self.name, revision)

    @cached_property
    def config(self) -> ModelConfig:
        """With the changes, and the tokenizer's end-of-text. Raises `ValueError` if the tokenizer has too many ids."""
        config = load_config(self.name, self.revision, **self._changes)
        config.check_vocabulary(self.tokenizer.vocab_size)
        return config

    def template(self, settings: PromptArguments, *, to_tune: bool = False) -> Template:
        """The template that the flags name, else the model's own, else alpaca; see `template_of`."""
        chosen = settings.template or template_of(self.name, self.revision, to_tune=to_tune)
        return get_template(chosen, **settings.triggers)

    def load_model(self, device: str | torch.device) -> CausalLM:
        """The weights, in fp32, with `config`'s changes; each call returns a new model."""
        return load_model(self.name, self.revision, device=device, **self._changes)

    @property
    def _changes(self) -> dict[str, Any]:
        end = self.tokenizer.eot_id
        return {**self.changes, "bos_token_id": end, "eos_token_id": end}
