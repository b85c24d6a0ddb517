"""The optimizer's groups and the learning rate."""

import subprocess
import sys

import pytest
import torch

from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.settings.groups import TrainConfig
from minigpt.training.optim import AdamW, learning_rate, make_optimizer


def rates(total, **settings):
    config = TrainConfig(learning_rate=2.0, **settings)
    return [learning_rate(step, total, config) for step in range(total)]


def test_the_worked_example():
    assert [round(rate, 3) for rate in rates(6, warmup_steps=2)] == [1.0, 2.0, 2.0, 1.707, 1.0, 0.293]


def test_linear_and_constant_and_a_floor():
    assert rates(4, lr_scheduler_type="linear") == [2.0, 1.5, 1.0, 0.5]
    assert rates(4, lr_scheduler_type="linear", min_lr_ratio=0.5) == [2.0, 1.75, 1.5, 1.25]
    assert rates(3, lr_scheduler_type="constant", warmup_steps=2) == [1.0, 2.0, 2.0]
    config = TrainConfig(learning_rate=2.0, min_lr_ratio=0.1)
    assert learning_rate(10, 10, config) == pytest.approx(0.2)
    assert learning_rate(99, 10, config) == pytest.approx(0.2)  # past the end it stays there


def test_cosine_equals_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step, rate in enumerate(rates(20)):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        schedule.step()


def test_warmup_longer_than_the_run_only_climbs():
    assert rates(3, warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6])


def test_decay_falls_on_matrices_alone():
    model = GPT(GPTConfig(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    decayed, free = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in free["params"]} == {n for n in names.values() if n.endswith("bias") or "ln" in n}
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_fused_adamw_equals_the_plain_one_on_weights_as_they_are_loaded(tmp_path):
    """A loaded matrix is a transposed view of the file: the fused kernel must read its strides right."""
    torch.manual_seed(0)
    GPT(GPTConfig(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    config = TrainConfig(learning_rate=1e-2)
    model, plain = GPT.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path)
    assert not model.h[0].attn.c_attn.weight.is_contiguous()
    fused = make_optimizer(model, config)
    assert fused.defaults["fused"]
    matrices, vectors = ([p for p in plain.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False))
    judge = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    for _ in range(5):
        idx = torch.randint(0, 50, (2, 8))
        for network, optimizer in ((model, fused), (plain, judge)):
            nll_sum, n_tokens = network(idx[:, :-1], idx[:, 1:])
            (nll_sum / n_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, weight), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name.endswith("c_attn.bias"):  # the key third's gradient is zero in exact arithmetic, and noise in ours
            weight, wanted = weight.view(3, -1)[[0, 2]], wanted.view(3, -1)[[0, 2]]
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-6, msg=name)


def test_our_class_equals_torchs_to_the_last_bit():
    config, results = TrainConfig(learning_rate=1e-2), []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2))
        optimizer = make_optimizer(model, config, kind)
        for _ in range(3):
            idx = torch.randint(0, 50, (2, 8))
            model(idx[:, :-1], idx[:, 1:])[0].backward()
            optimizer.step()
            model.zero_grad()
        results.append((model.state_dict(), optimizer.state_dict()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_training_in_one_process_does_not_import_the_compiler():
    """Which took 2.4 of the 13 s that ten steps of a tiny model took, nor a library that only some runs need."""
    code = """if True:
        import sys
        from minigpt import GPT, GPTConfig, TrainConfig, make_engine, train
        model = GPT(GPTConfig(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2))
        config = TrainConfig(max_steps=2, per_device_train_batch_size=1)
        train(config, make_engine(model, config), [[1, 2, 3], [4, 5]])
        names = {name.partition(".")[0] for name in sys.modules} | sys.modules.keys()
        print(sorted(names & {"torch._dynamo", "deepspeed", "transformers", "sentence_transformers", "matplotlib"}))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
