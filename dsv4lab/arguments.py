"""What arguments must be, as reference and kernels alike have it: shapes and numbers that the host sees, no values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

PEAK_IDS = 128  # ids of the vocabulary that share a peak
LEAST_EPS = 1e-30  # keeps 1 / rms a float32


def check_shape(name: str, value: torch.Tensor, want: Sequence[int]) -> None:
    """Raises ValueError unless the tensor has exactly this shape: nothing is broadcast."""
    if tuple(value.shape) != tuple(want):
        raise ValueError(f"{name} must be {tuple(want)}, got {tuple(value.shape)}")


def check_contiguous(**tensors: torch.Tensor) -> None:
    """Raises ValueError."""
    for name, value in tensors.items():
        if not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {value.stride()} of {tuple(value.shape)}")


def check_dense(name: str, value: torch.Tensor, want: Sequence[int | str], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless the tensor is contiguous and has this shape, a letter being any number; TypeError on dtype."""
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {value.dtype}")
    fits = value.dim() == len(want) and all(isinstance(w, str) or w == n for w, n in zip(want, value.shape, strict=True))
    if not fits or not value.is_contiguous():
        shape = ", ".join(map(str, want)) + "," * (len(want) == 1)
        raise ValueError(f"{name} must be contiguous ({shape}), got {tuple(value.shape)}, strides {value.stride()}")


def check_peaks(peaks: torch.Tensor | None, logits: torch.Tensor) -> None:
    """Of logits (B, V), one number, if any, for `PEAK_IDS` of them. Raises ValueError on shape, TypeError on dtype."""
    if peaks is not None:
        check_dense("peaks", peaks, (logits.shape[0], -(-logits.shape[1] // PEAK_IDS)), torch.int64)


def check_codes(act: str, global_scale: torch.Tensor | None) -> None:
    """Codes that a row may leave as; NVFP4's scale is given. Raises ValueError."""
    if act not in ("fp8", "nvfp4") or (act == "nvfp4") != (global_scale is not None):
        raise ValueError(f"act must be fp8, or nvfp4 with a global_scale, got {act!r} and {global_scale}")


def check_limit(limit: float) -> None:
    """Of the clamped SwiGLU. Raises ValueError."""
    if not 0.0 < limit < float("inf"):
        raise ValueError(f"limit must be positive and finite, got {limit}")


def check_experts(x: torch.Tensor, w1: Any, w3: Any, w2: Any, *, stacked: bool) -> None:
    """Packed weights for x (M, D): w1, w3 (E, I, D), w2 (E, D, I), without E where not `stacked`; of w1 and w3 both have an
    input_scale, or none. Raises ValueError.
    """
    if x.dim() != 2 or w1.codes.dim() != 2 + stacked or w1.shape[-1] != x.shape[1]:
        raise ValueError(f"w1 must be ({'E, ' * stacked}I, D) for x (M, D), got {w1.shape} and {tuple(x.shape)}")
    for name, weight, want in (("w3", w3, w1.shape), ("w2", w2, (*w1.shape[:-2], w1.shape[-1], w1.shape[-2]))):
        if weight.shape != want:
            raise ValueError(f"{name} must be {want} for w1 {w1.shape}, got {weight.shape}")
    if (w1.input_scale is None) != (w3.input_scale is None):
        raise ValueError("w1 and w3 must have both an input_scale or none, got one")


def check_top_k(top_k: int, experts: int) -> None:
    """Of a router. Raises ValueError."""
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be 1 to E = {experts}, got {top_k}")


def check_ring(window: int, ring_len: int) -> None:
    """A ring of window keys holds a whole window. Raises ValueError."""
    if not 1 <= window <= ring_len:
        raise ValueError(f"window must be 1 to ring_len = {ring_len}, got {window}")


def check_state(state: torch.Tensor, ratio: int, overlap: bool) -> None:
    """A compressor's ring holds what an entry pools. Raises ValueError."""
    span = ratio * (1 + overlap)
    if not 0 < span <= state.shape[1]:
        raise ValueError(f"state must have R >= {span} > 0, got R={state.shape[1]}")


def check_eps(eps: float, least: float = LEAST_EPS) -> None:
    """Of a norm. Raises ValueError."""
    if not least <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least {least}, got {eps}")


def check_sinkhorn(iters: int, eps: float) -> None:
    """Of hyper-connections. From 1 on what is added outgrows the sums, and nothing converges. Raises ValueError."""
    if iters < 1:
        raise ValueError(f"sinkhorn_iters must be at least 1, got {iters}")
    if not 0 <= eps < 1:
        raise ValueError(f"hc_eps must be at least 0 and below 1, got {eps}")


def check_max_entries(most: int | None) -> None:
    """What queries see at most, if that is told. Raises ValueError."""
    if most is not None and most < 0:
        raise ValueError(f"max_entries must be at least 0, got {most}")


def check_routing(x: torch.Tensor, weights: torch.Tensor, expert_idx: torch.Tensor) -> None:
    """What a router gives for tokens x (M, D). Raises ValueError on shapes, TypeError on dtypes."""
    if weights.dtype != torch.float32 or expert_idx.dtype != torch.int64:
        raise TypeError(f"weights must be float32 and expert_idx int64, got {weights.dtype} and {expert_idx.dtype}")
    if expert_idx.dim() != 2 or expert_idx.shape[0] != x.shape[0] or not expert_idx.shape[1]:
        raise ValueError(f"expert_idx must be (M, k) for x (M, D), got {tuple(expert_idx.shape)} for {tuple(x.shape)}")
    if weights.shape != expert_idx.shape:
        raise ValueError(f"weights must be one an id, {tuple(expert_idx.shape)}, got {tuple(weights.shape)}")
