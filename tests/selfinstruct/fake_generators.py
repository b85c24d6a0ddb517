"""Fake task writers: a generator of plausible text, and a tiny model that samples words in the layout of a list."""

import random
import re
from collections.abc import Sequence
from itertools import pairwise

import torch

from minigpt.data.tokenizer import Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.selfinstruct.generators import Completion, OnCompletion, SamplingParams, SeededPrompt

VERBS = re.findall(
    r"\w+", "Describe Explain Compare List Suggest Translate Summarize Invent Rank Rewrite Imagine Defend"
)
WORDS = re.findall(
    r"\w+",
    """river bakery winter teacher garden violin harvest letter engine doctor market planet village storm lantern recipe
    bridge museum forest captain window cousin theatre railway island pepper blanket mountain library sailor mirror
    orchard castle journey painter compass saddle whistle curtain bottle ladder meadow copper feather anchor candle""",
)


def plausible(prompt: str, seed: int) -> Completion:
    """Continues a list of tasks like a good model: a few tasks fail a filter, and the last one is truncated."""
    rng = random.Random(seed)
    number = int(re.findall(r"(\d+)\. \w+:$", prompt)[0])
    with_input = "\n1. Input:" in prompt
    text = ""
    for position in range(number, number + rng.randint(2, 5)):
        instruction = " ".join([rng.choice(VERBS), "the", *rng.sample(WORDS, rng.randint(5, 9))]) + "."
        instruction = rng.choice([instruction] * 12 + ["Say hi.", "Write a program that sorts.", "Draw " + instruction])
        context = rng.choice(["<noinput>", " ".join(rng.sample(WORDS, 4))])
        text += f" {instruction}\n"
        text += f"{position}. Input:\n{context}\n" if with_input else ""
        text += (
            f"{position}. Output:\nIt is about {' and '.join(rng.sample(WORDS, 3))}.\n###\n{position + 1}. Instruction:"
        )
    return Completion(text + " List the", False)


class Scripted:
    """A generator without a model. As with a model, a completion depends on prompt and seed only."""

    def __init__(self, write=plausible, context: int = 100_000):
        self.write, self.context = write, context
        self.prompts: list[SeededPrompt] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def complete(
        self, prompts: Sequence[SeededPrompt], params: SamplingParams, on_completion: OnCompletion | None = None
    ) -> list[list[Completion]]:
        self.prompts += prompts
        n = params.settings.num_return_sequences
        return [[self.write(text, seed + index) for index in range(n)] for text, seed in prompts]


def random_text_model(tokenizer: Tokenizer, context: int = 256) -> GPT:
    """A bigram model as a GPT: random words, then `\\nOutput:`, words, and end-of-text.

    One layer whose attention is zero. Each known token has its own embedding dimension; the MLP detects the dimension
    of the last token and adds those of its possible successors.
    """
    texts = [(tokenizer.decode([token]), token) for token in range(tokenizer.eot_id)]
    words = [token for text, token in texts if re.fullmatch(r" [a-z]{4,}", text)][::20][:40]
    marker = tokenizer.encode("\nOutput:")
    successors = {word: [*random.Random(word).sample(words, 12), marker[0], tokenizer.eot_id] for word in words}
    successors |= {token: [successor] for token, successor in pairwise(marker)} | {marker[-1]: words[:12]}
    known = [*successors, tokenizer.eot_id]
    width = 64
    config = GPTConfig(
        tokenizer.vocab_size,
        n_positions=context,
        n_embd=width,
        n_layer=1,
        n_head=1,
        bos_token_id=tokenizer.eot_id,
        eos_token_id=tokenizer.eot_id,
    )
    assert len(words) >= 30 and len(known) <= width
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.wte.weight[known, range(len(known))] = 1.0
        mlp = model.h[0].mlp
        mlp.c_fc.weight[:width] = torch.eye(width)
        mlp.c_fc.bias.fill_(-5.0)  # all other tokens stay below the activation
        for token, nexts in successors.items():
            mlp.c_proj.weight[[known.index(successor) for successor in nexts], known.index(token)] = 10.0
        model.ln_f.weight.fill_(10.0)
    return model
