"""The state in which a CTA begins: special registers, constants, addresses of variables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.sim.cubin import fitting
from dsv4lab.sim.errors import ResourceError, UnknownInstruction
from dsv4lab.sim.memory import LOCAL_WINDOW, PARAM_WINDOW, RANK_SHIFT, SHARED_RESERVED, Region, SharedMemory
from dsv4lab.sim.program import Launch
from dsv4lab.sim.registers import RegisterFile
from dsv4lab.sim.state import Cluster, Cta, Dim3

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine

_SHARED_LIMIT = 232_448  # bytes of shared memory that a CTA of sm_90 and sm_100 may have
_MULTIPROCESSORS = {"sm_90": 132, "sm_10": 148}  # of an H200, a B200
TIMERS = ("%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi")


def _split(rank: int, shape: Dim3) -> Dim3:
    return rank % shape[0], rank // shape[0] % shape[1], rank // (shape[0] * shape[1])


def _volume(shape: Dim3) -> int:
    return shape[0] * shape[1] * shape[2]


def static_shared(machine: Machine) -> int:
    """Bytes of shared memory that the kernel declares besides the dynamic array."""
    return max((v.offset + v.size for v in machine.launch.kernel.shared), default=0)


def check_launch(launch: Launch) -> None:
    """Raise ResourceError for a launch that no GPU accepts."""
    kernel, threads = launch.kernel, int(np.prod(launch.block))
    if not 0 < threads <= 1024:
        raise ResourceError(f"{kernel.name}: a block must have 1 to 1024 threads, got {launch.block}")
    if min(launch.grid) < 1:
        raise ResourceError(f"{kernel.name}: grid {launch.grid} has no CTA")
    if launch.shared_bytes > _SHARED_LIMIT:
        raise ResourceError(f"{kernel.name}: {launch.shared_bytes} bytes of shared memory, the limit is {_SHARED_LIMIT}")
    if any(g % c for g, c in zip(launch.grid, launch.cluster, strict=True)):
        raise ResourceError(f"{kernel.name}: grid {launch.grid} is not a multiple of cluster {launch.cluster}")
    if int(np.prod(launch.cluster)) > 16:
        raise ResourceError(f"{kernel.name}: a cluster has at most 16 CTAs, got {launch.cluster}")
    if kernel.max_threads is not None and tuple(kernel.max_threads) != tuple(launch.block):
        raise ResourceError(f"{kernel.name}: compiled for blocks of {kernel.max_threads}, launched with {launch.block}")
    clusters, room = int(np.prod(launch.grid)) // int(np.prod(launch.cluster)), capacity(launch)
    if launch.attributes.get("cooperative") and clusters > room:
        raise ResourceError(
            f"{kernel.name}: a cooperative launch must fit the GPU at once: {clusters} clusters, room for {room}"
        )


def capacity(launch: Launch) -> int:
    """Clusters of a launch that a GPU holds at once; by registers, too, where the kernel is compiled."""
    static = max((v.offset + v.size for v in launch.kernel.shared), default=0)
    each = min(fitting(int(np.prod(launch.block)), launch.shared_bytes + static, launch.kernel.compiled_registers).values())
    processors = _MULTIPROCESSORS.get(launch.kernel.target[:5], min(_MULTIPROCESSORS.values()))
    return max(processors * each // int(np.prod(launch.cluster)), 1)


def start_cta(machine: Machine, cluster: Cluster, rank: int, registers: RegisterFile) -> Cta:
    """A CTA of the current launch, ready to run its first instruction."""
    launch = machine.launch
    place = _split(rank, launch.cluster)
    index = tuple(c * s + p for c, s, p in zip(cluster.index, launch.cluster, place, strict=True))
    assert len(index) == 3
    size = static_shared(machine) + launch.shared_bytes
    shared = SharedMemory(rank, size, machine.checks.uninitialized)
    cta = Cta(cluster, rank, index, shared, registers, _volume(launch.block))
    registers.clear()
    local = sum(v.size + v.align for v in launch.kernel.local)
    if local:
        stride = (local + 31) // 32 * 32
        cta.local = Region("local memory", LOCAL_WINDOW, np.zeros(stride * registers.threads, np.uint8))
        cta.local_stride = stride
    program = machine.compiled
    for slot, bits in program.constants.items():
        registers.row(slot)[...] = np.array([bits & (2**64 - 1), bits >> 64], np.uint64) if program.widths[slot] == 16 else bits
    for slot, (space, offset) in program.symbols.items():
        if space == "constant":
            base, offset = machine.constants[offset], 0
        else:
            base = {"param": PARAM_WINDOW, "shared": (rank << RANK_SHIFT) + SHARED_RESERVED, "local": LOCAL_WINDOW}[space]
        registers.row(slot)[...] = (base + offset) & ((1 << (8 * program.widths[slot])) - 1)
    thread = np.arange(registers.threads)
    for slot, name in program.specials.items():
        value = _special(machine, cta, name, place, thread)
        registers.row(slot)[...] = value
    return cta


def _special(machine: Machine, cta: Cta, name: str, place: Dim3, thread: np.ndarray) -> object:
    """Value of a special register for every thread of a CTA."""
    launch = machine.launch
    block, grid, cluster = launch.block, launch.grid, launch.cluster
    lane = thread % 32
    vectors: dict[str, tuple[object, object, object]] = {
        "%tid": (thread % block[0], thread // block[0] % block[1], thread // (block[0] * block[1])),
        "%ntid": block,
        "%ctaid": cta.index,
        "%nctaid": grid,
        "%clusterid": cta.cluster.index,
        "%nclusterid": tuple(g // c for g, c in zip(grid, cluster, strict=True)),  # type: ignore[dict-item]
        "%cluster_ctaid": place,
        "%cluster_nctaid": cluster,
    }
    base, _, component = name.partition(".")
    if base in vectors and component in ("x", "y", "z"):
        return vectors[base]["xyz".index(component)]
    one = np.uint64(1)
    bit = one << lane.astype(np.uint64)
    scalars: dict[str, object] = {
        "%laneid": lane,
        "%warpid": thread // 32,
        "%nwarpid": cta.warps,
        "%smid": 0,
        "%nsmid": 1,
        "%gridid": 0,
        "%cluster_ctarank": cta.rank,
        "%cluster_nctarank": _volume(cluster),
        "%is_explicit_cluster": int(_volume(cluster) > 1),
        "%dynamic_smem_size": launch.shared_bytes,
        "%total_smem_size": cta.shared.limit - SHARED_RESERVED,
        "%lanemask_eq": bit,
        "%lanemask_lt": bit - one,
        "%lanemask_le": bit * np.uint64(2) - one,
        "%lanemask_gt": (bit * np.uint64(2) - one) ^ np.uint64(0xFFFFFFFF),
        "%lanemask_ge": (bit - one) ^ np.uint64(0xFFFFFFFF),
    }
    if name in scalars:
        return scalars[name]
    if name in TIMERS or name.startswith("%envreg"):
        return 0
    raise UnknownInstruction(f"special register {name} is not simulated")
