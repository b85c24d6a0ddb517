"""Completions from any server with an OpenAI-compatible API: vLLM, TGI, Ollama, `chat.py --serve`, and OpenAI's own.

Source: the API reference of completions and chat completions (https://platform.openai.com/docs/api-reference).
Timeouts, retries and backoff are in minigpt/api_client.py.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request

from minigpt.api_client import ApiError, api_url, opener, post_json, side_by_side
from minigpt.distributed import print0
from minigpt.selfinstruct.generators import (
    Completion,
    OnCompletion,
    SamplingParams,
    SeededPrompt,
    truncate_at_stop,
)
from minigpt.settings.groups import check_range

if TYPE_CHECKING:  # importing it imports tiktoken, which would slow down --help
    from minigpt.data.tokenizer import Tokenizer

API_KEY_VARIABLE = "OPENAI_API_KEY"
MAX_STOP_STRINGS = 4  # OpenAI's limit; the others are applied here, by `truncate_at_stop`
REJECTED_STATUSES = (400, 413, 422)  # concern one request only: too long, or against the server's content rules


@dataclass
class EndpointArguments:
    """An OpenAI-compatible server, used instead of a local model. The API key is read from OPENAI_API_KEY."""

    api_base: str | None = None
    """The server's base URL, such as http://127.0.0.1:8000/v1 (vLLM, TGI, Ollama, chat.py --serve)."""
    api_model: str | None = None
    """The model's name on the server."""
    api_chat: bool = False
    """Use /chat/completions, for servers without /completions."""
    api_context: int | None = None
    """The model's context in tokens. Unset: what the server reports, else 4096. Without tokenizer_name, tokens are
    overestimated as bytes / 2."""
    api_timeout: float = 600.0
    """Seconds without receiving a byte after which a request is retried."""
    api_retries: int = 8
    """Maximum retries of a request after a timeout, status 429 or 5xx, or a malformed response."""

    def __post_init__(self) -> None:
        check_range(self, "at least 2", lambda x: x >= 2, "api_context")
        check_range(self, "above 0 and finite", lambda x: 0 < x < float("inf"), "api_timeout")
        check_range(self, "at least 0", lambda x: x >= 0, "api_retries")
        if bool(self.api_base) != bool(self.api_model):
            raise ValueError("--api_base and --api_model go together: the server's URL, and the model's name on it")


class ApiGenerator:
    """Generates with a server's model, in `request_batch_size` threads."""

    def __init__(self, endpoint: EndpointArguments, tokenizer: "Tokenizer | None" = None):
        """
        Args:
            tokenizer: the model's own, for exact token counts.

        Raises:
            ApiError: no response from the server, or the API key is rejected.
            ValueError: api_base is not a URL.
        """
        assert endpoint.api_base and endpoint.api_model
        self.endpoint, self.tokenizer = endpoint, tokenizer
        self.key = os.environ.get(API_KEY_VARIABLE, "").strip() or None
        self.url = api_url(endpoint.api_base, "chat/completions" if endpoint.api_chat else "completions")
        reported_context = self._fetch_context(api_url(endpoint.api_base, "models"))
        self.context = endpoint.api_context or reported_context or 4096
        self._any_success = False  # whether any request has succeeded
        self._retry_at = 0.0  # monotonic time, shared: a Retry-After sent to one thread holds back all threads
        self._abort = Event()

    def count(self, text: str) -> int:
        if self.tokenizer is not None:
            return len(self.tokenizer.encode(text))
        return -(-len(text.encode("utf-8", "replace")) // 2)

    def complete(
        self, prompts: Sequence[SeededPrompt], params: SamplingParams, on_completion: OnCompletion | None = None
    ) -> list[list[Completion]]:
        """A prompt that the server rejects gets an empty list.

        Raises:
            ApiError: the server does not respond, or rejects all requests; raised after the requests in flight finish.
            ValueError: beam search, which OpenAI's API does not have.
        """
        if params.settings.num_beams > 1:
            raise ValueError("--num_beams needs a local model: OpenAI's API has no beam search")
        results: list[list[Completion]] = [[] for _ in prompts]
        rejections: dict[int, ApiError] = {}
        failure: ApiError | None = None
        self._abort.clear()

        def request(index: int) -> list[Completion] | ApiError | None:
            """None if not sent, or not retried, because another request failed."""
            try:
                return None if self._abort.is_set() else self._request(prompts[index], params)
            except _Aborted:
                return None
            except ApiError as error:
                if error.status not in REJECTED_STATUSES:
                    self._abort.set()
                return error

        report: OnCompletion = on_completion or (lambda index, completions: None)
        for index, result in side_by_side(request, range(len(prompts)), params.settings.request_batch_size):
            if isinstance(result, list):
                self._any_success, results[index] = True, result
                report(index, result)
            elif result is not None and result.status in REJECTED_STATUSES:
                rejections[index] = result
            elif result is not None:
                failure = failure or result
        if rejections and not self._any_success:  # no request ever succeeded, so the prompt is not the cause
            failure = failure or next(iter(rejections.values()))
        if failure:
            raise self._with_hint(failure)
        for index, error in rejections.items():
            print0(f"the server rejected a request, which is skipped: {error}")
            report(index, [])
        return results

    def _request(self, prompt: SeededPrompt, params: SamplingParams) -> list[Completion]:
        settings, stop = params
        body: dict[str, Any] = {
            "model": self.endpoint.api_model,
            "max_tokens": settings.max_length,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "n": settings.num_return_sequences,
            "seed": prompt.seed % 2**31,  # some servers accept only 31 bits
            "stop": list(stop[:MAX_STOP_STRINGS]),
        }
        if settings.repetition_penalty != 1:
            body["repetition_penalty"] = settings.repetition_penalty  # vLLM and chat.py only, not OpenAI
        if self.endpoint.api_chat:
            body["messages"] = [{"role": "user", "content": prompt.text}]
        else:
            body["prompt"] = prompt.text
        attempts = left = self.endpoint.api_retries + 1  # left: including the current attempt

        def sleep(seconds: float) -> None:
            nonlocal left
            left -= 1
            self._back_off(seconds)

        while True:
            self._pause(self._retry_at - time.monotonic())
            timeout = self.endpoint.api_timeout
            response = post_json(self.url, body, self.key, timeout=timeout, attempts=left, sleep=sleep)
            if completions := read_choices(response, stop):
                return completions[: settings.num_return_sequences]
            if left == 1:
                excerpt = json.dumps(response)[:200]
                raise ApiError(f"{self.url}: no completion in the response {excerpt} ({attempts} attempts)")
            sleep(min(2.0 ** (attempts - left), 60.0))

    def _back_off(self, seconds: float) -> None:
        self._retry_at = max(self._retry_at, time.monotonic() + seconds)
        self._pause(seconds)

    def _pause(self, seconds: float) -> None:
        if self._abort.wait(max(0.0, seconds)):
            raise _Aborted

    def _fetch_context(self, url: str) -> int | None:
        """The model's context as vLLM and chat.py report it (`max_model_len`); None if the server does not."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            with opener.open(Request(url, headers=headers), timeout=min(30.0, self.endpoint.api_timeout)) as response:
                cards = json.loads(response.read(10_000_000))["data"]
            return next(int(card["max_model_len"]) for card in cards if card["id"] == self.endpoint.api_model)
        except HTTPError as error:
            if error.code in (401, 403):
                raise self._with_hint(ApiError(f"{url}: HTTP {error.code}", error.code)) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ApiError(f"{url}: no response ({reason}); is --api_base {self.endpoint.api_base} right?") from None
        except (ValueError, KeyError, TypeError, StopIteration):  # no model list, or no length in it
            pass
        return None

    def _with_hint(self, error: ApiError) -> ApiError:
        """The error with a hint at the fix."""
        hint = "completions received so far are saved: run the same command to resume"
        if error.status in (401, 403):
            hint = f"the API key is read from {API_KEY_VARIABLE}, which is {'set' if self.key else 'not set'}"
        elif error.status in (301, 302, 303, 307, 308):
            hint = "the server redirects: set --api_base to the new URL"
        elif error.status == 404:
            hint = f"no model {self.endpoint.api_model!r} on the server, or a wrong path: check --api_model, --api_base"
            hint += "" if self.endpoint.api_chat else ", or try --api_chat"
        elif error.status in REJECTED_STATUSES:
            hint = "if it is too long: set --api_context, --tokenizer_name for exact counts, or a smaller --max_length"
        return ApiError(f"{error} ({hint})", error.status)


class _Aborted(Exception):
    """Another request failed, so this one is not sent or retried."""


def read_choices(response: dict[str, Any], stop: Sequence[str]) -> list[Completion]:
    """The completions in a response of /completions or /chat/completions; an empty list if it is malformed.

    >>> read_choices({"choices": [{"text": " Name a fruit.", "finish_reason": "length"}]}, [])
    [Completion(text=' Name a fruit.', finished=False)]
    """
    completions = []
    try:
        for choice in response["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            text = (text or "").encode("utf-8", "replace").decode()  # JSON can contain a lone surrogate, UTF-8 cannot
            completions.append(truncate_at_stop(text, choice.get("finish_reason") != "length", stop))
    except (KeyError, TypeError, AttributeError):
        return []
    return completions
