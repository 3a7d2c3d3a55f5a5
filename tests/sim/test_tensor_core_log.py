"""sim.TensorCore: every product with its descriptors, its operands as read and TMEM as left, for a kernel of this folder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dsv4lab import sim


def test_products_are_kept_with_what_they_read_and_wrote(compiled: Callable[..., sim.Compiled]) -> None:
    a, b, c = torch.randn(128, 128).half(), torch.randn(64, 128).half(), torch.zeros(128, 64)
    tile = compiled("tcgen05_tile", a, b, c, arch="sm_100a")
    sim.enable("sm_100a")
    seen = sim.TensorCore(snapshots=8)
    tile(a, b, c, observers=[seen])
    sim.enable("sm_90a")
    assert [p.accumulate for p in seen.products] == [False] + [True] * 7  # two steps of four products of 16 columns
    first, last = seen.products[0], seen.products[-1]
    assert (first.shape.m, first.shape.n, first.shape.k, first.shape.a) == (128, 64, 16, "f16")
    assert first.a_scale == first.b_scale == -1 and first.a.mode == 3
    got = torch.from_numpy(np.concatenate([p.a_tile for p in seen.products], axis=1)).view(torch.float16)
    assert torch.equal(got, a)
    assert torch.equal(torch.from_numpy(last.b_tile).view(torch.float16), b[:, -16:])
    assert last.tmem is not None and first.tmem is not None
    sums = torch.from_numpy(last.tmem[:, last.accumulator : last.accumulator + 64].copy()).view(torch.float32)
    assert torch.equal(sums, c) and not np.array_equal(first.tmem, last.tmem)
    assert "128 x 64 x 16, A f16, B f16" in str(first) and "swizzle 128 bytes" in str(first)
    few = sim.TensorCore(snapshots=1)
    sim.enable("sm_100a")
    tile(a, b, c, observers=[few])
    sim.enable("sm_90a")
    assert [p.tmem is None for p in few.products] == [False] + [True] * 7
