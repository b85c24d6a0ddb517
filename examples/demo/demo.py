"""From raw text to answers on a CPU, without a network; it begins by saying how long it takes.

A GPT-2 of 2.1 million parameters reads a corpus of facts that comes with the package, is tuned on questions about
most of them, and is then asked about the others: facts that it has read, but never been asked about. In the end it
writes tasks of its own. Each stage is one of the scripts, run as you would run it; the commands are shown.

    python examples/demo/demo.py --seed 1     # or: make demo
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import demo_tasks
import facts
import yaml

from minigpt.distributed import clock, pick_device
from minigpt.hardware import available_cores, fastest_precision
from minigpt.settings.command_line import run

ROOT = Path(__file__).parents[2]
OTHER_STEPS = 830  # tuning, answers and starts, in steps of pretraining: 264 s / 0.124 s - 1,300
LONG = 600  # seconds; above them the reasons are printed


@dataclass
class DemoConfig:
    """Pretrain, tune and question a tiny GPT-2."""

    seed: int = 1
    """Fixes the split of the facts, the initialisation and the order of the data."""
    output_dir: str = "runs/demo"
    """Folder that everything is written to, relative to the repository."""


def main(config: DemoConfig) -> None:
    started = time.perf_counter()
    os.chdir(ROOT)  # the scripts' paths, those in configs/ too, are relative to it
    announce()
    folder = Path(config.output_dir)
    data, base, tuned = folder / "data", folder / "train", folder / "sft"
    facts.build(data, config.seed)
    demo_tasks.build(data, config.seed)

    title("1. A corpus of facts, as raw text", f"{data}/corpus.txt begins:")
    for line in (data / "corpus.txt").read_text(encoding="utf-8").splitlines()[:4]:
        print(f"  {line}")
    print(f"{data}/task_lists.jsonl holds lists of tasks about some of the facts, such as:")
    first = json.loads((data / "task_lists.jsonl").read_text(encoding="utf-8").partition("\n")[0])
    for line in first["text"].splitlines():
        print(f"  {line}")

    title(
        "2. train.py: a model that has read the corpus",
        "It can go on with a text, and it does just that when it is asked something.",
    )
    corpus, seed = (data / "task_lists.jsonl", data / "corpus.txt"), f"--seed={config.seed}"
    script("train.py", "--config", "configs/demo_train.yaml", "--data", *corpus, "--output_dir", base, seed)
    before = predict(f"{base}/export", data / "heldout.json", folder / "before")

    title(
        "3. sft.py: the same model, taught to answer",
        "By questions about other facts than those that it will be asked.",
    )
    instructions = ["--data", data / "instructions.json", "--replay_data", *corpus, "--output_dir", tuned, seed]
    script("sft.py", "--config", "configs/demo_sft.yaml", "--model_name_or_path", f"{base}/export", *instructions)
    after = predict(f"{tuned}/export", data / "heldout.json", folder / "after")
    control = predict(f"{tuned}/export", data / "control.json", folder / "control")

    title(
        "4. The same questions before and after", "The facts stood in the corpus; no question about them was ever seen."
    )
    for old, new in list(zip(before.answers, after.answers, strict=True))[:8]:
        print(f"  {new['prompt'][-1]['content']}")
        print(f"    before  {shortened(old['prediction'])}")
        print(f"    after   {shortened(new['prediction'])}  {'(right)' if new['exact_match'] else '(wrong)'}")
    rate = "exact match on {:4} held-out facts: {:6.1%} before, {:6.1%} after tuning"
    print("\n  " + rate.format(len(after.answers), before.exact_match, after.exact_match))
    print(f"  exact match on {len(control.answers):4} facts that it never read: {control.exact_match:6.1%} (a control)")
    print(f"  answers that end by themselves: {after.stop_rate:.1%}")
    print(f"  the loss curves: {base}/loss.png and {tuned}/loss.png")

    title("5. chat.py: ask it yourself", "China is among the facts held out, whatever the seed.")
    script("chat.py", "--model_name_or_path", f"{tuned}/export", "--prompt", "What is the capital of China?")

    title(
        "6. selfinstruct.py: it writes tasks of its own",
        "It is shown a task and goes on with the list; what can be read and is unlike all others is kept.",
    )
    batch_dir = folder / "selfinstruct"
    shutil.rmtree(batch_dir, ignore_errors=True)  # a bootstrap that is there would go on
    pools = ["--seed_tasks_path", data / "seed_tasks.jsonl", "--batch_dir", batch_dir, seed]
    script(
        *("selfinstruct.py", "--config", "configs/demo_selfinstruct.yaml"),
        *("--model_name_or_path", f"{tuned}/export", *pools),
    )
    new_tasks = show_new_tasks(read_lines(batch_dir / "machine_generated_instructions.jsonl"), data)
    print(f"  the report: {batch_dir}/report.html")

    title(
        "What this model is",
        "A network of 2.1 million parameters that knows the few hundred facts of its corpus and has learnt to\n"
        "answer questions about them in one sentence. It knows nothing else, and when asked something else it\n"
        "makes an answer up in the same confident form. The same scripts train the real GPT-2.",
    )
    result = {
        "exact_match_before": before.exact_match,
        "exact_match_after": after.exact_match,
        "exact_match_control": control.exact_match,
        "stop_rate": after.stop_rate,
        "new_tasks": new_tasks,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result))


def announce() -> None:
    """Says how long the demonstration will take on this machine, from a few steps that it times, and why if long."""
    import torch

    from minigpt import GPT, Batch, GPTConfig, TrainConfig, make_engine

    recipe = yaml.safe_load(Path("configs/demo_train.yaml").read_text(encoding="utf-8"))
    device = pick_device()  # as the scripts do
    precision = fastest_precision(device)
    model = GPT(GPTConfig.from_pretrained(recipe["config_name"], vocab_size=4096)).to(device)
    engine = make_engine(model, TrainConfig(bf16=precision == "bf16"))
    idx = torch.randint(0, 4096, (recipe["per_device_train_batch_size"], recipe["block_size"] + 1))
    batch, seconds = Batch(idx[:, :-1], idx[:, 1:]), []
    while len(seconds) < 3 or sum(seconds) < 1.5:
        start = time.perf_counter()
        engine.backward(engine(batch).sum / batch.targets.numel(), last=True)
        engine.step(1e-4)
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[1:])
    total = step * (recipe["max_steps"] + OTHER_STEPS)
    threads, cores = torch.get_num_threads(), available_cores()
    where = f"{threads} of {cores} cores" if device == "cpu" else device
    print(f"About {clock(total)} on this machine, in {precision} on {where}: a step takes {1000 * step:,.0f} ms.")
    if total > LONG and device == "cpu":
        load, reasons = os.getloadavg()[0], []
        if load > cores / 2:
            reasons.append(f"other processes use the cores (load {load:.1f}): end them")
        if threads == 1:
            one_thread = f"one thread computes: OMP_NUM_THREADS={cores} uses all cores"
            reasons.append("there is one core" if cores == 1 else one_thread)
        if precision == "fp32":
            reasons.append("this CPU has no fast bf16: one with AVX512-BF16 or AMX takes half the time")
        print("\n  ".join(["It takes long because", *(reasons or ["these cores are slow"])]))


@dataclass
class Outcome:
    """What `sft.py --predict` wrote."""

    answers: list[dict]
    exact_match: float
    stop_rate: float


# The pretrained model is asked in the same words as the tuned one.
ANSWERING = ("--template", "alpaca", "--max_new_tokens", "32", "--per_device_eval_batch_size", "64")


def predict(model: str, questions: Path, folder: Path) -> Outcome:
    """Has a model answer a dataset."""
    script("sft.py", "--model_name_or_path", model, "--predict", questions, "--output_dir", folder, *ANSWERING)
    answers = read_lines(folder / "predictions.jsonl")
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return Outcome(answers, scores["exact_match"], scores["stop_rate"])


def show_new_tasks(written: list[dict], data: Path) -> int:
    """How many tasks stand in nothing that the model was trained on or shown; some of them, judged by the facts."""
    told = demo_tasks.told(data)
    new = [task for task in written if demo_tasks.words(task["instruction"]) not in told]
    right = [task for task in new if demo_tasks.is_right(task["instruction"], task["output"])]
    held_out = {row["output"] for row in json.loads((data / "heldout.json").read_text(encoding="utf-8"))}
    unasked = [task for task in right if task["output"] in held_out]
    print(f"\n  {len(new)} of the {len(written)} kept tasks stand in nothing that it was trained on or shown")
    print(
        f"  {len(right)} of these are rightly asked and answered, {len(unasked)} about a fact that nobody had asked for"
    )
    for task in new[:8]:
        print(f"  {task['instruction']}\n    {shortened(task['output'])}  {'(right)' if task in right else '(wrong)'}")
    return len(new)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def script(name: str, *arguments) -> None:
    """Runs one of the scripts, and shows the command."""
    words = [str(word) for word in arguments]
    if name in ("train.py", "sft.py"):
        words.append("--overwrite_output_dir")
    print(f"$ python {shlex.join([name, *words])}", flush=True)
    done = subprocess.run([sys.executable, name, *words], check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with exit code {done.returncode}; its message stands above")


def title(text: str, explanation: str) -> None:
    print(f"\n== {text}\n{explanation}", flush=True)


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 70 else f"{text[:70]} ..."


if __name__ == "__main__":
    run(main, DemoConfig)
