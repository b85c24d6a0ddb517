"""The request and response bodies: the fields of OpenAI's API that apply to a GPT-2.

Source: the API reference of chat completions and completions (https://platform.openai.com/docs/api-reference).
Fields of unsupported features (tools, logprobs, ...) accept only the values that turn the feature off, because clients
send those; any other value and any unknown field is refused by name. `top_k`, `repetition_penalty`, `truncation` and a
message's `input` are extensions; `truncation` has the meaning of OpenAI's responses API.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_CHOICES = 16


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):  # Literal[False] accepts 0, because 0 == False
        raise ValueError("Input should be false")
    return value


No = Annotated[Literal[False], BeforeValidator(_boolean)]
Text = Annotated[str, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
EmptyList = Annotated[list[Any], Field(max_length=0)]
EmptyDict = Annotated[dict[str, Any], Field(max_length=0)]


UNSUPPORTED = {
    *("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "response_format", "tools"),
    *("tool_choice", "functions", "function_call", "modalities", "audio", "store", "best_of", "echo", "suffix"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: No | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class SamplingFields(_Strict):
    """The fields of both kinds of request. The defaults are the flags of the server."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # unsupported features
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: EmptyDict | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingFields":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ContentPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    input: str | None = None
    """Alpaca's input; the template decides where it goes."""
    name: str | None = None
    # fields of an answer, which clients send back with the conversation
    refusal: None = None
    audio: None = None
    annotations: EmptyList | None = None
    function_call: None = None
    tool_calls: EmptyList | None = None

    def as_message(self) -> dict[str, str]:
        """The message in the format of `Template.render`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text, **({"input": self.input} if self.input else {})}


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """auto: the oldest turns of a conversation longer than the context are dropped, and an answer gets at most half of
    the context. disabled, the default: such a conversation is refused."""
    metadata: dict[str, Any] | None = None
    # unsupported features
    logprobs: No | None = None
    top_logprobs: None = None
    response_format: TextFormat | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    store: No | None = None


TokenId = Annotated[int, Field(ge=0)]


class CompletionRequest(SamplingFields):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    # unsupported features
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: No | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None


# ---- responses


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Truncated(BaseModel):
    """How much of the conversation was left out of the prompt."""

    turns_dropped: int
    tokens_cut: int


FinishReason = Literal["stop", "length"]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    truncated: Truncated | None = None


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "minigpt"
    max_model_len: int
    """Tokens of prompt and answer together."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
