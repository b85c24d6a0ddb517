"""A server on the loopback interface that writes tasks, in a good mood."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..scripted_endpoint import Endpoint, Reply, serve
from .writers import plausible

MODEL = "scripted"
Mood = Callable[[int, dict[str, Any]], Reply | None]


@contextmanager
def serving(mood: Mood = lambda number, body: None, context: int | None = None) -> Iterator[Endpoint]:
    """The server; its `answered` are the seeds of the requests that it answered.

    Before it answers, `mood(number, body)` is asked: what that returns is sent instead; None is a good mood.
    """

    def script(number: int, body: dict[str, Any]) -> Reply:
        reply = mood(number, body)
        if reply is not None:
            return reply
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        choices = []
        for place in range(body["n"]):
            text, finished = plausible(prompt, body["seed"] + place)
            said = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
            choices.append({"index": place, **said, "finish_reason": "stop" if finished else "length"})
        server.answered.append(body["seed"])
        return {"choices": choices}

    card = {"id": MODEL, **({"max_model_len": context} if context else {})}
    with serve(script, {"object": "list", "data": [{"id": "another", "max_model_len": 7}, card]}) as server:
        server.answered = []
        yield server
