"""What a compiled kernel asks of a multiprocessor, read from its cubin: registers, shared and local memory, spills, barriers.

A cubin is an ELF file. Section `.nv.info` holds attributes of all kernels, `.nv.info.NAME` those of one, as records
(format byte, attribute byte, 16-bit value, or that many bytes of payload); `.text.NAME` holds its 16-byte instructions.
The numbers are those that `ptxas -v` prints; tests compare the two.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from dsv4lab.sim.errors import SimulatorError

# attributes of .nv.info and .nv.info.NAME
_REGISTERS, _FRAME_BYTES = 0x2F, 0x11  # of all kernels: (symbol, value) pairs of 32-bit words
_REQUIRED_THREADS, _MAX_THREADS = 0x10, 0x05
_BARRIERS, _MBARRIERS = 0x4C, 0x38
_PARAM_BYTES = 0x19
_ANNOTATIONS = 0x55  # (kind, instruction offset) pairs
_SPILL = 1  # kind of annotation
_PAYLOAD = 4  # format byte of records with a payload

_INSTRUCTION_BYTES = 16
_STORE_LOCAL, _LOAD_LOCAL = 0x387, 0x983  # low 12 bits of STL, LDL
_WIDTHS = (1, 1, 2, 2, 4, 8, 16)  # bytes moved a thread, by bits 73-75
_SYSTEM_SHARED = 1024  # bytes at the start of shared memory that the system keeps; .nv.shared.NAME counts them

# of one multiprocessor of sm_90 and sm_100
_REGISTER_FILE = 65_536
_REGISTER_UNIT = 8  # a thread's registers are allocated in eights
_SHARED_FILE = 233_472
_SHARED_UNIT = 128
_MAX_WARPS, _MAX_CTAS, _WARP = 64, 32, 32


class CubinError(SimulatorError):
    """Bytes that are not a cubin this module can read."""


@dataclass(frozen=True)
class Resources:
    """Static figures of one kernel.

    registers: of a thread at launch. shared_bytes: static shared memory of a CTA, without what the launch adds.
    stack_bytes: local memory of a thread; spill_*_bytes: how much of it the code stores and loads because registers ran out,
    over all instructions once. barriers: named barriers. mbarriers: distinct mbarriers that ptxas could tell apart.
    threads: the block that the kernel demands, or may have at most; 0 if it says neither. code_bytes: machine code.
    """

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    barriers: int
    mbarriers: int
    threads: int
    param_bytes: int
    code_bytes: int

    def resident(self, threads: int | None = None, dynamic_shared: int = 0) -> dict[str, int]:
        """CTAs that fit on one multiprocessor by each limit; the smallest is what runs.

        threads: of a CTA (default: what the kernel demands). dynamic_shared: bytes that the launch asks for.
        Registers that `setmaxnreg` moves between warps do not change the sum.
        """
        return fitting(threads or self.threads or 1, self.shared_bytes + dynamic_shared, self.registers)


def fitting(threads: int, shared_bytes: int, registers: int) -> dict[str, int]:
    """CTAs of so many threads, bytes of shared memory and registers a thread that fit on one multiprocessor, by each limit."""
    warps = -(-threads // _WARP)
    a_warp = -(-max(registers, 1) // _REGISTER_UNIT) * _REGISTER_UNIT * _WARP
    shared = -(-(shared_bytes + _SYSTEM_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    return {
        "registers": _REGISTER_FILE // (a_warp * warps),
        "shared memory": _SHARED_FILE // shared,
        "warps": _MAX_WARPS // warps,
        "CTAs": _MAX_CTAS,
    }


def resources(cubin: bytes) -> dict[str, Resources]:
    """The kernels of a cubin by name. Raises CubinError."""
    try:
        return _read(cubin)
    except (struct.error, IndexError, ValueError) as error:
        raise CubinError(f"not a cubin that can be read ({error}); it has {len(cubin)} bytes") from None


def _read(cubin: bytes) -> dict[str, Resources]:
    if cubin[:4] != b"\x7fELF":
        raise CubinError(f"not a cubin: an ELF file begins with 7f454c46, got {cubin[:4].hex()}")
    sections = _sections(cubin)
    symbols = _symbols(sections)
    of_all: dict[tuple[int, str], int] = {}
    for attribute, payload in _records(sections.get(".nv.info", b"")):
        if attribute in (_REGISTERS, _FRAME_BYTES):
            symbol, value = struct.unpack("<II", payload)
            of_all[attribute, symbols[symbol]] = value
    found = {}
    for section, code in sections.items():
        name = section.removeprefix(".text.")
        if name == section or (_REGISTERS, name) not in of_all:
            continue
        info = dict(_records(sections.get(f".nv.info.{name}", b"")))
        threads = info.get(_REQUIRED_THREADS) or info.get(_MAX_THREADS) or bytes(12)
        x, y, z = struct.unpack("<III", threads)
        stored, loaded = _spills(code, info.get(_ANNOTATIONS, b""))
        found[name] = Resources(
            name=name,
            registers=of_all[_REGISTERS, name],
            shared_bytes=max(len(sections.get(f".nv.shared.{name}", b"")) - _SYSTEM_SHARED, 0),
            stack_bytes=of_all.get((_FRAME_BYTES, name), 0),
            spill_store_bytes=stored,
            spill_load_bytes=loaded,
            barriers=int.from_bytes(info.get(_BARRIERS, b""), "little"),
            mbarriers=int.from_bytes(info.get(_MBARRIERS, b""), "little"),
            threads=x * y * z,
            param_bytes=int.from_bytes(info.get(_PARAM_BYTES, b""), "little"),
            code_bytes=len(code),
        )
    return found


def _sections(elf: bytes) -> dict[str, bytes]:
    """Section contents by name; sections without bytes in the file (NOBITS) as zeros of their size."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    strings = headers[names][4]
    out = {}
    for name, kind, _, _, offset, length, *_ in headers:
        text = elf[strings + name : elf.index(b"\0", strings + name)].decode()
        out[text] = bytes(length) if kind == 8 else elf[offset : offset + length]
    return out


def _symbols(sections: dict[str, bytes]) -> list[str]:
    table, strings = sections[".symtab"], sections[".strtab"]
    starts = (struct.unpack_from("<I", table, at)[0] for at in range(0, len(table), 24))
    return [strings[start : strings.index(b"\0", start)].decode() for start in starts]


def _records(section: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, its payload, or its value's bytes)."""
    at = 0
    while at + 4 <= len(section):
        form, attribute, value = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == _PAYLOAD:
            yield attribute, section[at : at + value]
            at += value
        else:
            yield attribute, value.to_bytes(2, "little") if form == 3 else bytes([value & 0xFF])


def _spills(code: bytes, annotations: bytes) -> tuple[int, int]:
    """Bytes that the local loads and stores marked as spills move, each instruction counted once."""
    stored = loaded = 0
    for at in range(0, len(annotations), 8):
        kind, offset = struct.unpack_from("<II", annotations, at)
        if kind != _SPILL or offset + _INSTRUCTION_BYTES > len(code):
            continue
        low, high = struct.unpack_from("<QQ", code, offset)
        width = _WIDTHS[min((high >> 9) & 7, 6)]
        if low & 0xFFF == _STORE_LOCAL:
            stored += width
        elif low & 0xFFF == _LOAD_LOCAL:
            loaded += width
    return stored, loaded
