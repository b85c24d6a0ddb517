"""A scripted OpenAI-compatible server on the loopback interface."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from minigpt.selfinstruct.generators import Completion

from .writers import plausible

MODEL = "scripted"


class Reply:
    """What a mood makes of a request instead of an answer: a status, headers and a body, after a while."""

    def __init__(self, status: int = 200, body: Any = "", after: float = 0.0, **headers: str):
        self.status, self.after = status, after
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


Mood = Callable[[int, dict[str, Any]], Reply | None]


class Endpoint:
    """Answers `/completions` and `/chat/completions` with what `write(prompt, seed)` says.

    Before, `mood(number, body)` is asked: the number of the request, counted from 0, and what it holds. A Reply is sent
    instead of an answer; None is a good mood; a `ConnectionError` closes the connection.
    """

    def __init__(self, mood: Mood, write: Callable[[str, int], Completion], context: int | None):
        self.mood, self.write, self.context = mood, write, context
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.at: list[float] = []
        self.most_at_once = self.at_once = 0
        self.answered: list[int] = []
        """The seeds of the requests that got a whole answer."""
        self.lock = threading.Lock()
        self.base = ""


@contextmanager
def serving(
    mood: Mood = lambda number, body: None,
    write: Callable[[str, int], Completion] = plausible,
    context: int | None = None,
) -> Iterator[Endpoint]:
    endpoint = Endpoint(mood, write, context)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            endpoint.paths.append(self.path)
            endpoint.keys.append(self.headers["Authorization"])
            card = {"id": MODEL, **({"max_model_len": endpoint.context} if endpoint.context else {})}
            self._send(Reply(body={"object": "list", "data": [{"id": "another", "max_model_len": 7}, card]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                number = len(endpoint.bodies)
                endpoint.bodies.append(body)
                endpoint.paths.append(self.path)
                endpoint.keys.append(self.headers["Authorization"])
                endpoint.at.append(time.monotonic())
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
            try:
                reply = endpoint.mood(number, body)
                good = reply is None
                if reply is None:
                    reply = Reply(body={"object": "text_completion", "choices": self._choices(body)})
                time.sleep(reply.after)
                if good:
                    endpoint.answered.append(body["seed"])
            except ConnectionError:
                self.close_connection = True
                return
            finally:
                with endpoint.lock:
                    endpoint.at_once -= 1
            self._send(reply)

        def _choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
            chat = self.path == "/v1/chat/completions"
            prompt = body["messages"][0]["content"] if chat else body["prompt"]
            found = []
            for place in range(body["n"]):
                text, finished = endpoint.write(prompt, body["seed"] + place)
                said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
                found.append({"index": place, **said, "finish_reason": "stop" if finished else "length"})
            return found

        def _send(self, reply: Reply) -> None:
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:  # the client has given up
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.base = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
