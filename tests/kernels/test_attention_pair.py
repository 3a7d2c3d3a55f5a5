"""Attention by pairs of CTAs, each of which decodes half of the keys for both: the same bits as where each decodes all."""

from __future__ import annotations

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.attention.core import api
from dsv4lab.kernels.attention.core.config import AttentionConfig, pairs
from tests.kernels.attention import RAGGED, Case, Silent, judge, make_case
from tests.kernels.simulated import simulating


def run(case: Case, parts: int | None = None, *, pair: bool | None, unpack: bool | None = False) -> torch.Tensor:
    """Keys are decoded in the kernel, as a rule."""
    return case.run(parts, unpack, pair=pair)


def simulated(case: Case, parts: int | None = None, ctas: int = 4, *, pair: bool | None = True, **how: object) -> torch.Tensor:
    with simulating(multiprocessors=ctas, **how):
        return run(case, parts, pair=pair)


# ---- choice ------------------------------------------------------------------------------------------------------------
def test_pairs_are_for_packed_keys_and_tiles_that_come_in_twos() -> None:
    for record in ("plain", "fp8", "nvfp4"):
        for heads, tiles in ((4, 1), (64, 1), (72, 2), (128, 2), (192, 3), (256, 4)):
            assert pairs(heads, record, 132) == (record != "plain" and tiles % 2 == 0)
            assert not pairs(heads, record, 1), "two CTAs must run at once"
    with pytest.raises(ValueError, match="pair must be false for plain records, which are not decoded, got True"):
        AttentionConfig("plain", "chosen", pair=True).check()
    with pytest.raises(ValueError, match="pair must be false for an odd number of tiles of heads, got True for 1"):
        simulated(make_case("fp8", "chosen", [(3, 1)], 64))


def test_the_call_takes_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[AttentionConfig] = []
    monkeypatch.setattr(api, "_compiled", lambda config, _: compiled.append(config))
    monkeypatch.setattr(api, "unpack_keys", lambda near, *_, **__: (torch.empty(near.shape[0], 64, 512).bfloat16(), None))
    runtime = Silent(7)
    for record, heads, queries, unpack, wanted, ctas in (
        ("fp8", 128, 1, False, True, 2),
        ("fp8", 128, 9, False, True, 6),  # of seven multiprocessors
        ("nvfp4", 72, 9, None, True, 6),
        ("fp8", 64, 9, False, False, 7),
        ("plain", 128, 9, None, False, 7),
        ("fp8", 128, 9, True, False, 7),
    ):
        with running_on(runtime):  # type: ignore[arg-type]
            run(make_case(record, "window", [(300, queries)], heads), 1, pair=None, unpack=unpack)
        assert (compiled[-1].pair, runtime.calls[-1][-1]) == (wanted, ctas), (record, heads, queries)


# ---- in the simulator --------------------------------------------------------------------------------------------------
def test_pairs_give_the_same_bits() -> None:
    """No entry yet, and four blocks of keys: an item of each of two pairs."""
    case = make_case("fp8", "chosen", [(1, 1), (500, 1)], 128, k=100)
    found = simulated(case, 1)
    judge(case, found)
    assert torch.equal(found, simulated(case, 1, pair=False))


def test_parts_of_different_lengths() -> None:
    """Parts of one and two blocks, and without keys; a second tile of 8 heads."""
    case = make_case("nvfp4", "visible", [(1, 1), (16_000, 1)], 72)
    assert judge(case, simulated(case, 3)) < 0.004


@pytest.mark.parametrize("schedule", ["lazy", "random"])
def test_any_schedule_and_no_race(schedule: str) -> None:
    """Two items of three blocks that follow each other in a pair."""
    case = make_case("fp8", "chosen", [(300, 2)], 128, k=50, fewer=0.3)
    found = simulated(case, 1, ctas=2, schedule=schedule, checks=sim.Checks(races=True))
    assert judge(case, found) < 0.004


# ---- on a GPU ----------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("record", ["fp8", "nvfp4"])
@pytest.mark.parametrize(("heads", "k"), [(128, 1024), (72, 200), (256, 512)])
def test_pairs_give_the_same_bits_on_the_gpu(record: str, heads: int, k: int, seed: int) -> None:
    for kind in ("window", "chosen", "visible"):
        for sequences in RAGGED:
            case = make_case(record, kind, sequences, heads, k=k, seed=seed, device="cuda")
            for parts in (1, 2, 3):
                found = run(case, parts, pair=True)
                assert torch.equal(found, run(case, parts, pair=False))
                assert torch.equal(found, run(case, parts, pair=True))  # not a matter of timing
            found = run(case, pair=True)  # in as many parts as are best for pairs
            assert torch.equal(found, run(case, pair=True))
            if sum(n for _, n in sequences) < 100:
                judge(case, found)
