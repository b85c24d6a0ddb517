"""Curation: which records of an instruction file are worth keeping.

meaning.py and lint.py choose; here is what they read and write. The file, in any format of `data.records`, is left
alone. Beside it, or in `--output_dir`, of a `tasks.jsonl` and the mode `unique`, come to lie

- `tasks.unique.jsonl`: the records that stay, in their order and with all their keys;
- `tasks.unique.dropped.jsonl`: a line for each reason against each other record, `{"source", "instruction", "reason",
  "nearest", "nearest_source", "score"}`, where the nearest is the text that it is too near to, or not near enough.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minigpt.data.read.records import Conversation, read_records
from minigpt.data.read.streams import find_data_files, read_values
from minigpt.distributed import print0
from minigpt.files import whole_file, writing_to
from minigpt.settings.groups import check_range

SHOWN = 3  # places named for each reason


@dataclass
class CurationArguments:
    """Choosing among tasks, and generating none."""

    curate: Literal["unique", "consistent", "lint"] | None = None
    """Generate nothing, but choose among tasks: unique drops what means the same as one before; consistent, what the
    model cannot tell the instruction of from the output (both need the extra curation); lint, empty answers, links,
    repeats, and overlap with eval_data."""
    data: str | None = None
    """Instruction file to curate. Unset: the tasks in batch_dir."""
    eval_data: list[str] = field(default_factory=list)
    """Evaluation files that lint looks for in the data."""
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Folder or hub id of the sentence-transformers model that unique and consistent compare meanings with."""
    curate_threshold: float | None = None
    """Cosine from which two instructions mean the same (unset: 0.5); for lint, ROUGE-L (unset: 0.7)."""
    output_dir: str | None = None
    """Where curated files go. Unset: beside the data."""

    def __post_init__(self) -> None:
        check_range(self, "above 0 and at most 1", lambda x: 0 < x <= 1, "curate_threshold")
        if not self.curate and (self.data or self.output_dir):
            raise ValueError("--data and --output_dir go with --curate; a run that generates is told --batch_dir")
        if self.eval_data and self.curate != "lint":
            raise ValueError("--eval_data goes with --curate lint")


class Entry(NamedTuple):
    """A record and what it says. Of several turns, or instances, the texts are joined by line feeds."""

    source: str  # that of its Conversation: FILE:LINE
    record: dict[str, Any]
    instruction: str
    input: str
    outputs: tuple[str, ...]

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)

    @property
    def question(self) -> str:
        """The instruction and the input: the same instruction may be put to many inputs."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


class Drop(NamedTuple):
    """Why a record does not stay."""

    place: int  # of the entry
    reason: str
    nearest: str | None = None
    nearest_source: str | None = None
    score: float | None = None


class Curated(NamedTuple):
    """What came of it."""

    kept: int
    dropped: int
    reasons: dict[str, int]  # how many records each speaks against; there may be several against one


def read_entries(path: str | Path, output_dir: str | None = None) -> tuple[list[Entry], Path]:
    """The questions and answers of one file, and the path that the names of the results begin with.

    That of `data/alpaca.jsonl` is `data/alpaca`, and with the output_dir `out`, `out/alpaca`. Any other ending belongs
    to the name, so that `data/alpaca.json` has results of its own.

    Raises:
        ValueError: the path leads to several files, to an empty one, or to the hub without an output_dir; a record
            cannot be read, or is plain text.
    """
    if output_dir is None and str(path).startswith("hf://"):
        raise ValueError(f"{path}: lies on the hub; --output_dir says where the results go")
    file, *others = find_data_files(path)
    if others:
        raise ValueError(f"{path}: {1 + len(others)} files; curation takes one at a time")
    if not file.stat().st_size:
        raise ValueError(f"{file}: no task in it (a run that has kept none leaves this); --data names another file")
    conversations = read_records(file)
    entries = []
    for _, record in read_values(file):
        several = isinstance(record, dict) and "messages" not in record and record.get("instances")
        found = list(islice(conversations, len(several) if several else 1))  # a bad record is an error here
        if found[0].messages[0]["role"] == "text":
            raise ValueError(f"{found[0].source}: plain text, expected a question and its answer")
        entries.append(make_entry(record, found))
    return entries, Path(output_dir or file.parent) / file.name.removesuffix(".jsonl")


def make_entry(record: dict[str, Any], conversations: Sequence[Conversation]) -> Entry:
    messages = [message for conversation in conversations for message in conversation.messages]
    questions = [message for message in messages if message["role"] in ("user", "text")]
    return Entry(
        source=conversations[0].source,
        record=record,
        instruction="\n".join(dict.fromkeys(question["content"] for question in questions)),
        input="\n".join(question["input"] for question in questions if "input" in question),
        outputs=tuple(message["content"] for message in messages if message["role"] == "assistant"),
    )


def write_results(
    base: Path, mode: str, entries: Sequence[Entry], drops: Sequence[Drop], reasons: Sequence[str]
) -> Curated:
    """Writes both files and says what came of it."""
    dropped = {drop.place for drop in drops}
    kept = [as_line(entry.record) for place, entry in enumerate(entries) if place not in dropped]
    kept_file, dropped_file = (base.with_name(f"{base.name}.{name}.jsonl") for name in (mode, f"{mode}.dropped"))
    why = []
    for drop in drops:
        reason = drop._asdict()
        entry = entries[reason.pop("place")]
        why.append(as_line({"source": entry.source, "instruction": entry.instruction, **reason}))
    with writing_to(base.parent, "--output_dir"):
        for file, lines in (kept_file, kept), (dropped_file, why):
            with whole_file(file) as temporary:
                # Half of a surrogate pair, which JSON can write and UTF-8 cannot, becomes JSON's \ud83d again.
                temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    print0(f"{kept_file}: {len(kept):,} of {len(entries):,} records kept; why not the others: {dropped_file}")
    for name in reasons:
        places = [entries[drop.place].source for drop in drops if drop.reason == name]
        examples = ", ".join(places[:SHOWN]) + (", ..." if len(places) > SHOWN else "")
        print0(f"  {name:16} {len(places):8,}  {examples}".rstrip())
    return Curated(len(kept), len(dropped), dict(Counter(drop.reason for drop in drops)))


def as_line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=str) + "\n"  # str: a date of parquet
