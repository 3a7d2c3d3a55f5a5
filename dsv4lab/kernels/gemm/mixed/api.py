"""Linears with weights as they are stored, on any architecture that has a kernel for them: checks, plan, launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv4lab.arguments import check_dense
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.elements import ELEMENT
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.gemm.mixed.config import BLOCK, FEW, PART, MixedConfig, choose, choose_grouped
from dsv4lab.kernels.gemm.mixed.layout import GROUP_ROWS, K_PAD, SLAB, TILE, PreparedWeight, record_words


@dataclass(frozen=True)
class Tiles:
    """Which rows of a grouped product belong to which matrix, as the permutation kernel leaves it on the device.

    tiles (T, 4) i32: matrix, first row, end row, unused; count (1,) i32: how many of them there are. tokens: rows of a tile at
    most. Without a permutation (`of_rows`) tiles (rows, 2) i32: each row's matrix, unused; count is None, rows are slots.
    """

    tiles: torch.Tensor
    count: torch.Tensor | None
    tokens: int

    @classmethod
    def of_rows(cls, matrices: torch.Tensor, tokens: int) -> Tiles:
        """A tile for each row: matrices (rows,) i64, contiguous; the result of a row whose matrix is none is anything."""
        return cls(matrices.view(torch.int32).view(-1, 2), None, tokens)


@dataclass(frozen=True)
class Slots:
    """What the rows of an expert's first product are: slots (M,) i32, each token * top_k + choice, or None where row m is
    slot m (`Tiles.of_rows`); weights f32, one a slot.
    """

    slots: torch.Tensor | None
    weights: torch.Tensor
    top_k: int


def linear(
    x: torch.Tensor,
    weight: PreparedWeight,
    *,
    out_dtype: torch.dtype,
    factor: torch.Tensor | None = None,
    factor_of: str = "row",
    limit: float | None = None,
    requant: torch.Tensor | None = None,
    config: MixedConfig | None = None,
) -> torch.Tensor:
    """y = factor x W^T, or clamped SwiGLU of a pair's two products.

    x (M, K) bf16, contiguous, or of G groups (M, G, K), for which z[g] = W[g] x[g], rows of W's groups following each other;
    weight: one matrix (N, K); factor (M,) or (M, G) f32, one a "row", or (1,), of the "matrix"; limit: of a paired weight's
    SwiGLU; requant (1,) f32: the global scale, decode direction, normal and positive, by which its results are quantised to
    NVFP4: what `quant.rows.api.activation_values` makes of bf16 y, where `config.requantises`
    -> (M, N) or (M, G, N / G) of out_dtype, bf16 or f32.

    Weights are decoded to BF16 exactly, sums are float32 in the tensor core's order, factors come last. The result does not
    depend on timing. config: compile-time choices, by default `config.choose`'s.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.gemm.linear`, `grouped_linear`, `reference.moe.expert`.
    """
    return _products(x, weight, weight.shape[1], out_dtype, factor, factor_of, limit, requant, config)[0]


def two_linears(
    x: torch.Tensor,
    weight: PreparedWeight,
    rows: int,
    *,
    out_dtype: torch.dtype,
    factor: torch.Tensor | None = None,
    factor_of: str = "row",
    config: MixedConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear` of two matrices, one behind the other: the first `rows` of N, a multiple of 16, and the others; no groups.

    -> (M, rows), (M, N - rows). Raises as that. Source: `reference.gemm.two_linears`.
    """
    if not 0 < rows < weight.shape[1] or rows % SLAB or x.dim() != 2:
        raise ValueError(
            f"rows must be a multiple of {SLAB} below N={weight.shape[1]} and x (M, K), got {rows}, {tuple(x.shape)}"
        )
    y, z = _products(x, weight, rows, out_dtype, factor, factor_of, None, None, config)
    assert z is not None
    return y, z


def _products(
    x: torch.Tensor,
    weight: PreparedWeight,
    first_rows: int,
    out_dtype: torch.dtype,
    factor: torch.Tensor | None,
    factor_of: str,
    limit: float | None,
    requant: torch.Tensor | None,
    config: MixedConfig | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the first rows of the weight, and of the others, if there are any."""
    matrices, n, k = weight.shape
    groups = x.shape[1] if x.dim() == 3 else 1
    _check_x(x, out_dtype, (groups, k) if x.dim() == 3 else (k,))
    _check_limit(weight, limit)
    _check_requant(weight, requant)
    if matrices != 1:
        raise ValueError(f"weight must be one matrix, got a stack of {matrices}")
    if groups > 1 and (k % K_PAD or n % (groups * GROUP_ROWS) or weight.paired):
        raise ValueError(
            f"weight must have K % {K_PAD} == 0 and N % {groups * GROUP_ROWS} == 0 for {groups} groups and be no pair, "
            f"got K={k}, N={n}"
        )
    m = x.shape[0]
    y = torch.empty((m, groups, n // groups) if x.dim() == 3 else (m, first_rows), dtype=out_dtype, device=x.device)
    second = y.new_empty(m, n - first_rows) if first_rows < n else None
    if not y.numel():
        return y, second
    padded = weight.records.shape[1] * TILE
    scaled = "no" if factor is None else factor_of
    rows = n // groups * (2 if weight.paired else 1)  # of a group: a tile must not have rows of two
    if config is None:
        config = choose(weight.format, ELEMENT[out_dtype], m, rows, padded, paired=weight.paired, scaled=scaled, groups=groups)
        config = replace(config, requant=requant is not None, two=second is not None)
    if groups > 1 and rows % config.rows:
        raise ValueError(f"config must have rows that divide the {rows} of a group, got {config.rows}")
    factor = factor.reshape(-1) if factor is not None else None
    group_rows = rows if groups > 1 else weight.records.shape[0] * SLAB
    _launch(config, x.view(m, -1), weight, y.view(m, -1), factor, None, None, group_rows, limit, requant, second=second)
    return y, second


def partial_argmax(x: torch.Tensor, weight: PreparedWeight, *, config: MixedConfig | None = None) -> torch.Tensor:
    """Of each row of x W^T the largest number in every part of W's rows, without writing the product.

    x (M, K) bf16, contiguous; weight: one matrix (N, K), no pair -> (M, parts) int64, M * parts < 2^31: in the upper word
    the float32's bits in an order of unsigned integers, in the lower one ~row, so that the largest of a row is its argmax, of
    equals the lowest (`_common.order.pack`). NaN is above all numbers. The numbers compared are those of `linear` in
    float32, to the bit: configurations are the same but for `out`.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.head.lm_head_greedy`.
    """
    return _picked("argmax", x, weight, None, config)[1]


def linear_peaks(
    x: torch.Tensor, weight: PreparedWeight, *, config: MixedConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T in float32, and `partial_argmax` of every `PART` rows of W: (M, N) f32, (M, ceil(N / PART)) int64.

    Arguments as there, N % 8 == 0. Sums are `linear`'s to the bit where it takes as many rows a tile, as for a large N.
    Source: `reference.head.lm_head_peaks`.
    """
    return _picked("peaks", x, weight, None, config)


@dataclass(frozen=True)
class Draws:
    """What each row's token is drawn with, see `reference.sampling`: temperature (M,) f32, seed, position (M,) i64."""

    temperature: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor


def partial_sample(x: torch.Tensor, weight: PreparedWeight, draws: Draws, *, config: MixedConfig | None = None) -> torch.Tensor:
    """`partial_argmax` of logits / T + noise, of the logits themselves where T is 0.

    x (M, K) bf16, contiguous, M at most `FEW`; weight: one matrix (N, K), no pair; draws of M rows -> (M, parts) int64, packed
    as there; no logit NaN. The largest of a row names the token that the sampler draws where nothing is filtered.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.sampling.sample`.
    """
    m = x.shape[0]
    if m > FEW:
        raise ValueError(f"x must have at most {FEW} rows, got {m}")
    for name, dtype in (("temperature", torch.float32), ("seed", torch.int64), ("position", torch.int64)):
        check_dense(name, getattr(draws, name), (m,), dtype)
    return _picked("sample", x, weight, draws, config)[1]


def _picked(
    out: str, x: torch.Tensor, weight: PreparedWeight, draws: Draws | None, config: MixedConfig | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(All numbers, for peaks; the largest of each row and part, packed)."""
    matrices, n, k = weight.shape
    _check_x(x, torch.float32, (k,))
    if matrices != 1 or weight.paired:
        raise ValueError(f"weight must be one matrix, no pair, got a stack of {matrices} and paired={weight.paired}")
    m = x.shape[0]
    if config is None:
        config = choose(weight.format, out, max(m, 1), n, weight.records.shape[1] * TILE)
    parts = -(-weight.slabs // config.slabs) * (config.rows // config.part_rows)
    parts = -(-n // PART) if out == "peaks" else parts
    if m * parts >= 2**31:
        raise ValueError(f"x must have M * {parts} < 2^31, got M={m}")
    found = torch.empty((m, parts), dtype=torch.int64, device=x.device)
    y, peaks = (torch.empty((m, n), dtype=torch.float32, device=x.device), found) if out == "peaks" else (found, None)
    if m:
        _launch(config, x, weight, y, None, None, None, n, None, draws=draws, peaks=peaks)
    return y, found


def grouped(
    x: torch.Tensor,
    weight: PreparedWeight,
    tiles: Tiles,
    *,
    rows: int,
    out_dtype: torch.dtype,
    slots: Slots | None = None,
    gather: bool = False,
    factor: torch.Tensor | None = None,
    factor_of: str = "row",
    limit: float | None = None,
    requant: torch.Tensor | None = None,
    beside: PreparedWeight | None = None,
    config: MixedConfig | None = None,
) -> torch.Tensor:
    """Rows of x times the matrix that each belongs to: an expert's first product (slots, a paired weight) or its second.

    x (rows, K) bf16 in the order of the tiles or, with gather (slots, tiles of at most `FEW` tokens), (tokens, K) in their own.
    factor: of the products, f32, one a "row", a "matrix" or, of slots, a "token". requant (E,): as for `linear`, one a matrix.
    beside (tiles `of_rows`, of one token): one matrix more, of the same form, whose row is the last, and multiplied first.
    Its row has weight 1; its weights do not wait for the kernel before. Rows are then one more, those of x without gather too.
    Result (rows, N), or (rows + 1, N) with beside; rows that no tile has are not written.
    Raises ValueError on shapes, TypeError on dtypes. Source: the products of `reference.moe.moe`.
    """
    _, n, k = weight.shape
    _check_x(x, out_dtype, (k,))
    _check_limit(weight, limit)
    _check_requant(weight, requant)
    _check_beside(weight, tiles, slots, rows, beside)
    all_rows = rows + (beside is not None)
    num_rows = rows // slots.top_k if gather and slots else all_rows
    if x.shape[0] != num_rows:
        raise ValueError(f"x must have {num_rows} rows, got {x.shape[0]}")
    y = torch.empty(all_rows, n, dtype=out_dtype, device=x.device)
    if not y.numel():
        return y
    scaled = "no" if factor is None else factor_of
    padded = weight.records.shape[1] * TILE
    if config is None:
        config = choose_grouped(
            weight.format,
            ELEMENT[out_dtype],
            rows,
            weight.shape[0],
            weight.slabs,
            padded,
            paired=weight.paired,
            slotted=slots is not None,
            gather=gather,
            scaled=scaled,
            single=tiles.count is None,
            beside=beside is not None,
        )
        config = replace(config, requant=requant is not None)
    want = (tiles.tokens, tiles.count is None, gather, scaled, beside is not None)
    got = (config.tokens, config.single, config.gather, config.scaled, config.beside)
    if want != got:
        raise ValueError(f"config must have (tokens, single, gather, scaled, beside) = {want}, got {got}")
    _launch(config, x, weight, y, factor, slots, tiles, weight.slabs * SLAB, limit, requant, beside=beside)
    return y


def _check_beside(weight: PreparedWeight, tiles: Tiles, slots: Slots | None, rows: int, beside: PreparedWeight | None) -> None:
    if beside is None:
        return
    want, got = ((1, *weight.shape[1:]), weight.format, weight.paired), (beside.shape, beside.format, beside.paired)
    if got != want:
        raise ValueError(f"beside must have (shape, format, paired) = {want}, got {got}")
    if tiles.count is not None or (slots is not None and slots.top_k != rows):
        raise ValueError(f"beside needs the {rows} rows of one token, each a tile, got slots or tiles of another order")


def _check_limit(weight: PreparedWeight, limit: float | None) -> None:
    if weight.paired == (limit is None):
        raise ValueError(f"limit must be given for a paired weight alone, got {limit} and paired={weight.paired}")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive, or infinite for none, got {limit}")


def _check_requant(weight: PreparedWeight, requant: torch.Tensor | None) -> None:
    if requant is None:
        return
    matrices, n, _ = weight.shape
    check_dense("requant", requant, (matrices,), torch.float32)
    if n % BLOCK:
        raise ValueError(f"weight must have N % {BLOCK} == 0 where results are quantised, got N={n}")


def _check_x(x: torch.Tensor, out_dtype: torch.dtype, want: tuple[int, ...]) -> None:
    if x.dtype != torch.bfloat16 or out_dtype not in ELEMENT:
        raise TypeError(f"x must be bfloat16 and out_dtype bfloat16 or float32, got {x.dtype} and {out_dtype}")
    check_dense("x", x, ("M", *want))


def _launch(
    config: MixedConfig,
    x: torch.Tensor,
    weight: PreparedWeight,
    y: torch.Tensor,
    factor: torch.Tensor | None,
    slots: Slots | None,
    tiles: Tiles | None,
    group_rows: int,
    limit: float | None,
    requant: torch.Tensor | None = None,
    draws: Draws | None = None,
    beside: PreparedWeight | None = None,
    peaks: torch.Tensor | None = None,
    second: torch.Tensor | None = None,
) -> None:
    flags = (config.format, config.paired, config.scaled != "no", config.slotted, config.grouped, config.two)
    want = (weight.format, weight.paired, factor is not None, slots is not None, tiles is not None, second is not None)
    if flags != want:
        raise ValueError(f"config must have (format, paired, scaled, slotted, grouped, two) = {want}, got {flags}")
    out = ELEMENT.get(y.dtype, "argmax" if draws is None else "sample") if peaks is None else "peaks"
    if config.out != out:
        raise ValueError(f"config must have out = {out}, got {config.out!r}")
    if config.requant != (requant is not None):
        raise ValueError(f"config must have requant = {requant is not None}, got {config.requant}")
    if weight.records.shape[1] % config.chunks:
        raise ValueError(f"config must have chunks that divide K / {TILE} = {weight.records.shape[1]}, got {config.chunks}")
    if config.alternates and weight.records.shape[1] % (2 * config.cluster):
        raise ValueError(f"config must have a cluster that leaves pairs of tiles of K to each CTA, got {config.cluster}")
    runtime = runtime_of(x)
    row_tiles = -(-weight.slabs // config.slabs)
    entries = tiles.tiles.shape[0] + config.beside if tiles else -(-y.shape[0] // config.tokens)
    count = entries * row_tiles
    places = runtime.multiprocessors if config.cluster == 1 else runtime.clusters(config.cluster)
    clusters = min(count, max(places, 1) * config.resident)
    f32, i32 = weight.alpha.view(-1), weight.records.view(-1)  # stand in for what the configuration does not read
    i64 = _unread(x.device)
    runtime.call(
        _compiled(config, runtime),
        x,
        weight.records,
        weight.alpha,
        y,
        y if second is None else second,
        i64[None] if peaks is None else peaks,
        draws.temperature if draws else f32[:1] if factor is None else factor,
        slots.slots if slots and slots.slots is not None else i32[:1],
        slots.weights.view(-1) if slots else f32[:1],
        tiles.tiles if tiles else i32[:4].view(1, 4),
        tiles.count if tiles and tiles.count is not None else i32[:1],
        f32[:1] if requant is None else requant,
        draws.seed if draws else i64,
        draws.position if draws else i64,
        beside.records if beside else weight.records,
        beside.alpha if beside else weight.alpha,
        slots.top_k if slots else 1,
        group_rows,
        float("inf") if limit is None else limit,
        clusters * config.cluster,
    )


@functools.cache
def _unread(device: torch.device) -> torch.Tensor:
    """Stands in for int64 tensors; memory of its own, or the simulator would take the records for it."""
    return torch.empty(1, dtype=torch.int64, device=device)


def _compiled(config: MixedConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with all sizes left open. Raises ValueError for an architecture without a class."""
    if runtime.arch != "sm_90a":
        raise ValueError(f"the mixed linear needs sm_90a, got {runtime.arch}")
    config.check()

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.gemm.mixed.sm90 import MixedLinearSm90

        i32, f32 = cutlass.Int32, cutlass.Float32
        free = cute.sym_int
        results = {"bf16": cutlass.BFloat16, "f32": f32, "peaks": f32}
        if config.out in results:
            made = [fake(results[config.out], free(), free(divisibility=8)) for _ in range(2)]
        else:
            made = [fake(cutlass.Int64, free(), free(), align=8) for _ in range(2)]
        examples = (
            fake(cutlass.BFloat16, free(), free(divisibility=8)),
            fake(i32, free(), free(divisibility=2), record_words(config.format)),
            fake(f32, free(), 2, align=4),
            *made,
            fake(cutlass.Int64, free(), free(), align=8),
            fake(f32, free(), align=4),
            fake(i32, free(), align=4),
            fake(f32, free(), align=4),
            fake(i32, free(), 2 if config.single else 4, align=4),
            fake(i32, free(), align=4),
            fake(f32, free(), align=4),
            fake(cutlass.Int64, free(), align=8),
            fake(cutlass.Int64, free(), align=8),
            fake(i32, free(), free(divisibility=2), record_words(config.format)),
            fake(f32, free(), 2, align=4),
            i32(1),
            i32(1),
            f32(1.0),
            i32(1),
            fake_stream(),
        )
        return MixedLinearSm90(config), examples

    return cache.kernel("dsv4lab.kernels.gemm.mixed.sm90", config, build, runtime)
