"""Prepared weights, kept beside the weights they were made from: as many bytes again, as long as the codes live."""

from __future__ import annotations

from collections.abc import Callable

from dsv4lab.formats import PackedWeight
from dsv4lab.kernels._common.kept import kept
from dsv4lab.kernels.gemm.mixed.layout import PreparedWeight, prepare, prepare_two


def prepared(weight: PackedWeight, up: PackedWeight | None = None) -> PreparedWeight:
    """`layout.prepare` of a weight, or of a gate-up pair, from memory where nothing has changed since. Raises as `prepare`."""
    return _kept([weight] if up is None else [weight, up], lambda: prepare(weight, up))


def prepared_two(first: PackedWeight, second: PackedWeight) -> PreparedWeight:
    """`prepare_two`, likewise."""
    return _kept([first, second], lambda: prepare_two(first, second), "two")


def _kept(weights: list[PackedWeight], make: Callable[[], PreparedWeight], *how: str) -> PreparedWeight:
    tensors = [t for w in weights for name, t in w.tensors().items() if name != "input_scale"]  # what is read
    return kept((*(id(w.codes) for w in weights), *how), tensors, make)
