r"""Renders the prompt that asks a model for tasks, and parses tasks from its completion.

A request is a numbered list of tasks that ends with an open slot, the next number; the model continues the list. The
layout is that of Stanford Alpaca's generate_instruction.py (iio) and of ArmelRandy/Self-instruct, which omits the Input
lines (io). The classification branch is from Self-Instruct (Wang et al. 2022, section 2.2): inputs generated before
their label are biased towards one label, so for a classification task the model generates the label first and then an
input that has it.

The parser tolerates badly formatted completions:
- A marker is at the start of a line: a trigger word in any case and a colon; a number, `###` and bold are optional.
- Markers are recognised only in the order instruction, input, output; the input may be missing. So an output may
  contain `Input:` and `Output:`. If a task's output marker has the task's number, markers without it are text too.
- A task ends at the next instruction marker or at a line of only `###`. Without an output marker it is discarded.

Rendering and parsing round-trip, except for white space at the ends of a text and for texts that contain the layout
itself: an output with a line of only `###`, a text with an instruction marker that has a number or `###`, an
instruction or input with the next marker of its own task, an input such as "None". Such tasks can still be used as
shots, because only completions are parsed; a task parsed from a completion never has such an output.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from minigpt.selfinstruct.tasks import Task

NO_INPUT = "<noinput>"
# Models write a bare None for "no input"; it is rarely a real input. But Na is a metal, "nothing" and null are words to
# work on, and `None` and [None] are code, so these are kept as inputs.
_NO_INPUT = re.compile(
    r"[\W_]*no[\W_]*(?:(?:additional|further)\s+)?input"
    r"(?:\s+(?:is\s+)?(?:required|needed|necessary|provided|given))?[\W_]*"
    r"|[\s<(]*(?:none|n/a|not[\s_]applicable)[\s>).]*"
    r"|<\s*(?:nothing|empty|blank)\s*>",
    re.IGNORECASE,
)
_NO_OUTPUT = re.compile(r"<\s*no[\W_]*(?:input|output)\s*>", re.IGNORECASE)
_SEPARATOR = re.compile(r"^[^\S\n]*###[^\S\n]*$", re.MULTILINE)
_YES = re.compile(r"\W*yes\b", re.IGNORECASE)


class _Marker(NamedTuple):
    """The start of a field: `9. Output:` has the field "output" and the number "9"."""

    field: str
    number: str | None
    separated: bool
    """Whether `###` precedes it."""
    start: int
    end: int


@dataclass(frozen=True)
class TaskFormat:
    """The layout of tasks in a request: io (instruction, output) or iio (instruction, input, output).

    >>> TaskFormat("io").parse(" Name a colour.\\n2. Output:\\nRed.\\n###\\n3. Instruc", number=2, finished=False)
    [Task(instruction='Name a colour.', input='', output='Red.', is_classification=False)]
    """

    name: str = "iio"
    instruction: str = "Instruction"
    input: str = "Input"
    output: str = "Output"

    def __post_init__(self) -> None:
        if self.name not in ("io", "iio"):
            raise ValueError(f"the format of a request is io or iio, not {self.name!r}")
        words = {"instruction": self.instruction, "input": self.input, "output": self.output}
        for field, word in words.items():
            if not word.strip() or word != word.strip() or "\n" in word:
                raise ValueError(f"--trigger_{field} {word!r}: expected one line, no surrounding white space")
        if len(set(words.values())) < len(words):
            raise ValueError(f"the trigger words {', '.join(words.values())} must differ from each other")

    def render(self, shots: Sequence[Task]) -> str:
        r"""The request: a task description, the shots, and an open slot with the next number.

        >>> print(TaskFormat().render([Task("Name the capital.", "France", "Paris."), Task("Say hi.", "", "Hi.")]))
        Write a list of diverse tasks, each with its Instruction, its Input (<noinput> if there is none) and its Output.
        ###
        1. Instruction: Name the capital.
        1. Input:
        France
        1. Output:
        Paris.
        ###
        2. Instruction: Say hi.
        2. Input:
        <noinput>
        2. Output:
        Hi.
        ###
        3. Instruction:

        io has no Input lines; the input of a task follows its instruction on a new line, as in the template io.
        """
        fields = f"its {self.instruction} and its {self.output}"
        if self.name == "iio":
            fields = f"its {self.instruction}, its {self.input} ({NO_INPUT} if there is none) and its {self.output}"
        description = f"Write a list of diverse tasks, each with {fields}.\n"
        return description + self._list(shots, ("instruction", "input", "output"), len(shots) + 1)

    def parse(self, completion: str, number: int, finished: bool = True) -> list[Task]:
        """The tasks in a completion.

        Args:
            completion: the generated text, which continues directly after the open slot.
            number: the number of the open slot.
            finished: False if the completion was truncated: then the last task is dropped, unless a `###` or the next
                instruction marker shows that it is complete.
        """
        text = f"{number}. {self.instruction}:\n{self._continued(completion, 'instruction')}"
        return self._read(text, ("instruction", "input", "output"), finished)

    def stop_strings(self, number: int) -> tuple[str, ...]:
        """The stop string that ends a completion before the task with this number.

        Other systems stop at "20.", which also truncates an answer that mentions 2020.
        """
        return (f"\n{number}. {self.instruction}:",)

    # ---- the classification branch

    def render_is_classification(self, shots: Sequence[Task], instruction: str) -> str:
        """Asks whether an instruction is classification. Shots: seed tasks of both kinds. Stop at a line feed."""
        examples = "".join(
            f"###\n{number}. {self.instruction}: {task.instruction.strip()}\n"
            f"{number}. Classification: {'Yes' if task.is_classification else 'No'}\n"
            for number, task in enumerate(shots, 1)
        )
        number = len(shots) + 1
        return (
            "Is the task classification: is its answer one of a few labels that are known beforehand?\n"
            f"{examples}###\n{number}. {self.instruction}: {instruction.strip()}\n{number}. Classification:"
        )

    @staticmethod
    def parse_is_classification(completion: str) -> bool:
        """Whether the answer is yes; anything else counts as no, which leaves the task unchanged."""
        return bool(_YES.match(completion))

    def render_label_first(self, shots: Sequence[Task], instruction: str) -> str:
        """Asks for a label of a classification task first, then for an input that has it; iio only.

        Shots: at least one seed task, all of them classification. Stop at `stop_strings(len(shots) + 2)`.
        """
        if self.name != "iio":
            raise ValueError("the classification branch needs the format iio: io has no Input field")
        order, number = ("instruction", "output", "input"), len(shots) + 1
        return (
            f"Give for each task a possible {self.output} first, then an {self.input} that has this {self.output}.\n"
            f"{self._list(shots, order, number)} {instruction.strip()}\n{number}. {self.output}:"
        )

    def parse_label_first(self, completion: str, instruction: str, number: int, finished: bool = True) -> Task | None:
        """The task with the generated label and input; None unless both are present and not truncated.

        Arguments: those of `render_label_first` and of `parse`.
        """
        instruction = _normalize_newlines(instruction).strip()
        text = self._continued(completion, "output")
        text = f"{number}. {self.instruction}: {instruction}\n{number}. {self.output}:\n{text}"
        for task in self._read(text, ("instruction", "output", "input"), finished):
            if task.instruction == instruction and task.output:
                return task._replace(is_classification=True)
        return None

    # ---- rendering and parsing

    def _list(self, shots: Sequence[Task], order: Sequence[str], number: int) -> str:
        tasks = "".join(f"###\n{self._shot(task, order, position)}" for position, task in enumerate(shots, 1))
        return f"{tasks}###\n{number}. {self.instruction}:"

    def _shot(self, task: Task, order: Sequence[str], number: int) -> str:
        instruction, input, output = task.instruction.strip(), task.input.strip(), task.output.strip()
        if self.name == "io":
            instruction, order = f"{instruction}\n{input}".strip(), ("instruction", "output")
        lines = {
            "instruction": f"{number}. {self.instruction}: {instruction}\n",
            "input": f"{number}. {self.input}:\n{input or NO_INPUT}\n",
            "output": f"{number}. {self.output}:\n{output}\n",
        }
        return "".join(lines[field] for field in order)

    @cached_property
    def _marker(self) -> re.Pattern[str]:
        words = {field: getattr(self, field) for field in ("instruction", "input", "output")}
        # At most 3 digits, because 4 are a year; at most 3 spaces of indent, because 4 are code. White space is matched
        # possessively (*+), or a long run of it would backtrack for hours.
        case = re.IGNORECASE if len({word.casefold() for word in words.values()}) == len(words) else 0
        return re.compile(
            r"^[^\S\n]{0,3}(?P<separator>###\s*+)?(?:\*\*)?(?:(?P<number>\d{1,3})[^\S\n]*+[.):]?)?[^\S\n]*+(?:\*\*)?"
            f"(?:{'|'.join(f'(?P<{field}>{re.escape(word)})' for field, word in words.items())})"
            r"[^\S\n]*+(?:\*\*)?[:\uff1a](?:\*\*(?!\S))?",
            re.MULTILINE | case,
        )

    def _continued(self, completion: str, field: str) -> str:
        """The text after an open slot, without a repetition of the slot, which chat models write."""
        text = _normalize_newlines(completion).lstrip()
        repeated = self._marker.match(text)
        return text[repeated.end() :] if repeated and repeated.lastgroup == field else text

    def _read(self, text: str, order: Sequence[str], finished: bool) -> list[Task]:
        """The complete tasks in a text that starts with an instruction marker."""
        markers = [
            _Marker(str(match.lastgroup), match["number"], bool(match["separator"]), match.start(), match.end())
            for match in self._marker.finditer(text)
        ]
        tasks = []
        while markers:
            fields, markers = self._one_task(markers, order)
            end = markers[0].start if markers else len(text)
            ends = [field.start for field in fields[1:]] + [end]
            texts = {field.field: text[field.end : end] for field, end in zip(fields, ends)}
            if order[-1] not in texts:
                continue
            texts[order[-1]], *rest = _SEPARATOR.split(texts[order[-1]])
            instruction, input, output = (texts.get(name, "").strip() for name in ("instruction", "input", "output"))
            if instruction and (finished or markers or rest):
                input = "" if _NO_INPUT.fullmatch(input) else input
                output = "" if _NO_OUTPUT.fullmatch(output) else output
                tasks.append(Task(instruction, input, output))
        return tasks

    @staticmethod
    def _one_task(markers: list[_Marker], order: Sequence[str]) -> tuple[list[_Marker], list[_Marker]]:
        """Splits the markers into the first task's fields and the markers from the next task on; others are text."""
        first, *others = markers
        starts = [index for index, marker in enumerate(others) if marker.field == "instruction"]
        # A model that numbers the fields of a task also numbers or separates the next task: else it is text.
        explicit = [index for index in starts if others[index].separated or others[index].number]
        candidates = others[: explicit[0]] if explicit else others
        numbered = bool(first.number) and any(m.field == order[-1] and m.number == first.number for m in candidates)
        next_task = (explicit if numbered else starts) or [len(others)]
        fields = [first]
        for marker in others[: next_task[0]]:
            in_order = order.index(marker.field) > order.index(fields[-1].field)
            if in_order and (marker.number == first.number or not numbered):
                fields.append(marker)
        return fields, others[next_task[0] :]


def _normalize_newlines(text: str) -> str:
    return text.replace("\r\n", "\n")
