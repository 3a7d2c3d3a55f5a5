"""The linear with NVFP4 weights and BF16 activations on any architecture that has a kernel for it: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsv4lab.formats import NVFP4, PackedWeight
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.gemm.w4a16.config import CODE_BYTES, SCALE_BYTES, TILE, W4A16Config, choose
from dsv4lab.kernels.gemm.w4a16.weights import prepare_codes, prepare_scales

K_MULTIPLE = 128  # two tiles, which take turns in registers
_OUT = {torch.bfloat16: "bf16", torch.float32: "f32"}
_arrivals: dict[tuple[torch.device, int], torch.Tensor] = {}


@dataclass(frozen=True)
class PreparedWeight:
    """An NVFP4 matrix (N, K) in the order of `weights`.

    codes (N/64, K/64, 512) i32; scale (N/64, K/64, 64) i32; global_scale (1,) f32.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0] * TILE, self.codes.shape[1] * TILE

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.global_scale.nbytes


def prepare(weight: PackedWeight) -> PreparedWeight:
    """Reorder an NVFP4 weight (N, K), once: N % 64 == 0, K % 128 == 0, linear scales. The size does not change.

    Raises ValueError on other formats and shapes.
    """
    if weight.format != NVFP4 or weight.scale is None or weight.global_scale is None:
        raise ValueError(f"weight must be nvfp4, got {weight.format.name}")
    if len(weight.shape) != 2 or weight.shape[0] % TILE or weight.shape[1] % K_MULTIPLE:
        raise ValueError(f"weight must be (N, K) with N % {TILE} == 0 and K % {K_MULTIPLE} == 0, got {tuple(weight.shape)}")
    codes, scale = prepare_codes(weight.codes, weight.scale), prepare_scales(weight.scale)
    return PreparedWeight(codes, scale, weight.global_scale.float().reshape(1))


def linear_w4a16(
    x: torch.Tensor, weight: PreparedWeight, *, out_dtype: torch.dtype = torch.bfloat16, config: W4A16Config | None = None
) -> torch.Tensor:
    """y = x W^T: x (M, K) bf16, contiguous -> (M, N) of out_dtype, bf16 or f32.

    Weights are decoded to BF16 exactly, sums are float32 in the tensor core's order, the global scale comes last. The
    result does not depend on timing. config: compile-time choices, by default `config.choose`'s.
    Raises ValueError on shapes, TypeError on dtypes.
    """
    n, k = weight.shape
    if x.dtype != torch.bfloat16 or out_dtype not in _OUT:
        raise TypeError(f"x must be bfloat16 and out_dtype bfloat16 or float32, got {x.dtype} and {out_dtype}")
    if x.dim() != 2 or x.shape[1] != k or not x.is_contiguous():
        raise ValueError(f"x must be contiguous (M, {k}), got {tuple(x.shape)} with strides {x.stride()}")
    m = x.shape[0]
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if not m:
        return y
    config = config or choose(m, n, k, _OUT[out_dtype])
    if k % (config.chunks * TILE):
        raise ValueError(f"config must have chunks that divide K / {TILE} = {k // TILE}, got {config.chunks}")
    runtime = runtime_of(x)
    tiles = config.tiles(m, n)
    work = tiles * (k // TILE // config.chunks) if config.streamed else tiles
    ctas = min(work, runtime.multiprocessors)
    partial = x.new_empty((ctas, 2, config.tokens * config.rows) if config.streamed else (1, 1, 4), dtype=torch.float32)
    arrived = _counters(x.device, tiles) if config.streamed else _counters(x.device, 1)
    runtime.call(_compiled(config, runtime), x, weight.codes, weight.scale, weight.global_scale, y, partial, arrived, ctas)
    return y


def _counters(device: torch.device, count: int) -> torch.Tensor:
    """Zeros that every launch leaves as it found them; one set for each stream, since launches on one do not overlap here."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    known = _arrivals.get((device, stream))
    if known is None or known.numel() < count:
        known = _arrivals[device, stream] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return known[:count]


def _compiled(config: W4A16Config, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M, N and K left open. Raises ValueError for an architecture without a class."""
    if runtime.arch != "sm_90a":
        raise ValueError(f"linear_w4a16 needs sm_90a, got {runtime.arch}")
    config.check()

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.gemm.w4a16.sm90 import W4A16LinearSm90

        m, n, k = cute.sym_int(), cute.sym_int(divisibility=TILE), cute.sym_int(divisibility=K_MULTIPLE)
        row_tiles, column_tiles, tiles, ctas, slots, size = (cute.sym_int() for _ in range(6))
        i32, f32 = cutlass.Int32, cutlass.Float32
        examples = (
            fake(cutlass.BFloat16, m, k),
            fake(i32, row_tiles, column_tiles, CODE_BYTES // 4),
            fake(i32, row_tiles, column_tiles, SCALE_BYTES // 4),
            fake(f32, 1, align=4),
            fake({"bf16": cutlass.BFloat16, "f32": f32}[config.out], m, n),
            fake(f32, ctas, slots, size),
            fake(i32, tiles, align=4),
            i32(1),
            fake_stream(),
        )
        return W4A16LinearSm90(config), examples

    return cache.kernel("dsv4lab.kernels.gemm.w4a16.sm90", config, build, runtime)
