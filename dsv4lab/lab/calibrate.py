"""Calibration: the largest activation that each four-bit matrix is given on a text.

NVFP4 checkpoints carry an `input_scale` a matrix, a constant of calibration that sets the global scale of its input in
W4A4. It comes from running the model, unquantised, over text: here that is done with hooks on the modules that own the
matrices, prediction block included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from dsv4lab import ops
from dsv4lab.formats import NVFP4, PackedWeight
from dsv4lab.model.attention import Attention, Compressor
from dsv4lab.model.checkpoint.inventory import matrix_format, parameters
from dsv4lab.model.layers import Linear
from dsv4lab.model.model import Model
from dsv4lab.model.moe import Experts
from dsv4lab.model.mtp import MTPBlock
from dsv4lab.reference.moe import clamped_swiglu

_EXPERT = re.compile(r"(?P<layer>.*)\.ffn\.experts\.\d+\.(?P<matrix>w[123])\.weight$")
# Their first input is two matrices', which are one operation, no calls of modules.
_TOGETHER: dict[type, tuple[str, ...]] = {Attention: (".wq_a", ".wkv"), Compressor: (".wkv", ".wgate")}
_CHUNK_TOKENS = 1024  # tokens of text run as one prompt; longer ones cost more and show the matrices nothing new


class _Amax:
    """Running maxima of absolute values, by matrix name."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def see(self, name: str, x: torch.Tensor) -> None:
        if x.numel():
            self.values[name] = max(self.values.get(name, 0.0), float(x.abs().max()))


def measure_input_amax(model: Model, token_ids: Sequence[int], *, layout: str, progress: bool = False) -> dict[str, float]:
    """Largest input magnitude of every matrix that `layout` stores as NVFP4, by its canonical `.weight` name.

    model: loaded with numerics "exact"; token_ids: the calibration text, run in chunks. Experts that no token of it reaches
    get the largest value of the same projection in their layer, as spec 11.2 has it; other matrices that only saw zeros are
    left out. Raises ValueError for an empty text or a layout without NVFP4 matrices.
    """
    known = parameters(model.config)
    wanted = {name for name, p in known.items() if p.is_matrix and matrix_format(layout, name, p) is NVFP4}
    if not wanted:
        raise ValueError(f"layout must store matrices as nvfp4 to be calibrated, got {layout!r}")
    if not len(token_ids):
        raise ValueError("the calibration text must hold at least one token, got none")
    seen = _Amax()
    handles = [
        module.register_forward_pre_hook(_hook(name, module, seen))
        for name, module in model.named_modules()
        if isinstance(module, Linear | Experts | Attention | Compressor)
    ]
    for name, module in model.named_modules():
        if isinstance(module, MTPBlock):
            _watch_predictions(name, module, seen)
    num_drafts = 1 if len(model.mtp) else 0
    chunk_len = min(_CHUNK_TOKENS, model.config.max_position_embeddings - 2)
    try:
        starts = range(0, len(token_ids), chunk_len)
        for start in tqdm(starts, desc="calibrating", unit="chunk", disable=None if progress else True):
            # two new tokens make the prediction block catch up with the whole prompt
            chunk = list(token_ids[start : start + chunk_len])
            model.complete([chunk], max_new_tokens=2, stop_ids=(), num_drafts=num_drafts)
    finally:
        for handle in handles:
            handle.remove()
        for block in model.mtp:
            del block.predict  # the class's own again
    found = {name: amax for name, amax in seen.values.items() if name in wanted and amax > 0}
    return dict(sorted((found | _unreached_experts(found, wanted)).items()))


def _watch_predictions(name: str, block: MTPBlock, seen: _Amax) -> None:
    """The prediction block's two input projections run inside one operation, out of reach of module hooks."""
    plain, eps = block.predict, block.config.rms_norm_eps

    def predict(streams: torch.Tensor, embedding: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.see(f"{name}.e_proj.weight", ops.rmsnorm(embedding, block.enorm.weight, eps=eps))
        seen.see(f"{name}.h_proj.weight", ops.rmsnorm(streams, block.hnorm.weight, eps=eps))
        return plain(streams, embedding, *rest)

    block.predict = predict  # type: ignore[method-assign,assignment]


def _unreached_experts(found: dict[str, float], wanted: set[str]) -> dict[str, float]:
    """Values for routed experts without one: the experts of a layer are stored alike, all with an input_scale or none."""
    largest: dict[str, float] = {}
    for name, amax in found.items():
        if match := _EXPERT.match(name):
            key = f"{match['layer']} {match['matrix']}"
            largest[key] = max(largest.get(key, 0.0), amax)
    out = {}
    for name in wanted - found.keys():
        if (match := _EXPERT.match(name)) and (key := f"{match['layer']} {match['matrix']}") in largest:
            out[name] = largest[key]
    return out


def _hook(name: str, module: torch.nn.Module, seen: _Amax) -> Any:
    def linear(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        for leaf in _TOGETHER.get(type(module), ("",)):
            seen.see(f"{name}{leaf}.weight", args[0])

    def expert(
        prefix: str, x: torch.Tensor, matrices: Sequence[PackedWeight], limit: float, row_weight: torch.Tensor | None
    ) -> None:
        w1, w3 = matrices
        hidden = clamped_swiglu(ops.linear(x.float(), w1, act="none"), ops.linear(x.float(), w3, act="none"), limit=limit)
        seen.see(f"{prefix}.w1.weight", x)
        seen.see(f"{prefix}.w3.weight", x)
        seen.see(f"{prefix}.w2.weight", hidden if row_weight is None else hidden * row_weight)

    def experts(owner: Any, args: tuple[Any, ...]) -> None:
        x, weights, expert_idx, shared = args
        expert(f"{name.removesuffix('experts')}shared_experts", x, (shared.w1.weight, shared.w3.weight), owner.limit, None)
        for index in expert_idx.unique().tolist():
            rows, places = (expert_idx == index).nonzero(as_tuple=True)
            matrices = (owner.w1.weight[index], owner.w3.weight[index])
            expert(f"{name}.{index}", x[rows], matrices, owner.limit, weights[rows, places, None])

    return experts if isinstance(module, Experts) else linear
