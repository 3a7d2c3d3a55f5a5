"""The prediction block's addition on any architecture: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.elements import ELEMENT
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.head.mtp.config import DEPTH_MULTIPLE, MAX_ELEMENTS, AddConfig


def add_streams(e: torch.Tensor, f: torch.Tensor, *, config: AddConfig | None = None) -> torch.Tensor:
    """e[:, None] + f in float32, rounded once: e (M, D), f (M, S, D), bf16 or f32, contiguous, D % 8 == 0 -> like f.

    Raises ValueError on shapes, TypeError on dtypes.  Source: `reference.head.mtp_input`.
    """
    for name, value, dims in (("e", e, 2), ("f", f, 3)):
        if value.dtype not in ELEMENT:
            raise TypeError(f"{name} must be bfloat16 or float32, got {value.dtype}")
        if value.ndim != dims or not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous with {dims} dims, got {tuple(value.shape)}, strides {value.stride()}")
    if (f.shape[0], f.shape[2]) != tuple(e.shape) or e.shape[1] % DEPTH_MULTIPLE:
        raise ValueError(
            f"e and f must be (M, D) and (M, S, D) with D % {DEPTH_MULTIPLE} == 0, got {tuple(e.shape)} and {tuple(f.shape)}"
        )
    if f.numel() >= MAX_ELEMENTS:
        raise ValueError(f"f must have less than 2^31 elements, got {tuple(f.shape)}")
    out = torch.empty_like(f)
    if not out.numel():
        return out
    kinds = (ELEMENT[e.dtype], ELEMENT[f.dtype], f.shape[1])
    config = config or AddConfig.for_shape(e.shape[0], e.shape[1], *kinds)
    config.check()
    if (config.e, config.f, config.streams) != kinds:
        raise ValueError(f"config must be for e, f, streams {kinds}, got {config}")
    runtime = runtime_of(f)
    runtime.call(_compiled(config, runtime), e, f, out)
    return out


def _compiled(config: AddConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M and D left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.head.mtp.kernel import AddStreams

        types = {"bf16": cutlass.BFloat16, "f32": cutlass.Float32}
        tokens, depth = cute.sym_int(), cute.sym_int(divisibility=DEPTH_MULTIPLE)
        streams = (fake(types[config.f], tokens, config.streams, depth) for _ in range(2))
        return AddStreams(config), (fake(types[config.e], tokens, depth), *streams, fake_stream())

    return cache.kernel("dsv4lab.kernels.head.mtp.kernel", config, build, runtime)
