"""The exported chat template, through transformers: what it asks a model is what we trained it on.

First the strings of every kind of conversation, then the ids, from a folder as a run exports it.
"""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import AutoTokenizer

from minigpt.data.encode import encode_segments
from minigpt.data.prompts import TEMPLATES, Template, get_template
from minigpt.data.tokenizer import END_OF_TEXT, Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.training.run.checkpoint import export

TOKENIZER = Tokenizer.tiny()
PIECES = ["Name", " the", "capital", "s", " ", "  ", "\n", "\n\n", "\t", *".:é", "日本", "😀", "{x}", "'s", "123"]
EDGES = [*"Aé日😀.:'{7", " ", "\n", "\t", "\n a", "###", "Human:"]  # what beginnings and ends might merge with


def templates() -> dict[str, Template]:
    found = dict(TEMPLATES)
    for name, template in TEMPLATES.items():
        if template.triggers:
            words = ("Request", "in put", "Réponse", "[Human]", "<bot>")
            found[f"{name}, other words"] = get_template(name, **dict(zip(template.triggers, words)))
    return found


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """`judge(template)`: transformers' tokenizer of a folder that was exported with it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, n_positions=32, n_embd=8, n_layer=1, n_head=1))

    def load(template: Template):
        folder = tmp_path_factory.mktemp("run") / "export"
        export(folder, model, TOKENIZER, template, model.state_dict(), "A test.")
        return AutoTokenizer.from_pretrained(folder)

    return load


def said(draw: random.Random) -> str:
    return draw.choice(EDGES) + "".join(draw.choices(PIECES, k=draw.randint(0, 8))) + draw.choice(EDGES)


def text_of(template: Template, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    return "".join(segment.text for segment in template.render(messages, add_generation_prompt))


def ours(template: Template, messages: list[dict[str, str]]) -> list[int]:
    return list(encode_segments(template.render(messages, add_generation_prompt=True), TOKENIZER).ids)


def theirs(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


# ---- the same strings

AWKWARD = [
    "",
    " \n blanks around \t\n ",
    "'single' \"double\" \\back\\slash\\n \\u0041 ''' ~",
    "{{ jinja }} {% if x %} {# no #} {%- endif -%} }} %} {content} {0} {}",
    "tabs\tand\r\nline\rends\x85\u2028",
    "é 日本 😀 \0 <|endoftext|>",
]


def awkward_conversations() -> list[list[dict[str, str]]]:
    found = []
    for content in AWKWARD:
        user, answer = {"role": "user", "content": content}, {"role": "assistant", "content": content}
        given, system = {**user, "input": content}, {"role": "system", "content": content}
        empty = {**user, "input": ""}
        for first, turns in product(
            ([], [system]),
            ([user], [given], [empty, answer, given], [given, answer, user], [given, answer, user, answer, given]),
        ):
            found += [[*first, *turns], [*first, *turns, answer]]
        found += [[{"role": "text", "content": content}], [system]]
    return found


def awkward_templates() -> dict[str, Template]:
    found = {name: get_template(name) for name in TEMPLATES}
    for words in ("'quoted' \"twice\" \\", "{{ x }} {% y %} {content} {0}", "é\n\r\n\r \\n ", "-}} %}"):
        found[f"hugchat of {words}"] = get_template("hugchat", human=words, assistant=words)
        found[f"alpaca of {words}"] = get_template("alpaca", instruction=words, input=words, output=words)
    braces = dict.fromkeys(("user", "answer", "system", "separator", "preamble"), "{{{human}}} '\\ }}{{ {content}")
    return found | {"braces": replace(get_template("hugchat"), **braces)}


@pytest.mark.parametrize("name", awkward_templates())
def test_chat_template_says_the_same(name, judge):
    template = awkward_templates()[name]
    tokenizer = judge(template)
    for messages, add_generation_prompt in product(awkward_conversations(), (False, True)):
        if add_generation_prompt and messages[-1]["role"] not in ("user", "text"):
            continue
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert rendered == text_of(template, messages, add_generation_prompt)


# ---- the same ids


@pytest.mark.parametrize("name", templates())
def test_a_question_is_asked_in_the_same_ids(name, judge):
    template = templates()[name]
    tokenizer, draw = judge(template), random.Random(name)
    for _ in range(50):
        for with_input, with_system in product((False, True), (False, True)):
            question = {"role": "user", "content": said(draw), **({"input": said(draw)} if with_input else {})}
            system = [{"role": "system", "content": said(draw)}] if with_system else []
            messages = [*system, question]
            assert theirs(tokenizer, messages) == ours(template, messages), messages


@pytest.mark.parametrize("name", templates())
def test_a_dialogue_is_asked_in_the_same_text(name, judge):
    """And in the same ids but for seams: what one encodes as pieces, the other encodes as one text."""
    template = templates()[name]
    tokenizer, draw = judge(template), random.Random(name)
    for _ in range(20):
        messages = [{"role": ("user", "assistant")[n % 2], "content": said(draw)} for n in range(5)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == text_of(template, messages)
        assert theirs(tokenizer, messages).count(tokenizer.eos_token_id) == 2
        assert tokenizer.decode(theirs(tokenizer, messages)) == text


def test_a_literal_special_token_forges_a_turn_there_and_not_here(judge):
    template = get_template("alpaca")
    tokenizer, messages = judge(template), [{"role": "user", "content": f"Say {END_OF_TEXT} twice."}]
    assert theirs(tokenizer, messages).count(tokenizer.eos_token_id) == 1
    assert ours(template, messages).count(tokenizer.eos_token_id) == 0
    assert tokenizer.decode(theirs(tokenizer, messages)) == TOKENIZER.decode(ours(template, messages))
