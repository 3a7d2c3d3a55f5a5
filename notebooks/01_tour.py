# %% [markdown]
# # 01 · A prompt's path through DeepSeek-V4
#
# **Question.** What happens to a prompt between its token ids and the logits of the next token?
#
# The model is *nano*: a small DeepSeek-V4 that this project trained. It has all three attention kinds, both routers and the
# prediction block, and every constant that shapes a kernel is the real one; only widths and counts are small. Everything
# below is a real tensor, caught on its way through the model.
#
# **Needs** nothing: no GPU, no network, no earlier notebook. **Takes** less than a minute on two CPU cores.

# %% tags=["parameters"]
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
device = "auto"  # "auto", "cpu" or "cuda"
prompt_tokens = 400  # tokens: beyond three HCA blocks of 128, so that every kind of attention has something to see
shown_queries = 24  # queries of the end of the prompt that the attention figures show
chunk_tokens = 37  # tokens a step in the chunked prefill: a multiple of nothing
seed = 0

# %%
import numpy as np
import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.config import CSA, HASH, HCA
from dsv4lab.lab import observed, perplexity
from dsv4lab.model.cache import Batch
from dsv4lab.reference.indexer import index_key_read
from dsv4lab.reference.mhc import sinkhorn

target = lab.setup(seed, device)
# float32, as the formulas below are checked: on a GPU some operations run as their reference then, and a warning says which.
model = dsv4lab.load(checkpoint or dsv4lab.nano(), target, torch.float32)
config, tokenizer = model.config, model.tokenizer

# %%
lab.environment(target)

# %% [markdown]
# ## 1. From text to four streams
#
# The tokenizer is a byte-level BPE. Each token's embedding row $e$ is copied into $S = 4$ *residual streams*:
# $X_j = e,\ j = 0 \ldots 3$. The streams are the only state that goes from layer to layer.
#
# The prompt is a file of the Python standard library that the model was not trained on. One step of the model runs over all
# of it, and `ops.observe()` collects every operation with its inputs and its output; the prediction block (MTP) runs as well,
# so that it is on the map.

# %%
text = perplexity.held_out_files()["py_compile.py"]
ids = [tokenizer.bos_id, *tokenizer.encode(text)][:prompt_tokens]
print(tokenizer.decode(ids[1:120]), "...\n")
print("the first tokens:", " ".join(f"{tokenizer.decode([i])!r}:{i}" for i in ids[1:16]))
lab.check_that("decoding gives the text back", text.startswith(tokenizer.decode(ids[1:])), "==", 1)
lab.record("characters per token", len(tokenizer.decode(ids[1:])) / (len(ids) - 1))

# %%
cache = model.new_cache(max_seqs=1, max_tokens=len(ids), max_step=len(ids))
seq = cache.open()
with ops.observe() as calls:
    batch, streams = model.run_step(cache, [(seq, ids)])
    logits = model.head_logits(streams)
    ahead = Batch.plan(cache, [(seq, ids[1:])], starts=[0])
    _, draft_logits = model.predict_next(streams[:-1], ahead.token_ids, ahead)

trunk, kinds, branch = observed.shape_stages(calls, config.layer_kinds, config.router_kinds)
viz.plot_shape_tour(trunk, kinds=kinds, branch=branch, branch_from=trunk[-3][0])
embedded = observed.find(calls, "embed_streams")[0].output
table = model.embed.weight[batch.token_ids].float()
lab.check("every stream starts as the embedding", embedded.float(), table[:, None].expand(embedded.shape), max_abs=0)

# %% [markdown]
# ## 2. Hyper-connections: how the streams are read, written and mixed
#
# Before a sub-layer (attention or experts) three coefficient sets are computed from the streams themselves. The sub-layer
# reads $u = \sum_j \mathrm{pre}_j X_j$; its output $y$ is written back as
#
# $$X'_i = \mathrm{post}_i\, y + \sum_j \mathrm{comb}_{ji} X_j .$$
#
# `comb` is made *doubly stochastic*: no entry negative, all rows and columns with the sum one. Then mixing can neither blow the
# streams up nor let them die, however deep the model is. `pre` may be any number between 0 and 1, `post` between 0 and 2. A
# stream that a sub-layer neither reads nor writes is a wire that passes it by.

# %%
sites = observed.mhc_sites(calls)
names = [site.name for site in sites]
comb = torch.stack([site.comb for site in sites])  # (site, token, old stream, new stream)
# The last step divides columns by their sums + eps, which leaves them at 1 to float32; rows were divided one step earlier.
lab.check("columns of comb sum to 1", comb.sum(-2), torch.ones_like(comb.sum(-2)), max_abs=8 * 2**-24 + 2 * config.hc_eps)
lab.record("rows of comb: largest distance of a sum from 1", (comb.sum(-1) - 1).abs().max())
lab.check_that("smallest entry of comb", comb.min(), ">=", 0)
viz.plot_mhc_mixing(comb[:, -1], site_names=names)

# %%
pre, post = (torch.stack([getattr(site, part) for site in sites]) for part in ("pre", "post"))
lab.check_that("smallest pre", pre.min(), ">=", 0)
lab.check_that("largest pre", pre.max(), "<=", 1 + 2 * config.hc_eps)
lab.check_that("largest post", post.max(), "<=", 2)
viz.plot_mhc_weights(pre, post, site_names=names)
rms = torch.stack([site.streams.float().square().mean(-1).sqrt() for site in sites])
viz.plot_stream_norms(rms, site_names=names)

# %% [markdown]
# **Sinkhorn.** `comb` is made by turns: divide each row by its sum, divide each column by its sum. The distance from doubly
# stochastic shrinks by a constant factor an iteration, and theory says which: the square of the second singular value of the
# limit, $\sigma_2^2$. So the 20 iterations of V4 are a budget that a matrix near a permutation ($\sigma_2 \to 1$) exceeds.

# %%
comb_logits = torch.cat([site.logits for site in sites])
iterations = range(1, config.hc_sinkhorn_iters + 1)
steps = torch.stack([sinkhorn(comb_logits, iters=i, eps=config.hc_eps) for i in iterations])
viz.plot_sinkhorn(steps)
lab.check("our last iteration is the model's comb", steps[-1].float(), comb.flatten(0, 1), max_abs=2**-23)
rows = (steps.sum(-1) - 1).abs().sum(-1)  # (iteration, matrix): summed over rows this can only fall, but for eps in each sum
lab.check_that("largest rise of the row error in an iteration", rows.diff(dim=0).max(), "<=", 8 * config.hc_eps)

some = comb_logits[:: len(comb_logits) // 200]
measured, predicted = observed.sinkhorn_rates(some, iters=40, floor=1e-11)  # float64 rounds at 1e-16
readable = measured.isfinite() & (predicted > 1e-4)
ratio = (measured / predicted)[readable]
lab.record("matrices whose rate can be read", int(readable.sum()), f"of {len(some)}")
lab.check_that("median of measured over predicted rate, above", ratio.median(), "<=", 1.02)
lab.check_that("median of measured over predicted rate, below", ratio.median(), ">=", 0.98)

# %% [markdown]
# The rate is the predicted one, so the picture can be read forward: streams that are blended are balanced in a few iterations,
# down to a floor at `hc_eps`, which is added to every sum. Streams that are nearly kept apart, or nearly exchanged, are not: there
# the iterations are what stops, and a row may be off by far more than rounding.
#
# ## 3. Attention: what a query may see
#
# A query at position $t$ sees the window of the last 128 tokens, itself included, and *compressed entries* that pool $m$
# tokens each. Entry $j$ becomes visible with the token that completes it: $(j + 1)\, m \le t + 1$. CSA layers ($m = 4$) keep
# the best `index_topk` of them, HCA layers ($m = 128$) all, SWA layers have none. In formulas, the counts are
#
# $$n_\mathrm{window} = \min(t + 1, 128), \qquad n_\mathrm{entries} = \min(K, \lfloor (t + 1) / m \rfloor).$$
#
# Window and entries share one softmax. Each head has a *sink*, a logit without a value: where nothing is worth looking at, it
# takes the probability.
#
# $$p_n = \frac{e^{s_n}}{\sum_{n'} e^{s_{n'}} + e^{\mathrm{sink}}}, \qquad s_n = q \cdot k_n / \sqrt{512}$$

# %%
t = torch.arange(len(ids))
for layer, kind in enumerate(config.layer_kinds):
    label, ratio = f"layer {layer} ({kind})", config.ratio(kind)
    call = observed.only(calls, "attention", f"layers.{layer}")
    seen = observed.attention_map(call, 0, len(ids), num_entries=len(ids) // ratio if ratio else 0)
    lab.check(f"{label}: window keys", seen.window_seen.sum(1), (t + 1).clamp(max=config.sliding_window), max_abs=0)
    if ratio:
        entries = ((t + 1) // ratio).clamp(max=config.index_topk if kind == CSA else len(ids))
        lab.check(f"{label}: entries", seen.entries_seen.sum(1), entries, max_abs=0)
        lab.check_that(f"{label}: query {ratio - 1} sees entry 0", seen.entries_seen[ratio - 1, 0], "==", 1)
        lab.check_that(f"{label}: query {ratio - 2} does not", seen.entries_seen[ratio - 2, 0], "==", 0)
    total = seen.window.sum(-1) + seen.compressed.sum(-1) + seen.sink
    lab.check(f"{label}: probabilities with the sink's", total, torch.ones_like(total), max_abs=1e-12)
    lab.record(f"{label}: share of the compressed entries", seen.compressed.sum(-1).mean())
    lab.record(f"{label}: share of the sink", seen.sink.mean())

# %%
first = len(ids) - shown_queries
csa, hca = config.layer_kinds.index(CSA), config.layer_kinds.index(HCA)
topk = observed.only(calls, "index_topk", f"layers.{csa}").output
seen = observed.attention_map(
    observed.only(calls, "attention", f"layers.{csa}"), first, shown_queries, num_entries=len(ids) // 4
)
where = dict(query_start=first, key_start=seen.key_start)
viz.plot_attention(seen.window, seen.compressed, seen.sink, tokens_per_entry=config.csa_ratio, selected=topk[first:], **where)
seen = observed.attention_map(observed.only(calls, "attention", f"layers.{hca}"), first, shown_queries)
viz.plot_attention(seen.window, seen.compressed, seen.sink, tokens_per_entry=config.hca_ratio, **where)

# %% [markdown]
# First the CSA layer, then the HCA layer. Left: compressed entries, marked where the CSA layer's indexer selected them; those
# without a mark get no probability. Middle: the window, a diagonal band. Right: how the probability is shared out.
#
# ## 4. The indexer: which entries are worth reading
#
# CSA layers have entries by the thousand in a long text, so a *lightning indexer* with small heads of its own scores them:
#
# $$I_{tj} = \sum_h w_{th}\, \mathrm{relu}(q^I_{th} \cdot k^I_j), \qquad \text{keep the } K \text{ best.}$$
#
# Queries and keys are turned by a Hadamard matrix and rounded to 4 bits first. The same scores again, here, from the index
# keys in the cache, in one float64 formula; then the test that the selected set is that of the largest scores. In the picture
# scores are of either sign (the head weights $w$ may be negative) and dots are what was kept.

# %%
call = observed.only(calls, "index_scores", f"layers.{csa}")
a, scores, visible = call.inputs, call.output, call.inputs["num_visible"]
j = torch.arange(a["max_entries"], device=target)
slots = a["block_table"][seq].long()[j // a["page_size"]] * a["page_size"] + j % a["page_size"]
keys = index_key_read(a["pages"], slots, record=a["record"], page_size=a["page_size"], dim=config.index_head_dim).double()
weights, q = (a["head_weights"] * a["scale"]).double(), a["q"].double()
again = torch.einsum("th,thj->tj", weights, torch.relu(q @ keys.T))
size = torch.einsum("th,thj->tj", weights.abs(), q.abs() @ keys.abs().T)  # what rounding errors are relative to
may_see = j < visible[:, None]
error = ((scores - again).abs() / size)[may_see].max()
roundings = config.index_head_dim + config.index_n_heads + 2  # of a float32 sum over dims, then heads
lab.check_that("index scores: error against the size of the terms", error, "<=", roundings * 2**-24)

# %%
kept = torch.zeros_like(may_see).scatter_(1, topk.long().clamp(min=0), topk >= 0)
kept[:, 0] = (topk == 0).any(1)  # the empty slots, -1, were scattered there
worst_kept = scores.masked_fill(~kept, torch.inf).amin(1)
best_left = scores.masked_fill(kept | ~may_see, -torch.inf).amax(1)
active = visible > config.index_topk
lab.check_that("queries that see more entries than they keep", int(active.sum()), ">", 0)
lab.check_that("smallest margin between kept and left", (worst_kept - best_left)[active].min(), ">=", 0)
lab.check("how many are kept", kept.sum(1), visible.clamp(max=config.index_topk), max_abs=0)
viz.plot_index_scores(scores[first:], selected=topk[first:], visible=visible[first:], query_start=first)

# %% [markdown]
# ## 5. Experts: by table and by score
#
# After attention each token goes through the shared expert and through $k$ of $E$ routed ones, with weights
# $w_e = \lambda\, s_e / \sum s$ where $s = \sqrt{\mathrm{softplus}(W_g u)}$. The first layers (*hash*) look the experts up in a
# table of token ids; the others choose by score plus a bias that was trained to balance the load.

# %%
for layer, router in enumerate(config.router_kinds):
    name = "router_hash" if router == HASH else "router_topk"
    call = observed.only(calls, name, f"layers.{layer}")
    weight, chosen = call.output
    lab.check(
        f"layer {layer}: weights sum to the scaling",
        weight.sum(1) / config.routed_scaling_factor,
        torch.ones(len(ids)),
        rel=2**-22,
    )
    s = torch.nn.functional.softplus(call.inputs["x"].double() @ call.inputs["gate_weight"].double().T).sqrt()
    if router == HASH:
        wanted = call.inputs["tid2eid"][batch.token_ids]
    else:
        wanted = (s + call.inputs["bias"].double()).topk(config.num_experts_per_tok).indices
    lab.check(f"layer {layer}: the chosen experts", chosen.sort(1).values, wanted.sort(1).values, max_abs=0)
load = observed.expert_counts(calls, config.n_routed_experts)
lab.check("tokens x experts a token", load.sum(1), torch.full((len(load),), len(ids) * config.num_experts_per_tok), max_abs=0)
rows = [f"{i}: {router}" for i, router in enumerate(config.router_kinds)]
viz.plot_expert_load(load, layer_names=rows)

# %% [markdown]
# ## 6. The cache: a ring and pages
#
# Per layer a sequence keeps a ring of window keys (position $p$ in slot $p \bmod R$) and, in CSA and HCA layers, compressed
# entries in blocks of $\mathrm{lcm}(4, 128) = 128$ tokens. All layers share one block table. Below, sequences of different
# lengths share a pool; one leaves, and a longer one takes its pages.

# %%
lengths = [300, 70, 512, 129]
shared = model.new_cache(max_seqs=3, max_tokens=9 * config.block_tokens, max_step=len(ids))
places = [shared.open() for _ in range(3)]
for place, length in zip(places, lengths[:3], strict=True):
    for start in range(0, length, shared.max_step):
        model.run_step(shared, [(place, (ids + ids)[start : min(start + shared.max_step, length)])])
shared.close(places[0])
late = shared.open()
model.run_step(shared, [(late, ids[: lengths[3]])])
held = np.array([shared.lengths[s] for s in range(shared.max_seqs)])
blocks = np.array([len(shared.blocks(s)) for s in range(shared.max_seqs)])
lab.check("blocks a sequence holds", blocks, -(-held // config.block_tokens), max_abs=0)
lab.check_that("blocks free", shared.free_blocks, "==", shared.num_blocks - blocks.sum())
viz.plot_cache_pages(shared.block_table, held, num_pages=shared.num_blocks, page_tokens=config.block_tokens)

# %%
small = model.new_cache(max_seqs=1, max_tokens=len(ids), max_step=chunk_tokens)
place, ring, snapshots, pieces = small.open(), np.full(small.ring_len, -1), [], []
for start in range(0, len(ids), chunk_tokens):
    step, part = model.run_step(small, [(place, ids[start : start + chunk_tokens])])
    pieces.append(model.head_logits(part))
    ring[step.window_slots.cpu()] = step.positions.cpu()
    snapshots.append(ring.copy())
shown = snapshots[2 :: len(snapshots) // 4]
p = np.arange(len(ids) - config.sliding_window, len(ids))
lab.check("the window's tokens are in slots p mod R", ring[p % small.ring_len], p, max_abs=0)
viz.plot_window_ring(np.stack(shown), names=[f"at token {s.max() + 1}" for s in shown])

# %% [markdown]
# The ring is larger than the window by the longest step, so that a step may write all its keys before its first query reads.
#
# ## 7. The next token
#
# The head collapses the streams as `pre` does, normalises, and multiplies with the output embedding: one logit per vocabulary
# entry, $p(\mathrm{token}) = \mathrm{softmax}(\mathrm{logits})$. The prediction block, from the same streams and the next token,
# guesses one token further.
#
# Nothing may depend on how a prompt is cut into steps: the ring above was filled in pieces, and the last check compares what
# came out. The references round once, so pieces should give the same bits; the bar allows a float32 product to be summed in
# another order.

# %%
probability = torch.softmax(logits.double(), dim=-1)
after = tokenizer.encode(text)[len(ids) - 1]
print("the text ends:", repr(tokenizer.decode(ids[-16:])), "and goes on:", repr(tokenizer.decode([after])))
for p_token, token in zip(*(part.tolist() for part in probability[-1].topk(5)), strict=True):
    print(f"  {tokenizer.decode([token])!r:>14}  {100 * p_token:5.1f} %")
truth = torch.tensor(ids, device=target)
lab.record("next token guessed right in the prompt", float((logits[:-1].argmax(-1) == truth[1:]).double().mean()))
lab.record("the one after it, by the prediction block", float((draft_logits[:-1].argmax(-1) == truth[2:]).double().mean()))

# %%
lab.check("logits by the short way are the tour's", model.logits(ids)[0], logits, max_abs=0)
lab.check("logits in pieces are those in one go", torch.cat(pieces), logits, rel=1e-5)

# %% [markdown]
# ## Findings
#
# - Four streams carry everything. Their mixing is doubly stochastic as far as a fixed number of iterations takes it, and how far
#   that is follows from the second singular value.
# - What a query sees follows from its position alone; what it reads among CSA entries is exactly the indexer's best.
# - Hash routing balances by construction of its table, score routing by training; the load map shows how well.
# - Cutting a prompt into steps changes nothing, which is what lets the cache be shared and chunked at will.
#
# **Next:** [02 · Number formats](02_number_formats.ipynb)
