# %% [markdown]
# # 07 · One NVFP4 tile on Blackwell
#
# **Question.** Which way do four-bit codes and their scales go through a Blackwell multiprocessor, from global memory to a
# finished tile of $y = xW^\top$, and how do we know, with no Blackwell at hand?
#
# The kernel is `dsv4lab/kernels/gemm/w4a4/sm100.py`: TMA loads, scales copied to tensor memory (TMEM), `tcgen05.mma` with block
# scales, a TMA store. It is compiled for sm_100a and its PTX is executed by the simulator. Numbers below that describe layouts and
# values are the instruction set's; times are not measured anywhere.
#
# **Needs** a C compiler; notebooks 02 (formats) and 06 (the simulator) help. **Takes** about half a minute on two CPU cores.

# %% tags=["parameters"]
rows = 100  # tokens, at most 128 for one tile
columns = 120  # output features, a multiple of 8, at most 128
depth = 448  # K, a multiple of 32, above 256 for two steps and not a multiple of 256, so that the last step has a tail
random_schedules = 3  # beside the eager and the lazy one
seed = 0

# %%
import torch

import dsv4lab
from dsv4lab import lab, ops, sim, viz
from dsv4lab.formats import NVFP4, from_atom128x4, to_atom128x4
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.gemm.w4a4.api import linear_w4a4
from dsv4lab.kernels.gemm.w4a4.config import TILE_K, TILE_M, W4A4Config
from dsv4lab.lab import tensor_memory
from dsv4lab.reference import gemm, quant

target = lab.setup(seed, "cpu")
arch = "sm_100a"
config = W4A4Config(out="f32")
steps = -(-depth // TILE_K)
parts = TILE_K // 64  # products of a step: one tcgen05.mma takes 64 columns

# %%
lab.environment(target)

# %% [markdown]
# ## 1. The product, and how it is asked for
#
# A value is a code (E2M1), times a block scale for every 16 along $K$ (E4M3), times a float32 scale of its row of $x$ or of all of $W$:
#
# $$y_{mn} = g_m\, g_W \sum_b s^x_{mb}\, s^W_{nb} \sum_{k \in b} c^x_{mk}\, c^W_{nk}.$$
#
# The tensor core does both sums; the epilogue multiplies by $g_m g_W$. `backend("sim", ...)` runs the kernels that are
# registered for the architecture: here two, the quantiser of $x$ and the product. `TensorCore` and `Recorder` watch.

# %%
x = torch.randn(rows, depth) * torch.exp(torch.randn(rows, 1))  # rows of different size
weight = quant.quantize(0.02 * torch.randn(columns, depth), NVFP4.name)
core, recorder = sim.TensorCore(snapshots=steps * parts), sim.Recorder()
with dsv4lab.backend("sim", arch=arch, observers=[core, recorder]) as simulated:
    y = ops.linear(x, weight, act="nvfp4")
want = gemm.linear(x, weight, act="nvfp4")
lab.check("y against the oracle", y, want, rel=1e-5)
quantiser, product = simulated.launches
lab.check_that("kernels launched", len(simulated.launches), "==", 2)
lab.record("warp-instructions of the product", product.stats.instructions)

# %% [markdown]
# The rows of $x$ differ in size by two orders of magnitude, so a scale that is applied to the wrong row would show at once.
#
# ## 2. What the tensor core is given
#
# Codes two a byte, 128 rows by 256 columns a step, and their block scales in tiles of 128 rows by 4 blocks (`atom128x4`,
# notebook 02). Everything travels by TMA: five descriptors, 128 bytes each, made by the host code. The last axis of a box is
# padded by nothing: beyond the edges of a tensor TMA reads zeros, so **tails cost no code**.

# %%
maps = list(sim.tensor_maps(product.launch).values())
for name, found in zip(("x codes", "W codes", "x scales", "W scales", "y"), maps, strict=True):
    print(f"{name:9s} {found}")
per_step = sum(found.box_bytes for found in maps[:4])
lab.check_that("bytes of a step, as the barrier expects them", per_step, "==", config.stage_bytes, "bytes")
lab.check_that("codes of both operands", 2 * TILE_M * TILE_K // 2, "==", sum(found.box_bytes for found in maps[:2]), "bytes")
lab.check_that("scales: one byte for 16 values", 2 * TILE_M * TILE_K // 16, "==", sum(f.box_bytes for f in maps[2:4]), "bytes")

# %% [markdown]
# ## 3. Shared memory: a row is 128 bytes
#
# 256 codes are 128 bytes, all 32 banks of one line. TMA's 128-byte swizzle puts chunk $c$ of row $r$ (16 bytes, 32 codes) at
# place $c \oplus (r \bmod 8)$, so that reading one chunk of eight rows meets every bank once. One `tcgen05.mma` takes 64 columns: two
# chunks, bold below. Its operand is found through a **matrix descriptor**: start, stride between groups of 8 rows, swizzle.

# %%
first, second = core.products[:2]
print(first)
print("second:", f"A starts at {second.a.start:#x}")
chunks = tensor_memory.chunks_of_lines(first.a, lines=16, chunks=8)
predicted = torch.arange(8) ^ (torch.arange(16)[:, None] % 8)
lab.check("chunk in each place", chunks, predicted, max_abs=0)
lab.check("start, next part; bytes between 8 rows", [second.a.start - first.a.start, first.a.stride], [32, 1024], max_abs=0)
viz.plot_swizzle(chunks, marked=chunks < 2)

# %% [markdown]
# The next 64 columns start 32 bytes further on: the swizzle is a function of the *address*, so moving the start moves along $K$.
# What the tensor core reads through its descriptors must be the codes that the reference packs, and zeros beyond the ends.

# %%
row_scale = quant.nvfp4_global_scale(x.abs().amax(-1))
x_codes, x_scale, _ = (t.squeeze(1) if t.ndim > 1 else t for t in quant.quantize_nvfp4(x[:, None], global_scale=row_scale))
padded_x, padded_w = torch.zeros(2, TILE_M, steps * TILE_K // 2, dtype=torch.uint8)
padded_x[:rows, : depth // 2], padded_w[:columns, : depth // 2] = x_codes, weight.codes
lab.check_that("products for one tile", len(core.products), "==", steps * parts)
seen_x = torch.cat([torch.from_numpy(one.a_tile) for one in core.products], dim=1)
seen_w = torch.cat([torch.from_numpy(one.b_tile) for one in core.products], dim=1)
lab.check("A as read, all of K", seen_x, padded_x, max_abs=0)
lab.check("B as read, all of K", seen_w, padded_w, max_abs=0)

# %% [markdown]
# ## 4. The instruction descriptor
#
# 32 bits say what kind of product it is: formats of A and B, format of the scales, $M/16$, $N/8$, and which bytes of a scale word to
# begin at. With `block16` every product takes four scales a row, so both begin at byte 0.

# %%
shape = first.shape
lab.check("M, N, K of one product", [shape.m, shape.n, shape.k], [TILE_M, config.tile_n, 64], max_abs=0)
lab.check_that("operands are e2m1, scales e4m3", (shape.a, shape.b, shape.scales) == ("e2m1", "e2m1", "e4m3"), "==", 1)
lab.check("first scale byte of A and B", [shape.a_scale, shape.b_scale], [0, 0], max_abs=0)
flags = [float(one.accumulate) for one in core.products]
lab.check("D is overwritten once, then added to", flags, [0.0] + [1.0] * (len(flags) - 1), max_abs=0)

# %% [markdown]
# ## 5. Tensor memory
#
# 128 lanes by 512 columns of 32 bits, 256 KiB for each multiprocessor. The kernel allocates all of it and divides it by hand: two
# accumulators, so that the next tile can begin while this one is stored, then the scales of one step.

# %%
predicted_columns = [0, *config.scale_columns]
lab.check("where D and the scales begin", [first.accumulator, first.a_scale, first.b_scale], predicted_columns, max_abs=0)
owner = tensor_memory.owners(config)
names = ["accumulator 0", "accumulator 1", "scales of x", "scales of W"]
lab.check_that("columns in use", int((owner[0] >= 0).sum()), "==", config.tmem_columns)
holding = tensor_memory.written(core.products[parts - 1].tmem)
used = [*range(columns), *range(config.scale_columns[0], config.tmem_columns)]  # of the accumulator, W's rows only
lab.check("columns that hold something after a step", holding.nonzero()[0], used, max_abs=0)
viz.plot_tmem_map(owner, names)

# %% [markdown]
# ## 6. Scales in tensor memory
#
# `tcgen05.cp` copies an atom of 512 bytes, 32 lines of 16, and repeats it in all four groups of 32 lanes, because each quarter of
# the tensor core reads its own. So the scale of row $r$, block $4p + i$ of a step lies in
#
# $$\text{lane } r \bmod 32 \;(+\,32 j), \qquad \text{column } x_0 + 4p + \lfloor r/32 \rfloor, \qquad \text{byte } i.$$
#
# The formula, evaluated here, against the cells that the simulated copy left behind after the first step.

# %%
cells = core.products[parts - 1].tmem
places = tensor_memory.scale_places(rows=TILE_M, parts=parts)
padded_scale = torch.zeros(TILE_M, steps * TILE_K // 16, dtype=torch.uint8)
padded_scale[:rows, : depth // 16] = x_scale.view(torch.uint8)
expected = padded_scale[places.row, places.block]
for group in range(4):
    held = tensor_memory.scale_bytes(cells, lanes=32 * group, column=first.a_scale, columns=4 * parts)
    lab.check(f"scales of x in lanes {32 * group} to {32 * group + 31}", held, expected, max_abs=0)
viz.plot_scale_words(places.row, places.block, first_column=first.a_scale)

# %% [markdown]
# Read a column downwards: 32 rows, four blocks in its four bytes. The four columns between two wide bars belong to one product.
# The `atom128x4` layout of memory is these 16 bytes of a lane, one lane after the other: that is why it exists.
#
# ## 7. The accumulator
#
# Row $m$ of the tile is lane $m$, column $n$ is column $n$. Products of codes are multiples of 1/4 up to 36, block scales have 4
# significant bits each: every term is exact in float32, only the sum may round. The float64 sum is the yardstick.

# %%
exact = tensor_memory.block_products(x_codes, x_scale, weight.codes, weight.scale)
sums = torch.from_numpy(core.products[-1].tmem[:rows, :columns].copy()).view(torch.float32)
size = tensor_memory.block_products(x_codes & 0x77, x_scale, weight.codes & 0x77, weight.scale)  # signs dropped
lab.check("TMEM after the last product", sums, exact, rel=1e-5)
lab.check_that("error against the sum of magnitudes", ((sums - exact).abs() / size).max(), "<=", len(flags) * 2.0**-24)
outside = torch.from_numpy(core.products[-1].tmem[rows:, : config.tile_n].copy()).view(torch.float32)
lab.check("lanes beyond the last row", outside, torch.zeros_like(outside), max_abs=0)
finished = (sums.double() * row_scale.double()[:, None] * weight.global_scale.double()).float()
lab.check("times both global scales: y", y, finished, rel=1e-6)

# %% [markdown]
# ## 8. A classic mistake
#
# Give the tensor core scales in the order of the checkpoint (`linear`) where it expects `atom128x4`: same bytes, same number of
# them, no error from anything. The result has the right size and points nearly the right way, and is wrong.

# %%
linear_order = torch.zeros(to_atom128x4(weight.scale).numel(), dtype=torch.uint8)
linear_order[: weight.scale.numel()] = weight.scale.view(torch.uint8).flatten()
as_if = from_atom128x4(linear_order.view(1, -1, 512), columns, depth // 16).view(torch.float8_e4m3fn)
mistaken = dsv4lab.formats.PackedWeight(NVFP4, weight.codes, as_if, weight.global_scale)
with dsv4lab.backend("sim", arch=arch):
    wrong = ops.linear(x, mistaken, act="nvfp4")
measured = lab.compare(wrong, want)
lab.check_that("it is wrong", measured.max_rel, ">=", 0.1)
lab.record("cosine of the wrong result", measured.cosine)

# %% [markdown]
# ## 9. Who works when
#
# Warp 5 starts copies, warp 4 copies scales and issues products, warps 0-3 store 32 rows each. Two rings of mbarriers join them:
# stages (load to mma) and accumulators (mma to store). The clock is a model (notebook 06): it shows order, not speed.

# %%
trace = recorder.traces[-1]
timeline = trace.timeline()
viz.plot_warp_timeline(**timeline.figure())
kinds = [one.kind for one in trace.operations.values()]
lab.check_that("TMA loads: four a step", kinds.count("TMA load"), "==", 4 * steps)
lab.check_that("scale copies: an atom each", kinds.count("tcgen05.cp"), "==", 2 * parts * steps)
lab.check_that("products", kinds.count("tcgen05.mma"), "==", parts * steps)
lab.check_that("TMA stores: 32 rows by 32 columns each", kinds.count("TMA store"), "==", 4 * config.tile_n // 32)

# %% [markdown]
# ## 10. Every schedule gives the same tile
#
# A GPU takes the warps in any order, and its copies and products finish when they like. `explore` runs the same launches eager,
# lazy and at random, with the race and proxy-fence checks on, and compares every byte.

# %%
operands = (x_codes, to_atom128x4(x_scale), row_scale, weight.codes, to_atom128x4(weight.scale), weight.global_scale)
with sim.capture(arch) as launches, running_on(sim.Host(arch)):
    again = linear_w4a4(*operands, out_dtype=torch.float32)  # captured, not yet computed
explored = sim.explore(launches, seeds=random_schedules, checks=sim.Checks(races=True), raising=False)
print(f"{len(explored.schedules)} schedules: {', '.join(explored.schedules)}")
lab.check_that("findings", len(explored.findings), "==", 0)
lab.check("the tile after the last schedule", again, y, max_abs=0)

# %% [markdown]
# ## 11. Other shapes
#
# One tile proves little: a tile index that is stuck at zero gives it too. Several tiles in both directions, more tiles than CTAs,
# odd ends, both output types.

# %%
for shape_m, shape_n, shape_k in ((1, 8, 32), (257, 264, 544), (131, 640, 1056)):
    many = torch.randn(shape_m, shape_k)
    packed = quant.quantize(0.02 * torch.randn(shape_n, shape_k), NVFP4.name)
    with dsv4lab.backend("sim", arch=arch):
        got = ops.linear(many, packed, act="nvfp4")
    label = f"{shape_m} x {shape_n} x {shape_k}"
    lab.check(label, got, gemm.linear(many, packed, act="nvfp4"), rel=1e-5)

# %% [markdown]
# ## Findings
#
# - Codes, scales, descriptors and accumulators lie where the formulas above say, bit for bit, in the compiled kernel as
#   the simulator executes it.
# - Block scaling costs 1/8 of the operand bytes, one `tcgen05.cp` for 128 rows by 64 columns, and 32 of 512 TMEM columns.
# - The result differs from the oracle by float32 summation only, under every schedule tried, with no race found.
#
# Not shown: speed, and whether the hardware agrees. The simulator's products are checked against NVIDIA's own samples and,
# for Hopper's instructions, against an H200; no Blackwell has run this kernel yet.
