"""What the block pool must do, written the simplest way: prefixes are tuples of tokens, and there are no hashes."""

from __future__ import annotations

import collections


class PoolModel:
    """Block ids, ref counts, the eviction order and the published prefixes."""

    def __init__(self, num_blocks: int, prefix_caching: bool) -> None:
        self.prefix_caching = prefix_caching
        self.ref_counts = [0] * num_blocks
        self.free = set(range(num_blocks))
        self.cached: collections.OrderedDict[int, None] = collections.OrderedDict()  # first: evicted first
        self.chains: dict[int, tuple] = {}  # of blocks whose whole prefix is known
        self.published: dict[tuple, int] = {}
        self.stale: set[int] = set()

    def num_available(self) -> int:
        return len(self.free) + len(self.cached)

    def is_published(self, block: int) -> bool:
        return block in self.chains and self.published.get(self.chains[block]) == block

    def took(self, block: int | None) -> None:
        """The pool says that it gave this block: any free one, else the least recently used, else none."""
        if self.free:
            assert block in self.free
            self.free.remove(block)
        elif self.cached:
            expected, _ = self.cached.popitem(last=False)
            assert block == expected
            del self.published[self.chains.pop(block)]
        else:
            assert block is None
            return
        self.ref_counts[block] = 1

    def ref(self, block: int) -> None:
        self.cached.pop(block, None)
        self.ref_counts[block] += 1

    def release(self, block: int) -> None:
        self.ref_counts[block] -= 1
        if self.ref_counts[block] > 0:
            return
        self.stale.discard(block)
        if self.is_published(block):
            self.cached[block] = None
        else:
            self.chains.pop(block, None)
            self.free.add(block)

    def chain(self, parent: int | None, tokens: tuple[int, ...], salt: int) -> tuple | None:
        before = () if parent is None else self.chains.get(parent)
        return None if before is None else (*before, (salt, tokens))

    def publish(self, block: int, parent: int | None, tokens: tuple[int, ...], salt: int) -> bool:
        if self.is_published(block):
            return True
        chain = self.chain(parent, tokens, salt)
        if not self.prefix_caching or block in self.stale or chain is None:
            return False
        self.chains[block] = chain
        return self.published.setdefault(chain, block) == block

    def find(self, parent: int | None, tokens: tuple[int, ...], salt: int) -> int | None:
        chain = self.chain(parent, tokens, salt)
        return None if chain is None else self.published.get(chain)

    def reset(self) -> None:
        self.free.update(self.cached)
        self.cached.clear()
        self.chains.clear()
        self.published.clear()
        self.stale = {block for block, count in enumerate(self.ref_counts) if count > 0}
