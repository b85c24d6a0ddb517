"""An OpenAI-compatible server on the loopback interface that writes tasks; tests can inject faults."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..scripted_endpoint import Endpoint, Reply, serve
from .fake_generators import plausible

MODEL = "scripted"
Fault = Callable[[int, dict[str, Any]], Reply | None]


@contextmanager
def serving(fault: Fault = lambda number, body: None, context: int | None = None) -> Iterator[Endpoint]:
    """The server; its `answered` are the seeds of the requests that got completions.

    If `fault(number, body)` returns a reply, it is sent instead of completions; None means no fault.
    """

    def script(number: int, body: dict[str, Any]) -> Reply:
        reply = fault(number, body)
        if reply is not None:
            return reply
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        choices = []
        for index in range(body["n"]):
            text, finished = plausible(prompt, body["seed"] + index)
            content = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
            choices.append({"index": index, **content, "finish_reason": "stop" if finished else "length"})
        server.answered.append(body["seed"])
        return {"choices": choices}

    card = {"id": MODEL, **({"max_model_len": context} if context else {})}
    with serve(script, {"object": "list", "data": [{"id": "another", "max_model_len": 7}, card]}) as server:
        server.answered = []
        yield server
