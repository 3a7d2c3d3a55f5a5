# %% [markdown]
# # 03 · Why attention scores stay in BF16
#
# **Question.** FP8 and FP4 tensor cores are two and four times as fast as BF16. Queries and keys are large in DeepSeek-V4 (512
# channels a head). Why not compute $QK^T$ in four bits?
#
# Queries and keys below are nano's own, caught while it reads Python source that it was not trained on. Each loss is predicted
# from the number format alone, then measured: on the scores, on the probabilities, on the output of the layer, and on the loss
# of the model.
#
# **Needs** nothing: no GPU, no network; [02 · Number formats](02_number_formats.ipynb) explains the formats. **Takes** less than a
# minute on two CPU cores.

# %% tags=["parameters"]
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
device = "cpu"  # references and figures are host arrays
prompt_tokens = 768  # tokens of the text whose attention is studied: 192 CSA entries, 6 HCA entries
shown_queries = 32  # queries of its end that the attention maps show
loss_windows = 4  # stretches of held-out text that the loss is measured on
loss_tokens = 512  # tokens in each
seed = 0

# %%
import json

import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.config import CSA
from dsv4lab.formats import BF16, FP8_ROW, NVFP4
from dsv4lab.lab import observed, perplexity, rounding
from dsv4lab.lab import score_precision as sp

target = lab.setup(seed, device)
# "exact": weights as stored, activations and cache not quantised. The scores are then the only thing that a format touches.
model = dsv4lab.load(checkpoint or dsv4lab.nano(), target, torch.float32, numerics="exact")
config = model.config
roundings = sp.operand_roundings(config.qk_rope_head_dim)
results = {}

# %%
lab.environment(target)

# %% [markdown]
# ## 1. Real queries and keys
#
# A score is $s_n = q \cdot k_n / \sqrt{512}$, a number in nats: it goes through $e^s$. Window keys, compressed entries and the sink
# share one softmax,
#
# $$p_n = \frac{e^{s_n}}{\sum_j e^{s_j} + e^{\mathrm{sink}}}, \qquad o = \sum_n p_n k_n ,$$
#
# and the keys are the values. First the same attention again in float64, from the queries and the cache that the model's own
# attention was given; it must reproduce the model's output.

# %%
window = perplexity.held_out_windows(model.tokenizer, count=1, length=prompt_tokens)
with ops.observe() as calls:
    model.logits(window[:, :-1], step=prompt_tokens)  # one step: no later key takes the place of an earlier one
cases, exact = {}, {}
for layer, kind in enumerate(config.layer_kinds):
    call = observed.only(calls, "attention", f"layers.{layer}")
    label = f"{layer} {kind}"
    (cases[label],) = sp.attention_cases(call)
    exact[label] = sp.attend(cases[label])
    # the model rounds its sum to float32 once
    lab.check(f"layer {label}: attention again", exact[label].output, call.output, rel=1e-5)
    visible = exact[label].scores > -torch.inf
    results[label] = {"score_std": float(exact[label].scores[visible].std())}
    lab.record(f"layer {label}: standard deviation of the scores", results[label]["score_std"], "nats")
    lab.record(f"layer {label}: rms of a query channel", cases[label].q.square().mean().sqrt())
    lab.record(f"layer {label}: rms of a key channel", cases[label].keys.keys.square().mean().sqrt())

# %% [markdown]
# ## 2. The prediction
#
# Rounding changes $q$ by $\delta q$ and $k$ by $\delta k$. If these are independent of everything else, with variances
# $\sigma^2_{q,i}$ and $\sigma^2_{k,i}$ in channel $i$, then
#
# $$\mathrm{var}(\delta s) = \frac{1}{512} \sum_i \left( \sigma_{q,i}^2\, k_i^2 + q_i^2\, \sigma_{k,i}^2 \right).$$
#
# The format says what $\sigma$ is: with relative RMS error $\varepsilon$ it is $\varepsilon$ times the value itself where each code has its
# own exponent (BF16, FP8), and $\varepsilon$ times the RMS of the block of 16 in NVFP4. The $\varepsilon$ below are computed for Gaussian
# values, from the rules of the formats; nothing has been rounded yet.
#
# DeepSeek-V4 normalises queries to RMS 1 and keys by a learned norm. **If** energy lay evenly over the channels, every score
# would be off by $\sqrt 2\, \varepsilon \cdot \mathrm{rms}(k)$ however long the head: 512 channels average nothing away, because the
# score grows with them. Where queries and keys put their energy into the *same few* channels, the sum is larger.
#
# Four candidates: BF16; FP8 with a scale a row; NVFP4; and NVFP4 that spares the 64 rotary channels.

# %%
amax = rounding.typical_amax(rounding.gaussian_magnitude, prompt_tokens * config.head_dim)
epsilon = {
    "BF16": rounding.predict_relative_rms(BF16, rounding.gaussian_magnitude),
    "FP8": rounding.predict_relative_rms(FP8_ROW, rounding.gaussian_magnitude, group=config.head_dim),
    "NVFP4": rounding.predict_relative_rms(NVFP4, rounding.gaussian_magnitude, amax=amax),
}
variance = {name: {label: sp.predict_score_variance(case, name) for label, case in cases.items()} for name in sp.FORMATS}
predicted = {}
for name in sp.FORMATS:
    for label, case in cases.items():
        visible = case.keys.visible[:, None].expand_as(variance[name][label])
        predicted[f"{name}, layer {label}"] = float(variance[name][label][visible].mean().sqrt())
print("relative RMS error of one operand:", {name: f"{100 * value:.3f} %" for name, value in epsilon.items()})

# %%
for label, case in cases.items():
    even = 2**0.5 * epsilon["NVFP4"] * float(case.keys.keys.square().mean().sqrt())
    everywhere, spared = predicted[f"NVFP4, layer {label}"], predicted[f"{sp.FP4_NOPE}, layer {label}"]
    share = results[label]["rotary_share"] = 1 - (spared / everywhere) ** 2
    print(f"layer {label}, NVFP4: {everywhere:.3f} nats; with even energy {even:.3f}; without the rotary part {spared:.3f}")
    lab.record(f"layer {label}: share of the error's variance from the rotary channels", share)
    if not checkpoint:  # what the text says of nano
        lab.check_that(f"layer {label}: share of the rotary channels", share, ">", 0.5)

# %% [markdown]
# ## 3. The scores, measured
#
# Two bounds need no assumption. Cauchy-Schwarz: no score can be off by more than
# $(|\delta q|\,|k'| + |q|\,|\delta k|) / \sqrt{512}$. And BF16 rounds each value by at most $1/257$ of itself, so a score by at most
# $(2 u + u^2)\,\sum_i |q_i k_i| / \sqrt{512}$ with $u = 1/257$.

# %%
rounded = {name: {label: sp.attend(case, roundings[name]) for label, case in cases.items()} for name in sp.FORMATS}
loss = {name: {label: sp.compare_attention(rounded[name][label], exact[label]) for label in cases} for name in sp.FORMATS}
measured = {f"{n}, layer {label}": float(loss[n][label].errors.square().mean().sqrt()) for n in sp.FORMATS for label in cases}
for name in sp.FORMATS:
    worst = max((loss[name][k].errors.abs() / sp.score_error_limit(c, roundings[name])).max() for k, c in cases.items())
    lab.check_that(f"{name}: largest error over Cauchy-Schwarz", worst, "<=", 1 + 1e-9)
u = 1 / 257
for label, case in cases.items():
    size = (case.q.double().abs() @ case.keys.keys.double().abs().T) * case.scale
    limit = (2 * u + u * u) * size[case.keys.visible[:, None].expand_as(size)]
    lab.check_that(
        f"BF16, layer {label}: error over its bound", (loss["BF16"][label].errors.abs() / limit).max(), "<=", 1 + 1e-9
    )
ratio = torch.tensor([measured[name] / predicted[name] for name in predicted])
lab.check_that("smallest measured / predicted", ratio.min(), ">=", 0.5)
lab.check_that("largest measured / predicted", ratio.max(), "<=", 2.0)
viz.plot_predicted(predicted, measured, quantity="RMS error of a score (nats)")

# %%
shown = {name: torch.cat([loss[name][label].errors for label in cases])[::7] for name in ("BF16", "FP8", "NVFP4")}
viz.plot_error_histogram(shown, unit="nats", quantiles=(0.5,))

# %% [markdown]
# The theory holds from the energies of the channels alone; no query had to be rounded to know. And it says where the error comes
# from: nano's queries and keys meet in a few rotary channels. They are an eighth of the head and give most of the error. Where
# the ratio is well above one, the block's mean is too kind: E2M1's steps are widest for the largest value of a block, and that
# is the channel in which the other operand is large as well.
#
# ## 4. The probabilities
#
# Errors of scores move probability. To second order the divergence of a query is half the variance of the errors under its own
# probabilities; for independent errors
#
# $$\mathrm{KL}(p \,\|\, p') \approx \tfrac12 \sum_n (p_n - p_n^2)\, \mathrm{var}(\delta s_n).$$
#
# Without any assumption: $\mathrm{KL} \le r^2 / 8$ with $r$ the spread between a query's largest and smallest error (Hoeffding's
# lemma), and half the sum of $|p - p'|$, the *total variation*, is at most $\sqrt{\mathrm{KL}/2}$ (Pinsker).

# %%
predicted, measured = {}, {}
for name in sp.FORMATS:
    for label in cases:
        got, case_name = loss[name][label], f"{name}, layer {label}"
        predicted[case_name] = float(sp.predict_kl(exact[label], variance[name][label]).mean())
        measured[case_name] = float(got.kl.mean())
        results[label][f"{name} tv"] = float(got.tv.mean())
every = [got for by_layer in loss.values() for got in by_layer.values()]
hoeffding = max((got.kl - got.spread**2 / 8).max() for got in every)
pinsker = max((got.tv - (got.kl.clamp(min=0) / 2).sqrt()).max() for got in every)
lab.check_that("all formats and layers: largest KL - r^2 / 8", hoeffding, "<=", 1e-12, "nats")
lab.check_that("all formats and layers: largest TV - sqrt(KL / 2)", pinsker, "<=", 1e-9)
for label in cases:
    order = [measured[f"{name}, layer {label}"] for name in ("BF16", "FP8", "NVFP4")]
    lab.check_that(f"layer {label}: KL of FP8 over that of BF16", order[1] / order[0], ">", 1)
    lab.check_that(f"layer {label}: KL of NVFP4 over that of FP8", order[2] / order[1], ">", 1)
viz.plot_predicted(predicted, measured, quantity="mean KL divergence of a query's probabilities (nats)")

# %% [markdown]
# Where the ratio at the right is below one, the errors of a query agree among its keys (they share $\delta q$), and a softmax does
# not see a common shift.
#
# Where probability moved: the CSA layer exact, and the absolute change with NVFP4 scores. What it moves is what there is: large
# probabilities change most.

# %%
label = next(k for k in cases if k.endswith(CSA))
first = prompt_tokens - shown_queries
shown = dict(tokens_per_entry=config.csa_ratio)
viz.plot_attention(**sp.probability_map(cases[label], exact[label], first, shown_queries), **shown)
change = sp.probability_map(cases[label], rounded["NVFP4"][label], first, shown_queries, against=exact[label])
viz.plot_attention(**change, **shown, quantity="|change of probability|")
moved = torch.stack([loss["NVFP4"][label].tv.mean(), loss["BF16"][label].tv.mean()])
lab.record("share of probability that moves with NVFP4 scores", moved[0])
lab.record("share of probability that moves with BF16 scores", moved[1])

# %% [markdown]
# ## 5. The output of the layer
#
# The output is $\sum_n p_n k_n$, so it moves by at most $2\,\mathrm{TV} \cdot \max_n |k_n|$. What the next layer sees is the
# direction: cosine to the exact output, for every query and head, and of these the worst.

# %%
cosines, excess = {}, -torch.inf
for name in sp.FORMATS:
    cosines[name] = torch.stack([loss[name][label].cosine.flatten() for label in cases])
    for label, case in cases.items():
        got = loss[name][label]
        moved = (rounded[name][label].output - exact[label].output).norm(dim=-1)
        limit = 2 * got.tv * case.keys.keys.double().norm(dim=-1).max()
        excess = max(excess, float((moved - limit).max()))
        results[label] |= {f"{name} cosine": float(got.cosine.mean()), f"{name} worst cosine": float(got.cosine.min())}
        print(f"{name:22} layer {label:6} mean cosine {got.cosine.mean():.6f}   worst row {got.cosine.min():.6f}")
lab.check_that("all formats and layers: output moved - limit", excess, "<=", 1e-9)
viz.plot_cosine_depth(cosines, layer_names=list(cases))

# %% [markdown]
# ## 6. The loss of the model
#
# Now every layer computes its scores from rounded operands while the model reads held-out text. What should it cost? If the
# model's probabilities are calibrated, its text is a draw from them, and the expected rise of the loss is the divergence between
# the two next-token distributions:
#
# $$\mathbb{E}[\Delta \mathrm{loss}] = \mathrm{KL}(p_\mathrm{exact} \,\|\, p_\mathrm{rounded}).$$
#
# The divergence is averaged over the whole vocabulary, so it is known far better than the difference of losses at single tokens.
# Differences are taken token by token; their standard error is that of runs of 64 tokens.

# %%
windows = perplexity.held_out_windows(model.tokenizer, count=loss_windows, length=loss_tokens)
base = model.logits(windows[:, :-1])
exact = base.cpu().double().log_softmax(-1)
base_losses = perplexity.token_losses(exact, windows)
ppl, whiskers, divergence, rise = {"exact": perplexity.perplexity(base_losses)}, {}, {}, {}
for name in sp.FORMATS:
    with sp.rounded_scores(model, roundings[name]):
        changed = model.logits(windows[:, :-1]).cpu().double().log_softmax(-1)
    losses = perplexity.token_losses(changed, windows)
    rise[name], error = perplexity.paired_difference(losses, base_losses)
    ppl[name], divergence[name] = perplexity.perplexity(losses), float(perplexity.divergence(exact, changed).mean())
    whiskers[name] = error * ppl[name]
    print(f"{name:22} predicted {divergence[name]:+.5f}   measured {rise[name]:+.5f} +- {error:.5f} nats a token")
ax = viz.plot_perplexity(ppl, "exact", spread=whiskers)
ax.set_xlabel("format of the operands of QK^T")

# %%
lab.check_that("BF16: |change of the loss|", abs(rise["BF16"]), "<=", 0.01, "nats a token")
lab.check_that("KL of FP8 over that of BF16", divergence["FP8"] / divergence["BF16"], ">", 1)
lab.check_that("KL of NVFP4 over that of FP8", divergence["NVFP4"] / divergence["FP8"], ">", 1)
with sp.rounded_scores(model, lambda x: x):
    lab.check("scores that are not rounded change nothing", model.logits(windows[:1, :-1]), base[:1], rel=1e-3)
for name in sp.FORMATS:
    lab.record(f"{name}: rise of the loss, predicted", divergence[name], "nats a token")
    lab.record(f"{name}: rise of the loss, measured", rise[name], "nats a token")
results["loss"] = {name: {"predicted": divergence[name], "measured": rise[name], "perplexity": ppl[name]} for name in rise}
if not checkpoint:  # what the text says of nano
    lab.check_that("NVFP4: rise of the perplexity", ppl["NVFP4"] / ppl["exact"] - 1, ">", 0.03)
    lab.check_that("FP8: rise of the perplexity", ppl["FP8"] / ppl["exact"] - 1, "<=", 0.01)
    lab.check_that("rotary BF16: rise against that of all NVFP4", rise[sp.FP4_NOPE] / rise["NVFP4"], "<=", 0.5)
print(json.dumps(results, indent=1))

# %% [markdown]
# ## Findings
#
# - A score's error is set by the significant bits of its operands, and more channels do not average it away. The *relative* error
#   of a probability is the *absolute* error of its score, so a rounding error becomes a percentage.
# - From BF16 to FP8 to NVFP4 the divergence grows with the square of $\varepsilon$, as predicted, and so does the loss.
# - NVFP4 scores cost nano more than 3 % of perplexity, which is this project's whole budget for *all weights* in NVFP4. FP8
#   scores stay within 1 %, the budget of the official format, of which they alone take a visible part.
# - Most of the four-bit error sits in the rotary channels, and sparing them takes away at least half of the loss. The official
#   cache record does the same: these 64 channels stay in BF16, the other 448 are FP8.
# - In BF16 the loss is that of exact scores, within its standard error or near it, and far below any other format's.
#
# So kernels keep $QK^T$ in BF16 with float32 accumulation, as the model's own code does, and spend the narrow formats on weights,
# on the cache, and on the indexer, whose scores only choose and are never exponentiated.
#
# **Next:** [04 · The whole model](04_whole_model.ipynb)
