"""What rotates, normalises, stores and reads around the attention: time, percent of copy bandwidth, peers.

Query heads (Flash's 64 and Pro's 128) before and after the attention, window keys into pages and keys out of them, compressors
(both of CSA, the one of HCA) from projections to stored entries, index queries. 8,192 tokens are one new sequence. 8 tokens and
1 are sequences of 16,384 tokens in their decode step; each of them completes an entry, which is the most that a compressor may
have to do.

Bound: the bytes that must be read and written, over copy bandwidth. Peers: `eager.py`, and torch.compile of it, of some
operations and at one size to save time. `equal`: the part of our result's bytes that is the reference's, on a part of the rows
where there are many. cosine and worst_row: of the numbers that the result stands for, against those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import common, eager, operations
from benchmarks.common import Bench, Call, Failure
from benchmarks.operations import BLOCK, DIM, EPS, FLASH, INDEX_DIM, PRO, ROPE_DIM, WINDOW_PAGE, Args, inv_freq, record_bytes
from benchmarks.quantizers import equal_part
from dsv4lab import ops
from dsv4lab.config import CSA, HCA
from dsv4lab.dispatch import backend
from dsv4lab.kernels._common.launch import runtime_of
from dsv4lab.reference import cache as reference_cache
from dsv4lab.reference import indexer as reference_indexer
from dsv4lab.reference.quant import dequantize_fp8_rows, dequantize_nvfp4

TOKENS = (8192, 8, 1)
QUICK_TOKENS = (8192, 1)
CONTEXT = 16384  # tokens of a sequence in a decode step
BAR_PERCENT = 80.0  # of the bound, of 8,192 tokens
BAR_US = 6.0  # of fewer
_RING = 192  # places of a sequence's window
_GROUP = 128
_COMPILED = (
    "q_norm_rope flash",
    "inverse_rope_fp8 flash",
    "cache_write fp8",
    "cache_read fp8",
    "compress csa kv",
    "index_query fp4",
)

Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Operation:
    """kernel: the operation's name. make: arguments for so many tokens on a device. nbytes: that it must read and write for
    them. eager: the peer. values: numbers of a result, of the arguments that gave it. rows: arguments with a row a token, where
    rows are independent. written: arguments that are results.
    """

    name: str
    kernel: str
    make: Callable[[int, str], Args]
    nbytes: Callable[[int], float]
    eager: Callable[..., Any]
    values: Callable[[Parts, Args], torch.Tensor]
    rows: tuple[int, ...] = ()
    written: tuple[int, ...] = ()

    def __call__(self, args: Args) -> Any:
        """What is measured."""
        return operations.call(self.kernel, *args[0], **args[1])

    def parts(self, result: Any, args: Args) -> Parts:
        """What is compared with the reference; a global scale that was given is not."""
        if self.written:
            return tuple(args[0][i] for i in self.written)
        return result[:2] if isinstance(result, tuple) else (result,)

    def fresh(self, args: Args, rows: Any = slice(None)) -> Args:
        """Copies of what is written, and some of the rows."""
        chosen = [a.clone() if i in self.written else a[rows] if i in self.rows else a for i, a in enumerate(args[0])]
        return tuple(chosen), args[1]


# ---- heads -------------------------------------------------------------------------------------------------------------
def positions_of(m: int, device: str) -> torch.Tensor:
    """One new sequence, or the last token of as many."""
    if m < _GROUP:
        return torch.full((m,), CONTEXT - 1, dtype=torch.int64, device=device)
    return torch.arange(m, device=device)


def heads_args(heads: int, dim: int, m: int, device: str, *more: float, **named: Any) -> Args:
    q = torch.randn(m, heads, dim, device=device).bfloat16()
    scalars = [torch.full((), value, device=device) for value in more]
    return (q, positions_of(m, device), inv_freq(device), *scalars), named


def plain_values(parts: Parts, args: Args) -> torch.Tensor:
    return parts[0]


def fp8_values(parts: Parts, args: Args) -> torch.Tensor:
    codes, scale = parts[0], parts[1].view(torch.float8_e8m0fnu)
    return dequantize_fp8_rows(codes, scale, group=codes.shape[-1] // scale.shape[-1])


def nvfp4_values(parts: Parts, args: Args) -> torch.Tensor:
    return dequantize_nvfp4(parts[0], parts[1], args[0][3])


def _of_heads(name: str, heads: int) -> tuple[Operation, ...]:
    read = 2.0 * heads * DIM  # bytes of a token
    make = partial(heads_args, heads, DIM)
    scale = 5.0 / 2688.0
    rows = (0, 1)

    def both(out: float) -> Callable[[int], float]:
        return lambda m: m * (read + heads * out)

    return (
        Operation(
            f"q_norm_rope {name}", "q_norm_rope", partial(make, eps=EPS), both(2 * DIM), eager.q_norm_rope, plain_values, rows
        ),
        Operation(f"inverse_rope {name}", "inverse_rope", make, both(2 * DIM), eager.inverse_rope, plain_values, rows),
        Operation(
            f"inverse_rope_fp8 {name}",
            "inverse_rope_fp8",
            partial(make, group=_GROUP),
            both(DIM + DIM / _GROUP),
            eager.inverse_rope_fp8,
            fp8_values,
            rows,
        ),
        Operation(
            f"inverse_rope_nvfp4 {name}",
            "inverse_rope_nvfp4",
            lambda m, device: heads_args(heads, DIM, m, device, scale),
            both(DIM / 2 + DIM / 16),
            eager.inverse_rope_nvfp4,
            nvfp4_values,
            rows,
        ),
    )


def _index_query(record: str) -> Operation:
    heads = FLASH.index_n_heads
    return Operation(
        f"index_query {record}",
        "index_query",
        partial(heads_args, heads, INDEX_DIM, record=record),
        lambda m: 4.0 * m * heads * INDEX_DIM,
        eager.index_query,
        plain_values,
        rows=(0, 1),
    )


# ---- keys --------------------------------------------------------------------------------------------------------------
def write_args(record: str, m: int, device: str) -> Args:
    """A ring a sequence; that of a long one holds all its tokens."""
    one = m >= _GROUP
    slots = torch.arange(m, device=device) if one else torch.arange(m, device=device) * _RING + (CONTEXT - 1) % _RING
    pages = -(-m // WINDOW_PAGE) if one else m * _RING // WINDOW_PAGE
    x = torch.randn(m, DIM, device=device).bfloat16()
    pool = operations.pages_of(record, pages, WINDOW_PAGE, device)
    weight = operations.norm_weight(DIM, device)
    return (x, weight, positions_of(m, device), inv_freq(device), pool, slots), _stored(record, WINDOW_PAGE)


def _stored(record: str, page_size: int) -> dict[str, Any]:
    return dict(eps=EPS, record=record, page_size=page_size)


def written_keys(parts: Parts, args: Args) -> torch.Tensor:
    """The keys that were stored."""
    named = args[1]
    return reference_cache.cache_read(
        parts[-1], args[0][5], record=named["record"], page_size=named["page_size"], dim=DIM, rope_dim=ROPE_DIM
    )


def read_args(record: str, m: int, device: str) -> Args:
    """Entries from all over a pool of twice as many."""
    size = BLOCK // FLASH.csa_ratio
    pages = -(-2 * m // size)
    slots = (
        torch.randperm(pages * size, device=device)[:m]
        if device != "meta"
        else torch.empty(m, dtype=torch.int64, device=device)
    )
    named = dict(record=record, page_size=size, dim=DIM, rope_dim=ROPE_DIM)
    return (operations.pages_of(record, pages, size, device), slots), named


def _cache(record: str) -> tuple[Operation, ...]:
    each = record_bytes(record)
    return (
        Operation(
            f"cache_write {record}",
            "cache_write",
            partial(write_args, record),
            lambda m: m * (2.0 * DIM + each),
            eager.cache_write,
            written_keys,
            written=(4,),
        ),
        Operation(
            f"cache_read {record}",
            "cache_read",
            partial(read_args, record),
            lambda m: m * (4.0 * DIM + each),
            eager.cache_read,
            plain_values,
            rows=(1,),
        ),
    )


# ---- compressors -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Compressor:
    kind: str
    key: str
    record: str

    @property
    def ratio(self) -> int:
        return FLASH.ratio(self.kind)

    @property
    def dim(self) -> int:
        return DIM if self.key == "kv" else INDEX_DIM

    @property
    def overlap(self) -> bool:
        return self.kind == CSA

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.dim * (2 if self.overlap else 1)

    @property
    def span(self) -> int:
        """Tokens that an entry pools, and places of a ring."""
        return self.ratio * (2 if self.overlap else 1)

    def args(self, m: int, device: str) -> Args:
        one = m >= _GROUP
        seqs = 1 if one else m
        values, scores = (torch.randn(m, self.width, device=device) for _ in range(2))
        ape = 0.3 * torch.randn(self.ratio, self.width, device=device)
        state = torch.randn(seqs, self.span, 2, self.width, device=device)
        positions = positions_of(m, device)
        seq_idx = torch.zeros_like(positions) if one else torch.arange(m, device=device)
        first = torch.zeros_like(positions) if one else torch.arange(m, device=device)
        last = torch.full_like(positions, (m if one else CONTEXT) - 1)
        blocks = -(-(m if one else CONTEXT) // BLOCK)
        size = BLOCK // self.ratio
        pages = operations.pages_of(self.record, seqs * blocks, size, device, index=self.key == "index")
        table = operations.block_table(seqs, blocks, device)
        weight = operations.norm_weight(self.dim, device)
        named = dict(ratio=self.ratio, overlap=self.overlap, key=self.key, rounded=True) | _stored(self.record, size)
        return (values, scores, ape, state, weight, inv_freq(device), pages, positions, seq_idx, first, last, table), named

    def nbytes(self, m: int) -> float:
        """Values and scores; the ring, of which an entry reads one half of its channels; entries."""
        token, each = 8.0 * self.width, record_bytes(self.record, self.dim)
        if m >= _GROUP:
            return m * token + self.span * token + m // self.ratio * each
        return m * (2 * token + (self.span - 1) * 8.0 * self.dim + each)

    def entries(self, parts: Parts, args: Args) -> torch.Tensor:
        """The entries that were stored."""
        positions, seq_idx, table, size = args[0][7], args[0][8], args[0][11], args[1]["page_size"]
        last = (positions + 1) % self.ratio == 0
        entry = positions[last] // self.ratio
        slots = table[seq_idx[last], entry // size].long() * size + entry % size
        how: dict[str, Any] = dict(record=self.record, page_size=size)
        if self.key == "kv":
            return reference_cache.cache_read(parts[-1], slots, dim=DIM, rope_dim=ROPE_DIM, **how)
        return reference_indexer.index_key_read(parts[-1], slots, dim=INDEX_DIM, **how)


def _compress(name: str, kind: str, key: str, record: str) -> Operation:
    one = Compressor(kind, key, record)
    return Operation(f"compress {name}", "compress", one.args, one.nbytes, eager.compress, one.entries, written=(3, 6))


OPERATIONS = (
    *_of_heads("flash", FLASH.num_attention_heads),
    *_of_heads("pro", PRO.num_attention_heads),
    *(operation for record in ("plain", "fp8", "nvfp4") for operation in _cache(record)),
    _compress("csa kv", CSA, "kv", "fp8"),
    _compress("csa index", CSA, "index", "fp4"),
    _compress("hca", HCA, "kv", "fp8"),
    _index_query("fp4"),
    _index_query("fp8"),
)


# ---- cases -------------------------------------------------------------------------------------------------------------
def cases(*, quick: bool) -> Iterator[tuple[Operation, int]]:
    for m in QUICK_TOKENS if quick else TOKENS:
        for operation in OPERATIONS:
            if not quick or not operation.name.endswith(" pro"):
                yield operation, m


def label(operation: Operation, m: int) -> str:
    """What `--match` looks at."""
    return f"{operation.name} {m}"


def touch(operation: Operation, m: int) -> None:
    """The call on tensors without memory: asks for the kernels that the measurement will."""
    operation(operation.make(m, "meta"))


# ---- rows --------------------------------------------------------------------------------------------------------------
def run(bench: Bench) -> None:
    """All rows. Raises Broken."""
    for operation, m in cases(quick=bench.quick):
        if bench.wants(label(operation, m)):
            try:
                measure(bench, operation, m)
            except Exception as error:
                bench.failed(operation.name, {"m": m, "format": ""}, error)


def measure(bench: Bench, operation: Operation, m: int, device: str = "cuda") -> None:
    eager.prepare_constants(device)
    fields: dict[str, Any] = {"m": m, "format": ""}
    fields |= {"bar_percent": BAR_PERCENT} if m == max(TOKENS) else {"bar_us": BAR_US}
    first = operation.make(m, device)
    nbytes = operation.nbytes(m)
    sets = [first, *(operation.make(m, device) for _ in range(common.num_copies(nbytes) - 1))]
    ours: Sequence[Call] | Failure = [partial(operation, args) for args in sets]
    try:
        with common.seeing(first[0][0]) as names:
            fields |= compared(operation, first)
        fields |= common.kernel_fields(common.kernels_of(names, runtime_of(first[0][0]).arch))
    except Exception as error:
        ours = Failure(common.reason_of(error))
        if device == "cuda":
            common.still_alive()
    candidates: dict[str, Sequence[Call] | Failure] = {"ours": ours, "torch": operations.calls_of(operation.eager, sets)}
    if m != max(TOKENS) or operation.name not in _COMPILED or bench.quick:
        candidates["torch.compile"] = Failure(f"of {', '.join(_COMPILED)} at {max(TOKENS)} tokens only, to save time")
    else:
        compiled = eager.compiled(operation.eager, *first[0], **first[1])
        candidates["torch.compile"] = compiled if isinstance(compiled, Failure) else operations.calls_of(compiled, sets)
    bench.measure(operation.name, fields, candidates, nbytes=nbytes, flops=0.0)


def compared(operation: Operation, args: Args) -> dict[str, Any]:
    """equal, cosine and worst_row of some rows, or of all where they are written into pages."""
    rows = common.sampled(args[0][operation.rows[0]].shape[0]) if operation.rows else slice(None)
    mine, theirs = operation.fresh(args), operation.fresh(args, rows)
    got = operation.parts(operation(mine), mine)
    if operation.rows:
        got = tuple(part[rows] for part in got)
    with backend("reference"):
        want = operation.parts(getattr(ops, operation.kernel)(*theirs[0], **theirs[1]), theirs)
    figures = operations.accuracy_fields(operation.values(got, mine), operation.values(want, theirs))
    return {"equal": equal_part(got, want)} | figures
