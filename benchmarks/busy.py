"""One training step of the demo's model, on a quiet machine and beside a process that computes on one core.

    python benchmarks/busy.py --repeat 3

OpenMP's threads wait for one another at the end of every product. By default they spin, which gains little on a quiet
machine and costs a multiple on a busy one: while one thread has no core, all others spin and use up theirs.
Each row is a way to wait, as the environment sets it before torch is imported; the last is what the scripts set
(`minigpt.hardware.set_thread_waiting`). Milliseconds a step of 8 x 88 tokens: medians of the steps, and of `--repeat`
processes, which take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

VARIANTS = {
    "threads spin (the default of libgomp)": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=5000": {"GOMP_SPINCOUNT": "5000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "what the scripts set": {"SET": "1"},
}
BUSY = "import torch; torch.set_num_threads(1); a = torch.randn(512, 512)\nwhile True: a @ a"


def work(steps: int) -> None:
    """Prints the median of the steps in milliseconds."""
    if os.environ.pop("SET", None):
        from minigpt.hardware import set_thread_waiting

        set_thread_waiting()
    import torch

    from minigpt import GPT, Batch, GPTConfig, TrainConfig, make_engine

    torch.manual_seed(0)
    shape = GPTConfig(4096, n_positions=128, n_embd=192, n_layer=4, n_head=4)
    engine = make_engine(GPT(shape).train(), TrainConfig())
    idx = torch.randint(0, 4096, (8, 89))
    batch = Batch(idx[:, :-1], idx[:, 1:])
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.backward(engine(batch).sum / batch.targets.numel(), last=True)
        engine.step(1e-4)
        seconds.append(time.perf_counter() - start)
    print(1000 * statistics.median(seconds[2:]))


def measure(variant: str, busy: bool, args: argparse.Namespace) -> float:
    """Median milliseconds of a step in a new process; `busy`: while another process computes on one core."""
    names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {key: value for key, value in os.environ.items() if key not in names} | VARIANTS[variant]
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        command = [sys.executable, __file__, "--work", "--steps", str(args.steps)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        if other:
            other.kill()
            other.wait()
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON too")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.steps)
        return
    times: dict[str, dict[bool, list[float]]] = {variant: {False: [], True: []} for variant in args.variants}
    for _ in range(args.repeat):
        for variant in args.variants:
            for busy in (False, True):
                times[variant][busy].append(measure(variant, busy, args))
    medians = {variant: [statistics.median(runs[busy]) for busy in (False, True)] for variant, runs in times.items()}
    print(f"{'ms a step':40}{'quiet':>8}{'busy':>8}{'ratio':>8}")
    for variant, (quiet, busy) in medians.items():
        print(f"{variant:40}{quiet:8.0f}{busy:8.0f}{busy / quiet:8.1f}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(medians, file, indent=2)


if __name__ == "__main__":
    main()
