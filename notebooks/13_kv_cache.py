# %% [markdown]
# # 13 · The paged cache
#
# **Question.** What is one key, byte by byte, where does it lie, and what does it lose there?
#
# Kernels: `dsv4lab/kernels/cache/`, which norm, rotate, quantise and store keys in one pass, and read them back.
#
# **Needs** a C compiler or a Hopper GPU; notebooks 02 (formats) and 12 (norm and rotation) help. **Takes** half a minute on two
# CPU cores, twice that where the kernels have yet to be compiled. With `device="cuda"` the same cells run natively, and the
# last section measures.

# %% tags=["parameters"]
device = "auto"  # "auto", "cpu" (simulated) or "cuda" (native, an sm_90a)
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
tokens = 45  # keys that the kernels write and read, an odd number
text_tokens = 512  # whose keys are studied
loss_windows = 3  # of held-out text, for the loss by record
profile_tokens = 8192  # of the last section
measured = ""  # folder of measured rows; empty: benchmarks/baselines
seed = 0

# %%
import numpy as np
import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.config import CSA, ModelConfig
from dsv4lab.formats import FP8_ROW, NVFP4
from dsv4lab.kernels._common import cache as store
from dsv4lab.lab import baselines, hopper, keys, observed, perplexity, roofline, rounding, sections
from dsv4lab.model.numerics import Numerics
from dsv4lab.records import KV_RECORDS, allocate_kv_pages, kv_record
from dsv4lab.reference import cache, quant

target, cpu = lab.setup(seed, device), torch.device("cpu")
path, flash, million = checkpoint or dsv4lab.nano(), ModelConfig.flash(), 2**20
model = dsv4lab.load(path, device=cpu, dtype=torch.bfloat16)
base = baselines.newest("rope_and_cache", measured)

# %%
lab.environment(target)

# %% [markdown]
# ## 1. A record, byte by byte
#
# A key has 512 numbers; it is also the value. The last 64 were rotated and stay in BF16. The other 448 are E4M3 with a power
# of two for each 64 (`fp8`), or E2M1 with an E4M3 scale for each 16 and one power of two for the record (`nvfp4`). In a page
# all data parts come first, then all scale parts: both are read in whole vectors.

# %%
packed = {name: kv_record(512, 64, name) for name in ("fp8", "nvfp4")}
pool_of = dict(dim=512, rope_dim=64, dtype=torch.bfloat16)
rotary = ("64 rotary dims, BF16", 128)
rows = {
    "plain": [("codes of 448 dims", 896), rotary],
    "fp8": [("codes of 448 dims", 448), rotary, ("block scales", 7), ("padding", 1)],
    "nvfp4": [("codes of 448 dims", 224), rotary, ("block scales", 28), ("record scale", 1), ("padding", 3)],
}
sizes = {name: keys.record_bytes(flash, name) for name in KV_RECORDS}
lab.check("bytes of a record", list(sizes.values()), [sum(n for _, n in row) for row in rows.values()], max_abs=0)
viz.plot_record_bytes(rows)
pages = {}
for name, one in packed.items():
    parts = {"data parts": 64 * one.data_bytes, "scale parts": 64 * one.scale_bytes}
    parts |= {"padding": one.page_bytes(64) - sum(parts.values())} if name == "fp8" else {}  # nvfp4 pages have none
    pages[f"page of 64, {name}"] = list(parts.items())
lab.check("bytes of a page of 64", [one.page_bytes(64) for one in packed.values()], [37440, 24576], max_abs=0)
viz.plot_record_bytes(pages)

# %% [markdown]
# `lab.keys` lays records out by hand, with the quantisers of notebook 02 alone. Which byte changes when dim $i$ changes sign?

# %%
key = torch.randn(1, 512).bfloat16()
flipped, dim = key.where(torch.eye(512) == 0, -key), torch.arange(512)  # row i: dim i has the other sign
for record, one in packed.items():
    changed = (keys.pack(flipped, record)[0] != keys.pack(key, record)[0]).int().argmax(-1)
    codes = one.data_bytes - 128
    place = torch.where(dim < 448, dim * codes // 448, codes + 2 * (dim - 448) + 1)  # a BF16's sign is in its second byte
    lab.check(f"{record}: the byte where dim i keeps its sign", changed, place, max_abs=0)

# %% [markdown]
# ## 2. Addresses: a ring and a table
#
# `slot` = page x records of a page + place. The window of sequence $s$ is a ring: position $p$ in slot $s R + p \bmod R$.
# Entry $j$ of a CSA layer is place $j \bmod 32$ of page `table[s, j // 32]`; one table serves all layers. -1 is nowhere:
# nothing is stored there, zeros are read. Three sequences of nano share a pool; one leaves, another takes its pages.

# %%
ids = perplexity.held_out_windows(model.tokenizer, count=1, length=text_tokens)[0].tolist()
shared = model.new_cache(max_seqs=3, max_tokens=8 * model.config.block_tokens, max_step=64)
first, second, third = (shared.open() for _ in range(3))
ring = np.full((3, shared.ring_len), -1)
for seq, length in ((first, 200), (second, 300), (third, 130), (second, 430), (first, 400)):
    if length == 430:  # the first sequence leaves, a new one takes its place
        shared.close(first)
        ring[first], first = -1, shared.open()
    while (start := shared.lengths[seq]) < length:
        step, _ = model.run_step(shared, [(seq, ids[start : min(start + 64, length)])])
        ring[seq, step.window_slots - seq * shared.ring_len] = step.positions

# %%
held, table, size = shared.lengths, shared.block_table, shared.page_size(CSA)
viz.plot_cache_pages(table, held, num_pages=shared.num_blocks, page_tokens=shared.block_tokens)
for seq, length in enumerate(held):
    last = np.arange(max(length - 128, 0), length)
    lab.check(f"sequence {seq}: its window is in its ring", ring[seq, last % shared.ring_len], last, max_abs=0)
viz.plot_window_ring(ring, names=[f"sequence {s}" for s in range(3)])

# %% [markdown]
# ## 3. Writing
#
# A warp takes a key, a lane 16 of its dims; every lane turns one pair. Norm and rotation are float32 where the reference has
# float64, so of BF16 keys a last bit may differ now and then. What the kernel makes of **its own** key must be the record by
# hand, byte for byte. Pools are poisoned: what has no slot stays.

# %%
with ops.observe() as calls:
    model.logits(torch.tensor(ids[:text_tokens])[None])
real = [call.inputs for call in observed.find(calls, "cache_write", "layers")]
x, where = real[0]["x"][:tokens], real[0]["positions"][:tokens] + 60_000
slots = torch.randperm(3 * 64)[:tokens].where(torch.arange(tokens) % 5 != 1, -1)
operands = [t.to(target) for t in (x, real[0]["norm_weight"], where, real[0]["inv_freq"])]
how, pools = dict(eps=model.config.rms_norm_eps, page_size=64), {}
for record in KV_RECORDS:
    before = allocate_kv_pages(record, num_pages=3, page_size=64, device=target, **pool_of)
    before.view(torch.uint8).fill_(0xAB)
    for schedule in hopper.schedules(target):
        pool, wanted = before.clone(), before.clone()
        with hopper.running(target, schedule):
            ops.cache_write(*operands, pool, slots.to(target), record=record, **how)
        cache.cache_write(*operands, wanted, slots.to(target), record=record, **how)
        apart = int((pool.view(torch.uint8) != wanted.view(torch.uint8)).sum())
        lab.check_that(f"{record}, {schedule}: bytes that differ from the reference's", apart, "<=", 64)
    pools[record] = pool

# %%
mine = pools["plain"].cpu().view(-1, 512)[slots.clamp(min=0)]
for record in packed:
    want = keys.in_pages(mine, record, slots, torch.full_like(pools[record].cpu(), 0xAB), 64)
    lab.check(f"{record}: all bytes, of the kernel's own keys", pools[record], want, max_abs=0)

# %% [markdown]
# ## 4. Reading
#
# Slots in any order, -1 among them, and out comes float32, exactly what the bytes say. Two sequences with the same beginning may
# name the same page.

# %%
known = torch.cat([slots, slots.flip(0), torch.tensor([-1])]).to(target)
for record, pool in pools.items():
    as_stored = dict(record=record, page_size=64, dim=512, rope_dim=64)
    with hopper.running(target):
        got = ops.cache_read(pool, known, **as_stored)
    lab.check(f"{record}: read", got, cache.cache_read(pool, known, **as_stored), max_abs=0)
    lab.check_that(f"{record}: largest number at -1", float(got[known < 0].abs().max()), "==", 0)
entries = shared.layers[model.config.layer_kinds.index(CSA)].entry_pages.to(target)
long = table[second, :3].long()
twin = torch.cat([long[:2], table[first, :1].long()])  # a shared beginning, then a page of its own
j = torch.arange(len(long) * size)
both = torch.stack([row[j // size] * size + j % size for row in (long, twin)]).to(target)
read = dict(record=model.numerics.kv_record, page_size=size, dim=512, rope_dim=64)
with hopper.running(target):
    one, other = (ops.cache_read(entries, row, **read) for row in both)
lab.check("shared pages: the same entries", other[:-size], one[:-size], max_abs=0)

# %% [markdown]
# ## 5. What a key loses
#
# Nano's real keys of a text, written and read back, against the key before any rounding. Then the error that the formats alone
# predict (notebook 02), given how the values are distributed.

# %%
parts = [[a[name] for name in ("x", "norm_weight", "positions", "inv_freq")] for a in real]
exact = torch.cat([cache.kv_norm_rope(x.double(), *rest, eps=how["eps"]) for x, *rest in parts])
errors, got = {}, {}
for record in KV_RECORDS:
    back = keys.round_trip(exact, record).double()
    got[record] = rounding.relative_rms(back[:, :448], exact[:, :448]).value
    errors[record] = (back - exact).square().mean(0).sqrt() / exact.square().mean().sqrt()
words = "448 dims, quantised", "64 rotary dims, BF16"
viz.plot_dim_errors(errors, split=448, words=words, quantity="RMS error over the key's RMS")

# %%
nope = exact[:, :448].float()
quantile, row_rms = rounding.row_magnitudes(nope)
formats = {"fp8": (FP8_ROW, {"group": 64}), "nvfp4": (NVFP4, {"amax": float(nope.abs().max())})}
predicted = {r: rounding.predict_relative_rms(f, quantile, row_rms=row_rms, **more) for r, (f, more) in formats.items()}
worst = {r: rounding.worst_relative_rms(f) for r, (f, _) in formats.items()}
shares = {r: got[r] for r in predicted}
viz.plot_predicted(predicted, shares, bounds=worst, quantity="relative RMS error of the 448 dims (no unit)")
for r, value in shares.items():
    lab.check_that(f"{r}: measured over predicted, less 1", abs(value / predicted[r] - 1), "<=", 0.05)

# %% [markdown]
# The rotary dims lose a BF16's last bit, whatever the record; four bits lose three to four times what eight lose. What of it
# reaches the model? The loss on held-out text, nothing else rounded:

# %%
windows, logs = perplexity.held_out_windows(model.tokenizer, count=loss_windows, length=text_tokens), {}
for record in KV_RECORDS:
    only_keys = Numerics(f"{record} keys", False, False, kv_record=record, index_record="plain")
    logs[record] = perplexity.log_probabilities(dsv4lab.load(path, numerics=only_keys), windows)
losses = {record: perplexity.token_losses(log, windows) for record, log in logs.items()}
found = {record: perplexity.perplexity(loss) for record, loss in losses.items()}
more = {record: perplexity.paired_difference(losses[record], losses["plain"]) for record in packed}
for record in packed:
    lab.record(f"{record}: divergence from plain", float(perplexity.divergence(logs["plain"], logs[record]).mean()), "nats")
viz.plot_perplexity(found, "plain", spread={r: found[r] * error for r, (_, error) in more.items()}).set_xlabel("record of keys");

# %% [markdown]
# ## 6. Why a record's scale is a power of two
#
# NVFP4 wants block scales within E4M3, so a record needs a scale $g$ of its own, $g \ge a/2688$. A float32 $g$ costs three
# more bytes, which the padding would hold. But then code x scale x $g$ has 24 bits, and a decoded key must be rounded before
# tensor cores take it. With a power of two it has 6 bits: decoded keys are BF16 numbers **exactly**, and division by $g$ in
# the quantiser is exact, too. What does it cost? Block scales may lie up to one octave lower in E4M3's fifteen.

# %%
both, lost = {}, {}
for name, g in {
    "power of two": quant.decode_e8m0(quant.nvfp4_power_scale(nope)),
    "largest / 2688": quant.nvfp4_row_scale(nope),
}.items():
    codes, block_scale, _ = quant.quantize_nvfp4(nope[:, None], global_scale=g)
    back = quant.dequantize_nvfp4(codes, block_scale, g)[:, 0]
    both[name], lost[name] = block_scale.float(), rounding.relative_rms(back, nope).value
    lab.record(f"{name}: share that is no BF16", float((back != back.bfloat16().float()).double().mean()))
    if name == "power of two":
        lab.check("decoded keys in BF16", back.bfloat16(), back, max_abs=0)
lab.check_that("error of the one over the other", lost["power of two"] / lost["largest / 2688"], "<=", 1.01)
viz.plot_scale_histogram(both, marks={"largest E4M3": 448.0, "least normal": 2.0**-6})

# %% [markdown]
# ## 7. Memory
#
# A CSA layer adds a quarter of a key and of an index key a token, an HCA layer 1/128 of a key. Window and compressor state do
# not grow. From the record sizes alone, over the specification's table:

# %%
for name, c, want in (
    ("Flash", flash, (3850, 3514, 3.21, 12.2, 4.05)),
    ("Pro", ModelConfig.pro(), (5511, 5031, 4.56, 18.7, 5.80)),
):
    growing = [keys.growing_bytes(c, "fp8", index) for index in ("fp8", "fp4")]
    fixed = keys.fixed_bytes(c, "fp8")
    have = (*growing, *(1e-6 * part for part in fixed), 1e-9 * (million * growing[0] + sum(fixed)))
    lab.check(f"{name}: B a token, FP8 and FP4 index; MB of window, of state; GB at a million tokens", np.array(have) / want, np.ones(5), max_abs=0.003)
    lab.record(f"{name}: NVFP4 keys, FP4 index", keys.growing_bytes(c, "nvfp4", "fp4"), "B a token")
at = 2.0 ** np.arange(7, 21)
growth = {"BF16 keys of every token": at * 1024 * len(flash.layer_kinds)}
for key, index in (("fp8", "fp8"), ("fp8", "fp4"), ("nvfp4", "fp4")):
    bytes_a_token, rest = keys.growing_bytes(flash, key, index), sum(keys.fixed_bytes(flash, key))
    growth[f"{key} keys, {index} index"] = at * bytes_a_token + rest
full, official, *_ = (size[-1] for size in growth.values())
lab.check_that("a million tokens: fp8 keys over BF16 keys of every token", official / full, "<", 0.1)
viz.plot_cache_growth(at, growth, marks={"memory of an H200": 141e9})

# %% [markdown]
# ## 8. What it uses, predicted and measured
#
# Predicted: bytes over the bandwidth of a copy; writing reads 1,024 a key, reading writes 2,048. The bar for few keys is 6 us.

# %%
host = [t.cpu() for t in operands]
with hopper.running(cpu) as run:
    for r, pool in pools.items():
        ops.cache_write(*host, pool.cpu(), slots, record=r, **how)
        ops.cache_read(pool.cpu(), slots, record=r, page_size=64, dim=512, rope_dim=64)
names = [f"cache_{way} {record}" for record in pools for way in ("write", "read")]
viz.plot_resources(**sections.print_uses(run.launches, store, names))
m = profile_tokens
work = {name: roofline.Work(m * ((1024 if "write" in name else 2048) + sizes[name.split()[1]]), 0.0) for name in names}
bound, time = sections.print_floors(work, base, m)
if time:
    viz.plot_predicted(bound, time, quantity=f"time of {m} keys (us)", words=("bound", "measured"))

# %%
if target.type == "cuda":
    many, at, runs = torch.randn(m, 512, device=target).bfloat16(), torch.arange(m, device=target), {}
    mixed, (_, weight, _, freq) = at[torch.randperm(m, device=target)], operands
    for r in KV_RECORDS:
        pool = allocate_kv_pages(r, num_pages=-(-m // 64), page_size=64, device=target, **pool_of)
        read = dict(record=r, page_size=64, dim=512, rope_dim=64)
        runs[f"cache_write {r}"] = lambda r=r, p=pool: ops.cache_write(many, weight, at, freq, p, at, record=r, **how)
        runs[f"cache_read {r}"] = lambda p=pool, read=read: ops.cache_read(p, mixed, **read)
    print(hopper.table(hopper.profile(target, runs, work, roofline.measure_ceilings(target))))
else:
    print("no GPU: nothing is timed, the simulator's clock is no stopwatch")

# %% [markdown]
# ## Findings
#
# - A record is 584 or 384 bytes; the kernel's are those laid out by hand, byte for byte, wherever slots lead.
# - Formats alone predict what real keys lose. A power of two as record scale costs next to nothing, and decoded keys go to
#   tensor cores as they are.
# - At a million tokens Flash's cache is less than a tenth of what BF16 keys of every token would take.
#
# **Next:** [14 · The compressor](14_compressor.ipynb)
