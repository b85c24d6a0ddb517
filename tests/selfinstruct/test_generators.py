"""Generators: the local model, alone and on several ranks."""

import math

import pytest

from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import is_main
from minigpt.selfinstruct.generators import (
    Completion,
    GeneratorArguments,
    How,
    LocalGenerator,
    Prompt,
    Ranks,
    cut,
    fit_shots,
)
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

from ..ranks import on_ranks
from .writers import Scripted, babbler

SEEDS = [10, 7, 99, 3, 2**63 - 1, 0, 5]
PROMPTS = [Prompt(f"{'###' * n}\n{n}. Instruction:", seed) for n, seed in enumerate(SEEDS, 1)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.tiny()


@pytest.fixture(scope="module")
def local(tokenizer):
    return LocalGenerator(babbler(tokenizer), tokenizer)


def how(stop=(), **settings):
    return How(GeneratorArguments(**{"max_length": 20, **settings}), stop)


# ---- the local model


def test_the_worked_example_of_cut():
    assert cut("4 apples\n###\n10. Instr", False, ["\n###\n10."]) == Completion(text="4 apples", finished=True)
    assert cut("a b c", False, ["c", "b"]) == ("a ", True)
    assert cut("a b c", False, ["d"]) == ("a b c", False)


def test_a_completion_depends_on_its_seed_alone(local):
    """So that a round cut to other batches, or dealt to ranks, comes to the same."""
    together = local.complete(PROMPTS, how(request_batch_size=3))
    alone = [local.complete([prompt], how())[0] for prompt in PROMPTS]
    assert together == alone
    assert len({completions[0].text for completions in together}) == len(PROMPTS)


def test_how_completions_end(local, tokenizer):
    """With end-of-text, which is no part of them; with a stop string, which is cut off; or for lack of room."""
    free = local.complete(PROMPTS, how(max_length=12))
    finished = [completion for (completion,) in free if completion.finished]
    unfinished = [completion for (completion,) in free if not completion.finished]
    assert finished and unfinished
    for completion in finished:
        assert len(tokenizer.encode(completion.text)) < 12
        assert "<|endoftext|>" not in completion.text
    stopped = local.complete(PROMPTS, how(("\nOutput:",), max_length=60))
    whole = local.complete(PROMPTS, how(max_length=60))
    assert any("\nOutput:" in completion.text for (completion,) in whole)
    for (short,), (long,) in zip(stopped, whole, strict=True):
        assert short == (long.text.partition("\nOutput:")[0], True) if "\nOutput:" in long.text else long


def test_several_completions_of_a_prompt(local):
    several = local.complete(PROMPTS[:2], how(num_return_sequences=3))
    assert [len(completions) for completions in several] == [3, 3]
    assert len({completion.text for completions in several for completion in completions}) == 6
    one = local.complete(PROMPTS[:2], how())
    assert [completions[0] for completions in several] == [completions[0] for completions in one]


def test_beams_draw_nothing(local):
    beams = how(num_beams=3, num_return_sequences=2)
    assert beams.settings.temperature == 0
    other_seeds = [prompt._replace(seed=prompt.seed + 1) for prompt in PROMPTS[:2]]
    assert local.complete(PROMPTS[:2], beams) == local.complete(other_seeds, beams)


def test_the_likeliest_tokens_need_no_seed(local, tokenizer):
    (first,), (second,) = local.complete([PROMPTS[0], PROMPTS[0]._replace(seed=2)], how(max_length=3, temperature=0.0))
    assert first == second
    assert len(tokenizer.encode(first.text)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2, "temperature": 0.5}, "--num_beams 2 searches"),
        ({"num_beams": 2, "num_return_sequences": 3}, "--num_return_sequences 3 is more than"),
        ({"temperature": 0.0, "num_return_sequences": 2}, "would be alike"),
        ({"stop_words": ["a", ""]}, "--stop_words: an empty string"),
        ({"max_length": 0}, "--max_length must be at least 1"),
        ({"request_batch_size": 0}, "--request_batch_size must be at least 1"),
        ({"temperature": math.inf}, "--temperature must be at least 0 and finite, got inf"),  # it failed in the model
        ({"repetition_penalty": math.inf}, "--repetition_penalty must be above 0 and finite, got inf"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GeneratorArguments(**settings)


def test_fewer_shots_where_the_context_is_short():
    """Words count as tokens here; every prompt is as long as its budget allows, and one more would not fit."""
    tasks = [Task(f"Say the number {n} in three languages.", "", "x " * n) for n in range(1, 9)]
    render = TaskFormat().render
    for context in range(60, 300, 7):
        found = fit_shots(Scripted(context=context), render, tasks, 20)
        lengths = [len(render(tasks[:count]).split()) for count in range(1, 9)]
        expected = max((count for count, length in enumerate(lengths, 1) if length + 20 <= context), default=0)
        assert found == ((tasks[:expected], render(tasks[:expected])) if expected else None)


# ---- several ranks


def test_two_ranks_complete_what_one_does(local):
    first, second = on_ranks(2, _on_a_rank, local)
    assert second is None
    assert first == [local.complete(PROMPTS, how()), local.complete(PROMPTS[:1], how(max_length=3))]


def _on_a_rank(local):
    generator = Ranks(local)
    if not is_main():
        return generator.help()
    found = [
        generator.complete(PROMPTS, how()),
        generator.complete(PROMPTS[:1], how(max_length=3)),  # nothing is left for rank 1
    ]
    generator.close()
    return found


def test_a_rank_that_fails_ends_all(local):
    assert on_ranks(2, _a_rank_fails, local) == ["ValueError", "OtherRankFailed"]


def _a_rank_fails(local):
    generator = Ranks(local)
    try:
        generator.complete([Prompt("", 1), Prompt("a", 2)], how()) if is_main() else generator.help()
    except (ValueError, RuntimeError) as error:
        return type(error).__name__
