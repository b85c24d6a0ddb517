"""The bootstrap of Self-Instruct (Wang et al. 2022, https://arxiv.org/abs/2212.10560): a model writes instruction data.

A request shows tasks from the seed pool and the machine pool, and the model continues the list. Tasks parsed from the
completion pass through the filters; those that remain are added to the machine pool.

Requests run in rounds. The shots of a round are sampled before it starts, from tasks kept in earlier rounds, and depend
only on the run's seed and the request's index, as do the sampling seeds. So the files (run_files.py) are the only
state, and a resumed run gives the same result wherever it was interrupted. The run ends exactly at the request that
reaches the target or a budget; with a larger one it resumes from there.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple

from minigpt.distributed import clock, print0, progress_bar
from minigpt.selfinstruct.curation.labels import LabelsFirst
from minigpt.selfinstruct.filters import BANNED_WORDS, Filters
from minigpt.selfinstruct.generators import (
    Completion,
    Generator,
    GeneratorArguments,
    SamplingParams,
    SeededPrompt,
    fit_shots,
)
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.run_files import BatchDir, Statistics, as_json
from minigpt.selfinstruct.tasks import Task
from minigpt.settings.groups import check_range

BATCHES_PER_ROUND = 4
LIST_LENGTH = 20  # tasks in a request and its completion together, as in Stanford Alpaca


@dataclass
class BootstrapArguments:
    """Target, budgets and shots of a run."""

    batch_dir: str = "runs/selfinstruct"
    """Run folder; an existing run is resumed."""
    seed_tasks_path: str | None = None
    """Human-written seed tasks, in any supported format. Unset: the bundled ones."""
    num_instructions_to_generate: int = 100
    """Number of tasks to keep. All tasks of the last request are filtered, so the result may be a few more."""
    num_prompt_instructions: int = 8
    """Shots per request; fewer if the context is too short."""
    num_prompt_synthetic_instructions: int = 2
    """How many of the shots are model-written, once there are any."""
    max_requests: int | None = None
    """Maximum number of requests. Unset: ten per task to keep, at least 100."""
    max_stall: int = 100
    """The run ends after this many consecutive requests without a kept task."""

    def __post_init__(self) -> None:
        check_range(self, "at least 1", lambda x: x >= 1, "num_instructions_to_generate", "num_prompt_instructions")
        check_range(self, "at least 1", lambda x: x >= 1, "max_requests", "max_stall")
        check_range(self, "at least 0", lambda x: x >= 0, "num_prompt_synthetic_instructions")
        if self.num_prompt_synthetic_instructions > self.num_prompt_instructions:
            raise ValueError(
                f"--num_prompt_synthetic_instructions {self.num_prompt_synthetic_instructions} is more than "
                f"--num_prompt_instructions {self.num_prompt_instructions}, which includes them: use a smaller number"
            )

    @property
    def request_budget(self) -> int:
        return self.max_requests or max(100, 10 * self.num_instructions_to_generate)


@dataclass
class TaskArguments:
    """Format and filters of tasks."""

    format: Literal["io", "iio"] = "iio"
    """io: instruction and output; iio: with an input, or <noinput>, between them."""
    trigger_instruction: str = "Instruction"
    """Trigger word before an instruction in prompts and completions."""
    trigger_input: str = "Input"
    """Trigger word before an input."""
    trigger_output: str = "Output"
    """Trigger word before an output."""
    label_first: bool = False
    """Ask the model whether a task is classification; if so, generate a label first, then an input that has it (iio
    only): inputs generated first are biased towards one label."""
    threshold: float = 0.7
    """Keep a task only if its ROUGE-L with every other is below this."""
    keep_programming: bool = False
    """Keep instructions that start with "Write a program" or "Write a function"."""
    banned_words: list[str] = field(default_factory=lambda: list(BANNED_WORDS))
    """Drop instructions that contain one of these as a whole word; "" disables the filter."""
    language: str = "en"
    """Language code of the instructions. For any but en, an instruction may start with a non-ASCII character, and
    ROUGE-L uses the words of all scripts."""

    def __post_init__(self) -> None:
        check_range(self, "above 0 and at most 1", lambda x: 0 < x <= 1, "threshold")
        self.task_format()  # raises if the trigger words cannot be parsed back
        if self.label_first and self.format != "iio":
            raise ValueError("--label_first generates an input, and --format io has none")

    def task_format(self) -> TaskFormat:
        return TaskFormat(self.format, self.trigger_instruction, self.trigger_input, self.trigger_output)

    def filters(self) -> Filters:
        return Filters(self.banned_words, self.keep_programming, self.language)


@dataclass
class RunArguments(BootstrapArguments, TaskArguments, GeneratorArguments):
    """All settings of a run except the model."""

    def __post_init__(self) -> None:
        for part in (BootstrapArguments, TaskArguments, GeneratorArguments):
            part.__post_init__(self)

    @property
    def round_size(self) -> int:
        """Requests per round."""
        return BATCHES_PER_ROUND * self.request_batch_size


class Request(NamedTuple):
    """A prompt of a round, and the shots in it."""

    idx: int
    shots: list[Task]
    prompt: SeededPrompt


class Bootstrap:
    """Runs, or resumes, a bootstrap."""

    def __init__(self, files: BatchDir, arguments: RunArguments, seed_tasks: Sequence[Task], generator: Generator):
        """Raises ValueError if no seed task fits the context, or --label_first lacks seed tasks of both kinds."""
        from minigpt.selfinstruct.novelty import NoveltyFilter, rouge_words, unicode_words

        self.files, self.arguments, self.statistics = files, arguments, files.statistics
        self.generator, self.format = generator, arguments.task_format()
        self.filters = arguments.filters()
        self.novelty = NoveltyFilter(arguments.threshold, rouge_words if self.filters.is_english else unicode_words)
        # A completion ends when the list is long enough, or at max_length tokens.
        length = max(LIST_LENGTH, 2 * arguments.num_prompt_instructions)
        stop = (*self.format.stop_strings(length + 1), *arguments.stop_words)
        self.params = SamplingParams(arguments, stop)

        max_length, context = arguments.max_length, generator.context
        max_prompt_tokens = context - max_length
        if max_prompt_tokens <= 0:
            raise ValueError(
                f"--max_length {max_length} leaves no tokens for the prompt: the model's context is {context} tokens, "
                "for prompt and completion together (use a smaller --max_length)"
            )
        self.seed_pool = [task for task in seed_tasks if self._fit([task])]
        self.machine_pool: list[tuple[int, Task]] = []
        """(request index, task) of the kept tasks that fit the context."""
        if not self.seed_pool:
            raise ValueError(
                f"--max_length {max_length} leaves {max_prompt_tokens} of the model's {context} tokens for the "
                f"prompt, and none of the {len(seed_tasks)} seed tasks fits (use a smaller --max_length, or shorter "
                "tasks)"
            )
        if too_long := len(seed_tasks) - len(self.seed_pool):
            print0(f"{too_long:,} of {len(seed_tasks):,} seed tasks are too long to be used as shots")
        self.labels = None
        if arguments.label_first:
            self.labels = LabelsFirst(
                self.seed_pool, self.format, arguments.num_prompt_instructions, generator, self.params, self._complete
            )
        for task in seed_tasks:
            self.novelty.add(task.instruction)
        for line in files.kept:
            self.novelty.add(line["instruction"])
        self._add_to_machine_pool(files.kept)
        self.last_kept_request: int = files.kept[-1]["request_idx"] if files.kept else -1

    def run(self) -> Statistics:
        """Runs rounds until the target or a budget is reached."""
        statistics, target = self.statistics, self.arguments.num_instructions_to_generate
        if statistics.requests:
            print0(
                f"{self.files.folder}: resuming after {statistics.requests:,} requests, {statistics.kept:,} tasks kept"
            )
        with progress_bar(target, "task", "tasks kept", initial=statistics.kept) as bar:
            statistics.ended = self._end_reason()
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
        pool = [task for idx, task in self.machine_pool if idx < first]
        requests = [
            self._make_request(idx, pool)
            for idx in range(self.statistics.requests, min(first + size, self.arguments.request_budget))
        ]
        completions_by_request = self._complete([request.prompt for request in requests], self.params)

        kept: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        for request, completions in zip(requests, completions_by_request, strict=True):
            tasks = [
                task
                for completion in completions
                for task in self.format.parse(completion.text, len(request.shots) + 1, completion.finished)
            ]
            verdicts = [self._filter(task, request.idx, kept) for task in tasks]
            lines.append(
                {
                    "request_idx": request.idx,
                    "seed": request.prompt.seed,
                    "shots": [task.instruction for task in request.shots],
                    "prompt": request.prompt.text,
                    "completions": as_json(completions),
                    "tasks": verdicts,
                }
            )
            self.statistics.requests += 1
            self.statistics.completions += len(completions)
            self.statistics.tasks += len(tasks)
            self.statistics.ended = self._end_reason()
            if self.statistics.ended:
                break
        if self.labels:
            self.labels.apply(kept)
        self.files.commit(kept, lines)
        self._add_to_machine_pool(kept)
        if self.statistics.requests == first + size:
            self.files.clear_completion_cache()

    def _make_request(self, idx: int, pool: Sequence[Task]) -> Request:
        """The request with index `idx`; `pool` is the machine pool at the start of its round."""
        random = Random(f"{self.arguments.seed}/{idx}")
        synthetic = min(self.arguments.num_prompt_synthetic_instructions, len(pool))
        human = min(self.arguments.num_prompt_instructions - synthetic, len(self.seed_pool))
        shots = random.sample(pool, synthetic) + random.sample(self.seed_pool, human)
        random.shuffle(shots)
        seed = random.getrandbits(63)
        fitted = self._fit(shots)
        assert fitted is not None  # each shot fits on its own
        shots, text = fitted
        return Request(idx, shots, SeededPrompt(text, seed))

    def _filter(self, task: Task, request_idx: int, kept: list[dict[str, Any]]) -> dict[str, Any]:
        """The task with its verdict. A task that passes is appended to `kept` and to the novelty pool."""
        verdict, score, nearest = self.filters.reject(task), None, None
        if verdict is None:
            novelty = self.novelty.check(task.instruction)
            verdict, score = "kept" if novelty.accepted else "novelty", novelty.score
            nearest = next(iter(novelty.neighbours), None)
        if verdict == "kept":
            kept.append(
                {
                    "instruction": task.instruction,
                    "input": task.input,
                    "output": task.output,
                    "most_similar_instructions": novelty.neighbours,
                    "avg_similarity_score": novelty.average,
                    "request_idx": request_idx,
                }
            )
            self.statistics.kept += 1
            self.novelty.add(task.instruction)
            self.last_kept_request = request_idx
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

    def _complete(self, prompts: Sequence[SeededPrompt], params: SamplingParams) -> list[list[Completion]]:
        """The completions of each prompt; those received before an interruption come from the cache."""
        cache = self.files.cached_completions
        missing = [prompt for prompt in prompts if prompt.seed not in cache]

        def save(index: int, completions: list[Completion]) -> None:
            self.files.cache_completions(missing[index].seed, completions)

        results = self.generator.complete(missing, params, save) if missing else []
        generated = {prompt.seed: completions for prompt, completions in zip(missing, results, strict=True)}
        return [generated[seed] if seed in generated else cache[seed] for _, seed in prompts]

    def _add_to_machine_pool(self, kept: Sequence[dict[str, Any]]) -> None:
        for line in kept:
            task = Task(line["instruction"], line["input"], line["output"])
            if self._fit([task]):
                self.machine_pool.append((line["request_idx"], task))

    def _fit(self, shots: list[Task]) -> tuple[list[Task], str] | None:
        return fit_shots(self.generator, self.format.render, shots, self.arguments.max_length)

    # ---- the end

    def _end_reason(self) -> str | None:
        if self.statistics.kept >= self.arguments.num_instructions_to_generate:
            return "target"
        if self.statistics.requests >= self.arguments.request_budget:
            return "max_requests"
        if self.statistics.requests - self.last_kept_request > self.arguments.max_stall:
            return "max_stall"
        return None


def table(statistics: Statistics) -> str:
    """The statistics as text."""
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
    """One line: which budget ended the run before its target, and which filter dropped most."""
    budget = {
        "max_requests": f"--max_requests {arguments.request_budget} is reached",
        "max_stall": f"--max_stall {arguments.max_stall} consecutive requests without a kept task",
    }[str(statistics.ended)]
    name, count = max(statistics.rejected.items(), key=lambda item: item[1])
    detail = f"of {statistics.tasks:,} tasks read, the filter {name} dropped most, {count:,}"
    if not count:
        detail = "no filter dropped any"
    if not statistics.tasks:
        detail = f"no task found in {statistics.completions:,} completions"
    target = arguments.num_instructions_to_generate
    return f"{arguments.batch_dir}: {statistics.kept:,} of {target:,} tasks kept; {budget}; {detail}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
