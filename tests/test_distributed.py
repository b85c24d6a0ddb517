"""Rank, world and device, and output of rank 0 alone."""

import pytest

from minigpt.distributed import is_main, pick_device, rank, say, world_size


def test_one_process_is_the_first_of_one(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    say("hello")
    assert capsys.readouterr().out == "hello\n"


def test_the_others_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), world_size(), is_main()) == (1, 4, False)
    say("hello")
    assert capsys.readouterr().out == ""


def test_the_device_of_a_name():
    assert pick_device("cpu") == "cpu"
    assert pick_device() in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("name", ["gpu", "cpux", "cuda:999"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError) as caught:
        pick_device(name)
    assert str(caught.value) == f"--device {name}: this PyTorch has no such device here (cuda, cpu or mps)"
