"""The head: logits, tokens without logits, sampling, verification of drafts, the prediction block's input, a step's integers.

Bound: the head's weight, or the logits, once over copy bandwidth; of a step's integers a few hundred bytes, so that percents
say nothing there and the time is what a launch takes, against a bar of 6 us. Peers: torch, in float32 where it samples:
`logits.argmax`, softmax and `multinomial`, with a sort where there is a filter; cuBLAS BF16 for the head and for the input's
two products; for integers the reference, which is torch; for head and sampler with peaks both without.
Tokens are compared with the reference's; where a filter's edge is within rounding of an element they may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import common, operations
from benchmarks.common import Bench, Call, Failure
from benchmarks.operations import EPS, FLASH, PRO, Args
from dsv4lab.formats import BF16, PackedWeight
from dsv4lab.ops.weights import pack_all
from dsv4lab.reference import decoding, sampling

VOCAB = FLASH.vocab_size
BAR_PERCENT = 80.0  # of the head's bound, 1 to 16 tokens
BAR_US = 6.0  # of a decode-size launch
DRAFTS, RATIOS = 2, [FLASH.csa_ratio, FLASH.hca_ratio]  # of the steps whose integers are measured
RING = FLASH.sliding_window + 64
_LEFT = 1 << 20  # tokens that a sequence may still grow by
KINDS = {"greedy": (0.0, 0, 1.0), "noise": (1.0, 0, 1.0), "filtered": (0.8, 50, 0.9)}


# ---- peers -------------------------------------------------------------------------------------------------------------
def filtered(logits: torch.Tensor, temperature: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities with both filters, by a sort."""
    values, ids = (logits / temperature.clamp_min(1e-5)[:, None]).sort(-1, descending=True)
    kept = values.softmax(-1)
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept = torch.where((rank < top_k) if top_k else (rank >= 0), kept, 0.0)
    kept = torch.where(kept.cumsum(-1) - kept < top_p * kept.sum(-1, keepdim=True), kept, 0.0)
    return torch.zeros_like(kept).scatter_(-1, ids, kept / kept.sum(-1, keepdim=True))


def torch_sample(kind: str, logits: torch.Tensor, temperature: torch.Tensor, *rest: Any) -> torch.Tensor:
    t, k, p = KINDS[kind]
    if not t:
        return logits.argmax(-1)
    probs = filtered(logits, temperature, k, p) if k else (logits / temperature[:, None]).softmax(-1)
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


def torch_probabilities(kind: str, logits: torch.Tensor, temperature: torch.Tensor, *rest: Any) -> torch.Tensor:
    return filtered(logits, temperature, *KINDS[kind][1:])


def torch_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def torch_greedy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight).argmax(-1)


def torch_draw(x: torch.Tensor, weight: torch.Tensor, *, temperature: torch.Tensor, **which: Any) -> torch.Tensor:
    probs = (torch.nn.functional.linear(x, weight).float() / temperature[:, None]).softmax(-1)
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


def torch_input(
    embedding: Any, streams: Any, enorm: Any, hnorm: Any, fmts: Any, codes: Any, *rest: Any, **how: Any
) -> torch.Tensor:
    d = embedding.shape[1]
    e, h = torch.rms_norm(embedding, (d,), enorm, EPS) @ codes[0].t(), torch.rms_norm(streams, (d,), hnorm, EPS) @ codes[1].t()
    return e[:, None] + h


# ---- cases -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """make: arguments on a device. nbytes, flops: of a call. peer: None where torch has nothing like it."""

    name: str
    operation: str
    m: int
    make: Callable[[str], Args]
    nbytes: float
    flops: float
    peer: Callable[..., Any] | None
    check: Callable[[Args, Any], dict[str, Any]]
    bar: float | None = None  # percent of the bound
    bar_us: float | None = None
    ours: Callable[..., Any] | None = None  # where it is more than the operation


def drawn(peaks: bool, x: torch.Tensor, weight: torch.Tensor, *knobs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Head and sampler: logits, (peaks,) tokens."""
    found = operations.call("lm_head_peaks", x, weight) if peaks else (operations.call("lm_head", x, weight),)
    return *found, operations.call("sample", found[0], *knobs, *found[1:])


def drawn_args(m: int, d: int, device: str) -> Args:
    return (*head_args(m, d, device)[0], *sample_args("filtered", m, device)[0][1:]), {}


def drawn_figures(args: Args, got: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    return sampled_figures(((got[0], *args[0][2:]), {}), got[-1])


def head_args(m: int, d: int, device: str) -> Args:
    x = torch.randn(m, d, device=device).bfloat16()
    return (x, (torch.randn(VOCAB, d, device=device) * d**-0.5).bfloat16()), {}


def head_figures(args: Args, got: torch.Tensor) -> dict[str, Any]:
    return operations.accuracy_fields(got, args[0][0].double() @ args[0][1].double().t())


def greedy_figures(args: Args, got: torch.Tensor) -> dict[str, Any]:
    logits = args[0][0].double() @ args[0][1].double().t()
    return {"equal": float((logits.gather(-1, got[:, None])[:, 0] >= logits.amax(-1) - 1e-4).float().mean())}


def draw_args(m: int, d: int, device: str) -> Args:
    which = torch.arange(m, device=device)
    return head_args(m, d, device)[0], dict(temperature=torch.ones(m, device=device), seed=which, position=which * 7)


def draw_figures(args: Args, got: torch.Tensor) -> dict[str, Any]:
    """Logits are float64's, so that a draw whose two best lie within float32's rounding may differ."""
    logits = (args[0][0].double() @ args[0][1].double().t()).float()
    return {"equal": float((got == sampling.sample(logits, **args[1])).float().mean())}


def sample_args(kind: str, m: int, device: str, *, draw: bool = True) -> Args:
    t, k, p = KINDS[kind]
    logits = 3 * torch.randn(m, VOCAB, device=device)
    numbers = dict(device=device)
    knobs = (torch.full((m,), t, **numbers), torch.full((m,), k, **numbers), torch.full((m,), p, **numbers))  # type: ignore[call-overload]
    which = torch.arange(m, device=device)
    return ((logits, *knobs, which, which * 7) if draw else (logits, *knobs)), {}


def sampled_figures(args: Args, got: torch.Tensor) -> dict[str, Any]:
    logits, t, k, p, seed, position = args[0]
    want = sampling.sample(logits, temperature=t, top_k=k, top_p=p, seed=seed, position=position)
    return {"equal": float((got == want).float().mean())}


def probability_figures(args: Args, got: torch.Tensor) -> dict[str, Any]:
    logits, t, k, p = (a[:8] for a in args[0])
    return operations.accuracy_fields(got[:8], sampling.probabilities(logits, temperature=t, top_k=k, top_p=p))


def draft_args(m: int, device: str) -> Args:
    target, draft = (torch.rand(m, n, VOCAB, device=device).softmax(-1) for n in (3, 2))
    which = torch.arange(m, device=device)
    return (target, draft, which[:, None].expand(-1, 2).contiguous() * 100, which, which * 7), {}


def draft_figures(args: Args, got: Any) -> dict[str, Any]:
    target, draft, ids, seed, position = args[0]
    want = sampling.accept_drafts(target, draft, ids, seed=seed, position=position)
    return {"equal": float(all(torch.equal(a, b) for a, b in zip(got, want, strict=True)))}


def integers(m: int, device: str, *size: int, high: int) -> torch.Tensor:
    return torch.randint(1, high, (m, *size)).to(device)  # made on the CPU: shapes alone have no random integers


def plan_args(m: int, device: str) -> Args:
    how = dict(tokens=DRAFTS + 1, offset=-1, ring_len=RING, ratios=RATIOS)
    return (integers(m, device, high=1 << 20), torch.randperm(m).to(device)), how


def match_args(m: int, device: str) -> Args:
    return (integers(m, device, DRAFTS + 1, high=3), integers(m, device, DRAFTS + 1, high=3)), {}


def advance_args(m: int, device: str) -> Args:
    """A limit so far off that calls may go on; what a first one adds to `known` is then seen by it."""
    known, steps = integers(m, device, high=1 << 20), integers(m, device, DRAFTS + 1, high=VOCAB)
    return (steps, known, known + _LEFT, integers(m, device, high=DRAFTS + 2) - 1, integers(m, device, high=VOCAB)), {}


def integer_figures(function: Callable[..., Any], args: Args, got: Any) -> dict[str, Any]:
    """Whether all are the reference's; of what is changed in place, too."""
    given = [a.clone() for a in args[0]]
    equal = True
    if function is decoding.advance_decode:
        steps, known, limit, accepted, token = args[0]
        equal = torch.equal(known, limit - _LEFT + accepted + 1) and torch.equal(steps[:, 0], token)
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (got, function(*given, **args[1]))), strict=True)
    return {"equal": float(equal and all(torch.equal(a, b) for a, b in pairs))}


# name -> arguments, reference, int64s that are read and written for a sequence
INTEGERS: dict[str, tuple[Callable[[int, str], Args], Callable[..., Any], int]] = {
    "decode_plan": (plan_args, decoding.decode_plan, 2 + (4 + len(RATIOS)) * (DRAFTS + 1)),
    "match_drafts": (match_args, decoding.match_drafts, 2 * (DRAFTS + 1) + 2),
    "advance_decode": (advance_args, decoding.advance_decode, DRAFTS + 4 + 2 + DRAFTS + 2),
}


def input_args(m: int, d: int, device: str) -> Args:
    weights = [PackedWeight(BF16, (torch.randn(d, d, device=device) * d**-0.5).bfloat16()) for _ in range(2)]
    norms = [operations.norm_weight(d, device) for _ in range(2)]
    rows = (torch.randn(m, d, device=device).bfloat16(), torch.randn(m, FLASH.hc_mult, d, device=device).bfloat16())
    return (*rows, *norms, *pack_all(*weights)), dict(eps=EPS, act="none")


def input_figures(args: Args, got: torch.Tensor) -> dict[str, Any]:
    return operations.accuracy_fields(got, torch_input(*args[0]))


def cases(*, quick: bool) -> Iterator[tuple[Case]]:
    return ((case,) for case in _cases(quick))


def _cases(quick: bool) -> Iterator[Case]:
    for config, size in ((FLASH, "flash"), (PRO, "pro")):
        d = config.hidden_size
        for m in (1, 16) if quick else (1, 4, 8, 16, 64, 256):
            make, weight, flops = partial(head_args, m, d), 2.0 * VOCAB * d, 2.0 * m * VOCAB * d
            bar = BAR_PERCENT if m <= 16 else None
            yield Case(f"{size} lm_head", "lm_head", m, make, weight + 4.0 * m * VOCAB, flops, torch_head, head_figures, bar)
            yield Case(f"{size} lm_head_greedy", "lm_head_greedy", m, make, weight, flops, torch_greedy, greedy_figures, bar)
            make = partial(draw_args, m, d)
            yield Case(f"{size} lm_head_sample", "lm_head_sample", m, make, weight, flops, torch_draw, draw_figures, bar)
            make, moved, how = partial(drawn_args, m, d), weight + 4.0 * m * VOCAB, [partial(drawn, p) for p in (False, True)]
            yield Case(f"{size} filtered head", "lm_head_peaks", m, make, moved, flops, how[0], drawn_figures, ours=how[1])
    for m in (1, 256) if quick else (1, 64, 256):
        row = 4.0 * m * VOCAB
        for kind in KINDS:
            make = partial(sample_args, kind, m)
            yield Case(f"flash sample, {kind}", "sample", m, make, row, 0.0, partial(torch_sample, kind), sampled_figures)
        make, peer = partial(sample_args, "filtered", m, draw=False), partial(torch_probabilities, "filtered")
        yield Case("flash probabilities", "probabilities", m, make, 2 * row, 0.0, peer, probability_figures)
    for m in (1, 64):
        make = partial(draft_args, m)  # at the least both distributions at the place of the first rejected draft
        yield Case("flash accept_drafts", "accept_drafts", m, make, 8.0 * m * VOCAB, 0.0, None, draft_figures)
    for m in (1, 64):
        for name, (args, oracle, words) in INTEGERS.items():
            check = partial(integer_figures, oracle)
            yield Case(f"flash {name}", name, m, partial(args, m), 8.0 * m * words, 0.0, oracle, check, bar_us=BAR_US)
    d = FLASH.hidden_size
    for m in (1, 64):
        moved = 4.0 * d * d + 2.0 * m * d * (1 + 2 * FLASH.hc_mult)
        flops = 2.0 * m * d * d * (1 + FLASH.hc_mult)
        yield Case("flash mtp_input", "mtp_input", m, partial(input_args, m, d), moved, flops, torch_input, input_figures)


def label(case: Case) -> str:
    """What `--match` looks at."""
    return f"{case.name} {case.m}"


def touch(case: Case) -> None:
    """The call on tensors without memory: asks for the kernels that the measurement will."""
    args, named = case.make("meta")
    for function in (case.ours, case.peer) if case.ours else (partial(operations.call, case.operation),):
        function(*args, **named)


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
    fields |= {"bar_percent": case.bar} if case.bar else {}
    fields |= {"bar_us": case.bar_us} if case.bar_us else {}
    sets = [case.make(device) for _ in range(min(common.num_copies(case.nbytes), 8))]
    ours = operations.checked(fields, case.ours or case.operation, sets, case.check)
    candidates: dict[str, Sequence[Call] | Failure] = {"ours": ours}
    if case.peer is not None:
        candidates["without peaks" if case.ours else "torch"] = operations.calls_of(case.peer, sets)
    bench.measure(case.name, fields, candidates, nbytes=case.nbytes, flops=case.flops)
