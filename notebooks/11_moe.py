# %% [markdown]
# # 11 · The mixture of experts
#
# **Question.** How do tokens get to their experts and back without the host ever knowing who goes where, and what does a layer
# of experts cost when one token asks, or sixty-four?
#
# Six launches in a row, `dsv4lab/kernels/moe/experts.py`: permute, quantise, grouped product 1 with SwiGLU, quantise, grouped
# product 2, combine.
#
# **Needs** a C compiler or a Hopper GPU; notebooks 09 (the product) and 10 (the router) help. **Takes** half a minute on two
# CPU cores, twice that where the kernels have yet to be compiled. With `device="cuda"` the same cells run natively, and the
# last section measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
drawn_tokens = 14  # of the permutation's picture
few = 17  # tokens of a comparison, read where they lie
many = 400  # tokens of a comparison, gathered first
profile_tokens = [1, 8, 64, 1024]  # of the last section, at Flash's width
baselines = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import contextlib

import torch

import dsv4lab
from dsv4lab import lab, ops, sim, viz
from dsv4lab.formats import PackedWeight
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.gemm.mixed.api import Slots, Tiles, grouped
from dsv4lab.kernels.gemm.mixed.config import grouped_tokens
from dsv4lab.kernels.gemm.mixed.prepared import prepared
from dsv4lab.kernels.gemm.operators import activations
from dsv4lab.kernels.moe.combine.api import combine
from dsv4lab.kernels.moe.permute.api import permute
from dsv4lab.lab import baselines as measured
from dsv4lab.lab import hopper, observed, perplexity, roofline
from dsv4lab.reference import gemm, moe, quant

target = lab.setup(seed, device)

# %%
lab.environment(target)

# %%
cpu = torch.device("cpu")
base = measured.newest("experts", baselines)
model = dsv4lab.load(checkpoint or dsv4lab.nano(), device=cpu)
config = model.config
ceilings = base.ceilings if base else roofline.Ceilings(4.8e12, 989e12, "data sheet of an H200")
tile_tokens = 8
# Sums are in another order on a GPU; where that turns a rounding of h to FP8, one value moves by a step of FP8.
bars = {"rel": 1e-5} if target.type == "cpu" else {"cosine": 0.99999}


def direct(schedule="eager"):
    """Where kernels are called directly: on the GPU, or in the simulator."""
    stack = contextlib.ExitStack()
    if target.type == "cpu":
        stack.enter_context(running_on(sim.Host(hopper.ARCH)))
        stack.enter_context(hopper.launching(target, schedule))
    return stack


# %% [markdown]
# ## 1. Real routings
#
# $$y = \sum_{e \in I} W_2^e \big( w_e \cdot \mathrm{silu}(\min(W_1^e x, l)) \cdot \mathrm{clamp}(W_3^e x, \pm l) \big) + \text{shared}(x)$$
#
# The routing weight $w_e$ goes in before the second product, as in the model's reference. Inputs are what nano's layers are
# given on text that it was not trained on: MXFP4 experts, activations quantised to FP8 before both products ("official"
# numerics).

# %%
text = perplexity.held_out_windows(model.tokenizer, count=1, length=512)
with ops.observe() as calls:
    model.logits(text[:, :-1])
expert_calls = observed.find(calls, "moe_layer", "layers")
first = expert_calls[1]
print(f"act {first.inputs['act']}, formats {first.inputs['fmts']}")
print(f"{config.n_routed_experts} experts, {config.num_experts_per_tok} a token")
counts = observed.expert_counts(calls, config.n_routed_experts)
viz.plot_expert_load(counts, layer_names=[f"{i} ({kind})" for i, kind in enumerate(config.router_kinds)])
lab.check_that("entries of a layer", int(counts[0].sum()), "==", text[:, :-1].numel() * config.num_experts_per_tok)

# %% [markdown]
# ## 2. Permutation
#
# An entry is a (token, choice); its flat index is $i = t k + c$. Sorted stably by expert,
#
# $$\mathrm{position}[i] = \#\{j : e_j < e_i\} + \#\{j < i : e_j = e_i\}, \qquad \mathrm{slots}[\mathrm{position}[i]] = i,$$
#
# and an expert's $n$ rows are cut into $\lceil n/T \rceil$ tiles, as even as multiples of 8 allow. One launch, no atomics, and
# the list of tiles stays on the device: the products read it there, so the host waits for nothing and a CUDA graph can hold the
# whole layer.

# %%
ids = first.inputs["expert_idx"][:drawn_tokens].contiguous()
with direct():
    order = permute(ids.to(target), num_experts=config.n_routed_experts, tile_tokens=tile_tokens)
order = type(order)(*(part.cpu() for part in order))
slots = torch.sort(ids.flatten(), stable=True).indices
tiles = order.tiles[: int(order.num_tiles)]
load = torch.bincount(ids.flatten(), minlength=config.n_routed_experts)
lab.check("slots", order.slots, slots, max_abs=0)
lab.check("position: the way back", order.position[slots], torch.arange(len(slots)), max_abs=0)
lab.check_that("tiles", len(tiles), "==", int((-(-load // tile_tokens)).sum()))
lab.check("tiles follow each other", tiles[:, 1], torch.cat([tiles.new_zeros(1), tiles[:-1, 2]]), max_abs=0)
in_tiles = torch.zeros_like(load).index_add_(0, tiles[:, 0].long(), (tiles[:, 2] - tiles[:, 1]).long())
lab.check("rows of each expert", in_tiles, load, max_abs=0)
viz.plot_permutation(ids, order.position, tiles);

# %% [markdown]
# Read a line downwards: an entry goes to the row that its expert has for it; a bracket is what one CTA multiplies with one
# expert's weights. Entries with an id that is no expert's are dropped, empty experts have no tile, and all tokens on one expert
# make full tiles.

# %%
hard = {
    "one token": torch.tensor([[6, 1]]),
    "all on one expert": torch.full((50, 1), 3),
    "some dropped": torch.where(torch.rand(40, 2) < 0.2, -1, torch.randint(0, 8, (40, 2))),
    "ends alone": torch.tensor([[0, 7]] * 9),
}
for name, some in hard.items():
    flat = some.flatten()
    for schedule in hopper.schedules(target):
        with direct(schedule):
            found = permute(some.to(target), num_experts=8, tile_tokens=tile_tokens)
        kept = torch.sort(torch.where(flat < 0, 8, flat), stable=True).indices[: int((flat >= 0).sum())]
        lab.check(f"{name}, {schedule}: slots", found.slots.cpu()[: len(kept)], kept, max_abs=0)
        want = torch.full_like(flat, -1).index_put_((kept,), torch.arange(len(kept)))
        lab.check(f"{name}, {schedule}: position", found.position, want, max_abs=0)

# %% [markdown]
# ## 3. The stages, one by one
#
# The same calls as `experts.py` makes for few tokens, so that each stage can be seen. Rows of $x$ are read where they lie
# (`gather`): a slot names its token. Product 1 multiplies gate and up together, its epilogue does SwiGLU and the routing
# weight. The reference for each row is computed from the same quantised operands.

# %%
arguments = {k: v.to(target) if isinstance(v, torch.Tensor) else v for k, v in first.inputs.items()}
x, weights, ids = (arguments[k][:few].contiguous() for k in ("x", "weights", "expert_idx"))
layer = model.layers[1].ffn.experts
w1, w3, w2 = (getattr(layer, name).weight.to(target) for name in ("w1", "w3", "w2"))
limit, top_k = config.swiglu_limit, config.num_experts_per_tok
tokens, _ = grouped_tokens(ids.numel(), len(w1.codes))  # rows of a tile: what an expert has on average, and a bit more
with direct():
    order = permute(ids, num_experts=len(w1.codes), tile_tokens=tokens)
    plan = Tiles(order.tiles, order.num_tiles, tokens)
    values, factor = activations(x, "fp8", None)
    pick = Slots(order.slots, weights, top_k)
    how = dict(rows=ids.numel(), out_dtype=x.dtype)
    h = grouped(values, prepared(w1, w3), plan, slots=pick, gather=True, factor=factor, factor_of="token", limit=limit, **how)
    hidden, factor = activations(h, "fp8", None)
    y = grouped(hidden, prepared(w2), plan, factor=factor, **how)
    out = combine(y, order.position, top_k=top_k)

# %%
of = order.slots.long()
row_token, row_expert, row_weight = of // top_k, ids.flatten()[of], weights.flatten()[of]
quantised = gemm.quantize_activation(x, "fp8")
want_h, want_y = torch.empty_like(h), torch.empty_like(y)
for e in row_expert.unique().tolist():
    mine = row_expert == e
    gate, up = (gemm.linear(x[row_token[mine]], w[e], act="fp8") for w in (w1, w3))
    want_h[mine] = moe.swiglu(gate, up, row_weight[mine], limit=limit)
    want_y[mine] = gemm.linear(want_h[mine], w2[e], act="fp8")
lab.check("x, quantised", values.float(), quantised, max_abs=0)
lab.check("h, product 1 with SwiGLU", h, want_h, rel=1e-5)
lab.check("y, product 2", y, want_y, **bars)
lab.check("combined", out, moe.moe(x, weights, ids, w1, w3, w2, limit=limit, act="fp8"), **bars)

# %% [markdown]
# The shared expert's rows are added last and the sum is rounded once: `moe_combine`. In a layer, combine's launch does both.

# %%
z = torch.randn_like(x)
with hopper.running(target):
    whole = ops.moe_combine(out, z)
lab.check("routed and shared", whole, moe.moe_combine(out, z), max_abs=0)

# %% [markdown]
# ## 4. The operator against the reference
#
# `ops.moe` on nano's activations, every layer, few and many tokens, every schedule. MXFP4 weights and FP8 activations are exact
# in BF16, products are exact in float32, sums are short: there is nothing left to differ by but the order of a sum.

# %%
for call in expert_calls:
    layer = call.scope.split(".")[1]
    stack = model.layers[int(layer)].ffn.experts
    matrices = [getattr(stack, name).weight.to(target) for name in ("w1", "w3", "w2")]
    for count in (few, many):
        operands = [call.inputs[k][:count].to(target) for k in ("x", "weights", "expert_idx")]
        want = moe.moe(*operands, *matrices, limit=limit, act="fp8")
        for schedule in hopper.schedules(target):
            with hopper.running(target, schedule):
                got = ops.moe(*operands, *matrices, limit=limit, act="fp8")
            lab.check(f"layer {layer}, {count} tokens, {schedule}", got, want, **bars)
            lab.record("values that differ at all", int((got != want).sum()), f"of {got.numel()}")


# %% [markdown]
# NVFP4 experts, whose gate and up have global scales of their own, BF16 activations, and the routings that are hard:

# %%
def random_stack(shape, factor):
    """NVFP4 matrices of a stack, each with a global scale of its own."""
    return quant.quantize(factor * torch.randn(shape), "nvfp4").to(target)


stacks = random_stack((8, 128, 256), 0.05), random_stack((8, 128, 256), 0.02), random_stack((8, 256, 128), 0.05)
for name, some in hard.items():
    ids = some.clamp(min=0) if name == "some dropped" else some  # the reference knows no dropped ids
    xs, weights = torch.randn(len(ids), 256).bfloat16().to(target), torch.rand(ids.shape).to(target)
    for act, least in (("none", 0.9999), ("nvfp4", 0.998)):  # a turned rounding of h moves a four-bit code by a whole step
        with hopper.running(target):
            got = ops.moe(xs, weights, ids.to(target), *stacks, limit=limit, act=act)
        want = moe.moe(xs, weights, ids.to(target), *stacks, limit=limit, act=act)
        lab.check(f"NVFP4 experts, {name}, act {act}", got, want, cosine=least)

# %% [markdown]
# ## 5. Error by stage
#
# The kernels add nothing; what is lost is what the formats lose. Cosine to the float64 chain with the same weights and
# unquantised activations, after each stage, for FP8 activations (official) and NVFP4 ones (W4A4). The band is from the worst
# row to the best.

# %%
x = first.inputs["x"][:many]
weights, ids = first.inputs["weights"][:many], first.inputs["expert_idx"][:many]
stack = model.layers[1].ffn.experts
w1, w3, w2 = stack.w1.weight, stack.w3.weight, stack.w2.weight


def chain(act):
    """Every stage for all entries, as the kernels' reference computes them: x, h, y, sum."""
    rounded = [gemm.quantize_activation(x, act)]
    h, y = torch.zeros(many, top_k, w1.shape[1]), torch.zeros(many, top_k, x.shape[1])
    for e in ids.unique().tolist():
        rows, place = (ids == e).nonzero(as_tuple=True)
        gate, up = (gemm.linear(x[rows], w[e], act=act) for w in (w1, w3))
        h[rows, place] = moe.swiglu(gate, up, weights[rows, place], limit=limit)
        y[rows, place] = gemm.linear(h[rows, place], w2[e], act=act)
    return [*rounded, h.flatten(0, 1), gemm.quantize_activation(h.flatten(0, 1), act), y.flatten(0, 1), y.sum(1)]


# %%
exact = chain("none")
stages = ["x quantised", "h", "h quantised", "y", "sum"]
cosines = {}
for label, act in (("FP8 (official)", "fp8"), ("NVFP4 (W4A4)", "nvfp4")):
    pairs = zip(chain(act), exact, strict=True)
    rows = [torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in pairs]
    cosines[label] = torch.stack([row.quantile(torch.linspace(0, 1, 65, dtype=torch.float64)) for row in rows])
ax = viz.plot_cosine_depth(cosines, layer_names=stages)
ax.set(xlabel="stage")
lab.check_that("FP8: median cosine of the sum", cosines["FP8 (official)"][-1].median(), ">=", 0.999)
lab.check_that("NVFP4: median cosine of the sum", cosines["NVFP4 (W4A4)"][-1].median(), ">=", 0.98)

# %% [markdown]
# ## 6. Who works when, and what it uses
#
# The grouped product of few tokens, simulated: the same kernel as notebook 09, tiles from the list. Then every launch of the
# operator.

# %%
small = [first.inputs[k][:6] for k in ("x", "weights", "expert_idx")]
traces = hopper.traces(cpu, lambda: ops.moe(*small, w1, w3, w2, limit=limit, act="fp8"))
product = traces[2]  # permute, quantise, product 1
viz.plot_warp_timeline(**product.timeline().figure(groups=("CTA 0",)))
hit = len(small[2].unique())
records = next(row for row in product.traffic().rows if "int32" in row.tensor and row.once > 4096)
per_expert = prepared(w1.to("cpu"), w3.to("cpu")).records.nbytes / len(w1.codes)
lab.check_that("bytes of weights read: experts that are hit", sum(records.by.values()), "==", hit * per_expert)
lab.check_that("experts hit", hit, "<=", config.n_routed_experts)


# %%
def compiled():
    """Compiled kernels of the cache, newest first."""
    return map(cache.read, sorted(cache.folder().glob("*.kernel"), key=lambda path: -path.stat().st_mtime))


wanted = [first.inputs[k] for k in ("x", "weights", "expert_idx")]
labels, executed = [], []
for count in (few, many):
    with hopper.running(cpu) as run:
        ops.moe(*(part[:count] for part in wanted), w1, w3, w2, limit=limit, act="fp8")
    gather = ["gather"] if len(run.launches) > 6 else []
    steps = ["permute", "x to FP8", *gather, "product 1", "h to FP8", "product 2", "combine"]
    labels += [f"{step}, {count} tokens" for step in steps]
    executed += run.launches
used = hopper.uses(executed, compiled(), labels)
print(hopper.table([one.row() for one in used]))
lab.check_that("most spilled bytes", max(one.spill_bytes for one in used), "==", 0)
viz.plot_resources([one.registers for one in used], [hopper.REGISTERS] * len(used), [f"registers: {one.name}" for one in used]);

# %% [markdown]
# ## 7. What decoding costs, predicted
#
# Few tokens are bound by the bytes of the experts that are hit. If $M$ tokens choose $k$ of $E$ independently, they hit
#
# $$E\,\big(1 - (1 - k/E)^M\big)$$
#
# experts on average. Real routings hit fewer where neighbouring tokens choose alike. Both for Flash, and, so that it is more
# than a formula, counted on draws.

# %%
experts, chosen, d, inner = 256, 6, 4096, 2048  # Flash
one_expert = 3 * d * inner * (1 / 2 + 1 / 16)  # bytes in NVFP4
expected = {m: experts * (1 - (1 - chosen / experts) ** m) for m in (1, 3, 8, 16, 64, 1024)}
draws = {m: sum(len(torch.rand(m, experts).topk(chosen).indices.unique()) for _ in range(50)) / 50 for m in expected}
lab.check("experts hit, formula and draws", list(expected.values()), list(draws.values()), rel=0.05)
print(f"one expert: {one_expert / 1e6:.2f} MB; ceilings: {ceilings.source}")
for m, hit in expected.items():
    work = roofline.Work((hit + 1) * one_expert, 6.0 * m * (chosen + 1) * d * inner)
    least = f"{1e6 * work.floor_s(ceilings):7.1f} us by {work.bound(ceilings)}"
    print(f"{m:5d} tokens: {hit:6.1f} experts, {work.num_bytes / 1e6:8.1f} MB, at least {least}")
routed = torch.cat([call.inputs["expert_idx"] for call in expert_calls])
near = sum(len(part.unique()) for part in routed.split(8)) / len(routed.split(8))
n = config.n_routed_experts
lab.record("nano, 8 tokens in a row: experts hit", round(near, 2), f"(independent: {n * (1 - (1 - top_k / n) ** 8):.2f})")

# %% [markdown]
# ## 8. Predicted and measured
#
# The layer: router, experts, shared expert, sum. Its bound counts packed bytes of the experts that were really hit, or flops.

# %%
print(base)
found = base.where(shape="flash layer")
if found:
    intensity, rate = measured.roofline_points(found)
    limits = {"BF16": round(ceilings.flops_per_s * 1e-12, 1)}
    names = [f"{row['m']} tokens" for row in found]
    viz.plot_roofline(intensity, rate, names, bandwidth=round(ceilings.bytes_per_s * 1e-12, 3), ceilings=limits)
    fields = ("shape", "m", "experts_hit", "registers", "spill_bytes")
    print(hopper.table(measured.summary(found, fields, ("grouped_mm_bf16", "eager_loop_bf16"))))

# %%
decode = [row for m in (1, 8, 64) for row in base.where(m=m) if row["shape"].startswith("flash ")]
apart = ("layer", "experts", "router_hash", "moe_combine", "w4a4", "mxfp4", "fp8_block")  # wholes, not its own, other formats
parts = [r for r in decode if not set(r["shape"].split()) & set(apart) and (r["m"], r["shape"]) != (1, "flash shared")]
if any(row["shape"] == "flash layer" for row in decode):
    whole = [row for row in decode if row["shape"] == "flash layer"]
    hits = {row["m"]: row["experts_hit"] for row in whole}
    lab.check("experts hit, predicted and measured", [expected[m] for m in hits], list(hits.values()), rel=0.15)
    weighty = [row for row in parts if row["bound_us"] > 0.1 * row["us"]]  # the rest is latency, see the table
    bound, time = measured.bound_and_time(whole + weighty, "{shape}, {m} tokens")
    viz.plot_predicted(bound, time, quantity="time (us)", words=("bound", "measured"))
    for row in whole:
        alone = sum(part["us"] for part in parts if part["m"] == row["m"])
        lab.record(f"{row['m']} tokens: parts one by one, over the layer", round(alone / row["us"], 3))
    print(hopper.table(measured.summary(whole + parts, ("shape", "m"))))

# %% [markdown]
# Parts are timed in graphs of their own; in the layer they start while the one ahead is ending, so their sum may be above the
# whole.
#
# ## 9. Measured here
#
# With `device="cuda"`: the experts of a layer at Flash's width, random NVFP4 weights, cold, against ceilings measured in the
# same minute, replayed from CUDA graphs. A graph's start and end, some 2 us, count too; `benchmarks/` has many calls a graph.

# %%
if target.type == "cuda":
    here = roofline.measure_ceilings(target)

    def stack_of(n, k):
        codes = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, device=target)
        scale = torch.randint(0x20, 0x50, (experts, n, k // 16), dtype=torch.uint8, device=target).view(torch.float8_e4m3fn)
        return PackedWeight(dsv4lab.formats.NVFP4, codes, scale, torch.full((experts,), k**-0.5 / 8, device=target))

    big = stack_of(inner, d), stack_of(inner, d), stack_of(d, inner)
    calls, work = {}, {}
    for m in profile_tokens:
        xs, ids = torch.randn(m, d, device=target).bfloat16(), torch.rand(m, experts, device=target).topk(chosen).indices
        share = torch.full((m, chosen), 0.25, device=target)
        calls[f"{m} tokens"] = lambda xs=xs, share=share, ids=ids: ops.moe(xs, share, ids, *big, limit=limit, act="none")
        work[f"{m} tokens"] = roofline.Work(len(ids.unique()) * one_expert, 6.0 * m * chosen * d * inner)
    print(hopper.table(hopper.profile(target, calls, work, here)))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - The permutation is a stable sort that one launch does; its list of tiles never leaves the device.
# - With official numerics the kernels agree with the reference as far as a float32 sum can; losses are the formats' own.
# - Few tokens read the experts that they hit, and nothing else: the bytes in the log are the bytes of those experts.
# - At first the bytes grow with the number of tokens, because hardly two choose the same expert; then experts repeat, and a
#   token gets cheaper.
#
# **Next:** [12 · Norm and rotation](12_norm_rope.ipynb)
