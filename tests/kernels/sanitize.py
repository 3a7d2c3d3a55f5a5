"""Every kernel of linears, experts, routing and quantisers once, on small shapes, for NVIDIA's compute-sanitizer:

compute-sanitizer --tool memcheck python -m tests.kernels.sanitize
python tests/kernels/racecheck.py FOLDER    racecheck, of this and of sanitize_attention.py and sanitize_model.py

All results are compared with the reference, so that a run that does nothing does not pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dsv4lab.formats import to_atom128x4
from dsv4lab.kernels.gemm.mixed.api import linear
from dsv4lab.kernels.gemm.mixed.config import MixedConfig
from dsv4lab.kernels.gemm.mixed.layout import prepare
from dsv4lab.kernels.moe.experts import experts, layer
from dsv4lab.kernels.moe.router.api import router_hash, router_topk
from dsv4lab.kernels.quant.rows import api as rows
from dsv4lab.reference import gemm, moe, norm, quant
from tests.kernels.mixed import FORMATS, GPU_BOUND, products, random_weight, routing, trained_weight, worst
from tests.kernels.test_quantize_rows import EPS, LIMIT, on_cpu, per_row, same, within
from tests.kernels.test_router import SCALE, check_score, check_weights, exact, material

FEW = MixedConfig("nvfp4", "f32", 8, 4, 2, 2, splits=2)
SOME = MixedConfig("nvfp4", "f32", 64, 4, 1, 3)
MANY = MixedConfig("nvfp4", "bf16", 256, 8, 1, 3, (128, 192))


def linears() -> None:
    """NVFP4 in every form of the kernel; other formats with few tokens and with more, which are decoded differently."""
    others = [fmt for fmt in FORMATS if fmt != FEW.format]
    for m, config in (
        (5, FEW),
        (5, replace(FEW, cluster=2)),
        (13, replace(FEW, tokens=16, chunks=4, splits=4, per_warp=2)),
        (33, MixedConfig("nvfp4", "f32", 32, 4, 2, 2, cluster=2)),
        (300, MANY),
        *((5, replace(FEW, format=fmt)) for fmt in others),
        *((70, replace(SOME, format=fmt)) for fmt in others),
    ):
        x = torch.randn(m, 512, device="cuda").bfloat16()
        weight = random_weight(config.format, 200, 512, seed=m).to("cuda")
        ready = prepare(weight)
        torch.cuda.synchronize()
        out = torch.float32 if config.out == "f32" else torch.bfloat16
        error = worst(linear(x, ready, out_dtype=out, config=config), products(x, weight))
        assert error < (GPU_BOUND if config.out == "f32" else 2.0**-7), (config, error)
    x, weight = torch.randn(20, 3, 256, device="cuda").bfloat16(), random_weight("nvfp4", 3 * 64, 256, seed=2).to("cuda")
    want = torch.einsum("mgk,gnk->mgn", x.double(), quant.dequantize(weight).double().view(3, 64, 256))
    assert worst(linear(x, prepare(weight), out_dtype=torch.float32), want) < GPU_BOUND


def mixtures() -> None:
    weights = [trained_weight("nvfp4", 6, *shape, seed=1).to("cuda") for shape in ((64, 128), (64, 128), (128, 64))]
    for tokens in (1, 3, 400):
        x = torch.randn(tokens, 128, device="cuda").bfloat16()
        route, ids = (t.cuda() for t in routing(tokens, 6, 2, seed=2))
        y = experts(x, route, ids, *weights, limit=10.0, act="none")
        want = moe.moe(x, route, ids, *weights, limit=10.0, act="none")
        assert (y - want).norm() < 0.01 * want.norm()
        given = [replace(w, input_scale=torch.full((6,), 0.01, device="cuda")) for w in weights]
        for calibrated in (weights, [*weights[:2], given[2]], given):  # the second: product 1 quantises for product 2
            y = experts(x, route, ids, *calibrated, limit=10.0, act="nvfp4")
            want = moe.moe(x, route, ids, *calibrated, limit=10.0, act="nvfp4")
            assert (y - want).norm() < 0.05 * want.norm()
        how = dict(limit=10.0, act="none", shared_act="none")
        shared = tuple(w[0] for w in weights)
        y, want = layer(x, route, ids, tuple(weights), shared, **how), moe.moe_layer(x, route, ids, *weights, *shared, **how)
        assert (y - want).norm() < 0.01 * want.norm()
    official = [trained_weight("mxfp4", 6, *shape, seed=1).to("cuda") for shape in ((64, 128), (64, 128), (128, 64))]
    x, (route, ids) = torch.randn(3, 128, device="cuda").bfloat16(), (t.cuda() for t in routing(3, 6, 2, seed=2))
    y, want = (f(x, route, ids, *official, limit=10.0, act="fp8") for f in (experts, moe.moe))
    assert (y - want).norm() < 0.01 * want.norm()


def routers() -> None:
    """One launch, two, the kernel for many tokens, and float32."""
    bf16, f32 = torch.bfloat16, torch.float32
    for tokens, num_experts, dtype in ((3, 16, bf16), (100, 16, bf16), (400, 72, bf16), (19, 40, f32)):
        x, gate, bias = (t.cuda() for t in material(tokens, num_experts, 256, dtype, dtype))
        check_score(x, gate, bias, 6, router_topk(x, gate, bias, top_k=6, route_scale=SCALE))
        table = torch.randint(0, num_experts, (50, 6), device="cuda")
        token_ids = torch.randint(0, 50, (tokens,), device="cuda")
        weights, ids = router_hash(x, gate, table, token_ids, route_scale=SCALE)
        assert torch.equal(ids, table[token_ids])
        check_weights(*exact(x, gate), ids, weights)


def quantisers() -> None:
    """Every bit, but for SwiGLU's values. Of many rows, which are other kernels, those with one global scale."""
    for m, k in ((37, 512), (1100, 256)):
        given, (x, up, weight, factor) = torch.tensor(0.013), inputs(m, k)
        x_gpu, weight_gpu, gated = x.cuda(), weight.cuda(), (x.cuda(), up.cuda(), factor.cuda())
        normed, h = norm.rmsnorm(x, weight, eps=EPS), rows.swiglu(*gated, limit=LIMIT).cpu()
        within(h, moe.clamped_swiglu(x, up, limit=LIMIT) * factor[:, None])
        calls = [
            (rows.quantize_nvfp4(x_gpu), quant.quantize_nvfp4(x)),
            (rows.quantize_nvfp4(x_gpu, given.cuda()), quant.quantize_nvfp4(x, global_scale=given)),
            (rows.rmsnorm_nvfp4(x_gpu, weight_gpu, EPS), quant.quantize_nvfp4(normed)),
            (rows.swiglu_nvfp4(*gated, limit=LIMIT), quant.quantize_nvfp4(h)),
        ]
        if m == 37:
            (codes, blocks, scale), (mx_codes, mx_scale) = per_row(x), quant.quantize_mxfp4(x)
            mx_tiles = to_atom128x4(mx_scale.view(torch.uint8)).view(mx_scale.dtype)
            ragged = x[:, :203].contiguous()
            tiled = dict(layout="atom128x4")
            calls += [
                (rows.quantize_nvfp4(x_gpu, per_row=True, **tiled), (codes, to_atom128x4(blocks), scale)),
                (rows.quantize_nvfp4(x.float().cuda()), quant.quantize_nvfp4(x.float())),
                (rows.quantize_mxfp4(x_gpu), (mx_codes, mx_scale)),
                (rows.quantize_mxfp4(x_gpu, **tiled), (mx_codes, mx_tiles)),
                (rows.quantize_fp8_rows(x_gpu, 128), quant.quantize_fp8_rows(x, group=128)),
                (rows.quantize_fp8_rows(ragged.cuda(), 64), quant.quantize_fp8_rows(ragged, group=64)),
                (rows.rmsnorm(x_gpu, weight_gpu, eps=EPS), (normed,)),
                (rows.rmsnorm_fp8(x_gpu, weight_gpu, eps=EPS, group=128), quant.quantize_fp8_rows(normed, group=128)),
                (rows.swiglu_fp8(*gated, limit=LIMIT, group=128), quant.quantize_fp8_rows(h, group=128)),
            ]
            for act in ("fp8", "nvfp4"):
                values, scale = rows.activation_values(x_gpu, act)
                back = values.float() if scale is None else values.float() * scale[:, None]
                calls.append((back.bfloat16(), (gemm.quantize_activation(x, act),)))
        for i, (got, want) in enumerate(calls):
            assert same(on_cpu(got), want), (m, i)


def inputs(m: int, k: int) -> tuple[torch.Tensor, ...]:
    """x and what SwiGLU takes beside it, a norm's weight, a factor for each row."""
    return torch.randn(m, k).bfloat16(), torch.randn(m, k).bfloat16(), torch.rand(k).bfloat16(), torch.rand(m)


if __name__ == "__main__":
    torch.manual_seed(0)
    linears()
    mixtures()
    routers()
    quantisers()
    torch.cuda.synchronize()
    print("all as the reference has it")
