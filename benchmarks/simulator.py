"""How fast the simulator runs: warp-instructions per second of each kernel under both cores, tile times, first-run times.

    python benchmarks/simulator.py [--repeat N] [--out FILE.json]

Kernels: those of tests/sim/kernels.py, our NVFP4 linear, and, where DSV4LAB_CUTLASS_EXAMPLES names NVIDIA's folder
examples/python/CuTeDSL, three of its samples. Times are the best of N: `cpu_s` of this process, which other load disturbs less,
and `wall_s`. `first_s` is what a kernel new to the process costs: parsing, decoding and one run, without CuTeDSL's own
compilation. A rate is warp-instructions over cpu_s.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = "DSV4LAB_CUTLASS_EXAMPLES"
_QUIET = ["--warmup_iterations", "0", "--iterations", "1"]
_NVFP4 = ["--a_dtype", "Float4E2M1FN", "--b_dtype", "Float4E2M1FN", "--sf_dtype", "Float8E4M3FN", "--sf_vec_size", "16"]
_NVFP4 += ["--c_dtype", "Float16", "--mma_tiler_mn", "128,128", "--cluster_shape_mn", "1,1"]
SAMPLES = {
    "NVIDIA NVFP4 GEMM 128x128x256": (
        "sm_100a",
        "cute/blackwell/kernel/blockscaled_gemm/dense_blockscaled_gemm_persistent.py",
        ["--mnkl", "128,128,256,1", *_NVFP4, *_QUIET],
    ),
    "NVIDIA FMHA, two tiles of 128x128x128": (
        "sm_100a",
        "cute/blackwell/kernel/attention/fmha/fmha.py",
        ["--q_shape", "1,256,1,128", "--k_shape", "1,128,1,128", *_QUIET],
    ),
    "NVIDIA Hopper FMHA 128x128x128": (
        "sm_90a",
        "cute/hopper/kernel/attention/fmha.py",
        ["--q_shape", "1,128,1,128", "--k_shape", "1,128,1,128", *_QUIET],
    ),
    "NVIDIA Hopper GEMM 256x256x256": (
        "sm_90a",
        "cute/hopper/kernel/dense_gemm/dense_gemm_persistent.py",
        ["--mnkl", "256,256,256,1", *_QUIET],
    ),
}


class Measurement:
    """Replaces `sim.api.execute`: every launch is timed under both cores, then its result put back."""

    def __init__(self, repeat: int) -> None:
        self.repeat = repeat
        self.records: list[dict[str, Any]] = []
        self.label = ""

    def __call__(self, launch: Any, memory: Any = None, **_: Any) -> Any:
        from dsv4lab.sim import api, ptx
        from dsv4lab.sim.machine import Machine
        from dsv4lab.sim.session import current

        memory = memory or current().tensors.memory()
        before = [allocation.data[allocation.lead :].copy() for allocation in memory.allocations]
        start = time.perf_counter()
        ptx.parse_module(launch.kernel.source)
        parse = time.perf_counter() - start
        record: dict[str, Any] = {"kernel": self.label, "grid": launch.grid, "block": launch.block, "cores": {}}
        stats = None
        for core in ("numpy", "native"):
            machine = Machine(memory, core=core)
            start = time.perf_counter()
            stats = machine.run(launch)
            first = parse + time.perf_counter() - start
            cpu = wall = float("inf")
            for _ in range(self.repeat):
                for allocation, data in zip(memory.allocations, before, strict=False):
                    allocation.data[allocation.lead :] = data
                began, clock = time.process_time(), time.perf_counter()
                machine.run(launch)
                cpu, wall = min(cpu, time.process_time() - began), min(wall, time.perf_counter() - clock)
            record["cores"][core] = {"first_s": first, "cpu_s": cpu, "wall_s": wall, "rate": stats.instructions / cpu}
        assert stats is not None
        record["instructions"] = stats.instructions
        self.records.append(record)
        native, numpy = record["cores"]["native"], record["cores"]["numpy"]
        print(
            f"{self.label:44} {stats.instructions:8} warp-instructions  numpy {numpy['rate'] / 1e3:6.0f} k/s  "
            f"native {native['rate'] / 1e3:6.0f} k/s  {1e3 * native['cpu_s']:8.2f} ms  first run {native['first_s']:5.2f} s",
            flush=True,
        )
        return api.Executed(launch, stats, wall)


@contextmanager
def measuring(repeat: int) -> Iterator[Measurement]:
    from dsv4lab.sim import api

    original, measurement = api.execute, Measurement(repeat)
    api.execute = measurement  # type: ignore[assignment]
    try:
        yield measurement
    finally:
        api.execute = original


def ours(measurement: Measurement) -> None:
    """The kernels of tests/sim/kernels.py and the NVFP4 linear."""
    from dsv4lab import ops, sim
    from dsv4lab.reference import quant

    sim.enable("sm_90a")
    spec = importlib.util.spec_from_file_location("simulator_kernels", ROOT / "tests" / "sim" / "kernels.py")
    assert spec is not None and spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = kernels
    spec.loader.exec_module(kernels)
    half = torch.float16
    cases = {
        "add": ("sm_90a", [torch.randn(16384), torch.randn(16384), torch.zeros(16384)]),
        "tile_copy": ("sm_90a", [torch.randn(256, 256).to(half), torch.zeros(256, 256, dtype=half)]),
        "wgmma_tile": ("sm_90a", [torch.randn(64, 512).to(half), torch.randn(64, 512).to(half), torch.zeros(64, 64)]),
        "tcgen05_tile": ("sm_100a", [torch.randn(128, 512).to(half), torch.randn(64, 512).to(half), torch.zeros(128, 64)]),
    }
    for name, (arch, tensors) in cases.items():
        measurement.label = f"{name} {'x'.join(map(str, tensors[0].shape))}"
        sim.compile(getattr(kernels, name), *tensors, arch=arch)(*tensors)
    measurement.label = "our NVFP4 linear 128x128x256"
    weight = quant.quantize(torch.randn(128, 256) * 0.02, "nvfp4")
    with ops.backend("sim", arch="sm_100a"):
        ops.linear(torch.randn(128, 256), weight, act="nvfp4", out_dtype=torch.float32)


def samples(measurement: Measurement, folder: Path, name: str) -> None:
    """One of NVIDIA's, in this process."""
    from dsv4lab.sim import script

    arch, path, arguments = SAMPLES[name]
    measurement.label = name
    outcome = script.run_script(folder / path, arguments, arch=arch, multiprocessors=1)
    if outcome.error:
        raise SystemExit(f"{name}: {outcome.error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sample", choices=SAMPLES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = os.environ.get(EXAMPLES)
    with measuring(options.repeat) as measurement:
        if options.sample:
            samples(measurement, Path(folder or ""), options.sample)
        else:
            ours(measurement)
    records = measurement.records
    for name in SAMPLES if folder and not options.sample else ():  # scripts replace parts of torch.cuda, so each has a process
        from dsv4lab.sim import script

        environment = {**os.environ, "LD_PRELOAD": str(script.aligned_allocator())}
        target = Path(options.out or "simulator.json").with_suffix(".part")
        command = [sys.executable, __file__, "--sample", name, "--repeat", str(options.repeat), "--out", str(target)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        print("".join(line + "\n" for line in done.stdout.splitlines() if line.startswith("NVIDIA")), end="", flush=True)
        records += json.loads(target.read_text())["kernels"]
        target.unlink()
    summary = {"load_average": os.getloadavg(), "cores": os.cpu_count(), "kernels": records}
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
