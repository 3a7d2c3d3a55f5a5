"""The attention sub-layer's decode step in a CUDA graph: what is launched never depends on how long the sequences are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsv4lab
from dsv4lab import ops
from dsv4lab.config import CSA, HCA, SWA, ModelConfig
from dsv4lab.model.attention import Attention
from dsv4lab.model.cache import Batch, Cache, LayerCache
from dsv4lab.model.numerics import OFFICIAL, Numerics

CONFIG = replace(ModelConfig.nano(), index_topk=16)  # so that the indexer has something to leave out


def layer(kind: str, numerics: Numerics) -> Attention:
    """A layer's attention with random weights; the same for the same kind."""
    torch.manual_seed((SWA, CSA, HCA).index(kind))
    c, attention = CONFIG, Attention(CONFIG, kind, numerics)
    for name, module in attention.named_modules():
        if hasattr(module, "rows"):
            module.assign("weight", (torch.randn(module.rows, module.columns) * module.columns**-0.5).bfloat16())
        elif name.rpartition(".")[2] in ("q_norm", "kv_norm", "norm"):
            dim = {"q_norm": c.q_lora_rank, "kv_norm": c.head_dim}.get(name, c.head_dim)
            dim = c.index_head_dim if name.startswith("indexer") else dim
            module.assign("weight", (1 + 0.1 * torch.randn(dim)).bfloat16())
        elif hasattr(module, "ape"):
            width = (c.index_head_dim if name.startswith("indexer") else c.head_dim) * (2 if module.overlap else 1)
            module.assign("ape", torch.randn(module.ratio, width))
    attention.assign("attn_sink", torch.randn(c.num_attention_heads))
    return attention


def prepared(kind: str, numerics: Numerics, device: str) -> tuple[Attention, Cache, LayerCache, list[int]]:
    """A layer and a cache with two sequences, empty."""
    cache = Cache(
        CONFIG, numerics, max_seqs=2, max_tokens=1500, max_step=600, max_rewind=2, dtype=torch.bfloat16, device=device
    )
    mine = cache.layers[CONFIG.layer_kinds.index(kind)]
    return layer(kind, numerics).to(device), cache, mine, [cache.open(), cache.open()]


def plan(cache: Cache, seqs: list[int], counts: list[int], *, fixed: bool = False) -> Batch:
    """The next step of `counts` tokens; the cache counts them."""
    for seq, count in zip(seqs, counts, strict=True):
        cache.reserve(seq, count)
    batch = Batch.plan(cache, [(seq, [0] * count) for seq, count in zip(seqs, counts, strict=True)], fixed=fixed)
    for seq, count in zip(seqs, counts, strict=True):
        cache.advance(seq, count)
    return batch


@pytest.mark.gpu
@pytest.mark.parametrize("record", ["fp8", "nvfp4", "plain"])
@pytest.mark.parametrize("kind", [SWA, CSA, HCA])
@torch.inference_mode()
def test_replays_are_the_steps_themselves(kind: str, record: str) -> None:
    """130 steps pass the ends of entries of both ratios; every output is that of a launch without a graph, and the
    reference's up to rounding."""
    numerics = replace(OFFICIAL, quantize_activations=False, kv_record=record)
    inputs = torch.Generator("cuda").manual_seed(1)

    def x(rows: int) -> torch.Tensor:
        return torch.randn(rows, CONFIG.hidden_size, device="cuda", generator=inputs).bfloat16()

    runs = [prepared(kind, numerics, "cuda") for _ in range(3)]
    prompt = x(503 + 90)
    for (attention, cache, mine, seqs), backend in zip(runs, ("kernel", "kernel", "reference"), strict=True):
        with dsv4lab.backend(backend):
            attention(prompt, plan(cache, seqs, [503, 90]), mine)

    attention, cache, mine, seqs = runs[0]
    with dsv4lab.backend("kernel"):
        batch, held = plan(cache, seqs, [1, 2], fixed=True), x(3)
        before = {name: part.clone() for name, part in vars(mine).items() if part is not None}
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            attention(held, batch, mine)  # compiled, prepared
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = attention(held, batch, mine)
        for name, part in before.items():
            getattr(mine, name).copy_(part)
    worst = 1.0
    for step in range(130):
        if step:
            batch.copy_(plan(cache, seqs, [1, 2]))
            held.copy_(x(3))
        graph.replay()
        outputs = []
        for (other, its_cache, its_layer, its_seqs), backend in zip(runs[1:], ("kernel", "reference"), strict=True):
            with dsv4lab.backend(backend):
                outputs.append(other(held, plan(its_cache, its_seqs, [1, 2], fixed=True), its_layer))
        assert torch.equal(y, outputs[0]), step
        worst = min(worst, float(torch.cosine_similarity(y.double(), outputs[1].double()).min()))
    assert worst > 0.99
    assert not torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("kind", [SWA, CSA, HCA])
def test_every_operation_of_a_layer_has_a_kernel(kind: str) -> None:
    """On the CPU, by what a small step asks for."""
    attention, cache, mine, seqs = prepared(kind, OFFICIAL, "cpu")
    with torch.inference_mode(), ops.observe() as calls:
        attention(torch.randn(7 + 130, CONFIG.hidden_size).bfloat16(), plan(cache, seqs, [7, 130], fixed=True), mine)
    made = ops.implementations()
    assert {call.name: made[call.name] for call in calls if "sm_90a" not in made[call.name]} == {}
    names = {"linear", "two_linears", "rmsnorm", "q_norm_rope", "cache_write", "attention", "inverse_rope", "grouped_linear"}
    names |= {"compress"} if kind != SWA else set()
    names |= {"index_query", "index_scores", "index_topk"} if kind == CSA else set()
    assert {call.name for call in calls} == names
