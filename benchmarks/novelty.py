"""The novelty filter, ours beside rouge_score: milliseconds a candidate, and a whole pool filtered from nothing.

    python benchmarks/novelty.py --pools 1000 10000 20000 50000 --repeat 3 --json -

Instructions made here (lengths, and how often words come, as in English ones; one in four rewrites an earlier one), or
those of `--instructions FILE`. A candidate is held against a pool in three ways:

    ours        NoveltyFilter: `check` (verdict, highest, average, ten nearest) and `highest`
    serial      rouge_score's table for each instruction, whose tokens are at hand; also the average and the ten nearest
    processes   as Self-Instruct's first code does it: a pool of processes for each candidate, which tokenize and score;
                the highest only

Each is a process of its own; they take turns with the same candidates, and their answers have to be equal to the last
bit. Medians are shown. With `--json FILE` (`-`: stdout, the table then on stderr) also an object whose `rows` hold, for
each `pool`:

    check_ms, serial_ms, check_ratio              with the average and the ten nearest: serial over ours
    highest_ms, processes_ms, highest_ratio       the highest alone: processes over ours
    peak_rss, serial_peak_rss, processes_peak_rss MiB, of the process alone: its texts, Python, numpy; not its children

and whose `from_nothing` holds `candidates`, `kept` and `seconds` of a filter that grows by what it accepts.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate, islice

SIDES = ("ours", "serial", "processes")
COMMON = """
the a of to and in for is that with given following write sentence what you list create your about from on or each it
describe explain how an this by two are as be words name using their story text if can make three why not find many
"""  # the first ranks


def made_instructions() -> Iterator[str]:
    """Without end. Words come as often as their rank says (Zipf); lengths are log-normal around 12 words."""
    draw = random.Random(0)
    syllables = [consonant + vowel for consonant in "bcdfghklmnprstvw" for vowel in "aeiou"]
    words = [*COMMON.split(), *("".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(15_000))]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    earlier: list[list[str]] = []
    while True:
        if earlier and draw.random() < 0.25:
            text = [draw.choice(words) if draw.random() < 0.25 else word for word in draw.choice(earlier)]
        else:
            length = min(max(round(draw.lognormvariate(2.5, 0.6)), 4), 150)
            text = draw.choices(words, cum_weights=weights, k=length)
        earlier.append(text)
        yield " ".join(text).capitalize() + "."


def instructions(file: str | None) -> Iterator[str]:
    if file is None:
        return made_instructions()
    from minigpt import read_records

    return (
        next(message["content"] for message in conversation.messages if message["role"] != "system")
        for conversation in read_records(file)
    )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def prepare(side: str, pool: list[str], processes: int) -> Callable[[str], dict]:
    """A function that holds a candidate against the pool: seconds, and what came out."""
    if side == "ours":
        from minigpt.selfinstruct import NoveltyFilter

        novelty = NoveltyFilter()
        for text in pool:
            novelty.add(text)

        def seconds(call: Callable[[str], object], text: str) -> float:
            """The median of twenty: one is over before the processor is awake."""
            found = []
            for _ in range(20):
                start = time.perf_counter()
                call(text)
                found.append(time.perf_counter() - start)
            return statistics.median(found)

        return lambda text: {
            "check_s": seconds(novelty.check, text),
            "highest_s": seconds(novelty.highest, text),
            "highest": novelty.highest(text),
            **novelty.check(text)._asdict(),
        }

    from functools import partial
    from multiprocessing import get_context

    import numpy as np
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    if side == "processes":

        def one_process_pool(text: str) -> dict:
            start = time.perf_counter()
            with get_context("fork").Pool(processes) as workers:
                scores = [score["rougeL"].fmeasure for score in workers.map(partial(scorer.score, text), pool)]
            highest = max(scores)
            return {"s": time.perf_counter() - start, "highest": highest}

        return one_process_pool

    tokenize = scorer._tokenizer.tokenize
    pool_tokens = [tokenize(text) for text in pool]

    def serial(text: str) -> dict:
        start = time.perf_counter()
        tokens = tokenize(text)
        scores = [rouge_scorer._score_lcs(tokens, other).fmeasure for other in pool_tokens]
        nearest: dict[str, float] = {}
        for place in np.argsort(-np.array(scores), kind="stable"):  # of equal ones the first, as ours
            nearest.setdefault(pool[place], scores[place])
            if len(nearest) == 10:
                break
        highest, average = max(scores), float(np.mean(scores))
        seconds = time.perf_counter() - start
        found = {"score": highest, "average": average, "neighbours": nearest}
        return {"s": seconds, "accepted": highest < 0.7, **found}

    return serial


def work(args) -> None:
    """One side: says it is ready, then answers each line on stdin, a candidate."""
    answer = prepare(args.side, list(islice(instructions(args.instructions), args.pool)), args.processes)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps({**answer(json.loads(line)), "peak_rss": peak_mib()}), flush=True)


def measure(pool: int, candidates: list[str]) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--pool", str(pool), "--side"]
    workers = {
        side: subprocess.Popen([*command, side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for side in SIDES
    }
    found: dict[str, list[dict]] = {side: [] for side in SIDES}

    def answer(side: str) -> str:
        line = workers[side].stdout.readline()
        if not line:
            raise SystemExit(f"error: pool of {pool}: the side {side} failed")
        return line

    for side in SIDES:
        answer(side)
    for text in candidates:
        for side, worker in workers.items():
            worker.stdin.write(json.dumps(text) + "\n")
            worker.stdin.flush()
            found[side].append(json.loads(answer(side)))
        ours, serial, processes = (found[side][-1] for side in SIDES)
        for key in ("accepted", "score", "average", "neighbours"):
            assert ours[key] == serial[key], f"{key} of {text!r}: {ours[key]}, rouge_score {serial[key]}"
        assert list(ours["neighbours"]) == list(serial["neighbours"])
        assert ours["highest"] == ours["score"] == processes["highest"]
    for worker in workers.values():
        worker.communicate()

    def median(side: str, key: str) -> float:
        return statistics.median(answer[key] for answer in found[side])

    row = {
        "pool": pool,
        "check_ms": median("ours", "check_s") * 1e3,
        "serial_ms": median("serial", "s") * 1e3,
        "highest_ms": median("ours", "highest_s") * 1e3,
        "processes_ms": median("processes", "s") * 1e3,
        "peak_rss": median("ours", "peak_rss"),
        "serial_peak_rss": median("serial", "peak_rss"),
        "processes_peak_rss": median("processes", "peak_rss"),
    }
    row["check_ratio"] = row["serial_ms"] / row["check_ms"]
    row["highest_ratio"] = row["processes_ms"] / row["highest_ms"]
    return row


def from_nothing(texts: Iterator[str], target: int) -> dict:
    """Filters until `target` are kept, or no more come."""
    from minigpt.selfinstruct import NoveltyFilter

    novelty = NoveltyFilter()
    candidates, seconds = 0, 0.0
    for text in texts:
        start = time.perf_counter()
        if novelty.check(text).accepted:
            novelty.add(text)
        seconds += time.perf_counter() - start
        candidates += 1
        if len(novelty) == target:
            break
    return {"candidates": candidates, "kept": len(novelty), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", metavar="FILE", help="take these, in any format that minigpt reads")
    parser.add_argument("--pools", nargs="+", type=int, default=[1000, 10_000, 20_000, 50_000])
    parser.add_argument("--repeat", type=int, default=3, help="candidates a pool")
    parser.add_argument("--processes", type=int, default=2, help="of the side with a pool of processes")
    parser.add_argument("--from_nothing", type=int, default=20_000, help="instructions to keep")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - is stdout")
    parser.add_argument("--pool", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args)
        return

    needed = max(args.pools) + args.repeat
    texts = list(islice(instructions(args.instructions), needed))
    if len(texts) < needed:
        raise SystemExit(
            f"error: {args.instructions} holds {len(texts)} instructions, {needed} are needed: lower --pools"
        )
    table = sys.stderr if args.json == "-" else sys.stdout
    titles = ("check ms", "serial ms", "ratio", "highest ms", "processes ms", "ratio", "peak MiB", "serial MiB")
    print(f"{'pool':>8}" + "".join(f"{title:>14}" for title in titles), file=table)
    rows = []
    for pool in args.pools:
        row = measure(pool, texts[pool : pool + args.repeat])
        rows.append(row)
        print(
            f"{pool:8,}{row['check_ms']:14.3f}{row['serial_ms']:14,.1f}{row['check_ratio']:14,.0f}"
            f"{row['highest_ms']:14.3f}{row['processes_ms']:14,.1f}{row['highest_ratio']:14,.0f}"
            f"{row['peak_rss']:14.1f}{row['serial_peak_rss']:14.1f}",
            file=table,
            flush=True,
        )
    grown = from_nothing(instructions(args.instructions), args.from_nothing)
    print(f"from nothing: {grown['kept']:,} kept of {grown['candidates']:,} in {grown['seconds']:.1f} s", file=table)
    if args.json:
        result = json.dumps({"processes": args.processes, "rows": rows, "from_nothing": grown}, indent=2)
        if args.json == "-":
            print(result)
        else:
            with open(args.json, "w", encoding="utf-8") as file:
                file.write(result + "\n")


if __name__ == "__main__":
    main()
