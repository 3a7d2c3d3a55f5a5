"""From a checkpoint directory to a model ready to run."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv4lab.model.attention import Attention
from dsv4lab.model.checkpoint import open_checkpoint
from dsv4lab.model.layers import share_input_scale
from dsv4lab.model.model import Model
from dsv4lab.model.moe import Experts, SharedExpert
from dsv4lab.model.numerics import EXACT, OFFICIAL, Numerics, get_numerics
from dsv4lab.model.tokenizer import Tokenizer

_DTYPES = (torch.float32, torch.bfloat16)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Of activations: bfloat16 on a GPU, since that is what kernels take; float32 elsewhere, where the reference runs."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    numerics: str | Numerics | None = None,
    progress: bool = False,
) -> Model:
    """Load a checkpoint of any known layout.

    path: directory with config.json and safetensors; dtype: of activations and residual streams, float32 or bfloat16 (the
    model's own), by default `default_dtype`'s, weights keep their stored bytes; numerics: "exact", "official" or "w4a4", by
    default exact for plain checkpoints and official for quantised ones; progress: a bar over the tensors. The tokenizer is read
    where there is one. On a GPU kernels take all of a bfloat16 model's step. Of a float32 one attention, index scores and
    hyper-connections run as their reference, with a warning, or MissingKernel in `backend("kernel")`; other kernels have torch
    split float32 rows in three and add up.
    Raises CheckpointError or ConfigError listing every problem, TypeError on another dtype, ValueError on w4a4 without NVFP4.
    """
    dtype = default_dtype(device) if dtype is None else dtype
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be one of {_DTYPES}, got {dtype}")
    checkpoint = open_checkpoint(path)
    chosen = (OFFICIAL if checkpoint.is_quantised else EXACT) if numerics is None else get_numerics(numerics)
    held = {fmt.name for fmt in checkpoint.formats.values()}
    if chosen.four_bit_activations and "nvfp4" not in held:
        raise ValueError(f"numerics {chosen.name} must have NVFP4 matrices (see `dsv4lab quantize`), got {sorted(held)}")
    tokenizer = Tokenizer.from_checkpoint(path) if (Path(path) / "tokenizer.json").exists() else None
    model = Model(checkpoint.config, chosen, dtype=dtype, device=device)
    model.tokenizer = tokenizer
    for name, value in checkpoint.items(progress=progress):
        model.assign(name, value.to(model.device))
    for module in model.modules():
        if isinstance(module, Attention):
            share_input_scale(module.wq_a, module.wkv)
        elif isinstance(module, (Experts, SharedExpert)):
            share_input_scale(module.w1, module.w3)
    return model.eval()
