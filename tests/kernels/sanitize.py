"""Every kernel of linears, experts, routing and quantisers once, on small shapes, for NVIDIA's compute-sanitizer:

compute-sanitizer --tool memcheck python tests/kernels/sanitize.py
python tests/kernels/racecheck.py FOLDER    racecheck, of this and of sanitize_attention.py and sanitize_model.py

Results are compared with the reference, so that a run that does nothing does not pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dsv4lab.kernels.gemm.mixed.api import linear
from dsv4lab.kernels.gemm.mixed.config import MixedConfig
from dsv4lab.kernels.gemm.mixed.layout import prepare
from dsv4lab.kernels.moe.experts import experts, layer
from dsv4lab.kernels.moe.router.api import router_topk
from dsv4lab.kernels.quant.rows import api as rows
from dsv4lab.reference import moe, quant
from tests.kernels.mixed import GPU_BOUND, products, random_weight, routing, trained_weight, worst

FEW = MixedConfig("nvfp4", "f32", 8, 4, 2, 2, splits=2)
MANY = MixedConfig("nvfp4", "bf16", 256, 8, 1, 3, (128, 192))


def linears() -> None:
    for m, config in (
        (5, FEW),
        (5, replace(FEW, cluster=2)),
        (13, replace(FEW, tokens=16, chunks=4, splits=4, per_warp=2)),
        (33, MixedConfig("nvfp4", "f32", 32, 4, 2, 2, cluster=2)),
        (300, MANY),
    ):
        x = torch.randn(m, 512, device="cuda").bfloat16()
        weight = random_weight("nvfp4", 200, 512, seed=m).to("cuda")
        ready = prepare(weight)
        torch.cuda.synchronize()
        out = torch.float32 if config.out == "f32" else torch.bfloat16
        error = worst(linear(x, ready, out_dtype=out, config=config), products(x, weight))
        assert error < (GPU_BOUND if config.out == "f32" else 2.0**-7), (config, error)


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
        gate = torch.randn(16, 128, device="cuda").bfloat16()
        found = router_topk(x, gate, torch.zeros(16, device="cuda"), top_k=3, route_scale=1.0)
        assert torch.equal(found[1], moe.router_topk(x, gate, torch.zeros(16, device="cuda"), top_k=3, route_scale=1.0)[1])


def quantisers() -> None:
    x, norm = torch.randn(37, 512, device="cuda").bfloat16(), torch.ones(512, device="cuda").bfloat16()
    assert torch.equal(rows.quantize_nvfp4(x)[0], quant.quantize_nvfp4(x)[0])
    assert torch.equal(rows.quantize_mxfp4(x)[0], quant.quantize_mxfp4(x)[0])
    rows.quantize_nvfp4(x, layout="atom128x4", per_row=True)
    rows.quantize_fp8_rows(x, 128)
    rows.rmsnorm_nvfp4(x, norm, eps=1e-6)
    rows.rmsnorm_fp8(x, norm, eps=1e-6, group=128)
    rows.swiglu_nvfp4(x, x, limit=10.0)
    rows.activation_values(x, "fp8")


if __name__ == "__main__":
    torch.manual_seed(0)
    linears()
    mixtures()
    quantisers()
    torch.cuda.synchronize()
    print("all as the reference has it")
