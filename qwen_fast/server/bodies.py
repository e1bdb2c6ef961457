"""The bytes of request bodies that the server holds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator

from .errors import ApiError
from .shares import Shares


class Bodies:
    """A budget of bytes. Each body is charged as it comes in, and until its request has ended: what was made of it lives
    as long. Several keys share the budget by the rule of Shares.

    most: bytes. names: the keys. clock: seconds, monotonic. All calls come from one event loop.
    """

    def __init__(self, most: int, names: Collection[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._shares = Shares(most, names, clock)

    @property
    def bytes_held(self) -> int:
        return self._shares.inside

    @contextlib.contextmanager
    def account(self, name: str) -> Iterator[Callable[[int], None]]:
        """A function that charges this key some bytes more, or raises ApiError: 503 where the budget is used up, 429
        where the key has its share of it. What was charged is given back at the end."""
        charged = 0
        shares = self._shares

        def charge(size: int) -> None:
            nonlocal charged
            if not shares.allows(name, size):
                raise self._refusal(name, size)
            shares.take(name, size)
            charged += size

        try:
            yield charge
        finally:
            shares.give_back(name, charged)

    def _refusal(self, name: str, size: int) -> ApiError:
        shares, headers = self._shares, {"retry-after": "1"}
        if shares.inside + size > shares.total:
            message = f"the bodies of other requests take {shares.inside} bytes; the limit is {shares.total}"
            return ApiError(503, message, code="too_many_bytes", headers=headers)
        message = f"the bodies of {name} take {shares.used(name)} bytes; its share is {shares.share(name)}"
        return ApiError(429, message, code="too_many_bytes", headers=headers)
