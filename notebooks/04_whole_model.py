# %% [markdown]
# # 04 · The whole model, in every format
#
# **Question.** What do four-bit and eight-bit weights, activations and cache cost the whole model, and is our model the right one
# to begin with?
#
# **Needs** [02 · Number formats](02_number_formats.ipynb). **Takes** about a minute on two CPU cores; no GPU, no network. The
# comparison with Transformers runs where that package is installed.

# %% tags=["parameters"]
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
device = "auto"  # "auto", "cpu" or "cuda"
num_windows = 6  # stretches of held-out text that are scored
window_tokens = 1024  # tokens a stretch
parity_tokens = 333  # of the comparison with Transformers: odd, across blocks of 4 and 128, and the index has to choose
official_bar = 0.01  # largest rise of perplexity over BF16, as a share
nvfp4_bar = 0.03  # the same for full NVFP4
seed = 3

# %%
import functools
import importlib.util
import math
import tempfile
import warnings
from pathlib import Path

import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.lab import observed, perplexity, weights
from dsv4lab.lab.calibrate import measure_input_amax
from dsv4lab.model.checkpoint import inventory, mxfp4_to_nvfp4, open_checkpoint, parameters, quantize_checkpoint

target = lab.setup(seed, device)
source = Path(checkpoint) if checkpoint else dsv4lab.nano()
scratch = tempfile.TemporaryDirectory()
work = Path(scratch.name)

# %%
# float32, so that formats alone differ: on a GPU some operations run as their reference then, and a warning says which.
load = functools.partial(dsv4lab.load, device=target, dtype=torch.float32)
lab.environment(target)

# %% [markdown]
# ## 1. Three checkpoints of one model
#
# - **official**: as released. FP8 in blocks of 128x128, routed experts MXFP4.
# - **nvfp4**: every matrix that the official format quantises in NVFP4, attention and prediction block included. NVFP4 carries one
#   more constant a matrix, the range of its *input*, which is measured on text that is not scored below.
# - **bf16**: the official weights written out. FP8 and MXFP4 values times a power of two are exact in BF16, so this is the same
#   model; what differs is that nothing is quantised while it runs.

# %%
official = open_checkpoint(source)
tokenizer = load(source).tokenizer
windows = perplexity.held_out_windows(tokenizer, count=num_windows + 1, length=window_tokens)
scored, calibration = windows[:-1], windows[-1].tolist()
amax = measure_input_amax(load(source, numerics="exact"), calibration, layout="nvfp4")
quantize_checkpoint(source, work / "nvfp4", layout="nvfp4", progress=False, input_amax=amax)
quantize_checkpoint(source, work / "bf16", layout="bf16", progress=False)
folders = {"bf16": work / "bf16", "official": source, "nvfp4": work / "nvfp4"}
stored = {name: open_checkpoint(folder) for name, folder in folders.items()}
for name, opened in stored.items():
    lab.check_that(f"{name}: read back as the layout it was written in", opened.layout == name, "==", 1)

# %% [markdown]
# **Bytes, predicted.** A quantised matrix of $n$ weights takes $n$ codes of $b$ bits and a scale per block:
#
# | | bits a code | scale | bits a weight |
# |---|---|---|---|
# | BF16 | 16 | none | 16 |
# | FP8 | 8 | 8 bits per 128 x 128 | 8.0005 where blocks are whole |
# | MXFP4 | 4 | 8 bits per 32 | 4.25 |
# | NVFP4 | 4 | 8 bits per 16, and two floats a matrix | 4.5 |
#
# Everything else (embedding, head, norms, compressors, hyper-connections) is the same in all three.

# %%
config, known = official.config, parameters(official.config)
matrices = {name: p.shape for name, p in known.items() if p.is_matrix}
experts = {name for name in matrices if known[name].kind == "expert"}
rest = sum(spec.nbytes for name, spec in inventory(config, "bf16").items() if name not in matrices)
predicted = dict.fromkeys(stored, rest)
for name, (rows, columns) in matrices.items():
    n = rows * columns
    predicted["bf16"] += 2 * n
    predicted["official"] += n * 17 // 32 if name in experts else n + -(-rows // 128) * -(-columns // 128)
    predicted["nvfp4"] += n // 2 + n // 16 + 8
num_weights = sum(rows * columns for rows, columns in matrices.values())
for layout, opened in stored.items():
    lab.check_that(f"{layout}: tensor bytes", opened.nbytes, "==", predicted[layout], "B")
    lab.record(f"{layout}: bits per quantised weight", 8 * (opened.nbytes - rest) / num_weights, "bit")
lab.record("bytes that no layout quantises", rest, "B")

# %% [markdown]
# ## 2. The weights in the model are the bytes of the file
#
# An independent reader, the safetensors library, opens the file; every buffer of the loaded model is compared with it byte by
# byte. Then the cast of the experts, MXFP4 to NVFP4: blocks of 32 with a power-of-two scale fit blocks of 16 with an E4M3
# scale exactly as long as the exponents of a matrix span no more than E4M3's, so the values must not change at all.

# %%
model = load(source)
on_disk, in_model = weights.stored_bytes(official.files), weights.model_bytes(model)
lab.check_that("tensors that only the file has", len(on_disk.keys() - in_model.keys()), "==", 0)
lab.check_that("tensors that only the model has", len(in_model.keys() - on_disk.keys()), "==", 0)
differing = sum(int((in_model[name] != on_disk[name]).sum()) for name in on_disk)
lab.check_that("bytes that differ", differing, "==", 0, f"of {sum(len(b) for b in on_disk.values())}")

unchanged = castable = 0
for base in sorted({name.rsplit(".", 2)[0] for name in experts}):
    for parts in (["w1", "w3"], ["w2"]):  # w1 and w3 share their global scale
        before, after = ([opened.read(f"{base}.{p}.weight") for p in parts] for opened in (official, stored["nvfp4"]))
        castable += len(parts) * (mxfp4_to_nvfp4(before) is not None)
        unchanged += sum(torch.equal(ops.dequantize(a), ops.dequantize(b)) for a, b in zip(before, after, strict=True))
lab.check_that("expert matrices that the cast leaves as they are", unchanged, "==", castable, f"of {len(experts)}")

# %% [markdown]
# ## 3. Error through depth
#
# The streams after each layer against those of the BF16 model, for one stretch of text. Two things differ in the NVFP4 model: the
# weights, and what is quantised while it runs (activations and cache). If the two errors are independent, their squares add:
#
# $$e_\mathrm{both}^2 \approx e_\mathrm{weights}^2 + e_\mathrm{running}^2 .$$
#
# If they conspired, they would add as they are, and $e_\mathrm{both}$ would be up to $\sqrt 2$ of the prediction.

# %%
variants = {
    "official": ("official", "official"),
    "nvfp4 weights only": ("nvfp4", "exact"),
    "nvfp4": ("nvfp4", "official"),
    "nvfp4, w4a4": ("nvfp4", "w4a4"),
}
models = {"bf16": load(folders["bf16"], numerics="exact")}
models |= {name: load(folders[f], numerics=n) for name, (f, n) in variants.items()}
streams = {name: observed.streams_through_depth(m, [scored[0, :-1].tolist()]) for name, m in models.items()}
reference = streams.pop("bf16")
cosines = {name: observed.row_cosines(got, reference) for name, got in streams.items()}
viz.plot_cosine_depth(cosines, layer_names=[f"{i}: {kind}" for i, kind in enumerate(config.layer_kinds)])

# %%
error = {name: observed.relative_errors(got, reference) for name, got in streams.items()}
predicted_error = (error["nvfp4 weights only"] ** 2 + error["official"] ** 2).sqrt()
for layer, kind in enumerate(config.layer_kinds):
    ratio = float(error["nvfp4"][layer] / predicted_error[layer])
    lab.record(f"layer {layer} ({kind}): error of nvfp4", float(error["nvfp4"][layer]))
    lab.check_that(f"layer {layer} ({kind}): measured over predicted", ratio, "<=", math.sqrt(2))
last = torch.stack([error[name][-1] for name in ("official", "nvfp4", "nvfp4, w4a4")])
lab.check_that("smallest growth of the error with fewer bits", float((last[1:] / last[:-1]).min()), ">", 1)

# %% [markdown]
# ## 4. Perplexity
#
# $\mathrm{ppl} = \exp(\text{mean loss per token})$ on text that the model was not trained on. The formats are compared on the same
# tokens, so the spread that the tokens have by themselves drops out of the difference; its standard error is taken over runs
# of 64 tokens, because neighbours are not independent.

# %%
scoring = {name: m for name, m in models.items() if name != "nvfp4 weights only"}
log_p = {name: perplexity.log_probabilities(m, scored) for name, m in scoring.items()}
losses = {name: perplexity.token_losses(value, scored) for name, value in log_p.items()}
ppl = {name: perplexity.perplexity(value) for name, value in losses.items()}
paired = {name: perplexity.paired_difference(value, losses["bf16"]) for name, value in losses.items() if name != "bf16"}
lab.record("tokens scored", scored[:, 1:].numel())
for name, value in ppl.items():
    lab.record(f"perplexity per token: {name}", value)
bars = {"official": official_bar, "nvfp4": nvfp4_bar}
for name, bar in bars.items():
    lab.check_that(f"perplexity over BF16: {name}", ppl[name] / ppl["bf16"], "<=", 1 + bar)
spread = {name: ppl[name] * paired[name][1] for name in paired}  # d ppl = ppl * d loss
viz.plot_perplexity(ppl, "bf16", limits=bars, spread=spread)

# %% [markdown]
# **Predicted.** Were the BF16 model's probabilities $p$ the truth, another model $q$ would lose $\mathrm{KL}(p \| q)$ nats a token to
# it. The divergence needs no correct answers and hardly spreads, so it is the sharper instrument: it sees changes that the
# loss cannot. But it is a prediction of the loss only for a model that is as sure as it is right and does not know its
# quantised self; nano was trained with the roundings, which moves the measured rise below the predicted one.

# %%
for name, (mean, error_of_mean) in paired.items():
    kl = perplexity.divergence(log_p["bf16"], log_p[name])
    lab.record(f"{name}: rise of the loss, predicted (KL)", float(kl.mean()), "nats/token")
    lab.record(f"{name}: rise of the loss, measured", f"{mean:+.5f} +- {error_of_mean:.5f}", "nats/token")
    lab.check_that(f"{name}: smallest KL of a token", float(kl.min()), ">=", -1e-6)
    same = (log_p[name].argmax(-1) == log_p["bf16"].argmax(-1)).double().mean()
    lab.record(f"{name}: tokens with the same favourite", float(same))
differences = {name: (losses[name] - losses["bf16"]).abs() for name in paired}
viz.plot_error_histogram(differences, unit="nats")

# %% [markdown]
# ## 5. Against Transformers
#
# An implementation that shares no line with ours reads the same BF16 checkpoint and must give the same logits. This is the check
# that the model is the right one; the sections above only say how far formats are from it.

# %%
if importlib.util.find_spec("transformers") is None:
    lab.record("comparison with Transformers", "skipped: the package is not installed (it is a test dependency)")
else:
    warnings.filterwarnings("ignore", message="IProgress not found")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.DeepseekV4ForCausalLM.from_pretrained(folders["bf16"], dtype=torch.float32).eval()
    ids = scored[:2, :parity_tokens]
    with torch.no_grad():
        want = theirs(ids).logits
    got = models["bf16"].logits(ids).cpu()
    lab.check_that("largest logit difference, of their spread", (got - want).abs().max() / want.std(), "<", 1e-4)
    prompt = ids[:1, : parity_tokens // 2]
    options = dict(attention_mask=torch.ones_like(prompt), pad_token_id=0, eos_token_id=None, do_sample=False)
    expected = theirs.generate(prompt, max_new_tokens=40, **options)[0, prompt.shape[1] :]
    lab.check("forty greedy tokens", models["bf16"].generate(prompt[0], 40, stop_ids=()), expected, max_abs=0)

# %%
scratch.cleanup()

# %% [markdown]
# ## Findings
#
# - Every byte of the file is in the model, and the sizes are those that bits per weight predict.
# - MXFP4 experts pass into NVFP4 without a change; the cost of NVFP4 is in the matrices that were FP8.
# - Errors of weights and of activations add like independent ones.
# - Both formats hold their bars. What they change is seen in the divergence first, in the favourites next, in the loss last.
#
# **Next:** [05 · Generation](05_generation.ipynb)
