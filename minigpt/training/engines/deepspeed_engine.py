"""ZeRO and fp16 through DeepSpeed, behind the same promise as `TorchEngine`.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) cuts the optimizer's state (stage 1), the gradients (2) and the
weights (3) into one part per rank. The loop shards its own global batches and sets its own learning rate, so of
DeepSpeed only the engine and the optimizer are used. https://deepspeed.readthedocs.io

DeepSpeed wraps the plain model and the objective calls that wrapper, unlike under DistributedDataParallel, where the
objective runs inside the wrapped forward. A module of model and objective in between would put a prefix before every
parameter name in DeepSpeed's shards, so that older checkpoints could not be loaded, and would take ZeRO-3's root
hooks, which trace the order of weights, away from the model that sample answers are generated with. And it is not
needed: each call of DeepSpeed's engine gathers weights for itself, and several may precede one backward.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from minigpt.distributed import all_or_none, fails_alone, is_main, print0, rank, start_process_group, world_size
from minigpt.model.base import CausalLM
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.deepspeed_config import deepspeed_config
from minigpt.training.engines.state import MOMENTS, State, checkpoint_bytes, read_state, write_state
from minigpt.training.objectives import Loss, Objective
from minigpt.training.optim import StepInfo, make_optimizer, parameter_groups

SHARDS = "deepspeed"


class DeepSpeedEngine:
    """`deepspeed.initialize`, with a client torch AdamW unless the DeepSpeed file names an optimizer."""

    def __init__(self, model: CausalLM, config: TrainConfig, objective: Objective):
        self.device = next(model.parameters()).device
        self.module = model
        self.objective = objective
        deepspeed, settings = prepare(config, model.config.width, self.device.type)
        self.version, self.zero = deepspeed.__version__, deepcopy(settings["zero_optimization"])
        self.stage = self.zero["stage"]
        self.dtype = "fp16" if config.fp16 else "bf16" if config.bf16 else "fp32"
        self.checkpoint_bytes = checkpoint_bytes(model.num_parameters(), self.stage, self.dtype)
        for parameter in model.parameters():  # a memory-mapped file gives transposed views, which DeepSpeed flattens
            parameter.data = parameter.data.contiguous()
        start_process_group(self.device.type)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it, but only launchers set it
        self.max_grad_norm = config.max_grad_norm
        if self.stage == 0:  # in fp32: whole gradients are in p.grad, and `step` clips them to get their norm
            settings["gradient_clipping"] = 0.0
        # Replayed data may add micro-batches to the configured number; DeepSpeed only distinguishes one from several.
        settings["gradient_accumulation_steps"] = max(2, settings["gradient_accumulation_steps"])
        settings.pop("train_batch_size", None)
        # PyTorch's own class, because ZeRO compares the type and refuses a subclass.
        optimizer = None if "optimizer" in settings else make_optimizer(model, config, torch.optim.AdamW)
        exact = [] if self.dtype == "fp32" else [parameter.detach().to("cpu") for parameter in model.parameters()]
        with _quiet():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=None if optimizer else parameter_groups(model, config),
                config=settings,
                dist_init_required=False,
            )
        with torch.no_grad():  # DeepSpeed rounds the weights and then copies its fp32 weights from the rounded ones
            for parameter, value in zip(model.parameters(), exact):
                self._set_weight(parameter, value.to(self.device))
        if self.dtype == "fp16":  # the loop raises instead, with the cause
            self.optimizer.loss_scaler.raise_error_at_min_scale = False
        print0(f"DeepSpeed: ZeRO stage {self.stage}, {self.dtype}, {world_size()} ranks")

    # ---- the step
    def __call__(self, batch: Any) -> Loss:
        batch = batch._make(tensor.to(self.device, non_blocking=True) for tensor in batch)
        return self.objective(self.engine, batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if self.stage == 3:  # recomputed layers stop early, so DeepSpeed does not pop them from its stack of modules
            from deepspeed.runtime.zero import parameter_offload

            del parameter_offload.FWD_MODULE_STACK[1:]

    def step(self, lr: float) -> StepInfo:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss_scale = float(getattr(self.optimizer, "cur_scale", 1.0)) if self.dtype == "fp16" else 1.0
        if self.stage == 0:
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
            if not norm.isfinite():  # at this stage DeepSpeed would apply them
                self.engine.zero_grad()
                return StepInfo(float(norm), skipped=True)
            self.engine.step()
        else:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
        return StepInfo(float(norm), skipped=not self.engine.was_step_applied(), loss_scale=loss_scale)

    # ---- the state, whole
    def full_state_dict(self) -> dict[str, Tensor]:
        return self._gather(None)

    def save(self, folder: Path) -> None:
        """DeepSpeed's shards, for the same world, and the whole state, for any other world. Every rank writes."""
        self.engine._copy_recovery_script = lambda _: None  # not needed: the whole weights are saved too
        with all_or_none(), _raised_at_the_end(self.engine.checkpoint_engine), _quiet():
            self.engine.save_checkpoint(str(folder), tag=SHARDS, save_latest=False)
        moments = {kind: self._gather(kind) for kind in MOMENTS} if self._adam_steps() else {}
        state = State(self._gather(None), moments, {**self._facts(), "loss_scale": self._loss_scale()})
        with all_or_none():
            if is_main():
                write_state(folder, self.module, state)

    def load(self, folder: Path) -> None:
        state = read_state(folder, self.module)
        ours = {name: value for name, value in self._facts().items() if name != "adam_steps"}
        settings = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in self.optimizer.param_groups]
        clip_grad = getattr(self.optimizer, "clip_grad", None)
        if ours == {name: state.facts.get(name) for name in ours}:
            with _quiet():
                path, _ = self.engine.load_checkpoint(str(folder), tag=SHARDS)
            if path is None:
                raise ValueError(f"{folder / SHARDS}: DeepSpeed cannot read its own shards")
        else:
            self._scatter(state)
        # The settings of this run, not those of the run that wrote the checkpoint.
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        if clip_grad is not None:
            self.optimizer.clip_grad = clip_grad

    def close(self) -> None:
        alone = fails_alone(self.device.type)
        with contextlib.suppress(Exception):  # the error that led here is the one to show
            self.engine.destroy()
        if distributed.is_initialized() and not alone:
            from deepspeed import comm

            comm.destroy_process_group()  # PyTorch's process group and DeepSpeed's references to it

    def _facts(self) -> dict[str, Any]:
        return {
            "engine": "deepspeed",
            "world_size": world_size(),
            "version": self.version,
            "zero_optimization": self.zero,
            "dtype": self.dtype,
            "optimizer": f"{type(self.optimizer).__name__}, {type(self._adam).__name__}",
            "adam_steps": self._adam_steps(),
        }

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer inside ZeRO's."""
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def _adam_steps(self) -> int:
        """PyTorch keeps the count in each parameter's state, DeepSpeed's FusedAdam in the group."""
        steps = [one["step"] for one in self._adam.state.values() if "step" in one]
        return int(max([*steps, *(group.get("step", 0) for group in self._adam.param_groups)], default=0))

    def _loss_scale(self) -> float:
        return float(self.optimizer.cur_scale) if self.dtype == "fp16" else 1.0

    def _gather(self, kind: str | None) -> dict[str, Tensor]:
        """The fp32 weights (None) or one kind of moment: whole, on rank 0's CPU, one parameter at a time."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind is not None and self.stage in (1, 2):
            self._link_moments()
        tensors = {}
        for name, parameter in self.module.named_parameters():
            if self.stage == 0:
                full = parameter.detach() if kind is None else self._adam.state[parameter][kind]
            elif kind is None:
                full = safe_get_full_fp32_param(parameter)
            else:
                full = safe_get_full_optimizer_state(parameter, kind)
            if is_main():
                tensors[name] = full.to("cpu", torch.float32)
        return tensors

    def _link_moments(self) -> None:
        """Lets `safe_get_*` and `safe_set_*` find the moments in the flat tensors that ZeRO-1 and 2 step.

        DeepSpeed links them only once, after it stepped the first parameter group, when the second has no moments yet.
        """
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _scatter(self, state: State) -> None:
        """Each rank loads its parts of a state that another engine or another world wrote."""
        if state.moments:
            for part in self._parts():
                steps = torch.tensor(float(state.facts["adam_steps"]), device=part.device)
                self._adam.state[part] = {
                    "step": steps
                    if isinstance(self._adam, torch.optim.AdamW)
                    else int(steps),  # DeepSpeed's count ints
                    **{kind: torch.zeros_like(part, requires_grad=False) for kind in MOMENTS},
                }
            if self.stage in (1, 2):
                self._link_moments()
        for name, parameter in self.module.named_parameters():
            self._set_weight(parameter, state.weights[name].to(self.device).contiguous())
            for kind in state.moments:
                self._set_moment(parameter, state.moments[kind][name].to(self.device).contiguous(), kind)
        if self.dtype == "fp16" and state.facts.get("loss_scale", 1.0) > 1.0:
            self.optimizer.loss_scale = state.facts["loss_scale"]

    def _parts(self) -> list[Tensor]:
        """This rank's tensors that Adam steps: of stage 3, of stages 1 and 2, of stage 1 in bf16, of stage 0."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self.optimizer, name):
                return getattr(self.optimizer, name)
        return list(self.module.parameters())

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.copy_(value)
        if self.stage == 3:
            safe_set_local_fp32_param(parameter, _part(parameter, value))
        elif self.stage > 0:
            safe_set_full_fp32_param(parameter, value)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, kind: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 3:
            safe_set_local_optimizer_state(parameter, _part(parameter, value), kind)
        elif self.stage > 0:
            safe_set_full_optimizer_state(parameter, value, kind)
        else:
            self._adam.state[parameter][kind].copy_(value)


def _part(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's part of a tensor under ZeRO-3: equal parts, the last one padded.

    DeepSpeed's own way for whole values (`safe_set_full_*`) fails where the ranks do not divide the tensor.
    """
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's
    padded = nn.functional.pad(value.flatten(), (0, size * world_size() - value.numel()))
    return padded[rank() * size : (rank() + 1) * size]


def prepare(config: TrainConfig, hidden_size: int, device_type: str) -> tuple[Any, dict[str, Any]]:
    """DeepSpeed and its settings. A script calls it before it reads the data, so that errors come at once.

    Raises:
        ValueError: the DeepSpeed file contradicts a flag or DeepSpeed, or the device cannot compute in fp16.
    """
    settings = deepspeed_config(config, hidden_size, world_size(), device_type)
    deepspeed = import_deepspeed(device_type)
    if config.fp16 and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise ValueError(f"{device_type} does not compute in fp16: use --precision auto")
    try:
        deepspeed.runtime.zero.config.get_zero_config(deepcopy(settings))
    except ValueError as error:  # pydantic's, of several lines
        told = " ".join(line.strip() for line in str(error).splitlines()[1:] if "errors.pydantic.dev" not in line)
        raise ValueError(f"{config.deepspeed}: zero_optimization.{told}") from error
    return deepspeed, settings


def import_deepspeed(device_type: str) -> Any:
    """DeepSpeed for this device, with its log messages below the level of an error silenced.

    Raises:
        ImportError: it is not installed, or is a version that computes wrong gradients.
    """
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        try:
            import deepspeed
            from deepspeed.ops import __compatible_ops__
        except ImportError as error:
            raise ImportError(f"DeepSpeed cannot be used ({error}): pip install 'deepspeed<0.20' (Linux)") from error
    version = tuple(int(part) for part in re.findall(r"\d+", deepspeed.__version__)[:3])
    if version < (0, 19, 4):
        raise ImportError(
            f"DeepSpeed {deepspeed.__version__}: versions before 0.19.4 reduce gradients wrongly (its issues 7718 and "
            "8224): pip install 'deepspeed>=0.19.4'"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of PyTorch, to DeepSpeed
    # Its collectives for CPUs need a compiler and half a minute at the first start; gloo needs neither.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _raised_at_the_end(writer: Any) -> Iterator[None]:
    """Holds an error of writing a file back until DeepSpeed's save is over, because the other ranks wait in it."""
    write, errors = writer.save, []

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except Exception as error:  # of a full disk, PyTorch makes a RuntimeError
            errors.append(error)

    writer.save = save
    try:
        yield
    finally:
        del writer.save
    if errors:
        raise errors[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what DeepSpeed and its compilers print to standard output; on an error it goes to standard error."""
    sys.stdout.flush()
    real = os.dup(1)
    with tempfile.TemporaryFile() as chatter:
        os.dup2(chatter.fileno(), 1)
        try:
            yield
        except BaseException:
            sys.stdout.flush()
            chatter.seek(0)
            os.write(2, chatter.read())
            raise
        finally:
            sys.stdout.flush()
            os.dup2(real, 1)
            os.close(real)
