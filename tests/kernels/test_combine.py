"""The combination of experts' rows: every bit is that of sums in the order of expert ids, in the simulator and on the GPU."""

from __future__ import annotations

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels.moe.combine.api import combine, moe_combine
from dsv4lab.kernels.moe.combine.config import CombineConfig
from dsv4lab.reference import moe
from tests.kernels.simulated import simulating

BF16, F32 = torch.bfloat16, torch.float32


def position_of(expert_idx: torch.Tensor, experts: int) -> torch.Tensor:
    """Sorted row of every entry, as `permute` gives it; -1 for ids past the last expert."""
    flat = expert_idx.flatten()
    position = torch.empty_like(flat)
    position[torch.sort(flat, stable=True).indices] = torch.arange(flat.numel())
    return torch.where(flat < experts, position, -1).int()


def expected(y: torch.Tensor, expert_idx: torch.Tensor, experts: int, shared: torch.Tensor | None) -> torch.Tensor:
    """As `reference.moe.moe` adds: expert by expert, entries of one expert in order."""
    position = position_of(expert_idx, experts).view(expert_idx.shape)
    out = torch.zeros(expert_idx.shape[0], y.shape[1])
    for e in range(experts):
        rows, slot = (expert_idx == e).nonzero(as_tuple=True)
        out.index_add_(0, rows, y[position[rows, slot].long()].float())
    return out if shared is None else moe.moe_combine(out, shared)


def material(
    tokens: int, depth: int, top_k: int, experts: int, y_dtype: torch.dtype, shared_dtype: torch.dtype | None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows of very different sizes, so that another order gives other bits; experts repeat; ids of `experts` are dropped."""
    g = torch.Generator().manual_seed(seed + tokens * depth)
    expert_idx = torch.randint(0, experts + 1, (tokens, top_k), generator=g)
    y = torch.randn(tokens * top_k, depth, generator=g) * torch.exp(3 * torch.randn(tokens * top_k, 1, generator=g))
    shared = None if shared_dtype is None else torch.randn(tokens, depth, generator=g).to(shared_dtype)
    dropped = int((expert_idx == experts).sum())
    if dropped:
        y[-dropped:] = torch.nan  # rows behind the last that counts are nobody's
    return y.to(y_dtype), expert_idx, shared


@pytest.mark.parametrize(
    ("arch", "tokens", "depth", "top_k", "y_dtype", "shared_dtype", "config"),
    [
        ("sm_90a", 1, 4096, 6, BF16, BF16, None),
        ("sm_100a", 17, 128, 2, BF16, None, None),
        ("sm_90a", 3, 1024, 6, F32, BF16, CombineConfig("f32", 6, "bf16", 2)),
        ("sm_100a", 5, 1096, 3, BF16, F32, CombineConfig("bf16", 3, "f32", 4, warps=3)),  # the last piece is short
        ("sm_90a", 19, 64, 8, BF16, BF16, None),
    ],
)
def test_sums_have_the_reference_s_bits(
    arch: str,
    tokens: int,
    depth: int,
    top_k: int,
    y_dtype: torch.dtype,
    shared_dtype: torch.dtype | None,
    config: CombineConfig | None,
) -> None:
    y, expert_idx, shared = material(tokens, depth, top_k, 8, y_dtype, shared_dtype)
    with simulating(arch, schedule="lazy", checks=sim.Checks(races=True)):
        out = combine(y, position_of(expert_idx, 8), top_k=top_k, shared=shared, config=config)
    want = expected(y, expert_idx, 8, shared)
    assert out.dtype == want.dtype and torch.equal(out, want)


@pytest.mark.parametrize(("arch", "tokens", "depth", "dtype"), [("sm_100a", 1, 4096, BF16), ("sm_90a", 17, 136, F32)])
def test_plain_combination(arch: str, tokens: int, depth: int, dtype: torch.dtype) -> None:
    routed, shared = torch.randn(tokens, depth), torch.randn(tokens, depth).to(dtype)
    with simulating(arch):
        assert torch.equal(moe_combine(routed, shared), moe.moe_combine(routed, shared))


@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 16])
def test_choices_fit(top_k: int) -> None:
    for tokens in (1, 17, 8192):
        for depth in (8, 128, 4096, 7168):
            for y, shared in (("bf16", "bf16"), ("f32", None), ("bf16", "f32")):
                config = CombineConfig.for_shape(tokens, depth, y, top_k, shared)
                config.check()
                assert config.units == 1 or config.piece <= depth


@pytest.mark.parametrize(("tokens", "depth", "top_k"), [(1, 4096, 6), (5, 136, 3), (2, 64, 16)])
def test_rows_of_the_slots_are_added_in_the_order_of_experts(tokens: int, depth: int, top_k: int) -> None:
    """The same bits as of sorted rows; ids are wide, and of those that are no expert's, rows are not looked at."""
    y, ids, shared = material(tokens, depth, top_k, 4, BF16, F32)
    rows = y[position_of(ids, 4).long().clamp(min=0)].view(-1, depth)
    rows[ids.flatten() == 4] = torch.nan
    wide = torch.where(ids == 4, torch.tensor([4, -1, 2**32, 2**31])[torch.arange(ids.numel()) % 4].view(ids.shape), ids)
    with simulating("sm_90a", checks=sim.Checks(races=True)):
        got = combine(rows, wide.flatten(), top_k=top_k, shared=shared, num_experts=4)
    assert torch.equal(got, expected(y, ids, 4, shared))


def test_bad_rows_are_refused_and_none_is_nothing() -> None:
    y, position, shared = torch.zeros(8, 16), torch.zeros(8, dtype=torch.int32), torch.zeros(4, 16)
    for args, other, message in (
        ((y, position.long()), shared, r"position must be int32, got torch\.int64"),
        ((y, position[:7]), shared, r"position must be \(M k,\), got \(7,\), k=2"),
        ((y.half(), position), shared, "y must be bfloat16 or float32"),
        ((y[:, :12].contiguous(), position), shared, r"D % 8 == 0, got \(8, 12\)"),
        ((y[:0], position), None, "y must have rows to sum, got none for 4 tokens"),
        ((y, position), shared[:3], r"shared must be \(4, 16\), got \(3, 16\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            combine(*args, top_k=2, shared=other)
    with pytest.raises(TypeError, match=r"position must be int64, got torch\.int32"):
        combine(y, position, top_k=2, num_experts=4)
    with pytest.raises(ValueError, match="y must have the 8 rows of the slots for 4 experts, got 7"):
        combine(y[:7], position.long(), top_k=2, num_experts=4)
    with pytest.raises(ValueError, match="experts must be 0, or below"):
        CombineConfig("f32", 1, None, indexed=False, experts=4).check()
    with pytest.raises(ValueError, match=r"config must be for \(y, top_k, shared, indexed, experts\)"):
        combine(y, position, top_k=2, config=CombineConfig("bf16", 2, None))
    with pytest.raises(TypeError, match="routed must be float32"):
        moe_combine(shared.bfloat16(), shared)
    with pytest.raises(ValueError, match="top_k must be 1 to 16, got 17"):
        CombineConfig("f32", 17, None).check()
    assert combine(y, position[:0], top_k=2).shape == (0, 16)
    assert moe_combine(shared[:0], shared[:0]).shape == (0, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [1, 3, 16, 129, 1024, 4097, 8192])
def test_on_the_gpu(tokens: int, seed: int) -> None:
    for depth, top_k, experts, y_dtype, shared_dtype in ((4096, 6, 256, BF16, BF16), (1792, 6, 384, F32, None)):
        y, expert_idx, shared = material(tokens, depth, top_k, experts, y_dtype, shared_dtype, seed)
        y, position = y.cuda(), position_of(expert_idx, experts).cuda()
        out = combine(y, position, top_k=top_k, shared=None if shared is None else shared.cuda())
        total = torch.zeros(tokens, depth, device="cuda")
        for at in torch.where(position < 0, 2**31 - 1, position).view(tokens, top_k).sort(-1).values.unbind(1):
            total += torch.where(at[:, None] < y.shape[0], y[at.clamp(max=y.shape[0] - 1).long()].float(), 0.0)
        assert torch.equal(out, total if shared is None else moe.moe_combine(total, shared.cuda()))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_inputs() -> None:
    y, position = torch.zeros(600, 4096, dtype=BF16, device="cuda"), torch.zeros(600, dtype=torch.int32, device="cuda")
    combine(y, position, top_k=6)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = combine(y, position, top_k=6)
    for seed in range(3):
        new, expert_idx, _ = material(100, 4096, 6, 256, BF16, None, seed)
        y.copy_(new)
        position.copy_(position_of(expert_idx, 256))
        graph.replay()
        assert torch.equal(out.cpu(), expected(new, expert_idx, 256, None))
