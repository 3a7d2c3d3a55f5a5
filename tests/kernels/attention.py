"""Material for tests of core attention: caches filled by the reference, everything else in the pools NaN; and the judgement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dsv4lab.kernels.attention.core.api import attention as kernel
from dsv4lab.records import allocate_kv_pages
from dsv4lab.reference.attention import attention as reference
from dsv4lab.reference.attention import gather_keys
from dsv4lab.reference.cache import cache_write

DIM, ROPE_DIM, WINDOW, WINDOW_PAGE = 512, 64, 128, 64
SCALE = DIM**-0.5
BF16 = torch.bfloat16
RATIOS = {"window": 1, "chosen": 4, "visible": 128}
ENTRY_PAGES = {"window": 1, "chosen": 32, "visible": 1}


@dataclass
class Case:
    """Arguments of the operator, in its order, and the keyword ones."""

    args: tuple[Any, ...]
    how: dict[str, Any]
    parts: int | None = field(default=None)

    def to(self, device: str) -> Case:
        return replace(self, args=tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in self.args))

    def take(self, other: Case) -> None:
        """Another's arguments into the tensors of this one, as large or larger."""
        for held, new in zip(self.args, other.args, strict=True):
            if held is not None and held.shape == new.shape:
                held.copy_(new)
            elif held is not None:  # smaller pools and tables
                held.view(torch.uint8).fill_(255)
                held[tuple(slice(n) for n in new.shape)] = new

    def run(self, parts: int | None = None, unpack: bool | None = None, **way: Any) -> torch.Tensor:
        """By the kernel. way: more of what only it is asked for."""
        how = {name: value for name, value in self.how.items() if name != "rope_dim"}
        return kernel(*self.args, **how, parts=parts, unpack=unpack, **way)


# Batches of sequences, each (tokens, queries at its end)
RAGGED = (
    [(1, 1)],
    [(4096, 1)],
    [(127, 3), (128, 1), (129, 8), (512, 2), (640, 5), (1000, 1)],
    [(4096, 8), (65_537, 2)],
    [(700, 300), (5000, 129)],
)


def make_case(
    record: str,
    kind: str,
    sequences: list[tuple[int, int]],
    heads: int,
    *,
    k: int = 64,
    seed: int = 0,
    fewer: float = 0.1,
    sinks: torch.Tensor | None = None,
    shared: int = 0,
    device: str = "cpu",
) -> Case:
    """sequences: (tokens so far, queries: the last ones). k: entries chosen, or as many as are visible, each empty with
    probability `fewer`. shared: pages of the first sequence that the others begin with, as far as they reach: of a prefix that
    was computed once; where a sequence ends inside, entries that it must not see come after. Keys differ in size, so that some
    scores stand out.
    """
    g = torch.Generator(device).manual_seed(seed + 7 * heads + sum(n for n, _ in sequences))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    ratio, entry_page = RATIOS[kind], ENTRY_PAGES[kind]
    most = max(queries for _, queries in sequences)
    ring_len = -(-(WINDOW + most) // WINDOW_PAGE) * WINDOW_PAGE
    per_seq = [-(-max(length // ratio, 1) // entry_page) for length, _ in sequences]
    pools = dict(dim=DIM, rope_dim=ROPE_DIM, dtype=BF16, device=device)
    window = allocate_kv_pages(record, num_pages=len(sequences) * ring_len // WINDOW_PAGE, page_size=WINDOW_PAGE, **pools)
    entries = allocate_kv_pages(record, num_pages=sum(per_seq) + 2, page_size=entry_page, **pools)
    window, entries = _together(window, entries)
    order = torch.randperm(entries.shape[0], generator=g, device=device)
    table = torch.full((len(sequences), max(per_seq) + 1), -1, dtype=torch.int32, device=device)
    inv_freq = 10000.0 ** (-torch.arange(0, ROPE_DIM, 2, device=device) / ROPE_DIM)

    def write(pages: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, page_size: int) -> None:
        weight = 0.5 + torch.rand(DIM, generator=g, device=device)
        how = dict(eps=1e-6, record=record, page_size=page_size)
        cache_write(random(len(slots), DIM) + 0.3 * random(1, DIM), weight, positions, inv_freq, pages, slots, **how)

    positions, seq_idx, taken = [], [], 0
    for s, (length, queries) in enumerate(sequences):
        pos = torch.arange(max(length - queries - WINDOW + 1, 0), length, device=device)
        write(window, s * ring_len + pos % ring_len, pos, WINDOW_PAGE)
        table[s, : per_seq[s]] = order[taken : taken + per_seq[s]].int()
        taken += per_seq[s]
        common = min(shared, per_seq[0], per_seq[s]) if s else 0
        table[s, :common] = table[0, :common]
        number = torch.arange(common * entry_page, max(length // ratio, common * entry_page), device=device)
        if kind != "window" and len(number):
            slots = table[s].long()[number // entry_page] * entry_page + number % entry_page
            write(entries, slots, number * ratio, entry_page)
        positions.append(torch.arange(length - queries, length, device=device))
        seq_idx.append(torch.full((queries,), s, device=device))
    at, seq = torch.cat(positions), torch.cat(seq_idx)
    mixed = torch.randperm(len(at), generator=g, device=device)  # queries of different sequences in any order
    at, seq = at[mixed], seq[mixed]
    chosen = None
    if kind == "chosen":
        chosen = torch.full((len(at), k), -1, dtype=torch.int32, device=device)
        for m, visible in enumerate(((at + 1) // ratio).tolist()):
            count = min(k, visible)
            picked = torch.randperm(visible, generator=g, device=device)[:count].int()
            gone = torch.rand(count, generator=g, device=device) < fewer
            chosen[m, :count] = torch.where(gone, -1, picked)
    q = (2 * random(len(at), heads, DIM)).to(BF16)
    sinks = 2 * random(heads) if sinks is None else sinks.to(device)
    args = (q, sinks, window, None if kind == "window" else entries, table, at, seq, chosen)
    # as a layer without entries says it
    how = dict(window=WINDOW, ring_len=ring_len, ratio=ratio if kind != "window" else 0, scale=SCALE, record=record)
    return Case(args, how | dict(window_page=WINDOW_PAGE, entry_page=entry_page, rope_dim=ROPE_DIM))


def _together(*pools: torch.Tensor) -> list[torch.Tensor]:
    """Pools of these shapes in one piece of memory, all NaN as E4M3, E8M0 and BF16. (The simulator's race check wants what the
    lanes of one `cp.async` read to be one tensor.)
    """
    memory = torch.full((sum(pool.nbytes for pool in pools),), 255, dtype=torch.uint8, device=pools[0].device)
    parts = memory.split([pool.nbytes for pool in pools])
    return [part.view(pool.dtype).view(pool.shape) for part, pool in zip(parts, pools, strict=True)]


def in_order(case: Case) -> Case:
    """Queries by sequence and position, as prefill has them."""
    q, sinks, window, entries, table, positions, seq_idx, chosen = case.args
    order = (seq_idx * 2**32 + positions).argsort()
    chosen = None if chosen is None else chosen[order]
    return replace(case, args=(q[order], sinks, window, entries, table, positions[order], seq_idx[order], chosen))


def judge_orders(run: Callable[[Case], torch.Tensor], case: Case) -> None:
    """Queries in any order and as prefill has them, twice: what is found is no matter of timing."""
    for ordered in (case, in_order(case)):
        found = run(ordered)
        judge(ordered, found)
        assert torch.equal(found, run(ordered))


class Silent:
    """A runtime that launches nothing and remembers every call's arguments."""

    arch, libraries = "sm_90a", ()

    def __init__(self, multiprocessors: int) -> None:
        self.multiprocessors = multiprocessors
        self.calls: list[tuple[Any, ...]] = []

    def clusters(self, size: int) -> int:
        return self.multiprocessors // size

    def call(self, function: Any, *args: Any) -> None:
        self.calls.append(args)


def composed(case: Case) -> torch.Tensor:
    """The same in BF16 by torch: scores in float32, probabilities and keys in BF16."""
    q, sinks, window, entries, table, positions, seq_idx, chosen = case.args
    how = {name: value for name, value in case.how.items() if name != "scale"}
    out = torch.empty_like(q)
    for m in range(q.shape[0]):
        one = None if chosen is None else chosen[m : m + 1]
        keys = gather_keys(window, entries, table, positions[m : m + 1], int(seq_idx[m]), one, dim=DIM, **how)
        keys = keys.keys[keys.visible[0]].to(BF16)
        scores = torch.cat(((q[m].float() @ keys.float().t()) * SCALE, sinks[:, None]), dim=1)
        p = torch.softmax(scores, dim=1)[:, :-1]
        out[m] = (p.to(BF16).float() @ keys.float()).to(BF16)
    return out


def judge(case: Case, found: torch.Tensor) -> float:
    """The relative error, after everything that must hold has been asserted."""
    want = reference(*case.args, **case.how).double()
    assert found.dtype == BF16 and found.shape == want.shape
    assert bool(found.isfinite().all()), "a value that is none: a key was read that nobody wrote"
    found = found.double()
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), want.flatten(), dim=0)
    rows = torch.nn.functional.cosine_similarity(found.flatten(0, 1), want.flatten(0, 1), dim=1)
    silent = want.flatten(0, 1).norm(dim=1) < 1e-20  # all of the weight is the sink's
    assert cosine > 0.9999, float(cosine)
    assert bool(((rows > 0.999) | silent).all()), float(rows.min())
    error = (found - want).norm() / want.norm()
    assert error <= 2 * (composed(case).double() - want).norm() / want.norm(), float(error)
    return float(error)


def error_of(case: Case, found: torch.Tensor) -> float:
    """The relative error: of many queries, for which `judge` takes long."""
    want = reference(*case.args, **case.how).double()
    return float((found.double() - want).norm() / want.norm())


def check_replays(run: Callable[[Case], torch.Tensor], cases: list[Case]) -> None:
    """A CUDA graph captured with the first, the largest, gives what each of the cases needs."""
    first = cases[0]
    run(first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(first)
    for case in cases:
        first.take(case)
        graph.replay()
        torch.cuda.synchronize()
        assert found.dtype == torch.bfloat16 and error_of(case, found) < 0.004
