"""The attention sub-layer as the model runs it, of each kind (SWA, CSA, HCA), at Flash's dims: whole, and each of its kernels.

    prefill      the last 4,096 tokens of a sequence of 16,384
    decode       the last token of each of 1 or 64 sequences of 16,384

Weights are random: NVFP4 with BF16 activations, or FP8 with activations quantised as the official model has them; keys are
FP8, index keys FP4. `parts` of a row are the operations that the layer called, in its order, each timed alone in a graph of its
own on the same arguments; parts_us is their sum, which launches that overlap make larger than `us`.

Bound: the bytes of the weights, and of the keys and index keys that are read, over copy bandwidth, or the flops of products,
attention and index scores over the BF16 rate, whichever is longer; of a part, with its inputs and its result.
cosine and worst_row: against the same layer on the reference; rows whose choice of entries differs by rounding are the worst.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks import common, operations
from benchmarks.common import Bench, Call, Failure, Timing, attempt
from benchmarks.linear import prepared_shape, random_weight
from benchmarks.operations import BLOCK
from benchmarks.work import Shape, again, bytes_of, flops_of, kept_bytes, name_of
from dsv4lab import ops
from dsv4lab.config import CSA, HCA, SWA
from dsv4lab.dispatch import MissingKernel, backend
from dsv4lab.kernels._common.launch import runtime_of
from dsv4lab.kernels.gemm.mixed import prepared as prepared_weights
from dsv4lab.model.attention import Attention, Compressor
from dsv4lab.model.cache import Batch, Cache, LayerCache
from dsv4lab.model.layers import Linear, Weight
from dsv4lab.model.numerics import OFFICIAL, Numerics

FORMATS = {
    "nvfp4": Numerics("weights only", False, False, kv_record="fp8", index_record="fp4"),
    "fp8_block": OFFICIAL,
}
_MOST_COPIES = 6
KINDS = (SWA, CSA, HCA)
SHAPES = tuple(
    Shape(f"flash {kind.lower()} layer, {step}", kind, seqs, tokens)
    for step, seqs, tokens in (("prefill", 1, 4096), ("decode 1", 1, 1), ("decode 64", 64, 1))
    for kind in KINDS
)
QUICK = ("flash csa layer, prefill", "flash csa layer, decode 1", "flash hca layer, decode 64")


def cases(*, quick: bool) -> Iterator[tuple[Shape, str]]:
    for fmt in ("nvfp4",) if quick else FORMATS:
        for shape in SHAPES:
            if not quick or shape.name in QUICK:
                yield shape, fmt


def label(shape: Shape, fmt: str) -> str:
    """What `--match` looks at."""
    return f"{shape.name} {fmt}"


# ---- the layer ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layer:
    """A module with random weights, a cache full of random keys, and a step."""

    module: Attention
    cache: LayerCache
    batch: Batch
    x: torch.Tensor

    @classmethod
    def make(cls, shape: Shape, fmt: str, device: str) -> Layer:
        numerics = FORMATS[fmt]
        module = Attention(shape.config, shape.kind, numerics)
        fill_weights(module, fmt, device)
        module.to(device)
        cache, batch = filled_cache(shape, numerics, device)
        x = torch.randn(shape.rows, shape.config.hidden_size, device=device).bfloat16()
        return cls(module, cache.layers[0], batch, x)

    def __call__(self) -> torch.Tensor:
        """What is measured."""
        return self.module(self.x, self.batch, self.cache)

    def on_reference(self) -> torch.Tensor:
        """The same by the reference, on a copy of the cache."""
        with backend("reference"):
            return self.module(self.x, self.batch, deepcopy(self.cache))

    def observed(self) -> list[ops.Call]:
        """The operations that it calls; those without a kernel run on the reference."""
        with ops.observe() as calls:
            self()
        return calls


def fill_weights(module: Attention, fmt: str, device: str) -> None:
    """Matrices of `fmt`; those of compressors and of the indexer's head weights are BF16, as in checkpoints."""
    plain = {id(child) for part in module.modules() if isinstance(part, Compressor) for child in part.modules()}
    if hasattr(module, "indexer"):
        plain.add(id(module.indexer.weights_proj))
    for child in module.modules():
        if isinstance(child, Linear):
            child.assign("weight", random_weight("bf16" if id(child) in plain else fmt, child.rows, child.columns, device))
        elif isinstance(child, Compressor):
            rows = 2 * child.ratio if child.overlap else child.ratio
            child.assign("ape", torch.randn(child.ratio, child.wkv.rows, device=device) * 0.1 * rows**-0.5)
            child.norm.assign("weight", operations.norm_weight(child.wkv.rows // (2 if child.overlap else 1), device))
    config = module.config
    module.q_norm.assign("weight", operations.norm_weight(config.q_lora_rank, device))
    module.kv_norm.assign("weight", operations.norm_weight(config.head_dim, device))
    module.assign("attn_sink", torch.randn(config.num_attention_heads, device=device))
    assert all(child.weight is not None for child in module.modules() if isinstance(child, Weight))


def filled_cache(shape: Shape, numerics: Numerics, device: str, *, fixed: bool = False) -> tuple[Cache, Batch]:
    """A cache of one layer, full of random keys, and the step of the shape's tokens. fixed: as a CUDA graph needs it."""
    cache = Cache(
        shape.config,
        numerics,
        max_seqs=shape.seqs,
        max_tokens=shape.seqs * shape.context,
        max_step=max(shape.tokens, BLOCK),
        max_rewind=0,
        dtype=torch.bfloat16,
        device=device,
    )
    seqs = [cache.open() for _ in range(shape.seqs)]
    before = shape.context - shape.tokens
    for start in range(0, before, BLOCK):  # in turn, so that a sequence's blocks do not lie side by side
        for seq in seqs:
            cache.reserve(seq, min(BLOCK, before - start))
            cache.advance(seq, min(BLOCK, before - start))
    for seq in seqs:
        cache.reserve(seq, shape.tokens)
    if before:
        fill_cache(cache, shape.kind, device)
    return cache, Batch.plan(cache, [(seq, [0] * shape.tokens) for seq in seqs], fixed=fixed)


def fill_cache(cache: Cache, kind: str, device: str) -> None:
    """Random keys in all pages, random numbers in the compressors' rings."""
    layer, numerics = cache.layers[0], cache.numerics
    layer.window_pages = operations.pages_of(numerics.kv_record, layer.window_pages.shape[0], 64, device)
    if layer.entry_pages is not None:
        size = cache.page_size(kind)
        layer.entry_pages = operations.pages_of(numerics.kv_record, layer.entry_pages.shape[0], size, device)
        if layer.index_pages is not None:
            count = layer.index_pages.shape[0]
            layer.index_pages = operations.pages_of(numerics.index_record, count, size, device, index=True)
    for state in (layer.state, layer.index_state):
        if state is not None:
            state.normal_()


def touch(shape: Shape, fmt: str) -> None:
    """The layer on tensors without memory, then its kernels: asks for those that the measurement will."""
    ask_again(Layer.make(shape, fmt, "meta").observed())


def ask_again(calls: Sequence[ops.Call]) -> None:
    """Make observed calls of kernels on tensors without memory. Raises MissingKernel, once all have been asked for."""
    missing = []
    with mock.patch.object(prepared_weights, "prepare", prepared_shape):
        for call in calls:
            try:
                again(call)
            except MissingKernel as error:
                missing.append(str(error))
    if missing:
        raise MissingKernel("; ".join(dict.fromkeys(missing)))


# ---- rows --------------------------------------------------------------------------------------------------------------
def run(bench: Bench) -> None:
    """All rows. Raises Broken."""
    for shape, fmt in cases(quick=bench.quick):
        if not bench.wants(label(shape, fmt)):
            continue
        try:
            measure(bench, shape, fmt)
        except Exception as error:
            bench.failed(shape.name, {"m": shape.rows, "format": fmt}, error)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(bench: Bench, shape: Shape, fmt: str, device: str = "cuda") -> None:
    first = Layer.make(shape, fmt, device)
    fields: dict[str, Any] = {"m": shape.rows, "format": fmt, "context": shape.context}
    want = first.on_reference()
    made = [first.observed()]
    nbytes = sum(kept_bytes(shape, call) for call in made[0])
    flops = sum(flops_of(shape, call) for call in made[0])
    layers = [first]
    while len(layers) < min(_MOST_COPIES, operations.cold_copies(nbytes)):
        layers.append(Layer.make(shape, fmt, device))
        made.append(layers[-1].observed())
    ours = attempt(lambda: our_calls(layers, want, fields))
    fields |= parts_fields(bench, shape, made)
    row = bench.measure(shape.name, fields, {"ours": ours}, nbytes=nbytes, flops=flops)
    print_parts(row, fields["parts"])


def our_calls(layers: Sequence[Layer], want: torch.Tensor, fields: dict[str, Any]) -> list[Call]:
    """After a first call, whose kernels and figures go into the fields. Raises MissingKernel."""
    with backend("kernel"), common.seeing(layers[0].x) as names:
        y = layers[0]()
    fields.update(operations.accuracy_fields(y, want))
    fields.update(common.kernel_fields(common.kernels_of(names, runtime_of(y).arch)))
    return [partial(_on_kernels, layer) for layer in layers]


def _on_kernels(layer: Layer) -> torch.Tensor:
    with backend("kernel"):
        return layer()


def parts_fields(bench: Bench, shape: Shape, made: Sequence[Sequence[ops.Call]]) -> dict[str, Any]:
    """The table of a layer's operations: `made` by each of its copies."""
    parts = list(zip(*made, strict=True))
    bounds = [bench.ceilings.bound_us(bytes_of(shape, same[0]), flops_of(shape, same[0])) for same in parts]
    candidates = {
        str(i): common.repeated([partial(again, call) for call in same], bounds[i][0]) for i, same in enumerate(parts)
    }
    times: dict[str, Timing | Failure] = bench.stopwatch.measure(candidates)
    table = []
    for i, (same, (bound, which)) in enumerate(zip(parts, bounds, strict=True)):
        row: dict[str, Any] = {"part": name_of(same[0]), "us": None, "percent_of_bound": None, "bound": which}
        time = times[str(i)]
        if isinstance(time, Timing):
            row |= {"us": round(time.best_us, 3), "percent_of_bound": round(100 * bound / time.best_us, 1)}
        else:
            row["reason"] = time.reason
        table.append(row)
    known = [row["us"] for row in table if row["us"] is not None]
    return {"parts": table, "parts_us": round(sum(known), 3) if len(known) == len(table) else None}


def print_parts(row: dict[str, Any], parts: Sequence[dict[str, Any]]) -> None:
    for part in parts:
        if part["us"] is None:
            print(f"    {part['part']:34} failed  {part['reason']}", flush=True)
        else:
            share = "" if row["us"] is None else f"{100 * part['us'] / row['us']:5.1f}% of the layer"
            print(
                f"    {part['part']:34} {part['us']:8.2f} us  {part['percent_of_bound']:5.1f}% {part['bound']:5}  {share}",
                flush=True,
            )
