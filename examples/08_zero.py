"""Memory of each of two ranks under ZeRO stages 0 to 3, in bytes: measured, and by the formula of the paper.

Opens minigpt/training/engines/deepspeed_engine.py. The paper: Rajbhandari et al., arXiv:1910.02054.
    python examples/08_zero.py      # starts its own two ranks; on Linux, for DeepSpeed
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed

from minigpt import GPT, Batch, GPTConfig, TrainConfig, make_engine

SHAPE = GPTConfig(vocab_size=4096, n_positions=64, n_embd=128, n_layer=4, n_head=4)
ZERO = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000}  # 0: partition every parameter
SUMS = {"grad_accum_dtype": "bf16"}  # as in the paper; by default minigpt sums gradients in fp32


def paper(stage: int, ranks: int) -> float:
    """Bytes per parameter: 2 of weight, 2 of gradient, 12 of optimizer state (an fp32 weight and two moments)."""
    return 2 / (ranks if stage >= 3 else 1) + 2 / (ranks if stage >= 2 else 1) + 12 / (ranks if stage >= 1 else 1)


def size(tensors) -> int:
    """Bytes of memory of some tensors; memory shared by several views counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(stage: int) -> list[list[int]]:
    """For each rank the bytes of its parameters, gradients and optimizer state during a step."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "deepspeed.json"
        path.write_text(json.dumps({"data_types": SUMS, "zero_optimization": {"stage": stage, **ZERO}}))
        engine = make_engine(GPT(SHAPE), TrainConfig(bf16=True, deepspeed=str(path) if stage else None))
    model, optimizer = engine.module, engine.optimizer
    ids = torch.arange(66).view(2, 33)
    for last in (False, True):  # two micro-batches
        engine.backward(engine(Batch(ids[:, :-1], ids[:, 1:])).sum / 64, last)  # a mean over 64 tokens
        if not last:  # stages 0 and 1 keep full gradients until the last one; 2 and 3 partition them at once
            whole = size(p.grad for p in model.parameters())
    part = size(gradient for group in getattr(optimizer, "averaged_gradients", {}).values() for gradient in group)
    engine.step(1e-3)
    weights = [tensor for p in model.parameters() for tensor in (p, getattr(p, "ds_tensor", None))]  # full or a part
    adam = getattr(optimizer, "optimizer", optimizer)  # ZeRO wraps it; it updates this rank's fp32 weights
    state = [moment for moments in adam.state.values() for name, moment in moments.items() if name != "step"]
    state += adam.state if stage else []  # at stage 0 it updates the model's own fp32 weights
    held: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(held, [size(weights), whole or part, size(state)])
    engine.close()
    return held


if "RANK" not in os.environ:
    launch = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2", __file__]
    quiet = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([sys.executable, *launch], env={**os.environ, **quiet}).returncode)

n = GPT(SHAPE).num_parameters()
table = [measure(stage) for stage in range(4)]
if os.environ["RANK"] == "0":
    print(f"\n   ZeRO rank{'parameters':>13}{'gradients':>13}{'optimizer':>13}{'total':>13}    each  paper")
    for stage, ranks in enumerate(table):
        for rank, held in enumerate(ranks):
            cells = "".join(f"{count:13,}" for count in (*held, sum(held)))
            print(f"   {stage:4} {rank:4}{cells}{sum(held) / n:8.2f}{paper(stage, 2):7.2f}")
            assert abs(sum(held) / n / paper(stage, 2) - 1) < 0.02  # partitions are padded to equal size
    print(f"\n   each: bytes per parameter, of {n:,} parameters; activations not included")
    print("   ZeRO 0 is plain PyTorch with fp32 weights: 4 + 4 + 8, not 2 + 2 + 12")
    xl = [round(1.557611200 * paper(stage, 64), 1) for stage in range(4)]
    print(f"   GPT-2 XL on 64 GPUs, by the paper: {xl} GB on each")
    print("\n=> ZeRO partitions optimizer state (1), also gradients (2), also weights (3).", flush=True)
os._exit(0)  # skip interpreter shutdown: process-group threads that are still running would abort it
