"""A conversation: what the model is asked, what is shown of its answer, what is remembered."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt.data.dataset import encode_example, encode_segments
from minigpt.data.prompts import TEMPLATES, get_template
from minigpt.data.records import Conversation
from minigpt.inference.chat import Chat, fit_prompt
from minigpt.model.gpt2 import GPT, GPTConfig

ROOT = Path(__file__).parents[2]
ALPACA, HUGCHAT = get_template("alpaca"), get_template("hugchat")
QUESTION = {"role": "user", "content": "What is the capital of France?"}


def encode(tokenizer, template, messages):
    return list(encode_segments(template.render(messages, add_generation_prompt=True), tokenizer).ids)


@pytest.fixture
def say(speaker, tokenizer):
    """The pieces that are shown, and what is remembered, when a model says a text."""

    def say(text, template=ALPACA, max_new_tokens=150):
        prompt = encode(tokenizer, template, [QUESTION])
        model = speaker(tokenizer.encode(text), prompt_length=len(prompt))
        chat = Chat(model, tokenizer, template, max_new_tokens=max_new_tokens)
        pieces = list(chat.ask(QUESTION["content"]))
        assert chat.messages == [QUESTION, {"role": "assistant", "content": chat.messages[-1]["content"]}]
        assert "".join(pieces) == chat.messages[-1]["content"]
        assert all(pieces)
        return pieces

    return say


@pytest.fixture
def asked():
    """A random model, and a list of the prompts that it reads."""
    prompts = []

    def make(tokenizer, context=128):
        torch.manual_seed(0)
        model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=context, n_embd=16, n_layer=1, n_head=1)).eval()
        model.register_forward_pre_hook(
            lambda _, args: prompts.append(args[0][0].tolist()) if len(args[0][0]) > 1 else None
        )
        return model, prompts

    return make


# ---- what is shown


def test_an_answer_comes_in_pieces_and_is_remembered(say):
    pieces = say("The capital of France is Paris.")
    assert "".join(pieces) == "The capital of France is Paris."
    assert len(pieces) > 4


def test_blanks_around_an_answer_are_not_shown(say):
    assert "".join(say("  \n The capital  is\n\n Paris. \n\n  ")) == "The capital  is\n\n Paris."


@pytest.mark.parametrize(
    "template", [ALPACA, HUGCHAT, get_template("io", instruction="Request")], ids=["alpaca", "hugchat", "io"]
)
def test_a_stop_string_is_not_shown_even_in_part(say, template):
    [stop] = template.stop_strings()
    for text in (f"Paris. \n\n{stop} Another", f"Paris.{stop}", f"Paris.\n\n{stop[:3]}{stop}"):
        assert "".join(say(text, template)) == template.read_answer(text)
    assert "".join(say(f"{stop} Paris", template)) == ""


@pytest.mark.parametrize("stop", [ALPACA.stop_strings()[0], HUGCHAT.stop_strings()[0]])
def test_what_only_begins_like_a_stop_string_is_shown(say, stop):
    template = ALPACA if stop in ALPACA.stop_strings() else HUGCHAT
    for size in range(1, len(stop)):
        for text in (f"Paris, {stop[:size]}-x {stop[:size]}", f"a{stop[:size]}{stop[:size]}b"):
            assert "".join(say(text, template)) == text.strip()


def test_no_character_comes_in_halves(say):
    """Token-wise decoding shows U+FFFD for each part of a character that takes several tokens."""
    characters = [*"日本語中文한국어", "😀", "👩‍👩‍👧", "🇫🇷", "e\u0301", "ß", "a", " ", "\n"]
    for seed in range(60):
        text = "".join(random.Random(seed).choices(characters, k=20)).strip()
        pieces = say(text)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_not_shown(say, tokenizer):
    assert len(tokenizer.encode("Paris 日")) > 3
    assert "".join(say("Paris 日", max_new_tokens=len(tokenizer.encode("Paris 日")) - 1)) == "Paris"


def test_a_blank_line_ends_an_answer_where_that_is_asked_for(speaker, tokenizer, tmp_path):
    """HugChat's corpora end a turn with one, and models trained on them without end-of-text run on."""
    prompt = encode(tokenizer, HUGCHAT, [QUESTION])
    speaker(tokenizer.encode(" Paris.\nIt is. \n\nAnd more."), prompt_length=len(prompt)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, ROOT / "chat.py", "--model_name_or_path", tmp_path, "--prompt", QUESTION["content"]]
    for switch, shown in (([], "Paris.\nIt is. \n\nAnd more.\n"), (["--stop_blank_line"], "Paris.\nIt is.\n")):
        done = subprocess.run([*command, "--template", "hugchat", *switch], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, shown)


# ---- what is asked


@pytest.mark.parametrize("name", TEMPLATES)
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

        dropped = chat.turns_dropped
        assert (prompts[-1], chat.tokens_cut) == (without(dropped), 0)
        assert len(prompts[-1]) <= room
        assert dropped == 0 or len(without(dropped - 1)) > room
        assert tokenizer.decode(prompts[-1]).startswith(system or ALPACA.preamble)
    assert len(prompts) == 200
    assert dropped > 150
    assert len(chat.messages) == first + 400  # nothing is forgotten but what the model is asked


def test_a_message_longer_than_the_context_loses_its_beginning(asked, tokenizer):
    model, prompts = asked(tokenizer)
    chat = Chat(model, tokenizer, ALPACA, "Answer in one word.", max_new_tokens=28)
    list(chat.ask("Hello."))
    endless = "seven " * 300
    whole = encode(tokenizer, ALPACA, [chat.messages[0], {"role": "user", "content": endless}])
    assert "".join(chat.ask(endless)) != ""
    assert (prompts[-1], chat.turns_dropped, chat.tokens_cut) == (whole[-100:], 1, len(whole) - 100)
    list(chat.ask("And now?"))
    short = encode(tokenizer, ALPACA, [chat.messages[0], {"role": "user", "content": "And now?"}])
    assert (prompts[-1], chat.turns_dropped, chat.tokens_cut) == (short, 2, 0)


def test_no_room_is_refused_and_nothing_remembered(asked, tokenizer):
    chat = Chat(asked(tokenizer)[0], tokenizer, ALPACA, max_new_tokens=128)
    with pytest.raises(ValueError, match="room for 0 tokens of prompt: --max_new_tokens leaves nothing"):
        list(chat.ask("Hello."))
    assert chat.messages == []


def test_only_a_question_can_be_fitted(tokenizer):
    for messages in ([QUESTION, {"role": "assistant", "content": "Paris."}], [{"role": "system", "content": "Hi"}]):
        with pytest.raises(ValueError, match="role"):
            fit_prompt(messages, ALPACA, tokenizer, 100)


# ---- what is remembered


def test_breaking_off_in_the_middle_keeps_the_conversation_whole(say, speaker, tokenizer):
    prompt = encode(tokenizer, ALPACA, [QUESTION])
    model = speaker(tokenizer.encode("The capital of France is Paris."), prompt_length=len(prompt))
    chat = Chat(model, tokenizer, ALPACA, max_new_tokens=50)
    answer = chat.ask(QUESTION["content"])
    shown = next(answer) + next(answer)
    answer.close()
    assert chat.messages == [QUESTION, {"role": "assistant", "content": shown}]
    list(chat.ask("Go on."))  # the roles still take turns
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_the_settings_of_sampling_are_generates(asked, tokenizer):
    model, _ = asked(tokenizer)
    answers = [
        "".join(Chat(model, tokenizer, ALPACA, max_new_tokens=20, temperature=1.0, seed=seed).ask("Hello."))
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
