"""Prompt templates and the loss mask: one example in every template, and which of its tokens are supervised.

Opens minigpt/data/prompts.py (templates and trigger words) and minigpt/data/encode.py (segments become ids).

    python examples/02_prompt_and_mask.py
"""

import os
import sys
from itertools import groupby

from minigpt import Conversation, Example, Tokenizer, encode_example, get_template

COLOUR = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
MESSAGES = [
    {"role": "user", "content": "Name the capital.", "input": "France"},
    {"role": "assistant", "content": "Paris."},
]
tokenizer = Tokenizer.tiny()


def marked(example: Example) -> str:
    """The example's text with supervised tokens in green and others in cyan; without colour, supervised in brackets."""
    text = ""
    for supervised, tokens in groupby(zip(example.ids, example.supervised), key=lambda token: token[1]):
        piece = tokenizer.decode([id for id, _ in tokens])
        if COLOUR:
            colour = "\033[32m" if supervised else "\033[36m"
            text += "\n".join(f"{colour}{line}\033[0m" for line in piece.split("\n"))
        else:
            text += f"[{piece}]" if supervised else piece
    return "   | " + text.replace("\n", "\n   | ")


# The loss covers the answer and the end-of-text after it, which teaches the model to stop. Prompt tokens are input
# only, without a loss. (The template none is for raw text, which is supervised whole.)
print(f"Supervised: {'green' if COLOUR else 'in [brackets]'}; the rest is input only. | begins a line.\n")
print("   template       tokens  supervised  an answer ends at <|endoftext|> or")
examples = {}
for name in ("alpaca", "alpaca-short", "io", "iio", "hugchat", "input-output", "none"):
    template = get_template(name)
    example = encode_example(Conversation(MESSAGES), template, tokenizer, max_seq_length=256)
    assert example is not None  # None if truncation leaves no supervised token
    examples[name] = example
    print(f"   {name:14} {len(example):6}  {sum(example.supervised):10}  {', '.join(template.stop_strings()) or '-'}")
for name, example in examples.items():
    print(f"\n{name}\n{marked(example)}")

# The trigger words of a template can be replaced.
words = get_template("io", instruction="Request", output="Answer")
own = encode_example(Conversation(MESSAGES), words, tokenizer, max_seq_length=256)
print(f"\nio with other trigger words\n{marked(own)}")

# Prompt and answer are tokenized separately and joined, so no token spans the boundary. hugchat's space after the colon
# belongs to the answer: ' Paris' is how a word after a colon is tokenized in running text.
print("\nThe last tokens of hugchat's example")
for id, supervised in list(zip(examples["hugchat"].ids, examples["hugchat"].supervised))[-7:]:
    print(f"   {id:5}  {'supervised' if supervised else 'input only':10}  {tokenizer.decode([id])!r}")

for name, example in examples.items():
    template = get_template(name)
    question = template.render(MESSAGES[:1], add_generation_prompt=True)  # the prompt in chat, without an answer
    asked = [id for segment in question for id in tokenizer.encode(segment.text)]
    assert example.ids[: len(asked)] == asked
    assert example.supervised == [template.supervise_prompt] * len(asked) + [True] * (len(example) - len(asked))
    assert example.ids[-1] == tokenizer.eot_id
print("\n=> In every template, the prompt in chat has the same tokens as in training.")
