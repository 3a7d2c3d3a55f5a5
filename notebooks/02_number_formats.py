# %% [markdown]
# # 02 · Number formats: NVFP4, MXFP4, FP8
#
# **Question.** What exactly do the bytes of a four-bit or eight-bit weight mean, what does rounding to them cost, and why can
# a Hopper kernel decode NVFP4 to BF16 without losing a bit?
#
# Every number below is predicted from the format's rules first and measured after. Weights and activations are those of the
# nano model. The kernels that write these bytes are the subject of notebook 08, the one that multiplies them of notebook 09.
#
# **Needs** nothing: no GPU, no network, no earlier notebook. **Takes** about half a minute on two CPU cores.

# %% tags=["parameters"]
checkpoint = ""  # a checkpoint directory; empty: the nano model that is shipped with dsv4lab
device = "cpu"  # formats are bit-exact everywhere; the figures need host arrays
num_rows = 512  # rows of the random matrices, 512 values each
live_factor = 3.0  # how far live activations exceed the calibrated ones in section 9
seed = 0

# %%
import json

import torch

import dsv4lab
from dsv4lab import lab, ops, viz
from dsv4lab.config import CSA, HCA
from dsv4lab.formats import BF16, FP8_BLOCK, FP8_ROW, MXFP4, NVFP4, PackedWeight, atom128x4_offset, from_atom128x4, to_atom128x4
from dsv4lab.lab import observed, perplexity, rounding
from dsv4lab.model.checkpoint.quantize import mxfp4_to_nvfp4
from dsv4lab.reference import quant

target = lab.setup(seed, device)
model = dsv4lab.load(checkpoint or dsv4lab.nano(), target, torch.float32)
layers = dict(zip(model.config.layer_kinds, model.layers, strict=True))
formats = {"NVFP4": NVFP4, "MXFP4": MXFP4, "FP8 rows": FP8_ROW, "FP8 blocks": FP8_BLOCK}
results = {}

# %%
lab.environment(target)

# %% [markdown]
# ## 1. The grids
#
# A code is a sign, an exponent $e$ and a mantissa $m$. With bias $b$ and $M$ mantissa bits,
#
# $$x = (-1)^s\, 2^{e-b}\,(1 + m\,2^{-M}) \quad (e > 0), \qquad x = (-1)^s\, 2^{1-b}\, m\,2^{-M} \quad (e = 0).$$
#
# | format | exponent, mantissa bits | bias | largest | used for |
# |---|---|---|---|---|
# | E2M1 | 2, 1 | 1 | 6 | codes of NVFP4 and MXFP4 |
# | E4M3 | 4, 3 | 7 | 448 (the next code is NaN) | FP8 codes; block scales of NVFP4 |
# | E8M0 | 8, 0 | 127 | $2^{127}$ (255 is NaN) | scales of MXFP4 and FP8: powers of two, no sign |
#
# The formula above, written down once more, must give what the reference decodes.

# %%
e2m1 = quant.decode_e2m1(torch.arange(16, dtype=torch.uint8))
e4m3 = quant.decode_e4m3(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn))
e8m0 = quant.decode_e8m0(torch.arange(256, dtype=torch.uint8))
finite = e4m3.isfinite()
lab.check("E2M1 by the formula", e2m1, rounding.grid_values(bits=4, mantissa_bits=1, bias=1), max_abs=0)
lab.check("E4M3 by the formula", e4m3[finite], rounding.grid_values(bits=8, mantissa_bits=3, bias=7)[finite], max_abs=0)
lab.check("E8M0 is 2^(b - 127)", e8m0[:255].double().log2(), torch.arange(255) - 127, max_abs=0)
lab.check_that("E4M3 codes that are NaN", int((~finite).sum()), "==", 2)
lab.check("largest E2M1 and E4M3", [e2m1.max(), e4m3[finite].max()], [6, 448], max_abs=0)
viz.plot_number_grid({"E2M1": e2m1, "E4M3": e4m3[finite]}, limits=(-6.0, 6.0))
viz.plot_number_grid({"E2M1": e2m1, "E4M3": e4m3[finite], "E8M0": e8m0[:255]}, log2=True, limits=(2.0**-12, 2.0**12))

# %% [markdown]
# E2M1 doubles its step at 2 and at 4: it is a floating-point format, with steps 0.5, 1 and 2. The second picture, with
# magnitudes on a log axis, shows who can scale whom: E8M0 reaches everywhere but only by powers of two, E4M3 hits eight places
# an octave over 18 octaves.
#
# ## 2. Packing
#
# Two codes share a byte along $K$: **the even element is in the low nibble**, the odd one in the high nibble. A decoder that
# swaps them still gives plausible weights, in the wrong order, so two bytes are worth remembering:
# `0x72` is $(+1, +6)$ and `0x9C` is $(-2, -0.5)$.

# %%
packed = torch.tensor([0x72, 0x9C], dtype=torch.uint8)
codes = quant.unpack_e2m1(packed)
lab.check("0x72 0x9C", quant.decode_e2m1(codes), torch.tensor([1.0, 6.0, -2.0, -0.5]), max_abs=0)
lab.check("packing gives the bytes back", quant.pack_e2m1(codes), packed, max_abs=0)
for byte in packed.tolist():
    low, high = quant.decode_e2m1(torch.tensor([byte & 15, byte >> 4], dtype=torch.uint8)).tolist()
    print(f"0x{byte:02X} = {byte >> 4:04b} {byte & 15:04b}   element 0 (low nibble) {low:+.1f}   element 1 (high) {high:+.1f}")

# %% [markdown]
# ## 3. Block scales
#
# A block of consecutive values shares a scale that is chosen by its largest magnitude $a$:
#
# | format | block | rule | bits a weight |
# |---|---|---|---|
# | NVFP4 | 1 x 16 | $s = \mathrm{E4M3}(a / 6g)$, and $x = \mathrm{code} \cdot s \cdot g$ | 4 + 8/16 |
# | MXFP4 | 1 x 32 | $s = 2^{\lceil \log_2 (a / 6) \rceil}$ | 4 + 8/32 |
# | FP8 rows | 1 x 128 | $s = 2^{\lceil \log_2 (a / 448) \rceil}$ | 8 + 8/128 |
# | FP8 blocks | 128 x 128 | the same | 8 + 8/16384 |
#
# $g$ is one float32 for the whole matrix. An E4M3 scale lands within 1/16 of where it should, so $a/s$ lies in
# $6 \pm 6/16$ and **some code of every block is a 6** (while the scale is a normal E4M3 number, $2^{-6}$ or above). A power of two
# is up to twice too large: $a/s$ lies in $(3, 6]$, and half of E2M1's range may stay empty. The price of E4M3 is its short range, which is why NVFP4 needs $g$.
#
# The matrix is nano's token embedding: real weights that the checkpoint stores in BF16.

# %%
weight = model.embed.weight.float()
stored = {label: quant.quantize(weight, fmt.name) for label, fmt in formats.items()}
wanted_bits = dict(zip(formats, (4 + 8 / 16 + 32 / weight.numel(), 4 + 8 / 32, 8 + 8 / 128, 8 + 8 / 128**2), strict=True))
for label, bits in wanted_bits.items():
    lab.check_that(f"{label}: stored", stored[label].nbytes * 8 / weight.numel(), "==", bits, "bits a weight")
codes = {label: quant.unpack_e2m1(stored[label].codes) for label in ("NVFP4", "MXFP4")}
nv_scale, mx_scale = quant.decode_e4m3(stored["NVFP4"].scale), quant.decode_e8m0(stored["MXFP4"].scale)
nv_top = quant.decode_e2m1(codes["NVFP4"]).abs().unflatten(-1, (-1, 16)).amax(-1)
mx_top = quant.decode_e2m1(codes["MXFP4"]).abs().unflatten(-1, (-1, 32)).amax(-1)
lab.check_that("NVFP4: least of the blocks' largest codes", nv_top[nv_scale >= 2**-6].min(), "==", 6)
lab.check_that("MXFP4: least of the blocks' largest codes", mx_top[mx_top > 0].min(), ">=", 3)
lab.record("MXFP4: share of blocks that use the code 6", (mx_top == 6).double().mean())
viz.plot_scale_histogram({"NVFP4: s g": nv_scale * stored["NVFP4"].global_scale, "MXFP4: s": mx_scale}, bins_per_octave=8)
viz.plot_code_histogram(codes, e2m1)

# %% [markdown]
# Above: what one unit of a code is worth. NVFP4 follows the weights smoothly, MXFP4 in octaves. Below: the shares of the 16
# codes. NVFP4's spread reaches to the ends; MXFP4 crowds the middle, where the grid has no finer steps to offer.
#
# ## 4. Anatomy of the error
#
# Rounding to the nearest code is worst halfway between two codes. Relative to the value that is at most
# $2^{-(M+1)} / (1 + 2^{-(M+1)}) = 1/(2^{M+1} + 1)$: 1/5 for E2M1 ($M = 1$), 1/17 for E4M3 ($M = 3$), 1/257 for BF16 ($M = 7$). Below the smallest code values flush to
# zero (error 100 %), above the largest they saturate.
#
# **The zero block.** A block of zeros has no largest value to follow; each format stores an agreed scale (1, $2^{-126}$,
# $2^{-22}$), so that no kernel divides by zero. And because NVFP4's block scale cannot go below $2^{-9}$, a block vanishes whole
# when its largest value is at most $0.25 \cdot 2^{-9} g$, that is $2^{-11}/2688$ of the largest value of the matrix.

# %%
ladder = torch.cat([torch.logspace(-14, 11, 60_000, base=2.0), torch.tensor([1.25, 1 + 1 / 16, 1 + 1 / 256])])
rounded = {
    "E2M1": quant.decode_e2m1(quant.encode_e2m1(ladder)),
    "E4M3": quant.decode_e4m3(quant.encode_e4m3(ladder)),
    "BF16": ladder.bfloat16().float(),
}
normal = {"E2M1": (1, 6, 1 / 5), "E4M3": (2**-6, 448, 1 / 17), "BF16": (0, torch.inf, 1 / 257)}
for name, (low, high, worst) in normal.items():
    x, y = (v[(ladder >= low) & (ladder <= high)].double() for v in (ladder, rounded[name]))
    lab.check(f"{name}: worst relative error between {low:g} and {high:g}", ((y - x).abs() / x).max(), worst, rel=1e-6)
edges = torch.tensor([0.25, 0.2501, 1e3, 2.0**-10, 2.0**-10 * 1.001, 1e4])
ends = torch.cat([quant.decode_e2m1(quant.encode_e2m1(edges[:3])), quant.decode_e4m3(quant.encode_e4m3(edges[3:]))])
lab.check("flush, smallest code, saturation", ends, torch.tensor([0, 0.5, 6, 0, 2.0**-9, 448]), max_abs=0)
viz.plot_error_anatomy(ladder, rounded, floor=1e-3)

# %%
zeros = torch.zeros(128, 128)
for (label, fmt), agreed in zip(formats.items(), (1.0, 2.0**-126, 2.0**-22, 2.0**-22), strict=True):
    empty = quant.quantize(zeros, fmt.name)
    scale = quant.decode_e4m3(empty.scale) if fmt is NVFP4 else quant.decode_e8m0(empty.scale)
    lab.check_that(f"{label}: scale of a block of zeros", scale.unique(), "==", agreed)
    lab.check(f"{label}: zeros decode to zeros", quant.dequantize(empty), zeros, max_abs=0)
floor = 2.0**-11 / quant.NVFP4_RANGE
two_blocks = torch.full((2, 16), 1.0) * torch.tensor([[1.0], [0.0]])
for name, size, survives in (("just above", 1.01 * floor, 1), ("at", floor, 0)):
    two_blocks[1] = size
    lab.check_that(f"a block {name} the floor survives", bool(quant.fake_nvfp4(two_blocks)[1].any()), "==", survives)
results["nvfp4_range_log2"] = float(-torch.tensor(floor).log2())

# %% [markdown]
# ## 5. The direction of the global scale
#
# In this house $g$ points in the **decode** direction: $x = \mathrm{code} \cdot s \cdot g$ with $g = a_\mathrm{matrix} / (6 \cdot 448)$,
# as `weight_scale_2` in checkpoints. Other libraries call $1/g$ "the global scale"; ours is then named `inv_global_scale`. A
# mix-up multiplies the matrix by $g^{-2}$: nothing looks broken, everything is. Another way to see what $g$ is for: scaling a
# matrix by $2^k$ must change $g$ and not a single code or block scale.

# %%
packed = stored["NVFP4"]
g = packed.global_scale
lab.check("g = amax / 2688", g, weight.abs().max() / quant.NVFP4_RANGE, max_abs=0)
right, wrong = quant.dequantize(packed), quant.dequantize_nvfp4(packed.codes, packed.scale, 1 / g)
lab.check_that(
    "decode direction: relative RMS error", rounding.relative_rms(right, weight).value, "<=", rounding.worst_relative_rms(NVFP4)
)
lab.check("wrong direction: too large by g^-2", (wrong.double().norm() / right.double().norm()), g.double() ** -2, rel=1e-6)
scaled = quant.quantize(weight * 2.0**10, "nvfp4")
lab.check("codes of 2^10 W", scaled.codes, packed.codes, max_abs=0)
lab.check("block scales of 2^10 W", scaled.scale.float(), packed.scale.float(), max_abs=0)
lab.check("global scale of 2^10 W", scaled.global_scale / g, torch.tensor(2.0**10), max_abs=0)

# %% [markdown]
# ## 6. What a format costs, predicted
#
# For independent values with magnitude quantiles $Q$ and blocks of $n$, the largest of a block is $Q(v^{1/n})$ with $v$ uniform,
# the others are $Q(u\, v^{1/n})$ with $u$ uniform. The largest sets the scale, the format rounds all of them, and
#
# $$\varepsilon = \frac{\mathrm{rms}(\hat x - x)}{\mathrm{rms}(x)}$$
#
# follows by two sums over quantiles, without drawing a sample (`lab.rounding`). Two distributions: a Gaussian, and Student's $t$
# with four degrees of freedom, whose tail is so heavy that its kurtosis is infinite. There is also a worst case that no block
# whatever can pass: its largest value in the middle of a gap, and all others just small enough to vanish.

# %%
shape = (num_rows, 512)
quantiles = {"Gaussian": rounding.gaussian_magnitude, "Student t4": rounding.student4_magnitude}
amax = {name: rounding.typical_amax(q, shape[0] * shape[1]) for name, q in quantiles.items()}
ours = formats | {"BF16": BF16}
cases = {f"{label}, {name}": (fmt, name) for name in quantiles for label, fmt in ours.items()}
predicted = {case: rounding.predict_relative_rms(fmt, quantiles[name], amax=amax[name]) for case, (fmt, name) in cases.items()}
worst = {case: rounding.worst_relative_rms(fmt) for case, (fmt, _) in cases.items() if fmt is not BF16}
for case, value in predicted.items():
    bound = f"   worst block {100 * worst[case]:6.2f} %" if case in worst else ""
    print(f"{case:24} {100 * value:8.4f} %{bound}")

# %%
samples = {"Gaussian": torch.randn(shape), "Student t4": torch.distributions.StudentT(4.0).sample(shape)}
decoded = {case: quant.dequantize(quant.quantize(samples[name], fmt.name)) for case, (fmt, name) in cases.items()}
measured = {case: rounding.relative_rms(decoded[case], samples[name]) for case, (_, name) in cases.items()}
for case, got in measured.items():
    slack = 5 * got.standard_error + 0.005 * predicted[case]  # five sigma, and half a percent for the sums over quantiles
    lab.check_that(f"{case}: |measured - predicted|", abs(got.value - predicted[case]), "<=", slack)
values = {case: got.value for case, got in measured.items()}
spread = {case: got.standard_error for case, got in measured.items()}
viz.plot_predicted(predicted, values, spread=spread, bounds=worst, quantity="relative RMS error (no unit)")
results["relative_rms"] = {case: round(value, 6) for case, value in values.items()}

# %% [markdown]
# Two lessons for a kernel's tests. The error of a four-bit weight is about a tenth of the weight, by construction: cosines near
# $1 - \varepsilon^2/2$ are what a *correct* kernel gives against unquantised weights. And heavy tails hurt MXFP4, whose blocks
# are twice as long and whose scale is coarse, but not NVFP4: the error of a large value is small relative to itself, and it is
# large values that carry the energy.
#
# **Nano's own weights.** The prediction now takes their measured distribution within a row and the sizes of the rows, and still
# assumes that the values of a block are independent. Only matrices with fine values can tell: one that already lies on a
# format's grid has no error in that format left, and nano's compressors and head were packed with short mantissas.

# %%
csa, hca = layers[CSA], layers[HCA]
matrices = {"embedding": model.embed.weight, "CSA router": csa.ffn.gate.weight}
matrices |= {"CSA streams": csa.hc_attn.fn, "HCA streams": hca.hc_ffn.fn}  # the projections of hyper-connections
chosen = [label for label in formats if label != "FP8 blocks"]  # one row of blocks a matrix is too few for a distribution
pairs = {f"{label}, {name}": rounding.measure_matrix(formats[label], m) for name, m in matrices.items() for label in chosen}
predicted = {case: pair[0] for case, pair in pairs.items()}
values = {case: pair[1].value for case, pair in pairs.items()}
bounds = {case: rounding.worst_relative_rms(formats[case.split(",")[0]]) for case in pairs}
for case, value in values.items():
    lab.check_that(f"{case}: relative RMS error", value, "<=", bounds[case])
ratio = torch.tensor([values[case] / predicted[case] for case in values])
lab.check_that("largest |measured / predicted - 1|", (ratio - 1).abs().max(), "<=", 0.1)
viz.plot_predicted(predicted, values, bounds=bounds, quantity="relative RMS error (no unit)")
results["nano_relative_rms"] = {case: round(value, 6) for case, value in values.items()}

# %% [markdown]
# Trained weights behave like independent values of their own distribution: a format's cost can be told from a histogram.
#
# ## 7. Why `code * block_scale` is exact in BF16
#
# E2M1 has 2 significant bits, E4M3 has 4. A product has at most the sum, **6**; BF16 holds 8 and has exponent to spare. So
# decoding to BF16 loses nothing, and $g$ can wait for the epilogue, in float32. In E4M3, with its 4 bits, it does not work. How
# many of the $16 \times 254$ finite products need more than 4 bits? A code $\pm 1.5 \cdot 2^j$ (6 of 16) makes $3 m$ of a mantissa
# $m \in 8 \ldots 15$; $3m$ needs 5 or 6 bits for $m \in \{9, 11, 13, 14, 15\}$. With 15 exponents, less the NaN at the top
# ($m = 15$), plus the subnormal $m = 7$, and two signs, that is $6 \cdot 2 \cdot (15 \cdot 5 - 1 + 1) = 900$.
#
# So a Hopper kernel may stream packed codes, decode them to BF16 in registers, multiply with float32 accumulation and apply $g$
# once: $y = g\,(x \cdot \mathrm{bf16}(\mathrm{code} \cdot s))$ is the block-scaled product up to the order of summation. Here is
# that kernel's arithmetic against float64, on nano's LM head and random BF16 activations. The bar is that of a float32 sum of
# $K$ terms: $K\,2^{-24}$ of the sum of magnitudes.

# %%
scales = e4m3[e4m3.isfinite()]
product = e2m1[:, None] * scales  # exact in float32: 24 bits
needed = rounding.significant_bits(product)
lab.check_that("most bits that a product needs", int(needed.max()), "==", 6)
lab.check_that("products that need more than 4 bits", int((needed > 4).sum()), "==", 900)
in_bf16, in_fp8 = product.bfloat16().float(), quant.decode_e4m3(quant.encode_e4m3(product))
lab.check("all 16 x 254 products in BF16", in_bf16, product, max_abs=0)
lab.check_that("products that E4M3 changes", int((in_fp8 != product).sum()), ">=", 900)
nonzero = product != 0
errors = {name: ((got - product).abs() / product.abs())[nonzero] for name, got in (("BF16", in_bf16), ("E4M3", in_fp8))}
viz.plot_error_histogram(errors, relative=True)
results["products_by_bits"] = {bits: int((needed == bits).sum()) for bits in range(7)}

# %%
head = quant.quantize(model.head.weight.float().cpu(), "nvfp4")
codes = quant.decode_e2m1(quant.unpack_e2m1(head.codes))
decoded = (codes * quant.decode_e4m3(head.scale).repeat_interleave(NVFP4.group, -1)).bfloat16()
x, w = torch.randn(37, head.shape[-1]).bfloat16(), quant.dequantize(head).double()
y = (x.float() @ decoded.float().T) * head.global_scale
exact, size = x.double() @ w.T, x.double().abs() @ w.abs().T
lab.check_that("error against the sum of magnitudes", ((y - exact).abs() / size).max(), "<=", head.shape[-1] * 2.0**-24)

# %% [markdown]
# ## 8. From MXFP4 to NVFP4 without loss
#
# Routed experts ship as MXFP4. With $k$ a block's E8M0 exponent and $k_\max$ the largest of the matrices that share $g$, take
# $g = 2^{k_\max - 8}$ and block scale $2^{k - k_\max + 8}$, and keep the nibbles. E4M3 holds the powers of two from $2^{-9}$ to
# $2^8$, so exponents may span **17** binades; a wider span has no exact cast. Re-quantising the decoded weights instead moves the
# grid.

# %%
experts = layers[CSA].ffn.experts
pair = [experts.w1.weight[0], experts.w3.weight[0]]  # w1 and w3 of an expert share their global scale
cast = mxfp4_to_nvfp4(pair)
exponents = torch.cat([w.scale.view(torch.uint8).flatten().int() for w in pair]) - 127
lab.check_that("binades that the exponents span", int(exponents.max() - exponents.min()), "<=", 17)
for name, old, new in zip(("w1", "w3"), pair, cast, strict=True):
    lab.check(f"{name}: the same nibbles", new.codes, old.codes, max_abs=0)
    lab.check(f"{name}: the same weights", quant.dequantize(new), quant.dequantize(old), max_abs=0)
again = quant.quantize(quant.dequantize(pair[0]), "nvfp4")
lab.record(
    "relative RMS error of re-quantising instead",
    rounding.relative_rms(quant.dequantize(again), quant.dequantize(pair[0])).value,
)
for span, possible in ((17, 1), (18, 0)):
    scale = (torch.tensor([[127, 127 - span]], dtype=torch.uint8)).view(torch.float8_e8m0fnu)
    wide = PackedWeight(MXFP4, torch.full((1, 32), 0x22, dtype=torch.uint8), scale)
    lab.check_that(f"a span of {span} binades can be cast", mxfp4_to_nvfp4([wide]) is not None, "==", possible)

# %% [markdown]
# ## 9. Two layouts of the block scales, and a trap
#
# Checkpoints store block scales **linear**: row after row. Blackwell's tensor cores read tiles of 128 rows by 4 blocks, 512
# bytes each (`atom128x4`), in which scale $(r, c)$ of a tile lies at byte $16\,(r \bmod 32) + 4\lfloor r/32 \rfloor + c$. Edge
# tiles are padded with zero bytes. The matrix below fills neither its last row of tiles nor its last column.

# %%
rows, blocks = 200, 7
linear = torch.randint(1, 127, (rows, blocks), dtype=torch.uint8)
tiles = to_atom128x4(linear)
lab.check_that("bytes with padding", tiles.numel(), "==", -(-rows // 128) * -(-blocks // 4) * 512)
offsets = torch.tensor([[atom128x4_offset(r, c, blocks) for c in range(blocks)] for r in range(rows)])
lab.check("each scale is where the formula puts it", tiles.flatten()[offsets], linear, max_abs=0)
lab.check("there and back", from_atom128x4(tiles, rows, blocks), linear, max_abs=0)
lab.check_that("padding is zero", int(tiles.long().sum() - linear.long().sum()), "==", 0)
shown = torch.tensor([[atom128x4_offset(r, c, 8) for c in range(8)] for r in range(128)])
viz.plot_scale_layout({"linear": torch.arange(128 * 8).view(128, 8), "atom128x4": shown}, num_marked=20)

# %% [markdown]
# In `atom128x4` the first bytes jump by 32 rows: four rows of one quarter each, then the next row. Uniform data hide a wrong
# layout; distinct bytes and an odd shape do not.
#
# **The trap: `input_scale`.** NVFP4 checkpoints carry one per matrix, amax / 2688 of the activations *of a calibration text*. It
# is a constant of calibration, not the activation's normaliser. Used as $g$ for activations that turn out larger, the block
# scale saturates: every block whose ratio $a/6g$ reaches 432, the midpoint below 448, gets 448, and no value beyond 2688 g is
# left. Below: nano's activations, calibrated on themselves, then enlarged as a prompt of another kind might enlarge them.
# In the picture, the bar at 448 is where magnitude was lost; with the $g$ of the moment there is none.

# %%
window = perplexity.held_out_windows(model.tokenizer, count=1, length=512)
with ops.observe() as calls:
    model.logits(window[:, :-1])
x = observed.only(calls, "moe_layer", "layers.1").inputs["x"].float()
input_scale, live = x.abs().max() / quant.NVFP4_RANGE, live_factor * x  # the constant, and what comes at run time
block_amax = live.unflatten(-1, (-1, NVFP4.group)).abs().amax(-1)
saturating = block_amax / (6 * input_scale) >= 432  # predicted from the rule, block by block
coded = {"g = input_scale": quant.quantize_nvfp4(live, global_scale=input_scale), "g = amax / 2688": quant.quantize_nvfp4(live)}
scales = {name: quant.decode_e4m3(block_scale) for name, (_, block_scale, _) in coded.items()}
decoded = {name: quant.dequantize_nvfp4(*parts) for name, parts in coded.items()}
error = {name: rounding.relative_rms(values, live).value for name, values in decoded.items()}
lab.check("blocks that saturate", scales["g = input_scale"] == 448, saturating, max_abs=0)
lab.check("largest value left: 2688 g", decoded["g = input_scale"].abs().max(), quant.NVFP4_RANGE * input_scale, rel=1e-6)
lab.check_that("error, g = amax / 2688", error["g = amax / 2688"], "<=", rounding.worst_relative_rms(NVFP4))
lab.check_that("error, g = input_scale", error["g = input_scale"], ">", error["g = amax / 2688"])
viz.plot_scale_histogram(scales, marks={"largest E4M3": 448.0})
results |= {"saturated_blocks": float(saturating.double().mean()), "relative_rms_live": error}
print(json.dumps(results, indent=1))

# %% [markdown]
# ## Findings
#
# - Three formats, three grids, and one scale rule each; every stored byte follows from them, and is checked here bit for bit.
# - The cost of a format can be computed before anything is run, from the distribution of the values alone; nano's own weights
#   agree. NVFP4 beats MXFP4 because its scale is finer, not because its codes are.
# - `code * block_scale` needs 6 bits. BF16 holds it exactly, FP8 does not: decode to BF16, apply the global scale last.
# - MXFP4 becomes NVFP4 without touching a nibble, as long as the exponents span at most 17 binades.
# - Directions and layouts are conventions that data cannot reveal: test them with distinct bytes and odd shapes. And
#   `input_scale` knows only the text it was calibrated on.
#
# **Next:** [03 · Why attention scores stay in BF16](03_attention_precision.ipynb)
