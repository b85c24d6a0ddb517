"""Reads, checks and writes checkpoints in Hugging Face's layout.

Weights are safetensors, in one file or in shards listed by an index. Pickles are never opened.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from minigpt.files import read_json, whole_file
from minigpt.hub import resolve_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SkipInit(TorchFunctionMode):
    """Skips the initialisation of modules created under it, because a checkpoint replaces their parameters."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class WeightMap:
    """How a family's checkpoint names and stores the tensors of the module.

    With prefix "transformer." and transposed ("c_fc.weight",) the module's "h.0.mlp.c_fc.weight" of shape (out,in) is
    "transformer.h.0.mlp.c_fc.weight" of shape (in,out) in the file.
    """

    prefix: str = ""
    """What the file's names begin with; files without it are read too."""
    transposed: tuple[str, ...] = ()
    """Ends of the names of matrices that the file stores as (in,out)."""
    ignored: tuple[str, ...] = ()
    """Ends of names, in the file, of tensors that are no weights."""
    tied: tuple[str, ...] = ()
    """Names, in the file, of second copies of a tensor."""

    def to_module(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By the module's names and in its layout; transposed matrices are views."""
        weights = {}
        for name, tensor in tensors.items():
            name = name.removeprefix(self.prefix)
            if name not in self.tied and not name.endswith(self.ignored):
                weights[name] = tensor.t() if name.endswith(self.transposed) else tensor
        return weights

    def to_file(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_module`."""
        return {
            self.prefix + name: tensor.t() if name.endswith(self.transposed) else tensor
            for name, tensor in weights.items()
        }


def read_config(name_or_folder: str | Path, revision: str | None = None) -> dict:
    """The contents of config.json."""
    path = resolve_file(name_or_folder, "config.json", revision)
    if path is None:
        raise FileNotFoundError(f"{name_or_folder}: no config.json, so this is not a model")
    return read_json(path)


def read_weights(name_or_folder: str | Path, revision: str | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint by the file's own names, memory-mapped, on the CPU."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for path in _weight_files(name_or_folder, revision):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
    return tensors


def read_state_dict(name_or_folder: str | Path, revision: str | None, layout: WeightMap) -> dict[str, Tensor]:
    """A checkpoint's weights by the module's own names and in its layout, memory-mapped."""
    return layout.to_module(read_weights(name_or_folder, revision))


def _weight_files(name_or_folder: str | Path, revision: str | None) -> list[Path]:
    if single := resolve_file(name_or_folder, WEIGHTS, revision):
        return [single]
    if index := resolve_file(name_or_folder, INDEX, revision):
        weight_map = read_json(index).get("weight_map")  # tensor -> shard
        if not isinstance(weight_map, dict):
            raise ValueError(f'{index}: no "weight_map", which says where each tensor lies (fetch it again)')
        shards = sorted(set(weight_map.values()))
        paths = {shard: resolve_file(name_or_folder, shard, revision) for shard in shards}
        missing = [shard for shard, path in paths.items() if path is None]
        if missing:
            raise FileNotFoundError(f"{index}: names {', '.join(missing)}, which is not there")
        return [path for path in paths.values() if path is not None]
    at = f" at revision {revision}" if revision else ""
    if resolve_file(name_or_folder, "pytorch_model.bin", revision):
        raise FileNotFoundError(
            f"{name_or_folder}{at}: only a pickle (pytorch_model.bin), which can run code and is never opened; "
            "on the hub a safetensors copy is usually at --revision refs/pr/1"
        )
    raise FileNotFoundError(f"{name_or_folder}{at}: no {WEIGHTS} and no {INDEX}")


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuses missing tensors, unexpected ones and wrong shapes, naming them."""
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing {_few(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {_few(unexpected)}")
    for name in sorted(expected.keys() & found.keys()):
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} is {tuple(found[name].shape)}, not {tuple(expected[name].shape)}")
    if problems:
        raise ValueError(f"{source}: the weights do not fit its config.json: {'; '.join(problems[:4])}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def write_model(folder: str | Path, config: dict, weights: Mapping[str, Tensor]) -> None:
    """Writes config.json, generation_config.json and model.safetensors, each whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    with whole_file(folder / WEIGHTS) as path:
        try:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path, {"format": "pt"}
            )
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS}: cannot be written ({error}); the disk may be full") from error
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    for name, content in {
        "config.json": {**config, "dtype": dtypes.pop() if len(dtypes) == 1 else "float32"},
        "generation_config.json": generation,
    }.items():
        with whole_file(folder / name) as path:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
