"""Prepared weights, kept beside the weights they were made from: as many bytes again, as long as the codes live."""

from __future__ import annotations

from dsv4lab.formats import PackedWeight
from dsv4lab.kernels._common.kept import kept
from dsv4lab.kernels.gemm.mixed.layout import PreparedWeight, prepare, prepare_two


def prepared(weight: PackedWeight, up: PackedWeight | None = None) -> PreparedWeight:
    """`layout.prepare` of a weight, or of a gate-up pair, from memory where nothing has changed since. Raises as `prepare`."""
    weights = [weight] if up is None else [weight, up]
    tensors = [t for w in weights for name, t in w.tensors().items() if name != "input_scale"]  # what `prepare` reads
    return kept(tuple(id(w.codes) for w in weights), tensors, lambda: prepare(weight, up))


def prepared_two(first: PackedWeight, second: PackedWeight) -> PreparedWeight:
    """Likewise `layout.prepare_two`."""
    tensors = [t for w in (first, second) for name, t in w.tensors().items() if name != "input_scale"]
    return kept((id(first.codes), id(second.codes), "two"), tensors, lambda: prepare_two(first, second))
