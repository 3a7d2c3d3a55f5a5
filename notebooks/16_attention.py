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
# over window and entries together, the same keys for all heads. The sink takes a share and gives nothing. Nano on text that it
# was not trained on, mean of heads; circles: chosen.

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


# %%
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
whole = steps[-1, 1] + np.exp2(sink - steps[-1, 0])
shares = steps[:, 1] * np.exp2(steps[:, 0] - steps[-1, 0]) / whole
lab.check("what is missing is the sink's share", 1 - shares[-1], 1 - p.sum(), max_abs=1e-12)
viz.plot_online_softmax(x, steps[:, 0], shares, tile=tile, sink=sink);

# %% [markdown]
# ## 3. Right with one tile
#
# Defects that only a second tile shows. If the tile index stays 0, every tile is the first: $a$ and $\ell$ grow alike and **the
# output is the same for every length**. No test with 64 keys sees it.

# %%
defects = "", "tile index frozen", "sum not rescaled", "last tile not masked"
lengths = np.array([32, 64, 65, 96, 128, 192, 256, 384])
every = reference.gather_keys(*pools, a["positions"][one], 0, None, dim=512, **where).keys.double().numpy()
every = np.concatenate([every[128:], every[:128]])  # all 256 entries, then the window: 384 keys of nano
wanted = [(lambda w, n=n: w @ every[:n] / w.sum())(np.exp(every[:n] @ q * a["scale"])) for n in lengths]
outputs = {d or "right": np.stack([attend(every[:n], q, defect=d)[0] for n in lengths]) for d in defects}
close = {d: np.array([lab.compare(o, w).cosine for o, w in zip(by, wanted, strict=True)]) for d, by in outputs.items()}
viz.plot_cosine_depth(close, layer_names=[str(n) for n in lengths], bar=0.999).set_xlabel("keys")
wrong = {d: np.linalg.norm(by - wanted, axis=1) / np.linalg.norm(wanted, axis=1) for d, by in outputs.items()}
shown = {d: np.where(by < 1e-12, 0, by) for d, by in wrong.items() if d != "right"}
viz.plot_growing_error(lengths, shown, quantity="error over the output's length").set_xlabel("keys")
lab.check("right, at every length", outputs["right"], wanted, rel=1e-12)
lab.check("any defect: one full tile", [by[1] for by in outputs.values()], [wanted[1]] * len(outputs), rel=1e-12)
frozen = outputs["tile index frozen"][1:]
lab.check("frozen: the same output from 64 keys on", frozen, np.broadcast_to(frozen[0], frozen.shape), rel=1e-12)
lab.check_that("sum not rescaled: least cosine", close["sum not rescaled"].min(), ">", 0.99999999)
lab.check_that("sum not rescaled: largest error", wrong["sum not rescaled"].max(), ">", 0.1)

# %% [markdown]
# Cosines do not see a wrong denominator: kernels are held to cosine **and** size, at several lengths.
#
# ## 4. The kernel
#
# A CTA takes a query with 64 of its heads. Eight warps gather keys by index, decode their record to BF16 and fill a ring; two
# warpgroups multiply blocks of 64 keys in turn. Few queries are cut into parts for idle multiprocessors; a cluster of CTAs
# puts them together, or a second kernel. Probabilities meet the values in BF16: the bar is what that costs.

# %%
rows = torch.tensor([40, 300, text_tokens - 1])[-queries:]


def given(kind, record, where=target):
    """Some queries, keys in another record."""
    a = seen[kind].inputs
    some = {n: None if a[n] is None else a[n][rows].contiguous() for n in ("q", "positions", "seq_idx", "topk_indices")}
    pools = {n: None if a[n] is None else keys.repacked(a[n], record) for n in ("window_pages", "entry_pages")}
    return pooling.on(a | some | pools, where, record=record)


# %%
cases = [(kind, "fp8") for kind in kinds] + [("CSA", record) for record in KV_RECORDS if record != "fp8"]
table = []
for kind, record in cases:
    inputs = given(kind, record)
    exact = reference.attention(**inputs | dict(q=inputs["q"].double()))
    unrounded = reference.attention(**(base_of := given(kind, "plain")) | dict(q=base_of["q"].double()))
    schedules = hopper.schedules(target)
    for schedule in schedules if kind == "CSA" and record == "fp8" else schedules[-1:]:
        with hopper.running(target, schedule):
            got = ops.attention(**inputs)
        lab.check(f"{kind}, {record}, {schedule}", got, exact, row_cosine=0.9999, rel=0.1, mean_rel=0.004)
    ours, lost = lab.compare(got, exact), lab.compare(exact, unrounded)
    table.append({"layer, keys": f"{kind}, {record}", "kernel: cosine": ours.cosine, "worst row": ours.worst_row_cosine}
                 | {"record: cosine": lost.cosine, "record: worst row": lost.worst_row_cosine})  # fmt: skip
print(hopper.table([{n: v if isinstance(v, str) else f"{v:.7f}" for n, v in line.items()} for line in table]))

# %% [markdown]
# Parts of the same keys, put together by $L_i = m_i + \log_2 \ell_i$: the answer depends on their number as on any order of
# summation.

# %%
inputs = {n: v for n, v in given("CSA", "fp8").items() if n != "rope_dim"}
host = contextlib.nullcontext() if target.type == "cuda" else running_on(sim.Host(hopper.ARCH))
with host, hopper.launching(target, hopper.schedules(target)[-1]):
    by_parts = {parts: api.attention(**inputs, parts=parts) for parts in (2, 3)}
exact = reference.attention(**given("CSA", "fp8") | dict(q=inputs["q"].double()))
for parts, got in by_parts.items():
    lab.check(f"{parts} parts", got, exact, row_cosine=0.9999, mean_rel=0.004)

# %% [markdown]
# Many queries that follow each other see few keys in SWA, and in HCA up to 8,192 tokens. There a CTA keeps them all in shared
# memory, and a warpgroup has all scores of a query's 64 heads in registers: one softmax, no maximum that grows, nobody to wait
# for. 4,096 queries at the end of 8,192 tokens took 243 us block by block, and take 195 us so (H200).

# %%
inputs = {n: v for n, v in given("HCA", "fp8").items() if n != "rope_dim"}
host = contextlib.nullcontext() if target.type == "cuda" else running_on(sim.Host(hopper.ARCH))
with host, hopper.launching(target, hopper.schedules(target)[-1]):
    got = api.attention(**inputs, parts=1, resident=True)
exact = reference.attention(**given("HCA", "fp8") | dict(q=inputs["q"].double()))
lab.check("all keys at once", got, exact, row_cosine=0.9999, mean_rel=0.004)

# %% [markdown]
# ## 5. Who does what when
#
# The simulator's clock is a **model**, no measurement. 160 keys are three blocks of 2 x 2 x 64 x 64 x 512 flops, which a lone
# query has several CTAs for; at 4,096 a cycle the tensor core takes 2,048 cycles each.

# %%
few = given("CSA", "fp8", cpu)
few |= {n: few[n][-1:].contiguous() for n in ("q", "positions", "seq_idx", "topk_indices")}
trace, *_ = hopper.traces(cpu, lambda: ops.attention(**few))
timeline = trace.timeline()
viz.plot_warp_timeline(**timeline.figure())
blocks = -(-(model.config.sliding_window + model.config.index_topk) // tile) / len({cta for cta, _ in trace.roles})
cycles = timeline.busy("tensor core") * timeline.cycles / blocks
lab.check("cycles of the tensor core a block, over 2,048", cycles / 2048, 1.0, max_abs=0.1)

# %% [markdown]
# ## 6. What it moves and uses
#
# Records are read once for all heads of a tile, queries by each CTA that has a part of their keys. Of a thread's 128 registers,
# those that gather hand half to those that multiply.

# %%
read = {row.tensor: row.factor for row in trace.traffic().rows if row.tensor in ("near", "far", "q")}
parts = len({cta for cta, _ in trace.roles})
lab.check_that("queries are read, times", read.pop("q"), "==", parts)
lab.check_that("records are read, times at most", max(read.values()), "<=", 1.0)
with hopper.running(cpu) as launched:
    for kind, record in cases:
        ops.attention(**given(kind, record, cpu))
attended = [one for one in launched.launches if "AttentionSm90" in one.launch.kernel.name]  # not those that combine parts
viz.plot_resources(**sections.print_uses(attended, cache, [" ".join(case) for case in cases], most_spilled=256))

# %% [markdown]
# ## 7. Predicted and measured
#
# $4 \cdot 64 \cdot 512$ flops a query and key; a decode step reads 584 bytes for them: 224 flop/byte, near the 200 where an
# H200's memory and tensor cores take equally long. The bars: 480 TFLOP/s in prefill, 36 us for 64 sequences.

# %%
heads, top, window, m = 64, 512, 128, 4096


def work_of(queries, keys_of_each, records):
    """Heads in and out, indices, records; products."""
    moved = queries * (heads * 2048.0 + 4 * top) + 584.0 * records
    return roofline.Work(moved, 4.0 * heads * 512 * queries * keys_of_each)


work = {"flash csa prefill": work_of(m, window + top, window + m + 2 * m // 4)}
work["flash hca prefill 64k"] = work_of(m, window + (65536 - m // 2) / 128, window + m + 512)
work |= {f"flash csa decode {n}": work_of(n, window + top, n * (window + top)) for n in (1, 64, 256)}
sections.print_floors(work, base, m)
ceilings = sections.ceilings_of(base)
rows = [row for row in base.rows if row["shape"] in work and row["format"] == "fp8"]
if rows:
    limits = dict(bandwidth=round(ceilings.bytes_per_s / 1e12, 2), ceilings={"BF16": round(ceilings.flops_per_s / 1e12)})
    viz.plot_roofline(*baselines.roofline_points(rows), [row["shape"] for row in rows], **limits)

# %%
if target.type == "cuda":
    n, k = 64, dict(device=target)
    window_pages, entries = (keys.repacked(torch.randn(n * p, r, 512, **k).bfloat16(), "fp8") for p, r in ((10, 64), (128, 32)))
    how = dict(window=window, ring_len=640, ratio=4, scale=512**-0.5, record="fp8", window_page=64, entry_page=32, rope_dim=64)
    how |= dict(entry_pages=entries, block_table=torch.randperm(n * 128, **k).int().view(n, 128), window_pages=window_pages)
    how |= dict(topk_indices=torch.rand(n, 4096, **k).topk(top).indices.sort(-1).values.int(), sinks=torch.zeros(heads, **k))
    how |= dict(positions=torch.full((n,), 16383, **k), seq_idx=torch.arange(n, **k))
    q = torch.randn(n, heads, 512, **k).bfloat16()
    runs = {"flash csa decode 64": lambda: ops.attention(q, **how)}
    print(hopper.table(hopper.profile(target, runs, work, roofline.measure_ceilings(target))))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - Tile by tile is exact, tiles of any size, the sink at the end.
# - The typical defects are invisible with one tile, and two of them with a cosine.
# - The kernel's error is that of BF16 probabilities and outputs; what a record loses is another, larger matter.
#
# **Next:** [17 · The output projection](17_output_projection.ipynb)
