"""The exported chat template, applied by transformers, gives the strings and the ids that the model was trained on."""

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
EDGES = [
    *"Aé日😀.:'{7",
    " ",
    "\n",
    "\t",
    "\n a",
    "###",
    "Human:",
]  # texts begin and end with these: candidates for merges across segments


def templates() -> dict[str, Template]:
    templates = dict(TEMPLATES)
    for name, template in TEMPLATES.items():
        if template.triggers:
            words = ("Request", "in put", "Réponse", "[Human]", "<bot>")
            templates[f"{name}, other words"] = get_template(name, **dict(zip(template.triggers, words)))
    return templates


@pytest.fixture(scope="module")
def load_export(tmp_path_factory):
    """`load_export(template)`: exports a model with the template, and loads the folder's tokenizer by transformers."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, n_positions=32, n_embd=8, n_layer=1, n_head=1))

    def load(template: Template):
        folder = tmp_path_factory.mktemp("run") / "export"
        export(folder, model, TOKENIZER, template, model.state_dict(), "A test.")
        return AutoTokenizer.from_pretrained(folder)

    return load


def random_text(rng: random.Random) -> str:
    return rng.choice(EDGES) + "".join(rng.choices(PIECES, k=rng.randint(0, 8))) + rng.choice(EDGES)


def text_of(template: Template, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    return "".join(segment.text for segment in template.render(messages, add_generation_prompt))


def our_ids(template: Template, messages: list[dict[str, str]]) -> list[int]:
    return list(encode_segments(template.render(messages, add_generation_prompt=True), TOKENIZER).ids)


def their_ids(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


# ---- equal strings

AWKWARD = [
    "",
    " \n blanks around \t\n ",
    "'single' \"double\" \\back\\slash\\n \\u0041 ''' ~",
    "{{ jinja }} {% if x %} {# no #} {%- endif -%} }} %} {content} {0} {}",
    "tabs\tand\r\nline\rends\x85\u2028",
    "é 日本 😀 \0 <|endoftext|>",
]


def awkward_conversations() -> list[list[dict[str, str]]]:
    conversations = []
    for content in AWKWARD:
        user, answer = {"role": "user", "content": content}, {"role": "assistant", "content": content}
        with_input, system = {**user, "input": content}, {"role": "system", "content": content}
        empty_input = {**user, "input": ""}
        for first, turns in product(
            ([], [system]),
            (
                *([user], [with_input], [empty_input, answer, with_input], [with_input, answer, user]),
                [with_input, answer, user, answer, with_input],
            ),
        ):
            conversations += [[*first, *turns], [*first, *turns, answer]]
        conversations += [[{"role": "text", "content": content}], [system]]
    return conversations


def awkward_templates() -> dict[str, Template]:
    templates = {name: get_template(name) for name in TEMPLATES}
    for words in ("'quoted' \"twice\" \\", "{{ x }} {% y %} {content} {0}", "é\n\r\n\r \\n ", "-}} %}"):
        templates[f"hugchat of {words}"] = get_template("hugchat", human=words, assistant=words)
        templates[f"alpaca of {words}"] = get_template("alpaca", instruction=words, input=words, output=words)
    braces = dict.fromkeys(("user", "answer", "system", "separator", "preamble"), "{{{human}}} '\\ }}{{ {content}")
    return templates | {"braces": replace(get_template("hugchat"), **braces)}


@pytest.mark.parametrize("name", awkward_templates())
def test_chat_template_renders_the_same_text(name, load_export):
    template = awkward_templates()[name]
    tokenizer = load_export(template)
    for messages, add_generation_prompt in product(awkward_conversations(), (False, True)):
        if add_generation_prompt and messages[-1]["role"] not in ("user", "text"):
            continue
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert rendered == text_of(template, messages, add_generation_prompt)


# ---- equal ids


@pytest.mark.parametrize("name", templates())
def test_a_single_question_gives_the_same_ids(name, load_export):
    template = templates()[name]
    tokenizer, rng = load_export(template), random.Random(name)
    for _ in range(50):
        for with_input, with_system in product((False, True), (False, True)):
            question = {
                "role": "user",
                "content": random_text(rng),
                **({"input": random_text(rng)} if with_input else {}),
            }
            system = [{"role": "system", "content": random_text(rng)}] if with_system else []
            messages = [*system, question]
            assert their_ids(tokenizer, messages) == our_ids(template, messages), messages


@pytest.mark.parametrize("name", templates())
def test_a_dialogue_gives_the_same_text(name, load_export):
    """The ids may differ at segment boundaries: we tokenize segments separately, transformers the whole text."""
    template = templates()[name]
    tokenizer, rng = load_export(template), random.Random(name)
    for _ in range(20):
        messages = [{"role": ("user", "assistant")[n % 2], "content": random_text(rng)} for n in range(5)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == text_of(template, messages)
        assert their_ids(tokenizer, messages).count(tokenizer.eos_token_id) == 2
        assert tokenizer.decode(their_ids(tokenizer, messages)) == text


def test_typed_end_of_text_is_a_special_token_in_transformers_but_not_here(load_export):
    template = get_template("alpaca")
    tokenizer, messages = load_export(template), [{"role": "user", "content": f"Say {END_OF_TEXT} twice."}]
    assert their_ids(tokenizer, messages).count(tokenizer.eos_token_id) == 1
    assert our_ids(template, messages).count(tokenizer.eos_token_id) == 0
    assert tokenizer.decode(their_ids(tokenizer, messages)) == TOKENIZER.decode(our_ids(template, messages))
