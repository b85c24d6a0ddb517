"""What an engine promises the loop."""

import pytest
import torch

from minigpt import TrainConfig, make_engine
from minigpt.data.collate import Batch
from minigpt.model.gpt2 import GPT, GPTConfig


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT(GPTConfig(**shape, initializer_range=0.2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def batch(seed: int) -> Batch:
    idx = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(idx[:, :-1], idx[:, 1:])


def test_gradients_are_summed_until_the_step(model):
    engine = make_engine(model, TrainConfig())
    for seed in (1, 2):
        engine.backward(engine(batch(seed)).sum, last=seed == 2)
    summed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    both = [model(*batch(seed))[0] for seed in (1, 2)]
    sum(both).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(summed[name], parameter.grad)


def test_a_step_clips_applies_and_clears(model):
    engine = make_engine(model, TrainConfig(max_grad_norm=0.5))
    engine.backward(engine(batch(1)).sum, last=True)
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    seen = {}
    step = engine.optimizer.step
    engine.optimizer.step = lambda: seen.update(grads=[p.grad.clone() for p in model.parameters()]) or step()
    info = engine.step(lr=0.125)
    assert info.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert (info.skipped, info.loss_scale) == (False, 1.0)
    assert torch.cat([g.flatten() for g in seen["grads"]]).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert {group["lr"] for group in engine.optimizer.param_groups} == {0.125}
    assert all(parameter.grad is None for parameter in model.parameters())
