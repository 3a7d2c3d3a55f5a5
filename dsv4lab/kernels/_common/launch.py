"""Where compiled kernels run: on the GPU that holds the tensors, or wherever the caller has said (the simulator)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

_LIBRARY = "libcute_dsl_runtime.so"


class Runtime(Protocol):
    """A place where host code of compiled kernels is called.

    arch: what to compile for, "sm_90a". multiprocessors: how many CTAs a persistent kernel may start at once. libraries: what
    host code is linked to.
    """

    arch: str
    multiprocessors: int
    libraries: tuple[str, ...]

    def know(self, ptx: str, cubin: bytes) -> None:
        """Told of every module that is loaded, before its first launch."""

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call host code with torch tensors and numbers."""


class Gpu:
    """The GPU that tensors live on."""

    def __init__(self, device: Any) -> None:
        import torch

        found = torch.cuda.get_device_properties(device)
        self.arch = f"sm_{found.major}{found.minor}a"
        self.multiprocessors = found.multi_processor_count
        self.libraries = runtime_libraries()

    def know(self, ptx: str, cubin: bytes) -> None:
        pass

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        function(*args)


_active: ContextVar[Runtime | None] = ContextVar("dsv4lab_runtime", default=None)
_gpus: dict[Any, Gpu] = {}


@contextmanager
def running_on(runtime: Runtime) -> Iterator[None]:
    """Kernels called inside run there, whatever device their tensors are on."""
    token = _active.set(runtime)
    try:
        yield
    finally:
        _active.reset(token)


def runtime_of(tensor: Any) -> Runtime:
    """Where a kernel that works on this tensor shall run. Raises ValueError for a CPU tensor outside `running_on`."""
    active = _active.get()
    if active is not None:
        return active
    if tensor.device.type != "cuda":
        raise ValueError(f"a kernel needs CUDA tensors, or the simulator, got device {tensor.device}")
    if tensor.device not in _gpus:
        _gpus[tensor.device] = Gpu(tensor.device)
    return _gpus[tensor.device]


def runtime_libraries() -> tuple[str, ...]:
    """CuTeDSL's own runtime library: the flavour that its start-up hook chose, else the newest CUDA's."""
    found = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = [Path(root) for root in (found.submodule_search_locations or ()) if found] if found else []
    chosen = [path for path in os.environ.get("CUTE_DSL_LIBS", "").split(os.pathsep) if path]
    own = [path for path in chosen if any(Path(path).is_relative_to(root) for root in roots)]
    newest = [str(path) for root in roots for path in sorted(root.glob(f"*/lib/{_LIBRARY}"), reverse=True)]
    return tuple(own or newest[:1])
