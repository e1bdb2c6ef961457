"""Requests as pydantic models: OpenAI's fields, and vLLM's under vLLM's names. Unknown fields are kept and ignored.

Types are strict ("5" is no integer, true is no number), null stands for a field that was left out. NaN, infinity and lone
surrogates never get here: json_body refuses them in the JSON text. Lists are counted before (see bounds.check_counts), and
end at the first entry that is wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ..params import MAX_LOGPROBS
from .errors import described

_INT32_MAX = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
_TEXTS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_TOKEN_SCHEMA = {"type": "integer", "minimum": 0, "maximum": _INT32_MAX}


def _one_or_many(value: Any) -> Any:
    """A text where a list of texts is taken too."""
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, str):
        return [value]
    raise ValueError(f"Input should be a text or a list of texts, not {described(value)}")


def _prompts(value: Any) -> list[str | list[int]]:
    """Every form of "prompt" as a list of prompts: a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        message = f"Input should be a text, a list of token ids, or a list of these, not {described(value)}"
        raise ValueError(message)  # noqa: TRY004 - for pydantic
    if not value:
        raise ValueError("Input should have at least one prompt or token id, not []")
    if _is_token_id(value[0]):
        return [_token_ids(value, "")]
    prompts: list[str | list[int]] = []
    for i, one in enumerate(value):
        if isinstance(one, str):
            prompts.append(one)
        elif isinstance(one, list):
            prompts.append(_token_ids(one, f"prompt {i}: "))
        else:
            message = f"prompt {i} should be a text or a list of token ids, not {described(one)}"
            raise ValueError(message)  # noqa: TRY004 - for pydantic
    return prompts


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token_ids(values: list[Any], where: str) -> list[int]:
    if values and set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= _INT32_MAX:
        return values
    for i, value in enumerate(values):
        if not _is_token_id(value) or not 0 <= value <= _INT32_MAX:
            raise ValueError(f"{where}token id {i} should be an integer from 0 to {_INT32_MAX}, not {described(value)}")
    return values


def _tokens(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise ValueError(f"Input should be an array, got {described(value)}")  # noqa: TRY004 - for pydantic
    return _token_ids(value, "")


Strings = Annotated[list[str], Field(fail_fast=True)]
Texts = Annotated[Strings | None, BeforeValidator(_one_or_many), WithJsonSchema(_TEXTS_SCHEMA)]
Prompts = Annotated[
    list[Any],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": _TOKEN_SCHEMA, "minItems": 1},
                {"type": "array", "items": {"type": "array", "items": _TOKEN_SCHEMA, "minItems": 1}, "minItems": 1},
            ]
        }
    ),
]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Strict):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type 'json_schema' needs json_schema.schema")
        return self


class StructuredOutputs(Strict):
    """One of the fields, which says what form the text must have."""

    json_: dict[str, Any] | bool | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Strings | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None

    def given(self) -> dict[str, Any]:
        """The fields that ask for something, by StructuredOutputsParams' names."""
        values = {"json": self.json_, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        found = {name: value for name, value in values.items() if value is not None}
        return {**found, "json_object": True} if self.json_object else found


class GenerationRequest(Strict):
    """What chat and completion requests share."""

    model: str | None = Field(None, max_length=1024)
    n: int | None = Field(None, ge=1, le=_INT32_MAX)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_INT32_MAX)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: Texts = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=_INT32_MAX)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=_INT32_MAX)
    prompt_logprobs: Logprobs | None = None
    allowed_token_ids: TokenIds | None = Field(None, min_length=1)
    bad_words: Strings | None = None
    priority: int | None = Field(None, ge=-(2**31), le=_INT32_MAX)
    request_id: str | None = Field(None, min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = Field(None, min_length=1)
    guided_grammar: str | None = None
    best_of: int | None = Field(None, ge=1, le=_INT32_MAX)
    use_beam_search: bool | None = None

    @field_validator("logit_bias")
    @classmethod
    def _bias_keys(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= _INT32_MAX):
                raise ValueError(f"Input should have token ids as keys, {described(key)} is none")
        return value

    @model_validator(mode="after")
    def _together(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.use_beam_search:
            raise ValueError("use_beam_search is not supported")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}; it is supported only where it equals n, {self.n or 1}")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs cannot be streamed")
        forms = self.forms()
        if len(forms) > 1:
            raise ValueError(f"only one form of structured output can be asked for, got {', '.join(sorted(forms))}")
        return self

    def forms(self) -> dict[str, Any]:
        """The structured output asked for, by StructuredOutputsParams' names: json, regex, choice, grammar or
        json_object. Empty: free text."""
        found = self.structured_outputs.given() if self.structured_outputs else {}
        older = {"json": self.guided_json, "regex": self.guided_regex, "choice": self.guided_choice}
        found.update({name: value for name, value in older.items() if value is not None})
        if self.guided_grammar is not None:
            found["grammar"] = self.guided_grammar
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_object":
            found["json_object"] = True
        if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is not None:
            found["json"] = wanted.json_schema.schema_
        return found

    @property
    def samples(self) -> int:
        return self.n or 1


class ContentPart(Strict):
    type: str = "text"
    text: str | None = None


class ChatMessage(Strict):
    role: str = Field(min_length=1, max_length=64)
    content: str | Annotated[list[ContentPart | str], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: FunctionName


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=_INT32_MAX)
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT32_MAX)
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _chat_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt cannot both be true")
        choice = self.tool_choice
        if choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("tools holds two functions of one name")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"tool_choice names {choice.function.name!r}, which is not in tools")
        if (choice == "required" or isinstance(choice, NamedTool)) and self.forms():
            raise ValueError("a forced tool_choice and structured output cannot both be asked for")
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0, le=_INT32_MAX)
    logprobs: Logprobs | None = None
    echo: bool | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _completion_together(self) -> CompletionRequest:
        if self.suffix:
            raise ValueError("suffix is not supported")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be streamed")
        return self


class TokenizeRequest(Strict):
    """POST /tokenize: prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = Field(None, min_length=1)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of prompt and messages")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt cannot both be true")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Any], BeforeValidator(_tokens), WithJsonSchema({"type": "array", "items": _TOKEN_SCHEMA})]
