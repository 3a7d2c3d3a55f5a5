"""NVFP4 linears on a Hopper GPU: time, percent of the bound and ratio to cuBLAS, one JSON line a shape.

python benchmarks/linear.py OUT.jsonl [--quick]

Every figure is a CUDA graph of calls that go through copies of the weights, so that none is in the L2 cache; the best
of ten replays counts. The ceilings (copy bandwidth, BF16 rate) and the peer (torch's BF16 matmul on the decoded weights) are
measured in the same run. Bound: packed bytes over copy bandwidth, or flops over the BF16 rate, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import torch

from dsv4lab.formats import NVFP4, PackedWeight
from dsv4lab.kernels.gemm.w4a16.api import PreparedWeight, linear_w4a16, prepare
from dsv4lab.kernels.gemm.w4a16.config import choose
from dsv4lab.reference import quant

SHAPES = {  # name: (N, K)
    "flash wq_b": (32768, 1024),
    "flash wo_b": (4096, 8192),
    "flash wq_a": (1024, 4096),
    "pro wq_b": (65536, 1536),
    "pro wo_b": (7168, 16384),
}
TOKENS = (1, 3, 8, 16, 64, 129, 1024, 4097, 8192)
_COLD_BYTES = 300e6


def best_us(calls: Sequence[Callable[[], object]], replays: int = 10) -> float:
    """Microseconds of one call, the best of several replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(3 + replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            stream.synchronize()
            times.append(start.elapsed_time(end))
    return min(times[3:]) / len(calls) * 1e3


def ceilings() -> dict[str, float]:
    """copy: bytes read and written a second, in TB/s; bf16: TFLOP/s of an 8192^3 product."""
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = 8 * source.numel() / best_us([lambda: torch.mul(source, 1.0, out=target)] * 4) * 1e-6
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {"copy_TBs": copy, "bf16_TFLOPs": 2 * 8192**3 / best_us([lambda: a @ a.t()]) * 1e-6}


def random_weight(n: int, k: int) -> PackedWeight:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.randint(0x20, 0x50, (n, k // 16), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    return PackedWeight(NVFP4, codes, scale, torch.tensor(0.37, device="cuda"))


def copies(weight: PreparedWeight) -> list[PreparedWeight]:
    count = max(2, int(_COLD_BYTES // weight.nbytes))
    return [PreparedWeight(weight.codes.clone(), weight.scale.clone(), weight.global_scale) for _ in range(count)]


def measure(name: str, tokens: Sequence[int], limits: dict[str, float]) -> list[dict[str, object]]:
    n, k = SHAPES[name]
    weight = random_weight(n, k)
    dense = quant.dequantize(weight).bfloat16()
    packed = copies(prepare(weight))
    plain = [dense] + [dense.clone() for _ in range(int(_COLD_BYTES // dense.nbytes))]
    rows = []
    for m in tokens:
        x = torch.randn(m, k, device="cuda").bfloat16()
        y = linear_w4a16(x, packed[0]).float()
        want = (x @ dense.t()).float()
        ours = best_us([lambda w=w, x=x: linear_w4a16(x, w) for w in packed])  # type: ignore[misc]
        peer = best_us([lambda w=w, x=x: x @ w.t() for w in plain])  # type: ignore[misc]
        bound = max(packed[0].nbytes / limits["copy_TBs"] * 1e-6, 2 * m * n * k / limits["bf16_TFLOPs"] * 1e-6)
        rows.append(
            {
                "shape": name,
                "m": m,
                "n": n,
                "k": k,
                "us": round(ours, 2),
                "percent_of_bound": round(100 * bound / ours, 1),
                "bound": "bytes" if bound * limits["copy_TBs"] * 1e6 <= packed[0].nbytes * 1.001 else "flops",
                "cublas_bf16_us": round(peer, 2),
                "times_cublas": round(peer / ours, 2),
                "relative_error": float((y - want).norm() / want.norm()),
                "config": repr(choose(m, n, k, "bf16")),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="file to append to, one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="three token counts only")
    args = parser.parse_args()
    torch.manual_seed(0)
    limits = ceilings()
    head = {
        "benchmark": "linear w4a16",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        **{name: round(value, 3) for name, value in limits.items()},
    }
    with open(args.out, "a") as file:
        for name in SHAPES:
            for row in measure(name, (1, 16, 4097) if args.quick else TOKENS, limits):
                file.write(json.dumps(head | row) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
