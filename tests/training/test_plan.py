"""The plan against what is measured: autograd's saved tensors, PyTorch's allocator, files on the disk, real runs."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from minigpt import GPT, Batch, Example, GPTConfig, TrainConfig, make_engine
from minigpt.model.gpt2 import PRESETS
from minigpt.training.loop import train
from minigpt.training.plan import activation_bytes, count_parameters, model_states, plan, saved_bytes

from ..ranks import on_ranks

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SHAPES = [
    GPTConfig(vocab_size=301, n_positions=64, n_embd=32, n_layer=3, n_head=4, **NO_DROPOUT),
    GPTConfig(vocab_size=503, n_positions=64, n_embd=192, n_layer=2, n_head=3, **NO_DROPOUT),  # heads as GPT-2's
    GPTConfig(vocab_size=2003, n_positions=32, n_embd=128, n_layer=1, n_head=2, **NO_DROPOUT),  # nearly all head
]
CHUNKS = GPTConfig(vocab_size=2003, n_positions=512, n_embd=16, n_layer=1, n_head=2, **NO_DROPOUT)  # of the head: two
WIDE = GPTConfig(vocab_size=503, n_positions=96, n_embd=768, n_layer=2, n_head=12, **NO_DROPOUT)  # as GPT-2
TINY = GPTConfig(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, **NO_DROPOUT)
PRECISIONS = ("fp32", "autocast", "bf16")


def build(config: GPTConfig, precision: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).train()
    return model.bfloat16() if precision == "bf16" else model


def batch_of(config: GPTConfig, rows: int) -> Batch:
    idx = torch.randint(0, config.vocab_size, (rows, config.n_positions))
    return Batch(idx, idx.roll(-1, 1))


def count_saved(model: GPT, batch: Batch, autocast: bool) -> int:
    """Bytes that autograd keeps after a forward pass, each storage once; weights are not its own."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(*batch)
    return sum(saved.values())


def peak_bytes(function) -> int:
    """The most that PyTorch's CPU allocator had given out at a time, above what it had at the beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


def test_parameters_are_those_published():
    published = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }
    assert {name: count_parameters(GPTConfig.preset(name)) for name in PRESETS} == published
    assert (
        count_parameters(GPTConfig(**vars(TINY) | {"n_inner": 40}))
        == GPT(GPTConfig(**vars(TINY) | {"n_inner": 40})).num_parameters()
    )


def test_model_states_are_those_of_the_zero_paper():
    """Figure 1: 7.5 billion parameters, 64 GPUs, K = 12."""
    totals = [round(model_states(7.5e9, 64, stage, "fp16").total / 1e9, 1) for stage in range(4)]
    assert totals == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", SHAPES, ids=lambda config: f"C{config.n_embd}")
def test_saved_bytes_are_what_autograd_saves(config, precision):
    batch = batch_of(config, rows=4)
    found = count_saved(build(config, precision), batch, precision == "autocast")
    width = 4 if precision == "fp32" else 2
    tokens = batch.inputs.numel()
    head = 4 * config.vocab_size * config.n_embd + width * tokens * config.n_embd  # its two gradients
    # Within 1%: in bf16 LayerNorm keeps its statistics in bf16 on a CPU; and some vectors of indices are not counted.
    assert saved_bytes(config, 4, config.n_positions, precision) == pytest.approx(found - head, rel=0.01)


def test_masks_of_dropout():
    """A CPU's masks are as wide as the numbers, where CUDA's are a byte; there are as many of them."""
    config = SHAPES[0]
    masked = GPTConfig(**vars(config) | {"resid_pdrop": 0.1, "embd_pdrop": 0.1})
    batch = batch_of(config, rows=4)
    extra = count_saved(build(masked, "fp32"), batch, False) - count_saved(build(config, "fp32"), batch, False)
    ours = [saved_bytes(one, 4, config.n_positions, "fp32") for one in (config, masked)]
    assert ours[1] - ours[0] == extra // 4 > 0


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", [*SHAPES, CHUNKS], ids=lambda config: f"C{config.n_embd}")
def test_a_step_takes_what_was_planned(config, precision, gradient_checkpointing):
    """Gradients and activations, at the peak of a global batch of two micro-batches."""
    model = build(config, precision)
    flags = {"bf16": precision == "autocast", "gradient_checkpointing": gradient_checkpointing}
    engine = make_engine(model, TrainConfig(**flags))

    def step(batch: Batch) -> None:
        for _ in range(2):
            loss = engine(batch)
            engine.backward(loss.sum / engine.objective.weight(batch), last=False)
        engine.step(1e-4)

    step(batch_of(TINY, rows=1))  # makes the optimizer's moments
    batch = batch_of(config, rows=4)
    found = peak_bytes(lambda: step(batch))
    planned = activation_bytes(config, 4, config.n_positions, precision, gradient_checkpointing)
    planned += int(model_states(model.num_parameters(), 1, 0, precision).gradients)
    # A CPU adds bf16 to fp32 through a copy in fp32, of the head's gradient; CUDA converts as it adds.
    slack = 0 if precision == "fp32" else 4 * config.vocab_size * config.n_embd
    assert 0.95 * found - slack <= planned <= 1.1 * found


def test_logits_are_counted_as_the_head_holds_them():
    """At most 1,024 tokens at a time: of a small vocabulary, those of a whole micro-batch were counted."""
    config = GPTConfig(vocab_size=8009, n_positions=512, n_embd=16, n_layer=1, n_head=1, **NO_DROPOUT)
    few, many = (activation_bytes(config, rows, 512, "fp32") for rows in (2, 4))
    assert few > 2 * 4 * 1024 * 8009 > 10 * (many - few) > 0


def rank_memory(stage: int, bf16: bool, file: Path) -> tuple[float, float]:
    """Bytes of each parameter that a rank holds between steps, and planned."""
    from minigpt.training.engines.deepspeed_config import deepspeed_config

    zero = {"stage": stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    file = file.with_name(f"{stage}{bf16}.json")
    file.write_text(json.dumps({"zero_optimization": zero}))
    config = TrainConfig(deepspeed=str(file), bf16=bf16, plan=2)
    gc.collect()
    others = {id(tensor) for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)}
    shape = WIDE  # most of its tensors are large enough for ZeRO-3 to divide
    model = GPT(shape)
    engine = make_engine(model, config)
    batch = Batch(*(tensor[:, :4] for tensor in batch_of(TINY, rows=1)))
    for _ in range(2):
        loss = engine(batch)
        engine.backward(loss.sum / engine.objective.weight(batch), last=True)
        engine.step(1e-4)
    del loss
    gc.collect()
    storages = {}
    for tensor in gc.get_objects():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in others:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    engine.close()
    full = deepspeed_config(config, shape.n_embd, 2, "cpu")
    planned = plan(config, shape, [shape.n_positions + 1] * 8, deepspeed=full).memory[stage]
    n_parameters = count_parameters(shape)
    return sum(storages.values()) / n_parameters, (planned.parameters + planned.optimizer) / n_parameters


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_divides_as_planned(tmp_path, stage, bf16):
    """Two ranks, between two steps: weights and optimizer. DeepSpeed's buffers for gradients may lie there as well."""
    sums = {(1, True): 4, (3, False): 4 / 2, (3, True): 4 / 2}  # which it does not let go between steps
    for found, planned in on_ranks(2, rank_memory, stage, bf16, tmp_path / "x"):
        assert found == pytest.approx(planned + sums.get((stage, bf16), 0), rel=0.02)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"max_steps": 5}, {"replay": True}])
def test_steps_and_tokens_are_those_of_the_run(settings):
    random = np.random.default_rng(0)
    data = [Example(random.integers(0, 50, n), np.ones(n, bool)) for n in random.integers(3, 30, 11)]
    replay = [Example(random.integers(0, 50, 9), np.ones(9, bool))] * 4 if "replay" in settings else None
    settings = {name: value for name, value in settings.items() if name != "replay"}
    config = TrainConfig(num_train_epochs=2, per_device_train_batch_size=3, logging_steps=100, **settings)
    result = train(config, make_engine(GPT(TINY), config), data, replay_data=replay, replay_ratio=0.5)
    planned = plan(
        config,
        TINY,
        [len(example) for example in data],
        replay_lengths=[len(example) for example in replay or ()],
        replay_ratio=0.5,
    )
    assert (planned.steps, planned.epochs) == (result.steps, result.epochs)
    tolerance = 0.2 if config.max_steps else 0  # of steps that end within an epoch, the mean is known
    assert planned.tokens == pytest.approx(result.tokens, rel=tolerance)


def test_a_checkpoint_takes_the_disk_that_was_planned(tmp_path):
    config = GPTConfig(vocab_size=301, n_positions=64, n_embd=64, n_layer=3, n_head=4, **NO_DROPOUT)
    engine = make_engine(GPT(config), TrainConfig())
    batch = batch_of(config, rows=1)
    engine.backward(engine(batch).sum / engine.objective.weight(batch), last=True)
    engine.step(1e-4)
    (tmp_path / "state").mkdir()
    engine.save(tmp_path / "state")
    engine.module.save_pretrained(tmp_path / "export")
    planned = plan(TrainConfig(), config, [9, 9])
    sizes = {f.name: sum(x.stat().st_size for x in f.iterdir()) for f in tmp_path.iterdir()}
    # 20 KB: the tensors' names, and the small JSON files
    assert planned.checkpoint <= sizes["state"] <= planned.checkpoint + 20_000
    assert planned.export <= sizes["export"] <= planned.export + 20_000


def test_checkpoints_on_disk():
    def kept(**settings) -> int:
        return plan(TrainConfig(num_train_epochs=3, **settings), TINY, [9] * 80).checkpoints  # 30 steps

    assert [kept(), kept(save_steps=10), kept(save_steps=7), kept(save_steps=7, save_total_limit=2)] == [1, 3, 5, 2]


def test_nothing_to_train_on():
    with pytest.raises(ValueError, match="^the training data is empty: give more of it, or hold out less"):
        plan(TrainConfig(), TINY, [])


def test_what_zero_offloads_lies_in_the_hosts_memory():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    planned = plan(TrainConfig(fp16=True, plan=4), TINY, [9] * 80, deepspeed={"zero_optimization": zero})
    memory, n_parameters = planned.memory[3], count_parameters(TINY)
    assert (memory.parameters, memory.optimizer) == (0, 0)
    assert planned.offloaded == (2 + 12) * n_parameters / 4


def test_the_table_of_gpt2_xl():
    """HugChat's: 8 GPUs, ZeRO-1 in fp16. Of each parameter 2 bytes, 4 of its gradient and 12 / 8 of its optimizer.

    Activations by hand: of each token and layer 32 C + 116 = 51,316 bytes, of 1,024 tokens and 48 layers 2.35 GiB;
    in backward of the head 10 bytes of each of its V C + N C gradients, 0.76 GiB.
    """
    config = TrainConfig(
        fp16=True,
        plan=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        save_steps=5000,
        save_total_limit=2,
    )
    zero = {"stage": 1, "reduce_bucket_size": 100_000_000}
    xl = GPTConfig.preset("gpt2-xl", **NO_DROPOUT)
    table = plan(config, xl, np.full(998_000, 513), deepspeed={"zero_optimization": zero}).table()
    assert table.splitlines() == [
        "model            1,557,611,200 parameters, fp16",
        "steps            93,564 (3.00 epochs of 998,000 examples)",
        "a step           2 examples x 2 accumulated x 8 GPUs = 32, 16,384 tokens on average",
        "tokens           1,532,928,000; the longest example has 512",
        "",
        "GiB per GPU        parameters   gradients   optimizer activations     buffers       total",
        "ZeRO 0: nothing          2.90        2.90       17.41        3.12        0.00       26.33",
        "1: + optimizer           2.90        5.80        2.18        3.12        0.37       14.37 <",
        "2: + gradients           2.90        0.73        2.18        3.12        0.56        9.48",
        "3: + parameters          0.36        0.73        2.18        3.12        2.51        8.89",
        "",
        "a checkpoint     37.72 GiB; 2 of them 75.43 GiB",
        "while saving     37.72 GiB more: the oldest goes when the newest is complete",
        "export           5.80 GiB, and as much for export-best",
    ]
