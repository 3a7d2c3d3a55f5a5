"""The lightning indexer at the model's shapes (64 heads of 128): scores of paged index keys, and the choice of the best.

    scores prefill       4,096 queries at the end of 65,536 tokens: 15,361 to 16,384 entries each
    scores all visible   the same with every entry seen by every query: the tensor cores' shape
    scores decode        1 query of each of 1, 8 or 64 sequences of 4,096 or 262,144 entries (16 k and 1 M tokens)
    .. of 262144         as in a graph captured for sequences of so many entries; scores that are not visible are left alone
    topk                 512 (Flash) or 1,024 (Pro) of 4,096 x 16,384, 1 x 262,144 and 64 x 4,096 scores

Bound: 2 * 64 * 128 flops a query and visible entry over the BF16 rate, or the bytes of queries, of every index key of a
sequence once and of the scores, over copy bandwidth, whichever is longer; for the choice the scores once and the indices.
Peers: torch in BF16 on keys decoded and gathered beforehand, without masks (scores), and torch.topk, which does not sort.

equal: the part of the chosen indices that is the reference's. equal_mask: whether hidden entries score -inf and no others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import common, eager, operations
from benchmarks.common import Bench, Call, Failure, attempt
from benchmarks.operations import BLOCK, FLASH, INDEX_DIM, PRO, Args, record_bytes
from benchmarks.quantizers import equal_part
from dsv4lab.reference import indexer as reference

HEADS, RATIO = FLASH.index_n_heads, FLASH.csa_ratio
PAGE = BLOCK // RATIO
RECORDS = ("fp4", "fp8")
_PEER_RECORD = "fp8"
_PEER_QUERIES = 256  # that an eager peer takes at once
_ORACLE_QUERIES = 16
_COMPILED = "scores decode 64 x 4096"


@dataclass(frozen=True)
class Scores:
    """queries: of one sequence, its last ones, or one of each of `seqs`. entries: of a sequence. masked: causally. most:
    entries that the call is made for, `entries` if 0.
    """

    name: str
    queries: int
    seqs: int
    entries: int
    masked: bool
    most: int = 0

    @property
    def decode(self) -> bool:
        return self.seqs == self.queries

    def visible(self, device: str) -> torch.Tensor:
        if not self.masked:
            return torch.full((self.queries,), self.entries, dtype=torch.int64, device=device)
        first = self.entries * RATIO - self.queries
        return (torch.arange(first, first + self.queries, device=device) + 1) // RATIO

    @property
    def total_visible(self) -> int:
        """Of all queries."""
        first = self.entries * RATIO - self.queries
        return sum((p + 1) // RATIO for p in range(first, first + self.queries)) if self.masked else self.queries * self.entries

    @property
    def flops(self) -> float:
        return 2.0 * HEADS * INDEX_DIM * self.total_visible

    def nbytes(self, record: str) -> float:
        """Queries in BF16, their weights, the keys of every sequence, scores."""
        queries = self.queries * HEADS * (2.0 * INDEX_DIM + 4.0)
        return queries + self.seqs * self.entries * record_bytes(record, INDEX_DIM) + 4.0 * self.queries * self.entries


@dataclass(frozen=True)
class Choice:
    """k of the entries that each query sees, the last of `entries`, or all of them. most: as of `Scores`."""

    name: str
    queries: int
    entries: int
    k: int
    most: int = 0

    @property
    def masked(self) -> bool:
        return self.queries > 64

    def visible(self, device: str) -> torch.Tensor:
        return Scores("", self.queries, 1, self.entries, self.masked).visible(device)

    @property
    def nbytes(self) -> float:
        return 4.0 * Scores("", self.queries, 1, self.entries, self.masked).total_visible + 4.0 * self.queries * self.k


_LONGEST = 262144
_DECODE = tuple((seqs, entries) for entries in (4096, _LONGEST) for seqs in (1, 8, 64))
SCORES = (
    Scores("scores prefill", 4096, 1, 16384, True),
    Scores("scores all visible", 4096, 1, 16384, False),
    *(Scores(f"scores decode {seqs} x {entries}", seqs, seqs, entries, False) for seqs, entries in _DECODE),
    *(Scores(f"scores decode {n} x 4096 of {_LONGEST}", n, n, 4096, False, _LONGEST) for n in (1, 64)),
)
_SIZES = ((4096, 16384), (1, _LONGEST), (64, 4096))
CHOICES = (
    *(
        Choice(f"topk {k} of {queries} x {entries}", queries, entries, k)
        for queries, entries in _SIZES
        for k in (FLASH.index_topk, PRO.index_topk)
    ),
    *(Choice(f"topk {FLASH.index_topk} of {n} x 4096 of {_LONGEST}", n, 4096, FLASH.index_topk, _LONGEST) for n in (1, 64)),
)
QUICK = (
    "scores prefill",
    "scores decode 1 x 262144",
    "scores decode 64 x 4096",
    "topk 512 of 4096 x 16384",
    "topk 512 of 1 x 262144",
)

Case = tuple[Scores | Choice, str]


def cases(*, quick: bool) -> Iterator[Case]:
    """Shapes with the keys' record, which the choice has none of."""
    shapes: tuple[Scores | Choice, ...] = (*SCORES, *CHOICES)
    for shape in shapes:
        if not quick or shape.name in QUICK:
            for record in RECORDS if isinstance(shape, Scores) else ("",):
                yield shape, record


def label(shape: Scores | Choice, record: str) -> str:
    """What `--match` looks at."""
    return f"{shape.name} {record}"


# ---- inputs ------------------------------------------------------------------------------------------------------------


def scores_args(shape: Scores, record: str, device: str, copies: int = 1) -> list[Args]:
    """Arguments of `index_scores`: copies of different queries over different pages of one pool."""
    blocks = -(-shape.entries // PAGE)
    table = operations.block_table(copies * shape.seqs, blocks, device)
    pages = operations.pages_of(record, copies * shape.seqs * blocks, PAGE, device, index=True)
    found = []
    for part in table.split(shape.seqs):
        q = torch.randn(shape.queries, HEADS, INDEX_DIM, device=device).bfloat16()
        weights = torch.randn(shape.queries, HEADS, device=device) * (INDEX_DIM * HEADS) ** -0.5
        seqs = torch.arange(shape.queries, device=device) if shape.decode else torch.zeros_like(shape.visible(device))
        named = dict(record=record, page_size=PAGE, max_entries=shape.most or shape.entries, fill=not shape.most)
        found.append(((q, weights, pages, part.contiguous(), seqs, shape.visible(device)), named))
    return found


def choice_args(shape: Choice, device: str, copies: int = 1) -> list[Args]:
    """Arguments of `index_topk`: masked scores as `index_scores` leaves them."""
    found = []
    for _ in range(copies):
        visible = shape.visible(device)
        scores = torch.randn(shape.queries, shape.most or shape.entries, device=device)
        scores.masked_fill_(torch.arange(scores.shape[1], device=device) >= visible[:, None], -torch.inf)
        found.append(((scores, visible), dict(k=shape.k)))
    return found


def touch(shape: Scores | Choice, record: str) -> None:
    """The call on tensors without memory: asks for the kernels that the measurement will."""
    if isinstance(shape, Scores):
        args, named = scores_args(shape, record, "meta")[0]
        operations.call("index_scores", *args, **named)
    else:
        args, named = choice_args(shape, "meta")[0]
        operations.call("index_topk", *args, **named)


# ---- rows --------------------------------------------------------------------------------------------------------------
def run(bench: Bench) -> None:
    """All rows. Raises Broken."""
    for shape, record in cases(quick=bench.quick):
        if not bench.wants(label(shape, record)):
            continue
        try:
            if isinstance(shape, Scores):
                measure_scores(bench, shape, record)
            else:
                measure_choice(bench, shape)
        except Exception as error:
            bench.failed(shape.name, {"m": shape.queries, "format": record}, error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def fields_of(shape: Scores | Choice, record: str) -> dict[str, Any]:
    return {"m": shape.queries, "n": shape.entries, "k": INDEX_DIM, "format": record, "heads": HEADS}


def measure_scores(bench: Bench, shape: Scores, record: str, device: str = "cuda") -> None:
    fields = fields_of(shape, record)
    nbytes = shape.nbytes(record)
    sets = scores_args(shape, record, device, operations.cold_copies(nbytes))
    ours = operations.checked(fields, "index_scores", sets, compared_scores)
    peers: dict[str, Sequence[Call] | Failure] = {}
    if record == _PEER_RECORD:  # a peer's keys are BF16 whatever the record was
        peers["torch"] = attempt(lambda: peer_calls(shape, sets))
        peers["torch.compile"] = Failure(f"of {_COMPILED} only, to save time")
        if shape.name == _COMPILED and not bench.quick:
            peers["torch.compile"] = attempt(lambda: compiled_calls(shape, sets))
    bench.measure(shape.name, fields, {"ours": ours, **peers}, nbytes=nbytes, flops=shape.flops)


def measure_choice(bench: Bench, shape: Choice, device: str = "cuda") -> None:
    fields = fields_of(shape, "")
    sets = choice_args(shape, device, operations.cold_copies(shape.nbytes))
    ours = operations.checked(fields, "index_topk", sets, compared_choice)
    peer: list[Call] = [partial(torch.topk, args[0], shape.k, sorted=False) for args, _ in sets]
    bench.measure(shape.name, fields, {"ours": ours, "torch.topk": peer}, nbytes=shape.nbytes, flops=0.0)


def compared_scores(args: Args, y: torch.Tensor) -> dict[str, Any]:
    """Some queries against float64; equal_mask: of all, whether what is hidden is -inf and nothing else."""
    (q, weights, pages, table, seqs, visible), named = args
    rows = common.sampled(q.shape[0], _ORACLE_QUERIES)
    want = reference.index_scores(q[rows].double(), weights[rows], pages, table, seqs[rows], visible[rows], **named)
    hidden = torch.arange(y.shape[1], device=y.device) >= visible[:, None]
    shown = int(visible.min())
    figures = operations.accuracy_fields(y[rows].masked_fill(hidden[rows], 0.0), want.masked_fill(hidden[rows], 0.0))
    return figures | {"equal_mask": bool((torch.isneginf(y) == hidden)[:, : None if named["fill"] else shown].all())}


def compared_choice(args: Args, y: torch.Tensor) -> dict[str, Any]:
    """equal: the part of indices that is the reference's."""
    (scores, visible), named = args
    rows = common.sampled(y.shape[0])
    return {"equal": equal_part(y[rows], reference.index_topk(scores[rows], visible[rows], **named))}


# ---- peers -------------------------------------------------------------------------------------------------------------
def peer_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q (b, rows, ci), weights (b, m, Hi) and keys (b, n, ci), all bf16 -> (b, m, n), with m heads' rows together."""
    dots = torch.relu(torch.bmm(q, keys.transpose(1, 2)))
    return torch.matmul(weights[:, :, None], dots.unflatten(1, (-1, HEADS)))[:, :, 0].float()


def _peer_inputs(shape: Scores, sets: Sequence[Args]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Keys of every sequence in their order."""
    pages = sets[0][0][2]
    keys = operations.dense(pages, sets[0][1]["record"], PAGE, index=True).view(-1, PAGE, INDEX_DIM)
    for (q, weights, _, table, *_), _ in sets:
        own = keys[table.long()].flatten(1, 2)[:, : shape.entries]
        yield q.view(shape.seqs, -1, INDEX_DIM), weights.bfloat16().view(shape.seqs, -1, HEADS), own


def _peer_call(function: Callable[..., torch.Tensor], q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> Call:
    """Some queries at a time, since the dot products of all heads lie in memory."""

    def call() -> list[torch.Tensor]:
        parts = zip(q.split(_PEER_QUERIES * HEADS, dim=1), weights.split(_PEER_QUERIES, dim=1), strict=True)
        return [function(part, factor, keys) for part, factor in parts]

    return call


def peer_calls(shape: Scores, sets: Sequence[Args]) -> list[Call]:
    return [_peer_call(peer_scores, *inputs) for inputs in _peer_inputs(shape, sets)]


def compiled_calls(shape: Scores, sets: Sequence[Args]) -> list[Call]:
    """Raises RuntimeError where torch.compile does not get there."""
    inputs = list(_peer_inputs(shape, sets))
    fast = eager.compiled(peer_scores, *inputs[0])
    if isinstance(fast, Failure):
        raise RuntimeError(fast.reason)
    return [_peer_call(fast, *each) for each in inputs]
