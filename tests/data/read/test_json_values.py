"""The streaming JSON reader: the values of json.loads, with line numbers, for every layout."""

import io
import json
import random
import time
from pathlib import Path

import pytest

from minigpt.data.read import json_values as module
from minigpt.data.read.json_values import json_values

PATH = Path("data.json")
SKIP = "(inside an array or object a syntax error cannot be skipped: correct it, or write one record per line)"


def values(text):
    return list(json_values(PATH, io.StringIO(text, newline="\n")))


def values_and_error(text):
    """The values before the error, and the error message."""
    before = []
    with pytest.raises(ValueError) as error:
        for value in json_values(PATH, io.StringIO(text, newline="\n")):
            before.append(value)
    return before, str(error.value)


def test_worked_example():
    assert values('[\n  {"text": "a"},\n  {"text": "b"}\n]') == [(2, {"text": "a"}), (3, {"text": "b"})]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\r\n\t", []),
        ("[]", []),
        ("[ \n ]\n", []),
        ("{}", [(1, {})]),
        ('{"a": 1}', [(1, {"a": 1})]),
        ('{"a": 1}\n', [(1, {"a": 1})]),
        ('\n\n{"a": 1}\r\n\r\n{"a": 2}\r\n', [(3, {"a": 1}), (5, {"a": 2})]),
        ('{"a": "x\u2028y\u0085z"}\n{"a": 2}', [(1, {"a": "x\u2028y\u0085z"}), (2, {"a": 2})]),
        ('{\n"a": 1,\n"b": [\n2]}', [(1, {"a": 1, "b": [2]})]),
        ('{"a":\n1}\n{"b":\n2}', [(1, {"a": 1}), (3, {"b": 2})]),
        ("[1, -2.5e3,\n true,\n\n null]", [(1, 1), (1, -2500.0), (2, True), (4, None)]),
        ('[[{"a": 1}]]', [(1, [{"a": 1}])]),
    ],
)
def test_layouts(text, expected):
    assert values(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"type": "t", "instances": [{"a": 1}, {"a": 2}]}', [(1, {"a": 1}), (1, {"a": 2})]),
        ('{"type": "t",\n"instances": [\n{"a": 1},\n{"a": 2}\n]}', [(3, {"a": 1}), (4, {"a": 2})]),
        ('{\n"instances": [\n{"a": 1}\n],\n"type": "t"}', [(3, {"a": 1})]),
        ('{\n"instances": [\n{"a": 1}\n]}', [(3, {"a": 1})]),
        ('{\n"type": "t",\n"instances": {}}', [(1, {"type": "t", "instances": {}})]),
        ('{"instances": [{"a": 1}]}\n{"instances": [{"a": 2}]}', [(1, {"a": 1}), (2, {"a": 2})]),
        ('[{"instances": [{"a": 1}]},\n{"type": "t", "instances": [{"a": 2}]}]', [(1, {"a": 1}), (2, {"a": 2})]),
        (
            '{"instances": [{"a": 1}], "instruction": "i"}',
            [(1, {"instances": [{"a": 1}], "instruction": "i"})],
        ),
        (
            '{\n"instruction": "i",\n"instances": [{"a": 1}]}',
            [(1, {"instruction": "i", "instances": [{"a": 1}]})],
        ),
    ],
)
def test_a_dataset_yields_its_instances_and_a_seed_task_itself(text, expected):
    assert values(text) == expected


def test_a_seed_task_with_instances_before_the_instruction_is_an_error():
    """Its instances are streamed before the "instruction" is read, and would lack it."""
    _, error = values_and_error('{\n"id": 1,\n"instances": [\n{"output": "a"}],\n"instruction": "i"}')
    assert error == (
        'data.json:3: "instances" belongs to a dataset, which has a "type", or to a seed task, which has its '
        '"instruction" before them; found "id", "instruction"'
    )


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_any_chunk_size_gives_the_values_of_json_loads(monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    rng = random.Random(chunk)

    def value(depth):
        kind = rng.randrange(8 if depth else 6)
        if kind < 4:
            return [None, True, rng.uniform(-1e9, 1e-9), rng.randrange(-(10**20), 10**20)][kind]
        if kind < 6:
            return "".join(
                rng.choice('ab"\\/\n\t {}[],:\u00e9\u4e2d\u2028\U0001f600') for _ in range(rng.randrange(40))
            )
        if kind == 6:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return {f"k{i}": value(depth - 1) for i in range(rng.randrange(4))}

    for _ in range(300):
        rows = [{"row": i, "value": value(3)} for i in range(rng.randrange(1, 6))]
        ascii_only = rng.random() < 0.5
        array = json.dumps(rows, indent=rng.choice([None, 1]), ensure_ascii=ascii_only)
        assert values(array) == [(line_of(array, i), row) for i, row in enumerate(rows)]
        lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
        assert values(lines) == list(enumerate(rows, 1))
        objects = "".join(json.dumps(row, indent=2, ensure_ascii=ascii_only) + "\n" for row in rows)
        assert [row for _, row in values(objects)] == rows
        dataset = json.dumps({"type": "t", "more": value(2), "instances": rows}, indent=1, ensure_ascii=ascii_only)
        assert [row for _, row in values(dataset)] == rows


def line_of(array, row):
    return array[: array.index(f'"row": {row},')].rpartition("{")[0].count("\n") + 1


def test_a_bad_line_is_yielded_as_an_error_and_reading_continues():
    good = '{"a": 1}'
    bad = ['{"a" 1}', '{"a": ', '{"a": "x', '{"a": "x\\', '{"a": tr', "x", f"{good},", "{'a': 1}", '{"a": \udce9}']
    pairs = values("\n".join([good, *bad, good, '{"a": "cut']))
    assert (pairs[0], pairs[-2]) == ((1, {"a": 1}), (11, {"a": 1}))
    truncated = "the line ends in the middle of a record (column {}): a record must be on one line"
    assert [(line, str(error)) for line, error in pairs[1:-2] + pairs[-1:]] == [
        (2, "not valid JSON at column 6, near '1}': Expecting ':' delimiter"),
        (3, truncated.format(5)),
        (4, truncated.format(8)),
        (5, truncated.format(9)),
        (6, truncated.format(8)),
        (7, "not valid JSON at column 1, near 'x': Expecting value"),
        (8, "not valid JSON at column 9, near ',': Extra data"),
        (9, "not valid JSON at column 2, near \"'a': 1}\": Expecting property name enclosed in double quotes"),
        (10, "not valid JSON at column 7, near b'\\xe9}': Expecting value"),
        (
            12,
            "the last line is truncated (column 10): the file was not written completely; "
            "delete the line, or write the file again",
        ),
    ]
    assert all(isinstance(error, ValueError) for _, error in pairs[1:-2])


@pytest.mark.parametrize("first", ['{"a" 1}', '{"a": "x', "{'a': 1}", '{"a": 1},'])
def test_a_bad_first_line_can_be_skipped(first):
    (line, error), *rest = values(f'{first}\n{{"a": 2}}\n')
    assert (line, type(error), rest) == (1, ValueError, [(2, {"a": 2})])


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("3", 0, "1: not JSON: it begins with '3', expected { or [ (raw text is read from .txt files)"),
        (
            "instruction,output\nQ,A\n",
            0,
            "1: not JSON: it begins with 'instruction,output', expected { or [ (raw text is read from .txt files)",
        ),
        (
            "\udc89\udcfe PNG",
            0,
            "1: not JSON: it begins with b'\\x89\\xfe PNG', expected { or [ (raw text is read from .txt files)",
        ),
        (
            '[{"a": 1}\n {"a": 2}]',
            1,
            f"2: not valid JSON at column 2, near '{{\"a\": 2}}]': Expecting ',' delimiter {SKIP}",
        ),
        ('[{"a": 1},\n {"a" 2}]', 1, f"2: not valid JSON at column 7, near '2}}]': Expecting ':' delimiter {SKIP}"),
        ("[1, 'a']", 1, f"1: not valid JSON at column 5, near \"'a']\": Expecting value {SKIP}"),
        ("[1] x", 1, f"1: not valid JSON at column 5, near 'x': Extra data {SKIP}"),
        (
            '{"a":\n1,\n2}',
            0,
            f"3: not valid JSON at column 1, near '2}}': Expecting property name enclosed in double quotes {SKIP}",
        ),
        ('{"a"\n=1}', 0, f"2: not valid JSON at column 1, near '=1}}': Expecting ':' delimiter {SKIP}"),
        ("[", 0, "1: the file is truncated: write or fetch it again"),
        ('[{"a": 1}', 1, "1: the file is truncated: write or fetch it again"),
        ('[{"a": 1},\n', 1, "2: the file is truncated: write or fetch it again"),
        (
            '[1,\n{"a": {\n"b": "x',
            1,
            "3: the file is truncated inside the value that starts at line 2: write or fetch it again",
        ),
        ('{"instances": [\n{"a": 1},\n{"a": 2}', 2, "3: the file is truncated: write or fetch it again"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_errors_name_line_column_and_fix(monkeypatch, text, count, message, chunk):
    before, error = values_and_error(text)
    assert (len(before), error) == (count, f"data.json:{message}")
    if text[:1] in ("[", "{"):  # otherwise the error quotes the first chunk, so its size matters
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert values_and_error(text) == (before, error)


def test_a_missing_bracket_is_an_error_before_memory_runs_out(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 10)
    monkeypatch.setattr(module, "_LONGEST", 1000)
    before, error = values_and_error('[1,\n{"messages": [' + '{"a": 1},\n' * 500)
    assert before == [(1, 1)]
    assert error == (
        "data.json:2: a record of more than 1,000 characters starts here: a bracket is missing, or the records are "
        'under a key other than "instances"'
    )


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_one_bad_record_among_a_million(layout):
    """The error names its line, and the time is linear in the size of the file, not quadratic."""
    good, bad, half = '{"a": "b"}', '{"a" "b"}', 500_000
    separator = "\n" if layout == "lines" else ",\n"
    text = separator.join([*[good] * half, bad, *[good] * half])
    start = time.perf_counter()
    if layout == "lines":
        errors = [(line, str(value)) for line, value in json_values(PATH, io.StringIO(text)) if type(value) is not dict]
        assert errors == [(half + 1, "not valid JSON at column 6, near '\"b\"}': Expecting ':' delimiter")]
    else:
        count = 0
        with pytest.raises(ValueError, match=f"^data.json:{half + 1}: not valid JSON at column 6, "):
            for _ in json_values(PATH, io.StringIO(f"[{text}]")):
                count += 1
        assert count == half
    assert time.perf_counter() - start < 60  # about 1 s
