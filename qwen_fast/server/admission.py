"""Which requests get in: places counted before tokenisation, and what each key may use."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping

from .auth import KeyLimits
from .errors import ApiError
from .state import Principal, RequestRecord

_LONGEST_WAIT_S = 60  # what Retry-After says at most
_NO_LIMITS = KeyLimits()
_LAST_TURN = 2**31 - 1  # as the engine counts; from there on it is first come, first served


class Bucket:
    """Allows `per_minute` a minute on average, and as much at once after a minute without any. It can be overdrawn.

    clock: seconds, monotonic.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._rate = per_minute / 60
        self._most = max(per_minute, 1.0)
        self._clock = clock
        self._left = self._most
        self._then = clock()

    def take(self, amount: float) -> None:
        self._fill()
        self._left -= amount

    def seconds_until(self, amount: float) -> float:
        """Until so much is there; 0: it is."""
        self._fill()
        return max(0.0, (amount - self._left) / self._rate)

    def _fill(self) -> None:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._then) * self._rate)
        self._then = now


class _Tenant:
    """What one key uses now."""

    def __init__(self, limits: KeyLimits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.admitted = 0
        self.turn = 0  # of the request that came last
        self.next_turn = 0
        self.requests = Bucket(limits.requests_per_minute, clock) if limits.requests_per_minute else None
        self.tokens = Bucket(limits.tokens_per_minute, clock) if limits.tokens_per_minute else None


class QueueAdmission:
    """Admission by numbers.

    max_num_queued_reqs: sequences, running and waiting together. Half of the places belong to all; the other half is
        shared out among the keys of `limits`, and nobody else takes a key's part: no key can shut another out.
    max_num_queued_tokens: prompt tokens of requests without a first token; 0: no limit. in_flight: the requests that
        run, where these are counted.
    limits: of each key, by name. clock: seconds, monotonic.

    Refusals are ApiError 429 with Retry-After. All calls come from one event loop. `admitted`: sequences inside.
    """

    def __init__(
        self,
        max_num_queued_reqs: int,
        max_num_queued_tokens: int = 0,
        limits: Mapping[str, KeyLimits] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.admitted = 0
        self.in_flight: Mapping[str, RequestRecord] = {}
        self._most = max_num_queued_reqs
        self._most_tokens = max_num_queued_tokens
        self._clock = clock
        self._tenants = {name: _Tenant(one, clock) for name, one in (limits or {}).items()}
        self._own = max_num_queued_reqs // (2 * len(self._tenants)) if len(self._tenants) > 1 else 0
        self._turn = 0  # of the requests that have ended, the latest
        self._left_at = clock()
        self._seconds_per_place = 0.0  # between two places that become free, a running mean

    @contextlib.asynccontextmanager
    async def slot(self, principal: Principal, n: int) -> AsyncIterator[None]:
        """Places for n sequences. n = 0: a request that generates nothing, which only its key's rate limits."""
        tenant = self._tenant(principal)
        self._check_key(principal, tenant, n)
        if n:
            self._check_queue(tenant, n)
        if tenant.requests is not None:
            tenant.requests.take(1)
        self.admitted += n
        tenant.admitted += n
        tenant.turn = turn = max(self._turn, tenant.next_turn)
        tenant.next_turn = turn + n
        try:
            yield
        finally:
            self.admitted -= n
            tenant.admitted -= n
            self._turn = max(self._turn, turn)
            self._note_free(n)

    def priority(self, principal: Principal) -> int:
        """The engine's priority (lower runs first) of the request that this key was just admitted with, so that the
        sequences of several keys take turns, however many one of them sends.

        A key's turns count its sequences (start-time fair queueing); a key that was idle goes on where the others are.
        Every request is overtaken by finitely many others."""
        return min(self._tenant(principal).turn, _LAST_TURN) if len(self._tenants) > 1 else 0

    def finished(self, record: RequestRecord) -> None:
        """Counts the tokens of a request that has ended."""
        tokens = self._tenant(record.principal).tokens
        if tokens is not None:
            tokens.take(record.prompt_tokens + record.completion_tokens)

    def _tenant(self, principal: Principal) -> _Tenant:
        found = self._tenants.get(principal.name)
        if found is None:
            found = self._tenants[principal.name] = _Tenant(_NO_LIMITS, self._clock)
        return found

    def _check_key(self, principal: Principal, tenant: _Tenant, n: int) -> None:
        limits = tenant.limits
        if tenant.requests is not None and (wait := tenant.requests.seconds_until(1)) > 0:
            raise _refused(f"{principal.name} sent more than {limits.requests_per_minute:g} requests a minute", wait)
        if tenant.tokens is not None and (wait := tenant.tokens.seconds_until(1)) > 0:
            raise _refused(f"{principal.name} used more than {limits.tokens_per_minute:g} tokens a minute", wait)
        if n > limits.concurrency > 0:
            message = f"{n} sequences are asked for; the limit of {principal.name} is {limits.concurrency}"
            raise ApiError(400, message, param="n")
        if limits.concurrency and tenant.admitted + n > limits.concurrency:
            message = f"{principal.name} has {tenant.admitted} sequences open and asks for {n} more"
            raise _refused(f"{message}; the limit is {limits.concurrency}", self._seconds_per_place)

    def _check_queue(self, tenant: _Tenant, n: int) -> None:
        if n > self._most:
            raise ApiError(400, f"{n} sequences are asked for; the limit is {self._most}", param="n")
        kept = 0
        if self._own:
            kept = sum(max(0, self._own - other.admitted) for other in self._tenants.values() if other is not tenant)
        if self.admitted + kept + n > self._most:
            message = f"{self.admitted} sequences run or wait and {n} more are asked for"
            others = f", of which {kept} are kept for other keys" if kept else ""
            raise _refused(f"{message}; the limit is {self._most}{others}", n * self._seconds_per_place)
        if self._most_tokens:
            waiting = sum(one.prompt_tokens for one in self.in_flight.values() if one.first_token is None)
            if waiting >= self._most_tokens:
                message = f"{waiting} prompt tokens wait; the limit is {self._most_tokens}"
                raise _refused(message, self._seconds_per_place)

    def _note_free(self, n: int) -> None:
        if n:
            now = self._clock()
            self._seconds_per_place += 0.1 * ((now - self._left_at) / n - self._seconds_per_place)
            self._left_at = now


def _refused(message: str, seconds: float) -> ApiError:
    wait = min(max(1, math.ceil(seconds)), _LONGEST_WAIT_S)
    return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(wait)})
