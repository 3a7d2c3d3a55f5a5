"""The simulator's tests share one compilation of each kernel."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dsv4lab import sim


@pytest.fixture(scope="session")
def kernels() -> Iterator[ModuleType]:
    """tests/sim/kernels.py, with the simulator enabled. Skips where CuTeDSL or a C compiler is missing."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    try:
        sim.enable("sm_90a")
    except sim.ShimError as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("sim_test_kernels", Path(__file__).with_name("kernels.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sim.disable()


@pytest.fixture(scope="session")
def compiled(kernels: ModuleType) -> Callable[..., sim.Compiled]:
    """compiled(name, *tensors, arch=...): a function of kernels.py, compiled once for name, arch, shapes, strides, dtypes."""
    known: dict[Any, sim.Compiled] = {}

    def get(name: str, *tensors: torch.Tensor, arch: str = "sm_90a") -> sim.Compiled:
        key = (name, arch, *((tuple(t.shape), t.stride(), t.dtype) for t in tensors))
        if key not in known:
            known[key] = sim.compile(getattr(kernels, name), *tensors, arch=arch)
        return known[key]

    return get
