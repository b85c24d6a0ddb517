"""Samples at an evaluation: answers to a dataset's first prompts, and the continuation of a text."""

import copy
import json

import pytest
import torch

from minigpt.data.store import TokenBlocks, build_store, build_text_store
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import rank
from minigpt.evaluation.predict import show_answers, show_text
from minigpt.inference.generate import generate
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import make_engine
from minigpt.training.loop import train

from ..inference.memorized_data import ALPACA, MESSAGES, TEMPLATE
from ..ranks import on_ranks


def test_show_answers(memorized, tokenizer, tmp_path, capsys):
    data = tmp_path / "data.json"
    turns = [*MESSAGES[1], {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Nobody knows."}]
    data.write_text(json.dumps([ALPACA[0], {"text": "a text has no question"}, {"messages": turns}, ALPACA[2]]))
    store = build_store([str(data)], TEMPLATE, tokenizer, 64, cache_dir=tmp_path)
    show_answers(memorized, 0, tokenizer, store, count=3, max_new_tokens=24)
    shown = [
        "  1 prompt    '### Instruction:\\nCapital of France?\\n\\n### Output:\\n'",
        "  1 reference 'The capital of France is Paris.<|endoftext|>'",
        "  1 answer    'The capital of France is Paris.<|endoftext|>'",
        "  3 prompt    '### Instruction:\\nCapital of Sweden?\\n\\n### Output:\\n'",
        "  3 reference 'Stockholm.<|endoftext|>'",  # the first answer, which the prompt asks for
        "  3 answer    'Stockholm.<|endoftext|>'",
    ]
    assert capsys.readouterr().out.splitlines() == shown
    show_answers(memorized, 10, tokenizer, store, count=3, max_new_tokens=24)  # later steps show only the answers
    assert capsys.readouterr().out.splitlines() == [shown[2], shown[5]]
    show_answers(memorized, 0, tokenizer, None, count=3, max_new_tokens=24)
    assert capsys.readouterr().out == ""


def test_show_text(memorized, tokenizer, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("The capital of France is Paris. " * 5)
    data = TokenBlocks(build_text_store([str(tmp_path / "a.txt")], tokenizer, cache_dir=tmp_path), 32)
    for length, seed in ((8, 1), (8, 1), (8, 2)):
        show_text(memorized, tokenizer, data, length, seed)
    first, again, other = capsys.readouterr().out.splitlines()
    start = tokenizer.decode(tokenizer.encode("The capital of France is Paris. " * 5)[:8])
    assert first.startswith(f"  sample    {start!r} ... ")
    assert first == again != other
    show_text(memorized, tokenizer, data, 0, seed=1)
    show_text(memorized, tokenizer, None, 8, seed=1)
    assert capsys.readouterr().out == ""


def train_with_samples(folder, rows, stage: int) -> tuple[int, list[int]]:
    """On every rank: two ZeRO steps with samples before, between and after. Rank 1's answers would end at once."""
    store = build_store([str(rows)], TEMPLATE, Tokenizer.tiny(), 64, cache_dir=folder / "cache")
    tokenizer = copy.copy(Tokenizer.tiny())
    config = TrainConfig(max_steps=2, eval_steps=1, per_device_train_batch_size=2, deepspeed=str(folder / "zero.json"))
    torch.manual_seed(0)
    engine = make_engine(GPT(GPTConfig(tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2)), config)
    forwards: list[int] = []

    def show(module: GPT, step: int) -> None:
        [first] = generate(module, [[1, 2, 3]], max_new_tokens=1)
        tokenizer.eot_id = first[0] if rank() == 1 else Tokenizer.tiny().eot_id
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        hook = module.h[0].register_forward_hook(count)
        show_answers(module, step, tokenizer, store, count=2, max_new_tokens=6)
        hook.remove()
        forwards.append(calls)

    try:
        return train(config, engine, store, store, on_eval=show).steps, forwards
    finally:
        engine.close()


@pytest.mark.parametrize("threshold", [0, 100_000], ids=["all weights sharded", "small weights persistent"])
def test_samples_under_zero_3_run_equal_forwards_and_training_continues(tmp_path, threshold):
    """Regression: a rank whose answer had ended gathered no more weights, so the others waited forever; and weights
    gathered in inference mode could not be used by backward."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ALPACA))
    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    results = on_ranks(2, train_with_samples, tmp_path, rows, 3)
    assert results[0] == results[1]
    assert results[0][0] == 2
    assert len(set(results[0][1])) == 1
