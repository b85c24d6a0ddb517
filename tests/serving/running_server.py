"""Runs a server in a thread of the test process, on a free port, and sends requests to it."""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import httpx
import torch

from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.serving.requests import RequestBuilder
from minigpt.serving.server import Server
from minigpt.settings.groups import SamplingArguments, ServeArguments

NAME = "tiny"
CHAT = "/v1/chat/completions"


def make_model(context: int = 256, step_s: float = 0.0) -> GPT:
    """Weights of std 0.2, so that answers do not loop and near-ties are rare. Each step sleeps for `step_s`."""
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
    """Runs a server for the duration of the block, then shuts it down and waits for its end."""
    sampling = asdict(SamplingArguments(max_new_tokens=20))
    builder = RequestBuilder(model, Tokenizer.tiny(), get_template(template), sampling)
    server = Server(builder, NAME, ServeArguments(serve=True, **{"port": 0, "max_batch_size": 4, **settings}))
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
    """Waits until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def ask(content: str = "Hi", **more: object) -> dict:
    """The body of a chat request."""
    return {"messages": [{"role": "user", "content": content}], **more}


def post(server: Server, body: dict, path: str = CHAT, **more: object) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=30, **more)


def events(lines: Iterable[str]) -> list[dict]:
    """The objects of a stream of server-sent events, without the final [DONE]; an aborted stream ends with an error."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert all(item == "[DONE]" or item.startswith("{") for item in data)
    assert data[-1] == "[DONE]" or "error" in json.loads(data[-1])
    return [json.loads(item) for item in data if item != "[DONE]"]
