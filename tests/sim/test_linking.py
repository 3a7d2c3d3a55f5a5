"""CUDA's runtime library and the stand-in for it in one process: each object file calls the one that it is linked to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4lab import sim
from dsv4lab.sim import linking, shim

needs_compiler = pytest.mark.skipif(shim.find_compiler() is None, reason="needs a C compiler")
# A kernel simulated, and the same object file linked to CuTeDSL's library, whose first call fails without a driver.
SCRIPT = """
import sys
import torch
import dsv4lab
from dsv4lab import ops, sim
from dsv4lab.kernels._common import cache, launch

bind, call = sim.Host.bind, sim.Host.call
plain, called = [], []
sim.Host.bind = lambda host, code: plain.append(code) or bind(host, code)
sim.Host.call = lambda host, function, *args: called.append((host, args)) or call(host, function, *args)


def simulated():
    cache._loaded.clear()
    with dsv4lab.backend("sim", arch="sm_90a") as chosen:
        ops.rmsnorm(torch.ones(3, 128).bfloat16(), torch.ones(128).bfloat16(), eps=1e-6)
    return len(chosen.launches) == 1


def native():
    function = cache._link(plain[0], launch.runtime_libraries())
    with dsv4lab.backend("sim", arch="sm_90a") as chosen:
        try:
            call(called[0][0], function, *called[0][1])
        except RuntimeError as error:
            return "Cuda" in str(error) and not chosen.launches
    return False


if sys.argv[1] == "native":  # something of CuTeDSL's library first: an object file of an earlier process
    path = sorted(cache.folder().glob("*.kernel"))[0]
    cache._link(cache.read(path).object, launch.runtime_libraries())
print(simulated(), native(), simulated(), native())
"""


@needs_compiler
def test_each_kernel_runs_where_it_is_linked(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a kernel linked to CUDA is called with memory of the process")
    for first in ("simulated", "native"):  # the first one compiles, too
        command = [sys.executable, "-c", SCRIPT, first]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.stdout.split() == ["True"] * 4, first + done.stdout + done.stderr[-2000:]


@pytest.mark.gpu
def test_a_gpu_and_the_simulator_take_turns() -> None:
    import torch

    import dsv4lab
    from dsv4lab import ops

    x, weight = torch.randn(3, 128).bfloat16(), torch.randn(128).bfloat16()
    for _ in range(2):
        on_gpu = ops.rmsnorm(x.cuda(), weight.cuda(), eps=1e-6)
        with dsv4lab.backend("sim", arch="sm_90a") as chosen:
            simulated = ops.rmsnorm(x, weight, eps=1e-6)
        assert len(chosen.launches) == 1 and torch.equal(on_gpu.cpu(), simulated)


def test_names_are_nobody_else_s() -> None:
    points = linking.entry_points()
    assert {"_cudaLaunchKernelEx", "cuda_dialect_init_library_once", "CuteDSLRT_GetErrorName"} <= points
    own = {linking.own_name(name) for name in points}
    assert len(own) == len(points) and not own & points


@needs_compiler
def test_the_second_library_has_only_its_own_names() -> None:
    library = shim.load(linking.build())
    assert all(hasattr(library, linking.own_name(name)) and not hasattr(library, name) for name in linking.entry_points())


@needs_compiler
def test_an_object_file_is_renamed(tmp_path: Path) -> None:
    source = tmp_path / "host.c"
    source.write_text(
        "int _cudaMalloc(void **, long); int _cudaOther(void);\nint f(void) { return _cudaMalloc(0, 1) + _cudaOther(); }\n"
    )
    compiler = shim.find_compiler()
    assert compiler is not None
    subprocess.run([*compiler, "-fPIC", "-c", str(source), "-o", str(tmp_path / "host.o")], check=True)
    before = (tmp_path / "host.o").read_bytes()
    after = linking.renamed(before)
    (tmp_path / "host.o").write_bytes(after)
    whole = tmp_path / "host.so"
    subprocess.run([*compiler, "-shared", "-fPIC", str(tmp_path / "host.o"), "-o", str(whole)], check=True)
    assert b"\0_sudaMalloc\0" in whole.read_bytes() and b"\0_cudaMalloc\0" not in whole.read_bytes()
    assert b"\0_cudaOther\0" in whole.read_bytes() and before != after


def test_other_files_are_refused() -> None:
    with pytest.raises(sim.SimulatorError, match="ELF file of 64 bits"):
        linking.renamed(b"\x7fELF\x01\x01" + bytes(60))
