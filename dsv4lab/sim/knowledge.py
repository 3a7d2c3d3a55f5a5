"""What is known to have happened: vector clocks over a cluster's warps, and the set of completed asynchronous operations; and
what mbarriers carry of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dsv4lab.sim.observe import Origin
    from dsv4lab.sim.state import Cta

Array = NDArray


class Known:
    """What happened before some point of an execution. Immutable, so that sharing it is a snapshot.

    home: number of the cluster whose warps `clocks` counts, (warps,) int64: everything that warp did up to that clock.
    done: bit 2 i is set once the i-th asynchronous operation of the cluster has read its sources, bit 2 i + 1 once it is
    complete. others: the same about other clusters, by number.
    """

    __slots__ = ("clocks", "done", "home", "others")

    def __init__(self, home: int, clocks: Array, done: int = 0, others: dict[int, tuple[Array, int]] | None = None) -> None:
        self.home = home
        self.clocks = clocks
        self.done = done
        self.others = others

    @classmethod
    def nothing(cls, home: int, warps: int) -> Known:
        return cls(home, np.zeros(warps, np.int64))

    def of(self, cluster: int) -> tuple[Array, int] | None:
        """Clocks and completed operations of one cluster."""
        if cluster == self.home:
            return self.clocks, self.done
        return None if self.others is None else self.others.get(cluster)

    def join(self, more: Known) -> Known:
        """What is known here or there; the home is this one's."""
        if more is self:
            return self
        if more.home == self.home and more.others is None:
            return Known(self.home, np.maximum(self.clocks, more.clocks), self.done | more.done, self.others)
        others = dict(self.others or {})
        for cluster, (clocks, done) in [(more.home, (more.clocks, more.done)), *(more.others or {}).items()]:
            if cluster == self.home:
                continue
            mine = others.get(cluster)
            others[cluster] = (clocks, done) if mine is None else (np.maximum(mine[0], clocks), mine[1] | done)
        own = more.of(self.home)
        if own is None:
            return Known(self.home, self.clocks, self.done, others)
        return Known(self.home, np.maximum(self.clocks, own[0]), self.done | own[1], others)

    def covers(self, more: Known) -> bool:
        """Whether all that is known there about its own cluster is known here."""
        found = self.of(more.home)
        return found is not None and bool((found[0] >= more.clocks).all()) and not more.done & ~found[1]

    def complete(self, bits: int) -> Known:
        """With more of the home's operations done."""
        return Known(self.home, self.clocks, self.done | bits, self.others) if bits & ~self.done else self

    def at(self, warp: int, clock: int) -> Known:
        """With a warp of the home at a later clock."""
        clocks = self.clocks.copy()
        clocks[warp] = clock
        return Known(self.home, clocks, self.done, self.others)


class Message:
    """What a synchronisation carries from one side to the other: causality, and what a proxy fence made visible to the
    asynchronous proxy. Grows in place."""

    __slots__ = ("causal", "fenced")

    def __init__(self, causal: Known | None = None, fenced: Known | None = None) -> None:
        self.causal = causal
        self.fenced = fenced

    def add(self, causal: Known | None, fenced: Known | None) -> None:
        if causal is not None:
            self.causal = causal if self.causal is None else self.causal.join(causal)
        if fenced is not None:
            self.fenced = fenced if self.fenced is None else self.fenced.join(fenced)

    def merge(self, more: Message) -> None:
        self.add(more.causal, more.fenced)


class Barrier:
    """What an mbarrier carries: arrivals of the phase under way, and of all that completed. latest, earlier: arrivals of the
    phase that completed last and of the one before, with who completed it. passed: phases that warps waited for last."""

    def __init__(self, cta: Cta, init: int) -> None:
        self.init = init  # record
        self.cta = cta
        self.pending = Message()
        self.done = Message()
        self.latest: tuple[Message, Origin] | None = None
        self.earlier: tuple[Message, Origin] | None = None
        self.by: Origin | None = None  # who arrived last
        self.passed: dict[tuple[Cta, int], int] = {}

    def flip(self) -> None:
        assert self.by is not None
        self.earlier, self.latest = self.latest, (self.pending, self.by)
        self.done.merge(self.pending)
        self.pending = Message()
