"""tcgen05.ld and st of every shape and count, against the figures of the PTX ISA: which thread and register hold which cell."""

import numpy as np
import pytest

from dsv4lab.sim.assembly import run
from dsv4lab.sim.errors import MemoryFault, ResourceError, UnknownInstruction

RNG = np.random.default_rng(17)
COLUMNS = 512
DATA = 60  # first of the 128 registers that hold data
# shape -> lanes, columns of .x1, registers of .x1
SHAPES = {"32x32b": (32, 1, 1), "16x64b": (16, 2, 1), "16x128b": (16, 4, 2), "16x256b": (16, 8, 4), "16x32bx2": (16, 1, 1)}
# %d1 the cells that are given, %d2 the result, %r0 thread, %r6 warp, %r9 the allocation, %r8 the warp's first lane,
# %r10 the lane at which accesses of 16 lanes begin: the upper half for odd warps
START = """
ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; shr.u32 %r6, %r0, 5;
setp.eq.u32 %p1, %r6, 0;
@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 512;
bar.sync 0; ld.shared.b32 %r9, [%r1];
shl.b32 %r7, %r6, 21; add.s32 %r8, %r9, %r7; and.b32 %r5, %r6, 1; shl.b32 %r5, %r5, 20; add.s32 %r10, %r8, %r5;
mul.wide.u32 %d3, %r0, 2048; add.s64 %d4, %d1, %d3; add.s64 %d5, %d2, %d3; mul.wide.u32 %d6, %r0, 4; add.s64 %d7, %d2, %d6;
add.s64 %d8, %d1, %d6;
"""
FINISH = "bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r9, 512; ret;"


def _names(count: int) -> str:
    return ", ".join(f"%r{DATA + k}" for k in range(count))


def _rows(instruction: str, address: str, offset: int) -> str:
    """128 columns of the thread's row between registers and global memory."""
    parts = []
    for k in range(0, 128, 4):
        names = "{" + ", ".join(f"%r{DATA + k + j}" for j in range(4)) + "}"
        place = f"[{address}+{offset + 4 * k}]"
        parts.append(f"ld.global.v4.b32 {names}, {place};" if instruction == "ld" else f"st.global.v4.b32 {place}, {names};")
    return " ".join(parts)


def _fill() -> str:
    """The given cells into all of TMEM."""
    blocks = (
        _rows("ld", "%d4", 512 * k) + f"tcgen05.st.sync.aligned.32x32b.x128.b32 [%r8+{128 * k}], {{{_names(128)}}};"
        for k in range(4)
    )
    return "".join(blocks) + "tcgen05.wait::st.sync.aligned;"


def _dump(offset: int) -> str:
    """All of TMEM into the result, from byte `offset` on."""
    return "".join(
        f"tcgen05.ld.sync.aligned.32x32b.x128.b32 {{{_names(128)}}}, [%r8+{128 * k}]; tcgen05.wait::ld.sync.aligned;"
        + _rows("st", "%d5", offset + 512 * k)
        for k in range(4)
    )


def _holder(shape: str, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thread and register of the (packed) cell at a row and column of the fragment, as the ISA draws them."""
    pair, upper = 4 * (row % 8), row // 8
    if shape == "16x64b":  # row 0 is T0 T2, row 8 is T1 T3, row 1 is T4 T6
        return pair + upper + 2 * (column % 2), column // 2
    if shape == "16x128b":  # row 0 is T0 T1 T2 T3 in r0, row 8 the same threads in r1
        return pair + column % 4, upper + 2 * (column // 4)
    if shape == "16x256b":  # row 0 is T0:r0 T0:r1 T1:r0 T1:r1 .., row 8 the same threads in r2 and r3
        return pair + column % 8 // 2, column % 2 + 2 * upper + 4 * (column // 8)
    return row, column


def _cases(shape: str, packed: bool) -> list[tuple[int, int, int]]:
    """(count, first column, distance of the halves of 16x32bx2) of every legal count."""
    _, wide, registers = SHAPES[shape]
    cases = []
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        if count * registers > 128:
            continue
        width = count * wide * (2 if packed else 1)
        apart = min(width + 3, COLUMNS - width)
        reach = apart + width if shape == "16x32bx2" else width
        cases.append((count, min(5, COLUMNS - reach), apart))
    return cases


def _places(shape: str, count: int, first: int, apart: int, packed: bool, warp: int):
    """TMEM lane, TMEM column (of the low half), thread and register, for every register of a warp."""
    lanes, wide, registers = SHAPES[shape]
    row, column = (x.reshape(-1) for x in np.mgrid[:lanes, : count * wide])
    thread, register = _holder(shape, row, column)
    step = 2 if packed else 1
    lane = 32 * warp + row + (16 * (warp % 2) if lanes == 16 else 0)
    place = first + step * column
    if shape == "16x32bx2":
        lane, place = np.tile(lane, 2), np.concatenate([place, place + apart])
        thread, register = np.concatenate([thread, thread + 16]), np.tile(register, 2)
    assert len(set(zip(thread.tolist(), register.tolist(), strict=True))) == 32 * count * registers  # every register once
    return lane, place, thread, register


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_loads_of_every_count(shape, packed):
    """Every warp loads from its own quarter, odd warps from the upper 16 lanes of it where the shape has 16."""
    cells = RNG.integers(0, 1 << 32, (128, COLUMNS), np.uint32)
    cases, body, total = _cases(shape, packed), START + _fill(), 0
    start = "%r8" if SHAPES[shape][0] == 32 else "%r10"
    for count, first, apart in cases:
        registers = count * SHAPES[shape][2]
        half = f", {apart}" if shape == "16x32bx2" else ""
        opcode = f"tcgen05.ld.sync.aligned.{shape}.x{count}{'.pack::16b' if packed else ''}.b32"
        body += f"{opcode} {{{_names(registers)}}}, [{start}+{first}]{half}; tcgen05.wait::ld.sync.aligned;"
        body += " ".join(f"st.global.b32 [%d7+{512 * (total + k)}], %r{DATA + k};" for k in range(registers))
        total += registers
    out = np.zeros((total, 128), np.uint32)
    run(body + FINISH, block=128, cells=cells, out=out)
    done = 0
    for count, first, apart in cases:
        registers = count * SHAPES[shape][2]
        expected = np.zeros((registers, 128), np.uint32)
        for warp in range(4):
            lane, column, thread, register = _places(shape, count, first, apart, packed, warp)
            value = cells[lane, column]
            if packed:
                value = value % 65536 + cells[lane, column + 1] % 65536 * 65536
            expected[register, 32 * warp + thread] = value
        np.testing.assert_array_equal(out[done : done + registers], expected, f"{shape}.x{count}")
        done += registers


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_stores_of_every_count(shape, packed):
    """Cells that no register belongs to keep what they had."""
    cells = RNG.integers(0, 1 << 32, (128, COLUMNS), np.uint32)
    values = RNG.integers(0, 1 << 32, (128, 128), np.uint32)  # register, thread
    cases, body = _cases(shape, packed), START + "ld.param.b64 %d8, [p2]; add.s64 %d8, %d8, %d6;"
    start = "%r8" if SHAPES[shape][0] == 32 else "%r10"
    for number, (count, first, apart) in enumerate(cases):
        registers = count * SHAPES[shape][2]
        half = f" {apart}," if shape == "16x32bx2" else ""
        opcode = f"tcgen05.st.sync.aligned.{shape}.x{count}{'.unpack::16b' if packed else ''}.b32"
        body += _fill() + " ".join(f"ld.global.b32 %r{DATA + k}, [%d8+{512 * k}];" for k in range(registers))
        body += f"{opcode} [{start}+{first}],{half} {{{_names(registers)}}}; tcgen05.wait::st.sync.aligned;"
        body += _dump(number * cells.nbytes)
    out = np.zeros((len(cases), 128, COLUMNS), np.uint32)
    run(body + FINISH, block=128, cells=cells, out=out, values=values)
    for number, (count, first, apart) in enumerate(cases):
        expected = cells.copy()
        for warp in range(4):
            lane, column, thread, register = _places(shape, count, first, apart, packed, warp)
            value = values[register, 32 * warp + thread]
            expected[lane, column] = value % 65536 if packed else value
            if packed:
                expected[lane, column + 1] = value // 65536
        np.testing.assert_array_equal(out[number], expected, f"{shape}.x{count}")


@pytest.mark.parametrize(
    ("instruction", "error", "message"),
    [
        ("ld.sync.aligned.16x256b.x64.b32 {%r60}, [%r9]", UnknownInstruction, "needs 256 registers .at most 128."),
        ("ld.sync.aligned.32x32b.x2.b32 {%r60}, [%r9]", UnknownInstruction, "needs 2 registers"),
        ("ld.sync.aligned.32x32b.x1.b32 {%r60}, [%r9+512]", MemoryFault, "touches TMEM columns 512 to 512"),
        ("st.sync.aligned.32x32b.x2.b32 [%r9+511], {%r60, %r61}", MemoryFault, "touches TMEM columns 511 to 512"),
        ("ld.sync.aligned.32x32b.x1.b32 {%r60}, [%r10+1048576]", ResourceError, "leaves the warp's quarter"),
        ("ld.sync.aligned.32x32b.x1.b32 {%r60}, [%r9+2097152]", ResourceError, "at lane 32 leaves the warp's quarter"),
        ("ld.sync.aligned.16x32bx2.x1.b32 {%r60}, [%r9], 512", MemoryFault, "touches TMEM columns 512 to 512"),
        ("ld.sync.aligned.16x32bx2.x1.b32 {%r60}, [%r9], %r6", UnknownInstruction, "needs a constant distance"),
        ("ld.sync.aligned.32x64b.x1.b32 {%r60}, [%r9]", UnknownInstruction, "is not simulated"),
    ],
)
def test_what_is_refused(instruction, error, message):
    cells, out = RNG.integers(0, 1 << 32, (128, COLUMNS), np.uint32), np.zeros(4, np.uint32)
    with pytest.raises(error, match=message):
        run(START + _fill() + f"tcgen05.{instruction}; {FINISH}", block=128, cells=cells, out=out)
