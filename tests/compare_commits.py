"""Whether a commit and the working tree compute the same, byte for byte: to be run before and after code is moved.

    python tests/compare_commits.py BASE [--cases NAME ...] [--keep FOLDER]
    python tests/compare_commits.py origin/main --cases logits steps

BASE, any name of a commit, is checked out into a temporary worktree. Each case runs the same commands with BASE's code
and with this tree's (uncommitted changes included), side by side on this machine, because last bits depend on the CPU,
and on equal inputs. All files that the commands write are compared, with what they print. Per case a line says `same`,
`DIFFERENT` and what differs, or `FAILED`; the exit code is 1 if any case is not the same.

The cases named old-... begin with what BASE wrote (a run with its checkpoint, export, token store and config.yaml, and
a run of self-instruct), and both trees go on from there: so what users have on disk still opens.

What may differ is listed in `ALLOWED`. A new version number also gives token stores new names, so that old-stores
differs, as it should.
"""

import argparse
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests" / "compare_driver.py"
TIMEOUT = 300.0  # seconds of a command

# Files, by their names' patterns; a regular expression, and why what it matches may differ.
ALLOWED = [
    ("*", r"minigpt \d+\.\d+\.\d+\w*", "version, in --version and model cards"),
    ("manifest.json", r'"minigpt": "[^"]*"', "version"),
    ("manifest.json", r'"trainer\.json": \{[^}]*\}', "size and sha256 of a file with a run time"),
    ("trainer.json", r'"seconds": [\d.e-]+', "run time"),
    ("trainer.json", r'"metrics_bytes": \d+', "size of a file with speeds in it"),
    ("metrics.jsonl", r'"tokens_per_s": [\d.]+', "speed"),
    ("*.out", r"[\d,]+ tok/s", "speed"),
    ("*.out", r"[\d:]+ left", "time left"),
    ("*.out", r"(?m)^time +[\d,]+ s$", "run time"),
    ("*.err", r"takes \d+ times as long", "how slow bf16 is where it is emulated: measured"),
    (".lock", r"process \d+", "process id"),
]


class Command(NamedTuple):
    """A script of the tree, or a function of compare_driver.py, with its arguments."""

    line: str
    stdin: str = ""
    code: int = 0
    """The exit code that it must have: two equal failures would compare nothing."""
    ranks: int = 1
    """More than one: under torchrun."""


class Case(NamedTuple):
    commands: list[Command]
    from_old: bool = False
    """Begins with what BASE wrote, see `OLD`."""


class Side(NamedTuple):
    name: str
    tree: Path
    folder: Path
    """Has a folder for each case, in which its commands run."""


class Failed(Exception):
    """A command ended otherwise than it must."""


# --logging_steps 1, because otherwise one line more is printed once five seconds have passed.
TRAIN = "--learning_rate 1e-2 --logging_steps 1"
RUN = f"{TRAIN} --max_steps 10 --eval_steps 4 --per_device_train_batch_size 3 --max_new_tokens 8"
SFT = f"sft.py --model_name_or_path model --data train.json --validation_data held.json --template iio {RUN}"
PREDICT = "sft.py --model_name_or_path model --template alpaca-short --max_new_tokens 12"
TEXT = f"train.py --config_name model --tokenizer_name tiny --data corpus.txt --block_size 32 {TRAIN}"
TASKS = "selfinstruct.py --model_name_or_path babbler --format io --seed_tasks_path seeds.jsonl --max_length 60"
CHAT = "chat.py --template hugchat --max_new_tokens 16"
TALK = "Say it twice.\nAnd again, 日本?\n/params temperature 0.9 top_k 40 top_p 0.95 seed 3\nOnce more!\n/retry\n"
SCRIPTS = ("train.py", "sft.py", "selfinstruct.py", "chat.py")

CASES = {
    "help": Case([*(Command(f"{script} --help") for script in SCRIPTS), Command("sft.py --version")]),
    "refusals": Case(
        [
            Command("sft.py --learning_rat 1", code=2),
            Command("sft.py --fp16 --bf16", code=2),
            Command("train.py --model_name_or_path model --data corpus.txt --block_size 97", code=1),
            Command("selfinstruct.py --num_beams 2 --temperature 1", code=2),
            Command("chat.py --model_name_or_path model --top_p 0", code=2),
        ]
    ),
    "data": Case([Command("data")]),
    "logits": Case([Command("logits model")]),
    "gradients": Case([Command("gradients")]),
    "steps": Case([Command("steps")]),
    "export": Case(
        [
            Command(f"{TEXT} --stride 24 --max_steps 10 --warmup_steps 2 --output_dir text"),
            Command(f"{SFT} --replay_data corpus.txt --trigger_output Answer --output_dir tuned"),
            Command(f"{SFT} --plan 8 --output_dir plan"),
        ]
    ),
    "two-ranks": Case([Command(f"{SFT} --gradient_accumulation_steps 2 --output_dir ddp", ranks=2)]),
    "zero1": Case([Command(f"{SFT} --deepspeed zero1.json --output_dir zero1", ranks=2)]),
    "answers": Case([Command("answers model")]),
    "chat": Case(
        [
            Command(f"{CHAT} --model_name_or_path model", TALK),
            Command(f"{CHAT} --model_name_or_path model --quantize int8", TALK),
            Command(f"{CHAT} --model_name_or_path model --quantize fp16", TALK),
            Command(f"{CHAT} --model_name_or_path model --bf16 --prompt Hello --input there"),
        ]
    ),
    "predict": Case(
        [
            Command(f"{PREDICT} --predict held.json --output_dir fp32"),
            Command(f"{PREDICT} --predict held.json --quantize int8 --compare_with fp32 --output_dir int8"),
            Command(f"{PREDICT} --data held.json --eval_only"),
            Command(f"{PREDICT} --data held.json --inspect 2 --max_seq_length 60"),
        ]
    ),
    "selfinstruct": Case(
        [
            Command(f"{TASKS} --num_instructions_to_generate 12 --batch_dir tasks"),
            Command(f"{TASKS} --num_beams 2 --quantize int8 --max_requests 4 --batch_dir beams", code=1),  # keeps none
            Command(
                "selfinstruct.py --curate lint --data tasks/machine_generated_instructions.jsonl --output_dir lint"
            ),
        ]
    ),
    "old-exports": Case(
        [Command("answers old/sft/export"), Command(f"{CHAT} --model_name_or_path old/sft/export", TALK)], True
    ),
    "old-checkpoints": Case(
        [
            Command("train.py --config old/text/config.yaml --resume latest --max_steps 10"),
            Command("sft.py --config old/sft/config.yaml --resume old/sft/checkpoints/step-5 --output_dir resumed"),
        ],
        True,
    ),
    "old-stores": Case(
        [
            Command("sft.py --config old/sft/config.yaml --inspect 1"),
            Command("train.py --config old/text/config.yaml --output_dir plan --plan 8"),
        ],
        True,
    ),
    "old-configs": Case(
        [
            Command("sft.py --config old/sft/config.yaml --output_dir again"),
            Command("selfinstruct.py --config old/tasks/config.yaml --num_instructions_to_generate 12"),
        ],
        True,
    ),
}
OLD = [
    Command(f"{TEXT} --max_steps 5 --save_steps 5 --output_dir old/text --cache_dir old/cache"),
    Command(f"{SFT} --save_steps 5 --output_dir old/sft --cache_dir old/cache"),
    Command(f"{TASKS} --num_instructions_to_generate 4 --batch_dir old/tasks"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare what a commit and the working tree compute, byte for byte.")
    parser.add_argument("base", metavar="BASE", help="commit, branch or tag to compare with")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep all files there: a new folder")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        folder: Path = arguments.keep.resolve() if arguments.keep else Path(temporary) / "files"
        if folder.exists():
            parser.error(f"--keep {folder}: is there already")
        _git("worktree", "add", "--quiet", "--detach", str(tree), arguments.base)
        try:
            base, new = Side("base", tree, folder / "base"), Side("new", ROOT, folder / "new")
            same = compare_cases(arguments.cases, base, new)
        except Failed as failed:
            sys.exit(f"FAILED: {failed}")
        finally:
            _git("worktree", "remove", "--force", str(tree))
    sys.exit(0 if same else 1)


def compare_cases(names: list[str], base: Side, new: Side) -> bool:
    """Prints a line for each case. Returns whether all are the same."""
    started = time.monotonic()
    inputs, old = base.folder.parent / "inputs", base.folder.parent / "old"
    inputs.mkdir(parents=True)
    run([Command("inputs")], new, inputs)  # by this tree, whose tests/ holds the code for it
    if any(CASES[name].from_old for name in names):
        shutil.copytree(inputs, old)
        run(OLD, base, old)
    print(f"{'(inputs)':16} {time.monotonic() - started:5.1f} s", flush=True)
    outcomes = []
    for name in names:
        started = time.monotonic()
        outcomes.append(compare_case(name, base, new, old if CASES[name].from_old else inputs))
        print(f"{name:16} {time.monotonic() - started:5.1f} s  {outcomes[-1]}", flush=True)
    return set(outcomes) == {"same"}


def compare_case(name: str, base: Side, new: Side, inputs: Path) -> str:
    """Runs a case in both trees, each in a copy of `inputs`. Returns "same", or what differs, or what failed."""

    def run_case(side: Side) -> None:
        shutil.copytree(inputs, side.folder / name)
        run(CASES[name].commands, side, side.folder / name)

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(run_case, (base, new)))
    except Failed as failed:
        return f"FAILED: {failed}"
    differences = compare_folders(base.folder / name, new.folder / name)
    return "\n    ".join(["DIFFERENT:", *differences]) if differences else "same"


def run(commands: list[Command], side: Side, folder: Path) -> None:
    """Runs commands in a folder, one after the other. What each prints goes into files there."""
    for number, command in enumerate(commands, 1):
        name, *words = shlex.split(command.line)
        program = [str(side.tree / name)] if name.endswith(".py") else ["-P", str(DRIVER), name]
        if command.ranks > 1:
            program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={command.ranks}", *program]
        done = subprocess.run(
            [sys.executable, *program, *words],
            cwd=folder,
            env=_environment(side),
            input=command.stdin.encode(),
            capture_output=True,
            timeout=TIMEOUT,
        )
        (folder / f"{number}-{name}.out").write_bytes(done.stdout)
        (folder / f"{number}-{name}.err").write_bytes(done.stderr)
        if done.returncode != command.code:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise Failed(f"{side.name}: exit code {done.returncode} instead of {command.code}: {command.line}: {last}")


def _environment(side: Side) -> dict[str, str]:
    """Ours without what changes results; on the CPU, one thread a process, and no network."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MINIGPT_", "OMP_", "GOMP_"))}
    home = side.folder / ".home"
    home.mkdir(parents=True, exist_ok=True)
    return ours | {
        "PYTHONPATH": str(side.tree),
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(home / "matplotlib"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "COLUMNS": "100",  # of --help
        "NO_COLOR": "1",
    }


def compare_folders(base: Path, new: Path) -> list[str]:
    """What differs between the files below two folders, a line each."""
    names = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} for folder in (base, new)
    ]
    differences = [f"{name}: only in base" for name in sorted(names[0] - names[1])]
    differences += [f"{name}: only in new" for name in sorted(names[1] - names[0])]
    for name in sorted(names[0] & names[1]):
        contents = [normalised(folder / name) for folder in (base, new)]
        if contents[0] != contents[1]:
            differences.append(f"{name}: {_difference(base / name, new / name, *contents)}")
    return differences


def normalised(path: Path) -> bytes:
    """A file's bytes, without what may differ."""
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content
    for pattern, allowed, _ in ALLOWED:
        if fnmatch.fnmatch(path.name, pattern):
            text = re.sub(allowed, "(allowed)", text)
    return text.encode()


def _difference(base: Path, new: Path, base_content: bytes, new_content: bytes) -> str:
    """The first tensor or line that differs."""
    if base.suffix == ".safetensors":
        import torch
        from safetensors.torch import load_file

        tensors, others = load_file(base), load_file(new)
        if tensors.keys() != others.keys():
            return f"tensors {sorted(tensors.keys() ^ others.keys())} are in one alone"
        unequal = [name for name in tensors if not torch.equal(tensors[name], others[name])]
        if unequal and tensors[unequal[0]].shape == others[unequal[0]].shape:
            most = (tensors[unequal[0]].double() - others[unequal[0]].double()).abs().max().item()
            return f"{len(unequal)} of {len(tensors)} tensors, {unequal[0]} by up to {most:.3g}"
        return f"{unequal} have another shape" if unequal else "equal tensors in other bytes (order, metadata, NaN)"
    try:
        lines, others_lines = base_content.decode().split("\n"), new_content.decode().split("\n")
    except UnicodeDecodeError:
        return f"{len(base_content):,} and {len(new_content):,} bytes"
    pairs = zip([*lines, "(end)"], [*others_lines, "(end)"], strict=False)
    number, (one, other) = next((number, pair) for number, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    place = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    start = max(0, place - 30)
    return f"line {number}: {one[start : start + 100]!r} -> {other[start : start + 100]!r}"


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True)


if __name__ == "__main__":
    main()
