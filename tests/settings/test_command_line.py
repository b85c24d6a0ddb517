"""The command line and the YAML that a dataclass becomes."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from minigpt import __version__
from minigpt.settings.command_line import convert, is_given, parse, save_yaml
from minigpt.settings.groups import PromptArguments, TrainConfig


@dataclass
class Config(TrainConfig, PromptArguments):
    """A script's configuration."""

    data: list[str] = field(default_factory=list)
    """Files."""
    layers: list[int] = field(default_factory=lambda: [1, 2])
    """A list of numbers."""
    mode: Literal["fast", "exact"] | None = None
    """A choice, or none."""


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# ---- flags


def test_defaults():
    assert parse(Config, []) == Config()


def test_defaults_others_count_on():
    config = TrainConfig()
    assert (config.lr_scheduler_type, config.warmup_steps, config.weight_decay) == ("cosine", 0, 0.1)
    assert (config.max_grad_norm, config.seed) == (1.0, 42)


def test_flags_of_every_kind():
    line = "--data A B --fp16 --learning_rate 1e-4 --max_steps=7 --lr_scheduler_type linear --layers 3 --mode exact"
    assert parse(Config, line.split()) == Config(
        data=["A", "B"],
        fp16=True,
        learning_rate=1e-4,
        max_steps=7,
        lr_scheduler_type="linear",
        layers=[3],
        mode="exact",
    )


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["--no_group_by_length"], {"group_by_length": False}),
        (["--no-group-by-length", "--learning-rate", "1"], {"group_by_length": False, "learning_rate": 1.0}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
        (["--data=A", "--seed=3"], {"data": ["A"], "seed": 3}),
        (["--data"], {"data": []}),
        (["--trigger_input", ""], {"trigger_input": ""}),
        (["--trigger_input", "two words = one"], {"trigger_input": "two words = one"}),
        (["--trigger_input=--seed"], {"trigger_input": "--seed"}),
        (["--data", "None"], {"data": ["None"]}),
        (["--template", "none"], {"template": "none"}),  # the name of a template, not None
        (["--max_grad_norm", "inf"], {"max_grad_norm": float("inf")}),
    ],
)
def test_spellings(argv, changes):
    assert parse(Config, argv) == Config(**changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning 3", "unknown flag --learning (did you mean --learning_rate?)"),  # no abbreviations
        ("--learning-rte=3", "unknown flag --learning-rte (did you mean --learning_rate?)"),
        ("--batch_size 3", "unknown flag --batch_size (did you mean --per_device_train_batch_size or "
         "--per_device_eval_batch_size?)"),
        ("--confg x", "unknown flag --confg (did you mean --config?)"),
        ("--local 3", "unknown flag --local (see --help)"),
        ("--zzz", "unknown flag --zzz (see --help)"),
        ("--data A --fp16 True", "unexpected argument 'True' (write --flag VALUE; a switch takes no value)"),
        ("--learning_rate abc", "--learning_rate: expected a number, got 'abc'"),
        ("--learning_rate", "--learning_rate: expected a number, got nothing"),
        ("--max_steps 1.5", "--max_steps: expected a whole number, got '1.5'"),
        ("--seed 1 2", "--seed: expected a whole number, got ['1', '2']"),
        ("--layers 1 x", "--layers: expected a whole number, got 'x'"),
        ("--mode fst", "--mode: expected one of fast, exact, got 'fst'"),
        ("--config", "--config: expected text, got nothing"),
    ],
)  # fmt: skip
def test_wrong_flags_are_named(line, message):
    with pytest.raises(ValueError) as error:
        parse(Config, line.split())
    assert str(error.value) == message


@pytest.mark.parametrize(
    "words", [["--local_rank", "3"], ["--local-rank=3"], ["--local_rank=3"], ["--local-rank", "3"]]
)
def test_the_launchers_local_rank_is_ignored(words):
    assert parse(Config, [*words, "--data", "A", "B"]) == parse(Config, ["--data", "A", "B", *words])
    assert parse(Config, ["--data", "A", *words, "--fp16"]) == Config(data=["A"], fp16=True)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(Config, ["--version"])
    assert (exit.value.code, capsys.readouterr().out) == (0, f"minigpt {__version__}\n")


# ---- YAML


@pytest.mark.parametrize("before", [True, False])
def test_flags_beat_yaml_beats_defaults_in_any_order(yaml_file, before):
    config = ["--config", str(yaml_file("fp16: true\nseed: 1\nmax_steps: 5\ndata: [A, B]\n"))]
    flags = ["--no_fp16", "--seed", "2", "--max_steps", "None", "--data", "C"]
    assert parse(Config, config) == Config(fp16=True, seed=1, max_steps=5, data=["A", "B"])
    assert parse(Config, config + flags if before else flags + config) == Config(seed=2, data=["C"])


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("", {}),
        ("# only a comment\n", {}),
        ("learning_rate: 1e-4", {"learning_rate": 1e-4}),  # text in YAML 1.1
        ("learning_rate: 1", {"learning_rate": 1.0}),
        ("learning_rate: '3'", {"learning_rate": 3.0}),
        ("seed: 010", {"seed": 10}),  # eight in YAML 1.1
        ("data: a.json", {"data": ["a.json"]}),
        ("data:\n- a.json\n- b.json", {"data": ["a.json", "b.json"]}),
        ("layers: []", {"layers": []}),
        ("max_steps: null\nmode:\ntemplate: ~", {}),
        ("trigger_input: no\ntrigger_output: 12\ntrigger_human: 'null'",
         {"trigger_input": "no", "trigger_output": "12", "trigger_human": "null"}),
        ("fp16: yes\ngroup_by_length: False", {"fp16": True, "group_by_length": False}),
        ("'seed': 3\r\nfp16: true\r\n", {"seed": 3, "fp16": True}),
        (b"\xef\xbb\xbfseed: 3", {"seed": 3}),
    ],
)  # fmt: skip
def test_yaml_values(yaml_file, text, changes):
    assert parse(Config, ["--config", str(yaml_file(text))]) == Config(**changes)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("seed: 1\nlearning: 3", 2, "unknown key learning (did you mean learning_rate?)"),
        ("learning-rate: 3", 1, "unknown key learning-rate (did you mean learning_rate?)"),
        ("config: other.yaml", 1, "unknown key config (see --help)"),
        ("? [a]\n: 1", 1, "unknown key [...] (see --help)"),
        ("seed: 1\nfp16: true\nseed: 1", 3, "duplicate key seed"),
        ("\nlearning_rate: abc", 2, "learning_rate: expected a number, got 'abc'"),
        ("learning_rate:", 1, "learning_rate: expected a number, got nothing"),
        ("data: null", 1, "data: expected a list, got nothing"),
        ("seed: 1.5", 1, "seed: expected a whole number, got '1.5'"),
        ("seed: [1, 2]", 1, "seed: expected a whole number, got ['1', '2']"),
        ("fp16: 1", 1, "fp16: expected true or false, got '1'"),
        ("data: [[a]]", 1, "data: expected text, got ['a']"),
        ("data: {a: b}", 1, "data: expected a value or a list, got a mapping"),
        ("mode: exat", 1, "mode: expected one of fast, exact, got 'exat'"),
        ("- seed", 1, "expected lines such as learning_rate: 1e-4"),
        ("\njust text", 2, "expected lines such as learning_rate: 1e-4"),
        ("seed: 1\nfp16: [true", 2, "not YAML: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\nfp16: a: b", 2, "not YAML: mapping values are not allowed here"),
        ("seed: 1\n---\nseed: 2", 2, "not YAML: but found another document"),
        ("é: 1\nseed: \x00", 2, "not YAML: special characters are not allowed"),
        (b"seed: 1\nfp16: \xff", 2, "not UTF-8 text, so not YAML"),
    ],
)  # fmt: skip
def test_wrong_yaml_is_named_with_its_line(yaml_file, text, line, message):
    path = yaml_file(text)
    with pytest.raises(ValueError) as error:
        parse(Config, ["--config", str(path)])
    assert str(error.value) == f"{path}:{line}: {message}"


def test_the_worked_example_of_convert():
    assert convert("1e-4", float) == 0.0001
    assert convert("a.json", list[str]) == ["a.json"]
    assert convert(None, int | None) is None


# ---- what the user has set


def given(config) -> set[str]:
    return {field.name for field in dataclasses.fields(config) if is_given(config, field.name)}


def test_flags_and_yaml_are_given_even_where_they_state_the_default(yaml_file):
    path = yaml_file("seed: 42\nlearning_rate: 1")
    config = parse(Config, ["--no_fp16", "--data", "--config", str(path), "--learning_rate", "2"])
    assert given(config) == {"fp16", "data", "seed", "learning_rate"}
    assert given(parse(Config, [])) == set()
    config.warmup_steps = 3  # a program's doing, not the user's
    assert not is_given(config, "warmup_steps")


def test_built_in_python_what_is_no_default_is_given():
    assert given(Config(seed=42, layers=[1, 2], data=["A"], fp16=True)) == {"data", "fp16"}


def test_nothing_but_is_given_sees_what_is_given(tmp_path):
    config = parse(Config, ["--seed", "42"])
    assert config == Config()
    assert dataclasses.asdict(config) == dataclasses.asdict(Config())
    save_yaml(config, tmp_path / "parsed.yaml")
    save_yaml(Config(), tmp_path / "built.yaml")
    assert (tmp_path / "parsed.yaml").read_text() == (tmp_path / "built.yaml").read_text()


# ---- the saved configuration


STRINGS = [
    *("1e-4", "010", "12", "1:30", "1_000", ".inf", "2024-01-01", "null", "None", "~", "yes", "false", "", "=", "<<"),
    *(
        " lead",
        "trail ",
        "a: b",
        "a #b",
        "# c",
        "- d",
        "[e]",
        "{f}",
        "'g\"",
        "&h",
        "*i",
        "!j",
        "%k",
        "@l",
        "`m",
        "?",
        "|",
    ),
    *(
        "Grüße",
        "你好",
        "🙂",
        "\u2028",
        "\x85",
        "\x07",
        "\ufeff",
        "tab\t",
        "### Request:\n",
        "\n\n a\n  b\r\n",
        "word " * 99,
    ),
]


@dataclass
class Everything:
    """Every kind of field."""

    text: str
    maybe_text: str | None
    texts: list[str]
    number: float
    maybe_number: float | None
    numbers: list[float]
    count: int
    counts: list[int]
    maybe_count: int | None
    switch: bool
    maybe_switch: bool | None
    choice: Literal["on", "1"]
    choices: list[Literal["a", "b"]]


EDGES = [float("inf"), -float("inf"), -0.0, 0.1 + 0.2, 1e-300, 1e22, 5e-324, 1 / 3]


@pytest.mark.parametrize(
    "config",
    [
        Everything("", None, [], 1e-5, None, [], -1, [], None, True, None, "on", []),
        Everything("a", "b", STRINGS, 0.1 + 0.2, 1e22, EDGES, 0, [-5, 10**30], 3, False, True, "1", ["b", "a"]),
        Everything("null", "None", ["null"], 1.0, -0.0, [0.0], 1, [0], 0, False, False, "on", ["a"]),
        Everything("\n### Frage:\r\n", " \n ", ["\n"], 1.0, -0.0, [0.0], 1, [0], 0, False, False, "on", ["a"]),
    ],
)
def test_a_saved_configuration_repeats_itself(tmp_path, config):
    path = tmp_path / "runs" / "config.yaml"
    save_yaml(config, path)
    assert parse(Everything, ["--config", str(path)]) == config


def test_the_saved_file(tmp_path):
    path = tmp_path / "config.yaml"
    save_yaml(Config(data=["a b.json"], learning_rate=1e-5, trigger_human="### Größe:\n"), path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:6] == ["data:", "- a b.json", "layers:", "- 1", "- 2", "mode: null"]
    assert lines[6:9] == ["output_dir: null", "overwrite_output_dir: false", "resume: null"]
    assert "learning_rate: 1.0e-05" in lines
    assert lines[-2:] == [r'trigger_human: "### Größe:\n"', "trigger_assistant: null"]
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == dataclasses.asdict(
        parse(Config, ["--config", str(path)])
    )


def test_only_the_resulting_value_must_be_in_range(yaml_file):
    path = yaml_file("learning_rate: -1")
    assert parse(Config, ["--config", str(path), "--learning_rate", "1"]) == Config(learning_rate=1.0)
    with pytest.raises(ValueError, match="must be above 0"):
        parse(Config, ["--config", str(path)])
