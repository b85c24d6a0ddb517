"""Curation of an instruction file: settings, and reading and writing files. The checks are in semantic.py and lint.py.

The input file, in any format of `data.read.records`, is not changed. For `tasks.jsonl` and the mode `unique`, the
results are written to the same folder, or to `--output_dir`:

- `tasks.unique.jsonl`: the kept records, in their order and with all their keys;
- `tasks.unique.dropped.jsonl`: one line per dropped record and reason, `{"source", "instruction", "reason", "nearest",
  "nearest_source", "score"}`; `nearest` is the text that the record is too similar, or not similar enough, to.
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

MAX_SOURCES = 3  # printed per reason


@dataclass
class CurationArguments:
    """Settings of --curate, which filters an existing file and generates nothing."""

    curate: Literal["unique", "consistent", "lint"] | None = None
    """Filter existing tasks instead of generating. unique: drop semantic duplicates. consistent: drop tasks whose
    instruction the model cannot reconstruct from the output (both need the extra curation). lint: drop empty answers,
    links, duplicates, and overlap with eval_data."""
    data: str | None = None
    """Instruction file to curate. Unset: the tasks in batch_dir."""
    eval_data: list[str] = field(default_factory=list)
    """Evaluation files; lint drops records that overlap with them."""
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Folder or hub id of the sentence-transformers model that unique and consistent use."""
    curate_threshold: float | None = None
    """Instructions with at least this cosine count as equal in meaning (unset: 0.5); for lint, ROUGE-L (unset: 0.7)."""
    output_dir: str | None = None
    """Folder for the curated files. Unset: the folder of the data."""

    def __post_init__(self) -> None:
        check_range(self, "above 0 and at most 1", lambda x: 0 < x <= 1, "curate_threshold")
        if not self.curate and (self.data or self.output_dir):
            raise ValueError("--data and --output_dir go with --curate; without it, use --batch_dir")
        if self.eval_data and self.curate != "lint":
            raise ValueError("--eval_data goes with --curate lint")


class Entry(NamedTuple):
    """A record and its texts. The texts of several turns or instances are joined by line feeds."""

    source: str  # FILE:LINE, from its Conversation
    record: dict[str, Any]
    instruction: str
    input: str
    outputs: tuple[str, ...]

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)

    @property
    def question(self) -> str:
        """Instruction and input, because the same instruction may occur with many inputs."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


class Drop(NamedTuple):
    """A reason to drop a record."""

    entry_index: int
    reason: str
    nearest: str | None = None
    nearest_source: str | None = None
    score: float | None = None


class Curated(NamedTuple):
    """Counts of a curation."""

    kept: int
    dropped: int
    reasons: dict[str, int]  # reason -> number of records; a record may have several reasons


def read_entries(path: str | Path, output_dir: str | None = None) -> tuple[list[Entry], Path]:
    """Reads one file. Returns its entries, and the path prefix of the result files.

    The prefix for `data/alpaca.jsonl` is `data/alpaca`, or `out/alpaca` with the output_dir `out`. Any other extension
    stays in the prefix, so that the results of `data/alpaca.json` have different names.

    Raises:
        ValueError: the path matches several files, an empty one, or is on the hub without an output_dir; or a record
            cannot be read or is plain text.
    """
    if output_dir is None and str(path).startswith("hf://"):
        raise ValueError(f"{path}: is on the hub; set --output_dir for the results")
    file, *others = find_data_files(path)
    if others:
        raise ValueError(f"{path}: {1 + len(others)} files; curation takes one at a time")
    if not file.stat().st_size:
        raise ValueError(
            f"{file}: contains no tasks (a run that kept none leaves an empty file); use --data for another file"
        )
    conversations = read_records(file)
    entries = []
    for _, record in read_values(file):
        instances = isinstance(record, dict) and "messages" not in record and record.get("instances")
        # A seed task has one conversation per instance. Raises ValueError if the record is invalid.
        record_conversations = list(islice(conversations, len(instances) if instances else 1))
        if record_conversations[0].messages[0]["role"] == "text":
            raise ValueError(f"{record_conversations[0].source}: plain text, expected a question and its answer")
        entries.append(make_entry(record, record_conversations))
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
    """Writes both files and prints the counts."""
    dropped = {drop.entry_index for drop in drops}
    kept = [to_json_line(entry.record) for index, entry in enumerate(entries) if index not in dropped]
    kept_file, dropped_file = (base.with_name(f"{base.name}.{name}.jsonl") for name in (mode, f"{mode}.dropped"))
    drop_lines = []
    for drop in drops:
        values = drop._asdict()
        entry = entries[values.pop("entry_index")]
        drop_lines.append(to_json_line({"source": entry.source, "instruction": entry.instruction, **values}))
    with writing_to(base.parent, "--output_dir"):
        for file, lines in (kept_file, kept), (dropped_file, drop_lines):
            with whole_file(file) as temporary:
                # A lone surrogate, which JSON can escape and UTF-8 cannot encode, is written as \ud83d again.
                temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    print0(f"{kept_file}: {len(kept):,} of {len(entries):,} records kept; dropped records and reasons: {dropped_file}")
    for name in reasons:
        sources = [entries[drop.entry_index].source for drop in drops if drop.reason == name]
        examples = ", ".join(sources[:MAX_SOURCES]) + (", ..." if len(sources) > MAX_SOURCES else "")
        print0(f"  {name:16} {len(sources):8,}  {examples}".rstrip())
    return Curated(len(kept), len(dropped), dict(Counter(drop.reason for drop in drops)))


def to_json_line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=str) + "\n"  # default=str: dates from parquet
