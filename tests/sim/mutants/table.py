"""The seeded defects: what is broken, how, and under which kind `sim.explore` must report it first. Importable without CuTeDSL.

A mutant is an edit of the compiled PTX (`mutate.py`), or a `defect` that the kernel's source knows by name where the structure
changes. Several kinds are given where the schedule decides which of them a defect shows first, each of them true.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.sim.mutants.mutate import Edit, coordinate, drop, drop_wait, launched_with, offset, operand

DEADLOCK, RACE, FENCE, WRONG, HAZARD = "deadlock", "race", "missing fence", "wrong result", "hazard"
FAULT, UNINITIALISED, MISUSE, RESOURCE = "memory fault", "uninitialised read", "barrier misuse", "resource misuse"
EARLY = (RACE, UNINITIALISED)  # data used before it is there: before anything is, or while it is written
LOAD, STORE = r"cp\.async\.bulk\.tensor\.\dd\.shared", r"cp\.async\.bulk\.tensor\.\dd\.global"
EXPECT, ARRIVE = r"mbarrier\.arrive\.expect_tx", r"mbarrier\.arrive\.shared"

ARCHITECTURES = {
    "pipelined_copy": "sm_90a",
    "warpgroup_gemm": "sm_90a",
    "cluster_product": "sm_90a",
    "row_softmax": "sm_90a",
    "tensor_gemm": "sm_100a",
    "nvfp4_gemm": "sm_100a",
}


@dataclass(frozen=True)
class Mutant:
    """kernel: module and function of this folder. edit: of its PTX; None: the source's own `defect` of this name."""

    kernel: str
    defect: str
    edit: Edit | None
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kernel}: {self.defect}"


def _of(kernel: str, *rows: tuple[str, Edit | None, str | tuple[str, ...]]) -> list[Mutant]:
    return [Mutant(kernel, what, edit, (kinds,) if isinstance(kinds, str) else kinds) for what, edit, kinds in rows]


MUTANTS = [
    *_of(
        "pipelined_copy",
        ("the wait for a full buffer removed", drop_wait("mbarrier_wait(full"), EARLY),
        ("the wait for an empty buffer removed", drop_wait("mbarrier_wait(empty"), (RACE, MISUSE)),
        ("the arrival that frees a buffer removed", drop(ARRIVE, "mbarrier_arrive(empty"), DEADLOCK),
        ("twice the bytes expected", operand(EXPECT, 2, 8192), DEADLOCK),
        ("half the bytes expected", operand(EXPECT, 2, 2048), DEADLOCK),
        ("bytes expected at the next buffer's barrier", offset(EXPECT, 1, 8), DEADLOCK),
        ("a phase not flipped", None, (*EARLY, DEADLOCK)),
        ("a buffer too few", None, RACE),
        ("a buffer released before the values read from it are used", None, RACE),
        ("the proxy fence before the TMA store removed", drop(r"fence\.proxy\.async"), FENCE),
        ("the wait for the stored buffer's reads removed", drop(r"cp\.async\.bulk\.wait_group\.read"), RACE),
        ("the wait for the stored buffer's reads too permissive", operand(r"cp\.async\.bulk\.wait_group\.read", 0, 2), RACE),
        ("commit_group of the TMA store removed", drop(r"cp\.async\.bulk\.commit_group"), RACE),
        ("the barrier before the TMA store removed", drop(r"bar\.sync", "the buffer is full"), EARLY),
        ("the barrier before an output buffer is refilled removed", drop(r"bar\.sync", "the buffer is free"), RACE),
        ("a named barrier for one warp too many", operand(r"bar\.sync", 1, 160, "the buffer is full"), (DEADLOCK, MISUSE)),
        ("a TMA load four columns to the right", coordinate(LOAD, 0, 4), WRONG),
        ("a TMA store one row down", coordinate(STORE, 1, 1), WRONG),
        ("an mbarrier never initialised", drop(r"mbarrier\.init", "mbarrier_init(empty", 1), MISUSE),
        ("the barrier after the initialisation removed", drop(r"bar\.sync", "cute.arch.barrier()"), (MISUSE, RACE)),
        (
            "an empty barrier that counts one warp too few",
            operand(r"mbarrier\.init", 1, 3, "mbarrier_init(empty"),
            (RACE, MISUSE),
        ),
        ("shared memory written out of bounds", offset(r"st\.shared", 0, 1 << 18, nth=3), FAULT),
        ("an input buffer that nothing fills", offset(r"ld\.shared", 1, 12288, "inside["), (UNINITIALISED, RACE)),
    ),
    *_of(
        "warpgroup_gemm",
        ("the wait for a full buffer removed", drop_wait("mbarrier_wait(full"), EARLY),
        ("the wait for an empty buffer removed", drop_wait("mbarrier_wait(empty"), (RACE, MISUSE)),
        ("the last wgmma wait removed", drop(r"wgmma\.wait_group", "wait_group(0)"), (HAZARD, RACE)),
        ("a wgmma wait that lets one group too many go on", operand(r"wgmma\.wait_group", 0, 2, "wait_group(1)"), RACE),
        ("wgmma.commit_group removed", drop(r"wgmma\.commit_group"), (HAZARD, RACE)),
        ("wgmma.fence removed", drop(r"wgmma\.fence"), FENCE),
        ("the arrival that frees a buffer removed", drop(ARRIVE, "(step - 1)"), DEADLOCK),
        ("B's bytes not expected", operand(EXPECT, 2, 8192), (*EARLY, MISUSE)),
        ("a wrong swizzle", None, WRONG),
        ("B's k-tile off by one element", coordinate(LOAD, 0, 1, "load_b"), FAULT),
        ("an accumulator that is never cleared", operand(r"setp\.ne\.b32", 1, 1, "cute.gemm", 0), WRONG),
        ("the proxy fence before the TMA store removed", drop(r"fence\.proxy\.async"), FENCE),
        ("the barrier before the TMA store removed", drop(r"bar\.sync", "the buffer is full"), EARLY),
        ("the barrier before the output buffer is refilled removed", drop(r"bar\.sync", "the buffer is free"), RACE),
        ("the wait for the stored buffer's reads removed", drop(r"cp\.async\.bulk\.wait_group\.read"), RACE),
        ("commit_group of the TMA store removed", drop(r"cp\.async\.bulk\.commit_group"), RACE),
        ("more registers asked for than the CTA has", launched_with(64, operand(r"setmaxnreg\.inc", 0, 232)), DEADLOCK),
        ("registers that the loader does not give up", launched_with(64, drop(r"setmaxnreg\.dec")), DEADLOCK),
        ("stmatrix to rows that are not aligned", offset(r"stmatrix", 0, 8, nth=1), FAULT),
        ("the output tile stored one column to the right", coordinate(STORE, 0, 1), FAULT),
    ),
    *_of(
        "cluster_product",
        (
            "the cluster barrier after the initialisation removed",
            drop(r"barrier\.cluster", "barriers are there"),
            (MISUSE, RACE),
        ),
        ("the cluster barrier before the reduction removed", drop(r"barrier\.cluster", "partial sums are there"), EARLY),
        ("the wait of the cluster barrier before the reduction removed", drop(r"barrier\.cluster\.wait", "partial"), EARLY),
        ("the cluster barrier before the exit removed", drop(r"barrier\.cluster", "nobody leaves"), HAZARD),
        ("the wait for a full buffer removed", drop_wait("mbarrier_wait(full"), EARLY),
        ("the wait for an empty buffer removed", drop_wait("mbarrier_wait(empty"), (RACE, MISUSE)),
        ("a multicast mask of one CTA", operand(LOAD, 3, 1, "load_b"), (DEADLOCK, MISUSE)),
        (
            "the remote arrival sent to the wrong CTA",
            operand(r"mapa", 2, 0, "mbarrier_arrive(empty + stage, 1)"),
            (DEADLOCK, MISUSE),
        ),
        ("a remote arrival beyond the cluster", operand(r"mapa", 2, 2, "mbarrier_arrive(empty + stage, 1)"), FAULT),
        ("a multicast mask beyond the cluster", operand(LOAD, 3, 7, "load_b"), FAULT),
        ("the remote arrival removed", drop(ARRIVE, "mbarrier_arrive(empty + stage, 1)"), DEADLOCK),
        ("the other CTA's bytes not expected", operand(EXPECT, 2, 12288), (*EARLY, MISUSE)),
        ("an empty barrier that counts one CTA", operand(r"mbarrier\.init", 1, 4, "mbarrier_init(empty"), (RACE, DEADLOCK)),
        ("a multicast tile one row down", coordinate(LOAD, 1, 1, "load_b"), WRONG),
        ("its own partial sum taken for the other's", operand(r"mapa", 2, 0, "inline_ptx"), WRONG),
    ),
    *_of(
        "row_softmax",
        ("cp.async.wait_group too permissive", operand(r"cp\.async\.wait_group", 0, 2), EARLY),
        ("cp.async.wait_group removed", drop(r"cp\.async\.wait_group"), EARLY),
        ("cp.async.commit_group removed", drop(r"cp\.async\.commit_group"), EARLY),
        ("the barrier after the wait removed", drop(r"bar\.sync", "the chunk is there"), EARLY),
        ("the barrier before the partial maxima are combined removed", drop(r"bar\.sync", "every warp's part"), EARLY),
        ("both groups at one named barrier", operand(r"bar\.sync", 0, 1, "the chunk is there"), (*EARLY, MISUSE)),
        ("a named barrier that does not exist", operand(r"bar\.sync", 0, 17, "the chunk is there"), MISUSE),
        ("a named barrier for a part of a warp", operand(r"bar\.sync", 1, 100, "the chunk is there"), MISUSE),
        ("a named barrier for both groups", operand(r"bar\.sync", 1, 256, "the chunk is there"), DEADLOCK),
        ("a named barrier for one warp too few", operand(r"bar\.sync", 1, 96, "the chunk is there"), (*EARLY, MISUSE)),
        ("a chunk that is not loaded", drop(r"cp\.async\.c[ag]", "prologue", 1), UNINITIALISED),
        ("a stage too few", None, RACE),
        ("cp.async beyond the tensor", offset(r"cp\.async\.c[ag]", 1, 1 << 40, "later"), FAULT),
        ("cp.async to a misaligned address", offset(r"cp\.async\.c[ag]", 0, 4, "later"), FAULT),
        ("the result stored beyond the tensor", offset(r"st\.global", 0, 1 << 40, nth=0), FAULT),
        ("a shuffle distance wrong", operand(r"shfl\.sync\.bfly", 2, 2, nth=0), WRONG),
    ),
    *_of(
        "tensor_gemm",
        ("the wait for a full buffer removed", drop_wait("mbarrier_wait(full"), EARLY),
        ("the wait for an empty buffer removed", drop_wait("mbarrier_wait(empty"), (RACE, MISUSE)),
        ("the wait for a finished accumulator removed", drop_wait("mbarrier_wait(sums_full"), EARLY),
        ("the wait for a free accumulator removed", drop_wait("mbarrier_wait(sums_empty"), RACE),
        ("the commit that frees a buffer removed", drop(r"tcgen05\.commit", "commit(empty"), DEADLOCK),
        ("the commit that announces an accumulator removed", drop(r"tcgen05\.commit", "commit(sums_full"), DEADLOCK),
        ("a commit to the other buffer's barrier", offset(r"tcgen05\.commit", 0, 8, "commit(empty"), (DEADLOCK, MISUSE, RACE)),
        ("tcgen05.wait::ld removed", drop(r"tcgen05\.wait::ld"), RACE),
        ("the arrival that frees an accumulator removed", drop(ARRIVE, "mbarrier_arrive(sums_empty"), DEADLOCK),
        ("a phase not flipped", None, (*EARLY, WRONG)),
        (
            "an accumulator freed by one of four warps",
            operand(r"mbarrier\.init", 1, 1, "mbarrier_init(sums_empty"),
            (RACE, DEADLOCK),
        ),
        ("twice the bytes expected", operand(EXPECT, 2, 49152), DEADLOCK),
        ("A's k-tile off by one element", coordinate(LOAD, 0, 1, "load_a"), FAULT),
        ("TMEM not freed", drop(r"tcgen05\.dealloc"), RESOURCE),
        ("half of the TMEM freed", operand(r"tcgen05\.dealloc", 1, 64), RESOURCE),
        ("TMEM columns that are no power of two", operand(r"tcgen05\.alloc", 1, 48), RESOURCE),
        ("TMEM never allocated", drop(r"tcgen05\.alloc"), UNINITIALISED),
        ("TMEM freed while it is read", drop(r"bar\.sync", "all accumulators are read"), (FAULT, RACE, RESOURCE)),
        ("half of the TMEM allocated", operand(r"tcgen05\.alloc", 1, 64), (FAULT, RESOURCE)),
        ("the barrier after the allocation removed", drop(r"bar\.sync", "barriers and TMEM"), (*EARLY, MISUSE)),
    ),
    *_of(
        "nvfp4_gemm",
        ("scale factors of A not copied to TMEM", drop(r"tcgen05\.cp", "copy_sfa"), UNINITIALISED),
        ("scale factors of B copied two columns off", offset(r"tcgen05\.cp", 0, 2, "copy_sfb"), (UNINITIALISED, WRONG, RACE)),
        ("a product with another block's scale factors", offset(r"tcgen05\.mma", 5, 4, nth=1), WRONG),
        ("scale factors of A not loaded", drop(LOAD, "load_sfa"), DEADLOCK),
        ("scale factors' bytes not expected", operand(EXPECT, 2, 32768), (*EARLY, MISUSE)),
        ("scale factors of B one block further", coordinate(LOAD, 1, 1, "load_sfb"), WRONG),
        ("the wait for a full buffer removed", drop_wait("mbarrier_wait(full"), EARLY),
        ("the wait for an empty buffer removed", drop_wait("mbarrier_wait(empty"), (RACE, MISUSE)),
        ("the commit that frees a buffer removed", drop(r"tcgen05\.commit", "commit(empty"), DEADLOCK),
        ("the last commit removed", drop(r"tcgen05\.commit", "commit(done)"), DEADLOCK),
        ("the wait for the accumulator removed", drop_wait("mbarrier_wait(done"), EARLY),
        ("TMEM not freed", drop(r"tcgen05\.dealloc"), RESOURCE),
        ("TMEM freed while it is read", drop(r"bar\.sync", "the accumulator is read"), (FAULT, RACE, RESOURCE)),
    ),
]
