"""Static figures of a cubin against what ptxas itself prints when it is asked to."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from dsv4lab import sim
from dsv4lab.sim.cubin import CubinError, Resources, resources

_USED = re.compile(
    r"Used (\d+) registers(?:, used (\d+) barriers)?(?:, (\d+) bytes cumulative stack size)?(?:, (\d+) bytes smem)?"
)
_SPILLED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def test_spills_registers_and_barriers_are_those_that_ptxas_reports(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUTE_DSL_COMPILER_OPT", "remarks{ptx}")
    sim.enable("sm_90a")  # reads the variable
    x, y = torch.zeros(128 * 256), torch.zeros(128 * 256)
    compiled = sim.compile(kernels.spilling, x, y, options="--ptxas-options -v")
    monkeypatch.undo()
    sim.enable("sm_90a")
    said = " ".join("".join(capfd.readouterr()).split())
    (found,) = sim.resources(compiled).values()
    used, spilled = _USED.search(said), _SPILLED.search(said)
    assert used is not None and spilled is not None, said
    assert found.registers == int(used[1]) == 255
    assert found.barriers == int(used[2])
    assert (found.stack_bytes, found.spill_store_bytes, found.spill_load_bytes) == tuple(map(int, spilled.groups()))
    assert found.spill_store_bytes > 0 and found.spill_load_bytes > 0


def test_static_shared_memory_is_what_the_kernel_declares(kernels: ModuleType, compiled: Callable[..., sim.Compiled]) -> None:
    x, y = torch.arange(128.0), torch.zeros(128)
    function = compiled("reverse", x, y)
    (found,) = sim.resources(function).values()
    assert found.shared_bytes == 4 * kernels.STATIC_FLOATS  # ptxas -v: "1200 bytes smem"
    assert sim.trace(function, x, y).shared_bytes == 4 * kernels.STATIC_FLOATS
    torch.testing.assert_close(y, x.flip(0))


def test_a_kernel_without_spills(compiled: Callable[..., sim.Compiled]) -> None:
    a, b, c = torch.ones(64, 64).half(), torch.ones(64, 64).half(), torch.zeros(64, 64)
    function = compiled("wgmma_tile", a, b, c)
    ((name, found),) = sim.resources(function).items()
    assert name in function.kernels and found.threads == 128
    assert (found.stack_bytes, found.spill_store_bytes, found.spill_load_bytes) == (0, 0, 0)
    assert found.mbarriers == 1 and found.barriers == 1
    assert found.code_bytes % 16 == 0 and found.code_bytes > 1024
    assert found.param_bytes >= 2 * 128 + 8, "two descriptors and a pointer"


def test_what_fits_on_a_multiprocessor() -> None:
    one = Resources("k", registers=168, shared_bytes=0, stack_bytes=0, spill_store_bytes=0, spill_load_bytes=0,
                    barriers=1, mbarriers=0, threads=384, param_bytes=0, code_bytes=16)  # fmt: skip
    # 12 warps of 32 x 168 registers are 64512 of 65536; 113 KiB + 1 KiB of the system twice are 228 KiB
    assert one.resident(dynamic_shared=113 * 1024) == {"registers": 1, "shared memory": 2, "warps": 5, "CTAs": 32}
    assert one.resident(threads=128, dynamic_shared=113 * 1024 + 1)["shared memory"] == 1
    assert one.resident(threads=128)["registers"] == 3


@pytest.mark.parametrize("bad", [b"", b"\x7fELF", b"PK\x03\x04" + bytes(100), b"\x7fELF" + bytes(60)])
def test_what_is_no_cubin(bad: bytes) -> None:
    with pytest.raises(CubinError, match="not a cubin"):
        resources(bad)
