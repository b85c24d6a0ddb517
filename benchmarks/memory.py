"""The memory of a training step: what `--plan` says beside what was measured at its worst instant.

    python benchmarks/memory.py --preset gpt2 --batch 8 --length 512 --bf16
    torchrun --nproc_per_node 8 benchmarks/memory.py --preset gpt2-xl --batch 2 --fp16

On CUDA the measure is `torch.cuda.max_memory_allocated`, on a CPU what PyTorch's allocator had given out, as its
profiler saw it. Two micro-batches make a step, so that gradients and activations are there together; dropout is off.
"""

import argparse

import numpy as np

from minigpt.hardware import set_thread_waiting

set_thread_waiting()  # before torch is imported

import torch

from minigpt import GPT, Batch, GPTConfig, TrainConfig, make_engine
from minigpt.distributed import pick_device, print0, world_size
from minigpt.training.engines.deepspeed_config import deepspeed_config
from minigpt.training.plan import plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2", choices=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--deepspeed")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    config = TrainConfig(
        plan=world_size(),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=2,
        bf16=args.bf16,
        fp16=args.fp16,
        deepspeed=args.deepspeed,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    shape = GPTConfig.preset(args.preset, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    device = torch.device(pick_device())
    settings = None
    if args.deepspeed or args.fp16:
        settings = deepspeed_config(config, shape.n_embd, world_size(), device.type)
    planned = plan(config, shape, [args.length + 1] * 2 * args.batch * world_size(), deepspeed=settings)
    idx = torch.randint(0, shape.vocab_size, (args.batch, args.length))

    def steps() -> None:
        model = GPT(shape).to(device).train()
        model.gradient_checkpointing = args.gradient_checkpointing
        engine = make_engine(model, config)
        for number in range(3):
            for last in (False, True):
                engine.backward(engine(Batch(idx, idx)).sum / idx.numel() / 2, last=last)
            engine.step(1e-5)
            if number == 0 and device.type == "cuda":  # the first makes the moments, and what comes before is not ours
                torch.cuda.reset_peak_memory_stats()
        engine.close()

    if device.type == "cuda":
        steps()
        found = torch.cuda.max_memory_allocated()
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            steps()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        found = int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())
    print0(planned.table())
    total = planned.memory[planned.stage].total
    print0(f"{'measured':16} {found / 2**30:.2f} GiB on rank 0; planned {total / 2**30:.2f}, {total / found:.2f} of it")


if __name__ == "__main__":
    main()
