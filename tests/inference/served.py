"""A server in a thread of the test's process, on a port of its own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.serve.answer import Asker
from minigpt.inference.serve.run import Server
from minigpt.model.gpt2 import GPT, GPTConfig

NAME = "tiny"


def make_model(context: int = 256, step_s: float = 0.0) -> GPT:
    """Weights of std 0.2, so that answers are no loops and near-ties are rare; slower by `step_s` at every step."""
    torch.manual_seed(0)
    config = GPTConfig(Tokenizer.tiny().vocab_size, n_positions=context, n_embd=32, n_layer=2, n_head=4)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    if step_s:
        model.register_forward_pre_hook(lambda *_: time.sleep(step_s))
    return model


@contextmanager
def serving(model: GPT, template: str = "alpaca", **settings) -> Iterator[Server]:
    """A server while the block runs; then it is asked to end, and has ended."""
    sampling = {"max_new_tokens": 20, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    asker = Asker(model, Tokenizer.tiny(), get_template(template), {**sampling, "seed": None})
    settings = {"host": "127.0.0.1", "port": 0, "api_key": None, "max_batch_size": 4, "max_queue": 64, **settings}
    server = Server(asker, NAME, **settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def wait_for(condition, seconds: float = 20) -> None:
    """Returns as soon as `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
