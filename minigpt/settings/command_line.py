"""Flags, YAML files and `--help` from one flat dataclass per script.

A field's name is the flag and the YAML key, its type determines the accepted values, its default is shown, and the
docstring under it is the help text (after litgpt's `litgpt/args.py`).

    @dataclass
    class SFTConfig(TrainConfig, PromptArguments):
        '''Instruction-tune a GPT-2.'''

        data: list[str] = field(default_factory=list)
        '''Instruction data: files, folders, globs.'''

    def main(config: SFTConfig) -> None: ...

    if __name__ == "__main__":
        run(main, SFTConfig)

tyro (https://brentyi.github.io/tyro) splits the command line and formats the help. It returns every value as text, and
YAML is read as text too, so that one function, `convert`, validates both and their errors have the same form.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import tyro
import yaml

from minigpt.distributed import OtherRankFailed, OutOfMemory, is_main, is_out_of_memory, rank, world_size
from minigpt.files import whole_file
from minigpt.hardware import set_thread_waiting
from minigpt.version import __version__

T = TypeVar("T")


def run(main: Callable[[T], None], config_class: type[T]) -> None:
    """Parses the command line and calls `main(config)`. Errors are one line; `--debug` shows the traceback.

    Exit codes: 0 success, 1 `main` failed, 2 invalid command line or YAML file, 75 interrupted and saved, 130 Ctrl-C.
    """
    set_thread_waiting()
    code: int | str | None = 2
    try:
        try:
            config = parse(config_class)
            code = 1
            main(config)
            code = None
        finally:
            sys.stdout.flush()  # raises BrokenPipeError here, not at interpreter shutdown
    except SystemExit as leaving:
        code = leaving.code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debugging():
            raise
        where = "" if is_main() else f"rank {rank()}: "
        print(f"{where}error: {in_one_line(error)}", file=sys.stderr)
    if world_size() > 1 and not isinstance(code, str):
        # Skip interpreter shutdown: threads of torch's process groups may still run, and one that wakes up during
        # shutdown aborts the process (seen in one ZeRO-3 run of fifty).
        sys.stderr.flush()
        os._exit(code or 0)
    if code is not None:
        sys.exit(code)


def debugging() -> bool:
    """Whether to show tracebacks. Read from sys.argv, because it also applies to errors in parsing the flags."""
    return "--debug" in sys.argv[1:]


def in_one_line(error: Exception) -> str:
    """The error as one line; an unexpected type of error includes its name."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.filename}: {error.strerror}"
    if isinstance(error, OutOfMemory):
        return message
    if is_out_of_memory(error):
        wanted = re.search(r"ried to allocate ([\d.]+ \w+)", message)
        asked = f" (tried to allocate {wanted[1]})" if wanted else ""
        return f"out of memory{asked}: use a smaller model, smaller batches or shorter texts"
    if isinstance(error, RuntimeError) and ("gloo" in message or "NCCL" in message):
        return "another rank exited; see its error message, if any (resume training with --resume auto)"
    if message and isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, OtherRankFailed)):
        return message
    return f"{type(error).__name__}: {message or 'no message'} (--debug shows the traceback)"


def parse(config_class: type[T], argv: Sequence[str] | None = None) -> T:
    """The configuration: flags override `--config FILE`, which overrides the defaults, in any order on the line.

    Raises `ValueError` in one line (which flag or line of the file, what was expected), `OSError` if the file cannot
    be read, and `SystemExit(0)` after `--help` and `--version`.
    """
    hints = get_type_hints(config_class)
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--local_rank", "--local-rank")  # added by deepspeed; LOCAL_RANK in the environment is used
    argv = launcher.parse_known_args(argv)[1]
    if os.environ.get("NO_COLOR"):  # https://no-color.org
        tyro._experimental_options["ansi_codes"] = False
    found, unknown = tyro.cli(
        _form(config_class, hints),
        default={"debug": False, "version": False},
        prog=Path(sys.argv[0]).name,
        description=inspect.getdoc(config_class),
        args=argv,
        return_unknown_args=True,
        use_underscores=True,
    )
    if found["version"]:
        print(f"minigpt {__version__}")
        raise SystemExit(0)
    known = [*hints, "config", "debug", "version"]
    if unknown and unknown[0].startswith("-"):
        flag = unknown[0].split("=")[0]
        raise ValueError(f"unknown flag {flag}{_nearest(flag.lstrip('-').replace('-', '_'), known, '--')}")
    if unknown:
        raise ValueError(f"unexpected argument {unknown[0]!r} (write --flag VALUE; a switch takes no value)")

    flags = {name: value for group in found.values() if isinstance(group, dict) for name, value in group.items()}
    values = _read_yaml(Path(_from_words("config", found["config"], str)), hints) if "config" in found else {}
    alternatives = getattr(config_class, "ALTERNATIVES", ())
    if not flags.keys().isdisjoint(alternatives):
        values = {name: value for name, value in values.items() if name not in alternatives}
    for name, words in flags.items():
        values[name] = words if isinstance(words, bool) else _from_words(name, words, hints[name])
    config = config_class(**values)
    vars(config)["_given"] = set(values)  # not a field, so that equality and save_yaml ignore it
    return config


def is_given(config: Any, name: str) -> bool:
    """Whether a flag or the YAML file set this field; for a config built in Python, whether it is not the default."""
    if "_given" in vars(config):
        return name in vars(config)["_given"]
    return any(field.name == name and getattr(config, name) != _default(field) for field in dataclasses.fields(config))


def save_yaml(config: Any, path: Path) -> None:
    """Writes every field as YAML, in the order of `--help`; `--config` with the file gives an equal configuration."""
    values = {name: getattr(config, name) for names in _groups(type(config)).values() for name in names}
    with whole_file(path) as temporary:
        text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100_000)
        temporary.write_text(text, encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Writes line breaks as `\\n` in double quotes; YAML's folding is harder to read and would change a NEL."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if text.splitlines() not in ([], [text]) else None
    ),
)


def convert(value: str | list | None, hint: Any) -> Any:
    """Converts a value as written (text, a list of texts, or None for null or empty) to the type `hint`.

    >>> convert("1e-4", float), convert("a.json", list[str]), convert(None, int | None)
    (0.0001, ['a.json'], None)

    Raises `ValueError`: "expected a number, got 'abc'".
    """
    if value is None and NoneType in get_args(hint):
        return None
    kind = _kind(hint)
    if kind.item is not None and value is not None:
        return [convert(item, kind.item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, str):
        with contextlib.suppress(KeyError, ValueError):
            return kind.read(value)
    raise ValueError(f"expected {kind.expected}, got {repr(value) if value else 'nothing'}")


class _Kind(NamedTuple):
    """A type of field: its names in the help and in errors, its parser, and the item type of a list."""

    metavar: str
    expected: str
    read: Callable[[str], Any]
    item: Any = None


_YAML_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_KINDS = {
    bool: _Kind("", "true or false", lambda text: _YAML_BOOLEANS[text.lower()]),
    int: _Kind("INT", "a whole number", int),
    float: _Kind("FLOAT", "a number", lambda text: float(text.replace(".inf", "inf"))),  # YAML writes .inf
    str: _Kind("STR", "text", str),
}


def _kind(hint: Any) -> _Kind:
    """The kind of `int`, `int | None`, `list[int]`, `Literal["a", "b"]`, ..."""
    arguments = get_args(hint)
    if NoneType in arguments:  # X | None
        return _kind(next(argument for argument in arguments if argument is not NoneType))
    if get_origin(hint) is list:
        return _Kind(f"{_kind(arguments[0]).metavar} ...", "a list", str, item=arguments[0])
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in arguments}
        return _Kind(f"{{{','.join(choices)}}}", f"one of {', '.join(choices)}", choices.__getitem__)
    return _KINDS[hint]


def _from_words(name: str, words: list[str], hint: Any) -> Any:
    """The value of a flag, from the words that follow it. The word None unsets an optional field."""
    value: str | list | None = words[0] if len(words) == 1 else words
    if value == "None" and NoneType in get_args(hint):
        value = None
    try:
        return convert(value, hint)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from None


def _read_yaml(path: Path, hints: dict[str, Any]) -> dict[str, Any]:
    """The fields that a YAML file sets.

    Scalars are read as text and converted by the field's type, because YAML 1.1 reads `1e-4` as text, `no` as False,
    `010` as 8 and `2024-01-01` as a date.
    """
    try:
        text = path.read_bytes().decode("utf-8")  # PyYAML removes a byte order mark itself
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text, so not YAML") from None
    try:
        root = yaml.SafeLoader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{path}:{line}: not YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {error.problem}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}:{root.start_mark.line + 1}: expected lines such as learning_rate: 1e-4")

    values: dict[str, Any] = {}
    for key, node in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "[...]"
        where = f"{path}:{key.start_mark.line + 1}"
        if name not in hints:
            raise ValueError(f"{where}: unknown key {name}{_nearest(name, hints)}")
        if name in values:
            raise ValueError(f"{where}: duplicate key {name}")
        try:
            values[name] = convert(_as_written(node), hints[name])
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from None
    return values


def _as_written(node: yaml.Node) -> str | list | None:
    if isinstance(node, yaml.SequenceNode):
        return [_as_written(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        raise ValueError("expected a value or a list, got a mapping")
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=1) or [known for known in names if name in known][:3]
    return f" (did you mean {' or '.join(prefix + known for known in close)}?)" if close else " (see --help)"


def _groups(config_class: type) -> dict[type, list[str]]:
    """The names of the fields by the class that declares them: the script's own class first, then its bases."""
    owners: dict[str, type] = {}
    for cls in reversed(config_class.__mro__):
        for name in inspect.get_annotations(cls):
            owners.setdefault(name, cls)
    return {cls: names for cls in config_class.__mro__ if (names := [name for name in owners if owners[name] is cls])}


def _form(config_class: Any, hints: dict[str, Any]) -> Any:
    """The type that tyro parses: the words after each given flag, with one box of the help per class."""
    switch = tyro.conf.FlagCreatePairsOff[bool]
    form: dict[str, Any] = {
        "config": _flag(list[str], "YAML file of settings, such as a run's config.yaml; flags override it.", "FILE"),
        "debug": _flag(switch, "Show the traceback of an error."),
        "version": _flag(switch, "Show the version and exit."),
    }
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    helps = {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for cls in reversed(config_class.__mro__[:-1])
        for parameter in docstring_parser.parse_from_object(cls).params
    }
    for cls, names in _groups(config_class).items():
        flags = {
            name: _flag(
                bool if hints[name] is bool else list[str],
                helps.get(name),
                _kind(hints[name]).metavar or None,
                f"(default: {_shown(fields[name])})",
            )
            for name in names
        }
        title = cls.__name__.removesuffix("Config").removesuffix("Arguments").lower()
        box = TypedDict(title, flags, total=False)  # type: ignore[misc]  # mypy requires literal fields
        box.__doc__ = None if cls is config_class else inspect.getdoc(cls)
        form[title] = tyro.conf.OmitArgPrefixes[box]
    return TypedDict("Form", form, total=False)  # type: ignore[operator]


def _flag(kind: Any, text: str | None, metavar: str | None = None, default: str = "") -> Any:
    return Annotated[kind, tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=default)]


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(field: dataclasses.Field) -> str:
    value = _default(field)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return "unset" if value in (None, "") else str(value)
