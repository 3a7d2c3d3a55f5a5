"""The feed-forward sub-layer: router, routed experts, shared expert (spec 5)."""

from __future__ import annotations

import torch
from torch import nn

from dsv4lab import ops
from dsv4lab.config import HASH, ModelConfig
from dsv4lab.formats import PackedWeight
from dsv4lab.model.layers import ExpertStack, Linear
from dsv4lab.model.numerics import Numerics


class Gate(nn.Module):
    """Chooses the experts of a token: by the learned score plus a bias, or by a table of token ids."""

    def __init__(self, config: ModelConfig, router: str) -> None:
        super().__init__()
        self.router, self.top_k, self.route_scale = router, config.num_experts_per_tok, config.routed_scaling_factor
        for name in ("weight", "bias", "tid2eid"):
            self.register_buffer(name, None)

    def assign(self, leaf: str, value: torch.Tensor) -> None:
        """Take weight (E, D), bias (E,) f32, or tid2eid (V, top_k) int64."""
        setattr(self, leaf, value.float() if leaf == "bias" else value)

    def forward(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (M, D), token_ids (M,) -> weights (M, top_k) f32, expert ids (M, top_k) int64."""
        if self.router == HASH:
            return ops.router_hash(x, self.weight, self.tid2eid, token_ids, route_scale=self.route_scale)
        return ops.router_topk(x, self.weight, self.bias, top_k=self.top_k, route_scale=self.route_scale)


class Experts(nn.Module):
    """The routed experts, each matrix stacked over experts."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        c, self.limit, self.numerics = config, config.swiglu_limit, numerics
        self.w1 = ExpertStack(c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
        self.w3 = ExpertStack(c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
        self.w2 = ExpertStack(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size)

    def assign(self, leaf: str, value: torch.Tensor | PackedWeight) -> None:
        """Take one expert's matrix; leaf is "<expert>.<w1|w2|w3>.weight"."""
        expert, matrix, _ = leaf.split(".")
        getattr(self, matrix).assign(int(expert), value)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, expert_idx: torch.Tensor, shared: SharedExpert) -> torch.Tensor:
        """x (M, D), weights and expert_idx (M, top_k) -> (M, D): the shared expert's result included, rounded once."""
        act, shared_act = (self.numerics.act(of.w1.weight.format) for of in (self, shared))
        matrices = (m.weight for of in (self, shared) for m in (of.w1, of.w3, of.w2))
        return ops.moe_layer(x, weights, expert_idx, *matrices, limit=self.limit, act=act, shared_act=shared_act)


class SharedExpert(nn.Module):
    """The expert every token passes; runs with the routed ones, see `Experts`."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        self.w1 = Linear(config.moe_intermediate_size, config.hidden_size, numerics)
        self.w3 = Linear(config.moe_intermediate_size, config.hidden_size, numerics)
        self.w2 = Linear(config.hidden_size, config.moe_intermediate_size, numerics)


class MoE(nn.Module):
    """Routed experts plus the shared one, added in float32 and rounded once."""

    def __init__(self, config: ModelConfig, router: str, numerics: Numerics) -> None:
        super().__init__()
        self.gate = Gate(config, router)
        self.experts = Experts(config, numerics)
        self.shared_experts = SharedExpert(config, numerics)

    def forward(self, x: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """x (M, D) normalised, token_ids (M,) -> (M, D). The shared expert streams its weights while routes are found."""
        with ops.starting(x.device):
            weights, expert_idx = self.gate(x, token_ids)
            return self.experts(x, weights, expert_idx, self.shared_experts)
