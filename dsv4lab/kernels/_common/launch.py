"""Where compiled kernels run: on the GPU that holds the tensors, or wherever the caller has said (the simulator).

A kernel that hangs cannot be cancelled. For development runs there is a watchdog: inside `watchdog(seconds)`, or in a process
started with DSV4LAB_WATCHDOG=seconds, the GPU's every launch is waited for, and one that has not ended by then is named on
stderr, with its configuration and its arguments, before the process ends with status 70. Launches that a CUDA graph records
are not waited for, nor are its replays.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

_LIBRARY = "libcute_dsl_runtime.so"
_VARIABLE = "DSV4LAB_WATCHDOG"  # seconds that a launch may take; empty or 0: as long as it likes
_HUNG_STATUS = 70  # of the process
_SPIN_S, _POLL_S = 1e-3, 1e-3  # most kernels end within the first, which asks all the time; then once in the second


class Name(NamedTuple):
    """What a compiled host function was compiled from: a module and the configuration's repr."""

    module: str
    config: str

    def __str__(self) -> str:
        return f"{self.module} {self.config}"


_names: dict[int, Name] = {}  # of functions that the kernel cache keeps for good, by id


def give_name(function: Callable[..., Any], module: str, config: Any) -> None:
    """Remember what a loaded function is, for whoever has to speak of it."""
    _names[id(function)] = Name(module, repr(config))


def name_of(function: Callable[..., Any]) -> Name:
    """What `give_name` was told; the function's repr where it was told nothing."""
    return _names.get(id(function), Name("a function without a name,", repr(function)))


class Runtime(Protocol):
    """A place where host code of compiled kernels is called.

    arch: what to compile for, "sm_90a". multiprocessors: how many CTAs a persistent kernel may start at once. libraries: what
    host code is linked to.
    """

    arch: str
    multiprocessors: int
    libraries: tuple[str, ...]

    def bind(self, host_code: bytes) -> bytes:
        """An object file as it is linked, with the names that `libraries` have."""

    def know(self, ptx: str, cubin: bytes) -> None:
        """Told of every module that is loaded, before its first launch."""

    def clusters(self, size: int) -> int:
        """How many clusters of so many CTAs, each with a multiprocessor of its own, run at once."""

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call host code with torch tensors and numbers."""


class Gpu:
    """The GPU that tensors live on."""

    def __init__(self, device: Any) -> None:
        import torch

        found = torch.cuda.get_device_properties(device)
        self.device = device
        self.arch = f"sm_{found.major}{found.minor}a"
        self.multiprocessors = found.multi_processor_count
        self.libraries = runtime_libraries()
        self._clusters: dict[int, int] = {}

    def bind(self, host_code: bytes) -> bytes:
        return host_code

    def know(self, ptx: str, cubin: bytes) -> None:
        pass

    def clusters(self, size: int) -> int:
        """The driver's answer, which depends on how multiprocessors are grouped: 7 of 16 CTAs on an H200."""
        if size not in self._clusters:
            import torch
            from cutlass.utils import HardwareInfo

            with torch.cuda.device(self.device):
                self._clusters[size] = HardwareInfo(torch.cuda.current_device()).get_max_active_clusters(size)
        return self._clusters[size]

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        seconds = _watchdog.get()
        if seconds is None:
            function(*args)
        else:
            self._call_watched(function, args, seconds)

    def _call_watched(self, function: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> None:
        import torch

        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                function(*args)
                return
            before, after = torch.cuda.Event(), torch.cuda.Event()
            before.record()
            function(*args)
            after.record()
            wait_or_exit(function, args, before, after, seconds)


class Event(Protocol):
    """A point of a stream: a CUDA event."""

    def query(self) -> bool:
        """Whether all work before it has ended. Raises what that work ran into."""


def wait_or_exit(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    before: Event,
    after: Event,
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait for a launch between two events; past `seconds`, say which it is and end the process.

    An error of the launch is raised with the kernel's name in a note.
    """
    start = clock()
    try:
        while not after.query():
            waited = clock() - start
            if waited > seconds:
                _exit(_complaint(function, args, before, seconds))
            if waited > _SPIN_S:
                sleep(_POLL_S)
    except Exception as error:
        error.add_note(f"raised after the launch of {_launched(function, args)}")
        raise


def _complaint(function: Callable[..., Any], args: tuple[Any, ...], before: Event, seconds: float) -> str:
    """What hangs: the launch, or something ahead of it in its stream that was not waited for."""
    what = "kernel has" if before.query() else "work ahead of this kernel in its stream has"
    return f"dsv4lab watchdog: {what} not ended after {seconds:g} s: {_launched(function, args)}"


def _launched(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    return f"{name_of(function)}, arguments {', '.join(map(_argument, args))}"


def _argument(value: Any) -> str:
    """A tensor's dtype, shape and device; anything else as it is."""
    if not hasattr(value, "dtype") or not hasattr(value, "device"):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"


def _exit(complaint: str) -> NoReturn:
    """End the process at once, without Python's own end, which would wait for the GPU."""
    for stream in {sys.stderr, sys.__stderr__}:  # a notebook's is sent by a thread that may not get to it
        if stream is not None:
            print(complaint, file=stream, flush=True)
    os._exit(_HUNG_STATUS)


def _from_environment() -> float | None:
    """Seconds of the environment's watchdog. Raises ValueError."""
    text = os.environ.get(_VARIABLE, "")
    try:
        seconds = float(text or 0)
    except ValueError:
        raise ValueError(f"{_VARIABLE} must be a number of seconds, got {text!r}") from None
    return _checked(seconds) if seconds else None


def _checked(seconds: float) -> float:
    if not 0 < seconds < float("inf"):
        raise ValueError(f"a watchdog's seconds must be positive and finite, got {seconds}")
    return seconds


_SECONDS = _from_environment()
_watchdog: ContextVar[float | None] = ContextVar("dsv4lab_watchdog", default=_SECONDS)


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Every launch inside is waited for, and ends the process when it takes longer. Raises ValueError."""
    token = _watchdog.set(_checked(seconds))
    try:
        yield
    finally:
        _watchdog.reset(token)


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
