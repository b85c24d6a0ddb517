"""JSON over HTTP to a server that speaks OpenAI's protocol, with patience: time-outs, attempts, pauses.

The standard library alone, so that asking a model elsewhere needs nothing that training does not.

    url = api_url("http://127.0.0.1:8000/v1", "chat/completions")
    answer = post_json(url, {"model": "minigpt", "messages": messages}, key)
    answer["choices"][0]["message"]["content"]
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

LONGEST_PAUSE = 120.0  # seconds between two attempts; a server that wants more is given up


class ApiError(OSError):
    """A server that refuses, or answers nothing of use at any attempt. `status` is that of HTTP, if it came so far."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class _NoRedirects(HTTPRedirectHandler):
    """urllib would follow with a GET, and hand the key to whoever it is sent to."""

    def redirect_request(self, *_: Any) -> None:
        return None


opener = build_opener(_NoRedirects)


def api_url(api_base: str, path: str) -> str:
    """`http://host/v1/` and `chat/completions` -> `http://host/v1/chat/completions`.

    Raises:
        ValueError: `api_base` is no address of HTTP.
    """
    parts = urlsplit(api_base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{api_base!r} is no address of a server, such as http://127.0.0.1:8000/v1")
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
    """Sends an object, and returns the object that comes back.

    What may pass is tried again: no connection, no answer in time, half an answer, one that is no JSON, the statuses
    408, 409, 429 and 500 to 599. The pauses double from a second on, shortened at random so that several askers part;
    a server's `Retry-After` counts instead.

    Args:
        key: sent as `Authorization: Bearer KEY`; never shown in an error.
        timeout: seconds without a byte.
        attempts: in all.
        first: nothing has come from there before: where nobody can be reached, there is no other attempt.
        sleep: waits so many seconds between two of them.

    Raises:
        ApiError: a refusal that no other attempt will change, or the last attempt's.
        ValueError: the key is none.
    """
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("the API key holds characters that no key has")
    headers = {"Content-Type": "application/json", "User-Agent": f"minigpt/{__version__}"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = Request(url, json.dumps(body).encode(), headers)
    problem, status = "", None
    for attempt in range(attempts):
        pause = min(2.0**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        try:
            with opener.open(request, timeout=timeout) as response:
                answer = json.loads(response.read())
            if isinstance(answer, dict):
                return answer
            problem, status = "the answer is no JSON object", None
        except HTTPError as error:
            problem, status = f"HTTP {error.code}: {_message(error)}", error.code
            if key:
                problem = problem.replace(key, "***")
            if not (status in (408, 409, 429) or status >= 500) or "insufficient_quota" in problem:
                raise ApiError(f"{url}: {problem}", status) from None
            asked = _retry_after(error.headers.get("Retry-After"))
            if asked is not None and asked > LONGEST_PAUSE:
                raise ApiError(f"{url}: {problem} (it asks to wait for {asked:,.0f} s)", status) from None
            pause = pause if asked is None else asked
        except ValueError:
            problem, status = "the answer is not JSON", None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)  # a URLError wraps what happened
            problem, status = f"no answer ({str(reason) or type(reason).__name__})", None
            if isinstance(reason, TimeoutError):
                problem = f"no answer within {timeout:g} s"
            if first and attempt == 0 and isinstance(error, URLError):
                raise ApiError(f"{url}: {problem}") from None
        if attempt + 1 < attempts:
            sleep(pause)
    raise ApiError(f"{url}: {problem} ({attempts} attempts)", status)


def side_by_side(function: Callable[[T], R], items: Sequence[T], threads: int = 4) -> Iterator[tuple[T, R]]:
    """Each item and what the function makes of it, as they get done; the first error ends it.

    The threads wait for servers. Nobody waits for them: Ctrl-C ends the process at once.
    """
    waiting: SimpleQueue[T] = SimpleQueue()
    done: SimpleQueue[tuple[T, R | None, Exception | None]] = SimpleQueue()

    def work() -> None:
        while True:
            try:
                item = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((item, function(item), None))
            except Exception as error:
                done.put((item, None, error))

    for item in items:
        waiting.put(item)
    for _ in range(min(threads, len(items))):
        Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            item, result, error = done.get()
            if error is not None:
                raise error
            yield item, result  # type: ignore[misc]  # there is one where there is no error
    finally:
        while not waiting.empty():  # whoever is no longer waited for asks for nothing more
            try:
                waiting.get_nowait()
            except Empty:
                break


def _message(error: HTTPError) -> str:
    """What the server says of its refusal: OpenAI's `{"error": {"message", "code"}}`, or the text."""
    try:
        text = error.read(100_000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        text = ""
    try:
        found = json.loads(text)["error"]
        text = " ".join(str(found[name]) for name in ("message", "code") if found.get(name))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    text = " ".join(text.split()) or error.reason
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _retry_after(value: str | None) -> float | None:
    """The seconds that a `Retry-After` asks for, given as a number or as a date; None where it is neither."""
    try:
        return max(0.0, float(value or ""))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
