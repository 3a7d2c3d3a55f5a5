"""What the calls of a layer's operations must do at least: the bytes that they move and the flops of their products.

Calls are those that `ops.observe()` sees. Weights count whole, but of experts only those that tokens are sent to; of a paged
cache the keys that a step may see, whatever the pools hold or a launch is prepared for; inputs and results as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import operations
from benchmarks.operations import FLASH, INDEX_DIM, WINDOW, record_bytes
from dsv4lab import ops
from dsv4lab.config import SCORE, ModelConfig

# what a call reads beside weights and pages, by the names of its arguments; of an operation that is not here, nothing
_MOVED = {
    "linear": ("x",),
    "two_linears": ("x",),
    "grouped_linear": ("x",),
    "rmsnorm": ("x",),
    "q_norm_rope": ("q",),
    "inverse_rope": ("x",),
    "inverse_rope_fp8": ("x",),
    "inverse_rope_nvfp4": ("x",),
    "cache_write": ("x",),
    "compress": ("values", "scores"),
    "index_query": ("q",),
    "index_scores": ("q", "head_weights"),
    "attention": ("q", "topk_indices"),
    "mhc_pre": ("streams",),
    "mhc_post_pre": ("y", "streams", "post", "comb"),
    "mhc_post": ("y", "streams", "post", "comb"),
    "router_topk": ("x",),
    "router_hash": ("x",),
    "moe_layer": ("x",),
}
_WEIGHTS = ("fn", "gate_weight")  # arguments that are weights by themselves
_PARTS = ("codes", "scale", "global_scale")  # and those that are parts of packed ones


@dataclass(frozen=True)
class Shape:
    """tokens: the last ones of each of `seqs` sequences of `context` tokens, in one step."""

    name: str
    kind: str
    seqs: int
    tokens: int
    context: int = 16384
    model: ModelConfig = FLASH

    @property
    def rows(self) -> int:
        return self.seqs * self.tokens

    @property
    def config(self) -> ModelConfig:
        """Of a model of one such layer."""
        return replace(self.model, layer_kinds=(self.kind,), router_kinds=(SCORE,), num_nextn_predict_layers=0)

    @property
    def ratio(self) -> int:
        return self.model.ratio(self.kind)

    @property
    def entries(self) -> int:
        """Compressed entries that a sequence's last token may see."""
        return self.context // self.ratio if self.ratio else 0


# ---- calls -------------------------------------------------------------------------------------------------------------
def again(call: ops.Call) -> Any:
    """The kernel of an observed call, on its arguments."""
    schema = getattr(torch.ops.dsv4lab, call.name).default._schema
    args = [call.inputs[a.name] for a in schema.arguments if not a.kwarg_only]
    return operations.call(call.name, *args, **{a.name: call.inputs[a.name] for a in schema.arguments if a.kwarg_only})


def name_of(call: ops.Call) -> str:
    """The operation, with its matrix where it has one."""
    if call.name == "compress":
        return f"{call.name} {call.inputs['key']}"
    if call.name not in ("linear", "grouped_linear"):
        return call.name
    columns = call.inputs["x"].shape[-1]
    return f"{call.name} {call.inputs['codes'].shape[0]}x{columns} {call.inputs['fmt']}"


def kept_bytes(shape: Shape, call: ops.Call) -> float:
    """Of weights and of keys that a call must read, or write."""
    given = call.inputs
    if call.name == "moe_layer":
        return sum(expert_bytes(call))
    if "codes" in given:
        return _packed_bytes(given)
    if call.name == "attention":
        entries = shape.entries
        if shape.tokens == 1 and given["topk_indices"] is not None:
            entries = min(entries, given["topk_indices"].shape[1])
        before = min(WINDOW - 1, shape.context - shape.tokens)
        return float(shape.seqs * (before + shape.tokens + entries) * record_bytes(given["record"]))
    if call.name == "index_scores":
        return float(shape.seqs * shape.entries * record_bytes(given["record"], INDEX_DIM))
    if call.name == "cache_write":
        return float(shape.rows * record_bytes(given["record"]))
    if call.name == "compress":
        done = shape.rows // shape.ratio if shape.tokens > 1 else shape.seqs * (shape.context % shape.ratio == 0)
        dim = given["norm_weight"].shape[0]
        return float(done * record_bytes(given["record"], dim))
    return float(sum(given[name].nbytes for name in _WEIGHTS if name in given))


def _packed_bytes(given: dict[str, Any]) -> float:
    """Of one packed weight, or of a list of them."""
    tensors = [t for part in _PARTS for t in (given[part] if isinstance(given[part], list) else [given[part]])]
    return float(sum(t.nbytes for t in tensors if t is not None))


def experts_hit(call: ops.Call) -> int:
    """Experts that any token of a call of `moe_layer` is sent to."""
    return int(call.inputs["expert_idx"].unique().numel())


def expert_bytes(call: ops.Call) -> tuple[float, float]:
    """Packed bytes of the routed experts that a call of `moe_layer` hits, and of the shared one."""
    routed, shared = ({part: call.inputs[part][of] for part in _PARTS} for of in (slice(3), slice(3, 6)))
    return _packed_bytes(routed) * experts_hit(call) / routed["codes"][0].shape[0], _packed_bytes(shared)


def expert_flops(shape: Shape, call: ops.Call) -> tuple[float, float]:
    """Of the routed experts of a call of `moe_layer`, and of the shared one."""
    given = call.inputs
    once = 6.0 * shape.rows * given["x"].shape[1]
    return once * given["expert_idx"].shape[1] * given["codes"][0].shape[-2], once * given["codes"][3].shape[-2]


def moved_bytes(shape: Shape, call: ops.Call) -> float:
    """Of inputs and results; of scores those of entries that there are."""
    if call.name == "index_topk":
        return 4.0 * shape.rows * shape.entries + call.output.nbytes
    results = call.output if isinstance(call.output, tuple) else (call.output,)
    if call.name == "index_scores":
        results = (call.output[:, : shape.entries],)
    given = [call.inputs[name] for name in _MOVED.get(call.name, ())]
    return float(sum(part.nbytes for part in (*given, *results) if part is not None))


def bytes_of(shape: Shape, call: ops.Call) -> float:
    """All that a call by itself must read and write."""
    return kept_bytes(shape, call) + moved_bytes(shape, call)


def flops_of(shape: Shape, call: ops.Call) -> float:
    given = call.inputs
    last = range(shape.context - shape.tokens + 1, shape.context + 1)
    if call.name == "moe_layer":
        return sum(expert_flops(shape, call))
    if "codes" in given:
        codes = given["codes"] if isinstance(given["codes"], list) else [given["codes"]]
        return 2.0 * shape.rows * sum(part.shape[0] for part in codes) * given["x"].shape[-1]
    if call.name == "attention":
        seen = [n // shape.ratio if shape.ratio else 0 for n in last]
        most = shape.context if given["topk_indices"] is None else given["topk_indices"].shape[1]
        keys = sum(min(n, WINDOW) + min(entries, most) for n, entries in zip(last, seen, strict=True))
        return 4.0 * shape.seqs * keys * given["q"].shape[1] * given["q"].shape[2]
    if call.name == "index_scores":
        return 2.0 * shape.seqs * sum(n // shape.ratio for n in last) * given["q"].shape[1] * given["q"].shape[2]
    if call.name in ("mhc_pre", "mhc_post_pre"):
        return 2.0 * shape.rows * given["fn"].numel()
    if "gate_weight" in given:
        return 2.0 * shape.rows * given["gate_weight"].numel()
    return 0.0


# ---- parts of experts --------------------------------------------------------------------------------------------------
def layer_parts(shape: Shape, call: ops.Call, *, apart: bool) -> dict[str, tuple[float, float]]:
    """`expert_parts` of a call of `moe_layer`. apart: the shared expert has products of its own."""
    weights, flops = expert_bytes(call), expert_flops(shape, call)
    x, top_k = call.inputs["x"], call.inputs["expert_idx"].shape[1]
    if not apart:
        return expert_parts(shape.rows, top_k, x.shape[1], sum(weights), sum(flops))
    return {
        "shared product 1": (weights[1] * 2 / 3, flops[1] * 2 / 3),
        "shared product 2": (weights[1] / 3, flops[1] / 3),
        **expert_parts(shape.rows, top_k, x.shape[1], weights[0], flops[0]),
    }


def expert_parts(tokens: int, top_k: int, d: int, weights: float, flops: float) -> dict[str, tuple[float, float]]:
    """Bytes and flops of the steps from routed tokens to their sums: of experts with `weights` bytes that are hit.

    Rows are BF16, d wide. Results of the first product and operands of the second are not counted: weights are what binds
    where bytes do.
    """
    rows, row = tokens * top_k, 2.0 * d
    return {
        "permute": (16.0 * rows, 0.0),
        "gather": (rows * (row + 4.0) + tokens * row, 0.0),
        "product 1": (weights * 2 / 3, flops * 2 / 3),
        "product 2": (weights / 3, flops / 3),
        "combine": (rows * (row + 4.0) + 2 * tokens * row, 0.0),
    }
