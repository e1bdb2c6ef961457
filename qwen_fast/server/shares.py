"""A quantity that several keys share: places for sequences, bytes of bodies."""

from __future__ import annotations

from collections.abc import Callable, Collection

_WAITS_S = 5.0  # a key that was refused room for its share counts as waiting for so long


class Shares:
    """Who may take how much of `total`.

    names: the keys. With at most one of them there is one rule: all together have at most `total`. With several:

    1. Each key has a floor, total / (2 * keys) but at least 1, which nobody else can take: a request that stays within
       it gets in, always. (With more keys than total / 2 these floors may lead beyond `total`, by at most 1 for each
       key.)
    2. Beyond its floor a key takes what is free, less what is kept for the floors of others, which is at most half of
       `total`: a key that is alone gets at least half.
    3. A key's share is an equal part, among the keys that have something or wait, of what is not kept for the others.
       While another key waits, that is, was refused less than 5 s ago what its share allows, nobody gets more than its
       own share. So what becomes free goes to those that wait.

    clock: seconds, monotonic. Names that are not in `names` have no floor.
    """

    def __init__(self, total: int, names: Collection[str], clock: Callable[[], float]) -> None:
        self.total = total
        self.inside = 0
        self._clock = clock
        self._names = frozenset(names) if len(names) > 1 else frozenset()
        self.floor = max(1, total // (2 * len(self._names))) if self._names else 0
        self._kept = self.floor * len(self._names)  # below the floors of all keys together
        self._used: dict[str, int] = {}  # without the keys that have nothing
        self._active_names = 0  # of _used, those that have a floor
        self._waiting: dict[str, float] = {}  # until when

    def used(self, name: str) -> int:
        return self._used.get(name, 0)

    def kept_for_others(self, name: str) -> int:
        """What a key cannot take because it is kept for the floors of others."""
        return min(self._kept - self._below_floor(name, self.used(name)), self.total // 2)

    def share(self, name: str) -> int:
        """Of a key that wants something now."""
        now = self._clock()
        self._waiting = {one: until for one, until in self._waiting.items() if until > now}
        asking = {one for one in (*self._waiting, name) if one not in self._used}
        known = self._active_names + len(asking & self._names)
        kept = min(self.floor * (len(self._names) - known), self.total // 2)
        return max(self.floor, (self.total - kept) // (len(self._used) + len(asking)))

    def allows(self, name: str, amount: int) -> bool:
        """Whether the key may take so much more now. Where not, and its share would allow it, it waits from now on."""
        if not self._names:
            return self.inside + amount <= self.total
        used = self.used(name)
        if name in self._names and used + amount <= self.floor:
            return True
        within = used + amount <= self.share(name)
        free = self.inside + self.kept_for_others(name) + amount <= self.total
        if free and (within or not self._others_wait(name)):
            return True
        if within:
            self._waiting[name] = self._clock() + _WAITS_S
        return False

    def take(self, name: str, amount: int) -> None:
        """Also where allows() says no: the caller has asked."""
        self._waiting.pop(name, None)
        self._set(name, self.used(name) + amount)
        self.inside += amount

    def give_back(self, name: str, amount: int) -> None:
        self._set(name, self.used(name) - amount)
        self.inside -= amount

    def _others_wait(self, name: str) -> bool:
        """share() has just dropped those that wait no more."""
        return len(self._waiting) > (name in self._waiting)

    def _below_floor(self, name: str, used: int) -> int:
        return max(0, self.floor - used) if name in self._names else 0

    def _set(self, name: str, used: int) -> None:
        before = self._used.pop(name, 0)
        if used:
            self._used[name] = used
        if name in self._names:
            self._active_names += bool(used) - bool(before)
            self._kept += self._below_floor(name, used) - self._below_floor(name, before)
