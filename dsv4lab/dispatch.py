"""Operators: registration with torch.library, choice of implementation, and observation of calls.

The machinery under `dsv4lab.ops`; it knows nothing of any single operation. See that module for what the backends mean.
"""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves.
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from dsv4lab.kernels._common.launch import running_on
from dsv4lab.sim.schedule import Schedule
from dsv4lab.sim.session import ARCHITECTURES, DEFAULT_ARCH

if TYPE_CHECKING:
    from dsv4lab.sim import Checks, Executed, Observer

BACKENDS = ("auto", "reference", "kernel", "sim")


@dataclass(frozen=True)
class Backend:
    """What runs operations. All but the name are the simulator's; what it launches is added to `launches`."""

    name: str = "auto"
    arch: Optional[str] = None
    schedule: str = "eager"
    seed: int = 0
    checks: Optional["Checks"] = None
    observers: tuple["Observer", ...] = ()
    launches: list["Executed"] = field(default_factory=list, compare=False)


_backend: ContextVar[Backend] = ContextVar("dsv4lab_backend", default=Backend())  # noqa: B039 (its list is never filled)
_scope: ContextVar[str] = ContextVar("dsv4lab_scope", default="")
_references: ContextVar[Optional[set[str]]] = ContextVar("dsv4lab_references", default=None)
_observer: ContextVar[Optional[list]] = ContextVar("dsv4lab_observer", default=None)


class MissingKernel(NotImplementedError):
    """An operation was asked of a backend that has no implementation of it for the device or the arguments at hand."""


@dataclass
class Call:
    """One observed operation: its name, the scope it ran in (such as "layers.1.attn"), its inputs by name, its output."""

    name: str
    scope: str
    inputs: dict[str, Any]
    output: Any

    def missing(self, arch: str) -> Optional[str]:
        """Why no kernel of that architecture ("sm_90a") takes these inputs; None where one does."""
        operation = _operations[self.name]
        bound = operation.signature.bind(**self.inputs)
        return operation.missing(arch, *bound.args, **bound.kwargs)


@dataclass(frozen=True)
class _Kernel:
    function: Callable[..., Any]
    refuses: Callable[..., object]


@dataclass
class _Operation:
    name: str
    reference: Callable[..., Any]
    signature: inspect.Signature
    preparation: bool = False  # of weights, before a model runs: the reference is all there is to be
    kernels: dict[str, _Kernel] = field(default_factory=dict)  # by architecture, "sm_90a"
    warned: set[str] = field(default_factory=set)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the implementation that the active backend gives the arguments."""
        device = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)).device
        function = self.select(device, *args, **kwargs)
        seen = _references.get()
        if seen is not None and function is self.reference:
            seen.add(self.name)
        return function(*args, **kwargs)

    def select(self, device: torch.device, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The implementation that the active backend gives these arguments on this device. Raises MissingKernel."""
        backend = _backend.get()
        on_gpu = device.type == "cuda"
        if backend.name == "reference" or (backend.name == "auto" and not on_gpu):
            return self.reference
        if on_gpu == (backend.name == "sim"):
            wanted = "CPU" if on_gpu else "CUDA"
            raise MissingKernel(f"{self.name}: backend {backend.name!r} needs {wanted} tensors, got device {device}")
        if backend.name == "sim":
            arch = backend.arch or DEFAULT_ARCH
        else:
            major, minor = torch.cuda.get_device_capability(device)
            arch = f"sm_{major}{minor}a"
        missing = self.missing(arch, *args, **kwargs)
        if missing is None:
            function = self.kernels[arch].function
            return partial(self._simulate, function, arch, backend) if backend.name == "sim" else function
        if backend.name != "auto":
            raise MissingKernel(missing)
        if not self.preparation and missing not in self.warned:
            self.warned.add(missing)
            warnings.warn(f"{missing}; its reference runs instead, far slower", stacklevel=4)
        return self.reference

    def missing(self, arch: str, *args: Any, **kwargs: Any) -> Optional[str]:
        """Why there is no kernel of that architecture for these arguments; None where there is one."""
        if arch not in self.kernels:
            return f"{self.name} has no kernel for {arch} (has: {', '.join(sorted(self.kernels)) or 'none'})"
        why = self.kernels[arch].refuses(*args, **kwargs)
        return None if why is None else f"{self.name} has no kernel for {arch} that takes these arguments: {why}"

    def _simulate(self, function: Callable[..., Any], arch: str, backend: "Backend", *args: Any, **kwargs: Any) -> Any:
        from dsv4lab import sim

        host = sim.Host(arch)
        names = {n: a for n, a in self.signature.bind(*args, **kwargs).arguments.items() if isinstance(a, Tensor)}
        how: dict[str, Any] = dict(schedule=backend.schedule, seed=backend.seed, checks=backend.checks)
        with sim.simulating(arch, names=names, observers=backend.observers, **how) as runs, running_on(host):
            try:
                return function(*args, **kwargs)
            finally:
                backend.launches.extend(runs.executed)


_operations: dict[str, _Operation] = {}


def implementations() -> dict[str, tuple[str, ...]]:
    """What each operation can run on: its name -> "reference" and the architectures it has kernels for."""
    return {name: ("reference", *sorted(op.kernels)) for name, op in sorted(_operations.items())}


def kernel_rooms() -> dict[str, str]:
    """Of each operation that has kernels the folder of `dsv4lab.kernels` that they are in, such as "attention"."""
    modules = {name: fn.function.__module__ for name, op in _operations.items() for fn in op.kernels.values()}
    return {name: module.split(".")[2] for name, module in modules.items() if module.startswith("dsv4lab.kernels.")}


def register_kernel(
    name: str,
    arch: str,
    function: Callable[..., Any],
    *,
    refuses: Callable[..., object] = lambda *args, **kwargs: None,
) -> None:
    """Give operation `name` a kernel for an architecture ("sm_90a"), called like the raw operator: on its GPU or simulated.

    refuses: called with the same arguments; says why the kernel does not take them ("act must be nvfp4"), None where it does.
    """
    if name not in _operations:
        raise ValueError(f"operation must be one of {sorted(_operations)}, got {name!r}")
    if not re.fullmatch(r"sm_\d+a", arch):
        raise ValueError(f"arch must be an architecture such as 'sm_90a', got {arch!r}")
    _operations[name].kernels[arch] = _Kernel(function, refuses)


@contextmanager
def backend(
    name: str,
    *,
    arch: Optional[str] = None,
    schedule: str = "eager",
    seed: int = 0,
    checks: Optional["Checks"] = None,
    observers: Iterable["Observer"] = (),
) -> Iterator[Backend]:
    """Run the operations inside the block on the named backend.

    with dsv4lab.backend("sim", arch="sm_100a", schedule="lazy") as simulated:
        y = ops.linear(x, weight, act="nvfp4")
    print(simulated.launches[0].stats.instructions)

    arch ("sm_90a", the default, or "sm_100a"), schedule ("eager", "lazy", "random" with its seed), checks (`sim.Checks`) and
    observers (`sim.Recorder`, say) are the simulator's alone. Raises ValueError on an unknown name, or on settings that another
    backend lacks.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    chosen = Backend(name, arch, schedule, seed, checks, tuple(observers))
    if name != "sim" and chosen != Backend(name):
        raise ValueError(f"arch, schedule, seed, checks and observers are for backend 'sim', got some for {name!r}")
    if name == "sim":
        Schedule(schedule, seed)
        if arch not in (None, *ARCHITECTURES):
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    token = _backend.set(chosen)
    try:
        yield chosen
    finally:
        _backend.reset(token)


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Name the part of the model that runs inside the block; scopes nest with dots. Only observers see it."""
    outer = _scope.get()
    token = _scope.set(f"{outer}.{name}" if outer else name)
    try:
        yield
    finally:
        _scope.reset(token)


@contextmanager
def observe() -> Iterator[list[Call]]:
    """Collect the calls made inside the block, in order. Tensors are kept by reference: page pools show their latest state."""
    calls: list[Call] = []
    token = _observer.set(calls)
    try:
        yield calls
    finally:
        _observer.reset(token)


@contextmanager
def references() -> Iterator[set[str]]:
    """Collect the names of operations that run as their reference inside the block: a CUDA graph cannot hold those."""
    seen: set[str] = set()
    token = _references.set(seen)
    try:
        yield seen
    finally:
        _references.reset(token)


def operator(
    *, mutates: tuple[str, ...] = (), fake: Optional[Callable[..., Any]] = None, preparation: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of plain tensors and scalars as `dsv4lab::<name>`; it is itself the reference implementation.

    `fake` computes output shapes on meta tensors; without it the reference itself does, which must then not look at values.
    `preparation`: no part of a model's step, so that its reference on a GPU is nothing to warn of.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.lstrip("_")
        operation = _Operation(name, function, inspect.signature(function), preparation)
        _operations[name] = operation

        schema = torch.library.infer_schema(function, mutates_args=mutates)
        op = torch.library.custom_op(f"dsv4lab::{name}", operation.run, mutates_args=mutates, schema=schema)
        op.register_fake(fake or function)

        def call(*args: Any, **kwargs: Any) -> Any:
            output = op(*args, **kwargs)
            observer = _observer.get()
            if observer is not None:
                bound = operation.signature.bind(*args, **kwargs)
                bound.apply_defaults()
                observer.append(Call(name, _scope.get(), dict(bound.arguments), output))
            return output

        call.__doc__ = function.__doc__
        call.__name__ = name
        return call

    return register
