"""The bootstrap of Self-Instruct (Wang et al. 2022, https://arxiv.org/abs/2212.10560): a model writes instruction data.

A request shows tasks of the seed pool and of the machine pool, and the model continues the list. What can be read of
it goes through the filters; what is left joins the machine pool.

Requests run in rounds. The shots of a round are drawn before it starts, from what earlier rounds kept, and draws and
seeds depend on the run's seed and the request's number alone. So a round needs no memory but the files (run_files.py),
and a run comes to the same however often it was stopped, and wherever: the target and the budgets end it with the
request that meets them, and with larger ones it goes on from there.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple

from minigpt.distributed import clock, print0, progress_bar
from minigpt.selfinstruct.curation.labels import LabelsFirst
from minigpt.selfinstruct.filters import BANNED_WORDS, Filters
from minigpt.selfinstruct.generators import Completion, Generator, GeneratorArguments, How, Prompt, fit_shots
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.run_files import BatchDir, Statistics, as_json
from minigpt.selfinstruct.tasks import Task
from minigpt.settings.groups import check_range

BATCHES = 4  # of requests in a round
LIST = 20  # tasks in a request and its completion together, as in Stanford Alpaca


@dataclass
class BootstrapArguments:
    """How many tasks, and what may be spent on them."""

    batch_dir: str = "runs/selfinstruct"
    """Folder of the run. One that is there goes on."""
    seed_tasks_path: str | None = None
    """Tasks that people wrote, in any of the known formats. Unset: those that come along."""
    num_instructions_to_generate: int = 100
    """Tasks to keep. The request that reaches them is judged to its end, so there may be a few more."""
    num_prompt_instructions: int = 8
    """Tasks that a request shows; fewer where the context is too short."""
    num_prompt_synthetic_instructions: int = 2
    """How many of them the model wrote, as soon as there are any."""
    max_requests: int | None = None
    """Requests after which the run ends. Unset: ten for each task to keep, and at least 100."""
    max_stall: int = 100
    """Requests in a row without a task to keep after which the run ends."""

    def __post_init__(self) -> None:
        check_range(self, "at least 1", lambda x: x >= 1, "num_instructions_to_generate", "num_prompt_instructions")
        check_range(self, "at least 1", lambda x: x >= 1, "max_requests", "max_stall")
        check_range(self, "at least 0", lambda x: x >= 0, "num_prompt_synthetic_instructions")
        if self.num_prompt_synthetic_instructions > self.num_prompt_instructions:
            raise ValueError(
                f"--num_prompt_synthetic_instructions {self.num_prompt_synthetic_instructions} is more than "
                f"--num_prompt_instructions {self.num_prompt_instructions}, which they are part of: give fewer"
            )

    @property
    def request_budget(self) -> int:
        return self.max_requests or max(100, 10 * self.num_instructions_to_generate)


@dataclass
class TaskArguments:
    """How tasks are written, and which are dropped."""

    format: Literal["io", "iio"] = "iio"
    """io: tasks of instruction and output; iio: with an input between them, or <noinput>."""
    trigger_instruction: str = "Instruction"
    """Word for an instruction in requests and completions."""
    trigger_input: str = "Input"
    """Word for an input."""
    trigger_output: str = "Output"
    """Word for an output."""
    label_first: bool = False
    """Ask of each new task whether it is classification, and then for a label first and an input that has it (iio):
    inputs written first lean towards one label."""
    threshold: float = 0.7
    """Keep a task whose ROUGE-L with every other is below this."""
    keep_programming: bool = False
    """Keep what begins with "Write a program" or "Write a function"."""
    banned_words: list[str] = field(default_factory=lambda: list(BANNED_WORDS))
    """Drop instructions with one of these, as whole words; "" bans none."""
    language: str = "en"
    """Code of the instructions' language. In any but en, an instruction need not begin with an ASCII character, and
    ROUGE-L compares the words of all scripts."""

    def __post_init__(self) -> None:
        check_range(self, "above 0 and at most 1", lambda x: 0 < x <= 1, "threshold")
        self.task_format()  # it refuses trigger words that nobody could read back
        if self.label_first and self.format != "iio":
            raise ValueError("--label_first gives a task another input, and --format io has none")

    def task_format(self) -> TaskFormat:
        return TaskFormat(self.format, self.trigger_instruction, self.trigger_input, self.trigger_output)

    def filters(self) -> Filters:
        return Filters(self.banned_words, self.keep_programming, self.language)


@dataclass
class RunArguments(BootstrapArguments, TaskArguments, GeneratorArguments):
    """All that a run reads, but where the model is."""

    def __post_init__(self) -> None:
        for part in (BootstrapArguments, TaskArguments, GeneratorArguments):
            part.__post_init__(self)

    @property
    def round_size(self) -> int:
        """Requests of a round."""
        return BATCHES * self.request_batch_size


class Request(NamedTuple):
    """One prompt of a round."""

    idx: int
    shots: list[Task]
    prompt: Prompt


class Bootstrap:
    """A run, from what its files hold to its end."""

    def __init__(self, files: BatchDir, arguments: RunArguments, seed_tasks: Sequence[Task], generator: Generator):
        """Raises ValueError where no seed task fits into the context, or --label_first lacks its kinds of them."""
        from minigpt.selfinstruct.novelty import NoveltyFilter, rouge_words, unicode_words

        self.files, self.arguments, self.statistics = files, arguments, files.statistics
        self.generator, self.format = generator, arguments.task_format()
        self.filters = arguments.filters()
        self.novelty = NoveltyFilter(arguments.threshold, rouge_words if self.filters.is_english else unicode_words)
        # A completion ends when its list is long enough, or the room ends.
        length = max(LIST, 2 * arguments.num_prompt_instructions)
        stop = (*self.format.stop_strings(length + 1), *arguments.stop_words)
        self.how = How(arguments, stop)

        max_length, context = arguments.max_length, generator.context
        if max_length >= context:
            raise ValueError(
                f"--max_length {max_length} leaves no room for a request: the model's context is {context} tokens, "
                "for a request and its completion together (give a smaller --max_length)"
            )
        self.shown = [task for task in seed_tasks if self._fit([task])]
        self.machine: list[tuple[int, Task]] = []
        """Tasks that were kept and can be shown, with the number of their request."""
        if not self.shown:
            raise ValueError(
                f"--max_length {max_length} leaves {context - max_length} of the model's {context} tokens for a "
                f"request, and not one of {len(seed_tasks)} seed tasks fits (give a smaller --max_length, or shorter "
                "tasks)"
            )
        if left_out := len(seed_tasks) - len(self.shown):
            print0(f"{left_out:,} of {len(seed_tasks):,} seed tasks are too long to be shown")
        self.labels = None
        if arguments.label_first:
            self.labels = LabelsFirst(
                self.shown, self.format, arguments.num_prompt_instructions, generator, self.how, self._complete
            )
        for task in seed_tasks:
            self.novelty.add(task.instruction)
        for line in files.kept:
            self.novelty.add(line["instruction"])
        self._show_from_now_on(files.kept)
        self.last_kept: int = files.kept[-1]["request_idx"] if files.kept else -1

    def run(self) -> Statistics:
        """Rounds until the target is reached or a budget is used up."""
        statistics, target = self.statistics, self.arguments.num_instructions_to_generate
        if statistics.requests:
            print0(
                f"{self.files.folder}: going on after {statistics.requests:,} requests, {statistics.kept:,} tasks kept"
            )
        with progress_bar(target, "task", "tasks kept", initial=statistics.kept) as bar:
            statistics.ended = self._ended()
            started, kept_before = time.perf_counter(), statistics.kept
            while not statistics.ended:
                before = statistics.kept
                self._round()
                bar.set_postfix_str(f"{statistics.requests:,} requests", refresh=False)
                bar.update(statistics.kept - before)
                if bar.disable:
                    line = f"{statistics.requests:,} requests: {statistics.kept:,} of {target:,} tasks"
                    if new := statistics.kept - kept_before:
                        seconds = (time.perf_counter() - started) / new * max(0, target - statistics.kept)
                        line += f"  about {clock(seconds)} left"
                    print0(line)
        self.files.commit([], [])
        return statistics

    # ---- one round

    def _round(self) -> None:
        size = self.arguments.round_size
        first = self.statistics.requests // size * size
        pool = [task for idx, task in self.machine if idx < first]
        requests = [
            self._draw(idx, pool)
            for idx in range(self.statistics.requests, min(first + size, self.arguments.request_budget))
        ]
        answers = self._complete([request.prompt for request in requests], self.how)

        kept: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        for request, completions in zip(requests, answers, strict=True):
            tasks = [
                task
                for completion in completions
                for task in self.format.parse(completion.text, len(request.shots) + 1, completion.finished)
            ]
            judged = [self._judge(task, request.idx, kept) for task in tasks]
            lines.append(
                {
                    "request_idx": request.idx,
                    "seed": request.prompt.seed,
                    "shots": [task.instruction for task in request.shots],
                    "prompt": request.prompt.text,
                    "completions": as_json(completions),
                    "tasks": judged,
                }
            )
            self.statistics.requests += 1
            self.statistics.completions += len(completions)
            self.statistics.tasks += len(tasks)
            self.statistics.ended = self._ended()
            if self.statistics.ended:
                break
        if self.labels:
            self.labels.put(kept)
        self.files.commit(kept, lines)
        self._show_from_now_on(kept)
        if self.statistics.requests == first + size:
            self.files.forget_arrived()

    def _draw(self, idx: int, pool: Sequence[Task]) -> Request:
        """The request of this number."""
        random = Random(f"{self.arguments.seed}/{idx}")
        synthetic = min(self.arguments.num_prompt_synthetic_instructions, len(pool))
        others = min(self.arguments.num_prompt_instructions - synthetic, len(self.shown))
        shots = random.sample(pool, synthetic) + random.sample(self.shown, others)
        random.shuffle(shots)
        seed = random.getrandbits(63)
        fitting = self._fit(shots)
        assert fitting is not None  # each alone does
        shots, text = fitting
        return Request(idx, shots, Prompt(text, seed))

    def _judge(self, task: Task, request_idx: int, kept: list[dict[str, Any]]) -> dict[str, Any]:
        """A task with its verdict. One that stays is added to `kept`, and to what others are compared with."""
        verdict, score, nearest = self.filters.reject(task), None, None
        if verdict is None:
            found = self.novelty.check(task.instruction)
            verdict, score = "kept" if found.accepted else "novelty", found.score
            nearest = next(iter(found.neighbours), None)
        if verdict == "kept":
            kept.append(
                {
                    "instruction": task.instruction,
                    "input": task.input,
                    "output": task.output,
                    "most_similar_instructions": found.neighbours,
                    "avg_similarity_score": found.average,
                    "request_idx": request_idx,
                }
            )
            self.statistics.kept += 1
            self.novelty.add(task.instruction)
            self.last_kept = request_idx
        else:
            self.statistics.rejected[verdict] += 1
        return {
            "instruction": task.instruction,
            "input": task.input,
            "output": task.output,
            "verdict": verdict,
            "score": score,
            "nearest": nearest,
        }

    def _complete(self, prompts: Sequence[Prompt], how: How) -> list[list[Completion]]:
        """The completions of each prompt; those that came before the run was stopped are not asked for again."""
        arrived = self.files.arrived
        missing = [prompt for prompt in prompts if prompt.seed not in arrived]

        def keep(place: int, completions: list[Completion]) -> None:
            self.files.keep(missing[place].seed, completions)

        answers = self.generator.complete(missing, how, keep) if missing else []
        fresh = {prompt.seed: completions for prompt, completions in zip(missing, answers, strict=True)}
        return [fresh[seed] if seed in fresh else arrived[seed] for _, seed in prompts]

    def _show_from_now_on(self, kept: Sequence[dict[str, Any]]) -> None:
        for line in kept:
            task = Task(line["instruction"], line["input"], line["output"])
            if self._fit([task]):
                self.machine.append((line["request_idx"], task))

    def _fit(self, shots: list[Task]) -> tuple[list[Task], str] | None:
        return fit_shots(self.generator, self.format.render, shots, self.arguments.max_length)

    # ---- the end

    def _ended(self) -> str | None:
        if self.statistics.kept >= self.arguments.num_instructions_to_generate:
            return "target"
        if self.statistics.requests >= self.arguments.request_budget:
            return "max_requests"
        if self.statistics.requests - self.last_kept > self.arguments.max_stall:
            return "max_stall"
        return None


def table(statistics: Statistics) -> str:
    """What became of everything, for people."""
    rejected = sum(statistics.rejected.values())
    rows = [
        ("requests", f"{statistics.requests:,}, with {statistics.completions:,} completions"),
        ("tasks read", f"{statistics.tasks:,}"),
        ("kept", f"{statistics.kept:,} ({_share(statistics.kept, statistics.tasks)})"),
        ("dropped", f"{rejected:,} ({_share(rejected, statistics.tasks)})"),
        *((f"  {name}", f"{n:,} ({_share(n, statistics.tasks)})") for name, n in statistics.rejected.items()),
    ]
    return "\n".join(f"{name:16} {value}" for name, value in rows)


def why_ended(statistics: Statistics, arguments: BootstrapArguments) -> str:
    """In one line: the budget that ended a run before its target, and the filter that took most."""
    budget = {
        "max_requests": f"--max_requests {arguments.request_budget} is used up",
        "max_stall": f"--max_stall {arguments.max_stall} requests in a row brought nothing new",
    }[str(statistics.ended)]
    name, count = max(statistics.rejected.items(), key=lambda item: item[1])
    most = f"of {statistics.tasks:,} tasks read, the filter {name} dropped most, {count:,}"
    if not count:
        most = "no filter dropped any"
    if not statistics.tasks:
        most = f"no task could be read in {statistics.completions:,} completions"
    target = arguments.num_instructions_to_generate
    return f"{arguments.batch_dir}: {statistics.kept:,} of {target:,} tasks kept; {budget}; {most}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
