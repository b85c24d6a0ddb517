"""`chat.py --serve`: runs the application on a socket, with a graceful shutdown."""

import asyncio
import logging
import socket
import sys

import uvicorn

from minigpt.serving.app import make_app
from minigpt.serving.requests import RequestBuilder
from minigpt.serving.worker import Worker
from minigpt.settings.groups import ServeArguments

GRACE_S = 15  # at shutdown, running answers get this many seconds to finish


class Server(uvicorn.Server):
    """Serves a model. `run` returns after SIGTERM or Ctrl-C: answers that are running then may finish within `GRACE_S`
    seconds, and are aborted after that.

    Args:
        builder: holds model, tokenizer, template and settings.
        name: the model name that clients see.
        config: address, API key, batch size and queue size.

    Raises:
        OSError: the address is in use or not available.
    """

    def __init__(self, builder: RequestBuilder, name: str, config: ServeArguments):
        host, port = config.host, config.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self.socket = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: {error.strerror or error} (choose another)") from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.socket.getsockname()[1]}"
        self.worker = Worker(
            builder.model, builder.tokenizer, max_rows=config.max_batch_size, max_queue=config.max_queue
        )
        settings = {"lifespan": "off", "ws": "none", "log_level": "warning", "access_log": False}
        app = make_app(self.worker, builder, name, config.api_key)
        super().__init__(
            uvicorn.Config(app, server_header=False, timeout_graceful_shutdown=GRACE_S + 5, **settings)  # type: ignore[arg-type]
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns about writes to closed connections
        super().run(sockets or [self.socket])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if rows := self.worker.rows:
            eprint(f"shutting down: {rows} running answer{'s' * (rows != 1)} may take {GRACE_S} seconds")
        abort = asyncio.get_running_loop().call_later(GRACE_S, self._abort)
        await super().shutdown(sockets)
        abort.cancel()
        self.worker.end("the server has shut down")
        await asyncio.to_thread(self.worker.join)
        eprint("shut down")

    def _abort(self) -> None:
        eprint(f"{self.worker.rows} answers are aborted")
        self.worker.end("the server is shutting down; the answer is aborted")


def eprint(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
