"""Prepared weights, kept beside the weights they were made from: as many bytes again, as long as the codes live."""

from __future__ import annotations

from dataclasses import replace

import torch

from dsv4lab.formats import PackedWeight
from dsv4lab.kernels._common.kept import kept
from dsv4lab.kernels.gemm.mixed.layout import PreparedWeight, prepare


def prepared(weight: PackedWeight, up: PackedWeight | None = None) -> PreparedWeight:
    """`layout.prepare` of a weight, or of a gate-up pair, from memory where nothing has changed since. Raises as `prepare`."""
    weights = [weight] if up is None else [weight, up]
    tensors = [t for w in weights for name, t in w.tensors().items() if name != "input_scale"]  # what `prepare` reads
    return kept(tuple(id(w.codes) for w in weights), tensors, lambda: prepare(weight, up))


def prepared_two(first: PackedWeight, second: PackedWeight) -> PreparedWeight:
    """Likewise of two weights (N1, K), (N2, K) of one format without global scales: one behind the other. N1 % 16 == 0."""

    def make() -> PreparedWeight:
        a, b = prepare(first), prepare(second)
        return replace(a, records=torch.cat([a.records, b.records]), shape=(1, a.shape[1] + b.shape[1], a.shape[2]))

    tensors = [t for w in (first, second) for name, t in w.tensors().items() if name != "input_scale"]
    return kept((id(first.codes), id(second.codes), "two"), tensors, make)
