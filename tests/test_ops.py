"""Operators: each one checked by torch.library, equal to its reference, shaped on meta tensors; backends, observation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from dsv4lab import dispatch, ops
from dsv4lab.formats import PackedWeight
from dsv4lab.records import allocate_index_pages, allocate_kv_pages
from dsv4lab.reference import attention, cache, compressor, decoding, gemm, head, indexer, mhc, moe, norm, quant, rope, sampling
from dsv4lab.reference.rope import rope_frequencies

TOKENS = 5
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
# Not "test_autograd_registration": it looks at operators that have a derivative, and these are for inference.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@dataclass(frozen=True)
class Case:
    """One call of a public function: ops.<public>(*args, **kwargs) must do what reference(*args, **kwargs) does."""

    public: str
    reference: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operator: str  # the torch.library name underneath
    written: tuple[int, ...] = ()  # the arguments it writes into

    def fresh(self) -> tuple[Any, ...]:
        """The arguments, with a copy of what is written into."""
        return tuple(a.clone() if i in self.written else a for i, a in enumerate(self.args))


def cases() -> list[Case]:
    """Every operator at least once, in every form of its arguments. Odd sizes."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    found: list[Case] = []

    def add(
        public: str, reference: Callable[..., Any], *args: Any, operator: str = "", written: tuple[int, ...] = (), **kw: Any
    ) -> None:
        found.append(Case(public, reference, args, kw, operator or public, written))

    x, x16 = rand(TOKENS, 160), rand(TOKENS, 160).bfloat16()
    scale = torch.tensor(0.01)
    positions = torch.tensor([0, 1, 2, 0, 1])
    seq_idx = torch.tensor([0, 0, 0, 1, 1])
    freq = rope_frequencies(rope_dim=32, theta=1e4, scaling=None)
    heads = rand(TOKENS, 3, 96).bfloat16()
    eps = dict(eps=1e-6)

    for given in (None, scale):
        add("quantize_nvfp4", quant.quantize_nvfp4, x, global_scale=given)
        add("rmsnorm_nvfp4", norm.rmsnorm_nvfp4, x16, rand(160), **eps, global_scale=given)
        add("inverse_rope_nvfp4", rope.inverse_rope_nvfp4, heads, positions, freq, global_scale=given)
    add("quantize_mxfp4", quant.quantize_mxfp4, x16)
    add("quantize_fp8_rows", quant.quantize_fp8_rows, x, group=128)
    add("quantize_fp8_blocks", quant.quantize_fp8_blocks, rand(131, 200))
    weights = {name: quant.quantize(rand(33, 160), name) for name in ("nvfp4", "mxfp4", "fp8_block", "fp8_row", "bf16", "f32")}
    for weight in weights.values():
        add("dequantize", quant.dequantize, weight)
        add("linear", gemm.linear, x16, weight, act="fp8")
    add("two_linears", gemm.two_linears, x16, weights["fp8_block"], weights["nvfp4"], act="fp8")
    weights["nvfp4"].input_scale = scale
    add("linear", gemm.linear, x16, weights["nvfp4"], act="nvfp4", out_dtype=torch.float32)
    add("grouped_linear", gemm.grouped_linear, rand(TOKENS, 3, 64), quant.quantize(rand(12, 64), "nvfp4"), act="nvfp4")
    add("grouped_linear", gemm.grouped_linear, rand(TOKENS, 3, 64).bfloat16(), quant.quantize(rand(12, 64), "bf16"), act="none")
    add("lm_head", gemm.lm_head, x16, rand(37, 160).bfloat16())
    add("rmsnorm", norm.rmsnorm, x16, rand(160), **eps)
    add("rmsnorm_fp8", norm.rmsnorm_fp8, x16, rand(160), **eps, group=128)
    add("q_norm_rope", norm.q_norm_rope, heads, positions, freq, **eps)
    add("inverse_rope", rope.inverse_rope, heads, positions, freq)
    add("inverse_rope_fp8", rope.inverse_rope_fp8, heads, positions, freq, group=64)

    # cache, compressors, indexer, attention
    window = dict(num_pages=4, page_size=4, dim=96, rope_dim=32, dtype=torch.bfloat16, device="cpu")
    slots = torch.tensor([0, 1, -1, 8, 9])
    table = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)
    topk = torch.tensor([[-1, -1], [0, -1], [0, -1], [-1, -1], [0, -1]], dtype=torch.int32)
    for record in ("plain", "fp8", "nvfp4"):
        pages = allocate_kv_pages(record, **window)
        knobs = dict(record=record, page_size=4)
        add(
            "cache_write", cache.cache_write, heads[:, 0], rand(96), positions, freq, pages, slots, written=(4,), **eps, **knobs
        )
        cache.cache_write(heads[:, 0], rand(96), positions, freq, pages, slots, **eps, **knobs)
        add("cache_read", cache.cache_read, pages, slots, **knobs, dim=96, rope_dim=32)
        where = dict(window=2, ring_len=8, scale=0.1, record=record, window_page=4, entry_page=4, rope_dim=32)
        for entry_pages, chosen, ratio in ((None, None, 0), (pages, None, 2), (pages, topk, 2)):
            args = (heads, rand(3), pages, entry_pages, table, positions, seq_idx, chosen)
            add("attention", attention.attention, *args, ratio=ratio, **where)
    where = (torch.tensor([2, 3, 4, 7, 8]), seq_idx, torch.tensor([0, 0, 0, 3, 3]), torch.tensor([4, 4, 4, 8, 8]), table)
    for key, record, overlap, rounded in (
        ("kv", "plain", True, False),
        ("kv", "fp8", False, True),
        ("kv", "nvfp4", False, False),
        ("index", "plain", False, True),
        ("index", "fp8", True, True),
        ("index", "fp4", True, False),
    ):
        dim = 96 if key == "kv" else 64
        width = 2 * dim if overlap else dim
        pooled = (rand(TOKENS, width), rand(TOKENS, width), rand(2, width), rand(2, 5, 2, width), rand(dim), freq)
        pool = dict(num_pages=4, page_size=4, dim=dim, dtype=torch.float32, device="cpu")
        pages = allocate_kv_pages(record, rope_dim=32, **pool) if key == "kv" else allocate_index_pages(record, **pool)
        knobs = dict(record=record, page_size=4, ratio=2, overlap=overlap, key=key, rounded=rounded)
        add("compress", compressor.compress, *pooled, pages, *where, written=(3, 6), **eps, **knobs)
    visible = torch.tensor([0, 3, 7, 1, 2])
    for record in ("plain", "fp8", "fp4"):
        add("index_query", indexer.index_query, rand(TOKENS, 3, 64), positions, freq, record=record)
        pages = allocate_index_pages(record, num_pages=4, page_size=4, dim=64, dtype=torch.float32, device="cpu")
        knobs = dict(record=record, page_size=4)
        indexer.index_key_write(rand(TOKENS, 64), rand(64), positions, freq, pages, slots, **eps, **knobs)
        query = (rand(TOKENS, 3, 64), rand(TOKENS, 3), pages, table, seq_idx, visible)
        add("index_scores", indexer.index_scores, *query, max_entries=7, **knobs)
    for k in (3, 12):
        add("index_topk", indexer.index_topk, rand(TOKENS, 7), visible, k=k)

    # experts
    gate, ids = rand(6, 160), torch.tensor([0, 8, 3, 3, 1])
    route = dict(route_scale=1.5)
    add("router_topk", moe.router_topk, x16, gate, rand(6), top_k=2, **route)
    add("router_hash", moe.router_hash, x16, gate, torch.randint(0, 6, (9, 2), generator=g, dtype=torch.int32), ids, **route)
    for fmt, act in (("mxfp4", "fp8"), ("nvfp4", "nvfp4"), ("f32", "none")):
        up, gated, down = (quant.quantize(rand(6, *shape), fmt) for shape in ((64, 160), (64, 160), (160, 64)))
        if act == "nvfp4":
            for weight in (up, gated, down):
                weight.input_scale = torch.full((6,), 0.01)
        act_knobs = dict(limit=10.0, act=act)
        choice = torch.tensor([[0, 1], [3, 1], [5, 0], [0, 2], [1, 5]])
        routed = (x16, torch.rand(TOKENS, 2, generator=g), choice)
        add("moe", moe.moe, *routed, up, gated, down, operator="moe_experts", **act_knobs)
        add("shared_expert", moe.expert, x16, up[0], gated[0], down[0], **act_knobs)
        every = (up, gated, down, up[0], gated[0], down[0])
        add("moe_layer", moe.moe_layer, *routed, *every, shared_act=act, **act_knobs)
    add("moe_combine", moe.moe_combine, x, x16)
    for weight in (None, torch.rand(TOKENS, generator=g)):
        halves = (x16, rand(TOKENS, 160).bfloat16(), weight)
        add("swiglu", moe.swiglu, *halves, limit=1.5)
        add("swiglu_fp8", moe.swiglu_fp8, *halves, limit=10.0, group=64)
        add("swiglu_nvfp4", moe.swiglu_nvfp4, *halves, limit=10.0)
    add("swiglu_nvfp4", moe.swiglu_nvfp4, x, x, None, scale, limit=10.0)

    # hyper-connections, prediction block
    streams, y, norm_weight = rand(TOKENS, 4, 32).bfloat16(), rand(TOKENS, 32).bfloat16(), rand(32)
    hc = (rand(24, 128), rand(24), rand(3), norm_weight)
    mix = dict(eps=1e-6, hc_eps=1e-6, sinkhorn_iters=5)
    post, comb = torch.rand(TOKENS, 4, generator=g), torch.rand(TOKENS, 4, 4, generator=g)
    add("embed_streams", mhc.embed_streams, ids, rand(9, 32).bfloat16(), num_streams=4)
    add("mhc_pre", mhc.mhc_pre, streams, *hc, **mix)
    add("mhc_post", mhc.mhc_post, y, streams, post, comb)
    add("mhc_post_pre", mhc.mhc_post_pre, y, streams, post, comb, *hc, **mix)
    for act in (dict(act="fp8"), dict(act="nvfp4", global_scale=scale)):
        add("mhc_pre_quantized", mhc.mhc_pre_quantized, streams, *hc, **act, **mix)
        add("mhc_post_pre_quantized", mhc.mhc_post_pre_quantized, y, streams, post, comb, *hc, **act, **mix)
    add("mhc_head", mhc.mhc_head, streams, rand(4, 128), rand(4), rand(1), norm_weight, eps=1e-6, hc_eps=1e-6)
    e_proj, h_proj = (quant.quantize(rand(32, 32), "fp8_block") for _ in range(2))
    add("mtp_input", head.mtp_input, y, streams, rand(32), rand(32), e_proj, h_proj, eps=1e-6, act="fp8")

    # sampling
    add("lm_head_greedy", head.lm_head_greedy, x16, rand(37, 160).bfloat16())
    knobs = dict(
        temperature=torch.tensor([0.0, 1.0, 0.7, 1.0, 2.0]),
        top_k=torch.tensor([0, 3, 0, 5, 1]),
        top_p=torch.tensor([1.0, 0.9, 0.5, 1.0, 0.1]),
    )
    draw = dict(seed=torch.arange(TOKENS), position=torch.arange(TOKENS) * 7)
    add("probabilities", sampling.probabilities, rand(TOKENS, 23), **knobs)
    add("sample", sampling.sample, rand(TOKENS, 23), **knobs, **draw)
    add("lm_head_peaks", head.lm_head_peaks, x16, rand(137, 160).bfloat16())
    add("sample", sampling.sample, rand(TOKENS, 23), **knobs, **draw, peaks=torch.zeros(TOKENS, 1).long())
    add("lm_head_sample", head.lm_head_sample, x16, rand(37, 160).bfloat16(), temperature=knobs["temperature"], **draw)
    target, draft = rand(TOKENS, 3, 23).softmax(-1), rand(TOKENS, 2, 23).softmax(-1)
    add("accept_drafts", sampling.accept_drafts, target, draft, torch.randint(0, 23, (TOKENS, 2), generator=g), **draw)
    known, step = torch.arange(3) + 5, torch.randint(0, 9, (3, 4), generator=g)
    add("decode_plan", decoding.decode_plan, known, known - 5, tokens=4, offset=-1, ring_len=192, ratios=[4, 128])
    add("match_drafts", decoding.match_drafts, step + 1, step)
    add("advance_decode", decoding.advance_decode, step, known, known + 3, known - 5, known, written=(0, 1))
    return found


CASES = cases()
each_case = pytest.mark.parametrize("case", CASES, ids=[f"{i}-{c.public}" for i, c in enumerate(CASES)])


def same(a: Any, b: Any) -> bool:
    """Equal structure, dtypes, shapes and bits."""
    if a is None or b is None:
        return a is b
    if not isinstance(a, torch.Tensor):
        return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    bits = (a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def parts(value: Any) -> list[torch.Tensor]:
    """The tensors of an argument or a result."""
    if isinstance(value, PackedWeight):
        return list(value.tensors().values())
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def observed(case: Case) -> tuple[ops.Call, tuple[Any, ...], Any]:
    """Call through the public name: what the observer saw, the arguments afterwards, the result."""
    args = case.fresh()
    with ops.observe() as calls:
        result = getattr(ops, case.public)(*args, **case.kwargs)
    assert len(calls) == 1
    return calls[0], args, result


# ---- every operator ----------------------------------------------------------------------------------------------------
def test_every_operator_has_a_case() -> None:
    assert {c.operator for c in CASES} == set(ops.implementations())


@each_case
def test_arguments_and_results_pass_through(case: Case) -> None:
    before = pytree.tree_map_only(torch.Tensor, torch.clone, [parts(a) for a in case.args])
    call, args, result = observed(case)
    expected_args = case.fresh()
    expected = case.reference(*expected_args, **case.kwargs)
    assert call.name == case.operator
    assert same(result, expected) and same(call.output, result)
    for written in case.written:
        assert same(args[written], expected_args[written])
        assert not same(args[written], case.args[written]), "it writes something"
    # inputs stay as they are, and no output shares memory with one
    untouched = [i for i in range(len(args)) if i not in case.written]
    assert same([parts(args[i]) for i in untouched], [before[i] for i in untouched])
    given = {t.untyped_storage().data_ptr() for a in args for t in parts(a) if t.numel()}
    assert not [t for t in parts(result) if t.untyped_storage().data_ptr() in given]


@each_case
def test_operator_passes_torch_library_checks(case: Case) -> None:
    """Schema (mutation, aliases), fake tensors, and tracing with dynamic shapes."""
    call, _, _ = observed(case)
    op = getattr(torch.ops.dsv4lab, case.operator).default
    by_name = dict(call.inputs)
    names = [a.name for a in op._schema.arguments if a.alias_info is not None]
    for name, written in zip(names, case.written, strict=True):  # give it the state before the call
        by_name[name] = case.args[written].clone()
    positional = tuple(by_name.pop(a.name) for a in op._schema.arguments if not a.kwarg_only)
    # Torch's schema check multiplies its inputs, which float8 cannot; `test_arguments_and_results_pass_through` looks at
    # the same things.
    narrow = any(t.dtype in FLOAT8 for t in pytree.tree_leaves((positional, by_name)) if isinstance(t, torch.Tensor))
    checks = [name for name in CHECKS if not (narrow and name == "test_schema")]
    if case is not next(c for c in CASES if c.operator == case.operator):
        checks.remove("test_aot_dispatch_dynamic")  # slow: once an operator
    torch.library.opcheck(op, positional, by_name, test_utils=checks)


@each_case
def test_meta_tensors_get_the_right_shapes(case: Case) -> None:
    call, _, result = observed(case)
    on_meta = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), call.inputs)
    op = getattr(torch.ops.dsv4lab, case.operator).default
    got = op(**on_meta)
    flat, want = (pytree.tree_leaves(t) for t in (got, result))
    assert len(flat) == len(want)
    for a, b in zip(flat, want, strict=True):
        if isinstance(b, torch.Tensor):
            assert a.device.type == "meta" and (a.shape, a.dtype) == (b.shape, b.dtype)


# ---- backends ----------------------------------------------------------------------------------------------------------
X, WEIGHT = torch.randn(3, 16), torch.randn(16)


def run() -> torch.Tensor:
    return ops.rmsnorm(X, WEIGHT, eps=1e-6)


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The rmsnorm operation without kernels; what a test registers is gone after it."""
    operation = dispatch._operations["rmsnorm"]
    monkeypatch.setattr(operation, "kernels", {})
    return operation


def missing(message: str) -> Any:
    return pytest.raises(ops.MissingKernel, match=f"^{re.escape(message)}$")


def sevens(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    return torch.full_like(x, 7.0)


def test_unknown_names_are_rejected() -> None:
    with (
        pytest.raises(ValueError, match=re.escape("backend must be one of ('auto', 'reference', 'kernel', 'sim'), got 'cuda'")),
        ops.backend("cuda"),
    ):
        pass
    with pytest.raises(ValueError, match=r"operation must be one of .*'rmsnorm'.*, got 'rms_norm'"):
        ops.register_kernel("rms_norm", "sm_90a", sevens)
    for arch in ("sm_90", "sim"):
        with pytest.raises(ValueError, match=f"arch must be an architecture such as 'sm_90a', got '{arch}'"):
            ops.register_kernel("rmsnorm", arch, sevens)
    for settings, message in (
        (dict(arch="sm_80a"), "arch must be one of sm_90a, sm_100a, got 'sm_80a'"),
        (dict(schedule="late"), "schedule must be one of eager, lazy, random, got 'late'"),
    ):
        with pytest.raises(ValueError, match=message), ops.backend("sim", **settings):
            pass
    with pytest.raises(ValueError, match="are for backend 'sim', got some for 'kernel'"), ops.backend("kernel", seed=1):
        pass


def test_missing_kernels_name_the_operation(operation: Any) -> None:
    with ops.backend("kernel"), missing("rmsnorm: backend 'kernel' needs CUDA tensors, got device cpu"):
        run()
    with ops.backend("sim"), missing("rmsnorm has no kernel for sm_90a (has: none)"):
        run()
    ops.register_kernel("rmsnorm", "sm_100a", sevens, refuses=lambda x, weight, *, eps: "eps is odd" if eps > 1 else None)
    with ops.backend("sim"), missing("rmsnorm has no kernel for sm_90a (has: sm_100a)"):
        run()
    with (
        ops.backend("sim", arch="sm_100a"),
        missing("rmsnorm has no kernel for sm_100a that takes these arguments: eps is odd"),
    ):
        ops.rmsnorm(X, WEIGHT, eps=3.0)
    assert issubclass(ops.MissingKernel, NotImplementedError)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_choice_by_architecture(operation: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """auto: this architecture's kernel, else the reference with a warning, whether other architectures have one or not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(operation, "warned", set())
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    here = f"sm_{capability[0]}{capability[1]}a"
    with pytest.warns(UserWarning, match=f"rmsnorm has no kernel for {here} .has: none.; its reference runs instead"):
        assert operation.select(cuda) is operation.reference
    with ops.backend("kernel"), missing(f"rmsnorm has no kernel for {here} (has: none)"):
        operation.select(cuda)
    with ops.backend("sim"), missing("rmsnorm: backend 'sim' needs CPU tensors, got device cuda:0"):
        operation.select(cuda)

    ops.register_kernel("rmsnorm", "sm_80a", lambda *a, **k: None)
    with pytest.warns(UserWarning, match=f"rmsnorm has no kernel for {here} .has: sm_80a.; its reference runs instead"):
        assert operation.select(cuda) is operation.reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert operation.select(cuda) is operation.reference
        with ops.backend("reference"):
            assert operation.select(cuda) is operation.reference
        assert operation.select(cpu) is operation.reference

    ops.register_kernel("rmsnorm", here, sevens)
    for backend in ("auto", "kernel"):
        with ops.backend(backend):
            assert operation.select(cuda) is sevens
    assert ops.implementations()["rmsnorm"] == ("reference", *sorted(("sm_80a", here)))


def test_what_has_no_kernel_is_preparation_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else warns where its reference runs on a GPU; these have nothing else to run."""
    without = {name for name, op in dispatch._operations.items() if "sm_90a" not in op.kernels}
    assert without == {name for name, op in dispatch._operations.items() if op.preparation}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for operation in (dispatch._operations[name] for name in sorted(without)):
            assert operation.select(torch.device("cuda", 0)) is operation.reference


def test_backends_nest_and_come_back_after_an_error(operation: Any) -> None:
    reference = norm.rmsnorm(X, WEIGHT, eps=1e-6)
    with ops.backend("sim"):
        with pytest.raises(ZeroDivisionError), ops.backend("reference"):
            assert torch.equal(run(), reference)
            raise ZeroDivisionError
        with pytest.raises(ops.MissingKernel):
            run()
    assert torch.equal(run(), reference)


# ---- observation -------------------------------------------------------------------------------------------------------
def test_observe_collects_names_scopes_inputs_and_outputs() -> None:
    run()
    with ops.observe() as calls:
        run()
        with ops.scope("layers.1"):
            with ops.scope("attn"):
                y = ops.rmsnorm(X, weight=WEIGHT, eps=0.5)
            ops.moe_combine(X, X)
        ops.quantize_nvfp4(X)
    run()  # after the block nothing is collected
    assert [(c.name, c.scope) for c in calls] == [
        ("rmsnorm", ""),
        ("rmsnorm", "layers.1.attn"),
        ("moe_combine", "layers.1"),
        ("quantize_nvfp4", ""),
    ]
    assert calls[1].inputs == {"x": X, "weight": WEIGHT, "eps": 0.5} and calls[1].output is y
    assert calls[3].inputs == {"x": X, "global_scale": None} and len(calls[3].output) == 3  # defaults are filled in


def test_observers_nest_and_come_back_after_an_error() -> None:
    with ops.observe() as outer:
        with pytest.raises(ZeroDivisionError), ops.observe() as inner, ops.scope("broken"):
            run()
            raise ZeroDivisionError
        run()
    assert [c.scope for c in inner] == ["broken"]
    assert [c.scope for c in outer] == [""]  # the inner block's calls are the inner observer's alone


def test_a_failing_operation_is_not_recorded(operation: Any) -> None:
    with ops.observe() as calls, ops.backend("sim"), pytest.raises(ops.MissingKernel):
        run()
    assert calls == []


def test_positional_and_named_arguments_are_the_same_call() -> None:
    weight = quant.quantize(torch.randn(8, 32), "nvfp4")
    x = torch.randn(3, 32)
    with ops.observe() as calls:
        a, b = ops.linear(x, weight, act="fp8"), ops.linear(x=x, weight=weight, act="fp8", out_dtype=None)
    assert torch.equal(a, b)
    assert list(calls[0].inputs) == list(calls[1].inputs)
    assert calls[0].inputs["fmt"] == "nvfp4" and calls[0].inputs["codes"] is weight.codes
