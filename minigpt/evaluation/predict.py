"""Answers for a whole dataset, and how good they are: `sft.py --predict`, and the samples at an evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minigpt.data.prompts import Message, Template
from minigpt.data.read.records import Conversation, read_records
from minigpt.data.store import Subset, TokenBlocks, TokenStore
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import print0, progress_bar, world_size
from minigpt.evaluation.judge import Judge, mark_answers, request_for
from minigpt.evaluation.page import PAGE, PREDICTIONS, Run, check_questions, read_run, write_run
from minigpt.files import writing_to
from minigpt.inference.chat import fit_prompt
from minigpt.inference.decoder import Decoder
from minigpt.inference.generate import Sampling, generate
from minigpt.model.base import CausalLM

JUDGEMENTS = "judgements.jsonl"


class Prediction(NamedTuple):
    """One answer beside its reference."""

    prompt: list[Message]
    """The messages up to the last user's."""
    reference: str
    prediction: str
    stopped: bool
    """The model ended its answer itself, with end-of-text."""
    exact_match: bool
    """Equal to the reference, blanks around both aside."""
    rouge_l: float
    """ROUGE-L F-measure of Lin 2004, as `rouge_score` computes it, without a stemmer."""


class Scores(NamedTuple):
    """Means over a set of predictions."""

    answers: int
    exact_match: float
    rouge_l: float
    stop_rate: float

    def __str__(self) -> str:
        return (
            f"{self.answers:,} answers: exact match {self.exact_match:.1%}, ROUGE-L {self.rouge_l:.3f}, "
            f"{self.stop_rate:.1%} stop by themselves"
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
    """Answers the last user message of each conversation greedily, in the order given.

    Args:
        conversations: each ends with the assistant's message that is the reference.
        max_new_tokens: room for an answer; a prompt that leaves less of the context is cut as in chat.
        batch_size: conversations answered together. When an answer ends, the next question takes its place.

    Raises:
        ValueError: a conversation does not end with a question and its answer, or no room is left for its question;
            the message begins with where it was read.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if not conversations:
        return []
    room = model.config.context - max_new_tokens
    prompts = [_prompt(number, found, template, tokenizer, room) for number, found in enumerate(conversations, 1)]
    longest = max(map(len, prompts)) + max_new_tokens
    rows = min(batch_size, len(prompts))
    decoder = Decoder(model, max_rows=rows, max_length=longest, tokenizer=tokenizer)
    sampling = Sampling(max_new_tokens=max_new_tokens, eos_id=tokenizer.eot_id, stop=template.stop_strings())
    # Those alike in length are read together, the longest first: they take most room.
    longest_first = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    places = {decoder.add(prompts[place], sampling): place for place in longest_first}  # by the decoder's key

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    new: list[list[int]] = [[] for _ in prompts]
    found: dict[int, Prediction] = {}
    with progress_bar(len(prompts), "answer", "answering") as bar:
        while len(decoder):
            for key, token, reason in decoder.step():
                place = places[key]
                new[place].append(token)
                if reason is None:
                    continue
                stopped = token == tokenizer.eot_id
                answer = template.read_answer(tokenizer.decode(new[place][:-1] if stopped else new[place]))
                messages = conversations[place].messages
                reference = messages[-1]["content"].strip()
                found[place] = Prediction(
                    prompt=list(messages[:-1]),
                    reference=reference,
                    prediction=answer,
                    stopped=stopped,
                    exact_match=answer == reference,
                    rouge_l=scorer.score(reference, answer)["rougeL"].fmeasure,
                )
                bar.update(1)
    return [found[place] for place in range(len(prompts))]


def _prompt(number: int, conversation: Conversation, template: Template, tokenizer: Tokenizer, room: int) -> list[int]:
    """The ids that ask a conversation's last question; an error begins with where it was read."""
    source = conversation.source or f"conversation {number}"
    messages = conversation.messages
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{source}: no question and answer, so nothing to compare with")
    try:
        ids = fit_prompt(messages[:-1], template, tokenizer, room).ids
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if not ids:
        raise ValueError(f"{source}: the question is empty")
    return ids


def score(predictions: Sequence[Prediction]) -> Scores:
    """The means."""
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
) -> Run:
    """Answers a dataset into a folder: predictions.jsonl, a line per answer, scores.json, and predictions.html.

    Answers of the same model that are there already are not given anew where there is something else to do with them.

    Args:
        name: the model's, for scores and page.
        overwrite: answer anew.
        compare_with: a folder of the same questions' answers, which the page shows beside these. It is kept in
            scores.json: where the answers are not given anew, the page goes on showing it.
        judge: marks the answers, see `mark_answers`; what it said is kept in judgements.jsonl.

    Raises:
        FileExistsError: the folder holds predictions, and nothing is to be done with them.
        ValueError: a record that is no question and answer, or the folders' questions differ: named with file and line.
    """
    target = folder / PREDICTIONS
    given = target.exists() and not overwrite
    if given and not (compare_with or judge):
        raise FileExistsError(f"{target}: is there already; give another --output_dir, or --overwrite_output_dir")
    conversations = list(read_records(path, skip_bad_records=skip_bad_records))
    if not conversations:
        raise ValueError(f"{path}: no question in it")
    questions = [(found.messages[:-1], found.messages[-1]["content"].strip()) for found in conversations]
    if given:
        run = read_run(folder)
        if run.name != name:
            raise FileExistsError(f"{target}: the answers of {run.name}; give another --output_dir for those of {name}")
        check_questions(run, questions, path)
        print0(f"{target}: is there already, and stays as it is (--overwrite_output_dir answers anew)")
        if not compare_with and (kept := run.scores.get("compare_with")):
            if (Path(kept) / PREDICTIONS).exists():
                compare_with = kept
            else:
                print0(f"{kept}: is gone; the page shows {name} alone (--compare_with names another)")
    others = [read_run(Path(compare_with))] if compare_with else []
    for other in others:
        check_questions(other, questions, path)
    if not given:
        predictions = predict(
            model, tokenizer, template, conversations, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        scores = {"model": name, "data": path, **score(predictions)._asdict()}
        run = Run(name, folder, [prediction._asdict() for prediction in predictions], scores)
    if compare_with:
        run = run._replace(scores={**run.scores, "compare_with": compare_with})
    write_run(run, path, others)
    print0(f"{target}: {Scores(*(run.scores[name] for name in Scores._fields))}")
    if judge:
        asked = [request_for(line["prompt"], line["reference"], line["prediction"]) for line in run.predictions]
        with writing_to(folder, "--output_dir"):
            marks = mark_answers(asked, judge, folder / JUDGEMENTS)
        lines = [{**line, "mark": mark} for line, mark in zip(run.predictions, marks.each, strict=True)]
        run = run._replace(predictions=lines, scores={**run.scores, "judge": marks.summary()})
        write_run(run, path, others)
        print0(f"{folder / JUDGEMENTS}: {marks}")
    print0(f"{folder / PAGE}: to look at in a browser")
    return run


def show_answers(
    model: CausalLM, step: int, tokenizer: Tokenizer, data: Subset | TokenStore | None, count: int, max_new_tokens: int
) -> None:
    """Prints greedy answers to a dataset's first prompts; before the first step, prompts and references too."""
    if data is None:
        return
    room = model.config.context - max_new_tokens
    for index in range(min(count, len(data))):
        ids, start = [int(i) for i in data[index].ids], int(data.prompt_lengths[index])
        if start == 0:
            continue  # a text: there is no question in it
        end = ids.index(tokenizer.eot_id, start) + 1 if tokenizer.eot_id in ids[start:] else len(ids)
        prompt, reference = ids[max(0, start - room) : start], ids[start:end]
        # On several ranks each goes on for equally long, or under ZeRO-3 one would wait for weights that the others,
        # done already, no longer gather.
        eos_id = tokenizer.eot_id if world_size() == 1 else None
        [answer] = generate(model, [prompt], max_new_tokens=max_new_tokens, eos_id=eos_id)
        if tokenizer.eot_id in answer:
            answer = answer[: answer.index(tokenizer.eot_id) + 1]
        shown = {"prompt": prompt, "reference": reference} if step == 0 else {}
        for name, part in {**shown, "answer": answer}.items():
            text = tokenizer.decode(part)
            print0(f"  {index + 1} {name:9} {'' if len(text) <= 100 else '... '}{text[-100:]!r}")


def show_text(model: CausalLM, tokenizer: Tokenizer, data: TokenBlocks | None, length: int, seed: int) -> None:
    """Prints how a model goes on where the first block of `data` begins."""
    if length and data is not None:
        start = [int(i) for i in data[0].ids[: min(8, model.config.context // 2)]]
        [more] = generate(model, [start], max_new_tokens=length, temperature=0.8, top_k=40, seed=seed)
        print0(f"  sample    {tokenizer.decode(start)!r} ... {tokenizer.decode(more)!r}")
