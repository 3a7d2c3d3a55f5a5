"""The rotation of heads on Hopper and Blackwell: checks, shapes, launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_contiguous, check_eps
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.elements import ELEMENT, dense
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.quant.rows.api import scale_counters
from dsv4lab.kernels.quant.rows.config import CHUNK
from dsv4lab.kernels.rope.heads.config import HEAD_DIM, ROPE_DIM, HeadsConfig
from dsv4lab.paging import check_positions

ARCHITECTURES = ("sm_90a", "sm_100a")
GROUPS = (64, 128)
MAX_WORDS = 2**31  # of x; indices are 32 bits wide
# CTAs that fit a multiprocessor, of launches whose CTAs go on from one run of heads to the next: "amax", which leaves few
# maxima that way, and NVFP4, where what a CTA prepares from the global scale serves all its tokens.
_RESIDENT = {"sm_90a": 3, "sm_100a": 2}


def q_norm_rope(
    q: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, eps: float, config: HeadsConfig | None = None
) -> torch.Tensor:
    """Normalise every query head without a weight, then rotate its last 64 values.

    q (M, H, 512) bf16 or f32; positions (M,) i32 or i64, 0 to 2^20; inv_freq (32,) f32, 0 to 1; all contiguous; eps in x^2
    units, at least 1e-30 -> like q.  Raises ValueError on shapes, TypeError on dtypes.  Source: `reference.norm.q_norm_rope`.
    """
    _check(q, positions, inv_freq)
    check_eps(eps)
    out = torch.empty_like(q)
    _launch(q, positions, inv_freq, out, eps=eps, config=config, out_as="same", norm=True)
    return out


def inverse_rope(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, config: HeadsConfig | None = None
) -> torch.Tensor:
    """Rotate the last 64 values of every head by the negative angle. Arguments and errors as for `q_norm_rope` -> like x.

    Source: `reference.rope.inverse_rope`.
    """
    _check(x, positions, inv_freq)
    out = torch.empty_like(x)
    _launch(x, positions, inv_freq, out, config=config, out_as="same")
    return out


def inverse_rope_fp8(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, group: int, config: HeadsConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`inverse_rope`, rounded to x's dtype, then FP8: codes (M, H, 512) e4m3, scale (M, H, 512 / group) e8m0.

    group 64 or 128. Arguments and errors as for `q_norm_rope`.  Source: `reference.rope.inverse_rope_fp8`.
    """
    _check(x, positions, inv_freq)
    if group not in GROUPS:
        raise ValueError(f"group must be 64 or 128, got {group}")
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(*x.shape[:2], HEAD_DIM // group, dtype=torch.uint8, device=x.device)
    _launch(x, positions, inv_freq, codes, scale, config=config, out_as="fp8", group=group)
    return codes.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def inverse_rope_nvfp4(
    x: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    *,
    config: HeadsConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`inverse_rope`, rounded to x's dtype, then NVFP4: codes (M, H, 256) u8, block_scale (M, H, 32) e4m3, global scale f32.

    global_scale () or (M,) f32, decode direction, normal and positive; absent, it is computed over all of x, in a launch of its
    own, and is (). Other arguments and errors as for `q_norm_rope`.  Source: `reference.rope.inverse_rope_nvfp4`.
    """
    _check(x, positions, inv_freq)
    m, heads, _ = x.shape
    codes = torch.empty(m, heads, HEAD_DIM // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(m, heads, HEAD_DIM // CHUNK, dtype=torch.uint8, device=x.device)
    how: dict[str, Any] = dict(config=config, out_as="nvfp4")
    if global_scale is not None:
        if global_scale.dtype != torch.float32:
            raise TypeError(f"global_scale must be float32, got {global_scale.dtype}")
        if global_scale.shape not in ((), (m,)) or not global_scale.is_contiguous():
            raise ValueError(f"global_scale must be a scalar or contiguous ({m},), got {tuple(global_scale.shape)}")
        kind = "many" if global_scale.ndim else "one"
        _launch(x, positions, inv_freq, codes, scale, given=global_scale.reshape(-1), scale_of=kind, **how)
        return codes, scale.view(torch.float8_e4m3fn), global_scale
    if not x.numel():
        return codes, scale.view(torch.float8_e4m3fn), torch.ones((), dtype=torch.float32, device=x.device)
    found = _scale_of_tensor(x, positions, inv_freq)
    _launch(x, positions, inv_freq, codes, scale, given=found, scale_of="one", **how)
    return codes, scale.view(torch.float8_e4m3fn), found[0]


# ---- checks ------------------------------------------------------------------------------------------------------------
def refuses(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, name: str = "x", dim: int = HEAD_DIM
) -> Exception | None:
    """What is wrong with heads (M, H, dim) of that name, their positions and frequencies; None where nothing is."""
    if x.dtype not in ELEMENT:
        return TypeError(f"{name} must be bfloat16 or float32, got {x.dtype}")
    if positions.dtype not in (torch.int32, torch.int64):
        return TypeError(f"positions must be int32 or int64, got {positions.dtype}")
    if inv_freq.dtype != torch.float32:
        return TypeError(f"inv_freq must be float32, got {inv_freq.dtype}")
    if x.ndim != 3 or x.shape[2] != dim:
        return ValueError(f"{name} must be (M, H, {dim}), got {tuple(x.shape)}")
    if positions.shape != x.shape[:1]:
        return ValueError(f"positions must be ({x.shape[0]},), got {tuple(positions.shape)}")
    if inv_freq.shape != (ROPE_DIM // 2,):
        return ValueError(f"inv_freq must be ({ROPE_DIM // 2},), got {tuple(inv_freq.shape)}")
    words = x.numel() * x.element_size() // 4
    return None if words < MAX_WORDS else ValueError(f"{name} must have fewer than 2^31 words of 4 bytes, got {words}")


def _check(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> None:
    why = refuses(x, positions, inv_freq)
    if why is not None:
        raise why
    check_contiguous(x=x, positions=positions, inv_freq=inv_freq)
    check_positions(positions)


# ---- launches ----------------------------------------------------------------------------------------------------------
def _scale_of_tensor(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """The global scale of the rotated heads, (1,) f32."""
    config = HeadsConfig.for_shape(x.shape[0], x.shape[1], out="amax", element=ELEMENT[x.dtype])
    ctas = min(config.tasks(x.shape[0], x.shape[1]), _resident(x))
    used = torch.empty(1, dtype=torch.float32, device=x.device)
    _run(config, x, positions, inv_freq, None, scale_counters(x.device), None, used, 0.0, ctas)
    return used


def _resident(x: torch.Tensor) -> int:
    """CTAs that run at once. An architecture without a kernel is refused later."""
    runtime = runtime_of(x)
    return _RESIDENT.get(runtime.arch, 1) * runtime.multiprocessors


def _launch(
    x: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    out_as: str,
    config: HeadsConfig | None,
    given: torch.Tensor | None = None,
    norm: bool = False,
    group: int = CHUNK,
    scale_of: str = "",
    eps: float = 0.0,
) -> None:
    """Fill codes and scales; nothing where there is nothing to rotate."""
    if not x.numel():
        return
    m, heads, _ = x.shape
    choices: dict[str, Any] = dict(out=out_as, element=ELEMENT[x.dtype], norm=norm, group=group, scale=scale_of)
    if config is None:
        config = HeadsConfig.for_shape(m, heads, **choices)
    config.check()
    if any(getattr(config, name) != value for name, value in choices.items()):
        raise ValueError(f"config must have {choices}, got {config}")
    ctas = config.tasks(m, heads)
    if out_as == "nvfp4":
        ctas = min(ctas, _resident(x))
    _run(config, x, positions, inv_freq, given, codes, scale, None, eps, ctas)


def _run(
    config: HeadsConfig,
    x: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    given: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    used: torch.Tensor | None,
    eps: float,
    ctas: int,
) -> None:
    runtime = runtime_of(x)
    m, heads, _ = x.shape
    words = dense(x).view(m * heads, HEAD_DIM).view(torch.uint32)
    runtime.call(
        _compiled(config, runtime),
        words,
        positions.view(torch.int32),
        inv_freq,
        inv_freq if given is None else given,
        codes if config.out == "amax" else codes.view(m * heads, -1).view(torch.uint32),
        inv_freq.view(torch.uint8)[None] if scale is None else scale.view(m * heads, -1),
        inv_freq if used is None else used,
        positions.element_size() // 4,
        heads,
        eps,
        ctas,
    )


def _compiled(config: HeadsConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M and H left open. Raises ValueError for an architecture without a kernel."""
    if runtime.arch not in ARCHITECTURES:
        raise ValueError(f"the rotation of heads needs {' or '.join(ARCHITECTURES)}, got {runtime.arch}")

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.rope.heads.kernel import TurnHeads

        u8, u32, f32 = cutlass.Uint8, cutlass.Uint32, cutlass.Float32
        rows, width = cute.sym_int(), HEAD_DIM if config.element == "f32" else HEAD_DIM // 2
        codes = {"same": width, "amax": 2, "fp8": HEAD_DIM // 4, "nvfp4": HEAD_DIM // 8}[config.out]
        scales = {"fp8": HEAD_DIM // config.group, "nvfp4": HEAD_DIM // CHUNK}.get(config.out, ROPE_DIM * 2)
        free = cute.sym_int if config.out in ("same", "amax") else lambda: rows
        examples = (
            fake(u32, rows, width),
            fake(cutlass.Int32, cute.sym_int(), align=4),
            fake(f32, ROPE_DIM // 2, align=4),
            fake(f32, cute.sym_int(), align=4),
            fake(u32, rows if config.out != "amax" else 1, codes),
            fake(u8, free(), scales, align=1),
            fake(f32, cute.sym_int(), align=4),
            cutlass.Int32(1),
            cutlass.Int32(1),
            cutlass.Float64(0.0),
            cutlass.Int32(1),
            fake_stream(),
        )
        return TurnHeads(config, runtime.arch), examples

    return cache.kernel("dsv4lab.kernels.rope.heads.kernel", config, build, runtime)
