"""Index queries on Hopper and Blackwell: checks, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_contiguous
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.elements import ELEMENT, dense
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.indexer.query.config import HEAD_DIM, RECORDS, ROPE_DIM, QueryConfig
from dsv4lab.kernels.rope.heads import api as heads_api
from dsv4lab.paging import check_positions

ARCHITECTURES = ("sm_90a", "sm_100a")


def index_query(
    q: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, record: str, config: QueryConfig | None = None
) -> torch.Tensor:
    """Rotate the last 64 values of index heads; with record "fp8" or "fp4" turn them by Hadamard, quantise and dequantise.

    q (M, H, 128) bf16 or f32; positions (M,) i32 or i64, 0 to 2^20; inv_freq (32,) f32, 0 to 1; all contiguous -> like q.
    Raises ValueError on shapes and record, TypeError on dtypes.  Source: `reference.indexer.index_query`.
    """
    why = refuses(q, positions, inv_freq, record=record)
    if why is not None:
        raise why
    check_contiguous(q=q, positions=positions, inv_freq=inv_freq)
    check_positions(positions)
    out = torch.empty_like(q)
    if not q.numel():
        return out
    m, heads, _ = q.shape
    element = ELEMENT[q.dtype]
    config = config or QueryConfig.for_shape(m, heads, record, element)
    config.check()
    if (config.record, config.element) != (record, element):
        raise ValueError(f"config must be for record {record} of {element}, got {config}")
    runtime = runtime_of(q)
    rows = dense(q).view(m * heads, HEAD_DIM).view(torch.uint32)
    words = positions.view(torch.int32)
    stride = positions.element_size() // words.element_size()
    target = out.view(m * heads, HEAD_DIM).view(torch.uint32)
    runtime.call(_compiled(config, runtime), rows, words, inv_freq, target, stride, heads)
    return out


def refuses(q: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, record: str) -> Exception | None:
    """What is wrong with these arguments."""
    if record not in RECORDS:
        return ValueError(f"record must be one of {', '.join(RECORDS)}, got {record!r}")
    return heads_api.refuses(q, positions, inv_freq, name="q", dim=HEAD_DIM)


def _compiled(config: QueryConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M and H left open. Raises ValueError for an architecture without a kernel."""
    if runtime.arch not in ARCHITECTURES:
        raise ValueError(f"index queries need {' or '.join(ARCHITECTURES)}, got {runtime.arch}")

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.indexer.query.kernel import IndexQuery

        u32 = cutlass.Uint32
        rows, width = cute.sym_int(), HEAD_DIM if config.element == "f32" else HEAD_DIM // 2
        examples = (
            fake(u32, rows, width),
            fake(cutlass.Int32, cute.sym_int(), align=4),
            fake(cutlass.Float32, ROPE_DIM // 2, align=4),
            fake(u32, rows, width),
            cutlass.Int32(1),
            cutlass.Int32(1),
            fake_stream(),
        )
        return IndexQuery(config), examples

    return cache.kernel("dsv4lab.kernels.indexer.query.kernel", config, build, runtime)
