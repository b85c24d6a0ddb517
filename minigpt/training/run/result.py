"""The result of a run, which the loop returns and the scripts print."""

import math
from dataclasses import dataclass
from pathlib import Path

from minigpt.training.run.folder import EXPORT, EXPORT_BEST, LOSS_PICTURE


@dataclass
class TrainResult:
    """Losses are means over supervised tokens, in nats. A checkpoint holds these fields, so their names are fixed."""

    steps: int
    epochs: float
    tokens: int
    """Tokens read, padding not counted."""
    supervised_tokens: int
    """The denominators of all steps together: supervised tokens, or what the objective counts instead."""
    train_loss: float
    """Over the last tenth of the steps."""
    seconds: float
    val_loss_before: float | None = None
    val_loss: float | None = None
    """At the last step."""
    best_val_loss: float | None = None
    best_step: int | None = None
    skipped_steps: int = 0
    """Steps of fp16 that were not applied, because their gradients overflowed."""

    def table(self, folder: Path) -> str:
        """A small table of these numbers and of the files in the run folder."""
        skipped = f", {self.skipped_steps:,} of them skipped" if self.skipped_steps else ""
        rows = [
            ("steps", f"{self.steps:,} ({self.epochs:.2f} epochs){skipped}"),
            ("data seen", f"{self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"),
            ("training loss", f"{self.train_loss:.4f} (perplexity {perplexity(self.train_loss)})"),
        ]
        if self.val_loss is not None and self.val_loss_before is not None:
            change = f"{self.val_loss_before:.4f} -> {self.val_loss:.4f} (perplexity {perplexity(self.val_loss)})"
            rows.append(("validation loss", f"{change}, lowest {self.best_val_loss:.4f} at step {self.best_step:,}"))
        rows += [
            ("time", f"{self.seconds:,.0f} s"),
            ("export", str(folder / EXPORT)),
        ]
        if self.best_step not in (None, self.steps):
            rows.append(("lowest loss", str(folder / EXPORT_BEST)))
        if (folder / LOSS_PICTURE).exists():
            rows.append(("picture", str(folder / LOSS_PICTURE)))
        else:
            rows.append(
                ("picture", f"none: {LOSS_PICTURE} needs matplotlib (pip install -c constraints.txt -e '.[plot]')")
            )
        rows.append(("chat", f"python chat.py --model_name_or_path {folder / EXPORT}"))
        return "\n".join(f"{name:16} {value}" for name, value in rows)


def perplexity(loss: float) -> str:
    """exp(loss), formatted; capped at exp(700), because exp overflows a float soon after."""
    return f"{math.exp(min(loss, 700.0)):,.2f}"
