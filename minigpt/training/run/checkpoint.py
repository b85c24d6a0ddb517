"""Checkpoints to resume from, and the exported folder that other tools open.

    checkpoints/step-40/
      model.safetensors, optimizer.safetensors, ...   the engine's state (minigpt/training/engines/state.py)
      rng-0.safetensors, rng-1.safetensors, ...       each rank's random numbers
      trainer.json                                    the loop's counters: where in the data it is
      manifest.json                                   every file with its sha256

A checkpoint is complete or absent: it is written to step-40.tmp, flushed to disk (fsync), and renamed at the end. A
folder with a manifest is a committed checkpoint; *.tmp is an unfinished write or a deletion in progress, and is removed
by the next start.
"""

import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.data.prompts import Template
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import OtherRankFailed, all_or_none, is_main, is_out_of_memory, rank, world_size
from minigpt.files import read_json, remove, to_disk, whole_file
from minigpt.model.base import CausalLM
from minigpt.training.engines.torch_engine import Engine
from minigpt.version import __version__

CHECKPOINTS, MANIFEST, TRAINER = "checkpoints", "manifest.json", "trainer.json"
UNFINISHED = ".tmp"
SPARE_BYTES = 2**20  # for the small files


def save_checkpoint(run: Path, step: int, engine: Engine, progress: dict[str, Any], keep: int | None = None) -> Path:
    """Writes `run/checkpoints/step-N`, then removes all but the newest `keep`. Every rank calls.

    Args:
        progress: JSON that `load_checkpoint` returns.

    Raises:
        OSError: it cannot be written; earlier checkpoints are kept, and the message names the bytes needed.
    """
    folder = run / CHECKPOINTS / f"step-{step}"
    temporary = folder.with_name(folder.name + UNFINISHED)
    try:
        with all_or_none():
            if is_main():
                remove_unfinished(run)
                temporary.mkdir(parents=True)
                if shutil.disk_usage(temporary).free < engine.checkpoint_bytes + SPARE_BYTES:
                    raise OSError("too little space")
        engine.save(temporary)
        with all_or_none():
            _save_random_state(temporary / f"rng-{rank()}.safetensors", engine.device)
        with all_or_none():
            if is_main():
                content = {**progress, "step": step, "world_size": world_size()}
                (temporary / TRAINER).write_text(json.dumps(content, indent=2) + "\n")
                _commit(temporary, folder, step)
    except Exception as error:
        if is_main():  # it fails where any rank fails
            remove(temporary)
        if isinstance(error, OtherRankFailed) or is_out_of_memory(error):
            raise
        raise OSError(
            f"{folder}: cannot be written ({error}); it needs {engine.checkpoint_bytes + SPARE_BYTES:,} bytes, and "
            f"{shutil.disk_usage(run).free:,} are free; earlier checkpoints stand (--save_total_limit keeps fewer)"
        ) from error
    if is_main() and keep:
        keep_newest(run, keep)
    return folder


def load_checkpoint(folder: Path, engine: Engine, seed: int) -> dict[str, Any]:
    """Gives engine and random numbers their state back, once the files' sums agree. Every rank calls.

    On another number of ranks the random numbers (dropout) start anew from the seed and the step.

    Returns:
        The `progress` that was saved.
    """
    with all_or_none():
        if is_main():
            _verify(folder)
    progress = read_json(folder / TRAINER)
    engine.load(folder)
    if progress["world_size"] == world_size():
        _load_random_state(folder / f"rng-{rank()}.safetensors", engine.device)
    else:
        torch.manual_seed((seed + rank() + progress["step"] * world_size()) % 2**63)
    return progress


def checkpoints(run: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    found = {}
    for path in (run / CHECKPOINTS).glob("step-*"):
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / MANIFEST).exists():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def keep_newest(run: Path, count: int) -> None:
    """Removes all checkpoints but these."""
    for old in checkpoints(run)[:-count]:
        unfinished = old.with_name(old.name + UNFINISHED)  # so that half of one is never taken for a whole one
        old.rename(unfinished)
        remove(unfinished)


def remove_unfinished(run: Path) -> None:
    """What a run that was killed in the middle of writing or removing a checkpoint left of it."""
    for leftover in (run / CHECKPOINTS).glob(f"*{UNFINISHED}"):
        remove(leftover)


def find_checkpoint(run: Path, resume: str | None) -> Path | None:
    """What `--resume PATH|latest|auto` means for the run in this folder; None where it starts from nothing.

    Raises:
        FileNotFoundError: there is no such checkpoint. Only "auto" may start anew.
        FileExistsError: the run went on from there already.
    """
    found = checkpoints(run)
    if resume is None:
        return None
    if resume in ("latest", "auto"):
        if not found and resume == "latest":
            raise FileNotFoundError(f"{run / CHECKPOINTS}: no checkpoint (--resume auto starts anew then)")
        return found[-1] if found else None
    path = Path(resume)
    if (path / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"{path}: a run, not a checkpoint: --output_dir {path} --resume latest resumes it")
    if not (path / MANIFEST).exists() or path.name.endswith(UNFINISHED):
        known = f"; there are {', '.join(str(p) for p in found)}" if found else ""
        raise FileNotFoundError(f"{path}: no checkpoint, which has a {MANIFEST}{known} (--resume PATH|latest|auto)")
    if path.resolve() in [p.resolve() for p in found[:-1]]:
        raise FileExistsError(f"{path}: the run went on to {found[-1].name}; branch off with another --output_dir")
    return path


def _commit(temporary: Path, folder: Path, step: int) -> None:
    """Manifest, disk, rename: from here on it is a checkpoint."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for other in range(world_size()):
        if temporary / f"rng-{other}.safetensors" not in files:
            raise OSError(f"what rank {other} wrote is not here: the run's folder must lie on storage that all share")
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(files, pool.map(_sha256, files), strict=True))
    names = {
        path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sums[path]} for path in files
    }
    manifest = {"minigpt": __version__, "step": step, "files": names}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in [*temporary.rglob("*"), temporary]:
        to_disk(path)
    if not (folder / MANIFEST).exists():  # no checkpoint, but a copy of one that was broken off, say
        remove(folder)
    temporary.rename(folder)
    for path in (folder.parent, folder.parent.parent):
        to_disk(path)


def _verify(folder: Path) -> None:
    """Raises `ValueError` for the first file that is not what was written."""
    try:
        files = {name: str(entry["sha256"]) for name, entry in read_json(folder / MANIFEST)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        files = {}
    if not files:
        raise ValueError(f"{folder / MANIFEST}: damaged; remove {folder}, and --resume takes the one before")
    found_here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    if strangers := sorted(found_here - set(files)):  # DeepSpeed opens what it finds, pickles too
        raise ValueError(
            f"{folder / strangers[0]}: not of this checkpoint, whose {MANIFEST} does not name it: remove it"
        )
    if outside := sorted(name for name in files if ".." in Path(name).parts or Path(name).is_absolute()):
        raise ValueError(f"{folder / MANIFEST}: names {outside[0]}, which is not in its folder; remove {folder}")
    with ThreadPoolExecutor() as pool:
        for name, found in zip(files, pool.map(lambda name: _sha256(folder / name), files), strict=True):
            if found != files[name]:
                what = "is missing" if found is None else "is not what was written (its sha256 differs)"
                raise ValueError(f"{folder / name}: {what}; remove {folder}, and --resume takes the one before")


def _sha256(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _save_random_state(path: Path, device: torch.device) -> None:
    from safetensors.torch import save_file

    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":  # which need not be the process's current one
        states["cuda"] = torch.cuda.get_rng_state(device)
    save_file(states, path)


def _load_random_state(path: Path, device: torch.device) -> None:
    from safetensors.torch import load_file

    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def export(
    folder: str | Path,
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    state_dict: dict[str, Tensor] | None = None,
    training: str = "How it was trained is not recorded.",
) -> None:
    """Writes weights, tokenizer, template and model card.

    The folder opens with `load_model` and `Tokenizer.from_pretrained`, and with transformers'
    AutoModelForCausalLM and AutoTokenizer (chat template included).

    Args:
        folder: made if it does not exist.
        state_dict: weights to write instead of the model's own, such as those an engine gathered.
        training: how the model came about, as Markdown for the card.
    """
    folder = Path(folder)
    model.save_pretrained(folder, state_dict)
    tokenizer.save_pretrained(folder, model_max_length=model.config.context)
    template.save_pretrained(folder)
    with whole_file(folder / "README.md") as path:
        path.write_text(_card(model, template, training), encoding="utf-8")


def _card(model: CausalLM, template: Template, training: str) -> str:
    config = model.config
    example = [{"role": "user", "content": "Name the capital of France."}, {"role": "assistant", "content": "Paris."}]
    rendered = "".join(segment.text for segment in template.render(example))
    return f"""---
pipeline_tag: text-generation
tags: [{config.MODEL_TYPE}, minigpt]
---

# A {config.NAME} trained with minigpt {__version__}

{config.n_layer} layers, {config.width} wide, {config.n_head} heads, context {config.context}, vocabulary \
{config.vocab_size:,}: {model.num_parameters():,} parameters.

{training}

## Use

    python chat.py --model_name_or_path FOLDER

or, with transformers, `AutoModelForCausalLM.from_pretrained(FOLDER)` and
`AutoTokenizer.from_pretrained(FOLDER).apply_chat_template(messages, add_generation_prompt=True)`.

It was trained on the prompt template `{template.name}`:

```
{rendered}
```

## Limits

A language model of this size repeats what its data taught it and invents the rest. Its answers can be wrong, biased
or harmful, and nothing here filters them.
"""
