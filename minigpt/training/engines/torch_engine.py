"""The engines run a training step on the hardware: forward, backward, step.

Both keep one promise: gradients are summed over a global batch's micro-batches and averaged over ranks, and the
caller scales the loss. The loop does not know which engine it has. `TorchEngine` is plain PyTorch, alone or as
DistributedDataParallel (Li et al. 2020, arXiv:2006.15704); `DeepSpeedEngine`, in its own file, is ZeRO and fp16.
"""

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from minigpt.distributed import all_or_none, fails_alone, is_main, start_process_group, world_size
from minigpt.model.base import CausalLM, ModelConfig
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.state import MOMENTS, State, checkpoint_bytes, read_state, write_state
from minigpt.training.objectives import Loss, NextToken, Objective
from minigpt.training.optim import StepInfo, make_optimizer
from minigpt.training.precision import fit_to_machine


class Engine(Protocol):
    """The contract. Every rank makes the same calls in the same order."""

    module: CausalLM
    """The plain model, not what wraps it."""
    device: torch.device
    objective: Objective
    checkpoint_bytes: int
    """What `save` writes, over all ranks."""

    def __call__(self, batch: Any) -> Loss:
        """The objective's forward. `batch` is what the objective's `collate` returns, on any device."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the loss's gradient. `last`: of the global batch's micro-batches, when the ranks' sums are averaged."""

    def step(self, lr: float) -> StepInfo:
        """Clips, applies and clears the gradients; those that are not finite are cleared and not applied."""
        ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights in fp32 on rank 0; on the others perhaps nothing."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer; any engine in a world of any size can load them."""

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""

    def close(self) -> None:
        """Frees the optimizer's memory and leaves the process group."""


class ObjectiveForward(nn.Module):
    """One forward of an objective as a module, which DistributedDataParallel can wrap.

    DDP expects one forward per backward, but an objective may call the model more than once.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Any) -> Loss:
        return objective(self.model, batch)


class TorchEngine:
    """Plain PyTorch: fp32 weights, bf16 autocast if asked for, DistributedDataParallel on several ranks."""

    def __init__(self, model: CausalLM, config: TrainConfig, objective: Objective):
        self.device = next(model.parameters()).device
        self.module = model
        self.objective = objective
        self.checkpoint_bytes = checkpoint_bytes(model.num_parameters())
        for parameter in model.parameters():  # a memory-mapped file gives transposed views
            parameter.data = parameter.data.contiguous()
        self.optimizer = make_optimizer(self.module, config)
        self.bf16 = config.bf16
        self.max_grad_norm = config.max_grad_norm
        self.last = True
        self.forward: nn.Module = ObjectiveForward(model)  # names and state are taken from `module`, never from this
        if world_size() > 1:
            start_process_group(self.device.type)
            self.forward = ddp = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)
            ddp.register_comm_hook(None, self._average_on_last)

    def __call__(self, batch: Any) -> Loss:
        batch = batch._make(tensor.to(self.device, non_blocking=True) for tensor in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.forward(self.objective, batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.last = last
        loss.backward()

    def _average_on_last(self, _: None, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's hook for a bucket of gradients: each rank adds up its own until the last micro-batch."""
        if self.last:
            return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None is the group of all ranks
        unchanged: torch.futures.Future[Tensor] = torch.futures.Future()
        unchanged.set_result(bucket.buffer())
        return unchanged

    def step(self, lr: float) -> StepInfo:
        grad_norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm).item()
        if finite := math.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.module.zero_grad(set_to_none=True)  # the optimizer's method would import torch._dynamo
        return StepInfo(grad_norm, skipped=not finite)

    def full_state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def save(self, folder: Path) -> None:
        with all_or_none():
            if is_main():
                parameters = dict(self.module.named_parameters())
                adam = {name: self.optimizer.state[p] for name, p in parameters.items() if p in self.optimizer.state}
                moments = {kind: {name: adam[name][kind] for name in adam} for kind in MOMENTS}
                steps = max((int(state["step"]) for state in adam.values()), default=0)
                facts = {"engine": "torch", "world_size": world_size(), "adam_steps": steps}
                write_state(folder, self.module, State(self.module.state_dict(), moments, facts))

    def load(self, folder: Path) -> None:
        state = read_state(folder, self.module)
        steps = torch.tensor(float(state.facts["adam_steps"]), device=self.device)  # fused AdamW keeps it there
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(state.weights[name])
                if state.moments:
                    moments = {kind: torch.empty_like(parameter).copy_(state.moments[kind][name]) for kind in MOMENTS}
                    self.optimizer.state[parameter] = {"step": steps.clone(), **moments}

    def close(self) -> None:
        self.optimizer.state.clear()
        if distributed.is_initialized() and not fails_alone(self.device.type):
            distributed.destroy_process_group()


def check_engine(config: TrainConfig, model_config: ModelConfig, device: str) -> None:
    """Raises what `make_engine` would; a script calls it before it reads the data, which takes longer."""
    if (config.deepspeed or config.fp16) and not config.plan:
        from minigpt.training.engines.deepspeed_engine import prepare

        prepare(config, model_config.width, torch.device(device).type)


def make_engine(model: CausalLM, config: TrainConfig, *, objective: Objective | None = None) -> Engine:
    """The engine that the configuration asks for: DeepSpeed's for `deepspeed` and `fp16`, else PyTorch's.

    Args:
        objective: what its forward computes; None is `NextToken()`.

    Raises:
        ValueError: the DeepSpeed file contradicts a flag, or the device cannot compute in fp16.
    """
    if config.precision == "auto":
        fit_to_machine(config, str(next(model.parameters()).device))
    model.gradient_checkpointing = config.gradient_checkpointing
    if objective is None:
        objective = NextToken()
    if config.deepspeed or config.fp16:
        from minigpt.training.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, config, objective)
    return TorchEngine(model, config, objective)
