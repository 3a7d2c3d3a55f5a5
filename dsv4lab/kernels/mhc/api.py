"""Hyper-connections on Hopper and Blackwell: checks, plans, launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_codes, check_dense, check_eps, check_sinkhorn
from dsv4lab.formats import ATOM_COLUMNS, ATOM_ROWS
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.elements import ELEMENT, dense
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.mhc.config import (
    BLOCK,
    CHUNK,
    GROUPS,
    MAX_TOKENS,
    RANKS,
    STREAMS,
    TILE,
    EmbedConfig,
    MixConfig,
    PostConfig,
    TogetherConfig,
)
from dsv4lab.kernels.mhc.prepared import prepared, prepared_fragments
from dsv4lab.kernels.quant.rows.api import quantize_fp8_rows, quantize_nvfp4
from dsv4lab.paging import check_range

ARCHITECTURES = ("sm_90a", "sm_100a")
_INTEGER = {torch.int32: "i32", torch.int64: "i64"}
_ALIGN = 16  # bytes of a vector
_UNSET = -1  # a sum that has not come yet, as in `values`
_MAX_ELEMENTS = 2**31  # 32-bit words of a launch, indexed by 32 bits

_FEW_CODED = 64  # tokens

_scratch: dict[tuple[torch.device, int, int, int], torch.Tensor] = {}


def mhc_pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
    config: MixConfig | TogetherConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coefficients, collapse and the following RMSNorm.

    streams (M, 4, D) bf16, D % 16 == 0, values below 1e18; fn (24, 4 D), base (24,), scale (3,) f32; norm_weight (D,) bf16 or
    f32; all contiguous; eps in x^2 units, at least 1e-30; 0 <= hc_eps < 1; sinkhorn_iters >= 1 -> normalised input (M, D) bf16,
    post (M, 4) f32, comb (M, 4, 4) f32. pre, post and comb are within 1e-5 of the exact ones, relative, x within one unit of
    the last place.
    Raises ValueError on shapes, TypeError on dtypes.  Source: `reference.mhc.mhc_pre`.
    """
    _check_streams(streams)
    _check_mix(streams, fn, base, scale, norm_weight, 24, 3)
    made = _mix(streams, None, fn, base, scale, norm_weight, eps, hc_eps, sinkhorn_iters, config)
    return made[1], made[3], made[4]


def mhc_pre_quantized(streams: torch.Tensor, *mix: Any, **how: Any) -> tuple[torch.Tensor, ...]:
    """`mhc_pre`, and what `quant.rows.api` makes of its normalised input, bit for bit: codes, scales, post, comb.

    Of the same configuration, that is: up to 64 tokens a `MixConfig`, which `mhc_pre` alone may not choose. Arguments of
    `mhc_pre`, a `MixConfig` if any; act "fp8", as `quantize_fp8_rows` in groups of 128, or "nvfp4", as `quantize_nvfp4` with a
    global_scale (one f32, after norm_weight) and a layout.  Source: `reference.mhc.mhc_pre_quantized`.
    """
    _check_streams(streams)
    return _quantized(streams, None, *mix, **how)[1:]


def mhc_post(
    y: torch.Tensor,
    streams: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    *,
    config: PostConfig | None = None,
) -> torch.Tensor:
    """X'[i] = post[i] y + sum_j comb[j, i] X[j], in float32, rounded once.

    y (M, D), streams (M, 4, D) bf16, D % 16 == 0; post (M, 4), comb (M, 4, 4) f32; all contiguous -> like streams.
    Raises ValueError on shapes, TypeError on dtypes.  Source: `reference.mhc.mhc_post`.
    """
    _check_streams(streams)
    _check_post(y, streams, post, comb)
    m, _, columns = streams.shape
    new = torch.empty_like(streams)
    if not m:
        return new
    config = config or PostConfig.for_shape(m, columns)
    config.check()
    runtime = runtime_of(streams)
    compiled = _compiled_post(config, runtime)
    for part in _parts(m, max(_MAX_ELEMENTS // (STREAMS * columns), 1)):
        rows = (_words(streams[part]), _words(y[part]), dense(post[part]), dense(comb[part].flatten(1)))
        runtime.call(compiled, *rows, _words(new[part]))
    return new


def mhc_post_pre(
    y: torch.Tensor,
    streams: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
    config: MixConfig | TogetherConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mhc_post`, in every bit, then `mhc_pre` of its result. Arguments and errors as for these.

    -> new streams (M, 4, D) bf16, normalised input (M, D) bf16, post (M, 4) f32, comb (M, 4, 4) f32.
    """
    _check_streams(streams)
    _check_post(y, streams, post, comb)
    _check_mix(streams, fn, base, scale, norm_weight, 24, 3)
    made = _mix(streams, (y, post, comb), fn, base, scale, norm_weight, eps, hc_eps, sinkhorn_iters, config)
    return made[0], made[1], made[3], made[4]


def mhc_post_pre_quantized(
    y: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, *mix: Any, **how: Any
) -> tuple[torch.Tensor, ...]:
    """`mhc_post`, in every bit, then `mhc_pre_quantized` of its result: new streams, codes, scales, post, comb."""
    _check_streams(streams)
    _check_post(y, streams, post, comb)
    return _quantized(streams, (y, post, comb), *mix, **how)


def mhc_head(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    eps: float,
    hc_eps: float,
    config: MixConfig | TogetherConfig | None = None,
) -> torch.Tensor:
    """Collapse before the head, then the final RMSNorm.

    fn (4, 4 D), base (4,), scale (1,) f32, others as for `mhc_pre` -> (M, D) bf16.  Source: `reference.mhc.mhc_head`.
    """
    _check_streams(streams)
    _check_mix(streams, fn, base, scale, norm_weight, 4, 1)
    return _mix(streams, None, fn, base, scale, norm_weight, eps, hc_eps, 1, config)[1]


def embed_streams(
    token_ids: torch.Tensor, weight: torch.Tensor, *, num_streams: int, config: EmbedConfig | None = None
) -> torch.Tensor:
    """Look up embeddings and copy each into every stream.

    token_ids (M,) i32 or i64; weight (V, D) bf16 or f32, rows of a multiple of 16 bytes; contiguous -> (M, num_streams, D) like
    weight. Negative ids count from the end; ids outside the table, which `paging` finds, take its first or last row.
    Raises ValueError on shapes, TypeError on dtypes.  Source: `reference.mhc.embed_streams`.
    """
    if token_ids.dtype not in _INTEGER or weight.dtype not in ELEMENT:
        raise TypeError(
            f"token_ids must be int32 or int64, weight bfloat16 or float32, got {token_ids.dtype} and {weight.dtype}"
        )
    if token_ids.dim() != 1 or not token_ids.is_contiguous():
        raise ValueError(f"token_ids must be contiguous (M,), got {tuple(token_ids.shape)}")
    if weight.dim() != 2 or not weight.is_contiguous() or not weight.numel():
        raise ValueError(f"weight must be contiguous (V, D), got {tuple(weight.shape)}, strides {weight.stride()}")
    row = weight.shape[1] * weight.element_size()
    if row % _ALIGN or num_streams < 1:
        raise ValueError(f"rows must be a multiple of {_ALIGN} bytes and num_streams >= 1, got {row} and {num_streams}")
    m = token_ids.shape[0]
    if max(m * num_streams, weight.shape[0]) * row // 4 >= _MAX_ELEMENTS:
        raise ValueError(f"weight and the result must be below 2^33 bytes, got {tuple(weight.shape)} and {m} tokens")
    out = torch.empty(m, num_streams, weight.shape[1], dtype=weight.dtype, device=weight.device)
    if not m:
        return out
    check_range("token_ids", token_ids, weight.shape[0], start=-weight.shape[0])
    config = config or EmbedConfig(num_streams, row // _ALIGN, _INTEGER[token_ids.dtype])
    config.check()
    if (config.streams, config.words, config.token) != (num_streams, row // _ALIGN, _INTEGER[token_ids.dtype]):
        raise ValueError(f"config must be for {num_streams} streams of {row} bytes, {token_ids.dtype}, got {config}")
    runtime = runtime_of(weight)
    runtime.call(_compiled_embed(config, runtime), token_ids, _words(weight), _words(out))
    return out


# ---- checks ------------------------------------------------------------------------------------------------------------
def _check_streams(streams: torch.Tensor) -> None:
    if streams.dtype != torch.bfloat16:
        raise TypeError(f"streams must be bfloat16, got {streams.dtype}")
    if streams.dim() != 3 or not streams.is_contiguous():
        raise ValueError(f"streams must be contiguous (M, S, D), got {tuple(streams.shape)}, strides {streams.stride()}")
    _, s, columns = streams.shape
    if s != STREAMS or columns % BLOCK or not columns:
        raise ValueError(f"streams must be (M, {STREAMS}, D) with D % {BLOCK} == 0, got S={s}, D={columns}")


def _check_post(y: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> None:
    m, _, columns = streams.shape
    check_dense("y", y, (m, columns), torch.bfloat16)
    check_dense("post", post, (m, STREAMS), torch.float32)
    check_dense("comb", comb, (m, STREAMS, STREAMS), torch.float32)


def _check_mix(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    outputs: int,
    scales: int,
) -> None:
    columns = streams.shape[2]
    check_dense("fn", fn, (outputs, STREAMS * columns), torch.float32)
    check_dense("base", base, (outputs,), torch.float32)
    check_dense("scale", scale, (scales,), torch.float32)
    if norm_weight.dtype not in ELEMENT:
        raise TypeError(f"norm_weight must be bfloat16 or float32, got {norm_weight.dtype}")
    check_dense("norm_weight", norm_weight, (columns,), norm_weight.dtype)


# ---- launches ----------------------------------------------------------------------------------------------------------
def _quantized(
    streams: torch.Tensor,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    *,
    act: str,
    layout: str = "linear",
    config: MixConfig | None = None,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, ...]:
    """`_mix` to codes and scales; of many tokens by a launch more, since `MixConfig` is slower by more than that (H200)."""
    _check_mix(streams, fn, base, scale, norm_weight, 24, 3)
    check_codes(act, global_scale)
    if global_scale is not None:
        check_dense("global_scale", global_scale, (), torch.float32)
    if layout != "linear" and (act, layout) != ("nvfp4", "atom128x4"):
        raise ValueError(f"layout must be linear, or atom128x4 of nvfp4, got {layout!r} of {act}")
    quant = act if layout == "linear" else "nvfp4_tiles"
    mix = (streams, given, fn, base, scale, norm_weight, eps, hc_eps, sinkhorn_iters, config)
    if config is not None or streams.shape[0] <= _FEW_CODED:
        return _mix(*mix, quant, global_scale)
    new, x, _, post, comb = _mix(*mix)
    if global_scale is None:
        return new, *quantize_fp8_rows(x, GROUPS["fp8"]), post, comb
    return new, *quantize_nvfp4(x, global_scale, layout=layout)[:2], post, comb


def _mix(
    streams: torch.Tensor,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    hc_eps: float,
    iters: int,
    config: MixConfig | TogetherConfig | None,
    quant: str = "",
    global_scale: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """New streams (the old, without `given`: y, post and comb), x or codes, scales (None of x), post, comb; the last two empty
    for the head.
    """
    check_eps(eps)
    check_sinkhorn(iters, hc_eps)
    m, _, columns = streams.shape
    f32 = dict(dtype=torch.float32, device=streams.device)
    outputs = fn.shape[0]
    whole = outputs > STREAMS
    new = torch.empty_like(streams) if given else streams
    out, scales = _room(m, columns, quant, streams.device)
    post = torch.empty(m if whole else 0, STREAMS, **f32)  # type: ignore[call-overload]
    comb = torch.empty(m if whole else 0, STREAMS, STREAMS, **f32)  # type: ignore[call-overload]
    if not m:
        return new, out, scales, post, comb
    runtime = runtime_of(streams)
    choices: dict[str, Any] = dict(columns=columns, outputs=outputs, post=given is not None, weight=ELEMENT[norm_weight.dtype])
    for part in _parts(m, MAX_TOKENS):
        tokens = part.stop - part.start
        plan = config or _plan(tokens, choices, quant, runtime)
        plan.check()
        wanted = choices | dict(quant=quant)
        if any(getattr(plan, name, "") != value for name, value in wanted.items()):
            raise ValueError(f"config must have {wanted}, got {plan}")
        y, old_post, old_comb = (t[part] for t in given or (streams.view(-1, columns), post, comb))
        rows = (_words(streams[part]), _words(y), dense(old_post), dense(old_comb.flatten(1)))
        shared = (base, scale, dense(norm_weight))
        results = (_words(new[part]), _words(out[part]), post[part], comb[part].flatten(1), eps, hc_eps, iters)
        if isinstance(plan, TogetherConfig):
            ctas = RANKS * max(min(runtime.clusters(RANKS), -(-tokens // TILE)), 1)
            fragments = prepared_fragments(fn, scaled=plan.scaled)
            runtime.call(_compiled_together(plan, runtime), *rows, *fragments, *shared, *results, ctas)
            continue
        if plan.split > 1 and tokens > TILE:
            raise ValueError(f"config with split must be for up to {TILE} tokens, got {tokens}")
        sums = _sums(tokens, plan.slices * plan.row, streams.device).view(-1, plan.slices, plan.row)[:tokens]
        groups = min(max(runtime.multiprocessors // plan.slices, 1), -(-tokens // TILE))
        ctas = tokens if plan.split > 1 else min(tokens, runtime.multiprocessors)
        place = slice(part.start // ATOM_ROWS, None) if quant == "nvfp4_tiles" else part
        codes = (
            (out if scales is None else scales).view(torch.uint8)[place],
            base if global_scale is None else global_scale.reshape(1),
        )
        runtime.call(_compiled(plan, runtime), *rows, prepared(fn), sums, *shared, *results, *codes, groups, ctas)
    return new, out, scales, post, comb


def _room(m: int, columns: int, quant: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For x alone, or for codes and scales; of tiles the padding is zeros."""
    if not quant:
        return torch.empty(m, columns, dtype=torch.bfloat16, device=device), None
    blocks = -(-columns // GROUPS[quant])
    if quant == "fp8":
        codes = torch.empty(m, columns, dtype=torch.float8_e4m3fn, device=device)
        return codes, torch.empty(m, blocks, dtype=torch.float8_e8m0fnu, device=device)
    codes = torch.empty(m, columns // 2, dtype=torch.uint8, device=device)
    tiles = (-(-m // ATOM_ROWS), -(-blocks // ATOM_COLUMNS), ATOM_ROWS * ATOM_COLUMNS)
    scales = codes.new_zeros(tiles) if quant == "nvfp4_tiles" else codes.new_empty(m, blocks)
    return codes, scales.view(torch.float8_e4m3fn)


def _plan(tokens: int, choices: dict[str, Any], quant: str, runtime: Runtime) -> MixConfig | TogetherConfig:
    """One pass by clusters of CTAs, where D and the GPU allow it, of BF16 rows: a CTA's slice may end within a group of FP8."""
    together = None if quant else TogetherConfig.for_shape(tokens, **choices)
    if together is not None and runtime.clusters(RANKS) > 0:
        return together
    return MixConfig.for_shape(tokens, multiprocessors=runtime.multiprocessors, quant=quant, **choices)


def _parts(tokens: int, most: int) -> list[slice]:
    """Tokens of one launch each."""
    return [slice(first, min(first + most, tokens)) for first in range(0, tokens, most)]


def _words(value: torch.Tensor) -> torch.Tensor:
    """As 32-bit words, at an address that vectors may have."""
    return dense(value).view(torch.int32)


def _sums(tokens: int, words: int, device: torch.device) -> torch.Tensor:
    """Words of `tokens` tokens that are not set, and that every launch leaves so.

    One set for each stream, size and power of two of tokens, kept for good: a CUDA graph may hold it. While a graph is recorded
    nothing is kept, since filling it would be part of the graph.
    """
    room = 1 << (tokens - 1).bit_length()
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0, words, room)
    known = _scratch.get(key)
    if known is None:
        known = torch.full((room, words), _UNSET, dtype=torch.int32, device=device)
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            _scratch[key] = known
    return known


# ---- compiling ---------------------------------------------------------------------------------------------------------
def _compiled(config: MixConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M left open. Raises ValueError for an architecture without a kernel."""
    _check_arch(runtime)

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.mhc.kernel import Mix

        u32, m = cutlass.Uint32, cute.sym_int()
        rows, shared, results = _examples(config, m)
        fn = fake(u32, config.columns // BLOCK, config.fragment_words // 4, 32, 4)
        counts = cutlass.Int32(1), cutlass.Int32(1)
        scales = fake(cutlass.Uint8, m, config.blocks, align=1)
        if config.quant == "nvfp4_tiles":
            scales = fake(cutlass.Uint8, cute.sym_int(), -(-config.blocks // ATOM_COLUMNS), ATOM_ROWS * ATOM_COLUMNS)
        given = fake(cutlass.Float32, 1 if "nvfp4" in config.quant else config.outputs, align=4)
        results = (*results, scales, given, *counts, fake_stream())
        return Mix(config, runtime.arch), (*rows, fn, fake(u32, m, config.slices, config.row), *shared, *results)

    return cache.kernel("dsv4lab.kernels.mhc.kernel", config, build, runtime)


def _compiled_together(config: TogetherConfig, runtime: Runtime) -> Callable[..., Any]:
    """Likewise, by clusters."""
    _check_arch(runtime)

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.mhc.together import Together

        rows, shared, results = _examples(config, cute.sym_int())
        fn = fake(cutlass.Uint32, config.columns // BLOCK, config.block_words // 4, 32, 4)
        unit = fake(cutlass.Float32, config.rows, align=4)
        return Together(config), (*rows, fn, unit, *shared, *results, cutlass.Int32(RANKS), fake_stream())

    return cache.kernel("dsv4lab.kernels.mhc.together", config, build, runtime)


def _examples(config: MixConfig | TogetherConfig, m: Any) -> tuple[tuple[Any, ...], ...]:
    """Of M tokens: streams, y, post, comb; base, scale, weight; results and numbers."""
    import cutlass
    import cutlass.cute as cute

    from dsv4lab.kernels._common.fakes import fake

    u32, f32 = cutlass.Uint32, cutlass.Float32
    types = {"bf16": cutlass.BFloat16, "f32": f32}
    words = config.columns // 2
    whole = config.outputs > STREAMS
    given, made = (cute.sym_int() if not there else m for there in (config.post or whole, whole))
    streams, row = fake(u32, m, STREAMS, words), fake(u32, m, words)
    rows = (streams, row, fake(f32, given, STREAMS), fake(f32, given, STREAMS * STREAMS))
    shared = (
        fake(f32, config.outputs, align=4),
        fake(f32, 3 if whole else 1, align=4),
        fake(types[config.weight], config.columns),
    )
    out = fake(u32, m, config.columns // CHUNK * config.chunk_words) if isinstance(config, MixConfig) else row
    results = (streams, out, fake(f32, made, STREAMS), fake(f32, made, STREAMS * STREAMS), f32(0.0), f32(0.0), cutlass.Int32(1))
    return rows, shared, results


def _compiled_post(config: PostConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M and D left open."""
    _check_arch(runtime)

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.mhc.post import Post

        u32, f32 = cutlass.Uint32, cutlass.Float32
        m, words = cute.sym_int(), cute.sym_int(divisibility=BLOCK // 2)
        examples = (
            fake(u32, m, STREAMS, words),
            fake(u32, m, words),
            fake(f32, m, STREAMS),
            fake(f32, m, STREAMS * STREAMS),
            fake(u32, m, STREAMS, words),
            fake_stream(),
        )
        return Post(config), examples

    return cache.kernel("dsv4lab.kernels.mhc.post", config, build, runtime)


def _compiled_embed(config: EmbedConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M and V left open."""
    _check_arch(runtime)

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.mhc.embed import Embed

        ids = {"i32": cutlass.Int32, "i64": cutlass.Int64}[config.token]
        m = cute.sym_int()
        examples = (
            fake(ids, m, align=ids.width // 8),
            fake(cutlass.Uint32, cute.sym_int(), config.words * 4),
            fake(cutlass.Uint32, m, config.streams, config.words * 4),
            fake_stream(),
        )
        return Embed(config), examples

    return cache.kernel("dsv4lab.kernels.mhc.embed", config, build, runtime)


def _check_arch(runtime: Runtime) -> None:
    if runtime.arch not in ARCHITECTURES:
        raise ValueError(f"hyper-connections need {' or '.join(ARCHITECTURES)}, got {runtime.arch}")
