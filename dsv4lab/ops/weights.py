"""Packed weights as operator arguments: torch.library knows tensors and scalars only."""

from typing import Optional

import torch
from torch import Tensor

from dsv4lab.formats import PackedWeight, get_format


def packed(
    fmt: str, codes: Tensor, scale: Optional[Tensor], global_scale: Optional[Tensor], input_scale: Optional[Tensor]
) -> PackedWeight:
    """The packed weight that an operator was given in parts: fmt a format's name, parts as in `PackedWeight`, not checked.

    Raises ValueError for another name.
    """
    return PackedWeight(get_format(fmt), codes, scale, global_scale, input_scale)


def flat(weight: PackedWeight) -> tuple[str, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """A packed weight as operator arguments, in the order `packed` takes them."""
    return weight.format.name, weight.codes, weight.scale, weight.global_scale, weight.input_scale


def pack_all(*weights: PackedWeight) -> tuple[str, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Several packed weights as operator arguments; a part that a format lacks is an empty tensor."""
    empty = weights[0].codes.new_empty(0, dtype=torch.float32)
    parts = [[getattr(w, name) for w in weights] for name in ("codes", "scale", "global_scale", "input_scale")]
    filled = [[empty if t is None else t for t in part] for part in parts]
    return ",".join(w.format.name for w in weights), filled[0], filled[1], filled[2], filled[3]
