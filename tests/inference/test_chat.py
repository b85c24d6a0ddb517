"""A conversation: what the model is asked, what is shown of its answer, what is remembered."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt.data.dataset import encode_example, encode_segments
from minigpt.data.prompts import TEMPLATES, get_template
from minigpt.data.records import Conversation, read_records
from minigpt.inference.chat import Chat, as_one_text, fit_prompt, load_messages, save_messages, text_pieces, until_stop
from minigpt.inference.sampling import generate
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


# ---- a model that continues text


def test_without_a_template_one_text_grows(asked, tokenizer):
    """What came is kept verbatim, and what is typed next begins a line."""
    model, prompts = asked(tokenizer)
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


def test_a_blank_before_a_continuation_is_part_of_it(say):
    assert say(" there was", get_template("none"))[0].startswith(" ")


def test_worked_examples(tokenizer):
    said = [{"role": "user", "content": "A cat"}, {"role": "assistant", "content": " sat."}]
    assert as_one_text([*said, {"role": "user", "content": "It"}]) == [{"role": "user", "content": "A cat sat.\nIt"}]
    assert list(text_pieces([*tokenizer.encode("日本"), tokenizer.eot_id], tokenizer)) == ["日", "本"]
    assert list(until_stop(["Yes", ". ", "\n", "##", " No", "##", "#"], ["###"])) == ["Yes", ".", " \n## No"]


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


def test_an_answer_interrupted_before_its_first_word_leaves_nothing(asked, tokenizer, monkeypatch):
    chat = Chat(asked(tokenizer)[0], tokenizer, ALPACA, "Be brief.", max_new_tokens=20)
    list(chat.ask("Hello."))
    before = chat.messages

    def interrupted(*_, **__):
        yield tokenizer.encode("日")[0]  # not yet a character
        raise KeyboardInterrupt

    monkeypatch.setattr("minigpt.inference.chat.stream", interrupted)
    for ask in (lambda: chat.ask("Never mind"), chat.retry, lambda: chat.ask("Never mind", replace=True)):
        with pytest.raises(KeyboardInterrupt):
            list(ask())
        assert chat.messages == before
    pieces = chat.ask("Never mind")  # and not even begun
    pieces.close()
    assert chat.messages == before


def test_an_answer_that_fails_leaves_nothing(asked, tokenizer):
    model, _ = asked(tokenizer)
    chat = Chat(model, tokenizer, ALPACA, max_new_tokens=20)
    list(chat.ask("Hello."))
    before = chat.messages
    with torch.no_grad():
        model.wte.weight[:] = float("nan")
    for ask in (lambda: chat.ask("And now?"), chat.retry):
        with pytest.raises(ValueError, match="its weights are broken"):
            list(ask())
        assert chat.messages == before


def test_a_retry_draws_otherwise_and_replaces_the_answer(asked, tokenizer):
    model, prompts = asked(tokenizer)
    chat = Chat(model, tokenizer, ALPACA, max_new_tokens=20, temperature=1.0, seed=5)
    list(chat.ask("Hello.", "an input"))
    first = "".join(chat.ask("Again."))
    answers = [first, *("".join(chat.retry()) for _ in range(3))]
    assert len(set(answers)) == 4
    assert prompts[1:] == [prompts[1]] * 4
    assert len(chat.messages) == 4
    assert chat.messages[2:] == [{"role": "user", "content": "Again."}, {"role": "assistant", "content": answers[-1]}]
    assert "".join(chat.ask("Again.", replace=True)) == first  # a new question draws from the seed itself
    with pytest.raises(ValueError, match="nothing has been asked yet"):
        Chat(model, tokenizer, ALPACA, "Be brief.", max_new_tokens=20).retry()


def test_undo_clear_and_another_system_text(asked, tokenizer):
    model, prompts = asked(tokenizer, context=256)
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
    with pytest.raises(ValueError, match="nothing has been asked yet"):
        chat.undo()
    chat.system = None
    assert (chat.messages, chat.system) == ([], None)


def test_what_is_counted(say, speaker, tokenizer):
    prompt = encode(tokenizer, ALPACA, [QUESTION])
    ids = tokenizer.encode("The capital of France is Paris.")
    chat = Chat(speaker(ids, prompt_length=len(prompt)), tokenizer, ALPACA, max_new_tokens=50)
    list(chat.ask(QUESTION["content"]))
    [answer] = chat.answers
    assert (answer.prompt_tokens, answer.new_tokens) == (len(prompt), len(ids) + 1)  # and the end of text
    assert 0 < answer.first_token_s < answer.seconds < 60


# ---- files


def test_what_is_saved_is_read_again_by_chat_and_by_training(tmp_path):
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
    with pytest.raises(FileExistsError, match=r"a\.json: is there already \(give another name\)"):
        save_messages(messages[:3], tmp_path / "a.json")
    save_messages(messages[:3], tmp_path / "a.json", overwrite=True)
    assert load_messages(str(tmp_path / "a.json")) == (messages[:3], False)


def test_what_cannot_be_saved_or_loaded(tmp_path):
    said = [QUESTION, {"role": "assistant", "content": "Paris."}]
    with pytest.raises(ValueError, match=r"a\.txt: expected a name that ends in \.json or \.jsonl"):
        save_messages(said, tmp_path / "a.txt")
    for nothing in ([], [{"role": "system", "content": "Hi"}]):
        with pytest.raises(ValueError, match="nothing has been said yet"):
            save_messages(nothing, tmp_path / "a.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to .* another name chooses another place"):
        save_messages(said, tmp_path / "file" / "a.json")
    (tmp_path / "text.jsonl").write_text('{"text": "Once"}\n')
    with pytest.raises(ValueError, match=r"text\.jsonl:1: no conversation, expected messages"):
        load_messages(str(tmp_path / "text.jsonl"))
    (tmp_path / "two.jsonl").write_text(2 * (json.dumps({"messages": said}) + "\n"))
    assert load_messages(str(tmp_path / "two.jsonl")) == (said, True)
