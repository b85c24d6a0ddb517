"""A stand-in for the Hugging Face hub on the loopback interface: a folder served as model and dataset repositories.

It speaks the part of the hub's HTTP that `huggingface_hub.hf_hub_download` needs: HEAD and GET of
`/OWNER/NAME/resolve/REVISION/FILE` (datasets below `/datasets`), with `ETag`, `X-Repo-Commit` and `Content-Length`,
and 404 with the `X-Error-Code` that tells which of repository, revision and file is missing.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

_RESOLVE = re.compile(
    r"/(?P<datasets>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)(\?.*)?"
)


class HubServer:
    """The server of one test: put files below `root`, run the client in a subprocess with `env`.

    A model repository is the folder `OWNER/NAME` below `root`, a dataset `datasets/OWNER/NAME`; its files are the
    revision "main", and those of `OWNER/NAME@REVISION` another one's (a "/" in it written "%2F").
    """

    def __init__(self, root: Path, home: Path, endpoint: str):
        self.root = root
        self.requests: list[str] = []
        """What was asked, in order: "HEAD /OWNER/NAME/resolve/main/config.json"."""
        self.token: str | None = None
        """Whoever does not bring it is told that there is no such repository, as of a private one."""
        self.env = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        """What the client's environment needs; huggingface_hub reads it at import."""


@contextmanager
def serve_hub(root: Path, home: Path) -> Iterator[HubServer]:
    """Serves `root` while the block runs; `home` is where the client keeps its cache."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            match = _RESOLVE.fullmatch(self.path)
            if not match or (hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}"):
                return self.refuse("RepoNotFound")
            folder = root / (match["datasets"] or "") / match["repo"]
            if not folder.is_dir():
                return self.refuse("RepoNotFound")
            revision = match["revision"]
            commit = hashlib.sha1(f"{folder}@{revision}".encode()).hexdigest()
            if revision != "main":
                folder = folder.with_name(f"{folder.name}@{revision}")
            if not folder.is_dir():
                return self.refuse("RevisionNotFound")
            file = folder / unquote(match["file"])
            if not file.is_file():
                return self.refuse("EntryNotFound", {"X-Repo-Commit": commit})
            content = file.read_bytes()
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.reply(200, {"ETag": etag, "X-Repo-Commit": commit, "Content-Type": "text/plain"}, content)

        def refuse(self, code: str, headers: dict[str, str] | None = None) -> None:
            self.reply(404, {"X-Error-Code": code, **(headers or {})}, b"")

        def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing: standard error is the test's."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = HubServer(root, home, f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
