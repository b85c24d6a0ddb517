"""One training step, ours beside a plain loop over transformers' GPT2LMHeadModel: tokens/s and peak memory.

    python benchmarks/train_step.py --preset gpt2 --batch 4 --length 256 --prompt_share 0.6

Both read the same batches of instruction-like examples: `prompt_share` of the positions is prompt and ignored. Each
side runs in a process of its own, in turn, `repeat` times; medians are shown.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from minigpt.hardware import set_thread_waiting


def measure(side: str, args: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.manual_seed(0)
    idx = torch.randint(0, 50257, (args.batch, args.length))
    targets = torch.cat([idx[:, 1:], torch.full((args.batch, 1), -100)], dim=1)
    targets[:, : int(args.length * args.prompt_share)] = -100
    if side == "ours":
        from minigpt import GPT, Batch, GPTConfig, TrainConfig, make_engine

        model = GPT(GPTConfig.preset(args.preset, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).to(args.device)
        engine = make_engine(model, TrainConfig(bf16=args.bf16))
        engine.module.train()

        def step() -> None:
            n_tokens = (targets != -100).sum()
            engine.backward(engine(Batch(idx, targets)).sum / n_tokens, last=True)
            engine.step(1e-5)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        from minigpt.model.gpt2 import PRESETS

        config = GPT2Config(**PRESETS[args.preset], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel(config).to(args.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        inputs = idx.to(args.device)
        labels = torch.cat([torch.full((args.batch, 1), -100), targets[:, :-1]], dim=1).to(args.device)

        def step() -> None:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                loss = model(inputs, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if args.device == "cuda":
            torch.cuda.synchronize()

    step()
    wait()
    start = time.perf_counter()
    for _ in range(args.steps):
        step()
    wait()
    seconds = (time.perf_counter() - start) / args.steps
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"tokens_per_s": args.batch * args.length / seconds, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2", choices=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt_share", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_thread_waiting()  # before torch is imported, here and in the processes that are started
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    for _ in range(args.repeat):
        for side in found:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    median = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()
    }
    print(f"{'':14}{'tokens/s':>12}{'peak MiB':>12}")
    for side, values in median.items():
        print(f"{side:14}{values['tokens_per_s']:12,.0f}{values['peak_mib']:12,.0f}")
    ours, peer = median["ours"], median["transformers"]
    print(f"{'ratio':14}{ours['tokens_per_s'] / peer['tokens_per_s']:12.2f}{ours['peak_mib'] / peer['peak_mib']:12.2f}")


if __name__ == "__main__":
    main()
