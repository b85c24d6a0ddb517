"""Reading and splitting the data of a script's flags: each example and token is in exactly one split."""

import json

import pytest

from minigpt.data.encode import Encoding
from minigpt.data.prompts import get_template
from minigpt.data.splits import read_conversations, read_text, split_conversations, split_text
from minigpt.data.store import split
from minigpt.data.tokenizer import Tokenizer
from minigpt.settings.groups import DataArguments

TOKENIZER = Tokenizer.tiny()
ENCODING = Encoding(get_template("io"), TOKENIZER, 64)


@pytest.fixture
def flags(tmp_path):
    """`flags(...)`: DataArguments with its own cache, and a data file of 20 good records and a bad one."""
    lines = [json.dumps({"instruction": f"Say {number}.", "output": str(number)}) for number in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, "3"]))
    (tmp_path / "held.jsonl").write_text(lines[0])
    (tmp_path / "a.txt").write_text("The king of the castle.\n" * 40)
    (tmp_path / "b.txt").write_text("A queen.")

    def make(data, validation_data=(), **settings):
        paths = ([str(tmp_path / name) for name in names] for names in (data, validation_data))
        return DataArguments(*paths, cache_dir=str(tmp_path / "cache"), **settings)

    return make


def answers(examples):
    """The number that each example's answer contains."""
    if examples is None:
        return None
    ids = [[id for id, supervised in zip(example.ids, example.supervised) if supervised] for example in examples]
    return [int(TOKENIZER.decode(answer[:-1])) for answer in ids]


def test_split_conversations(flags):
    config = flags(["data.jsonl"], skip_bad_records=1, validation_split=0.25)
    training, validation = split_conversations(config, ENCODING, seed=3)
    assert (len(training), len(validation)) == (15, 5)
    assert sorted(answers(training) + answers(validation)) == list(range(20))
    expected = split(read_conversations(config, config.data, ENCODING), 0.25, 3)
    assert [answers(part) for part in expected] == [answers(training), answers(validation)]

    config = flags(["data.jsonl"], ["held.jsonl"], skip_bad_records=1, validation_split=0.25)
    assert [answers(part) for part in split_conversations(config, ENCODING, seed=3)] == [list(range(20)), [0]]
    config = flags(["data.jsonl"], skip_bad_records=1, validation_split=0.0)
    assert [answers(part) for part in split_conversations(config, ENCODING, seed=3)] == [list(range(20)), None]


def test_split_text(flags):
    config = flags(["a.txt", "b.txt"], validation_split=0.25)
    store = read_text(config, config.data, TOKENIZER)
    tokens = store.ids.tolist()
    cut = len(tokens) - round(len(tokens) * 0.25)
    training, validation = split_text(config, TOKENIZER, 8, stride=4)
    assert (training.ids.tolist(), validation.ids.tolist()) == (tokens[:cut], tokens[cut:])
    assert [(part.block_size, part.stride) for part in (training, validation)] == [(8, 4), (8, 8)]

    training, validation = split_text(flags(["a.txt", "b.txt"], ["b.txt"]), TOKENIZER, 8)
    assert (training.ids.tolist(), validation.ids.tolist()) == (
        tokens,
        [*TOKENIZER.encode("A queen."), TOKENIZER.eot_id],
    )
    training, validation = split_text(flags(["a.txt", "b.txt"], validation_split=0.0), TOKENIZER, 8)
    assert (training.ids.tolist(), validation) == (tokens, None)
    assert len(split_text(flags(["a.txt"], validation_split=0.001), TOKENIZER, 8)[1]) == 1  # at least one block


def test_reading_prints_the_statistics(flags, capsys):
    config = flags(["data.jsonl", "held.jsonl"], skip_bad_records=1)
    store = read_conversations(config, config.data, ENCODING)
    assert capsys.readouterr().out == f"{' '.join(config.data)}: {store.stats}\n"
    assert store.stats.bad_records == 1
    with pytest.raises(ValueError, match="data.jsonl:21: "):
        read_conversations(flags(["data.jsonl"]), config.data, ENCODING)

    config = flags(["a.txt", "b.txt"])
    tokens = read_text(config, config.data, TOKENIZER).stats.tokens
    assert capsys.readouterr().out == f"{' '.join(config.data)}: 2 documents, {tokens:,} tokens; 0 bad records\n"
