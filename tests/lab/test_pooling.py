"""Compressors taken apart: weights that pool as the reference does, steps that add up to one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv4lab.lab import pooling
from dsv4lab.reference.compressor import compress, compressor_pool


def inputs_of(ratio: int, overlap: bool, key: str, record: str, tokens: int) -> dict[str, Any]:
    """A sequence from position 0, as an observed call has it."""
    g = torch.Generator().manual_seed(ratio)
    d, page_size = (512 if key == "kv" else 128), 128 // ratio
    width = d * (2 if overlap else 1)
    values, scores = (torch.randn(tokens, width, generator=g) for _ in range(2))
    given = dict(
        values=values,
        scores=2 * scores,
        ape=torch.randn(ratio, width, generator=g),
        norm_weight=torch.rand(d, generator=g).bfloat16() + 0.5,
        inv_freq=torch.rand(32, generator=g),
        block_table=torch.tensor([[2, 0, 1]], dtype=torch.int32),
    )
    return given | dict(
        ratio=ratio, overlap=overlap, eps=1e-6, record=record, page_size=page_size, key=key, rounded=record != "plain"
    )


CASES = [(4, True, "kv", "fp8"), (4, True, "index", "fp4"), (128, False, "kv", "nvfp4")]


@pytest.mark.parametrize(("ratio", "overlap", "key", "record"), CASES)
def test_gates_pool_as_the_reference_does(ratio: int, overlap: bool, key: str, record: str) -> None:
    one = pooling.piece(pooling.fresh(inputs_of(ratio, overlap, key, record, 300), ring=1), 0, 300)
    last = torch.arange(ratio - 1, 300, ratio)
    where = [one[name] for name in ("values", "scores", "ape", "state", "positions", "seq_idx", "first_row")]
    pooled = compressor_pool(*where, last, ratio=ratio, overlap=overlap)
    d = pooling.dims(one)
    for entry in (0, 1):
        weights = pooling.gates(one, entry)
        assert weights.shape == (pooling.span(one), d)
        places = torch.arange(-weights.shape[0], 0) + (entry + 1) * ratio
        a = one["values"][places.clamp(min=0)].double()
        a = torch.cat([a[:ratio, :d], a[ratio:, d:]]) if overlap else a
        torch.testing.assert_close((weights * a).sum(0).float(), pooled[entry], rtol=1e-6, atol=1e-6)
        used = pooling.effective_tokens(weights)
        assert float(used.min()) >= 1 and float(used.max()) <= int((places >= 0).sum()) + 1e-9
    with pytest.raises(ValueError, match=rf"entry must be in \[0, {300 // ratio}\), got -1"):
        pooling.gates(one, -1)


@pytest.mark.parametrize(("ratio", "overlap", "key", "record"), CASES)
def test_pieces_are_one_step(ratio: int, overlap: bool, key: str, record: str) -> None:
    inputs = inputs_of(ratio, overlap, key, record, 300)
    whole, cut = (pooling.fresh(inputs, ring=pooling.span(inputs)) for _ in range(2))
    compress(**pooling.piece(whole, 0, 300))
    for start, stop in ((0, 129), (129, 130), (130, 300)):
        compress(**pooling.piece(cut, start, stop))
    assert torch.equal(whole["state"], cut["state"]) and torch.equal(whole["pages"], cut["pages"])
    found = pooling.entries(whole, 300 // ratio)
    assert found.shape == (300 // ratio, pooling.dims(inputs)) and float(found.abs().amax(-1).min()) > 0


def test_longer_goes_round_and_has_pages_of_its_own() -> None:
    inputs = inputs_of(4, True, "index", "fp4", 20)
    more = pooling.longer(inputs, 300)
    assert torch.equal(more["values"][40:60], inputs["values"]) and len(set(more["block_table"][0].tolist())) == 3
    assert pooling.fresh(more, ring=8, record="plain", dtype=torch.float32)["pages"].shape == (3, 32, 128)
    moved = pooling.on(inputs, torch.device("cpu"), rounded=False)
    assert moved["rounded"] is False and inputs["rounded"] is True
