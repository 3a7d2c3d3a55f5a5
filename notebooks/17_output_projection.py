# %% [markdown]
# # 17 · The output projection
#
# **Question.** Attention ends in 64 heads of 512 numbers, eight times the width of the model. How do they get back, with how
# many weights and bits, and where does the rotation go?
#
# Operations: `inverse_rope`, `grouped_linear` (`o_a`), `linear` (`o_b`); kernels in `dsv4lab/kernels/{rope,gemm}/`.
#
# **Needs** a C compiler or a Hopper GPU; notebooks 09 and 12 help. **Takes** half a minute on two CPU cores, longer where
# kernels have yet to be compiled. With `device="cuda"` the same cells run natively, and the last section measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
text_tokens = 512  # whose outputs are studied
tokens = 11  # of a comparison, an odd number
profile_tokens = [1, 64, 4096]  # of the last section
measured = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.config import ModelConfig
from dsv4lab.formats import NVFP4, PackedWeight
from dsv4lab.kernels._common import cache
from dsv4lab.lab import baselines, hopper, observed, perplexity, roofline, rounding, sections
from dsv4lab.reference import gemm, quant, rope

target, cpu = lab.setup(seed, device), torch.device("cpu")
model = dsv4lab.load(checkpoint or dsv4lab.nano(), device=cpu, dtype=torch.bfloat16)
base, config = baselines.newest("linear", measured), model.config
groups, rank = config.o_groups, config.o_lora_rank

# %%
lab.environment(target)

# %% [markdown]
# ## 1. The way back
#
# Turn each head back by its query's position (notebook 12), cut the heads into $G$ groups, give each group a matrix of its own,
# then join:
#
# $$z_g = A_g\, [R_{-t}\, o]_g, \qquad y = B\, [z_1; \dots; z_G].$$
#
# Nano's own, step by step, on text that it was not trained on.

# %%
ids = perplexity.held_out_windows(model.tokenizer, count=1, length=text_tokens)[0][:text_tokens]
with ops.observe() as calls:
    model.logits(ids[None], step=text_tokens)
turned, low, given = {}, {}, {}
for i, kind in enumerate(config.layer_kinds):
    name = f"{i} {kind}"
    given[name] = observed.only(calls, "inverse_rope", f"layers.{i}").inputs
    grouped = observed.only(calls, "grouped_linear", f"layers.{i}")
    turned[name], low[name] = grouped.inputs["x"], grouped.output
    back = rope.inverse_rope(*given[name].values()).view_as(turned[name])
    lab.check(f"layer {name}: heads turned back, in {groups} groups", turned[name], back, max_abs=0)
layers = {name: model.layers[int(name[0])].attn for name in turned}
a = {name: quant.dequantize(one.wo_a.weight).double().unflatten(0, (groups, -1)) for name, one in layers.items()}
b = {name: quant.dequantize(one.wo_b.weight).double() for name, one in layers.items()}
z = {name: torch.einsum("mgk,grk->mgr", x.double(), a[name]) for name, x in turned.items()}
y = {name: part.flatten(1) @ b[name].t() for name, part in z.items()}
for name in z:
    lab.check(f"layer {name}: A by hand", low[name], z[name], row_cosine=0.99999)
print("heads", tuple(given["0 SWA"]["x"].shape), "groups", tuple(turned["0 SWA"].shape), "low", tuple(z["0 SWA"].shape))

# %% [markdown]
# What if nobody turned back? The product is linear, so $A$ would have to know where the query stands. The cosine of $y$ with
# what it should be, token by token:

# %%
unturned, shares = {}, {}
for name, one in given.items():
    x = one["x"].double().view_as(turned[name])
    other = torch.einsum("mgk,grk->mgr", x, a[name]).flatten(1) @ b[name].t()
    unturned[name] = torch.cosine_similarity(other, y[name])
    shares[name] = float(x.unflatten(-1, (-1, 512))[..., 448:].square().sum() / x.square().sum())
    lab.record(f"layer {name}: share of the output's energy in rotary dims", shares[name])
viz.plot_cosine_depth({"not turned back": torch.stack(list(unturned.values()))}, layer_names=list(unturned))
lab.check_that("not turned back: best median of a layer", max(float(c.median()) for c in unturned.values()), "<", 0.95)

# %% [markdown]
# ## 2. Why groups
#
# A full matrix for Flash would have $64 \cdot 512 \cdot 4096$ = 134 million weights. One low-rank pair of the same inner width
# 1,024 is cheap, but $y$ would lie in 1,024 dims. With $G$ groups, $A$ costs the same whatever $G$ is, since each group reads a
# $G$-th of the heads; the inner width is $G$ times as large, and only $B$ pays for it.

# %%
rows = []
for name, c in {"Flash": ModelConfig.flash(), "Pro": ModelConfig.pro(), "nano": config}.items():
    wide, d = c.num_attention_heads * c.head_dim, c.hidden_size
    for g in sorted({1, c.o_groups}):
        pair = wide * c.o_lora_rank + g * c.o_lora_rank * d
        rows.append({"model": name, "groups": g, "inner width": g * c.o_lora_rank, "model's width": d}
                    | {"million weights": pair / 1e6, "of a full matrix": f"{100 * pair / (wide * d):.0f} %"})  # fmt: skip
print(hopper.table(rows))
flash = ModelConfig.flash()
lab.check_that("Flash: inner width over the model's", flash.o_groups * flash.o_lora_rank / flash.hidden_size, ">=", 1)

# %% [markdown]
# Does the model use those dims? Singular values of nano's outputs $y$ of the text, and of the whole matrix $B A$: what the best
# approximation of each rank leaves out. A single group of nano's would end at the first line.

# %%
whole = {name: torch.cat([b[name].unflatten(1, (groups, -1))[:, g] @ a[name][g] for g in range(groups)], 1) for name in a}
for name in whole:
    lab.check(f"layer {name}: one matrix", turned[name].double().flatten(1) @ whole[name].t(), y[name], rel=1e-9)
spectra = {f"outputs, {name}": torch.linalg.svdvals(y[name]) for name in y}
spectra |= {f"B A, {name}": torch.linalg.svdvals(whole[name]) for name in whole}
viz.plot_spectrum(spectra, marks={"one group": rank, "two": 2 * rank})
left = {name: float(1 - one.square()[:rank].sum() / one.square().sum()) for name, one in spectra.items()}
if not checkpoint:  # what the text says of nano
    lab.check_that("energy of outputs beyond one group, least", min(v for k, v in left.items() if k[0] == "o"), ">", 0.01)

# %% [markdown]
# ## 3. Fewer bits into A
#
# The model's own code keeps the input of $A$ in BF16; engines quantise it, FP8 in groups of 128 or NVFP4 in blocks of 16. What
# becomes of the error? If errors of different dims are independent, with variances $\sigma_i^2$, then
#
# $$\mathbb{E}\,|\delta y|^2 = \sum_i \sigma_i^2\, |W_i|^2, \qquad W = BA,$$
#
# with $W_i$ its columns: an error is worth what the matrix makes of its dim.

# %%
acts = {"FP8": "fp8", "NVFP4": "nvfp4"}
predicted, found, errors = {}, {}, {}
for name, x in turned.items():
    for form, act in acts.items():
        seen = gemm.quantize_activation(x.flatten(0, 1), act).view_as(x).double()
        delta = (seen - x.double()).flatten(1)
        errors[f"{form}, {name}"] = delta.square().mean(0).sqrt() / x.double().square().mean().sqrt()
        variance = delta.square().mean(0)
        want = (variance.unflatten(0, (groups, -1))[:, None] * a[name].square()).sum().mul(len(x)).sqrt() / z[name].norm()
        predicted[f"z, {form}, {name}"] = float(want)
        moved = torch.einsum("mgk,grk->mgr", seen, a[name])
        found[f"z, {form}, {name}"] = rounding.relative_rms(moved, z[name]).value
        want = (variance * whole[name].square()).sum().mul(len(x)).sqrt() / y[name].norm()
        predicted[f"y, {form}, {name}"] = float(want)
        found[f"y, {form}, {name}"] = rounding.relative_rms(moved.flatten(1) @ b[name].t(), y[name]).value
viz.plot_predicted(predicted, found, quantity="relative RMS error (no unit)")
off = max(abs(value / predicted[name] - 1) for name, value in found.items())
lab.check_that("measured over predicted, furthest from 1", off, "<=", 0.15)

# %%
shown = {name: error[:512] for name, error in errors.items() if name[-3:] == "CSA"}
viz.plot_dim_errors(shown, split=448, words=("448 dims", "64 rotary dims"), quantity="RMS error over the input's RMS, head 0")
ratio = [found[f"y, NVFP4, {name}"] / found[f"y, FP8, {name}"] for name in turned]
lab.record("error of y, NVFP4 over FP8, by layer", ", ".join(f"{r:.1f}" for r in ratio))
lab.check_that("NVFP4 over FP8, least", min(ratio), ">", 2)

# %% [markdown]
# ## 4. The kernels
#
# `grouped_linear` is the product of notebook 09 with one more index: all groups in one launch, weights decoded on the way, here
# nano's FP8 blocks and the same matrix as NVFP4. Then the path as a layer calls it, from rotated heads to $y$.

# %%
name = "1 CSA"
own = layers[name].wo_a.weight
codes, block_scale, scale = quant.quantize_nvfp4(quant.dequantize(own))
weights = {"FP8 blocks": own, "NVFP4": PackedWeight(NVFP4, codes, block_scale, scale)}
x = turned[name][-tokens:].to(target)
for form, weight in weights.items():
    here = PackedWeight(weight.format, *(None if t is None else t.to(target) for t in (weight.codes, weight.scale, weight.global_scale)))
    for act in ("none", "fp8", "nvfp4"):
        for schedule in hopper.schedules(target):
            with hopper.running(target, schedule):
                got = ops.grouped_linear(x, here, act=act)
            want = gemm.grouped_linear(x, here, act=act)
            lab.check(f"A in {form}, input {act}, {schedule}", got, want, row_cosine=0.9999, rel=0.05)

# %%
cosines = {}
for name, one in given.items():
    attn, few = layers[name].to(target), slice(text_tokens - tokens, text_tokens)
    heads, where, freq = one["x"][few].to(target), one["positions"][few].to(target), one["inv_freq"].to(target)
    steps = []
    for context in (hopper.running(target, hopper.schedules(target)[-1]), dsv4lab.backend("reference")):
        with context:
            out = ops.inverse_rope(heads, where, freq)
            inner = attn.wo_a(out.view(tokens, groups, -1))
            steps.append([out.flatten(1), inner.flatten(1), attn.wo_b(inner.flatten(1))])
    cosines[name] = torch.stack([torch.cosine_similarity(g.double(), w.double()) for g, w in zip(*steps, strict=True)]).cpu()
    layers[name].to(cpu)
    lab.check_that(f"layer {name}: worst cosine of y", float(cosines[name][-1].min()), ">=", 0.999)
viz.plot_cosine_depth(cosines, layer_names=["turned back", "z", "y"], bar=0.999).set_xlabel("after");

# %% [markdown]
# Fused with the rotation (notebook 12), codes come straight from the heads. Decoded, they are what `act="fp8"` would have made:

# %%
heads, where, freq = (given["1 CSA"][n].to(target) for n in ("x", "positions", "inv_freq"))
heads, where, here = heads[-tokens:], where[-tokens:], layers["1 CSA"].to(target).wo_a.weight
with hopper.running(target):
    fused = ops.inverse_rope_fp8(heads, where, freq, group=128)
    x = ops.inverse_rope(heads, where, freq).view(tokens, groups, -1)
    from_codes = quant.dequantize_fp8_rows(*(part.flatten(0, 1) for part in fused), group=128).to(torch.bfloat16).view_as(x)
    got, want = ops.grouped_linear(from_codes, here, act="none"), ops.grouped_linear(x, here, act="fp8")
lab.check("z from codes and z from heads", got, want, rel=0.02, row_cosine=0.99999)

# %% [markdown]
# ## 5. What it moves and uses
#
# Each weight is read once for all tokens.

# %%
host = layers["1 CSA"].to(cpu)
few = turned["1 CSA"][-tokens:]
(trace,) = hopper.traces(cpu, lambda: host.wo_a(few))
viz.plot_traffic(**trace.traffic().figure())
with hopper.running(cpu) as launched:
    ops.inverse_rope(given["1 CSA"]["x"][-tokens:], given["1 CSA"]["positions"][-tokens:], given["1 CSA"]["inv_freq"])
    host.wo_b(host.wo_a(few).flatten(1))
viz.plot_resources(**sections.print_uses(launched.launches, cache, ["inverse_rope", "o_a", "o_b: FP8 rows", "o_b"]))

# %% [markdown]
# ## 6. Predicted and measured
#
# Flash: 33.5 million weights in each of the two, NVFP4 at 4.5 bits. Up to some sixty tokens the bytes bind, beyond them the
# products.

# %%
m = profile_tokens[-1]
weights_of = float(flash.o_groups * flash.o_lora_rank * flash.hidden_size)
inner = flash.o_groups * flash.o_lora_rank
wide = flash.num_attention_heads * flash.head_dim
work = {"flash wo_a": roofline.Work(weights_of * 4.5 / 8 + 2.0 * m * (wide + inner), 2.0 * m * weights_of)}
work["flash wo_b"] = roofline.Work(weights_of * 4.5 / 8 + 2.0 * m * (inner + flash.hidden_size), 2.0 * m * weights_of)
sections.print_floors(work, base, m)
bound, time = baselines.bound_and_time([row for n in work for row in base.where(shape=n)], "{shape}, {m} tokens")
if time:
    viz.plot_predicted(bound, time, quantity="time (us)", words=("bound", "measured"))

# %%
if target.type == "cuda":
    codes = torch.randint(0, 256, (inner, 2048), dtype=torch.uint8, device=target)
    scales = torch.randint(0x20, 0x50, (inner, 256), dtype=torch.uint8, device=target).view(torch.float8_e4m3fn)
    big = PackedWeight(NVFP4, codes, scales, torch.tensor(0.01, device=target))
    runs, each = {}, {}
    for m in profile_tokens:
        heads = torch.randn(m, flash.o_groups, 4096, device=target).bfloat16()
        runs[f"{m} tokens"] = lambda heads=heads: ops.grouped_linear(heads, big, act="none")
        each[f"{m} tokens"] = roofline.Work(weights_of * 4.5 / 8 + 2.0 * m * (wide + inner), 2.0 * m * weights_of)
    print(hopper.table(hopper.profile(target, runs, each, roofline.measure_ceilings(target))))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - Turned back, heads mean the same everywhere; the projection needs no positions.
# - Groups buy inner width: as many weights in $A$, $G$ times the rank, and nano uses it.
# - What a rounded input does to the output follows from the variances of its dims and the columns of $BA$.
#
# **Next:** [18 · A layer's attention](18_layer.ipynb)
