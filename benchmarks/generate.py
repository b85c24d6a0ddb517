"""Generation, ours beside transformers' `generate`: tokens per second, and how near to the memory's speed.

    python benchmarks/generate.py --preset gpt2 --repeat 3 --json -

Random weights of a published size, saved once and loaded by both; greedy or beam search, no end-of-text, so that both
write the same number of tokens. Each side of a case runs in a process of its own, warmed up; the two take turns, and
medians are shown. int8 stands beside transformers' bf16. With `--json FILE` (`-`: stdout, the table then on stderr)
also an object whose `rows` hold, for each `case`:

    tokens_per_s, peer_tokens_per_s   new tokens over the seconds of a whole call, the prompt's reading included
    ratio                             ours over transformers
    floor_share                       weight bytes per step over the bandwidth: the share of the time that reading each
                                      weight once has to take
    bandwidth                         bytes per second, measured just before
    peak_rss, peer_peak_rss           MiB, of the process, with the checkpoint's mapped pages
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

CASES = {  # name: (dtype, rows, beams)
    "fp32 batch 1": ("fp32", 1, 1),
    "fp32 batch 8": ("fp32", 8, 1),
    "fp32 batch 32": ("fp32", 32, 1),
    "bf16 batch 1": ("bf16", 1, 1),
    "bf16 batch 8": ("bf16", 8, 1),
    "bf16 batch 32": ("bf16", 32, 1),
    "bf16 beams 3": ("bf16", 1, 3),
    "int8 batch 1": ("int8", 1, 1),
}
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def random_prompts(rows: int, length: int) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(50257) for _ in range(length)] for row in range(rows)]


def prepare(side: str, dtype: str, rows: int, beams: int, args) -> Callable[[int], object]:
    """A function that generates that many tokens a row."""
    import torch

    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    if side == "ours":
        from minigpt import GPT, generate
        from minigpt.inference.fast import for_generation, use_huge_pages

        use_huge_pages()
        prompts = random_prompts(rows, args.prompt)
        if dtype == "int8":
            model = for_generation(GPT.from_pretrained(args.folder), "int8")
        else:
            model = for_generation(GPT.from_pretrained(args.folder, dtype=torch_dtype))
        return lambda count: generate(model, prompts, max_new_tokens=count, num_beams=beams)

    from transformers import GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peer = GPT2LMHeadModel.from_pretrained(args.folder, dtype=torch_dtype).eval()
    peer.generation_config.eos_token_id = None
    prompts = torch.tensor(random_prompts(rows, args.prompt))
    settings = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    return lambda count: peer.generate(prompts, max_new_tokens=count, **settings)


def work(args) -> None:
    """One side of one case: says it is ready, then answers each line on stdin with a measurement."""
    dtype, rows, beams = CASES[args.case]
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


def measure(case: str, folder: str, args) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--case", case, "--folder", folder, "--side"]
    workers = {
        side: subprocess.Popen([*command, side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for side in ("ours", "transformers")
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
    ours, peer = (
        {key: statistics.median(run[key] for run in found[side]) for key in ("tokens_per_s", "peak_rss")}
        for side in ("ours", "transformers")
    )
    return {
        "case": case,
        "tokens_per_s": ours["tokens_per_s"],
        "peer_tokens_per_s": peer["tokens_per_s"],
        "ratio": ours["tokens_per_s"] / peer["tokens_per_s"],
        "peak_rss": ours["peak_rss"],
        "peer_peak_rss": peer["peak_rss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2", choices=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=32, help="tokens a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a row")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - is stdout")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args)
        return

    from minigpt import GPT, GPTConfig

    table = sys.stderr if args.json == "-" else sys.stdout
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = GPT(GPTConfig.preset(args.preset))
        model.save_pretrained(folder)
        matrices = model.num_parameters() - model.wpe.weight.numel()  # positions are looked up, one row a token
        del model
        print(f"{args.preset}, {args.prompt} + {args.tokens} tokens", file=table)
        titles = ("tokens/s", "transformers", "ratio", "GB/s", "of the floor", "peak MiB", "transformers")
        print(f"{'':14}" + "".join(f"{title:>14}" for title in titles), file=table)
        for case in args.cases:
            speed = bandwidth()  # anew for each case: on a machine that others share, it is not the same for long
            row = measure(case, folder, args)
            dtype, batch, _ = CASES[case]
            row["bandwidth"] = speed
            row["floor_share"] = row["tokens_per_s"] / batch * matrices * WEIGHT_BYTES[dtype] / speed
            rows.append(row)
            print(
                f"{case:14}{row['tokens_per_s']:14.1f}{row['peer_tokens_per_s']:14.1f}{row['ratio']:14.2f}"
                f"{speed / 1e9:14.1f}{row['floor_share']:14.0%}{row['peak_rss']:14,.0f}{row['peer_peak_rss']:14,.0f}",
                file=table,
                flush=True,
            )
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
