"""What a model is asked in a conversation: what it was trained on, and no more of it than fits."""

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
def test_what_is_asked_is_what_was_trained_on(asked, tokenizer, name, system):
    """The same conversation, encoded for training, begins with each of the prompts that chat asked."""
    model, prompts = asked(tokenizer, context=512)
    chat = Chat(model, tokenizer, get_template(name), system, max_new_tokens=8)
    for content, context in (("Add.", "2 and 3"), ("Why?", None), (" And the capital?\n", "Sweden\nNorway")):
        list(chat.ask(content, context))
    trained = encode_example(Conversation(chat.messages), get_template(name), tokenizer, 512).ids
    assert len(prompts) == 3
    assert [trained[: len(prompt)] for prompt in prompts] == prompts


@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_two_hundred_turns(asked, tokenizer, system):
    """The oldest turns leave whole, the system text stays, and the answer always has its room."""
    model, prompts = asked(tokenizer)
    room, first = 128 - 16, 1 if system else 0
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
        assert len(prompts[-1]) <= room
        assert dropped == 0 or len(without(dropped - 1)) > room
        assert tokenizer.decode(prompts[-1]).startswith(system or ALPACA.preamble)
    assert len(prompts) == 200
    assert dropped > 150
    assert len(chat.messages) == first + 400  # nothing is forgotten but what the model is asked


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Answer in one word."])
@pytest.mark.parametrize("text", ["seven " * 300 + "eight", "日本語😀" * 100, "x" * 5000], ids=["words", "CJK", "x"])
def test_a_message_longer_than_the_context_loses_its_beginning(asked, tokenizer, name, system, text):
    """And only that: the system text, the template's words and the message's end are asked as ever."""
    model, prompts = asked(tokenizer)
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
    asked_text, cut = tokenizer.decode(prompts[-1]), chat.answers[-1].tokens_cut
    [kept] = [n for n in range(len(text)) if asked_text == written(get_template(name), head, message, n)]
    assert kept > 0
    assert "\ufffd" not in asked_text
    assert (
        tokenizer.decode(tokenizer.encode(message["content"])[cut:]).replace("\ufffd", "")
        == (message["content"][-kept:])
    )


def written(template, head, message, kept):
    shorter = {**message, "content": message["content"][-kept:]}
    return "".join(segment.text for segment in template.render([*head, shorter], add_generation_prompt=True))


def test_of_a_message_with_an_input_the_input_goes_first(tokenizer):
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


def test_a_system_text_that_leaves_no_room_is_refused(asked, tokenizer):
    model, _ = asked(tokenizer)
    system, error = "seven " * 100, "tokens of system text and template leave no room for a message: 100 fit beside"
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


def test_a_context_too_small_is_refused_and_nothing_remembered(tokenizer):
    with pytest.raises(ValueError, match="room for 0 tokens of prompt: --max_new_tokens leaves nothing"):
        fit_prompt([QUESTION], ALPACA, tokenizer, 0)


def test_an_answer_gets_half_of_the_context_at_most(asked, tokenizer):
    model, prompts = asked(tokenizer)
    chat = Chat(model, tokenizer, ALPACA, max_new_tokens=1000)
    list(chat.ask("seven " * 300))
    assert chat.room == 64
    assert 55 <= len(prompts[-1]) <= 64


def test_a_thousand_strings_of_emoji_and_cjk(asked, tokenizer):
    """A random model says broken bytes as well: no half of a character is shown, kept or asked."""
    model, prompts = asked(tokenizer)
    chat = Chat(model, tokenizer, HUGCHAT, "日本語で答えて。😀", max_new_tokens=12, temperature=1.0, seed=1)
    characters = [*"日本語中文한국어漢字", "😀", "👩‍👩‍👧", "🇫🇷", "e\u0301", "👍🏽", "𠀀", "a", " "]
    rng = random.Random(0)
    broken = 0
    for turn in range(1000):
        text = "".join(rng.choices(characters, k=rng.choice((3, 20, 200))))
        chat.sampling["seed"] = turn
        assert "\ufffd" not in "".join(chat.ask(text))
        assert chat.messages[-2]["content"] == text
        asked_text = tokenizer.decode(prompts[-1])
        assert asked_text.startswith("日本語で答えて。😀\n\nHuman: ")
        assert "\ufffd" not in asked_text
        broken += chat.answers[-1].tokens_cut > 0
    assert broken > 100


def test_only_a_question_can_be_fitted(tokenizer):
    answer = {"role": "assistant", "content": "Paris."}
    for messages in ([QUESTION, answer], [{"role": "system", "content": "Hi"}], [QUESTION, QUESTION], []):
        with pytest.raises(ValueError, match="the role|must be a user's"):
            fit_prompt(messages, ALPACA, tokenizer, 100)
    with pytest.raises(ValueError, match="turn 2 has the role 'user'"):
        fit_prompt([QUESTION, QUESTION, answer, QUESTION], ALPACA, tokenizer, 40)
