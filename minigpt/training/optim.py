"""AdamW as GPT-2 is trained: decay on matrices only, warmup and decay of the learning rate."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from minigpt.settings.groups import TrainConfig


class StepInfo(NamedTuple):
    """What one optimizer step came to."""

    grad_norm: float
    """L2 norm of all gradients before clipping."""
    skipped: bool = False
    """The step was not applied, because its gradients were not finite."""
    loss_scale: float = 1.0
    """What the loss was multiplied by, so that half-precision gradients do not vanish; 1 where nothing was."""


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Weight decay on matrices; biases and LayerNorms go without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, the same to the last bit, without importing the compiler `torch._dynamo`.

    PyTorch's decorators on these two methods import it at their first call, only to keep it out of them: a thousand
    modules, 2.4 s of each start on a laptop's CPU. The functions under the decorators are called here instead.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.AdamW.add_param_group)(self, param_group)

    @torch.no_grad()  # which is the other thing that the decorator of `step` does
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)


def make_optimizer(model: nn.Module, config: TrainConfig, kind: type[torch.optim.AdamW] = AdamW) -> torch.optim.AdamW:
    """Loshchilov & Hutter 2019 (arXiv:1711.05101)."""
    return kind(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=all(p.device.type in ("cpu", "cuda", "mps") for p in model.parameters()),
    )


def learning_rate(applied_steps: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of the next step: a pure function of how many steps were applied before it.

    It climbs in a line over `warmup_steps`, then follows a half cosine (SGDR, arXiv:1608.03983) or a line down to
    `min_lr_ratio` of its peak, or stays.

    >>> config = TrainConfig(learning_rate=1.0, warmup_steps=2)
    >>> [round(learning_rate(step, 6, config), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if applied_steps < config.warmup_steps:
        return config.learning_rate * (applied_steps + 1) / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    decay_steps = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (applied_steps - config.warmup_steps) / decay_steps)
    factor = 1.0 - progress if config.lr_scheduler_type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * factor)
