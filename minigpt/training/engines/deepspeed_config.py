"""A DeepSpeed JSON, as people have it, completed and brought into agreement with the flags, section by section.

The keys: https://www.deepspeed.ai/docs/config-json and DeepSpeed's `runtime/config.py`. "auto" is a habit of Hugging
Face's Trainer, which DeepSpeed itself does not know: nothing leaves here as "auto". Who wins where the file and a flag
speak of the same: minigpt/training/engines/deepspeed_file.py.
"""

import json
import math
from typing import Any

from minigpt.distributed import print0
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.deepspeed_file import ZERO1_FP16, DeepSpeedFile

# What would change the data, the loss or the step behind the loop's back, by the reason it is refused. Switched off,
# such a key is dropped: DeepSpeed refuses those that it has removed even then.
REFUSED = {
    "the loop orders and cuts the data": (
        *("data_efficiency", "curriculum_learning", "elasticity"),
        *("sequence_parallel_size", "tensor_parallel.autotp_size", "expert_parallel"),
    ),
    "it would train another model than the flags describe": (
        *("compression_training", "quantize_training", "weight_quantization", "eigenvalue", "sparse_attention"),
        *("progressive_layer_drop", "hybrid_engine", "zero_optimization.zero_quantized_weights"),
        *("zero_optimization.zero_quantized_nontrainable_weights", "zero_optimization.zero_quantized_gradients"),
    ),
    "--bf16 or --fp16 choose the precision, and weights, moments and checkpoints stay fp32": (
        *("amp", "torch_autocast", "fp16.fp16_master_weights_and_grads"),
        *("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"),
    ),
    "the loop counts on one step per window, of averaged gradients, skipped where they are not finite": (
        *("gradient_allreduce_op", "managed_gradient_accumulation", "bf16.check_grad_overflow", "sparse_gradients"),
        *("zero_optimization.compute_grad_norm", "zero_optimization.zenflow", "compile.deepcompile"),
        *("zero_optimization.offload_optimizer.super_offload", "autotuning", "graph_harvesting"),
    ),
    "checkpoints are written whole, and resumed exactly": (
        *("nebula", "datastates_ckpt", "checkpoint.writer", "checkpoint.load_universal"),
        "checkpoint.use_node_local_storage",
        *("zero_optimization.load_from_fp32_weights", "zero_optimization.elastic_checkpoint"),
    ),
    "DeepSpeed has removed it": (
        *("zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather"),
        "zero_optimization.zeropp_loco_param",
    ),
}
# The values that leave things as they are, where those are not false, 0 or nothing.
HARMLESS: dict[str, tuple] = {
    "sequence_parallel_size": (1,),
    "tensor_parallel.autotp_size": (0, 1),
    "gradient_allreduce_op": ("mean",),
    "managed_gradient_accumulation": (True,),
    "bf16.check_grad_overflow": (True,),
    "zero_optimization.compute_grad_norm": (True,),
    "zero_optimization.load_from_fp32_weights": (True,),
    "zero_optimization.mics_shard_size": (-1,),
}

SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}

# What may stand in optimizer.params besides what flags set; a value here is the only one that is still AdamW.
ADAM_PARAMS = {
    "torch_adam": None,
    "adam_w_mode": True,
    "bias_correction": True,
    "amsgrad": False,
    "fp32_optimizer_states": True,
}

FP16_DEFAULTS = {key: value for key, value in ZERO1_FP16["fp16"].items() if key != "enabled"}


def deepspeed_config(config: TrainConfig, hidden_size: int, world_size: int, device: str) -> dict[str, Any]:
    """What `deepspeed.initialize(config=...)` gets: the file of `--deepspeed`, or ZeRO-1 in fp16 for `--fp16` alone.

    Changes `config` where the file beats a default, and says so. A `scheduler` section is translated into the flags
    and taken out, because the loop sets the rate (its warmup ends where DeepSpeed's does, but begins one step up, not
    at 0). An `optimizer` section stays, completed: DeepSpeed then builds that optimizer, else the caller its own.
    `device` is "cuda", "cpu", ...; without CUDA nothing overlaps.

    >>> config = TrainConfig(fp16=True, gradient_accumulation_steps=2)
    >>> complete = deepspeed_config(config, hidden_size=768, world_size=4, device="cuda")
    >>> [complete[key] for key in ("train_batch_size", "gradient_clipping", "data_types")]
    [64, 1.0, {'grad_accum_dtype': 'fp32'}]

    Raises `FileNotFoundError`, and `ValueError` that names the file, the key and the flag or the fix.
    """
    file = DeepSpeedFile(config)
    _refuse(file)
    _precision(file)
    _batches(file, world_size)
    file.agree("gradient_clipping", "max_grad_norm", math.inf if file.get("gradient_clipping") == 0 else None)
    _optimizer(file)
    _scheduler(file)

    content = file.content
    content.pop("scheduler", None)
    content["train_micro_batch_size_per_gpu"] = config.per_device_train_batch_size
    content["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    content["train_batch_size"] = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    content["gradient_clipping"] = 0.0 if config.max_grad_norm == math.inf else config.max_grad_norm
    if "optimizer" in content:
        content["optimizer"]["params"] = {
            **content["optimizer"].get("params", {}),
            "lr": config.learning_rate,
            "betas": [config.adam_beta1, config.adam_beta2],
            "eps": config.adam_epsilon,
            "weight_decay": config.weight_decay,
        }
    _zero(file, hidden_size, device)
    if any((file.get("activation_checkpointing") or {}).values()) and not config.gradient_checkpointing:
        print0(f"{file.name}: activation_checkpointing does nothing for this model; --gradient_checkpointing does")
    return _without_auto(content)


def _refuse(file: DeepSpeedFile) -> None:
    for reason, keys in REFUSED.items():
        for key in keys:
            value = file.get(key)
            off = not value or (isinstance(value, dict) and value.get("enabled") in (False, "auto"))
            if value is not None and not (value in HARMLESS[key] if key in HARMLESS else off):
                raise file.error(f"{key} {json.dumps(value)} is not possible here: {reason} (take it out)")
            *sections, last = key.split(".")
            parent: Any = file.content
            for part in sections:
                parent = parent.get(part) if isinstance(parent, dict) else None
            if isinstance(parent, dict):
                parent.pop(last, None)


def _precision(file: DeepSpeedFile) -> None:
    """`fp16.enabled` and `--fp16`, `bf16.enabled` and `--bf16`; the sections that come of them."""
    config = file.config
    file.replace_auto_precision()
    for name in ("fp16", "bf16"):
        file.agree(f"{name}.enabled", name)
    file.content["fp16"] = {**FP16_DEFAULTS, **_without_auto(file.section("fp16")), "enabled": config.fp16}
    file.content["bf16"] = {**file.section("bf16"), "enabled": config.bf16}
    if config.bf16:
        file.content["bf16"]["check_grad_overflow"] = True  # a step that is not finite is skipped, as in fp16
    if config.fp16 or config.bf16:
        # Summed in half precision, the gradients of small micro-batches vanish beside the sum: 1 + 2^-9 is 1 in bf16.
        types = file.section("data_types")
        file.content["data_types"] = {"grad_accum_dtype": "fp32", **_without_auto(types)}
        # And rounded once more where the ranks add them up, they differ from one rank's in the second digit.
        file.content["communication_data_type"] = file.get("communication_data_type") or "fp32"


def _batches(file: DeepSpeedFile, world_size: int) -> None:
    """The micro-batch and the accumulation, or what `train_batch_size` leaves of them: the product of all three."""
    file.agree("train_micro_batch_size_per_gpu", "per_device_train_batch_size")
    file.agree("gradient_accumulation_steps", "gradient_accumulation_steps")
    total = file.number("train_batch_size")
    if total is None:
        return
    config = file.config
    fixed = {
        name: getattr(config, name)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        if file.is_fixed(name)
    }
    product = math.prod(fixed.values()) * world_size
    if total < 1 or total % product or (len(fixed) == 2 and total != product):
        factors = " x ".join([*(f"--{name} {value}" for name, value in fixed.items()), f"{world_size} ranks"])
        wanted = "" if len(fixed) == 2 else "a multiple of "
        raise file.error(f"train_batch_size {total} is not {wanted}{factors} = {product}")
    rest = int(total) // product
    if not fixed:
        file.agree(
            "train_batch_size", "per_device_train_batch_size", math.gcd(rest, config.per_device_train_batch_size)
        )
        rest //= config.per_device_train_batch_size
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if not file.is_fixed(name):
            file.agree("train_batch_size", name, rest)


def _optimizer(file: DeepSpeedFile) -> None:
    """An `optimizer` section: AdamW only, because that is what checkpoints hold the moments of."""
    if not file.section("optimizer"):
        file.content.pop("optimizer", None)
        return
    kind = file.get("optimizer.type")
    if str(kind).lower() not in ("adam", "adamw"):
        raise file.error(f"optimizer.type {json.dumps(kind)} is not possible here: AdamW is what checkpoints hold")
    params = file.section("optimizer.params")
    for key, value in params.items():
        if key not in ("lr", "betas", "eps", "weight_decay", *ADAM_PARAMS):
            fix = "gradient_clipping does that" if key == "max_grad_norm" else "take it out"
            raise file.error(f"optimizer.params.{key} is not known here ({fix})")
        wanted = ADAM_PARAMS.get(key)
        if wanted is not None and value not in (wanted, "auto"):
            raise file.error(
                f"optimizer.params.{key} {json.dumps(value)} is not AdamW as it is trained here"
                f" (write {json.dumps(wanted)}, or take it out)"
            )
    file.agree("optimizer.params.lr", "learning_rate")
    file.agree("optimizer.params.eps", "adam_epsilon")
    file.agree("optimizer.params.weight_decay", "weight_decay")
    betas = file.get("optimizer.params.betas")
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != 2:
            raise file.error(f"optimizer.params.betas: expected two numbers, got {json.dumps(betas)}")
        for name, beta in zip(("adam_beta1", "adam_beta2"), betas):
            if beta != "auto":
                file.agree("optimizer.params.betas", name, beta)


def _scheduler(file: DeepSpeedFile) -> None:
    """A `scheduler` section in the words of the flags, or a refusal that names it."""
    if not file.section("scheduler"):
        return
    kind = file.get("scheduler.type")
    if kind not in SCHEDULES:
        raise file.error(
            f"scheduler.type {json.dumps(kind)} has no counterpart here ({', '.join(SCHEDULES)} have;"
            " or take the section out and set --lr_scheduler_type and --warmup_steps)"
        )
    cosine = kind == "WarmupCosineLR"
    start, end = ("warmup_min_ratio", "cos_min_ratio") if cosine else ("warmup_min_lr", "warmup_max_lr")
    params = file.section("scheduler.params")
    for key in params:
        if key not in (start, end, "warmup_num_steps", "warmup_type", "total_num_steps"):
            raise file.error(f"scheduler.params.{key} is not known of {kind} (take it out)")

    file.agree("scheduler.type", "lr_scheduler_type", SCHEDULES[kind])
    if kind == "WarmupDecayLR":
        file.agree("scheduler.type", "min_lr_ratio", 0.0)
    file.agree(f"scheduler.params.{end}", "min_lr_ratio" if cosine else "learning_rate")
    file.agree("scheduler.params.warmup_num_steps", "warmup_steps")
    if file.number(f"scheduler.params.{start}"):
        raise file.error(f"scheduler.params.{start} {params[start]}: the warmup begins at 0 here (write 0)")
    warmup_type = file.get("scheduler.params.warmup_type")
    if warmup_type is None and file.get("scheduler.params.warmup_num_steps") is not None:
        warmup_type = "log"  # DeepSpeed's default
    if warmup_type not in (None, "linear") and file.config.warmup_steps:
        raise file.error(
            f'scheduler.params.warmup_type is {warmup_type}, and the warmup here is a line: write "linear"'
        )
    total, max_steps = file.number("scheduler.params.total_num_steps"), file.config.max_steps
    if total is not None and total != max_steps:
        raise file.error(
            f"scheduler.params.total_num_steps {total} contradicts --max_steps {max_steps or '(unset)'}"
            ' (write "auto", or make them equal)'
        )


def _zero(file: DeepSpeedFile, hidden_size: int, device: str) -> None:
    config, content = file.config, file.content
    zero = file.section("zero_optimization")
    stage = file.number("zero_optimization.stage") or 0
    if stage not in (0, 1, 2, 3):
        raise file.error(f"zero_optimization.stage: expected 0, 1, 2 or 3, got {stage}")
    if stage == 0 and (config.fp16 or config.bf16):
        stage = 1
        print0(f"{file.name}: ZeRO stage 1 instead of 0, where DeepSpeed scales half-precision gradients wrongly")
    overlap = zero.get("overlap_comm", "auto")
    if overlap == "auto":
        overlap = stage == 3
    if overlap and device != "cuda":
        overlap = False  # gloo has no streams to overlap on
    sizes = {  # as Hugging Face's Trainer fills them in
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    sizes = {key: size for key, size in sizes.items() if zero.get(key) == "auto"}
    content["zero_optimization"] = {**zero, **sizes, "stage": int(stage), "overlap_comm": overlap}

    offloaded = zero.get("cpu_offload") or file.get("zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
    if offloaded and "optimizer" not in content:
        content.setdefault("zero_force_ds_cpu_optimizer", False)  # or DeepSpeed refuses PyTorch's AdamW


def _without_auto(value: Any) -> Any:
    """The same without every "auto" in it, so that DeepSpeed's default holds there."""
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    if isinstance(value, list):
        return [_without_auto(item) for item in value if item != "auto"]
    return value
