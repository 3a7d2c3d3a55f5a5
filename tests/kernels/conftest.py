"""Kernels are tested in the simulator, where CuTeDSL and a C compiler are; each test process keeps its own kernel cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common import cache


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for compiled kernels that starts empty; on a GPU machine the user's, which processes share."""
    return cache.folder() if torch.cuda.is_available() else tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def simulated(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skips where the simulator cannot be; sends compiled kernels to the test's own folder."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    pytest.importorskip("tvm_ffi", reason="needs apache-tvm-ffi")
    monkeypatch.setattr(cache, "folder", lambda: kernel_cache)
    try:
        sim.enable("sm_100a")
    except sim.ShimError as error:
        pytest.skip(str(error))
    yield
    sim.disable()
