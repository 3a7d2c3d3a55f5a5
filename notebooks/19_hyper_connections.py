# %% [markdown]
# # 19 · Hyper-connections
#
# **Question.** V4 has four residual streams instead of one, mixed anew at every sub-layer. What keeps them from growing or
# dying, how exact must their coefficients be, and would anybody notice a mixing matrix used the wrong way round?
#
# Operations: `mhc_pre`, `mhc_post`, `mhc_post_pre`, `embed_streams`; kernels in `dsv4lab/kernels/mhc/`.
#
# **Needs** a C compiler or a Hopper GPU; notebook 01 introduces the streams. **Takes** half a minute on two CPU cores, longer
# where kernels have yet to be compiled. With `device="cuda"` the same cells run natively, and the last section measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
text_tokens = 256  # whose streams are studied
tokens = 11  # of a comparison, an odd number
wide_tokens = 3  # at Flash's width
profile_tokens = [1, 8, 8192]  # of the last section
measured = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import copy
import dataclasses

import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.config import ModelConfig
from dsv4lab.kernels._common import cache
from dsv4lab.kernels.mhc.config import TogetherConfig
from dsv4lab.lab import baselines, hopper, observed, perplexity, roofline, rounding, sections
from dsv4lab.model.block import Block
from dsv4lab.reference import mhc, quant

target, cpu = lab.setup(seed, device), torch.device("cpu")
model = dsv4lab.load(checkpoint or dsv4lab.nano(), device=cpu, dtype=torch.float32)
base, config, flash = baselines.newest("mhc", measured), model.config, ModelConfig.flash()
how = dict(eps=config.rms_norm_eps, hc_eps=config.hc_eps)
full = how | dict(sinkhorn_iters=config.hc_sinkhorn_iters)

# %%
lab.environment(target)


# %% [markdown]
# ## 1. Three sets of coefficients
#
# A token's streams $X_0 \dots X_3$, one after the other, are a vector $v$ of $4D$ numbers. A matrix of 24 rows makes of it
#
# $$m = \frac{W v}{\mathrm{rms}(v)}, \qquad \mathrm{pre}_j = \sigma(s_0 m_j + b_j) + \epsilon, \qquad
# \mathrm{post}_j = 2\,\sigma(s_1 m_{4+j} + b_{4+j}), \qquad A_{ji} = s_2 m_{8+4j+i} + b_{8+4j+i},$$
#
# and `comb` is $A$ after 20 iterations of Sinkhorn. A sub-layer $F$ reads $u$ through a norm and writes to every stream:
#
# $$u = \sum_j \mathrm{pre}_j X_j, \qquad X'_i = \mathrm{post}_i\, F(u) + \sum_j \mathrm{comb}_{ji} X_j .$$
#
# Spelled out in float64, against the reference, on text that nano was not trained on:

# %%
def by_hand(streams, fn, base, scale, *, iters=config.hc_sinkhorn_iters):
    """pre, post (M, 4), comb (M, 4, 4), as the equations have them."""
    v, base, scale = streams.double().flatten(1), base.double(), scale.double()
    m = v @ fn.double().t() / (v.square().mean(-1, keepdim=True) + how["eps"]).sqrt()
    pre = torch.sigmoid(scale[0] * m[:, :4] + base[:4]) + how["hc_eps"]
    post = 2 * torch.sigmoid(scale[1] * m[:, 4:8] + base[4:8])
    a = (scale[2] * m[:, 8:] + base[8:]).view(-1, 4, 4).softmax(-1) + how["hc_eps"]
    a = a / (a.sum(-2, keepdim=True) + how["hc_eps"])  # columns: each sum runs over j
    for _ in range(iters - 1):
        a = a / (a.sum(-1, keepdim=True) + how["hc_eps"])  # rows
        a = a / (a.sum(-2, keepdim=True) + how["hc_eps"])
    return pre, post, a


# %%
def apart(got, want):
    """The largest relative difference."""
    return float(((got.double() - want.double()).abs() / want.double().abs()).max())


# %%
windows = perplexity.held_out_windows(model.tokenizer, count=1, length=text_tokens)
with ops.observe() as calls:
    logits = model.logits(windows[:, :-1], step=text_tokens)
sites = observed.mhc_sites(calls)
made = [c for c in calls if c.name in ("mhc_pre", "mhc_post_pre") and c.scope.startswith("layers.")]
mixes = {s.name: [c.inputs[k] for k in ("fn", "base", "scale", "norm_weight")] for s, c in zip(sites, made, strict=True)}
for site in sites:
    found = [getattr(site, part) for part in ("pre", "post", "comb")]
    worst = max(map(apart, found, by_hand(site.streams, *mixes[site.name][:3])))
    lab.check_that(f"{site.name}: reference against float64 by hand", worst, "<=", 1e-5)

# %% [markdown]
# ## 2. The kernels
#
# Streams are needed twice, by the product with $W$ and by the sum that becomes $u$, with every coefficient between. They should
# come from memory once. There are two ways to do that; width and number of tokens choose.
#
# **One pass** (`together.py`, `together_streams.py`): $D$ a multiple of 1,024. Flash's BF16 rows take it always, Pro's from 64 tokens
# on, fused with `post` from 384. A cluster of 16 CTAs shares $D$. Each keeps its sixteenth of $W$ for the whole launch and tiles of
# 16 tokens in shared memory until they are collapsed, so that every CTA has sums over its columns only. It sends those of token
# $t$ to CTA $t$, which makes that token's coefficients and sends `pre` and the length of $u$ to all: messages of 16 bytes
# or 4, written by `st.async` into the other's shared memory, where an mbarrier counts bytes. A CTA's warps, of Flash and Pro:
#
# | Warps | Do |
# |---|---|
# | 1 | load tiles by TMA: streams, with `post` also $y$ and old coefficients |
# | 8 | multiply by $W$ and streams by each other; with `post` they write new streams in their places first |
# | 2 | every other tile each: add up sums, send them, make and send coefficients |
# | 1 | Sinkhorn, 8 tokens at once, a lane each |
# | 4 | collapse and store $x$, when coefficients have come; with `post` store new streams |
#
# The norm divides by the length of $u$ over all of $D$. Nobody has that much of $u$, and another exchange would be waited for.
# But
#
# $$|u|^2 = \sum_{ij} \mathrm{pre}_i\, \mathrm{pre}_j\, X_i \cdot X_j,$$
#
# and the products of the streams do not depend on coefficients: tensor cores make all 16 beside the projection, they travel with
# its sums, and the CTA that makes a token's coefficients makes its length.
#
# **Side by side** (`project.py`, `finish.py`): any other width, nano's 128 too, and few tokens of Pro, whose $W$ a cluster takes
# longer to read than all multiprocessors. Two launches: one multiplies with $W$ and leaves sums, the other has a token's streams
# in shared memory already, waits for its sums, makes coefficients, collapses and applies the norm. Up to 8 tokens of Pro, one
# launch of both: 8 CTAs, a cluster, share the columns of a token.
#
# Nano's sites, then, are the second's. Bars: coefficients within $10^{-5}$ of the exact ones, sums of rows and columns within
# $10^{-4}$ on matrices that 20 iterations finish.

# %%
for site in sites:
    few, mix = site.streams[-tokens:].bfloat16(), mixes[site.name]
    pre, post, comb = by_hand(few, *mix[:3])
    want = mhc.mhc_pre(few, *mix, **full)[0]
    for schedule in hopper.schedules(target):
        with hopper.running(target, schedule):
            x, *found = ops.mhc_pre(few.to(target), *(w.to(target) for w in mix), **full)
        worst = max(apart(got.cpu(), right) for got, right in zip(found, (post, comb), strict=True))
        lab.check_that(f"{site.name}, {schedule}: post and comb against float64", worst, "<=", 1e-5)
    lab.check(f"{site.name}: what the sub-layer reads", x, want, row_cosine=0.99999, mean_rel=1e-3)

# %% [markdown]
# The length by products, in float32 as the kernel's, against the sum itself. Products round relative to their terms, so streams
# that cancel each other cost places; nano's do not:

# %%
off = {}
for site in sites:
    few, pre = site.streams[-tokens:].bfloat16(), site.pre[-tokens:]
    products = few.float() @ few.float().mT
    square = torch.einsum("mi,mj,mij->m", pre, pre, products)
    direct = (pre.double()[..., None] * few.double()).sum(1).square().sum(-1)
    off[site.name] = float((square / direct - 1).abs().max())
lab.check_that("length of u squared: products against the sum, furthest off", max(off.values()), "<=", 1e-5)

# %% [markdown]
# Between two sub-layers `post` and the next `pre` are one operation, so that the streams pass by once. It must be the two
# after each other, **bit for bit**:

# %%
fused = {c.scope.removeprefix("layers."): c.inputs for c in calls if c.name == "mhc_post_pre" and c.scope[:7] == "layers."}
for name, given in fused.items():
    y, streams = (given[k][-tokens:].bfloat16().to(target) for k in ("y", "streams"))
    post, comb = (given[k][-tokens:].to(target) for k in ("post", "comb"))
    mix = [given[k].to(target) for k in ("fn", "base", "scale", "norm_weight")]
    with hopper.running(target):
        together = ops.mhc_post_pre(y, streams, post, comb, *mix, **full)
        new = ops.mhc_post(y, streams, post, comb)
        apiece = (new, *ops.mhc_pre(new, *mix, **full))
    lab.check(f"{name}: new streams", new, mhc.mhc_post(y, streams, post, comb), row_cosine=0.99999, rel=0.05)
    lab.check_that(f"{name}: fused is post, then pre", all(map(torch.equal, together, apiece)), "==", 1)

# %% [markdown]
# Where a four- or eight-bit linear follows, the norm's row may leave as codes: of FP8 with a scale for 128, or of NVFP4. They are
# those that the quantiser gives of the BF16 row of the same configuration, in every bit.

# %%
for act, given in {"fp8": None, "nvfp4": torch.tensor(1 / 128, device=target)}.items():
    with hopper.running(target):
        codes, block, *rest = ops.mhc_pre_quantized(new, *mix, given, act=act, **full)
        again = ops.mhc_post_pre_quantized(y, streams, post, comb, *mix, given, act=act, **full)
        x = ops.mhc_pre(new, *mix, **full)[0]
    want = quant.quantize_fp8_rows(x, group=128) if given is None else quant.quantize_nvfp4(x, global_scale=given)
    same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip((codes, block), want, strict=False)]
    lab.check_that(f"{act}: the quantiser's bytes", all(same), "==", 1)
    lab.check_that(f"{act}: fused is post, then pre", all(map(torch.equal, again, (new, codes, block, *rest))), "==", 1)

# %% [markdown]
# ## 3. How exact the product must be
#
# $W$ is float32, streams are BF16, and tensor cores multiply BF16. A float32 is the sum of three BF16 of 8 bits each; with fewer
# parts, or TF32's 11 bits, $W$ is off by $\delta$. If errors are independent, the relative error of $m$ is
# $\sqrt{\sum \delta^2 / \sum W^2}$. At Flash's width, $K = 16{,}384$, where `mhc_pre` is one pass:

# %%
d = flash.hidden_size
streams = torch.randn(wide_tokens, 4, d).bfloat16()
mix = [(4 * d) ** -0.5 * torch.randn(24, 4 * d), torch.randn(24), torch.ones(3), torch.ones(d).bfloat16()]
flash_args = (streams, *mix)
fn, (pre, post, comb) = mix[0], by_hand(streams, *mix[:3])
parts, rest = [], fn
for _ in range(3):
    parts.append(rest.bfloat16().float())
    rest = rest - parts[-1]
less = {f"{n} BF16 part{'s' * (n > 1)}": sum(parts[:n]) for n in (1, 2)}
less["TF32"] = ((fn.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
lab.check("three parts are the float32", sum(parts), fn, max_abs=0)
m = streams.double().flatten(1) @ fn.double().t()
predicted = {name: float((w - fn).double().norm() / fn.double().norm()) for name, w in less.items()}
found = {name: rounding.relative_rms(streams.double().flatten(1) @ w.double().t(), m).value for name, w in less.items()}
viz.plot_predicted(predicted, found, quantity="relative RMS error of m (no unit)")
off = max(abs(found[name] / predicted[name] - 1) for name in less)
lab.check_that("measured over predicted, furthest from 1", off, "<=", 0.4)

# %%
for name, part in less.items():
    lab.record(f"{name}: comb off by", apart(by_hand(streams, part, *mix[1:3])[2], comb))
with hopper.running(target) as wide:
    _, *found = ops.mhc_pre(streams.to(target), *(w.to(target) for w in mix), **full)
worst = max(apart(got.cpu(), right) for got, right in zip(found, (post, comb), strict=True))
lab.check_that("the kernel, three parts: post and comb off by", worst, "<=", 1e-5)
for axis, what in ((-1, "rows"), (-2, "columns")):
    lab.check_that(f"sums of {what} off 1", (found[1].sum(axis) - 1).abs().max(), "<=", 1e-4)

# %% [markdown]
# ## 4. Streams through nano
#
# How large each stream is at every site.

# %%
names = [site.name for site in sites]
rms = torch.stack([site.streams.square().mean(-1).sqrt() for site in sites])
viz.plot_stream_norms(rms, site_names=names);

# %% [markdown]
# Why doubly stochastic? If rows sum to 1, no mixing changes the **sum** of the streams; it is a plain residual stream:
#
# $$\sum_i X'_i = \sum_j X_j + \Big(\sum_i \mathrm{post}_i\Big) y .$$
#
# The last iteration divides columns, so rows are what is left unfinished: the sum leaks $\sum_j (r_j - 1) X_j$, $r_j$ the sums
# of rows. Predicted from `comb` alone, and measured from streams that the model stored:

# %%
outputs = [c for c in calls if c.name in ("mhc_post_pre", "mhc_post") and c.scope.startswith("layers.")]
leak, drift = {}, {}
for site, call in zip(sites, outputs, strict=True):
    a, new = call.inputs, call.output if call.name == "mhc_post" else call.output[0]
    before, after = a["streams"].double(), new.double().sum(1)
    plain = before.sum(1) + a["post"].double().sum(-1, keepdim=True) * a["y"].double()
    r = a["comb"].double().sum(-1)
    leak[site.name] = float(((r - 1)[..., None] * before).sum(1).norm() / after.norm())
    drift[site.name] = float((after - plain).norm() / after.norm())
viz.plot_predicted(leak, drift, quantity="what the sum of streams leaks, of its size (no unit)")
off = max(abs(drift[name] - leak[name]) for name in names)
lab.check_that("measured less predicted, largest", off, "<=", 1e-6)

# %% [markdown]
# ## 5. Sinkhorn, iteration by iteration
#
# Columns are right after every iteration, to `hc_eps`; rows converge as fast as the limit's $\sigma_2^2$ lets them (notebook
# 01). The kernel takes the count at run time.

# %%
every = torch.cat([site.logits for site in sites])
steps = torch.stack([mhc.sinkhorn(every, iters=i, eps=config.hc_eps) for i in range(1, 21)])
viz.plot_sinkhorn(steps, tolerance=1e-4)
late = (steps[-1].sum(-1) - 1).abs().amax(-1)
lab.record("share of matrices whose rows are within 1e-4 after 20", float((late <= 1e-4).double().mean()))
name, few = names[-1], sites[-1].streams[-tokens:].bfloat16()
for iters in (1, 2, 5, 20, 64):
    with hopper.running(target):
        comb = ops.mhc_pre(few.to(target), *(w.to(target) for w in mixes[name]), **how, sinkhorn_iters=iters)[2]
    lab.check_that(f"{iters} iterations", apart(comb.cpu(), by_hand(few, *mixes[name][:3], iters=iters)[2]), "<=", 1e-5)


# %% [markdown]
# What are iterations worth to the model? Nano with fewer, against nano with 20: the divergence of what it predicts next.

# %%
def changed(change):
    """Logits of a copy of the model to whose blocks and modules something was done."""
    other = copy.deepcopy(model)
    change(other)
    with ops.observe() as seen:
        return other.logits(windows[:, :-1], step=text_tokens), seen


def iterations(count):
    """A change: so many iterations of Sinkhorn."""
    def change(other):
        for layer in other.layers:
            layer.config = dataclasses.replace(config, hc_sinkhorn_iters=count)
    return change


# %%
log_p, counts = torch.log_softmax(logits, -1), [1, 3, 10]
gone = [float(perplexity.divergence(log_p, torch.log_softmax(changed(iterations(n))[0], -1)).mean()) for n in counts]
ax = viz.plot_growing_error(counts, {"against 20": gone}, quantity="divergence of predictions (nats)")
ax.set(xlabel="Sinkhorn iterations")
ax.set_xticks(counts, counts)
ax.lines[0].set(markersize=9, linestyle="-")
lab.check_that("3 iterations over 1, divergence", gone[1] / gone[0], "<", 0.8)


# %% [markdown]
# ## 6. The wrong transpose
#
# `comb` is summed over its first index. Its transpose is as doubly stochastic, where Sinkhorn has finished: no sum, no norm and
# no shape tells. A block that has it the wrong way round, in all layers:

# %%
class Backwards(Block):
    """A block whose streams are mixed by the transpose."""

    def forward(self, streams, batch, held):
        """As the block's own."""
        with ops.scope("attn"):
            x, post, comb = ops.mhc_pre(streams, *self.hc_attn.tensors, self.attn_norm.weight, **full)
            y = self.attn(x, batch, held)
        with ops.scope("ffn"):
            mix = (*self.hc_ffn.tensors, self.ffn_norm.weight)
            streams, x, post, comb = ops.mhc_post_pre(y, streams, post, comb.mT, *mix, **full)
            return ops.mhc_post(self.ffn(x, batch.token_ids), streams, post, comb.mT)


def transposed(other):
    """A change: all layers of the backbone."""
    for layer in other.layers:
        layer.__class__ = Backwards


# %%
wrong, seen = changed(transposed)
streams_of = ([x.flatten(1) for x in observed.layer_streams(each)] for each in (seen, calls))
kinds = [f"{i} {kind}" for i, kind in enumerate(config.layer_kinds)]
viz.plot_cosine_depth({"comb transposed": observed.row_cosines(*streams_of)}, layer_names=kinds)
both = {"right": log_p, "transposed": torch.log_softmax(wrong, -1)}
for name, one in both.items():
    lab.record(f"perplexity, {name}", perplexity.perplexity(perplexity.token_losses(one, windows)))
lost = float(perplexity.divergence(*both.values()).mean())
lab.check_that("divergence, of that with 10 iterations instead of 20", lost / gone[-1], ">", 2)

# %% [markdown]
# Nano's matrices are near the identity, which is its own transpose: streams stay within a hundredth of a cosine, text still
# looks like text, and only the loss tells. So the kernels are compared with the definition, never with sums alone.

# %% [markdown]
# ## 7. What it moves and uses
#
# Side by side at nano's width, in one pass at Flash's, with 3 tokens. In both a projecting warp holds its part of $W$ in registers
# for the whole launch. In one pass a thread of every warp starts with the 128 registers that 512 threads may have; `setmaxnreg`
# then moves them to those that project. The launch takes all shared memory for stages.

# %%
name, given = next(iter(fused.items()))
args = [given[k][-tokens:].bfloat16() for k in ("y", "streams")] + [given[k][-tokens:] for k in ("post", "comb")]
mix = [given[k] for k in ("fn", "base", "scale", "norm_weight")]
with hopper.running(cpu) as run:
    streams = ops.embed_streams(windows[0, :tokens], model.embed.weight.bfloat16(), num_streams=4)
    ops.mhc_pre(streams, *mix, **full)
    ops.mhc_post_pre(*args, *mix, **full)
    ops.mhc_post(*args)
    if target.type == "cuda":  # else section 3 has simulated it
        ops.mhc_pre(*flash_args, **full)
labels = ["embed_streams", *(f"{which}: {half}" for which in ("pre", "post_pre") for half in ("project", "finish"))]
labels += ["post", "Flash's pre: one pass"]
viz.plot_resources(**sections.print_uses([*run.launches, *wide.launches], cache, labels))
plan = TogetherConfig.for_shape(wide_tokens, d, 24, post=False, weight="bf16")
print("one pass: registers of a thread that projects, collapses, does something else:", plan.registers, "stages:", plan.stages)

# %% [markdown]
# ## 8. Predicted and measured
#
# Each byte once: `pre` reads $4D$ numbers a token and writes $D$; `post` reads $5D$ and writes $4D$; fused, 5 are read and 5
# written, where one after the other would move 14. One token: $W$ as three BF16 parts, 2.4 MB, is most of it.

# %%
w = 24 * 4 * d * 6.0  # bytes of three parts
moved = {"pre": (w, 5), "post": (0.0, 9), "post_pre": (w, 10)}
work = {f"flash {name}": roofline.Work(fixed + profile_tokens[-1] * 2.0 * d * n, 0.0) for name, (fixed, n) in moved.items()}
bound, time = sections.print_floors(work, base, profile_tokens[-1])
if time:
    viz.plot_predicted(bound, time, quantity="time (us)", words=("bound", "measured"))

# %%
if target.type == "cuda":
    here, runs, each = roofline.measure_ceilings(target), {}, {}
    mix = [w.to(target) for w in ((4 * d) ** -0.5 * torch.randn(24, 4 * d), torch.randn(24), torch.ones(3), torch.ones(d))]
    for m in profile_tokens:
        x, y = torch.randn(m, 4, d, device=target).bfloat16(), torch.randn(m, d, device=target).bfloat16()
        post, comb = torch.rand(m, 4, device=target), torch.full((m, 4, 4), 0.25, device=target)
        both = {
            "pre": lambda x=x: ops.mhc_pre(x, *mix, **full),
            "post": lambda x=x, y=y, post=post, comb=comb: ops.mhc_post(y, x, post, comb),
            "post_pre": lambda x=x, y=y, post=post, comb=comb: ops.mhc_post_pre(y, x, post, comb, *mix, **full),
        }
        runs |= {f"{name}, {m} tokens": call for name, call in both.items()}
        each |= {f"{name}, {m} tokens": roofline.Work(moved[name][0] + m * 2.0 * d * moved[name][1], 0.0) for name in both}
    print(hopper.table(hopper.profile(target, runs, each, here)))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - The sum of the streams is a plain residual stream, but for what unfinished rows leak.
# - One BF16 part of $W$, or TF32, moves `comb` far beyond the bar; three parts are the float32 itself.
# - Nano's matrices are near the identity, which 20 iterations do not finish: rows stay off by hundredths, as trained.
# - The transpose costs a twentieth of the perplexity and shows nowhere else.
#
# **Next:** [20 · Head, sampler, prediction](20_head_sampler_mtp.ipynb)
