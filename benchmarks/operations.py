"""What the suites of the attention stack share: a kernel by its operation's name, random pages of keys, figures of rows.

Keys are drawn normally, normalised, rotated and stored by the reference, as a model's are; a large pool repeats some thousand
of them, since only addresses matter to the time. Block tables are random permutations of a pool's pages, and picks of entries
are random, in ascending order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Call, Failure, attempt
from dsv4lab.config import ModelConfig
from dsv4lab.dispatch import MissingKernel
from dsv4lab.kernels._common.launch import runtime_of
from dsv4lab.kernels.registry import KERNELS
from dsv4lab.records import allocate_index_pages, allocate_kv_pages, index_record, kv_record
from dsv4lab.reference.cache import cache_read, cache_write
from dsv4lab.reference.indexer import index_key_read, index_key_write
from dsv4lab.reference.rope import rope_frequencies

FLASH, PRO = ModelConfig.flash(), ModelConfig.pro()  # all constants that they share are taken from the first
DIM, ROPE_DIM, INDEX_DIM = FLASH.head_dim, FLASH.qk_rope_head_dim, FLASH.index_head_dim
WINDOW, WINDOW_PAGE = FLASH.sliding_window, 64
BLOCK = FLASH.block_tokens  # tokens of a page of entries, whatever their ratio
EPS = FLASH.rms_norm_eps
Args = tuple[tuple[Any, ...], dict[str, Any]]
_UNIQUE = 8192  # keys that differ, of a pool
_CHUNK = 1 << 16  # keys that are decoded at once
_MOST_COPIES = 256  # of what a call of few bytes reads: 60 MB of it are enough to have most of it cold


def call(name: str, *args: Any, **named: Any) -> Any:
    """An operation's kernel, without the detour through torch's dispatcher. Raises MissingKernel, also where it refuses."""
    tensor = next(a for a in (*args, *named.values()) if isinstance(a, torch.Tensor))
    arch = runtime_of(tensor).arch
    entry = next((entry for entry in KERNELS if (entry.operation, entry.arch) == (name, arch)), None)
    if entry is None:
        raise MissingKernel(f"{name} has no kernel for {arch}")
    why = entry.refuses(*args, **named)
    if why is not None:
        raise MissingKernel(f"{name} has no kernel for {arch} that takes these arguments: {why}")
    return entry.function(*args, **named)


def calls_of(function: Callable[..., Any], sets: Sequence[Args]) -> list[Call]:
    """A call for each set of arguments."""
    return [partial(function, *args, **named) for args, named in sets]


def checked(
    fields: dict[str, Any], name: str | Callable[..., Any], sets: Sequence[Args], compare: Callable[[Args, Any], dict[str, Any]]
) -> Sequence[Call] | Failure:
    """Our calls, after a first one whose kernels and figures go into the fields; or why there are none. Raises Broken."""
    args, named = sets[0]
    function = partial(call, name) if isinstance(name, str) else name

    def first() -> list[Call]:
        with common.seeing(args[0]) as names:
            y = function(*args, **named)
        fields.update(compare(sets[0], y))
        fields.update(common.kernel_fields(common.kernels_of(names, runtime_of(args[0]).arch)))
        return calls_of(function, sets)

    return attempt(first)


# ---- pages -------------------------------------------------------------------------------------------------------------
def inv_freq(device: str) -> torch.Tensor:
    """Of the compressed layers."""
    found = rope_frequencies(rope_dim=ROPE_DIM, theta=FLASH.compress_rope_theta, scaling=FLASH.rope_scaling)
    return found.to(device)


def norm_weight(dim: int, device: str) -> torch.Tensor:
    return (1.0 + 0.1 * torch.randn(dim, device=device)).bfloat16()


def record_bytes(record: str, dim: int = DIM) -> int:
    """Of a key ("plain": bf16), its scales included; of an index key where dim is INDEX_DIM."""
    if record == "plain":
        return 2 * dim
    found = index_record(record, dim) if dim == INDEX_DIM else kv_record(dim, ROPE_DIM, record)
    return found.data_bytes + found.scale_bytes


def pages_of(record: str, num_pages: int, page_size: int, device: str, *, index: bool = False) -> torch.Tensor:
    """A pool full of random keys, or of index keys."""
    how: dict[str, Any] = dict(num_pages=num_pages, page_size=page_size, dtype=torch.bfloat16, device=device)
    dim = INDEX_DIM if index else DIM
    if index:
        pages = allocate_index_pages(record, dim=dim, **how)
    else:
        pages = allocate_kv_pages(record, dim=dim, rope_dim=ROPE_DIM, **how)
    if device == "meta":
        return pages
    few = min(num_pages, -(-_UNIQUE // page_size))
    slots = torch.arange(few * page_size, device=device)
    x = torch.randn(len(slots), dim, device=device).bfloat16()
    write = index_key_write if index else cache_write
    how = dict(eps=EPS, record=record, page_size=page_size)
    write(x, norm_weight(dim, device), slots, inv_freq(device), pages[:few], slots, **how)
    for rest in pages[few:].split(max(_CHUNK // page_size, 1)):
        rest.copy_(pages[torch.randint(few, (rest.shape[0],), device=device)])
    return pages


def dense(pages: torch.Tensor, record: str, page_size: int, *, index: bool = False) -> torch.Tensor:
    """All keys of a pool (slots, dim) bf16, as peers take them."""
    count = pages.shape[0] * page_size
    found = torch.empty(count, INDEX_DIM if index else DIM, dtype=torch.bfloat16, device=pages.device)
    for slots in torch.arange(count, device=pages.device).split(_CHUNK):
        if index:
            found[slots] = index_key_read(pages, slots, record=record, page_size=page_size, dim=INDEX_DIM).bfloat16()
        else:
            how: dict[str, Any] = dict(record=record, page_size=page_size, dim=DIM, rope_dim=ROPE_DIM)
            found[slots] = cache_read(pages, slots, **how).bfloat16()
    return found


def block_table(seqs: int, blocks: int, device: str) -> torch.Tensor:
    """(seqs, blocks) i32: pages 0 to seqs * blocks - 1 in random order."""
    if device == "meta":
        return torch.empty(seqs, blocks, dtype=torch.int32, device=device)
    return torch.randperm(seqs * blocks, device=device).view(seqs, blocks).int()


def picks(num_visible: torch.Tensor, entries: int, k: int) -> torch.Tensor:
    """k random visible entries of each query, ascending, then -1: (M, k) i32. entries: the most that are visible."""
    device = num_visible.device
    if device.type == "meta":
        return torch.empty(num_visible.shape[0], k, dtype=torch.int32, device=device)
    score = torch.rand(num_visible.shape[0], max(entries, k), device=device)
    hidden = torch.arange(score.shape[1], device=device) >= num_visible[:, None]
    best = score.masked_fill_(hidden, -1.0).topk(k, sorted=False)
    chosen = torch.where(best.values >= 0, best.indices, score.shape[1]).sort(-1).values
    return torch.where(chosen < score.shape[1], chosen, -1).int()


def cold_copies(nbytes: float) -> int:
    """As `common.num_copies`, but many of small things too: a decode step finds none of its keys in the L2 cache."""
    return max(2, min(_MOST_COPIES, math.ceil(common.COLD_BYTES / max(nbytes, 1.0))))


# ---- figures of rows ---------------------------------------------------------------------------------------------------
def worst_row(y: torch.Tensor, want: torch.Tensor) -> float:
    """The smallest cosine of any row (the last dim); rows that are zero on both sides are left out."""
    a, b = y.double().flatten(0, -2), want.double().flatten(0, -2)
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    counts = (a.norm(dim=-1) > 0) | (b.norm(dim=-1) > 0)
    return float(((a * b).sum(-1) / norms.clamp(min=1e-300))[counts].min()) if bool(counts.any()) else 1.0


def accuracy_fields(y: torch.Tensor, want: torch.Tensor) -> dict[str, Any]:
    """relative_error, cosine and worst_row against float64."""
    return {
        "relative_error": common.relative_error(y, want),
        "cosine": common.cosine(y, want),
        "worst_row": worst_row(y, want),
    }
