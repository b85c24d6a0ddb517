r"""Prompt templates: the only place that defines trigger words such as "### Instruction:".

A template renders a conversation as segments of text, each supervised (the model learns to write it) or not. Training,
chat, evaluation and self-instruct all render with it, so prompts at inference are exactly those of training.

Each segment is tokenized separately. All text between two answers is one segment, and the space between a trigger and
its answer belongs to the answer, so byte-pair merges at the boundary are the same in training and at inference.
Tokenizing the concatenated text instead was a bug of stanford_alpaca (fixed in its pull request 229).

Sources: alpaca is tatsu-lab/stanford_alpaca's prompt with a newline before the answer (LLMs-from-scratch, chapter 7);
hugchat is from HugNLP/HugChat; io and iio are from ArmelRandy/Self-instruct.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from minigpt.data.tokenizer import END_OF_TEXT
from minigpt.files import read_json, whole_file
from minigpt.hub import resolve_file

TEMPLATE_FILE = "prompt_template.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

Message = Mapping[str, str]


class Segment(NamedTuple):
    """A piece of a rendered conversation, tokenized separately."""

    text: str
    supervised: bool
    special: bool = False
    """`text` is the name of a special token, not ordinary text."""


@dataclass(frozen=True)
class Template:
    """How a conversation is rendered as text. Data, not code: all fields are saved in `prompt_template.json`.

    The patterns are format strings. Their placeholders are trigger words (`{instruction}`, `{input}`, `{output}`,
    `{human}`, `{assistant}`), `{content}` for a message's content, and `{context}` for the input of a user message.
    A literal brace is doubled.
    """

    name: str
    user: str
    """Pattern of a user message, up to the beginning of the answer."""
    user_with_input: str
    """The same for a user message with an input."""
    answer: str = "{content}"
    preamble: str = ""
    """Text before the first turn of a conversation without a system message."""
    preamble_with_input: str = ""
    """The same if the first turn has an input."""
    system: str = "{content}\n\n"
    separator: str = "\n\n"
    """Text between an answer and the next user message."""
    triggers: dict[str, str] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    """Stop strings: they begin the next turn, so the answer ends before them."""
    supervise_prompt: bool = False

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Segment]:
        r"""Renders a conversation as segments.

        Each answer is followed by the end-of-text token, supervised, so that the model learns to stop.

        >>> hi = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
        >>> get_template("hugchat").render(hi)  # doctest: +NORMALIZE_WHITESPACE
        [Segment(text='Human: Hi \n HugChat:', supervised=False, special=False),
         Segment(text=' Hello.', supervised=True, special=False),
         Segment(text='<|endoftext|>', supervised=True, special=True)]

        Args:
            messages: an optional system message, then user and assistant alternating; or one message of role text.
            add_generation_prompt: end with the prompt for the last message, a user's, so that the model answers it.
                Otherwise a user message without an answer is left out, because there is nothing to learn from it.

        Raises:
            ValueError: the roles are not in this order, or there is no user message to answer.
        """
        segments: list[Segment] = []
        text = ""  # the prompt, collected until the next answer
        rest = list(messages)
        if len(rest) == 1 and rest[0]["role"] == "text":
            if add_generation_prompt:
                return [Segment(rest[0]["content"], supervised=True)]
            return [Segment(rest[0]["content"], supervised=True), Segment(END_OF_TEXT, True, special=True)]
        if rest and rest[0]["role"] == "system":
            text = self._write(self.system, rest.pop(0))
        elif rest:
            text = self._write(self.preamble_with_input if rest[0].get("input") else self.preamble, rest[0])
        for index, message in enumerate(rest):
            expected = ("user", "assistant")[index % 2]
            if message["role"] != expected:
                raise ValueError(f"turn {index + 1} has the role {message['role']!r}, expected {expected!r}")
            if expected == "user":
                text += self._write(self.separator, message) if index else ""
                text += self._write(self.user_with_input if message.get("input") else self.user, message)
            else:
                segments += [
                    Segment(text, self.supervise_prompt),
                    Segment(self._write(self.answer, message), supervised=True),
                    Segment(END_OF_TEXT, supervised=True, special=True),
                ]
                text = ""
        if add_generation_prompt:
            if not rest or rest[-1]["role"] != "user":
                raise ValueError("the last message must be a user's, because the model answers it")
            segments.append(Segment(text, self.supervise_prompt))
        return segments

    def read_answer(self, generated: str) -> str:
        """The answer in generated text: everything before the first stop string, stripped of white space."""
        ends = [generated.find(stop) for stop in self.stop_strings() if stop in generated]
        return generated[: min(ends, default=len(generated))].strip()

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings with the trigger words filled in."""
        return tuple(stop.format(**self.triggers) for stop in self.stop)

    def _write(self, pattern: str, message: Message) -> str:
        return pattern.format(**self.triggers, content=message["content"], context=message.get("input") or "")

    def with_triggers(self, **words: str | None) -> "Template":
        """A copy with other trigger words; None leaves a word unchanged."""
        changes = {name: word for name, word in words.items() if word is not None}
        if unknown := changes.keys() - self.triggers.keys():
            known = ", ".join(f"trigger_{name}" for name in self.triggers) or "no trigger words"
            raise ValueError(f"template {self.name} has no trigger_{min(unknown)}; it has {known}")
        return replace(self, triggers={**self.triggers, **changes})

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `prompt_template.json`, and an equivalent `chat_template.jinja` for other tools."""
        for name, text in {
            TEMPLATE_FILE: json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n",
            CHAT_TEMPLATE_FILE: self.to_jinja(),
        }.items():
            with whole_file(Path(folder) / name) as path:
                path.write_bytes(text.encode("utf-8"))

    def to_jinja(self) -> str:
        """An equivalent Hugging Face chat template. A user message's input is `message.input`."""
        first = self._choose("m.get('input')", self._jinja(self.preamble_with_input), self._jinja(self.preamble))
        user = self._choose("m.get('input')", self._jinja(self.user_with_input), self._jinja(self.user))
        return (
            "{%- for m in messages -%}"
            "{%- if m.role == 'text' -%}{{- m.content -}}{%- if not add_generation_prompt -%}"
            "{{- eos_token -}}{%- endif -%}"
            "{%- elif m.role == 'system' and (loop.length > 2 or add_generation_prompt) -%}"
            f"{self._jinja(self.system)}"
            "{%- elif m.role == 'user' -%}"
            "{%- if not loop.last or add_generation_prompt -%}"
            f"{{%- if loop.first -%}}{first}"
            f"{{%- elif loop.previtem.role == 'assistant' -%}}{self._jinja(self.separator)}{{%- endif -%}}"
            f"{user}{{%- endif -%}}"
            f"{{%- elif m.role == 'assistant' -%}}{self._jinja(self.answer)}{{{{- eos_token -}}}}"
            "{%- endif -%}{%- endfor -%}"
        )

    def _jinja(self, pattern: str) -> str:
        """`a {content} b` -> `{{- 'a ' ~ m.content ~ ' b' -}}`, with the trigger words filled in."""
        expressions = {"content": "\0m.content\0", "context": "\0(m.input or '')\0"}
        pieces = pattern.format(**self.triggers, **expressions).split("\0")  # text, expression, text, ...
        parts = [piece if index % 2 else _jinja_string(piece) for index, piece in enumerate(pieces) if piece]
        return "{{- " + " ~ ".join(parts) + " -}}" if parts else ""

    @staticmethod
    def _choose(condition: str, yes: str, no: str) -> str:
        return yes if yes == no else f"{{%- if {condition} -%}}{yes}{{%- else -%}}{no}{{%- endif -%}}"


def _jinja_string(text: str) -> str:
    for character, escape in {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r"}.items():
        text = text.replace(character, escape)
    return f"'{text}'"


_HEADINGS = {"instruction": "Instruction", "input": "Input", "output": "Response"}
_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request.\n\n"
_ALPACA = Template(
    name="alpaca",
    preamble=f"{_TASK}. {_REQUEST}",
    preamble_with_input=f"{_TASK}, paired with an input that provides further context. {_REQUEST}",
    user="### {instruction}:\n{content}\n\n### {output}:\n",
    user_with_input="### {instruction}:\n{content}\n\n### {input}:\n{context}\n\n### {output}:\n",
    triggers=_HEADINGS,
    stop=("### {instruction}:",),
)
_HUGCHAT = Template(
    name="hugchat",
    user="{human}: {content} \n {assistant}:",
    user_with_input="{human}: {content}\n{context} \n {assistant}:",
    answer=" {content}",
    separator=" \n\n ",
    triggers={"human": "Human", "assistant": "HugChat"},
    stop=("{human}:",),
)
_IIO = "### {instruction}:\n{content}\n\n### {input}:\n{context}\n\n### {output}:\n"
TEMPLATES = {
    template.name: template
    for template in (
        _ALPACA,
        replace(_ALPACA, name="alpaca-short", preamble_with_input=_ALPACA.preamble),
        _HUGCHAT,
        replace(_HUGCHAT, name="input-output", separator=" \n ", triggers={"human": "Input", "assistant": "Output"}),
        replace(
            _ALPACA,
            name="io",
            preamble="",
            preamble_with_input="",
            user="### {instruction}:\n{content}\n\n### {output}:\n",
            user_with_input="### {instruction}:\n{content}\n{context}\n\n### {output}:\n",
            triggers={"instruction": "Instruction", "output": "Output"},
        ),
        replace(
            _ALPACA,
            name="iio",
            preamble="",
            preamble_with_input="",
            user=_IIO,
            user_with_input=_IIO,
            triggers={**_HEADINGS, "output": "Output"},
        ),
        Template(
            name="none",
            user="{content}",
            user_with_input="{content}\n{context}",
            answer="\n{content}",
            separator="\n",
            supervise_prompt=True,
        ),
    )
}


def get_template(
    name_or_folder: str | Path,
    instruction: str | None = None,
    input: str | None = None,
    output: str | None = None,
    human: str | None = None,
    assistant: str | None = None,
) -> Template:
    """A built-in template by name, or the one saved with a model; trigger words are replaced if given.

    Args:
        name_or_folder: alpaca, alpaca-short, hugchat, input-output, io, iio or none; or a folder or hub id whose
            `prompt_template.json` is read.
        instruction, input, output, human, assistant: trigger words to replace.

    Raises:
        ValueError: no such template, a broken file, or a trigger word that the template does not have.
    """
    template = TEMPLATES.get(str(name_or_folder)) or _read(name_or_folder)
    return template.with_triggers(instruction=instruction, input=input, output=output, human=human, assistant=assistant)


def template_of(model: str | Path, revision: str | None = None, *, to_tune: bool = False) -> str | Path:
    """The default for `get_template`: the path of the model's own `prompt_template.json`, else "alpaca".

    With `to_tune` it is "alpaca" for a raw-text model too, because that model's template, none, has no turns to teach.
    """
    path = resolve_file(model, TEMPLATE_FILE, revision)
    if path is None or (to_tune and get_template(path).name == "none"):
        return "alpaca"
    return path


def _read(folder: str | Path) -> Template:
    path = Path(folder) if Path(folder).name == TEMPLATE_FILE else None
    if path is None and (Path(folder).is_dir() or "/" in str(folder)):  # a misspelt name must not query the hub
        with suppress(FileNotFoundError):
            path = resolve_file(folder, TEMPLATE_FILE)
    if path is None or not path.is_file():
        raise ValueError(
            f"no template {str(folder)!r}; one of {', '.join(TEMPLATES)}, or a folder with {TEMPLATE_FILE}"
        )
    values = read_json(path)
    sample = json.loads(json.dumps(asdict(_ALPACA)))
    if not {"name", "user", "user_with_input"} <= values.keys() <= sample.keys():
        raise ValueError(f"{path}: a template has the keys {', '.join(sample)}")
    for name, value in values.items():
        if type(value) is not type(sample[name]):
            raise ValueError(f"{path}: {name} is {json.dumps(value)}, expected a value like {json.dumps(sample[name])}")
    template = Template(**{**values, "stop": tuple(values.get("stop", ()))})
    try:  # format every pattern, so that a broken one is reported here and not in the middle of a run
        template.to_jinja()
        template.stop_strings()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        known = ", ".join(["content", "context", *template.triggers])
        raise ValueError(
            f"{path}: {error!r}: the placeholders of a pattern are {known}; a literal brace is doubled"
        ) from error
    return template
