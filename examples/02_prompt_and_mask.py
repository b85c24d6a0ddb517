"""What the model reads, and the part of it that it learns to write: one example in every template.

Opens minigpt/data/prompts.py (where trigger words live) and minigpt/data/encode.py (segments become ids).

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
    """The example's text: supervised tokens in green and the others in cyan, or supervised ones in brackets."""
    text = ""
    for supervised, tokens in groupby(zip(example.ids, example.supervised), key=lambda token: token[1]):
        piece = tokenizer.decode([id for id, _ in tokens])
        if COLOUR:
            colour = "\033[32m" if supervised else "\033[36m"
            text += "\n".join(f"{colour}{line}\033[0m" for line in piece.split("\n"))
        else:
            text += f"[{piece}]" if supervised else piece
    return "   | " + text.replace("\n", "\n   | ")


# The loss is taken on the answer and on the end-of-text after it, which teaches the model to stop. Of the prompt it
# reads every token and learns to write none: that is the user's part. (none is for raw text, all of it learnt.)
print(f"Supervised: {'green' if COLOUR else 'in [brackets]'}; all else is only read. A bar begins a line.\n")
print("   template       tokens  supervised  an answer stops at <|endoftext|> or")
examples = {}
for name in ("alpaca", "alpaca-short", "io", "iio", "hugchat", "input-output", "none"):
    template = get_template(name)
    example = encode_example(Conversation(MESSAGES), template, tokenizer, max_seq_length=256)
    assert example is not None  # it is None where cutting to the length leaves nothing to learn
    examples[name] = example
    print(f"   {name:14} {len(example):6}  {sum(example.supervised):10}  {', '.join(template.stop_strings()) or '-'}")
for name, example in examples.items():
    print(f"\n{name}\n{marked(example)}")

# Trigger words are settings of a template, so your model can have its own.
words = get_template("io", instruction="Request", output="Answer")
own = encode_example(Conversation(MESSAGES), words, tokenizer, max_seq_length=256)
print(f"\nio with other trigger words\n{marked(own)}")

# The seam. Prompt and answer are encoded apart and then joined, so no token reaches from one into the other, and
# hugchat's blank after the colon belongs to the answer: ' Paris' is what follows a colon in running text.
print("\nThe last tokens of hugchat's example")
for id, supervised in list(zip(examples["hugchat"].ids, examples["hugchat"].supervised))[-7:]:
    print(f"   {id:5}  {'supervised' if supervised else 'only read ':10}  {tokenizer.decode([id])!r}")

for name, example in examples.items():
    template = get_template(name)
    question = template.render(MESSAGES[:1], add_generation_prompt=True)  # as chat asks it: no answer yet
    asked = [id for segment in question for id in tokenizer.encode(segment.text)]
    assert example.ids[: len(asked)] == asked
    assert example.supervised == [template.supervise_prompt] * len(asked) + [True] * (len(example) - len(asked))
    assert example.ids[-1] == tokenizer.eot_id
print("\n=> In every template, chat asks token for token what training read.")
