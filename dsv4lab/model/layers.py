"""Modules that hold weights: each knows its shape, takes its tensor from a checkpoint, and computes through one operation."""

from __future__ import annotations

import torch
from torch import nn

from dsv4lab import ops
from dsv4lab.formats import BF16, F32, PackedWeight
from dsv4lab.model.numerics import Numerics

_PARTS = ("codes", "scale", "global_scale", "input_scale")


def as_packed(value: torch.Tensor | PackedWeight) -> PackedWeight:
    """A plain float matrix as a packed weight: bf16 stays bf16, any other float becomes f32."""
    if isinstance(value, PackedWeight):
        return value
    return PackedWeight(BF16, value) if value.dtype == torch.bfloat16 else PackedWeight(F32, value.float())


class _PackedModule(nn.Module):
    """The parts of one packed weight as buffers, so that they move with the module; all absent until assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.format = F32
        for part in _PARTS:
            self.register_buffer(part, None)

    @property
    def weight(self) -> PackedWeight:
        return PackedWeight(self.format, *(getattr(self, part) for part in _PARTS))


class Linear(_PackedModule):
    """A weight matrix (rows, columns) in any format, as stored in the checkpoint."""

    def __init__(self, rows: int, columns: int, numerics: Numerics) -> None:
        super().__init__()
        self.rows, self.columns, self.numerics = rows, columns, numerics

    def assign(self, leaf: str, value: torch.Tensor | PackedWeight) -> None:
        """Take the weight; leaf is "weight"."""
        weight = as_packed(value)
        self.format = weight.format
        for part in _PARTS:
            setattr(self, part, getattr(weight, part))

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """x (M, columns) -> (M, rows) of out_dtype, x.dtype where None."""
        return ops.linear(x, self.weight, act=self.numerics.act(self.format), out_dtype=out_dtype)


def both(
    first: Linear, second: Linear, x: torch.Tensor, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What two linears make of one x, in one operation where they quantise it alike."""
    act = first.numerics.act(first.format)
    if act != second.numerics.act(second.format):
        return first(x, out_dtype), second(x, out_dtype)
    return ops.two_linears(x, first.weight, second.weight, act=act, out_dtype=out_dtype)


def share_input_scale(first: _PackedModule, second: _PackedModule) -> None:
    """Of two that quantise one x: the larger calibrated scale of both, as one tensor, by which kernels see that it is one.

    Neither saturates at it. What was not calibrated, in either, stays.
    """
    a, b = first.weight.input_scale, second.weight.input_scale
    if a is not None and b is not None:
        first.input_scale = second.input_scale = torch.maximum(a, b)


class GroupedLinear(Linear):
    """One matrix a group, rows of a group contiguous: the low-rank half of the output projection."""

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """x (M, G, columns) -> (M, G, rows / G)."""
        return ops.grouped_linear(x, self.weight, act=self.numerics.o_a_act(self.format))


class ExpertStack(_PackedModule):
    """The same matrix of every expert, stacked: (E, rows, columns) in one format."""

    def __init__(self, num_experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.num_experts, self.rows, self.columns = num_experts, rows, columns

    def assign(self, expert: int, value: torch.Tensor | PackedWeight) -> None:
        """Copy one expert's matrix into the stack, which the first one allocates."""
        weight = as_packed(value)
        if self.codes is None:
            self.format = weight.format
            for part, tensor in weight.tensors().items():
                setattr(self, part, tensor.new_empty((self.num_experts, *tensor.shape)))
        if set(weight.tensors()) != set(self.weight.tensors()) or weight.format != self.format:
            raise ValueError(
                f"experts of one layer must share a format, got {self.format.name} with {sorted(self.weight.tensors())}, "
                f"then {weight.format.name} with {sorted(weight.tensors())} at expert {expert}"
            )
        for part, tensor in weight.tensors().items():
            stack = getattr(self, part)
            if stack.dtype != tensor.dtype:
                raise ValueError(f"experts of one layer must share a {part} dtype, got {stack.dtype}, then {tensor.dtype}")
            stack[expert].copy_(tensor)


class Weight(nn.Module):
    """A plain tensor called `weight`: a norm's, an embedding's, a router's."""

    weight: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", None)

    def assign(self, leaf: str, value: torch.Tensor) -> None:
        """Take the tensor; leaf is its name."""
        setattr(self, leaf, value)


class HyperConnection(nn.Module):
    """One site's hyper-connection weights, under the checkpoint's names `hc_<site>_fn`, `_base`, `_scale` of its parent."""

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("fn", "base", "scale"):
            self.register_buffer(name, None)

    def assign(self, leaf: str, value: torch.Tensor) -> None:
        """Take fn, base or scale, kept in float32."""
        setattr(self, leaf, value.float())

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.fn, self.base, self.scale
