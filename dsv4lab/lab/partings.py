"""Two greedy texts of one prompt: are they the same, up to a place where rounding decides?

Kernels sum in an order that depends on how many tokens they are given, and round to BF16 in between. So two ways to make a text
may part where two logits are closer than kernels and reference are; there, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dsv4lab.dispatch import backend

if TYPE_CHECKING:
    from dsv4lab.model.model import Model


def logits(model: Model, ids: Sequence[int], by: str) -> torch.Tensor:
    """Of a text, (S, V) f32, computed by a backend."""
    with backend(by):
        return model.logits(ids)[0]


def difference(kernel: torch.Tensor, plain: torch.Tensor, *, of_text: bool = False) -> torch.Tensor:
    """The largest, of kernels' and reference's logits (S, V), at each of a text's places; of_text: at any of them. That is for
    four-bit activations: a code that rounding turns is rare, and decode need not turn those that prefill does."""
    error = (kernel - plain).abs().amax(-1)
    return error.max().expand_as(error) if of_text else error


def parted_by_rounding(
    model: Model, prompt: Sequence[int], a: Sequence[int], b: Sequence[int], *, of_text: bool = False
) -> bool:
    """Whether two texts are the same up to a place where kernels and reference differ by more than the two tokens do.

    prompt, and what follows it in each: token ids. Both tokens must be the likeliest there, as far as that can be told. A text
    that parts from the other costs two forward passes, on a GPU.
    """
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:
        return list(a) == list(b)
    ids = [*prompt, *a[:at]]
    kernel, plain = (logits(model, ids, by)[len(prompt) - 1 :] for by in ("kernel", "reference"))
    error, plain = float(difference(kernel, plain, of_text=of_text)[-1]), plain[-1]
    gap = float((plain[a[at]] - plain[b[at]]).abs())
    return gap <= 2 * error + 1e-3 * float(plain.std()) and bool(plain[[a[at], b[at]]].min() >= plain.max() - 2 * error - gap)
