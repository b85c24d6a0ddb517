"""Out of memory in training, as one line: what the run takes, what is there, and which flag to change next."""

import contextlib
import io
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import torch

from minigpt.distributed import OutOfMemory, is_out_of_memory, world_size
from minigpt.model.base import ModelConfig
from minigpt.settings.groups import TrainConfig
from minigpt.training.plan import Lengths, plan
from minigpt.training.run.checkpoint import checkpoints
from minigpt.training.run.folder import METRICS

SUGGESTIONS = 3  # changes in the message; the first is the one to try next
MAX_RATIO = 0.99  # of the estimate before: a change that leaves more is not suggested
MIN_OUTSIDE = 0.05  # of the GPU's memory: if other processes hold more, the message says how much


@contextlib.contextmanager
def explain_out_of_memory(
    config: TrainConfig,
    model_config: ModelConfig,
    device: torch.device | str,
    lengths: Lengths,
    replay_lengths: Lengths = (),
    replay_ratio: float = 0.0,
    *,
    step: Callable[[], int] | None = None,
    evaluating: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Turns PyTorch's error into an `OutOfMemory` whose message says what to change.

    Args:
        device: this rank's.
        lengths, replay_lengths, replay_ratio: as `plan` takes them.
        step: steps made so far; None while engine and weights are set up.
        evaluating: whether an evaluation is under way, and not a step.

    Raises:
        OutOfMemory: in place of `torch.OutOfMemoryError`, and of what CPU, MPS, cuBLAS and NCCL raise instead.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        device = torch.device(device)
        memory, place = ("GPU memory", "GPU") if device.type == "cuda" else ("memory", "process")
        steps = step() if step else 0
        if evaluating():
            what = f"evaluation at step {steps}: out of {memory}"
            rows = config.per_device_eval_batch_size
            changes = [f"--per_device_eval_batch_size {rows // 2}"] if rows > 1 else [_last_resort(config)]
        else:
            needed, changes = next_changes(config, model_config, lengths, replay_lengths, replay_ratio)
            what = f"{f'step {steps + 1}' if step else 'setting up'}: out of {memory}: "
            what += f"this run takes about {_gib(needed)} a {place} by --plan's estimate"
            changes = [*changes, _last_resort(config)][:SUGGESTIONS]
        parts = [what, _device_memory(device), "next: " + ", then ".join(changes), _kept(config, steps)]
        raise OutOfMemory("; ".join(part for part in parts if part)) from error


def next_changes(
    config: TrainConfig,
    model_config: ModelConfig,
    lengths: Lengths,
    replay_lengths: Lengths = (),
    replay_ratio: float = 0.0,
) -> tuple[float, list[str]]:
    """The plan's bytes on each GPU, and the flags that need less memory, each in addition to those before it.

    >>> shape = GPTConfig.preset("gpt2")
    >>> needed, changes = next_changes(TrainConfig(gradient_checkpointing=True), shape, [513] * 64)
    >>> f"{needed / 2**30:.2f}", changes[0]
    ('3.31', '--per_device_train_batch_size 4 --gradient_accumulation_steps 2 (2.77 GiB, the same steps)')
    """

    def estimate(config: TrainConfig) -> float:
        with contextlib.redirect_stdout(io.StringIO()):  # what DeepSpeed's file changes was said at the start
            planned = plan(config, model_config, lengths, replay_lengths, replay_ratio)
        return planned.memory[planned.stage].total

    current = copy(config)
    current.plan = world_size()
    needed = smallest = estimate(current)
    texts = []
    for change in _candidates(config):
        changed = copy(current)
        vars(changed).update(change)
        if "_given" in vars(config):  # the flags that count as the user's, beside a DeepSpeed file
            vars(changed)["_given"] = vars(current)["_given"] | set(change)
        try:
            bytes_left = estimate(changed)
        except (ValueError, OSError):  # the run's DeepSpeed file fixes this setting; or configs/deepspeed is not here
            continue
        if bytes_left < MAX_RATIO * smallest:
            current, smallest = changed, bytes_left
            same = ", the same steps" if "gradient_accumulation_steps" in change else ""
            flags = (f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items())
            texts.append(f"{' '.join(flags)} ({_gib(bytes_left)}{same})")
    return needed, texts


def _candidates(config: TrainConfig) -> list[dict[str, Any]]:
    """Settings that may need less memory; first those that change neither the steps nor the engine."""
    candidates: list[dict[str, Any]] = []
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if batch > 1:
        part = next(divisor for divisor in range(2, batch + 1) if batch % divisor == 0)
        candidates.append(
            {"per_device_train_batch_size": batch // part, "gradient_accumulation_steps": accumulation * part}
        )
    if not config.gradient_checkpointing:
        candidates.append({"gradient_checkpointing": True})
    precision = "fp16" if config.fp16 else "bf16"  # configs/deepspeed has no file for fp32
    names = [f"zero1_{precision}", f"zero2_{precision}", *(["zero3_fp16"] if config.fp16 else [])]
    candidates += [{"deepspeed": f"configs/deepspeed/{name}.json"} for name in names]
    return [*candidates, {"deepspeed": "configs/deepspeed/zero3_offload.json", precision: True}]


def _last_resort(config: TrainConfig) -> str:
    length = next((f"a shorter --{name} or " for name in ("max_seq_length", "block_size") if hasattr(config, name)), "")
    return f"{length}a smaller model"


def _device_memory(device: torch.device) -> str:
    """What the GPU has, and how much of it other processes hold."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    held = f", {_gib(outside)} of it held outside this PyTorch" if outside > MIN_OUTSIDE * total else ""
    return f"the GPU has {_gib(total)}{held}"


def _kept(config: TrainConfig, steps: int) -> str:
    """The checkpoint from which the run can be resumed, or that there is none."""
    if config.output_dir is None:
        return ""
    saved = checkpoints(Path(config.output_dir))
    if saved:
        return f"{saved[-1]} is intact (--resume latest)"
    stepped = steps > 0 and (Path(config.output_dir) / METRICS).exists()
    return "no checkpoint was written yet (--resume auto starts anew, --save_steps writes some)" if stepped else ""


def _gib(amount: float) -> str:
    return f"{amount / 2**30:.2f} GiB"
