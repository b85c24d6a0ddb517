"""A conversation: the text shown for an answer, and the messages stored. (The prompts: test_fit_prompt.py.)"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt.data.encode import encode_segments
from minigpt.data.prompts import get_template
from minigpt.data.read.records import Conversation, read_records
from minigpt.inference.chat import Chat, as_one_text, load_messages, save_messages
from minigpt.inference.generate import generate

ROOT = Path(__file__).parents[2]
ALPACA, HUGCHAT = get_template("alpaca"), get_template("hugchat")
QUESTION = {"role": "user", "content": "What is the capital of France?"}


def encode(tokenizer, template, messages):
    return list(encode_segments(template.render(messages, add_generation_prompt=True), tokenizer).ids)


@pytest.fixture
def shown_pieces(speaker, tokenizer):
    """The pieces that the chat shows if the model generates a text; also checks the stored messages."""

    def shown_pieces(text, template=ALPACA, max_new_tokens=150):
        prompt = encode(tokenizer, template, [QUESTION])
        model = speaker(tokenizer.encode(text), prompt_length=len(prompt))
        chat = Chat(model, tokenizer, template, max_new_tokens=max_new_tokens)
        pieces = list(chat.ask(QUESTION["content"]))
        assert chat.messages == [QUESTION, {"role": "assistant", "content": chat.messages[-1]["content"]}]
        assert "".join(pieces) == chat.messages[-1]["content"]
        assert all(pieces)
        return pieces

    return shown_pieces


# ---- the text shown


def test_an_answer_is_streamed_and_stored(shown_pieces):
    pieces = shown_pieces("The capital of France is Paris.")
    assert "".join(pieces) == "The capital of France is Paris."
    assert len(pieces) > 4


def test_whitespace_around_an_answer_is_not_shown(shown_pieces):
    assert "".join(shown_pieces("  \n The capital  is\n\n Paris. \n\n  ")) == "The capital  is\n\n Paris."


@pytest.mark.parametrize(
    "template", [ALPACA, HUGCHAT, get_template("io", instruction="Request")], ids=["alpaca", "hugchat", "io"]
)
def test_a_stop_string_is_not_shown_even_in_part(shown_pieces, template):
    [stop] = template.stop_strings()
    for text in (f"Paris. \n\n{stop} Another", f"Paris.{stop}", f"Paris.\n\n{stop[:3]}{stop}"):
        assert "".join(shown_pieces(text, template)) == template.read_answer(text)
    assert "".join(shown_pieces(f"{stop} Paris", template)) == ""


@pytest.mark.parametrize("stop", [ALPACA.stop_strings()[0], HUGCHAT.stop_strings()[0]])
def test_a_partial_stop_string_is_shown(shown_pieces, stop):
    template = ALPACA if stop in ALPACA.stop_strings() else HUGCHAT
    for size in range(1, len(stop)):
        for text in (f"Paris, {stop[:size]}-x {stop[:size]}", f"a{stop[:size]}{stop[:size]}b"):
            assert "".join(shown_pieces(text, template)) == text.strip()


def test_incomplete_characters_are_not_shown(shown_pieces):
    """Decoding token by token would show U+FFFD for each part of a character that takes several tokens."""
    characters = [*"日本語中文한국어", "😀", "👩‍👩‍👧", "🇫🇷", "e\u0301", "ß", "a", " ", "\n"]
    for seed in range(60):
        text = "".join(random.Random(seed).choices(characters, k=20)).strip()
        pieces = shown_pieces(text)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_at_the_end_is_not_shown(shown_pieces, tokenizer):
    assert len(tokenizer.encode("Paris 日")) > 3
    assert "".join(shown_pieces("Paris 日", max_new_tokens=len(tokenizer.encode("Paris 日")) - 1)) == "Paris"


def test_stop_blank_line(speaker, tokenizer, tmp_path):
    """HugChat's corpora end a turn with a blank line; models trained on them without end-of-text do not stop."""
    prompt = encode(tokenizer, HUGCHAT, [QUESTION])
    speaker(tokenizer.encode(" Paris.\nIt is. \n\nAnd more."), prompt_length=len(prompt)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, ROOT / "chat.py", "--model_name_or_path", tmp_path, "--prompt", QUESTION["content"]]
    for flags, shown in (([], "Paris.\nIt is. \n\nAnd more.\n"), (["--stop_blank_line"], "Paris.\nIt is.\n")):
        done = subprocess.run([*command, "--template", "hugchat", *flags], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, shown)


# ---- a model that continues text


def test_without_a_template_the_conversation_is_one_growing_text(prompt_recorder, tokenizer):
    """Model output is kept verbatim, and the next user input starts a new line."""
    model, prompts = prompt_recorder(tokenizer)
    chat = Chat(model, tokenizer, get_template("none"), max_new_tokens=12)
    text = ""
    for typed in ("Once upon", "A second line", "  a third"):
        text += ("\n" if text else "") + typed
        shown = "".join(chat.ask(typed))
        assert prompts[-1] == tokenizer.encode(text)
        assert shown == tokenizer.decode(generate(model, [prompts[-1]], max_new_tokens=12)[0]).rstrip()
        text += shown
    chat.undo()
    list(chat.ask("Another", "with an input"))
    assert tokenizer.decode(prompts[-1]).endswith("\nAnother\nwith an input")


def test_a_leading_space_is_part_of_a_continuation(shown_pieces):
    assert shown_pieces(" there was", get_template("none"))[0].startswith(" ")


def test_docstring_example_of_as_one_text():
    turn = [{"role": "user", "content": "A cat"}, {"role": "assistant", "content": " sat."}]
    assert as_one_text([*turn, {"role": "user", "content": "It"}]) == [{"role": "user", "content": "A cat sat.\nIt"}]


# ---- the messages stored


def test_stopping_early_stores_the_partial_answer(shown_pieces, speaker, tokenizer):
    prompt = encode(tokenizer, ALPACA, [QUESTION])
    model = speaker(tokenizer.encode("The capital of France is Paris."), prompt_length=len(prompt))
    chat = Chat(model, tokenizer, ALPACA, max_new_tokens=50)
    answer = chat.ask(QUESTION["content"])
    shown = next(answer) + next(answer)
    answer.close()
    assert chat.messages == [QUESTION, {"role": "assistant", "content": shown}]
    list(chat.ask("Go on."))  # the roles still alternate
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_sampling_settings_are_passed_to_generate(prompt_recorder, tokenizer):
    model, _ = prompt_recorder(tokenizer)
    answers = [
        "".join(Chat(model, tokenizer, ALPACA, max_new_tokens=20, temperature=1.0, seed=seed).ask("Hello."))
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_an_answer_interrupted_before_any_text_is_not_stored(prompt_recorder, tokenizer, monkeypatch):
    chat = Chat(prompt_recorder(tokenizer)[0], tokenizer, ALPACA, "Be brief.", max_new_tokens=20)
    list(chat.ask("Hello."))
    before = chat.messages

    def interrupted(*_, **__):
        yield tokenizer.encode("日")[0]  # an incomplete character
        raise KeyboardInterrupt

    monkeypatch.setattr("minigpt.inference.chat.stream", interrupted)
    for ask in (lambda: chat.ask("Never mind"), chat.retry, lambda: chat.ask("Never mind", replace=True)):
        with pytest.raises(KeyboardInterrupt):
            list(ask())
        assert chat.messages == before
    pieces = chat.ask("Never mind")  # closed before the first token
    pieces.close()
    assert chat.messages == before


def test_a_failed_answer_is_not_stored(prompt_recorder, tokenizer):
    model, _ = prompt_recorder(tokenizer)
    chat = Chat(model, tokenizer, ALPACA, max_new_tokens=20)
    list(chat.ask("Hello."))
    before = chat.messages
    with torch.no_grad():
        model.wte.weight[:] = float("nan")
    for ask in (lambda: chat.ask("And now?"), chat.retry):
        with pytest.raises(ValueError, match="its weights are broken"):
            list(ask())
        assert chat.messages == before


def test_retry_samples_again_and_replaces_the_answer(prompt_recorder, tokenizer):
    model, prompts = prompt_recorder(tokenizer)
    chat = Chat(model, tokenizer, ALPACA, max_new_tokens=20, temperature=1.0, seed=5)
    list(chat.ask("Hello.", "an input"))
    first = "".join(chat.ask("Again."))
    answers = [first, *("".join(chat.retry()) for _ in range(3))]
    assert len(set(answers)) == 4
    assert prompts[1:] == [prompts[1]] * 4
    assert len(chat.messages) == 4
    assert chat.messages[2:] == [{"role": "user", "content": "Again."}, {"role": "assistant", "content": answers[-1]}]
    assert "".join(chat.ask("Again.", replace=True)) == first  # a new question uses the seed itself
    with pytest.raises(ValueError, match="no question has been asked yet"):
        Chat(model, tokenizer, ALPACA, "Be brief.", max_new_tokens=20).retry()


def test_undo_clear_and_another_system_text(prompt_recorder, tokenizer):
    model, prompts = prompt_recorder(tokenizer, context=256)
    chat = Chat(model, tokenizer, ALPACA, max_new_tokens=8)
    list(chat.ask("One."))
    list(chat.ask("Two.", "2"))
    assert chat.undo() == {"role": "user", "content": "Two.", "input": "2"}
    chat.system = "Be brief."
    list(chat.ask("Three."))
    assert prompts[-1] == encode(tokenizer, ALPACA, chat.messages[:-1])
    assert [m["content"] for m in chat.messages if m["role"] != "assistant"] == ["Be brief.", "One.", "Three."]
    chat.system = "Be long."
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 2]
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be long."}]
    with pytest.raises(ValueError, match="no question has been asked yet"):
        chat.undo()
    chat.system = None
    assert (chat.messages, chat.system) == ([], None)


def test_answer_stats(shown_pieces, speaker, tokenizer):
    prompt = encode(tokenizer, ALPACA, [QUESTION])
    ids = tokenizer.encode("The capital of France is Paris.")
    chat = Chat(speaker(ids, prompt_length=len(prompt)), tokenizer, ALPACA, max_new_tokens=50)
    list(chat.ask(QUESTION["content"]))
    [answer] = chat.answers
    assert (answer.prompt_tokens, answer.new_tokens) == (len(prompt), len(ids) + 1)  # plus end-of-text
    assert 0 < answer.first_token_s < answer.seconds < 60


# ---- files


def test_saved_messages_are_read_by_chat_and_by_training(tmp_path):
    messages = [
        {"role": "system", "content": "日本語で\n答えて。"},
        {"role": "user", "content": '"Hi" 😀\n\n', "input": "1 < 2"},
        {"role": "assistant", "content": ""},
        *[{"role": "user", "content": " Why? "}, {"role": "assistant", "content": "So."}],
    ]
    for name in ("a.json", "b.jsonl"):
        save_messages(messages, tmp_path / name)
        assert load_messages(str(tmp_path / name)) == (messages, False)
        assert list(read_records(tmp_path / name)) == [Conversation(messages)]
    with pytest.raises(FileExistsError, match=r"a\.json: already exists \(give another name\)"):
        save_messages(messages[:3], tmp_path / "a.json")
    save_messages(messages[:3], tmp_path / "a.json", overwrite=True)
    assert load_messages(str(tmp_path / "a.json")) == (messages[:3], False)


def test_files_that_cannot_be_saved_or_loaded(tmp_path):
    messages = [QUESTION, {"role": "assistant", "content": "Paris."}]
    with pytest.raises(ValueError, match=r"a\.txt: expected a name that ends in \.json or \.jsonl"):
        save_messages(messages, tmp_path / "a.txt")
    for unanswered in ([], [{"role": "system", "content": "Hi"}]):
        with pytest.raises(ValueError, match="there is no conversation to save yet"):
            save_messages(unanswered, tmp_path / "a.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to .* another name chooses another place"):
        save_messages(messages, tmp_path / "file" / "a.json")
    (tmp_path / "text.jsonl").write_text('{"text": "Once"}\n')
    with pytest.raises(ValueError, match=r"text\.jsonl:1: no conversation in it, expected messages"):
        load_messages(str(tmp_path / "text.jsonl"))
    (tmp_path / "two.jsonl").write_text(2 * (json.dumps({"messages": messages}) + "\n"))
    assert load_messages(str(tmp_path / "two.jsonl")) == (messages, True)
