"""The core attention over paged keys, prefill and decode, at Flash's (64 heads) and Pro's (128 heads) shapes.

    csa prefill      4,096 queries at the end of 8,192 tokens: window and 512 (Flash) or 1,024 (Pro) chosen entries
    hca prefill      the same queries, window and all visible entries of 128 tokens (64 at most); has the bar of the dense shape
    hca prefill 64k  4,096 queries at the end of 65,536 tokens: window and up to 512 entries; Flash's against the same bar
    csa decode       1 query of each of 1 to 256 sequences of 16,384 tokens, FP8 keys; window and 512 or 1,024 entries
    hca decode       the same with all 128 entries of 128 tokens

A call is everything from rotated queries to the output, splits and their combination included. A decode step finds its keys
cold: calls go through sequences of their own. tflops: 4 * heads * 512 flops a query and key that it attends to.

Bound: those flops over the BF16 rate, or bytes over copy bandwidth: queries, outputs, indices, and in decode every attended
key's record once a query, in prefill every record of window and entries once. Bars: 480 and 540 TFLOP/s for CSA prefill of
Flash and Pro, 480 for dense HCA; 13, 36, 48 and 88 us for Flash's decode steps of 1, 64, 128 and 256, 60 and 105 us for
Pro's of 64 and 128. For orientation: FlashMLA on an H200 takes 14.6, 45.8, 49.3 and 91.7 us for Flash, 56.0 and 105.3 us for
Pro, and its prefill of BF16 keys reaches 561 and 631 TFLOP/s.

Peers take BF16 keys, decoded beforehand into one matrix, and for each query one list of rows in it:

    sdpa        torch's scaled_dot_product_attention, a query's heads as its rows; keys gathered beforehand, no sink
    torch       gather, two products and a softmax with the sink; long prefills in pieces
    triton      `triton_attention.py`, its tile chosen on the spot

cosine and worst_row (of a query's head): some queries against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import common, eager, operations
from benchmarks.common import Bench, Call, Failure, attempt
from benchmarks.operations import BLOCK, DIM, FLASH, PRO, ROPE_DIM, WINDOW, WINDOW_PAGE, Args, record_bytes
from dsv4lab.config import CSA, HCA, ModelConfig
from dsv4lab.reference import attention as reference

RECORDS = ("plain", "fp8", "nvfp4")
SCALE = FLASH.softmax_scale
_PEER_RECORD = "fp8"
_PEER_QUERIES = 512  # that the eager peer gathers keys for at once
_ORACLE_QUERIES = 32
_COMPILED = "flash csa decode 64"
_WRONG = 0.02  # relative error of a peer


@dataclass(frozen=True)
class Shape:
    """queries: the last ones of one sequence of `context` tokens, or one of each of as many. bar: (unit, figure) or none."""

    name: str
    model: ModelConfig
    kind: str
    queries: int
    context: int
    decode: bool = False
    bar: tuple[str, float] | None = None

    @property
    def heads(self) -> int:
        return self.model.num_attention_heads

    @property
    def ratio(self) -> int:
        return self.model.ratio(self.kind)

    @property
    def topk(self) -> int:
        """Entries that are chosen for a query; 0: it attends to all that it sees."""
        return self.model.index_topk if self.kind == CSA else 0

    @property
    def seqs(self) -> int:
        return self.queries if self.decode else 1

    @property
    def ring(self) -> int:
        """Places of a sequence's window: for the tokens of a step and the window before it."""
        step = 1 if self.decode else self.queries
        return -(-(WINDOW + step) // WINDOW_PAGE) * WINDOW_PAGE

    @property
    def page(self) -> int:
        return BLOCK // self.ratio

    def positions(self, device: str) -> torch.Tensor:
        if self.decode:
            return torch.full((self.queries,), self.context - 1, dtype=torch.int64, device=device)
        return torch.arange(self.context - self.queries, self.context, device=device)

    @property
    def attended(self) -> int:
        """Keys of all queries."""
        each = [(p + 1) // self.ratio for p in self.positions("cpu").tolist()]
        return sum(WINDOW + (min(n, self.topk) if self.topk else n) for n in each)

    @property
    def flops(self) -> float:
        return 4.0 * self.heads * DIM * self.attended

    def nbytes(self, record: str) -> float:
        keys = self.attended if self.decode else WINDOW - 1 + self.queries + self.context // self.ratio
        heads = self.queries * self.heads * DIM * 2.0
        return 2 * heads + 4.0 * self.queries * self.topk + keys * record_bytes(record)


def _decode(name: str, model: ModelConfig, kind: str, bars: dict[int, float | None]) -> tuple[Shape, ...]:
    found = []
    for seqs, us in bars.items():
        bar = None if us is None else ("us", us)
        found.append(Shape(f"{name} {kind.lower()} decode {seqs}", model, kind, seqs, 16384, decode=True, bar=bar))
    return tuple(found)


PREFILL = (
    Shape("flash csa prefill", FLASH, CSA, 4096, 8192, bar=("tflops", 480.0)),
    Shape("pro csa prefill", PRO, CSA, 4096, 8192, bar=("tflops", 540.0)),
    Shape("flash hca prefill", FLASH, HCA, 4096, 8192, bar=("tflops", 480.0)),
    Shape("flash hca prefill 64k", FLASH, HCA, 4096, 65536, bar=("tflops", 480.0)),
    Shape("pro hca prefill 64k", PRO, HCA, 4096, 65536),
)
DECODE = (
    *_decode("flash", FLASH, CSA, {1: 13.0, 64: 36.0, 128: 48.0, 256: 88.0}),
    *_decode("pro", PRO, CSA, {64: 60.0, 128: 105.0}),
    *_decode("flash", FLASH, HCA, {1: None, 64: None, 128: None}),
    *_decode("pro", PRO, HCA, {64: None}),
)
QUICK = (
    *("flash csa prefill", "flash hca prefill", "flash hca prefill 64k"),
    *("flash csa decode 1", "flash csa decode 64", "pro csa decode 64"),
)


def cases(*, quick: bool) -> Iterator[tuple[Shape, str]]:
    """Decode steps have FP8 keys, as caches do."""
    for shape in (*PREFILL, *DECODE):
        if not quick or shape.name in QUICK:
            for record in (_PEER_RECORD,) if quick or shape.decode else RECORDS:
                yield shape, record


def label(shape: Shape, record: str) -> str:
    """What `--match` looks at."""
    return f"{shape.name} {record}"


# ---- inputs ------------------------------------------------------------------------------------------------------------


def inputs(shape: Shape, record: str, device: str, copies: int = 1) -> list[Args]:
    """Arguments of `ops.attention`: decode steps of sequences of their own in one pool, or queries of one prefill."""
    places = copies if shape.decode else 1
    blocks = -(-shape.context // BLOCK)
    window = operations.pages_of(record, places * shape.seqs * shape.ring // WINDOW_PAGE, WINDOW_PAGE, device)
    entries = operations.pages_of(record, places * shape.seqs * blocks, shape.page, device)
    table = operations.block_table(places * shape.seqs, blocks, device)
    sinks = torch.randn(shape.heads, device=device)
    positions = shape.positions(device)
    seq_idx = torch.arange(shape.queries, device=device) if shape.decode else torch.zeros_like(positions)
    visible = (positions + 1) // shape.ratio
    named = dict(window=WINDOW, ring_len=shape.ring, ratio=shape.ratio, scale=SCALE, record=record)
    named |= dict(window_page=WINDOW_PAGE, entry_page=shape.page, rope_dim=ROPE_DIM)
    found = []
    for copy in range(copies):
        q = torch.randn(shape.queries, shape.heads, DIM, device=device).bfloat16()
        chosen = operations.picks(visible, shape.context // shape.ratio, shape.topk) if shape.topk else None
        rings, tables = (part.chunk(places)[copy % places] for part in (window, table))
        found.append(((q, sinks, rings, entries, tables, positions, seq_idx, chosen), named))
    return found


def touch(shape: Shape, record: str) -> None:
    """The call on tensors without memory: asks for the kernels that the measurement will."""
    args, named = inputs(shape, record, "meta")[0]
    operations.call("attention", *args, **named)


# ---- rows --------------------------------------------------------------------------------------------------------------
def run(bench: Bench) -> None:
    """All rows. Raises Broken."""
    for shape, record in cases(quick=bench.quick):
        if not bench.wants(label(shape, record)):
            continue
        try:
            measure(bench, shape, record)
        except Exception as error:
            bench.failed(shape.name, {"m": shape.queries, "format": record}, error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(bench: Bench, shape: Shape, record: str, device: str = "cuda") -> None:
    fields: dict[str, Any] = {"m": shape.queries, "n": shape.attended / shape.queries, "k": DIM, "format": record}
    fields |= {"heads": shape.heads, "context": shape.context}
    fields["bytes_of_keys"] = "attended records, once a query" if shape.decode else "all records, once"
    if shape.bar is not None:
        fields[f"bar_{shape.bar[0]}"] = shape.bar[1]
    nbytes = shape.nbytes(record)
    sets = inputs(shape, record, device, operations.cold_copies(nbytes))
    candidates: dict[str, Sequence[Call] | Failure] = {"ours": operations.checked(fields, "attention", sets, accuracy)}
    if record == _PEER_RECORD:  # a peer's keys are BF16 whatever the record was
        candidates |= peers(bench, shape, sets)
    bench.measure(shape.name, fields, candidates, nbytes=nbytes, flops=shape.flops)


def oracle(args: Args, rows: Any) -> torch.Tensor:
    """Some queries in float64."""
    (q, sinks, window, entries, table, positions, seq_idx, chosen), named = args
    few = None if chosen is None else chosen[rows]
    return reference.attention(q[rows].double(), sinks, window, entries, table, positions[rows], seq_idx[rows], few, **named)


def accuracy(args: Args, y: torch.Tensor) -> dict[str, Any]:
    rows = common.sampled(y.shape[0], _ORACLE_QUERIES)
    return operations.accuracy_fields(y[rows], oracle(args, rows))


# ---- peers -------------------------------------------------------------------------------------------------------------
Listed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, the matrix of keys, rows of it (M, n) i32 with -1 for none


def listed(shape: Shape, sets: Sequence[Args]) -> list[Listed]:
    """Every query's keys as rows of one matrix: all windows, then all entries."""
    args, named = sets[0]
    pools = {id(a[2]): a[2] for a, _ in sets}  # a decode step has windows of its own
    record = named["record"]
    keys = [operations.dense(pool, record, WINDOW_PAGE) for pool in pools.values()]
    first = {at: i * keys[0].shape[0] for i, at in enumerate(pools)}
    base = len(keys) * keys[0].shape[0]
    matrix = torch.cat((*keys, operations.dense(args[3], record, shape.page)))
    found = []
    for (q, _, window, _, table, positions, seq_idx, chosen), _ in sets:
        pos = positions[:, None] - torch.arange(WINDOW - 1, -1, -1, device=q.device)
        near = first[id(window)] + seq_idx[:, None] * shape.ring + pos % shape.ring
        near = torch.where(pos >= 0, near, -1)
        if chosen is None:
            entry = torch.arange(shape.context // shape.ratio, device=q.device).expand(len(positions), -1)
            entry = torch.where(entry < (positions[:, None] + 1) // shape.ratio, entry, -1)
        else:
            entry = chosen.long()
        page = table[seq_idx[:, None], entry.clamp(min=0) // shape.page].long()
        far = torch.where(entry >= 0, base + page * shape.page + entry.clamp(min=0) % shape.page, -1)
        found.append((q, matrix, torch.cat((near, far), dim=1).int()))
    return found


def peers(bench: Bench, shape: Shape, sets: Sequence[Args]) -> dict[str, Sequence[Call] | Failure]:
    sinks = sets[0][0][1]
    try:
        lists = listed(shape, sets)
    except Exception as error:
        return {name: Failure(common.reason_of(error)) for name in ("sdpa", "torch", "triton")}
    found: dict[str, Sequence[Call] | Failure] = {
        "sdpa": attempt(lambda: [_sdpa_call(*each) for each in lists]),
        "torch": attempt(lambda: [_eager_call(eager_attention, each, sinks) for each in lists]),
        "torch.compile": Failure(f"of {_COMPILED} only, to save time"),
        "triton": attempt(lambda: _triton_calls(sets[0], lists, sinks)),
    }
    if shape.name == _COMPILED and not bench.quick:
        fast = eager.compiled(eager_attention, *lists[0], sinks)
        found["torch.compile"] = fast if isinstance(fast, Failure) else [_eager_call(fast, each, sinks) for each in lists]
    return found


def _sdpa_call(q: torch.Tensor, matrix: torch.Tensor, rows: torch.Tensor) -> Call:
    keys = matrix[rows.clamp(min=0)][:, None]
    mask = (rows >= 0)[:, None, None] if bool((rows < 0).any()) else None
    return lambda: scaled_dot_product_attention(q[:, None], keys, keys, attn_mask=mask, scale=SCALE)


def eager_attention(q: torch.Tensor, matrix: torch.Tensor, rows: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    keys = matrix[rows.clamp(min=0)]
    scores = torch.bmm(q, keys.transpose(1, 2)).float() * SCALE
    scores = scores.masked_fill((rows < 0)[:, None], -torch.inf)
    weights = torch.softmax(torch.cat((scores, sinks.expand(q.shape[0], -1)[..., None]), dim=-1), dim=-1)
    return torch.bmm(weights[..., :-1].to(q.dtype), keys)


def _eager_call(function: Callable[..., torch.Tensor], each: Listed, sinks: torch.Tensor) -> Call:
    q, matrix, rows = each
    pieces = list(zip(q.split(_PEER_QUERIES), rows.split(_PEER_QUERIES), strict=True))
    return lambda: [function(part, matrix, some, sinks) for part, some in pieces]


def _triton_calls(args: Args, lists: Sequence[Listed], sinks: torch.Tensor) -> list[Call]:
    """Takes the kernel's fastest tile and checks it on some queries. Raises RuntimeError on a wrong result."""
    from benchmarks import triton_attention

    triton_attention.tune(lists, sinks, SCALE)
    got = triton_attention.attend(*lists[0], sinks, SCALE)
    rows = common.sampled(got.shape[0], 8)
    error = common.relative_error(got[rows], oracle(args, rows))
    if not error < _WRONG:
        raise RuntimeError(f"the Triton kernel is wrong: relative error {error:.3g}")
    return [partial(triton_attention.attend, *each, sinks, SCALE) for each in lists]
