"""What the tests of inference share."""

from collections.abc import Callable

import pytest
import torch

from minigpt.data.tokenizer import Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.tiny()


@pytest.fixture(scope="session")
def speaker(tokenizer: Tokenizer) -> Callable[..., GPT]:
    """`speaker(ids)`: a model that says `ids`, whatever it is asked, and then only end-of-text.

    It has no layers. A position's embedding points at the token to be said there and drowns the token read, so by
    the tied head that token is the likeliest by far.
    """

    def speak(ids: list[int], prompt_length: int, context: int = 256) -> GPT:
        config = GPTConfig(tokenizer.vocab_size, n_positions=context, n_embd=128, n_layer=0, n_head=1)
        torch.manual_seed(0)
        model = GPT(config).eval()
        script = [0] * (prompt_length - 1) + ids
        script += [tokenizer.eot_id] * (context - len(script))
        with torch.no_grad():
            model.wte.weight.normal_()
            model.wpe.weight.copy_(1000 * model.wte.weight[script[:context]])
        return model

    return speak
