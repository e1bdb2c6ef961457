"""From the first byte of a request to a validated one: its key's rate, the bytes of its body, its counts, its model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from .bounds import check_counts
from .errors import ApiError
from .http_io import CONTEXT, Message, Receive, read_body
from .json_body import parse_json
from .state import Server

if TYPE_CHECKING:
    from .protocol import GenerationRequest

_LOG = logging.getLogger("qwen_fast.server")
QUICK_BODY_BYTES = 32 * 1024  # larger ones are decoded and validated in a thread
M = TypeVar("M", bound=BaseModel)


@contextlib.asynccontextmanager
async def body_of(server: Server, scope: Message, receive: Receive) -> AsyncIterator[bytes]:
    """The body of a request, whose bytes count until this is left. ApiError where the server takes none now, or the
    key's rate or its share of bytes is used up."""
    require_ready(server)
    principal = scope[CONTEXT].principal
    server.admission.arrive(principal)
    with server.bodies.account(principal.name) as charge:
        yield await read_body(scope, receive, server.config.limits, charge)


def validated(server: Server, kind: type[M], body: bytes) -> M:
    """The request. What pydantic sees has been counted: it lets no other thread run until it is done."""
    limits = server.config.limits
    value = parse_json(body, limits)
    check_counts(value, limits, server.llm.max_model_len)
    request = kind.model_validate(value)
    check_model(server, getattr(request, "model", None))
    return request


def require_ready(server: Server) -> None:
    """ApiError 503 where no request can be taken."""
    dead = server.dead
    if dead:
        raise ApiError(503, dead, code="engine_error")
    if not server.ready:
        reason = server.not_ready_reason or "the server is not ready"
        raise ApiError(503, reason, code="not_ready", headers={"retry-after": "5"})


def check_model(server: Server, name: str | None) -> None:
    """ApiError 404 for a name that is not served. A request without one means the first."""
    if name is not None and name not in server.model_names:
        shown = name if len(name) <= 100 else name[:97] + "..."
        raise ApiError(404, f"the model {shown!r} does not exist", param="model", code="model_not_found")


def note_unknown_fields(request: GenerationRequest) -> None:
    if request.model_extra:
        names = ", ".join(sorted(ascii(name[:64]) for name in list(request.model_extra)[:16]))
        _LOG.info("fields of a request that mean nothing here: %s", names)
