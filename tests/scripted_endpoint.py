"""A server that speaks OpenAI's protocol, on the loopback interface: it says what a test's script says."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | int | bytes | dict | list | tuple[int, dict[str, str], Any] | Callable[[BaseHTTPRequestHandler], None]
Script = Callable[[int, dict[str, Any]], Reply]


class Endpoint:
    """What a scripted server was asked, in order; `bodies` and `at` of the POST requests alone."""

    def __init__(self, url: str):
        self.url = url
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.at: list[float] = []  # seconds of the monotonic clock
        self.at_once = self.most_at_once = 0


@contextmanager
def serve(script: Script, models: Mapping[str, Any] | None = None) -> Iterator[Endpoint]:
    """Answers POST request `number`, from 0, with what `script(number, body)` returns, or after a while.

    A text is the content of a chat completion; a number a status; a tuple status, headers and content; bytes come as
    they are and any other value as JSON, with 200; a function is handed the connection; a `ConnectionError` closes it.

    Args:
        models: the answer to a GET request.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:
                self._note()
            self._send(200, {}, models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.bodies)
                self._note()
                server.bodies.append(body)
                server.at.append(time.monotonic())
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                reply = script(number, body)
            finally:
                with lock:
                    server.at_once -= 1
            if callable(reply):
                return reply(self)
            if isinstance(reply, str):
                reply = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
            if isinstance(reply, int):
                reply = (reply, {}, b"")
            self._send(*(reply if isinstance(reply, tuple) else (200, {}, reply)))

        def _note(self) -> None:
            server.paths.append(self.path)
            server.headers.append(dict(self.headers))

        def _send(self, status: int, headers: dict[str, str], content: Any) -> None:
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Says nothing: standard error is the test's."""

    class Server(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False  # a handler that sleeps holds up nobody

        def handle_error(self, *_: object) -> None:
            """A client that has gone, or is to be left without an answer."""

    http = Server(("127.0.0.1", 0), Handler)
    server = Endpoint(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def in_turn(*replies: Reply) -> Script:
    """One reply after the other, the last one for ever."""
    return lambda number, _: replies[min(number, len(replies) - 1)]
