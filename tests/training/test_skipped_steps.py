"""Gradients that are no numbers: every rank skips the step, the schedule waits, and many in a row end the run."""

import math

import pytest
import torch

from minigpt import train
from minigpt.distributed import is_main

from ..ranks import engine_of, few, on_ranks
from .engines.test_engines import DATA, HALF, KINDS, step
from .test_loop import tiny_model


def copied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def broken_steps(kind):
    """Three of six steps get a gradient that is no number, on rank 0 alone; what each step did."""
    engine, _ = engine_of(kind, tiny_model(), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    did = []
    before = copied(engine.full_state_dict())
    for factor in (1.0, math.inf, math.nan, 1.0, math.inf, 1.0):
        loss, info = step(engine, factor=factor)
        after = copied(engine.full_state_dict())
        moved = any(not torch.equal(after[name], before[name]) for name in after) if is_main() else info.skipped ^ True
        finite = all(tensor.isfinite().all() for tensor in after.values())
        did.append((math.isfinite(info.grad_norm), info.skipped, moved, finite, math.isfinite(loss), info.loss_scale))
        before = after
    return did


@pytest.mark.parametrize("kind", few([*KINDS, *HALF], [*KINDS, "torch bf16", "zero1 bf16", "zero2 bf16", "zero1 fp16"]))
def test_gradients_that_are_no_numbers_leave_the_weights_as_they_were(kind):
    applied, skipped = (True, False, True, True, True), (False, True, False, True, True)
    scales = [65536, 65536, 65536, 32768, 32768, 16384] if "fp16" in kind else [1] * 6  # patient once, then halved
    for did in on_ranks(2, broken_steps, kind):
        assert [step[:-1] for step in did] == [applied, skipped, skipped, applied, skipped, applied]
        assert [step[-1] for step in did] == scales


# ---- fp16 in the loop


def run_in_fp16(broken, steps, power=16):
    """The learning rates and the number of skips of a run in which the gradients of some steps are not finite."""
    settings = {"max_steps": steps, "warmup_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    engine, config = engine_of("zero1 fp16", tiny_model(), **settings, file={"fp16": {"initial_scale_power": power}})
    rates = []
    backward, plain_step = engine.backward, engine.step
    engine.backward = lambda loss, last: backward(loss * (math.inf if len(rates) + 1 in broken else 1.0), last)
    engine.step = lambda lr: (rates.append(lr), plain_step(lr))[1]
    result = train(config, engine, DATA)
    return rates, result.skipped_steps


def test_a_skipped_step_moves_the_schedule_by_one():
    """The scheduler stepped on, and the rate of the first applied step was that of the second."""
    plain, skipped = on_ranks(2, run_in_fp16, (), 8)[0]
    assert skipped == 0
    rates, skipped = on_ranks(2, run_in_fp16, (1, 4), 8)[0]
    assert skipped == 2
    assert rates == [plain[0], *plain[:3], *plain[2:6]]


@pytest.mark.parametrize(
    ("power", "message"),
    [
        (16, "step 25: the gradient norm is inf, 25 times in a row, at loss scale 1 "),  # down from 65536, and no more
        (32, "step 25: the gradient norm is inf, 25 times in a row, at loss scale 512"),
    ],
)
def test_many_skips_in_a_row_stop_with_the_cause(power, message):
    """DeepSpeed went on for ever, or ended at "loss scale already at minimum"."""
    with pytest.raises(AssertionError) as caught:
        on_ranks(1, run_in_fp16, range(1, 100), 40, power)
    assert f"FloatingPointError: {message}" in str(caught.value)
