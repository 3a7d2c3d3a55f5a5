# %% [markdown]
# # 08 · Row quantisers as kernels
#
# **Question.** What does it take for a kernel to quantise exactly as the reference does, for every input there is, and how near
# does it come to the speed of copying?
#
# The kernel half of notebook 02. One kernel, `dsv4lab/kernels/quant/rows/`, does NVFP4, MXFP4 and FP8, of rows themselves, of
# their RMSNorm, or of clamped SwiGLU. It never differs from `dsv4lab.reference` by a bit; that is checked here, not hoped for.
#
# **Needs** a C compiler or a Hopper GPU; notebook 02 says what the formats mean. **Takes** half a minute on two CPU cores,
# twice that where the kernels have yet to be compiled. With
# `device="cuda"` the same cells run natively, and the last section measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
rows = 37  # random ones, an odd number
columns = 512  # K, a multiple of 128
profile_shape = [8192, 4096]  # rows and columns of the last section
baselines = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import contextlib

import torch

from dsv4lab import lab, ops, sim, viz
from dsv4lab.formats import from_atom128x4
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.quant.rows import api
from dsv4lab.lab import baselines as measured
from dsv4lab.lab import hopper, roofline
from dsv4lab.reference import moe, norm, quant

target = lab.setup(seed, device)
cpu = torch.device("cpu")
base = measured.newest("quantizers", baselines)
given = torch.tensor(0.003, device=target)  # a global scale

# %%
lab.environment(target)

# %% [markdown]
# ## 1. Who does what
#
# | format | block scale | code |
# |---|---|---|
# | NVFP4 | $s = \mathrm{E4M3}(a_{16} / 6g)$, at least $2^{-9}$ | $\mathrm{E2M1}(x / (s\,g))$ |
# | MXFP4 | $s = 2^{\lceil \log_2 (a_{32} / 6) \rceil}$ | $\mathrm{E2M1}(x / s)$ |
# | FP8 | $s = 2^{\lceil \log_2 (a_{128} / 448) \rceil}$ | $\mathrm{E4M3}(x / s)$ |
#
# A thread takes 16 consecutive values at a time, an NVFP4 block, and keeps them in registers. Maxima of longer
# groups, and sums of a row, go by shuffles. What is in doubt is never the plan but the last bit: is $x/(s\,g)$ rounded once or
# twice, what does a maximum do with NaN, does a denormal survive.

# %%
x = (torch.randn(rows, columns) * torch.exp(2 * torch.randn(rows, 1))).bfloat16()
quantisers = {
    "NVFP4, g given": (ops.quantize_nvfp4, quant.quantize_nvfp4, (), {"global_scale": given}),
    "NVFP4, g computed": (ops.quantize_nvfp4, quant.quantize_nvfp4, (), {}),
    "MXFP4": (ops.quantize_mxfp4, quant.quantize_mxfp4, (), {}),
    "FP8 rows": (ops.quantize_fp8_rows, quant.quantize_fp8_rows, (), {"group": 128}),
}


def as_bytes(parts):
    """Codes and scales as one row of bytes."""
    return torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts]).cpu()


# %%
for dtype in (torch.bfloat16, torch.float32):
    for name, (kernel, reference, extra, how) in quantisers.items():
        for schedule in hopper.schedules(target):
            with hopper.running(target, schedule):
                got = kernel(x.to(target, dtype), *extra, **how)
            want = reference(x.to(target, dtype), *extra, **how)
            lab.check(f"{name} of {str(dtype)[6:]}, {schedule}: bytes", as_bytes(got), as_bytes(want), max_abs=0)

# %% [markdown]
# ## 2. Every BF16 number there is
#
# Random rows meet neither ties nor the ends of the range. But there are $2^{16}$ BF16 numbers and a quantiser with a given
# global scale looks at one block at a time: **all** of them can be tried but NaN, in an order that puts numbers of very
# different size next to each other, and in one that puts neighbours together.

# %%
patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
numbers = patterns[~patterns.isnan()]
numbers = torch.cat([numbers, numbers.new_zeros(-len(numbers) % columns)]).view(-1, columns)
orders = {"neighbours together": numbers, "far apart": numbers.flatten()[torch.randperm(numbers.numel())].view(numbers.shape)}
lab.record("BF16 numbers", int((~patterns.isnan()).sum()))
for order, every in orders.items():
    for name in ("NVFP4, g given", "MXFP4", "FP8 rows"):
        kernel, reference, extra, how = quantisers[name]
        with hopper.running(target):
            got = kernel(every.to(target), *extra, **how)
        want = reference(every.to(target), *extra, **how)
        lab.check(f"{name}, every BF16, {order}: bytes", as_bytes(got), as_bytes(want), max_abs=0)

# %% [markdown]
# ## 3. Special values
#
# Float32 has too many values for that, so the ones that break kernels are chosen: zeros of both signs, the least denormal,
# numbers at and beside each tie of E2M1 and E4M3, the largest finite ones, infinity, blocks of a single value, and rows of
# zeros. NaN has no magnitude, so it takes no part in a maximum; its own code is the reference's.

# %%
ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 17 / 16, 19 / 16, 464.0, 2.0**-10])
beside = torch.cat([ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, torch.tensor(torch.inf))])
ends = torch.tensor([0.0, -0.0, 1e-45, 2.0**-149, 2.0**-126, 1.17e-38, 2.0**-60, 2.0**60, 3e38, torch.finfo(torch.float32).max])
wild = torch.cat([beside, -beside, ends, -ends, torch.tensor([torch.inf, -torch.inf])])
special = wild[torch.randint(len(wild), (29, columns))]
special[0], special[1, ::16] = 0, 6.0  # a row of zeros; blocks whose largest value is 6
special[2] = wild[torch.randint(len(beside), (columns,))]
with_nan = torch.where(torch.rand(29, columns) < 0.02, torch.nan, special)
for label, values in {"special values": special, "ties alone": special[2:3], "with NaN": with_nan}.items():
    for name in ("NVFP4, g given", "MXFP4", "FP8 rows"):
        kernel, reference, extra, how = quantisers[name]
        with hopper.running(target):
            got = kernel(values.to(target), *extra, **how)
        want = reference(values.to(target), *extra, **how)
        lab.check(f"{name}, {label}: bytes", as_bytes(got), as_bytes(want), max_abs=0)

# %% [markdown]
# ## 4. Fused with what comes before
#
# RMSNorm and SwiGLU write BF16 that the next quantiser reads again: 4 bytes a value there and back, more than the codes
# themselves. Fused, the values never leave registers. The reference computes in float64 and rounds to the input's type once,
# **then** quantises; so does the kernel, which is why it carries sums in more than float32 where a rounding could go the other
# way.

# %%
wide = torch.randn(rows, columns).bfloat16().to(target)
up, weight = torch.randn(rows, columns).bfloat16().to(target), (1 + 0.1 * torch.randn(columns)).bfloat16().to(target)
share = torch.rand(rows, device=target)  # a routing weight for each row
fused = {
    "RMSNorm, NVFP4": (ops.rmsnorm_nvfp4, norm.rmsnorm_nvfp4, (wide, weight), {"eps": 1e-6, "global_scale": given}),
    "RMSNorm, FP8": (ops.rmsnorm_fp8, norm.rmsnorm_fp8, (wide, weight), {"eps": 1e-6, "group": 128}),
    "SwiGLU, NVFP4": (ops.swiglu_nvfp4, moe.swiglu_nvfp4, (wide, up, share), {"limit": 10.0, "global_scale": given}),
    "SwiGLU, FP8": (ops.swiglu_fp8, moe.swiglu_fp8, (wide, up, share), {"limit": 10.0, "group": 128}),
}
for name, (kernel, reference, operands, how) in fused.items():
    for schedule in hopper.schedules(target):
        with hopper.running(target, schedule):
            got = kernel(*operands, **how)
        lab.check(f"{name}, {schedule}: bytes", as_bytes(got), as_bytes(reference(*operands, **how)), max_abs=0)

# %% [markdown]
# ## 5. Two layouts, one kernel
#
# For Blackwell's tensor cores block scales go straight into `atom128x4` tiles (notebook 02), padding included. Called directly,
# since operators speak of linear scales alone.

# %%
host = contextlib.nullcontext() if target.type == "cuda" else running_on(sim.Host(hopper.ARCH))
with hopper.launching(target), host:
    codes, tiles, _ = api.quantize_nvfp4(x.to(target), given, layout="atom128x4")
want_codes, want_scale, _ = quant.quantize_nvfp4(x.to(target), global_scale=given)
found = from_atom128x4(tiles.view(torch.uint8), rows, columns // 16)
lab.check("codes", codes, want_codes, max_abs=0)
lab.check("scales in tiles", found, want_scale.view(torch.uint8), max_abs=0)
lab.check_that("padding is zero", int(tiles.view(torch.uint8).long().sum() - found.long().sum()), "==", 0)

# %% [markdown]
# ## 6. Each byte once
#
# The floor of a quantiser is traffic: $x$ in, codes and scales out. The log of a simulated launch counts what threads really
# moved. A global scale of the whole tensor needs the largest value first, hence $x$ twice; that is the price of NVFP4's short
# range, and why a calibrated or a per-row scale is cheaper.

# %%
plain = torch.randn(64, columns).bfloat16()
(once,) = hopper.traces(cpu, lambda: ops.quantize_nvfp4(plain, given.cpu()))
looking, writing = hopper.traces(cpu, lambda: ops.quantize_nvfp4(plain))
read = {name: trace.traffic().of("x").factor for name, trace in (("given", once), ("amax", looking), ("codes", writing))}
lab.check("x is read: g given; the two launches of g computed", list(read.values()), [1, 1, 1], max_abs=0)
written = sum(sum(row.by.values()) for row in once.traffic().rows if row.direction == "written")
lab.check_that("codes and scales written", written, "==", plain.numel() * (1 / 2 + 1 / 16), "bytes")
viz.plot_traffic(**once.traffic().figure());


# %% [markdown]
# ## 7. What it uses
#
# Occupancy hides latency here, not pipelines: many small CTAs, few registers, nothing spilled.

# %%
def compiled():
    """Compiled kernels of the cache, newest first."""
    return map(cache.read, sorted(cache.folder().glob("*.kernel"), key=lambda path: -path.stat().st_mtime))


with hopper.running(cpu) as run:
    for _, (kernel, _, operands, how) in (quantisers | fused).items():
        here = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in how.items()}
        kernel(*(part.cpu() for part in operands or (wide,)), **here)
labels = ["NVFP4, g given", "NVFP4, g computed: amax", "NVFP4, g computed: codes", "MXFP4", "FP8 rows", *fused]
used = hopper.uses(run.launches, compiled(), labels)
print(hopper.table([one.row() for one in used]))
lab.check_that("most spilled bytes", max(one.spill_bytes for one in used), "==", 0)
viz.plot_resources([one.registers for one in used], [hopper.REGISTERS] * len(used), [f"registers: {one.name}" for one in used]);

# %% [markdown]
# ## 8. Predicted and measured
#
# Predicted: bytes over the bandwidth of a copy, measured in the same run. Rows of a few tokens are bound by the launch, not by
# bytes.

# %%
print(base)
for m in sorted({row["m"] for row in base.rows}, reverse=True)[:1]:
    large = [row for row in base.where(m=m) if row["k"] == min(row["k"] for row in base.where(m=m))]
    bound, time = measured.bound_and_time(large, "{shape}")
    fields = ("shape", "m", "k", "equal", "registers", "spill_bytes")
    print(hopper.table(measured.summary(large, fields, ("torch", "torch.compile"))))
    viz.plot_predicted(bound, time, quantity=f"time of {m} x {large[0]['k']} (us)", words=("bound", "measured"))
    lab.record("least share of bytes that equal the reference's on that GPU", min(row["equal"] for row in large))

# %%
few = [row for row in base.rows if row["m"] <= 16 and row["k"] == 4096]
print(hopper.table(measured.summary(few, ("shape", "m", "k"), ("torch",))) if few else base)

# %% [markdown]
# ## 9. Measured here
#
# With `device="cuda"`: the quantisers at a model's width, cold, against copy bandwidth measured in the same minute,
# replayed from CUDA graphs. A graph's start and end, some 2 us, count too; `benchmarks/` has many calls a graph.

# %%
if target.type == "cuda":
    here = roofline.measure_ceilings(target)
    m, k = profile_shape
    big, scale = torch.randn(m, k, device=target).bfloat16(), torch.tensor(6 / 2688, device=target)
    calls = {
        "NVFP4, g given": lambda: api.quantize_nvfp4(big, scale),
        "NVFP4, g computed": lambda: api.quantize_nvfp4(big),
        "MXFP4": lambda: api.quantize_mxfp4(big),
        "FP8 rows": lambda: api.quantize_fp8_rows(big, 128),
    }
    value_bytes = {"NVFP4, g given": 2 + 9 / 16, "NVFP4, g computed": 4 + 9 / 16, "MXFP4": 2 + 17 / 32, "FP8 rows": 3 + 1 / 128}
    work = {name: roofline.Work(m * k * value, 0.0) for name, value in value_bytes.items()}
    print(here.source, f"{here.bytes_per_s * 1e-12:.2f} TB/s")
    print(hopper.table(hopper.profile(target, calls, work, here)))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - Bit for bit the reference's, for every BF16 number there is, for ties, denormals, infinities and NaN, alone and fused.
# - Each byte moves once; a global scale over the whole tensor is the one thing that costs $x$ a second time.
# - Fusing keeps values in registers and changes no bit, because the kernel rounds where the reference rounds.
#
# **Next:** [09 · A linear with stored weights](09_linear.ipynb)
