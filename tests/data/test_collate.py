"""The collator: expected inputs and targets as whole tensors."""

import doctest

import numpy as np
import pytest
import torch

from minigpt.data import collate as module
from minigpt.data.collate import Batch, collate
from minigpt.data.encode import Example

A, B, C, D, F = 11, 12, 13, 14, 15
E, I = 50256, -100  # noqa: E741

TABLE = {
    "padding masked, end-of-text not": ([[A, B, C], [D, F]], None, [[A, B, C], [D, F, E]], [[B, C, E], [F, E, I]]),
    "an inner end-of-text stays supervised": ([[A, E, B, C]], None, [[A, E, B, C]], [[E, B, C, E]]),
    "an inner end-of-text in a padded row": (
        [[A, E, B], [A, B, C, D, F]],
        None,
        [[A, E, B, E, E], [A, B, C, D, F]],
        [[E, B, E, I, I], [B, C, D, F, E]],
    ),
    "ends with end-of-text: none appended": ([[A, B, E]], None, [[A, B]], [[B, E]]),
    "end-of-text in a batch": (
        [[A, B, E], [C], [A, B]],
        None,
        [[A, B], [C, E], [A, B]],
        [[B, E], [E, I], [B, E]],
    ),
    "two end-of-texts are kept": ([[A, E, E]], None, [[A, E]], [[E, E]]),
    "a single token": ([[A]], None, [[A]], [[E]]),
    "truncated: no end-of-text": ([[A, B, C, D, F]], 4, [[A, B, C, D]], [[B, C, D, F]]),
    "allowed_max_len exactly reached": ([[A, B, C, D]], 4, [[A, B, C, D]], [[B, C, D, E]]),
    "allowed_max_len not reached": ([[A], [B, C]], 4, [[A, E], [B, C]], [[E, I], [C, E]]),
    "allowed_max_len of 1": ([[A, B, C], [D]], 1, [[A], [D]], [[B], [E]]),
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    sequences, allowed_max_len, inputs, targets = TABLE[name]
    batch = collate(sequences, allowed_max_len=allowed_max_len)
    assert isinstance(batch, Batch)
    for tensor, expected in zip(batch, (inputs, targets), strict=True):
        assert (tensor.dtype, tensor.device.type) == (torch.int64, "cpu")
        assert tensor.tolist() == expected


ERRORS = {
    "an empty batch": ([], {}, "the batch is empty: there is nothing to collate"),
    "an empty sequence": ([[A], []], {}, "sequence 1 of the batch has no token left to predict after the shift"),
    "only end-of-text": ([[A], [B], [E]], {}, "sequence 2 of the batch has no token left to predict after the shift"),
    "an Example of one token": (
        [Example([A], [True])],
        {},
        "sequence 0 of the batch has no token left to predict after the shift",
    ),
    "allowed_max_len 0": ([[A, B]], {"allowed_max_len": 0}, "allowed_max_len is 0: at least one position is needed"),
    "allowed_max_len -1": ([[A, B]], {"allowed_max_len": -1}, "allowed_max_len is -1: at least one position is needed"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    batch, options, message = ERRORS[name]
    with pytest.raises(ValueError) as caught:
        collate(batch, **options)
    assert str(caught.value) == message


@pytest.mark.filterwarnings("error")
def test_accepts_every_kind_of_sequence_and_modifies_none():
    def sequences() -> list:
        return [
            [A, B, C],
            (D, F),
            np.array([A, E], np.uint16),
            torch.tensor([B, C]),
            torch.tensor([C], dtype=torch.int32),
        ]

    originals = sequences()
    originals[2].setflags(write=False)  # like a memory-mapped array
    batch = collate(originals, allowed_max_len=2)
    assert batch.inputs.tolist() == [[A, B], [D, F], [A, E], [B, C], [C, E]]
    assert batch.targets.tolist() == [[B, C], [F, E], [E, I], [C, E], [E, I]]
    batch.inputs.fill_(0)
    batch.targets.fill_(0)
    for sequence, before in zip(originals, sequences(), strict=True):
        assert type(sequence) is type(before)
        assert list(map(int, sequence)) == list(map(int, before))


def test_a_2d_tensor_is_a_batch_of_rows():
    batch = collate(torch.tensor([[A, B], [C, E]]))
    assert batch.inputs.tolist() == [[A, B], [C, E]]
    assert batch.targets.tolist() == [[B, E], [E, I]]


def test_examples_get_nothing_appended():
    """A truncated Example stays without end-of-text; the mask applies to targets, so it is shifted with them."""
    full = Example(np.array([A, B, C, E], np.uint16), np.array([False, False, True, True]))
    cut = Example([A, B, C, D, F], [True, False, False, True, True])
    batch = collate([full, cut, [A, B]])
    assert batch.inputs.tolist() == [[A, B, C, E], [A, B, C, D], [A, B, E, E]]
    assert batch.targets.tolist() == [[I, C, E, I], [I, I, D, F], [B, E, I, I]]
    capped = collate([full, cut], allowed_max_len=2)
    assert capped.inputs.tolist() == [[A, B], [A, B]]
    assert capped.targets.tolist() == [[I, C], [I, I]]
    assert (full.ids.tolist(), cut.ids) == ([A, B, C, E], [A, B, C, D, F])


def test_other_pad_token_and_ignore_index():
    batch = collate([[A, B, C], [D, 0]], pad_token_id=0, ignore_index=-1)
    assert batch.inputs.tolist() == [[A, B, C], [D, 0, 0]]
    assert batch.targets.tolist() == [[B, C, 0], [0, -1, -1]]


def test_pad_token_inside_a_sequence_is_supervised():
    """transformers issue 23530: masking by value hid every end-of-text, so models did not learn to stop."""
    [row] = collate([Example([A, E, E, B], [True] * 4)]).targets.tolist()
    assert row == [E, E, B]


def test_docstring_example():
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=1)
