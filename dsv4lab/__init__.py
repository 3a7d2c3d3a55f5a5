"""dsv4lab: build, check, profile and draw every kernel of DeepSeek-V4 inference, and run the model on them.

Shortest use:

    import dsv4lab
    model = dsv4lab.load(dsv4lab.nano())
    new_ids = model.generate(model.tokenizer.encode("def "))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from dsv4lab.dispatch import Backend
    from dsv4lab.model.model import Model
    from dsv4lab.model.numerics import Numerics

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "load", "nano"]


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    numerics: str | Numerics | None = None,
    progress: bool = False,
) -> Model:
    """Load a checkpoint directory; see `dsv4lab.model.loading.load`. dtype None is bfloat16 on a GPU, float32 on the CPU."""
    from dsv4lab.model.loading import load as load_model  # imports torch, a second: `dsv4lab --help` should not

    return load_model(path, device=device, dtype=dtype, numerics=numerics, progress=progress)


def backend(name: str, **settings: Any) -> AbstractContextManager[Backend]:
    """Choose what computes operations inside a block; see `dsv4lab.dispatch.backend`."""
    from dsv4lab.dispatch import backend as choose

    return choose(name, **settings)


def nano() -> Path:
    """Directory of the shipped nano model: a small trained V4 in the official checkpoint format. See `dsv4lab.shipped`."""
    from dsv4lab import shipped

    return shipped.unpacked(shipped.NANO)
