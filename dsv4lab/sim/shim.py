"""Builds C libraries with the system's compiler, once for each source and machine; loads the runtime stand-in (runtime.c)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dsv4lab.sim.errors import SimulatorError

SOURCE = Path(__file__).with_name("runtime.c")
LIBRARY = "libcute_dsl_runtime.so"
_COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-shared", "-fPIC")
REMEDY = "install gcc or clang (Debian, Ubuntu: apt install gcc), or name one in the environment variable CC"


class ShimError(SimulatorError):
    """The runtime stand-in cannot be built or loaded on this machine."""


def cache_folder() -> Path:
    """Where built libraries are kept: below XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dsv4lab" / "sim"


def find_compiler() -> list[str] | None:
    """The command line of a C compiler: CC where it is set and exists, else the first found; None where there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    if named and shutil.which(named[0]):
        return named
    return next(([path] for name in _COMPILERS if (path := shutil.which(name))), None)


def library_path() -> Path:
    """Where the library of this source belongs; it need not exist yet."""
    return place(LIBRARY, (SOURCE,), FLAGS)


def place(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """Where a library called `name` belongs that is built from these sources with these flags on this machine."""
    key = hashlib.sha256(" ".join((*flags, platform.machine(), platform.system())).encode())
    for source in sources:
        key.update(source.read_bytes())
    return cache_folder() / key.hexdigest()[:16] / name


def build() -> Path:
    """The runtime library's path, built if it is not in the cache. Raises `ShimError` where that cannot be done."""
    return build_at(library_path(), (SOURCE,), FLAGS)


def build_at(path: Path, sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """Compile C sources to a shared library, unless it exists. Raises `ShimError` where that cannot be done.

    The file appears under its name complete or not at all, so processes may build at the same time.
    """
    if path.exists():
        return path
    compiler = find_compiler()
    if compiler is None:
        raise ShimError(f"the simulator needs a C compiler once, to build {path.name}, and found none: {REMEDY}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        command = [*compiler, *flags, "-o", scratch, *map(str, sources), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            names = ", ".join(source.name for source in sources)
            raise ShimError(f"{' '.join(compiler)} could not build {names}:\n{done.stderr.strip()}")
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return path


class Extent3(ctypes.Structure):
    """extent_t of runtime.c."""

    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32))

    def tuple(self) -> tuple[int, int, int]:
        return self.x, self.y, self.z


class Attribute(ctypes.Structure):
    """attribute_t: one launch attribute."""

    _fields_ = (("id", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16))


class Config(ctypes.Structure):
    """config_t: what a launch states about itself."""

    _fields_ = (
        ("grid", Extent3),
        ("block", Extent3),
        ("shared_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint32),
    )


LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(Config), ctypes.POINTER(ctypes.c_void_p)
)
ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_uint32,
)


def load(path: Path) -> ctypes.CDLL:
    """The library with its own functions declared."""
    library = ctypes.CDLL(str(path))
    library.simrt_set_callbacks.argtypes = [LAUNCH, ENCODE]
    library.simrt_set_callbacks.restype = None
    library.simrt_set_raise.argtypes = [ctypes.c_void_p]
    library.simrt_set_raise.restype = None
    library.simrt_set_device_attribute.argtypes = [ctypes.c_int, ctypes.c_int]
    library.simrt_complaint.restype = ctypes.c_char_p
    library.simrt_clear_complaint.restype = None
    return library
