"""What a CTA and a cluster are made of besides registers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from dsv4lab.sim.errors import BarrierMisuse, MemoryFault
from dsv4lab.sim.memory import OFFSET_MASK, RANK_SHIFT, SHARED_WINDOW, WINDOW_BYTES, Region, SharedMemory
from dsv4lab.sim.registers import WARP, Lanes, RegisterFile
from dsv4lab.sim.sync import ClusterBarrier, Groups, MBarrier, Meeting, NamedBarrier
from dsv4lab.sim.tmem import TensorMemory

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine

Dim3 = tuple[int, int, int]


class Cta:
    """One thread block: registers, shared memory, TMEM, barriers, and the groups of what its threads set in motion."""

    def __init__(
        self, cluster: Cluster, rank: int, index: Dim3, shared: SharedMemory, registers: RegisterFile, threads: int
    ) -> None:
        self.cluster = cluster
        self.machine = cluster.machine
        self.rank = rank
        self.index = index
        self.serial = self.machine.stats.ctas + rank  # position among the launch's CTAs
        self.shared = shared
        shared.observers, shared.cta = self.machine.observers, self
        self.registers = registers
        self.threads = threads
        self.warps = (threads + WARP - 1) // WARP
        self.live_warps = self.warps
        self.live_threads = threads
        self.tensor = TensorMemory(self.machine.checks.uninitialized, self.machine.checks.tmem_columns)
        self.tensor.observers, self.tensor.cta = self.machine.observers, self
        self.mbarriers: dict[int, MBarrier] = {}
        self.named: dict[int, NamedBarrier] = {}
        self.bulk_groups: dict[int, Groups] = {}  # by thread
        self.copy_groups: dict[int, Groups] = {}  # cp.async, by warp
        self.wgmma_groups: dict[int, Groups] = defaultdict(Groups)  # by warp
        self.wgmma_pending: dict[int, dict[int, object]] = defaultdict(dict)  # by warpgroup, then by sequence number
        self.wgmma_issued: dict[int, int] = defaultdict(int)  # by warp
        self.wgmma_flight: dict[int, Any] = {}  # accumulators by group, by warp
        self.in_flight: dict[int, frozenset[int]] = {}  # wgmma accumulator slots, by warp
        self.cluster_tickets: dict[int, int] = {}  # generation of barrier.cluster a warp arrived in
        self.register_budget: dict[int, int] = {}  # registers of a thread, by warp that executed setmaxnreg
        self.free_registers = 0  # given back by setmaxnreg.dec and not taken by .inc
        self.local: Region | None = None
        self.local_stride = 0  # bytes of local memory of a thread
        self.native: Any = None  # what the native core keeps of a CTA
        self._lanes: dict[tuple[int, int], Lanes] = {}

    def lanes(self, warp: int, warps: int) -> Lanes:
        key = (warp, warps)
        found = self._lanes.get(key)
        if found is None:
            found = self._lanes[key] = Lanes(self, self.registers, warp, warps)
        return found

    def mbarrier(self, offset: int) -> MBarrier:
        found = self.mbarriers.get(offset)
        if found is None:
            raise BarrierMisuse(f"no mbarrier was initialised at {self.shared.describe(offset)}")
        return found

    def barrier(self, number: int) -> NamedBarrier:
        if not 0 <= number < 16:
            raise BarrierMisuse(f"a named barrier's number must be 0 to 15, got {number}")
        return self.named.setdefault(number, NamedBarrier(number))

    def retire(self, threads: int, warps: int) -> None:
        """Threads exited: barriers that wait for everyone no longer wait for them."""
        self.live_threads -= threads
        self.live_warps -= warps
        for barrier in self.named.values():
            barrier.settle(self.live_threads)
        self.cluster.barrier.settle(self.cluster.live_threads)

    def describe(self) -> str:
        return f"CTA {self.index}" + (f" (rank {self.rank})" if len(self.cluster.ctas) > 1 else "")


class Cluster:
    """CTAs that run together and may reach each other's shared memory."""

    def __init__(self, machine: Machine, index: Dim3) -> None:
        self.machine = machine
        self.index = index
        self.ctas: list[Cta] = []
        self.barrier = ClusterBarrier()
        self.meetings: dict[tuple[str, int], Meeting] = {}  # by operation and first rank of the pair

    @property
    def live_threads(self) -> int:
        return sum(cta.live_threads for cta in self.ctas)

    def cta(self, rank: int) -> Cta:
        if not 0 <= rank < len(self.ctas):
            raise MemoryFault(f"shared address of CTA rank {rank}, but the cluster has {len(self.ctas)} CTAs")
        return self.ctas[rank]

    def resolve(self, address: int) -> tuple[Cta, int]:
        """The CTA and the offset in its shared memory of a shared (or generic shared) address."""
        if address >= SHARED_WINDOW:
            if address >= SHARED_WINDOW + WINDOW_BYTES:
                raise MemoryFault(f"address 0x{address:x} is not a shared address")
            address -= SHARED_WINDOW
        return self.cta((address >> RANK_SHIFT) & 0xFF), address & OFFSET_MASK

    def pair(self, cta: Cta) -> tuple[Cta, Cta]:
        """The two CTAs of a `cta_group::2` that `cta` belongs to."""
        first = cta.rank & ~1
        return self.cta(first), self.cta(first + 1)

    def masked(self, mask: int) -> list[Cta]:
        """The CTAs of a multicast mask."""
        if mask >> len(self.ctas):
            raise MemoryFault(f"multicast mask 0x{mask:x} names CTAs beyond the cluster's {len(self.ctas)}")
        return [cta for cta in self.ctas if (mask >> cta.rank) & 1]
