"""The recipes in configs/: every one parses, and its arithmetic is right and is the plan's."""

import math
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from minigpt.model.gpt2 import GPTConfig
from minigpt.settings.command_line import parse
from minigpt.training.plan import count_parameters, plan

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
SUM = re.compile(rf"([(ceil]*{NUMBER}(?:[)]* (?:[-+x/]|\^) ?[(]*{NUMBER}|\^{NUMBER})*[)]*) = ({NUMBER})")


def comments(path: Path) -> str:
    return "\n".join(line.partition("#")[2] for line in path.read_text(encoding="utf-8").splitlines())


def config_class(path: Path):
    import selfinstruct
    import sft
    import train

    others = {"train": train.PretrainConfig, "selfinstruct": selfinstruct.SelfInstructConfig}
    return others.get(path.stem.rpartition("_")[2], sft.SFTConfig)


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_parses_and_what_it_names_is_there(path):
    words = ["--config", str(path)]
    if path.stem == "demo_sft":
        words += ["--model_name_or_path", "x"]
    config = parse(config_class(path), words)
    for named in (getattr(config, "deepspeed", None), getattr(config, "config_name", None)):
        assert named is None or Path(named).exists()


def sums(text: str) -> list[tuple[str, float, str]]:
    """Every sum in a text, what it comes to, and what is written there.

    >>> sums("in all ceil(10 / 4) = 3 steps of 2^3 = 9 bytes")
    [('ceil(10 / 4)', 3, '3'), ('2^3', 8, '9')]
    """
    found = []
    for left, right in SUM.findall(text):
        expression = left.replace(",", "").replace(" x ", " * ").replace("^", "**")
        found.append((left, eval(expression, {"ceil": math.ceil}), right))
    return found


def test_sums_are_found():
    text = "in all ceil(10 / 4) = 3 steps of 2^3 = 9 bytes, (4 + 8) x 1,000 / 2^2 = 3,000.0"
    assert sums(text) == [("ceil(10 / 4)", 3, "3"), ("2^3", 8, "9"), ("(4 + 8) x 1,000 / 2^2", 3000, "3,000.0")]


@pytest.mark.parametrize("path", [p for p in CONFIGS if "demo" not in p.stem], ids=lambda path: path.stem)
def test_the_arithmetic_of_its_comments_is_right(path):
    found = sums(comments(path))
    assert len(found) >= 3
    for expression, value, written in found:
        digits = len(written.partition(".")[2])
        assert f"{value:,.{digits}f}" == written, expression


@pytest.mark.parametrize(
    ("name", "gpus", "examples"),
    [
        ("hugchat_gpt2", 1, 998_000),
        ("hugchat_gpt2_large", 1, 998_000),
        ("hugchat_gpt2_xl", 8, 998_000),
        ("gpt2_medium_instructions", 1, 1_045),
        ("alpaca_gpt2", 1, 51_482),
    ],
)
def test_the_plan_has_the_steps_and_the_model_of_its_comments(name, gpus, examples):
    path = ROOT / "configs" / f"{name}.yaml"
    config = parse(config_class(path), ["--config", str(path), "--plan", str(gpus)])
    shape = GPTConfig.preset(config.model_name_or_path.partition("/")[2])
    text = comments(path)
    planned = plan(config, shape, np.full(examples, (config.max_seq_length or 512) + 1))
    assert f"= {planned.steps:,} steps in all" in text
    assert f" {examples:,} remain" in text
    if "memory:" in text:
        assert f"{count_parameters(shape):,}" in text
    if config.max_seq_length and "tokens:" in text:
        assert planned.tokens <= planned.steps * 32 * config.max_seq_length


def test_the_slurm_script_starts_the_recipe():
    path = ROOT / "configs" / "sft.slurm"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("srun")))
    flags = [word for word in words[words.index("sft.py") + 1 :] if word != "$@"]
    config = parse(config_class(path), flags)
    assert (config.resume, config.gradient_accumulation_steps, config.deepspeed) == (
        "auto",
        1,
        "configs/deepspeed/zero1_fp16.json",
    )
    assert (text.count("--nodes=2"), text.count("--gpus-per-node=8"), text.count("2 x 1 x 16 = 32")) == (1, 1, 1)
