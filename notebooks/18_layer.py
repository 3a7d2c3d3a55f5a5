# %% [markdown]
# # 18 · A layer's attention
#
# **Question.** All operations of notebooks 12 to 17 together: does a layer of kernels give what the reference gives, step by
# step; what does one decode step launch; and why may a CUDA graph replay it while sequences grow?
#
# The layer: `dsv4lab/model/attention.py`; addresses: `dsv4lab/model/cache.py`.
#
# **Needs** a C compiler or a Hopper GPU; notebooks 12 to 17. **Takes** half a minute on two CPU cores, two where the kernels
# have yet to be compiled. With `device="cuda"` the same cells run natively, and a graph is captured and timed.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
prompt_tokens = 253  # before the step that is compared; an odd place
tokens = 5  # of that step, which completes one CSA entry and one HCA entry
decode_steps = 6  # of one token, through one fixed plan
measured = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import copy
import functools
import re

import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.config import CSA, HCA, SWA, ModelConfig
from dsv4lab.lab import baselines, hopper, keys, layer_table, observed, perplexity, roofline, sections
from dsv4lab.model.cache import Batch

target = lab.setup(seed, device)
model = dsv4lab.load(checkpoint or dsv4lab.nano(), device=target, dtype=torch.bfloat16)
base, config = baselines.newest("attention_layer", measured), model.config
names = [f"{i} {kind}" for i, kind in enumerate(config.layer_kinds)]
on_reference = functools.partial(dsv4lab.backend, "reference")

# %%
lab.environment(target)

# %% [markdown]
# ## 1. A layer as a sentence
#
# Low-rank queries; norm and rotation; the key into its page; entries, from tokens that are complete; the choice; attention; the
# output turned back; `o_a`, `o_b`. SWA has no entries, HCA no choice. The inputs are nano's own, while it reads text that it was
# not trained on. What each kind calls, and what one token gets out of it:

# %%
total = prompt_tokens + tokens + decode_steps
ids = perplexity.held_out_windows(model.tokenizer, count=1, length=total)[0][:total]
with on_reference(), ops.observe() as calls:
    model.logits(ids[None], step=total)
inputs = {n: observed.only(calls, "mhc_pre", f"layers.{i}.attn").output[0] for i, n in enumerate(names)}
for i, name in enumerate(names):
    made = [call for call in calls if call.scope == f"layers.{i}.attn" and not call.name.startswith("mhc")]
    shapes = [tuple(c.output.shape[1:]) if isinstance(c.output, torch.Tensor) else "stored" for c in made]
    print(name, ", ".join(f"{c.name} {s}" for c, s in zip(made, shapes, strict=True)), sep=": ")
    missing = {c.name for c in made if hopper.ARCH not in ops.implementations()[c.name]}
    lab.check_that(f"{name}: operations without a kernel", len(missing), "==", 0)

# %% [markdown]
# The first two products, `wq_a` and `wkv`, read the same rows: `two_linears` quantises them once, and multiplies them in one launch.

# %%
attn, few = model.layers[1].attn, inputs["1 CSA"][:tokens]
act = attn.wq_a.numerics.act(attn.wq_a.format)
with hopper.running(target):
    both = ops.two_linears(few, attn.wq_a.weight, attn.wkv.weight, act=act)
    alone = [ops.linear(few, one.weight, act=act) for one in (attn.wq_a, attn.wkv)]
for part, got, want in zip(("wq_a", "wkv"), both, alone, strict=True):
    lab.check(f"{part}: x quantised for both, and for one", got, want, max_abs=0)


# %% [markdown]
# ## 2. Step by step
#
# Both sides start from a cache that the reference filled with the prompt. Then one step of a few tokens: each operation's output
# on kernels beside the reference's, each computed from **its own** predecessors, so that differences may grow as in use.

# %%
def plan(cache, count, *, fixed=False):
    """The next `count` tokens of the cache's sequence 0, and their rows of the text."""
    start = cache.lengths[0]
    cache.reserve(0, count)
    batch = Batch.plan(cache, [(0, [0] * count)], fixed=fixed)
    cache.advance(0, count)
    return batch, slice(start, start + count)


def step(cache, batch, rows, context):
    """The attention of all layers over a planned step -> its outputs and calls, by layer."""
    outputs, made = {}, {}
    for name, block, held in zip(names, model.layers, cache.layers, strict=True):
        with torch.inference_mode(), context(), ops.observe() as made[name]:
            outputs[name] = block.attn(inputs[name][rows], batch, held)
    return outputs, made


# %%
def prompted():
    """A cache whose one sequence holds the prompt, written by the reference."""
    cache = model.new_cache(max_seqs=1, max_tokens=total, max_step=prompt_tokens)
    cache.open()
    step(cache, *plan(cache, prompt_tokens), on_reference)
    return cache


# %%
sides = {"kernels": functools.partial(hopper.running, target), "reference": on_reference}
caches = dict(zip(sides, (start := prompted(), copy.deepcopy(start)), strict=True))
outputs, made = {}, {}
for side, context in sides.items():
    outputs[side], made[side] = step(caches[side], *plan(caches[side], tokens), context)
table, cosines = [], {}
for name in names:
    mine, theirs = (made[side][name] for side in sides)
    series = cosines[name] = {}
    for ours, right in zip(mine, theirs, strict=True):
        got, want = (c.output.flatten(1) if isinstance(c.output, torch.Tensor) else None for c in (ours, right))
        if got is None or not got.is_floating_point():
            continue
        got, want = (x.masked_fill(x == -torch.inf, 0).double() for x in (got, want))
        label = ours.name + f" {got.shape[1]}"
        series[f"{len(series)} {label}"] = torch.cosine_similarity(got, want).cpu()
    lab.check(f"layer {name}: output", outputs["kernels"][name], outputs["reference"][name], row_cosine=0.995, mean_rel=0.03)

# %%
for name, series in cosines.items():
    steps = [re.sub(r"^\d+ ", "", label) for label in series]
    ax = viz.plot_cosine_depth({name: torch.stack(list(series.values()))}, layer_names=steps, bar=0.995)
    ax.set_xlabel("operation, and the width of its output")
    ax.tick_params(axis="x", rotation=50)
chosen = [next(c.output for c in made[side]["1 CSA"] if c.name == "index_topk") for side in sides]
lab.check("layer 1 CSA: chosen entries", *chosen, max_abs=0)

# %% [markdown]
# Up to attention both sides agree to the last bits of BF16. There probabilities meet the values in BF16, and from then on each
# rounding to FP8 may turn a last bit into a neighbouring code. What they **stored** must agree, too: pages byte by byte, state
# as float32 sums.

# %%
for name, held, right in zip(names, caches["kernels"].layers, caches["reference"].layers, strict=True):
    for part, pool in vars(held).items():
        want = getattr(right, part)
        if pool is None:
            continue
        if pool.dtype == torch.uint8:
            lab.check_that(f"layer {name}, {part}: share of bytes that differ", float((pool != want).double().mean()), "<=", 1e-4)
        else:
            lab.check(f"layer {name}, {part}", pool, want, rel=1e-5)


# %% [markdown]
# ## 3. What a decode step launches
#
# One token. The host knows what to launch from sizes alone and reads nothing back. Kernels by their classes, with CTAs and
# threads, for a plan that is **fixed** (section 4).

# %%
def launches_of(cache, batch, rows):
    """What a step launches in each layer, as (kernel, CTAs, threads), simulated on CPU tensors; and its outputs."""
    found, results = {}, {}
    for name, block, held in zip(names, model.layers, cache.layers, strict=True):
        with torch.inference_mode(), hopper.running(target) as run:
            results[name] = block.attn(inputs[name][rows], batch, held)
        executed = run.launches if target.type == "cpu" else []
        symbols = [(e.launch.kernel.name, e.launch.grid, e.launch.block) for e in executed]
        classes = [re.sub(r"(object|_).*", "", re.search(r"kernels[a-z0-9]*([A-Z]\w+)", symbol)[1]) for symbol, *_ in symbols]
        found[name] = [(c, grid[0] * grid[1] * grid[2], block[0]) for c, (_, grid, block) in zip(classes, symbols, strict=True)]
    return found, results


cache = caches["kernels"]
held, rows = plan(cache, 1, fixed=True)
first, _ = launches_of(cache, held, rows)
for name, each in first.items():
    print(f"{name}, {len(each)} launches:", ", ".join(f"{c} {ctas} x {threads}" for c, ctas, threads in each))

# %% [markdown]
# The simulator's clock, a **model** and no measurement, gives each launch of the CSA layer a length; here they lie end to end, as
# without overlap. At nano's width most are starts and ends: what chained launches (PDL) and graphs are for.

# %%
if target.type == "cpu":
    spare = copy.deepcopy(cache)
    batch, rows = plan(spare, 1, fixed=True)
    with torch.inference_mode():
        traces = hopper.traces(target, lambda: model.layers[1].attn(inputs["1 CSA"][rows], batch, spare.layers[1]))
    cycles = [trace.timeline().cycles for trace in traces]
    labels = [one[0] for one in first["1 CSA"]]
    viz.plot_launches(cycles, labels)
    lab.check_that("traced launches", len(traces), "==", len(labels))

# %% [markdown]
# ## 4. A plan that stays right
#
# A CUDA graph replays launches with the same addresses and sizes. Positions grow, so nothing that is launched may depend on them:
#
# - positions, slots, rows and counts are tensors; `Batch.copy_` writes the next step's values into the same memory;
# - `Batch.plan(fixed=True)` says that queries may see as many entries as the block table has places for: scores have that width,
#   `-inf` beyond what is visible;
# - the block table itself is the cache's own tensor, new pages appear in it;
# - what a step completes is decided on the device: without an entry to complete, the compressor stores none.
#
# One held plan through the steps, against a twin cache with a new plan each:

# %%
twin, table, launched_alike, outputs_alike = copy.deepcopy(cache), [], True, True
for _ in range(decode_steps - 1):
    new, rows = plan(cache, 1)
    other, _ = plan(twin, 1)
    held.copy_(new)
    launched, y = launches_of(cache, held, rows)
    _, want = launches_of(twin, other, rows)
    outputs_alike &= all(torch.equal(y[name], want[name]) for name in names)
    launched_alike &= launched == first
    seen = {kind: int(held.entries[kind].num_visible) for kind in (CSA, HCA)}
    most = {f"{kind} planned for": held.entries[kind].max_visible for kind in (CSA, HCA)}
    table.append({"position": int(held.positions)} | {f"{kind} entries": n for kind, n in seen.items()} | most)
print(hopper.table(table))
if target.type == "cpu":  # where launches are seen
    lab.check_that("launches, grids and blocks as in the first step", launched_alike, "==", 1)
lab.check_that("outputs equal those of new plans, bit for bit", outputs_alike, "==", 1)

# %%
short, _ = plan(copy.deepcopy(twin), 1)  # says how many entries its queries see, and no more
later = copy.deepcopy(twin)
for _ in range(config.csa_ratio):
    new, _ = plan(later, 1)
try:
    short.copy_(new)
except ValueError as refused:
    print(why := str(refused))
lab.check_that("a plan that is not fixed refuses a longer sequence", "max_visible" in why, "==", 1)

# %% [markdown]
# ## 5. Captured
#
# On a GPU: the held plan's step in a CUDA graph, replayed for further tokens, bit for bit against launches without a graph.

# %%
if target.type == "cuda":
    kept, run = [copy.deepcopy(layer) for layer in cache.layers], functools.partial(step, context=sides["kernels"])
    x = {name: inputs[name][:1].clone() for name in names}
    inputs_of_text, inputs = inputs, x  # the graph reads its inputs where they lie
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = run(cache, held, slice(0, 1))
    for layer, before in zip(cache.layers, kept, strict=True):  # as before the capture
        for part, value in vars(before).items():
            if value is not None:
                getattr(layer, part).copy_(value)
    for place in range(3):
        held.copy_(plan(cache, 1)[0])
        for name in names:
            x[name].copy_(inputs_of_text[name][place : place + 1])
        graph.replay()
        want, _ = run(twin, plan(twin, 1)[0], slice(0, 1))
        lab.check_that(f"replay {place}: alike", all(torch.equal(captured[n], want[n]) for n in names), "==", 1)
else:
    print("no GPU: nothing is captured; section 4 ran the same plan in the simulator")

# %% [markdown]
# ## 6. Predicted and measured
#
# A decode step of one token at Flash's width reads the layer's weights, here NVFP4 with BF16 compressors, and keys of a sequence
# of 16,384 tokens. Predicted: those bytes over the bandwidth of a copy. What a measured time has beyond them are starts and
# ends of a chain of dependent launches.

# %%
c = ModelConfig.flash()
d, heads, inner = c.hidden_size, c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
key, index = keys.record_bytes(c, "fp8"), keys.record_bytes(c, "fp4", index=True)
four_bits = d * (c.q_lora_rank + c.head_dim) + c.q_lora_rank * heads + heads * c.o_lora_rank + inner * d
small = c.q_lora_rank * c.index_n_heads * c.index_head_dim
more = {SWA: (0, 0), HCA: (0, 2 * d * c.head_dim), CSA: (small, d * (4 * (c.head_dim + c.index_head_dim) + c.index_n_heads))}
read = {SWA: 0, HCA: 16384 // 128 * key, CSA: c.index_topk * key + 16384 // 4 * index}
work = {}
for kind in (SWA, CSA, HCA):
    weights_of = (four_bits + more[kind][0]) * 4.5 / 8 + 2.0 * more[kind][1]
    work[f"flash {kind.lower()} layer, decode 1"] = roofline.Work(weights_of + c.sliding_window * key + read[kind], 0.0)
bound, time = sections.print_floors(work, base, 1)
if time:
    viz.plot_predicted(bound, time, quantity="time of one token (us)", words=("bound", "measured"))
for row in (row for name in work for row in base.where(shape=name, format="nvfp4")):
    parts = row.get("parts", [])
    print(row["shape"], ", ".join(f"{part['part']} {part['us']}" for part in parts), sep=": ")

# %% [markdown]
# Whole layers, hyper-connections and experts included: every kernel of a decode step of one token, with its part's percent of
# bound. Prefill and 64 sequences are in `docs/layers.md`.

# %%
whole = baselines.newest("layers", measured)
print(whole)
for shape in (layer_table.shape_of(kind, "decode 1") for kind in (SWA, CSA, HCA)):
    for row in whole.where(shape=shape, format=layer_table.FORMAT):
        print(f"\n{shape}: {row['us']} us, {row['percent_of_bound']} % of its parts' bounds")
        print(hopper.table(layer_table.kernels_of(row)))

# %% [markdown]
# ## Findings
#
# - Layer by layer and step by step, kernels follow the reference to the last bits of BF16; what they store is the same.
# - A decode step is 12 to 22 launches, of sizes that no position changes; one plan serves all steps, and so does one graph.
# - Many of them are small; CSA quantises the query's row twice.
#
# **Next:** [19 · Hyper-connections](19_hyper_connections.ipynb)
