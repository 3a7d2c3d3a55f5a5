# %% [markdown]
# # 06 · The simulator
#
# **Question.** What does a warp-specialised kernel do between its launch and its result, and what does it look like when its
# synchronisation is wrong?
#
# `dsv4lab.sim` lets CuTeDSL compile for Hopper or Blackwell, catches the launch and executes the real PTX on the CPU. The two
# kernels below are ours and short: `dsv4lab/kernels/lessons/scaled_copy.py` and `tiled_gemm.py`. Keep the first one open.
#
# **Needs** a C compiler; no GPU, no network, no earlier notebook. **Takes** about half a minute on two CPU cores.

# %% tags=["parameters"]
num_tiles = 12  # tiles of 64 x 64 that the copy moves: a multiple of the stages below
stage_counts = [1, 2, 3, 4]  # stages of the ring
factor = 2.5  # what the copy multiplies by
gemm_shape = [128, 192, 512]  # M, N, K of the product, multiples of 64
gemm_stages = 3
random_schedules = 5  # beside the eager and the lazy one
seed = 0

# %%
import inspect
import math
import re

import torch

from dsv4lab import lab, sim, viz
from dsv4lab.kernels.lessons import scaled_copy, tiled_gemm
from dsv4lab.lab.edits import difference, edited

target = lab.setup(seed, "cpu")
sim.enable("sm_90a")
source = torch.randn(64, 64 * num_tiles).half()
result = torch.zeros_like(source)
wanted = (factor * source.float()).half()
tile_bytes = 64 * 64 * 2

# %%
lab.environment(target)

# %% [markdown]
# ## 1. A launch, without a GPU
#
# The copy computes $y = \alpha x$ with one role for each step: warp 0 has TMA load a tile, warps 1-4 scale it in place, warp 5
# has TMA store it. The tiles lie in a ring of stages. `describe` shows what the host code launched. Two parameters are TMA
# descriptors: 128 bytes that the copy engine reads, here decoded again.

# %%
two_stages = sim.compile(scaled_copy.scaled_copy, source, result, factor, 2)
(launch,) = two_stages.capture(source, result, factor)
print(sim.describe(launch).replace(launch.kernel.name, "scaled_copy"))
maps = list(sim.tensor_maps(launch).values())
lab.check_that("TMA descriptors among the parameters", len(maps), "==", 2)
lab.check("box of the load", list(maps[0].box), [64, 64], max_abs=0)
lab.check_that("shared memory beside the tiles", launch.shared_bytes - 2 * tile_bytes, "<=", 1024, "bytes")
lab.check_that("the swizzle is 128 bytes wide", maps[0].swizzle == "128B", "==", 1)

# %%
(run,) = two_stages(source, result, factor)
lab.check("y = factor x, to the bit", result, wanted, max_abs=0)
lab.record("warp-instructions", run.stats.instructions)
lab.record("simulated in", 1e3 * run.seconds, "ms")

# %% [markdown]
# ## 2. Who waits for whom
#
# `sim.trace` keeps a log of every instruction, access, barrier event and asynchronous operation. Its timeline puts the log on a
# virtual clock: an instruction takes one issue slot, TMA has a rate and a latency, a waiter goes on when what it waited for is
# done. **This is a model with a handful of round parameters, not a measurement**; it is there to show order and idleness.

# %%
trace = sim.trace(two_stages, source, result, factor)
timeline = trace.timeline()
print(timeline.timing)
viz.plot_warp_timeline(**timeline.figure())
roles = [trace.roles[0, warp] for warp in range(6)]
lab.check_that("roles, found from what the warps issue", roles == ["load", *["math"] * 4, "store"], "==", 1)
tma_cycles = timeline.busy("TMA") * timeline.cycles
lab.check_that("TMA works for the bytes it moves", tma_cycles, "==", 2 * num_tiles * tile_bytes / timeline.timing.copy_bytes)

# %% [markdown]
# Nearly everything is grey: with two tiles in flight the kernel waits for latency. (White is a warp that waits for its turn to
# issue.) The arithmetic of a ring: with one stage a
# tile's round trip (load, scale, store, give back) takes $R$ cycles; with $S$ stages $S$ tiles make the trip together, so
# $T$ tiles take at least $\lceil T/S \rceil R$, and more once they queue for the same engine or issue slots.

# %%
traces = {}
for stages in stage_counts:
    compiled = sim.compile(scaled_copy.scaled_copy, source, result, factor, stages)
    traces[stages] = sim.trace(compiled, source, result, factor)
cycles = {stages: trace.timeline().cycles for stages, trace in traces.items()}
round_trip = cycles[1] / num_tiles
bound = {stages: math.ceil(num_tiles / stages) * round_trip for stages in stage_counts}
for stages in stage_counts[1:]:
    lab.check_that(f"{stages} stages: never below the bound", cycles[stages], ">=", bound[stages], "cycles")
    lab.check_that(f"{stages} stages: near it", cycles[stages], "<=", 1.5 * bound[stages], "cycles")
names = {stages: f"{stages} stage{'s' if stages > 1 else ''}" for stages in stage_counts}
predicted, modelled = ({names[s]: values[s] for s in stage_counts} for values in (bound, cycles))
viz.plot_predicted(predicted, modelled, quantity="modelled cycles", words=("bound", "model"))

# %% [markdown]
# ## 3. The protocol
#
# Three mbarriers a stage. The graph is drawn from the log: on the left who arrives, on the right who waits, with source lines and
# counts; barriers that the same lines use are the stages of one ring. Each completes once a tile.

# %%
graph = trace.barriers()
viz.plot_barrier_graph(**graph.figure())
mbarriers = [i for i, info in enumerate(trace.barrier_infos) if info.kind == "mbarrier"]
flips = trace.select(kind="flip")
lab.check_that("mbarriers of two stages", len(mbarriers), "==", 3 * 2)
lab.check("phases of each", [int((flips["subject"] == i).sum()) for i in mbarriers], [num_tiles / 2] * 6, max_abs=0)

# %% [markdown]
# ## 4. Memory
#
# A piece of shared memory is *held* from its write to the last read before the next write. Time here is the order in which the
# simulator executed, one of many legal ones. TMA's tile turns into the threads' tile in place, warp by warp.

# %%
held = trace.shared()
viz.plot_memory_occupancy(**held.figure())
step, most = held.most()
lab.check_that("never more than two tiles", most, "<=", 2 * tile_bytes, "bytes")
traffic = trace.traffic()
lab.check("each byte moves once", [traffic.of("source").factor, traffic.of("target", "written").factor], [1, 1], max_abs=0)

# %% [markdown]
# **Banks.** A row of a tile has 128 bytes: all 32 banks. Two neighbouring threads share a row, so the eight lanes of a phase
# (16 bytes each) touch two chunks in each of four rows. Laid out plainly the rows fall onto the same banks: **four** words for
# one bank. The 128-byte swizzle XORs the chunk's number with the row's: one word for each bank.

# %%
plain = sim.compile(scaled_copy.scaled_copy, source, result, factor, 2, False)
conflicts = {"swizzled": trace.bank_conflicts(), "plain": sim.trace(plain, source, result, factor).bank_conflicts()}
lab.check("the plain layout computes the same", result, wanted, max_abs=0)
for layout, predicted in (("swizzled", 1), ("plain", 4)):
    rows = conflicts[layout].rows
    lab.check(f"{layout}: words of the busiest bank in a phase", [row.degree for row in rows], [predicted] * 8, max_abs=0)
    passes, phases = sum(row.passes for row in rows), sum(row.phases for row in rows)
    lab.check_that(f"{layout}: passes for each phase", passes / phases, "==", predicted)
viz.plot_bank_conflicts(**conflicts["plain"].figure())

# %% [markdown]
# What ptxas made of it is in the cubin: registers, spills, barriers. Together with the launch's shared memory they say how many
# CTAs fit on one multiprocessor.

# %%
(static,) = sim.resources(two_stages).values()
fits = static.resident(dynamic_shared=launch.shared_bytes)
viz.plot_resources(
    [static.registers, launch.shared_bytes / 1024, static.spill_store_bytes + static.spill_load_bytes, static.barriers],
    [255, 227, 0, 16],
    ["registers of a thread", "shared memory (KiB)", "spilled (bytes)", "named barriers"],
)
print(fits)
lab.check_that("spilled bytes", static.spill_store_bytes + static.spill_load_bytes, "==", 0)
lab.check_that("CTAs on a multiprocessor", min(fits.values()), "==", min(64 // 6, 65536 // (192 * -(-static.registers // 8) * 8)))


# %% [markdown]
# ## 5. Break it: a barrier that waits for bytes that never come
#
# `expect_tx` announces how many bytes a phase has to receive. Announce 128 too many, a typical slip when a tile's shape changes.
# `edited` takes the kernel's source, changes one line and imports the copy; the kernel itself stays as it is.

# %%
def attempt(module, name, *arguments, constants=(), **options):
    """Explore the schedules of an edited kernel; what was found, with names and paths cut short."""
    compiled = sim.compile(getattr(module, name), *arguments, *constants)
    options = dict(seeds=random_schedules, checks=sim.Checks(races=True), raising=False) | options
    found = sim.explore(compiled, *arguments, **options)
    text = "\n".join(str(finding.text) for finding in found.findings)
    text = re.sub(r"/\S+/(\w+\.py:\d+)", r"\1", re.sub(r"kernel_cutlass_\w+", "the kernel", text))
    return found, text


def line_of(module, text):
    """Number of the source line that holds `text`."""
    return 1 + next(i for i, line in enumerate(inspect.getsource(module).splitlines()) if text in line)


# %%
too_many = edited(scaled_copy, {"expect_tx(full + stage, _BYTES)": "expect_tx(full + stage, _BYTES + 128)"})
print(difference(scaled_copy, too_many), "\n")
found, report = attempt(too_many, "scaled_copy", source, result, factor, constants=[2])
print(report)
lab.check_that("a deadlock is found", found.kinds == ["deadlock"], "==", 1)
lab.check_that("the report counts the missing bytes", "128 bytes outstanding" in report, "==", 1)
waiting = line_of(scaled_copy, "mbarrier_wait(full + stage")
lab.check_that("it names the line that waits", f"scaled_copy.py:{waiting}" in report, "==", 1)

# %% [markdown]
# Read it from the top: who waits, on what, where. Warps 1-4 wait for `full`, whose arrival has come, but 128 bytes are
# outstanding. Its last events show why: 8320 expected, 8192 completed. All others wait for what those warps would have done.
#
# ## 6. Break it: a fence that nobody misses
#
# Threads write shared memory through the *generic* proxy, TMA reads it through the *asynchronous* one, and an mbarrier does not
# order the two: that takes `fence.proxy.async`. Without it the result is right on this simulator under every schedule, because it
# has no second view of memory to be stale; on a GPU nothing promises that. So results cannot find it here. The checker keeps,
# for every byte, who wrote it, and what has been ordered since.

# %%
unfenced = edited(scaled_copy, {'cute.arch.fence_proxy("async.shared", space="cta")': ""})
print(difference(scaled_copy, unfenced), "\n")
blind, _ = attempt(unfenced, "scaled_copy", source, result, factor, constants=[2], checks=sim.Checks(races=False))
found, report = attempt(unfenced, "scaled_copy", source, result, factor, constants=[2])
print(report)
lab.check_that("results that give it away", len(blind.findings), "==", 0)
lab.check_that("the checker finds a missing fence", found.kinds == ["missing fence"], "==", 1)
writer, reader = line_of(unfenced, "autovec_copy(values, part)"), line_of(unfenced, "cute.copy(store")
named = f"scaled_copy.py:{writer}" in report and f"scaled_copy.py:{reader}" in report
lab.check_that("it names the store and the copy", named, "==", 1)

# %% [markdown]
# ## 7. A product on tensor cores
#
# $C = AB^\top$ on 64 x 64 tiles: one warp loads, a warpgroup multiplies with `wgmma`, straight from shared memory. The products
# are asynchronous too: one group of them is in flight while the next is issued.

# %%
rows, columns, depth = gemm_shape
a, b, c = torch.randn(rows, depth).half(), torch.randn(columns, depth).half(), torch.zeros(rows, columns)
product = sim.compile(tiled_gemm.tiled_gemm, a, b, c, gemm_stages)
trace = sim.trace(product, a, b, c)
exact = a.double() @ b.double().T
size = a.double().abs() @ b.double().abs().T
lab.check_that("error against the sum of magnitudes", ((c - exact).abs() / size).max(), "<=", depth * 2.0**-24)
timeline = trace.timeline()
viz.plot_warp_timeline(**timeline.figure())
lab.check_that(
    "tensor core: cycles of one CTA", timeline.busy("tensor core") * timeline.cycles, "==", 64 * 64 * depth / timeline.timing.macs
)

# %% [markdown]
# **Traffic.** Every CTA reads its rows of $A$ and of $B$, so $A$ is read once for each column of tiles, $N/64$ times, and $B$
# $M/64$ times. The black marks are what a perfect cache, or larger tiles, could save.

# %%
traffic = trace.traffic()
viz.plot_traffic(**traffic.figure())
lab.check("times that A and B are read", [traffic.of("a").factor, traffic.of("b").factor], [columns / 64, rows / 64], max_abs=0)
lab.check_that("times that C is written", traffic.of("c", "written").factor, "==", 1)

# %% [markdown]
# ## 8. Break it: a stage given back too early
#
# After `wait_group(1)` one group may still be in flight: the current step's. Only the stage *before* may be given back. Give back
# the current one and TMA may overwrite operands that the tensor core still reads: the classic bug of a Hopper main loop. It works when
# products happen at once (eager) and when they are put off as long as possible together with the loads (lazy).

# %%
early = edited(tiled_gemm, {"if step > 0:": "if step >= 0:", "empty + (step - 1) % stages": "empty + stage"})
print(difference(tiled_gemm, early), "\n")
options = dict(constants=[gemm_stages], expect={"c": exact}, atol=1e-2)
blind, _ = attempt(early, "tiled_gemm", a, b, c, checks=sim.Checks(races=False), first=False, **options)
found, report = attempt(early, "tiled_gemm", a, b, c, **options)
wrong = {schedule for finding in blind.findings for schedule in finding.schedules}
print(f"wrong results under {', '.join(sorted(wrong)) or 'no schedule'} of {', '.join(blind.schedules)}\n\n{report}")
lab.check_that("eager and lazy schedules that see it", len(wrong & {"eager", "lazy"}), "==", 0)
lab.check_that("the checker sees it in the first schedule", found.kinds == ["race"] and len(found.schedules) == 1, "==", 1)
lines = [line_of(early, "cute.gemm(mma"), line_of(early, "cute.copy(load_a")]
lab.check_that("it names the product and the load", all(f"tiled_gemm.py:{n}" in report for n in lines), "==", 1)

# %% [markdown]
# ## 9. Fixed
#
# The kernels as they are, under every schedule, with all checks: nothing to report, and one result to the bit.

# %%
for module, name, arguments, constants, expect in (
    (scaled_copy, "scaled_copy", (source, result, factor), [2], {"target": wanted}),
    (tiled_gemm, "tiled_gemm", (a, b, c), [gemm_stages], {"c": exact}),
):
    found, _ = attempt(module, name, *arguments, constants=constants, expect=expect, atol=1e-2)
    print(f"{name}: {', '.join(found.schedules)}")
    lab.check_that(f"{name}: findings", len(found.findings), "==", 0)
    lab.check_that(f"{name}: schedules", len(found.schedules), "==", 2 + random_schedules)

# %% [markdown]
# ## Findings
#
# - A launch can be read without running it: descriptors, shared memory and resources say a good part of what a kernel does.
# - A ring of $S$ stages divides latency by $S$ until engines or issue slots queue; the log shows which.
# - Bank conflicts and bytes read twice follow from layouts and tiles by arithmetic, and the log agrees exactly.
# - A deadlock shows itself. A missing fence or an early release often does not: right results under two schedules, or under
#   all, prove nothing. The checker needs one run.
#
# **Next:** [07 · One NVFP4 tile on Blackwell](07_blackwell_nvfp4_tile.ipynb)
