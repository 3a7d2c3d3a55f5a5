# %% [markdown]
# # 05 · Generation
#
# **Question.** Does the model write, do the ways to make it write faster (batching, the cache, speculative decoding) change
# a single token, and on a GPU, whose kernels are at work?
#
# **Needs** [01 · A prompt's path](01_tour.ipynb). **Takes** about a minute on two CPU cores; no GPU, no network. With
# `device="cuda"`, a Hopper GPU, all text is written in BF16 by our kernels alone: backend "kernel", where a missing one is an
# error.

# %% tags=["parameters"]
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
device = "auto"  # "auto", "cpu" or "cuda"
prompts = ["def ", "class ", "import ", "for i in range(", "    def __init__(self, ", "if __name__ == ", "with open("]
long_prompt_tokens = 250  # tokens of held-out text as one more prompt: crosses a block of 128, and the index has to choose
new_tokens = 72  # tokens a prompt is continued by
temperature = 0.8  # of the sampled continuations; 0 is greedy
top_p = 0.95  # probability mass of the likeliest tokens that are drawn from
draws = 20000  # samples of one token that are compared with its probabilities
most_drafts = 3  # drafted tokens a step, at most
acceptance_bar = 0.5  # share of first drafts that the backbone must accept
seed = 7

# %%
import functools
import math
import time

import numpy as np
import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.config import CSA, HCA, ModelConfig
from dsv4lab.lab import codelike, hopper, observed, partings, perplexity, trace
from dsv4lab.records import index_record, kv_record

target = lab.setup(seed, device)
load = functools.partial(dsv4lab.load, checkpoint or dsv4lab.nano(), target)
model = load()  # float32 on the CPU, BF16 on a GPU
config, tokenizer = model.config, model.tokenizer
held_out = perplexity.held_out_ids(tokenizer)
ids = [tokenizer.encode(text) for text in prompts] + [held_out[-long_prompt_tokens:]]

# %%
on_gpu, reference = target.type == "cuda", functools.partial(dsv4lab.backend, "reference")
ours = functools.partial(dsv4lab.backend, "kernel") if on_gpu else reference
lab.environment(target)

# %% [markdown]
# ## 1. Text
#
# Greedy decoding takes the likeliest token every time: $x_{t+1} = \arg\max_v\, \mathrm{logits}_t[v]$. All prompts run together;
# they have different lengths, and one of them is long.

# %%
start = time.perf_counter()
with ours():
    plain = model.complete(ids, max_new_tokens=new_tokens, stop_ids=())
seconds = time.perf_counter() - start
for prompt, done in zip(prompts, plain, strict=False):
    print(prompt + tokenizer.decode(done.ids, skip_special=True), end="\n" + 72 * "-" + "\n")
lab.record("greedy decoding, all prompts together", len(ids) * new_tokens / seconds, "tokens/s")

# %% [markdown]
# Is it code? A line counts if it parses as Python, alone or as part of a compound statement. Real code does not reach a share
# of one (docstrings, expressions over several lines); tokens drawn by their frequency but in no order show what chance
# gives. The model's text must be nearer to the real code than to chance.

# %%
with ours():
    options = dict(temperature=temperature, top_p=top_p, stop_ids=())
    sampled = model.complete(ids, max_new_tokens=new_tokens, seed=seed, **options)


def written(completions):
    """The text of some completions, without each one's unfinished last line."""
    texts = [tokenizer.decode(p + c.ids, skip_special=True) for p, c in zip(ids[:-1], completions, strict=False)]
    return "".join(text[: text.rfind("\n") + 1] for text in texts)


code = codelike.parsing_share("".join(perplexity.held_out_files().values()))
chance = codelike.parsing_share(tokenizer.decode(codelike.shuffled(held_out, 4000, seed), skip_special=True))
lab.record("lines that parse: held-out code", code)
lab.record("lines that parse: tokens by frequency alone", chance)
lab.record("lines that parse: the model, greedy", codelike.parsing_share(written(plain)))
lab.check_that(
    "lines that parse: the model", codelike.parsing_share(written(plain) + written(sampled)), ">", (code + chance) / 2
)

# %% [markdown]
# **Streaming.** A token is a string of bytes, and a character may be spread over several; the stream decoder holds back what is
# unfinished. The pieces together are the text.

# %%
stream, pieces, stamps = tokenizer.stream(), [], []


def on_token(token):
    """Take one token as it is made."""
    pieces.append(stream.push(token))
    stamps.append(time.perf_counter())


with ours():
    streamed = model.generate(ids[0], new_tokens // 2, stop_ids=(), on_token=on_token).tolist()
pieces.append(stream.finish())
print(pieces[:12])
lab.check_that("streamed text is the decoded text", "".join(pieces) == tokenizer.decode(streamed), "==", 1)
lab.record("time between tokens, median", 1e3 * float(np.median(np.diff(stamps))), "ms")


# %% [markdown]
# The text alone is the text in the batch: bit for bit on the CPU. Kernels on a GPU sum in an order that depends on the number of
# tokens, so there texts may part where two logits are closer than twice the error of the logits there.

# %%
def check_texts(name, prompts, texts, others):
    """Texts must be the same, on a GPU up to a place where rounding decides."""
    apart = [(p, a, b) for p, a, b in zip(prompts, texts, others, strict=True) if a != b]
    explained = [on_gpu and partings.parted_by_rounding(model, *one) for one in apart]
    lab.record(f"{name}: texts that part", len(apart), f"of {len(texts)}")
    lab.check_that(f"{name}: not by rounding", explained.count(False), "==", 0)


check_texts("streamed alone and in the batch", ids[:1], [streamed], [plain[0].ids[: len(streamed)]])

# %% [markdown]
# ## 2. Sampling
#
# With temperature $T$ the next token is drawn from $\mathrm{softmax}(\mathrm{logits} / T)$, cut to the likeliest tokens of mass
# `top_p`. The noise of a draw depends on the request's seed and the position alone, so a request gives the same text in
# any company, up to rounding of its logits. Request $r$ of a batch draws with seed $\mathtt{seed} + r$.

# %%
with ours():
    again, twice, other = (
        model.generate(ids[1], new_tokens // 2, seed=seed + offset, **options).tolist() for offset in (1, 1, 100)
    )
shared = next((i for i, (a, b) in enumerate(zip(again, sampled[1].ids, strict=False)) if a != b), len(again))
lab.check("the same seed, twice", twice, again, max_abs=0)
lab.record("the same seed, alone and in the batch: first tokens alike", shared, f"of {len(again)}")
if not on_gpu:  # there the logits' rounding depends on the batch, see above
    lab.check("the same seed, alone and in the batch", again, sampled[1].ids[: len(again)], max_abs=0)
lab.check_that("tokens that another seed changes", sum(a != b for a, b in zip(again, other, strict=True)), ">", 0)
print(prompts[1] + tokenizer.decode(again), "\n", 72 * "-", "\n", prompts[1] + tokenizer.decode(other))

# %% [markdown]
# Predicted against measured: of $n$ draws, a token of probability $p$ comes up $np \pm \sqrt{np(1-p)}$ times. Beyond
# $\sqrt{2 \ln (2V / 10^{-4})}$ standard errors, chance would go once in ten thousand runs for any of the $V$ tokens.

# %%
vector = dict(temperature=torch.tensor([temperature]), top_k=torch.tensor([0]), top_p=torch.tensor([top_p]))
vector = {name: value.to(target) for name, value in vector.items()}
many = {name: value.expand(draws) for name, value in vector.items()}
many |= dict(seed=torch.arange(draws, device=target), position=torch.full((draws,), len(ids[1]), device=target))
with ours():
    logits = model.logits(ids[1])[0, -1:]
    p = ops.probabilities(logits, **vector)[0].double().cpu()
    drawn = ops.sample(logits.expand(draws, -1), **many).cpu()
frequency = torch.bincount(drawn, minlength=config.vocab_size) / draws
possible = p > 0
lab.check_that("draws outside the nucleus", frequency[~possible].sum(), "==", 0)
common = p * draws >= 10  # below, counts are too small to be normal
z = ((frequency - p) / (p * (1 - p) / draws).sqrt())[common]
lab.record("tokens in the nucleus", int(possible.sum()), f"of {config.vocab_size}")
lab.check_that("largest deviation", z.abs().max(), "<=", math.sqrt(2 * math.log(2e4 * config.vocab_size)), "standard errors")
viz.plot_error_histogram({"frequency of each token": z}, unit="standard errors", num_bins=20)

# %% [markdown]
# ## 3. Speculative decoding
#
# The prediction block (MTP) drafts $n$ tokens; one step of the backbone checks them all and keeps the longest prefix it would
# have written itself. So the text is that of plain greedy decoding, token for token, whatever the drafts are: they only
# decide how many steps it takes.

# %%
runs = {}
for num_drafts in range(1, most_drafts + 1):
    with ours():
        runs[num_drafts] = model.complete(ids, max_new_tokens=new_tokens, stop_ids=(), num_drafts=num_drafts)
    texts = [done.ids for done in runs[num_drafts]]
    check_texts(f"{num_drafts} drafts a step and none", ids, texts, [done.ids for done in plain])
with ours():
    alone = model.complete(ids[-1:], max_new_tokens=new_tokens, stop_ids=(), num_drafts=most_drafts)[0]
check_texts("the long prompt alone and in the batch", ids[-1:], [alone.ids], [plain[-1].ids])
lab.record("its accepted drafts, by place", str(alone.accepted))
if not on_gpu:  # there drafts may part where texts do not
    lab.check("its accepted drafts are those in the batch", alone.accepted, runs[most_drafts][-1].accepted, max_abs=0)

# %% [markdown]
# Acceptance falls after the first draft: the first one is made from the backbone's own streams, each further one from the
# block's guess of them. Greedy text of a small model repeats itself, which is easy to draft; so the first draft is also judged
# in text that the model did not write: is it what the backbone would choose there?

# %%
accepted, drafted = (np.array([getattr(c, part) for c in runs[most_drafts]]).sum(0) for part in ("accepted", "drafted"))
lab.check_that("acceptance of the first draft", accepted[0] / drafted[0], ">", acceptance_bar)
viz.plot_mtp_acceptance(accepted, drafted, bar=acceptance_bar)
with ours():
    agreed = observed.draft_agreement(model, held_out[-1024:])
lab.check_that("first drafts accepted in held-out text", float(agreed.double().mean()), ">", acceptance_bar)

# %% [markdown]
# **Tokens per backbone step, predicted.** With $a_k$ the share of drafts at place $k$ that stand, given that those before stood:
#
# $$E = 1 + a_1 + a_1 a_2 + a_1 a_2 a_3 + \ldots$$
#
# The first token comes from the prompt's own step, and the last step of a request drafts only what is still wanted, so measured
# and predicted may differ by up to $n$ tokens a request.

# %%
for num_drafts, completions in runs.items():
    kept, tried = (np.array([getattr(c, part) for c in completions]).sum(0) for part in ("accepted", "drafted"))
    steps = sum(c.steps for c in completions)
    lab.check_that(f"{num_drafts} drafts: tokens", len(ids) + steps + kept.sum(), "==", len(ids) * new_tokens)
    predicted = 1 + float(np.cumprod(kept / np.maximum(tried, 1)).sum())
    measured = (len(ids) * (new_tokens - 1)) / steps
    lab.record(f"{num_drafts} drafts: tokens per backbone step, measured", measured)
    lab.check_that(
        f"{num_drafts} drafts: predicted minus measured", abs(predicted - measured), "<=", num_drafts * len(ids) / steps
    )

# %% [markdown]
# ## 4. Drift between prefill and decode
#
# A token's streams should not depend on whether the token came with the prompt or one by one. Below, the streams after each
# layer of the long prompt and its continuation: once in one step, once decoded token by token. For scale, the same model with
# BF16 activations against the reference in float32, at distance $e$. Two ways that are both BF16, as a GPU's prefill and decode
# are, may be $2e$ apart; on the CPU both are float32, and the same but for its last bits.

# %%
sequence = ids[-1] + plain[-1].ids
new = slice(len(ids[-1]), None)  # the decoded tokens


def streams(of, *steps):
    """Those of the decoded tokens, by layer."""
    return [layer[new] for layer in observed.streams_through_depth(of, steps)]


with reference():
    full = streams(load(dtype=torch.float32), sequence)
with ours():
    bf16 = streams(load(dtype=torch.bfloat16), sequence)
    prefill, decode = streams(model, sequence), streams(model, ids[-1], *([token] for token in plain[-1].ids))

# %%
drift, rounding = observed.relative_errors(decode, prefill), observed.relative_errors(bf16, full)
for layer, (apart, e) in enumerate(zip(drift.tolist(), rounding.tolist(), strict=True)):
    lab.record(f"layer {layer}: BF16 against float32", e)
    lab.check_that(f"layer {layer}: decode against prefill", apart, "<=", 2 * e if on_gpu else 1e-5)
series = {"decode against prefill": (decode, prefill), "bfloat16 against float32": (bf16, full)}
series = {name: observed.row_cosines(*pair) for name, pair in series.items()}
viz.plot_cosine_depth(series, layer_names=[f"{i}: {kind}" for i, kind in enumerate(config.layer_kinds)])

# %% [markdown]
# ## 5. What the cache costs
#
# The window is a ring of fixed size; what grows are the compressed entries. Per token, a CSA layer adds a quarter of a record
# of 584 bytes and of a 4-bit index key of 68 bytes, an HCA layer 1/128 of a record. Pages are padded to 576 bytes.

# %%
kv, index = kv_record(config.head_dim, config.qk_rope_head_dim), index_record("fp4", config.index_head_dim)
record_bytes = {CSA: kv.data_bytes + kv.scale_bytes + index.data_bytes + index.scale_bytes, HCA: kv.data_bytes + kv.scale_bytes}


def predicted_bytes(c):
    """Bytes of compressed entries per token: the rule above, without padding."""
    return sum(record_bytes[kind] / c.ratio(kind) for kind in c.layer_kinds if kind in record_bytes)


for name, c, table in (("Flash", ModelConfig.flash(), 3514), ("Pro", ModelConfig.pro(), 5031)):
    lab.check_that(f"{name}: growing bytes per token, floor", int(predicted_bytes(c)), "==", table, "B")
sizes = [model.new_cache(max_seqs=1, max_tokens=n * config.block_tokens).nbytes for n in (100, 200)]
measured = (sizes[1] - sizes[0]) / (100 * config.block_tokens)
pages = {CSA: kv.page_bytes(32) + index.page_bytes(32), HCA: kv.page_bytes(1)}
padded = (sum(pages.get(kind, 0) for kind in config.layer_kinds) + 4) / config.block_tokens  # 4: the block table's entry
lab.record("nano: growing bytes per token, without padding", predicted_bytes(config), "B")
lab.check_that("nano: growing bytes per token", measured, "==", padded, "B")
lab.record("a cache of bf16 keys for all tokens would take", 2 * config.head_dim * config.num_hidden_layers, "B per token")

# %% [markdown]
# ## 6. Whose kernels
#
# Every operation that a generation calls must have a kernel of Hopper's that takes its arguments, in BF16. That can be told on
# any machine, from what one calls:

# %%
half, short = load(dtype=torch.bfloat16), dict(max_new_tokens=6, stop_ids=(), num_drafts=2)
with ours(), ops.observe() as calls:
    half.complete(ids[-2:], **short)
table = [{"operation": name, "calls": sum(c.name == name for c in calls)} for name in sorted({c.name for c in calls})]
print(hopper.table(table))
refused = {call.name: why for call in calls if (why := call.missing(hopper.ARCH))}
lab.check_that("operations without a kernel that takes them", len(refused), "==", 0, f"of {len(table)} {refused or ''}")

# %% [markdown]
# On a GPU a profile says what ran, prefill and decode steps, all of it: ours are the classes below `dsv4lab.kernels`; copies
# move values and compute none; there may be nothing else. The first decode step is launched kernel by kernel, each later one is
# the **replay of a CUDA graph**: one launch for drafting, checking and counting, which the profile knows as `cudaGraphLaunch`.

# %%
if on_gpu:
    with ours(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        done = half.complete(ids[-2:], **short)  # once more: all is compiled and prepared
    print(hopper.table(trace.by_name(profile)))
    lab.check_that("kernels that are neither ours nor copies", len(trace.foreign(profile)), "==", 0)
    unseen = trace.rooms_called(calls) - trace.rooms(profile)
    lab.check_that("folders of our kernels that were called and not seen", len(unseen), "==", 0)
    steps = max(c.steps for c in done)
    lab.check_that("decode steps that were a graph's replay", trace.graph_replays(profile), ">=", 1, f"of {steps}")
else:
    print("no GPU: nothing to profile; the operations above are what would run")

# %% [markdown]
# ## Findings
#
# - The text parses far more often than chance; the model learned the language's shape, not its meaning.
# - Batch, stream, seed and drafts leave every token as it is, on a GPU up to rounding. What they change is the number of steps.
# - Tokens per step follow from the acceptance by place; the third draft costs as much as the first and brings the least.
# - Decoding and prefill agree through depth; the choice of a 16-bit activation type moves the streams far more.
# - The compressed cache grows by a small part of what full keys would take.
# - Prefill, decoding, drafting and sampling have a kernel for everything; on a GPU nothing else computes.
#
# **Next:** kernels, one notebook each.
