"""`chat.py --serve`: the application on a socket, from the first request to an orderly end."""

import asyncio
import logging
import socket
import sys

import uvicorn

from minigpt.serving.app import make_app
from minigpt.serving.requests import RequestBuilder
from minigpt.serving.worker import Worker
from minigpt.settings.groups import ServeArguments

GRACE_S = 15  # that long answers under way may take when the server is asked to end


class Server(uvicorn.Server):
    """A model on a socket. `run` serves until SIGTERM or Ctrl-C; answers under way may then finish within `GRACE_S`
    seconds, and are cut after.

    Args:
        asker: model, tokenizer, template and settings.
        name: of the model, as clients call it.
        config: where it listens, to whom, and to how many at once.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, builder: RequestBuilder, name: str, config: ServeArguments):
        host, port = config.host, config.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self.listening = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: {error.strerror or error} (give another)") from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.listening.getsockname()[1]}"
        self.worker = Worker(
            builder.model, builder.tokenizer, max_rows=config.max_batch_size, max_queue=config.max_queue
        )
        settings = {"lifespan": "off", "ws": "none", "log_level": "warning", "access_log": False}
        app = make_app(self.worker, builder, name, config.api_key)
        super().__init__(
            uvicorn.Config(app, server_header=False, timeout_graceful_shutdown=GRACE_S + 5, **settings)  # type: ignore[arg-type]
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of what is sent to a client that has just left
        super().run(sockets or [self.listening])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if rows := self.worker.rows:
            eprint(f"ending: {rows} answer{'s' * (rows != 1)} under way may take {GRACE_S} seconds")
        cut = asyncio.get_running_loop().call_later(GRACE_S, self._cut)
        await super().shutdown(sockets)
        cut.cancel()
        self.worker.end("the server has ended")
        await asyncio.to_thread(self.worker.join)
        eprint("ended")

    def _cut(self) -> None:
        eprint(f"{self.worker.rows} answers are cut")
        self.worker.end("the server is ending, and the answer is cut")


def eprint(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
