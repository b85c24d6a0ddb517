"""The prompts of a conversation: equal to the training text, and truncated to fit into the context."""

import random

import pytest

from minigpt.data.encode import encode_example, encode_segments
from minigpt.data.prompts import TEMPLATES, get_template
from minigpt.data.read.records import Conversation
from minigpt.inference.chat import Chat, as_one_text, fit_prompt

ALPACA, HUGCHAT = get_template("alpaca"), get_template("hugchat")
QUESTION = {"role": "user", "content": "What is the capital of France?"}


def encode(tokenizer, template, messages):
    return list(encode_segments(template.render(messages, add_generation_prompt=True), tokenizer).ids)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "none"])
@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_prompts_equal_the_training_text(prompt_recorder, tokenizer, name, system):
    """The conversation encoded for training begins with each of the prompts that the chat sent."""
    model, prompts = prompt_recorder(tokenizer, context=512)
    chat = Chat(model, tokenizer, get_template(name), system, max_new_tokens=8)
    for content, context in (("Add.", "2 and 3"), ("Why?", None), (" And the capital?\n", "Sweden\nNorway")):
        list(chat.ask(content, context))
    trained = encode_example(Conversation(chat.messages), get_template(name), tokenizer, 512).ids
    assert len(prompts) == 3
    assert [trained[: len(prompt)] for prompt in prompts] == prompts


@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_two_hundred_turns(prompt_recorder, tokenizer, system):
    """The oldest turns are dropped whole, the system text is kept, and the answer always has its space."""
    model, prompts = prompt_recorder(tokenizer)
    max_prompt_tokens, first = 128 - 16, 1 if system else 0
    chat = Chat(model, tokenizer, ALPACA, system, max_new_tokens=16)
    rng = random.Random(0)
    for _ in range(200):
        question = " ".join(rng.choices(["capital", "of", "Sweden", "seven", "plural"], k=rng.randint(1, 12)))
        messages = [*chat.messages, {"role": "user", "content": question}]
        list(chat.ask(question))

        def without(turns, messages=messages):
            return encode(tokenizer, ALPACA, [*messages[:first], *messages[first + 2 * turns :]])

        dropped = chat.answers[-1].turns_dropped
        assert (prompts[-1], chat.answers[-1].tokens_cut) == (without(dropped), 0)
        assert len(prompts[-1]) <= max_prompt_tokens
        assert dropped == 0 or len(without(dropped - 1)) > max_prompt_tokens
        assert tokenizer.decode(prompts[-1]).startswith(system or ALPACA.preamble)
    assert len(prompts) == 200
    assert dropped > 150
    assert len(chat.messages) == first + 400  # dropped turns stay in the conversation


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Answer in one word."])
@pytest.mark.parametrize("text", ["seven " * 300 + "eight", "日本語😀" * 100, "x" * 5000], ids=["words", "CJK", "x"])
def test_a_message_longer_than_the_context_is_truncated_from_the_left(prompt_recorder, tokenizer, name, system, text):
    """The system text, the template and the end of the message are unchanged."""
    model, prompts = prompt_recorder(tokenizer)
    chat = Chat(model, tokenizer, get_template(name), system, max_new_tokens=28)
    list(chat.ask("Hello."))
    earlier, message = chat.messages, {"role": "user", "content": text}
    list(chat.ask(text))
    assert chat.messages[:-1] == [*earlier, message]
    assert 90 <= len(prompts[-1]) <= 100
    if name == "none":
        [*head, message] = as_one_text([*earlier, message])
    else:
        head = earlier[: system is not None]
        assert chat.answers[-1].turns_dropped == 1
    prompt_text, cut = tokenizer.decode(prompts[-1]), chat.answers[-1].tokens_cut
    [n_kept] = [n for n in range(len(text)) if prompt_text == rendered(get_template(name), head, message, n)]
    assert n_kept > 0
    assert "\ufffd" not in prompt_text
    assert (
        tokenizer.decode(tokenizer.encode(message["content"])[cut:]).replace("\ufffd", "")
        == (message["content"][-n_kept:])
    )


def rendered(template, head, message, n_kept):
    shorter = {**message, "content": message["content"][-n_kept:]}
    return "".join(segment.text for segment in template.render([*head, shorter], add_generation_prompt=True))


def test_the_input_is_truncated_before_the_content(tokenizer):
    message = {"role": "user", "content": "Sum up the text.", "input": "seven " * 300 + "eight"}
    ids, _, cut = fit_prompt([message], ALPACA, tokenizer, 100)
    text = tokenizer.decode(ids)
    assert 90 <= len(ids) <= 100
    assert "### Instruction:\nSum up the text.\n\n### Input:\n" in text
    assert text.endswith("seven eight\n\n### Response:\n")
    assert cut > 200
    ids, _, more = fit_prompt([{**message, "content": "Sum up " * 200}], ALPACA, tokenizer, 100)
    assert tokenizer.decode(ids).endswith("Sum up Sum up \n\n### Response:\n")
    assert "### Input:" not in tokenizer.decode(ids)
    assert more > cut + 200


def test_a_system_text_that_fills_the_context_is_refused(prompt_recorder, tokenizer):
    model, _ = prompt_recorder(tokenizer)
    system, error = "seven " * 100, "tokens of system text and template leave none for a message: 100 fit beside"
    with pytest.raises(ValueError, match=error):
        Chat(model, tokenizer, ALPACA, system, max_new_tokens=28)
    chat = Chat(model, tokenizer, ALPACA, "Be brief.", max_new_tokens=28)
    list(chat.ask("Hello."))
    before = chat.messages
    with pytest.raises(ValueError, match=error):
        chat.system = system
    with pytest.raises(ValueError, match=error):
        chat.load([{"role": "system", "content": system}, *before[1:]])
    assert chat.messages == before


def test_max_new_tokens_that_fills_the_context_is_refused(tokenizer):
    with pytest.raises(ValueError, match="0 tokens are left for the prompt: lower --max_new_tokens"):
        fit_prompt([QUESTION], ALPACA, tokenizer, 0)


def test_an_answer_gets_at_most_half_of_the_context(prompt_recorder, tokenizer):
    model, prompts = prompt_recorder(tokenizer)
    chat = Chat(model, tokenizer, ALPACA, max_new_tokens=1000)
    list(chat.ask("seven " * 300))
    assert chat.max_answer_tokens == 64
    assert 55 <= len(prompts[-1]) <= 64


def test_a_thousand_strings_of_emoji_and_cjk(prompt_recorder, tokenizer):
    """A random model also generates invalid UTF-8: no incomplete character is shown, stored or sent."""
    model, prompts = prompt_recorder(tokenizer)
    chat = Chat(model, tokenizer, HUGCHAT, "日本語で答えて。😀", max_new_tokens=12, temperature=1.0, seed=1)
    characters = [*"日本語中文한국어漢字", "😀", "👩‍👩‍👧", "🇫🇷", "e\u0301", "👍🏽", "𠀀", "a", " "]
    rng = random.Random(0)
    truncated = 0
    for turn in range(1000):
        text = "".join(rng.choices(characters, k=rng.choice((3, 20, 200))))
        chat.sampling["seed"] = turn
        assert "\ufffd" not in "".join(chat.ask(text))
        assert chat.messages[-2]["content"] == text
        prompt_text = tokenizer.decode(prompts[-1])
        assert prompt_text.startswith("日本語で答えて。😀\n\nHuman: ")
        assert "\ufffd" not in prompt_text
        truncated += chat.answers[-1].tokens_cut > 0
    assert truncated > 100


def test_the_last_message_must_be_a_question(tokenizer):
    answer = {"role": "assistant", "content": "Paris."}
    for messages in ([QUESTION, answer], [{"role": "system", "content": "Hi"}], [QUESTION, QUESTION], []):
        with pytest.raises(ValueError, match="the role|must be a user's"):
            fit_prompt(messages, ALPACA, tokenizer, 100)
    with pytest.raises(ValueError, match="turn 2 has the role 'user'"):
        fit_prompt([QUESTION, QUESTION, answer, QUESTION], ALPACA, tokenizer, 40)
