"""What a run tells while it runs."""

import json

import pytest

from minigpt.training.run import metrics as metrics_module
from minigpt.training.run.metrics import Metrics, draw_losses, losses_of


def test_plain_lines_where_there_is_no_terminal(capsys):
    with Metrics(None, total_steps=5, logging_steps=2) as metrics:
        metrics.evaluated(4.0)
        for step in range(1, 6):
            line = {"step": step, "loss": 3.5, "lr": 1e-3, "grad_norm": 1.25, "tokens": 10, "tokens_per_s": 1234.0}
            metrics.log(line | ({"val_loss": 2.0} if step == 5 else {}), 0.01)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "step 0/5  val_loss 4.0000"
    assert [line.split()[1] for line in out] == ["0/5", "1/5", "2/5", "4/5", "5/5"]
    assert out[1] == "step 1/5  loss 3.5000  lr 1.00e-03  grad 1.25  1,234 tok/s"  # which says nothing of the others
    assert out[2].endswith("  1,234 tok/s  0:00:00 left")
    assert "val_loss 2.0000" in out[-1]


def test_the_time_left_is_the_median_step_and_the_evaluations(monkeypatch, capsys):
    """The first step prepares kernels, and a pause is no speed: a mean said 1:55:45 after a first step of 3 s."""
    now = [0.0]
    monkeypatch.setattr("minigpt.training.run.metrics.time.perf_counter", lambda: now[0])
    line = {"loss": 3.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10, "tokens_per_s": 1.0}
    with Metrics(None, total_steps=100, logging_steps=50, eval_steps=25) as metrics:
        for step in range(1, 51):
            seconds = 60.0 if step == 1 else 30.0 if step == 10 else 2.0
            now[0] += seconds
            if step % 25 == 0:
                now[0] += 7.0  # the evaluation
            metrics.log({"step": step, **line} | ({"val_loss": 2.0} if step % 25 == 0 else {}), seconds)
            if step % 25 == 0:
                now[0] += 4.0  # sample answers and a checkpoint
    out = [text.split()[1:2] + text.split()[-2:] for text in capsys.readouterr().out.splitlines()]
    assert out == [
        ["1/100", "1", "tok/s"],
        ["4/100", "0:03:12", "left"],  # as soon as steps have taken five seconds: 96 x 2 s; no evaluation is timed yet
        ["25/100", "0:02:51", "left"],  # 75 x 2 s and three evaluations of 7 s
        ["50/100", "0:02:02", "left"],  # 50 x 2 s and two evaluations, the last of 7 s after a checkpoint of 4 s
    ]


def test_the_picture_is_drawn_from_the_file(tmp_path):
    lines = [{"step": step, "loss": 4.0 / step, "tokens": 100 * step} for step in range(1, 20)]
    lines[0]["val_loss_before"] = lines[-1]["val_loss"] = 4.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_step_no_picture(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert not draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_the_picture_is_drawn_also_where_a_run_breaks_off(tmp_path):
    with pytest.raises(FloatingPointError), Metrics(tmp_path, total_steps=5, logging_steps=10) as metrics:
        for step in (1, 2):
            metrics.log(
                {"step": step, "loss": 3.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10, "tokens_per_s": 1.0}, 0.01
            )
        raise FloatingPointError
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(("seconds", "drawings"), [(0.0, [1, 2, 3, 3]), (60.0, [3])])
def test_evaluations_draw_again_only_after_some_seconds(tmp_path, monkeypatch, seconds, drawings):
    """Ten steps of a tiny model took 13 s, 5.5 of them for drawing after each. The end always draws."""
    lines_drawn = []
    monkeypatch.setattr(metrics_module, "PICTURE_SECONDS", seconds)
    monkeypatch.setattr(metrics_module, "draw_losses", lambda file, _: lines_drawn.append(file.read_text().count("\n")))
    with Metrics(tmp_path, total_steps=3, logging_steps=10) as metrics:
        for step in (1, 2, 3):
            line = {"step": step, "loss": 3.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10, "tokens_per_s": 1.0}
            metrics.log({**line, "val_loss": 2.0}, 0.01)
    assert lines_drawn == drawings


def test_a_run_that_goes_on_writes_on_and_knows_how_much_there_is(tmp_path, capsys):
    line = {"loss": 3.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10, "tokens_per_s": 1.0}
    with Metrics(tmp_path, total_steps=40, logging_steps=10) as metrics:
        metrics.log({"step": 1, **line}, 0.01)
        metrics.log({"step": 2, **line}, 0.01)
        assert metrics.bytes_on_disk() == (tmp_path / "metrics.jsonl").stat().st_size > 0
    capsys.readouterr()
    with Metrics(tmp_path, total_steps=40, logging_steps=10, first_step=2) as metrics:
        assert metrics.bytes_on_disk() == (tmp_path / "metrics.jsonl").stat().st_size
        for step in range(3, 13):
            metrics.log({"step": step, **line}, 0.01)
        assert metrics.bytes_on_disk() == (tmp_path / "metrics.jsonl").stat().st_size
    assert [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 13)
    ]
    assert [text.split()[1] for text in capsys.readouterr().out.splitlines()] == ["3/40", "10/40"]
    assert losses_of(tmp_path / "metrics.jsonl") == [3.5] * 12
    assert losses_of(tmp_path / "none.jsonl") == []
