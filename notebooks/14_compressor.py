# %% [markdown]
# # 14 · The compressor
#
# **Question.** What becomes of 4 tokens, or of 128, when they turn into one key; and how can a step begin and end anywhere?
#
# Kernel: `dsv4lab/kernels/compressor/`. One launch pools the entries that a step completes, makes keys of them (notebook 13),
# stores them, and moves the step's tokens into a ring.
#
# **Needs** a C compiler or a Hopper GPU; notebooks 12 and 13 help. **Takes** half a minute on two CPU cores, twice that where
# the kernels have yet to be compiled. With `device="cuda"` the same cells run natively, and the last section measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
text_tokens = 384  # whose gates are studied
shown_entry = 30  # of the CSA layer, the one whose gates are drawn
csa_tokens = 45  # of a comparison
hca_tokens = 261  # of a comparison: two entries, and five tokens of a third
profile_tokens = 8192  # of the last section
measured = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import functools

import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.kernels._common import cache
from dsv4lab.lab import baselines, hopper, keys, observed, perplexity, pooling, roofline, sections
from dsv4lab.reference import compressor

target, cpu = lab.setup(seed, device), torch.device("cpu")
model = dsv4lab.load(checkpoint or dsv4lab.nano(), device=cpu, dtype=torch.bfloat16)
base = baselines.newest("rope_and_cache", measured)

# %%
lab.environment(target)

# %% [markdown]
# ## 1. Gates
#
# Two projections give each token values $a_p$ and scores $z_p$; a learned embedding of the token's place in its block is added
# to the scores. An entry is a weighted mean, **with weights of its own in each channel**:
#
# $$e[i] = \sum_p w_p[i]\, a_p[i], \qquad w_p[i] = \mathrm{softmax}_p\big(z_p[i] + \mathrm{ape}_{p \bmod m}[i]\big).$$
#
# What follows is a key's way: RMSNorm, rotation at the block's first token, quantisation. Below: nano's gates on text that it
# was not trained on.

# %%
ids = perplexity.held_out_windows(model.tokenizer, count=1, length=text_tokens)[0][:text_tokens]
with ops.observe() as calls:
    model.logits(ids[None], step=text_tokens)
steps = {}
for call in observed.find(calls, "compress", "layers"):
    kind = "csa" if call.inputs["overlap"] else "hca"
    steps.setdefault(kind if call.inputs["key"] == "kv" and kind == "hca" else f"{kind} {call.inputs['key']}", call.inputs)
for name, inputs in steps.items():
    print(
        f"{name}: {inputs['ratio']} tokens an entry, {inputs['values'].shape[1]} channels a token, {pooling.dims(inputs)} an entry"
    )
first = 4 * (shown_entry - 1)
words = [repr(model.tokenizer.decode([int(token)]))[1:-1] for token in ids[first : first + 8]]
weights = pooling.gates(steps["csa kv"], shown_entry)
lab.check("weights of each channel add up to 1", weights.sum(0), torch.ones(512), max_abs=1e-12)
viz.plot_gates(weights, tokens=words, cuts=[4], title=f"CSA entry {shown_entry}: the block before, then its own")

# %%
viz.plot_gates(pooling.gates(steps["hca"], 1), title="HCA entry 1: 128 tokens")
every = {name: [pooling.gates(one, j) for j in range(1, len(one["values"]) // one["ratio"])] for name, one in steps.items()}
for name, found in every.items():
    used = torch.cat([pooling.effective_tokens(w) for w in found])
    low, middle, high = used.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    lab.record(
        f"{name}: tokens that count in a channel, 5 %, median, 95 %", f"{low:.1f}, {middle:.1f}, {high:.1f} of {len(found[0])}"
    )
mean = torch.stack(every["csa kv"]).mean(0)
lab.record("csa kv: weight of an entry's own block, mean", float(mean[4:].sum(0).mean()))
viz.plot_gates(
    mean, tokens=[f"{which} {i}" for which in ("before", "own") for i in range(4)], cuts=[4], title="CSA, mean of entries"
)


# %% [markdown]
# ## 2. Overlap
#
# A CSA token has two sets of channels. Its block's own entry reads the second, the **next** entry reads the first; so an entry
# sees 8 tokens and its neighbours share 4, and nothing is cut where a block ends. An HCA token has one set and one entry. Who
# reads what, by derivative: a token that an entry does not read cannot change it.

# %%
def reads(ratio, overlap, tokens, d=3):
    """(E, tokens) int: 0 not read, 1 through the first half of channels, 2 through the second (or only) ones."""
    position, zero = torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64)
    width, last = d * (2 if overlap else 1), torch.arange(ratio - 1, tokens, ratio)
    given = torch.randn(tokens, width), torch.randn(ratio, width), torch.zeros(1, 1, 2, width), position, zero, zero, last
    pooled = torch.autograd.functional.jacobian(
        lambda a: compressor.compressor_pool(a, *given, ratio=ratio, overlap=overlap).sum(-1), torch.randn(tokens, width)
    )
    through = (pooled != 0).unflatten(-1, (-1, d)).any(-1)
    return (through * torch.tensor([1, 2] if overlap else [2])).sum(-1)


csa, hca = reads(4, True, 34), reads(128, False, 300)
block = torch.arange(34) // 4
want = torch.stack([torch.where(block == j, 2, 0) + torch.where(block == j - 1, 1, 0) for j in range(8)])
lab.check("CSA: own block and the one before", csa, want, max_abs=0)
lab.check("HCA: own block", hca, 2 * (torch.arange(300) // 128 == torch.arange(2)[:, None]), max_abs=0)
viz.plot_pooling(csa, ["first half of channels", "second half"], title="CSA: 34 tokens, 8 entries")
viz.plot_pooling(hca, ["first half", "all channels"], title="HCA: 300 tokens, 2 entries")


# %% [markdown]
# ## 3. The kernel
#
# Every number of a step belongs to one entry, so one warp reads and pools it; what goes into the ring is read once more, from
# L2. Weights are powers of two, $2^{L z - M}$, and parts of a softmax meet in shared memory. Ring: the reference's in every
# bit. Pooled values: within $2^{-20}$ of the largest that was pooled, so plain float32 keys are held to that. In the stored
# record a rounding may go the other way now and then.

# %%
def run(operation, inputs, cuts):
    """A fresh sequence in steps that end at `cuts` -> its inputs, with ring and pages as they are then."""
    for start, stop in zip((0, *cuts[:-1]), cuts, strict=True):
        operation(**pooling.piece(inputs, start, stop))
    return inputs


lengths = {name: hca_tokens if name == "hca" else csa_tokens for name in steps}
forms = {"float32": dict(record="plain", dtype=torch.float32), "as stored": {}}
cases = [(name, form, schedule) for name in steps for form in forms for schedule in hopper.schedules(target)]

# %%
errors = {}
for name, form, schedule in cases:
    n, exact = lengths[name], form == "float32"
    one = pooling.on(steps[name], target, rounded=not exact)
    room = dict(ring=pooling.span(one) + 3, **forms[form])
    want = run(compressor.compress, pooling.fresh(one, **room), [n])
    with hopper.running(target, schedule):
        got = run(ops.compress, pooling.fresh(one, **room), [n])
    label, differing = f"{name}, {form}, {schedule}", int((got["state"] != want["state"]).sum())
    lab.check_that(f"{label}: numbers of the ring that differ", differing, "==", 0)
    mine, theirs = (pooling.entries(part, n // one["ratio"]) for part in (got, want))
    bars = dict(max_abs=2.0**-20 * float(theirs.abs().max())) if exact else dict(row_cosine=0.999)
    lab.check(f"{label}: entries", mine, theirs, **bars)
    if exact:
        errors[name] = (mine - theirs).abs().cpu() / float(theirs.abs().max())
print(f"the bar is {2.0**-20:.2g}")
viz.plot_error_histogram(errors, relative=True, quantiles=(), num_bins=40)

# %% [markdown]
# ## 4. Anywhere: steps, and one go
#
# A step may end within a block; what the next one needs is in a ring, token $p$ at $p \bmod R$, with
# $R = $ span + tokens that may be taken back. Cut at odd places, down to single tokens, the kernel must leave the same bytes.

# %%
cuts = {"csa": [9, 10, 12, 17, 18, csa_tokens], "hca": [58, 127, 128, 200, hca_tokens]}
for name, inputs in steps.items():
    here, n = pooling.on(inputs, target), lengths[name]
    with hopper.running(target, hopper.schedules(target)[-1]):
        whole, cut = (run(ops.compress, pooling.fresh(here, ring=pooling.span(here)), ends) for ends in ([n], cuts[name[:3]]))
    wrong = sum(int((whole[part] != cut[part]).sum()) for part in ("state", "pages"))
    lab.check_that(f"{name}: numbers and bytes that differ, {len(cuts[name[:3]])} steps against one", wrong, "==", 0)

# %%
here, held, ends = pooling.on(steps["csa kv"], target), [], (9, 14, 18, 21)
for n in ends:
    with hopper.running(target):
        state = run(ops.compress, pooling.fresh(here, ring=11), [n])["state"][0]
    token = (state[:, None, 0] == here["values"][:n]).all(-1).int().argmax(-1)  # whose values lie in each place
    held.append(torch.where(state[:, 1, 0] == -torch.inf, -1, token).cpu())
lab.check("places: p mod 11", held[-1] % 11, torch.arange(11), max_abs=0)
viz.plot_window_ring(torch.stack(held), names=[f"CSA, R = 8 + 3, {n} tokens" for n in ends])

# %% [markdown]
# ## 5. Taking tokens back
#
# Drafts that are not accepted were pooled all the same. Going back copies nothing: the next step writes the right tokens over
# the wrong ones, in the ring and in the page. That needs room: a ring of 8 has lost what the drafts took the place of.

# %%
right, n = pooling.on(steps["csa kv"], target), 24
wrong_tokens = right | {name: torch.randn_like(right[name]) for name in ("values", "scores")}
straight = {ring: pooling.fresh(right, ring=ring) for ring in (11, 8)}
again = {ring: pooling.fresh(right, ring=ring) for ring in (11, 8)}
with hopper.running(target):
    for ring, one in again.items():
        run(ops.compress, straight[ring], [n])
        ops.compress(**pooling.piece(one, 0, 15))
        drafts = wrong_tokens | {part: one[part] for part in ("state", "pages")}
        ops.compress(**pooling.piece(drafts, 15, 18))  # three drafts, none accepted
        ops.compress(**pooling.piece(one, 15, n))
same = {ring: (pooling.entries(one, 6) == pooling.entries(straight[ring], 6)).all(-1).tolist() for ring, one in again.items()}
print("entries that are as if there had been no drafts:", same)
lab.check_that("R = 8 + 3: entries that differ", same[11].count(False), "==", 0)
lab.check_that("R = 8: entries that differ", same[8].count(False), ">", 0)
differing = int((again[11]["state"] != straight[11]["state"]).sum())
lab.check_that("R = 8 + 3: numbers of the ring that differ", differing, "==", 0)

# %% [markdown]
# ## 6. What it moves and uses
#
# Values and scores are float32: 8 bytes a channel. The log of a simulated step of an HCA layer, then what launches use: all 16
# loads of a lane go out together, for which HCA, in rounds, has a few registers too little.

# %%
host = {name: pooling.fresh(inputs, ring=pooling.span(inputs)) for name, inputs in steps.items()}
(trace,) = hopper.traces(cpu, lambda: ops.compress(**pooling.piece(host["hca"], 0, hca_tokens)))
rows = [row for row in trace.traffic().rows if row.tensor in ("values", "scores") and row.direction == "read"]
again_share = pooling.span(steps["hca"]) / hca_tokens  # of the tokens: those that go into the ring
lab.check_that("values and scores are read, times at most", max(row.factor for row in rows), "<=", 1 + again_share)
viz.plot_traffic(**trace.traffic().figure())
with hopper.running(cpu) as launches:
    for name, inputs in host.items():
        ops.compress(**pooling.piece(inputs, 0, lengths[name]))
viz.plot_resources(**sections.print_uses(launches.launches, cache, list(host), most_spilled=200))

# %% [markdown]
# ## 7. Predicted and measured
#
# Predicted: values, scores and keys once, over the bandwidth of a copy. A decode step is a launch and three trips to memory: 3
# to 4 us said its author, 5 where 128 tokens of the ring become an entry; the bar is 6. With `device="cuda"` one long step of
# Flash's width is timed here, cold, replayed from a CUDA graph.

# %%
m, work = profile_tokens, {}
for name, one in steps.items():
    record = keys.record_bytes(model.config, one["record"], index=one["key"] == "index")
    token = 8.0 * one["values"].shape[1]
    work[f"compress {name}"] = roofline.Work((m + pooling.span(one)) * token + m // one["ratio"] * record, 0.0)
bound, time = sections.print_floors(work, base, m)
if time:
    viz.plot_predicted(bound, time, quantity=f"time of {m} tokens (us)", words=("bound", "measured"))

# %%
if target.type == "cuda":
    runs = {}
    for name, one in steps.items():
        step = pooling.fresh(pooling.longer(pooling.on(one, target, rounded=True), m), ring=pooling.span(one))
        runs[f"compress {name}"] = functools.partial(ops.compress, **pooling.piece(step, 0, m))
    print(hopper.table(hopper.profile(target, runs, work, roofline.measure_ceilings(target))))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - An entry is no mean: each channel chooses its own tokens.
# - With overlap each token is in two entries, through channels of its own for each.
# - Where steps begin and end leaves no trace, to the bit; drafts leave none where the ring has room for them.
# - A number comes from memory once; what goes into the ring is read again while it is near.
#
# **Next:** [15 · The indexer](15_indexer.ipynb)
