"""The block pool against a simple model, and the scheduler against what its sequences must experience, over random
operations. The C code is compiled into a small library of its own: see sched_library."""

from __future__ import annotations

import ctypes
import zlib

import pytest
import sched_library as lib
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_model import PoolModel

pytestmark = pytest.mark.skipif(lib.compiler() is None, reason="no C compiler (CC or cc)")

VOCAB = 3  # few tokens: many shared prefixes
HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
POOL_SETTINGS = settings(max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=HEALTH)
SCHEDULER_SETTINGS = settings(max_examples=80, stateful_step_count=70, deadline=None, suppress_health_check=HEALTH)


def or_none(block: int) -> int | None:
    return None if block == lib.NO_BLOCK else block


class PoolMachine(RuleBasedStateMachine):
    """Every operation of the pool and of the model side by side, with equal results."""

    @initialize(num_blocks=st.integers(1, 6), block_size=st.integers(1, 3), prefix_caching=st.booleans())
    def create(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.c = lib.load()
        self.pool = ctypes.c_void_p()
        self.block_size = block_size
        lib.checked(self.c.qf_block_pool_create, num_blocks, block_size, prefix_caching, 99, ctypes.byref(self.pool))
        self.model = PoolModel(num_blocks, prefix_caching)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.c.qf_block_pool_destroy(self.pool)

    def blocks(self, kind: str) -> list[int]:
        counts = self.model.ref_counts
        return [b for b, n in enumerate(counts) if n > 0 or (kind == "hittable" and b in self.model.cached)]

    def tokens(self, data: st.DataObject) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(0, 1), min_size=self.block_size, max_size=self.block_size)))

    @rule()
    def take(self) -> None:
        self.model.took(or_none(self.c.qf_block_pool_take(self.pool)))

    @precondition(lambda self: self.blocks("hittable"))
    @rule(data=st.data())
    def ref(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.blocks("hittable")))
        self.c.qf_block_pool_ref(self.pool, block)
        self.model.ref(block)

    @precondition(lambda self: self.blocks("used"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.blocks("used")))
        self.c.qf_block_pool_release(self.pool, block)
        self.model.release(block)

    @precondition(lambda self: self.blocks("used"))
    @rule(data=st.data(), salt=st.sampled_from([0, 0, 7]))
    def publish(self, data: st.DataObject, salt: int) -> None:
        used = self.blocks("used")
        block = data.draw(st.sampled_from(used))
        parent = data.draw(st.sampled_from([lib.NO_BLOCK, *(b for b in used if b != block)]))
        tokens = self.tokens(data)
        if block in self.model.chains:
            return  # offered once already: its children may depend on its hash
        published = self.c.qf_block_pool_publish(self.pool, block, parent, lib.int32_array(tokens), salt)
        assert published == self.model.publish(block, or_none(parent), tokens, salt)

    @rule(data=st.data(), salt=st.sampled_from([0, 0, 7]))
    def find(self, data: st.DataObject, salt: int) -> None:
        parent = data.draw(st.sampled_from([lib.NO_BLOCK, *self.blocks("hittable")]))
        tokens = self.tokens(data)
        found = self.c.qf_block_pool_find(self.pool, parent, lib.int32_array(tokens), salt)
        assert or_none(found) == self.model.find(or_none(parent), tokens, salt)

    @rule(unlikely=st.integers(0, 4))
    def reset(self, unlikely: int) -> None:
        if unlikely == 0:
            self.c.qf_block_pool_reset_prefix_cache(self.pool)
            self.model.reset()

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        lib.checked(self.c.qf_block_pool_check, self.pool)
        assert self.c.qf_block_pool_num_available(self.pool) == self.model.num_available()
        assert self.c.qf_block_pool_num_cached(self.pool) == len(self.model.cached)
        for block, count in enumerate(self.model.ref_counts):
            assert self.c.qf_block_pool_ref_count(self.pool, block) == count
            assert self.c.qf_block_pool_is_published(self.pool, block) == self.model.is_published(block)


def next_token(salt: int, context: tuple[int, ...]) -> int:
    """The fake model: any change of any earlier token changes what follows."""
    return zlib.crc32(repr((salt, context)).encode()) % VOCAB


class Request:
    """One sequence and what it must come to."""

    def __init__(self, number: int, prompt: list[int], num_output: int, stop_after: int, **fields) -> None:
        total = len(prompt) + num_output
        self.tokens = (ctypes.c_int32 * total)(*prompt)
        self.table = (ctypes.c_int32 * total)()
        self.seq = lib.Seq(
            id=number,
            token_ids=self.tokens,
            block_table=self.table,
            num_prompt_tokens=len(prompt),
            max_total_tokens=total,
            **fields,
        )
        self.stop_at = len(prompt) + min(stop_after, num_output)
        self.expected = list(prompt)
        while len(self.expected) < total:
            self.expected.append(next_token(self.seq.cache_salt, tuple(self.expected)))
        self.mask_for = None
        self.planned_to = 0  # where the next chunk starts unless it is admitted anew
        self.lives = 0
        self.leader: Request | None = None
        self.prompt_done = False

    def known(self) -> list[int]:
        return self.tokens[: self.seq.num_tokens]


class SchedulerMachine(RuleBasedStateMachine):
    """The owner of a scheduler, with a device whose KV of a position is the whole context up to there."""

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        prefix_caching=st.booleans(),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        depth=st.integers(1, 2),
    )
    def create(self, num_blocks, block_size, prefix_caching, max_num_seqs, budget, depth) -> None:
        self.c = lib.load()
        self.pool, self.scheduler = ctypes.c_void_p(), ctypes.c_void_p()
        self.num_blocks, self.block_size, self.budget, self.depth = num_blocks, block_size, budget, depth
        self.max_num_seqs, self.max_len = max_num_seqs, min(num_blocks * block_size, 20)
        lib.checked(self.c.qf_block_pool_create, num_blocks, block_size, prefix_caching, 5, ctypes.byref(self.pool))
        config = lib.SchedulerConfig(max_num_seqs, budget, self.max_len, depth)
        lib.checked(self.c.qf_scheduler_create, ctypes.byref(config), self.pool, ctypes.byref(self.scheduler))
        self.requests: dict[int, Request] = {}  # by the address of the sequence
        self.steps: list[tuple[lib.StepPlan, list]] = []
        self.kv: dict[tuple[int, int], tuple] = {}  # (block, offset): (salt, the tokens up to there)
        self.slot_tokens: dict[int, int] = {}
        self.count = self.last_step = 0

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        try:
            self.drain()
        finally:
            for plan, _ in self.steps:
                self.c.qf_step_plan_deinit(plan)
            self.c.qf_scheduler_destroy(self.scheduler)
            self.c.qf_block_pool_destroy(self.pool)

    def live(self) -> list[Request]:
        return [r for r in self.requests.values() if r.seq.state != lib.FINISHED]

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        total = data.draw(st.integers(1, self.max_len))
        num_prompt = data.draw(st.integers(1, total))
        differs = data.draw(st.integers(0, total))  # the all-zero prompt but for one position
        request = Request(
            self.count,
            [int(i == differs) for i in range(num_prompt)],
            total - num_prompt,
            stop_after=data.draw(st.integers(1, total)),
            priority=data.draw(st.sampled_from([0, 0, 0, -1, 1])),
            guided=data.draw(st.sampled_from([False, False, True])),
            cache_salt=data.draw(st.sampled_from([0, 0, 0, 3])),
            max_prefix_hit=data.draw(st.sampled_from([lib.INT32_MAX, lib.INT32_MAX, 0, 5])),
        )
        self.count += 1
        address = ctypes.addressof(request.seq)
        if self.live() and data.draw(st.sampled_from([False, False, True])):
            request.leader = data.draw(st.sampled_from(self.live()))
            request.seq.leader = ctypes.addressof(request.leader.seq)
        lib.checked(self.c.qf_scheduler_add, self.scheduler, request.seq)
        self.requests[address] = request

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def toggle_pause(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live()))
        self.c.qf_scheduler_set_paused(self.scheduler, request.seq, not request.seq.paused)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.live())))

    @rule()
    def masks(self) -> None:
        for request in self.live():
            if request.seq.guided and request.mask_for != request.seq.num_tokens:
                request.mask_for = request.seq.num_tokens
                self.c.qf_scheduler_set_mask_ready(self.scheduler, request.seq)

    @rule(unlikely=st.integers(0, 9))
    def reset_prefix_cache(self, unlikely: int) -> None:
        if unlikely == 0:
            self.c.qf_block_pool_reset_prefix_cache(self.pool)

    @rule()
    def schedule(self) -> None:
        self.plan_step()

    def plan_step(self) -> int:
        """Plans and submits a step; returns its number of entries."""
        plan = lib.StepPlan()
        lib.checked(self.c.qf_step_plan_init, plan, self.max_num_seqs)
        before = {address: request.seq.state for address, request in self.requests.items()}
        self.c.qf_scheduler_schedule(self.scheduler, plan)
        if plan.num_entries == 0:
            assert plan.step == 0
            self.c.qf_step_plan_deinit(plan)
            return 0
        assert len(self.steps) < self.depth
        assert plan.step == self.last_step + 1
        self.last_step += 1
        entries = [plan.entries[i] for i in range(plan.num_entries)]
        assert sum(entry.num_tokens for entry in entries) == plan.num_tokens <= self.budget
        assert len({entry.seq for entry in entries}) == len({entry.slot for entry in entries}) == plan.num_entries
        self.check_order(entries, before)
        snapshots = [self.check_entry(entry) for entry in entries]
        self.steps.append((plan, list(zip(entries, snapshots, strict=True))))
        return plan.num_entries

    def check_order(self, entries: list, before: dict[int, int]) -> None:
        """Running ones first, then the admitted ones, each in order of rank."""
        keys = []
        for entry in entries:
            request = self.requests[entry.seq]
            admitted = before[entry.seq] == lib.WAITING
            keys.append((admitted, request.seq.priority, request.seq.arrival))
            if admitted:
                assert request.leader is None or request.leader.prompt_done or request.leader.seq.state == lib.FINISHED
        assert keys == sorted(keys)

    def check_entry(self, entry: lib.StepEntry) -> tuple[list[int], int]:
        request = self.requests[entry.seq]
        seq = request.seq
        assert seq.state == lib.RUNNING and not seq.paused and entry.num_tokens > 0
        end = entry.start + entry.num_tokens
        if seq.num_preemptions + 1 > request.lives:  # admitted, for the first time or again
            request.lives = seq.num_preemptions + 1
            assert entry.start % self.block_size == 0
            assert entry.start <= min(seq.num_tokens - 1, seq.max_prefix_hit)
            if seq.num_preemptions == 0:
                assert seq.num_cached_tokens == entry.start
        else:
            assert entry.start == request.planned_to
        request.planned_to = end
        known_end = seq.num_tokens + seq.num_pending_tokens - entry.samples
        assert end <= known_end
        assert entry.samples == (end == known_end and seq.num_prompt_tokens < seq.max_total_tokens)
        assert end < seq.max_total_tokens or seq.num_prompt_tokens == seq.max_total_tokens
        if entry.samples and seq.guided:
            assert request.mask_for == end == seq.num_tokens
        table = request.table[: seq.num_blocks]
        for index in range(entry.start // self.block_size, (end - 1) // self.block_size + 1):
            assert self.c.qf_block_pool_ref_count(self.pool, table[index]) == 1  # written: so nobody else reads it
            assert not self.c.qf_block_pool_is_published(self.pool, table[index])
        return table, seq.num_tokens

    def run(self, entry: lib.StepEntry, table: list[int], num_known: int) -> int:
        """The fake device: reads the whole context where the table says, writes the chunk's."""
        request = self.requests[entry.seq]
        salt = request.seq.cache_salt
        context: tuple[int, ...] = ()
        for position in range(entry.start + entry.num_tokens):
            place = (table[position // self.block_size], position % self.block_size)
            if position >= entry.start:
                known = position < num_known
                token = request.tokens[position] if known else self.slot_tokens[entry.slot]
                self.kv[place] = (salt, (*context, token))
            assert self.kv[place] == (salt, tuple(request.expected[: position + 1]))
            context = self.kv[place][1]
        return next_token(salt, context)

    @precondition(lambda self: self.steps)
    @rule()
    def complete(self) -> None:
        plan, entries = self.steps.pop(0)
        sampled = [self.run(entry, *snapshot) for entry, snapshot in entries]
        for (entry, _), token in zip(entries, sampled, strict=True):
            if not entry.samples:
                continue
            request = self.requests[entry.seq]
            self.slot_tokens[entry.slot] = token
            was_live = request.seq.state != lib.FINISHED
            assert self.c.qf_scheduler_accept(self.scheduler, entry, token) == was_live
            if was_live and request.seq.num_tokens == request.stop_at:
                self.end(request, whole=True)
        self.c.qf_scheduler_complete(self.scheduler, plan)
        for entry, _ in entries:
            request = self.requests[entry.seq]
            seq = request.seq
            computed = seq.num_completed_tokens >= seq.num_prompt_tokens
            request.prompt_done |= computed or seq.num_tokens > seq.num_prompt_tokens
            if computed and seq.num_prompt_tokens == seq.max_total_tokens and seq.state == lib.RUNNING:
                self.end(request, whole=True)
        self.c.qf_step_plan_deinit(plan)

    def end(self, request: Request, whole: bool = False) -> None:
        known = request.known()
        assert known == request.expected[: len(known)]
        if whole:
            assert len(known) == request.stop_at
        self.c.qf_scheduler_finish(self.scheduler, request.seq)

    def drain(self) -> None:
        """With nothing paused and no mask missing all requests end, and a step is always possible."""
        for _ in range(5000):
            if not self.c.qf_scheduler_has_work(self.scheduler):
                break
            for request in self.live():
                self.c.qf_scheduler_set_paused(self.scheduler, request.seq, False)
            self.masks()
            if self.plan_step() == 0 or len(self.steps) == self.depth:
                assert self.steps, "nothing is in flight and nothing can run"
                self.complete()
            self.sound()
        assert not self.c.qf_scheduler_has_work(self.scheduler)
        assert all(request.seq.released for request in self.requests.values())
        assert self.c.qf_block_pool_num_available(self.pool) == self.num_blocks

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "scheduler"):
            lib.checked(self.c.qf_scheduler_check, self.scheduler)


TestPool = PoolMachine.TestCase
TestPool.settings = POOL_SETTINGS
TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = SCHEDULER_SETTINGS
