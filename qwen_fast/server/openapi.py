"""The OpenAPI document: the routes are plain ASGI applications, so it is written here and not derived from them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from .. import __version__
from ..outputs import Usage
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_REF = "#/components/schemas/{model}"
_TEXT, _INT, _OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "object"}
_ANY: dict[str, Any] = {}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _cost() -> dict[str, Any]:
    """What the meter says of a request: every field of Usage.as_dict()."""
    kinds: dict[str, dict[str, Any]] = {
        "energy_uj": {"type": "object", "additionalProperties": _INT},
        "energy_provisional": {"type": "boolean"},
        "energy_note": _TEXT,
    }
    schema = _object(**{name: kinds.get(name, _INT) for name in Usage(0, 0, 0).as_dict()})
    return {**schema, "description": " ".join((Usage.__doc__ or "").split())}


_USAGE = _object(prompt_tokens=_INT, completion_tokens=_INT, total_tokens=_INT, prompt_tokens_details=_OBJECT)
_USAGE["properties"]["cost"] = _cost()  # not required: --no-usage-cost, meter=False
_REASON = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
_CHAT_CHOICE = _object(
    index=_INT,
    message=_object(role=_TEXT, content=_nullable(_TEXT)),
    logprobs=_nullable(_OBJECT),
    finish_reason=_REASON,
    stop_reason=_ANY,
)
_TEXT_CHOICE = _object(index=_INT, text=_TEXT, logprobs=_nullable(_OBJECT), finish_reason=_REASON, stop_reason=_ANY)
_CARD = _object(id=_TEXT, object=_TEXT, created=_INT, owned_by=_TEXT, root=_TEXT, max_model_len=_INT)
_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_nullable(_TEXT), code=_ANY))


def _answer(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    named = {"type": "string", "const": kind}
    return _object(id=_TEXT, object=named, created=_INT, model=_TEXT, choices=_list(choice), usage=_USAGE)


# path, method, summary, request model, schema of the answer, whether it may be an event stream
_ROUTES: tuple[tuple[str, str, str, type[BaseModel] | None, dict[str, Any], bool], ...] = (
    (
        "/v1/chat/completions",
        "post",
        "Answer a conversation",
        ChatRequest,
        _answer("chat.completion", _CHAT_CHOICE),
        True,
    ),
    (
        "/v1/completions",
        "post",
        "Continue one or several texts",
        CompletionRequest,
        _answer("text_completion", _TEXT_CHOICE),
        True,
    ),
    ("/v1/models", "get", "The served names", None, _object(object=_TEXT, data=_list(_CARD)), False),
    ("/v1/models/{model}", "get", "One served name", None, _CARD, False),
    (
        "/tokenize",
        "post",
        "Token ids of a text or a conversation",
        TokenizeRequest,
        _object(count=_INT, max_model_len=_INT, tokens=_list(_INT)),
        False,
    ),
    ("/detokenize", "post", "The text of token ids", DetokenizeRequest, _object(prompt=_TEXT), False),
    ("/health", "get", "200 while the engine lives", None, _object(status=_TEXT), False),
    ("/ready", "get", "200 while requests are taken", None, _object(status=_TEXT), False),
    ("/ping", "get", "As /health", None, _object(status=_TEXT), False),
    ("/version", "get", "The version of qwen_fast", None, _object(version=_TEXT), False),
    ("/load", "get", "Requests being answered", None, _object(server_load=_INT), False),
)
_STATUSES = {
    "400": "A value is wrong; the message names field, value and limit",
    "401": "No valid key",
    "404": "Unknown model or route",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "Too many requests; see retry-after",
    "431": "Too many or too large headers",
    "501": "Asked for what this server does not have",
    "503": "The server is draining, full, or its engine failed",
    "504": "The request took too long",
}


def document() -> dict[str, Any]:
    """The whole document, fresh at every call."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, method, summary, model, answer, streams in _ROUTES:
        content: dict[str, Any] = {"application/json": {"schema": answer}}
        if streams:
            content["text/event-stream"] = {"schema": _TEXT}
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
            "responses": {"200": {"description": "The answer", "content": content}, **_error_responses()},
        }
        if "{model}" in path:
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": _TEXT}]
        if model is not None:
            schema = model.model_json_schema(ref_template=_REF)
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
            reference = {"$ref": _REF.format(model=model.__name__)}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
        paths.setdefault(path, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwen_fast", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _error_responses() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {status: {"description": text, "content": content} for status, text in _STATUSES.items()}
