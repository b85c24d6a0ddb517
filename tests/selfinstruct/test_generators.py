"""The local generator, in one process and on several ranks."""

import math

import pytest

from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import is_main
from minigpt.selfinstruct.generators import (
    Completion,
    GeneratorArguments,
    LocalGenerator,
    Ranks,
    SamplingParams,
    SeededPrompt,
    fit_shots,
    truncate_at_stop,
)
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

from ..ranks import on_ranks
from .fake_generators import Scripted, random_text_model

SEEDS = [10, 7, 99, 3, 2**63 - 1, 0, 5]
PROMPTS = [SeededPrompt(f"{'###' * n}\n{n}. Instruction:", seed) for n, seed in enumerate(SEEDS, 1)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.tiny()


@pytest.fixture(scope="module")
def local(tokenizer):
    return LocalGenerator(random_text_model(tokenizer), tokenizer)


def make_params(stop=(), **settings):
    return SamplingParams(GeneratorArguments(**{"max_length": 20, **settings}), stop)


# ---- the local model


def test_truncate_at_stop():
    assert truncate_at_stop("4 apples\n###\n10. Instr", False, ["\n###\n10."]) == Completion(
        text="4 apples", finished=True
    )
    assert truncate_at_stop("a b c", False, ["c", "b"]) == ("a ", True)
    assert truncate_at_stop("a b c", False, ["d"]) == ("a b c", False)


def test_a_completion_depends_only_on_prompt_and_seed(local):
    """So batch size and number of ranks do not change the result."""
    together = local.complete(PROMPTS, make_params(request_batch_size=3))
    alone = [local.complete([prompt], make_params())[0] for prompt in PROMPTS]
    assert together == alone
    assert len({completions[0].text for completions in together}) == len(PROMPTS)


def test_completions_end_by_eos_stop_string_or_length(local, tokenizer):
    """End-of-text and the stop string are not part of the text; at max_length `finished` is False."""
    completions = local.complete(PROMPTS, make_params(max_length=12))
    finished = [completion for (completion,) in completions if completion.finished]
    unfinished = [completion for (completion,) in completions if not completion.finished]
    assert finished and unfinished
    for completion in finished:
        assert len(tokenizer.encode(completion.text)) < 12
        assert "<|endoftext|>" not in completion.text
    stopped = local.complete(PROMPTS, make_params(("\nOutput:",), max_length=60))
    full = local.complete(PROMPTS, make_params(max_length=60))
    assert any("\nOutput:" in completion.text for (completion,) in full)
    for (short,), (long,) in zip(stopped, full, strict=True):
        assert short == (long.text.partition("\nOutput:")[0], True) if "\nOutput:" in long.text else long


def test_several_completions_per_prompt(local):
    several = local.complete(PROMPTS[:2], make_params(num_return_sequences=3))
    assert [len(completions) for completions in several] == [3, 3]
    assert len({completion.text for completions in several for completion in completions}) == 6
    single = local.complete(PROMPTS[:2], make_params())
    assert [completions[0] for completions in several] == [completions[0] for completions in single]


def test_beam_search_ignores_the_seed(local):
    params = make_params(num_beams=3, num_return_sequences=2)
    assert params.settings.temperature == 0
    other_seeds = [prompt._replace(seed=prompt.seed + 1) for prompt in PROMPTS[:2]]
    assert local.complete(PROMPTS[:2], params) == local.complete(other_seeds, params)


def test_greedy_decoding_ignores_the_seed(local, tokenizer):
    (first,), (second,) = local.complete(
        [PROMPTS[0], PROMPTS[0]._replace(seed=2)], make_params(max_length=3, temperature=0.0)
    )
    assert first == second
    assert len(tokenizer.encode(first.text)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2, "temperature": 0.5}, "--num_beams 2: beam search does not sample"),
        ({"num_beams": 2, "num_return_sequences": 3}, "--num_return_sequences 3 is more than"),
        ({"temperature": 0.0, "num_return_sequences": 2}, "would return identical completions"),
        ({"stop_words": ["a", ""]}, "--stop_words: an empty string"),
        ({"max_length": 0}, "--max_length must be at least 1"),
        ({"request_batch_size": 0}, "--request_batch_size must be at least 1"),
        # used to fail in the model
        ({"temperature": math.inf}, "--temperature must be at least 0 and finite, got inf"),
        ({"repetition_penalty": math.inf}, "--repetition_penalty must be above 0 and finite, got inf"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        GeneratorArguments(**settings)


def test_fit_shots_uses_as_many_shots_as_fit():
    """A token is a word here; one more shot would not fit."""
    tasks = [Task(f"Say the number {n} in three languages.", "", "x " * n) for n in range(1, 9)]
    render = TaskFormat().render
    for context in range(60, 300, 7):
        fitted = fit_shots(Scripted(context=context), render, tasks, 20)
        lengths = [len(render(tasks[:count]).split()) for count in range(1, 9)]
        expected = max((count for count, length in enumerate(lengths, 1) if length + 20 <= context), default=0)
        assert fitted == ((tasks[:expected], render(tasks[:expected])) if expected else None)


# ---- several ranks


def test_two_ranks_equal_one(local):
    first, second = on_ranks(2, _complete_on_a_rank, local)
    assert second is None
    assert first == [local.complete(PROMPTS, make_params()), local.complete(PROMPTS[:1], make_params(max_length=3))]


def _complete_on_a_rank(local):
    generator = Ranks(local)
    if not is_main():
        return generator.help()
    results = [
        generator.complete(PROMPTS, make_params()),
        generator.complete(PROMPTS[:1], make_params(max_length=3)),  # rank 1 has an empty shard
    ]
    generator.close()
    return results


def test_a_failing_rank_ends_all_ranks(local):
    assert on_ranks(2, _fail_on_a_rank, local) == ["ValueError", "OtherRankFailed"]


def _fail_on_a_rank(local):
    generator = Ranks(local)
    try:
        generator.complete(
            [SeededPrompt("", 1), SeededPrompt("a", 2)], make_params()
        ) if is_main() else generator.help()
    except (ValueError, RuntimeError) as error:
        return type(error).__name__
