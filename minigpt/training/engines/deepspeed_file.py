"""A DeepSpeed JSON beside the flags: what is written at a key, and who sets a flag that a key speaks of too.

A value that the file states and the user states too must be the same; where only the file states it, it becomes the
configuration's, and a line says so.
"""

import difflib
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from minigpt.distributed import print0
from minigpt.files import read_json
from minigpt.settings.command_line import is_given
from minigpt.settings.groups import TrainConfig

# What `--fp16` alone means: configs/deepspeed/zero1_fp16.json, which need not be there when a run starts.
ZERO1_FP16: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 100_000_000, "allgather_bucket_size": 100_000_000},
}

# The keys that a misspelling would silently leave at DeepSpeed's default.
READ_HERE = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "fp16", "bf16", "zero_optimization", "activation_checkpointing", "data_types"),
)


class DeepSpeedFile:
    """A DeepSpeed JSON beside the configuration that it has to agree with."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.name = config.deepspeed or "--fp16"
        self.agreed: dict[str, str] = {}  # flag -> the key that has set it
        if config.deepspeed is None:
            self.content = deepcopy(ZERO1_FP16)
            return
        path = Path(config.deepspeed)
        if not path.exists():
            raise FileNotFoundError(f"--deepspeed {path}: no such file (ready-made ones lie in configs/deepspeed)")
        self.content = _read(path)
        if "bfloat16" in self.content:  # its old name
            self.content.setdefault("bf16", self.content.pop("bfloat16"))
        if isinstance(zero := self.content.get("zero_optimization"), bool):  # an old form
            self.content["zero_optimization"] = {"stage": int(zero)}
        for key in self.content:
            close = difflib.get_close_matches(key, READ_HERE, n=1, cutoff=0.85)
            if close and key not in READ_HERE:
                raise self.error(f"unknown key {key} (did you mean {close[0]}?)")

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.name}: {text}")

    def get(self, key: str) -> Any:
        """The value at `fp16.enabled`, or None where nothing or "auto" stands there."""
        value: Any = self.content
        for depth, part in enumerate(key.split(".")):
            if not isinstance(value, dict):
                raise self.error(f"{'.'.join(key.split('.')[:depth])}: expected an object, got {json.dumps(value)}")
            value = value.get(part)
            if value is None or value == "auto":
                return None
        return value

    def section(self, key: str) -> dict[str, Any]:
        """The object at `fp16`, empty where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{key}: expected an object, got {json.dumps(value)}")
        return value or {}

    def number(self, key: str) -> Any:
        """The number at `key`, or None where there is none."""
        value = self.get(key)
        return value if value is None else self.checked_number(key, value)

    def checked_number(self, key: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{key}: expected a number, got {json.dumps(value)}")
        return value

    def is_fixed(self, name: str) -> bool:
        """Whether the file or the user has said what this flag is."""
        return name in self.agreed or is_given(self.config, name)

    def replace_auto_precision(self) -> None:
        """Makes `--precision auto` unset if the file states a precision, which `agree` then takes from it."""
        config = self.config
        if config.precision == "auto" and (self.get("fp16.enabled") or self.get("bf16.enabled") is not None):
            print0(f"{self.name}: sets the precision, which --precision auto leaves open")
            config.precision = None
            vars(config).get("_given", set()).discard("precision")

    def agree(self, key: str, name: str, value: Any = None) -> None:
        """What is written at `key` is what the flag `name` is, or becomes it where nothing else has set the flag.

        `value`: what the written value means as a flag, where that is not the written value itself.
        """
        written = self.get(key)
        value = written if value is None else value
        if value is None:
            return
        current = getattr(self.config, name)
        if isinstance(current, bool):
            if not isinstance(value, bool):
                raise self.error(f"{key}: expected true or false, got {json.dumps(value)}")
        elif isinstance(current, (int, float)):
            value = self.checked_number(key, value)
            if isinstance(current, int) and not float(value).is_integer():
                raise self.error(f"{key}: expected a whole number, got {json.dumps(value)}")
            value = type(current)(value)
        stated = f"{key} {json.dumps(written)}"
        if value != current:
            if name in self.agreed:
                raise self.error(f"{stated} contradicts {self.agreed[name]}")
            flag = _flag(name, current) if is_given(self.config, name) else None
            if name in TrainConfig.ALTERNATIVES and is_given(self.config, "precision"):
                flag = f"--precision {'bf16' if self.config.bf16 else 'fp16' if self.config.fp16 else 'fp32'}"
            if flag:
                raise self.error(f'{stated} contradicts {flag} (drop one of them, or write "auto")')
            setattr(self.config, name, value)
            try:
                TrainConfig.__post_init__(self.config)
            except ValueError as error:
                raise self.error(f"{stated}: {error}") from None
            default = ("on" if current else "off") if isinstance(current, bool) else current
            print0(f"{self.name}: {stated} ({_flag(name, value)} instead of the default {default})")
        self.agreed[name] = stated


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError:
        import hjson  # comes with DeepSpeed, which reads its files with it: comments and last commas are allowed

        try:
            content = hjson.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON, comments allowed: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a JSON object") from None
        return dict(content)


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    return f"--{name} {value}"
