"""The simulator as a place to run compiled host code that others keep, on disk for instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv4lab.sim import linking
from dsv4lab.sim import session as _session


class Host:
    """Runs host code compiled with TVM-FFI for `arch`; launches go where `sim.simulating` and `sim.capture` send them.

    multiprocessors: what persistent kernels may take the GPU to have. libraries: what object files must be linked to.
    """

    def __init__(self, arch: str | None = None) -> None:
        self.session = _session.current(arch)
        self.arch = self.session.arch
        self.multiprocessors = self.session.multiprocessors
        self.libraries: tuple[str, ...] = (str(linking.library_path()),)

    def bind(self, host_code: bytes) -> bytes:
        """An object file with the names that `libraries` have."""
        return linking.renamed(host_code)

    def know(self, ptx: str, cubin: bytes) -> None:
        """The PTX of a module that will be launched."""
        self.session.kernels_of(ptx, cubin)

    def clusters(self, size: int) -> int:
        """Clusters of so many CTAs that persistent kernels may start: one at least, for here none waits for another."""
        return max(self.multiprocessors // size, 1)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a loaded host function with torch CPU tensors and numbers. Raises what its kernels ran into."""
        self.session.call(function, *args)
