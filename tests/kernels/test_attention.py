"""Core attention against float64: at most twice the error of a composition in BF16, whatever the division of the keys."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import dsv4lab
from dsv4lab import ops, paging, sim
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.attention.core import api as attention_api
from dsv4lab.kernels.attention.core.config import (
    KEYS,
    AttentionConfig,
    block_range,
    capacity,
    divide,
    unpacks,
)
from dsv4lab.kernels.attention.operators import ENTRIES
from dsv4lab.records import kv_record
from dsv4lab.reference.attention import attention as reference
from dsv4lab.reference.cache import cache_read
from tests.kernels.attention import BF16, RAGGED, WINDOW, Case, Silent, check_replays, judge, make_case
from tests.kernels.simulated import simulating


def simulated(case: Case, parts: int | None = None, ctas: int = 4, *, unpack: bool = False, **how: object) -> torch.Tensor:
    """Each CTA decodes its keys: few, to whom four queries are many, would have them unpacked, or work in pairs. Parts are for
    a second kernel.
    """
    with simulating(multiprocessors=ctas, **how):
        return case.run(parts, unpack, pair=False, merge=False)


# ---- plan arithmetic ---------------------------------------------------------------------------------------------------
def test_parts_have_every_block_once_and_fill_the_gpu() -> None:
    for total in (0, 1, 2, 10, 18, 131):
        for parts in (1, 2, 3, 9, 130):
            ranges = [block_range(total, parts, p) for p in range(parts)]
            assert ranges[0][0] == 0 and ranges[-1][1] == total
            assert all(a[1] == b[0] for a, b in pairwise(ranges))
            assert max(b - a for a, b in ranges) == -(-total // parts)
    for heads in (4, 64, 96, 128):
        for k in (0, 512, 1024, 8192):
            for queries in (1, 2, 7, 64, 128, 256, 4096):
                keys = capacity("chosen" if k else "window", WINDOW, k)
                blocks = -(-keys // KEYS)
                plan = divide(queries, heads, keys, 132)
                assert plan.head_tiles == -(-heads // 64) and plan.items == queries * plan.head_tiles * plan.parts
                assert 1 <= plan.parts <= blocks and plan.ctas == min(plan.items, 132)
                assert not plan.merge or 1 < plan.parts <= 12
                if queries == 1 and heads <= 64:  # no CTA has more than it must
                    most = max(b - a for a, b in (block_range(blocks, plan.parts, p) for p in range(plan.parts)))
                    assert most <= 2
                if queries >= 128:
                    assert plan.parts == 1
    assert capacity("window", 128, 512) == 128 and capacity("visible", 128, 512) == 640


def way(record: str, queries: int, heads: int, k: int, *, rings: int, ring: int, reach: int) -> bool:
    """reach: entries that the call can reach. k 0: all visible ones."""
    keys = capacity("chosen" if k else "visible" if reach else "window", 128, k or reach)
    division = divide(queries, heads, keys, 132)
    return unpacks(division, record, keys, rings=rings, window=128, tokens=rings * ring, entries=reach)


@pytest.mark.parametrize("record", ["fp8", "nvfp4"])
@pytest.mark.parametrize(("heads", "k"), [(64, 512), (128, 1024)])
def test_prefill_unpacks_and_decode_does_not(record: str, heads: int, k: int) -> None:
    for queries in (129, 512, 4096):  # of one sequence of 8,192 tokens, in caches for one and for many sequences
        assert way(record, queries, heads, k, rings=1, ring=4224, reach=2048)
    for rings in (1, 16, 64):
        assert way(record, 4096, heads, k, rings=rings, ring=8320, reach=rings * 2048)
        assert way(record, 4096, heads, 0, rings=rings, ring=8320, reach=rings * 512), "all visible entries"
        assert way(record, 4096, heads, 0, rings=rings, ring=8320, reach=0), "a window only"
    for seqs in (1, 8, 64, 128, 256):  # a query of each
        for context in (1024, 16_384, 131_072):
            assert not way(record, seqs, heads, k, rings=seqs, ring=192, reach=seqs * context // 4)
            assert not way(record, seqs, heads, 0, rings=seqs, ring=192, reach=seqs * context // 128)
        assert not way(record, seqs, heads, 0, rings=seqs, ring=192, reach=0)
    drafts = way(record, 256, heads, k, rings=64, ring=192, reach=64 * 2048)  # four queries of each of 64 sequences
    assert not drafts, "128 heads decode in pairs, and 64 have fewer keys"
    assert not way("plain", 4096, heads, k, rings=1, ring=4224, reach=2048)
    assert not way(record, 4096, heads, k, rings=1025, ring=192, reach=2048), "more sequences than a CTA has threads"
    assert not way(record, 4096, heads, k, rings=0, ring=4224, reach=2048)
    assert not way(record, 1024, heads, k, rings=1, ring=1152, reach=4_000_000), "a pool that takes longer than it saves"


def test_the_call_takes_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are told as they are: a table that names less than the pool has, rings of the window's pool."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(attention_api, "unpacks", lambda *_, **sizes: told.append(sizes))
    for name in ("_compiled", "_compiled_combine"):
        monkeypatch.setattr(attention_api, name, lambda *_: None)
    case = make_case("fp8", "chosen", [(300, 1), (200, 2)], 4, k=20)
    window, far, table = case.args[2:5]
    with running_on(Silent(132)):
        case.run()
        with paging.checked(False):
            replace(case, args=(*case.args[:4], table[:, :1].contiguous(), *case.args[5:])).run()
        make_case("nvfp4", "window", [(300, 1)], 4).run()
    tokens, rings = window.shape[0] * 64, window.shape[0] * 64 // case.how["ring_len"]
    assert rings == 2 and told[0] == dict(rings=2, window=128, tokens=tokens, entries=min(far.shape[0], table.numel()) * 32)
    assert told[1] == told[0] | dict(entries=2 * 32) and told[2]["entries"] == 0


def test_records_and_pages() -> None:
    for record, data, scales, page in (("plain", 1024, 0, 65536), ("fp8", 576, 8, 37440), ("nvfp4", 352, 32, 24576)):
        config = AttentionConfig(record, "chosen")
        assert (config.data_bytes, config.scale_bytes, config.page_bytes(64)) == (data, scales, page)


def test_bad_choices_are_refused() -> None:
    for config, message in (
        (AttentionConfig("fp4", "chosen"), "record must be one of plain, fp8, nvfp4, got 'fp4'"),
        (AttentionConfig("fp8", "all"), "kind must be one of window, visible, chosen, got 'all'"),
        (AttentionConfig("fp8", "chosen", entry_page=0), "entry_page must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            config.check()


def test_bad_input_is_refused_and_none_is_nothing() -> None:
    case = make_case("fp8", "chosen", [(300, 2)], 4)

    def given(at: int, value: object) -> Case:
        return replace(case, args=(*case.args[:at], value, *case.args[at + 1 :]))

    q, sinks, window, _, table, positions, _, chosen = case.args
    for at, value, message in (
        (0, q.float(), "q must be bfloat16 and sinks float32, got torch.float32"),
        (0, q[:, :, :256].contiguous(), r"q must be contiguous \(M, H, 512\), got \(2, 4, 256\)"),
        (1, sinks[:3], r"sinks must be contiguous \(4,\), got \(3,\)"),
        (4, table.long(), "block_table must be int32, got torch.int64"),
        (5, positions.int(), "positions must be int64, got torch.int32"),
        (7, chosen[:1], r"topk_indices must be contiguous \(2, k\), got \(1, 64\)"),
        (2, window[:, :-16].contiguous(), r"window_pages must be contiguous pages of 37440 bytes, got \(3, 37424\)"),
        (3, window.view(torch.int8), "entry_pages must be uint8 for fp8 records, got torch.int8"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            simulated(given(at, value))
    for at, value, knobs, message in (
        (4, table[:, :0].contiguous(), {}, "got none for entry 0"),
        (5, positions - 300, {}, "positions must be 0 to"),
        (0, q, dict(max_entries=0), "max_entries must be at least"),
        (0, q, dict(ratio=0), "ratio and entry_page must be at least 1"),
    ):
        bad = Case((*given(at, value).args[:7], None), case.how | knobs)
        for run in (Case.run, lambda bad: reference(*bad.args, **bad.how)):
            with pytest.raises(ValueError, match=message):
                run(bad)
    with pytest.raises(ValueError, match="scale must be positive, got -1"):
        simulated(replace(case, how=case.how | dict(scale=-1.0)))
    with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
        simulated(case, parts=0)
    nothing = replace(case, args=(q[:0], *case.args[1:5], positions[:0], case.args[6][:0], chosen[:0]))
    assert simulated(nothing).shape == (0, 4, 512)
    refuses = ENTRIES[0].refuses
    assert refuses(*case.args, **case.how) is None
    assert "record must be one of" in (refuses(*case.args, **case.how | dict(record="int8")) or "")
    assert "q must be bfloat16" in (refuses(*given(0, q.float()).args, **case.how) or "")
    plain = make_case("plain", "window", [(3, 1)], 4)
    args = (*plain.args[:2], plain.args[2].float(), *plain.args[3:])
    assert "window_pages must be bfloat16 for plain records" in (refuses(*args, **plain.how) or "")


# ---- in the simulator --------------------------------------------------------------------------------------------------
LENGTHS = [
    # one query each: no entry yet; the window not full, full, one more; three to six blocks of keys
    ("fp8", "chosen", [(1, 1), (127, 1), (128, 1), (129, 1), (512, 1), (1000, 2)], 64, 200),
    ("nvfp4", "visible", [(1, 1), (129, 2), (640, 1), (40_000, 1)], 4, 0),
    ("plain", "window", [(1, 1), (65, 3), (1000, 2)], 8, 0),
]


@pytest.mark.parametrize(("record", "kind", "sequences", "heads", "k"), LENGTHS)
def test_every_length(record: str, kind: str, sequences: list[tuple[int, int]], heads: int, k: int) -> None:
    case = make_case(record, kind, sequences, heads, k=k)
    assert judge(case, simulated(case, parts=1)) < 0.004


@pytest.mark.parametrize(("record", "kind"), [("fp8", "chosen"), ("nvfp4", "visible")])
def test_every_code_is_decoded_exactly(record: str, kind: str) -> None:
    """A query whose only key has all the weight gives that key back."""
    n = 6
    case = make_case(record, kind, [(1, 1)] * n, 4, k=64, sinks=torch.full((4,), -torch.inf))
    q, _, window, _, _, _, seq, _ = case.args
    g = torch.Generator().manual_seed(1)
    data, scales = kv_record(512, 64, record).parts(window, 64)
    data, scales = data[::3, 0], scales[::3, 0]  # a sequence has three pages
    codes = 448 if record == "fp8" else 224
    every = torch.arange(256).repeat(2)[: 256 + codes - 224]
    for s in range(n):
        data[s, :codes] = every.roll(97 * s)[:codes].byte()
    data[:, codes:] = torch.randn(n, 64, generator=g).bfloat16().view(torch.uint8)
    if record == "fp8":
        data[:, :448][(data[:, :448] & 0x7F) == 0x7F] = 0  # NaN
        scales[:, :7] = torch.randint(20, 135, (n, 7), generator=g).byte()
    else:
        scales[:, :28] = torch.randint(0, 0x7F, (n, 28), generator=g).byte()  # of E4M3, subnormal ones too
        scales[:, 28] = torch.tensor([30, 90, 110, 120, 127, 134]).byte()
    q.zero_()
    keys = cache_read(window, torch.arange(n) * 192, record=record, page_size=64, dim=512, rope_dim=64)
    assert torch.equal(simulated(case, 1), keys[seq].bfloat16()[:, None].expand(-1, 4, -1))


RACES = [
    ("fp8", "chosen", [(700, 1)], 128, 200, 2, "lazy"),  # two head tiles; parts of two and three blocks
    ("nvfp4", "visible", [(40_000, 1)], 4, 0, 3, "random"),  # parts of two and three blocks, the last one partly empty
    ("plain", "window", [(1000, 2)], 8, 0, 3, "random"),  # a part without keys
    ("fp8", "chosen", [(700, 2)], 72, 70, 1, "random"),  # items that follow each other in a CTA
]


@pytest.mark.parametrize(("record", "kind", "sequences", "heads", "k", "parts", "schedule"), RACES)
def test_any_schedule_and_no_race(
    record: str, kind: str, sequences: list[tuple[int, int]], heads: int, k: int, parts: int, schedule: str
) -> None:
    case = make_case(record, kind, sequences, heads, k=k)
    found = simulated(case, parts, ctas=2, schedule=schedule, checks=sim.Checks(races=True))
    assert judge(case, found) < 0.004


def test_sinks_and_empty_entries() -> None:
    """A sink that takes all, or none; chosen entries with many gaps, whole blocks of them; a query that chose nothing."""
    sinks = torch.tensor([1e4, 60.0, -1e4, -torch.inf])
    case = make_case("fp8", "chosen", [(1200, 2), (100, 1)], 4, k=200, fewer=0.7, sinks=sinks)
    chosen = case.args[-1]
    chosen[0, 30:190] = -1
    chosen[1] = -1
    for parts in (1, 4):
        found = simulated(case, parts)
        judge(case, found)
        assert bool((found[:, 0] == 0).all()) and bool((found[:, 3].float().norm(dim=-1) > 0.1).all())


@pytest.mark.parametrize(
    ("record", "kind", "sequences", "k"),
    [("fp8", "chosen", [(700, 1), (30, 1)], 40), ("nvfp4", "visible", [(300, 1), (100, 1)], 0)],
)
def test_attention_is_the_same_to_the_bit(record: str, kind: str, sequences: list[tuple[int, int]], k: int) -> None:
    """As where it decodes for itself."""
    case = make_case(record, kind, sequences, 4, k=k)
    found = simulated(case, 1, unpack=True)
    judge(case, found)
    assert torch.equal(found, simulated(case, 1, unpack=False))


def test_a_window_is_as_its_plain_keys() -> None:
    case = make_case("nvfp4", "window", [(1, 1), (190, 1)], 4)
    found = simulated(case, 1, unpack=True)
    judge(case, found)
    window = case.args[2]
    how = dict(record="nvfp4", page_size=64, dim=512, rope_dim=64)
    keys = cache_read(window, torch.arange(window.shape[0] * 64), **how).to(BF16).view(-1, 64, 512)
    plain = replace(case, args=(*case.args[:2], keys, *case.args[3:]), how=case.how | dict(record="plain"))
    assert torch.equal(found, simulated(plain, 1, unpack=True)), "plain keys are not unpacked, whatever is asked for"


def test_pages_of_a_common_prefix_in_the_simulator() -> None:
    """Three sequences begin with the same pages; the last one ends inside the second of them."""
    case = make_case("fp8", "chosen", [(900, 1), (700, 1), (200, 1)], 4, k=70, shared=4)
    table = case.args[4]
    assert torch.equal(table[0, :4], table[1, :4]) and torch.equal(table[0, :2], table[2, :2]) and table[0, 4] != table[1, 4]
    found = simulated(case, 1)
    judge(case, found)
    assert torch.equal(found, simulated(case, 1, unpack=True))


def test_the_operator_in_the_simulator() -> None:
    case = make_case("fp8", "chosen", [(300, 1)], 64)
    with dsv4lab.backend("sim", arch="sm_90a"):
        found = ops.attention(*case.args, **case.how)
        q, name = case.args[0].mT.contiguous().mT, torch.ops.dsv4lab
        for op, args, how in ((name.attention, (q, *case.args[1:]), case.how), (name.rmsnorm, (q, q[0, 0]), dict(eps=1.0))):
            torch.library.opcheck(op.default, args, how, test_utils="test_faketensor")
        far = case.args[4].long() + 2**32  # as int32 the same page
        with pytest.raises(ValueError, match="block_table"):
            ops.attention(*case.args[:4], far, *case.args[5:], **case.how)
    judge(case, found)


# ---- on a GPU ----------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("record", ["plain", "fp8", "nvfp4"])
@pytest.mark.parametrize(("heads", "k"), [(64, 512), (128, 1024), (4, 32)])
def test_on_the_gpu(record: str, heads: int, k: int, seed: int) -> None:
    for kind in ("window", "chosen", "visible"):
        for sequences in RAGGED:
            case = make_case(record, kind, sequences, heads, k=k, seed=seed, device="cuda")
            for parts in (None, 1, 3):
                found = case.run(parts)
                judge(case, found)
                assert torch.equal(found, case.run(parts))  # not a matter of timing


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("record", "kind", "heads", "shared"),
    [("fp8", "chosen", 64, 40), ("nvfp4", "visible", 128, 30), ("plain", "chosen", 128, 9)],
)
def test_pages_of_a_common_prefix_on_the_gpu(record: str, kind: str, heads: int, shared: int) -> None:
    """Sequences go on after it, end at its end and inside; decode and prefill."""
    for sequences in ([(9000, 2), (7000, 1), (5120, 8), (1000, 1), (1, 1)], [(9000, 300), (6000, 129), (1152, 40)]):
        case = make_case(record, kind, sequences, heads, k=512, shared=shared, device="cuda")
        table = case.args[4]
        assert torch.equal(table[0, :shared], table[1, :shared]) and table[0, 0] == table[-1, 0] != -1
        found = case.run()
        judge(case, found)
        assert torch.equal(case.run(1, unpack=True), case.run(1, unpack=False))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])  # 128: CTAs in pairs
@pytest.mark.parametrize("kind", ["chosen", "visible"])
def test_a_cuda_graph_replays_with_new_inputs(kind: str, heads: int) -> None:
    """Positions grow after capture: keys are found from what is on the device."""
    lengths = (9000, 400, 5000, 8999)
    cases = [make_case("fp8", kind, [(n, 2), (n // 2, 1)], heads, k=512, seed=n, device="cuda") for n in lengths]
    check_replays(lambda case: case.run(), cases)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("record", ["fp8", "nvfp4"])
@pytest.mark.parametrize(("heads", "k"), [(64, 512), (128, 1024)])
def test_unpacked_keys_give_the_same_bits_on_the_gpu(record: str, heads: int, k: int, seed: int) -> None:
    """Flash's and Pro's, ragged batches."""
    for kind in ("window", "chosen", "visible"):
        for sequences in ([(8192, 1025)], [(700, 300), (5000, 129)], [(20_001, 513), (130, 130), (900, 1), (64, 3)]):
            case = make_case(record, kind, sequences, heads, k=k, seed=seed, device="cuda")
            found = case.run(unpack=True)
            assert torch.equal(found, case.run(unpack=False)) and torch.equal(found, case.run(unpack=True))
            if sum(n for _, n in sequences) < 500:
                judge(case, found)


@pytest.mark.gpu
@pytest.mark.parametrize(("record", "kind"), [("fp8", "chosen"), ("nvfp4", "visible")])
def test_a_cuda_graph_unpacks_what_is_seen_then(record: str, kind: str) -> None:
    """What is unpacked is found from what is on the device."""
    cases: list[Case] = [
        make_case(record, kind, [(n, 150), (n // 2, 70)], 64, k=512, seed=n, device="cuda") for n in (9000, 400, 5000, 8999)
    ]
    check_replays(lambda case: case.run(unpack=True), cases)
