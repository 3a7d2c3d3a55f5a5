"""Index queries in the operator's form."""

from __future__ import annotations

from torch import Tensor

from dsv4lab.kernels.entry import Entry
from dsv4lab.kernels.indexer.query import api


def index_query(q: Tensor, positions: Tensor, inv_freq: Tensor, *, record: str) -> Tensor:
    return api.index_query(q.contiguous(), positions.contiguous(), inv_freq.contiguous(), record=record)


ENTRIES = tuple(Entry(index_query.__name__, arch, index_query, api.refuses) for arch in api.ARCHITECTURES)
