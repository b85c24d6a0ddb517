"""What stands before the routes: who may ask, how much, from where; and what is counted of it.

A page of any other site that is open in the same browser can send requests to a server on the loopback interface, and
read the answers where it points a name of its own there (DNS rebinding). So a server without a key answers to the
names of the interface alone, and to no page but its own.
"""

import hmac
import json
from collections import Counter
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 1 << 20  # bytes; many times what a context of 1,024 tokens holds
OPEN = {"/", "/chat.css", "/chat.js", "/health", "/openapi.json"}  # for which no key is needed
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
    "prompt_tokens_total": "Tokens of prompts.",
    "completion_tokens_total": "Tokens of answers.",
    "first_token_seconds": "From the request to its first token.",
    "answer_seconds": "From the request to its last token.",
    "rows_running": "Answers under way.",
    "rows_waiting": "Answers that wait for a place.",
    "up": "Whether the model answers.",
}


class ApiError(HTTPException):
    """An error in OpenAI's shape."""

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
        self.json = json.dumps(body)  # in ASCII: what was sent may hold a lone surrogate, which UTF-8 cannot

    def response(self) -> Response:
        return Response(self.json, self.status_code, self.headers, "application/json")


class Metrics:
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
    """An ASGI application around another.

    Args:
        api_key: without it, all but the page and the health is refused; None asks for none.
        hosts: the names under which the server answers, and to no page of another origin; None is any.
        paths: those that are counted by name.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        api_key: str | None,
        hosts: Collection[str] | None,
        paths: Collection[str],
    ):
        self.app, self.metrics, self.hosts, self.paths = app, metrics, hosts, paths
        self._authorization = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def receive_limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY:
                raise _too_large()
            return message

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update({"Cache-Control": "no-store", **SECURITY})
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.counts[f'requests_total{{path="{path}",status="{message["status"]}"}}'] += 1
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, send_secured)
        else:
            await self.app(scope, receive_limited, send_secured)

    def _check(self, path: str, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and _hostname(f"//{host}") not in self.hosts:
            raise ApiError(403, f"without --api_key the server does not answer to the name {host!r}", code="wrong_host")
        if self.hosts is not None and origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "without --api_key pages of other sites may not ask the server", code="wrong_origin")
        given = headers.get("authorization", "").encode("latin-1")
        if self._authorization and path not in OPEN and not hmac.compare_digest(given, self._authorization):
            raise ApiError(
                401,
                "the API key is missing or wrong (Authorization: Bearer KEY)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY:
            raise _too_large()


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY:,} bytes", code="request_too_large")


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
