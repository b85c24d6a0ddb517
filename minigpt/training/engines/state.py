"""What an engine knows, in files that any other engine can take up.

model.safetensors      the fp32 weights, in Hugging Face's layout, with config.json beside them
optimizer.safetensors  Adam's moments in fp32: "exp_avg.h.0.attn.c_attn.weight", "exp_avg_sq.h.0.attn.c_attn.weight"
engine.json            which engine wrote it, in a world of which size, and Adam's count of steps

Names and layouts are the module's own, with full tensors gathered from all ranks: so a run can resume with
another number of ranks, another ZeRO stage or the other engine.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from minigpt.files import read_json
from minigpt.model.base import CausalLM
from minigpt.model.weights import read_state_dict

OPTIMIZER, ENGINE = "optimizer.safetensors", "engine.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # PyTorch's names, and DeepSpeed's


class State(NamedTuple):
    """Full fp32 tensors on the CPU, and what else there is to know."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    """exp_avg and exp_avg_sq, each by parameter; both empty before the first applied step."""
    facts: dict[str, Any]
    """At least `adam_steps`, which Adam's bias correction counts."""


def checkpoint_bytes(n_parameters: int, zero_stage: int | None = None, dtype: str = "fp32") -> int:
    """What a checkpoint of these files takes: weights and both moments in fp32.

    Under DeepSpeed, whose ZeRO stage is given, its own shards lie beside them: the same again, and at stages 1 and 2
    the module's weights too, in its own `dtype`.
    """
    shards = 0 if zero_stage is None else 12 + (0 if zero_stage in (0, 3) else 4 if dtype == "fp32" else 2)
    return n_parameters * (12 + shards)


def write_state(folder: Path, module: CausalLM, state: State) -> None:
    """On rank 0 only."""
    from safetensors.torch import save_file

    module.save_pretrained(folder, state.weights)
    moments = {f"{kind}.{name}": tensor for kind in state.moments for name, tensor in state.moments[kind].items()}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in moments.items()}, folder / OPTIMIZER)
    (folder / ENGINE).write_text(json.dumps(state.facts, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path, module: CausalLM) -> State:
    """Memory-mapped. Raises `ValueError` where it is the state of another model."""
    from safetensors.torch import load_file

    config = module.CONFIG.from_pretrained(folder)
    for name in config.SHAPE:
        if (theirs := getattr(config, name)) != (ours := getattr(module.config, name)):
            raise ValueError(f"{folder}: of a model with {name} {theirs}, and this one has {ours}")
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / OPTIMIZER).items():
        kind, name = key.split(".", 1)
        moments.setdefault(kind, {})[name] = tensor
    return State(read_state_dict(folder, None, module.WEIGHTS), moments, read_json(folder / ENGINE))
