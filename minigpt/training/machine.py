"""What a training run takes from the machine it is on: the precision, if the user left it open, and the threads."""

from pathlib import Path

from minigpt.arguments import TrainConfig
from minigpt.distributed import all_or_none, is_main, say, start_process_group, sum_over_ranks, world_size
from minigpt.files import read_json
from minigpt.hardware import bf16_seconds_ratio, bf16_warning, threads_warning


def fit_to_machine(config: TrainConfig, device: str, checkpoint: Path | None = None) -> None:
    """Replaces `precision="auto"` in `config` by `bf16` on or off, and says which; every rank calls.

    Rank 0 decides: the precision of the checkpoint that the run resumes from, else bf16 if a product takes no longer
    in it than in fp32. It also warns about a precision set by hand that this machine emulates, and about threads.

    Args:
        device: "cpu", "cuda:0", ...
        checkpoint: what the run resumes from, whose precision is kept.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    if is_main() and (warning := threads_warning(device)):
        say(warning)
    if config.precision != "auto":
        if config.bf16 and is_main() and (warning := bf16_warning(device)):
            say(f"{warning}; --precision auto computes in the faster one")
        return
    if world_size() > 1:
        start_process_group(device.partition(":")[0])
    bf16 = False
    with all_or_none():
        if is_main():
            if checkpoint is not None:
                bf16, reason = _precision_of(checkpoint), f"that of {checkpoint}"
            else:
                ratio = bf16_seconds_ratio(device)
                bf16, reason = ratio <= 1, f"a product takes {ratio:.3g} times as long in bf16 as in fp32 here"
            say(f"precision: {'bf16' if bf16 else 'fp32'}, {reason}")
    config.bf16, config.precision = bool(sum_over_ranks(bf16)[0]), None


def _precision_of(checkpoint: Path) -> bool:
    try:
        return bool(read_json(checkpoint / "trainer.json")["recipe"]["bf16"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / 'trainer.json'}: damaged; remove {checkpoint}") from error
