"""The rule by which keys share places and bytes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_admission import Clock

from qwen_fast.server.shares import Shares


class Sharing(RuleBasedStateMachine):
    """Keys that take and give back at random, and the rule of Shares."""

    @initialize(total=st.integers(1, 40), keys=st.integers(2, 12))
    def begin(self, total: int, keys: int) -> None:
        self.clock = Clock()
        self.names = [f"k{i}" for i in range(keys)]
        self.shares = Shares(total, self.names, self.clock)
        self.held: dict[str, int] = dict.fromkeys(self.names, 0)
        self.waits: dict[str, float] = {}

    def share(self, name: str) -> int:
        waiting = {one for one, until in self.waits.items() if until > self.clock.now}
        active = {one for one, used in self.held.items() if used} | waiting | {name}
        kept = min(self.shares.floor * (len(self.names) - len(active)), self.shares.total // 2)
        return max(self.shares.floor, (self.shares.total - kept) // len(active))

    @rule(key=st.integers(0, 11), amount=st.integers(1, 20))
    def ask(self, key: int, amount: int) -> None:
        name = self.names[key % len(self.names)]
        used, share, total = self.held[name], self.share(name), self.shares.total
        others_wait = any(until > self.clock.now for one, until in self.waits.items() if one != name)
        allowed = self.shares.allows(name, amount)
        if used + amount <= self.shares.floor:
            assert allowed  # always, so an idle key gets one place at least
        elif allowed:
            assert sum(self.held.values()) + amount <= total
            assert used + amount <= share or not others_wait
        elif used + amount <= share:
            self.waits[name] = self.clock.now + 5
        if not allowed and not others_wait and sum(self.held.values()) == 0:
            assert amount > total - total // 2  # alone, a key gets half
        if allowed:
            self.shares.take(name, amount)
            self.held[name] += amount
            self.waits.pop(name, None)

    @rule(key=st.integers(0, 11), amount=st.integers(1, 20))
    def give_back(self, key: int, amount: int) -> None:
        name = self.names[key % len(self.names)]
        amount = min(amount, self.held[name])
        self.shares.give_back(name, amount)
        self.held[name] -= amount

    @rule(key=st.integers(0, 11), seconds=st.sampled_from([0.5, 6.0]))
    def time_passes(self, key: int, seconds: float) -> None:
        self.clock.now += seconds

    @rule(key=st.integers(0, 11), amount=st.integers(1, 20))
    def who_waits_gets_in(self, key: int, amount: int) -> None:
        """A key that asks for no more than its share, and asks again, gets in once the others, who go on asking too,
        have given back what they have beyond theirs."""
        name = self.names[key % len(self.names)]
        if self.held[name] + amount > self.share(name) or self.shares.allows(name, amount):
            return
        self.waits = {name: self.clock.now + 5}
        for other in self.names:
            while other != name and self.held[other] > self.share(other):
                self.shares.give_back(other, 1)
                self.held[other] -= 1
                if self.held[other] >= self.share(other):
                    assert not self.shares.allows(other, 1)
        self.clock.now += 4  # and those who waited too have given up
        self.shares._waiting = {name: self.clock.now + 1}
        if self.held[name] + amount <= self.share(name):
            assert self.shares.allows(name, amount)
        self.waits = {name: self.clock.now + 5}
        self.shares._waiting = {name: self.clock.now + 5}

    @invariant()
    def sums_are_right(self) -> None:
        if not hasattr(self, "held"):
            return
        shares, floor = self.shares, self.shares.floor
        assert shares.inside == sum(self.held.values())
        assert shares.inside <= shares.total + (len(self.names) if floor * len(self.names) > shares.total // 2 else 0)
        for name, used in self.held.items():
            kept = sum(max(0, floor - other) for one, other in self.held.items() if one != name)
            assert shares.used(name) == used and shares.kept_for_others(name) == min(kept, shares.total // 2)


Sharing.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSharing = Sharing.TestCase
