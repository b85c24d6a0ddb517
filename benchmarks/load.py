"""Loading a checkpoint and its first forward, ours beside transformers: seconds and growth of memory.

    python benchmarks/load.py FOLDER

FOLDER holds a GPT-2 as transformers saves it. Imports are not counted. Each side runs in a process of its own, in
turn; medians are shown.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from minigpt.hardware import set_thread_waiting


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(side: str, folder: str) -> dict[str, float]:
    import torch

    if side == "ours":
        from minigpt import GPT as Model
    else:
        from transformers import GPT2LMHeadModel as Model
    idx = torch.arange(16)[None]
    torch.ones(8, 8) @ torch.ones(8, 8)  # the thread pool
    before, start = peak_mib(), time.perf_counter()
    model = Model.from_pretrained(folder)
    loaded = time.perf_counter()
    with torch.no_grad():
        model(idx)
    return {"load_s": loaded - start, "load_and_forward_s": time.perf_counter() - start, "mib": peak_mib() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--side", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_thread_waiting()  # before torch is imported, here and in the processes that are started
    if args.side:
        print(json.dumps(measure(args.side, args.folder)))
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    for _ in range(args.repeat):
        for side, runs in found.items():
            command = [sys.executable, __file__, args.folder, "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'':14}{'load s':>10}{'+ forward s':>14}{'MiB more':>12}")
    for side, runs in found.items():
        values = [statistics.median(run[key] for run in runs) for key in runs[0]]
        print(f"{side:14}{values[0]:10.3f}{values[1]:14.3f}{values[2]:12,.0f}")


if __name__ == "__main__":
    main()
