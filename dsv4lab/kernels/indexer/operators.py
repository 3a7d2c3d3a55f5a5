"""The indexer's scores and selection in the operators' form, and what they refuse."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsv4lab.kernels.entry import Entry
from dsv4lab.kernels.indexer.scores import api as _scores
from dsv4lab.kernels.indexer.topk import api as _topk

TOPK_ARCHITECTURES = ("sm_90a", "sm_100a")


def index_scores(
    q: Tensor,
    head_weights: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_idx: Tensor,
    num_visible: Tensor,
    **how: Any,
) -> Tensor:
    return _scores.index_scores(
        q.contiguous(),
        head_weights.contiguous(),
        pages,
        block_table.contiguous(),
        seq_idx.contiguous(),
        num_visible.contiguous(),
        **how,
    )


def index_topk(scores: Tensor, num_visible: Tensor, *, k: int) -> Tensor:
    return _topk.index_topk(scores.contiguous(), num_visible.contiguous(), k=k)


ENTRIES = (
    Entry("index_scores", "sm_90a", index_scores, _scores.refuses),
    *(Entry("index_topk", arch, index_topk, _topk.refuses) for arch in TOPK_ARCHITECTURES),
)
