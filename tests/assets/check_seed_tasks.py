"""Checks that the seed pool's code does what it says, by running it: Python, SQL, shell, git, JavaScript, HTML.

    python tests/assets/check_seed_tasks.py

To be run after each change of seed_tasks.jsonl. It needs bash, git and node, takes seconds, and at success notes in
seed_tasks.checked which content it checked; a test fails for any other. The pool's code runs with your rights.
"""

import ast
import contextlib
import hashlib
import io
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

PATH = Path(__file__).parents[2] / "minigpt" / "assets" / "seed_tasks.jsonl"
STAMP = Path(__file__).with_name("seed_tasks.checked")
TOOLS = ("bash", "git", "node")
ROWS = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]
BY_NAME = {row["name"]: row for row in ROWS}


def output(name: str) -> str:
    return BY_NAME[name]["instances"][0]["output"]


def given(name: str) -> str:
    return BY_NAME[name]["instances"][0]["input"]


@contextlib.contextmanager
def raises(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


# ---- Python: every answer runs

CALLS = {  # name: what is evaluated after the answer has run, and what it comes to
    "reverse_words": ("reverse_words('to be  or not')", "not or be to"),
    "palindrome": (
        "[is_palindrome(t) for t in ('Never odd or even!', 'A1a', 'ab', '')]",
        [True, True, False, True],
    ),
    "count_words": ("count_words('To be or not to be')", {"to": 2, "be": 2, "or": 1, "not": 1}),
    "comprehension": ("squares", [1, 9, 25, 49, 81]),
    "mutable_default": ("[add(1), add(2), add(3, [0])]", [[1], [2], [0, 3]]),
    "last_elements": ("[last([1, 2, 3], n) for n in (0, 1, 3, 5)]", [[], [3], [1, 2, 3], [1, 2, 3]]),
    "merge_counts": ("merge({'a': 1, 'b': 2}, {'b': 3, 'c': 4})", {"a": 1, "b": 5, "c": 4}),
    "dataclass": ("Book('Emma', 'Jane Austen', 1815).year", 1815),
    "parse_csv": (r"parse_csv('a,b\n1,\"x, y\"\n')", [{"a": "1", "b": "x, y"}]),
    "type_hints": ("repeat('a', 2)", ["a", "a"]),
    "fibonacci": ("list(fibonacci(14))", [0, 1, 1, 2, 3, 5, 8, 13]),
    "safe_int": ("[to_int('12'), to_int('1.5'), to_int('')]", [12, None, None]),
    "flatten": ("flatten([[1], [], [2, 3]])", [1, 2, 3]),
    "binary_search": ("[binary_search([1, 3, 5, 7], n) for n in (1, 7, 4, 9, 0)]", [0, 3, -1, -1, -1]),
    "prime": ("[n for n in range(-2, 30) if is_prime(n)]", [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]),
    "sort_pairs": ("pairs", [("rice", 7), ("tea", 3), ("milk", 1)]),
    "docstring": ("(area(2, 3), area.__doc__)", (6, "Return the area of a rectangle.")),
    "decorator": ("(f := counted(len))('ab') + f('c') + f.calls", 5),
    "transpose": ("transpose([[1, 2, 3], [4, 5, 6]])", [[1, 4], [2, 5], [3, 6]]),
    "gcd": ("[gcd(12, 18), gcd(7, 5), gcd(4, 4)]", [6, 1, 4]),
    "days_between": ("days_between('2024-02-28', '2024-03-01')", 2),
    "simplify_condition": ("[is_adult(age) for age in (17, 18, 19)]", [False, True, True]),
}
PRINTED = {"fizzbuzz": "1 2 Fizz 4 Buzz Fizz 7 8 Fizz Buzz 11 Fizz 13 14 FizzBuzz"}
TESTS = {"tests"}  # needs its input, and is called


def check_that_python_answers_do_what_was_asked() -> None:
    for name, (call, expected) in CALLS.items():
        space: dict[str, Any] = {}
        exec(output(f"code_python_{name}"), space)
        assert eval(call, space) == expected, name


def check_that_python_answers_print_what_was_asked() -> None:
    for name, expected in PRINTED.items():
        assert printed(output(f"code_python_{name}")).split() == expected.split(), name


def printed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(code, {})
    return text.getvalue()


def check_the_broken_inputs_are_broken_as_they_say() -> None:
    space: dict[str, Any] = {}
    exec(given("code_python_mutable_default") + "\n" + given("code_python_last_elements"), space)
    assert [space["add"](1), space["add"](2)][1] == [1, 2]
    assert space["last"]([1, 2, 3], 0) == [1, 2, 3]
    exec(given("code_python_comprehension") + "\nbefore = squares\n" + output("code_python_comprehension"), space)
    assert space["before"] == space["squares"]
    with raises(json.JSONDecodeError):
        json.loads(given("code_json_repair"))


def check_the_written_tests_pass_and_catch_a_bug() -> None:
    space: dict[str, Any] = {}
    exec(given("code_python_tests") + "\n" + output("code_python_tests"), space)
    tests = [value for key, value in space.items() if key.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    space["clamp"] = lambda x, low, high: max(low, x)
    with raises(AssertionError):
        for test in tests:
            test()


def check_snippets_print_what_the_answers_say() -> None:
    for instance in BY_NAME["code_predict_output"]["instances"]:
        assert printed(instance["input"]).strip() == instance["output"]
    names: dict = {}
    exec(output("code_better_names"), names)
    assert names["speed_kmh"] == 80


# ---- other languages


def rows_of(sql: str, setup: str, query: str = "") -> list[tuple]:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(setup)
        found = database.execute(sql).fetchall()
        return database.execute(query).fetchall() if query else found


def check_sql_answers_run() -> None:
    staff = (
        "CREATE TABLE employees(name, department, salary); INSERT INTO employees VALUES "
        "('A', 'x', 10), ('B', 'x', 30), ('C', 'y', 50);"
    )
    assert rows_of(output("code_sql_average"), staff) == [("y", 50.0), ("x", 20.0)]
    shop = (
        "CREATE TABLE customers(id, name); CREATE TABLE orders(id, customer_id);"
        "INSERT INTO customers VALUES (1, 'Ann'), (2, 'Bob'); INSERT INTO orders VALUES (7, 1);"
    )
    assert rows_of(output("code_sql_no_orders"), shop) == [("Bob",)]
    tea = (
        "CREATE TABLE products(name, category, price); INSERT INTO products VALUES ('a', 'tea', 10), ('b', 'jam', 10);"
    )
    assert rows_of(output("code_sql_update"), tea, "SELECT round(price, 6) FROM products") == [(11.0,), (10.0,)]
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(output("code_sql_create"))
        database.execute("INSERT INTO members(name, email) VALUES ('Ann', 'a@example.com')")
        with raises(sqlite3.IntegrityError):
            database.execute("INSERT INTO members(name, email) VALUES ('Bob', 'a@example.com')")


def check_the_dangerous_query_is_dangerous_and_the_remedy_is_not() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript("CREATE TABLE users(name); INSERT INTO users VALUES ('Ann'), ('Bob');")
        space: dict[str, Any] = {"cursor": database.cursor(), "name": "' OR '1'='1"}
        assert space["name"] in output("code_sql_injection")
        assert len(eval(given("code_sql_injection"), space).fetchall()) == 2
        assert len(eval(output("code_sql_injection").splitlines()[-1], space).fetchall()) == 0


def check_regular_expressions_match_what_they_should() -> None:
    dates = {"2024-02-29": True, "1999-12-31": True, "2024-13-01": False, "2024-00-10": False, "24-01-01": False}
    assert {text: bool(re.match(output("code_regex_date"), text)) for text in dates} == dates
    words = {"Hello": True, "hello": False, "HeLlo": False, "H": False, "Two Words": False}
    assert {text: bool(re.match(given("code_regex_explain"), text)) for text in words} == words
    assert re.findall(output("code_regex_blanks"), "a b  c   d") == ["  ", "   "]


def check_shell_answers_run(folder: Path) -> None:
    for name, text in (
        ("notes.txt", "a\nb\nc\n"),
        ("letter.txt", "colour, colours\n"),
        ("x y.jpeg", ""),
        ("z.jpeg", ""),
    ):
        (folder / name).write_text(text)
    with open(folder / "large.bin", "wb") as large:
        large.truncate(11 * 1024 * 1024)

    def shell(name: str, text: str = "") -> str:
        command = ["bash", "-c", output(f"code_shell_{name}")]
        return subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, check=True).stdout

    assert shell("count_lines").strip() == "3"
    assert shell("replace") == "color, colors\n"
    assert shell("find_large") == "./large.bin\n"
    assert [line.split() for line in shell("top_words", "b\na\nb\nc\nc\nb\nd\nd\nc\nc\n").splitlines()] == [
        ["4", "c"],
        ["3", "b"],
        ["2", "d"],
    ]
    shell("rename")
    assert sorted(path.name for path in folder.glob("*.jp*g")) == ["x y.jpg", "z.jpg"]


def check_the_git_answer_keeps_the_changes(folder: Path) -> None:
    def git(*words: str) -> str:
        names = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        return subprocess.run(["git", *names, *words], cwd=folder, capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    for text in ("one", "two"):
        (folder / "a").write_text(text)
        git("add", "a")
        git("commit", "-q", "-m", text)
    subprocess.run(output("code_git_undo").split(), cwd=folder, capture_output=True, check=True)
    assert git("log", "--format=%s").split() == ["one"]
    assert (folder / "a").read_text() == "two"
    assert len(output("code_git_message").split()) <= 10


def check_data_answers_say_the_same_in_the_other_notation() -> None:
    assert json.loads(output("code_json_repair")) == ast.literal_eval(given("code_json_repair"))
    assert json.loads(output("code_yaml_to_json")) == yaml.safe_load(given("code_yaml_to_json"))


def check_javascript_answers_run() -> None:
    even = given("code_javascript_even") + output("code_javascript_even") + "console.log(JSON.stringify(even));"
    greet = output("code_javascript_translate") + "console.log(greet('Ada'));"
    said = subprocess.run(["node", "-e", even + greet], capture_output=True, text=True, check=True).stdout
    assert said == "[2,4]\nHello, Ada!\n"


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")


def check_html_answers_are_closed_and_complete() -> None:
    items: list = [("li", {}), "/li"] * 3
    assert Tags(output("code_html_list")).tags == [("ul", {}), *items, "/ul"]
    assert re.findall("<li>(.*)</li>", output("code_html_list")) == given("code_html_list").split(", ")
    (tag, attributes), end = Tags(output("code_html_link")).tags
    assert (tag, end, attributes["href"], attributes["target"]) == ("a", "/a", "https://example.com", "_blank")


# ---- general tasks whose answer can be computed


def check_sums_and_orders_are_right() -> None:
    assert 12 * 60 + 15 - (9 * 60 + 40) == 2 * 60 + 35 and "2 hours and 35 minutes" in output("general_train_journey")
    assert round(5 / 1.609344, 1) == 3.1 and "3.1" in output("general_kilometres")
    assert 80 * 0.85 == 68 and "68" in output("general_discount")
    numbers = [int(n) for n in given("general_sort_numbers").split(", ")]
    assert [int(n) for n in output("general_sort_numbers").split(", ")] == sorted(numbers, reverse=True)
    assert sorted(output("general_order_steps").splitlines()) == sorted(given("general_order_steps").splitlines())
    assert all(date in given("general_extract_dates") for date in output("general_extract_dates").splitlines())
    assert len(re.findall(r"(?:19|20)\d\d", given("general_extract_dates"))) == 3
    assert len(output("general_shorten_sentence").split()) <= 8


def main() -> None:
    """Runs every function named check_*, then writes the checked file's sha256. Raises AssertionError at a failure."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        sys.exit(f"error: the check needs {', '.join(missing)}: install it, or nothing is known of those answers")
    checks = {name: check for name, check in globals().items() if name.startswith("check_")}
    for name, check in checks.items():
        with TemporaryDirectory() as folder:
            check(*[Path(folder)] * len(signature(check).parameters))
        print(name.removeprefix("check_").replace("_", " "))
    STAMP.write_text(f"{hashlib.sha256(PATH.read_bytes()).hexdigest()}  {PATH.name}\n", encoding="utf-8")
    print(f"{len(ROWS)} seed tasks, {len(checks)} checks: all hold; {STAMP.name} notes it")


if __name__ == "__main__":
    main()
