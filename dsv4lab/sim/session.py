"""Puts the simulator where CuTeDSL expects the CUDA runtime, and turns what compiled host code launches into `Launch` objects.

`enable` sets environment variables that CuTeDSL reads when its modules are imported and when it compiles:

    CUTE_DSL_LIBS      the runtime library that compiled host code is linked against: our stand-in
    CUTE_DSL_ARCH      the architecture to compile for, as there may be no GPU to ask
    CUTE_DSL_KEEP      ptx and cubin: the cubin identifies a launch, the PTX is what we execute
    CUTE_DSL_DUMP_DIR  where those files go: a private folder, removed at exit
    CUTE_DSL_LINEINFO  a `.loc` for every instruction

and the same with CUTE_EXPERIMENTAL_DSL, which `cutlass.cute.experimental` reads.
If CuTeDSL is imported already, its settings are read again, so the order of imports does not matter. But a function that was
compiled before `enable` is linked against the real runtime and stays so. The variables are inherited by child processes, which
must call `enable` themselves before they launch. `disable` takes everything back. torch is never touched.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dsv4lab.sim import contract, descriptor, linking, ptx, shim
from dsv4lab.sim.cubin import resources
from dsv4lab.sim.errors import SimulatorError
from dsv4lab.sim.native import library
from dsv4lab.sim.program import Kernel, Launch
from dsv4lab.sim.tensors import SOURCE, Registry, as_device

Handler = Callable[[Launch], None]
ARCHITECTURES = {"sm_90a": (9, 0, 132), "sm_100a": (10, 0, 148)}  # compute capability; multiprocessors of an H200, a B200
SHARED_BYTES = 232_448  # dynamic shared memory that a block may ask for: 227 KiB
DEFAULT_ARCH = "sm_90a"
_PREFIXES = ("CUTE_DSL", "CUTE_EXPERIMENTAL_DSL")
_L2_BYTES = {9: 50 << 20, 10: 126 << 20}
_FATBIN_MAGIC, _FATBIN_CUBIN = 0xBA55ED50, 2
# cudaLaunchAttributeID
_CLUSTER = 4
_FLAGS = {2: "cooperative", 6: "programmatic_stream_serialization"}
_NUMBERS = {3: "synchronization_policy", 5: "cluster_scheduling_policy", 8: "priority"}


class CaptureError(SimulatorError):
    """A launch that cannot be understood: no PTX is known for its image, or CuTeDSL is not as expected."""


@dataclass(frozen=True)
class _Module:
    """One compiled cubin and its PTX."""

    cubin: bytes
    text: str
    kernels: dict[str, Kernel]


class Session:
    """The simulator's presence in this process. There is one: `enable` returns it."""

    def __init__(self) -> None:
        self.libraries = (shim.load(shim.build()), shim.load(linking.build()))  # for engines, for object files
        self.tensors = Registry()
        self.arch = ""
        self.multiprocessors = 0
        self.launches = 0  # made in this process so far
        self.handlers: list[Handler] = []
        self.machine: Any = None  # the api's, kept here because it ends with the session
        self._modules: list[_Module] = []
        self._error: BaseException | None = None
        self._saved_environment: dict[str, str | None] = {}
        self._hooks: list[tuple[Any, str, Any]] = []
        self._folder = tempfile.mkdtemp(prefix="dsv4lab-sim-")
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        self._callbacks = (shim.LAUNCH(self._on_launch), shim.ENCODE(_on_encode))  # must outlive the library's use of them
        for each in self.libraries:
            each.simrt_set_callbacks(*self._callbacks)

    def enable(self, arch: str, multiprocessors: int | None) -> None:
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        found = contract.probe_library()
        if not found.ok:
            raise contract.ContractError(str(found))
        settings = {
            "LIBS": str(shim.library_path()),
            "ARCH": arch,
            "KEEP": "ptx,cubin",
            "DUMP_DIR": self._folder,
            "LINEINFO": "1",
        }
        self._set_environment({f"{prefix}_{name}": value for prefix in _PREFIXES for name, value in settings.items()})
        missing = contract.missing_hooks()
        if missing:
            self._restore_environment()
            raise contract.ContractError(str(contract.Probe(found.version, tuple(missing))))
        _reread_settings()
        self.arch = arch
        major, minor, default = ARCHITECTURES[arch]
        self.multiprocessors = multiprocessors or default
        # cudaDeviceAttr: warp size, multiprocessors, compute capability, shared memory per multiprocessor and per block
        for number, value in (
            (10, 32),
            (16, self.multiprocessors),
            (75, major),
            (76, minor),
            (81, 233_472),
            (97, SHARED_BYTES),
        ):
            for each in self.libraries:
                each.simrt_set_device_attribute(number, value)
        if not self._hooks:
            self._install_hooks()

    def disable(self) -> None:
        for owner, name, original in reversed(self._hooks):
            setattr(owner, name, original)
        self._hooks.clear()
        self._restore_environment()
        _reread_settings()
        self.arch = ""

    @property
    def enabled(self) -> bool:
        return bool(self._hooks)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call host code that takes torch tensors (TVM-FFI), loaded from an object file and linked to the stand-in."""
        return self._on_device(lambda host, *values: host(*values))(function, *args)

    def module_of(self, cubin: bytes) -> _Module | None:
        return next((module for module in reversed(self._modules) if module.cubin == cubin), None)

    def kernels_of(self, text: str, cubin: bytes) -> dict[str, Kernel]:
        """The kernels of a compiled module, parsed once."""
        module = self.module_of(cubin)
        if module is None:
            module = _Module(cubin, text, _with_registers(ptx.parse_module(text), cubin))
            self._modules.append(module)
        return module.kernels

    def raise_pending(self) -> None:
        """Raise what went wrong inside the last call of host code, which could only return an error number."""
        error, self._error = self._error, None
        complaint = next(filter(None, (each.simrt_complaint().decode() for each in self.libraries)), "")
        for each in self.libraries:
            each.simrt_clear_complaint()
        if error is not None:
            raise error
        if complaint:
            raise contract.ContractError(f"{complaint} ({contract.PACKAGE} {contract.installed_version()})")

    def _on_launch(self, name: bytes, image: int, config: Any, arguments: Any) -> int:
        self.launches += 1
        try:
            handler = self.handlers[-1] if self.handlers else fallback
            if handler is None:
                raise CaptureError("a kernel was launched, but neither sim.capture nor sim.run is active")
            handler(self._launch(name.decode(), image, config.contents, arguments))
        except BaseException as error:
            self._error = error
            return 1
        return 0

    def _launch(self, name: str, image: int, config: shim.Config, arguments: Any) -> Launch:
        kernel = self._kernel(name, image)
        params = bytearray(max((p.offset + p.size for p in kernel.params), default=0))
        for param, pointer in zip(kernel.params, arguments[: len(kernel.params)], strict=True):
            params[param.offset : param.offset + param.size] = ctypes.string_at(pointer, param.size)
        attributes: dict[str, Any] = {}
        cluster = kernel.cluster or (1, 1, 1)
        for attribute in config.attributes[: config.count]:
            number, value = attribute.id, tuple(attribute.value)
            if number == _CLUSTER:
                cluster = (value[0], value[1], value[2])
            elif number in _FLAGS:
                if value[0]:
                    attributes[_FLAGS[number]] = True
            elif number in _NUMBERS:
                attributes[_NUMBERS[number]] = ctypes.c_int32(value[0]).value
            else:
                attributes[f"attribute {number}"] = value
        return Launch(
            kernel, config.grid.tuple(), config.block.tuple(), cluster, config.shared_bytes, bytes(params), attributes
        )

    def _kernel(self, name: str, image: int) -> Kernel:
        for cubin in _cubins(image):
            for module in reversed(self._modules):
                if cubin.startswith(module.cubin) and name in module.kernels:
                    return module.kernels[name]
        raise CaptureError(f"no PTX is known for kernel {name}: it was compiled before sim.enable, or by another process")

    def _set_environment(self, values: dict[str, str]) -> None:
        for name, value in values.items():
            self._saved_environment.setdefault(name, os.environ.get(name))
            os.environ[name] = value

    def _restore_environment(self) -> None:
        for name, value in self._saved_environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._saved_environment.clear()

    def _hook(self, module: str, path: str, make: Callable[[Any], Any]) -> None:
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        owner = contract.resolve(owner, ".".join(parents)) if parents else owner
        original = vars(owner)[name]
        self._hooks.append((owner, name, original))
        setattr(owner, name, make(original))

    def _install_hooks(self) -> None:
        hook, jit, executor = self._hook, "cutlass.base_dsl.jit_executor", "cutlass.cutlass_dsl.cuda_jit_executor"
        hook(jit, "JitFunctionArtifacts.__post_init__", self._keep_artifacts)
        hook(jit, "JitExecutor.run_compiled_program", self._raising)
        hook(executor, "CudaDialectJitCompiledFunction.num_devices", lambda _: property(lambda _self: 1))
        hook(executor, "CudaDialectJitCompiledFunction._load_cuda_library", _without_handles)
        hook("cutlass.cute.runtime", "_Tensor.__init__", self._seeing)
        facts = "cutlass.utils.hardware_info"
        major = ARCHITECTURES[self.arch][0]
        hook(facts, "HardwareInfo.__init__", lambda _: lambda _self, device_id=0: None)
        hook(facts, "HardwareInfo.get_device_multiprocessor_count", lambda _: lambda _self: self.multiprocessors)
        hook(facts, "HardwareInfo.get_l2_cache_size_in_bytes", lambda _: lambda _self: _L2_BYTES[major])
        hook(
            facts,
            "HardwareInfo.get_max_active_clusters",
            lambda _: lambda _self, cluster_size, stream=None: max(self.multiprocessors // cluster_size, 1),
        )
        if importlib.util.find_spec("tvm_ffi") is not None:
            from tvm_ffi import libinfo

            ffi = ctypes.CDLL(libinfo.find_libtvm_ffi())
            for each in self.libraries:
                each.simrt_set_raise(ctypes.cast(ffi.TVMFFIErrorSetRaisedFromCStr, ctypes.c_void_p))
            for name in ("TVMFFIJitCompiledFunction", "TVMFFIJitCompiledFunctionWithKwargs"):
                hook("cutlass.cutlass_dsl.tvm_ffi_provider", f"{name}.__call__", self._on_device)

    def _keep_artifacts(self, original: Any) -> Any:
        def post_init(artifacts: Any) -> None:
            original(artifacts)
            if isinstance(artifacts.CUBIN, bytes) and artifacts.PTX:
                self.kernels_of(artifacts.PTX, artifacts.CUBIN)

        return post_init

    def _raising(self, original: Any) -> Any:
        def run_compiled_program(executor: Any, *args: Any, **kwargs: Any) -> Any:
            return self._call(original, executor, *args, **kwargs)

        return run_compiled_program

    def _seeing(self, original: Any) -> Any:
        def init(tensor: Any, source: Any, *args: Any, **kwargs: Any) -> None:
            self.tensors.see(source)
            setattr(tensor, SOURCE, source)
            original(tensor, as_device(source), *args, **kwargs)

        return init

    def _on_device(self, original: Any) -> Any:
        from tvm_ffi import from_dlpack

        def convert(value: Any) -> Any:
            wrapped = as_device(value)
            if wrapped is value or isinstance(value, dict | tuple | list):
                return type(value)(map(convert, value)) if isinstance(value, tuple | list) else value
            self.tensors.see(value)
            return from_dlpack(wrapped)

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            return self._call(original, function, *map(convert, args), **{name: convert(a) for name, a in kwargs.items()})

        return call

    def _call(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result, failure = None, None
        try:
            result = original(*args, **kwargs)
        except Exception as error:
            failure = error
        self.raise_pending()  # the cause, of which host code knows no more than a number
        if failure is not None:
            raise failure
        return result


_session: Session | None = None
fallback: Handler | None = None  # for launches made while no handler is active


def enable(arch: str = DEFAULT_ARCH, *, multiprocessors: int | None = None) -> Session:
    """Make CuTeDSL in this process compile for `arch` and launch into the simulator. May be called again, for another `arch`.

    multiprocessors: what persistent kernels are told about the GPU; by default 132 for sm_90a, 148 for sm_100a.
    Raises ShimError where there is no C compiler, ContractError where this CuTeDSL is not one that the simulator knows.
    """
    global _session
    if _session is None:
        _session = Session()
    _session.enable(arch, multiprocessors)
    return _session


def disable() -> None:
    """Take back what `enable` did. Functions compiled in between stay linked to the simulator."""
    if _session is not None and _session.enabled:
        _session.disable()


def current(arch: str | None = None) -> Session:
    """The session, enabled for `arch` (None: as it is, or sm_90a if it is not enabled)."""
    if _session is not None and _session.enabled and arch in (None, _session.arch):
        return _session
    return enable(arch or DEFAULT_ARCH)


@contextmanager
def handling(session: Session, handler: Handler) -> Iterator[None]:
    """Launches made inside go to `handler`."""
    session.handlers.append(handler)
    try:
        yield
    finally:
        session.handlers.pop()


def _reread_settings() -> None:
    """Let an already imported CuTeDSL see the environment as it is now."""
    settings = sys.modules.get("cutlass.base_dsl.env_manager")
    if settings is None:
        return
    for getter in vars(settings).values():
        if hasattr(getter, "cache_clear"):
            getter.cache_clear()
    for dsl in contract.resolve(importlib.import_module("cutlass.base_dsl.dsl"), "DSLSingletonMeta._instances").values():
        dsl.envar._apply_env_var_spec(dsl.envar.prefix)


def _without_handles(original: Any) -> Any:
    """Handles of the stand-in must not reach the real runtime, which would be asked to unload them."""

    def load(function: Any) -> list[Any]:
        original(function)
        return []

    return load


def _with_registers(kernels: dict[str, Kernel], cubin: bytes) -> dict[str, Kernel]:
    """Kernels learn from the cubin how many registers a thread has, at entry, too, where they fix that (for `setmaxnreg`)."""
    known = {name: found.registers for name, found in resources(cubin).items()}
    return {
        name: replace(k, compiled_registers=known[name], thread_registers=known[name] if k.thread_registers else 0)
        if name in known
        else k
        for name, k in kernels.items()
    }


def _cubins(image: int) -> Iterator[bytes]:
    """The cubins of the image given to cudaLibraryLoadData: a fatbin's entries, or the ELF file itself."""
    if ctypes.c_uint32.from_address(image).value != _FATBIN_MAGIC:
        if ctypes.string_at(image, 4) == b"\x7fELF":
            sections, size, count = (int.from_bytes(ctypes.string_at(image + at, n), "little") for at, n in _ELF_FIELDS)
            yield ctypes.string_at(image, sections + size * count)
        return
    header = ctypes.c_uint16.from_address(image + 6).value
    at, end = image + header, image + header + ctypes.c_uint64.from_address(image + 8).value
    while at < end:
        kind = ctypes.c_uint16.from_address(at).value
        start, size = ctypes.c_uint32.from_address(at + 4).value, ctypes.c_uint64.from_address(at + 8).value
        if kind == _FATBIN_CUBIN:
            yield ctypes.string_at(at + start, size)
        at += start + size


_ELF_FIELDS = ((40, 8), (58, 2), (60, 2))  # (offset, bytes) of e_shoff, e_shentsize, e_shnum


def _on_encode(target: int, element: int, rank: int, address: int, *rest: Any) -> int:
    extents, strides, box, element_strides, interleave, swizzle, promotion, fill = rest
    try:
        made = descriptor.TensorMap(
            address=address or 0,
            element=descriptor.DRIVER_TYPES[element],
            extents=tuple(extents[:rank]),
            strides=tuple(strides[: rank - 1]),
            box=tuple(box[:rank]),
            swizzle=descriptor.SWIZZLES[swizzle],
            interleave=interleave,
            nan_fill=bool(fill),
            l2_promotion=promotion,
            steps=tuple(element_strides[:rank]),
        ).encode()
    except (ValueError, IndexError):
        return 1
    ctypes.memmove(target, made, len(made))
    return 0


def doctor() -> list[tuple[str, bool, str, str]]:
    """(what, ok, detail, remedy) for each thing the simulator needs from this machine; imports no CuTeDSL, builds nothing."""
    compiler, built = shim.find_compiler(), shim.library_path()
    found = contract.probe_library()
    if built.exists():
        runtime = ("simulator runtime", True, f"built: {built}", "")
    elif compiler:
        runtime = ("simulator runtime", True, f"will be built on first use with {' '.join(compiler)}", "")
    else:
        runtime = ("simulator runtime", False, "no C compiler to build it with", shim.REMEDY)
    core = library.path()
    if core.exists():
        speed = ("simulator core", True, f"native, built: {core}", "")
    elif compiler:
        speed = ("simulator core", True, f"native, will be built on first use with {' '.join(compiler)}", "")
    else:
        speed = ("simulator core", False, "numpy, several times slower: no C compiler to build the native one", shim.REMEDY)
    remedy = f"pip install '{contract.PACKAGE}=={contract.KNOWN_VERSION}'"
    return [runtime, speed, ("simulator contract", found.ok, str(found), "" if found.ok else remedy)]
