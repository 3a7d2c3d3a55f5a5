"""Hyper-connections and the embedding: time, percent of copy bandwidth, peers, and how exact `comb` is.

Bound: the streams (and y) once, what comes out once, `fn` once, over copy bandwidth. Peers: the same in float32 of torch
(`mhc_*` below), torch.compile of it for Flash at 8,192 tokens and of its post_pre at one, other shapes saying so, Triton's pre
and post (`triton_mhc`), and for codes "unfused", the BF16 row's kernel and then the quantiser's. comb_error: largest relative
error against float64; comb_sums: by how much rows and columns of `comb` miss 1. Random streams and weights. Bars: 85 % of the
bound at 8,192 tokens, 8 us for up to 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import common, eager, operations, triton_mhc
from benchmarks.common import Bench, Call, Failure
from benchmarks.operations import EPS, FLASH, PRO, Args
from dsv4lab.reference import mhc as reference
from dsv4lab.reference import quant

TOKENS = (8192, 64, 8, 4, 1)
QUICK_TOKENS = (8192, 1)
QUICK_FEW = (8, 4)  # of post_pre, whose bar is for 1 to 8 tokens
FEW = 8
BAR_PERCENT, BAR_US = 85.0, 8.0
S = FLASH.hc_mult
HOW = dict(eps=EPS, hc_eps=FLASH.hc_eps, sinkhorn_iters=FLASH.hc_sinkhorn_iters)
_WRONG = 0.01  # relative error of a peer: BF16 rounds to 0.004
ACTS = {"fp8": (1 + 1 / 128) / 2, "nvfp4": (1 / 2 + 1 / 16) / 2}  # codes and scales, in BF16 rows
_GLOBAL = torch.tensor(4.0 / 2688)
_VOCAB = 16384  # rows of the table: only their bytes matter


# ---- peers -------------------------------------------------------------------------------------------------------------
def mix_of(v: torch.Tensor, fn: torch.Tensor) -> torch.Tensor:
    """Products of the flattened streams (M, 4 D) over their root mean square, in their dtype."""
    return (v @ fn.t()) * torch.rsqrt(v.square().mean(-1, keepdim=True) + EPS)


def mhc_pre(streams: Any, fn: Any, base: Any, scale: Any, weight: Any, **how: Any) -> tuple[torch.Tensor, ...]:
    mix = mix_of(streams.flatten(1).float(), fn)
    pre = torch.sigmoid(mix[:, :S] * scale[0] + base[:S]) + FLASH.hc_eps
    post = 2 * torch.sigmoid(mix[:, S : 2 * S] * scale[1] + base[S : 2 * S])
    comb = torch.softmax((mix[:, 2 * S :] * scale[2] + base[2 * S :]).view(-1, S, S), -1) + FLASH.hc_eps
    comb = comb / (comb.sum(-2, keepdim=True) + FLASH.hc_eps)
    for _ in range(FLASH.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + FLASH.hc_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + FLASH.hc_eps)
    u = (pre[:, :, None] * streams.float()).sum(1).to(streams.dtype)
    return eager.rmsnorm(u, weight), post, comb


def mhc_post(y: Any, streams: Any, post: Any, comb: Any) -> torch.Tensor:
    mixed = torch.einsum("mji,mjd->mid", comb, streams.float())
    return (post[:, :, None] * y.float()[:, None] + mixed).to(streams.dtype)


def mhc_post_pre(y: Any, streams: Any, post: Any, comb: Any, *rest: Any, **how: Any) -> tuple[torch.Tensor, ...]:
    new = mhc_post(y, streams, post, comb)
    return new, *mhc_pre(new, *rest)


def mhc_head(streams: Any, fn: Any, base: Any, scale: Any, weight: Any, **how: Any) -> torch.Tensor:
    mix = mix_of(streams.flatten(1).float(), fn)
    pre = torch.sigmoid(mix * scale + base) + FLASH.hc_eps
    return eager.rmsnorm((pre[:, :, None] * streams.float()).sum(1).to(streams.dtype), weight)


def coded(row: Any, fp8: Any, nvfp4: Any, *args: Any, act: str, global_scale: Any = None, **how: Any) -> tuple[Any, ...]:
    """What `row` makes, its BF16 row quantised by one of two functions."""
    *new, x, post, comb = row(*args, **how)
    codes = fp8(x) if act == "fp8" else nvfp4(x, global_scale)
    return *new, *codes[:2], post, comb


def embed_streams(ids: Any, table: Any, *, num_streams: int) -> torch.Tensor:
    return table[ids][:, None].expand(-1, num_streams, -1).contiguous()


# ---- cases -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """An operation at a width, for so many tokens. streams: rows of D that are read and written for a token."""

    name: str
    operation: str
    width: int
    m: int
    streams: float
    peer: Callable[..., Any]
    act: str = ""

    @property
    def plain(self) -> str:
        """The operation of the BF16 row."""
        return self.operation.removesuffix("_quantized")

    @property
    def outputs(self) -> int:
        return {"mhc_pre": S * (S + 2), "mhc_post_pre": S * (S + 2), "mhc_head": S}.get(self.plain, 0)

    @property
    def nbytes(self) -> float:
        small = {"mhc_pre": 80, "mhc_post": 80, "mhc_post_pre": 160, "mhc_head": 0, "embed_streams": 8}[self.plain]
        return self.m * (2.0 * self.streams * self.width + small) + 4.0 * self.outputs * S * self.width

    def args(self, device: str) -> Args:
        d, m, n = self.width, self.m, self.outputs
        if self.operation == "embed_streams":
            table = torch.randn(_VOCAB, d, device=device).bfloat16()
            ids = (
                torch.randint(_VOCAB, (m,), device=device)
                if device != "meta"
                else torch.empty(m, dtype=torch.int64, device=device)
            )
            return (ids, table), dict(num_streams=S)
        streams = torch.randn(m, S, d, device=device).bfloat16()
        fn = torch.randn(n, S * d, device=device) * (S * d) ** -0.5
        mix = (fn, torch.randn(n, device=device), torch.ones(1 if n == S else 3, device=device))
        rest = (*mix, operations.norm_weight(d, device))
        y = torch.randn(m, d, device=device).bfloat16()
        given = (torch.rand(m, S, device=device), torch.rand(m, S, S, device=device) / S)
        if self.operation == "mhc_post":
            return (y, streams, *given), {}
        how: dict[str, Any] = dict(HOW)
        if self.act:
            how |= dict(act=self.act) | ({"global_scale": _GLOBAL.to(device)} if self.act == "nvfp4" else {})
        if self.plain == "mhc_post_pre":
            return (y, streams, *given, *rest), how
        if self.operation == "mhc_head":
            del how["sinkhorn_iters"]
        return (streams, *rest), dict(how)


def cases(*, quick: bool) -> Iterator[tuple[Case]]:
    return ((case,) for case in _cases(quick))


def _cases(quick: bool) -> Iterator[Case]:
    for m in (*QUICK_TOKENS, *QUICK_FEW) if quick else TOKENS:
        for config, size in ((FLASH, "flash"), (PRO, "pro")):
            d = config.hidden_size
            if quick and m in QUICK_FEW:
                yield Case(f"{size} post_pre", "mhc_post_pre", d, m, 2 * S + 2, mhc_post_pre)
                continue
            yield Case(f"{size} pre", "mhc_pre", d, m, S + 1, mhc_pre)
            yield Case(f"{size} post", "mhc_post", d, m, 2 * S + 1, mhc_post)
            yield Case(f"{size} post_pre", "mhc_post_pre", d, m, 2 * S + 2, mhc_post_pre)
            yield Case(f"{size} head", "mhc_head", d, m, S + 1, mhc_head)
            for act, row in ACTS.items():
                for name, moved, plain in (("pre", S, mhc_pre), ("post_pre", 2 * S + 1, mhc_post_pre)):
                    peer = partial(coded, plain, eager.fp8, eager.nvfp4)
                    yield Case(f"{size} {name} {act}", f"mhc_{name}_quantized", d, m, moved + row, peer, act)
            yield Case(f"{size} embed", "embed_streams", d, m, S + 1, embed_streams)


def label(case: Case) -> str:
    """What `--match` looks at."""
    return f"{case.name} {case.m}"


def touch(case: Case) -> None:
    """The call on tensors without memory: asks for the kernels that the measurement will."""
    args, named = case.args("meta")
    operations.call(case.operation, *args, **named)


def run(bench: Bench) -> None:
    """All rows. Raises Broken."""
    for (case,) in cases(quick=bench.quick):
        if bench.wants(label(case)):
            try:
                measure(bench, case)
            except Exception as error:
                bench.failed(case.name, {"m": case.m, "format": "", "operation": case.operation}, error)


def measure(bench: Bench, case: Case, device: str = "cuda") -> None:
    fields: dict[str, Any] = {"m": case.m, "format": "", "operation": case.operation}
    if case.m == max(TOKENS):
        fields["bar_percent"] = BAR_PERCENT
    elif case.m <= FEW:
        fields["bar_us"] = BAR_US
    eager.prepare_constants(device)
    first = case.args(device)
    sets = [first, *(case.args(device) for _ in range(common.num_copies(case.nbytes) - 1))]
    sets = [((*a[:-4], *first[0][-4:]) if case.outputs else a, named) for a, named in sets]  # one fn, prepared once
    ours = operations.checked(fields, case.operation, sets, partial(compared, case))
    candidates: dict[str, Sequence[Call] | Failure] = {"ours": ours, "torch": operations.calls_of(case.peer, sets)}
    many, one = case.m == max(TOKENS), case.m == 1 and case.operation == "mhc_post_pre"
    if case.name.startswith("flash") and (many or one) and not case.act:
        compiled = eager.compiled(case.peer, *first[0], **first[1])
        candidates["torch.compile"] = compiled if isinstance(compiled, Failure) else operations.calls_of(compiled, sets)
    else:
        candidates["torch.compile"] = Failure(f"of Flash at {max(TOKENS)} tokens, of its post_pre at one, to save time")
    peers: dict[str, Callable[..., Any]] = {"mhc_pre": triton_mhc.mhc_pre, "mhc_post": triton_mhc.mhc_post}
    peer = peers.get(case.operation)
    if peer is not None:
        candidates["triton"] = common.attempt(lambda: _triton_calls(case, peer, sets))
    if case.act:
        steps = (case.plain, {}), ("quantize_fp8_rows", dict(group=128)), ("quantize_nvfp4", {})
        kernels = (partial(operations.call, name, **how) for name, how in steps)
        candidates["unfused"] = operations.calls_of(partial(coded, *kernels), sets)
    bench.measure(case.name, fields, candidates, nbytes=case.nbytes, flops=0.0)


def _triton_calls(case: Case, peer: Callable[..., Any], sets: Sequence[Args]) -> Sequence[Call]:
    """Compares the kernel with the reference first. Raises RuntimeError on a wrong result."""
    args, named = sets[0]
    found = compared(case, sets[0], peer(*args, **named))
    if not (found["relative_error"] < _WRONG and found.get("comb_error", 0.0) < _WRONG):
        raise RuntimeError(f"the Triton kernel is wrong: {found}")
    return operations.calls_of(peer, sets)


def compared(case: Case, args: Args, got: Any) -> dict[str, Any]:
    """Figures of the normalised input or the streams, on some rows; of `comb`, too, where it is made."""
    rows = common.sampled(case.m)
    if case.operation == "embed_streams":
        return {"equal": float(torch.equal(got, embed_streams(*args[0], **args[1])))}
    per_token = {"mhc_pre": 1, "mhc_head": 1}.get(case.plain, 4)
    some = (*(a[rows] for a in args[0][:per_token]), *args[0][per_token:])
    want = getattr(reference, case.operation)(*some, **args[1])
    got, want = ((r if isinstance(r, tuple) else (r,)) for r in (got, want))
    if case.operation == "mhc_pre_quantized":
        values: Callable[..., Any] = partial(quant.dequantize_fp8_rows, group=128)
        if case.act == "nvfp4":
            values = partial(quant.dequantize_nvfp4, global_scale=args[1]["global_scale"])
        got, want = ((values(*r[:2]), *r[2:]) for r in (got, want))
    fields = operations.accuracy_fields(got[0][rows], want[0])
    if case.plain in ("mhc_pre", "mhc_post_pre"):
        comb, exact = (
            got[-1][rows].double(),
            exact_comb(got[0][rows] if case.plain == "mhc_post_pre" else some[0], args[0][-4:-1]),
        )
        sums = torch.stack([comb.sum(-1), comb.sum(-2)])
        fields |= {"comb_error": float(((comb - exact).abs() / exact).max()), "comb_sums": float((sums - 1).abs().max())}
    return fields


def exact_comb(streams: torch.Tensor, mix: Sequence[torch.Tensor]) -> torch.Tensor:
    """In float64 throughout."""
    fn, base, scale = (t.double() for t in mix)
    logits = (mix_of(streams.double().flatten(1), fn)[:, 2 * S :] * scale[2] + base[2 * S :]).view(-1, S, S)
    return reference.sinkhorn(logits, iters=FLASH.hc_sinkhorn_iters, eps=FLASH.hc_eps)
