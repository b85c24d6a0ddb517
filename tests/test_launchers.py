"""The scripts under python, torchrun and deepspeed, as processes of their own: what they print, and how they end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from .workplace import ROOT, Workplace

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29517")
LAUNCHES = int(os.environ.get("LAUNCHES", "10"))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workplace:
    work = Workplace(tmp_path_factory.mktemp("launchers"))
    for stage in range(4):
        (work.folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return work


def settings(run: str, **more: object) -> list[str]:
    """A run of three steps, of a batch of 4 on two ranks."""
    values = {
        "model_name_or_path": "model",
        "data": "train.json",
        "validation_data": "held.json",
        "output_dir": run,
        "max_steps": 3,
        "eval_steps": 1_000_000,
        "eval_samples": 0,
        "per_device_train_batch_size": 2,
        **more,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@contextmanager
def started(work: Workplace, launcher: tuple[str, ...], script: str, *arguments: str, **env: str) -> Iterator:
    """The process of a launcher. At the end of the block it is killed, and so are the ranks that it started."""
    with subprocess.Popen(
        [*launcher, str(ROOT / script), *arguments],
        cwd=work.folder,
        env=work.environment(DS_ACCELERATOR="cpu", **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            for pid in ranks_of(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.kill()


def ranks_of(launcher: int) -> list[int]:
    """The processes that run a script for it, directly or (deepspeed) through another launcher."""
    try:
        children = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child.pid for child in children if {str(ROOT / "sft.py"), str(ROOT / "train.py")} & {*child.cmdline()[:3]}]


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def steps_of(work: Workplace, run: str) -> int:
    path = work.folder / run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def own_lines(out: str) -> list[str]:
    """What the run printed, without what its time was; the deepspeed launcher's lines begin with a date."""
    lines = [line for line in out.splitlines() if not re.match(r"\[\d{4}-", line)]
    lines = [re.sub(r"[\d,]+ tok/s.*|\d+ s$|runs/\w+", "...", line) for line in lines]
    return [line for line in lines if not line.startswith("DeepSpeed: ZeRO stage 2, fp32, 2 ranks")]


def words_and_numbers(text: str) -> tuple[list[str], list[float]]:
    number = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
    return re.split(number, text), [float(found.replace(",", "")) for found in re.findall(number, text)]


def test_every_launcher_gives_the_same_run_and_deepspeed_does_not_drown_it(work):
    outs = []
    for launcher, more in ((TORCHRUN, {}), (DEEPSPEED, {"deepspeed": "zero2.json"})):
        with started(work, launcher, "sft.py", *settings(f"runs/{len(outs)}", **more)) as process:
            out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        outs.append(own_lines(out))
    assert len(outs[0]) in (14, 15)  # one more where there are more cores than the launchers' one thread uses
    # The last digit that is shown may be rounded otherwise.
    words, numbers = zip(*(words_and_numbers("\n".join(out)) for out in outs), strict=True)
    assert words[1] == words[0]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, abs=2e-4)
    weights = [work.weights(f"runs/{run}/export") for run in (0, 1)]
    for name, tensor in weights[0].items():
        assert (weights[1][name] - tensor).abs().max() < 1e-5, name


def test_ctrl_c_then_the_runs_own_configuration_goes_on(work):
    with started(work, (sys.executable,), "sft.py", *settings("runs/c", max_steps=400, save_total_limit=1)) as process:
        until(lambda: steps_of(work, "runs/c") > 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    steps = steps_of(work, "runs/c")
    assert (process.returncode, err) == (75, "\nSIGINT: the step will be finished and saved, then this run ends\n")
    saved = f"runs/c/checkpoints/step-{steps}"
    assert out.splitlines()[-1] == f"{saved}: saved; --resume auto resumes from it"
    told = json.loads((work.folder / "runs/c/preempted.json").read_text())
    assert told == {"checkpoint": saved, "signal": "SIGINT", "exit_code": 75}

    out = work.good("sft.py", "--config", "runs/c/config.yaml", "--resume", "latest", "--max_steps", steps + 5)
    assert f"{saved}: resuming after step {steps} of {steps + 5}" in out.splitlines()
    assert [line["step"] for line in work.metrics("runs/c")] == list(range(1, steps + 6))
    assert not (work.folder / "runs/c/preempted.json").exists()


def test_the_second_ctrl_c_is_immediate(work):
    long_step = settings("runs/cc", replay_data="corpus.txt", replay_ratio=20_000)
    with started(work, (sys.executable,), "sft.py", *long_step) as process:
        until(lambda: (work.folder / "runs/cc/metrics.jsonl").exists())
        until(lambda: "val_loss" in process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline().startswith("SIGINT: ")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=5)
    assert (process.returncode, err) == (130, "\ninterrupted\n")
    assert sorted(path.name for path in (work.folder / "runs/cc").iterdir()) == [".lock"]


def test_sigterm_before_training_ends_the_process_at_once(work):
    with started(work, (sys.executable,), "sft.py", *settings("runs/early")) as process:
        assert process.stdout.readline().startswith("train.json: 16 examples")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=5)
    assert process.returncode == -signal.SIGTERM
    assert [path.name for path in (work.folder / "runs/early").iterdir()] == [".lock"]


@pytest.mark.parametrize("launcher", [TORCHRUN, pytest.param(DEEPSPEED, marks=pytest.mark.slow)], ids=["torchrun", ""])
def test_sigterm_to_one_rank_under_a_launcher(work, launcher):
    run = f"runs/term-{len(launcher)}"
    arguments = settings(run, max_steps=100_000, resume="auto", deepspeed="zero1.json")
    with started(work, launcher, "sft.py", *arguments) as process:
        until(lambda: steps_of(work, run) > 2)
        first = int((work.folder / run / ".lock").read_text().split()[1])
        (second,) = {*ranks_of(process.pid)} - {first}
        os.kill(second, signal.SIGTERM)
        process.communicate(timeout=40)
    assert process.returncode != 0  # a code of the launcher's own
    assert preempted_at(work, run) == steps_of(work, run)


def preempted_at(work: Workplace, run: str) -> int:
    """The step of the checkpoint that preempted.json names."""
    told = json.loads((work.folder / run / "preempted.json").read_text())
    assert told["exit_code"] == 75
    assert (work.folder / told["checkpoint"] / "manifest.json").exists()
    return int(Path(told["checkpoint"]).name.removeprefix("step-"))


@pytest.mark.slow
def test_sigterm_to_torchrun_itself(work):
    """As a cluster's scheduler does; and the same command goes on."""
    arguments = settings("runs/all", max_steps=100_000, resume="auto")
    with started(work, TORCHRUN, "sft.py", *arguments) as process:
        until(lambda: steps_of(work, "runs/all") > 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=40)
    assert process.returncode != 0
    steps = steps_of(work, "runs/all")
    assert preempted_at(work, "runs/all") == steps
    with started(work, TORCHRUN, "sft.py", *settings("runs/all", max_steps=steps + 2, resume="auto")) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert f"resuming after step {steps} of {steps + 2}" in out
    assert [line["step"] for line in work.metrics("runs/all")] == list(range(1, steps + 3))


@pytest.mark.slow
def test_ranks_that_a_cluster_starts_by_hand_leave_with_their_own_code(work):
    """Slurm's srun starts each rank itself, and sees its exit code."""
    arguments = settings("runs/srun", max_steps=100_000)
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29518"}
    with (
        started(work, (sys.executable,), "sft.py", *arguments, RANK="0", LOCAL_RANK="0", **env) as first,
        started(work, (sys.executable,), "sft.py", *arguments, RANK="1", LOCAL_RANK="1", **env) as second,
    ):
        until(lambda: steps_of(work, "runs/srun") > 2)
        second.send_signal(signal.SIGTERM)
        for process in (first, second):
            process.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (75, 75)
    assert preempted_at(work, "runs/srun") == steps_of(work, "runs/srun")


@pytest.mark.slow
def test_the_ranks_of_a_killed_torchrun_keep_their_folder(work):
    """They start sessions of their own, so they train on, and a second run would write into the same files."""
    arguments = settings("runs/killed", max_steps=100_000)
    with started(work, TORCHRUN, "sft.py", *arguments) as process:
        until(lambda: steps_of(work, "runs/killed") > 2)
        ranks = ranks_of(process.pid)
        process.kill()
        try:
            first = int((work.folder / "runs/killed/.lock").read_text().split()[1])
            steps = steps_of(work, "runs/killed")
            code, message = work.bad("sft.py", *settings("runs/killed", resume="auto"))
            assert (code, message) == (
                1,
                f"runs/killed: another run, process {first} on {socket.gethostname()}, is writing into this folder; "
                "wait for it, end it, or give another --output_dir",
            )
            assert steps_of(work, "runs/killed") > steps
        finally:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDP", "zero0", "zero1", "zero2", "zero3"])
def test_short_runs_end_well_every_time(work, kind):
    """A finished ZeRO-3 run aborted at exit now and then, where its engine was left to the interpreter's end."""
    more = {} if kind == "DDP" else {"deepspeed": f"{kind}.json"}
    failed = []
    for i in range(LAUNCHES):
        with started(work, TORCHRUN, "sft.py", *settings(f"runs/{kind}-{i}", **more)) as process:
            _, err = process.communicate(timeout=120)
        if process.returncode or err:
            failed.append((i, process.returncode, err))
    assert failed == []


@pytest.mark.parametrize("script", ["sft.py", "train.py"])
def test_a_plan_leaves_nothing(work, script):
    data = {"sft.py": "train.json", "train.py": "corpus.txt"}[script]
    out = work.good(script, "--model_name_or_path", "model", "--data", data, "--output_dir", "runs/plan", "--plan", 8)
    assert "ZeRO" in out
    assert not (work.folder / "runs/plan").exists()
