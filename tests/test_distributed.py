"""Rank, world size and device; reductions over ranks; output on rank 0 only."""

import pytest

from minigpt.distributed import (
    all_or_none,
    is_main,
    pick_device,
    print0,
    rank,
    start_process_group,
    sum_over_ranks,
    world_size,
)

from .ranks import on_ranks


def test_without_a_launcher_rank_is_0_and_world_size_1(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    print0("hello")
    assert capsys.readouterr().out == "hello\n"


def test_print0_prints_nothing_on_other_ranks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), world_size(), is_main()) == (1, 4, False)
    print0("hello")
    assert capsys.readouterr().out == ""


def test_pick_device():
    assert pick_device("cpu") == "cpu"
    assert pick_device() in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("name", ["gpu", "cpux", "cuda:999"])
def test_an_unavailable_device_is_an_error_that_names_it(name):
    with pytest.raises(ValueError) as caught:
        pick_device(name)
    assert str(caught.value) == f"--device {name}: this PyTorch has no such device here (cuda, cpu or mps)"


def test_mps_refuses_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and mps is one device: use --device cpu"):
        start_process_group("mps")


def sums():
    start_process_group("cpu")
    start_process_group("cpu")  # a second call does nothing
    return sum_over_ranks(rank(), 2**40 + 1, 0.5)


def test_sums_over_ranks_are_exact():
    """In fp32 a count of tokens is exact up to 2^24."""
    assert on_ranks(3, sums) == [[3, 3 * (2**40 + 1), 1.5]] * 3
    assert sum_over_ranks(1, 2.5) == [1, 2.5]  # one process, no process group


def one_rank_fails(failing):
    start_process_group("cpu")
    try:
        with all_or_none():
            if rank() in failing:
                raise ValueError(f"rank {rank()}: the disk is full")
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_all_or_none_raises_on_every_rank_if_one_fails():
    """Regression: the others waited in the next collective until its timeout of half an hour."""
    name, message = "OtherRankFailed", "rank {} stops, because 1 of 3 ranks failed"
    assert on_ranks(3, one_rank_fails, (1,)) == [
        (name, message.format(0)),
        ("ValueError", "rank 1: the disk is full"),
        (name, message.format(2)),
    ]
    assert on_ranks(2, one_rank_fails, ()) == [None, None]
