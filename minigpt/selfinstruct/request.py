r"""The text that asks a model for tasks, and the tasks in what it writes back.

A request is a list of tasks with the next number open; the model continues the list. The layout is that of Stanford
Alpaca's generate_instruction.py (iio) and of ArmelRandy/Self-instruct, which leaves the Input lines out (io). The
classification branch is that of Self-Instruct (Wang et al. 2022, section 2.2): where the input is written first, the
inputs come to lean towards one label; so a task that is found to be classification is given its label first, and
then an input that has it.

How tasks are read, in what no one has promised to write well:
- A marker begins a line: a trigger word in any case and a colon, with or without a number, `###` or bold print.
- Markers count in their order only: instruction, input, output; the input may be missing. So an answer may speak of
  `Input:` and `Output:`. Where a task's own number stands at its output, markers without it are text as well.
- A task ends where the next instruction stands, or at a line that is only `###`. Without an output it is none.

So the tasks of a request come back from its text, but for white space around a text, and for what looks like the
layout itself: an output with a line that is only `###`, a text with an instruction marker that has a number or `###`,
an instruction or input with its own task's next marker, an input that reads as none. Such a task may be shown all the
same, because only completions are read; what is kept of a completion has no such output.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from minigpt.selfinstruct.tasks import Task

NO_INPUT = "<noinput>"
# A bare None is how models say that there is no input, and seldom what a task is about. But Na is a metal, "nothing"
# and null are words to work on, and `None` and [None] are code: these stay.
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
    """Where a field begins: `9. Output:` is the field "output" of the task with the number "9"."""

    field: str
    number: str | None
    separated: bool
    """`###` stands before it."""
    start: int
    end: int


@dataclass(frozen=True)
class TaskFormat:
    """How tasks are written in a request: io (instruction, output) or iio (instruction, input, output).

    >>> TaskFormat("io").parse(" Name a colour.\\n2. Output:\\nRed.\\n###\\n3. Instruc", number=2, finished=False)
    [Task(instruction='Name a colour.', input='', output='Red.', is_classification=False)]
    """

    name: str = "iio"
    instruction: str = "Instruction"
    input: str = "Input"
    output: str = "Output"

    def __post_init__(self) -> None:
        if self.name not in ("io", "iio"):
            raise ValueError(f"a request is written as io or iio, not {self.name!r}")
        words = {"instruction": self.instruction, "input": self.input, "output": self.output}
        for field, word in words.items():
            if not word.strip() or word != word.strip() or "\n" in word:
                raise ValueError(f"--trigger_{field} {word!r}: expected a word on one line, without blanks around it")
        if len(set(words.values())) < len(words):
            raise ValueError(f"the trigger words {', '.join(words.values())} must differ from each other")

    def render(self, shots: Sequence[Task]) -> str:
        r"""The request: a line that says what is wanted, the shots, and the next number open.

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

        For io the Input lines fall away; what input a task has follows its instruction on a new line, as in the
        template io.
        """
        fields = f"its {self.instruction} and its {self.output}"
        if self.name == "iio":
            fields = f"its {self.instruction}, its {self.input} ({NO_INPUT} if there is none) and its {self.output}"
        asked = f"Write a list of diverse tasks, each with {fields}.\n"
        return asked + self._list(shots, ("instruction", "input", "output"), len(shots) + 1)

    def parse(self, completion: str, number: int, finished: bool = True) -> list[Task]:
        """The tasks that a person would read in a completion.

        Args:
            completion: what the model wrote, directly behind the open slot.
            number: that of the open slot.
            finished: whether the model came to an end; else the last task is dropped, unless it was complete before
                the cut.
        """
        text = f"{number}. {self.instruction}:\n{self._continued(completion, 'instruction')}"
        return self._read(text, ("instruction", "input", "output"), finished)

    def stop_strings(self, number: int) -> tuple[str, ...]:
        """What a completion contains when it goes on to the task with this number: the place to stop.

        Other systems stop at "20.", which also cuts an answer that speaks of 2020.
        """
        return (f"\n{number}. {self.instruction}:",)

    # ---- the classification branch

    def render_is_classification(self, shots: Sequence[Task], instruction: str) -> str:
        """Asks whether an instruction is classification. The shots are seed tasks of both kinds; stop at a line end."""
        shown = "".join(
            f"###\n{number}. {self.instruction}: {task.instruction.strip()}\n"
            f"{number}. Classification: {'Yes' if task.is_classification else 'No'}\n"
            for number, task in enumerate(shots, 1)
        )
        number = len(shots) + 1
        return (
            "Is the task classification: is its answer one of a few labels that are known beforehand?\n"
            f"{shown}###\n{number}. {self.instruction}: {instruction.strip()}\n{number}. Classification:"
        )

    @staticmethod
    def parse_is_classification(completion: str) -> bool:
        """Whether the answer is yes. What is neither yes nor no leaves the task as it is."""
        return bool(_YES.match(completion))

    def render_label_first(self, shots: Sequence[Task], instruction: str) -> str:
        """Asks for a label of a classification task, and then for an input that has it; for iio alone.

        The shots are seed tasks that are classification, at least one; stop at `stop_strings(len(shots) + 2)`.
        """
        if self.name != "iio":
            raise ValueError("the classification branch is for iio: in io a task has no input of its own")
        order, number = ("instruction", "output", "input"), len(shots) + 1
        return (
            f"Give for each task a possible {self.output} first, then an {self.input} that has this {self.output}.\n"
            f"{self._list(shots, order, number)} {instruction.strip()}\n{number}. {self.output}:"
        )

    def parse_label_first(self, completion: str, instruction: str, number: int, finished: bool = True) -> Task | None:
        """The task with the label and the input in a completion; None where they are not both there, and whole.

        Arguments: those of `render_label_first` and of `parse`.
        """
        instruction = _lines(instruction).strip()
        text = self._continued(completion, "output")
        text = f"{number}. {self.instruction}: {instruction}\n{number}. {self.output}:\n{text}"
        for task in self._read(text, ("instruction", "output", "input"), finished):
            if task.instruction == instruction and task.output:
                return task._replace(is_classification=True)
        return None

    # ---- writing and reading

    def _list(self, shots: Sequence[Task], order: Sequence[str], number: int) -> str:
        shown = "".join(f"###\n{self._shot(task, order, place)}" for place, task in enumerate(shots, 1))
        return f"{shown}###\n{number}. {self.instruction}:"

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
        # Four digits are a year, four blanks code. Blanks are possessive, or a line of them would take forever.
        case = re.IGNORECASE if len({word.casefold() for word in words.values()}) == len(words) else 0
        return re.compile(
            r"^[^\S\n]{0,3}(?P<separator>###\s*+)?(?:\*\*)?(?:(?P<number>\d{1,3})[^\S\n]*+[.):]?)?[^\S\n]*+(?:\*\*)?"
            f"(?:{'|'.join(f'(?P<{field}>{re.escape(word)})' for field, word in words.items())})"
            r"[^\S\n]*+(?:\*\*)?[:\uff1a](?:\*\*(?!\S))?",
            re.MULTILINE | case,
        )

    def _continued(self, completion: str, field: str) -> str:
        """The text behind an open slot, less the slot where the model wrote it again, as chat models do."""
        text = _lines(completion).lstrip()
        again = self._marker.match(text)
        return text[again.end() :] if again and again.lastgroup == field else text

    def _read(self, text: str, order: Sequence[str], finished: bool) -> list[Task]:
        """The complete tasks in a text that begins with an instruction marker."""
        markers = [
            _Marker(str(found.lastgroup), found["number"], bool(found["separator"]), found.start(), found.end())
            for found in self._marker.finditer(text)
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
        """The markers of the first task, and those from the next task on; the rest of them is text."""
        first, *others = markers
        starts = [index for index, marker in enumerate(others) if marker.field == "instruction"]
        # A model that numbers the fields of a task numbers, or separates, the next task too: without, it is text.
        clear = [index for index in starts if others[index].separated or others[index].number]
        near = others[: clear[0]] if clear else others
        numbered = bool(first.number) and any(m.field == order[-1] and m.number == first.number for m in near)
        following = (clear if numbered else starts) or [len(others)]
        fields = [first]
        for marker in others[: following[0]]:
            in_order = order.index(marker.field) > order.index(fields[-1].field)
            if in_order and (marker.number == first.number or not numbered):
                fields.append(marker)
        return fields, others[following[0] :]


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n")
