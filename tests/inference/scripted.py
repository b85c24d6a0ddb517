"""A server that speaks OpenAI's protocol, on the loopback interface: it says what a test's script says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = (
    str | int | bytes | dict[str, Any] | tuple[int, dict[str, str], bytes] | Callable[[BaseHTTPRequestHandler], None]
)


class Scripted:
    """What a scripted server was asked."""

    def __init__(self, url: str):
        self.url = url
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []


@contextmanager
def serve(script: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Scripted]:
    """Answers request `number`, from 0, with what `script(number, body)` returns.

    A text is the content of a chat completion; a number a status; bytes or an object come as they are, with 200; a
    function is handed the connection.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.bodies)
                server.paths.append(self.path)
                server.headers.append(dict(self.headers))
                server.bodies.append(body)
            reply = script(number, body)
            if callable(reply):
                return reply(self)
            if isinstance(reply, str):
                reply = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
            if isinstance(reply, int):
                reply = (reply, {}, b"")
            if not isinstance(reply, tuple):
                reply = (200, {}, reply if isinstance(reply, bytes) else json.dumps(reply).encode())
            status, headers, content = reply
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
            """A client that has gone."""

    http = Server(("127.0.0.1", 0), Handler)
    server = Scripted(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def in_turn(*replies: Reply) -> Callable[[int, dict[str, Any]], Reply]:
    return lambda number, _: replies[min(number, len(replies) - 1)]
