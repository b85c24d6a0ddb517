"""The middleware before the routes: API key, allowed hosts and origins, size limit, security headers, metrics.

A page of another site, open in the same browser, can send requests to a server on the loopback interface. It can read
the responses too if its host name resolves to that interface (DNS rebinding). So a server without a key checks that
the Host header is a name of the loopback interface, and the Origin its own.
"""

import hmac
import json
from collections import Counter
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

MAX_BODY = 1 << 20  # bytes; a context of 1,024 tokens needs only a fraction
OPEN_PATHS = {"/", "/chat.css", "/chat.js", "/health", "/openapi.json"}  # need no key
SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

HELP = {
    "requests_total": "Requests by path and status.",
    "prompt_tokens_total": "Prompt tokens.",
    "completion_tokens_total": "Generated tokens.",
    "first_token_seconds": "Seconds from the request to its first token.",
    "answer_seconds": "Seconds from the request to its last token.",
    "rows_running": "Answers in the running batch.",
    "rows_waiting": "Answers in the queue.",
    "up": "1 while the model worker runs, else 0.",
}


class HttpError(HTTPException):
    """An HTTP error whose body has the format of OpenAI's API."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        body = {"error": {"message": message, "type": type, "param": param, "code": code}}
        self.json = json.dumps(body)  # as ASCII: the message may quote a lone surrogate, which UTF-8 cannot encode

    def response(self) -> Response:
        return Response(self.json, self.status_code, self.headers, "application/json")


class ServerMetrics:
    """Counters in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats)."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def observe(self, name: str, seconds: float) -> None:
        self.counts[f"{name}_sum"] += seconds  # type: ignore[assignment]
        self.counts[f"{name}_count"] += 1

    def text(self, **gauges: int) -> str:
        lines = []
        values = {**self.counts, **gauges}
        for name, help in HELP.items():
            kind = "gauge" if name in gauges else "counter" if name.endswith("_total") else "summary"
            lines += [f"# HELP minigpt_{name} {help}", f"# TYPE minigpt_{name} {kind}"]
            lines += [
                f"minigpt_{key} {value:.6g}" if isinstance(value, float) else f"minigpt_{key} {value}"
                for key, value in sorted(values.items())
                if key.partition("{")[0] in (name, f"{name}_sum", f"{name}_count")
            ]
        return "\n".join(lines) + "\n"


class Guard:
    """ASGI middleware: checks a request before it reaches the application.

    Args:
        api_key: required for all paths but `OPEN_PATHS`; None requires no key.
        hosts: the host names to accept, and then also no Origin but the server's own; None accepts all.
        paths: paths that the metrics count by name; all others are counted as "other".
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: ServerMetrics,
        *,
        api_key: str | None,
        hosts: Collection[str] | None,
        paths: Collection[str],
    ):
        self.app, self.metrics, self.hosts, self.paths = app, metrics, hosts, paths
        self._authorization = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0  # bytes of the body

        async def receive_limited() -> AsgiMessage:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise _too_large()
            return message

        async def send_with_headers(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update({"Cache-Control": "no-store", **SECURITY})
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.counts[f'requests_total{{path="{path}",status="{message["status"]}"}}'] += 1
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except HttpError as error:
            await error.response()(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive_limited, send_with_headers)

    def _check(self, path: str, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and _hostname(f"//{host}") not in self.hosts:
            raise HttpError(
                403,
                f"host name {host!r} is refused: without --api_key only loopback names such as localhost are allowed",
                code="wrong_host",
            )
        if self.hosts is not None and origin is not None and origin.partition("://")[2] != host:
            raise HttpError(
                403, "request from a page of another site is refused: set --api_key to allow it", code="wrong_origin"
            )
        authorization = headers.get("authorization", "").encode("latin-1")
        if (
            self._authorization
            and path not in OPEN_PATHS
            and not hmac.compare_digest(authorization, self._authorization)
        ):
            raise HttpError(
                401,
                "the API key is missing or wrong (Authorization: Bearer KEY)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY:
            raise _too_large()


def _too_large() -> HttpError:
    return HttpError(413, f"the body is larger than {MAX_BODY:,} bytes", code="request_too_large")


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
