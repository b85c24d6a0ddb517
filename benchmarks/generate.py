"""Generation, ours beside transformers and llama.cpp: tokens per second, and how near to the memory's speed.

    python benchmarks/generate.py --preset gpt2 --repeat 3 --json -

Random weights of a published size, saved once and loaded by all; greedy or beam search, no end-of-text, so that all
write the same number of tokens. Each side of a case runs in a process of its own, warmed up; they take turns, and
medians are shown. int8 and fp16 are beside transformers' bf16, or its fp32 where bf16 is emulated.

llama.cpp continues one row, from the same weights in f32, f16 or q8_0. It is not a dependency: install
`llama-cpp-python gguf numpy` from source (`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python ...`)
into an environment of its own, and name its python with `--llama_python`. Our threads wait as the scripts let them
(`minigpt.hardware.set_thread_waiting`), llama.cpp's and transformers' by their own defaults.

With `--json FILE` (`-`: stdout, the table then on stderr) also an object whose `rows` hold, for each `case`:

    tokens_per_s                      new tokens over the seconds of a whole call, the prompt's reading included
    transformers, llama               the same of the peers, where they ran
    ratio, llama_ratio                ours over theirs
    floor_share                       weight bytes per step over the bandwidth: the share of the time that reading each
                                      weight once has to take
    bandwidth                         bytes per second, measured just before
    peak_rss, ..._peak_rss            MiB, of the process, with the checkpoint's mapped pages
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prompts import random_prompts

CASES = {  # name: (dtype, rows, beams, llama.cpp's type)
    "fp32 batch 1": ("fp32", 1, 1, "f32"),
    "fp16 batch 1": ("fp16", 1, 1, "f16"),
    "int8 batch 1": ("int8", 1, 1, "q8_0"),
    "fp32 batch 8": ("fp32", 8, 1, None),
    "int8 batch 8": ("int8", 8, 1, None),
    "fp32 batch 32": ("fp32", 32, 1, None),
    "int8 batch 32": ("int8", 32, 1, None),
    "bf16 batch 1": ("bf16", 1, 1, None),
    "bf16 batch 8": ("bf16", 8, 1, None),
    "bf16 batch 32": ("bf16", 32, 1, None),
    "bf16 beams 3": ("bf16", 1, 3, None),
}
ENVIRONMENT = dict(os.environ)  # of the peers: as the user set it
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


def prepare(side: str, dtype: str, rows: int, beams: int, args) -> Callable[[int], object]:
    """A function that generates that many tokens a row."""
    import torch

    prompts = random_prompts(rows, args.prompt)
    if side == "ours":
        from minigpt import GPT, generate
        from minigpt.inference.packed import for_generation, use_huge_pages

        use_huge_pages()
        if dtype == "bf16":
            model = for_generation(GPT.from_pretrained(args.folder, dtype=torch.bfloat16))
        else:
            quantize = None if dtype == "fp32" else dtype
            model = for_generation(GPT.from_pretrained(args.folder), quantize, batched=rows * beams > 1)
        return lambda count: generate(model, prompts, max_new_tokens=count, num_beams=beams)

    from transformers import GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch_dtype = torch.float32 if dtype == "fp32" or args.no_bf16 else torch.bfloat16
    peer = GPT2LMHeadModel.from_pretrained(args.folder, dtype=torch_dtype).eval()
    peer.generation_config.eos_token_id = None
    idx = torch.tensor(prompts)
    settings = {"attention_mask": torch.ones_like(idx), "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    return lambda count: peer.generate(idx, max_new_tokens=count, **settings)


def work(args) -> None:
    """One side of one case: says it is ready, then answers each line on stdin with a measurement."""
    if args.side == "ours":
        from minigpt.hardware import set_thread_waiting

        set_thread_waiting()
    dtype, rows, beams, _ = CASES[args.case]
    run = prepare(args.side, dtype, rows, beams, args)
    run(4)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run(args.tokens)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps({"tokens_per_s": rows * args.tokens / seconds, "peak_rss": peak}), flush=True)


def bandwidth() -> float:
    """Bytes per second that all cores together read from memory: the median of ten sums of half a gigabyte."""
    import torch

    block = torch.ones(2**27)
    found = []
    for _ in range(10):
        start = time.perf_counter()
        block.sum()
        found.append(block.nbytes / (time.perf_counter() - start))
    return statistics.median(found)


def commands(case: str, folder: str, args) -> dict[str, list[str]]:
    """The process of each side."""
    itself = [sys.executable, __file__, *sys.argv[1:], "--case", case, "--folder", folder, "--side"]
    sides = {side: [*itself, side] for side in ("ours", "transformers")}
    if args.no_bf16:
        sides["transformers"].append("--no_bf16")
    kind = CASES[case][3]
    if kind and args.llama_python:
        peer = str(Path(__file__).with_name("llama_peer.py"))
        numbers = [str(number) for number in (args.prompt, args.tokens, os.cpu_count())]
        sides["llama"] = [args.llama_python, peer, folder, kind, *numbers]
    return sides


def measure(case: str, folder: str, args) -> dict:
    workers = {
        side: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for side, command in commands(case, folder, args).items()
    }
    found: dict[str, list[dict[str, float]]] = {side: [] for side in workers}

    def answer(side: str) -> str:
        line = workers[side].stdout.readline()
        if not line:
            raise SystemExit(f"error: {case}: the side {side} failed")
        return line

    for side in workers:
        answer(side)
    for _ in range(args.repeat):
        for side, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            found[side].append(json.loads(answer(side)))
    for worker in workers.values():
        worker.communicate()
    median = {
        side: {key: statistics.median(run[key] for run in runs) for key in ("tokens_per_s", "peak_rss")}
        for side, runs in found.items()
    }
    ours = median.pop("ours")
    row = {"case": case, **ours}
    for side, peer in median.items():
        ratio = "llama_ratio" if side == "llama" else "ratio"
        row |= {side: peer["tokens_per_s"], ratio: ours["tokens_per_s"] / peer["tokens_per_s"]}
        row[f"{side}_peak_rss"] = peer["peak_rss"]
    return row


def has_llama(python: str) -> bool:
    """Whether that python can run llama_peer.py."""
    check = [python, "-c", "import llama_cpp, gguf, numpy"]
    return subprocess.run(check, capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2", choices=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=32, help="tokens a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a row")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--llama_python", default=sys.executable, help="a python that has llama-cpp-python and gguf")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - is stdout")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--no_bf16", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args)
        return

    from minigpt.hardware import bf16_warning, set_thread_waiting

    set_thread_waiting()
    from minigpt import GPT, GPTConfig

    table = sys.stderr if args.json == "-" else sys.stdout
    if not has_llama(args.llama_python):
        print(f"without llama.cpp: {args.llama_python} lacks llama-cpp-python or gguf (--llama_python)", file=table)
        args.llama_python = None
    if warning := bf16_warning():
        args.no_bf16 = True
        args.cases = [case for case in args.cases if not case.startswith("bf16")]
        print(f"without the cases in bf16: {warning}", file=table)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = GPT(GPTConfig.preset(args.preset))
        model.save_pretrained(folder)
        matrices = model.num_parameters() - model.wpe.weight.numel()  # positions are looked up, one row a token
        del model
        print(f"{args.preset}, {args.prompt} + {args.tokens} tokens", file=table)
        titles = ("tokens/s", "transformers", "ratio", "llama.cpp", "ratio", "GB/s", "of the floor")
        titles += ("peak MiB", "transformers", "llama.cpp")
        print(f"{'':14}" + "".join(f"{title:>13}" for title in titles), file=table)
        for case in args.cases:
            speed = bandwidth()  # anew for each case: on a machine that others share, it is not the same for long
            row = measure(case, folder, args)
            dtype, batch = CASES[case][:2]
            row["bandwidth"] = speed
            row["floor_share"] = row["tokens_per_s"] / batch * matrices * WEIGHT_BYTES[dtype] / speed
            rows.append(row)
            cells = [f"{row['tokens_per_s']:.1f}", f"{row['transformers']:.1f}", f"{row['ratio']:.2f}"]
            cells += [f"{row['llama']:.1f}", f"{row['llama_ratio']:.2f}"] if "llama" in row else ["", ""]
            cells += [f"{speed / 1e9:.1f}", f"{row['floor_share']:.0%}"]
            peaks = (row.get(f"{side}peak_rss") for side in ("", "transformers_", "llama_"))
            cells += [f"{peak:,.0f}" if peak else "" for peak in peaks]
            print(f"{case:14}" + "".join(f"{cell:>13}" for cell in cells), file=table, flush=True)
    if args.json:
        result = json.dumps(
            {
                "preset": args.preset,
                "prompt": args.prompt,
                "tokens": args.tokens,
                "rows": rows,
            },
            indent=2,
        )
        if args.json == "-":
            print(result)
        else:
            with open(args.json, "w", encoding="utf-8") as file:
                file.write(result + "\n")


if __name__ == "__main__":
    main()
