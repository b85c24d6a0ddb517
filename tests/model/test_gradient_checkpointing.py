"""Activations computed again in backward: the same numbers for less memory, and nowhere but in training."""

import pytest
import torch
from torch import Tensor

from minigpt.model.cache import KVCache
from minigpt.model.gpt2 import GPT, GPTConfig

B, T, C = 2, 20, 64
IDX, TARGETS = torch.randint(0, 331, (2, B, T), generator=torch.Generator().manual_seed(0))


def make_model(n_layer: int = 3, dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = GPT(GPTConfig(vocab_size=331, n_positions=48, n_embd=C, n_layer=n_layer, n_head=4, **rates))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def count_runs(model: GPT) -> list[int]:
    """Grows by a block's number whenever that block runs."""
    runs: list[int] = []
    for layer, block in enumerate(model.h):
        block.register_forward_pre_hook(lambda module, args, layer=layer: runs.append(layer))
    return runs


def loss_and_gradients(model: GPT, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        nll_sum, _ = model(IDX, TARGETS)
    nll_sum.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return nll_sum, gradients


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_bits(dropout, bf16):
    model = make_model(dropout=dropout)
    runs = count_runs(model)
    loss, gradients = loss_and_gradients(model, bf16)
    following = torch.rand(3)  # the generator too goes on as if nothing had been computed twice
    assert runs == [0, 1, 2]
    model.gradient_checkpointing = True
    runs.clear()
    loss_again, gradients_again = loss_and_gradients(model, bf16)
    assert torch.equal(following, torch.rand(3))
    assert runs == [0, 1, 2, 2, 1, 0]
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    model.gradient_checkpointing = False
    runs.clear()
    loss_and_gradients(model, bf16)
    assert runs == [0, 1, 2]


def saved_bytes(model: GPT) -> int:
    """What forward keeps for backward, weights and repeated tensors counted once."""
    saved: dict[int, int] = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}
    kept = []  # alive, or the next tensor may take its address

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        saved.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(IDX, TARGETS)
    return sum(saved.values())


def test_a_layer_keeps_its_input_and_nothing_else():
    plain = [saved_bytes(make_model(n_layer)) for n_layer in (1, 2, 5)]
    models = [make_model(n_layer) for n_layer in (1, 2, 5)]
    for model in models:
        model.gradient_checkpointing = True
    checkpointed = [saved_bytes(model) for model in models]
    x = B * T * C * 4  # bytes of the residual stream
    assert [checkpointed[1] - checkpointed[0], checkpointed[2] - checkpointed[0]] == [x, 4 * x]
    assert plain[2] - plain[0] == 4 * (plain[1] - plain[0])
    assert plain[1] - plain[0] > 14 * x  # two norms' inputs and outputs, q, k, v, attention, the MLP's 4 wide twice


@pytest.mark.parametrize("cached", [True, False])
def test_nothing_is_computed_twice_with_a_cache_or_in_eval_mode(cached):
    model = make_model(n_layer=1).train(cached)
    model.gradient_checkpointing = True
    runs = count_runs(model)
    model(IDX, TARGETS, cache=KVCache(model.config, B, T) if cached else None)[0].backward()
    assert runs == [0]
