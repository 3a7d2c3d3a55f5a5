"""Compile a CuTeDSL function for the simulator, look at what it launches, run it."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dsv4lab.sim import cubin as _cubin
from dsv4lab.sim import session as _session
from dsv4lab.sim.descriptor import DESCRIPTOR_BYTES, TensorMap, decode, looks_like_descriptor
from dsv4lab.sim.machine import Checks, Machine, Stats
from dsv4lab.sim.memory import GlobalMemory
from dsv4lab.sim.observe import Observer
from dsv4lab.sim.program import Kernel, Launch
from dsv4lab.sim.recorder import Recorder
from dsv4lab.sim.schedule import Schedule
from dsv4lab.sim.session import CaptureError, Session
from dsv4lab.sim.tracing import Trace


@dataclass(frozen=True)
class Executed:
    """One launch that was run: what it counted, how long it took, and what its threads printed."""

    launch: Launch
    stats: Stats
    seconds: float
    printed: str = ""

    def __str__(self) -> str:
        return f"{self.launch.kernel.name}: {self.stats.instructions} warp-instructions in {self.seconds:.3f} s"


class Compiled:
    """A host function linked to the simulator; call it with tensors like the function that `cute.compile` returns.

    function: CuTeDSL's compiled function. kernels: its device kernels by name.
    """

    def __init__(
        self, session: Session, function: Any, kernels: dict[str, Kernel], signature: inspect.Signature | None
    ) -> None:
        self.session = session
        self.function = function
        self.kernels = kernels
        self._signature = signature

    def __call__(
        self,
        *args: Any,
        schedule: str = "eager",
        checks: Checks | None = None,
        seed: int = 0,
        observers: Sequence[Observer] = (),
    ) -> list[Executed]:
        """Call the host function; every kernel it launches is run. Returns them in order. Errors: see `execute`."""
        options: dict[str, Any] = {"schedule": schedule, "checks": checks, "seed": seed, "observers": observers}
        return self._run(args, lambda launch, memory: execute(launch, memory, **options))

    @property
    def cubin(self) -> bytes:
        """The machine code that CuTeDSL's ptxas made."""
        return bytes(self.function.artifacts.CUBIN)

    def capture(self, *args: Any) -> list[Launch]:
        """Call the host function without running its kernels."""
        return [run.launch for run in self._run(args, lambda launch, _: Executed(launch, Stats(), 0.0))]

    def names(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """The tensors by the host function's parameter names."""
        if self._signature is None:
            return {}
        try:
            return dict(self._signature.bind_partial(*args).arguments)
        except TypeError:
            return {}

    def _without_constants(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments without those that were compiled in (`Constexpr`), which the compiled function does not take."""
        parameters = [] if self._signature is None else list(self._signature.parameters.values())
        if len(parameters) != len(args):
            return args
        return tuple(a for a, p in zip(args, parameters, strict=True) if "Constexpr" not in str(p.annotation))

    def _run(self, args: tuple[Any, ...], action: Callable[[Launch, GlobalMemory], Executed]) -> list[Executed]:
        done: list[Executed] = []
        names = self.names(args)
        args = self._without_constants(args)

        def handle(launch: Launch) -> None:
            done.append(action(launch, self.session.tensors.memory(names)))

        with _session.handling(self.session, handle):
            direct = type(self.function).__name__.startswith("TVMFFI")  # takes torch tensors as they are
            self.function(*(args if direct else map(_argument, args)))
        return done


def compile(fn: Any, *args: Any, arch: str | None = None, options: str = "") -> Compiled:
    """Compile a `@cute.jit` function with example arguments: torch CPU tensors, `from_dlpack` tensors, numbers.

    arch: "sm_90a" or "sm_100a"; by default the one that is enabled, or sm_90a. options: more options of `cute.compile`
    ("--enable-tvm-ffi" for functions that take torch tensors directly). Raises CaptureError where CuTeDSL returns no PTX.
    """
    session = _session.current(arch)
    import cutlass.cute as cute

    tvm_ffi = "--enable-tvm-ffi" in options
    examples = [_argument(value, enable_tvm_ffi=tvm_ffi) for value in args]
    function = cute.compile(fn, *examples, **({"options": options} if options else {}))
    artifacts = getattr(function, "artifacts", None)
    if artifacts is None or not artifacts.PTX or not isinstance(artifacts.CUBIN, bytes):
        raise CaptureError(f"CuTeDSL kept no PTX of {getattr(fn, '__name__', fn)!r}, so there is nothing to simulate")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        signature = None
    return Compiled(session, function, session.kernels_of(artifacts.PTX, artifacts.CUBIN), signature)


@contextmanager
def capture(arch: str | None = None) -> Iterator[list[Launch]]:
    """Collect the launches made inside, without running them.

    with sim.capture() as launches:
        compiled_function(a, b, c)
    print(sim.describe(launches[0]))
    """
    launches: list[Launch] = []
    with _session.handling(_session.current(arch), launches.append):
        yield launches


@dataclass
class Runs:
    """What `simulating` fills."""

    executed: list[Executed] = field(default_factory=list)

    @property
    def instructions(self) -> int:
        return sum(run.stats.instructions for run in self.executed)

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.executed)


@contextmanager
def simulating(
    arch: str | None = None,
    *,
    schedule: str = "eager",
    checks: Checks | None = None,
    seed: int = 0,
    names: Mapping[str, Any] | None = None,
    observers: Sequence[Observer] = (),
) -> Iterator[Runs]:
    """Run every kernel launched inside in the simulator, whoever compiled it, as long as that was after `enable`.

    names: tensors by the name they shall have in errors; others are named after the variable that holds them.
    """
    session, runs = _session.current(arch), Runs()

    def handle(launch: Launch) -> None:
        memory = session.tensors.memory(names)
        run = execute(launch, memory, schedule=schedule, checks=checks, seed=seed, observers=observers)
        runs.executed.append(run)

    with _session.handling(session, handle):
        yield runs


def run(fn: Any, *args: Any, arch: str | None = None, schedule: str = "eager", seed: int = 0, **more: Any) -> list[Executed]:
    """Compile and run in one go: `run(host_function, a, b, c, schedule="lazy")`. more: `options`, `checks`, `observers`."""
    checks, observers = more.pop("checks", None), more.pop("observers", ())
    compiled = fn if isinstance(fn, Compiled) else compile(fn, *args, arch=arch, **more)
    return compiled(*args, schedule=schedule, checks=checks, seed=seed, observers=observers)


def trace(
    fn: Any,
    *args: Any,
    launch: int = 0,
    ctas: int | None = None,
    arch: str | None = None,
    schedule: str = "eager",
    seed: int = 0,
    checks: Checks | None = None,
    options: str = "",
) -> Trace:
    """Run a compiled function, or one to compile, and keep a log of everything that its launch does.

    launch: which one, if the host function makes several. ctas: keep only this many of its CTAs, the first ones.
    Raises CaptureError if the function makes fewer launches, and what `execute` raises.
    To log launches that fail, or that someone else makes, give a `Recorder` to the `observers` of `run` or `simulating`.
    """
    recorder = Recorder(ctas)
    run(fn, *args, arch=arch, schedule=schedule, seed=seed, checks=checks, observers=[recorder], options=options)
    if not -len(recorder.traces) <= launch < len(recorder.traces):
        raise CaptureError(f"launch {launch} is to be traced, but the host function made {len(recorder.traces)}")
    return recorder.traces[launch]


def execute(
    launch: Launch,
    memory: GlobalMemory | None = None,
    *,
    schedule: str = "eager",
    checks: Checks | None = None,
    seed: int = 0,
    observers: Sequence[Observer] = (),
) -> Executed:
    """Run one launch, captured before or made by hand.

    memory: what it may touch; by default every live tensor. schedule: "eager", "lazy" or "random", the latter fixed by seed.
    observers: who is told of every event (see `dsv4lab.sim.observe`). Text that threads print goes to standard output.
    Raises SimulatorError, one subclass for each kind of fault, with the PTX and the Python line it happened at.
    """
    session = _session.current()
    machine = session.machine
    if machine is None:
        machine = session.machine = Machine(GlobalMemory())  # kept, as it decodes every kernel only once
    machine.memory = memory or session.tensors.memory()
    machine.schedule, machine.checks = Schedule(schedule, seed), checks or Checks()
    machine.observers[:] = observers
    start = time.perf_counter()
    try:
        stats = machine.run(launch)
    finally:
        machine.observers.clear()
        printed = "".join(machine.printed)
        sys.stdout.write(printed)
    return Executed(launch, stats, time.perf_counter() - start, printed)


def resources(compiled: Compiled | bytes) -> dict[str, _cubin.Resources]:
    """Registers, shared memory, spills and the like of each kernel, by name; from a compiled function or a cubin's bytes."""
    return _cubin.resources(compiled if isinstance(compiled, bytes) else compiled.cubin)


def tensor_maps(launch: Launch) -> dict[str, TensorMap]:
    """The TMA descriptors among a launch's parameters, by parameter name."""
    found = {}
    for param in launch.kernel.params:
        raw = launch.params[param.offset : param.offset + param.size]
        if param.size == DESCRIPTOR_BYTES and looks_like_descriptor(raw):
            found[param.name] = decode(raw)
    return found


def describe(launch: Launch) -> str:
    """A launch in words: shape, shared memory, attributes, and every parameter, descriptors decoded."""
    kernel = launch.kernel
    lines = [
        f"{kernel.name} for {kernel.target}",
        f"  grid {launch.grid}, block {launch.block}, cluster {launch.cluster}, {launch.shared_bytes} bytes of shared memory",
    ]
    lines += [f"  {name}: {value}" for name, value in launch.attributes.items()]
    maps = tensor_maps(launch)
    for index, param in enumerate(kernel.params):
        raw = launch.params[param.offset : param.offset + param.size]
        value = str(maps[param.name]) if param.name in maps else f"{param.size} bytes, 0x{raw[::-1].hex()}"
        lines.append(f"  parameter {index}: {value}")
    return "\n".join(lines)


def _argument(value: Any, *, enable_tvm_ffi: bool = False) -> Any:
    """Torch tensors and the like as CuTeDSL tensors; anything else as it is."""
    if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        return value
    from cutlass.cute import Tensor
    from cutlass.cute.runtime import from_dlpack

    if isinstance(value, Tensor):
        return value
    return from_dlpack(value, assumed_align=_alignment(value), enable_tvm_ffi=enable_tvm_ffi)


def _alignment(tensor: Any) -> int:
    """16 bytes, which TMA and 128-bit copies need, where the tensor has that; else what its address allows."""
    address = tensor.data_ptr() if hasattr(tensor, "data_ptr") else 0
    return 16 if address % 16 == 0 else address & -address


def _run_by_default(launch: Launch) -> None:
    execute(launch)


_session.fallback = _run_by_default
