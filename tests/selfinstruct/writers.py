"""Who writes tasks in these tests: a generator of plausible text, and a model that babbles in the shape of a list."""

import random
import re
from collections.abc import Sequence
from itertools import pairwise

import torch

from minigpt.data.tokenizer import Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.selfinstruct.generators import Completion, How, OnArrival, Prompt

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
    """Continues a list of tasks as a good model does, with a few that some filter drops and an end that is cut."""
    rng = random.Random(seed)
    number = int(re.findall(r"(\d+)\. \w+:$", prompt)[0])
    with_input = "\n1. Input:" in prompt
    text = ""
    for place in range(number, number + rng.randint(2, 5)):
        instruction = " ".join([rng.choice(VERBS), "the", *rng.sample(WORDS, rng.randint(5, 9))]) + "."
        instruction = rng.choice([instruction] * 12 + ["Say hi.", "Write a program that sorts.", "Draw " + instruction])
        context = rng.choice(["<noinput>", " ".join(rng.sample(WORDS, 4))])
        text += f" {instruction}\n"
        text += f"{place}. Input:\n{context}\n" if with_input else ""
        text += f"{place}. Output:\nIt is about {' and '.join(rng.sample(WORDS, 3))}.\n###\n{place + 1}. Instruction:"
    return Completion(text + " List the", False)


class Scripted:
    """A generator without a model: what it writes depends on the seed, as it does for a model."""

    def __init__(self, write=plausible, context: int = 100_000):
        self.write, self.context = write, context
        self.asked: list[Prompt] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def complete(
        self, prompts: Sequence[Prompt], how: How, on_arrival: OnArrival | None = None
    ) -> list[list[Completion]]:
        self.asked += prompts
        n = how.settings.num_return_sequences
        return [[self.write(text, seed + place) for place in range(n)] for text, seed in prompts]


def babbler(tokenizer: Tokenizer, context: int = 256) -> GPT:
    """A model whose next token depends on its last one alone: words, then `\\nOutput:`, words, and the end.

    One layer without attention. Each of the few tokens that it knows has a direction of its own; the MLP sees in which
    one the last token lies, and adds those of the tokens that may follow.
    """
    texts = [(tokenizer.decode([token]), token) for token in range(tokenizer.eot_id)]
    words = [token for text, token in texts if re.fullmatch(r" [a-z]{4,}", text)][::20][:40]
    marker = tokenizer.encode("\nOutput:")
    follows = {word: [*random.Random(word).sample(words, 12), marker[0], tokenizer.eot_id] for word in words}
    follows |= {token: [after] for token, after in pairwise(marker)} | {marker[-1]: words[:12]}
    known = [*follows, tokenizer.eot_id]
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
        mlp.c_fc.bias.fill_(-5.0)  # so that the others are silent
        for token, nexts in follows.items():
            mlp.c_proj.weight[[known.index(one) for one in nexts], known.index(token)] = 10.0
        model.ln_f.weight.fill_(10.0)
    return model
