"""What one machine's GPUs do, as a Markdown table: training, memory beside the plan, generation, chat, kill and resume.

    benchmarks/gpu.sh            # installs what is missing, and starts this file
    benchmarks/gpu.sh --cpu      # a rehearsal in tiny shapes

Random weights at the published shapes, made-up text, no network. The real scripts run under torchrun, each in
processes of their own; this process never touches a GPU, so all of its memory is theirs. Every run has to end within
`--minutes`: what does not fit any more is in the table as "not run".

MFU is model FLOPs utilisation: the FLOPs that the model needs for the tokens read, `flops_per_token`, over what the
GPUs could compute in that precision, `peak_flops` (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B).
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.settings.groups import TrainConfig
from minigpt.training.plan import count_parameters, plan

ROOT = Path(__file__).parents[1]
FIRST_STEPS = 3  # which allocate, and choose kernels: left out of the medians
ROOM = 0.85  # of a GPU's free memory, that the plan may fill: beside it are CUDA's context and fragments
BATCHES = (32, 16, 8, 4, 2, 1)
CONFIGS = {"train": "PretrainConfig", "sft": "SFTConfig"}  # the settings of each script
OURS = ".gpu-benchmark"  # marks a folder that the next start may replace
REFUSED = "does not compute in fp16"  # what train.py says of a CPU

# Dense FLOPs a second of the tensor cores, sums in fp32, from NVIDIA's data sheets; every word of a key is in the
# card's name. Of keys that match, the longest counts. Volta and Turing compute no bf16.
PEAKS: dict[str, dict[str, float]] = {
    "B200": {"fp16": 2250e12, "bf16": 2250e12},
    "GH200": {"fp16": 989e12, "bf16": 989e12},
    "H200": {"fp16": 989e12, "bf16": 989e12},
    "H200 NVL": {"fp16": 836e12, "bf16": 836e12},
    "H100": {"fp16": 989e12, "bf16": 989e12},
    "H100 PCIe": {"fp16": 756e12, "bf16": 756e12},
    "H100 NVL": {"fp16": 835e12, "bf16": 835e12},
    "A100": {"fp16": 312e12, "bf16": 312e12},
    "A40": {"fp16": 149.7e12, "bf16": 149.7e12},
    "A30": {"fp16": 165e12, "bf16": 165e12},
    "A10": {"fp16": 125e12, "bf16": 125e12},
    "L40S": {"fp16": 362e12, "bf16": 362e12},
    "L4": {"fp16": 121e12, "bf16": 121e12},
    "RTX 4090": {"fp16": 165.2e12, "bf16": 165.2e12},
    "RTX 3090": {"fp16": 71e12, "bf16": 71e12},
    "V100 SXM2": {"fp16": 125e12},
    "V100 PCIE": {"fp16": 112e12},
    "T4": {"fp16": 65e12},
}
OTHER_CARDS = {"AND", "D", "LAPTOP", "MAX", "MIG", "SUPER", "TI"}  # words of a card that is another one, or a part


def peak_flops(card: str, precision: str) -> float | None:
    """FLOPs a second that this card can compute at most; None where that is not known, of a part of a card too."""
    words = set(re.split(r"[\s-]+", card.upper()))
    fitting = [key for key in PEAKS if set(key.upper().split()) <= words]
    if not fitting or words & OTHER_CARDS:
        return None
    return PEAKS[max(fitting, key=len)].get(precision)


def flops_per_token(n_parameters: float, n_layer: int, width: int, length: int) -> float:
    """What forward and backward of one token need: 6 N + 12 L C T.

    Each of N weights is multiplied and added once forward and twice backward; a token's query meets T keys, and their
    values, in each of L layers of width C, all of its heads together. That half of the keys are masked, and that
    checkpointing computes a layer twice, is not counted: so the figure is the same for every way to compute it.

    >>> round(flops_per_token(124_439_808, 12, 768, 1024) / 1e6)  # GPT-2 124M, its tied head counted once
    860
    """
    return 6 * n_parameters + 12 * n_layer * width * length


def mfu(tokens_per_s: float, shape: GPTConfig, length: int, card: str, precision: str, ranks: int) -> float | None:
    """The share of what all ranks' cards could compute; None where that is not known."""
    peak = peak_flops(card, precision)
    if peak is None:
        return None
    return tokens_per_s * flops_per_token(count_parameters(shape), shape.n_layer, shape.n_embd, length) / (ranks * peak)


@dataclass(frozen=True)
class Machine:
    """What the runs get."""

    device: str
    """cuda or cpu."""
    card: str
    ranks: int
    free: float
    """Bytes of the fullest GPU that are free; of a CPU infinite, since the plan is a GPU's."""
    versions: str


@dataclass(frozen=True)
class Size:
    """A model, and how long it is trained."""

    name: str
    shape: GPTConfig
    length: int
    steps: int

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-").lower()


NO_DROPOUT: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
GPU_SIZES = [
    Size("GPT-2 124M", GPTConfig.preset("gpt2", **NO_DROPOUT), 1024, 30),
    Size("GPT-2 XL", GPTConfig.preset("gpt2-xl", **NO_DROPOUT), 1024, 12),
]
CPU_SIZES = [Size("tiny", GPTConfig(4096, 128, n_embd=64, n_layer=2, n_head=2, **NO_DROPOUT), 64, 12)]


class TimeIsUp(Exception):
    """The minutes are over."""


class Failed(Exception):
    """A run failed; the message is the line that it ended with."""


class Clock:
    """How much of the time is left."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds; raises `TimeIsUp` where there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeIsUp("not run: the minutes are over")
        return left


# ---- processes


def print0(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Launch:
    """A script under torchrun, in a session of its own, its output in a file."""

    def __init__(self, machine: Machine, script: str, folder: Path, arguments: Sequence[object]):
        self.folder, self.report = folder, folder.with_name(folder.name + ".json")
        self.log = folder.with_name(folder.name + ".log")
        for leftover in (self.report, *self.pid_files()):  # an earlier start's
            leftover.unlink(missing_ok=True)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", machine.ranks),
            *(__file__, "--script", script, "--report", self.report, "--output_dir", folder, *arguments),
        ]
        if machine.device == "cpu":
            command += ["--device", "cpu"]
        print0("$ " + " ".join(map(str, command[1:])))
        with open(self.log, "a") as log:
            self.start = log.tell()
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, start_new_session=True, env=environment(machine)
            )

    def wait(self, clock: Clock) -> dict[str, Any]:
        """What `run_script` measured. Raises `Failed` with the error that was printed, and `TimeIsUp`."""
        try:
            code = self.process.wait(clock.left())
        except (subprocess.TimeoutExpired, TimeIsUp):
            self.kill()
            raise TimeIsUp("not run to its end: the minutes are over") from None
        if code:
            raise Failed(error_in(self.output()) or f"exit code {code}, see {self.log}")
        return json.loads(self.report.read_text())

    def output(self) -> str:
        with open(self.log, errors="replace") as log:
            log.seek(self.start)
            return log.read()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.kill_ranks()  # to which torchrun gives sessions of their own
        self.process.wait()

    def kill_ranks(self) -> None:
        """As a machine that loses its power does it, to every rank; torchrun then ends by itself."""
        for file in self.pid_files():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)

    def pid_files(self) -> list[Path]:
        return list(self.report.parent.glob(f"{self.report.name}.pid-*"))

    def steps(self) -> list[int]:
        return [line["step"] for line in read_metrics(self.folder)]


def environment(machine: Machine) -> dict[str, str]:
    more = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if machine.device == "cpu":
        more |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | more


def error_in(output: str) -> str:
    """The first line with which a rank of our scripts ended; where all say that another is gone, that."""
    errors = re.findall(r"^(?:rank \d+: )?error: (.*)", output, re.MULTILINE)
    own = [error for error in errors if not error.startswith("another rank exited")]
    return (own or errors or [""])[0]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run; a line that is being written is no step yet."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run_script(script: str, report: Path, arguments: list[str]) -> None:
    """In each rank: train.py or sft.py as it is; rank 0 then writes the most memory that it held."""
    import importlib

    from minigpt.settings.command_line import run

    sys.argv = [f"{script}.py", *arguments]
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    rank = os.environ["RANK"]
    report.with_name(f"{report.name}.pid-{rank}").write_text(str(os.getpid()))

    def measured(config: Any) -> None:
        module.main(config)
        if rank == "0":
            report.write_text(json.dumps({"peak": peak_bytes()}))

    run(measured, getattr(module, CONFIGS[script]))


def peak_bytes() -> int:
    """The most that PyTorch had given out on the GPU; on a CPU the process's resident memory, libraries included."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


# ---- what is measured


def look_at(cpu: bool, ranks: int | None) -> Machine:
    """Asks another process, because one that has looked at a GPU holds memory on it."""
    code = """
import json, torch
cuda = torch.cuda.is_available()
count = torch.cuda.device_count() if cuda else 0
print(json.dumps({
    "count": count,
    "names": sorted({torch.cuda.get_device_name(i) for i in range(count)}),
    "free": min((torch.cuda.mem_get_info(i)[0] for i in range(count)), default=0),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
}))
"""
    found = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    if not cpu and not found["count"]:
        raise SystemExit("error: PyTorch sees no GPU here (--cpu is a rehearsal without one)")
    from importlib.metadata import version

    versions = f"torch {found['torch']}, DeepSpeed {version('deepspeed')}"
    if cpu:
        return Machine("cpu", cpu_name(), ranks or 2, float("inf"), versions)
    card = " and ".join(found["names"])
    return Machine("cuda", card, ranks or found["count"], found["free"], f"{versions}, CUDA {found['cuda']}")


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return "CPU"


def settings_of(precision: str, work: Path) -> list[str]:
    """The flags of ZeRO-1 in a precision; fp32 has no ready-made file."""
    if precision != "fp32":
        return ["--deepspeed", str(ROOT / f"configs/deepspeed/zero1_{precision}.json")]
    file = work / "zero1_fp32.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 100_000_000}}))
    return ["--deepspeed", str(file)]


def planned_bytes(size: Size, precision: str, ranks: int, batch: int, checkpointing: bool, work: Path) -> float:
    """What `--plan` says that each GPU holds."""
    config = TrainConfig(
        plan=ranks,
        per_device_train_batch_size=batch,
        deepspeed=settings_of(precision, work)[1],
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        gradient_checkpointing=checkpointing,
    )
    planned = plan(config, size.shape, [size.length + 1] * batch * ranks)
    return planned.memory[planned.stage].total


def choose_batch(size: Size, precision: str, machine: Machine, work: Path) -> tuple[int, bool, float]:
    """The largest micro-batch that the plan lets fit, and where none does, with checkpointing.

    Returns:
        The batch, whether layers are checkpointed, and the plan's bytes. A batch of 0: nothing fits, at those bytes.
    """
    if machine.device == "cpu":
        return 2, False, planned_bytes(size, precision, machine.ranks, 2, False, work)
    needed = 0.0
    for checkpointing in (False, True):
        for batch in BATCHES:
            needed = planned_bytes(size, precision, machine.ranks, batch, checkpointing, work)
            if needed <= ROOM * machine.free:
                return batch, checkpointing, needed
    return 0, True, needed


def train_size(size: Size, precision: str, machine: Machine, work: Path, clock: Clock) -> list[str]:
    """Trains on raw text; a row of the table. Leaves the run in `work/train-PRECISION`, with its export."""
    batch, checkpointing, needed = choose_batch(size, precision, machine, work)
    plan_gib = f"{needed / 2**30:.2f}"
    if not batch:
        there = f"does not fit: --plan says {plan_gib} GiB at batch 1, {machine.free / 2**30:.2f} GiB are free"
        return [size.name, precision, f"1 x {size.length}", there, "-", "-", plan_gib, "-"]
    cut = f"{batch} x {size.length}" + (", checkpointed" if checkpointing else "")
    folder = work / f"train-{precision}"
    shutil.rmtree(folder, ignore_errors=True)
    more = ["--gradient_checkpointing"] if checkpointing else []
    try:
        launch = Launch(
            machine,
            "train",
            folder,
            [
                *("--model_name_or_path", model_folder(size, work, machine, clock), "--tokenizer_name", "tiny"),
                *("--data", work / "text.txt", "--cache_dir", work / "cache", "--validation_split", 0),
                *("--block_size", size.length, "--max_steps", size.steps, "--per_device_train_batch_size", batch),
                *("--logging_steps", 10, *settings_of(precision, work), *more),
            ],
        )
        measured = launch.wait(clock)
        speed = tokens_per_s(read_metrics(folder))
    except Failed as error:
        told = f"refused on this {machine.device.upper()}" if REFUSED in str(error) else f"failed: {error}"
        return [size.name, precision, cut, told, "-", "-", plan_gib, "-"]
    except TimeIsUp as error:
        return [size.name, precision, cut, str(error), "-", "-", plan_gib, "-"]
    used = mfu(speed, size.shape, size.length, machine.card, precision, machine.ranks)
    return training_row(size.name, precision, cut, speed, used, measured["peak"], needed, machine.device)


def tokens_per_s(lines: Sequence[dict[str, Any]]) -> float:
    """The median of the steps, all ranks together, without the first ones and those that fp16 skipped: they are short.

    Raises `Failed` where none is left.
    """
    speeds = [line["tokens_per_s"] for line in lines[FIRST_STEPS:] if not line.get("skipped")]
    if not speeds:
        raise Failed(f"no step after the first {FIRST_STEPS} was applied")
    return statistics.median(speeds)


def training_row(
    name: str, precision: str, cut: str, speed: float, used: float | None, peak: float, needed: float, device: str
) -> list[str]:
    """On a CPU memory is not compared: the plan is a GPU's, and a process holds its libraries too."""
    share = f"{peak / needed:.2f}" if device == "cuda" else "-"
    utilisation = "-" if used is None else f"{used:.1%}"
    return [name, precision, cut, f"{speed:,.0f}", utilisation, f"{peak / 2**30:.2f}", f"{needed / 2**30:.2f}", share]


def model_folder(size: Size, work: Path, machine: Machine, clock: Clock) -> Path:
    """Random weights at this shape, saved once, by another process: it draws them on the GPU, which is faster."""
    folder = work / size.folder
    if not (folder / "config.json").exists():
        print0(f"drawing {size.name}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "shape.json").write_text(json.dumps(vars(size.shape)))
        worker("save", folder, machine, clock)
    return folder


def worker(task: str, folder: Path, machine: Machine, clock: Clock, *more: str) -> str:
    """What another process of this file says."""
    command = [sys.executable, __file__, "--worker", task, "--folder", str(folder), "--device", machine.device, *more]
    done = finished(command, machine, clock)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout


def finished(command: Sequence[str], machine: Machine, clock: Clock) -> subprocess.CompletedProcess[str]:
    """A process that has ended, with what it said. Raises `TimeIsUp`."""
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environment(machine), timeout=clock.left())
    except subprocess.TimeoutExpired:
        raise TimeIsUp("not run to its end: the minutes are over") from None


def work_on(task: str, folder: Path, device: str, dtype: str) -> None:
    """In the other process: weights drawn and saved, or tokens generated."""
    import torch

    from minigpt import generate
    from minigpt.inference.packed import for_generation

    if task == "save":
        torch.manual_seed(0)
        with torch.device(device):
            model = GPT(GPTConfig(**json.loads((folder / "shape.json").read_text())))
        model.save_pretrained(folder)
        return
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    model = for_generation(GPT.from_pretrained(folder, device=device, dtype=torch_dtype))
    tokens, prompt = (64, 32) if device == "cuda" else (16, 8)
    drawn = random.Random(0)
    speeds = {}
    for rows in (1, 8, 32):
        prompts = [[drawn.randrange(4096) for _ in range(prompt)] for _ in range(rows)]
        generate(model, prompts, max_new_tokens=4)
        start = time.perf_counter()
        generate(model, prompts, max_new_tokens=tokens)  # hands out ids, so the GPU is done
        speeds[rows] = rows * tokens / (time.perf_counter() - start)
    print(json.dumps(speeds))


def generate_size(size: Size, precision: str, machine: Machine, work: Path, clock: Clock) -> list[str]:
    """New tokens a second at 1, 8 and 32 rows; a row of the table."""
    try:
        folder = model_folder(size, work, machine, clock)
        speeds = json.loads(worker("generate", folder, machine, clock, "--dtype", precision))
    except (Failed, TimeIsUp) as error:
        told = f"failed: {error}" if isinstance(error, Failed) else str(error)
        return [size.name, precision, told, "-", "-"]
    return [size.name, precision, *(f"{speeds[str(rows)]:,.1f}" for rows in (1, 8, 32))]


def kill_and_resume(base: Path, precision: str, size: Size, machine: Machine, work: Path, clock: Clock) -> str:
    """sft.py is killed (SIGKILL to every rank) after its first checkpoint, and the same command goes on from there.

    Returns:
        How it went on.

    Raises:
        Failed: it did not go on, or steps are missing.
    """
    folder, every = work / "sft", size.steps // 3
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [
        *("--model_name_or_path", base, "--data", work / "instructions.json", "--cache_dir", work / "cache"),
        *("--validation_split", 0, "--max_seq_length", min(size.length, 256), "--max_steps", size.steps),
        *("--per_device_train_batch_size", 2, "--save_steps", every, "--save_total_limit", 1, "--resume", "auto"),
        *settings_of(precision, work),
    ]
    launch = Launch(machine, "sft", folder, arguments)
    while len(launch.steps()) < every + 1:  # its checkpoint is complete before the next step begins
        if launch.process.poll() is not None:
            raise Failed(error_in(launch.output()) or "sft.py ended before it was killed")
        if clock.end < time.monotonic():
            launch.kill()
            raise TimeIsUp("not run to its end: the minutes are over")
        time.sleep(0.02)
    launch.kill_ranks()
    try:
        code = launch.process.wait(min(60, clock.left()))
    except subprocess.TimeoutExpired:
        launch.kill()
        raise Failed("torchrun did not end within 60 s of its ranks") from None
    killed = len(launch.steps())
    again = Launch(machine, "sft", folder, arguments)
    again.wait(clock)
    resumed = re.search(r"going on after step (\d+) of (\d+)", again.output())
    if not code or not resumed or again.steps() != list(range(1, size.steps + 1)):
        raise Failed(f"exit code {code}, {resumed and resumed[0]}, {len(again.steps())} of {size.steps} steps written")
    return f"{precision}: killed after step {killed}; {resumed[0]}; steps 1 to {size.steps} are there, once each"


def ask(folder: Path, machine: Machine, clock: Clock) -> str:
    """chat.py answers a question with what was just tuned; a few steps from random weights say nothing sensible."""
    command = [sys.executable, str(ROOT / "chat.py"), "--model_name_or_path", str(folder), "--device", machine.device]
    command += ["--prompt", "What is the capital of China?", "--max_new_tokens", "16"]
    print0("$ " + " ".join(command[1:]))
    started = time.perf_counter()
    done = finished(command, machine, clock)
    if done.returncode:
        raise Failed(error_in(done.stderr) or f"exit code {done.returncode}")
    answer = " ".join(done.stdout.split())
    return f"{len(answer)} characters in {time.perf_counter() - started:.1f} s, start included"


def checked_row(name: str, check: Callable[..., str], *arguments: Any) -> list[str]:
    try:
        return [name, check(*arguments)]
    except Failed as error:
        return [name, f"failed: {error}"]
    except TimeIsUp as error:
        return [name, str(error)]


# ---- the data and the table


def write_data(work: Path) -> None:
    """Sentences and questions of random words: something to read at any length."""
    drawn = random.Random(0)
    syllables = ("ba", "de", "ki", "lo", "mu", "na", "po", "ri", "su", "ta")
    words = ["".join(drawn.choices(syllables, k=drawn.randint(1, 4))) for _ in range(2000)]

    def sentence() -> str:
        return " ".join(drawn.choices(words, k=drawn.randint(6, 14))).capitalize() + "."

    (work / "text.txt").write_text("\n".join(sentence() for _ in range(20_000)) + "\n")
    rows = [{"instruction": sentence(), "input": "", "output": sentence()} for _ in range(500)]
    (work / "instructions.json").write_text(json.dumps(rows))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a bar in a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def report(
    machine: Machine,
    command: str,
    trained: Sequence[Sequence[str]],
    generated: Sequence[Sequence[str]],
    checked: Sequence[Sequence[str]],
    seconds: float,
) -> str:
    """What goes into LOG.md."""
    where = (
        f"{machine.ranks} x {machine.card}" if machine.device == "cuda" else f"{machine.ranks} ranks, {machine.card}"
    )
    memory = (
        "Peak is `torch.cuda.max_memory_allocated` on rank 0 over the whole run, export included"
        if machine.device == "cuda"
        else "A rehearsal: tiny shapes; peak is a process's resident memory, libraries included, the plan a GPU's"
    )
    parts = [
        f"## {date.today()}: training and generation on {where}",
        f"`{command}`, {seconds:,.0f} s; {machine.versions}. Random weights, no dropout, ZeRO-1; tokens/s of all "
        f"ranks, the median step's after the first {FIRST_STEPS}. MFU: (6 N + 12 L C T) FLOPs a token over the card's "
        f'dense peak, "-" where that is not known. {memory}.',
        markdown(
            (
                "model",
                "precision",
                "batch x length a rank",
                "tokens/s",
                "MFU",
                "peak GiB",
                "planned GiB",
                "peak / plan",
            ),
            trained,
        ),
        "Generation, greedy, one rank, new tokens/s:",
        markdown(("model", "precision", "1 row", "8 rows", "32 rows"), generated),
        markdown(("check", "result"), checked),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a rehearsal: tiny shapes, ranks over gloo")
    parser.add_argument("--ranks", type=int, help="processes, a GPU each; unset: all GPUs, on a CPU two")
    parser.add_argument("--minutes", type=float, default=9.5, help="what has not ended by then is ended")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "gpu", help="for table.md and the logs")
    args = parser.parse_args()

    started, clock = time.perf_counter(), Clock(args.minutes)
    work: Path = args.output_dir.resolve()
    if work.exists() and any(work.iterdir()) and not (work / OURS).exists():
        raise SystemExit(f"error: {work}: holds something else; give another --output_dir")
    machine = look_at(args.cpu, args.ranks)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / OURS).touch()
    write_data(work)
    sizes, precisions = (CPU_SIZES, ("fp32", "fp16", "bf16")) if args.cpu else (GPU_SIZES, ("fp16", "bf16"))

    trained, generated, checked = [], [], []
    first, base = sizes[0], work / "base"
    for size in sizes:
        for precision in precisions:
            trained.append(train_size(size, precision, machine, work, clock))
            exported = work / f"train-{precision}" / "export"
            if size is first and exported.exists():
                shutil.rmtree(base, ignore_errors=True)
                exported.rename(base)
                tuning = precision
            shutil.rmtree(exported.parent, ignore_errors=True)  # XL's is 6 GB
        if size is first:  # the checks come before XL, which takes the most time
            if base.exists():
                checked.append(
                    checked_row("sft.py: kill -9, resume", kill_and_resume, base, tuning, size, machine, work, clock)
                )
            checked.append(checked_row("chat.py --prompt", ask, work / "sft" / "export", machine, clock))
            shutil.rmtree(work / "sft", ignore_errors=True)
        for precision in precisions:
            if not (args.cpu and precision == "fp16"):
                generated.append(generate_size(size, precision, machine, work, clock))
        shutil.rmtree(work / size.folder, ignore_errors=True)

    command = " ".join(["benchmarks/gpu.sh", *sys.argv[1:]])
    table = report(machine, command, trained, generated, checked, time.perf_counter() - started)
    (work / "table.md").write_text(table)
    print(table)
    failures = [cell for row in (*trained, *generated, *checked) for cell in row if cell.startswith("failed")]
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--script"]:  # --script NAME --report FILE, then the script's own flags
        run_script(sys.argv[2], Path(sys.argv[4]), sys.argv[5:])
    elif sys.argv[1:2] == ["--worker"]:
        words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        work_on(words["--worker"], Path(words["--folder"]), words["--device"], words.get("--dtype", "fp32"))
    else:
        main()
