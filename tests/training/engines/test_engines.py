"""Every engine, on one rank and on several, makes the same step: the one that plain PyTorch makes."""

import copy
import itertools
import os

import numpy as np
import pytest
import torch
import transformers
from torch import distributed
from torch.nn import functional as F

from minigpt import GPT, Example, TrainConfig, collate, make_engine, train
from minigpt.data.order import shard
from minigpt.distributed import is_main, rank, sum_over_ranks, world_size
from minigpt.training.loop import evaluate
from minigpt.training.optim import parameter_groups

from ...ranks import engine_of, few, on_ranks
from ..test_loop import examples, tiny_model

DATA = examples(7)  # of very unequal lengths, and a number that no number of ranks divides
KINDS = ["torch", "zero0", "zero1", "zero2", "zero3"]
HALF = ["torch bf16", "zero1 bf16", "zero2 bf16", "zero3 bf16", "zero1 fp16", "zero2 fp16", "zero3 fp16"]


def vector(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All in one, without the key third of c_attn.bias: its gradient is zero in exact arithmetic, and noise in ours."""
    parts = []
    for name in sorted(tensors):
        flat = tensors[name].detach().float().flatten()
        if name.endswith("c_attn.bias"):
            query, _, value = flat.chunk(3)
            flat = torch.cat([query, value])
        parts.append(flat)
    return torch.cat(parts)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def gradients(engine) -> dict[str, torch.Tensor]:
    """Of the global batch, averaged over ranks, before the step. Every rank calls."""
    from deepspeed.utils import safe_get_full_grad

    partitioned = getattr(engine, "stage", 0) > 0
    named = engine.module.named_parameters()
    return {name: (safe_get_full_grad(p) if partitioned else p.grad).clone() for name, p in named}


def step(engine, data=DATA, micro_batch_size=2, lr=1e-3, factor=1.0):
    """One step on a global batch, as the loop makes it: `(loss, StepInfo)`. `factor` makes rank 0's gradients wrong."""
    objective = engine.objective
    batches = [
        objective.collate([data[i] for i in indices])
        for indices in shard([len(example) for example in data], micro_batch_size, rank(), world_size())
    ]
    weight = sum_over_ranks(sum(objective.weight(batch) for batch in batches))[0]
    total = 0.0
    for batch in batches:
        loss = engine(batch)
        total += loss.sum.item()
        scale = world_size() * (factor if is_main() else 1.0)
        engine.backward(loss.sum / weight * scale, last=batch is batches[-1])
    return sum_over_ranks(total)[0] / weight, engine.step(lr)


# ---- the same global batch, cut in any way


def three_steps(kind, micro_batch_size, accumulation, checkpointing=False):
    """Gradients of the first of three steps, and the weights after the third."""
    engine, config = engine_of(
        kind,
        tiny_model(),
        learning_rate=1e-3,
        num_train_epochs=3,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    seen = []
    plain_step = engine.step

    def watched_step(lr):
        seen.append(gradients(engine))
        return plain_step(lr)

    engine.step = watched_step
    assert train(config, engine, DATA).steps == 3
    weights = engine.full_state_dict()
    return (vector(seen[0]), vector(weights)) if is_main() else None


@pytest.fixture(scope="module")
def whole():
    """One rank, one micro-batch."""
    result = three_steps("torch", 8, 1)
    assert error(vector(dict(tiny_model().named_parameters())), result[1]) > 0.01
    return result


# Seven examples, in micro-batches of one, are a filler for two ranks and two fillers for three.
CUTS = [(1, 2, 4), (2, 4, 1), (2, 2, 2), (2, 1, 4), (3, 1, 3)]
EVERY_CUT = list(itertools.product(CUTS, KINDS, (False, True)))
FEW_CUTS = [
    *[((1, 2, 4), kind, False) for kind in ("torch", "zero1")],
    *[((2, 4, 1), kind, False) for kind in ("torch", "zero2")],
    *[((2, 2, 2), kind, False) for kind in ("zero0", "zero1", "zero3")],
    *[((2, 1, 4), kind, True) for kind in KINDS],
    *[((3, 1, 3), kind, False) for kind in ("torch", "zero1", "zero3")],
]


@pytest.mark.parametrize(("cut", "kind", "checkpointing"), few(EVERY_CUT, FEW_CUTS))
def test_a_global_batch_cut_in_any_way_is_the_same_step(whole, cut, kind, checkpointing):
    """DeepSpeed 0.17.6 to 0.19.3 reduced some gradients wrongly, and silently; a mean of means weighs them wrongly."""
    ranks, micro_batch_size, accumulation = cut
    found = on_ranks(ranks, three_steps, kind, micro_batch_size, accumulation, checkpointing)[0]
    assert error(found[0], whole[0]) < 1e-6
    assert error(found[1], whole[1]) < 1e-5


def gradients_on_the_way():
    engine, _ = engine_of("torch", tiny_model())
    lengths = []
    for last in (False, True):
        engine.backward(engine(collate([DATA[rank()]])).sum, last)
        lengths.append(vector(gradients(engine)).norm().item())
    return lengths


def test_ranks_reduce_once_per_global_batch():
    """After every micro-batch they would come to the same gradient, and wait for each other all the time."""
    (first, averaged), (other, averaged_there) = on_ranks(2, gradients_on_the_way)
    assert first != pytest.approx(other, rel=0.01)
    assert averaged == averaged_there


# ---- the first update

EPSILON = 1e-3  # of the size of the gradients: with less, Adam's first step is their sign, whatever their scale


def plain_update(dtype, folder):
    """The first update of plain PyTorch: gradients of a model in `dtype`, AdamW on its fp32 weights.

    In fp32 the model is transformers'. In half precision it is our own, on the same micro-batches: what it rounds
    is no business of the engine's.
    """
    start = tiny_model()
    count = sum(int(example.supervised[1:].sum()) for example in DATA)
    if dtype == torch.float32:
        start.save_pretrained(folder)
        judge = transformers.GPT2LMHeadModel.from_pretrained(folder)
        for example in DATA:
            inputs, targets = collate([example])
            nll = F.cross_entropy(judge(inputs).logits[0], targets[0], ignore_index=-100, reduction="sum")
            (nll / count).backward()
        master = judge
    else:
        scale = 65536.0 if dtype == torch.float16 else 1.0
        half, master = copy.deepcopy(start).to(dtype), copy.deepcopy(start)
        for parameter in master.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for example in DATA:
            half.zero_grad()
            (half(*collate([example]))[0] / count * scale).backward()
            for parameter, rounded in zip(master.parameters(), half.parameters()):
                parameter.grad += rounded.grad.float() / scale
    norm = torch.nn.utils.clip_grad_norm_(master.parameters(), 1.0).item()
    torch.optim.AdamW(parameter_groups(master, TrainConfig()), lr=1e-3, betas=(0.9, 0.95), eps=EPSILON).step()
    master.save_pretrained(folder)
    return vector(GPT.from_pretrained(folder).state_dict()) - vector(start.state_dict()), norm


@pytest.fixture(scope="module")
def plain_updates(tmp_path_factory):
    dtypes = {"": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return {name: plain_update(dtype, tmp_path_factory.mktemp("plain")) for name, dtype in dtypes.items()}


def first_update(kind, file):
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    engine, _ = engine_of(kind, tiny_model(), adam_epsilon=EPSILON, **settings, file=file)
    info = step(engine, micro_batch_size=1)[1]
    weights = engine.full_state_dict()
    return (vector(weights) - vector(tiny_model().state_dict()), info.grad_norm) if is_main() else None


EVERY_UPDATE = list(itertools.product([*KINDS, "zero0 bf16", *HALF[1:]], (1, 2)))


@pytest.mark.parametrize(("kind", "ranks"), few(EVERY_UPDATE, EVERY_UPDATE[1::2]))
def test_the_first_update_is_plain_adamw(plain_updates, kind, ranks):
    """DeepSpeed's stage 0 divides by a loss scale that it never multiplied by, and takes a step at construction."""
    # Between ranks DeepSpeed rounds half-precision gradients once more, which a plain loop does not.
    file = {"communication_data_type": "fp32"}
    found, norm = on_ranks(ranks, first_update, kind, file)[0]
    dtype = kind.partition(" ")[2]

    assert error(found, plain_updates[dtype][0]) < 1e-3
    assert norm == pytest.approx(plain_updates[dtype][1], rel=1e-3)
    assert error(found, plain_updates[""][0]) < {"": 1e-3, "bf16": 0.05, "fp16": 0.01}[dtype]


# ---- the weights, whole


def trained_logits(kind, folder):
    engine, _ = engine_of(kind, tiny_model(), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for _ in range(2):
        step(engine)
    weights = engine.full_state_dict()
    if is_main():
        engine.module.save_pretrained(folder, weights)
    engine.module.eval()
    forward = engine.module if kind == "torch" else engine.engine
    with torch.no_grad():
        return forward(IDS), sorted(weights)


IDS = torch.arange(120).view(2, 60) % 61


EVERY_EXPORT = list(itertools.product(KINDS, (2, 3)))


@pytest.mark.parametrize(("kind", "ranks"), few(EVERY_EXPORT, [*EVERY_EXPORT[::2], ("zero3", 3)]))
def test_transformers_opens_the_weights_of_every_engine(kind, ranks, tmp_path):
    """The tied head was lost (DeepSpeed issue 1896), and stage 3 gave weights of no elements."""
    (logits, names), *others = on_ranks(ranks, trained_logits, kind, tmp_path)
    assert names == sorted(tiny_model().state_dict())
    assert [names for _, names in others] == [[]] * (ranks - 1) or kind == "torch"
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (judge(IDS).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert error(logits, tiny_model().eval()(IDS)) > 0.01
    assert torch.equal(judge.lm_head.weight, judge.transformer.wte.weight)


# ---- every example, once


def rows_seen(kind, sizes):
    """For each size of the data: which examples this rank's engine saw in two epochs, and in how many forwards."""
    seen = []
    for size in sizes:
        data = [Example(np.array([i, *DATA[i % 7].ids[: 3 + i]]), np.arange(4 + i) > 0) for i in range(size)]
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        engine, config = engine_of(kind, tiny_model(), num_train_epochs=2, **settings)
        rows, forwards = [], []

        def look(module, args, rows=rows, forwards=forwards):
            idx, targets = args
            rows.extend(idx[(targets != -100).any(1), 0].tolist())
            forwards.append(1)

        engine.module.register_forward_pre_hook(look)
        train(config, engine, data)
        seen.append((rows, len(forwards)))
    return seen


EVERY_WORLD = list(itertools.product((1, 2, 3, 4), ("torch", "zero2", "zero3")))


@pytest.mark.parametrize(("ranks", "kind"), few(EVERY_WORLD, EVERY_WORLD[::3]))
def test_each_example_once_an_epoch_on_any_number_of_ranks(ranks, kind):
    """DistributedSampler repeats rows, and ranks with unequal numbers of micro-batches wait for each other for ever."""
    sizes = range(1, 10)
    by_rank = on_ranks(ranks, rows_seen, kind, sizes)
    for size, *seen in zip(sizes, *by_rank):
        assert sorted(row for rows, _ in seen for row in rows) == sorted([*range(size), *range(size)])
        assert len({forwards for _, forwards in seen}) == 1


# ---- the rest


def validation_loss(kind):
    return evaluate(engine_of(kind, tiny_model())[0], DATA, 2)


@pytest.mark.parametrize(("ranks", "kind"), [(2, "torch"), (3, "torch"), (2, "zero3"), (3, "zero1")])
def test_the_validation_loss_is_that_of_one_rank(ranks, kind):
    expected = validation_loss("torch")
    assert on_ranks(ranks, validation_loss, kind) == [pytest.approx(expected, rel=1e-6)] * ranks


def open_and_close():
    losses = []
    for kind in [*KINDS, "zero1 bf16", "zero3"]:
        engine, _ = engine_of(kind, tiny_model())
        losses.append(step(engine)[0])
        engine.close()
        assert not distributed.is_initialized()
    return losses


def test_a_closed_engine_makes_way_for_another():
    losses = on_ranks(1, open_and_close)[0]
    assert losses == [pytest.approx(losses[0], rel=1e-2)] * 7


def close_on_ranks(kind):
    engine, _ = engine_of(kind, tiny_model())
    step(engine)
    before = distributed.is_initialized()
    engine.close()
    return before, distributed.is_initialized()


@pytest.mark.parametrize("kind", ["torch", "zero3"])
def test_a_closed_engine_has_left_the_other_ranks(kind):
    assert on_ranks(2, close_on_ranks, kind) == [(True, False)] * 2


OFFLOADS = [("zero2", ["optimizer"]), ("zero3", ["optimizer", "param"]), ("zero3 bf16", ["optimizer", "param"])]


@pytest.mark.parametrize(("kind", "offloads"), OFFLOADS)
def test_offloaded_to_the_cpu_the_update_is_the_same(plain_updates, kind, offloads):
    zero = {f"offload_{what}": {"device": "cpu"} for what in offloads}
    file = {"communication_data_type": "fp32", "zero_optimization": zero}
    found, _ = on_ranks(2, first_update, kind, file)[0]
    assert error(found, plain_updates[kind.partition(" ")[2]][0]) < 1e-3


def test_plain_python_needs_no_launcher(tmp_path):
    """DeepSpeed asks for LOCAL_RANK, which only a launcher sets."""

    def alone() -> bool:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
        engine = make_engine(tiny_model(), TrainConfig(deepspeed=str(tmp_path / "zero2.json")))
        skipped = step(engine)[1].skipped
        engine.close()
        return skipped

    assert on_ranks(1, alone) == [False]
