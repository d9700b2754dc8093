"""The supported requests of the OpenAI API, validated by pydantic.

Unsupported fields are rejected, never ignored: an unknown field is an error, and so is a known one with a value
that would change the answer (penalties, logit bias, tools).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, field_validator, model_validator

from tuna.data.records import Message

MAX_TOP = 20
MAX_N = 128
MAX_TOKENS = (1 << 31) - 1
MAX_PENALTY = 4.0  # 1e6 tokens to this power still fit in a float32
Stop = Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=16)]
Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One entry per prompt. Not by pydantic, which would validate a million tokens once per possible type."""
    several = isinstance(value, list) and not (value and all(type(item) is int for item in value))
    for prompt in value if several else [value]:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(item) is int for item in prompt)):
            raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists")
    if value == []:
        raise ValueError("has no prompt")
    return list(value) if several else [value]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class SamplingRequest(BaseModel):
    """The common fields of completions and chat completions."""

    model_config = ConfigDict(extra="forbid")

    model: str
    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: Stop = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Known fields, supported only with values that have no effect.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("n", "temperature", "top_p", "stream", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("contains an empty text, which would end every answer at once")
        return value

    @field_validator("presence_penalty", "frequency_penalty", "logit_bias")
    @classmethod
    def _not_served(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported by this server")
        return value


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`: prompts as texts or token ids, one or several."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    max_tokens: int = Field(16, ge=0, le=MAX_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("max_tokens", "echo", mode="before")
    @classmethod
    def _null_too(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("is not supported by this server")
        return value

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of = {self.best_of} is not supported: it must equal n = {self.n}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 needs echo: otherwise the answer would be empty")
        return self


class JsonSchema(BaseModel):
    """The schema of a structured answer; its name and `strict` have no effect here."""

    model_config = ConfigDict(extra="ignore")

    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """Free text, any JSON object, or a JSON object under a schema."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type 'json_schema' needs json_schema.schema")
        return self

    def schema_asked(self) -> dict[str, Any] | None:
        """The JSON schema of the answers, None for free text."""
        if self.json_schema is not None and self.type == "json_schema":
            return self.json_schema.json_schema
        return {"type": "object"} if self.type == "json_object" else None


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    response_format: ResponseFormat | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _null_is_false(cls, value: Any) -> Any:
        return False if value is None else value

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        return self


class RankRequest(BaseModel):
    """`POST /v1/rank`: k responses to one prompt, scored by `sum(log p) / tokens ** length_penalty`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    responses: list[str] = Field(min_length=1, max_length=1024)
    length_penalty: float = Field(1.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    template: str | None = None
    max_length: int | None = Field(None, ge=2, le=MAX_TOKENS)
    logprobs: bool = False

    @model_validator(mode="after")
    def _one_prompt(self) -> RankRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self
