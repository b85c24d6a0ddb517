"""What stands between the loop and the hardware: forward, backward, step.

One promise, which every engine keeps: gradients are summed over a window's micro-batches, and the caller scales the
loss. The loop does not know which engine it has.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minigpt.arguments import TrainConfig
from minigpt.data.collate import Batch
from minigpt.distributed import world_size
from minigpt.training.optim import make_optimizer


class StepInfo(NamedTuple):
    """What one optimizer step came to."""

    grad_norm: float
    """L2 norm of all gradients before clipping."""
    skipped: bool = False
    """The step was not applied, because its gradients were not finite."""
    loss_scale: float = 1.0
    """What the loss was multiplied by, so that half-precision gradients do not vanish; 1 where nothing was."""


class TorchEngine:
    """Plain PyTorch on one device: fp32 weights, bf16 autocast if asked for."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        self.device = next(model.parameters()).device
        self.module = model
        self.optimizer = make_optimizer(self.module, config)
        self.bf16 = config.bf16
        self.max_grad_norm = config.max_grad_norm

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Forward: `(nll_sum, n_tokens)`."""
        inputs, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.module(inputs, targets)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the loss's gradient. `last`: the window's last micro-batch, where an engine of many ranks reduces."""
        loss.backward()

    def step(self, lr: float) -> StepInfo:
        """Clips, applies and clears the gradients; those that are not finite are cleared and not applied."""
        grad_norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm).item()
        if finite := math.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(grad_norm, skipped=not finite)

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights."""
        return self.module.state_dict()

    def close(self) -> None:
        """Lets go of the optimizer's memory."""
        self.optimizer.state.clear()


def make_engine(model: nn.Module, config: TrainConfig) -> TorchEngine:
    """The engine that the configuration asks for.

    Raises:
        ValueError: torchrun or deepspeed started several processes, which would each train a model of their own.
    """
    if world_size() > 1:
        raise ValueError(f"{world_size()} processes were started, and this version trains in one: start it with python")
    return TorchEngine(model, config)
