"""The step-through examples, run from the project's folder as their readers run them."""

import ast
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minigpt
import minigpt.selfinstruct

from ..script_runner import ScriptRunner
from ..workplace import BLOCKED_NETWORK

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
CORE = {"torch", "numpy", "safetensors", "rouge_score", "deepspeed"}  # of what comes with a clean install
PUBLIC = {"minigpt": minigpt.__all__, "minigpt.selfinstruct": minigpt.selfinstruct.__all__}

SAYS = {  # patterns that must be found; every example, listed here or not, ends with the fact that it teaches
    "01_tokens.py": [
        r"4,096 ids = 256 bytes \+ 3,839 merges \+ 1 special\n",
        r"by hand \[(\d+)\], the tokenizer \[\1\]\n",
    ],
    "02_prompt_and_mask.py": [r"\| \[Paris\.<\|endoftext\|>\]\n", r"HugChat:\[ Paris\.<\|endoftext\|>\]\n"],
    "03_collator.py": [r"\[    5, 50256,  -100\]\]\)\n", r"one batch of 2: loss [\d.]+ over 5 targets\n"],
    "04_attention.py": [r"row 9 after ( 0\.\d\d){4} (1\.00|0\.[5-9]\d)( 0\.\d\d){6}\n"],
    "05_training_step.py": [
        r"mean over 9: (8\.\d{4}), the engine's \1;",
        r"its weights and ours differ by \de-0[789] at most\n",
    ],
    "06_custom_loop.py": [r"step   0, loss 8\.\d+\n", r"step 100, loss 0\.\d+\n", r"Not hot\? +cold<\|endoftext\|>\n"],
    "07_generate.py": [r"p = 0\.2\d\d  I drink tea\.\n", r"p = 0\.3\d\d  I run to the river\. +0\.[34]\d\d █+\n"],
    "08_zero.py": [r" 0 +0( +[\d,]+){4} +16\.00 +16\.00\n", r" 3 +1( +[\d,]+){4} +8\.\d\d +8\.00\n"],
    "09_novelty_filter.py": [r" = 0\.7692\n", r"0\.769 +0\.769 +1 +no +Write a poem about my cat!\n"],
    "10_load_gpt2.py": [
        r"c_attn\.weight +\(768, 2304\) +\(2304, 768\) +transposed\n",
        r"148 tensors, 124,439,808 parameters\n",
    ],
}


def environment(folder: Path) -> dict[str, str]:
    """Ours, on one core, and with nothing but this folder to go to."""
    (folder / "sitecustomize.py").write_text(BLOCKED_NETWORK)
    settings = {"PYTHONPATH": folder, "HOME": folder, "NETWORK_LOG": folder / "network.log", "OMP_NUM_THREADS": 1}
    ours = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return ours | {name: str(value) for name, value in settings.items()} | {"PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> ScriptRunner:
    folder = tmp_path_factory.mktemp("examples")
    return ScriptRunner(folder, environment(folder), cwd=ROOT)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_it_runs_offline_and_says_what_it_teaches(runner, example, tmp_path):
    if example.name == "08_zero.py" and sys.platform != "linux":
        pytest.skip("DeepSpeed, which 08_zero.py runs on, comes along on Linux only")
    code, out, err = runner.run([f"examples/{example.name}"], environment(tmp_path))
    assert (code, err) == (0, "")
    assert not (tmp_path / "network.log").exists()
    lines = [line for line in out.splitlines() if not line.startswith("   | ")]  # a prompt, shown as it is
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("=> ")
    for pattern in SAYS.get(example.name, []):
        assert re.search(pattern, out), pattern


def private(source: str) -> list[str]:
    """What an example uses that is neither public nor there after a clean install."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or ".", alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            names = [("minigpt", node.attr)] if owner == "minigpt" else []
            documented = (owner, node.attr) == ("os", "_exit")
            found += [node.attr] if node.attr.startswith("_") and not documented else []
        else:
            continue
        for module, name in names:
            if module in PUBLIC:
                found += [f"{module}.{name}"] if name and name not in PUBLIC[module] else []
            elif module.split(".")[0] not in CORE | sys.stdlib_module_names:
                found.append(module)
    return found


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_it_is_short_public_and_names_what_it_opens(example):
    source = example.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) < 80
    assert private(source) == []
    assert any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    docstring = ast.get_docstring(tree) or ""
    assert f"    python examples/{example.name}" in docstring
    opens = re.search(r"^Opens .*", docstring, re.MULTILINE)
    modules = re.findall(r"minigpt/[\w/]+\.py", opens[0]) if opens else []
    assert modules and all((ROOT / module).is_file() for module in modules)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from minigpt import GPT, hub", ["minigpt.hub"]),
        ("import minigpt\nminigpt.files", ["minigpt.files"]),
        ("from minigpt.data.collate import collate", ["minigpt.data.collate"]),
        ("def late():\n    import matplotlib.pyplot as plt", ["matplotlib.pyplot"]),
        ("from ..workplace import Workplace", ["workplace"]),
        ("tokenizer._ranks", ["_ranks"]),
        ("import os, torch\nfrom minigpt.selfinstruct import NoveltyFilter", []),
    ],
)
def test_these_tests_see_what_is_private(source, expected):
    assert private(source) == expected


def test_the_readme_lists_them_in_order():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+\.py)\]\(\1\) ", text, re.MULTILINE) == [path.name for path in EXAMPLES]
    assert len(EXAMPLES) == 10
    assert all((ROOT / module).is_file() for module in re.findall(r"minigpt/[\w/]+\.py", text))


def test_thirty_lines_are_thirty_lines():
    """The promise of 06: what runs, without docstring, comments and blank lines."""
    source = (ROOT / "examples" / "06_custom_loop.py").read_text(encoding="utf-8")
    code = source.split('"""', 2)[2].splitlines()
    assert 20 < sum(1 for line in code if line.strip() and not line.lstrip().startswith("#")) <= 30


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_are_for_terminals_that_want_them(no_color, tmp_path):
    master, slave = pty.openpty()
    command = [sys.executable, "examples/02_prompt_and_mask.py"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(tmp_path) | {"NO_COLOR": no_color}, stdout=slave, stderr=subprocess.STDOUT
    )
    os.close(slave)
    shown = b""
    while part := read(master):
        shown += part
    os.close(master)
    assert process.wait(timeout=60) == 0
    green = b"\033[32mParis.<|endoftext|>\033[0m"
    assert (green in shown, b"[Paris." in shown, b"\033" in shown) == (
        (False, True, False) if no_color else (True, False, True)
    )


def read(terminal: int) -> bytes:
    """What came; nothing once the other side has closed, of which Linux makes an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""
