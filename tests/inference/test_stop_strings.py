"""Where text ends a row, and what a tokenizer does not know."""

import pytest
import torch

from minigpt.inference.generate import generate
from minigpt.model.gpt2 import GPT


def test_a_stop_string_ends_a_row_wherever_tokens_end(speaker, tokenizer):
    def until(stop):
        return next(ids[:n] for n in range(len(ids) + 1) if stop in tokenizer.decode(ids[:n]))

    ids = tokenizer.encode("Paris.\n\n### Instruction:\nAnother 日本語")
    assert not any("### Instruction:" in tokenizer.decode([i]) for i in ids)  # it lies across several tokens
    assert len(until("日")) > len(until("Another ")) + 1  # and so does a character
    model = speaker(ids, prompt_length=1)
    settings = {"max_new_tokens": 40, "eos_id": tokenizer.eot_id, "tokenizer": tokenizer}
    for stop in (["### Instruction:"], ["never", "Paris"], ["日"], ["Another 日本"]):
        assert generate(model, [[1]], stop=stop, **settings) == [until(stop[-1])]
    assert generate(model, [[1]], stop=["never"], **settings) == [[*ids, tokenizer.eot_id]]


def test_a_stop_string_ends_a_beam(speaker, tokenizer):
    ids = tokenizer.encode("Paris is it.\n\n### Instruction: more")
    model = speaker(ids, prompt_length=1)
    settings = {"max_new_tokens": 30, "num_beams": 2, "tokenizer": tokenizer, "eos_id": tokenizer.eot_id}
    [found] = generate(model, [[1]], stop=["### Instr"], **settings)
    assert found == ids[: len(found)]
    assert "### Instr" in tokenizer.decode(found)
    assert "### Instr" not in tokenizer.decode(found[:-1])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_stop_string_before_min_new_tokens_ends_nothing_later_either(speaker, tokenizer, num_beams):
    """What was kept of the text held the whole of an early one, so the row ended as soon as it was allowed to."""
    ids = tokenizer.encode("No. Yes indeed. No. More")
    allowed = len(tokenizer.encode("No. Yes"))
    settings = {"max_new_tokens": 40, "eos_id": tokenizer.eot_id, "tokenizer": tokenizer, "num_beams": num_beams}
    for stop in (["No."], ["No.", "never, whatever it says"]):
        [found] = generate(speaker(ids, prompt_length=1), [[1]], stop=stop, min_new_tokens=allowed, **settings)
        assert tokenizer.decode(found) == "No. Yes indeed. No."


@pytest.mark.parametrize("num_beams", [1, 2])
def test_ids_that_the_tokenizer_does_not_know_never_come(speaker, tokenizer, num_beams):
    """Embeddings are padded to round sizes, and the rows beyond may be anything: decoding such an id failed, and with
    it a server for everybody."""
    ids = tokenizer.encode("Paris it is.")
    model = speaker(ids, prompt_length=1)
    config = model.config
    padded = GPT(type(config)(**{**vars(config), "vocab_size": config.vocab_size + 7})).eval()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            padded.get_parameter(name)[: len(weight)] = weight
        padded.wte.weight[config.vocab_size :] = 10 * model.wte.weight[ids[0]]  # likelier than the true first token
    settings = {"max_new_tokens": 40, "eos_id": tokenizer.eot_id, "num_beams": num_beams}
    assert generate(padded, [[1]], **settings)[0][0] >= config.vocab_size
    [found] = generate(padded, [[1]], stop=["never"], tokenizer=tokenizer, **settings)
    assert found == [*ids, tokenizer.eot_id]
