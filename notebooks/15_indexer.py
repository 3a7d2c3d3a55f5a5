# %% [markdown]
# # 15 · The indexer
#
# **Question.** A query of a CSA layer attends to 512 entries of a quarter million. Who chooses them, with how many bits, and how
# good is the choice?
#
# Kernels: `dsv4lab/kernels/indexer/` (query, scores, choice); its keys are made by the compressor (notebook 14).
#
# **Needs** a C compiler or a Hopper GPU; notebook 14 helps. **Takes** half a minute on two CPU cores, longer where the kernels
# have yet to be compiled. With `device="cuda"` the same cells run natively, and the last section measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
text_tokens = 768  # whose choices are studied
shown_queries = 40  # of its end that the map shows
queries = 11  # of a comparison, an odd number
profile_shape = [4096, 16384]  # queries and entries of the last section
measured = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import functools

import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.config import ModelConfig
from dsv4lab.kernels._common import cache
from dsv4lab.lab import baselines, hopper, keys, observed, perplexity, picks, pooling, roofline, sections
from dsv4lab.records import INDEX_RECORDS, allocate_index_pages
from dsv4lab.reference import compressor, indexer
from dsv4lab.reference.quant import fake_mxfp4
from dsv4lab.reference.rope import rope

target, cpu = lab.setup(seed, device), torch.device("cpu")
model = dsv4lab.load(checkpoint or dsv4lab.nano(), device=cpu, dtype=torch.bfloat16)
base, k = baselines.newest("indexer", measured), model.config.index_topk

# %%
lab.environment(target)

# %% [markdown]
# ## 1. A score
#
# Each token has a few small queries $q_h$ (128 channels) and a weight $w_h$ for each; an entry has one small key $k_j$:
#
# $$I_j = \sum_h w_h \max(0,\, q_h \cdot k_j), \qquad \text{chosen: the } K \text{ largest of those that the token may see.}$$
#
# No softmax: the score only chooses. Below, nano reads text that it was not trained on; beyond the line entries are not
# complete yet.

# %%
ids = perplexity.held_out_windows(model.tokenizer, count=1, length=text_tokens)[0][:text_tokens]
with ops.observe() as calls:
    model.logits(ids[None], step=text_tokens)
names = "index_query", "index_scores", "index_topk", "attention"
asked, scored, chose, attended = (observed.only(calls, name, "layers.1") for name in names)
scores, chosen, visible = scored.output, chose.output, chose.inputs["num_visible"]
entries, full = scores.shape[1], visible > k
seen = torch.arange(entries) < visible[:, None]
last = slice(text_tokens - shown_queries, text_tokens)
viz.plot_index_scores(scores[last], selected=chosen[last].long(), visible=visible[last], query_start=last.start)

# %% [markdown]
# ## 2. What is left out
#
# Attention over **all** entries says what a choice is worth: the share of their probability that it keeps. The best possible
# choice takes the largest probabilities; two simple ones take the latest entries, or any.

# %%
p, hidden = picks.entry_probabilities(attended, entries), ~seen
ways = {"indexer": scores, "best possible": p.float(), "latest": torch.arange(entries).float().expand(text_tokens, -1)}
ways["any"] = torch.rand_like(scores)
kept = {}
for name, by in ways.items():
    mask = picks.as_mask(indexer.index_topk(by.masked_fill(hidden, -torch.inf), visible, k=k), entries)
    kept[name] = picks.kept(p, mask)[full]
viz.plot_shares(kept, quantity="probability kept", mark=("all entries", 1.0))
lost = 1 - torch.stack([kept[name].mean() for name in ("indexer", "best possible")])
lab.check_that("no choice beats the best", float((kept["indexer"] - kept["best possible"]).max()), "<=", 1e-6)
if not checkpoint:  # what the text says of nano
    lab.check_that("left out by the indexer over the least possible", float(lost[0] / lost[1]), "<=", 1.5)
    lab.check_that("kept by any over kept by the indexer", float(kept["any"].mean() / kept["indexer"].mean()), "<=", 0.6)

# %% [markdown]
# ## 3. Four bits, eight, sixteen
#
# A score that only chooses may be coarse. If rounding adds noise of RMS $\sigma$ to scores that lie with density $\rho$ about
# the $K$-th, it carries $\rho \int_0^\infty P(\delta > x)\, dx = \rho\, \sigma / \sqrt{2 \pi}$ entries across. Same queries, same
# keys, three records; $\sigma$ is measured on scores, the changes are predicted from it.

# %%
index = next(c.inputs for c in observed.find(calls, "compress", "layers.1") if c.inputs["key"] == "index")
pages, score = {}, {}
for record in INDEX_RECORDS:
    pool = pooling.fresh(index, ring=pooling.span(index), record=record)
    compressor.compress(**pooling.piece(pool, 0, text_tokens))
    q = indexer.index_query(**asked.inputs | dict(record=record))
    pages[record] = pool["pages"]
    score[record] = indexer.index_scores(**scored.inputs | dict(q=q, pages=pool["pages"], record=record))
lab.check("the model's own scores again", score[model.numerics.index_record], scores, max_abs=0)
mask = {record: picks.as_mask(indexer.index_topk(one, visible, k=k), entries) for record, one in score.items()}
predicted, found, noise = {}, {}, {}
for record in ("fp8", "fp4"):
    sigma = picks.error_rms(score[record], score["plain"])
    many = picks.expected_changes(score["plain"], sigma, k=k)
    usable = ~many.isnan()
    predicted[record], noise[record] = float(many[usable].mean()), float(sigma[full].mean())
    found[record] = float(picks.changed(mask["plain"], mask[record])[usable].double().mean())
    lab.check_that(f"{record}: changes over those predicted", found[record] / predicted[record], "<=", 1.5)

# %%
viz.plot_predicted(predicted, found, quantity=f"of {k} entries, chosen otherwise than with plain keys")
viz.plot_shares({r: picks.kept(p, one)[full] for r, one in mask.items()}, quantity="probability kept")
ordered = score["plain"].sort(-1, descending=True).values
gap = (ordered[:, k - 1] - ordered[:, k])[full]
viz.plot_margins({"last chosen - first left out": gap}, bounds=noise, quantity="difference of scores (no unit)")
worth = [float(picks.kept(p, mask[r])[full].mean()) for r in ("plain", "fp4")]
lab.check_that("probability lost to four bits", worth[0] - worth[1], "<=", 0.01)

# %% [markdown]
# Entries at the edge change places, and they matter least: the probability that is kept hardly changes.
#
# ## 4. Hadamard: on both sides, or on neither
#
# Before they are quantised, queries and keys are turned by $H_{128}/\sqrt{128}$, which is orthogonal: no product changes. It
# spreads a large channel over all, and E2M1, whose step follows the largest of 32, gains. On one side alone, $q \cdot Hk$ is
# another product, and **nothing warns**.

# %%
a = scored.inputs
slots = a["block_table"][0].long()[torch.arange(entries) // a["page_size"]] * a["page_size"] + torch.arange(entries) % 32
key = indexer.index_key_read(pages["plain"], slots, record="plain", page_size=a["page_size"], dim=128)
query = rope(asked.inputs["q"], asked.inputs["positions"], asked.inputs["inv_freq"]).float()
flat = dict(record="plain", page_size=entries, block_table=torch.zeros(1, 1, dtype=torch.int32))
turned, sides = {}, {"both": (1, 1), "neither": (0, 0), "query alone": (1, 0), "key alone": (0, 1)}
for name, (on_query, on_key) in sides.items():
    for how, rounded in (("exact", torch.clone), ("FP4", fake_mxfp4)):
        q_seen, k_seen = (rounded(indexer.hadamard(x) if on else x) for x, on in ((query, on_query), (key, on_key)))
        turned[f"{name}, {how}"] = indexer.index_scores(**a | flat | dict(q=q_seen, pages=k_seen[None]))
best = {n: picks.as_mask(indexer.index_topk(s, visible, k=k), entries) for n, s in turned.items()}
same = {n: 1 - picks.changed(best["neither, exact"], one)[full] / k for n, one in best.items()}
viz.plot_shares(same, quantity="chosen as without Hadamard and rounding")
error = {n: float(picks.error_rms(s, turned["neither, exact"])[full].mean()) for n, s in turned.items()}
lab.check_that("both, exact: share chosen alike", float(same["both, exact"].mean()), ">=", 0.999)
lab.check_that("FP4: noise with Hadamard over noise without", error["both, FP4"] / error["neither, FP4"], "<", 1)
lab.check_that("one side: share chosen alike", max(float(same[f"{n} alone, exact"].mean()) for n in ("query", "key")), "<", 0.6)

# %% [markdown]
# ## 5. Ties
#
# Where all heads are cut off, scores are 0. Any choice among equals is right, but two that differ give two texts, so there is a
# rule: **the lower entry wins**, entries come out in ascending order. `torch.topk` promises nothing.

# %%
coarse = torch.randint(-2, 3, (queries, 300)).float().masked_fill(torch.arange(300) >= 280, -torch.inf)
coarse[0, :280], few = 0.0, torch.full((queries,), 280)
few[1], coarse[1, 20:] = 20, -torch.inf  # fewer than are chosen
want = indexer.index_topk(coarse, few, k=k)
for schedule in hopper.schedules(target):
    with hopper.running(target, schedule):
        got = ops.index_topk(coarse.to(target), few.to(target), k=k)
    lab.check(f"ties, {schedule}: the reference's entries", got, want, max_abs=0)

# %% [markdown]
# ## 6. The kernels
#
# The query kernel rounds as the reference does. Scores are exact products of codes, summed in float32; the reference sums in
# float64. The choice must then be the reference's **of these scores**, entry for entry.

# %%
rows = torch.randperm(text_tokens)[:queries].sort().values
rows[-1] = text_tokens - 1


def some(inputs, *names, **other):
    """Inputs with the rows of a comparison alone, on the device."""
    return pooling.on({name: value[rows] if name in names else value for name, value in inputs.items()}, target, **other)


for record in INDEX_RECORDS:
    given = some(asked.inputs, "q", "positions", record=record)
    for schedule in hopper.schedules(target):
        with hopper.running(target, schedule):
            q = ops.index_query(**given)
        lab.check(f"query, {record}, {schedule}", q, indexer.index_query(**given), mean_rel=1e-4, row_cosine=0.9999)

# %%
for record in INDEX_RECORDS:
    q = indexer.index_query(**asked.inputs | dict(record=record))[rows]
    given = some(scored.inputs, "head_weights", "seq_idx", "num_visible", q=q, pages=pages[record], record=record, fill=True)
    want = indexer.index_scores(**given)
    size = float(want[want > -torch.inf].abs().max())
    for schedule in hopper.schedules(target):
        with hopper.running(target, schedule):
            got = ops.index_scores(**given)
            best = ops.index_topk(got, given["num_visible"], k=k)
        lab.check(f"scores, {record}, {schedule}", got, want, max_abs=2.0**-20 * size)
        right = indexer.index_topk(got, given["num_visible"], k=k)
        lab.check(f"choice, {record}, {schedule}", best, right, max_abs=0)

# %% [markdown]
# ## 7. What it moves and uses
#
# The indexer looks at **every** entry, but a key of four bits is 68 bytes where attention would read 584. Few queries have a
# tile each and read keys for themselves, from L2 after the first; of many, four share a tile. A decode step is captured for the
# longest sequences there may be; what they have by then is divided among the CTAs, and what they lack is neither read nor written.

# %%
on_host = pooling.on(given, cpu, pages=pages["fp4"], record="fp4")
query_host = pooling.on(some(asked.inputs, "q", "positions"), cpu)
(trace,) = hopper.traces(cpu, lambda: ops.index_scores(**on_host))
viz.plot_traffic(**trace.traffic().figure())
with hopper.running(cpu) as launched:
    for record in INDEX_RECORDS:
        ops.index_query(**query_host | dict(record=record))
        ops.index_scores(**on_host | dict(pages=pages[record], record=record))
    ops.index_topk(scores[rows], visible[rows], k=k)
names = [f"{what} {record}" for record in INDEX_RECORDS for what in ("query", "scores")] + ["choice"]
viz.plot_resources(**sections.print_uses(launched.launches, cache, names))

# %% [markdown]
# ## 8. Predicted and measured
#
# Predicted: a prefill's scores are products, a decode step's are bytes of keys; the choice reads its scores once.

# %%
m, n = profile_shape
half = n - m // 8  # entries that a query of the last m tokens sees, on average
size = {record: keys.record_bytes(ModelConfig.flash(), record, index=True) for record in INDEX_RECORDS}
products = 2.0 * 64 * 128 * m * half
work = {"scores prefill": roofline.Work(m * 64 * 260.0 + n * size["fp4"] + 4.0 * m * n, products)}
work["scores decode 1 x 262144"] = roofline.Work(262144.0 * (size["fp4"] + 4), 2.0 * 64 * 128 * 262144)
work[f"topk 512 of {m} x {n}"] = roofline.Work(4.0 * m * (half + 512), 0.0)
bound, time = sections.print_floors(work, base, m)
if time:
    viz.plot_predicted(bound, time, quantity=f"time of {m} queries (us)", words=("bound", "measured"))

# %%
if target.type == "cuda":
    q, w = torch.randn(m, 64, 128, device=target).bfloat16(), torch.randn(m, 64, device=target)
    pool = allocate_index_pages("fp4", num_pages=n // 32, page_size=32, dim=128, dtype=torch.bfloat16, device=target)
    pool.random_(64, 128)
    table, sequence = torch.randperm(n // 32, device=target).int()[None], torch.zeros(m, dtype=torch.int64, device=target)
    sees = (torch.arange(4 * n - m, 4 * n, device=target) + 1) // 4
    how = dict(record="fp4", page_size=32, max_entries=n)
    runs = {"scores prefill": functools.partial(ops.index_scores, q, w, pool, table, sequence, sees, **how)}
    runs[f"topk 512 of {m} x {n}"] = functools.partial(ops.index_topk, runs["scores prefill"](), sees, k=512)
    print(hopper.table(hopper.profile(target, runs, work, roofline.measure_ceilings(target))))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - On real text the choice leaves out little more probability than the best choice would.
# - How many choices rounding changes follows from its noise and the density of scores; they matter least.
# - Hadamard on one side alone is silent and ruinous; on both it takes noise away.
# - Ties have a rule, which the kernel keeps.
#
# **Next:** [16 · Attention](16_attention.ipynb)
