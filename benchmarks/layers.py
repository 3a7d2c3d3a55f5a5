"""Whole layers of each kind (SWA, CSA, HCA) at Flash's true width, hyper-connections and experts included, and their kernels.

    prefill      4,096 tokens of one sequence, from its beginning
    decode       the last token of each of 1 or 64 sequences of 16,384, planned for a CUDA graph and replayed in one

Weights are random, in the layout of the official NVFP4 checkpoints: routed experts NVFP4, attention, indexer and shared expert
FP8 blocks, compressors and router BF16, hyper-connections float32. Keys are FP8, index keys FP4. `format` is the arithmetic:

    w4a16        activations stay BF16
    official     those of quantised products become FP8, as the loader has it for such checkpoints (CSA only)

A row is a layer and a step. us: of a graph of such steps. bound_us: the sum over its parts' bounds, each the longer of bytes
over copy bandwidth and flops over the BF16 rate (`work.py`). memory_GB: the most that was allocated so far. parts: every kernel
as torch's profiler saw it, in replays for decode and in launches for prefill; `us` is by how much it made the step longer
(`trace.added_us`), `runs_us` from its start to its end, which includes waiting for the kernel ahead. percent_of_bound there is
the part's bound over all kernels of the part; weights that arrived while the kernel ahead ran can take it past 100.

What must hold, and ends the suite with an error after its rows are written: results are finite; a replay gives what launches
give, result and cache; nothing but our kernels and copies runs; 64 tokens after 4,032 others agree with the reference, cosine
over 0.99. cosine_attn, cosine_ffn: of what the two halves of the layer add, where the residual streams do not help.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import attention_layer, common, operations, work
from benchmarks.attention_layer import KINDS, ask_again, filled_cache
from benchmarks.common import Bench, Ceilings
from benchmarks.linear import random_weight
from benchmarks.work import Shape, flops_of, name_of
from dsv4lab import ops
from dsv4lab.config import CSA, SCORE, ModelConfig
from dsv4lab.dispatch import backend
from dsv4lab.kernels._common import cache as kernel_cache
from dsv4lab.kernels._common import launch
from dsv4lab.kernels.gemm.mixed import prepared as prepared_weights
from dsv4lab.lab import trace
from dsv4lab.model.block import Block
from dsv4lab.model.cache import Batch, LayerCache
from dsv4lab.model.layers import ExpertStack, Linear
from dsv4lab.model.numerics import OFFICIAL, Numerics

FORMATS = {"w4a16": attention_layer.FORMATS["nvfp4"], "official": OFFICIAL}
SCENES = (("prefill", 1, 4096, 4096), ("decode 1", 1, 1, 16384), ("decode 64", 64, 1, 16384))
CHECKED = (1, 64, 4096)  # sequences, tokens, context of the step that the reference computes too
LEAST_COSINE = 0.99
_REPLAYS, _LAUNCHES = 7, 3  # runs that are traced, of decode and of prefill
_EXPERTS = "moe_layer"  # the operation whose launches are several parts
_STEPS = {".moe.permute.": "permute", ".moe.gather.": "gather", ".moe.combine.": "combine"}

SHAPES = tuple(
    Shape(f"flash {kind.lower()} block, {scene}", kind, seqs, tokens, context)
    for kind in KINDS
    for scene, seqs, tokens, context in SCENES
)
QUICK = ("flash csa block, prefill", "flash csa block, decode 1", "flash csa block, decode 64", "flash hca block, decode 64")


def cases(*, quick: bool) -> Iterator[tuple[Shape, str]]:
    for fmt in ("w4a16",) if quick else FORMATS:
        for shape in SHAPES:
            # the kinds differ in attention, not in what is quantised: one shows what the other arithmetic costs
            if shape.name in QUICK if quick else fmt == "w4a16" or shape.kind == CSA:
                yield shape, fmt


def label(shape: Shape, fmt: str) -> str:
    """What `--match` looks at."""
    return f"{shape.name} {fmt}"


def is_decode(shape: Shape) -> bool:
    return shape.tokens == 1


# ---- a layer and a step ------------------------------------------------------------------------------------------------
def random_block(config: ModelConfig, kind: str, numerics: Numerics, device: str) -> Block:
    """A layer with random weights, made where they are to stay."""
    block = Block(config, kind, SCORE, numerics).to(device)
    attention_layer.fill_weights(block.attn, "fp8_block", device)
    for site in (block.hc_attn, block.hc_ffn):
        wide = config.hc_mult * config.hidden_size
        site.assign("fn", torch.randn(config.hc_mix_dim, wide, device=device) * wide**-0.5)
        site.assign("base", torch.randn(config.hc_mix_dim, device=device) * 0.1)
        site.assign("scale", torch.ones(3, device=device))
    for norm in (block.attn_norm, block.ffn_norm):
        norm.assign("weight", operations.norm_weight(config.hidden_size, device))
    gate, experts = block.ffn.gate, block.ffn.experts
    gate.assign("weight", random_weight("bf16", config.n_routed_experts, config.hidden_size, device).codes)
    gate.assign("bias", torch.randn(config.n_routed_experts, device=device) * 0.01)
    for stack in (experts.w1, experts.w3, experts.w2):
        fill_stack(stack, device)
    experts.w3.global_scale.copy_(experts.w1.global_scale)  # one for both, as checkpoints have it
    for child in block.ffn.shared_experts.modules():
        if isinstance(child, Linear):
            child.assign("weight", random_weight("fp8_block", child.rows, child.columns, device))
    return block


def fill_stack(stack: ExpertStack, device: str) -> None:
    """Random NVFP4 for every expert. The first makes room for all, which are then drawn in place: no second copy is held."""
    first = random_weight("nvfp4", stack.rows, stack.columns, device)
    assert first.global_scale is not None
    stack.assign(0, replace(first, input_scale=torch.full_like(first.global_scale, 1 / 448)))  # of activations up to 6
    stack.codes.random_(0, 256)
    stack.scale.view(torch.uint8).random_(0x20, 0x50)
    stack.global_scale.uniform_(0.9, 1.1).mul_(first.global_scale)
    stack.input_scale.fill_(1 / 448)


def prepare_experts(block: Block) -> None:
    """Bring the experts into the kernels' order, one after the other: each takes three times its size for a while."""
    experts = block.ffn.experts
    for weights in ((experts.w1.weight, experts.w3.weight), (experts.w2.weight,)):
        prepared_weights.prepared(*weights)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True, eq=False)
class Step:
    """A layer, a cache full of random keys, and the tokens of a shape."""

    block: Block
    shape: Shape
    cache: LayerCache
    batch: Batch
    streams: torch.Tensor

    @classmethod
    def make(cls, block: Block, shape: Shape, device: str) -> Step:
        cache, batch = filled_cache(shape, block.attn.numerics, device, fixed=is_decode(shape))
        streams = torch.randn(shape.rows, shape.config.hc_mult, shape.config.hidden_size, device=device).bfloat16()
        return cls(block, shape, cache.layers[0], batch, streams)

    def __call__(self) -> torch.Tensor:
        """What is measured."""
        with backend("kernel"):
            return self.block(self.streams, self.batch, self.cache)

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of what the cache holds."""
        return {name: value.clone() for name, value in vars(self.cache).items() if value is not None}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            getattr(self.cache, name).copy_(value)


def touch(shape: Shape, fmt: str) -> None:
    """The layer on tensors without memory, then its kernels: asks for those that measurement and check will."""
    block = random_block(shape.config, shape.kind, FORMATS[fmt], "meta")
    calls = []
    for step in (shape, checked_shape(shape)):
        made = Step.make(block, step, "meta")
        with ops.observe() as seen:
            block(made.streams, made.batch, made.cache)
        calls += seen
    ask_again(calls)


# ---- what must hold ----------------------------------------------------------------------------------------------------
def checked_shape(shape: Shape) -> Shape:
    """The step that is compared with the reference: of the same layer, after enough tokens to choose entries from."""
    seqs, tokens, context = CHECKED
    return replace(shape, name="check", seqs=seqs, tokens=tokens, context=context)


def against_reference(step: Step) -> dict[str, Any]:
    """Figures of a step on kernels against the reference, whole and for what each half of the layer adds."""
    cache = deepcopy(step.cache)
    with ops.observe() as ours:
        y = step()
    with backend("reference"), ops.observe() as theirs:
        want = step.block(step.streams, step.batch, cache)
    fields = operations.accuracy_fields(y, want) | {"finite": bool(y.isfinite().all())}
    for name, after in (("cosine_attn", "mhc_post_pre"), ("cosine_ffn", "mhc_post")):
        a, b = (next(call.inputs["y"] for call in calls if call.name == after) for calls in (ours, theirs))
        fields[name] = common.cosine(a, b)
    return fields


def captured(step: Step) -> tuple[Callable[[], None], torch.Tensor]:
    """A CUDA graph of a step that has run before: how to replay it, and where its result will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = step()
    return graph.replay, y


def replayed(step: Step) -> tuple[Callable[[], None], bool]:
    """A graph's replay, and whether it does what launches do: the same result and the same cache, from the same cache."""
    before = step.state()
    want = step()
    after = step.state()
    replay, y = captured(step)
    step.restore(before)
    y.fill_(torch.nan)
    replay()
    equal = torch.equal(y, want)
    return replay, equal and all(torch.equal(value, after[name]) for name, value in step.state().items())


def faults(row: dict[str, Any]) -> list[str]:
    """What a row says that must not be."""
    found = []
    if not row["finite"]:
        found.append("results are not finite")
    if not row["cosine"] > LEAST_COSINE:
        found.append(f"cosine with the reference must be over {LEAST_COSINE}, is {row['cosine']:.5f}")
    if row.get("replay_equal") is False:
        found.append("a replay differs from launches")
    if row["foreign"]:
        found.append(f"kernels that are not ours: {', '.join(trace.short(name) for name in row['foreign'])}")
    return found


# ---- parts and their kernels -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Launched:
    """One launch. call: the number of the operation that it belongs to."""

    call: int
    name: launch.Name
    stream: int = 0


@dataclass
class Launches(common.Seen):
    """Keeps every launch. calls: what `ops.observe` has collected so far, which are the operations that have ended."""

    calls: list[ops.Call] = field(default_factory=list)
    launched: list[Launched] = field(default_factory=list)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
        self.launched.append(Launched(len(self.calls), launch.name_of(function), stream))
        super().call(function, *args)


def observed(step: Step) -> tuple[list[ops.Call], list[Launched]]:
    """A step's operations, and its launches."""
    with ops.observe() as calls:
        seen = Launches(launch.runtime_of(step.streams), calls=calls)
        with launch.running_on(seen):
            step()
    return calls, seen.launched


@dataclass(frozen=True)
class Part:
    """An operation, or a step of one that has several, with the least that it must do. launches: their numbers."""

    label: str
    nbytes: float
    flops: float
    launches: tuple[int, ...]


def parts_of(shape: Shape, calls: Sequence[ops.Call], launched: Sequence[Launched]) -> list[Part]:
    """All parts of a step, in the host's order. A quantiser inside of experts belongs to the product that it feeds."""
    found: list[Part] = []
    taken: dict[str, int] = {}

    def add(label: str, nbytes: float, flops: float, launches: Sequence[int]) -> None:
        taken[label] = taken.get(label, 0) + 1
        count = f" ({taken[label]})" if taken[label] > 1 else ""
        found.append(Part(f"{label}{count}", nbytes, flops, tuple(launches)))

    for number, call in enumerate(calls):
        mine = [i for i, one in enumerate(launched) if one.call == number]
        if call.name != _EXPERTS:
            add(name_of(call), work.bytes_of(shape, call), flops_of(shape, call), mine)
            continue
        steps = steps_of([launched[i].name.module for i in mine])
        bounds = work.layer_parts(shape, call, apart="shared product 1" in steps)
        for step in dict.fromkeys(steps):
            add(f"{call.name} {step}", *bounds[step], [i for i, of in zip(mine, steps, strict=True) if of == step])
    return found


def steps_of(modules: Sequence[str]) -> list[str]:
    """What each launch of `moe_layer` is for, by the modules of the kernels in the order of launches.

    Where there are four products, the first two are the shared expert's.
    """
    names = ["shared product 1", "shared product 2", "product 1", "product 2", ""][-1 - sum(".gemm." in m for m in modules) :]
    product, found = 0, []
    for module in modules:
        step = next((step for part, step in _STEPS.items() if part in f"{module}."), None)
        found.append(step or names[product])
        product += ".gemm." in module
    return found


_symbols: dict[tuple[launch.Name, str], frozenset[str]] = {}


def symbols_of(name: launch.Name, arch: str) -> frozenset[str]:
    """The kernels that a compiled function may start, by their symbols in its PTX."""
    if (name, arch) not in _symbols:
        _symbols[name, arch] = frozenset(common.symbols(kernel_cache.read(common.entry(name, arch)).ptx))
    return _symbols[name, arch]


def traced(call: Callable[[], object], runs: int) -> list[trace.Kernel]:
    """The kernels of `runs` calls, each waited for; of a second profile, since a first one may miss what runs as it starts."""
    for count in (1, runs):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(count):
                call()
                torch.cuda.synchronize()
    return trace.kernels_of(profile)


def table(parts: Sequence[Part], rows: Sequence[trace.Row], ceilings: Ceilings) -> list[dict[str, Any]]:
    """A line for every kernel, in the order of its part, with the part's bound."""
    part_of = {i: part for part in parts for i in part.launches}
    spent = {part: sum(row.us for row in rows if row.launch in part.launches) for part in parts}
    order = {part: number for number, part in enumerate(parts)}
    lines = []
    for row in sorted(rows, key=lambda row: order[part_of[row.launch]] if row.launch in part_of else len(order)):
        part = None if row.launch is None else part_of.get(row.launch)
        line: dict[str, Any] = {"part": "-", "kernel": trace.short(row.name), "count": row.count}
        line |= {"us": round(row.us, 3), "runs_us": round(row.runs_us, 3)}
        if part is not None:
            bound, which = ceilings.bound_us(part.nbytes, part.flops)
            line |= {"part": part.label, "bound_us": bound, "bound": which}
            line["percent_of_bound"] = round(100 * bound / spent[part], 1) if spent[part] else None
        lines.append(line)
    return lines


# ---- rows --------------------------------------------------------------------------------------------------------------
def run(bench: Bench) -> None:
    """All rows, a layer's weights at a time. Raises Broken, and RuntimeError where something does not hold that must."""
    wanted = [case for case in cases(quick=bench.quick) if bench.wants(label(*case))]
    done: list[dict[str, Any]] = []
    for kind, fmt in dict.fromkeys((shape.kind, fmt) for shape, fmt in wanted):
        shapes = [shape for shape, of in wanted if (shape.kind, of) == (kind, fmt)]
        measure(bench, shapes, fmt, done)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print_summary(done)
    wrong = [f"{row['shape']} {row['format']}: {fault}" for row in done for fault in faults(row)]
    if wrong:
        raise RuntimeError("; ".join(wrong))


def measure(bench: Bench, shapes: Sequence[Shape], fmt: str, done: list[dict[str, Any]], device: str = "cuda") -> None:
    """The rows of one kind of layer, which are added to `done`; all shapes are of that kind."""
    try:
        block = random_block(shapes[0].config, shapes[0].kind, FORMATS[fmt], device)
        prepare_experts(block)
        accuracy = against_reference(Step.make(block, checked_shape(shapes[0]), device))
    except Exception as error:
        for shape in shapes:
            bench.failed(shape.name, {"m": shape.rows, "format": fmt}, error)
        return
    for shape in shapes:
        try:
            row = measure_step(bench, Step.make(block, shape, device), fmt, dict(accuracy))
        except Exception as error:
            bench.failed(shape.name, {"m": shape.rows, "format": fmt}, error)
            continue
        done.append(row)
        print_parts(row)


def measure_step(bench: Bench, step: Step, fmt: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The row of one step, which is written. fields: of the check of its layer."""
    shape = step.shape
    y = step()  # whatever a first call does besides
    fields["finite"] = fields["finite"] and bool(y.isfinite().all())
    calls, launched = observed(step)
    parts = parts_of(shape, calls, launched)
    bounds = sum(bench.ceilings.bound_us(part.nbytes, part.flops)[0] for part in parts)
    replay: Callable[[], object] = step
    if is_decode(shape):
        replay, fields["replay_equal"] = replayed(step)
    time = bench.stopwatch.measure({"ours": common.repeated([step], bounds)})
    fields |= kernel_fields(bench, step, replay, parts, launched)
    row = {"shape": shape.name, "format": fmt, "m": shape.rows, "context": shape.context}
    row |= common.timing_fields(time, bounds, "sum of parts") | {"bound_us": bounds}
    row |= {"bytes": sum(part.nbytes for part in parts), "flops": sum(part.flops for part in parts)} | fields
    if torch.cuda.is_available():
        row["memory_GB"] = round(torch.cuda.max_memory_allocated() * 1e-9, 2)
    bench.write(row)
    print(common.line_of(row), flush=True)
    return row


def kernel_fields(
    bench: Bench, step: Step, replay: Callable[[], object], parts: Sequence[Part], launched: Sequence[Launched]
) -> dict[str, Any]:
    """The trace of a step: its table, what is not ours in it, and what was traced. Raises ValueError where runs differ.

    Replays that show no names, or not all of what ran, give way to launches.
    """
    arch = launch.runtime_of(step.streams).arch
    launches = [trace.Launch(symbols_of(one.name, arch), one.stream) for one in launched]
    ways: list[tuple[str, Callable[[], object], int]] = [("launches", step, _LAUNCHES)]
    if replay is not step:
        ways.insert(0, ("replays", replay, _REPLAYS))
    for how, call, runs in ways:
        found = traced(call, runs)
        try:
            rows = trace.rows_of(found, runs, launches)
        except ValueError:
            if how == "launches":
                raise
            continue
        if how == "launches" or any(trace.is_ours(row.name) for row in rows):
            break
    lines = table(parts, rows, bench.ceilings)
    return {
        "traced": how,
        "foreign": trace.foreign(kernel.name for kernel in found),
        "kernels_us": round(sum(line["us"] for line in lines), 2),
        "parts": lines,
    }


def print_parts(row: dict[str, Any]) -> None:
    """Every kernel of a step. The bound stands at the first kernel of its part."""
    print(f"    {'part':36} {'kernel':24} {'n':>3} {'us':>9} {'runs':>9} {'bound':>9}        % of bound")
    before = None
    for line in row["parts"]:
        text = f"    {line['part']:36} {line['kernel'][:24]:24} {line['count']:3} {line['us']:9.2f} {line['runs_us']:9.2f}"
        if line.get("bound_us") is not None and line["part"] != before:
            text += f" {line['bound_us']:9.2f} {line['bound']:6} {line['percent_of_bound'] or 0:10.1f}"
        before = line["part"]
        print(text, flush=True)
    for fault in faults(row):
        print(f"    WRONG: {fault}", flush=True)


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """A line for every layer and step."""
    print(f"\n{'layer and step':32} {'format':9} {'us':>9} {'kernels':>9} {'bounds':>9} {'%':>6}  replay  cosine, of halves")
    for row in rows:
        us = "-" if row["us"] is None else f"{row['us']:.1f}"
        percent = "-" if row["percent_of_bound"] is None else f"{row['percent_of_bound']:.1f}"
        replay = {None: "-", True: "equal", False: "DIFFERS"}[row.get("replay_equal")]
        halves = f"{row['cosine']:.6f}, {row['cosine_attn']:.5f}, {row['cosine_ffn']:.5f}"
        text = f"{row['shape']:32} {row['format']:9} {us:>9} {row['kernels_us']:9.1f} {row['bound_us']:9.1f} {percent:>6}"
        print(f"{text}  {replay:7} {halves}", flush=True)
