"""A stage may not be released while loads of it are under way, in the order of instructions that ptxas makes of ours."""

import struct
from collections.abc import Callable

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.gemm.mixed.api import linear
from dsv4lab.kernels.gemm.mixed.config import MixedConfig
from dsv4lab.kernels.gemm.mixed.layout import prepare
from dsv4lab.kernels.indexer.scores.api import index_scores
from dsv4lab.kernels.indexer.scores.config import IndexScoresConfig
from dsv4lab.kernels.mhc.api import mhc_pre
from dsv4lab.kernels.mhc.config import TogetherConfig
from dsv4lab.sim.cubin import _sections
from tests.kernels.mixed import random_weight
from tests.kernels.test_index_scores import scene

LOADS, ARRIVE = (0x984, 0x83B), 0x9A7  # bits 0 to 11 of LDS, LDSM, SYNCS.ARRIVE
NEVER = 15  # a predicate, bits 12 to 15


class Compiled(Exception):
    pass


class Compiler(sim.Host):
    def know(self, ptx: str, cubin: bytes) -> None:
        raise Compiled(cubin)


def linear_of(name: str) -> None:
    x, weight = torch.zeros(5, 512).bfloat16(), prepare(random_weight(name, 64, 512, seed=1))
    linear(x, weight, out_dtype=x.dtype, config=MixedConfig(name, "bf16", 8, slabs=4, chunks=4, stages=4, splits=4))


def scores() -> None:
    config = IndexScoresConfig("fp8", 64, 32, 4, 2, 4)
    index_scores(*scene("fp8", [70], [4]), record="fp8", page_size=32, max_entries=70, config=config)


def together() -> None:
    args = [torch.zeros(*shape) for shape in ((24, 16384), (24,), (3,))]
    config = TogetherConfig.for_shape(4096, 4096, 24, False, "bf16")
    mhc_pre(
        torch.zeros(3, 4, 4096).bfloat16(),
        *args,
        torch.zeros(4096).bfloat16(),
        eps=1e-6,
        hc_eps=1e-6,
        sinkhorn_iters=2,
        config=config,
    )


@pytest.mark.parametrize(
    "call", [lambda: linear_of("nvfp4"), lambda: linear_of("fp8_block"), lambda: linear_of("bf16"), scores, together]
)
def test_loads_have_ended(call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scoreboards that were waited for, instruction after instruction; a warp's loads end in order."""
    monkeypatch.setattr(cache, "_loaded", {})
    with pytest.raises(Compiled) as compiled, running_on(Compiler("sm_90a")):
        call()
    ((_, code),) = [(name, code) for name, code in _sections(compiled.value.args[0]).items() if name.startswith(".text.")]
    pending: list[int] = []
    arrivals = 0
    for low, high in struct.iter_unpack("<QQ", code):
        ended = [i + 1 for i, board in enumerate(pending) if board < 6 and high >> 52 + board & 1]
        pending = pending[max(ended, default=0) :]
        if low & 0xFFF == ARRIVE:
            arrivals += 1
            assert not pending
        elif low & 0xFFF in LOADS and low >> 12 & 15 != NEVER:
            pending.append(high >> 46 & 7)
    assert arrivals > 1
