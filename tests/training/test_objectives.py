"""What a step minimises: next-token prediction, and an objective that the loop has never heard of."""

import doctest
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minigpt import Example, TrainConfig, collate, make_engine, train
from minigpt.data.order import epoch_global_batches, shard
from minigpt.distributed import is_main, rank, world_size
from minigpt.training import objectives as module
from minigpt.training.loop import evaluate
from minigpt.training.objectives import PAD_ID, Loss, NextToken
from minigpt.training.optim import learning_rate, parameter_groups

from ..ranks import engine_of, on_ranks
from .test_loop import examples, tiny_model, weights


def test_the_docstrings_are_right():
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0


# ---- next-token prediction


def test_next_token_is_plain_cross_entropy():
    model, data = tiny_model().double(), examples(5)
    objective = NextToken()
    batch = objective.collate(data)
    loss = objective(model, batch)
    logits = model(batch.inputs)  # (B,T) -> (B,T,V)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum")
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-6)  # the sum is in fp32
    assert loss.extras == {}
    assert objective.weight(batch) == sum(int(example.supervised[1:].sum()) for example in data)
    gradients = torch.autograd.grad(loss.sum, list(model.parameters()))
    for gradient, judge in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, judge, rtol=1e-7, atol=1e-10)


def test_the_filler_runs_the_whole_forward_and_weighs_nothing():
    """A rank without data must not leave DDP and ZeRO-3 waiting for its part of a gradient."""
    objective, model = NextToken(), tiny_model()
    filler = objective.collate([])
    assert type(filler) is type(objective.collate(examples(2)))
    assert objective.weight(filler) == 0
    loss = objective(model, filler).sum
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_loop_makes_the_steps_of_a_loop_written_by_hand():
    """To the last bit: three steps, of three micro-batches and less."""
    data = examples(20)
    config = TrainConfig(
        learning_rate=1e-3, max_steps=3, per_device_train_batch_size=3, gradient_accumulation_steps=3, warmup_steps=2
    )
    trained = tiny_model()
    train(config, make_engine(trained, config), data)

    model = tiny_model().train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.95), eps=1e-8, fused=True)
    lengths = np.array([len(example) for example in data])
    for step, indices in enumerate(epoch_global_batches(lengths, 9, config.seed, 0)):
        batches = [collate([data[i] for i in indices[part]], PAD_ID) for part in shard(lengths[indices], 3)]
        n_tokens = sum(int((batch.targets != -100).sum()) for batch in batches)
        for inputs, targets in batches:
            nll_sum, _ = model(inputs, targets)
            (nll_sum / n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 3, config)
        optimizer.step()
        optimizer.zero_grad()
    for (name, expected), found in zip(model.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(found, expected), name


# ---- an objective of our own: of two answers the first shall be the likelier one


BETA = 0.02  # the answers' log-likelihoods differ by a hundred nats


@dataclass
class Pair:
    better: Example
    worse: Example

    def __len__(self) -> int:
        return len(self.better) + len(self.worse)


class Rows(NamedTuple):
    """The better ones of B pairs, then the worse ones."""

    ids: Tensor  # (2B,T)
    next_ids: Tensor  # (2B,T)
    real: Tensor  # (2B,): 0 in a filler, whose ids are those of some pair


@dataclass(frozen=True)
class Ranking:
    """Its batch, its denominator and its extras are not those of next-token prediction."""

    calls: int = 1
    """Of the model for each batch: all rows at once, or one call for each half."""

    def collate(self, items):
        rows = [pair.better for pair in items] + [pair.worse for pair in items]
        inputs, targets = collate(rows or [[1, 2], [3, 4]], PAD_ID)
        return Rows(inputs, targets, torch.ones(len(rows)) if rows else torch.zeros(2))

    def weight(self, batch):
        return int(batch.real.sum()) // 2

    def __call__(self, model, batch):
        parts = zip(batch.ids.chunk(self.calls), batch.next_ids.chunk(self.calls))
        log_p = torch.cat([self._log_p(model, ids, next_ids) for ids, next_ids in parts])
        better, worse = log_p.chunk(2)  # (2B,) -> 2 x (B,)
        real = batch.real.chunk(2)[0]
        return Loss((F.softplus(BETA * (worse - better)) * real).sum(), {"margin": ((better - worse) * real).sum()})

    def _log_p(self, model, ids, next_ids):
        logits = model(ids).float()  # (B,T) -> (B,T,V)
        return -F.cross_entropy(logits.transpose(1, 2), next_ids, ignore_index=-100, reduction="none").sum(1)


PAIRS = [Pair(*two) for two in zip(examples(9, seed=1), examples(9, seed=2))]
SETTINGS = {"learning_rate": 1e-3, "num_train_epochs": 3}


def train_to_rank(kind, objective, size, output_dir=None):
    """The weights after training, on rank 0."""
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size // world_size() or 1}
    engine, config = engine_of(kind, tiny_model(), **settings, **SETTINGS, output_dir=output_dir)
    result = train(config, engine, PAIRS, PAIRS[:3] if output_dir else None, objective=objective)
    assert (result.steps, result.supervised_tokens) == (9, 27)
    full = engine.full_state_dict()
    final = tiny_model()
    if is_main():
        final.load_state_dict({name: tensor.detach().clone() for name, tensor in full.items()})
    return weights(final) if rank() == 0 else None


@pytest.fixture(scope="module")
def by_hand():
    """Nine steps on whole global batches of 4, 4 and 1 pairs, in plain PyTorch."""
    model, config = tiny_model().train(), TrainConfig(**SETTINGS)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.95), eps=1e-8)
    lengths = np.array([len(pair) for pair in PAIRS])
    for step in range(9):
        pairs = [PAIRS[i] for i in epoch_global_batches(lengths, 4, config.seed, step // 3)[step % 3]]
        loss = 0.0
        for pair in pairs:
            nll = [model(*collate([row], PAD_ID))[0] for row in (pair.better, pair.worse)]
            loss = loss + F.softplus(BETA * (nll[0] - nll[1]))
        (loss / len(pairs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 9, config)
        optimizer.step()
        optimizer.zero_grad()
    assert ((weights(model) - weights(tiny_model())).norm()).item() > 0.1
    return weights(model)


WAYS = [(1, "torch", 4, 1), (1, "torch", 1, 2), (2, "torch", 1, 2), (2, "zero2", 1, 1), (2, "zero3", 1, 1)]


@pytest.mark.parametrize(("ranks", "kind", "size", "calls"), WAYS)
def test_the_loop_trains_an_objective_that_it_does_not_know(by_hand, ranks, kind, size, calls):
    """On two ranks one of them has a filler in the last step of each epoch, which sees a single pair."""
    found = on_ranks(ranks, train_to_rank, kind, Ranking(calls), size)[0]
    assert ((found - by_hand).norm() / by_hand.norm()).item() < 1e-5


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_two_forwards_before_one_backward_through_deepspeed(by_hand, kind):
    found = on_ranks(1, train_to_rank, kind, Ranking(calls=2), 4)[0]
    assert ((found - by_hand).norm() / by_hand.norm()).item() < 1e-5


def test_its_extras_are_in_the_metrics(tmp_path):
    train_to_rank("torch", Ranking(), 2, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    model, first = tiny_model(), epoch_global_batches([len(pair) for pair in PAIRS], 4, 42, 0)[0]
    nll = [[model(*collate([row], PAD_ID))[0].item() for row in (PAIRS[i].better, PAIRS[i].worse)] for i in first]
    assert lines[0]["margin"] == pytest.approx(sum(worse - better for better, worse in nll) / 4, rel=1e-4)
    assert all(math.isfinite(line["margin"]) for line in lines)
    assert lines[-1]["val_loss"] < lines[0]["val_loss_before"]


def test_the_engines_own_objective_is_the_default():
    engine = make_engine(tiny_model(), TrainConfig(**SETTINGS), objective=Ranking())
    model, before = engine.module, evaluate(engine, PAIRS, 4)
    batch = Ranking().collate(PAIRS)
    assert before == pytest.approx(Ranking()(model, batch).sum.item() / len(PAIRS), rel=1e-5)
    assert train(TrainConfig(**SETTINGS), engine, PAIRS).train_loss < before
    assert make_engine(tiny_model(), TrainConfig()).objective == NextToken()
    assert math.isfinite(before)
