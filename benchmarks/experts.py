"""The MoE layer at Flash's and Pro's shapes, NVFP4 experts: the whole of it, then its parts, each in a graph of its own.

    layer            router_topk, moe_layer: all experts and their sum
    experts          without router and shared expert
    router, router_hash (by token id), permute, gather (many tokens), product 1 (with SwiGLU), product 2, combine, shared
    moe_combine      by itself: the layer adds all in one launch

A token's shared expert is one more matrix of both products, otherwise it runs beside them, in launches of its own.
Then layer and experts alone with weights in MXFP4 and FP8 blocks, and "w4a4": NVFP4 weights with both products' activations
quantised to NVFP4, whose launches count and whose errors are against unquantised activations.

Bound of layer and experts: packed bytes of the experts that are hit, and of the shared one, over copy bandwidth, or
6 M top_k D I flops (and 6 M D I of the shared one) over the BF16 rate, whichever is longer. Inputs take turns: each hits
experts of its own. Peers multiply decoded BF16 weights:

    grouped_mm_bf16  torch's grouped product, twice, SwiGLU by torch between; rows are sorted beforehand, nothing is combined
    eager_loop_bf16  few tokens: an expert after the other, its number known to the host, summed

Both leave router, permutation and shared expert out, to their advantage. `peer_experts`: where BF16 weights of all experts do
not fit, of how many there are; ids are then taken modulo that number: the peer's groups are larger and its bytes fewer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks import common, work
from benchmarks.common import Bench, Call, Failure, attempt
from benchmarks.linear import LIMIT, prepared_shape, random_weight
from benchmarks.operations import FLASH as FLASH_MODEL
from dsv4lab.formats import PackedWeight
from dsv4lab.kernels._common.aside import starting
from dsv4lab.kernels._common.launch import runtime_of
from dsv4lab.kernels.gemm.mixed import prepared as prepared_weights
from dsv4lab.kernels.gemm.mixed.prepared import prepared
from dsv4lab.kernels.moe import experts as experts_module
from dsv4lab.kernels.moe.combine.api import moe_combine
from dsv4lab.kernels.moe.experts import experts, shared_expert
from dsv4lab.kernels.moe.router.api import router_hash, router_topk
from dsv4lab.reference import moe as reference
from dsv4lab.reference import quant

ROUTE_SCALE = 1.5
SCALES = {"nvfp4": 1 / 2 + 1 / 16, "mxfp4": 1 / 2 + 1 / 32, "fp8_block": 1 + 1 / 128**2}  # bytes of a weight, with its scale's
_VOCAB = FLASH_MODEL.vocab_size  # rows of the table of `router_hash`
# what `kernels.moe.experts` calls, and the name of that part here
_CALLED = {"permute": "permute", "gather_rows": "gather", "grouped": "product", "combine": "combine"}
_UP_SCALE = 0.7  # of up's global scale against gate's: the kernel has to take both
_LOOP_TOKENS = 8  # up to which the eager loop is run
_MOST_INPUTS = 6
_SPARE_BYTES = 14e9  # that peers' weights leave free
_ORACLE_TOKENS = 8


@dataclass(frozen=True)
class Model:
    """experts of d x inner, top_k of them a token; tokens: how many are measured; fmt: of weights; act: of activations.

    parts: whether they have rows of their own.
    """

    name: str
    experts: int
    d: int
    inner: int
    tokens: tuple[int, ...]
    top_k: int = 6
    fmt: str = "nvfp4"
    act: str = "none"
    parts: bool = True

    @property
    def expert_bytes(self) -> float:
        """Packed, with block scales."""
        return 3 * self.d * self.inner * SCALES[self.fmt]

    @property
    def dense_bytes(self) -> float:
        """Of one expert in BF16."""
        return 6.0 * self.d * self.inner


FLASH = Model("flash", 256, 4096, 2048, (1, 3, 8, 16, 64, 129, 1024, 4097, 8192))
PRO = Model("pro", 384, 7168, 3072, (1, 64, 129, 4097, 8192))
OTHERS = tuple(
    replace(FLASH, name=f"flash {name}", tokens=(1, 64, 8192), fmt=fmt, act=act, parts=False)
    for name, fmt, act in (("w4a4", "nvfp4", "nvfp4"), ("mxfp4", "mxfp4", "none"), ("fp8_block", "fp8_block", "none"))
)
MODELS = (FLASH, PRO, *OTHERS)
QUICK_TOKENS = (1, 64, 8192)


@dataclass(frozen=True)
class Layer:
    """Weights of a layer. shared: copies of (w1, w3, w2), so that they are cold."""

    model: Model
    gate_weight: torch.Tensor
    bias: torch.Tensor
    w1: PackedWeight
    w3: PackedWeight
    w2: PackedWeight
    shared: tuple[tuple[PackedWeight, PackedWeight, PackedWeight], ...]

    @classmethod
    def make(cls, model: Model, device: str, copies: int = _MOST_INPUTS) -> Layer:
        d, inner = model.d, model.inner

        def three(*stack: int) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
            w1, w3, w2 = (random_weight(model.fmt, n, k, device, *stack) for n, k in ((inner, d), (inner, d), (d, inner)))
            if w3.global_scale is not None:
                w3.global_scale = w3.global_scale * _UP_SCALE
            return w1, w3, w2

        gate = (torch.randn(model.experts, d, device=device) * d**-0.5).bfloat16()
        bias = 0.01 * torch.randn(model.experts, device=device)
        return cls(model, gate, bias, *three(model.experts), tuple(three() for _ in range(copies)))

    def prepare(self) -> None:
        """Bring the weights into the kernels' order, one after the other: each takes three times its size for a while."""
        prepared(self.w1, self.w3)
        if self.gate_weight.is_cuda:
            torch.cuda.empty_cache()
        prepared(self.w2)
        for w1, w3, w2 in self.shared:
            prepared(w1, w3)
            prepared(w2)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return router_topk(x, self.gate_weight, self.bias, top_k=self.model.top_k, route_scale=ROUTE_SCALE)

    def hashed(self, x: torch.Tensor, table: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return router_hash(x, self.gate_weight, table, token_ids, route_scale=ROUTE_SCALE)

    @property
    def three(self) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
        """Of the routed experts."""
        return self.w1, self.w3, self.w2

    def routed(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return experts(x, weights, ids, *self.three, limit=LIMIT, act=self.model.act)

    def all(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, copy: int = 0) -> torch.Tensor:
        shared, act = self.shared[copy % len(self.shared)], self.model.act
        return experts_module.layer(x, weights, ids, self.three, shared, limit=LIMIT, act=act, shared_act=act)

    def together(self, x: torch.Tensor, ids: torch.Tensor) -> bool:
        """Whether products are those of the shared expert, too."""
        act = self.model.act
        return experts_module.together(x, ids, self.three, self.shared[0], act=act, shared_act=act)

    def share(self, x: torch.Tensor, copy: int = 0) -> torch.Tensor:
        return shared_expert(x, *self.shared[copy % len(self.shared)], limit=LIMIT, act=self.model.act)

    def __call__(self, x: torch.Tensor, copy: int = 0) -> torch.Tensor:
        """What is measured: the whole layer, the shared expert beside the rest, as `dsv4lab.model.moe` runs it."""
        with starting(x.device):
            return self.all(x, *self.route(x), copy)


@dataclass(frozen=True)
class Step:
    """One input and its routing. made: the calls that routed experts make for it in the layer, with their arguments."""

    layer: Layer
    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    made: list[tuple[str, Call]]

    @classmethod
    def of(cls, layer: Layer, x: torch.Tensor, copy: int = 0) -> Step:
        weights, ids = layer.route(x)
        with recording() as made:
            layer.all(x, weights, ids, copy)
        return cls(layer, x, weights, ids, made)


@contextmanager
def recording() -> Iterator[list[tuple[str, Call]]]:
    """Keeps the calls of kernels that `kernels.moe.experts` makes inside, to be made again; their arguments stay alive."""
    made: list[tuple[str, Call]] = []

    def keeping(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **how: Any) -> Any:
            made.append((name, lambda: function(*args, **how)))
            return function(*args, **how)

        return call

    with ExitStack() as stack:
        for name in _CALLED:
            function = getattr(experts_module, name, None)
            if function is not None:
                stack.enter_context(mock.patch.object(experts_module, name, keeping(name, function)))
        yield made


def named(made: Sequence[tuple[str, Call]]) -> dict[str, Call]:
    """Parts by what they are: grouped products by their order. Raises ValueError where the experts work in another way."""
    products = [call for name, call in made if name == "grouped"]
    if len(products) != 2:
        raise ValueError(f"experts must call `grouped` twice, called {', '.join(name for name, _ in made)}")
    rest = {_CALLED[name]: call for name, call in made if name != "grouped"}
    return rest | {"product 1": products[0], "product 2": products[1]}


def cases(*, quick: bool) -> Iterator[tuple[Model, int]]:
    for model in MODELS[:1] if quick else MODELS:
        for m in QUICK_TOKENS if quick else model.tokens:
            yield model, m


def label(model: Model, m: int) -> str:
    """What `--match` looks at."""
    return f"{model.name} {m} tokens"


def touch(model: Model, m: int) -> None:
    """The layer on tensors without memory: asks for the kernels that the measurement will."""
    layer = Layer.make(model, "meta", copies=1)
    with mock.patch.object(prepared_weights, "prepare", prepared_shape):
        x = torch.empty(m, model.d, dtype=torch.bfloat16, device="meta")
        layer(x)
        if model.parts:
            layer.hashed(x, *hash_table(model, m, "meta"))


def hash_table(model: Model, m: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, top_k) i64, of each row experts that differ, and m token ids."""
    first = torch.randint(model.experts, (_VOCAB, 1))
    table = (first + torch.arange(model.top_k) * (model.experts // model.top_k)) % model.experts
    return table.to(device), torch.randint(_VOCAB, (m,)).to(device)


# ---- rows --------------------------------------------------------------------------------------------------------------
def run(bench: Bench) -> None:
    """All rows. Raises Broken."""
    for model in MODELS[:1] if bench.quick else MODELS:
        tokens = [m for of, m in cases(quick=bench.quick) if of is model and bench.wants(label(model, m))]
        if not tokens:
            continue
        try:
            layer = Layer.make(model, "cuda")
            layer.prepare()
            torch.cuda.empty_cache()
            dense = attempt_dense(layer)
        except Exception as error:
            bench.failed(f"{model.name} layer", {"format": model.fmt}, error)
            continue
        for m in tokens:
            measure(bench, layer, dense, m)
        del layer, dense
        gc.collect()
        torch.cuda.empty_cache()


def measure(bench: Bench, layer: Layer, dense: Dense | Failure, m: int, device: str = "cuda") -> None:
    """The rows of one number of tokens."""
    model = layer.model
    base: dict[str, Any] = {
        "format": model.fmt,
        "act": model.act,
        "m": m,
        "n": model.inner,
        "k": model.d,
        "experts": model.experts,
        "top_k": model.top_k,
    }
    name = f"{model.name} layer"
    try:
        count = min(_MOST_INPUTS, common.num_copies(min(m * model.top_k, model.experts) * model.expert_bytes) + 1)
        steps = [Step.of(layer, torch.randn(m, model.d, device=device).bfloat16(), i) for i in range(count)]
        hit = sum(int(step.ids.unique().numel()) for step in steps) / count
        base["experts_hit"] = hit
        with common.seeing(steps[0].x) as names:
            y = layer(steps[0].x)
        kernels = common.kernels_of(names, runtime_of(steps[0].x).arch)
        fields = base | common.kernel_fields(kernels) | accuracy(layer, steps[0], y)
    except Exception as error:
        bench.failed(name, base, error)
        return
    flops, nbytes = 6.0 * m * model.d * model.inner, model.expert_bytes
    whole = dict(nbytes=(hit + 1) * nbytes, flops=(model.top_k + 1) * flops)
    alone = dict(nbytes=hit * nbytes, flops=model.top_k * flops)
    peers = peers_of(model, steps, dense)
    if not isinstance(dense, Failure):
        fields["peer_experts"] = base["peer_experts"] = dense.experts
    layers: list[Call] = [lambda s=s, i=i: layer(s.x, i) for i, s in enumerate(steps)]  # type: ignore[misc]
    routed: list[Call] = [lambda s=s: layer.routed(s.x, s.weights, s.ids) for s in steps]  # type: ignore[misc]
    guarded(bench, name, fields, {"ours": layers, **peers}, **whole)
    guarded(bench, f"{model.name} experts", base, {"ours": routed, **peers}, **alone)
    if model.parts:
        measure_parts(bench, layer, steps, base, alone)
        measure_hash(bench, layer, steps, base)


def guarded(
    bench: Bench, name: str, fields: dict[str, Any], candidates: dict[str, Sequence[Call] | Failure], **bounds: float
) -> None:
    """A row, or a row that says why there is none. Raises Broken."""
    try:
        bench.measure(name, fields, candidates, nbytes=bounds["nbytes"], flops=bounds["flops"])
    except Exception as error:
        bench.failed(name, fields, error)


def measure_parts(bench: Bench, layer: Layer, steps: list[Step], base: dict[str, Any], experts_bound: dict[str, float]) -> None:
    """A row for each step of the layer."""
    model, m = layer.model, base["m"]
    row = 2.0 * model.d  # bytes of a token in BF16
    try:
        parts = [named(step.made) for step in steps]
        routed = [layer.routed(step.x, step.weights, step.ids) for step in steps]
        shared = [layer.share(step.x) for step in steps]
    except Exception as error:
        bench.failed(f"{model.name} parts", base, error)
        return
    gate_bytes, one, of_one = layer.gate_weight.nbytes, model.expert_bytes, 6.0 * m * model.d * model.inner
    more = layer.together(steps[0].x, steps[0].ids)
    everything, flops = experts_bound["nbytes"] + more * one, experts_bound["flops"] + more * of_one
    bounds = {  # bytes, flops
        "router": (gate_bytes + m * row + 12.0 * m * model.top_k, 2.0 * m * model.experts * model.d),
        **work.expert_parts(m, model.top_k, model.d, everything, flops),
        "shared": (one, of_one),
        "moe_combine": (4 * m * row, 0.0),
    }
    own: dict[str, Callable[[int], object]] = {
        "router": lambda i: layer.route(steps[i].x),
        "shared": lambda i: layer.share(steps[i].x, i),
        "moe_combine": lambda i: moe_combine(routed[i], shared[i]),
    }
    for name, (nbytes, computed) in bounds.items():
        if name not in own and name not in parts[0]:
            continue  # few tokens are not gathered
        fields = dict(base)
        try:
            calls = [made[name] if name in made else partial(own[name], i) for i, made in enumerate(parts)]
            with common.seeing(steps[0].x) as names:
                calls[0]()
            fields |= common.kernel_fields(common.kernels_of(names, runtime_of(steps[0].x).arch))
            bench.measure(f"{model.name} {name}", fields, {"ours": calls}, nbytes=nbytes, flops=computed)
        except Exception as error:
            bench.failed(f"{model.name} {name}", fields, error)


def measure_hash(bench: Bench, layer: Layer, steps: list[Step], base: dict[str, Any]) -> None:
    """The row of routing by token id. Bytes: the gate's rows of experts that are hit, tokens and their ids, results."""
    model, m, fields = layer.model, base["m"], base | {"operation": "router_hash"}
    try:
        table, token_ids = hash_table(model, m, str(steps[0].x.device))
        with common.seeing(steps[0].x) as names:
            weights, ids = layer.hashed(steps[0].x, table, token_ids)
        fields |= common.kernel_fields(common.kernels_of(names, runtime_of(steps[0].x).arch))
        rows = common.sampled(m)
        some = (steps[0].x[rows], layer.gate_weight, table, token_ids[rows])
        want = reference.router_hash(*some, route_scale=ROUTE_SCALE)
        fields |= {"equal": float((ids[rows] == want[1]).float().mean())}
        fields |= common.accuracy_fields(weights[rows], want[0], None)
        nbytes = int(ids.unique().numel()) * 2.0 * model.d + m * (2.0 * model.d + 8.0 + 20.0 * model.top_k)
        ours: list[Call] = [partial(layer.hashed, s.x, table, token_ids) for s in steps]
        torch_: list[Call] = [partial(torch_hash, s.x, layer.gate_weight, table, token_ids) for s in steps]
        flops = 2.0 * m * model.top_k * model.d
        bench.measure(f"{model.name} router_hash", fields, {"ours": ours, "torch": torch_}, nbytes=nbytes, flops=flops)
    except Exception as error:
        bench.failed(f"{model.name} router_hash", fields, error)


def torch_hash(x: Any, gate: Any, table: Any, token_ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A peer: all scores, then those of the table's experts."""
    ids = table[token_ids]
    scores = torch.nn.functional.softplus((x @ gate.t()).float()).sqrt().gather(1, ids)
    return scores / scores.sum(-1, keepdim=True) * ROUTE_SCALE, ids


# ---- accuracy ----------------------------------------------------------------------------------------------------------
def accuracy(layer: Layer, step: Step, y: torch.Tensor) -> dict[str, Any]:
    """The layer of a few tokens against float64 on the same routing, and the same by torch in BF16."""
    count = min(_ORACLE_TOKENS, y.shape[0])
    x, weights, ids = step.x[:count], step.weights[:count], step.ids[:count]
    exact = torch.zeros(count, layer.model.d, dtype=torch.float64, device=x.device)
    rounded = torch.zeros(count, layer.model.d, dtype=torch.float32, device=x.device)
    for e in ids.unique().tolist():
        rows, slot = (ids == e).nonzero(as_tuple=True)
        factor = weights[rows, slot, None]
        matrices = [quant.dequantize(w[e]) for w in (layer.w1, layer.w3, layer.w2)]
        exact.index_add_(0, rows, one_expert(x[rows].double(), factor, [w.double() for w in matrices]))
        rounded.index_add_(0, rows, one_expert(x[rows], factor, [w.bfloat16() for w in matrices]).float())
    matrices = [quant.dequantize(w) for w in layer.shared[0]]
    exact += one_expert(x.double(), None, [w.double() for w in matrices])
    shared = one_expert(x, None, [w.bfloat16() for w in matrices])
    return common.accuracy_fields(y[:count], exact, (rounded + shared.float()).bfloat16())


def one_expert(x: torch.Tensor, factor: torch.Tensor | None, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """w2 (SwiGLU(w1 x, w3 x) * factor) in the operands' dtype."""
    w1, w3, w2 = matrices
    h = swiglu(x @ w1.t(), x @ w3.t())
    return (h if factor is None else (h * factor).to(x.dtype)) @ w2.t()


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)


# ---- peers -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Dense:
    """Decoded weights of some experts: pair (experts, 2 I, D), down (experts, D, I) bf16."""

    pair: torch.Tensor
    down: torch.Tensor

    @property
    def experts(self) -> int:
        return self.pair.shape[0]


def attempt_dense(layer: Layer) -> Dense | Failure:
    """BF16 weights of as many experts as memory has room for, at least top_k."""
    model = layer.model
    try:
        device = layer.gate_weight.device
        count = affordable(model, torch.cuda.mem_get_info()[0] if device.type == "cuda" else float("inf"))
        pair = torch.empty(count, 2 * model.inner, model.d, dtype=torch.bfloat16, device=device)
        down = torch.empty(count, model.d, model.inner, dtype=torch.bfloat16, device=device)
        for e in range(count):
            pair[e, : model.inner] = quant.dequantize(layer.w1[e])
            pair[e, model.inner :] = quant.dequantize(layer.w3[e])
            down[e] = quant.dequantize(layer.w2[e])
        return Dense(pair, down)
    except Exception as error:
        return Failure(common.reason_of(error))


def affordable(model: Model, free: float) -> int:
    """Experts whose BF16 weights fit: all, or the largest part of them that divides their number. Raises MemoryError."""
    for part in range(1, model.experts // model.top_k + 1):
        count = model.experts // part
        if model.experts % part == 0 and count * model.dense_bytes <= free - _SPARE_BYTES:
            return count
    raise MemoryError(f"no room for BF16 weights of {model.top_k} experts in {free / 1e9:.1f} GB")


def peers_of(model: Model, steps: list[Step], dense: Dense | Failure) -> dict[str, Sequence[Call] | Failure]:
    if isinstance(dense, Failure):
        return {"grouped_mm_bf16": dense}
    found: dict[str, Sequence[Call] | Failure] = {
        "grouped_mm_bf16": attempt(lambda: [_grouped_call(step, dense) for step in steps])
    }
    if steps[0].x.shape[0] <= _LOOP_TOKENS:
        found["eager_loop_bf16"] = attempt(lambda: [_loop_call(step, dense) for step in steps])
    return found


def _grouped_call(step: Step, dense: Dense) -> Call:
    ids = step.ids.flatten() % dense.experts
    order = torch.argsort(ids, stable=True)
    x = step.x[order // step.layer.model.top_k].contiguous()
    factor = step.weights.flatten()[order, None].bfloat16()
    ends = torch.bincount(ids, minlength=dense.experts).cumsum(0).to(torch.int32)
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def call() -> torch.Tensor:
        both = product(x, dense.pair.transpose(1, 2), offs=ends)
        h = swiglu(*both.chunk(2, dim=-1)) * factor
        return product(h, dense.down.transpose(1, 2), offs=ends)

    return call


def _loop_call(step: Step, dense: Dense) -> Call:
    """Which rows an expert gets is known to the host, which leaves only products to the device."""
    ids = step.ids % dense.experts
    plan = []
    for e in ids.unique().tolist():
        rows, slot = (ids == e).nonzero(as_tuple=True)
        plan.append((e, rows, step.x[rows].contiguous(), step.weights[rows, slot, None].bfloat16()))

    def call() -> torch.Tensor:
        out = torch.zeros(step.x.shape, dtype=torch.float32, device=step.x.device)
        for e, rows, x, factor in plan:
            h = swiglu(*(x @ dense.pair[e].t()).chunk(2, dim=-1)) * factor
            out.index_add_(0, rows, (h @ dense.down[e].t()).float())
        return out

    return call
