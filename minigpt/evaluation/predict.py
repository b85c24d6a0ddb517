"""Answers a whole dataset and scores the answers: `sft.py --predict`, and the sample answers at an evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minigpt.data.prompts import Message, Template
from minigpt.data.read.records import Conversation, read_records
from minigpt.data.store import Subset, TokenBlocks, TokenStore
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import print0, progress_bar, world_size
from minigpt.evaluation.judge import Judge, mark_answers, request_for
from minigpt.evaluation.page import (
    PAGE,
    PREDICTIONS,
    PredictionRun,
    check_questions,
    read_predictions,
    write_predictions,
)
from minigpt.files import writing_to
from minigpt.inference.chat import fit_prompt
from minigpt.inference.decoder import Decoder
from minigpt.inference.generate import Sampling, generate
from minigpt.model.base import CausalLM

JUDGEMENTS = "judgements.jsonl"


class Prediction(NamedTuple):
    """One answer with its reference."""

    prompt: list[Message]
    """The messages up to the last user message."""
    reference: str
    prediction: str
    stopped: bool
    """The answer ended with end-of-text, not with a stop string or at max_new_tokens."""
    exact_match: bool
    """Equal to the reference, ignoring whitespace around both."""
    rouge_l: float
    """ROUGE-L F-measure (Lin 2004), as `rouge_score` computes it, without a stemmer."""


class Scores(NamedTuple):
    """Means over a set of predictions."""

    answers: int
    exact_match: float
    rouge_l: float
    stop_rate: float

    def __str__(self) -> str:
        return (
            f"{self.answers:,} answers: exact match {self.exact_match:.1%}, ROUGE-L {self.rouge_l:.3f}, "
            f"{self.stop_rate:.1%} ended with end-of-text"
        )


def predict(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Prediction]:
    """Answers the last user message of each conversation greedily. The predictions are in the order of `conversations`.

    Args:
        conversations: each ends with the assistant message that is the reference.
        max_new_tokens: the maximum length of an answer; a prompt that does not leave as much is truncated as in chat.
        batch_size: the number of rows in a batch. When an answer ends, the next question takes its place.

    Raises:
        ValueError: a conversation does not end with a question and its answer, or nothing of its question fits; the
            message begins with the file and line of the conversation.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if not conversations:
        return []
    max_prompt_tokens = model.config.context - max_new_tokens
    prompts = [
        _prompt(number, conversation, template, tokenizer, max_prompt_tokens)
        for number, conversation in enumerate(conversations, 1)
    ]
    longest = max(map(len, prompts)) + max_new_tokens
    rows = min(batch_size, len(prompts))
    decoder = Decoder(model, max_rows=rows, max_length=longest, tokenizer=tokenizer)
    sampling = Sampling(max_new_tokens=max_new_tokens, eos_id=tokenizer.eot_id, stop=template.stop_strings())
    # Sorted by length, so that prompts of similar length are prefilled together; the longest need most memory.
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    indices = {decoder.add(prompts[index], sampling): index for index in longest_first}  # decoder key -> index

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    new: list[list[int]] = [[] for _ in prompts]
    predictions: dict[int, Prediction] = {}
    with progress_bar(len(prompts), "answer", "answering") as bar:
        while len(decoder):
            for key, token, reason in decoder.step():
                index = indices[key]
                new[index].append(token)
                if reason is None:
                    continue
                stopped = token == tokenizer.eot_id
                answer = template.read_answer(tokenizer.decode(new[index][:-1] if stopped else new[index]))
                messages = conversations[index].messages
                reference = messages[-1]["content"].strip()
                predictions[index] = Prediction(
                    prompt=list(messages[:-1]),
                    reference=reference,
                    prediction=answer,
                    stopped=stopped,
                    exact_match=answer == reference,
                    rouge_l=scorer.score(reference, answer)["rougeL"].fmeasure,
                )
                bar.update(1)
    return [predictions[index] for index in range(len(prompts))]


def _prompt(
    number: int, conversation: Conversation, template: Template, tokenizer: Tokenizer, max_prompt_tokens: int
) -> list[int]:
    """The ids that ask a conversation's last question. Errors begin with the conversation's file and line."""
    source = conversation.source or f"conversation {number}"
    messages = conversation.messages
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{source}: does not end with a question and its answer, so there is nothing to compare with")
    try:
        ids = fit_prompt(messages[:-1], template, tokenizer, max_prompt_tokens).ids
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if not ids:
        raise ValueError(f"{source}: the question is empty")
    return ids


def score(predictions: Sequence[Prediction]) -> Scores:
    """The means over the predictions."""
    count = max(1, len(predictions))
    return Scores(
        answers=len(predictions),
        exact_match=sum(p.exact_match for p in predictions) / count,
        rouge_l=sum(p.rouge_l for p in predictions) / count,
        stop_rate=sum(p.stopped for p in predictions) / count,
    )


def predict_file(
    path: str,
    folder: Path,
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    *,
    name: str,
    max_new_tokens: int,
    batch_size: int,
    skip_bad_records: int = 0,
    overwrite: bool = False,
    compare_with: str | None = None,
    judge: Judge | None = None,
) -> PredictionRun:
    """Answers a dataset and writes predictions.jsonl (one line per answer), scores.json and predictions.html.

    If the folder already has answers of the same model, they are kept, and only compared or judged.

    Args:
        name: the model's name, for scores and page.
        overwrite: answer again, even if the folder has answers.
        compare_with: a folder with another model's answers to the same questions, shown beside these on the page. It
            is recorded in scores.json, so that a later run which keeps the answers shows it too.
        judge: marks the answers, see `mark_answers`; its replies are stored in judgements.jsonl.

    Raises:
        FileExistsError: the folder has answers of another model, or nothing to do with them: neither `compare_with`,
            `judge` nor `overwrite` is given.
        ValueError: a record does not end with a question and its answer, or the folders' questions differ; names the
            file and the line.
    """
    target = folder / PREDICTIONS
    reuse = target.exists() and not overwrite
    if reuse and not (compare_with or judge):
        raise FileExistsError(f"{target}: already exists; give another --output_dir, or --overwrite_output_dir")
    conversations = list(read_records(path, skip_bad_records=skip_bad_records))
    if not conversations:
        raise ValueError(f"{path}: contains no question")
    questions = [(c.messages[:-1], c.messages[-1]["content"].strip()) for c in conversations]
    if reuse:
        run = read_predictions(folder)
        if run.name != name:
            raise FileExistsError(f"{target}: has answers of {run.name}; give another --output_dir for those of {name}")
        check_questions(run, questions, path)
        print0(f"{target}: already exists, and is kept (--overwrite_output_dir answers again)")
        if not compare_with and (recorded := run.scores.get("compare_with")):
            if (Path(recorded) / PREDICTIONS).exists():
                compare_with = recorded
            else:
                print0(f"{recorded}: no longer exists; the page shows only {name} (--compare_with sets another folder)")
    others = [read_predictions(Path(compare_with))] if compare_with else []
    for other in others:
        check_questions(other, questions, path)
    if not reuse:
        predictions = predict(
            model, tokenizer, template, conversations, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        scores = {"model": name, "data": path, **score(predictions)._asdict()}
        run = PredictionRun(name, folder, [prediction._asdict() for prediction in predictions], scores)
    if compare_with:
        run = run._replace(scores={**run.scores, "compare_with": compare_with})
    write_predictions(run, path, others)
    print0(f"{target}: {Scores(*(run.scores[name] for name in Scores._fields))}")
    if judge:
        requests = [request_for(line["prompt"], line["reference"], line["prediction"]) for line in run.predictions]
        with writing_to(folder, "--output_dir"):
            marks = mark_answers(requests, judge, folder / JUDGEMENTS)
        lines = [{**line, "mark": mark} for line, mark in zip(run.predictions, marks.each, strict=True)]
        run = run._replace(predictions=lines, scores={**run.scores, "judge": marks.summary()})
        write_predictions(run, path, others)
        print0(f"{folder / JUDGEMENTS}: {marks}")
    print0(f"{folder / PAGE}: open it in a browser")
    return run


def show_answers(
    model: CausalLM, step: int, tokenizer: Tokenizer, data: Subset | TokenStore | None, count: int, max_new_tokens: int
) -> None:
    """Prints greedy answers to a dataset's first prompts; at step 0 also the prompts and references."""
    if data is None:
        return
    max_prompt_tokens = model.config.context - max_new_tokens
    for index in range(min(count, len(data))):
        ids, start = [int(i) for i in data[index].ids], int(data.prompt_lengths[index])
        if start == 0:
            continue  # plain text: it contains no question
        end = ids.index(tokenizer.eot_id, start) + 1 if tokenizer.eot_id in ids[start:] else len(ids)
        prompt, reference = ids[max(0, start - max_prompt_tokens) : start], ids[start:end]
        # No early stop on several ranks: under ZeRO-3 every rank must run the same number of forwards, because each
        # forward gathers weights from all ranks.
        eos_id = tokenizer.eot_id if world_size() == 1 else None
        [answer] = generate(model, [prompt], max_new_tokens=max_new_tokens, eos_id=eos_id)
        if tokenizer.eot_id in answer:
            answer = answer[: answer.index(tokenizer.eot_id) + 1]
        extra = {"prompt": prompt, "reference": reference} if step == 0 else {}
        for name, part in {**extra, "answer": answer}.items():
            text = tokenizer.decode(part)
            print0(f"  {index + 1} {name:9} {'' if len(text) <= 100 else '... '}{text[-100:]!r}")


def show_text(model: CausalLM, tokenizer: Tokenizer, data: TokenBlocks | None, length: int, seed: int) -> None:
    """Prints how a model continues the beginning of the first block of `data`."""
    if length and data is not None:
        start = [int(i) for i in data[0].ids[: min(8, model.config.context // 2)]]
        [more] = generate(model, [start], max_new_tokens=length, temperature=0.8, top_k=40, seed=seed)
        print0(f"  sample    {tokenizer.decode(start)!r} ... {tokenizer.decode(more)!r}")
