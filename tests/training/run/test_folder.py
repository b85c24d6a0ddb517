"""The run folder: who may write into it, what is in it, and what is left of a run that failed."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from minigpt.settings.command_line import parse
from minigpt.settings.groups import DataArguments, ModelArguments, TrainConfig
from minigpt.training.run.checkpoint import find_checkpoint
from minigpt.training.run.folder import run_folder, start_run

ROOT = Path(__file__).parents[3]


@dataclass
class Config(TrainConfig, DataArguments, ModelArguments):
    """A script's configuration."""

    words: list[str] = field(default_factory=list)
    """Some words."""


def config(folder, **settings):
    return Config(output_dir=str(folder), **settings)


@contextmanager
def begun(settings: Config, default: str) -> Iterator[Path]:
    """A run that came as far as training."""
    with run_folder(settings, default) as folder:
        start_run(settings, folder)
        yield folder


def finish(folder, **settings):
    """A run that makes a step and leaves an export."""
    with begun(config(folder, **settings), "unused"):
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
        (folder / "export").mkdir()
        (folder / "export" / "model.safetensors").write_text("weights")


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_folder_is_the_flags_or_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unset = Config()
    with begun(unset, "runs/script") as folder:
        assert (str(folder), unset.output_dir) == ("runs/script", "runs/script")
    with begun(Config(output_dir="elsewhere"), "runs/script") as folder:
        assert str(folder) == "elsewhere"
    assert contents(tmp_path) == [
        "elsewhere/.lock",
        "elsewhere/config.yaml",
        "runs/script/.lock",
        "runs/script/config.yaml",
    ]


def test_the_saved_configuration_repeats_the_run(tmp_path):
    settings = config(
        tmp_path, learning_rate=1e-3, data=["a b.json", "é.json"], bf16=True, max_steps=None, words=["no"]
    )
    with begun(settings, "unused"):
        pass
    assert parse(Config, ["--config", str(tmp_path / "config.yaml")]) == settings


def test_a_second_run_is_refused_by_name(tmp_path):
    with begun(config(tmp_path), "unused"):
        with (
            pytest.raises(FileExistsError) as caught,
            begun(config(tmp_path, overwrite_output_dir=True), "unused"),
        ):
            pass
        assert str(caught.value) == (
            f"{tmp_path}: another run, process {os.getpid()} on {socket.gethostname()}, is writing into this folder; "
            "wait for it, end it, or give another --output_dir"
        )
        assert contents(tmp_path) == [".lock", "config.yaml"]  # the first run's: nothing of it was touched


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = f"""
import time
from minigpt.settings.groups import TrainConfig
from minigpt.training.run.checkpoint import find_checkpoint
from minigpt.training.run.folder import run_folder
with run_folder(TrainConfig(output_dir={str(tmp_path)!r}), "unused"):
    print("claimed", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "claimed\n"
            with (
                pytest.raises(FileExistsError, match=f"another run, process {process.pid} on .*, is writing"),
                begun(config(tmp_path), "unused"),
            ):
                pass
        finally:
            process.send_signal(signal.SIGKILL)
    finish(tmp_path, overwrite_output_dir=True)
    assert contents(tmp_path) == [".lock", "config.yaml", "export/model.safetensors", "metrics.jsonl"]


def test_a_finished_run_is_not_written_over(tmp_path):
    finish(tmp_path)
    with pytest.raises(FileExistsError) as caught, begun(config(tmp_path), "unused"):
        pass
    assert str(caught.value) == (
        f"{tmp_path}: holds a run (config.yaml, metrics.jsonl, export); give another --output_dir, "
        "or --overwrite_output_dir"
    )
    assert contents(tmp_path) == [".lock", "config.yaml", "export/model.safetensors", "metrics.jsonl"]


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    (tmp_path / "notes").mkdir()
    for name in ("notes/a.md", "data.json", "export.txt", "predictions.jsonl"):
        (tmp_path / name).write_text("mine")
    finish(tmp_path)
    (tmp_path / "export-best").mkdir()
    (tmp_path / "loss.png").write_text("picture")
    with begun(config(tmp_path, overwrite_output_dir=True, seed=7), "unused"):
        assert contents(tmp_path) == [
            *(".lock", "config.yaml", "data.json", "export.txt", "notes/a.md", "predictions.jsonl")
        ]
        assert "seed: 7\n" in (tmp_path / "config.yaml").read_text()
    assert not (tmp_path / "export-best").exists()


def test_a_link_to_an_export_is_removed_and_not_what_it_leads_to(tmp_path):
    finish(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "export").symlink_to(tmp_path / "a" / "export")
    with begun(config(tmp_path / "b", overwrite_output_dir=True), "unused"):
        pass
    assert contents(tmp_path / "a") == [".lock", "config.yaml", "export/model.safetensors", "metrics.jsonl"]
    assert contents(tmp_path / "b") == [".lock", "config.yaml"]


@pytest.mark.parametrize("name", ["model_name_or_path", "tokenizer_name"])
def test_a_run_does_not_remove_what_it_starts_from(tmp_path, monkeypatch, name):
    """`sft.py --model_name_or_path runs/sft/export --overwrite_output_dir` would delete its own model."""
    monkeypatch.chdir(tmp_path)
    finish(tmp_path / "run")
    with (
        pytest.raises(FileExistsError) as caught,
        begun(Config(output_dir="run", overwrite_output_dir=True, **{name: str(tmp_path / "run/export")}), "unused"),
    ):
        pass
    assert (
        str(caught.value)
        == "run/export: this run starts from it, so it cannot take its place; give another --output_dir"
    )
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


def test_nothing_is_lost_before_training_begins(tmp_path):
    """`--overwrite_output_dir --data typo.json` once removed the old export, and then reported the typo."""
    finish(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with (
        pytest.raises(FileNotFoundError),
        run_folder(config(tmp_path, overwrite_output_dir=True, seed=7), "unused"),
    ):
        raise FileNotFoundError("typo.json: no such file or folder")
    assert contents(tmp_path) == [".lock", "config.yaml", "export/model.safetensors", "metrics.jsonl"]
    assert (tmp_path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt])
def test_a_run_that_fails_before_its_first_step_leaves_no_trace(tmp_path, error):
    """Otherwise the same command, its data mended, would be refused."""
    with pytest.raises(error), begun(config(tmp_path), "unused"):
        (tmp_path / "metrics.jsonl").touch()
        raise error
    assert contents(tmp_path) == [".lock"]
    finish(tmp_path)


def test_a_run_that_fails_later_keeps_what_it_has(tmp_path):
    with pytest.raises(FloatingPointError), begun(config(tmp_path), "unused"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
        raise FloatingPointError
    assert contents(tmp_path) == [".lock", "config.yaml", "metrics.jsonl"]
    with (
        pytest.raises(FileExistsError, match=r"holds a run \(config.yaml, metrics.jsonl\)"),
        begun(config(tmp_path), "unused"),
    ):
        pass


def test_a_folder_that_cannot_be_written_names_its_flag(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"file: cannot be written to \(File exists\); --output_dir chooses another place"),
        run_folder(config(tmp_path / "file"), "unused"),
    ):
        pass


def test_a_full_disk_names_the_folder(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")  # as write() says it: without a name
    with (
        pytest.raises(OSError, match=r"cannot be written to \(No space left on device\); --output_dir"),
        run_folder(config(tmp_path), "unused"),
    ):
        raise full


def test_an_error_that_is_not_of_writing_is_left_as_it_is(tmp_path):
    """A connection that broke while weights were fetched has no file name either, and is not the folder's fault."""
    with (
        pytest.raises(ConnectionResetError, match="Connection reset by peer"),
        run_folder(config(tmp_path), "unused"),
    ):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


# ---- a run that goes on


def checkpoint_of(run: Path, step: int) -> Path:
    """What the run folder sees of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


LINES = "".join(f'{{"step": {step}, "loss": 2.5}}\n' for step in range(1, 10))


def test_what_was_written_past_the_checkpoint_is_cut(tmp_path):
    """A killed run's lines of steps 4 to 9, half a line among them, stood before the same steps once more."""
    finish(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(LINES + '{"step": 10, "lo')
    (tmp_path / "preempted.json").write_text("{}")
    checkpoint = checkpoint_of(tmp_path, 3)
    checkpoint_of(tmp_path, 6).rename(tmp_path / "checkpoints" / "step-6.tmp")
    settings = config(tmp_path, resume="latest", seed=7)
    with run_folder(settings, "unused") as folder:
        start_run(settings, folder, checkpoint, metrics_bytes=len(LINES) // 3)
    assert (tmp_path / "metrics.jsonl").read_text() == LINES[: len(LINES) // 3]
    assert contents(tmp_path) == [
        *(".lock", "checkpoints/step-3/manifest.json", "config.yaml", "export/model.safetensors", "metrics.jsonl")
    ]
    assert "seed: 7\n" in (tmp_path / "config.yaml").read_text()
    assert "resume: null\n" in (tmp_path / "config.yaml").read_text()  # --config repeats the run, not the resuming


def test_a_branch_takes_the_history_along_and_leaves_it_there(tmp_path):
    finish(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text(LINES)
    checkpoint = checkpoint_of(tmp_path / "a", 3)
    settings = config(tmp_path / "b", resume=str(checkpoint))
    with run_folder(settings, "unused") as folder:
        start_run(settings, folder, checkpoint, metrics_bytes=len(LINES) // 3)
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == LINES[: len(LINES) // 3]
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == LINES
    assert contents(tmp_path / "b") == [".lock", "config.yaml", "metrics.jsonl"]


def test_a_folder_with_checkpoints_says_how_to_go_on(tmp_path):
    finish(tmp_path)
    checkpoint_of(tmp_path, 3)
    with pytest.raises(FileExistsError) as caught, begun(config(tmp_path), "unused"):
        pass
    assert str(caught.value) == (
        f"{tmp_path}: holds a run (config.yaml, metrics.jsonl, checkpoints, export); "
        "--resume latest resumes from its checkpoint, or --overwrite_output_dir"
    )
    with begun(config(tmp_path, overwrite_output_dir=True), "unused"):
        assert contents(tmp_path) == [".lock", "config.yaml"]


@pytest.mark.parametrize(
    ("resume", "found"),
    [
        (None, None),
        ("latest", "step-10"),
        ("auto", "step-10"),
        ("checkpoints/step-10/", "step-10"),
        ("checkpoints/step-9", "FileExistsError"),
        ("checkpoints/step-12.tmp", "FileNotFoundError"),
        ("checkpoints", "FileNotFoundError"),
    ],
)
def test_which_checkpoint_a_run_goes_on_from(tmp_path, monkeypatch, resume, found):
    """In the order of steps, not of names; what was not finished, or is no folder of a step, is none."""
    monkeypatch.chdir(tmp_path)
    for step in (9, 10, 12):
        checkpoint_of(tmp_path, step)
    (tmp_path / "checkpoints" / "step-12").rename(tmp_path / "checkpoints" / "step-12.tmp")
    (tmp_path / "checkpoints" / "step-11").mkdir()
    (tmp_path / "checkpoints" / "step-x").mkdir()
    try:
        checkpoint = find_checkpoint(tmp_path, resume)
    except OSError as error:
        assert type(error).__name__ == found
    else:
        assert (checkpoint and checkpoint.name) == found


def test_only_the_first_rank_touches_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with run_folder(config(tmp_path / "run"), "unused") as folder:
        assert folder == tmp_path / "run"
    assert not folder.exists()
