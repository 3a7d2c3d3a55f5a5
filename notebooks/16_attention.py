# %% [markdown]
# # 16 · Attention
#
# **Question.** One key that is also the value, a window, entries from anywhere, a sink: what does a kernel do with a tile of
# keys, and what goes wrong only when there are two?
#
# Kernel: `dsv4lab/kernels/attention/core/`, one for SWA, CSA and HCA, prefill and decode.
#
# **Needs** a C compiler or a Hopper GPU; notebooks 03, 13 and 15 help. **Takes** half a minute on two CPU cores, two where the
# kernels have yet to be compiled. With `device="cuda"` the same cells run natively, and the last section measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
text_tokens = 1024  # of nano's text: 8 HCA entries, 256 CSA entries
shown_queries = 32  # of its end that the maps show
tile = 64  # keys
queries = 3  # of a comparison
measured = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import contextlib
from dataclasses import replace

import numpy as np
import torch

import dsv4lab
from dsv4lab import lab, ops, sim, viz
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.attention.core import api
from dsv4lab.lab import baselines, hopper, keys, observed, perplexity, pooling, roofline, sections
from dsv4lab.model.numerics import OFFICIAL
from dsv4lab.records import KV_RECORDS
from dsv4lab.reference import attention as reference

target, cpu = lab.setup(seed, device), torch.device("cpu")
plain = replace(OFFICIAL, name="plain keys", kv_record="plain")
model = dsv4lab.load(checkpoint or dsv4lab.nano(), device=cpu, dtype=torch.bfloat16, numerics=plain)
base, kinds = baselines.newest("attention", measured), model.config.layer_kinds

# %%
lab.environment(target)

# %% [markdown]
# ## 1. Where queries look
#
# $$s_n = q \cdot k_n / \sqrt{512}, \qquad o = \frac{\sum_n e^{s_n} k_n}{\sum_n e^{s_n} + e^{\mathrm{sink}}}$$
#
# over window and entries together, the same key for every head. The sink takes a share and gives nothing: no key has to be
# looked at. Nano on text that it was not trained on, the mean of its heads; circles: what the indexer chose.

# %%
ids = perplexity.held_out_windows(model.tokenizer, count=1, length=text_tokens)[0][:text_tokens]
with ops.observe() as calls:
    model.logits(ids[None], step=text_tokens)
seen = {kind: observed.only(calls, "attention", f"layers.{i}") for i, kind in enumerate(kinds)}
first, fields = text_tokens - shown_queries, ("window", "compressed", "sink", "query_start", "key_start")
for kind in ("CSA", "HCA"):
    shown = observed.attention_map(seen[kind], first, shown_queries)
    total = shown.window.sum(-1) + shown.compressed.sum(-1) + shown.sink
    lab.check(f"{kind}: probabilities and sink", total, torch.ones_like(total), max_abs=1e-9)
    mine = {name: getattr(shown, name) for name in fields} | dict(tokens_per_entry=seen[kind].inputs["ratio"])
    mine |= dict(selected=seen[kind].inputs["topk_indices"][first:].long()) if kind == "CSA" else {}
    viz.plot_attention(**mine)

# %% [markdown]
# ## 2. Tile by tile
#
# A tile's scores are thrown away before the next is read. In base 2, as `ex2` computes, with $x = s \log_2 e$:
#
# $$m' = \max(m, \max_j x_j), \quad \ell' = 2^{m - m'} \ell + \sum_j 2^{x_j - m'}, \quad
# a' = 2^{m - m'} a + \sum_j 2^{x_j - m'} k_j .$$
#
# After the last tile the sink joins the **denominator only**: $o = a / (\ell + 2^{\mathrm{sink} \log_2 e - m})$. One head of one
# query of nano:

# %%
a, kind, row = seen["CSA"].inputs, "CSA", text_tokens - 1
where = {n: a[n] for n in ("window", "ring_len", "ratio", "record", "window_page", "entry_page", "rope_dim")}
pools, one = (a["window_pages"], a["entry_pages"], a["block_table"]), slice(row, row + 1)
found = reference.gather_keys(*pools, a["positions"][one], 0, a["topk_indices"][one], dim=512, **where)
K, q = found.keys.double().numpy(), a["q"][row, 0].double().numpy()
sink, log2_e = float(a["sinks"][0]) / np.log(2), 1 / np.log(2)


def attend(K, q, *, sink=-np.inf, tile=tile, defect=""):
    """Attention over keys K (n, c) tile by tile -> output (c,), maxima and sums after each tile."""
    m, total, acc, steps = -np.inf, 0.0, np.zeros(K.shape[1]), []
    for t in range(-(-len(K) // tile)):
        part = K[:tile] if defect == "tile index frozen" else K[t * tile : (t + 1) * tile]
        if defect == "last tile not masked":
            part = np.pad(part, ((0, tile - len(part)), (0, 0)))  # zeros where no key is
        x = part @ q * a["scale"] * log2_e
        new = max(m, x.max())
        kept = 1.0 if defect == "sum not rescaled" else np.exp2(m - new)
        p = np.exp2(x - new)
        m, total, acc = new, kept * total + p.sum(), np.exp2(m - new) * acc + p @ part
        steps.append((m, total))
    return acc / (total + np.exp2(sink - m)), np.array(steps)


# %%
out, steps = attend(K, q, sink=sink)
lab.check("one head, tile by tile", out, seen[kind].output[row, 0], row_cosine=0.99999, rel=0.05)
x = K @ q * a["scale"] * log2_e
p = np.exp2(x - x.max()) / (np.exp2(x - x.max()).sum() + np.exp2(sink - x.max()))
lab.check("the same as all at once", out, p @ K, rel=1e-12)
for size in (1, 7, len(K)):
    lab.check(f"tiles of {size}", attend(K, q, sink=sink, tile=size)[0], out, rel=1e-12)
order = np.random.default_rng(seed).permutation(len(K))
lab.check("keys in any order", attend(K[order], q, sink=sink)[0], out, rel=1e-12)
whole = steps[-1, 1] + np.exp2(sink - steps[-1, 0])
shares = steps[:, 1] * np.exp2(steps[:, 0] - steps[-1, 0]) / whole
lab.check("what is missing is the sink's share", 1 - shares[-1], 1 - p.sum(), max_abs=1e-12)
viz.plot_online_softmax(x, steps[:, 0], shares, tile=tile, sink=sink);

# %% [markdown]
# ## 3. Right with one tile
#
# Defects that only a second tile shows. If the tile index stays 0 (a loop that is unrolled once, a pointer that does not move),
# every tile is the first: $a$ and $\ell$ grow alike and **the output is the same for every length**, finite and smooth. No test
# with 64 keys can see it; cosines fall off slowly enough to be taken for rounding.

# %%
defects = "", "tile index frozen", "sum not rescaled", "last tile not masked"
lengths = [32, 64, 65, 96, 128, 192, 256, 512]
more = np.concatenate([found.keys.numpy()[order], np.random.default_rng(1).normal(size=(512, 512)) * K.std()]).astype(float)
wanted = {n: (lambda w: w @ more[:n] / w.sum())(np.exp(more[:n] @ q * a["scale"])) for n in lengths}
cosines, outputs = {}, {}
for defect in defects:
    outputs[defect] = {n: attend(more[:n], q, defect=defect)[0] for n in lengths}
    cosines[defect or "right"] = np.clip([lab.compare(outputs[defect][n], wanted[n]).cosine for n in lengths], -1, 1)
viz.plot_cosine_depth(cosines, layer_names=[str(n) for n in lengths], bar=0.999).set_xlabel("keys")
for defect, by_length in outputs.items():
    lab.check(f"{defect or 'right'}: one full tile", by_length[64], wanted[64], rel=1e-12)
frozen = [outputs["tile index frozen"][n] for n in lengths if n >= 64]
lab.check("frozen: the same output from 64 keys on", np.stack(frozen), np.stack([frozen[0]] * len(frozen)), rel=1e-12)
size = {n: np.linalg.norm(outputs["sum not rescaled"][n]) / np.linalg.norm(wanted[n]) for n in lengths}
lab.record("sum not rescaled: cosine says nothing, length over the right one, 512 keys", float(size[512]))

# %% [markdown]
# Cosines do not see a wrong denominator, which is a factor. So kernels are held to cosine **and** size, at several lengths, each
# query on its own.
#
# ## 4. The kernel
#
# A CTA takes a query with 64 of its heads. Eight warps gather keys by index, decode their record to BF16 and fill a ring; two
# warpgroups multiply, each half of the 512 dims, blocks of 64 keys in turn. Few queries are cut into parts for idle
# multiprocessors, and a second kernel puts them together. Probabilities meet the values in BF16, so the bar is
# what that costs.

# %%
rows = torch.tensor([40, 300, text_tokens - 1])[-queries:]


def given(kind, record, where=target):
    """Inputs of some queries of an observed call, its keys in another record."""
    a = seen[kind].inputs
    some = {n: None if a[n] is None else a[n][rows].contiguous() for n in ("q", "positions", "seq_idx", "topk_indices")}
    pools = {n: None if a[n] is None else keys.repacked(a[n], record) for n in ("window_pages", "entry_pages")}
    return pooling.on(a | some | pools, where, record=record)


cases = [(kind, "fp8") for kind in kinds] + [("CSA", record) for record in KV_RECORDS if record != "fp8"]
table, errors = [], {}
for kind, record in cases:
    inputs = given(kind, record)
    exact = reference.attention(**inputs | dict(q=inputs["q"].double()))
    unrounded = reference.attention(**(base_of := given(kind, "plain")) | dict(q=base_of["q"].double()))
    for schedule in hopper.schedules(target):
        with hopper.running(target, schedule):
            got = ops.attention(**inputs)
        lab.check(f"{kind}, {record}, {schedule}", got, exact, row_cosine=0.9999, rel=0.1, mean_rel=0.004)
    ours, lost = lab.compare(got, exact), lab.compare(exact, unrounded)
    errors[f"{kind}, {record}"] = (got.double() - exact).abs().cpu() / exact.square().mean().sqrt().cpu()
    table.append({"layer, keys": f"{kind}, {record}", "kernel: cosine": ours.cosine, "worst row": ours.worst_row_cosine}
                 | {"record: cosine": lost.cosine, "record: worst row": lost.worst_row_cosine})  # fmt: skip
print(hopper.table([{n: v if isinstance(v, str) else f"{v:.7f}" for n, v in line.items()} for line in table]))
viz.plot_error_histogram(errors, relative=True, quantiles=());
