"""Kernels are tested in the simulator, where CuTeDSL and a C compiler are; a run's processes share one cache of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common import cache


@pytest.fixture(scope="session")
def kernel_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for compiled kernels that starts empty, or that `--kernels` names; on a GPU machine the user's."""
    chosen: Path | None = request.config.getoption("--kernels")
    if chosen is not None:
        return chosen.absolute()
    if torch.cuda.is_available():
        return cache.folder()
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "kernels"  # xdist's workers share base.parent
    folder.mkdir(exist_ok=True)
    return folder


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
