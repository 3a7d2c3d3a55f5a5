"""The row quantisers on Hopper and Blackwell: checks, shapes, launches.

Every function takes contiguous BF16 or float32 rows (M, K), any M, and gives bit for bit what its reference gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsv4lab.arguments import check_dense, check_eps, check_limit
from dsv4lab.formats import ATOM_COLUMNS, ATOM_ROWS
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.counters import counters
from dsv4lab.kernels._common.elements import ELEMENT, dense
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.quant.rows.config import CHUNK, RowsConfig, for_shape

ARCHITECTURES = ("sm_90a", "sm_100a")
LAYOUTS = ("linear", "atom128x4")
FP8_GROUP = 128  # of `activation_values`, as in `reference.gemm`
_AMAX_CTAS = 4  # of an "amax" launch, a multiprocessor
_nothing: dict[torch.device, torch.Tensor] = {}


@dataclass(frozen=True)
class Source:
    """What is quantised: x (M, K) itself, its norm, or SwiGLU of x and `other` (M, K).

    other: the norm's weight (K,), or SwiGLU's second input. row_weight (M,) f32.
    """

    kind: str
    x: torch.Tensor
    other: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None
    eps: float = 0.0
    limit: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]

    def choices(self) -> dict[str, Any]:
        """Fields of the configuration that follow from the inputs."""
        found: dict[str, Any] = dict(source=self.kind, element=ELEMENT[self.x.dtype])
        if self.kind == "norm" and self.other is not None:
            found["weight"] = ELEMENT[self.other.dtype]
        return found | dict(weighted=self.row_weight is not None)


# ---- x itself ----------------------------------------------------------------------------------------------------------
def quantize_nvfp4(
    x: torch.Tensor, global_scale: torch.Tensor | None = None, *, layout: str = "linear", per_row: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NVFP4 rows.

    x (M, K) bf16 or f32, K % 16 == 0; global_scale f32, decode direction, normal and positive: () or (G,), one for each of G
    equal runs of rows. Absent, it is computed: over all of x, in a launch of its own, or where `per_row` for every row
    -> codes (M, K/2) u8; block_scale e4m3 (M, K/16), or tiles (ceil(M/128), ceil(K/64), 512) with zeros in the padding;
    global scale f32: () or (M,) where computed, else what was given. Raises ValueError on shapes, TypeError on dtypes.
    Source: `reference.quant.quantize_nvfp4`.
    """
    return _nvfp4(_plain(x), global_scale, layout, per_row)


def quantize_mxfp4(x: torch.Tensor, *, layout: str = "linear") -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4: x (M, K) bf16 or f32, K % 32 == 0 -> codes (M, K/2) u8, scale e8m0 (M, K/32) or tiles (.., .., 512).

    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.quant.quantize_mxfp4`.
    """
    source = _plain(x)
    m, k = source.shape
    if k % 32:
        raise ValueError(f"x must have K % 32 == 0, got K={k}")
    codes = torch.empty(m, k // 2, dtype=torch.uint8, device=x.device)
    scale = _scales(m, k // 32, layout, x.device)
    _launch(source, "mxfp4", codes, scale, group=32, tiles=layout != "linear")
    return codes, scale.view(torch.float8_e8m0fnu)


def quantize_fp8_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 rows: x (M, K) bf16 or f32; group 64 or 128, the last one may be partial
    -> codes (M, K) e4m3, scale (M, ceil(K/group)) e8m0. Raises ValueError on shapes and group, TypeError on dtypes.
    Source: `reference.quant.quantize_fp8_rows`.
    """
    return _fp8(_plain(x), group)


def activation_values(
    x: torch.Tensor, act: str, input_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Quantised activations as Hopper's tensor cores multiply them: values (M, K) bf16 and a factor for every row.

    x (M, K) bf16 or f32. act "fp8": values = code * scale, groups of 128, no factor; "nvfp4", K % 16 == 0: values = code *
    block scale, row_scale (M,) f32 the global scale, of each row's amax or input_scale () or (M,) f32. values * row_scale,
    rounded to x's dtype, is `reference.gemm.quantize_activation`. Exact, but for magnitudes outside BF16's normal range.
    Raises ValueError on shapes and act, TypeError on dtypes.
    """
    source = _plain(x)
    m, k = source.shape
    if act not in ("fp8", "nvfp4"):
        raise ValueError(f"act must be fp8 or nvfp4, got {act!r}")
    if k % CHUNK:
        raise ValueError(f"x must have K % {CHUNK} == 0, got K={k}")
    values = torch.empty(m, k, dtype=torch.bfloat16, device=x.device)
    if act == "fp8":
        _launch(source, "fp8", values, None, group=FP8_GROUP, decoded=True)
        return values, None
    if input_scale is None:
        row_scale = torch.empty(m, dtype=torch.float32, device=x.device)
        _launch(source, "nvfp4", values, None, used=row_scale, scale="row", decoded=True)
        return values, row_scale
    given = _given(input_scale, m)
    if given.numel() not in (1, m):
        raise ValueError(f"input_scale must be one for all or for each of {m} rows, got shape {tuple(input_scale.shape)}")
    _launch(source, "nvfp4", values, None, given=given, scale="one" if given.numel() == 1 else "many", decoded=True)
    return values, given.expand(m)


# ---- RMSNorm -----------------------------------------------------------------------------------------------------------
def rmsnorm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight: x (M, K), weight (K,), both bf16 or f32; eps in x^2 units -> like x.

    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.norm.rmsnorm`.
    """
    return _same(_normed(x, weight, eps))


def rmsnorm_fp8(x: torch.Tensor, weight: torch.Tensor, *, eps: float, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`rmsnorm`, rounded to x's dtype, then `quantize_fp8_rows`.

    x (M, K), weight (K,), both bf16 or f32; eps in x^2 units; group 64 or 128, the last one may be partial
    -> codes (M, K) e4m3, scale (M, ceil(K/group)) e8m0. Raises ValueError on shapes and group, TypeError on dtypes.
    Source: `reference.norm.rmsnorm_fp8`.
    """
    return _fp8(_normed(x, weight, eps), group)


def rmsnorm_nvfp4(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    global_scale: torch.Tensor | None = None,
    *,
    layout: str = "linear",
    per_row: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rmsnorm`, rounded to x's dtype, then `quantize_nvfp4`.

    x (M, K), weight (K,), both bf16 or f32, K % 16 == 0; eps in x^2 units; global_scale, layout, per_row and results as there.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.norm.rmsnorm_nvfp4`.
    """
    return _nvfp4(_normed(x, weight, eps), global_scale, layout, per_row)


# ---- SwiGLU ------------------------------------------------------------------------------------------------------------
def swiglu(gate: torch.Tensor, up: torch.Tensor, row_weight: torch.Tensor | None = None, *, limit: float) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) * row_weight: gate, up (M, K) of one dtype, row_weight (M,) f32; limit
    positive and finite -> like gate. Before its last rounding the value is within 2^-20 of the exact one.

    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.moe.swiglu`.
    """
    return _same(_gated(gate, up, row_weight, limit))


def swiglu_fp8(
    gate: torch.Tensor, up: torch.Tensor, row_weight: torch.Tensor | None = None, *, limit: float, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`swiglu`, rounded to gate's dtype, then `quantize_fp8_rows`.

    gate, up (M, K) of one dtype, bf16 or f32; row_weight (M,) f32; limit positive and finite; group 64 or 128, the last one may
    be partial -> codes (M, K) e4m3, scale (M, ceil(K/group)) e8m0. Raises ValueError on shapes, limit and group, TypeError on
    dtypes. Source: `reference.moe.swiglu_fp8`.
    """
    return _fp8(_gated(gate, up, row_weight, limit), group)


def swiglu_nvfp4(
    gate: torch.Tensor,
    up: torch.Tensor,
    row_weight: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    *,
    limit: float,
    layout: str = "linear",
    per_row: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`swiglu`, rounded to gate's dtype, then `quantize_nvfp4`.

    gate, up (M, K) of one dtype, bf16 or f32, K % 16 == 0; row_weight (M,) f32; limit positive and finite; global_scale,
    layout, per_row and results as there. Raises ValueError on shapes and limit, TypeError on dtypes.
    Source: `reference.moe.swiglu_nvfp4`.
    """
    return _nvfp4(_gated(gate, up, row_weight, limit), global_scale, layout, per_row)


# ---- formats -----------------------------------------------------------------------------------------------------------
def _nvfp4(
    source: Source, global_scale: torch.Tensor | None, layout: str, per_row: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, k = source.shape
    device = source.x.device
    if k % CHUNK:
        raise ValueError(f"x must have K % {CHUNK} == 0, got K={k}")
    if per_row and global_scale is not None:
        raise ValueError("per_row must be False where global_scale is given, got both")
    codes = torch.empty(m, k // 2, dtype=torch.uint8, device=device)
    scale = _scales(m, k // CHUNK, layout, device)
    tiles = layout != "linear"
    if global_scale is not None:
        given = _given(global_scale, m)
        _launch(source, "nvfp4", codes, scale, given=given, scale="one" if given.numel() == 1 else "many", tiles=tiles)
        return codes, scale.view(torch.float8_e4m3fn), global_scale
    if per_row:
        used = torch.empty(m, dtype=torch.float32, device=device)
        _launch(source, "nvfp4", codes, scale, used=used, scale="row", tiles=tiles)
        return codes, scale.view(torch.float8_e4m3fn), used
    if not source.x.numel():
        return codes, scale.view(torch.float8_e4m3fn), torch.ones((), dtype=torch.float32, device=device)
    found = _scale_of_tensor(source)
    _launch(source, "nvfp4", codes, scale, given=found, scale="one", tiles=tiles)
    return codes, scale.view(torch.float8_e4m3fn), found[0]


def _fp8(source: Source, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = source.shape
    if group not in (64, 128):
        raise ValueError(f"group must be 64 or 128, got {group}")
    codes = torch.empty(m, k, dtype=torch.uint8, device=source.x.device)
    scale = torch.empty(m, -(-k // group), dtype=torch.uint8, device=source.x.device)
    _launch(source, "fp8", codes, scale, group=group)
    return codes.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def _same(source: Source) -> torch.Tensor:
    out = torch.empty_like(source.x)
    _launch(source, "same", out, None)
    return out


# ---- checks ------------------------------------------------------------------------------------------------------------
def _plain(x: torch.Tensor) -> Source:
    _check_rows("x", x)
    return Source("x", x)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Source:
    _check_rows("x", x)
    if weight.dtype not in ELEMENT:
        raise TypeError(f"weight must be bfloat16 or float32, got {weight.dtype}")
    check_dense("weight", weight, x.shape[1:])
    check_eps(eps, 0.0)
    return Source("norm", x, weight, eps=eps)


def _gated(gate: torch.Tensor, up: torch.Tensor, row_weight: torch.Tensor | None, limit: float) -> Source:
    _check_rows("gate", gate)
    check_dense("up", up, gate.shape, gate.dtype)
    if row_weight is not None:
        check_dense("row_weight", row_weight, gate.shape[:1], torch.float32)
    check_limit(limit)
    return Source("swiglu", gate, up, row_weight, limit=limit)


def _check_rows(name: str, x: torch.Tensor) -> None:
    if x.dtype not in ELEMENT:
        raise TypeError(f"{name} must be bfloat16 or float32, got {x.dtype}")
    check_dense(name, x, ("M", "K"))


def _given(global_scale: torch.Tensor, rows: int) -> torch.Tensor:
    """A given global scale as (G,), G dividing the rows."""
    flat = global_scale.reshape(-1).contiguous()
    if flat.dtype != torch.float32:
        raise TypeError(f"global_scale must be float32, got {flat.dtype}")
    if rows % (flat.numel() or rows + 1):
        raise ValueError(f"global_scale must be a scalar or divide the {rows} rows, got shape {tuple(global_scale.shape)}")
    return flat


def _scales(rows: int, columns: int, layout: str, device: torch.device) -> torch.Tensor:
    """Room for block scales."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    tiles = (-(-rows // ATOM_ROWS), -(-columns // ATOM_COLUMNS), ATOM_ROWS * ATOM_COLUMNS)
    return torch.empty((rows, columns) if layout == "linear" else tiles, dtype=torch.uint8, device=device)


# ---- launches ----------------------------------------------------------------------------------------------------------
def _scale_of_tensor(source: Source) -> torch.Tensor:
    """The global scale of what is quantised, (1,) f32."""
    m, k = source.shape
    config = for_shape(m, k, out="amax", **source.choices())
    ctas = min(-(-m // config.rows), _AMAX_CTAS * runtime_of(source.x).multiprocessors)
    used = torch.empty(1, dtype=torch.float32, device=source.x.device)
    _run(config, source, scale_counters(source.x.device), None, None, used, ctas)
    return used


def scale_counters(device: torch.device) -> torch.Tensor:
    """(1, 2) u32 for a launch of "amax"."""
    return counters("quant.amax", device, 2).view(torch.uint32)[None]


def _launch(
    source: Source,
    out: str,
    codes: torch.Tensor,
    blocks: torch.Tensor | None,
    *,
    given: torch.Tensor | None = None,
    used: torch.Tensor | None = None,
    **rest: Any,
) -> None:
    """Fill codes, scales and global scales; nothing where there is nothing to quantise."""
    m, k = source.shape
    if source.x.numel():
        config = for_shape(m, k, out=out, **source.choices(), **rest)
        rows = blocks.shape[0] * ATOM_ROWS if config.tiles and blocks is not None else m
        ctas, runtime = -(-rows // config.rows), runtime_of(source.x)
        if config.streams and runtime.arch == "sm_90a":
            ctas = min(ctas, max(config.resident // (config.threads * config.rows), 1) * runtime.multiprocessors)
        _run(config, source, codes, blocks, given, used, ctas)


def _run(
    config: RowsConfig,
    source: Source,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    given: torch.Tensor | None,
    used: torch.Tensor | None,
    ctas: int,
) -> None:
    runtime = runtime_of(source.x)
    device = source.x.device
    if device not in _nothing:
        _nothing[device] = torch.zeros(1, dtype=torch.float32, device=device)
    nothing = _nothing[device]
    words, bytes_ = nothing.view(torch.uint32)[None], nothing.view(torch.uint8)[None]
    x, other = _as_words(source.x, config), words
    if source.other is not None:
        other = _as_words(source.other.reshape(-1, source.x.shape[1]), config)
    if config.out != "amax" and (not config.ragged or config.out == "same"):
        codes = _as_words(codes, config)
    per_scale = source.x.shape[0] // given.numel() if given is not None and config.scale == "many" else 1
    runtime.call(
        _compiled(config, runtime),
        x,
        other,
        nothing if source.row_weight is None else source.row_weight,
        nothing if given is None else given,
        codes,
        bytes_ if scale is None else scale,
        nothing if used is None else used,
        per_scale,
        1.0 / source.x.shape[1],
        source.eps,
        source.limit,
        ctas,
    )


def _as_words(x: torch.Tensor, config: RowsConfig) -> torch.Tensor:
    """Bits of x, from an address that vectors can be loaded from."""
    if config.ragged:
        return x.view(torch.uint16 if x.dtype == torch.bfloat16 else torch.uint32)
    return dense(x).view(torch.uint32)


def _compiled(config: RowsConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M and K left open. Raises ValueError for an architecture without a kernel."""
    if runtime.arch not in ARCHITECTURES:
        raise ValueError(f"the row quantisers need {' or '.join(ARCHITECTURES)}, got {runtime.arch}")

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.quant.rows.kernel import QuantizeRows

        u8, u32, f32 = cutlass.Uint8, cutlass.Uint32, cutlass.Float32
        bits = {"bf16": cutlass.Uint16, "f32": u32}
        scale_rows, scale_columns = cute.sym_int(), cute.sym_int()

        def matrix(element: Any, divisibility: int) -> Any:
            return fake(element, cute.sym_int(), cute.sym_int(divisibility=divisibility))

        def free(element: Any) -> Any:
            return fake(element, cute.sym_int(), cute.sym_int(), align=element.width // 8)

        x, codes = matrix(u32, config.words), matrix(u32, 2)
        other = x if config.source == "swiglu" else matrix(u32, CHUNK // 2) if config.source == "norm" else free(u32)
        if config.ragged:
            x = free(bits[config.element])
            other = free(bits[config.weight if config.source == "norm" else config.element])
            other = other if config.source != "x" else free(u32)
            codes = free(u8 if config.out == "fp8" else bits[config.element])
        elif config.out == "amax":
            codes = free(u32)
        elif config.out in ("fp8", "same") or config.decoded:
            codes = matrix(u32, 4)
        scale = fake(u8, scale_rows, scale_columns, ATOM_ROWS * ATOM_COLUMNS) if config.tiles else free(u8)
        floats = [fake(f32, cute.sym_int(), align=4) for _ in range(3)]
        examples = (
            x,
            other,
            floats[0],
            floats[1],
            codes,
            scale,
            floats[2],
            cutlass.Int32(1),
            cutlass.Float64(0.0),
            cutlass.Float64(0.0),
            f32(0.0),
            cutlass.Int32(1),
            fake_stream(),
        )
        return QuantizeRows(config, runtime.arch), examples

    return cache.kernel("dsv4lab.kernels.quant.rows.kernel", config, build, runtime)
