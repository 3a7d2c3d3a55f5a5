"""Compile and launch interception on real CuTeDSL kernels of ours: facts of launches, names in errors, results."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dsv4lab import sim
from dsv4lab.sim import contract
from dsv4lab.sim.ptx import parse

Compile = Callable[..., sim.Compiled]


def add_arguments(size: int = 1000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator), torch.zeros(size)


def halves(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float16)


@pytest.mark.parametrize(
    ("name", "arch", "shapes", "opcodes"),
    [
        ("add", "sm_90a", None, ["ld.global", "add.f32", "st.global"]),
        ("tile_copy", "sm_90a", [(100, 136), (100, 136)], ["cp.async.bulk.tensor.2d", "mbarrier.try_wait", "mbarrier.init"]),
        ("wgmma_tile", "sm_90a", [(64, 128), (64, 128), (64, 64)], ["wgmma.mma_async", "wgmma.fence", "wgmma.wait_group"]),
        ("tcgen05_tile", "sm_100a", [(128, 128), (64, 128), (128, 64)], ["tcgen05.mma", "tcgen05.ld", "tcgen05.alloc"]),
    ],
)
def test_real_ptx_parses(compiled: Compile, name: str, arch: str, shapes: list | None, opcodes: list[str]) -> None:
    tensors = list(add_arguments()) if shapes is None else [torch.zeros(shape, dtype=torch.float16) for shape in shapes]
    if name.endswith("tile"):
        tensors[-1] = tensors[-1].float()
    kernel = next(iter(compiled(name, *tensors, arch=arch).kernels.values()))
    assert kernel.target == arch
    assert kernel.max_threads == (128, 1, 1)
    for opcode in opcodes:
        assert any(instruction.opcode.startswith(opcode) for instruction in kernel.instructions), opcode
    assert all(0 <= target <= len(kernel.instructions) for target in kernel.labels.values())
    located = [i.location for i in kernel.instructions if i.location is not None]
    assert len(located) >= len(kernel.instructions) - 4
    assert {location.file.rpartition("/")[2] for location in located} == {"kernels.py"}
    assert parse(kernel.source, kernel.name).instructions == kernel.instructions


def test_an_instruction_names_the_line_it_comes_from(compiled: Compile, kernels: ModuleType) -> None:
    kernel = next(iter(compiled("add", *add_arguments()).kernels.values()))
    store = next(i for i in kernel.instructions if i.opcode.startswith("st.global"))
    assert store.location is not None
    source = Path(store.location.file).read_text(encoding="utf-8").splitlines()
    assert source[store.location.line - 1].strip() == "c[index] = a[index] + b[index]"


def test_launch_facts_of_a_plain_kernel(compiled: Compile) -> None:
    a, b, c = add_arguments()
    (launch,) = compiled("add", a, b, c).capture(a, b, c)
    assert (launch.grid, launch.block, launch.cluster, launch.shared_bytes) == ((8, 1, 1), (128, 1, 1), (1, 1, 1), 0)
    pointers = [int.from_bytes(launch.params[p.offset : p.offset + 8], "little") for p in launch.kernel.params]
    assert pointers == [t.data_ptr() for t in (a, b, c)]
    assert not c.any()  # capture does not run anything


def test_launch_facts_of_a_tensor_copy(compiled: Compile) -> None:
    source, target = halves(100, 136), torch.zeros(100, 136, dtype=torch.float16)
    (launch,) = compiled("tile_copy", source, target).capture(source, target)
    assert (launch.grid, launch.block) == ((2, 3, 1), (128, 1, 1))
    assert launch.shared_bytes >= 64 * 64 * 2
    maps = list(sim.tensor_maps(launch).values())
    assert [m.address for m in maps] == [source.data_ptr(), target.data_ptr()]
    for found in maps:
        assert (found.element, found.extents, found.strides) == ("f16", (136, 100), (272,))
        assert (found.box, found.box_bytes, found.swizzle) == ((64, 64), 8192, "128B")
    text = sim.describe(launch)
    assert "grid (2, 3, 1)" in text
    assert f"f16 tensor 136 x 100 at 0x{source.data_ptr():x}" in text


def test_capture_collects_launches_of_any_compiled_function(compiled: Compile) -> None:
    a, b, c = add_arguments()
    add = compiled("add", a, b, c)
    from cutlass.cute.runtime import from_dlpack

    with sim.capture() as launches:
        for _ in range(2):
            add.function(*(from_dlpack(t, assumed_align=16) for t in (a, b, c)))
    assert [launch.kernel for launch in launches] == list(add.kernels.values()) * 2


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
@pytest.mark.parametrize("size", [1, 127, 1000])
def test_vector_add_is_exact(compiled: Compile, schedule: str, size: int) -> None:
    a, b, c = add_arguments(size)
    (run,) = compiled("add", a, b, c)(a, b, c, schedule=schedule, seed=size)
    assert torch.equal(c, a + b)
    assert run.stats.ctas == -(-size // 128)


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_tensor_copy_is_exact_with_ragged_edges(compiled: Compile, schedule: str) -> None:
    source, target = halves(100, 136, seed=3), torch.zeros(100, 136, dtype=torch.float16)
    compiled("tile_copy", source, target)(source, target, schedule=schedule)
    assert torch.equal(source, target)


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
@pytest.mark.parametrize(("name", "arch", "rows"), [("wgmma_tile", "sm_90a", 64), ("tcgen05_tile", "sm_100a", 128)])
def test_tensor_core_tiles_are_exact_on_small_integers(
    compiled: Compile, name: str, arch: str, rows: int, schedule: str
) -> None:
    a, b, c = halves(rows, 128, seed=1), halves(64, 128, seed=2), torch.zeros(rows, 64)
    compiled(name, a, b, c, arch=arch)(a, b, c, schedule=schedule)
    assert torch.equal(c, a.float() @ b.float().T)


def test_a_fault_names_tensor_and_source_line(compiled: Compile) -> None:
    a, b, c = add_arguments(128)
    with pytest.raises(sim.SimulatorError, match=r"(?s)a\[.*kernels\.py:\d+"):
        compiled("add_past_the_end", a, b, c)(a, b, c)


def test_the_session_survives_a_fault(compiled: Compile) -> None:
    a, b, c = add_arguments(128)
    with pytest.raises(sim.SimulatorError):
        compiled("add_past_the_end", a, b, c)(a, b, c)
    compiled("add", a, b, c)(a, b, c)
    assert torch.equal(c, a + b)


def test_launches_without_a_context_are_run(compiled: Compile) -> None:
    from cutlass.cute.runtime import from_dlpack

    a, b, c = add_arguments(200)
    compiled("add", a, b, c).function(*(from_dlpack(t, assumed_align=16) for t in (a, b, c)))
    assert torch.equal(c, a + b)


def test_simulating_counts_what_runs_inside(compiled: Compile) -> None:
    from cutlass.cute.runtime import from_dlpack

    a, b, c = add_arguments(200)
    add = compiled("add", a, b, c)
    with sim.simulating(schedule="lazy") as runs:
        add.function(*(from_dlpack(t, assumed_align=16) for t in (a, b, c)))
    assert len(runs.executed) == 1
    assert runs.instructions == runs.executed[0].stats.instructions > 0
    assert torch.equal(c, a + b)


def test_a_captured_launch_can_be_run_later(compiled: Compile) -> None:
    a, b, c = add_arguments(300)
    (launch,) = compiled("add", a, b, c).capture(a, b, c)
    sim.execute(launch)
    assert torch.equal(c, a + b)


def test_numpy_arrays_are_tensors_too(compiled: Compile, kernels: ModuleType) -> None:
    a, b, c = np.arange(64, dtype=np.float32), np.ones(64, np.float32), np.zeros(64, np.float32)
    sim.run(kernels.add, a, b, c)
    assert (c == a + b).all()


def test_plain_pointers_reach_live_tensors(kernels: ModuleType) -> None:
    """A kernel that gets an address instead of a tensor may touch any live torch tensor, and nothing else."""
    session = sim.enable("sm_90a")
    hidden = torch.arange(32.0)
    memory = session.tensors.memory()
    span = memory.span(hidden.data_ptr(), 128)
    assert bytes(span) == hidden.numpy().tobytes()
    with pytest.raises(sim.SimulatorError, match="belongs to no tensor"):
        memory.find(64)


def test_tensors_are_named_after_variables(kernels: ModuleType) -> None:
    session = sim.enable("sm_90a")
    queries, rest = torch.zeros(7, 3), {"keys": torch.zeros(5)}
    names = {block.address: block.name for block in session.tensors.blocks(everything=True)}
    assert names[queries.data_ptr()] == "queries"
    assert names[rest["keys"].data_ptr()] == "rest['keys']"
    given = session.tensors.blocks({"q": queries}, everything=True)
    assert next(block.name for block in given if block.address == queries.data_ptr()) == "q"


@pytest.mark.skipif(importlib.util.find_spec("tvm_ffi") is None, reason="needs apache-tvm-ffi")
def test_tvm_ffi_functions_take_torch_tensors(kernels: ModuleType) -> None:
    a, b, c = add_arguments(130)
    add = sim.compile(kernels.add, a, b, c, options="--enable-tvm-ffi")
    add(a, b, c)
    assert torch.equal(c, a + b)
    with sim.capture() as launches:
        add.function(a, b, c)
    assert len(launches) == 1


def test_the_architecture_can_change(kernels: ModuleType) -> None:
    a, b, c = add_arguments(64)
    targets = [
        next(iter(sim.compile(kernels.add, a, b, c, arch=arch).kernels.values())).target for arch in ("sm_100a", "sm_90a")
    ]
    assert targets == ["sm_100a", "sm_90a"]
    with pytest.raises(ValueError, match="arch must be one of sm_90a, sm_100a, got 'sm_80'"):
        sim.enable("sm_80")


def test_disable_restores_everything(kernels: ModuleType) -> None:
    from cutlass.base_dsl.jit_executor import JitExecutor, JitFunctionArtifacts

    hooked = JitExecutor.run_compiled_program, JitFunctionArtifacts.__post_init__
    assert os.environ["CUTE_DSL_KEEP"] == "ptx,cubin"
    sim.disable()
    try:
        assert "CUTE_DSL_KEEP" not in os.environ
        assert "CUTE_DSL_LIBS" not in os.environ or "dsv4lab" not in os.environ["CUTE_DSL_LIBS"]
        assert (JitExecutor.run_compiled_program, JitFunctionArtifacts.__post_init__) != hooked
    finally:
        sim.enable("sm_90a")


def test_the_order_of_imports_does_not_matter() -> None:
    """In a fresh process with CuTeDSL imported first."""
    pytest.importorskip("cutlass")
    script = (
        "import sys, importlib.util, torch, cutlass.cute\n"
        "from dsv4lab import sim\n"
        "sim.enable('sm_90a')\n"
        f"spec = importlib.util.spec_from_file_location('kernels', {os.path.join(os.path.dirname(__file__), 'kernels.py')!r})\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['kernels'] = module; spec.loader.exec_module(module)\n"
        "a, b, c = torch.ones(5), torch.ones(5), torch.zeros(5)\n"
        "sim.run(module.add, a, b, c)\n"
        "assert (c == 2).all()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_simulator_imports_neither_torch_nor_cutedsl() -> None:
    script = "import sys, dsv4lab.sim; sys.exit(bool({'torch', 'cutlass'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_contract_holds_for_the_installed_version(kernels: ModuleType) -> None:
    found = contract.probe()
    assert found.ok, str(found)
    assert found.version in str(found)


def test_a_broken_contract_is_named(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType) -> None:
    monkeypatch.setattr(contract, "SYMBOLS", (*contract.SYMBOLS, "_cudaNoSuchEntryPoint"))
    with pytest.raises(sim.ContractError, match=rf"{contract.installed_version()} lacks _cudaNoSuchEntryPoint"):
        sim.enable("sm_90a")
    monkeypatch.undo()
    monkeypatch.setitem(contract.HOOKS, "cutlass.cute.runtime", ("_Tensor.no_such_method",))
    assert contract.missing_hooks() == ["cutlass.cute.runtime._Tensor.no_such_method"]


def test_an_unknown_host_request_is_an_error_not_a_guess(kernels: ModuleType) -> None:
    session = sim.enable("sm_90a")
    import ctypes

    value = ctypes.c_int(-1)
    assert session.libraries[0]._cudaDeviceGetAttribute(ctypes.byref(value), 16, 0) == 0
    assert value.value == 132
    assert session.libraries[0]._cudaDeviceGetAttribute(ctypes.byref(value), 9999, 0) != 0
    with pytest.raises(sim.ContractError, match="device attribute 9999"):
        session.raise_pending()


@pytest.mark.skipif(importlib.util.find_spec("tvm_ffi") is None, reason="needs apache-tvm-ffi")
def test_a_fault_in_a_tvm_ffi_function_is_raised_too(kernels: ModuleType) -> None:
    a, b, c = add_arguments(128)
    wrong = sim.compile(kernels.add_past_the_end, a, b, c, options="--enable-tvm-ffi")
    for _ in range(2):
        with pytest.raises(sim.SimulatorError, match=r"kernels\.py"):
            wrong(a, b, c)
    right = sim.compile(kernels.add, a, b, c, options="--enable-tvm-ffi")
    right(a, b, c)
    assert torch.equal(c, a + b)
