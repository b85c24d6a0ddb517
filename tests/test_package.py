"""The house as a whole: which way its imports run, what it costs to import, what it offers."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from dataclasses import fields
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import minigpt
from minigpt.moved import MOVED

ROOT = Path(__file__).parents[1]
SCRIPTS = [name for name in ("train", "sft", "selfinstruct", "chat") if (ROOT / f"{name}.py").exists()]
GROUND = {"api_client", "distributed", "files", "hardware", "hub", "moved", "settings", "version"}
STANDS_ON = {  # besides the ground, and besides itself
    "ground": set(),
    "data": set(),
    "model": set(),
    "inference": {"data", "model"},
    "training": {"data", "model"},
    "evaluation": {"data", "model", "inference"},
    "serving": {"data", "model", "inference"},
    "selfinstruct": {"data", "model", "inference", "training", "evaluation"},
}

Graph = dict[str, set[str]]


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """The absolute names a module imports, wherever in it: inside functions and for type checkers only as well.

    `from a import b` gives `a.b`, which is a module or a name in one.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                base = [*parents[: len(parents) - node.level + 1], *base]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def package_graph() -> Graph:
    """Each module of the package and the modules of the package, or scripts, that it imports."""
    files = {}
    for path in (ROOT / "minigpt").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def resolve(name: str) -> str:
        while name not in files and name not in SCRIPTS and "." in name:  # a name in a module
            name = name.rpartition(".")[0]
        return name

    return {
        module: {
            resolve(name)
            for name in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
            if name.split(".")[0] in ("minigpt", *SCRIPTS)
        }
        for module, path in files.items()
    }


def part(module: str) -> str:
    """The part of the house: `minigpt.data.store` -> data, `minigpt.files` -> ground, `minigpt` -> minigpt."""
    names = module.split(".")
    return "ground" if names[0] == "minigpt" and names[1:2] and names[1] in GROUND else names[min(1, len(names) - 1)]


def upward(graph: Graph) -> list[str]:
    """The arrows that the design does not have. The package's own `__init__` stands on everything."""
    return sorted(
        f"{module} -> {target}"
        for module, targets in graph.items()
        if module != "minigpt"
        for target in targets
        if part(target) not in {"ground", part(module), *STANDS_ON[part(module)]}
    )


def test_no_arrow_runs_upward():
    assert upward(package_graph()) == []


def test_no_arrow_runs_in_a_circle():
    graph = package_graph()
    assert len(graph) > 25
    TopologicalSorter(graph).prepare()
    graph["minigpt.files"].add("minigpt.training.loop")  # which stands on it
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_the_drawing_in_the_readme_is_of_this_code():
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    assert (ROOT / "docs" / "house.svg").read_text(encoding="utf-8") == house.draw(), "run python docs/house.py"


def test_the_scripts_stand_on_the_package_and_not_on_each_other():
    for script in SCRIPTS:
        used = imports((ROOT / f"{script}.py").read_text(encoding="utf-8"), script)
        assert not {name.split(".")[0] for name in used} & set(SCRIPTS)
        assert any(name.startswith("minigpt.") for name in used)


def test_no_pickle_and_no_transformers():
    for path in [*(ROOT / "minigpt").rglob("*.py"), *(ROOT / f"{script}.py" for script in SCRIPTS)]:
        used = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"), "x")}
        assert not used & {"pickle", "transformers", "dill", "joblib"}, path


def test_these_tests_see_every_kind_of_import():
    source = """
import os, minigpt.data.store as store
from minigpt import files
from . import weights
from ..data.order import deal
if TYPE_CHECKING:
    from minigpt.training.loop import train
def late():
    from sft import main
"""
    expected = {
        *("os", "minigpt.data.store", "minigpt.files", "minigpt.model.weights", "minigpt.data.order.deal"),
        *("minigpt.training.loop.train", "sft.main"),
    }
    assert imports(source, "minigpt.model.gpt2") == expected
    assert imports("from . import weights", "minigpt.model", is_package=True) == {"minigpt.model.weights"}


@pytest.mark.parametrize(
    "arrow",
    [
        ("minigpt.files", "minigpt.data.store"),
        ("minigpt.data.store", "minigpt.model.gpt2"),
        ("minigpt.model.gpt2", "minigpt.data.collate"),
        ("minigpt.training.loop", "minigpt.evaluation.predict"),
        ("minigpt.evaluation.predict", "minigpt.training.run.folder"),
        ("minigpt.inference.chat", "minigpt.selfinstruct.novelty"),
        ("minigpt.training.loop", "minigpt.selfinstruct.bootstrap"),
        ("minigpt.evaluation.predict", "minigpt.serving.app"),
        ("minigpt.data.store", "minigpt"),
        ("minigpt.training.run.folder", "sft"),
    ],
)
def test_these_tests_see_an_arrow_that_runs_upward(arrow):
    module, target = arrow
    assert upward({module: {target, "minigpt.files", module}}) == [f"{module} -> {target}"]


# ---- what it costs to import


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_brings_nothing_but_itself():
    """So it costs next to nothing, and a script's --help need not wait for torch."""
    code = "import sys; old = {*sys.modules}; import minigpt; print(*{m.split('.')[0] for m in {*sys.modules} - old})"
    assert set(python(code).split()) - sys.stdlib_module_names == {"minigpt"}


HELP = """
import io, runpy, sys
from contextlib import redirect_stdout
script = sys.argv[1]
sys.argv = [script, "--help"]
text = io.StringIO()
try:
    with redirect_stdout(text):
        runpy.run_path(script, run_name="__main__")
except SystemExit as exit:
    heavy = {"torch", "numpy", "tiktoken", "transformers", "safetensors", "huggingface_hub"} & {*sys.modules}
    print(exit.code, *heavy)
print(text.getvalue())
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_not_wait_for_torch(script):
    first, _, text = python(HELP, f"{script}.py").partition("\n")
    assert first == "0"
    assert text.startswith(f"usage: {script}.py [-h] [OPTIONS]\n")
    assert "--model_name_or_path STR" in text


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_import_path_names_the_new_one(old):
    with pytest.raises(ModuleNotFoundError, match=f"^{old} has moved to {MOVED[old]}$"):
        importlib.import_module(old)
    new = MOVED[old]
    assert (ROOT / new).is_file() if new.endswith(".py") else importlib.util.find_spec(new)


# ---- what it offers

PUBLIC = [  # design.md, "Public names"
    *("GPT", "GPTConfig", "Tokenizer", "read_records", "get_template", "encode_example", "Example", "collate"),
    *("Batch", "generate", "stream", "load_model", "make_engine", "train", "TrainConfig"),
]


def test_public_names():
    assert {*PUBLIC, "Conversation", "__version__"} == set(minigpt.__all__)
    assert set(minigpt.__all__) <= set(dir(minigpt))
    for name in minigpt.__all__:
        assert getattr(minigpt, name) is not None
    assert minigpt.GPT.__module__ == "minigpt.model.gpt2"
    assert minigpt.train.__module__ == "minigpt.training.loop"
    assert "learning_rate" in {field.name for field in fields(minigpt.TrainConfig)}


def test_signatures_are_those_of_the_design():
    """What may be given by place, in this order."""

    def by_place(function) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert by_place(minigpt.GPT.from_pretrained) == ["name_or_folder", "revision"]
    assert by_place(minigpt.GPT.save_pretrained) == ["self", "folder", "state_dict"]
    assert by_place(minigpt.GPT.forward) == ["self", "idx", "targets"]
    assert by_place(minigpt.collate) == ["batch", "pad_token_id", "ignore_index", "allowed_max_len"]
    assert by_place(minigpt.encode_example) == [
        *("conversation", "template", "tokenizer", "max_seq_length", "train_on_prompt")
    ]
    assert by_place(minigpt.get_template) == [
        *("name_or_folder", "instruction", "input", "output", "human", "assistant")
    ]
    assert by_place(minigpt.generate) == ["model", "prompts"]
    assert by_place(minigpt.make_engine) == ["model", "config"]
    assert by_place(minigpt.train) == ["config", "engine", "train_data", "eval_data", "on_eval", "export"]


def test_type_checkers_see_the_same_names():
    """What `__getattr__` finds at run time is what `if TYPE_CHECKING:` shows, from the same modules."""
    used = imports((ROOT / "minigpt" / "__init__.py").read_text(encoding="utf-8"), "minigpt", is_package=True)
    shown = {name.rpartition(".")[::2] for name in used if name.startswith("minigpt.")}
    found = {(home, name) for name, home in minigpt._HOME_OF.items()}
    assert shown - {("minigpt.version", "__version__"), ("minigpt.moved", "refuse_old_paths")} == found


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'minigpt' has no attribute 'Trainer'"):
        minigpt.Trainer  # noqa: B018
    with pytest.raises(ImportError):
        from minigpt import Trainer  # noqa: F401
