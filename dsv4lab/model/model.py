"""The whole model: token ids to logits, over a cache (spec 2, 6, 7)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from dsv4lab import ops
from dsv4lab.config import ModelConfig
from dsv4lab.formats import PackedWeight
from dsv4lab.model.block import Block
from dsv4lab.model.cache import DEFAULT_STEP, Batch, Cache, CacheFull
from dsv4lab.model.engine import Completion, generate
from dsv4lab.model.layers import HyperConnection, Weight
from dsv4lab.model.mtp import MTPBlock
from dsv4lab.model.numerics import Numerics
from dsv4lab.model.round import Sampling, as_integer
from dsv4lab.model.tokenizer import Tokenizer

_HC_SITE = re.compile(r"(?P<site>hc_(?:attn|ffn|head))_(?P<part>fn|base|scale)$")
_EXPERT = re.compile(r"(?P<module>.*\.experts)\.(?P<leaf>\d+\.w[123]\.weight)$")


class Model(nn.Module):
    """DeepSeek-V4 over `ops`. Build with `dsv4lab.load`; weights keep the checkpoint's bytes, activations are `dtype`."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config, self.numerics, self.dtype = config, numerics, dtype
        self.device = torch.device(device)
        self.tokenizer: Tokenizer | None = None
        self.embed = Weight()
        layers = zip(config.layer_kinds, config.router_kinds, strict=True)
        self.layers = nn.ModuleList(Block(config, kind, router, numerics) for kind, router in layers)
        self.hc_head = HyperConnection()
        self.norm = Weight()
        self.head = Weight()
        self.mtp = nn.ModuleList(MTPBlock(config, numerics) for _ in range(config.num_nextn_predict_layers))
        self.to(self.device)

    def assign(self, name: str, value: torch.Tensor | PackedWeight) -> None:
        """Take one tensor of a checkpoint by its official name."""
        if match := _EXPERT.match(name):
            module, leaf = match["module"], match["leaf"]
        elif match := _HC_SITE.search(name):
            module, leaf = name[: match.start()] + match["site"], match["part"]
        else:
            module, _, leaf = name.rpartition(".")
        self.get_submodule(module).assign(leaf, value)  # type: ignore[operator]

    # ---- forward -------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids (M,) -> (M, D) of the model's dtype."""
        return ops.embed_streams(token_ids, self.embed.weight, num_streams=1)[:, 0].to(self.dtype)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Run one step, write its cache -> the streams (M, S, D) before the head. The caller advances the cache."""
        streams = ops.embed_streams(batch.token_ids, self.embed.weight, num_streams=self.config.hc_mult).to(self.dtype)
        for i, (layer, cache) in enumerate(zip(self.layers, batch.cache.layers, strict=True)):
            with ops.scope(f"layers.{i}"):
                streams = layer(streams, batch, cache)
        return streams

    @torch.inference_mode()
    def collapse(self, streams: torch.Tensor) -> torch.Tensor:
        """Collapse and final norm: streams (M, S, D) -> (M, D), what the LM head reads."""
        c = self.config
        with ops.scope("head"):
            return ops.mhc_head(streams, *self.hc_head.tensors, self.norm.weight, eps=c.rms_norm_eps, hc_eps=c.hc_eps)

    @torch.inference_mode()
    def head_logits(self, streams: torch.Tensor) -> torch.Tensor:
        """Collapse, final norm, LM head: streams (M, S, D) -> (M, V) f32."""
        hidden = self.collapse(streams)
        with ops.scope("head"):
            return ops.lm_head(hidden, self.head.weight)

    @torch.inference_mode()
    def predict(self, streams: torch.Tensor, next_ids: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction block: streams (M, S, D) at i, ids (M,) at i + 1 -> its own streams, and (M, D), what the LM head
        reads for the token at i + 2."""
        with ops.scope("mtp.0"):
            embedding = self.embedding(next_ids)
            return self.mtp[0].predict(streams, embedding, batch, batch.cache.mtp[0])  # type: ignore[operator]

    @torch.inference_mode()
    def predict_next(self, streams: torch.Tensor, next_ids: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction block: streams (M, S, D) at i, ids (M,) at i + 1 -> its own streams, logits (M, V) for i + 2."""
        streams, hidden = self.predict(streams, next_ids, batch)
        with ops.scope("mtp.0"):
            return streams, ops.lm_head(hidden, self.head.weight)

    def new_cache(self, *, max_seqs: int, max_tokens: int, max_step: int = DEFAULT_STEP, max_rewind: int = 0) -> Cache:
        """An empty cache for this model. max_tokens: all sequences together; see `Cache`."""
        return Cache(
            self.config,
            self.numerics,
            max_seqs=max_seqs,
            max_tokens=max_tokens,
            max_step=max_step,
            max_rewind=max_rewind,
            dtype=self.dtype,
            device=self.device,
        )

    def logits(self, ids: torch.Tensor | Sequence[int], *, step: int = DEFAULT_STEP) -> torch.Tensor:
        """Logits of every position.

        ids (S,) or (B, S) int64; step: tokens of a sequence per forward step -> (B, S, V) f32, B = 1 for ids (S,).
        Raises ValueError on ids outside the vocabulary or an empty sequence, TypeError on a float tensor.
        """
        rows = self.check_ids(ids)
        length = len(rows[0])
        cache = self.new_cache(max_seqs=len(rows), max_tokens=len(rows) * length, max_step=min(step, length))
        seqs = [cache.open() for _ in rows]
        out = [
            self.head_logits(streams).unflatten(0, (len(rows), -1))
            for streams in self.prefill(cache, list(zip(seqs, rows, strict=True)))
        ]
        return torch.cat(out, dim=1)

    def prefill(self, cache: Cache, sequences: list[tuple[int, list[int]]]) -> Iterable[torch.Tensor]:
        """Feed (sequence, ids) pairs of equal length in steps of at most cache.max_step; yields each step's streams."""
        length = max(len(ids) for _, ids in sequences)
        for start in range(0, length, cache.max_step):
            step = [(seq, ids[start : start + cache.max_step]) for seq, ids in sequences]
            yield self.run_step(cache, step)[1]

    def run_step(self, cache: Cache, step: list[tuple[int, list[int]]]) -> tuple[Batch, torch.Tensor]:
        """Reserve, run and count one step of (sequence, new ids) pairs -> its batch and streams (M, S, D)."""
        try:
            for seq, ids in step:
                cache.reserve(seq, len(ids))
        except CacheFull:
            for seq, _ in step:
                cache.rewind(seq, cache.lengths[seq])  # gives back what the others took
            raise
        batch = Batch.plan(cache, step)
        streams = self(batch)
        for seq, ids in step:
            cache.advance(seq, len(ids))
        return batch, streams

    # ---- generation ----------------------------------------------------------------------------------------------------
    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Iterable[int] | None = None,
        num_drafts: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continue several prompts of any lengths together; see `engine.generate`. stop_ids: the config's EOS where None."""
        rows = [self.check_ids(p) for p in prompts]
        if not rows or max(map(len, rows)) > 1:
            raise ValueError(f"prompts must be one or more of (S,), got {[len(r) for r in rows]} rows")
        given = self.config.eos_token_ids if stop_ids is None else stop_ids
        stops = frozenset(as_integer("stop_ids", i, 0, self.config.vocab_size) for i in given)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return generate(
            self,
            [r for (r,) in rows],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=stops,
            num_drafts=num_drafts,
            on_token=on_token,
        )

    def generate(
        self,
        ids: torch.Tensor | Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 40,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Iterable[int] | None = None,
        num_drafts: int = 0,
        on_token: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """The new ids that continue `ids`, greedily by default; a stop id ends a sequence and is part of it.

        ids (S,) -> (n,) int64, n <= max_new_tokens; ids (B, S) -> (B, n), rows that ended early filled up with their stop id.
        temperature, top_k, top_p, seed: see `Sampling`; num_drafts: tokens the MTP block drafts ahead; on_token: called with
        each new id of a single sequence as it is made. For prompts of different lengths use `complete`.
        """
        rows = self.check_ids(ids)
        single = torch.as_tensor(ids).dim() == 1
        if on_token is not None and len(rows) > 1:
            raise ValueError(f"on_token needs a single sequence, got {len(rows)}; use complete")
        done = self.complete(
            rows,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_ids=stop_ids,
            num_drafts=num_drafts,
            on_token=None if on_token is None else lambda _, token: on_token(token),
        )
        width = max(len(c.ids) for c in done)
        filled = torch.tensor([c.ids + c.ids[-1:] * (width - len(c.ids)) for c in done], dtype=torch.int64)
        return filled[0] if single else filled

    def check_ids(self, ids: torch.Tensor | Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids as lists, one a sequence. Raises ValueError or TypeError naming what is wrong."""
        try:
            tensor = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"ids must be integers in rows of one length: {error}") from error
        if tensor.dim() not in (1, 2) or tensor.numel() == 0:
            raise ValueError(f"ids must be (S,) or (B, S) with at least one token, got shape {tuple(tensor.shape)}")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"ids must be integers, got {tensor.dtype}")
        tensor = tensor.long()  # uint16 has no minimum
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"ids must be in [0, vocab_size {self.config.vocab_size}), got {low if low < 0 else high}")
        return torch.atleast_2d(tensor).tolist()
