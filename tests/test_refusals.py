"""Bad input that once went through, or failed after something had been written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4lab.kernels.moe.operators import ENTRIES
from dsv4lab.kernels.moe.router.api import router_hash
from dsv4lab.model.cache import CacheFull
from dsv4lab.model.checkpoint import CheckpointError
from dsv4lab.model.loading import load
from dsv4lab.paging import check_keys
from dsv4lab.reference import gemm, head, norm

ONE = torch.ones(1, dtype=torch.int64)


def chosen(*ids: int) -> None:
    """Of a query at position 4, which sees two entries of ratio 2."""
    table, topk = torch.zeros(1, 4, dtype=torch.int32), torch.tensor([ids], dtype=torch.int32)
    check_keys(table, 4 * ONE, 0 * ONE, topk, rings=1, num_pages=4, page_size=4, ratio=2)


def test_entries_that_were_chosen_are_seen_and_none_is_twice() -> None:
    chosen(1, -1, 0, -1)
    for ids in ((0, 2), (1, 1, -1)):
        with pytest.raises(ValueError, match="entries seen, none twice"):
            chosen(*ids)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: gemm.matmul_rows(x[None], x), "x must"),
        (lambda x: norm.rmsnorm(x, x[0], eps=-1.0), "eps must"),
        (lambda x: norm.rmsnorm(x, x[0], eps=float("nan")), "eps must"),
        (lambda x: head.mtp_input(x[:1], x[:, None], x[0], x[0], x, x, eps=1e-6, act="none"), "embedding must"),
        (lambda x: router_hash(x, x[:8], torch.tensor([[8, 9], [0, 1]]), 0 * ONE.expand(64), route_scale=1.0), "tid2eid must"),
    ],
)
def test_operations_say_what_is_wrong(call: Callable[[torch.Tensor], Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(torch.ones(64, 64))


def test_experts_refuse_more_rows_than_their_kernels_take() -> None:
    refuses = next(entry.refuses for entry in ENTRIES if entry.operation == "moe_experts")
    assert "262144" in str(refuses(ONE, ONE, torch.zeros(43691, 6)))


def test_a_step_that_fails_takes_no_pages(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    cache = model.new_cache(max_seqs=2, max_tokens=256)
    a, b = cache.open(), cache.open()
    with pytest.raises(CacheFull):
        model.run_step(cache, [(a, [5] * 200), (b, [5] * 200)])
    model.run_step(cache, [(b, [5] * 200)])
    cache = model.new_cache(max_seqs=2, max_tokens=2048)
    with pytest.raises(ValueError, match="at least one token"):
        list(model.prefill(cache, [(cache.open(), [5]), (cache.open(), [5] * 600)]))
    assert model.generate(np.array([[1, 2]], np.uint16), 1) == model.generate([1, 2], 1)


def test_scales_that_are_no_numbers_are_damage(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    file = next(copy.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["layers.1.attn.wq_a.scale"].view(torch.uint8).fill_(255)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"wq_a.scale: must be finite"):
        load(copy)
