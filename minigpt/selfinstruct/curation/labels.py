"""Self-Instruct's output-first generation of classification tasks (Wang et al. 2022, section 2.2).

Inputs generated before the output are biased towards one label. So the model is asked whether each kept task is
classification; if it is, the model generates a label first, and then an input that has it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from minigpt.selfinstruct.generators import Completion, Generator, SamplingParams, SeededPrompt, fit_shots
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

YES_NO_TOKENS = 5  # max_length of a yes/no answer
Complete = Callable[[Sequence[SeededPrompt], SamplingParams], list[list[Completion]]]


class LabelsFirst:
    """Replaces the output and input of classification tasks."""

    def __init__(
        self,
        seed_tasks: Sequence[Task],
        task_format: TaskFormat,
        num_shots: int,
        generator: Generator,
        params: SamplingParams,
        complete: Complete,
    ):
        """
        Args:
            params: those of the bootstrap requests.
            complete: calls the generator.

        Raises:
            ValueError: the seed tasks are all classification, or none is.
        """
        self.labelled = [task for task in seed_tasks if task.is_classification]
        self.others = [task for task in seed_tasks if not task.is_classification]
        if not self.labelled or not self.others:
            raise ValueError('--label_first needs seed tasks with "is_classification": true, and others without')
        self.format, self.num_shots, self.generator, self.complete = task_format, num_shots, generator, complete
        settings = replace(params.settings, num_return_sequences=1)
        one_word = replace(settings, max_length=YES_NO_TOKENS, temperature=0.0, num_beams=1)
        self.yes_no_params = SamplingParams(one_word, ("\n",))
        # Largest number first: usually all shots fit, and a server may use only the first stop strings.
        numbers = range(num_shots + 2, 2, -1)
        stop = [word for number in numbers for word in task_format.stop_strings(number)]
        self.label_params = SamplingParams(settings, (*stop, *settings.stop_words))

    def apply(self, lines: Sequence[dict[str, Any]]) -> None:
        """Sets "is_classification" in the lines of kept tasks. If true, and the model generates both a label and an
        input, also replaces "output" and "input"."""
        answers = self._generate(lines, self.format.render_is_classification, self._both_kinds, self.yes_no_params)
        for line, (answer, _) in zip(lines, answers, strict=True):
            line["is_classification"] = self.format.parse_is_classification(answer.text)
        lines = [line for line in lines if line["is_classification"]]
        answers = self._generate(lines, self.format.render_label_first, self._labelled, self.label_params)
        for line, (answer, number) in zip(lines, answers, strict=True):
            task = self.format.parse_label_first(answer.text, line["instruction"], number, answer.finished)
            if task and task.output.strip() != task.input.strip():
                line.update(input=task.input, output=task.output)

    def _generate(
        self,
        lines: Sequence[dict[str, Any]],
        render: Callable[[Sequence[Task], str], str],
        sample_shots: Callable[[Random], list[Task]],
        params: SamplingParams,
    ) -> list[tuple[Completion, int]]:
        """For each line the completion, and the number of the open slot in its prompt. The completion is empty if no
        shot fits or the server rejects the prompt."""
        prompts: dict[int, tuple[SeededPrompt, int]] = {}  # index of the line -> prompt, number of the open slot
        for index, line in enumerate(lines):
            # The method's name is part of the seed: renaming it changes the results of a run.
            name = sample_shots.__name__
            random = Random(f"{params.settings.seed}/{line['request_idx']}/{line['instruction']}/{name}")
            shots, seed = sample_shots(random), random.getrandbits(63)

            def render_one(shots: Sequence[Task], instruction: str = line["instruction"]) -> str:
                return render(shots, instruction)

            if fitted := fit_shots(self.generator, render_one, shots, params.settings.max_length):
                prompts[index] = SeededPrompt(fitted[1], seed), len(fitted[0]) + 1
        results = self.complete([prompt for prompt, _ in prompts.values()], params)
        answers = [(Completion("", True), 0)] * len(lines)
        for (index, (_, number)), completions in zip(prompts.items(), results, strict=True):
            if completions:
                answers[index] = completions[0], number
        return answers

    def _both_kinds(self, random: Random) -> list[Task]:
        half = max(1, self.num_shots // 2)
        shots = _sample_up_to(self.labelled, half, random) + _sample_up_to(self.others, half, random)
        random.shuffle(shots)
        return shots

    def _labelled(self, random: Random) -> list[Task]:
        return _sample_up_to(self.labelled, self.num_shots, random)


def _sample_up_to(tasks: Sequence[Task], count: int, random: Random) -> list[Task]:
    return random.sample(tasks, min(count, len(tasks)))
