# %% [markdown]
# # 12 · Norm and rotation
#
# **Question.** Attention sees only normalised, rotated numbers. How exact must an angle be when the position is a million, and
# what do norm, rotation and quantisation cost when each byte moves once?
#
# Kernels: `dsv4lab/kernels/quant/rows/` (norms) and `dsv4lab/kernels/rope/` (heads).
#
# **Needs** a C compiler or a Hopper GPU; notebook 08 explains the row quantiser. **Takes** half a minute on two CPU cores,
# twice that where the kernels have yet to be compiled. With `device="cuda"` the same cells run natively, and the last section
# measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
tokens = 11  # of a comparison, an odd number
flash_heads = 64  # query heads of one token at Flash's width
angle_positions = 120  # whose sines the kernel computes
profile_shape = [8192, 64]  # tokens and heads of the last section
measured = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import math

import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.config import ModelConfig
from dsv4lab.kernels._common import cache
from dsv4lab.lab import baselines, hopper, observed, perplexity, roofline, sections
from dsv4lab.reference import norm, quant, rope

target = lab.setup(seed, device)
cpu, million = torch.device("cpu"), 2**20
model = dsv4lab.load(checkpoint or dsv4lab.nano(), device=cpu)
eps, flash = model.config.rms_norm_eps, ModelConfig.flash()
base = baselines.newest("rope_and_cache", measured)

# %%
lab.environment(target)

# %% [markdown]
# ## 1. RMSNorm, and what it is handed on as
#
# $$y_i = w_i\, x_i \Big/ \sqrt{\tfrac1K \textstyle\sum_j x_j^2 + \epsilon}$$
#
# The next product wants $y$ in eight or four bits, so it never needs to exist in sixteen. Inputs are nano's: the rows that its
# layers normalise on text that it was not trained on. The kernel rounds where the reference rounds, so every byte must agree.

# %%
text = perplexity.held_out_windows(model.tokenizer, count=1, length=256)
with ops.observe() as calls:
    model.logits(text[:, :-1])
written = [call.inputs for call in observed.find(calls, "cache_write", "layers")]
x = torch.cat([one["x"] for one in written])[::13].bfloat16().to(target)
weight, scale = written[0]["norm_weight"].to(target), torch.tensor(0.003, device=target)
forms = {
    "BF16": (ops.rmsnorm, norm.rmsnorm, {}),
    "FP8": (ops.rmsnorm_fp8, norm.rmsnorm_fp8, {"group": 128}),
    "NVFP4": (ops.rmsnorm_nvfp4, norm.rmsnorm_nvfp4, {"global_scale": scale}),
}
for name, (kernel, reference, how) in forms.items():
    for schedule in hopper.schedules(target):
        with hopper.running(target, schedule):
            got = kernel(x, weight, eps=eps, **how)
        got, want = ((part,) if name == "BF16" else part[:2] for part in (got, reference(x, weight, eps=eps, **how)))
        wrong = sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in zip(got, want, strict=True))
        lab.check_that(f"RMSNorm to {name}, {schedule}: bytes that differ", wrong, "==", 0)

# %%
y = norm.rmsnorm(x.float(), weight, eps=eps)
fp8, four = quant.quantize_fp8_rows(y, group=128), quant.quantize_nvfp4(y, global_scale=scale)
seen = {"BF16": y.bfloat16().float(), "FP8": quant.dequantize_fp8_rows(*fp8, group=128), "NVFP4": quant.dequantize_nvfp4(*four)}
viz.plot_error_anatomy(y.flatten(), {name: part.flatten() for name, part in seen.items()}, num_bins=60, floor=1e-4)

# %% [markdown]
# ## 2. Two tables of frequencies
#
# Pair $i$ turns by $f_i$ radians a token, $f_i = \theta^{-2i/64}$. Layers with a window alone take $\theta = 10^4$. Layers with
# compressed entries look back a million tokens; they take $\theta = 1.6 \cdot 10^5$, and YaRN slows the pairs that never made
# a turn in the 65,536 tokens of training to a sixteenth. Between the pair that made 32 turns and the one that made one, it
# blends:
#
# $$f_i \leftarrow f_i\,(g_i + (1 - g_i)/16), \qquad g_i = 1 - \mathrm{clamp}\big((i - 15)/10, 0, 1\big).$$

# %%
scaling = flash.rope_scaling
tables = {
    "window, 10,000": rope.rope_frequencies(rope_dim=64, theta=flash.rope_theta, scaling=None),
    "entries, 160,000 without YaRN": rope.rope_frequencies(rope_dim=64, theta=flash.compress_rope_theta, scaling=None),
    "entries, 160,000 with YaRN": rope.rope_frequencies(rope_dim=64, theta=flash.compress_rope_theta, scaling=scaling),
}
window, unscaled, entries = tables.values()
trained = scaling.original_max_position_embeddings
edges = [32 * math.log(trained / (turns * 2 * math.pi)) / math.log(flash.compress_rope_theta) for turns in (32, 1)]
lab.check("pairs that make 32 turns, and one", [math.floor(edges[0]), math.ceil(edges[1])], [15, 25], max_abs=0)
lab.check("up to pair 15: as they are", entries[:16], unscaled[:16], max_abs=0)
lab.check("from pair 25 on: a sixteenth", entries[25:], unscaled[25:] / 16, rel=1e-7)
marks = {"window, 128": 128.0, "trained on, 65,536": float(trained), "a million": float(million)}
viz.plot_frequency_tables(tables, ramp=(15, 25), marks=marks)

# %% [markdown]
# ## 3. Pairs are neighbours
#
# Pair $i$ is dims $448 + 2i$ and $449 + 2i$, turned together; a kernel that paired dim $i$ with $i + 32$, as other models do,
# would be wrong in every number and still look like attention. Query heads are first normalised, without a weight. Below: one
# head of nano, and its pairs turned at its token's place.

# %%
heads = observed.find(calls, "q_norm_rope", "layers")[0].inputs
q, place = heads["q"].double(), heads["positions"]
plain = norm.q_norm_rope(q, torch.zeros_like(place), window, eps=eps)
turned = norm.q_norm_rope(q, place, window, eps=eps)
row, shown = 101, [0, 3, 8, 14, 31]
pairs = [part[row, 0, 448:].view(32, 2) for part in (plain, turned)]
viz.plot_pair_planes(
    {"normalised": pairs[0][shown], f"at position {row}": pairs[1][shown]},
    [f"pair {i}\ndims {448 + 2 * i}, {449 + 2 * i}" for i in shown],
)
cos, sin = (f(row * window.double()) for f in (torch.cos, torch.sin))
a, b = pairs[0].unbind(-1)
lab.check(
    "each pair turned by position x frequency", pairs[1], torch.stack((a * cos - b * sin, a * sin + b * cos), -1), rel=1e-5
)
lab.check("lengths stay", pairs[1].norm(dim=-1), pairs[0].norm(dim=-1), rel=1e-12)
lab.check("the other 448 dims pass through", turned[..., :448], plain[..., :448], max_abs=0)

# %% [markdown]
# ## 4. The kernel
#
# A CTA takes eight heads of a token. Lane $l$ of a warp finds sine and cosine of pair $l$ once, shuffles hand them to whoever
# holds that pair, for all heads. The reference works in float64; the kernel's values may be off by $2^{-22}$ of a pair's
# length before the last rounding, so in float32 that is the bar, and of BF16 numbers only a few may differ by a last bit.

# %%
near = torch.tensor([0, 1, million - 1])
cases = {
    "nano": (q[-tokens:].float(), place[-tokens:]),
    "Flash, far": (3 * torch.randn(3, flash_heads, 512), near),
}
for name, (some, where) in cases.items():
    for dtype in (torch.float32, torch.bfloat16):
        for schedule in hopper.schedules(target) if name == "nano" else hopper.schedules(target)[:1]:
            operands = some.to(target, dtype), where.to(target), entries.to(target)
            with hopper.running(target, schedule):
                got = ops.q_norm_rope(*operands, eps=eps)
            want = norm.q_norm_rope(*operands, eps=eps)
            label = f"{name}, {str(dtype)[6:]}, {schedule}"
            if dtype == torch.float32:
                lab.check(label, got, want, max_abs=2.0**-22 * float(want.unflatten(-1, (-1, 2)).norm(dim=-1).max()))
            else:
                lab.check(label, got, want, rel=2.0**-5, row_cosine=0.99999)
                lab.check_that(f"{label}: share that differs", float((got != want).double().mean()), "<=", 2e-4)

# %% [markdown]
# ## 5. Angles at position one million
#
# The model's reference multiplies position and frequency in float32. Near $2^{20}$ such a product is a multiple of $1/16$: the
# angle is off by up to 0.03 rad. That error is **part of the model**, so the kernel takes the same product. Which angle it is,
# the rounding says; from there on sine and cosine must be right.

# %%
positions = torch.unique(torch.logspace(0, 20, 3000, base=2.0, dtype=torch.float64).long())
off = {}
for name, table in {"window": window, "entries": entries}.items():
    exact = positions.double()[:, None] * table.double()
    off[name] = ((positions.float()[:, None] * table).double() - exact).abs().amax(-1)
    lab.record(f"{name}: largest error of an angle", float(off[name].max()), "rad")
half = 2.0 ** (torch.floor(torch.log2(positions.double())) - 24)  # half the distance of float32 numbers there
lab.check_that("error over half a unit, largest", max(float((e / half).max()) for e in off.values()), "<=", 1)
lab.check_that("it comes near 2^-5 rad", max(float(e.max()) for e in off.values()), ">", 0.028)
viz.plot_growing_error(positions, off, bound=half, quantity="error of the angle (rad)")

# %% [markdown]
# The kernel's sines: heads of pairs $(1, 0)$ turned backwards give $(\cos, -\sin)$ exactly. Against float64 of the same
# float32 angle, beside three ways to do less: reduce the angle by $2\pi$ as one float32 number; keep tables in BF16; or be
# "better" and take the exact angle, which is another rotation than the model's.

# %%
far = torch.cat([torch.arange(million - angle_positions // 2, million), torch.randint(0, million, (angle_positions // 2,))])
ones = torch.tensor([1.0, 0.0]).repeat(256).expand(len(far), 1, 512).contiguous()
with hopper.running(target):
    found = (
        ops.inverse_rope(ones.to(target), far.to(target), entries.to(target))[:, 0, 448:].cpu().double().unflatten(-1, (32, 2))
    )
angle = far.float()[:, None] * entries
right = torch.stack((angle.double().cos(), -angle.double().sin()), -1)
reduced = torch.remainder(angle, torch.tensor(2 * math.pi)).double()
exact = far.double()[:, None] * entries.double()
ways = {"kernel": found, "2 pi as one float32": torch.stack((reduced.cos(), -reduced.sin()), -1)}
ways |= {"tables in BF16": right.bfloat16().double(), "exact angle": torch.stack((exact.cos(), -exact.sin()), -1)}
errors = {name: (part - right).abs().flatten() for name, part in ways.items()}
for name, error in errors.items():
    lab.record(f"{name}: largest error of a sine or cosine", float(error.max()))
lab.check_that("kernel, in units of 2^-24", float(errors["kernel"].max()) * 2**24, "<=", 1.2)
viz.plot_error_histogram(errors, unit="of a sine or cosine", quantiles=())


# %% [markdown]
# ## 6. Why the output is turned back
#
# Keys are the values, so a sum of values carries their rotation: $o = \sum_s p_s R_s v_s$. Turned back by the query's own
# angle, $R_{-t}\, o = \sum_s p_s R_{s-t} v_s$ knows distances alone. The same 64 tokens of nano, once at the beginning of a text
# and once 1,000 tokens later:

# %%
def attended(shift):
    """The output of the last of 64 queries, (heads, 512), as attended and turned back."""
    at = torch.arange(64) + shift
    keys = rope.rope(norm.rmsnorm(written[0]["x"][:64].double(), written[0]["norm_weight"], eps=eps), at, window)
    queries = norm.q_norm_rope(q[63:64], at[63:], window, eps=eps)[0]
    p = torch.softmax(queries @ keys.t() / 512**0.5, dim=-1)
    return p @ keys, rope.inverse_rope((p @ keys)[None], at[63:], window)[0]


(here, back), (later, later_back) = attended(0), attended(1000)
lab.check("turned back: no trace of the place", later_back, back, rel=2e-3)
lab.record("as attended: cosine of the rotary dims, here and 1,000 later", lab.compare(later[:, 448:], here[:, 448:]).cosine)
ways = {"here": here, "1,000 later": later, "here, turned back": back, "later, turned back": later_back}
cut = {name: part[0, 448:].view(32, 2)[[1, 2, 5, 9]] for name, part in ways.items()}
viz.plot_pair_planes(cut, [f"pair {i}" for i in (1, 2, 5, 9)])

# %% [markdown]
# ## 7. Turned back and quantised
#
# The product that follows (`o_a`) may take FP8 or NVFP4; fused, the heads are read once and only codes are written. Codes are
# checked in two steps: the turned BF16 values against the reference, then the codes of exactly those values, byte for byte.

# %%
out = observed.find(calls, "attention", "layers")[0].output[-tokens:].bfloat16()
out = torch.cat([out, 0.1 * torch.randn_like(out)], dim=1).to(target)  # 8 heads
where, table = place[-tokens:].to(target) + 900_000, window.to(target)
with hopper.running(target, hopper.schedules(target)[-1]) as run:
    same = ops.inverse_rope(out, where, table)
    codes8 = ops.inverse_rope_fp8(out, where, table, group=128)
    codes4 = ops.inverse_rope_nvfp4(out, where, table, global_scale=scale)
    free4 = ops.inverse_rope_nvfp4(out, where, table)
lab.check("inverse_rope", same, rope.inverse_rope(out, where, table), rel=2.0**-5, row_cosine=0.99999)
wanted = {
    "FP8": (codes8, quant.quantize_fp8_rows(same, group=128)),
    "NVFP4, g given": (codes4, quant.quantize_nvfp4(same, global_scale=scale)),
    "NVFP4, g computed": (free4, quant.quantize_nvfp4(same, global_scale=free4[2])),
}
for name, (got, want) in wanted.items():
    wrong = sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in zip(got[:2], want[:2], strict=True))
    lab.check_that(f"{name}: bytes that differ from the codes of the turned values", wrong, "==", 0)
lab.check("global scale", free4[2], quant.quantize_nvfp4(same)[2], rel=1e-7)

# %% [markdown]
# ## 8. Each byte once, and what it takes
#
# What threads of a simulated launch really moved; registers of the four kernels.

# %%
on_host = [part.cpu() for part in (out, where, table)]
(trace,) = hopper.traces(cpu, lambda: ops.inverse_rope_fp8(*on_host, group=128))
traffic = trace.traffic()
largest = {way: max((r for r in traffic.rows if r.direction == way), key=lambda r: r.once) for way in ("read", "written")}
lab.check("heads are read, codes written: times", [row.factor for row in largest.values()], [1, 1], max_abs=0)
viz.plot_traffic(**traffic.figure())
with hopper.running(cpu) as run:
    ops.q_norm_rope(*on_host, eps=eps)
    ops.inverse_rope(*on_host)
    ops.inverse_rope_fp8(*on_host, group=128)
    ops.inverse_rope_nvfp4(*on_host, global_scale=scale.cpu())
calls = "q_norm_rope", "inverse_rope", "inverse_rope_fp8", "inverse_rope_nvfp4"
viz.plot_resources(**sections.print_uses(run.launches, cache, calls, most_spilled=32))

# %% [markdown]
# ## 9. Predicted and measured
#
# Predicted: bytes over the bandwidth of a copy. A token alone waits for a launch and two trips to memory; the bar is 6 us. With
# `device="cuda"` Flash's heads are timed here, cold, replayed from CUDA graphs.

# %%
m, count = profile_shape
values = dict(zip(calls, (4.0, 4.0, 3 + 1 / 128, 2.5 + 1 / 16), strict=True))  # bytes of a value, in and out
work = {f"{name} flash": roofline.Work(m * count * 512 * each, 0.0) for name, each in values.items()}
bound, time = sections.print_floors(work, base, m)
if time:
    viz.plot_predicted(bound, time, quantity=f"time of {m} tokens (us)", words=("bound", "measured"))

# %%
if target.type == "cuda":
    big, at = torch.randn(m, count, 512, device=target).bfloat16(), torch.arange(m, device=target)
    more = {"q_norm_rope": {"eps": eps}, "inverse_rope_fp8": {"group": 128}, "inverse_rope_nvfp4": {"global_scale": scale}}
    runs = {f"{n} flash": lambda n=n: getattr(ops, n)(big, at, table, **more.get(n, {})) for n in calls}
    print(hopper.table(hopper.profile(target, runs, work, roofline.measure_ceilings(target))))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - Norms are the reference's to the bit, in sixteen, eight and four bits; heads but for last bits of a few numbers.
# - An angle at position one million is off by up to 0.03 rad, in the model itself. The kernel keeps that product and gets its
#   sine right to a unit; a reduction by one float32 $2\pi$ would add as much error again.
# - Values carry their key's rotation. Turned back, the output knows distances alone.
# - Each byte moves once; quantising on the way costs registers, not traffic.
#
# **Next:** [13 · The paged cache](13_kv_cache.ipynb)
