"""benchmarks/gpu.py: what it computes, what it says of a card that is too small, and, slow, all of it on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.model.gpt2 import GPTConfig
from minigpt.training.plan import count_parameters

ROOT = Path(__file__).parents[2]


def load():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


gpu = load()
H100, L4 = "NVIDIA H100 80GB HBM3", "NVIDIA L4"


def machine(gib: float, ranks: int = 1, card: str = H100):
    return gpu.Machine("cuda", card, ranks, gib * 2**30, "torch")


def test_flops_are_those_of_the_paper():
    """PaLM 540B, its table 3 and appendix B: 238.3e3 tokens/s on 6,144 TPU v4 of 275 TFLOPs are an MFU of 46.2%."""
    flops = gpu.flops_per_token(540.35e9, n_layer=118, width=48 * 256, length=2048)
    assert 238.3e3 * flops / (6144 * 275e12) == pytest.approx(0.462, abs=5e-4)


def test_mfu_by_hand():
    shape = GPTConfig.preset("gpt2-xl")
    flops = 6 * 1_557_611_200 + 12 * 48 * 1600 * 1024
    assert gpu.mfu(60_000, shape, 1024, H100, "bf16", ranks=8) == pytest.approx(60_000 * flops / (8 * 989e12))
    assert gpu.mfu(60_000, shape, 1024, "Some Card", "bf16", ranks=8) is None


@pytest.mark.parametrize(
    ("card", "fp16", "bf16"),
    [
        (H100, 989e12, 989e12),
        ("NVIDIA H100 PCIe", 756e12, 756e12),
        ("NVIDIA H100 NVL", 835e12, 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 312e12),
        ("NVIDIA A10", 125e12, 125e12),
        ("NVIDIA L40S", 362e12, 362e12),
        (L4, 121e12, 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 165.2e12),
        ("Tesla V100-SXM2-16GB", 125e12, None),
        ("Tesla T4", 65e12, None),
        ("NVIDIA A10G", None, None),  # half an A10
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None, None),  # three sevenths
        ("NVIDIA A100-SXM4-40GB and NVIDIA L4", None, None),
        ("AMD EPYC", None, None),
    ],
)
def test_the_peak_is_that_of_the_card_and_of_no_other(card, fp16, bf16):
    assert (gpu.peak_flops(card, "fp16"), gpu.peak_flops(card, "bf16")) == (fp16, bf16)


def test_the_batch_is_the_largest_that_the_plan_lets_fit(tmp_path):
    small, xl = gpu.GPU_SIZES
    assert [count_parameters(size.shape) for size in (small, xl)] == [124_439_808, 1_557_611_200]
    cases = [(small, 80), (small, 12), (xl, 80), (xl, 40), (xl, 24)]
    chosen = [gpu.choose_batch(size, "bf16", machine(gib), tmp_path) for size, gib in cases]
    batches = [batch for batch, _, _ in chosen]
    assert batches[0] > batches[1] > 0
    assert batches[2] > 0 == batches[4]
    for (size, gib), (batch, checkpointing, needed) in zip(cases, chosen):
        room = 0.85 * gib * 2**30
        if batch == 0:
            assert checkpointing and needed > room
        elif (doubled := 2 * batch) in gpu.BATCHES:
            assert needed <= room < gpu.planned_bytes(size, "bf16", 1, doubled, checkpointing, tmp_path)


def test_what_does_not_fit_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "Launch", None)
    row = gpu.train_size(gpu.GPU_SIZES[1], "fp16", machine(24), tmp_path, gpu.Clock(1))
    assert row[:3] == ["GPT-2 XL", "fp16", "1 x 1024"]
    assert row[3].startswith("does not fit: --plan says ") and row[3].endswith(" GiB at batch 1, 24.00 GiB are free")
    assert row[4:] == ["-", "-", row[3].split()[5], "-"]


def test_what_there_is_no_time_for_is_not_started(tmp_path):
    row = gpu.generate_size(gpu.CPU_SIZES[0], "bf16", machine(24), tmp_path, gpu.Clock(0))
    assert row == ["tiny", "bf16", "not run: the minutes are over", "-", "-"]


def test_the_first_steps_do_not_count_and_the_median_does():
    lines = [{"tokens_per_s": speed} for speed in (1.0, 2.0, 3.0, 500.0, 700.0, 90_000.0)]
    assert gpu.tokens_per_s(lines) == 700.0
    assert gpu.tokens_per_s([*lines, {"tokens_per_s": 1e6, "skipped": True}]) == 700.0
    with pytest.raises(gpu.Failed, match="no step after the first 3 was applied"):
        gpu.tokens_per_s(lines[:3])


def test_a_line_that_is_being_written_is_no_step(tmp_path):
    assert gpu.read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in gpu.read_metrics(tmp_path)] == [1, 2]


def test_the_error_is_the_one_of_the_rank_that_failed():
    gone = "error: another rank exited; what it said says why\n"
    assert gpu.error_in(f"[W] warning\n{gone}rank 1: error: step 3: out of GPU memory\nTraceback") == (
        "step 3: out of GPU memory"
    )
    assert gpu.error_in(gone).startswith("another rank exited")
    assert gpu.error_in("Killed\n") == ""


def test_the_table():
    row = gpu.training_row("GPT-2 124M", "bf16", "8 x 1024", 123_456.7, 0.4567, 10 * 2**30, 11 * 2**30, "cuda")
    assert row == ["GPT-2 124M", "bf16", "8 x 1024", "123,457", "45.7%", "10.00", "11.00", "0.91"]
    on_cpu = gpu.training_row("tiny", "bf16", "2 x 64", 99.6, None, 2**29, 2**30, "cpu")
    assert on_cpu[3:] == ["100", "-", "0.50", "1.00", "-"]
    failed = ["GPT-2 XL", "fp16", "1 x 1024", "failed: a | b", "-", "-", "1.00", "-"]
    text = gpu.report(machine(80), "benchmarks/gpu.sh", [row, failed], [["a", "bf16", "1", "2", "3"]], [["c", "d"]], 61)
    assert "training and generation on 1 x NVIDIA H100 80GB HBM3\n\n`benchmarks/gpu.sh`, 61 s; torch. " in text
    assert "\n| GPT-2 124M | bf16 | 8 x 1024 | 123,457 | 45.7% | 10.00 | 11.00 | 0.91 |\n" in text
    assert "| failed: a / b |" in text
    for table in text.split("\n\n")[2::1]:  # every row of a table has as many cells as its header
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1


def test_without_a_gpu_it_says_so(tmp_path):
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--output_dir", tmp_path], env=hidden, capture_output=True, text=True
    )
    told = "error: PyTorch sees no GPU here (--cpu is a rehearsal without one)\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told)


def test_a_folder_of_other_things_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").touch()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cpu", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds something else; give another --output_dir$"):
        gpu.main()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_all_of_it_on_a_cpu(tmp_path):
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--cpu", "--minutes", "60", "--output_dir", tmp_path / "gpu"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (tmp_path / "gpu" / "table.md").read_text().strip()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    trained = {row[1]: row for row in rows if row[0] == "tiny" and len(row) == 8}
    assert list(trained) == ["fp32", "fp16", "bf16"]
    assert trained["fp16"][3] == "refused on this CPU"
    for precision in ("fp32", "bf16"):
        assert float(trained[precision][3].replace(",", "")) > 0
    assert any(
        row[0].endswith("kill -9, resume") and row[1].endswith("steps 1 to 12 are there, once each") for row in rows
    )
    assert any(row[0] == "chat.py --prompt" and "characters in" in row[1] for row in rows)
    assert json.loads((tmp_path / "gpu" / "train-bf16.json").read_text())["peak"] > 0
