"""Killed at any place and resumed, a run ends as if nothing had happened: to the byte."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.data.store import TokenBlocks, build_text_store
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import rank
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import make_engine
from minigpt.training.loop import train
from minigpt.training.run.checkpoint import checkpoints, load_checkpoint

from ...ranks import on_ranks
from ...small_run import STEPS, assert_equal, at_step, evidence, killed_at, places, small_run


class Kind:
    """A way to run: its ranks, its settings, and what the run that nobody disturbed came to."""

    def __init__(self, folder: Path, world: int = 1, zero: int | None = None, **settings: Any):
        self.world, self.settings = world, settings
        if world > 1:
            self.settings = {"per_device_train_batch_size": 1, **settings}
        folder.mkdir()
        if zero is not None:
            (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": zero}}))
            self.settings["deepspeed"] = str(folder / "deepspeed.json")
        self.folder = folder
        self.expected: dict[str, Any] | None = None

    def undisturbed(self) -> dict[str, Any]:
        if self.expected is None:
            on_ranks(self.world, small_run, self.folder / "undisturbed", self.settings)
            self.expected = evidence(self.folder / "undisturbed")
        return self.expected

    def killed(self, run: Path, step: int, place: str) -> None:
        with pytest.raises(AssertionError, match="died with exit code -9"):
            on_ranks(self.world, small_run, run, {**self.settings, "resume": "auto"}, killed_at(step, place))

    def resumed(self, run: Path) -> dict[str, Any]:
        on_ranks(self.world, small_run, run, {**self.settings, "resume": "auto"})
        return evidence(run)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "one process": Kind(folder / "one"),
        "bf16": Kind(folder / "bf16", bf16=True),
        "DDP": Kind(folder / "ddp", world=2),
        "ZeRO-1": Kind(folder / "zero1", world=2, zero=1),
        "ZeRO-2": Kind(folder / "zero2", world=2, zero=2),
        "ZeRO-3": Kind(folder / "zero3", world=2, zero=3),
    }


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        (
            "one process",
            [
                *((2, "micro-batch"), (4, "optimizer"), (6, "files"), (7, "line"), (9, "renamed"), (11, "metrics")),
                *((12, "rotation"), (15, "manifest"), (18, "rotation"), (20, "export")),
            ],
        ),
        ("ZeRO-2", [(5, "micro-batch"), (12, "manifest"), (20, "optimizer")]),
        ("ZeRO-3", [(11, "optimizer")]),
        ("DDP", [(7, "micro-batch"), (12, "renamed")]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_killed_again_and_again(kinds, tmp_path, kind, kills):
    for step, place in kills:
        kinds[kind].killed(tmp_path / "run", step, place)
    assert_equal(kinds[kind].resumed(tmp_path / "run"), kinds[kind].undisturbed())


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_one_process_killed_at_every_place_of_every_step(kinds, tmp_path, step):
    for place in places(step):
        kinds["one process"].killed(tmp_path / place, step, place)
        assert_equal(kinds["one process"].resumed(tmp_path / place), kinds["one process"].undisturbed())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "step"),
    [("ZeRO-2", step) for step in range(1, STEPS + 1)]
    + [(kind, step) for kind in ("bf16", "DDP", "ZeRO-1", "ZeRO-3") for step in (1, 7, 20)],
)
def test_killed_at_a_step(kinds, tmp_path, kind, step):
    for place in {"micro-batch", places(step)[step % len(places(step))]}:
        kinds[kind].killed(tmp_path / place, step, place)
        assert_equal(kinds[kind].resumed(tmp_path / place), kinds[kind].undisturbed())


def test_a_checkpoint_that_was_not_finished_costs_no_older_one(kinds, tmp_path):
    kinds["one process"].killed(tmp_path / "run", 12, "manifest")
    assert names(tmp_path / "run" / "checkpoints") == ["step-12.tmp", "step-6", "step-9"]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-6", "step-9"]
    kinds["one process"].resumed(tmp_path / "run")
    assert names(tmp_path / "run" / "checkpoints") == ["step-18", "step-20"]


def test_fewer_ranks_and_more_go_on_with_the_same_examples(tmp_path):
    """2 ranks x 3, then 1 x 6, then 3 x 2: the window of 6 is the same, and so is what is in it."""
    whole = {"learning_rate": 1e-3, "save_steps": None, "resume": "auto"}
    cuts = [(2, 1, 3, 4), (1, 6, 1, 9), (3, 2, 1, None)]  # ranks, micro-batch, accumulation, the step that is the last

    def part(run, ranks, size, accumulation, last):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        stop = at_step(last, lambda: os.kill(os.getpid(), signal.SIGTERM)) if last else None
        on_ranks(ranks, _reads, tmp_path / run, {**whole, **sizes}, stop)
        parts = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{run}.read-*"))]
        for path in tmp_path.glob(f"{run}.read-*"):
            path.unlink()
        return [sorted(example for rank in step for example in rank) for step in zip(*parts, strict=True)]

    expected = part("whole", *cuts[0][:3], None)
    assert sorted(example for step in expected[:5] for example in step) == list(range(27))
    assert [step for cut in cuts for step in part("parts", *cut)] == expected
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in lines[1]] == pytest.approx([line[name] for line in lines[0]], rel=1e-5)


def _reads(run: Path, settings: dict[str, Any], before: Any) -> None:
    """Notes what this rank read, step by step."""
    _, seen = small_run(run, settings, before, dropout=0.0)
    (run.parent / f"{run.name}.read-{rank()}").write_text(json.dumps(seen))


@pytest.mark.parametrize("damage", ["of the version before", "zeroed"])
def test_a_run_resumes_though_its_store_is_built_anew(damage, tmp_path, capfd):
    """The order that a checkpoint holds has the store's name in it, which must not change."""
    (tmp_path / "corpus.txt").write_text("".join(f"After {n} comes {n + 1}.\n" for n in range(200)))
    small_shape = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}

    def run(resume: str | None) -> tuple[Path, bytes]:
        store = build_text_store([str(tmp_path / "corpus.txt")], Tokenizer.tiny(), cache_dir=tmp_path / "cache")
        config = TrainConfig(output_dir=str(tmp_path / "run"), max_steps=4, save_steps=2, resume=resume)
        torch.manual_seed(0 if resume is None else 1)
        engine = make_engine(GPT(GPTConfig(Tokenizer.tiny().vocab_size, **small_shape)), config)
        assert train(config, engine, TokenBlocks(store, 16)).steps == 4
        return store.folder, (tmp_path / "run" / "checkpoints" / "step-4" / "model.safetensors").read_bytes()

    folder, expected = run(None)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    if damage == "zeroed":
        (folder / "ids.bin").write_bytes(bytes((folder / "ids.bin").stat().st_size))
    else:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({"dtype": meta["dtype"], "stats": meta["stats"]}, indent=2))
    assert run("latest") == (folder, expected)
    assert capfd.readouterr().err.startswith(f"{folder}: damaged (")


# ---- what --resume means


def refused(run: Path, settings: dict[str, Any], world: int = 1, **more: Any) -> str:
    """The message of the error that a run ends with before anything is lost."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(AssertionError) as caught:
        on_ranks(world, partial(small_run, **more), run, settings)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }
    return str(caught.value).splitlines()[-1]


def test_latest_never_starts_anew_and_auto_does(kinds, tmp_path):
    """--resume once began again, silently, where the pointer to the checkpoint was missing."""
    run, kind = tmp_path / "run", kinds["one process"]
    message = f"FileNotFoundError: {run / 'checkpoints'}: no checkpoint (--resume auto starts anew then)"
    assert refused(run, {"resume": "latest"}) == message
    kind.killed(run, 2, "optimizer")
    assert refused(run, {"resume": "latest"}) == message
    assert "holds a run (config.yaml, metrics.jsonl)" in refused(run, {})
    assert_equal(kind.resumed(run), kind.undisturbed())


def test_auto_does_not_start_anew_over_a_finished_run(tmp_path):
    on_ranks(1, small_run, tmp_path / "run", {"save_steps": None, "max_steps": 3})
    assert refused(tmp_path / "run", {"resume": "auto"}) == (
        f"FileExistsError: {tmp_path / 'run'}: holds a run (config.yaml, metrics.jsonl, export); "
        "give another --output_dir, or --overwrite_output_dir"
    )


def test_an_older_checkpoint_branches_off_into_another_folder(kinds, tmp_path):
    kinds["one process"].undisturbed()
    first = kinds["one process"].folder / "undisturbed"
    older = first / "checkpoints" / "step-18"
    assert refused(first, {"resume": str(older)}) == (
        f"FileExistsError: {older}: the run went on to step-20; branch off with another --output_dir"
    )
    on_ranks(1, small_run, tmp_path / "branch", {"resume": str(older), "save_steps": 1})
    branch, expected = evidence(tmp_path / "branch"), kinds["one process"].undisturbed()
    assert branch["metrics"] == expected["metrics"]  # the history came along
    assert branch["export/model.safetensors"] == expected["export/model.safetensors"]
    assert names(first / "checkpoints") == ["step-18", "step-20"]
    no = tmp_path / "no"
    assert refused(no, {"resume": str(no)}) == (
        f"FileNotFoundError: {no}: no checkpoint, which has a manifest.json (--resume PATH|latest|auto)"
    )


def test_a_branch_takes_no_other_runs_place(kinds, tmp_path):
    """`--resume runs/a/checkpoints/step-18 --output_dir runs/b` put its history in the place of another run's."""
    kinds["one process"].undisturbed()
    newest = kinds["one process"].folder / "undisturbed" / "checkpoints" / "step-20"
    other = tmp_path / "other"
    on_ranks(1, small_run, other, {"max_steps": 3})
    assert refused(other, {"resume": str(newest)}) == (
        f"FileExistsError: {other}: holds a run (config.yaml, metrics.jsonl, checkpoints, export); "
        "--resume latest resumes from its checkpoint, or --overwrite_output_dir"
    )


def test_the_best_is_kept_where_a_run_ended_with_it_and_went_on(tmp_path):
    """Its weights were in export/ alone, and the next end wrote over them."""
    once = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "eval_steps": 1, "max_steps": 2, "resume": "auto"}
    on_ranks(1, small_run, tmp_path / "run", once)
    best = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    assert not (tmp_path / "run" / "export-best").exists()  # as the last is the best
    on_ranks(1, small_run, tmp_path / "run", {**once, "learning_rate": 0.5, "max_steps": 5})
    losses = [line["val_loss"] for line in evidence(tmp_path / "run")["metrics"]]
    assert min(losses) == losses[1]
    assert (tmp_path / "run" / "export-best" / "model.safetensors").read_bytes() == best
    assert (tmp_path / "run" / "export" / "model.safetensors").read_bytes() != best


def test_a_branch_keeps_the_best_of_its_own(tmp_path):
    """The lowest loss came along from the other run, and its weights did not: no folder had them."""
    once = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "eval_steps": 1, "save_steps": 1}
    on_ranks(1, small_run, tmp_path / "run", {**once, "max_steps": 3, "save_total_limit": 3})
    branch = {**once, "learning_rate": 0.5, "max_steps": 5}
    step_2 = tmp_path / "run" / "checkpoints" / "step-2"
    on_ranks(1, small_run, tmp_path / "branch", {**branch, "resume": str(step_2)})
    losses = {line["step"]: line["val_loss"] for line in evidence(tmp_path / "branch")["metrics"]}
    assert min(losses, key=losses.__getitem__) == 2
    best = (tmp_path / "branch" / "export-best" / "model.safetensors").read_bytes()
    assert best == (step_2 / "model.safetensors").read_bytes()


def test_another_seed_batch_or_data_is_refused_by_name(tmp_path):
    run = tmp_path / "run"
    on_ranks(1, small_run, run, {"max_steps": 3})
    refusal = f"ValueError: {run / 'checkpoints' / 'step-3'}: cannot resume from it, because "
    go_on = {"resume": "latest", "max_steps": 6}
    assert refused(run, {**go_on, "seed": 7}) == refusal + "--seed changed (42 then, 7 now): set it back"
    assert refused(run, {**go_on, "gradient_accumulation_steps": 3}) == (
        refusal
        + "--per_device_train_batch_size x --gradient_accumulation_steps x ranks changed (4 then, 6 now): set it back"
    )
    assert refused(run, {**go_on, "group_by_length": False}) == (
        refusal + "--group_by_length changed (True then, False now): set it back"
    )
    assert refused(run, go_on, count=28) == (refusal + "the data, or how it is cut into examples, changed: set it back")


def test_what_may_change_is_said_and_an_earlier_end_is_refused(tmp_path, capfd):
    run = tmp_path / "run"
    on_ranks(1, small_run, run, {"max_steps": 3})
    behind = refused(run, {"resume": "latest", "max_steps": 2})
    assert behind == f"ValueError: {run / 'checkpoints' / 'step-3'}: at step 3 already, behind the 2 of this run"
    capfd.readouterr()
    on_ranks(1, small_run, run, {"resume": "latest", "max_steps": 5, "learning_rate": 1e-4})
    said = [line.split(": ", 1)[1] for line in capfd.readouterr().out.splitlines() if " then, " in line]
    assert said == ["--learning_rate 0.003 then, 0.0001 now", "--max_steps 3 then, 5 now"]


@pytest.mark.parametrize("zero", [None, 1], ids=["plain", "ZeRO-1"])
@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_may_be_resumed_under_the_other_precision(tmp_path, capfd, bf16, zero):
    """On a CPU without bf16, say, of a run that began on another one. The weights that it resumes from are fp32."""
    run, settings = tmp_path / "run", {"lr_scheduler_type": "constant", "save_steps": 3}
    if zero is not None:
        (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": zero}}))
        settings["deepspeed"] = str(tmp_path / "deepspeed.json")
    for folder, max_steps in ((run, 3), (tmp_path / "undisturbed", 5)):
        on_ranks(1, small_run, folder, {**settings, "max_steps": max_steps, "bf16": not bf16})
    capfd.readouterr()
    on_ranks(1, small_run, run, {**settings, "resume": "latest", "max_steps": 5, "bf16": bf16})
    assert f": --bf16 {not bf16} then, {bf16} now\n" in capfd.readouterr().out
    losses, expected = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "undisturbed")
    )
    assert losses[:3] == expected[:3]
    assert losses[3:] != expected[3:]
    assert losses[3:] == pytest.approx(expected[3:], rel=0.01)


def test_a_finished_run_goes_on_to_more_steps(kinds, tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    on_ranks(1, small_run, tmp_path / "at-once", {**constant, "max_steps": 9})
    for steps in (5, 9, 9):
        on_ranks(1, small_run, tmp_path / "run", {**constant, "max_steps": steps, "resume": "auto"})
    found, expected = evidence(tmp_path / "run"), evidence(tmp_path / "at-once")
    assert [line["loss"] for line in found["metrics"]] == [line["loss"] for line in expected["metrics"]]
    assert found["export/model.safetensors"] == expected["export/model.safetensors"]


def test_resuming_and_overwriting_exclude_each_other():
    with pytest.raises(ValueError, match="--resume continues a run, --overwrite_output_dir deletes it: give one"):
        TrainConfig(resume="auto", overwrite_output_dir=True)


# ---- damaged checkpoints


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_a_changed_byte_is_named_before_anything_is_read(kinds, tmp_path):
    kinds["ZeRO-2"].undisturbed()
    run = shutil.copytree(kinds["ZeRO-2"].folder / "undisturbed", tmp_path / "run")
    folder = checkpoints(run)[-1]
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len([path for path in files if path.suffix == ".pt"]) == 3
    for path in files:
        content = path.read_bytes()
        middle = len(content) // 2
        for damaged, what in (
            (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], "is not what was written"),
            (content[:-1], "is not what was written"),
            (None, "is missing"),
        ):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(ValueError) as caught:
                load_checkpoint(folder, NoEngine(), seed=42)
            assert str(caught.value).startswith(f"{path}: {what}")
            assert str(caught.value).endswith(f"; remove {folder}, and --resume takes the one before")
        path.write_bytes(content)

    manifest = (folder / "manifest.json").read_text()
    for damaged, what in ((manifest[:-9], ": damaged; remove "), ("{}\n", ": damaged; remove ")):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError) as caught:
            load_checkpoint(folder, NoEngine(), seed=42)
        assert str(caught.value).startswith(f"{folder}/manifest.json{what}")
    (folder / "manifest.json").write_text(manifest)

    shard = next(path for path in files if path.suffix == ".pt")
    torch.save(Bomb(tmp_path / "exploded"), shard)
    message = refused(run, {**kinds["ZeRO-2"].settings, "resume": "latest", "max_steps": 22}, world=2)
    assert message.startswith(f"ValueError: {shard}: is not what was written")
    assert not (tmp_path / "exploded").exists()
    torch.load(shard, weights_only=False)
    assert (tmp_path / "exploded").exists()  # it was a live one


def test_a_changed_counter_is_damage_and_not_another_seed(tmp_path):
    """The counters were looked at before their sum was: "--seed changed: 43 then, 42 now"."""
    on_ranks(1, small_run, tmp_path / "run", {"max_steps": 3})
    counters = tmp_path / "run" / "checkpoints" / "step-3" / "trainer.json"
    counters.write_text(counters.read_text().replace('"seed": 42', '"seed": 43'))
    message = refused(tmp_path / "run", {"resume": "latest", "max_steps": 6})
    assert message.startswith(f"ValueError: {counters}: is not what was written (its sha256 differs); remove ")


class NoEngine:
    """Nothing of it is asked for."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
