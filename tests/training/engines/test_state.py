"""What one engine saves, another goes on from: the same engine to the last bit, any other to the same numbers."""

import itertools
import json
import math

import pytest
import torch

from minigpt.training.engines.state import ENGINE, OPTIMIZER, read_state

from ...ranks import engine_of, few, on_ranks
from ..test_loop import examples, tiny_model
from .test_engines import error, step, vector

DATA = examples(40)
WINDOW = 8

SAME = [
    *[(1, "torch"), (2, "torch"), (1, "zero2"), (2, "zero0"), (2, "zero1"), (2, "zero2"), (2, "zero3"), (3, "zero3")],
    *[(2, "torch bf16"), (2, "zero1 bf16"), (2, "zero2 bf16"), (2, "zero3 bf16")],
    *[(1, "zero1 fp16"), (2, "zero2 fp16"), (2, "zero3 fp16")],
]
QUICK = [(1, "torch"), (2, "torch"), (2, "zero1"), (2, "zero2"), (2, "zero3"), (2, "zero1 bf16"), (1, "zero1 fp16")]
OTHERS = [(1, "torch"), (2, "torch"), (2, "zero0"), (2, "zero1"), (2, "zero2"), (2, "zero3"), (3, "zero3")]
HALF = [
    (2, "zero1 bf16"),
    (2, "zero2 bf16"),
    (3, "zero3 bf16"),
    (2, "zero1 fp16"),
    (3, "zero2 fp16"),
    (2, "zero3 fp16"),
]
TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}


def new_engine(kind, **settings):
    return engine_of(kind, tiny_model(), per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)[0]


def steps(engine, first, last):
    """The losses of some steps, each on its own window."""
    return [step(engine, DATA[(i - 1) * WINDOW : i * WINDOW])[0] for i in range(first, last + 1)]


def saved(engine, folder):
    """Every rank calls; as a checkpoint does, which makes the folder first."""
    folder.mkdir(exist_ok=True)
    engine.save(folder)


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", OPTIMIZER, ENGINE)}


def train_and_save(kind, folder, settings=None):
    """Three steps, a checkpoint, two more steps, another one."""
    engine = new_engine(kind, **(settings or {}))
    steps(engine, 1, 3)
    saved(engine, folder / "3")
    losses = steps(engine, 4, 5)
    saved(engine, folder / "5")
    return losses


def load_and_train(kind, source, folder, settings=None):
    """Goes on from a checkpoint, which it saves at once again: the losses of the two steps that follow."""
    engine = new_engine(kind, **(settings or {}))
    engine.load(source)
    saved(engine, folder / "3")
    losses = steps(engine, 4, 5)
    saved(engine, folder / "5")
    return losses


# ---- the same engine


@pytest.mark.parametrize(("ranks", "kind"), few(SAME, QUICK))
def test_the_same_engine_goes_on_to_the_last_bit(ranks, kind, tmp_path):
    (tmp_path / "again").mkdir()
    losses = on_ranks(ranks, train_and_save, kind, tmp_path)
    assert on_ranks(ranks, load_and_train, kind, tmp_path / "3", tmp_path / "again") == losses
    for at in ("3", "5"):
        assert files(tmp_path / "again" / at) == files(tmp_path / at)
    assert json.loads((tmp_path / "5" / ENGINE).read_text())["adam_steps"] == 5


@pytest.mark.parametrize(
    ("ranks", "kind"), few([(2, "zero0"), (2, "zero1"), (2, "zero2 bf16"), (2, "zero3")], [(2, "zero2 bf16")])
)
def test_the_optimizer_of_a_deepspeed_file_goes_on_too(ranks, kind, tmp_path):
    settings = {"file": TORCH_ADAM}
    (tmp_path / "again").mkdir()
    losses = on_ranks(ranks, train_and_save, kind, tmp_path, settings)
    assert on_ranks(ranks, load_and_train, kind, tmp_path / "3", tmp_path / "again", settings) == losses
    assert files(tmp_path / "again" / "5") == files(tmp_path / "5")


def load_with_other_settings(kind, source):
    """The weights after a step with other settings than before; whose norm, clipped, is what the moments show."""
    settings = {"adam_beta1": 0.0, "weight_decay": 0.3, "adam_epsilon": 1e-6, "max_grad_norm": 0.25}
    engine = new_engine(kind, **settings)
    engine.load(source)
    info = step(engine, DATA[:WINDOW])[1]
    groups = [{key: group[key] for key in ("betas", "eps", "weight_decay")} for group in engine.optimizer.param_groups]
    saved(engine, source.parent / "other")
    return groups, info.grad_norm


@pytest.mark.parametrize(
    "kind",
    few(["torch", "zero0", "zero1", "zero2", "zero3", "zero1 bf16", "zero2 fp16"], ["zero1", "zero3", "zero1 bf16"]),
)
def test_the_settings_are_those_of_now(kind, tmp_path):
    """DeepSpeed takes the betas, the decay and the clipping from the checkpoint."""
    on_ranks(2, train_and_save, kind, tmp_path)
    for groups, norm in on_ranks(2, load_with_other_settings, kind, tmp_path / "3"):
        assert groups == [{"betas": (0.0, 0.95), "eps": 1e-6, "weight_decay": decay} for decay in (0.3, 0.0)]
        assert norm > 1.2
    # With beta1 = 0 the first moment is the gradient, as it was clipped.
    first_moment = vector(read_state(tmp_path / "other", tiny_model()).moments["exp_avg"])
    assert first_moment.norm().item() == pytest.approx(0.25, rel=1e-2)


# ---- another engine


def check_exchange(source, target, folder):
    """What `target` loads of `source` it saves again as it was, and it goes on with the same numbers."""
    (ranks, kind), (other_ranks, other_kind) = source, target
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    losses = on_ranks(ranks, train_and_save, kind, folder / "a")[0]
    found = on_ranks(other_ranks, load_and_train, other_kind, folder / "a" / "3", folder / "b")[0]
    before, after = ({**files(folder / name / "3")} for name in "ab")
    assert before.pop(ENGINE) != after.pop(ENGINE)
    assert before == after
    states = [read_state(folder / name / "5", tiny_model()) for name in "ab"]
    assert [state.facts["adam_steps"] for state in states] == [5, 5]
    exact = " " not in kind + other_kind
    assert found == [pytest.approx(loss, rel=1e-5 if exact else 1e-2) for loss in losses]
    assert error(vector(states[1].weights), vector(states[0].weights)) < (1e-5 if exact else 1e-3)
    for moment, tolerance in (("exp_avg", 1e-4), ("exp_avg_sq", 1e-4)):
        a, b = (vector(state.moments[moment]) for state in states)
        assert error(b, a) < (tolerance if exact else 0.1)


CHAIN = [*OTHERS, OTHERS[0]]


@pytest.mark.parametrize(("source", "target"), [*itertools.pairwise(CHAIN), ((3, "zero3"), (2, "zero1"))])
def test_another_engine_goes_on_with_the_same_numbers(source, target, tmp_path):
    check_exchange(source, target, tmp_path)


@pytest.mark.parametrize(
    ("source", "target"), [(OTHERS[0], HALF[0]), (HALF[0], HALF[4]), (HALF[4], HALF[2]), (HALF[2], OTHERS[1])]
)
def test_half_precision_takes_up_the_fp32_state(source, target, tmp_path):
    """The master weights and the moments: exactly; what follows differs by half precision's rounding."""
    check_exchange(source, target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations([*OTHERS, *HALF], 2)))
def test_every_engine_goes_on_from_every_other(source, target, tmp_path):
    check_exchange(source, target, tmp_path)


def untrained(kind, folder):
    engine = new_engine(kind)
    saved(engine, folder)


def load_untrained(kind, source):
    engine = new_engine(kind)
    engine.load(source)
    return steps(engine, 1, 2)


@pytest.mark.parametrize(("kind", "other"), [("torch", "zero1"), ("zero3", "torch"), ("zero2", "zero2")])
def test_a_state_before_the_first_step_has_no_moments(kind, other, tmp_path):
    on_ranks(2, untrained, kind, tmp_path / "0")
    assert read_state(tmp_path / "0", tiny_model()).moments == {}
    losses = on_ranks(2, load_untrained, other, tmp_path / "0")
    assert losses[0] == [pytest.approx(loss, rel=1e-5) for loss in steps(new_engine("torch"), 1, 2)]


def skipped_and_saved(kind, folder):
    engine = new_engine(kind)
    for factor in (1.0, math.inf, math.inf, math.inf):
        step(engine, DATA[:WINDOW], factor=factor)
    saved(engine, folder)


def scale_after_loading(kind, folder):
    engine = new_engine(kind)
    engine.load(folder)
    return step(engine, DATA[:WINDOW])[1].loss_scale


@pytest.mark.parametrize("kind", ["zero2 fp16", "zero3 fp16"])
def test_the_loss_scale_comes_along(kind, tmp_path):
    on_ranks(2, skipped_and_saved, "zero2 fp16", tmp_path / "a")
    assert on_ranks(2, scale_after_loading, kind, tmp_path / "a") == [65536 / 4] * 2


def test_the_state_of_another_model_is_refused(tmp_path):
    engine = new_engine("torch")
    saved(engine, tmp_path)
    other = tiny_model()
    other.config.n_layer = 3
    with pytest.raises(ValueError, match="of a model with n_layer 2, and this one has 3"):
        read_state(tmp_path, other)


def test_the_files_hold_whole_named_tensors(tmp_path):
    engine = new_engine("torch")
    steps(engine, 1, 1)
    saved(engine, tmp_path)
    state = read_state(tmp_path, engine.module)
    assert state.facts == {"engine": "torch", "world_size": 1, "adam_steps": 1}
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(state.weights[name], parameter)
        assert torch.equal(state.moments["exp_avg"][name], engine.optimizer.state[parameter]["exp_avg"])
