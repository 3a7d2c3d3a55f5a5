"""From the calls that `ops.observe()` collected to the arrays that figures and checks want.

Nothing is computed again that an operation already returned; what only existed inside one (attention probabilities, the
collapse weights of a hyper-connection) is worked out by the float32 reference from the operation's own inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dsv4lab.dispatch import Call, observe
from dsv4lab.lab.draws import judged_drafts
from dsv4lab.reference.attention import attention_probabilities, gather_keys
from dsv4lab.reference.mhc import mhc_coefficients, mhc_mix, sinkhorn

if TYPE_CHECKING:
    from dsv4lab.model.model import Model


def find(calls: Sequence[Call], name: str, scope: str = "") -> list[Call]:
    """The calls of one operation, in order; scope: that of the calls or an outer one, such as "layers.1"."""
    return [c for c in calls if c.name == name and (not scope or c.scope == scope or c.scope.startswith(f"{scope}."))]


def only(calls: Sequence[Call], name: str, scope: str = "") -> Call:
    """The one call of an operation in a scope. Raises LookupError where there is none or several."""
    found = find(calls, name, scope)
    if len(found) != 1:
        raise LookupError(f"there must be one call of {name} in {scope or 'any scope'}, got {len(found)}")
    return found[0]


# ---- streams and hyper-connections -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Site:
    """One hyper-connection at work: the streams it read, and its coefficients.

    streams (M, S, D); pre, post (M, S) f32; comb (M, S, S) f32, [old, new]; logits (M, S, S) f64: comb before Sinkhorn.
    """

    name: str
    streams: torch.Tensor
    pre: torch.Tensor
    post: torch.Tensor
    comb: torch.Tensor
    logits: torch.Tensor


def mhc_sites(calls: Sequence[Call]) -> list[Site]:
    """The hyper-connections of the backbone in order: "0 attn", "0 ffn", "1 attn" ...

    post and comb are what the operation returned; pre and the logits are computed from its inputs.
    """
    sites = []
    for call in calls:
        if call.name not in ("mhc_pre", "mhc_post_pre") or not call.scope.startswith("layers."):
            continue
        streams = call.inputs["streams"] if call.name == "mhc_pre" else call.output[0]
        weights = [call.inputs[part] for part in ("fn", "base", "scale")]
        options = {part: call.inputs[part] for part in ("eps", "hc_eps", "sinkhorn_iters")}
        pre, _, _ = mhc_coefficients(streams, *weights, **options)
        fn, base, scale = weights
        n = streams.shape[1]
        logits = mhc_mix(streams, fn, eps=options["eps"])[:, 2 * n :] * scale[2] + base[2 * n :]
        name = call.scope.removeprefix("layers.").replace(".", " ")
        sites.append(Site(name, streams, pre, call.output[-2], call.output[-1], logits.view(-1, n, n)))
    return sites


def sinkhorn_rates(logits: torch.Tensor, *, iters: int, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How fast each matrix becomes doubly stochastic: (measured, predicted) factor per iteration, (R,) f64 each.

    logits (R, S, S). Measured: the last ratio of two successive row-sum errors above `floor` within `iters` iterations, NaN
    where there are no two. Predicted: the square of the second singular value of the limit (taken at 20 * iters).
    """
    errors = torch.stack([(sinkhorn(logits, iters=i, eps=0.0).sum(-1) - 1).abs().amax(-1) for i in range(1, iters + 1)])
    clear = (errors > floor).sum(0)  # errors fall, so these are the first ones
    last = (clear - 1).clamp(min=1)[None]
    measured = (errors.gather(0, last) / errors.gather(0, last - 1))[0]
    limit = sinkhorn(logits, iters=20 * iters, eps=0.0)
    return torch.where(clear >= 2, measured, torch.nan), torch.linalg.svdvals(limit)[:, 1] ** 2


def layer_streams(calls: Sequence[Call]) -> list[torch.Tensor]:
    """The streams (M, S, D) that leave each backbone layer, of all observed steps one after the other."""
    outs: dict[str, list[torch.Tensor]] = {}
    for call in find(calls, "mhc_post", "layers"):
        outs.setdefault(call.scope, []).append(call.output)
    return [torch.cat(parts) for parts in outs.values()]


def streams_through_depth(model: Model, steps: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Run one sequence, cut into `steps` of token ids -> the streams (tokens, S * D) f32 that leave each layer."""
    cache = model.new_cache(max_seqs=1, max_tokens=sum(map(len, steps)), max_step=max(map(len, steps)))
    seq = cache.open()
    with observe() as calls:
        for step in steps:
            model.run_step(cache, [(seq, list(step))])
    return [layer.float().flatten(1) for layer in layer_streams(calls)]


def draft_agreement(model: Model, ids: Sequence[int]) -> torch.Tensor:
    """Whether the prediction block's draft for token i + 2 is the backbone's own choice there, over a text: (len - 2,) bool."""
    judge, drafts = judged_drafts(model, ids)
    return drafts[:-1].argmax(-1) == judge[:-1].argmax(-1)


def row_cosines(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cosine of each token's streams with the wanted ones, through depth: two lists of L (tokens, n) -> (L, tokens) f64."""
    pairs = zip(got, want, strict=True)
    return torch.stack([torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in pairs])


def relative_errors(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> torch.Tensor:
    """Norm of the difference over the norm of the wanted, through depth: two lists of L (tokens, n) -> (L,) f64."""
    pairs = zip(got, want, strict=True)
    return torch.stack([(a.double() - b.double()).norm() / b.double().norm() for a, b in pairs])


# ---- attention and experts ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AttentionMap:
    """Where some queries of one sequence look; P key positions from `key_start` on, T entries from 0 on.

    window (H, S, P), compressed (H, S, T), sink (H, S): probabilities, f64, zero where not attended.
    window_seen (S, P), entries_seen (S, T) bool: what each query may attend to.
    """

    query_start: int
    key_start: int
    window: torch.Tensor
    compressed: torch.Tensor
    sink: torch.Tensor
    window_seen: torch.Tensor
    entries_seen: torch.Tensor


def attention_map(call: Call, first: int, count: int, *, num_entries: int = 0) -> AttentionMap:
    """The probabilities of queries [first, first + count) of an observed `attention` call over a single sequence.

    num_entries: columns for compressed entries, at least as many as the queries may see. The page pools must still hold
    what the call saw: later steps must not have overwritten it. Raises ValueError for rows of several sequences.
    """
    a = call.inputs
    rows = slice(first, first + count)
    positions, seqs = a["positions"][rows], a["seq_idx"][rows].unique().tolist()
    if len(seqs) != 1:
        raise ValueError(f"the queries must belong to one sequence, got sequences {seqs}")
    where = {k: a[k] for k in ("window", "ring_len", "ratio", "record", "window_page", "entry_page", "rope_dim")}
    topk = None if a["topk_indices"] is None else a["topk_indices"][rows]
    pools = (a["window_pages"], a["entry_pages"], a["block_table"])
    keys = gather_keys(*pools, positions, seqs[0], topk, dim=a["q"].shape[-1], **where)
    p, sink = attention_probabilities(a["q"][rows], keys, a["sinks"], scale=a["scale"])
    near = len(keys.positions)
    width = max(num_entries, int(keys.entries.max()) + 1 if len(keys.entries) else 0)
    compressed = p.new_zeros(*p.shape[:2], width)
    compressed[..., keys.entries] = p[..., near:]
    entries_seen = keys.visible.new_zeros(count, width)
    entries_seen[:, keys.entries] = keys.visible[:, near:]
    return AttentionMap(
        query_start=int(positions[0]),
        key_start=int(keys.positions[0]),
        window=p[..., :near].transpose(0, 1),
        compressed=compressed.transpose(0, 1),
        sink=sink.t(),
        window_seen=keys.visible[:, :near],
        entries_seen=entries_seen,
    )


def expert_counts(calls: Sequence[Call], num_experts: int) -> torch.Tensor:
    """Tokens routed to each expert by every backbone layer, all observed steps together: (L, E) int64."""
    counts: dict[str, torch.Tensor] = {}
    for call in find(calls, "moe_layer", "layers"):
        load = torch.bincount(call.inputs["expert_idx"].flatten(), minlength=num_experts)
        counts[call.scope] = counts.get(call.scope, torch.zeros_like(load)) + load
    return torch.stack([counts[scope] for scope in sorted(counts, key=lambda s: int(s.split(".")[1]))])


# ---- the shape tour ----------------------------------------------------------------------------------------------------
Stage = tuple[str, tuple[int, ...], str]


def shape_stages(
    calls: Sequence[Call], layer_kinds: Sequence[str], router_kinds: Sequence[str]
) -> tuple[list[Stage], list[str], list[Stage]]:
    """A prompt's path as `viz.plot_shape_tour` draws it: trunk stages (name, output shape, note), their kinds, MTP stages.

    layer_kinds, router_kinds: of the configuration. Every shape is that of a tensor that was observed.
    """
    embedded = find(calls, "embed_streams")[0]
    trunk: list[Stage] = [
        ("token ids", tuple(embedded.inputs["token_ids"].shape), "positions 0, 1, 2 ..."),
        ("embedding", tuple(embedded.output.shape), "one copy in every stream"),
    ]
    kinds = ["ends", "ends"]
    for i, (kind, router) in enumerate(zip(layer_kinds, router_kinds, strict=True)):
        attention = only(calls, "attention", f"layers.{i}")
        post = only(calls, "mhc_post", f"layers.{i}")
        experts = only(calls, "moe_layer", f"layers.{i}")
        entries = attention.inputs["entry_pages"]
        heads = " x ".join(str(d) for d in attention.inputs["q"].shape[1:])
        seen = "window only" if entries is None else f"window + 1 entry per {attention.inputs['ratio']} tokens"
        joined = only(calls, "mhc_post_pre", f"layers.{i}")
        trunk.append((f"layer {i}: {kind} attention", tuple(joined.output[0].shape), f"queries {heads}; {seen}"))
        chosen = experts.inputs["expert_idx"].shape[1]
        trunk.append((f"layer {i}: experts", tuple(post.output.shape), f"{chosen} a token by {router}, and the shared one"))
        kinds += [f"{kind} attention", f"experts by {router}"]
    hidden, logits = only(calls, "mhc_head", "head"), only(calls, "lm_head", "head")
    trunk.append(("collapse, norm", tuple(hidden.output.shape), "four streams into one"))
    trunk.append(("LM head", tuple(logits.output.shape), "one logit a vocabulary entry"))
    return trunk, [*kinds, "ends", "ends"], _mtp_stages(calls)


def _mtp_stages(calls: Sequence[Call]) -> list[Stage]:
    if not find(calls, "mtp_input"):
        return []
    fused, layer = only(calls, "mtp_input"), only(calls, "mhc_post", "mtp")
    hidden, logits = only(calls, "mhc_head", "mtp"), only(calls, "lm_head", "mtp")
    return [
        ("MTP: fuse", tuple(fused.output.shape), "streams of i with the embedding of token i + 1"),
        ("MTP: layer", tuple(layer.output.shape), "an ordinary SWA layer with its own cache"),
        ("MTP: collapse", tuple(hidden.output.shape), "its own weights"),
        ("MTP: LM head", tuple(logits.output.shape), "shared with the trunk; predicts token i + 2"),
    ]
