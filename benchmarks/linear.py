"""Linears with stored weights on Hopper, at Flash's and Pro's shapes: time, percent of the bound, peers.

Bound: bytes of the packed weights over copy bandwidth, or 2 m n k flops over the BF16 rate, whichever is longer. Peers:

    cublas_bf16      torch's matmul of the decoded weights
    scaled_mm_fp8    torch._scaled_mm, one scale a tensor; both operands quantised beforehand
    triton_nvfp4     `triton_nvfp4.py`, for NVFP4 weights; its tile chosen for every shape on the spot

Shapes named "w4a4" or "official" quantise their activations first, to NVFP4 or to FP8 rows of 128: the time is that of all
launches, the errors are against unquantised activations. Of "two_linears" both weights share one quantisation.

Peers of a pair compute both products and leave SwiGLU out, which is to their advantage; the one of groups is torch's bmm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch

from benchmarks import common, operations
from benchmarks.common import Bench, Call, Failure, attempt
from dsv4lab.formats import BF16, PackedWeight, get_format
from dsv4lab.kernels._common.launch import runtime_of
from dsv4lab.kernels.gemm.mixed import prepared as prepared_weights
from dsv4lab.kernels.gemm.mixed.api import linear
from dsv4lab.kernels.gemm.mixed.layout import K_PAD, SLAB, TILE, PreparedWeight, prepare, record_words
from dsv4lab.ops.weights import flat, pack_all
from dsv4lab.reference import quant

TOKENS = (1, 3, 8, 16, 64, 129, 1024, 4097, 8192)
FEWER_TOKENS = (1, 16, 64, 1024, 4097)
QUANTISED_TOKENS = (1, 64, 4097)  # of shapes with an act
QUICK_TOKENS = (1, 16, 4097)
LIMIT = 10.0  # of SwiGLU, as in the model
FORMATS = ("nvfp4", "mxfp4", "fp8_block", "bf16")
_FP8_MAX = 448.0
_RMS = {"nvfp4": 8.1, "mxfp4": 2.93 * 2.5, "fp8_block": 1.0, "bf16": 1.0}  # of `random_weight` before its scale is set


@dataclass(frozen=True)
class Shape:
    """y (m, n) = x (m, k) W^T. groups: matrices of n / groups rows, each for its own x. paired: two matrices of n rows.

    act: what x is quantised to by the call. beside: rows of a second matrix for the same x, quantised once for both.
    """

    name: str
    n: int
    k: int
    groups: int = 1
    paired: bool = False
    formats: tuple[str, ...] = FORMATS
    out: torch.dtype = torch.bfloat16
    act: str = "none"
    beside: int = 0

    @property
    def rows(self) -> int:
        """Of all matrices."""
        return sum(self.parts)

    @property
    def parts(self) -> tuple[int, ...]:
        """Rows of each matrix."""
        return (self.n, self.n) if self.paired else (self.n, self.beside) if self.beside else (self.n,)

    @property
    def operation(self) -> str:
        """The name of what is called, where its own is not that of a linear."""
        return "two_linears" if self.beside else "grouped_linear" if self.groups > 1 else "linear"

    def x_shape(self, m: int) -> tuple[int, ...]:
        return (m, self.k) if self.groups == 1 else (m, self.groups, self.k)

    def flops(self, m: int) -> float:
        return 2.0 * m * self.rows * self.k


def _model(name: str, d: int, q_rank: int, heads: int, groups: int, inner: int) -> tuple[Shape, ...]:
    """heads: H * c, the width of all query heads."""
    return (
        Shape(f"{name} wq_a", q_rank, d),
        Shape(f"{name} wkv", 512, d),
        Shape(f"{name} wq_b", heads, q_rank),
        Shape(f"{name} wo_a", groups * 1024, heads // groups, groups=groups),
        Shape(f"{name} wo_b", d, groups * 1024),
        Shape(f"{name} shared w1+w3", inner, d, paired=True),
        Shape(f"{name} shared w2", d, inner),
        Shape(f"{name} head", 129280, d, formats=("bf16",), out=torch.float32),
    )


QUANTISED = (
    Shape("flash wq_b w4a4", 32768, 1024, formats=("nvfp4",), act="nvfp4"),
    Shape("flash wo_b w4a4", 4096, 8192, formats=("nvfp4",), act="nvfp4"),
    Shape("flash wq_a+wkv two_linears w4a4", 1024, 4096, formats=("nvfp4",), act="nvfp4", beside=512),
    Shape("flash wq_a+wkv two_linears official", 1024, 4096, formats=("fp8_block",), act="fp8", beside=512),
)
SHAPES = (*_model("flash", 4096, 1024, 32768, 8, 2048), *_model("pro", 7168, 1536, 65536, 16, 3072), *QUANTISED)


# ---- operands ----------------------------------------------------------------------------------------------------------
def random_weight(fmt: str, n: int, k: int, device: str, *stack: int) -> PackedWeight:
    """Codes and scales at random, so that x with a mean square of one gives such a y. stack: of matrices."""
    format_ = get_format(fmt)
    lead = (*stack, n)
    scale = (k**-0.5) / _RMS[fmt]
    if format_ == BF16:
        return PackedWeight(format_, (torch.randn(*lead, k, device=device) * scale).bfloat16())
    if fmt == "fp8_block":
        # of a matrix whose columns have been scaled to one; a power of two for each block
        codes = torch.randn(*lead, k, device=device).to(torch.float8_e4m3fn)
        exponent = 127 + round(torch.tensor(scale).log2().item())
        shape = (*stack, -(-n // 128), -(-k // 128))
        blocks = torch.randint(exponent - 1, exponent + 2, shape, dtype=torch.uint8, device=device)
        return PackedWeight(format_, codes, blocks.view(torch.float8_e8m0fnu))
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8, device=device)
    if fmt == "mxfp4":
        exponent = 127 + round(torch.tensor(scale).log2().item())
        blocks = torch.randint(exponent, exponent + 3, (*lead, k // 32), dtype=torch.uint8, device=device)
        return PackedWeight(format_, codes, blocks.view(torch.float8_e8m0fnu))
    blocks = torch.randint(0x20, 0x50, (*lead, k // 16), dtype=torch.uint8, device=device)
    return PackedWeight(format_, codes, blocks.view(torch.float8_e4m3fn), torch.full(stack, scale, device=device))


@dataclass(frozen=True)
class Weights:
    """Of one shape and format. parts: gate and up of a pair, or the one matrix."""

    shape: Shape
    fmt: str
    parts: tuple[PackedWeight, ...]

    @classmethod
    def make(cls, shape: Shape, fmt: str, device: str) -> Weights:
        return cls(shape, fmt, tuple(random_weight(fmt, rows, shape.k, device) for rows in shape.parts))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def prepared(self) -> Ready:
        """What the call takes: of an operation with an act the weights as they are stored, which it prepares once."""
        return prepare(*self.parts) if self.shape.act == "none" else self.parts

    def dense(self) -> torch.Tensor:
        """(rows, k) bf16: exact but for NVFP4's global scale, which the peers' operands have rounded in; see `oracle`."""
        return torch.cat([quant.dequantize(part).bfloat16() for part in self.parts])


Ready = PreparedWeight | tuple[PackedWeight, ...]


def call_linear(shape: Shape, weight: Ready, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """What is measured."""
    if isinstance(weight, tuple):
        if shape.beside:
            return operations.call("two_linears", x, *pack_all(*weight), act=shape.act, out_dtype=None)  # type: ignore[no-any-return]
        return operations.call("linear", x, *flat(weight[0]), shape.act, shape.out)  # type: ignore[no-any-return]
    return linear(x, weight, out_dtype=shape.out, limit=LIMIT if shape.paired else None)


def touch(shape: Shape, fmt: str, m: int) -> None:
    """The call on tensors without memory: asks for the kernels that the measurement will."""
    x = torch.empty(shape.x_shape(m), dtype=torch.bfloat16, device="meta")
    parts = Weights.make(shape, fmt, "meta").parts
    with mock.patch.object(prepared_weights, "prepare", prepared_shape):
        call_linear(shape, prepared_shape(*parts) if shape.act == "none" else parts, x)


def prepared_shape(weight: PackedWeight, up: PackedWeight | None = None) -> PreparedWeight:
    """`prepare` without the bytes, which even on tensors without memory takes seconds for a stack."""
    n, k = weight.shape[-2:]
    matrices = math.prod(weight.shape[:-2])
    slabs = -(-n * (1 if up is None else 2) // SLAB)
    shape = (matrices * slabs, -(-k // K_PAD) * K_PAD // TILE, record_words(weight.format.name))
    records = torch.empty(shape, dtype=torch.int32, device="meta")
    alpha = torch.empty(matrices, 2, device="meta")
    return PreparedWeight(weight.format.name, records, alpha, (matrices, n, k), up is not None)


def product(shape: Shape, x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """torch's product of x with all rows, in the operands' dtype; of float32 results where the shape has them."""
    if shape.groups > 1:
        w = dense.view(shape.groups, -1, shape.k)
        return torch.bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1)
    if shape.out == torch.float32 and x.dtype == torch.bfloat16 and x.is_cuda:
        return torch.mm(x, dense.t(), out_dtype=torch.float32)
    return x @ dense.t()


def finish(shape: Shape, y: torch.Tensor) -> torch.Tensor:
    """SwiGLU of a pair's two products, in float64 or, rounded as a model would, from BF16."""
    if not shape.paired:
        return y
    gate, up = y.double().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)).to(y.dtype)


# ---- rows --------------------------------------------------------------------------------------------------------------
def tokens_of(shape: Shape, fmt: str, *, quick: bool) -> tuple[int, ...]:
    if shape.act != "none":
        return QUANTISED_TOKENS
    if quick:
        return QUICK_TOKENS
    return TOKENS if fmt == "nvfp4" else FEWER_TOKENS


def cases(*, quick: bool) -> Iterator[tuple[Shape, str, int]]:
    """All that is measured: format after format, the first one first."""
    for fmt in FORMATS[:1] if quick else FORMATS:
        for shape in SHAPES:
            if fmt in shape.formats and not (quick and shape.act != "none"):
                for m in tokens_of(shape, fmt, quick=quick):
                    yield shape, fmt, m


def label(shape: Shape, fmt: str, m: int) -> str:
    """What `--match` looks at; weights are made once for all numbers of tokens, so these are no part of it."""
    return f"{shape.name} {fmt}"


def run(bench: Bench) -> None:
    """All rows. Raises Broken."""
    done: set[tuple[str, str]] = set()
    for shape, fmt, m in cases(quick=bench.quick):
        if (shape.name, fmt) not in done:
            done.add((shape.name, fmt))
            if not bench.wants(label(shape, fmt, m)):
                continue
            try:
                measure(bench, shape, fmt, tokens_of(shape, fmt, quick=bench.quick))
            except Exception as error:
                bench.failed(shape.name, {"format": fmt}, error)


def measure(bench: Bench, shape: Shape, fmt: str, tokens: Sequence[int], device: str = "cuda") -> None:
    """The rows of one shape and format."""
    weights = Weights.make(shape, fmt, device)
    ready = weights.prepared()
    packed = [ready, *(_clone(ready) for _ in range(common.num_copies(weights.nbytes) - 1))]
    dense = weights.dense()
    plain = [dense, *(dense.clone() for _ in range(common.num_copies(dense.nbytes) - 1))]
    fp8 = attempt_fp8(shape, dense)
    stored = _stored(weights)
    for m in tokens:
        fields = {"format": fmt, "m": m, "n": shape.n, "k": shape.k, "groups": shape.groups, "paired": shape.paired}
        fields |= {} if shape.act == "none" else {"act": shape.act, "operation": shape.operation}
        try:
            x = torch.randn(shape.x_shape(m), device=device).bfloat16()
            with common.seeing(x) as names:
                y = call_linear(shape, ready, x)
            fields |= accuracy(shape, weights, dense, x, torch.cat(y, dim=-1) if isinstance(y, tuple) else y)
            fields |= common.kernel_fields(common.kernels_of(names, runtime_of(x).arch))
            del y
            candidates: dict[str, Sequence[Call] | Failure] = {
                "ours": [lambda w=w, x=x: call_linear(shape, w, x) for w in packed],  # type: ignore[misc]
                "cublas_bf16": [lambda w=w, x=x: product(shape, x, w) for w in plain],  # type: ignore[misc]
                "scaled_mm_fp8": fp8 if isinstance(fp8, Failure) else attempt(lambda x=x: _fp8_calls(shape, x, fp8)),  # type: ignore[misc]
            }
            if fmt == "nvfp4":
                candidates["triton_nvfp4"] = attempt(lambda x=x: _triton_calls(shape, x, stored))  # type: ignore[misc]
            bench.measure(shape.name, fields, candidates, nbytes=weights.nbytes, flops=shape.flops(m))
        except Exception as error:
            bench.failed(shape.name, fields, error)


def _clone(weight: Ready) -> Ready:
    if isinstance(weight, tuple):
        return tuple(replace(part, codes=part.codes.clone()) for part in weight)
    return replace(weight, records=weight.records.clone(), alpha=weight.alpha.clone())


def accuracy(shape: Shape, weights: Weights, dense: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> dict[str, float | None]:
    """Ours and cuBLAS against float64 sums of the decoded operands, each its own: cuBLAS's are rounded to BF16 already."""
    rows = common.sampled(x.shape[0], 64 if shape.n > 1 << 16 else 256)
    taken, got = x[rows], y[rows]
    exact = torch.cat([quant.dequantize(part) for part in weights.parts])
    want = finish(shape, _in_double(shape, taken, exact))
    row = common.accuracy_fields(got, want, None)
    if isinstance(cublas := attempt(lambda: [finish(shape, product(shape, taken, dense))]), Failure):  # type: ignore[list-item]
        return row
    other = common.relative_error(cublas[0], finish(shape, _in_double(shape, taken, dense)))  # type: ignore[arg-type]
    row |= {"cublas_relative_error": other, "error_over_cublas": round(row["relative_error"] / other, 3) if other else None}
    return row


def _in_double(shape: Shape, x: torch.Tensor, dense: torch.Tensor, columns: int = 16384) -> torch.Tensor:
    """x W^T in float64, so many rows of W at a time."""
    if shape.groups > 1:
        return product(shape, x.double(), dense.double())
    return torch.cat([x.double() @ part.double().t() for part in dense.split(columns)], dim=-1)


# ---- peers -------------------------------------------------------------------------------------------------------------
Fp8 = tuple[list[torch.Tensor], torch.Tensor]


def attempt_fp8(shape: Shape, dense: torch.Tensor) -> Fp8 | Failure:
    """Copies of the weight in E4M3 with one scale, (rows, k) each, and the scale."""
    if shape.groups > 1:
        return Failure("torch._scaled_mm has no groups")
    try:
        scale = (dense.abs().amax().float() / _FP8_MAX).reshape(())
        codes = torch.cat([(part.float() / scale).to(torch.float8_e4m3fn) for part in dense.split(16384)])
        return [codes, *(codes.clone() for _ in range(common.num_copies(codes.nbytes) - 1))], scale
    except Exception as error:
        return Failure(common.reason_of(error))


def _fp8_calls(shape: Shape, x: torch.Tensor, fp8: Fp8) -> list[Call]:
    codes, scale = fp8
    x_scale = (x.abs().amax().float() / _FP8_MAX).reshape(())
    quantised = (x.float() / x_scale).to(torch.float8_e4m3fn)

    def call(w: torch.Tensor) -> Call:
        return lambda: torch._scaled_mm(
            quantised, w.t(), scale_a=x_scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return [call(w) for w in codes]


Stored = Callable[[], list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]


def _stored(weights: Weights) -> Stored:
    """Copies of the weight as the checkpoint has it, gate over up, made when they are first asked for."""
    made: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def get() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if not made:
            codes = torch.cat([part.codes for part in weights.parts])
            scale = torch.cat([part.scale.view(torch.uint8) for part in weights.parts if part.scale is not None])
            factor = weights.parts[0].global_scale
            assert factor is not None
            count = common.num_copies(codes.nbytes + scale.nbytes)
            made.extend((codes.clone(), scale.clone().view(torch.float8_e4m3fn), factor) for _ in range(count))
        return made

    return get


def _triton_calls(shape: Shape, x: torch.Tensor, stored: Stored) -> list[Call]:
    """Checks the kernel on a few tokens, then takes its fastest tile. Raises RuntimeError on a wrong result."""
    from benchmarks import triton_nvfp4

    copies = stored()
    triton_nvfp4.tune(x, copies)
    codes, scale, factor = copies[0]
    few = x[: min(x.shape[0], 4)]
    got = triton_nvfp4.linear_nvfp4(x, codes, scale, factor)[: few.shape[0]]
    want = product(shape, few, quant.dequantize_nvfp4(codes, scale, factor).bfloat16())
    if not common.relative_error(got, want) < 0.02:
        raise RuntimeError(f"the Triton kernel is wrong: relative error {common.relative_error(got, want):.3g}")
    return [lambda w=w: triton_nvfp4.linear_nvfp4(x, *w) for w in copies]  # type: ignore[misc]
