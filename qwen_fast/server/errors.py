"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import EngineError, ModelError

_LOG = logging.getLogger("qwen_fast.server")

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    431: "RequestHeaderFieldsTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
MAX_MESSAGE_CHARS = 1000  # a longer message is cut in its middle
_FIELD = re.compile(
    r"([a-z_]+(?:\[\d+\])*(?:\.[a-z_]+(?:\[\d+\])*)*)(?::| is | has | must | needs | holds | cannot | names )"
)
_PLAINER = {
    "model_type": "Input should be an object",
    "dict_type": "Input should be an object",
    "list_type": "Input should be an array",
}
_MAX_PARAM_CHARS = 200
_MAX_SHOWN = 80  # characters of a refused value


class ApiError(Exception):
    """An answer other than 200.

    status: HTTP status. message: what, the value and the limit. type: OpenAI's; None: by the status.
    param: the field, such as "messages.0.role". code: a short word for programs, or None for the status.
    headers: added to the response, such as {"retry-after": "1"}.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shortened(message, MAX_MESSAGE_CHARS)
        self.type = type or _TYPES.get(status, "APIError")
        self.param = None if param is None else shortened(param, _MAX_PARAM_CHARS)
        self.code = status if code is None else code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body_bytes(self) -> bytes:
        return json.dumps(self.body()).encode()


def shortened(text: str, limit: int = _MAX_SHOWN) -> str:
    """text, with its middle left out where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def from_exception(error: BaseException, request_id: str) -> ApiError:
    """What the client is told about an exception. Those that nobody expected are logged in full under the request id,
    and the client gets that id only."""
    from pydantic import ValidationError

    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return from_validation(error)
    if isinstance(error, ModelError):
        return ApiError(400, str(error))
    if isinstance(error, NotImplementedError):
        return ApiError(501, str(error))
    if isinstance(error, EngineError):
        _LOG.error("request %s: %s", request_id, error)
        return ApiError(503, f"the engine cannot serve this request: {error}", code="engine_error")
    if isinstance(error, MemoryError):
        _LOG.error("request %s: out of memory", request_id)
        return ApiError(503, "out of memory", code="out_of_memory")
    if isinstance(error, (ValueError, TypeError)) and _told_by_us(error):
        code = "context_length_exceeded" if "max_model_len" in str(error) else None
        return ApiError(400, str(error), param=_field_of(str(error)), code=code)
    _LOG.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, f"internal error; the server's log has it under request id {request_id}")


def _told_by_us(error: BaseException) -> bool:
    """The exception was raised, not merely passed on, by qwen_fast: its text is meant for the caller. A ValueError out
    of a library or out of the server itself is a defect."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.startswith("qwen_fast.") and not module.startswith("qwen_fast.server.")


def from_validation(error: Any, location: Sequence[str | int] = ()) -> ApiError:
    """pydantic's first complaint as one sentence: field, what is wrong, the value."""
    problems = error.errors(include_url=False, include_context=True)
    first = problems[0]
    path = ".".join(str(part) for part in (*location, *first["loc"]) if not _is_union_tag(part))
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = _PLAINER.get(first["type"], message)
    if first["type"] == "missing":
        text = f"{path}: this field is required"
    elif path and first["type"] == "value_error":  # our own words, which name the value
        text = f"{path}: {message}"
    elif path:
        text = f"{path}: {message}, got {described(first.get('input'))}"
    else:
        text = message
    if len(problems) > 1 and first["type"] != "missing":
        others = {".".join(map(str, one["loc"])) for one in problems[1:]}
        text += f" (and {len(others)} more)" if len(others) > 1 else ""
    return ApiError(400, text, param=path or _field_of(message))


def _field_of(message: str) -> str | None:
    """The field that a message begins with: "stop[0] is empty", "min_tokens is 3, more than ..."."""
    found = _FIELD.match(message[:_MAX_PARAM_CHARS])
    return found[1].replace("[", ".").replace("]", "") if found else None


def _is_union_tag(part: str | int) -> bool:
    """pydantic puts the names of a union's members into the path: "function-wrap[...]", "list[int]", "str"."""
    return isinstance(part, str) and (
        "[" in part or "(" in part or part in ("str", "int", "float", "bool", "strict-str")
    )


def described(value: Any) -> str:
    """A short rendering of a refused value: whole where it is small, its type and size where it is not."""
    if isinstance(value, str):
        return f"a text of {len(value)} characters" if len(value) > _MAX_SHOWN else ascii(value)
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if len(value) > 4 else shortened(ascii(value))
    if isinstance(value, dict):
        return f"an object with {len(value)} keys" if len(value) > 4 else shortened(ascii(value))
    if isinstance(value, (bool, int, float, type(None))):
        return shortened(json.dumps(value)) if not isinstance(value, int) or abs(value) < 2**64 else "a huge integer"
    return type(value).__name__
