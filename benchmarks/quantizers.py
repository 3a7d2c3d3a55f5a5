"""The row quantisers, alone and after RMSNorm or SwiGLU, and these two without: time, percent of copy bandwidth, peers.

Bound: the bytes that must be read and written, over copy bandwidth. A global scale computed over a whole matrix needs the
matrix twice. Peers: the composition of torch operations that a user would write, and torch.compile of it, at one shape to save
time. `equal`: the part of our result's bytes that is the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import common, eager
from benchmarks.common import Bench, Call, Failure
from benchmarks.eager import EPS, GROUP, LIMIT
from dsv4lab.kernels._common.launch import runtime_of
from dsv4lab.kernels.quant.rows import api
from dsv4lab.reference import gemm, moe, norm, quant

SHAPES = ((8192, 4096), (8192, 7168), (16, 4096), (16, 7168), (1, 4096), (1, 7168))
QUICK_SHAPES = ((8192, 4096), (1, 4096))
_COMPILED_SHAPE = (8192, 4096)

Operands = tuple[torch.Tensor, ...]
Result = Any  # a tensor or a tuple of them


@dataclass(frozen=True)
class Operation:
    """ours, oracle and eager take (x, other, scale): other is the norm's weight or SwiGLU's second input, scale () f32.

    reads: of x. oracle: the reference, bit by bit. eager: the peer.
    """

    name: str
    other: str  # "", "weight" or "up"
    ours: Callable[..., Result]
    oracle: Callable[..., Result]
    eager: Callable[..., Result]
    reads: int = 1


# ---- operations --------------------------------------------------------------------------------------------------------
def _oracle_fp8_values(x: torch.Tensor) -> torch.Tensor:
    return gemm.quantize_activation(x, "fp8")


def _ours_nvfp4_values(x: torch.Tensor) -> torch.Tensor:
    """Values times their factors, rounded: what the reference gives."""
    values, factor = api.activation_values(x, "nvfp4")
    assert factor is not None
    return (values.float() * factor[:, None]).to(x.dtype)


OPERATIONS = (
    Operation(
        "quantize_nvfp4, scale given",
        "",
        lambda x, _, s: api.quantize_nvfp4(x, s)[:2],
        lambda x, _, s: quant.quantize_nvfp4(x, global_scale=s)[:2],
        lambda x, _, s: eager.nvfp4(x, s),
    ),
    Operation(
        "quantize_nvfp4, scale computed",
        "",
        lambda x, _, s: api.quantize_nvfp4(x),
        lambda x, _, s: quant.quantize_nvfp4(x),
        lambda x, _, s: eager.nvfp4(x, eager.global_scale(x)),
        reads=2,
    ),
    Operation(
        "quantize_mxfp4",
        "",
        lambda x, _, s: api.quantize_mxfp4(x),
        lambda x, _, s: quant.quantize_mxfp4(x),
        lambda x, _, s: eager.mxfp4(x),
    ),
    Operation(
        "quantize_fp8_rows",
        "",
        lambda x, _, s: api.quantize_fp8_rows(x, GROUP),
        lambda x, _, s: quant.quantize_fp8_rows(x, group=GROUP),
        lambda x, _, s: eager.fp8(x),
    ),
    Operation(
        "rmsnorm_nvfp4",
        "weight",
        lambda x, w, s: api.rmsnorm_nvfp4(x, w, EPS, s)[:2],
        lambda x, w, s: norm.rmsnorm_nvfp4(x, w, eps=EPS, global_scale=s)[:2],
        lambda x, w, s: eager.nvfp4(eager.rmsnorm(x, w), s),
    ),
    Operation(
        "rmsnorm_fp8",
        "weight",
        lambda x, w, s: api.rmsnorm_fp8(x, w, eps=EPS, group=GROUP),
        lambda x, w, s: norm.rmsnorm_fp8(x, w, eps=EPS, group=GROUP),
        lambda x, w, s: eager.fp8(eager.rmsnorm(x, w)),
    ),
    Operation(
        "swiglu_nvfp4",
        "up",
        lambda x, u, s: api.swiglu_nvfp4(x, u, None, s, limit=LIMIT)[:2],
        lambda x, u, s: moe.swiglu_nvfp4(x, u, None, s, limit=LIMIT)[:2],
        lambda x, u, s: eager.nvfp4(eager.swiglu(x, u), s),
    ),
    Operation(
        "swiglu_fp8",
        "up",
        lambda x, u, s: api.swiglu_fp8(x, u, limit=LIMIT, group=GROUP),
        lambda x, u, s: moe.swiglu_fp8(x, u, limit=LIMIT, group=GROUP),
        lambda x, u, s: eager.fp8(eager.swiglu(x, u)),
    ),
    Operation(
        "activation_values fp8",
        "",
        lambda x, _, s: api.activation_values(x, "fp8")[0],
        lambda x, _, s: _oracle_fp8_values(x),
        lambda x, _, s: eager.fp8_values(x),
    ),
    Operation(
        "activation_values nvfp4",
        "",
        lambda x, _, s: api.activation_values(x, "nvfp4"),
        lambda x, _, s: gemm.quantize_activation(x, "nvfp4"),
        lambda x, _, s: eager.nvfp4_values(x),
    ),
    Operation(
        "rmsnorm",
        "weight",
        lambda x, w, s: api.rmsnorm(x, w, eps=EPS),
        lambda x, w, s: norm.rmsnorm(x, w, eps=EPS),
        lambda x, w, s: eager.rmsnorm(x, w),
    ),
    Operation(
        "swiglu",
        "up",
        lambda x, u, s: api.swiglu(x, u, None, limit=LIMIT),
        lambda x, u, s: moe.swiglu(x, u, limit=LIMIT),
        lambda x, u, s: eager.swiglu(x, u),
    ),
)


def operands(operation: Operation, m: int, k: int, device: str) -> Operands:
    """(x, other, scale)."""
    eager.prepare_constants(device)
    x = torch.randn(m, k, device=device).bfloat16()
    scale = torch.full((), 6.0 / 2688.0, device=device)
    if operation.other == "weight":
        return x, (1.0 + 0.1 * torch.randn(k, device=device)).bfloat16(), scale
    return x, torch.randn(m, k, device=device).bfloat16() if operation.other == "up" else scale, scale


def touch(operation: Operation, m: int, k: int) -> None:
    """The call on tensors without memory: asks for the kernels that the measurement will."""
    operation.ours(*operands(operation, m, k, "meta"))


def cases(*, quick: bool) -> Iterator[tuple[Operation, int, int]]:
    for m, k in QUICK_SHAPES if quick else SHAPES:
        for operation in OPERATIONS:
            yield operation, m, k


def label(operation: Operation, m: int, k: int) -> str:
    """What `--match` looks at."""
    return f"{operation.name} {m}x{k}"


# ---- rows --------------------------------------------------------------------------------------------------------------
def run(bench: Bench) -> None:
    """All rows. Raises Broken."""
    for operation, m, k in cases(quick=bench.quick):
        if bench.wants(label(operation, m, k)):
            try:
                measure(bench, operation, m, k)
            except Exception as error:
                bench.failed(operation.name, {"m": m, "k": k}, error)


def measure(bench: Bench, operation: Operation, m: int, k: int, device: str = "cuda") -> None:
    first = operands(operation, m, k, device)
    with common.seeing(first[0]) as names:
        got = operation.ours(*first)
    nbytes = minimum_bytes(operation, first, got)
    sets = [first, *(operands(operation, m, k, device) for _ in range(common.num_copies(nbytes) - 1))]
    fields: dict[str, Any] = {"m": m, "n": None, "k": k, "format": ""}
    fields |= common.kernel_fields(common.kernels_of(names, runtime_of(first[0]).arch))
    fields["equal"] = equal_part(_comparable(operation, first, got), operation.oracle(*first))

    def calls(function: Callable[..., Result]) -> list[Call]:
        return [lambda s=s: function(*s) for s in sets]  # type: ignore[misc]

    candidates: dict[str, Sequence[Call] | Failure] = {"ours": calls(operation.ours), "torch": calls(operation.eager)}
    if (m, k) != _COMPILED_SHAPE or bench.quick:
        candidates["torch.compile"] = Failure(f"compiled at {_COMPILED_SHAPE} only, to save time")
    else:
        compiled = eager.compiled(operation.eager, *first)
        candidates["torch.compile"] = compiled if isinstance(compiled, Failure) else calls(compiled)
    bench.measure(operation.name, fields, candidates, nbytes=nbytes, flops=0.0)


def minimum_bytes(operation: Operation, inputs: Operands, result: Result) -> float:
    """x as often as it must be read, the second input, the result."""
    x, other, _ = inputs
    parts = result if isinstance(result, tuple) else (result,)
    read = operation.reads * x.nbytes + (other.nbytes if operation.other else 0)
    return float(read + sum(part.nbytes for part in parts if part is not None))


def _comparable(operation: Operation, inputs: Operands, got: Result) -> Result:
    return _ours_nvfp4_values(inputs[0]) if operation.name == "activation_values nvfp4" else got


def equal_part(got: Result, want: Result) -> float:
    """Bytes of all parts that are equal, of all."""
    pairs = list(zip(*(part if isinstance(part, tuple) else (part,) for part in (got, want)), strict=True))
    same = total = 0
    for a, b in pairs:
        left, right = a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
        same, total = same + int((left == right).sum()), total + left.numel()
    return same / total
