"""Which requests get in: places counted before tokenisation, and what each key may use."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping

from .auth import KeyLimits
from .errors import ApiError
from .shares import Shares
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

    max_num_queued_reqs: sequences, running and waiting together. Several keys of `limits` share these places by the
        rule of Shares: each can always have one sequence at least, and no key gets more than its share while another
        waits.
    max_num_queued_tokens: prompt tokens of requests without a first token; 0: no limit. With several keys, a key whose
        own are below an equal part, among the keys that have any, still gets in.
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
        self.in_flight: Mapping[str, RequestRecord] = {}
        self._most_tokens = max_num_queued_tokens
        self._clock = clock
        self._tenants = {name: _Tenant(one, clock) for name, one in (limits or {}).items()}
        self._places = Shares(max_num_queued_reqs, self._tenants, clock)
        self._several = len(self._tenants) > 1
        self._turn = 0  # of the requests that have ended, the latest
        self._left_at = clock()
        self._seconds_per_place = 0.0  # between two places that become free, a running mean

    @property
    def admitted(self) -> int:
        return self._places.inside

    def arrive(self, principal: Principal) -> None:
        """Takes a request's part of its key's rate, before its body is read."""
        tenant = self._tenant(principal)
        limits = tenant.limits
        if tenant.requests is not None and (wait := tenant.requests.seconds_until(1)) > 0:
            raise _refused(f"{principal.name} sent more than {limits.requests_per_minute:g} requests a minute", wait)
        if tenant.tokens is not None and (wait := tenant.tokens.seconds_until(1)) > 0:
            raise _refused(f"{principal.name} used more than {limits.tokens_per_minute:g} tokens a minute", wait)
        if tenant.requests is not None:
            tenant.requests.take(1)

    def expect(self, principal: Principal) -> None:
        """Refuses a generation request whose body is not read yet, where not even one sequence has a place."""
        self._check_concurrency(principal, self._tenant(principal), 1)
        self._check_queue(principal, 1)

    @contextlib.asynccontextmanager
    async def slot(self, principal: Principal, n: int) -> AsyncIterator[None]:
        """Places for n sequences. n = 0: a request that generates nothing, which needs none."""
        tenant = self._tenant(principal)
        if n:
            self._check_concurrency(principal, tenant, n)
            self._check_queue(principal, n)
        self._places.take(principal.name, n)
        tenant.admitted += n
        tenant.turn = turn = max(self._turn, tenant.next_turn)
        tenant.next_turn = turn + n
        try:
            yield
        finally:
            self._places.give_back(principal.name, n)
            tenant.admitted -= n
            self._turn = max(self._turn, turn)
            self._note_free(n)

    def priority(self, principal: Principal) -> int:
        """The engine's priority (lower runs first) of the request that this key was just admitted with, so that the
        sequences of several keys take turns, however many one of them sends.

        A key's turns count its sequences (start-time fair queueing); a key that was idle goes on where the others are.
        Every request is overtaken by finitely many others."""
        return min(self._tenant(principal).turn, _LAST_TURN) if self._several else 0

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

    def _check_concurrency(self, principal: Principal, tenant: _Tenant, n: int) -> None:
        limits = tenant.limits
        if n > limits.concurrency > 0:
            message = f"{n} sequences are asked for; the limit of {principal.name} is {limits.concurrency}"
            raise ApiError(400, message, param="n")
        if limits.concurrency and tenant.admitted + n > limits.concurrency:
            message = f"{principal.name} has {tenant.admitted} sequences open and asks for {n} more"
            raise _refused(f"{message}; the limit is {limits.concurrency}", self._seconds_per_place)

    def _check_queue(self, principal: Principal, n: int) -> None:
        places, name = self._places, principal.name
        if n > places.total:
            raise ApiError(400, f"{n} sequences are asked for; the limit is {places.total}", param="n")
        self._check_waiting_tokens(name)  # first: who is refused here does not wait for a place
        if places.allows(name, n):
            return
        kept = places.kept_for_others(name)
        if places.inside + kept + n > places.total:
            message = f"{places.inside} sequences run or wait and {n} more are asked for"
            others = f", of which {kept} are kept for other keys" if kept else ""
            raise _refused(f"{message}; the limit is {places.total}{others}", n * self._seconds_per_place)
        message = f"{name} has {places.used(name)} sequences and asks for {n} more"
        share = f"; its share is {places.share(name)} while other keys wait"
        raise _refused(message + share, n * self._seconds_per_place)

    def _check_waiting_tokens(self, name: str) -> None:
        if not self._most_tokens:
            return
        waiting: dict[str, int] = {name: 0}
        for one in self.in_flight.values():
            if one.first_token is None and (tokens := one.prompt_tokens or one.expected_tokens):
                waiting[one.principal.name] = waiting.get(one.principal.name, 0) + tokens
        together = sum(waiting.values())
        if together < self._most_tokens or (self._several and waiting[name] < self._most_tokens // len(waiting)):
            return
        message = f"{together} prompt tokens wait; the limit is {self._most_tokens}"
        if self._several:
            message += f", of which {self._most_tokens // len(waiting)} are the share of {name}"
        raise _refused(message, self._seconds_per_place)

    def _note_free(self, n: int) -> None:
        if n:
            now = self._clock()
            self._seconds_per_place += 0.1 * ((now - self._left_at) / n - self._seconds_per_place)
            self._left_at = now


def _refused(message: str, seconds: float) -> ApiError:
    wait = min(max(1, math.ceil(seconds)), _LONGEST_WAIT_S)
    return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(wait)})
