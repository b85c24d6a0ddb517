"""Answers for a whole dataset, and how good they are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minigpt.data.order import deal
from minigpt.data.prompts import Message, Template
from minigpt.data.records import read_records
from minigpt.data.store import Blocks, Subset, TokenStore
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import progress_bar, say, world_size
from minigpt.files import whole_file, writing_to
from minigpt.inference.chat import fit_prompt
from minigpt.inference.sampling import generate
from minigpt.model.gpt2 import GPT


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
    model: GPT,
    tokenizer: Tokenizer,
    template: Template,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int | None = None,
) -> list[Prediction]:
    """Answers the last user message of each conversation, in the order given.

    Args:
        conversations: each ends with the assistant's message that is the reference.
        max_new_tokens: room for an answer; a prompt that leaves less of the context is cut as in chat.
        batch_size: conversations answered together, alike in length.

    Raises:
        ValueError: a conversation does not end with a question and its answer; or no room is left for prompts.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    prompts = []
    for index, messages in enumerate(conversations):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(f"conversation {index} has no question, or no answer to compare with")
        prompts.append(fit_prompt(messages[:-1], template, tokenizer, model.config.n_positions - max_new_tokens)[0])
    found: list[Prediction | None] = [None] * len(prompts)
    with progress_bar(len(prompts), "answer", "answering") as bar:
        for places in deal([len(prompt) for prompt in prompts], batch_size):
            answers = generate(
                model,
                [prompts[place] for place in places],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                eos_id=tokenizer.eot_id,
                stop=template.stop_strings(),
                tokenizer=tokenizer,
                seed=None if seed is None else [seed + int(place) for place in places],
            )
            for place, ids in zip(places, answers, strict=True):
                stopped = ids[-1:] == [tokenizer.eot_id]
                answer = template.read_answer(tokenizer.decode(ids[:-1] if stopped else ids))
                reference = conversations[place][-1]["content"].strip()
                found[int(place)] = Prediction(
                    prompt=list(conversations[place][:-1]),
                    reference=reference,
                    prediction=answer,
                    stopped=stopped,
                    exact_match=answer == reference,
                    rouge_l=scorer.score(reference, answer)["rougeL"].fmeasure,
                )
            bar.update(len(places))
    return [prediction for prediction in found if prediction is not None]


def predict_file(
    path: str,
    folder: Path,
    model: GPT,
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_new_tokens: int,
    batch_size: int,
    skip_bad_records: int = 0,
    overwrite: bool = False,
) -> Scores:
    """Answers a dataset; writes `predictions.jsonl`, a line per answer, and `scores.json` into a folder.

    Raises:
        FileExistsError: the folder holds predictions already, and `overwrite` is not set.
        ValueError: a record that is no question and answer, named with its file and line.
    """
    target = folder / "predictions.jsonl"
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target}: is there already; give another --output_dir, or --overwrite_output_dir")
    conversations = []
    for conversation in read_records(path, skip_bad_records=skip_bad_records):
        if conversation.messages[0]["role"] == "text":
            raise ValueError(f"{conversation.source}: plain text, expected a question and its answer")
        conversations.append(conversation.messages)
    predictions = predict(
        model, tokenizer, template, conversations, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    scores = score(predictions)
    lines = [json.dumps(prediction._asdict(), ensure_ascii=False) + "\n" for prediction in predictions]
    contents = {target: "".join(lines), folder / "scores.json": json.dumps(scores._asdict()) + "\n"}
    with writing_to(folder, "--output_dir"):
        for file, content in contents.items():
            with whole_file(file) as temporary:
                temporary.write_text(content, encoding="utf-8")
    say(f"{target}: {scores}")
    return scores


def show_answers(
    model: GPT, step: int, tokenizer: Tokenizer, data: Subset | TokenStore | None, count: int, max_new_tokens: int
) -> None:
    """Prints greedy answers to a dataset's first prompts; before the first step, prompts and references too."""
    if data is None:
        return
    room = model.config.n_positions - max_new_tokens
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
            say(f"  {index + 1} {name:9} {'' if len(text) <= 100 else '... '}{text[-100:]!r}")


def score(predictions: Sequence[Prediction]) -> Scores:
    """The means."""
    count = max(1, len(predictions))
    return Scores(
        answers=len(predictions),
        exact_match=sum(p.exact_match for p in predictions) / count,
        rouge_l=sum(p.rouge_l for p in predictions) / count,
        stop_rate=sum(p.stopped for p in predictions) / count,
    )


def show_text(model: GPT, tokenizer: Tokenizer, data: Blocks | None, length: int, seed: int) -> None:
    """Prints how a model goes on where the first block of `data` begins."""
    if length and data is not None:
        start = [int(i) for i in data[0].ids[: min(8, model.config.n_positions // 2)]]
        [more] = generate(model, [start], max_new_tokens=length, temperature=0.8, top_k=40, seed=seed)
        say(f"  sample    {tokenizer.decode(start)!r} ... {tokenizer.decode(more)!r}")
