"""The loop: the exact token mean, the order, evaluation, what it writes, how it fails."""

import json
import math

import numpy as np
import pytest
import torch

from minigpt import Example, TrainConfig, collate, make_engine, train
from minigpt.data.order import epoch_global_batches
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.training.loop import evaluate

VOCABULARY = 61


def tiny_model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT(GPTConfig(**shape, initializer_range=0.2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def examples(count: int, seed: int = 0) -> list[Example]:
    """Very unequal lengths, and very unequal shares of supervised tokens."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(random.integers(3, 60))
        start = int(random.integers(1, length - 1))
        rows.append(Example(random.integers(0, VOCABULARY, length), np.arange(length) >= start))
    return rows


def run(data, model=None, eval_data=None, **settings):
    config = TrainConfig(**{"learning_rate": 1e-3, "num_train_epochs": 1, **settings})
    engine = make_engine(model or tiny_model(), config)
    return train(config, engine, data, eval_data), engine.module


def weights(model) -> torch.Tensor:
    """All parameters but the key third of c_attn.bias, whose gradient is zero in exact arithmetic."""
    parts = []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        if name.endswith("c_attn.bias"):
            flat = torch.cat([flat[:32], flat[64:]])
        parts.append(flat)
    return torch.cat(parts)


def test_a_global_batch_cut_in_any_way_is_the_same_step():
    """A mean of means weighs a short answer like a long one (transformers pull request 34191)."""
    data = examples(48)
    results = [
        run(data, per_device_train_batch_size=size, gradient_accumulation_steps=steps)[1]
        for size, steps in ((12, 1), (4, 3), (3, 4), (1, 12))
    ]
    whole = weights(results[0])
    start = weights(tiny_model())
    assert (whole - start).norm() > 0.1
    for other in results[1:]:
        assert ((weights(other) - whole).norm() / whole.norm()).item() < 1e-6


def test_the_gradient_is_the_token_mean_in_float64():
    data = examples(8)
    model = tiny_model().double()
    config = TrainConfig(per_device_train_batch_size=3, gradient_accumulation_steps=3, max_grad_norm=math.inf)
    engine = make_engine(model, config)
    seen = {}
    step = engine.step
    engine.step = lambda lr: (seen.update({n: p.grad.clone() for n, p in model.named_parameters()}), step(lr))[1]
    train(config, engine, data)
    judge = tiny_model().double()
    nll, count = 0.0, 0
    for example in data:
        batch = collate([example])
        log_p = judge(batch.inputs).log_softmax(-1)
        keep = batch.targets != -100
        nll = nll - log_p[keep].gather(1, batch.targets[keep][:, None]).sum()
        count += int(keep.sum())
    (nll / count).backward()
    for name, parameter in judge.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_each_example_once_an_epoch_and_the_short_global_batch_is_stepped(monkeypatch):
    data = examples(11)
    seen = []

    class Watched(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    data = Watched(data)
    data.lengths = np.array([len(example) for example in list(data)])
    seen.clear()
    result, _ = run(data, per_device_train_batch_size=4, num_train_epochs=2)
    assert result.steps == 6
    assert sorted(seen[:11]) == sorted(seen[11:]) == list(range(11))
    assert seen[:4] == epoch_global_batches(data.lengths, 4, 42, 0)[0].tolist()


def test_the_files_of_a_run(tmp_path):
    exported = []
    config = TrainConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, eval_steps=3, learning_rate=1e-3)
    engine = make_engine(tiny_model(), config)
    result = train(
        config, engine, examples(30), examples(6, seed=1), export=lambda weights, folder: exported.append(folder.name)
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert list(lines[1]) == ["step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6, 8]
    assert lines[-1]["epoch"] == 1.0
    assert lines[-1]["tokens"] == result.tokens == sum(len(example) - 1 for example in examples(30))
    assert result.supervised_tokens == sum(int(example.supervised.sum()) for example in examples(30))
    assert lines[0]["val_loss_before"] == result.val_loss_before
    assert lines[-1]["val_loss"] == result.val_loss
    assert result.best_val_loss == min(line["val_loss"] for line in lines if "val_loss" in line)
    assert exported[-1] == "export"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_validation_loss_is_the_token_mean():
    model, data = tiny_model(), examples(9)
    engine = make_engine(model, TrainConfig())
    nll = sum(model(*collate([example]))[0].item() for example in data)
    count = sum(int(example.supervised[1:].sum()) for example in data)
    for batch_size in (1, 4, 9):
        assert evaluate(engine, data, batch_size) == pytest.approx(nll / count, rel=1e-5)


def test_the_best_weights_are_exported_beside_the_last_ones(tmp_path):
    """A rate that is far too high after a good start: the best is not the last."""
    kept = {}
    config = TrainConfig(
        output_dir=str(tmp_path), learning_rate=0.5, warmup_steps=12, per_device_train_batch_size=4, eval_steps=1
    )
    engine = make_engine(tiny_model(), config)

    def export(weights, folder):
        folder.mkdir(exist_ok=True)
        kept[folder.name] = {name: tensor.clone() for name, tensor in weights.items()}

    eval_data = examples(6, seed=1)
    result = train(config, engine, examples(48), eval_data, export=export)
    assert result.best_val_loss < result.val_loss
    assert (tmp_path / "export-best").is_dir()
    best = tiny_model()
    best.load_state_dict(kept["export-best"])
    assert evaluate(make_engine(best, config), eval_data, 8) == pytest.approx(result.best_val_loss, rel=1e-6)
    last = tiny_model()
    last.load_state_dict(kept["export"])
    assert evaluate(make_engine(last, config), eval_data, 8) == pytest.approx(result.val_loss, rel=1e-6)


def test_no_second_folder_where_the_last_is_the_best(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), learning_rate=1e-3, per_device_train_batch_size=4, eval_steps=4)
    data = examples(16)
    result = train(
        config,
        make_engine(tiny_model(), config),
        data,
        data,
        export=lambda weights, folder: folder.mkdir(exist_ok=True),
    )
    assert result.best_step == result.steps
    assert (tmp_path / "export").is_dir()
    assert not (tmp_path / "export-best").exists()


def test_every_step_reads_replayed_examples_too():
    data, replay = examples(16), examples(7, seed=3)
    config = TrainConfig(per_device_train_batch_size=4, num_train_epochs=2)
    engine = make_engine(tiny_model(), config)
    result = train(config, engine, data, replay_data=replay, replay_ratio=0.5)
    lengths = [len(example) - 1 for example in replay]
    assert result.steps == 8
    # 8 steps x 2 rows = 16 rows of 7: each of them twice, two of them once more
    extra = result.tokens - 2 * sum(len(example) - 1 for example in data) - 2 * sum(lengths)
    assert extra in {a + b for i, a in enumerate(lengths) for b in lengths[:i]}


def test_a_share_of_less_than_one_row_is_one():
    """A quarter of a global batch of 2 was rounded to 0, so --replay_data had no effect."""
    data, replay = examples(2), examples(1, seed=3)
    config = TrainConfig(per_device_train_batch_size=2)
    result = train(config, make_engine(tiny_model(), config), data, replay_data=replay)
    assert result.tokens == sum(len(example) - 1 for example in [*data, *replay])
    result = train(config, make_engine(tiny_model(), config), data, replay_data=replay, replay_ratio=0.0)
    assert result.tokens == sum(len(example) - 1 for example in data)


def test_a_second_run_into_a_folder_does_not_mix_its_lines_with_the_first_ones(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), per_device_train_batch_size=2)
    train(config, make_engine(tiny_model(), config), examples(6))
    with pytest.raises(FileExistsError, match="holds a run"):
        train(config, make_engine(tiny_model(), config), examples(6))
    config.overwrite_output_dir = True
    for _ in range(2):
        train(config, make_engine(tiny_model(), config), examples(6))
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]


def test_one_seed_one_run():
    data = examples(20)
    runs = [weights(run(data, per_device_train_batch_size=4, seed=seed)[1]) for seed in (7, 7, 8)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_max_steps_goes_on_into_further_epochs():
    result, _ = run(examples(8), per_device_train_batch_size=4, max_steps=5)
    assert (result.steps, result.epochs) == (5, 2.5)


def test_it_learns_and_every_parameter_moves():
    data = examples(8)
    before = tiny_model()
    result, after = run(data, per_device_train_batch_size=8, num_train_epochs=60, learning_rate=3e-3, eval_data=data)
    assert result.val_loss < 0.5 < result.val_loss_before
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_bf16_autocast_keeps_fp32_weights_and_stays_close():
    data = examples(16)
    full, half = (run(data, per_device_train_batch_size=8, max_steps=4, bf16=bf16)[0] for bf16 in (False, True))
    _, model = run(data, max_steps=1, bf16=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert half.train_loss == pytest.approx(full.train_loss, rel=0.02)
    assert half.train_loss != full.train_loss


def test_a_loss_that_is_no_number_stops_with_the_cause():
    model = tiny_model()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is nan, .* very first: .*\(h.1.mlp.c_fc.weight\)"):
        run(examples(4), model)


def test_a_gradient_that_is_no_number_leaves_the_weights_as_they_were():
    model = tiny_model()
    config = TrainConfig(learning_rate=1e-3)
    engine = make_engine(model, config)
    before = weights(model)
    model.wte.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="step 1: the gradient norm is (nan|inf)"):
        train(config, engine, examples(4))
    assert torch.equal(weights(model), before)


def test_a_step_that_breaks_the_weights_is_not_the_best(tmp_path):
    """Its validation loss was NaN, which no later loss is below: NaN weights stood in export-best, and in export."""
    config = TrainConfig(output_dir=str(tmp_path), learning_rate=1e30, max_grad_norm=math.inf, max_steps=1)
    with pytest.raises(FloatingPointError, match=r"step 1: the validation loss is nan at learning rate 1.00e\+30; "):
        train(
            config,
            make_engine(tiny_model(), config),
            examples(4),
            examples(2, seed=1),
            export=lambda weights, folder: folder.mkdir(),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="the training data is empty"):
        run([])
    with pytest.raises(ValueError, match="the replay data is empty: give more of it"):
        train(TrainConfig(), make_engine(tiny_model(), TrainConfig()), examples(2), replay_data=[])
