"""Stop strings, and ids outside the tokenizer's vocabulary."""

import pytest
import torch

from minigpt.inference.generate import generate
from minigpt.model.gpt2 import GPT


def test_a_stop_string_ends_a_row_at_any_token_boundary(speaker, tokenizer):
    def ids_until(stop):
        return next(ids[:n] for n in range(len(ids) + 1) if stop in tokenizer.decode(ids[:n]))

    ids = tokenizer.encode("Paris.\n\n### Instruction:\nAnother 日本語")
    assert not any("### Instruction:" in tokenizer.decode([i]) for i in ids)  # the stop string spans several tokens
    assert len(ids_until("日")) > len(ids_until("Another ")) + 1  # and so does the character
    model = speaker(ids, prompt_length=1)
    settings = {"max_new_tokens": 40, "eos_id": tokenizer.eot_id, "tokenizer": tokenizer}
    for stop in (["### Instruction:"], ["never", "Paris"], ["日"], ["Another 日本"]):
        assert generate(model, [[1]], stop=stop, **settings) == [ids_until(stop[-1])]
    assert generate(model, [[1]], stop=["never"], **settings) == [[*ids, tokenizer.eot_id]]


def test_a_stop_string_ends_a_beam(speaker, tokenizer):
    ids = tokenizer.encode("Paris is it.\n\n### Instruction: more")
    model = speaker(ids, prompt_length=1)
    settings = {"max_new_tokens": 30, "num_beams": 2, "tokenizer": tokenizer, "eos_id": tokenizer.eot_id}
    [generated] = generate(model, [[1]], stop=["### Instr"], **settings)
    assert generated == ids[: len(generated)]
    assert "### Instr" in tokenizer.decode(generated)
    assert "### Instr" not in tokenizer.decode(generated[:-1])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_stop_string_before_min_new_tokens_does_not_end_the_row_later(speaker, tokenizer, num_beams):
    """Regression: an early stop string stayed in the buffer, so the row ended once min_new_tokens was reached."""
    ids = tokenizer.encode("No. Yes indeed. No. More")
    allowed = len(tokenizer.encode("No. Yes"))
    settings = {"max_new_tokens": 40, "eos_id": tokenizer.eot_id, "tokenizer": tokenizer, "num_beams": num_beams}
    for stop in (["No."], ["No.", "never, whatever it says"]):
        [generated] = generate(speaker(ids, prompt_length=1), [[1]], stop=stop, min_new_tokens=allowed, **settings)
        assert tokenizer.decode(generated) == "No. Yes indeed. No."


@pytest.mark.parametrize("num_beams", [1, 2])
def test_ids_outside_the_vocabulary_are_never_generated(speaker, tokenizer, num_beams):
    """Embeddings may be padded to a round size, with arbitrary values in the padding. Regression: decoding such an id
    raised an error, which ended the server."""
    ids = tokenizer.encode("Paris it is.")
    model = speaker(ids, prompt_length=1)
    config = model.config
    padded = GPT(type(config)(**{**vars(config), "vocab_size": config.vocab_size + 7})).eval()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            padded.get_parameter(name)[: len(weight)] = weight
        padded.wte.weight[config.vocab_size :] = 10 * model.wte.weight[ids[0]]  # likelier than the correct first token
    settings = {"max_new_tokens": 40, "eos_id": tokenizer.eot_id, "num_beams": num_beams}
    assert generate(padded, [[1]], **settings)[0][0] >= config.vocab_size
    [generated] = generate(padded, [[1]], stop=["never"], tokenizer=tokenizer, **settings)
    assert generated == [*ids, tokenizer.eot_id]
