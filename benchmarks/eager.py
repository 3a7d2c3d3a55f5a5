"""Peers for the kernels that move memory: the compositions of torch operations that a user would write, and torch.compile.

They compute what `dsv4lab.reference` does, in float32 instead of float64 and without a look at values on the host, so that a
CUDA graph can hold them. `prepare_constants` comes first.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Failure
from dsv4lab.records import INDEX_FP4_GROUP, NOPE_GROUP, index_record, kv_record
from dsv4lab.reference.indexer import hadamard

EPS, LIMIT, GROUP = 1e-6, 10.0, 128
_COMPILE_S = 60  # that torch.compile may take for one operation
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_INDEX_DIM = 128
_constants: dict[str, torch.Tensor] = {}  # on the device, since a CUDA graph takes no copy from the host

Result = Any  # a tensor or a tuple of them


def prepare_constants(device: str) -> None:
    """Tables that the functions here look things up in."""
    _constants.update(edges=torch.tensor(_MIDPOINTS, device=device), grid=torch.tensor(_GRID, device=device))
    if device != "meta":
        _constants["hadamard"] = hadamard(torch.eye(_INDEX_DIM, device=device)).bfloat16()


# ---- rows --------------------------------------------------------------------------------------------------------------
def e2m1(x: torch.Tensor) -> torch.Tensor:
    codes = torch.bucketize(x.abs(), _constants["edges"], out_int32=True).to(torch.uint8) | ((x < 0).to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def nvfp4(x: torch.Tensor, scale: torch.Tensor) -> Result:
    """scale: () or (M, 1), one a row."""
    blocks = x.float().unflatten(-1, (-1, 16))
    block_scale = (blocks.abs().amax(-1) / (6.0 * scale)).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
    return e2m1(blocks / (block_scale.float() * scale)[..., None]).flatten(-2), block_scale


def global_scale(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax().float() / 2688.0


def exponent(amax: torch.Tensor, largest: float, floor: float = 1e-4) -> torch.Tensor:
    return torch.ceil(torch.log2(amax.clamp(min=floor) / largest))


def mxfp4(x: torch.Tensor) -> Result:
    blocks = x.float().unflatten(-1, (-1, INDEX_FP4_GROUP))
    power = exponent(blocks.abs().amax(-1), 6.0)
    return e2m1(blocks * torch.exp2(-power)[..., None]).flatten(-2), (power + 127).to(torch.uint8)


def fp8(x: torch.Tensor, group: int = GROUP) -> Result:
    blocks = x.float().unflatten(-1, (-1, group))
    power = exponent(blocks.abs().amax(-1), 448.0)
    codes = (blocks * torch.exp2(-power)[..., None]).to(torch.float8_e4m3fn)
    return codes.flatten(-2), (power + 127).to(torch.uint8)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, EPS)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)


def fp8_values(x: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    blocks = x.float().unflatten(-1, (-1, group))
    scale = torch.exp2(exponent(blocks.abs().amax(-1, keepdim=True), 448.0))
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).bfloat16()


def mxfp4_values(x: torch.Tensor) -> torch.Tensor:
    blocks = x.float().unflatten(-1, (-1, INDEX_FP4_GROUP))
    scale = torch.exp2(exponent(blocks.abs().amax(-1, keepdim=True), 6.0))
    scaled = blocks / scale
    codes = torch.bucketize(scaled.abs(), _constants["edges"], out_int32=True)
    return (_constants["grid"][codes].copysign(scaled) * scale).flatten(-2).bfloat16()


def nvfp4_values(x: torch.Tensor) -> Result:
    row = x.abs().amax(-1, keepdim=True).float() / 2688.0
    blocks = x.float().unflatten(-1, (-1, 16))
    block_scale = (blocks.abs().amax(-1) / (6.0 * row)).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float()
    scaled = blocks / (block_scale * row)[..., None]
    codes = torch.bucketize(scaled.abs(), _constants["edges"], out_int32=True)
    values = _constants["grid"][codes].copysign(scaled) * block_scale[..., None]
    return values.flatten(-2).bfloat16(), row


# ---- heads -------------------------------------------------------------------------------------------------------------
def rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, sign: float = 1.0) -> torch.Tensor:
    """x (M, c) or (M, H, c); sign: -1 turns back."""
    angle = positions.float()[:, None] * inv_freq
    if x.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin() * sign
    split = x.shape[-1] - 2 * inv_freq.shape[0]
    a, b = x[..., split:].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :split], turned.to(x.dtype)), dim=-1)


def q_norm_rope(q: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, eps: float) -> torch.Tensor:
    return rope(torch.nn.functional.rms_norm(q, (q.shape[-1],), None, eps), positions, inv_freq)


def inverse_rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    return rope(x, positions, inv_freq, -1.0)


def inverse_rope_fp8(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, group: int) -> Result:
    return fp8(inverse_rope(x, positions, inv_freq), group)


def inverse_rope_nvfp4(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, scale: torch.Tensor) -> Result:
    return nvfp4(inverse_rope(x, positions, inv_freq), scale)


def index_query(q: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, record: str) -> torch.Tensor:
    turned = rope(q, positions, inv_freq) @ _constants["hadamard"]
    return fp8_values(turned, q.shape[-1]) if record == "fp8" else mxfp4_values(turned)


# ---- pages -------------------------------------------------------------------------------------------------------------
def cache_write(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    eps: float,
    record: str,
    page_size: int,
) -> None:
    """Every key has a slot."""
    key = rope(rmsnorm(x, norm_weight), positions, inv_freq)
    page, place = slots // page_size, slots % page_size
    if record == "plain":
        pages[page, place] = key
        return
    rope_dim = 2 * inv_freq.shape[0]
    nope, rotary = key[:, :-rope_dim], key[:, -rope_dim:].bfloat16().contiguous()
    data, scales = kv_record(x.shape[1], rope_dim, record).parts(pages, page_size)
    if record == "fp8":
        codes, scale = fp8(nope, NOPE_GROUP)
        codes = codes.view(torch.uint8)
    else:
        power = exponent(nope.abs().amax(-1).float(), 2688.0, 1e-30)
        codes, block_scale = nvfp4(nope, torch.exp2(power)[:, None])
        scale = torch.cat((block_scale.view(torch.uint8), (power + 127).to(torch.uint8)[:, None]), dim=1)
    data[page, place] = torch.cat((codes, rotary.view(torch.uint8)), dim=1)
    scales[page, place] = torch.nn.functional.pad(scale, (0, scales.shape[2] - scale.shape[1]))


def index_key_write(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    eps: float,
    record: str,
    page_size: int,
) -> None:
    """Of packed records; every key has a slot."""
    key = rope(rmsnorm(x, norm_weight), positions, inv_freq).bfloat16() @ _constants["hadamard"]
    page, place = slots // page_size, slots % page_size
    data, scales = index_record(record, x.shape[1]).parts(pages, page_size)
    codes, scale = mxfp4(key) if record == "fp4" else fp8(key, x.shape[1])
    data[page, place] = codes.view(torch.uint8)
    scales[page, place] = scale if record == "fp4" else (scale.int() << 23).view(torch.uint8)


def cache_read(
    pages: torch.Tensor, slots: torch.Tensor, *, record: str, page_size: int, dim: int, rope_dim: int
) -> torch.Tensor:
    page, place = slots // page_size, slots % page_size
    if record == "plain":
        return pages[page, place].float()
    data, scales = kv_record(dim, rope_dim, record).parts(pages, page_size)
    rows, scale = data[page, place], scales[page, place]
    codes, rotary = rows[:, : -2 * rope_dim].contiguous(), rows[:, -2 * rope_dim :].contiguous().view(torch.bfloat16)
    if record == "fp8":
        groups = (dim - rope_dim) // NOPE_GROUP
        factor = torch.exp2(scale[:, :groups].float() - 127)
        nope = codes.view(torch.float8_e4m3fn).float().unflatten(1, (groups, -1)) * factor[..., None]
    else:
        blocks = (dim - rope_dim) // 16
        magnitudes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).int()
        values = torch.where(magnitudes > 7, -_constants["grid"][magnitudes & 7], _constants["grid"][magnitudes & 7])
        power = torch.exp2(scale[:, blocks].float() - 127)[:, None]
        factor = scale[:, :blocks].contiguous().view(torch.float8_e4m3fn).float() * power
        nope = values.unflatten(1, (blocks, -1)) * factor[..., None]
    return torch.cat((nope.flatten(1), rotary.float()), dim=1)


def compress(
    values: torch.Tensor,
    scores: torch.Tensor,
    ape: torch.Tensor,
    state: torch.Tensor,
    norm_weight: torch.Tensor,
    inv_freq: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    first_row: torch.Tensor,
    last_position: torch.Tensor,
    block_table: torch.Tensor,
    *,
    ratio: int,
    overlap: bool,
    eps: float,
    record: str,
    page_size: int,
    key: str,
    rounded: bool,
) -> None:
    """Either one new sequence of whole blocks, or one token of each of several sequences, which completes an entry.

    That is known to whoever calls, so that nothing is looked up; the kernel takes any mixture.
    """
    span, ring = ape.shape[0] * (2 if overlap else 1), state.shape[1]
    z = scores + ape[positions % ratio]
    if block_table.shape[0] == 1 and values.shape[0] > 1:
        own_a, own_z = values.view(-1, ratio, values.shape[1]), z.view(-1, ratio, values.shape[1])
        if overlap:
            d = values.shape[1] // 2
            first_a = torch.nn.functional.pad(own_a[:-1, :, :d], (0, 0, 0, 0, 1, 0))
            first_z = torch.nn.functional.pad(own_z[:-1, :, :d], (0, 0, 0, 0, 1, 0), value=-torch.inf)
            own_a = torch.cat((first_a, own_a[..., d:]), dim=1)
            own_z = torch.cat((first_z, own_z[..., d:]), dim=1)
        state[0, positions[-ring:] % ring] = torch.stack((values[-ring:], z[-ring:]), dim=1)
        entry, seq = positions[::ratio] // ratio, seq_idx[::ratio]
    else:
        state[seq_idx, positions % ring] = torch.stack((values, z), dim=1)
        back = torch.arange(span - 1, -1, -1, device=values.device)
        own_a, own_z = state[seq_idx[:, None], (positions[:, None] - back) % ring].unbind(2)
        if overlap:
            d = values.shape[1] // 2
            own_a = torch.cat((own_a[:, :ratio, :d], own_a[:, ratio:, d:]), dim=1)
            own_z = torch.cat((own_z[:, :ratio, :d], own_z[:, ratio:, d:]), dim=1)
        entry, seq = positions // ratio, seq_idx
    pooled = (torch.softmax(own_z, dim=1) * own_a).sum(1)
    slots = block_table[seq, entry // page_size].long() * page_size + entry % page_size
    write = cache_write if key == "kv" else index_key_write
    pooled = pooled.to(torch.bfloat16 if rounded else torch.float32)
    write(pooled, norm_weight, entry * ratio, inv_freq, pages, slots, eps=eps, record=record, page_size=page_size)


# ---- torch.compile -----------------------------------------------------------------------------------------------------
def compiled(function: Callable[..., Result], *inputs: Any, **named: Any) -> Callable[..., Result] | Failure:
    """torch.compile of a peer, run once; it may lack a compiler, or take too long."""
    try:
        with alarm(_COMPILE_S):
            torch._dynamo.reset()
            fast = torch.compile(function, dynamic=False)
            fast(*inputs, **named)
            return fast
    except Exception as error:
        return Failure(common.reason_of(error))


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside after so many seconds."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
