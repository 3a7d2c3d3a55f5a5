"""A stage may not be released while loads of it are under way, in the order of instructions that ptxas makes of ours."""

from __future__ import annotations

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
from dsv4lab.sim.cubin import _sections
from tests.kernels.mixed import random_weight
from tests.kernels.test_index_scores import scene

LOADS, ARRIVE, LEAVE = (0x984, 0x83B), 0x9A7, (0x947, 0x94D)  # LDS, LDSM; SYNCS.ARRIVE; BRA, EXIT: bits 0 to 11
ALWAYS, NEVER = 7, 15  # predicates, bits 12 to 15


class Compiled(Exception):
    pass


class Compiler(sim.Host):
    def know(self, ptx: str, cubin: bytes) -> None:
        raise Compiled(cubin)


def early(cubin: bytes) -> tuple[int, list[str]]:
    """How many arrivals there are, and those at which a load's scoreboard was not waited for; a warp's loads end in order."""
    count, found = 0, []
    for name, code in _sections(cubin).items():
        pending: list[int] = []
        for at in range(0, len(code) if name.startswith(".text.") else 0, 16):
            low, high = struct.unpack_from("<QQ", code, at)
            operation, predicate, board, waits = low & 0xFFF, low >> 12 & 15, high >> 46 & 7, high >> 52 & 63
            ended = [i + 1 for i, other in enumerate(pending) if other < 6 and waits >> other & 1]
            pending = pending[max(ended, default=0) :]
            count += operation == ARRIVE
            if operation == ARRIVE and pending:
                found.append(f"{at:04x}")
            elif operation in LOADS and predicate != NEVER:
                pending.append(board)
            elif operation in LEAVE and predicate == ALWAYS:
                pending = []
    return count, found


def linears(name: str, **how: int) -> object:
    x, weight = torch.zeros(5, 512).bfloat16(), prepare(random_weight(name, 64, 512, seed=1))
    return linear(x, weight, out_dtype=x.dtype, config=MixedConfig(name, "bf16", 8, **how))


def scores() -> object:
    config = IndexScoresConfig("fp8", 64, 32, 4, 2, 3)
    return index_scores(*scene("fp8", [70], [4]), record="fp8", page_size=32, max_entries=70, config=config)


@pytest.mark.parametrize(
    "call",
    [
        lambda: linears("nvfp4", slabs=4, chunks=4, stages=8, splits=4),
        lambda: linears("bf16", slabs=8, chunks=4, stages=3),
        scores,
    ],
)
def test_loads_have_ended(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_loaded", {})
    with pytest.raises(Compiled) as compiled, running_on(Compiler("sm_90a")):
        call()
    count, found = early(compiled.value.args[0])
    assert count > 1 and not found, found
