"""A DeepSpeed JSON as DeepSpeed gets it: completed, promoted, and without what would act behind the loop's back.

Beside the flags: test_deepspeed_file.py. Its optimizer and scheduler: test_deepspeed_optimizer.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.deepspeed_config import HARMLESS, REFUSED, deepspeed_config
from minigpt.training.engines.deepspeed_file import ZERO1_FP16

READY_MADE = Path(__file__).parents[3] / "configs" / "deepspeed"


def autos(value):
    if isinstance(value, dict):
        return [found for item in value.values() for found in autos(item)]
    if isinstance(value, list):
        return [found for item in value for found in autos(item)]
    return [value] if value == "auto" else []


# ---- complete


def test_an_empty_file_is_filled_from_the_flags(complete, capsys):
    flags = "--per_device_train_batch_size 2 --gradient_accumulation_steps 3 --max_grad_norm 0.5"
    assert complete({}, flags, world_size=4)[0] == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 24,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": False, **{key: value for key, value in ZERO1_FP16["fp16"].items() if key != "enabled"}},
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 0, "overlap_comm": False},
    }
    assert capsys.readouterr().out == ""


def test_fp16_alone_is_the_ready_made_zero1_fp16(complete):
    config = TrainConfig(fp16=True)
    assert json.loads((READY_MADE / "zero1_fp16.json").read_text()) == ZERO1_FP16
    alone = deepspeed_config(config, 64, 2, "cuda")
    assert alone == complete(ZERO1_FP16, "--fp16", world_size=2)[0]
    assert alone == {
        "communication_data_type": "fp32",
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 16,
        "gradient_clipping": 1.0,
        "fp16": ZERO1_FP16["fp16"],
        "bf16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {**ZERO1_FP16["zero_optimization"], "overlap_comm": False},
    }
    assert ZERO1_FP16["gradient_clipping"] == "auto"  # not written into
    assert config == TrainConfig(fp16=True)


def test_the_worked_example():
    config = TrainConfig(fp16=True, gradient_accumulation_steps=2)
    whole = deepspeed_config(config, hidden_size=768, world_size=4, device="cuda")
    assert [whole[key] for key in ("train_batch_size", "gradient_clipping", "data_types")] == [
        64, 1.0, {"grad_accum_dtype": "fp32"},
    ]  # fmt: skip


HUGGING_FACE = {  # as the documentation of transformers has it, with everything "auto"
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
             "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW",
                  "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR",
                  "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "none"},
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    "tensorboard": {"enabled": False, "job_name": ["auto", {"a": "auto"}]},
}  # fmt: skip


def test_a_file_of_hugging_faces_trainer(complete):
    whole, config = complete(HUGGING_FACE, "--bf16 --learning_rate 1e-4 --adam_beta2 0.99 --warmup_steps 3")
    assert autos(whole) == []
    assert "scheduler" not in whole
    assert config.lr_scheduler_type == "constant"
    assert whole["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 1e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1},
    }
    assert whole["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert whole["fp16"]["enabled"] is False
    assert whole["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "reduce_bucket_size": 4096,
        "stage3_prefetch_bucket_size": 3686,
        "stage3_param_persistence_threshold": 640,
        "stage3_max_live_parameters": 1e9,
    }
    assert "zero_force_ds_cpu_optimizer" not in whole  # DeepSpeed builds its own CPU Adam
    assert (whole["steps_per_print"], whole["wall_clock_breakdown"]) == (2000, False)
    assert whole["tensorboard"] == {"enabled": False, "job_name": [{}]}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("path", sorted(READY_MADE.glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_accepts_the_ready_made_files(path, device, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config_module = pytest.importorskip("deepspeed.runtime.config", reason="DeepSpeed is on Linux only")
    config = TrainConfig(deepspeed=str(path), max_grad_norm=0.5)
    whole = deepspeed_config(config, 768, 1, device)
    assert autos(whole) == []
    theirs = config_module.DeepSpeedConfig(whole)  # unknown keys of its sections are errors
    assert theirs.zero_optimization_stage == int(path.stem[4])
    assert theirs.float16_config.enabled == config.fp16 == path.stem.endswith("fp16")
    assert theirs.bfloat16_config.enabled == config.bf16 == path.stem.endswith("bf16")
    assert (theirs.train_batch_size, theirs.gradient_clipping) == (8, 0.5)
    assert theirs.grad_accum_dtype == (None if path.stem == "zero3_offload" else "fp32")
    assert theirs.zero_config.overlap_comm == (device == "cuda" and theirs.zero_optimization_stage == 3)


def test_the_ready_made_files_are_the_six_of_the_readme():
    names = ["zero1_bf16", "zero1_fp16", "zero2_bf16", "zero2_fp16", "zero3_fp16", "zero3_offload"]
    assert sorted(path.stem for path in READY_MADE.glob("*.json")) == names


# ---- batch sizes


@pytest.mark.parametrize(
    ("content", "flags", "world_size", "micro", "accumulation"),
    [
        ({"train_batch_size": 64}, "", 2, 8, 4),
        ({"train_batch_size": 12}, "", 1, 4, 3),  # the largest part of the default 8 that divides it
        ({"train_batch_size": 3}, "", 1, 1, 3),
        ({"train_batch_size": 8}, "", 1, 8, 1),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}, "", 3, 2, 2),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 2}, "", 3, 2, 2),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 1}, "", 3, 4, 1),
        ({"train_batch_size": 12}, "--per_device_train_batch_size 2", 3, 2, 2),
        ({"train_batch_size": 12}, "--gradient_accumulation_steps 2", 3, 2, 2),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 2}, "--per_device_train_batch_size 2", 3, 2, 2),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}, "", 3, 2, 2),
        ({"train_batch_size": 12.0, "train_micro_batch_size_per_gpu": 2.0}, "", 3, 2, 2),
    ],
)
def test_the_batch_size_is_cut(complete, content, flags, world_size, micro, accumulation):
    whole, config = complete(content, flags, world_size)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (micro, accumulation)
    assert [whole["train_batch_size"], whole["train_micro_batch_size_per_gpu"]] == [content["train_batch_size"], micro]
    assert whole["gradient_accumulation_steps"] == accumulation
    assert deepspeed_config(config, 64, world_size, "cuda") == whole


@pytest.mark.parametrize(
    ("content", "flags", "world_size", "message"),
    [
        ({"train_batch_size": 9}, "", 2, "train_batch_size 9 is not a multiple of 2 ranks = 2"),
        ({"train_batch_size": 12}, "--per_device_train_batch_size 5", 2,
         "train_batch_size 12 is not a multiple of --per_device_train_batch_size 5 x 2 ranks = 10"),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 4}, "", 2,
         "train_batch_size 12 is not a multiple of --gradient_accumulation_steps 4 x 2 ranks = 8"),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 1}, "--per_device_train_batch_size 3", 2,
         "train_batch_size 12 is not --per_device_train_batch_size 3 x --gradient_accumulation_steps 1 x 2 ranks = 6"),
        ({"train_batch_size": 0}, "", 1, "train_batch_size 0 is not a multiple of 1 ranks = 1"),
    ],
)  # fmt: skip
def test_a_batch_size_that_cannot_be_cut_shows_the_arithmetic(refusal, content, flags, world_size, message):
    assert refusal(content, flags, world_size) == f"x.json: {message}"


# ---- precision and stage


@pytest.mark.parametrize(
    ("content", "flags", "fp16", "bf16"),
    [
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "", False, False),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "--bf16", False, True),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "--fp16", True, False),
        ({"fp16": {"enabled": False}}, "--bf16", False, True),
        ({}, "--bf16", False, True),
        ({"fp16": {}}, "--fp16", True, False),
        ({"bf16": {"enabled": True}}, "", False, True),
        ({"bfloat16": {"enabled": True}}, "", False, True),
        ({"fp16": {"enabled": True}}, "", True, False),
    ],
)
def test_precision_is_the_files_or_the_flags(complete, content, flags, fp16, bf16):
    whole, config = complete({**content, "zero_optimization": {"stage": 1}}, flags)
    assert (config.fp16, whole["fp16"]["enabled"]) == (fp16, fp16)
    assert (config.bf16, whole["bf16"]["enabled"]) == (bf16, bf16)
    assert whole.get("data_types") == ({"grad_accum_dtype": "fp32"} if fp16 or bf16 else None)
    assert "bfloat16" not in whole


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ({"fp16": {"enabled": False}}, "--fp16", "fp16.enabled false contradicts --fp16 "),
        ({"bf16": {"enabled": True}}, "--no_bf16", "bf16.enabled true contradicts --no_bf16 "),
        ({"fp16": {"enabled": True}}, "--bf16", "fp16.enabled true: --fp16 and --bf16 are two ways to compute: "),
        ({"bf16": {"enabled": True}}, "--fp16", "bf16.enabled true: --fp16 and --bf16 are two ways to compute: "),
    ],
)
def test_contradictory_precisions_are_named(refusal, content, flags, message):
    assert refusal(content, flags).startswith(f"x.json: {message}")


def test_what_the_file_says_of_fp16_and_accumulation_is_kept(complete):
    fp16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": "auto", "auto_cast": False}
    content = {"fp16": fp16, "data_types": {"grad_accum_dtype": "fp16"}, "zero_optimization": {"stage": 2}}
    whole = complete(content)[0]
    assert whole["fp16"] == {**ZERO1_FP16["fp16"], "initial_scale_power": 8, "auto_cast": False}
    assert whole["data_types"] == {"grad_accum_dtype": "fp16"}
    assert complete({**content, "data_types": {"grad_accum_dtype": "auto"}})[0]["data_types"] == {
        "grad_accum_dtype": "fp32"
    }


@pytest.mark.parametrize("zero", [None, {}, {"stage": 0}, {"stage": "auto"}, False])
@pytest.mark.parametrize(("flags", "stage"), [("", 0), ("--bf16", 1), ("--fp16", 1)])
def test_half_precision_at_stage_0_becomes_stage_1_aloud(complete, capsys, zero, flags, stage):
    """DeepSpeed's stage 0 does not multiply the loss by the scale that its step divides by."""
    whole = complete({} if zero is None else {"zero_optimization": zero}, flags)[0]
    assert whole["zero_optimization"]["stage"] == stage
    said = "x.json: ZeRO stage 1 instead of 0, where DeepSpeed scales half-precision gradients wrongly\n"
    assert capsys.readouterr().out == (said if stage else "")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_stages_stay(complete, capsys, stage):
    assert complete({"zero_optimization": {"stage": stage}}, "--bf16")[0]["zero_optimization"]["stage"] == stage
    assert capsys.readouterr().out == ""


def test_the_old_form_of_zero(complete):
    assert complete({"zero_optimization": True})[0]["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("zero", "device", "overlap"),
    [
        ({"stage": 3}, "cuda", True),
        ({"stage": 2}, "cuda", False),
        ({"stage": 2, "overlap_comm": True}, "cuda", True),
        ({"stage": 3, "overlap_comm": False}, "cuda", False),
        ({"stage": 3, "overlap_comm": "auto"}, "cuda", True),
        ({"stage": 3}, "cpu", False),
        ({"stage": 2, "overlap_comm": True}, "cpu", False),
    ],
)
def test_communication_overlaps_only_on_cuda(complete, zero, device, overlap):
    assert complete({"zero_optimization": zero}, device=device)[0]["zero_optimization"]["overlap_comm"] is overlap


@pytest.mark.parametrize(
    ("content", "forced"),
    [
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, False),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, False),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, False),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, None),
        ({"zero_optimization": {"stage": 2}}, None),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}, "zero_force_ds_cpu_optimizer": True}, True),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}, "optimizer": {"type": "Adam"}}, None),
    ],
)
def test_an_offloaded_optimizer_may_be_pytorchs(complete, content, forced):
    assert complete(content)[0].get("zero_force_ds_cpu_optimizer") is forced


# ---- what would act behind the loop's back


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


KEYS = [(key, reason) for reason, keys in REFUSED.items() for key in keys]


@pytest.mark.parametrize(("key", "reason"), KEYS, ids=[key for key, _ in KEYS])
def test_what_acts_behind_the_loops_back_is_refused_and_dropped_where_it_is_off(complete, refusal, key, reason):
    if key in HARMLESS:
        on = [False, "sum"] if HARMLESS[key][0] in (True, "mean") else [2]
        off = HARMLESS[key]
    else:
        on, off = [True, {"enabled": True}, {"x": 1}], (False, {}, {"enabled": False, "x": 1}, "auto", None)
    for value in on:
        expected = f"x.json: {key} {json.dumps(value)} is not possible here: {reason} (take it out)"
        assert refusal(nested(key, value)) == expected
    for value in off:
        whole = complete(nested(key, value))[0]
        for part in key.split("."):
            assert isinstance(whole, dict)
            whole = whole.get(part, {})
        assert whole == {}


def test_activation_checkpointing_is_said_to_do_nothing(complete, capsys):
    section = {"activation_checkpointing": {"partition_activations": True}}
    line = "x.json: activation_checkpointing does nothing for this model; --gradient_checkpointing does\n"
    assert complete(section)[0]["activation_checkpointing"] == {"partition_activations": True}
    assert capsys.readouterr().out == line
    complete(section, "--gradient_checkpointing")
    complete({"activation_checkpointing": {"partition_activations": False}})
    complete({"activation_checkpointing": "auto"})
    assert capsys.readouterr().out == ""


def test_what_is_not_read_here_passes_through(complete):
    content = {
        "wandb": {"enabled": True, "project": "x"},
        "communication_data_type": "fp32",
        "comms_logger": {"enabled": True},
        "aio": {"block_size": 1},
    }
    whole = complete(content)[0]
    assert {key: whole[key] for key in content} == content


def test_deepspeed_is_not_imported():
    module = "minigpt.training.engines.deepspeed_config"
    code = f"import sys, {module}; assert not {{'deepspeed', 'torch'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
