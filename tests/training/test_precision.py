"""Precision left to the machine, with the products' seconds made up."""

import json

import pytest

from minigpt import GPT, GPTConfig, TrainConfig, make_engine
from minigpt.settings.command_line import is_given, parse
from minigpt.training import precision as machine
from minigpt.training.precision import fit_to_machine

from ..ranks import on_ranks


@pytest.fixture(autouse=True)
def machine_with(monkeypatch):
    """Sets how many times as long a product takes in bf16 as in fp32."""

    def set_ratio(ratio: float) -> None:
        monkeypatch.setattr(machine, "bf16_seconds_ratio", lambda device: ratio)
        monkeypatch.setattr(machine, "threads_warning", lambda device: None)

    set_ratio(100.0)
    return set_ratio


@pytest.mark.parametrize(
    ("ratio", "bf16", "said"),
    [
        (123.4, False, "precision: fp32, a product takes 123 times as long in bf16 as in fp32 here\n"),
        (0.5, True, "precision: bf16, a product takes 0.5 times as long in bf16 as in fp32 here\n"),
        (1.0, True, "precision: bf16, a product takes 1 times as long in bf16 as in fp32 here\n"),
    ],
)
def test_auto_is_what_the_machine_computes_fast(machine_with, capsys, ratio, bf16, said):
    machine_with(ratio)
    config = TrainConfig(precision="auto")
    fit_to_machine(config, "cpu")
    assert (config.bf16, config.fp16, config.precision) == (bf16, False, None)
    assert capsys.readouterr().out == said
    fit_to_machine(config, "cpu")
    assert config.bf16 == bf16


def test_make_engine_settles_what_is_left_open(machine_with):
    machine_with(0.5)
    config = TrainConfig(precision="auto")
    engine = make_engine(GPT(GPTConfig(31, n_positions=8, n_embd=8, n_layer=1, n_head=1)), config)
    assert engine.bf16
    assert config.bf16


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_resumed_run_keeps_its_precision(machine_with, capsys, tmp_path, precision):
    machine_with(100.0 if precision == "bf16" else 0.5)
    recipe = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    (tmp_path / "trainer.json").write_text(json.dumps({"recipe": recipe}))
    config = TrainConfig(precision="auto")
    fit_to_machine(config, "cpu", tmp_path)
    assert {"bf16": config.bf16, "fp16": config.fp16} == recipe
    assert config.precision is None
    assert capsys.readouterr().out == f"precision: {precision}, that of {tmp_path}\n"


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "trainer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^{tmp_path}/trainer.json: damaged; remove {tmp_path}"):
        fit_to_machine(TrainConfig(precision="auto"), "cpu", tmp_path)


def settled_on_rank(ratios: list[float]) -> bool:
    from minigpt.distributed import rank

    machine.bf16_seconds_ratio = lambda device: ratios[rank()]
    machine.threads_warning = lambda device: None
    config = TrainConfig(precision="auto")
    fit_to_machine(config, "cpu")
    return config.bf16


def test_rank_0_decides_for_all():
    """Two nodes of unlike CPUs would otherwise sum gradients of two precisions."""
    assert on_ranks(2, settled_on_rank, [0.5, 100.0]) == [True, True]
    assert on_ranks(2, settled_on_rank, [100.0, 0.5]) == [False, False]


def test_bf16_by_hand_still_runs_and_its_price_is_said(monkeypatch, capsys):
    monkeypatch.setattr(machine, "bf16_warning", lambda device: "bf16 is emulated here: ...")
    config = TrainConfig(bf16=True)
    fit_to_machine(config, "cpu")
    assert config.bf16
    assert capsys.readouterr().out == "bf16 is emulated here: ...; --precision auto computes in the faster one\n"
    fit_to_machine(TrainConfig(), "cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ("precision: auto", [], ("auto", False, False)),
        ("precision: auto", ["--bf16"], (None, True, False)),
        ("precision: auto", ["--no_bf16"], (None, False, False)),
        ("bf16: true", ["--precision", "auto"], ("auto", False, False)),
        ("bf16: true", ["--fp16"], (None, False, True)),
        ("bf16: true", ["--precision", "fp32"], (None, False, False)),
        ("fp16: true", ["--precision", "bf16"], (None, True, False)),
    ],
)
def test_a_flag_beats_what_a_file_says_of_the_precision(tmp_path, file, flags, expected):
    (tmp_path / "x.yaml").write_text(file)
    config = parse(TrainConfig, ["--config", str(tmp_path / "x.yaml"), *flags])
    assert (config.precision, config.bf16, config.fp16) == expected


@pytest.mark.parametrize("flags", [["--precision", "auto", "--bf16"], ["--precision", "fp32", "--fp16"]])
def test_two_ways_to_say_it_are_refused(flags):
    with pytest.raises(ValueError, match=f"^--precision {flags[1]} and {flags[2]} both say how to compute: give one$"):
        parse(TrainConfig, flags)


def test_a_deepspeed_file_sets_what_auto_leaves_open(tmp_path, capsys):
    from minigpt.training.engines.deepspeed_config import deepspeed_config

    path = tmp_path / "x.json"
    path.write_text('{"bf16": {"enabled": true}}')
    config = parse(TrainConfig, ["--precision", "auto", "--deepspeed", str(path)])
    assert is_given(config, "precision")
    assert deepspeed_config(config, 8, 1, "cpu")["bf16"]["enabled"]
    assert (config.precision, config.bf16) == (None, True)
    assert f"{path}: sets the precision, which --precision auto leaves open\n" in capsys.readouterr().out
    config = parse(TrainConfig, ["--precision", "fp32", "--deepspeed", str(path)])
    with pytest.raises(ValueError, match="bf16.enabled true contradicts --precision fp32 "):
        deepspeed_config(config, 8, 1, "cpu")


@pytest.mark.parametrize("plan", [None, 2])
def test_the_deepspeed_file_is_asked_before_the_machine(tmp_path, capsys, plan):
    """`--plan` and `--eval_only` come here first; fp32, chosen here, then contradicted the file."""
    from minigpt.training.engines.deepspeed_config import deepspeed_config

    path = tmp_path / "x.json"
    path.write_text('{"bf16": {"enabled": true}}')
    flags = ["--precision", "auto", "--deepspeed", str(path), *(["--plan", str(plan)] if plan else [])]
    config = parse(TrainConfig, flags)
    fit_to_machine(config, "cpu")
    assert deepspeed_config(config, 8, 1, "cpu")["bf16"]["enabled"]
    assert "precision: fp32" not in capsys.readouterr().out


def test_a_plan_made_on_a_cpu_is_of_the_precision_of_gpus(machine_with, capsys):
    machine_with(100.0)
    config = TrainConfig(precision="auto", plan=8)
    fit_to_machine(config, "cpu")
    assert config.bf16
    assert capsys.readouterr().out.startswith("precision: bf16, which GPUs older than Ampere ")
