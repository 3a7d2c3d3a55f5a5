"""Element types that kernels take and give, by the names configurations have for them."""

from __future__ import annotations

import torch

ELEMENT = {torch.bfloat16: "bf16", torch.float32: "f32"}
FLOATS = tuple(ELEMENT)
