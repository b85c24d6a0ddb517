"""A DeepSpeed JSON beside the flags: who sets what, what is said, how what is wrong is named."""

import math

import pytest

from minigpt.settings.command_line import parse
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.deepspeed_config import deepspeed_config

AGREEMENTS = [
    ({"train_micro_batch_size_per_gpu": 4}, "per_device_train_batch_size", 4, "8"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", 4, "1"),
    ({"gradient_clipping": 2}, "max_grad_norm", 2.0, "1.0"),
    ({"gradient_clipping": 0}, "max_grad_norm", math.inf, "1.0"),
    ({"optimizer": {"type": "adam", "params": {"lr": 0.5}}}, "learning_rate", 0.5, "5e-05"),
    ({"optimizer": {"type": "AdamW", "params": {"eps": 0.5}}}, "adam_epsilon", 0.5, "1e-08"),
    ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0}}}, "weight_decay", 0.0, "0.1"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.5, "auto"]}}}, "adam_beta1", 0.5, "0.9"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, "adam_beta2", 0.999, "0.95"),
    ({"scheduler": {"type": "WarmupDecayLR"}}, "lr_scheduler_type", "linear", "cosine"),
    ({"scheduler": {"type": "WarmupLR"}}, "lr_scheduler_type", "constant", "cosine"),
    ({"scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.5}}}, "min_lr_ratio", 0.5, "0.0"),
    ({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5, "warmup_type": "linear"}}},
     "warmup_steps", 5, "0"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "name", "value", "default"), AGREEMENTS, ids=lambda case: str(case)[:60])
def test_the_file_beats_a_default_aloud_and_a_flag_not(complete, refusal, capsys, content, name, value, default):
    config = complete(content)[1]
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(getattr(TrainConfig(), name))
    assert config == TrainConfig(deepspeed="x.json", **{name: value})  # and nothing else changed
    line = capsys.readouterr().out
    assert line.startswith("x.json: ")
    assert line.endswith(f" (--{name} {value} instead of the default {default})\n")

    again = deepspeed_config(config, 64, 1, "cuda")  # already agreed
    assert capsys.readouterr().out == ""
    assert complete(content, f"--{name} {value}")[0] == again
    assert capsys.readouterr().out == ""

    message = refusal(content, f"--{name} {default}")  # the default's value, but set by the user
    assert message.startswith("x.json: ")
    assert message.endswith(f' contradicts --{name} {default} (drop one of them, or write "auto")')


def test_no_clipping_is_inf_as_a_flag_and_0_to_deepspeed(complete):
    assert complete({"gradient_clipping": 0})[0]["gradient_clipping"] == 0.0
    assert complete({"gradient_clipping": 0}, "--max_grad_norm inf")[0]["gradient_clipping"] == 0.0
    assert complete({}, "--max_grad_norm inf")[0]["gradient_clipping"] == 0.0


def test_the_lines_in_full(complete, refusal, capsys):
    complete({"train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    assert capsys.readouterr().out.splitlines() == [
        "x.json: fp16.enabled true (--fp16 instead of the default off)",
        "x.json: train_micro_batch_size_per_gpu 4 (--per_device_train_batch_size 4 instead of the default 8)",
    ]
    assert refusal({"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}}, "--learning_rate 1e-4") == (
        'x.json: optimizer.params.lr 2e-05 contradicts --learning_rate 0.0001 (drop one of them, or write "auto")'
    )


def test_yaml_counts_as_set_by_the_user(tmp_path):
    (tmp_path / "x.json").write_text('{"gradient_clipping": 2}')
    (tmp_path / "run.yaml").write_text(f"max_grad_norm: 1.0\ndeepspeed: {tmp_path / 'x.json'}\n")
    with pytest.raises(ValueError, match="gradient_clipping 2 contradicts --max_grad_norm 1.0"):
        deepspeed_config(parse(TrainConfig, ["--config", str(tmp_path / "run.yaml")]), 64, 1, "cpu")


def test_a_configuration_built_in_python_has_set_what_is_no_default(tmp_path):
    (tmp_path / "x.json").write_text('{"gradient_clipping": 2}')
    config = TrainConfig(deepspeed=str(tmp_path / "x.json"))
    deepspeed_config(config, 64, 1, "cpu")
    assert config.max_grad_norm == 2.0
    with pytest.raises(ValueError, match="gradient_clipping 2 contradicts --max_grad_norm 0.5"):
        deepspeed_config(TrainConfig(deepspeed=config.deepspeed, max_grad_norm=0.5), 64, 1, "cpu")


def test_two_keys_of_the_file_must_agree(complete, refusal):
    def both(peak):
        return {
            "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": peak}},
        }

    assert complete(both(0.001))[1].learning_rate == 0.001
    assert refusal(both(0.002)) == "x.json: scheduler.params.warmup_max_lr 0.002 contradicts optimizer.params.lr 0.001"
    default = {**both(0.002), "optimizer": {"type": "AdamW", "params": {"lr": 5e-5}}}  # a default, but stated
    assert refusal(default).endswith("contradicts optimizer.params.lr 5e-05")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gradient_clipping": "1.0"}, 'gradient_clipping: expected a number, got "1.0"'),
        ({"gradient_clipping": True}, "gradient_clipping: expected a number, got true"),
        ({"gradient_clipping": -1}, "gradient_clipping -1: --max_grad_norm must be above 0, got -1.0"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps: expected a whole number, got 1.5"),
        ({"gradient_accumulation_steps": math.inf},
         "gradient_accumulation_steps: expected a whole number, got Infinity"),
        ({"gradient_accumulation_steps": 0},
         "gradient_accumulation_steps 0: --gradient_accumulation_steps must be at least 1, got 0"),
        ({"train_batch_size": "8"}, 'train_batch_size: expected a number, got "8"'),
        ({"fp16": {"enabled": 1}}, "fp16.enabled: expected true or false, got 1"),
        ({"fp16": True}, "fp16: expected an object, got true"),
        ({"data_types": "fp32", "bf16": {"enabled": True}}, 'data_types: expected an object, got "fp32"'),
        ({"zero_optimization": 2}, "zero_optimization: expected an object, got 2"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage: expected a number, got "2"'),
        ({"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}},
         "optimizer.params.betas: expected two numbers, got 0.9"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, "x"]}}},
         'optimizer.params.betas: expected a number, got "x"'),
        ({"gradient_cliping": 1.0}, "unknown key gradient_cliping (did you mean gradient_clipping?)"),
        ({"zero_optimisation": {}}, "unknown key zero_optimisation (did you mean zero_optimization?)"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_named(refusal, content, message):
    assert refusal(content) == f"x.json: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"fp16": {\n"enabled": tr', "x.json: not JSON, comments allowed: "),
        ("[]", "x.json: expected a JSON object"),
    ],
)
def test_what_is_not_json_is_named(refusal, text, message):
    assert refusal(text).startswith(message)


def test_comments_and_last_commas_are_allowed_as_deepspeed_allows_them(tmp_path):
    (tmp_path / "x.json").write_text('{\n// of ours\n"zero_optimization": {"stage": 2,},  # two\n}')
    config = TrainConfig(deepspeed=str(tmp_path / "x.json"))
    assert deepspeed_config(config, 64, 1, "cpu")["zero_optimization"]["stage"] == 2


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError) as error:
        deepspeed_config(TrainConfig(deepspeed="no/such.json"), 64, 1, "cpu")
    assert str(error.value) == "--deepspeed no/such.json: no such file (ready-made ones lie in configs/deepspeed)"
