"""The attention sub-layer: projections, compressors, indexer, core attention, grouped output projection (spec 4)."""

from __future__ import annotations

import torch
from torch import nn

from dsv4lab import ops
from dsv4lab.config import CSA, SWA, ModelConfig
from dsv4lab.model.cache import WINDOW_PAGE, Batch, LayerCache
from dsv4lab.model.layers import GroupedLinear, Linear, Weight, both
from dsv4lab.model.numerics import Numerics
from dsv4lab.reference.rope import rope_frequencies


class Compressor(nn.Module):
    """One compressor: tokens in, completed entries stored as keys, state carried in a ring."""

    def __init__(self, config: ModelConfig, kind: str, dim: int, numerics: Numerics, *, key: str) -> None:
        """key: what its entries become, "kv" or "index"."""
        super().__init__()
        self.kind, self.key, self.ratio, self.overlap = kind, key, config.ratio(kind), kind == CSA
        self.eps = config.rms_norm_eps
        self.record = numerics.kv_record if key == "kv" else numerics.index_record
        width = dim * (2 if self.overlap else 1)
        self.wkv = Linear(width, config.hidden_size, numerics)
        self.wgate = Linear(width, config.hidden_size, numerics)
        self.norm = Weight()
        self.register_buffer("ape", None)

    def assign(self, leaf: str, value: torch.Tensor) -> None:
        """Take `ape` (ratio, width), kept in float32."""
        setattr(self, leaf, value.float())

    def forward(self, x: torch.Tensor, batch: Batch, inv_freq: torch.Tensor, state: torch.Tensor, pages: torch.Tensor) -> None:
        """x (M, D): pools the entries that the step completes, writes them to `pages`, moves the tokens into the ring."""
        ops.compress(
            *both(self.wkv, self.wgate, x, torch.float32),
            self.ape,
            state,
            self.norm.weight,
            inv_freq,
            pages,
            batch.positions,
            batch.seq_idx,
            batch.first_row,
            batch.last_position,
            batch.cache.block_table,
            ratio=self.ratio,
            overlap=self.overlap,
            eps=self.eps,
            record=self.record,
            page_size=batch.cache.page_size(self.kind),
            key=self.key,
            rounded=x.dtype == torch.bfloat16,
        )


class Indexer(nn.Module):
    """Scores the visible entries of every query and keeps the best `index_topk` (CSA only)."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.record = config, numerics.index_record
        self.wq_b = Linear(config.index_n_heads * config.index_head_dim, config.q_lora_rank, numerics)
        self.weights_proj = Linear(config.index_n_heads, config.hidden_size, numerics)
        self.compressor = Compressor(config, CSA, config.index_head_dim, numerics, key="index")
        self.scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5

    def forward(
        self, x: torch.Tensor, qr: torch.Tensor, batch: Batch, cache: LayerCache, inv_freq: torch.Tensor
    ) -> torch.Tensor | None:
        """x (M, D), qr (M, Rq) -> (M, index_topk) int32 entries, -1 = empty; None where every query sees all it may."""
        plan = batch.entries[CSA]
        assert cache.index_state is not None and cache.index_pages is not None
        self.compressor(x, batch, inv_freq, cache.index_state, cache.index_pages)
        if plan.max_visible <= self.config.index_topk:
            return None
        q = self.wq_b(qr).view(-1, self.config.index_n_heads, self.config.index_head_dim)
        q = ops.index_query(q, batch.positions, inv_freq, record=self.record)
        head_weights = self.weights_proj(x, out_dtype=torch.float32)
        scores = ops.index_scores(
            q,
            head_weights,
            cache.index_pages,
            batch.cache.block_table,
            batch.seq_idx,
            plan.num_visible,
            record=self.record,
            page_size=batch.cache.page_size(CSA),
            max_entries=plan.max_visible,
            scale=self.scale,
            fill=False,  # `index_topk` looks at what is visible
        )
        return ops.index_topk(scores, plan.num_visible, k=self.config.index_topk)


class Attention(nn.Module):
    """One layer's attention, of any kind: SWA, CSA or HCA."""

    def __init__(self, config: ModelConfig, kind: str, numerics: Numerics) -> None:
        super().__init__()
        c = self.config = config
        self.kind, self.numerics = kind, numerics
        self.wq_a = Linear(c.q_lora_rank, c.hidden_size, numerics)
        self.q_norm = Weight()
        self.wq_b = Linear(c.num_attention_heads * c.head_dim, c.q_lora_rank, numerics)
        self.wkv = Linear(c.head_dim, c.hidden_size, numerics)
        self.kv_norm = Weight()
        heads_per_group = c.num_attention_heads // c.o_groups
        self.wo_a = GroupedLinear(c.o_groups * c.o_lora_rank, heads_per_group * c.head_dim, numerics)
        self.wo_b = Linear(c.hidden_size, c.o_groups * c.o_lora_rank, numerics)
        self.register_buffer("attn_sink", None)
        theta, scaling = (c.rope_theta, None) if kind == SWA else (c.compress_rope_theta, c.rope_scaling)
        self.register_buffer("inv_freq", rope_frequencies(rope_dim=c.qk_rope_head_dim, theta=theta, scaling=scaling))
        if kind != SWA:
            self.compressor = Compressor(c, kind, c.head_dim, numerics, key="kv")
        if kind == CSA:
            self.indexer = Indexer(c, numerics)

    def assign(self, leaf: str, value: torch.Tensor) -> None:
        """Take `attn_sink` (H,), kept in float32."""
        setattr(self, leaf, value.float())

    def forward(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        """x (M, D) normalised -> (M, D). Writes the step's keys, entries and state before it attends."""
        c = self.config
        qa, kv = both(self.wq_a, self.wkv, x)
        qr = ops.rmsnorm(qa, self.q_norm.weight, eps=c.rms_norm_eps)
        q = self.wq_b(qr).view(-1, c.num_attention_heads, c.head_dim)
        q = ops.q_norm_rope(q, batch.positions, self.inv_freq, eps=c.rms_norm_eps)
        ops.cache_write(
            kv,
            self.kv_norm.weight,
            batch.positions,
            self.inv_freq,
            cache.window_pages,
            batch.window_slots,
            eps=c.rms_norm_eps,
            record=self.numerics.kv_record,
            page_size=WINDOW_PAGE,
        )
        topk = None
        if self.kind != SWA:
            assert cache.state is not None and cache.entry_pages is not None
            self.compressor(x, batch, self.inv_freq, cache.state, cache.entry_pages)
        if self.kind == CSA:
            topk = self.indexer(x, qr, batch, cache, self.inv_freq)
        out = ops.attention(
            q,
            self.attn_sink,
            cache.window_pages,
            cache.entry_pages,
            batch.cache.block_table,
            batch.positions,
            batch.seq_idx,
            topk,
            window=c.sliding_window,
            ring_len=batch.cache.ring_len,
            ratio=c.ratio(self.kind),
            scale=c.softmax_scale,
            record=self.numerics.kv_record,
            window_page=WINDOW_PAGE,
            entry_page=1 if self.kind == SWA else batch.cache.page_size(self.kind),
            rope_dim=c.qk_rope_head_dim,
            max_entries=batch.entries[self.kind].max_visible if self.kind in batch.entries else None,
        )
        out = ops.inverse_rope(out, batch.positions, self.inv_freq)
        low = self.wo_a(out.view(x.shape[0], c.o_groups, -1))
        return self.wo_b(low.flatten(1))
