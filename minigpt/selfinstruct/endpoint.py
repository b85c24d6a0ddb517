"""Completions from any server that speaks OpenAI's protocol: vLLM, TGI, Ollama, `chat.py --serve`, and OpenAI's own.

Source: the API reference of completions and chat completions (https://platform.openai.com/docs/api-reference).
Time-outs, attempts and pauses are those of minigpt/api_client.py.
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
from minigpt.selfinstruct.generators import Completion, How, OnArrival, Prompt, cut
from minigpt.settings.groups import check_range

if TYPE_CHECKING:  # it brings tiktoken, and --help need not wait for it
    from minigpt.data.tokenizer import Tokenizer

KEY = "OPENAI_API_KEY"
MOST_STOPS = 4  # that OpenAI takes; the others are cut off here
REFUSED = (400, 413, 422)  # of one request: too long, or against the server's rules


@dataclass
class EndpointArguments:
    """A server that speaks OpenAI's protocol, instead of a local model. Its key is taken from OPENAI_API_KEY."""

    api_base: str | None = None
    """Its address, such as http://127.0.0.1:8000/v1 (vLLM, TGI, Ollama, chat.py --serve)."""
    api_model: str | None = None
    """The model's name there."""
    api_chat: bool = False
    """Ask for /chat/completions, where there is no /completions."""
    api_context: int | None = None
    """The model's context in tokens. Unset: what the server says of it, else 4096. Without tokenizer_name, two bytes
    count as a token, which is more than there are."""
    api_timeout: float = 600.0
    """Seconds without a byte after which a request is sent again."""
    api_retries: int = 8
    """How often a request is sent again after a time-out, status 429 or 5xx, or nonsense."""

    def __post_init__(self) -> None:
        check_range(self, "at least 2", lambda x: x >= 2, "api_context")
        check_range(self, "above 0 and finite", lambda x: 0 < x < float("inf"), "api_timeout")
        check_range(self, "at least 0", lambda x: x >= 0, "api_retries")
        if bool(self.api_base) != bool(self.api_model):
            raise ValueError("--api_base and --api_model go together: the server's address, and the model's name there")


class ApiGenerator:
    """A model behind a server, asked by `request_batch_size` threads at once."""

    def __init__(self, endpoint: EndpointArguments, tokenizer: "Tokenizer | None" = None):
        """
        Args:
            tokenizer: the model's own, to count with.

        Raises:
            ApiError: nobody answers at the address, or the key is refused.
            ValueError: the address is none.
        """
        assert endpoint.api_base and endpoint.api_model
        self.endpoint, self.tokenizer = endpoint, tokenizer
        self.key = os.environ.get(KEY, "").strip() or None
        self.url = api_url(endpoint.api_base, "chat/completions" if endpoint.api_chat else "completions")
        said = self._context_there(api_url(endpoint.api_base, "models"))
        self.context = endpoint.api_context or said or 4096
        self._answered = False  # whether a request ever was
        self._not_before = 0.0  # of the monotonic clock: what one thread is asked to wait, all wait
        self._given_up = Event()

    def count(self, text: str) -> int:
        if self.tokenizer is not None:
            return len(self.tokenizer.encode(text))
        return -(-len(text.encode("utf-8", "replace")) // 2)

    def complete(
        self, prompts: Sequence[Prompt], how: How, on_arrival: OnArrival | None = None
    ) -> list[list[Completion]]:
        """Raises ApiError where the server does not answer, or refuses; after what is under way has arrived. And
        ValueError for a beam search, which the protocol does not know."""
        if how.settings.num_beams > 1:
            raise ValueError("--num_beams needs a local model: OpenAI's protocol knows no beam search")
        found: list[list[Completion]] = [[] for _ in prompts]
        refused: dict[int, ApiError] = {}
        failed: ApiError | None = None
        self._given_up.clear()

        def ask(place: int) -> list[Completion] | ApiError | None:
            """None where it was not asked, or not again, because of another one's error."""
            try:
                return None if self._given_up.is_set() else self._ask(prompts[place], how)
            except _GivenUp:
                return None
            except ApiError as error:
                if error.status not in REFUSED:
                    self._given_up.set()
                return error

        keep: OnArrival = on_arrival or (lambda place, completions: None)
        for place, answer in side_by_side(ask, range(len(prompts)), how.settings.request_batch_size):
            if isinstance(answer, list):
                self._answered, found[place] = True, answer
                keep(place, answer)
            elif answer is not None and answer.status in REFUSED:
                refused[place] = answer
            elif answer is not None:
                failed = failed or answer
        if refused and not self._answered:  # not one was ever taken: it is no matter of the prompt
            failed = failed or next(iter(refused.values()))
        if failed:
            raise self._explained(failed)
        for place, error in refused.items():
            print0(f"a request is refused, and passed over: {error}")
            keep(place, [])
        return found

    def _ask(self, prompt: Prompt, how: How) -> list[Completion]:
        settings, stop = how
        body: dict[str, Any] = {
            "model": self.endpoint.api_model,
            "max_tokens": settings.max_length,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "n": settings.num_return_sequences,
            "seed": prompt.seed % 2**31,  # some read no more bits
            "stop": list(stop[:MOST_STOPS]),
        }
        if settings.repetition_penalty != 1:
            body["repetition_penalty"] = settings.repetition_penalty  # not OpenAI's, but vLLM's and ours
        if self.endpoint.api_chat:
            body["messages"] = [{"role": "user", "content": prompt.text}]
        else:
            body["prompt"] = prompt.text
        attempts = left = self.endpoint.api_retries + 1  # left: the attempt under way, and those after it

        def sleep(seconds: float) -> None:
            nonlocal left
            left -= 1
            self._back_off(seconds)

        while True:
            self._pause(self._not_before - time.monotonic())
            answer = post_json(self.url, body, self.key, timeout=self.endpoint.api_timeout, attempts=left, sleep=sleep)
            if completions := read_choices(answer, stop):
                return completions[: settings.num_return_sequences]
            if left == 1:
                said = json.dumps(answer)[:200]
                raise ApiError(f"{self.url}: no completion in the answer {said} ({attempts} attempts)")
            sleep(min(2.0 ** (attempts - left), 60.0))

    def _back_off(self, seconds: float) -> None:
        self._not_before = max(self._not_before, time.monotonic() + seconds)
        self._pause(seconds)

    def _pause(self, seconds: float) -> None:
        if self._given_up.wait(max(0.0, seconds)):
            raise _GivenUp

    def _context_there(self, url: str) -> int | None:
        """What the server says of the model's context, as vLLM and chat.py do; None where it says nothing."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            with opener.open(Request(url, headers=headers), timeout=min(30.0, self.endpoint.api_timeout)) as response:
                cards = json.loads(response.read(10_000_000))["data"]
            return next(int(card["max_model_len"]) for card in cards if card["id"] == self.endpoint.api_model)
        except HTTPError as error:
            if error.code in (401, 403):
                raise self._explained(ApiError(f"{url}: HTTP {error.code}", error.code)) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ApiError(f"{url}: no answer ({reason}); is --api_base {self.endpoint.api_base} right?") from None
        except (ValueError, KeyError, TypeError, StopIteration):  # it has no such list, or says no length
            pass
        return None

    def _explained(self, error: ApiError) -> ApiError:
        """The error, with what can be done about it."""
        hint = "what has arrived is kept: the same command goes on"
        if error.status in (401, 403):
            hint = f"the key is {KEY} of the environment, which is {'set' if self.key else 'not set'}"
        elif error.status in (301, 302, 303, 307, 308):
            hint = "it sends elsewhere: give --api_base that address"
        elif error.status == 404:
            hint = f"no model {self.endpoint.api_model!r} there, or no such path: --api_model, --api_base"
            hint += "" if self.endpoint.api_chat else ", or --api_chat"
        elif error.status in REFUSED:
            hint = "where it is too long: --api_context, --tokenizer_name to count exactly, or a smaller --max_length"
        return ApiError(f"{error} ({hint})", error.status)


class _GivenUp(Exception):
    """Another request's error ends the round."""


def read_choices(answer: dict[str, Any], stop: Sequence[str]) -> list[Completion]:
    """The completions in an answer of either protocol; an empty list where it is not what it should be.

    >>> read_choices({"choices": [{"text": " Name a fruit.", "finish_reason": "length"}]}, [])
    [Completion(text=' Name a fruit.', finished=False)]
    """
    found = []
    try:
        for choice in answer["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            text = (text or "").encode("utf-8", "replace").decode()  # JSON can hold a lone surrogate, a file cannot
            found.append(cut(text, choice.get("finish_reason") != "length", stop))
    except (KeyError, TypeError, AttributeError):
        return []
    return found
