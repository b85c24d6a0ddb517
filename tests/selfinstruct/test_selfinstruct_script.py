"""selfinstruct.py end to end, as a subprocess: with a tiny local model, and with a scripted server."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import selfinstruct
from minigpt.data.tokenizer import Tokenizer
from minigpt.settings.command_line import parse

from ..workplace import ROOT, Workplace
from .endpoint import MODEL, serving
from .fake_generators import VERBS, WORDS, random_text_model

SCRIPT = "selfinstruct.py"
TASKS = "machine_generated_instructions.jsonl"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
LOCAL = (
    "--model_name_or_path",
    "random_text",
    "--format",
    "io",
    "--seed_tasks_path",
    "seeds.jsonl",
    "--max_length",
    60,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workplace:
    work = Workplace(tmp_path_factory.mktemp("selfinstruct"))
    tokenizer = Tokenizer.tiny()
    random_text_model(tokenizer).save_pretrained(work.folder / "random_text")
    tokenizer.save_pretrained(work.folder / "random_text", 256)
    seeds = [
        {"instruction": f"{verb} {word}.", "instances": [{"input": "", "output": f"The {word}."}]}
        for verb, word in zip(VERBS, WORDS, strict=False)
    ]
    (work.folder / "seeds.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
    return work


@pytest.fixture(scope="module")
def local(work) -> str:
    """The output of an uninterrupted run in the folder `local`."""
    return work.good(SCRIPT, *LOCAL, "--num_instructions_to_generate", 25, "--batch_dir", "local")


def read_files(work: Workplace, run: str) -> dict[str, bytes]:
    """Name -> bytes of a run's files, with the folder's name replaced. The report is derived from these."""
    names = (TASKS, "requests.jsonl", "statistics.json", "config.yaml", "seed_tasks.jsonl")
    files = {name: (work.folder / run / name).read_bytes() for name in names}
    files["config.yaml"] = files["config.yaml"].replace(run.encode(), b"RUN")
    return files


def assert_same_files(work: Workplace, run: str, other: str = "local") -> None:
    files, expected = read_files(work, run), read_files(work, other)
    assert [name for name in expected if files[name] != expected[name]] == []


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def requests_of(work: Workplace, run: str) -> int:
    path = work.folder / run / "statistics.json"
    return json.loads(path.read_text())["requests"] if path.exists() else 0


@contextmanager
def started(work: Workplace, *arguments: object, launcher=(sys.executable,)):
    """Starts the script; kills it, and all ranks of its launcher, at the end of the block."""
    with subprocess.Popen(
        [*launcher, str(ROOT / SCRIPT), *map(str, arguments)],
        cwd=work.folder,
        env=work.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()


def wait_until(condition, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- a local model


def test_resume_with_another_precision_is_rejected(work, local):
    """Quantized weights would sample other tasks from the same seeds."""
    more = ("--num_instructions_to_generate", 30, "--batch_dir", "local", "--quantize", "int8")
    code, message = work.bad(SCRIPT, *LOCAL, *more)
    assert code == 1
    assert message == "local: started with --quantize None (now int8); use the same, or give another --batch_dir"


def test_a_local_run_in_int8(work):
    run = ("--num_instructions_to_generate", 3, "--quantize", "int8", "--batch_dir", "int8-run")
    work.good(SCRIPT, *LOCAL, *run)
    assert len(read_lines(work.folder / "int8-run" / TASKS)) >= 3
    assert "quantize: int8" in (work.folder / "int8-run" / "config.yaml").read_text()


def test_a_local_run(work, local):
    statistics = json.loads((work.folder / "local" / "statistics.json").read_text())
    kept = read_lines(work.folder / "local" / TASKS)
    assert statistics["ended"] == "target"
    assert len(kept) == statistics["kept"] >= 25
    rows = dict(line.split(maxsplit=1) for line in local.splitlines() if line.startswith(("kept", "report", "next")))
    assert rows["kept"] == f"{len(kept)} ({len(kept) / statistics['tasks']:.1%})"
    assert rows["report"] == "local/report.html"
    assert rows["next"] == f"python sft.py --model_name_or_path random_text --data local/{TASKS}"
    assert (work.folder / "local" / "report.html").read_text().startswith("<!doctype html>")
    assert len(read_lines(work.folder / "local" / "requests.jsonl")) == statistics["requests"]


def test_the_printed_next_command_trains(work, local):
    next_command = local.splitlines()[-1].split()
    assert next_command[:3] == ["next", "python", "sft.py"]
    limits = ("--max_steps", 2, "--eval_samples", 0, "--template", "io", "--output_dir", "tuned")
    out = work.good("sft.py", *next_command[3:], *limits)
    assert f"local/{TASKS}: {len(read_lines(work.folder / 'local' / TASKS))} examples" in out
    assert (work.folder / "tuned" / "export" / "model.safetensors").exists()


def test_the_saved_config_resumes_the_run(work, local):
    """With a larger target, in a copy; existing lines do not change."""
    shutil.copytree(work.folder / "local", work.folder / "copy")
    out = work.good(SCRIPT, "--config", "copy/config.yaml", "--batch_dir", "copy", "--num_instructions_to_generate", 32)
    assert out.startswith(f"copy: resuming after {requests_of(work, 'local')} requests, ")
    for name in (TASKS, "requests.jsonl"):
        before = (work.folder / "local" / name).read_bytes()
        assert (work.folder / "copy" / name).read_bytes().startswith(before)
    assert len(read_lines(work.folder / "copy" / TASKS)) >= 32


def test_resume_after_sigterm(work, local):
    command = (*LOCAL, "--num_instructions_to_generate", 25, "--batch_dir", "term")
    with started(work, *command) as process:
        wait_until(lambda: requests_of(work, "term") >= 20, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (
        75,
        "\nterm: interrupted; every finished round is saved; run the same command to resume\n",
    )
    work.good(SCRIPT, *command)
    assert_same_files(work, "term")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "kills"), [((sys.executable,), 20), (TORCHRUN, 5)], ids=["one process", "two ranks"]
)
def test_resume_after_kills_at_random_times(work, local, launcher, kills):
    """Killed while starting, or shortly after committing a round."""
    rng, run = random.Random(kills), f"killed-{kills}"
    command = (*LOCAL, "--num_instructions_to_generate", 25, "--batch_dir", run)
    seen = set()
    while kills:
        before = requests_of(work, run)
        with started(work, *command, launcher=launcher) as process:
            deadline = time.monotonic() + rng.choice([3, 60, 60, 60])
            while process.poll() is None and requests_of(work, run) == before and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
            kills -= process.poll() is None
        seen.add(requests_of(work, run))
        if requests_of(work, run) == requests_of(work, "local"):  # the run has ended: check it and start again
            work.good(SCRIPT, *command)
            assert_same_files(work, run)
            shutil.rmtree(work.folder / run)
    work.good(SCRIPT, *command)
    assert_same_files(work, run)
    assert len(seen) > 2


@pytest.mark.slow
def test_two_ranks_equal_one_process(work, local):
    command = (*LOCAL, "--num_instructions_to_generate", 25, "--batch_dir", "ranks")
    with started(work, *command, launcher=TORCHRUN) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out == local.replace("local", "ranks")
    assert_same_files(work, "ranks")


def test_an_untrained_model_ends_at_max_stall(work):
    done = work(
        SCRIPT,
        *("--model_name_or_path", "model", "--max_length", 15, "--format", "io", "--seed_tasks_path", "seeds.jsonl"),
        *("--max_stall", 10, "--batch_dir", "garbage"),
    )
    assert done.code == 1
    assert done.err == (
        "error: garbage: 0 of 100 tasks kept; --max_stall 10 consecutive requests without a kept task; "
        "no task found in 10 completions\n"
    )
    assert "kept             0 (-)" in done.out.splitlines()
    assert "next" not in done.out
    assert (work.folder / "garbage" / "report.html").exists()


# ---- a server


def server_command(server, run: str, *more: object) -> tuple[object, ...]:
    endpoint = ("--api_base", server.url, "--api_model", MODEL, "--batch_dir", run)
    return (*endpoint, "--seed_tasks_path", "seeds.jsonl", *more)


def test_a_server(work):
    with serving(lambda number, body: time.sleep(0.01)) as server:
        out = work.good(SCRIPT, *server_command(server, "api"), OPENAI_API_KEY="sk-1")
    assert len(read_lines(work.folder / "api" / TASKS)) >= 100
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-1"}
    assert "sk-1" not in "".join(path.read_text() for path in (work.folder / "api").glob("*.*l*"))
    assert 1 < server.most_at_once <= 5
    assert out.splitlines()[-1].endswith(f"--model_name_or_path openai-community/gpt2 --data api/{TASKS}")


def test_ctrl_c_exits_at_once_and_no_completion_is_requested_twice(work):
    """Even with requests in flight that take another minute."""
    arrived = work.folder / "cc" / "arrived.jsonl"
    with serving(lambda number, body: time.sleep(60) if number >= 28 else None) as server:
        with started(work, *server_command(server, "cc")) as process:
            wait_until(lambda: len(server.bodies) == 33, process)
            wait_until(lambda: arrived.exists() and arrived.read_bytes().count(b"\n") == 8, process)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=10)
        assert process.returncode == 75
        completed = set(server.answered)
        assert len(completed) == 28
    with serving() as server:
        work.good(SCRIPT, *server_command(server, "cc"))
    assert not completed & {body["seed"] for body in server.bodies}
    used = {request["seed"] % 2**31 for request in read_lines(work.folder / "cc" / "requests.jsonl")}
    assert completed <= used


@pytest.mark.slow
def test_five_hundred_tasks_from_the_real_seed_tasks(work, shared_data):
    """From a server that often fails; sft.py trains on the result."""

    def fault(number, body):
        return {3: (429, {"Retry-After": "1"}, b""), 5: 500, 7: b"<html>"}.get(number % 60)

    with serving(fault) as server:
        out = work.good(
            SCRIPT,
            *("--api_base", server.url, "--api_model", MODEL, "--batch_dir", "real"),
            *("--seed_tasks_path", shared_data / "seed_tasks.jsonl", "--num_instructions_to_generate", 500),
        )
    kept = read_lines(work.folder / "real" / TASKS)
    statistics = json.loads((work.folder / "real" / "statistics.json").read_text())
    assert len(kept) == statistics["kept"] >= 500
    assert len({line["instruction"] for line in kept}) == len(kept)
    assert statistics["tasks"] == statistics["kept"] + sum(statistics["rejected"].values())
    assert len(server.answered) == len(set(server.answered))
    assert f"{statistics['requests']:,}, with {statistics['completions']:,} completions" in out
    trained = work.good(
        *("sft.py", "--model_name_or_path", "random_text", "--data", f"real/{TASKS}", "--max_steps", 3),
        *("--eval_samples", 0, "--output_dir", "real-tuned"),
    )
    assert f"real/{TASKS}: {len(kept)} examples" in trained


# ---- errors


def test_an_error_is_one_line(work):
    (work.folder / "bad.jsonl").write_text(
        '{"instruction": "Say it.", "instances": [{"input": "", "output": "it"}]}\n{"instruction": "Say it twice."}\n'
    )
    code, message = work.bad(SCRIPT, "--model_name_or_path", "random_text", "--seed_tasks_path", "bad.jsonl")
    assert (code, message.split(": ")[0]) == (1, "bad.jsonl:2")
    assert not (work.folder / "runs").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--model_name_or_path is needed: a folder or a hub id, or --api_base with --api_model for a server"),
        ("--model_name_or_path MODEL --max_length 250", "--max_length 250 leaves 6 of the model's 256 tokens for the"),
        ("--model_name_or_path MODEL --max_length 300", "--max_length 300 leaves no tokens for the prompt: the model"),
        ("--model_name_or_path MODEL --tokenizer_name ./none", "./none: no such folder"),
        (
            "--model_name_or_path a --api_base http://x/v1 --api_model m",
            "--model_name_or_path and --api_base are alternatives",
        ),
        ("--model_name_or_path a --num_prompt_synthetic_instructions 9", "--num_prompt_synthetic_instructions 9 is"),
        ("--model_name_or_path a --trigger_input Output", "the trigger words Instruction, Output, Output must differ"),
    ],
)
def test_invalid_settings_are_rejected(work, tmp_path, line, message):
    words = [str(work.folder / "random_text") if word == "MODEL" else word for word in line.split()]
    with pytest.raises((ValueError, OSError)) as error:
        selfinstruct.main(parse(selfinstruct.SelfInstructConfig, [*words, "--batch_dir", str(tmp_path / "run")]))
    assert str(error.value).startswith(message)


def test_api_base_needs_a_single_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--api_base", "http://127.0.0.1:1/v1", "--api_model", "m", "--batch_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="--api_base needs one process alone: start it with python"):
        selfinstruct.main(parse(selfinstruct.SelfInstructConfig, words))


# ---- --curate


def test_lint_needs_no_model(work, local):
    tasks = work.folder / "local" / TASKS
    (work.folder / "eval.json").write_text(json.dumps([json.loads(tasks.read_text().splitlines()[0])]))
    settings = ("--data", f"local/{TASKS}", "--eval_data", "eval.json", "--output_dir", "c")
    out = work.good(SCRIPT, "--curate", "lint", *settings)
    assert re.search(r"evaluation +1\b", out)
    dropped = [json.loads(line) for line in (work.folder / "c" / TASKS.replace(".", ".lint.dropped.")).open()]
    assert "evaluation" in [line["reason"] for line in dropped]
    kept = (work.folder / "c" / TASKS.replace(".", ".lint.")).read_text().splitlines()
    assert len(kept) + len(dropped) == len(tasks.read_text().splitlines())


@pytest.mark.parametrize("mode", ["unique", "consistent"])
def test_semantic_curation(work, local, mode):
    """The generating model also embeds the texts, which any exported model can."""
    pytest.importorskip("sentence_transformers", reason="the extra curation is not installed")
    before = read_files(work, "local")
    model = () if mode == "unique" else LOCAL
    settings = ("--embedding_model", "random_text", "--batch_dir", "local", "--output_dir", f"by-{mode}")
    work.good(SCRIPT, "--curate", mode, *model, *settings)
    kept = (work.folder / f"by-{mode}" / TASKS.replace(".", f".{mode}.")).read_text().splitlines()
    dropped = (work.folder / f"by-{mode}" / TASKS.replace(".", f".{mode}.dropped.")).read_text().splitlines()
    tasks = before[TASKS].decode().splitlines()
    assert len(kept) + len(dropped) == len(tasks)
    assert set(kept) <= set(tasks)
    assert read_files(work, "local") == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--data x.json", "--data and --output_dir go with --curate"),
        ("--curate unique --eval_data x.json", "--eval_data goes with --curate lint"),
        ("--curate lint --data none.json", "none.json: no such file"),
        ("--curate consistent --data local.json", "--model_name_or_path is needed"),
    ],
)
def test_invalid_curate_settings_are_rejected(work, line, message):
    (work.folder / "local.json").write_text('[{"instruction": "Say hi.", "output": "Hi."}]')
    code, output = work.bad(SCRIPT, *line.split(), "--embedding_model", "random_text")
    assert message in output, (code, output)


def test_other_files_in_the_folder_are_kept(work):
    """Every hidden file with two dots was mistaken for a temporary file of the run and deleted."""
    project = work.folder / "project"
    (project / ".my.d").mkdir(parents=True)
    (project / ".gitlab-ci.yml").write_text("precious")
    work.good(SCRIPT, *LOCAL, "--num_instructions_to_generate", 1, "--batch_dir", "project")
    assert (project / ".gitlab-ci.yml").read_text() == "precious"
    assert (project / ".my.d").is_dir()

    (work.folder / "mine").mkdir()
    shutil.copy(work.folder / "seeds.jsonl", work.folder / "mine" / "seed_tasks.jsonl")
    code, message = work.bad(SCRIPT, *LOCAL, "--batch_dir", "mine")
    assert (code, "mine/seed_tasks.jsonl: exists without" in message) == (1, True), message
