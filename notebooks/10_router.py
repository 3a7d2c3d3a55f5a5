# %% [markdown]
# # 10 · The router
#
# **Question.** Which experts does a token go to, how close is that decision, and what does it cost to take it on the GPU?
#
# A router is a small matrix product with a discrete result: an error in the last bits of a score is harmless, unless two
# experts are so close that it changes who is chosen. The kernel is `dsv4lab/kernels/moe/router/`.
#
# **Needs** a C compiler or a Hopper GPU; notebook 01 shows where the router sits. **Takes** half a minute on two CPU cores,
# twice that where the kernels have yet to be compiled.
# With `device="cuda"` the same cells run natively, and the last section measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
windows = 4  # of held-out text
window_tokens = 512  # of each
wide_tokens = 3  # of the product at Flash's width
profile_tokens = [1, 16, 64, 1024]  # of the last section
baselines = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.kernels._common import cache
from dsv4lab.lab import baselines as measured
from dsv4lab.lab import hopper, observed, perplexity, roofline
from dsv4lab.reference import moe

target = lab.setup(seed, device)
cpu = torch.device("cpu")
model = dsv4lab.load(checkpoint or dsv4lab.nano(), device=cpu)
config = model.config
base = measured.newest("experts", baselines)
ceilings = base.ceilings if base else roofline.Ceilings(4.8e12, 989e12, "data sheet of an H200")

# %%
lab.environment(target)

# %% [markdown]
# ## 1. Scores, and who is chosen
#
# $$z = W x, \quad s = \sqrt{\ln(1 + e^{z})}, \quad I = \operatorname{top}_k(s + b), \quad w_i = \gamma\, s_i / \textstyle\sum_{j \in I} s_j.$$
#
# The bias $b$ balances load. **It chooses, it does not weigh.** In the first layers the choice is not learned at all: a table
# gives each token id its experts ("hash"), and the scores only weigh. Inputs are nano's: the activations that reach its routers
# on text that it was not trained on.

# %%
text = perplexity.held_out_windows(model.tokenizer, count=windows, length=window_tokens)
with ops.observe() as calls:
    model.logits(text[:, :-1])
by_score = observed.find(calls, "router_topk", "layers")
by_hash = observed.find(calls, "router_hash", "layers")
inputs = {call.scope.split(".")[1]: call.inputs for call in (*by_hash, *by_score)}
print("routers:", ", ".join(f"layer {i} by {kind}" for i, kind in enumerate(config.router_kinds)))
rows = len(by_score[0].inputs["x"])
lab.record("tokens", rows)
scores = {layer: moe.router_scores(a["x"], a["gate_weight"]).double() for layer, a in inputs.items()}
learned = {layer: a for layer, a in inputs.items() if "bias" in a}
lab.check_that("least score: above zero", min(float(s.min()) for s in scores.values()), ">", 0)


# %% [markdown]
# ## 2. The kernel against the reference
#
# Up to 16 tokens it is one launch; the CTA that comes last selects. With more, a second launch selects, a warp a token. Logits
# are summed in float32, the reference sums in float64. Weights may differ by that; **choices must not**.

# %%
def moved(arguments, count=None):
    """Operands on the target, and only the first tokens of them."""
    cut = {k: v[:count] if k in ("x", "token_ids") else v for k, v in arguments.items()}
    return {k: v.to(target) if isinstance(v, torch.Tensor) else v for k, v in cut.items()}


for layer, arguments in inputs.items():
    name = "router_topk" if layer in learned else "router_hash"
    for count in (7, 300):
        for schedule in hopper.schedules(target):
            with hopper.running(target, schedule):
                weights, ids = getattr(ops, name)(**moved(arguments, count))
            want_weights, want_ids = getattr(moe, name)(**moved(arguments, count))
            lab.check(f"layer {layer}, {count} tokens, {schedule}: experts", ids, want_ids, max_abs=0)
            lab.check(f"layer {layer}, {count} tokens, {schedule}: weights", weights, want_weights, max_abs=2e-6)

# %% [markdown]
# At Flash's width, 256 experts and 4,096 columns, random BF16 numbers: the same agreement, or a tie closer than float32 can
# tell.

# %%
d, experts, top_k = 4096, 256, 6
x = torch.randn(wide_tokens, d).bfloat16().to(target)
gate = (d**-0.5 * torch.randn(experts, d)).bfloat16().to(target)
bias = (0.01 * torch.randn(experts)).to(target)
with hopper.running(target):
    weights, ids = ops.router_topk(x, gate, bias, top_k=top_k, route_scale=1.5)
want_weights, want_ids = moe.router_topk(x, gate, bias, top_k=top_k, route_scale=1.5)
lab.check("Flash's width: experts", ids, want_ids, max_abs=0)
lab.check("Flash's width: weights", weights, want_weights, max_abs=2e-6)
lab.check("weights add up to the scale", weights.sum(-1), torch.full((wide_tokens,), 1.5), max_abs=1e-6)

# %% [markdown]
# ## 3. The bias chooses, it does not weigh
#
# Push one expert with a bias of 10: every token takes it first, at the weight of its score alone. A kernel that weighed by $s +
# b$ would give it nearly all. And where two experts score the same to the bit, the lower id goes first, as a stable sort has
# it.

# %%
layer, arguments = next(iter(learned.items()))
pushed = arguments | {"bias": arguments["bias"].clone()}
pushed["bias"][3] = 10.0
with hopper.running(target):
    weights, ids = ops.router_topk(**moved(pushed, 50))
s = scores[layer][:50]
chosen = s.gather(1, ids.cpu())
lab.check("the pushed expert is first everywhere", ids[:, 0], torch.full((50,), 3), max_abs=0)
alone = config.routed_scaling_factor * chosen / chosen.sum(-1, keepdim=True)
lab.check("weights are those of scores alone", weights, alone, max_abs=2e-6)
with_bias = chosen + pushed["bias"][ids.cpu()]
wrong = config.routed_scaling_factor * with_bias[:, 0] / with_bias.sum(-1)
lab.record("weight of the pushed expert, mean", float(weights[:, 0].double().mean()))
lab.record("what weighing by s + b would give", float(wrong.mean()))

# %%
twins = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
twins["gate_weight"][5], twins["bias"][:] = twins["gate_weight"][2], 0.0
twins["bias"][[2, 5]] = 10.0  # both always chosen, and equal
with hopper.running(target):
    weights, ids = ops.router_topk(**moved(twins, 50))
lab.check("equal scores: the lower id first", ids[:, :2], torch.tensor([2, 5]).expand(50, 2), max_abs=0)
lab.check("and equal weights", weights[:, 0], weights[:, 1], max_abs=0)

# %% [markdown]
# ## 4. How close it comes
#
# A choice can change only where the last expert that is taken and the first that is not are closer than the error of their
# scores. The kernel promises logits within $2^{-16} \sum |w x|$, $2^{-18}$ on ordinary numbers, and scores within $2^{-20}$
# beside that; the slope of $s(z)$ turns one into the other. Below: the share of nano's decisions that are closer than a size,
# and the promise.

# %%
margins, promise = {}, {}
for layer, arguments in learned.items():
    order = (scores[layer] + arguments["bias"].double()).sort(dim=-1, descending=True).values
    k = arguments["top_k"]
    margins[f"layer {layer}"] = order[:, k - 1] - order[:, k]
    size = arguments["x"].double().abs() @ arguments["gate_weight"].double().abs().t()
    z = arguments["x"].double() @ arguments["gate_weight"].double().t()
    slope = torch.sigmoid(z) / (2 * scores[layer])
    promise[layer] = (2 * (slope * size * 2.0**-18 + scores[layer] * 2.0**-20)).amax(-1)  # two scores may be off
typical = max(float(p.median()) for p in promise.values())
for layer, bound in promise.items():
    close = int((margins[f"layer {layer}"] < bound).sum())
    lab.record(f"layer {layer}: decisions within the kernel's error", close, f"of {rows}")
    closest = margins[f"layer {layer}"].min(dim=0)
    lab.record(f"layer {layer}: closest", float(closest.values), f"at token {int(closest.indices)}")
quantity = "s + b of the last taken less that of the first left out"
viz.plot_margins(margins, bounds={"error of two scores": typical}, quantity=quantity);

# %% [markdown]
# Over some decades the curve falls about as fast as the size: gaps are nearly uniform near zero, so the share of decisions in
# doubt is proportional to the error. That is why a router stays in float32 while everything around it is rounded to four or
# eight bits. How many choices would BF16 scores change on this text? And the kernel, run over all of it?

# %%
for layer, arguments in learned.items():
    rounded = scores[layer].bfloat16().double() + arguments["bias"].double()
    order = torch.sort(rounded, dim=-1, descending=True, stable=True).indices[:, : arguments["top_k"]].sort(-1).values
    exact = moe.router_topk(**arguments)[1].sort(-1).values
    changed = int((order != exact).any(-1).sum())
    lab.record(f"layer {layer}: tokens whose experts change with BF16 scores", changed, f"of {rows}")
everything = {layer: ops.router_topk(**a)[1] for layer, a in learned.items()}
for layer, arguments in learned.items():
    with hopper.running(target):
        _, ids = ops.router_topk(**moved(arguments))
    changed = (ids.cpu() != everything[layer]).any(-1)
    excused = margins[f"layer {layer}"] < promise[layer]
    lab.check_that(f"layer {layer}: choices that the kernel changed without doubt", int((changed & ~excused).sum()), "==", 0)

# %% [markdown]
# ## 5. Load
#
# Tokens an expert gets, on the same text. A bias that balances makes rows even; hash routing is as even as the text's token ids
# are. For a grouped product uneven load means more tiles that are not full, and for few tokens it means fewer experts to read.

# %%
counts = observed.expert_counts(calls, config.n_routed_experts)
names = [f"{i} ({kind})" for i, kind in enumerate(config.router_kinds)]
viz.plot_expert_load(counts, layer_names=names)
entries = rows * config.num_experts_per_tok
lab.check("every token has its experts", counts.sum(-1), [entries] * len(counts), max_abs=0)
for name, load in zip(names, counts.double(), strict=True):
    lab.record(f"layer {name}: busiest over mean", float(load.max() / load.mean()))


# %% [markdown]
# ## 6. What it uses
#
# Few tokens: the weights go from memory to registers in the tensor core's own order, several CTAs share $K$.

# %%
def compiled():
    """Compiled kernels of the cache, newest first."""
    return map(cache.read, sorted(cache.folder().glob("*.kernel"), key=lambda path: -path.stat().st_mtime))


with hopper.running(cpu) as run:
    ops.router_topk(x.cpu(), gate.cpu(), bias.cpu(), top_k=top_k, route_scale=1.5)
    ops.router_topk(**{k: v[:300] if k == "x" else v for k, v in arguments.items()})
labels = [f"Flash's width, {wide_tokens} tokens", "nano, 300 tokens: logits", "nano, 300 tokens: selection"]
used = hopper.uses(run.launches, compiled(), labels)
print(hopper.table([one.row() for one in used]))
lab.check_that("most spilled bytes", max(one.spill_bytes for one in used), "==", 0)
viz.plot_resources([one.registers for one in used], [hopper.REGISTERS] * len(used), [f"registers: {one.name}" for one in used]);

# %% [markdown]
# ## 7. Predicted and measured
#
# Bytes say little here: Flash's router weights are 2 MiB. What counts is latency: a launch, a trip to memory, the meeting of
# the parts of $K$, and $k$ rounds of selection. The kernel's author predicted 3 us for Flash and 4 us for Pro, for 1 to 16
# tokens on an H200.

# %%
for name, (e, width) in {"flash": (256, 4096), "pro": (384, 7168)}.items():
    work = roofline.Work(2.0 * e * width, 2.0 * e * width)
    least = f"{1e6 * work.floor_s(ceilings):.2f} us ({ceilings.source})"
    print(f"{name}: one token, {1e-6 * work.num_bytes:.1f} MB, at least {least}")
print(base)
found = [row for name in ("flash", "pro") for row in base.where(shape=f"{name} router")]
few = {f"{row['shape']}, {row['m']} tokens": row for row in found if row["m"] <= 16}
if few:
    predicted = {name: 3.0 if name.startswith("flash") else 4.0 for name in few}
    floors = {name: row["bound_us"] for name, row in few.items()}
    viz.plot_predicted(predicted, {name: row["us"] for name, row in few.items()}, bounds=floors, quantity="time (us)")
print(hopper.table(measured.summary(found, ("shape", "m", "k", "registers", "spill_bytes"))))

# %% [markdown]
# ## 8. Measured here
#
# With `device="cuda"`: Flash's router, cold, against ceilings measured in the same minute, replayed from CUDA
# graphs. A graph's start and end, some 2 us, count too; `benchmarks/` has many calls a graph.

# %%
if target.type == "cuda":
    here = roofline.measure_ceilings(target)
    calls, work = {}, {}
    for m in profile_tokens:
        some = torch.randn(m, d, device=target).bfloat16()
        calls[f"{m} tokens"] = lambda some=some: ops.router_topk(some, gate, bias, top_k=top_k, route_scale=1.5)
        work[f"{m} tokens"] = roofline.Work(2.0 * experts * d + 2.0 * m * d, 2.0 * m * experts * d)
    print(here.source, f"{here.bytes_per_s * 1e-12:.2f} TB/s, {here.flops_per_s * 1e-12:.0f} TFLOP/s")
    print(hopper.table(hopper.profile(target, calls, work, here)))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - The kernel chooses as the reference does on all of nano's text; where it might not, the margin says so beforehand.
# - The bias has no part in the weights, equal scores go to the lower id: two conventions that data would hide.
# - Decisions in doubt are proportional to the error of a score. Float32 puts next to none in doubt, BF16 would change some.
# - Few tokens cost latency, not bytes.
#
# **Next:** [11 · The mixture of experts](11_moe.ipynb)
