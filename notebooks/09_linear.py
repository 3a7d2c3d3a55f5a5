# %% [markdown]
# # 09 · A linear with stored weights on Hopper
#
# **Question.** How can $y = xW^\top$ read four-bit weights as they are stored, on tensor cores that know no four-bit numbers,
# at the speed of memory for few tokens and of the tensor cores for many?
#
# The kernel is `dsv4lab/kernels/gemm/mixed/`: packed weights arrive in order of *records*, are decoded to BF16 in registers,
# exactly, and multiplied with float32 accumulation. Its four formats are NVFP4, MXFP4, FP8 blocks and BF16.
#
# **Needs** a C compiler or a Hopper GPU; notebooks 02 (formats) and 06 (the simulator) help. **Takes** half a minute on two CPU
# cores, twice that where the kernels have yet to be compiled. With `device="cuda"` the same cells run natively, and the last
# section measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
rows = 256  # output features of the small matrix, a multiple of 16
columns = 512  # K, a multiple of 128
few = 5  # tokens: below 17 warps multiply on their own
many = 72  # tokens: above, warpgroups do
profile_tokens = [1, 16, 64, 1024, 4097]  # of the last section, at Flash's wq_b
baselines = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import numpy as np
import torch

from dsv4lab import lab, ops, viz
from dsv4lab.formats import FP8_BLOCK, MXFP4, NVFP4, PackedWeight
from dsv4lab.kernels._common import cache
from dsv4lab.kernels.gemm.mixed import api, layout
from dsv4lab.kernels.gemm.mixed.config import choose
from dsv4lab.lab import baselines as measured
from dsv4lab.lab import bits, hopper, roofline
from dsv4lab.reference import gemm, quant

target = lab.setup(seed, device)
cpu = torch.device("cpu")
formats = tuple(layout.PLANES)
matrix = 0.05 * torch.randn(rows, columns)
weights = {name: quant.quantize(matrix, name).to(target) for name in formats}
base = measured.newest("linear", baselines)
nominal = roofline.Ceilings(4.8e12, 989e12, "data sheet of an H200")
ceilings = base.ceilings if base else nominal

# %%
lab.environment(target)

# %% [markdown]
# ## 1. Why a code times its scale is exact in BF16
#
# $$y_{mn} = \alpha \sum_k x_{mk}\, \mathrm{bf16}(c_{nk}\, s_{nk}), \qquad \alpha \text{ in float32, last}.$$
#
# A code has 2 significant bits (E2M1) or 4 (E4M3), a scale 4 (E4M3) or 1 (a power of two); BF16 holds 8. So rounding to BF16 in
# the middle rounds nothing. Exponents are the harder part: the kernel puts a code's bits on BF16's fields as they are, which
# makes it $2^{-126}$ of its value, and a scale $2^{107}$; the missing power of two goes into $\alpha$.
#
# The proof is by exhaustion, and by the kernel itself: a matrix that holds **every code under every scale**, times the
# identity. (No format writes a negative block scale; the kernel takes none. Of MXFP4 127 octaves: with more, float32
# overflows.) The result must be the decoded matrix, to the bit. With 16 tokens at a time warps decode, with 64 warpgroups do.

# %%
byte = torch.arange(256, dtype=torch.uint8)
is_nan = (byte & 127) == 127  # of E4M3
e2m1 = quant.pack_e2m1(torch.arange(16, dtype=torch.uint8).repeat(4)).repeat(256, 1)  # 64 columns: four times every code
e4m3_scales = (byte.masked_fill(is_nan, 0) & 127)[:, None].expand(256, 4).contiguous().view(torch.float8_e4m3fn)
octaves = byte.clamp(64, 190)[:, None].expand(256, 2).contiguous().view(torch.float8_e8m0fnu)  # wider, and float32 overflows
e4m3 = byte.masked_fill(is_nan, 0).repeat(128, 1).view(torch.float8_e4m3fn)
two = torch.tensor([[120, 131]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
everything = {
    "nvfp4": PackedWeight(NVFP4, e2m1, e4m3_scales, torch.tensor(2.0**-3)),
    "mxfp4": PackedWeight(MXFP4, e2m1, octaves),
    "fp8_block": PackedWeight(FP8_BLOCK, e4m3, two),
}

# %%
for name, packed in everything.items():
    packed, want = packed.to(target), quant.dequantize(packed).float().t().to(target)
    identity = torch.eye(len(want)).bfloat16().to(target)
    for tokens in (16, 64):
        with hopper.running(target):
            parts = [ops.linear(x.contiguous(), packed, act="none", out_dtype=torch.float32) for x in identity.split(tokens)]
        lab.check(f"{name}: every code under every scale, {tokens} tokens at a time", torch.cat(parts), want, max_abs=0)
    lab.record(f"{name}: different values decoded", len(torch.unique(want)))


# %% [markdown]
# ## 2. The record: which byte holds which weight
#
# A record is 16 rows by 64 columns, codes first, then block scales, 576 bytes for NVFP4. Below is which word belongs to which
# weights, found by **asking** `layout.prepare`: codes that spell out their own number, bit by bit, are reordered, and the bits
# that come out name their owner. No second copy of the rule.

# %%
def record_of(numbers):
    """The bytes of the record that 16 x 64 codes, under scales of one, are prepared to."""
    scale = torch.ones(16, 4).to(torch.float8_e4m3fn)
    packed = PackedWeight(NVFP4, quant.pack_e2m1(numbers.view(16, 64)), scale, torch.ones(()))
    return layout.prepare(packed).records[0, 0].view(torch.uint8)


owner = bits.owners(record_of, count=16 * 64, bits=4)
code, bit = owner.code.reshape(-1, 32), owner.bit.reshape(-1, 32)  # a word each
first = code.min(axis=1)
lab.check_that("every bit of every code is somewhere once", len(np.unique(owner.code * 4 + owner.bit)) - 1, "==", 16 * 64 * 4)
lab.check_that("bytes of a record: codes, and a scale for 16", 4 * len(code), "==", 16 * 64 / 2 + 16 * 64 / 16)
texts = ["scales" if start < 0 else f"{start // 64}\n{start % 64}" for start in first]
pairs = [f"rows {g}, {g + 8}" for g in range(8)]
group, title = np.where(first < 0, -1, first // 64), "a word's first row, and its first column below"
viz.plot_record_words(group, texts, pairs, title=title);

# %% [markdown]
# The tensor core's A operand is 16 x 16: lane $(g, q)$ holds rows $g, g+8$ of columns $2q, 2q+1, 2q+8, 2q+9$, and those eight
# codes are one word. The picture has one line for each block of 16 columns. A **warpgroup** reads a line at a time, one word a
# lane: all 32 banks. A **warp on its own** gives lane $(g, q)$ block $q$: four neighbouring words in line $q$, 16 bytes; eight
# lanes go at once, two colours from each line, and the exchange $g \oplus 2\,\mathrm{block}$ keeps them on different banks.

# %%
g, q, block = (v.ravel() for v in np.meshgrid(np.arange(8), np.arange(4), np.arange(4), indexing="ij"))
place = block * 32 + (g ^ (2 * block)) * 4 + q
wanted = np.stack([(g + 8 * r) * 64 + 16 * block + 2 * q + c for r in (0, 1) for c in (0, 1, 8, 9)], axis=1)
found = np.stack([np.unique(word) for word in code[place]])
lab.check("the eight codes of each lane's word", found, np.sort(wanted, axis=1), max_abs=0)
for pair in range(4):  # eight lanes: two neighbouring g, all four blocks, 16 bytes each
    mine = np.isin(g, (2 * pair, 2 * pair + 1))
    lab.check_that(f"banks that lanes {8 * pair} to {8 * pair + 7} use at once", len(np.unique(place[mine] % 32)), "==", 32)

# %% [markdown]
# ## 3. Decoding in registers
#
# Inside a word, bits lie so that **a shift and a mask** put two codes onto the fields of two BF16: sign on sign, the two exponent
# bits on the exponent's lowest, the mantissa bit on the mantissa's highest. That serves three pairs, by 0, 3 and 6 bits; no fourth
# shift finds all that is left, so the last pair is moved by three shifts at once: one product with $2^2 + 2^7 + 2^{12}$, of bits
# that do not meet. Four operands; one multiplication by the scales finishes them. Shown: the word of lane (2, 1), block 1.

# %%
word, names = code[32 + (2 ^ 2) * 4 + 1], bit[32 + (2 ^ 2) * 4 + 1]
mask = 0x81C081C0  # of decode.py: sign, two exponent bits, a mantissa bit, twice
spread = [(2, 0x00400040), (7, 0x01800180), (12, 0x80008000)]  # 4228 = 2^2 + 2^7 + 2^12, and the field each brings
steps = {
    "word as stored": [(0, 0xFFFFFFFF)],
    "word, masked": [(0, mask)],
    "word << 3, masked": [(3, mask)],
    "word turned by 6, masked": [(6, mask), (-26, mask)],
    "that, four bits a half, times 4228, masked": [(s + turn, m) for s, m in spread for turn in (6, -26)],
}
owners = np.stack([np.max([bits.moved(word, *move) for move in moves], axis=0) for moves in steps.values()])
which = np.stack([np.max([bits.moved(names, *move) for move in moves], axis=0) for moves in steps.values()])
known = np.unique(word)
shown = np.where(owners < 0, -1, np.searchsorted(known, owners))
fields = [31, 24, 23, 22, 15, 8, 7, 6]  # sign, exponent, exponent, mantissa of the upper and of the lower half
lab.check("fields of the operands", which[1:, fields], [[3, 2, 1, 0, 3, 2, 1, 0]] * 4, max_abs=0)
lab.check("codes of the operands, each once", np.sort(owners[1:, [31, 15]].ravel()), known, max_abs=0)
viz.plot_word_bits(shown, which, list(steps), codes=[f"row {k // 64}, column {k % 64}" for k in known]);

# %% [markdown]
# ## 4. The kernel against the reference
#
# Four formats, few and many tokens, every schedule there is. Terms $x\,c\,s$ are exact, so all that may differ is the float32
# sum: the tensor core cuts off up to $2^{-22}$ of a sum of 16 products. The yardstick is float64, the unit the sum of
# magnitudes.

# %%
xs = {tokens: torch.randn(tokens, columns).bfloat16() for tokens in (few, many)}
results = {}
for tokens, x in xs.items():
    for name, weight in weights.items():
        for schedule in hopper.schedules(target):
            with hopper.running(target, schedule):
                results[name, tokens, schedule] = ops.linear(x.to(target), weight, act="none", out_dtype=torch.float32)
bar = columns / 16 * 2.0**-22
for name, weight in weights.items():
    decoded = quant.dequantize(weight).cpu().double()
    for tokens, x in xs.items():
        exact, size = x.double() @ decoded.t(), x.double().abs() @ decoded.t().abs()
        for schedule in hopper.schedules(target):
            error = (results[name, tokens, schedule].cpu() - exact).abs() / size
            lab.check_that(f"{name}, {tokens} tokens, {schedule}: error / sum of magnitudes", error.max(), "<=", bar)

# %% [markdown]
# The order of the sum is fixed, so every schedule must give the same bits. Quantised activations are exact in BF16 too (FP8:
# code times power of two; NVFP4: code times block scale, the global scale of the row in the epilogue), so the same kernel
# serves W4A8 and W4A4: against the reference, whose sums are float64.

# %%
for (name, tokens, schedule), y in results.items():
    if schedule != hopper.schedules(target)[0]:
        lab.check(f"{name}, {tokens} tokens: {schedule} and eager", y, results[name, tokens, "eager"], max_abs=0)
for act in ("none", "fp8", "nvfp4"):
    x = xs[few].to(target)
    with hopper.running(target):
        y = ops.linear(x, weights["nvfp4"], act=act)
    lab.check(f"NVFP4 weight, act {act}: BF16 result", y, gemm.linear(x, weights["nvfp4"], act=act), cosine=0.9999, rel=2.0**-5)

# %% [markdown]
# ## 5. Who works when
#
# A CTA has a warp that fetches weights (bulk copies of records), a warp that fetches tokens, and warps that decode and
# multiply. A ring of stages joins them. Always simulated; the clock is a model (notebook 06), it shows order, not speed.

# %%
(trace,) = hopper.traces(cpu, lambda: ops.linear(xs[many][:40], weights["nvfp4"].to("cpu"), act="none"))
timeline = trace.timeline()
viz.plot_warp_timeline(**timeline.figure())
kinds = [one.kind for one in trace.operations.values()]
config = choose("nvfp4", "bf16", 40, rows, columns)
copies = rows // 16 * columns // 64 // config.chunks
lab.check_that("copies of records: one a slab and step", kinds.count("bulk load"), "==", copies)
lab.check_that("words of the busiest bank, in any access", max(row.degree for row in trace.bank_conflicts().rows), "==", 1)
lab.record("CTAs", len({cta for cta, _ in trace.roles}))

# %% [markdown]
# Bytes: records cross the bus once. Tokens are read by every CTA that has other rows of $W$ (from L2, on a GPU); the picture
# counts them each time.

# %%
traffic = trace.traffic()
records = next(row for row in traffic.rows if "int32" in row.tensor)
packed = weights["nvfp4"].codes.nbytes + weights["nvfp4"].scale.nbytes
lab.check_that("bytes of records read", sum(records.by.values()), "==", packed)
lab.check_that("times that each is read", records.factor, "==", 1)
figure = traffic.figure()
short = {"int32": "records, read", "(1, 2)": "alpha, read"}
figure["labels"] = [next((new for old, new in short.items() if old in label), label) for label in figure["labels"]]
viz.plot_traffic(**figure);


# %% [markdown]
# ## 6. What it uses
#
# From the cubin that ptxas made: registers of a thread at launch, spilled bytes, shared memory of a CTA. Where loading and
# multiplying warps need different numbers of registers, they hand them over after the start.

# %%
def compiled():
    """Compiled kernels of the cache, newest first."""
    return map(cache.read, sorted(cache.folder().glob("*.kernel"), key=lambda path: -path.stat().st_mtime))


with hopper.running(cpu) as run:
    for name in formats:
        for x in xs.values():
            ops.linear(x, weights[name].to("cpu"), act="none", out_dtype=torch.float32)
labels = [f"{name}, {tokens} tokens" for name in formats for tokens in xs]
used = hopper.uses(run.launches, compiled(), labels)
print(hopper.table([one.row() for one in used]))
lab.check_that("most spilled bytes", max(one.spill_bytes for one in used), "==", 0)
lab.check_that("most shared memory", max(one.shared_kib for one in used), "<=", hopper.SHARED_KIB, "KiB")
limits = [hopper.REGISTERS] * len(used)
viz.plot_resources([one.registers for one in used], limits, [f"registers: {label}" for label in labels]);

# %% [markdown]
# ## 7. One kernel, many configurations
#
# `choose` picks tile, stages and cluster by shape: few tokens want every multiprocessor to stream weights, if need be with a
# cluster of CTAs sharing one tile's $K$; many tokens want large tiles, because weights are decoded once for each tile of
# tokens.

# %%
shapes = {"flash wq_a": (1024, 4096), "flash wq_b": (32768, 1024), "flash wo_b": (4096, 8192), "pro wq_b": (65536, 1536)}
table = []
for name, (n, k) in shapes.items():
    for m in (1, 16, 64, 1024, 8192):
        one = choose("nvfp4", "bf16", m, n, k)
        by = "warps" if one.by_warp else "warpgroups"
        line = {"shape": name, "m": m, "tile": f"{one.rows} x {one.tokens}", "by": by, "stages": one.stages}
        table.append(line | {"K a stage": 64 * one.chunks, "cluster": one.cluster, "KiB": one.shared_bytes // 1024})
print(hopper.table(table))
lab.check_that("most shared memory of a CTA", max(row["KiB"] for row in table), "<=", hopper.SHARED_KIB, "KiB")

# %% [markdown]
# ## 8. Predicted and measured
#
# The floor is the slower of two streams: packed bytes of $W$ over copy bandwidth, and $2mnk$ flops over the BF16 rate. Few
# tokens are bound by bytes, many by arithmetic; they cross at $m^* = \frac{\text{bytes a weight}}{2} \cdot
# \frac{\text{flop/s}}{\text{byte/s}}$ tokens, for NVFP4 at $4.5/16$ of the machine's balance where BF16 needs all of it.

# %%
crossing = {name: weights[name].nbytes / matrix.numel() / 2 * ceilings.balance for name in formats}
for name, tokens in crossing.items():
    lab.record(f"{name}: arithmetic binds beyond", round(tokens, 1), "tokens")
lab.record("NVFP4's crossing over BF16's", crossing["nvfp4"] / crossing["bf16"])
print(ceilings.source)
print(base)
n, k = shapes["flash wq_b"]
for m in profile_tokens:
    work = roofline.Work(n * k * (0.5 + 1 / 16), 2.0 * m * n * k)
    print(f"flash wq_b, NVFP4, {m:5d} tokens: at least {1e6 * work.floor_s(ceilings):8.2f} us, bound by {work.bound(ceilings)}")

# %%
rows_of_one = base.where(shape="flash wq_b", format="nvfp4")
if rows_of_one:
    intensity, rate = measured.roofline_points(rows_of_one)
    names = [f"{row['m']} tokens" for row in rows_of_one]
    limits = {"BF16": round(ceilings.flops_per_s * 1e-12, 1)}
    viz.plot_roofline(intensity, rate, names, bandwidth=round(ceilings.bytes_per_s * 1e-12, 3), ceilings=limits)
    print(hopper.table(measured.summary(rows_of_one, ("shape", "m"), ("cublas_bf16", "triton_nvfp4"))))
else:
    print(base)

# %%
decode_rows = [row for row in base.where(format="nvfp4", m=1) if row.get("n")]
if decode_rows:
    floor, time = measured.bound_and_time(decode_rows, "{shape}")
    viz.plot_predicted(floor, time, quantity="time of one token (us)", words=("bound", "measured"))
    lab.record("best percent of the bound", round(max(100 * floor[name] / time[name] for name in time), 1), "%")
else:
    print(base)

# %% [markdown]
# Where a matrix is small, a launch and a round trip to memory weigh more than its bytes, and the bound says little. That is
# what clusters and weights that are fetched before the kernel ahead has ended are for.
#
# ## 9. Anatomy of the error
#
# Relative to the float64 product of the same weights: float32 results, BF16 results, and what quantised activations add. Small
# results are sums that cancel; their relative error grows without anything being wrong, which is why bars are set against the
# sum of magnitudes or the size of the whole.

# %%
x = torch.randn(many, columns).bfloat16().to(target)
exact = (x.cpu().double() @ quant.dequantize(weights["nvfp4"]).cpu().double().t()).flatten()
kinds = {
    "float32 result": ("none", torch.float32),
    "BF16 result": ("none", torch.bfloat16),
    "FP8 activations": ("fp8", torch.float32),
    "NVFP4 activations": ("nvfp4", torch.float32),
}
outcome = {}
for name, (act, dtype) in kinds.items():
    with hopper.running(target):
        outcome[name] = ops.linear(x, weights["nvfp4"], act=act, out_dtype=dtype).cpu().double().flatten()
rms = {name: float((y - exact).norm() / exact.norm()) for name, y in outcome.items()}
print({name: f"{value:.2g}" for name, value in rms.items()})
lab.check_that("float32 result", rms["float32 result"], "<=", 1e-6)
lab.check_that("BF16 result: within half a unit", rms["BF16 result"], "<=", 1 / 257)
lab.check_that("FP8 costs less than NVFP4", rms["FP8 activations"], "<=", rms["NVFP4 activations"])
ax = viz.plot_error_anatomy(exact, outcome, num_bins=60, floor=1e-8)
ax.set(xlabel="magnitude of the result (no unit, log2 axis)", yticks=[1e-8, 1e-6, 1e-4, 1e-2, 1]);

# %% [markdown]
# ## 10. Measured here
#
# With `device="cuda"`: Flash's wq_b, cold, beside cuBLAS in BF16, against ceilings measured in the same minute,
# replayed from CUDA graphs. A graph's start and end, some 2 us, count too; `benchmarks/` has many calls a graph.

# %%
if target.type == "cuda":
    here = roofline.measure_ceilings(target)
    big = quant.quantize(0.02 * torch.randn(n, k, device=target), "nvfp4")
    ready, dense = layout.prepare(big), quant.dequantize(big).bfloat16()
    calls, work = {}, {}
    for m in profile_tokens:
        x = torch.randn(m, k, device=target).bfloat16()
        calls[f"ours, {m}"] = lambda x=x: api.linear(x, ready, out_dtype=torch.bfloat16)
        calls[f"cuBLAS BF16, {m}"] = lambda x=x: x @ dense.t()
        work[f"ours, {m}"] = work[f"cuBLAS BF16, {m}"] = roofline.Work(ready.nbytes, 2.0 * m * n * k)
    print(here.source, f"{here.bytes_per_s * 1e-12:.2f} TB/s, {here.flops_per_s * 1e-12:.0f} TFLOP/s")
    print(hopper.table(hopper.profile(target, calls, work, here)))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - Every code is decoded to the bit in all formats, by both readers: of NVFP4 under every scale, of MXFP4 over 127 octaves.
# - A record is an order, not an addition: the packed bytes, no more. Its two readers use all banks at once.
# - A pair of four-bit weights costs a shift, a mask and a multiplication, two pairs of four a second shift; one kernel serves
#   four formats.
# - Schedules do not change a bit; errors are those of a float32 sum.
# - Four bits move the crossing from bytes to arithmetic down with the bytes: fewer tokens are bound by memory, and those run
#   faster.
#
# **Next:** [10 · The router](10_router.ipynb)
