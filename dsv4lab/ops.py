"""One operation, one name: what models and notebooks call.

`ops.<name>` takes the arguments of `reference.<name>`. Underneath lies one `torch.library` operator `dsv4lab::<name>` an
operation, with a shape function for meta tensors. What runs is decided by the active backend and the device:

- "auto" (default): a CUDA tensor goes to the kernel registered for its architecture. Where there is none for the operation or
  its arguments, the float32 reference runs, with a warning once if other architectures have one; `implementations()` says
  which have. A CPU tensor goes to the reference.
- "reference": the float32 reference, on any device.
- "kernel": the kernel on the GPU; "sim": the same kernel, of the architecture named, in the simulator on CPU tensors.
  MissingKernel where there is none.

`observe()` collects every call with its inputs and outputs, for pictures and for checking kernels on real activations.
"""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves; and no tensor
# argument is keyword-only, which it does not accept.
from typing import Any, Optional

import torch
from torch import Tensor

from dsv4lab.dispatch import (
    BACKENDS,
    Backend,
    Call,
    MissingKernel,
    backend,
    implementations,
    observe,
    operator,
    register_kernel,
    scope,
)
from dsv4lab.formats import PackedWeight, get_format
from dsv4lab.kernels.registry import KERNELS
from dsv4lab.reference import (
    attention as _attention,
)
from dsv4lab.reference import (
    cache as _cache,
)
from dsv4lab.reference import (
    compressor as _compressor,
)
from dsv4lab.reference import (
    gemm as _gemm,
)
from dsv4lab.reference import (
    head as _head,
)
from dsv4lab.reference import (
    indexer as _indexer,
)
from dsv4lab.reference import (
    mhc as _mhc,
)
from dsv4lab.reference import (
    moe as _moe,
)
from dsv4lab.reference import (
    norm as _norm,
)
from dsv4lab.reference import (
    quant as _quant,
)
from dsv4lab.reference import (
    rope as _rope,
)
from dsv4lab.reference import (
    sampling as _sampling,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "Call",
    "MissingKernel",
    "backend",
    "implementations",
    "observe",
    "register_kernel",
    "scope",
]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Shape function of operations that only write into their arguments."""


def _two_counts(probs: Tensor) -> tuple[Tensor, Tensor]:
    return probs.new_empty(probs.shape[0], dtype=torch.int64), probs.new_empty(probs.shape[0], dtype=torch.int64)


def _packed(
    fmt: str, codes: Tensor, scale: Optional[Tensor], global_scale: Optional[Tensor], input_scale: Optional[Tensor]
) -> PackedWeight:
    return PackedWeight(get_format(fmt), codes, scale, global_scale, input_scale)


def _flat(weight: PackedWeight) -> tuple[str, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """A packed weight as operator arguments, in the order `_packed` takes them."""
    return weight.format.name, weight.codes, weight.scale, weight.global_scale, weight.input_scale


# ---- quantisers --------------------------------------------------------------------------------------------------------
@operator()
def quantize_nvfp4(x: Tensor, global_scale: Optional[Tensor] = None) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.quant.quantize_nvfp4`."""
    codes, block_scale, used = _quant.quantize_nvfp4(x, global_scale=global_scale)
    return codes, block_scale, used.clone() if used is global_scale else used


@operator()
def quantize_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quant.quantize_mxfp4`."""
    return _quant.quantize_mxfp4(x)


@operator()
def quantize_fp8_rows(x: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
    """See `reference.quant.quantize_fp8_rows`."""
    return _quant.quantize_fp8_rows(x, group=group)


@operator()
def quantize_fp8_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quant.quantize_fp8_blocks`."""
    return _quant.quantize_fp8_blocks(w)


@operator()
def _dequantize(
    fmt: str, codes: Tensor, scale: Optional[Tensor], global_scale: Optional[Tensor], input_scale: Optional[Tensor]
) -> Tensor:
    return _quant.dequantize(_packed(fmt, codes, scale, global_scale, input_scale)).clone()


def dequantize(weight: PackedWeight) -> Tensor:
    """See `reference.quant.dequantize`."""
    return _dequantize(*_flat(weight))


# ---- norms and rotary --------------------------------------------------------------------------------------------------
@operator()
def rmsnorm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """See `reference.norm.rmsnorm`."""
    return _norm.rmsnorm(x, weight, eps=eps)


@operator()
def rmsnorm_fp8(x: Tensor, weight: Tensor, *, eps: float, group: int) -> tuple[Tensor, Tensor]:
    """See `reference.norm.rmsnorm_fp8`."""
    return _norm.rmsnorm_fp8(x, weight, eps=eps, group=group)


@operator()
def rmsnorm_nvfp4(
    x: Tensor, weight: Tensor, eps: float, global_scale: Optional[Tensor] = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.norm.rmsnorm_nvfp4`."""
    codes, block_scale, used = _norm.rmsnorm_nvfp4(x, weight, eps=eps, global_scale=global_scale)
    return codes, block_scale, used.clone() if used is global_scale else used


@operator()
def q_norm_rope(q: Tensor, positions: Tensor, inv_freq: Tensor, *, eps: float) -> Tensor:
    """See `reference.norm.q_norm_rope`."""
    return _norm.q_norm_rope(q, positions, inv_freq, eps=eps)


@operator()
def inverse_rope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """See `reference.rope.inverse_rope`."""
    return _rope.inverse_rope(x, positions, inv_freq)


@operator()
def inverse_rope_fp8(x: Tensor, positions: Tensor, inv_freq: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
    """See `reference.rope.inverse_rope_fp8`."""
    return _rope.inverse_rope_fp8(x, positions, inv_freq, group=group)


@operator()
def inverse_rope_nvfp4(
    x: Tensor, positions: Tensor, inv_freq: Tensor, global_scale: Optional[Tensor] = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.rope.inverse_rope_nvfp4`."""
    codes, block_scale, used = _rope.inverse_rope_nvfp4(x, positions, inv_freq, global_scale=global_scale)
    return codes, block_scale, used.clone() if used is global_scale else used


# ---- cache and compressors ---------------------------------------------------------------------------------------------
@operator(mutates=("pages",), fake=_nothing)
def cache_write(
    x: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    pages: Tensor,
    slots: Tensor,
    *,
    eps: float,
    record: str,
    page_size: int,
) -> None:
    """See `reference.cache.cache_write`."""
    _cache.cache_write(x, norm_weight, positions, inv_freq, pages, slots, eps=eps, record=record, page_size=page_size)


@operator(fake=lambda pages, slots, *, dim, **_: pages.new_empty((slots.shape[0], dim), dtype=torch.float32))
def cache_read(pages: Tensor, slots: Tensor, *, record: str, page_size: int, dim: int, rope_dim: int) -> Tensor:
    """See `reference.cache.cache_read`."""
    return _cache.cache_read(pages, slots, record=record, page_size=page_size, dim=dim, rope_dim=rope_dim)


@operator()
def compressor_pool(
    values: Tensor,
    scores: Tensor,
    ape: Tensor,
    state: Tensor,
    positions: Tensor,
    seq_idx: Tensor,
    first_row: Tensor,
    last_row: Tensor,
    *,
    ratio: int,
    overlap: bool,
) -> Tensor:
    """See `reference.compressor.compressor_pool`."""
    return _compressor.compressor_pool(
        values, scores, ape, state, positions, seq_idx, first_row, last_row, ratio=ratio, overlap=overlap
    )


@operator(mutates=("state",), fake=_nothing)
def compressor_state_update(
    values: Tensor, scores: Tensor, ape: Tensor, state: Tensor, positions: Tensor, seq_idx: Tensor, last_position: Tensor
) -> None:
    """See `reference.compressor.compressor_state_update`."""
    _compressor.compressor_state_update(values, scores, ape, state, positions, seq_idx, last_position)


# ---- indexer and attention ---------------------------------------------------------------------------------------------
@operator(fake=lambda q, *_, **__: q.new_empty(q.shape))  # tracing Hadamard's loop with symbolic sizes takes minutes
def index_query(q: Tensor, positions: Tensor, inv_freq: Tensor, *, record: str) -> Tensor:
    """See `reference.indexer.index_query`."""
    return _indexer.index_query(q, positions, inv_freq, record=record)


@operator(mutates=("pages",), fake=_nothing)
def index_key_write(
    x: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    pages: Tensor,
    slots: Tensor,
    *,
    eps: float,
    record: str,
    page_size: int,
) -> None:
    """See `reference.indexer.index_key_write`."""
    _indexer.index_key_write(x, norm_weight, positions, inv_freq, pages, slots, eps=eps, record=record, page_size=page_size)


@operator(fake=lambda q, *_, max_entries, **__: q.new_empty((q.shape[0], max_entries), dtype=torch.float32))
def index_scores(
    q: Tensor,
    head_weights: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_idx: Tensor,
    num_visible: Tensor,
    *,
    record: str,
    page_size: int,
    max_entries: int,
) -> Tensor:
    """See `reference.indexer.index_scores`."""
    return _indexer.index_scores(
        q, head_weights, pages, block_table, seq_idx, num_visible, record=record, page_size=page_size, max_entries=max_entries
    )


@operator()
def index_topk(scores: Tensor, num_visible: Tensor, *, k: int) -> Tensor:
    """See `reference.indexer.index_topk`."""
    return _indexer.index_topk(scores, num_visible, k=k)


@operator(fake=lambda q, *_, **__: torch.empty_like(q))
def attention(
    q: Tensor,
    sinks: Tensor,
    window_pages: Tensor,
    entry_pages: Optional[Tensor],
    block_table: Tensor,
    positions: Tensor,
    seq_idx: Tensor,
    topk_indices: Optional[Tensor],
    *,
    window: int,
    ring_len: int,
    ratio: int,
    scale: float,
    record: str,
    window_page: int,
    entry_page: int,
    rope_dim: int,
) -> Tensor:
    """See `reference.attention.attention`."""
    return _attention.attention(
        q,
        sinks,
        window_pages,
        entry_pages,
        block_table,
        positions,
        seq_idx,
        topk_indices,
        window=window,
        ring_len=ring_len,
        ratio=ratio,
        scale=scale,
        record=record,
        window_page=window_page,
        entry_page=entry_page,
        rope_dim=rope_dim,
    )


# ---- matrix products ---------------------------------------------------------------------------------------------------
@operator(
    fake=lambda x, fmt, codes, *rest: x.new_empty(
        (x.shape[0], codes.shape[0]), dtype=rest[-1] or x.dtype
    )  # rest: .., out_dtype
)
def _linear(
    x: Tensor,
    fmt: str,
    codes: Tensor,
    scale: Optional[Tensor],
    global_scale: Optional[Tensor],
    input_scale: Optional[Tensor],
    act: str,
    out_dtype: Optional[torch.dtype],
) -> Tensor:
    return _gemm.linear(x, _packed(fmt, codes, scale, global_scale, input_scale), act=act, out_dtype=out_dtype)


def linear(x: Tensor, weight: PackedWeight, *, act: str, out_dtype: Optional[torch.dtype] = None) -> Tensor:
    """See `reference.gemm.linear`."""
    return _linear(x, *_flat(weight), act, out_dtype)


@operator(fake=lambda x, fmt, codes, *_: x.new_empty((x.shape[0], x.shape[1], codes.shape[0] // x.shape[1])))
def _grouped_linear(
    x: Tensor,
    fmt: str,
    codes: Tensor,
    scale: Optional[Tensor],
    global_scale: Optional[Tensor],
    input_scale: Optional[Tensor],
    act: str,
) -> Tensor:
    return _gemm.grouped_linear(x, _packed(fmt, codes, scale, global_scale, input_scale), act=act)


def grouped_linear(x: Tensor, weight: PackedWeight, *, act: str) -> Tensor:
    """See `reference.gemm.grouped_linear`."""
    return _grouped_linear(x, *_flat(weight), act)


@operator()
def lm_head(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.gemm.lm_head`."""
    return _gemm.lm_head(x, weight)


# ---- mixture of experts ------------------------------------------------------------------------------------------------
@operator()
def router_topk(x: Tensor, gate_weight: Tensor, bias: Tensor, *, top_k: int, route_scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.moe.router_topk`."""
    return _moe.router_topk(x, gate_weight, bias, top_k=top_k, route_scale=route_scale)


@operator()
def router_hash(
    x: Tensor, gate_weight: Tensor, tid2eid: Tensor, token_ids: Tensor, *, route_scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference.moe.router_hash`."""
    return _moe.router_hash(x, gate_weight, tid2eid, token_ids, route_scale=route_scale)


@operator(fake=lambda x, *_, **__: torch.empty_like(x, dtype=torch.float32))
def _moe_experts(
    x: Tensor,
    weights: Tensor,
    expert_idx: Tensor,
    fmts: str,
    codes: list[Tensor],
    scale: list[Tensor],
    global_scale: list[Tensor],
    input_scale: list[Tensor],
    *,
    limit: float,
    act: str,
) -> Tensor:
    w1, w3, w2 = _unpack_all(fmts, codes, scale, global_scale, input_scale)
    return _moe.moe(x, weights, expert_idx, w1, w3, w2, limit=limit, act=act)


def moe(
    x: Tensor,
    weights: Tensor,
    expert_idx: Tensor,
    w1: PackedWeight,
    w3: PackedWeight,
    w2: PackedWeight,
    *,
    limit: float,
    act: str,
) -> Tensor:
    """See `reference.moe.moe`."""
    return _moe_experts(x, weights, expert_idx, *_pack_all(w1, w3, w2), limit=limit, act=act)


@operator(fake=lambda x, *_, **__: x.new_empty(x.shape))
def _shared_expert(
    x: Tensor,
    fmts: str,
    codes: list[Tensor],
    scale: list[Tensor],
    global_scale: list[Tensor],
    input_scale: list[Tensor],
    *,
    limit: float,
    act: str,
) -> Tensor:
    w1, w3, w2 = _unpack_all(fmts, codes, scale, global_scale, input_scale)
    return _moe.expert(x, w1, w3, w2, limit=limit, act=act)


def shared_expert(x: Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight, *, limit: float, act: str) -> Tensor:
    """See `reference.moe.expert`."""
    return _shared_expert(x, *_pack_all(w1, w3, w2), limit=limit, act=act)


def _pack_all(*weights: PackedWeight) -> tuple[str, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Several packed weights as operator arguments; a part that a format lacks is an empty tensor."""
    empty = weights[0].codes.new_empty(0, dtype=torch.float32)
    parts = [[getattr(w, name) for w in weights] for name in ("codes", "scale", "global_scale", "input_scale")]
    filled = [[empty if t is None else t for t in part] for part in parts]
    return ",".join(w.format.name for w in weights), filled[0], filled[1], filled[2], filled[3]


def _unpack_all(fmts: str, *parts: list[Tensor]) -> list[PackedWeight]:
    codes, *rest = parts
    optional = [[t if t.numel() else None for t in part] for part in rest]
    return [_packed(name, codes[i], *(part[i] for part in optional)) for i, name in enumerate(fmts.split(","))]


@operator()
def moe_combine(routed: Tensor, shared: Tensor) -> Tensor:
    """See `reference.moe.moe_combine`."""
    return _moe.moe_combine(routed, shared)


# ---- hyper-connections -------------------------------------------------------------------------------------------------
@operator()
def embed_streams(token_ids: Tensor, weight: Tensor, *, num_streams: int) -> Tensor:
    """See `reference.mhc.embed_streams`."""
    return _mhc.embed_streams(token_ids, weight, num_streams=num_streams)


@operator()
def mhc_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.mhc.mhc_pre`."""
    return _mhc.mhc_pre(streams, fn, base, scale, norm_weight, eps=eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters)


@operator()
def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See `reference.mhc.mhc_post`."""
    return _mhc.mhc_post(y, streams, post, comb)


@operator()
def mhc_post_pre(
    y: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.mhc.mhc_post_pre`."""
    return _mhc.mhc_post_pre(
        y, streams, post, comb, fn, base, scale, norm_weight, eps=eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters
    )


@operator()
def mhc_head(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_weight: Tensor, *, eps: float, hc_eps: float
) -> Tensor:
    """See `reference.mhc.mhc_head`."""
    return _mhc.mhc_head(streams, fn, base, scale, norm_weight, eps=eps, hc_eps=hc_eps)


# ---- prediction block and sampling -------------------------------------------------------------------------------------
@operator(fake=lambda embedding, streams, *_, **__: streams.new_empty(streams.shape))
def _mtp_input(
    embedding: Tensor,
    streams: Tensor,
    enorm_weight: Tensor,
    hnorm_weight: Tensor,
    fmts: str,
    codes: list[Tensor],
    scale: list[Tensor],
    global_scale: list[Tensor],
    input_scale: list[Tensor],
    *,
    eps: float,
    act: str,
) -> Tensor:
    e_proj, h_proj = _unpack_all(fmts, codes, scale, global_scale, input_scale)
    return _head.mtp_input(embedding, streams, enorm_weight, hnorm_weight, e_proj, h_proj, eps=eps, act=act)


def mtp_input(
    embedding: Tensor,
    streams: Tensor,
    enorm_weight: Tensor,
    hnorm_weight: Tensor,
    e_proj: PackedWeight,
    h_proj: PackedWeight,
    *,
    eps: float,
    act: str,
) -> Tensor:
    """See `reference.head.mtp_input`."""
    packed = _pack_all(e_proj, h_proj)
    return _mtp_input(embedding, streams, enorm_weight, hnorm_weight, *packed, eps=eps, act=act)


@operator(fake=lambda logits, *_, **__: logits.new_empty(logits.shape[0], dtype=torch.int64))
def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """See `reference.sampling.sample`."""
    return _sampling.sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=position)


@operator()
def probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """See `reference.sampling.probabilities`."""
    return _sampling.probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)


@operator(fake=lambda target_probs, *_, **__: _two_counts(target_probs))
def accept_drafts(
    target_probs: Tensor, draft_probs: Tensor, draft_ids: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.sampling.accept_drafts`."""
    return _sampling.accept_drafts(target_probs, draft_probs, draft_ids, seed=seed, position=position)


for _kernel in KERNELS:
    register_kernel(_kernel.operation, _kernel.arch, _kernel.function, refuses=_kernel.refuses)
