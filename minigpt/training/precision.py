"""What a training run takes from the machine it is on: the precision, if the user left it open, and the threads."""

from pathlib import Path

from minigpt.distributed import all_or_none, is_main, print0, start_process_group, sum_over_ranks, world_size
from minigpt.files import read_json
from minigpt.hardware import bf16_seconds_ratio, bf16_warning, threads_warning
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.deepspeed_file import DeepSpeedFile


def fit_to_machine(config: TrainConfig, device: str, checkpoint: Path | None = None) -> None:
    """Replaces `precision="auto"` in `config` by `bf16` and `fp16`, and says which; every rank calls.

    A DeepSpeed file that states the precision decides. Otherwise rank 0 decides: the precision of the checkpoint that
    the run resumes from, else bf16 if a product takes no longer in it than in fp32. A plan made on a CPU is of bf16.
    It also warns about a precision set by hand that this machine emulates, and about threads.

    Args:
        device: "cpu", "cuda:0", ...
        checkpoint: what the run resumes from, whose precision is kept.

    Raises:
        ValueError: the checkpoint is damaged, or the DeepSpeed file is.
        FileNotFoundError: there is no such DeepSpeed file.
    """
    if config.precision == "auto" and config.deepspeed:
        DeepSpeedFile(config).replace_auto_precision()
    computes_here = config.plan is None
    if computes_here and is_main() and (warning := threads_warning(device)):
        print0(warning)
    if config.precision != "auto":
        if computes_here and config.bf16 and is_main() and (warning := bf16_warning(device)):
            print0(f"{warning}; --precision auto computes in the faster one")
        return
    if world_size() > 1:
        start_process_group(device.partition(":")[0])
    precision, reason = "fp32", ""
    with all_or_none():
        if is_main():
            if checkpoint is not None:
                precision, reason = _precision_of(checkpoint), f"that of {checkpoint}"
            elif not computes_here and device == "cpu":
                precision, reason = "bf16", "which GPUs older than Ampere do not have: plan those with --fp16"
            else:
                ratio = bf16_seconds_ratio(device)
                precision = "bf16" if ratio <= 1 else "fp32"
                reason = f"a product takes {ratio:.3g} times as long in bf16 as in fp32 here"
            print0(f"precision: {precision}, {reason}")
    bf16, fp16 = sum_over_ranks(precision == "bf16", precision == "fp16")
    config.bf16, config.fp16, config.precision = bool(bf16), bool(fp16), None


def _precision_of(checkpoint: Path) -> str:
    """bf16, fp16 or fp32."""
    try:
        recipe = read_json(checkpoint / "trainer.json")["recipe"]
        return "bf16" if recipe["bf16"] else "fp16" if recipe["fp16"] else "fp32"
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / 'trainer.json'}: damaged; remove {checkpoint}") from error
