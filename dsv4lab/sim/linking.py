"""Names of its own for what object files call in the simulator, so that CUDA and the simulator can share a process.

An execution engine looks for a name in all libraries that any engine of the process has loaded, and takes the first it finds.
CuTeDSL's runtime library and the stand-in for it have the same entry points: with both in a process, a kernel of the GPU would
be simulated or the other way round, whichever came first. So the stand-in is built a second time, for object files, with other
names, and the names in the object files are changed to them: the first c of each is an s.

Functions that `cute.compile` links by itself (`sim.run`) still call CuTeDSL's names: in a process that uses the GPU, too,
they need one of their own.
"""

from __future__ import annotations

import re
import struct
from functools import cache
from pathlib import Path

from dsv4lab.sim import shim
from dsv4lab.sim.errors import SimulatorError

LIBRARY = "libdsv4lab_runtime.so"
_SYMBOL_TABLE, _SYMBOL_BYTES, _UNDEFINED = 2, 24, 0  # type of the section; section of a symbol that others define
_ENTRY = re.compile(r"\b(_cu\w+|cuda_dialect_\w+|CuteDSLRT_\w+)\(")


@cache
def entry_points() -> frozenset[str]:
    """What the stand-in defines under CuTeDSL's names."""
    return frozenset(_ENTRY.findall(shim.SOURCE.read_text()))


def own_name(name: str) -> str:
    """An entry point's name in the library for object files: _cudaMalloc is _sudaMalloc there."""
    return re.sub("[cC]", lambda found: "s" if found[0] == "c" else "S", name, count=1)


def library_path() -> Path:
    """Where the library for object files belongs; it need not exist yet."""
    return shim.place(LIBRARY, (shim.SOURCE,), _flags())


def build() -> Path:
    """That library's path, built if it is not in the cache. Raises ShimError where that cannot be done."""
    return shim.build_at(library_path(), (shim.SOURCE,), _flags())


def _flags() -> tuple[str, ...]:
    return (*shim.FLAGS, *(f"-D{name}={own_name(name)}" for name in sorted(entry_points())))


def renamed(host_code: bytes) -> bytes:
    """A relocatable object file (ELF, 64 bits, little-endian) that calls the stand-in by its own names.

    Names may share bytes with others, so new ones come behind the old, in a string table at the end of the file. Raises
    SimulatorError where it is no such file.
    """
    if host_code[:6] != b"\x7fELF\x02\x01":
        raise SimulatorError(f"host code must be an ELF file of 64 bits, little-endian, got {host_code[:6]!r}")
    start, entry, count = struct.unpack_from("<Q10xHH", host_code, 0x28)
    sections = [struct.unpack_from("<IIQQQQIIQQ", host_code, start + i * entry) for i in range(count)]
    table = next((section for section in sections if section[1] == _SYMBOL_TABLE), None)
    if table is None:
        raise SimulatorError("host code must have a symbol table, got none")
    place, size = sections[table[6]][4:6]
    names, result = bytearray(host_code[place : place + size]), bytearray(host_code)
    for at in range(table[4], table[4] + table[5], _SYMBOL_BYTES):
        offset, _, _, section = struct.unpack_from("<IBBH", host_code, at)
        name = bytes(names[offset : names.index(0, offset)]).decode()
        if section == _UNDEFINED and name in entry_points():
            struct.pack_into("<I", result, at, len(names))
            names += own_name(name).encode() + b"\0"
    struct.pack_into("<QQ", result, start + table[6] * entry + 0x18, len(result), len(names))
    return bytes(result + names)
