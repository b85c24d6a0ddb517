"""What all decoders share: the output head with its loss, the bookkeeping of the KV cache, and checkpoints.

A family, such as `gpt2.py`, adds its config, its layers (`hidden_states`, `head_weight`) and a `WeightMap`, which says
how a checkpoint names and stores its tensors. `minigpt.model.families` maps `model_type` to the family's class.

Shapes: B rows, T positions, C = width, V = vocab_size.
"""

from collections.abc import Callable
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.model.cache import KVCache
from minigpt.model.head import linear_cross_entropy
from minigpt.model.weights import SkipInit, WeightMap, check_tensors, read_config, read_state_dict, write_model


class ModelConfig:
    """The shape of a model. A family's config is a dataclass whose fields have the names of Hugging Face's
    `config.json`; what the rest of the package reads has the same name in all families."""

    MODEL_TYPE: ClassVar[str]
    ARCHITECTURE: ClassVar[str]
    """Hugging Face's class, as in the `architectures` of a config.json."""
    NAME: ClassVar[str]
    """For messages and model cards: "GPT-2"."""
    SHAPE: ClassVar[tuple[str, ...]]
    """The fields that determine the shapes of the tensors."""
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    vocab_size: int
    n_layer: int
    n_head: int
    bos_token_id: int
    eos_token_id: int

    @property
    def context(self) -> int:
        """The most tokens that the model can attend to."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        raise NotImplementedError

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Key and value heads of a layer, and channels of each head."""
        return self.n_head, self.width // self.n_head

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, revision: str | None = None, **changes: Any) -> Self:
        """The config of a checkpoint, with some fields changed. Errors: those of `CausalLM.from_pretrained`."""
        values = read_config(name_or_folder, revision)
        try:
            config = cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{name_or_folder}: config.json: {error}") from error
        return replace(config, **changes)

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """From the contents of a `config.json`; keys that do not change the computation are ignored.

        Raises `ValueError` if it describes a model of another family.
        """
        if values.get("model_type", cls.MODEL_TYPE) != cls.MODEL_TYPE:
            raise ValueError(f"model_type {values['model_type']!r} is not {cls.MODEL_TYPE!r}")
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})

    def to_dict(self) -> dict:
        """The contents of a `config.json` that transformers opens."""
        return {"architectures": [self.ARCHITECTURE], "model_type": self.MODEL_TYPE, **asdict(self)}

    def check_vocabulary(self, size: int) -> None:
        """Raises `ValueError` if a tokenizer of that size has ids beyond the embedding."""
        if size > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {size:,} ids, the model's embedding {self.vocab_size:,}: they do not belong "
                "together (--tokenizer_name names another tokenizer)"
            )

    def check_length(self, flag: str, length: int) -> None:
        """Raises `ValueError` if sequences of that length exceed the context."""
        if length > self.context:
            raise ValueError(f"{flag} {length} is more than the model's context of {self.context}")


class CausalLM(nn.Module):
    """A decoder: ids in, logits or the loss out."""

    CONFIG: ClassVar[type[ModelConfig]]
    WEIGHTS: ClassVar[WeightMap]
    FUSED_BLOCK: ClassVar[str | None] = None
    """module:class of a layer in fewer calls, for generation; None packs each matrix by itself."""

    config: Any  # an instance of CONFIG

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep only each block's input: compute the rest again (arXiv:1604.06174)
        self.lm_head: Callable[[Tensor], Tensor] | None = None  # set by `inference.packed`; else `head_weight` is used

    # ---- what a family implements

    def hidden_states(self, idx: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        """The last layer's normalised output: (B,T) ids, (T,) or (B,T) positions -> (B,T,C).

        The cache, if there is one, has been extended by these positions.
        """
        raise NotImplementedError

    def head_weight(self) -> Tensor:
        """The (V,C) matrix of the output head. Under ZeRO-3 it may be read only inside `forward`."""
        raise NotImplementedError

    # ---- what all share

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool | Tensor = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the loss.

        Args:
            idx: (B,T) token ids.
            targets: (B,T) ids to predict; -100 is ignored, and the head is not computed there.
            positions: (T,) or (B,T); None counts from 0, or from the end of the cache.
            cache: filled with this call's keys and values, and read.
            last_only: logits of the last position only; or a (B,) tensor with the index of one position of each row,
                if rows of different lengths are padded on the right.

        Returns:
            Without targets logits (B,T,V), with `last_only` (B,1,V). With targets `(nll_sum, n_tokens)`: the summed
            negative log-likelihood in fp32 and the number of targets that counted.

        Raises:
            ValueError: the tokens exceed the context; if positions are given, the cache.
        """
        if positions is None:
            start, T = cache.length if cache is not None else 0, idx.shape[1]
            if start + T > self.config.context:
                raise ValueError(f"{start + T} tokens do not fit into a context of {self.config.context}")
            positions = torch.arange(start, start + T, device=idx.device)
        if cache is not None:
            cache.extend(positions)
        x = self.hidden_states(idx, positions, cache)  # (B,T) -> (B,T,C)
        if targets is not None:
            return linear_cross_entropy(x, self.head_weight(), targets)
        if isinstance(last_only, Tensor):
            x = x[torch.arange(len(x), device=x.device), last_only][:, None]  # (B,T,C) -> (B,1,C)
        elif last_only:
            x = x[:, -1:]  # (B,T,C) -> (B,1,C)
        return F.linear(x, self.head_weight()) if self.lm_head is None else self.lm_head(x)  # (B,T,C) -> (B,T,V)

    def run_block(self, block: nn.Module, x: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        """One layer; in training with gradient checkpointing its activations are computed again in backward."""
        if self.gradient_checkpointing and self.training and cache is None:
            # Early stop is the default, and needed: without it ZeRO-3 releases weights that backward is reading.
            return checkpoint(block, x, cache, mask, use_reentrant=False)
        return block(x, cache, mask)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self) -> int:
        """A tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        revision: str | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> Self:
        """A checkpoint in Hugging Face's layout, from a folder or from the hub, in eval mode.

        An fp32 file is memory-mapped: its pages are the model's weights, and there is no second copy in RAM.

        Args:
            name_or_folder: a folder, or a hub id such as "openai-community/gpt2".
            revision: branch, tag or commit of a hub id.
            device: where the weights go; None is the CPU.
            dtype: of the weights; None is fp32, whatever the file holds.
            changes: fields of the config to change, such as `resid_pdrop=0.0`.

        Raises:
            FileNotFoundError: no such folder or repository, or no safetensors weights in it.
            ValueError: it is of another family, or tensors are missing, unexpected or of another shape.
        """
        config = cls.CONFIG.from_pretrained(name_or_folder, revision, **changes)
        with torch.device("meta"), SkipInit():  # no memory, no initialisation
            model = cls(config)
        weights = {
            name: tensor.to(device=device, dtype=dtype or torch.float32)
            for name, tensor in read_state_dict(name_or_folder, revision, cls.WEIGHTS).items()
        }
        check_tensors(model.state_dict(), weights, name_or_folder)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes config.json, generation_config.json and model.safetensors as transformers would.

        Args:
            folder: created if it does not exist.
            state_dict: weights to write instead of the module's own, such as those an engine gathered.
        """
        weights = self.WEIGHTS.to_file(state_dict if state_dict is not None else self.state_dict())
        write_model(folder, self.config.to_dict(), weights)
