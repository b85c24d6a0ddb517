"""The classification branch of Self-Instruct (Wang et al. 2022, section 2.2): labels first.

A model that writes the input before the output makes inputs that lean towards one label. So it is asked of each task
that was kept whether it is classification; and where it is, for a label, and then for an input that has it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from minigpt.selfinstruct.generators import Completion, Generator, How, Prompt, fit_shots
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

YES_OR_NO = 5  # tokens
Complete = Callable[[Sequence[Prompt], How], list[list[Completion]]]


class LabelsFirst:
    """Gives tasks that are found to be classification another output and input."""

    def __init__(
        self,
        seed_tasks: Sequence[Task],
        task_format: TaskFormat,
        num_shots: int,
        generator: Generator,
        how: How,
        complete: Complete,
    ):
        """
        Args:
            how: that of the requests.
            complete: asks the generator.

        Raises:
            ValueError: the seed tasks are all of one kind.
        """
        self.labelled = [task for task in seed_tasks if task.is_classification]
        self.others = [task for task in seed_tasks if not task.is_classification]
        if not self.labelled or not self.others:
            raise ValueError('--label_first needs seed tasks with "is_classification": true, and such without')
        self.format, self.num_shots, self.generator, self.complete = task_format, num_shots, generator, complete
        settings = replace(how.settings, num_return_sequences=1)
        one_word = replace(settings, max_length=YES_OR_NO, temperature=0.0, num_beams=1)
        self.yes_or_no = How(one_word, ("\n",))
        numbers = range(num_shots + 2, 2, -1)  # fewer shots may fit; a server may take the first stop strings only
        stop = [word for number in numbers for word in task_format.stop_strings(number)]
        self.label_first = How(settings, (*stop, *settings.stop_words))

    def put(self, lines: Sequence[dict[str, Any]]) -> None:
        """Sets "is_classification" in the lines of tasks that were kept; and where it is true, "output" and "input",
        if the model comes to both."""
        found = self._ask(lines, self.format.render_is_classification, self._both_kinds, self.yes_or_no)
        for line, (answer, _) in zip(lines, found, strict=True):
            line["is_classification"] = self.format.parse_is_classification(answer.text)
        lines = [line for line in lines if line["is_classification"]]
        found = self._ask(lines, self.format.render_label_first, self._labelled, self.label_first)
        for line, (answer, number) in zip(lines, found, strict=True):
            task = self.format.parse_label_first(answer.text, line["instruction"], number, answer.finished)
            if task and task.output.strip() != task.input.strip():
                line.update(input=task.input, output=task.output)

    def _ask(
        self,
        lines: Sequence[dict[str, Any]],
        render: Callable[[Sequence[Task], str], str],
        draw: Callable[[Random], list[Task]],
        how: How,
    ) -> list[tuple[Completion, int]]:
        """The completion of each line's prompt, and the number of its open slot; an empty one where no shot fits, or a
        server refuses."""
        prompts: dict[int, tuple[Prompt, int]] = {}  # place -> prompt, open slot
        for place, line in enumerate(lines):
            random = Random(f"{how.settings.seed}/{line['request_idx']}/{line['instruction']}/{draw.__name__}")
            shots, seed = draw(random), random.getrandbits(63)

            def render_one(shots: Sequence[Task], instruction: str = line["instruction"]) -> str:
                return render(shots, instruction)

            if fitting := fit_shots(self.generator, render_one, shots, how.settings.max_length):
                prompts[place] = Prompt(fitting[1], seed), len(fitting[0]) + 1
        answers = self.complete([prompt for prompt, _ in prompts.values()], how)
        found = [(Completion("", True), 0)] * len(lines)
        for (place, (_, number)), completions in zip(prompts.items(), answers, strict=True):
            if completions:
                found[place] = completions[0], number
        return found

    def _both_kinds(self, random: Random) -> list[Task]:
        half = max(1, self.num_shots // 2)
        shots = _some(self.labelled, half, random) + _some(self.others, half, random)
        random.shuffle(shots)
        return shots

    def _labelled(self, random: Random) -> list[Task]:
        return _some(self.labelled, self.num_shots, random)


def _some(tasks: Sequence[Task], count: int, random: Random) -> list[Task]:
    return random.sample(tasks, min(count, len(tasks)))
