"""Fixtures of the tests of inference."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from minigpt.data.encode import encode_example
from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.chat import Chat
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.torch_engine import make_engine
from minigpt.training.loop import train

from .memorized_data import CONVERSATIONS, TEMPLATE


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.tiny()


@pytest.fixture(scope="session")
def speaker(tokenizer: Tokenizer) -> Callable[..., GPT]:
    """`speaker(ids)`: a model that generates `ids` for any prompt, and then only end-of-text.

    It has no layers. Each position's embedding is 1000 times the embedding of the token to generate there, so it
    outweighs the input token, and the tied head makes that token the likeliest by far.
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


@pytest.fixture(scope="session")
def memorized(tokenizer: Tokenizer) -> GPT:
    """A model overfitted on memorized_data.py; it could not stop if end-of-text were masked as padding."""
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=64, n_embd=128, n_layer=2, n_head=2, **dropouts))
    data = [encode_example(conversation, TEMPLATE, tokenizer, 64) for conversation in CONVERSATIONS]
    settings = TrainConfig(learning_rate=5e-3, warmup_steps=3, max_steps=80)
    train(settings, make_engine(model, settings), data)
    return model.eval()


@pytest.fixture
def prompt_recorder():
    """Makes a random model, and a list to which each prompt that it reads is appended."""
    prompts = []

    def make(tokenizer, context=128):
        torch.manual_seed(0)
        model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=context, n_embd=16, n_layer=1, n_head=1)).eval()
        model.register_forward_pre_hook(
            lambda _, args: prompts.append(args[0][0].tolist()) if len(args[0][0]) > 1 else None
        )
        return model, prompts

    return make


@pytest.fixture(scope="session")
def untrained_models(tmp_path_factory, tokenizer: Tokenizer) -> Path:
    """A folder with two models that were never trained.

    `brief` generates a fixed word at each position, and end-of-text at every twelfth, so its answers show how long the
    prompt was; `endless` generates words without end.
    """
    folder = tmp_path_factory.mktemp("untrained_models")
    words = [id for id in range(tokenizer.vocab_size - 1) if re.fullmatch(r" [a-z]{4,}", tokenizer.decode([id]))]
    for name, context, period in (("brief", 256, 12), ("endless", 8192, 9999)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=context, n_embd=128, n_layer=0, n_head=1)).eval()
        script = [words[i % len(words)] if (i + 1) % period else tokenizer.eot_id for i in range(context)]
        with torch.no_grad():
            model.wte.weight.normal_()
            model.wpe.weight.copy_(1000 * model.wte.weight[script])
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name, context)
        get_template("hugchat").save_pretrained(folder / name)
    return folder


@pytest.fixture
def twin(untrained_models: Path) -> Chat:
    """A chat with `brief` in this process: its answers are the expected output of chat.py in a subprocess."""
    model = GPT.from_pretrained(untrained_models / "brief")
    return Chat(model, Tokenizer.tiny(), get_template("hugchat"), max_new_tokens=256)


@pytest.fixture(scope="session")
def served_model() -> GPT:
    from ..serving.running_server import make_model

    return make_model(context=256)


@pytest.fixture(scope="module")
def server(served_model: GPT) -> Iterator:
    """A server for the tests of one module."""
    from ..serving.running_server import serving

    with serving(served_model) as server:
        yield server


@pytest.fixture(scope="session")
def slow_model() -> GPT:
    """A model that takes 20 ms per step, so that clients can disconnect, queue and be rejected meanwhile."""
    from ..serving.running_server import make_model

    return make_model(context=256, step_s=0.02)
