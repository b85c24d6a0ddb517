"""A client for servers with an OpenAI-compatible API: JSON over HTTP with timeouts, retries and backoff.

Uses the standard library only, so that it adds no dependency.

    url = api_url("http://127.0.0.1:8000/v1", "chat/completions")
    response = post_json(url, {"model": "minigpt", "messages": messages}, key)
    response["choices"][0]["message"]["content"]
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from minigpt.version import __version__

T = TypeVar("T")
R = TypeVar("R")

LONGEST_PAUSE = 120.0  # seconds between two attempts; a longer Retry-After is an error


class ApiError(OSError):
    """The request was refused, or failed at every attempt. `status` is the HTTP status; None without a response."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class _NoRedirects(HTTPRedirectHandler):
    """Not followed, because urllib would send a GET, and the API key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


opener = build_opener(_NoRedirects)


def api_url(api_base: str, path: str) -> str:
    """`http://host/v1/` and `chat/completions` -> `http://host/v1/chat/completions`.

    Raises:
        ValueError: `api_base` is not an HTTP URL.
    """
    parts = urlsplit(api_base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{api_base!r} is not a server URL, such as http://127.0.0.1:8000/v1")
    return f"{api_base.rstrip('/')}/{path}"


def post_json(
    url: str,
    body: dict[str, Any],
    key: str | None = None,
    *,
    timeout: float = 120.0,
    attempts: int = 6,
    first: bool = False,
    sleep: Callable[[float], object] = time.sleep,
) -> dict[str, Any]:
    """POSTs a JSON object, and returns the JSON object of the response.

    Transient errors are retried: no connection, timeout, a truncated response, a response that is not a JSON object,
    HTTP 408, 409, 429 and 500 to 599. Backoff is exponential from 1 s, with jitter so that parallel clients spread out;
    a server's `Retry-After` replaces it.

    Args:
        key: sent as `Authorization: Bearer KEY`; never shown in an error.
        timeout: seconds without a byte.
        attempts: total number, the first included.
        first: this is the first request to this server, so a failed connection is not retried: the URL may be wrong.
        sleep: called with the seconds to pause between two attempts.

    Raises:
        ApiError: an error that a retry cannot fix, or the error of the last attempt.
        ValueError: the key contains characters that an HTTP header cannot.
    """
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("the API key contains a non-ASCII or non-printable character")
    headers = {"Content-Type": "application/json", "User-Agent": f"minigpt/{__version__}"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = Request(url, json.dumps(body).encode(), headers)
    problem, status = "", None
    for attempt in range(attempts):
        pause = min(2.0**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        try:
            with opener.open(request, timeout=timeout) as response:
                content = json.loads(response.read())
            if isinstance(content, dict):
                return content
            problem, status = "the response is not a JSON object", None
        except HTTPError as error:
            problem, status = f"HTTP {error.code}: {_message(error)}", error.code
            if key:
                problem = problem.replace(key, "***")
            if not (status in (408, 409, 429) or status >= 500) or "insufficient_quota" in problem:
                raise ApiError(f"{url}: {problem}", status) from None
            retry_after = _retry_after(error.headers.get("Retry-After"))
            if retry_after is not None and retry_after > LONGEST_PAUSE:
                raise ApiError(f"{url}: {problem} (retry after {retry_after:,.0f} s)", status) from None
            pause = pause if retry_after is None else retry_after
        except ValueError:
            problem, status = "the response is not JSON", None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)  # a URLError wraps the cause
            problem, status = f"no answer ({str(reason) or type(reason).__name__})", None
            if isinstance(reason, TimeoutError):
                problem = f"no answer within {timeout:g} s"
            if first and attempt == 0 and isinstance(error, URLError):
                raise ApiError(f"{url}: {problem}") from None
        if attempt + 1 < attempts:
            sleep(pause)
    raise ApiError(f"{url}: {problem} ({attempts} attempts)", status)


def side_by_side(function: Callable[[T], R], items: Sequence[T], threads: int = 4) -> Iterator[tuple[T, R]]:
    """Maps the function over the items in parallel; yields `(item, result)` as each completes, raises the first error.

    For functions that wait for a server. The threads are daemons, so Ctrl-C ends the process at once.
    """
    pending: SimpleQueue[T] = SimpleQueue()
    completed: SimpleQueue[tuple[T, R | None, Exception | None]] = SimpleQueue()

    def work() -> None:
        while True:
            try:
                item = pending.get_nowait()
            except Empty:
                return
            try:
                completed.put((item, function(item), None))
            except Exception as error:
                completed.put((item, None, error))

    for item in items:
        pending.put(item)
    for _ in range(min(threads, len(items))):
        Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            item, result, error = completed.get()
            if error is not None:
                raise error
            yield item, result  # type: ignore[misc]  # without an error there is a result
    finally:
        while not pending.empty():  # on an error, or if the caller stops early: cancel the remaining items
            try:
                pending.get_nowait()
            except Empty:
                break


def _message(error: HTTPError) -> str:
    """The server's error message: from OpenAI's `{"error": {"message", "code"}}`, else the body, else the reason."""
    try:
        text = error.read(100_000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        text = ""
    try:
        details = json.loads(text)["error"]
        text = " ".join(str(details[name]) for name in ("message", "code") if details.get(name))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    text = " ".join(text.split()) or error.reason
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, which is a number or an HTTP date; None if it is neither."""
    try:
        return max(0.0, float(value or ""))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
