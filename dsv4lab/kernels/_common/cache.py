"""Compiled kernels on disk: compiled once for a configuration, an architecture, a state of the sources and of the libraries.

An entry is one file, `<key>.kernel`: a line of JSON (what it was compiled from, sizes, digest), then three parts: the object
file of the host code, which embeds the cubin and takes torch tensors (TVM-FFI), the cubin, and its PTX. Host code is linked
when it is loaded, to the CUDA runtime library of CuTeDSL or to the simulator's stand-in, so the same entry serves both.

Writers write a file of their own and rename it; a lock file per key keeps processes from compiling the same kernel side by side
and is released by the operating system when its holder dies. A damaged entry is rebuilt, with a warning that names it.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from dsv4lab.kernels._common.launch import Runtime, give_name

FORMAT = 1  # of the entries
LIBRARIES = ("nvidia-cutlass-dsl", "apache-tvm-ffi")
PARTS = ("object", "cubin", "ptx")
_SYMBOL = "dsv4lab_kernel"  # name of the host function in every object
_PACKAGE = __name__.partition(".")[0]
_STALE_S = 86_400.0  # age at which another process's unfinished file is litter

Build = Callable[[], tuple[Any, tuple[Any, ...]]]


class DamagedEntry(Exception):
    """A file of the cache that is not what its name says."""


@dataclass(frozen=True)
class Compiled:
    """The parts of an entry. object: host code, relocatable; cubin: device code; ptx: its source text."""

    object: bytes
    cubin: bytes
    ptx: str


_loaded: dict[tuple[str, Any, str, tuple[str, ...]], Callable[..., Any]] = {}


def kernel(module: str, config: Any, build: Build, runtime: Runtime) -> Callable[..., Any]:
    """The compiled host function of a kernel, ready for `runtime`: from memory, from disk, or compiled now.

    module: the name of the kernel's module; its source, and that of `build`'s, with what they import from this package, is part
    of the key. config: a frozen dataclass, whose repr is, too. build: gives the `@cute.jit` callable and its example
    arguments; called only when there is no entry.
    """
    where = (module, config, runtime.arch, runtime.libraries)
    if where not in _loaded:
        source = {
            "module": module,
            "config": repr(config),
            "arch": runtime.arch,
            "machine": platform.machine(),
            "sources": fingerprint(module),
            "builder": fingerprint(build.__module__),
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "format": FORMAT,
        }
        key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:32]
        compiled = _from_disk(folder() / f"{key}.kernel", source, lambda: _compile(build, runtime.arch))
        runtime.know(compiled.ptx, compiled.cubin)
        _loaded[where] = _link(runtime.bind(compiled.object), runtime.libraries)
        give_name(_loaded[where], module, config)
    return _loaded[where]


def folder() -> Path:
    """Where entries are kept: below XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dsv4lab" / "kernels"


# ---- keys --------------------------------------------------------------------------------------------------------------
@cache
def fingerprint(module: str) -> str:
    """Digest of a module's source and of everything that it imports from this package, directly or not."""
    digest = hashlib.sha256()
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source_of(name) if name not in seen else None
        seen.add(name)
        if path is None:
            continue
        text = path.read_bytes()
        digest.update(name.encode() + b"\0" + text)
        waiting += sorted(_imported(text), reverse=True)
    return digest.hexdigest()


def _source_of(name: str) -> Path | None:
    """The file of a module; None where there is no such module."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # `name` is something inside a module that is no package
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None and spec.origin.endswith(".py") else None


def _imported(text: bytes) -> set[str]:
    """Modules of this package that a source imports; names imported from a module count as possible submodules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.partition(".")[0] == _PACKAGE}


# ---- entries -----------------------------------------------------------------------------------------------------------
def _from_disk(path: Path, source: dict[str, Any], build: Callable[[], Compiled]) -> Compiled:
    """The entry at `path`, made if it is not there or damaged. A folder that cannot be written costs only the next compile."""
    found: Compiled | None = None
    building = False
    try:
        found = _read_or_warn(path)
        if found is None:
            with _lock(path.with_suffix(".lock")):
                found = _read_or_warn(path)  # another process may have been first
                if found is None:
                    building = True
                    found = build()
                    building = False
                    write(path, source, found)
    except OSError as error:
        if building:  # the compiler's own, such as a full disk where it works
            raise
        warnings.warn(f"compiled kernels cannot be kept in {path.parent}: {error}", stacklevel=2)
    return found or build()


def _read_or_warn(path: Path) -> Compiled | None:
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except DamagedEntry as error:
        warnings.warn(f"entry {path} of the kernel cache is damaged ({error}); it is rebuilt", stacklevel=2)
        path.unlink(missing_ok=True)
        return None


def read(path: Path) -> Compiled:
    """One entry. Raises DamagedEntry saying why it is none."""
    raw = path.read_bytes()
    line, newline, payload = raw.partition(b"\n")
    try:
        header = json.loads(line)
        sizes = [int(header["sizes"][part]) for part in PARTS]
        digest = str(header["sha256"])
    except (ValueError, KeyError, TypeError):
        raise DamagedEntry("its first line is no header") from None
    if not newline or len(payload) != sum(sizes):
        raise DamagedEntry(f"{len(payload)} bytes follow the header, which announces {sum(sizes)}")
    if hashlib.sha256(payload).hexdigest() != digest:
        raise DamagedEntry("its digest differs")
    first, second = sizes[0], sizes[0] + sizes[1]
    return Compiled(payload[:first], payload[first:second], payload[second:].decode())


def write(path: Path, source: dict[str, Any], compiled: Compiled) -> None:
    """Put an entry under its name, whole or not at all; sweep what killed writers left."""
    parts = (compiled.object, compiled.cubin, compiled.ptx.encode())
    payload = b"".join(parts)
    header = {
        "source": source,
        "sizes": dict(zip(PARTS, map(len, parts), strict=True)),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    for litter in path.parent.glob("*.part"):
        with suppress(FileNotFoundError):  # another process's, which is done with it
            if time.time() - litter.stat().st_mtime > _STALE_S:
                litter.unlink()
    scratch = path.with_name(f"{path.stem}-{os.getpid()}-{threading.get_ident()}.part")
    try:
        with scratch.open("wb") as file:  # whoever may read the folder may read the entry
            file.write(json.dumps(header).encode() + b"\n" + payload)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- CuTeDSL -----------------------------------------------------------------------------------------------------------
def _compile(build: Build, arch: str) -> Compiled:
    """Compile for an architecture, whatever this machine has."""
    import cutlass.cute as cute

    _remember_places()
    function, examples = build()
    with tempfile.TemporaryDirectory(prefix="dsv4lab-") as scratch:
        kept = f"--keep-ptx --keep-cubin --generate-line-info --dump-dir={scratch}"
        options = f"--enable-tvm-ffi --gpu-arch={arch} {kept}"
        # An engine would load the runtime library of the moment, whose names other engines would then find, too
        made = cute.compile(function, *examples, options=options, no_jit_engine=True)
        target = Path(scratch) / "kernel.o"
        made.export_to_c(str(target), function_name=_SYMBOL)
        return Compiled(target.read_bytes(), bytes(made.artifacts.CUBIN), str(made.artifacts.PTX))


@cache
def _remember_places() -> None:
    """CuTeDSL asks where in the sources every operation of a trace stands, and searches a function's tables for it each time.

    The answers depend on the code and the place in it alone, so they are kept: a sixth of a compile.
    """
    from cutlass._mlir_helpers import op

    def remembered(ask: Callable[[FrameType], Any]) -> Callable[[FrameType], Any]:
        known: dict[tuple[int, int], tuple[CodeType, Any]] = {}  # with the code, so that no other has its identity

        def answer(frame: FrameType) -> Any:
            key = id(frame.f_code), frame.f_lasti
            if key not in known:
                known[key] = frame.f_code, ask(frame)
            return known[key][1]

        return answer

    for name in ("_fast_frameinfo", "_is_framework_stack_frame"):
        if hasattr(op, name):  # without them it is only slower
            setattr(op, name, remembered(getattr(op, name)))


def _link(host_code: bytes, libraries: tuple[str, ...]) -> Callable[..., Any]:
    """Host code in memory, its calls of the CUDA runtime bound to `libraries`."""
    import tvm_ffi
    from cutlass._mlir._mlir_libs._cutlass_ir._execution_engine import BinaryExecutionEngine

    engine = BinaryExecutionEngine(host_code, list(libraries), True)
    return tvm_ffi.Function.__from_extern_c__(engine.lookup(f"__tvm_ffi_{_SYMBOL}"), keep_alive_object=engine)
