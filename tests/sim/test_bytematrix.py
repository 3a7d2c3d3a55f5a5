"""ldmatrix and stmatrix of 8-bit elements against the layouts of the mma fragments that they serve."""

import numpy as np
import pytest

from dsv4lab.sim.assembly import run

LANE = np.arange(32)
RNG = np.random.default_rng(11)


def _load(opcode: str, data: np.ndarray, registers: int) -> np.ndarray:
    """Fill shared memory with (32, 16) bytes, load from row `lane`: (registers, 32, 4) bytes."""
    out = np.zeros((registers, 32), np.uint32)
    stores = "".join(f"st.global.b32 [%d5+{128 * k}], %r{10 + k};\n" for k in range(registers))
    run(
        f"""
        ld.param.b64 %d1, [p0];
        ld.param.b64 %d2, [p1];
        mov.u32 %r0, %tid.x;
        mul.wide.u32 %d3, %r0, 16;
        add.s64 %d4, %d1, %d3;
        ld.global.v2.b64 {{%d6, %d7}}, [%d4];
        mov.u32 %r2, smem;
        shl.b32 %r3, %r0, 4;
        add.s32 %r3, %r2, %r3;
        st.shared.v2.b64 [%r3], {{%d6, %d7}};
        bar.sync 0;
        {opcode} {{{", ".join(f"%r{10 + k}" for k in range(registers))}}}, [%r3];
        mul.wide.u32 %d5, %r0, 4;
        add.s64 %d5, %d2, %d5;
        {stores}
        ret;
        """,
        data=np.ascontiguousarray(data),
        out=out,
    )
    return out.view(np.uint8).reshape(registers, 32, 4)


@pytest.mark.parametrize("count", [1, 2])
def test_transposed_bytes_give_the_b_fragment_of_an_8_bit_mma(count):
    data = RNG.integers(0, 256, (32, 16), np.uint8)
    got = _load(f"ldmatrix.sync.aligned.m16n16.x{count}.trans.shared.b8", data, 2 * count)
    for matrix in range(count):
        for half in range(2):
            for lane in range(32):
                k, n = 4 * (lane % 4) + np.arange(4), lane // 4 + 8 * half  # B of m16n8k32: four k for one n
                np.testing.assert_array_equal(got[2 * matrix + half, lane], data[16 * matrix + k, n])


@pytest.mark.parametrize(("name", "size"), [("b4x16_p64", 4), ("b6x16_p32", 6)])
def test_packed_elements_are_widened_to_the_low_bits_of_bytes(name, size):
    values = RNG.integers(0, 1 << size, (32, 16), np.uint8)
    bits = (values[:, :, None] >> np.arange(size, dtype=np.uint8)) & 1
    data = np.full((32, 16), 0xFF, np.uint8)  # the padding must not matter
    data[:, : 2 * size] = np.packbits(bits.reshape(32, -1), axis=1, bitorder="little")
    got = _load(f"ldmatrix.sync.aligned.m8n16.x4.shared.b8x16.{name}", data, 4)
    np.testing.assert_array_equal(got.reshape(4, 8, 16), values.reshape(4, 8, 16))
    turned = _load(f"ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8x16.{name}", data, 2)
    np.testing.assert_array_equal(turned[1, 5], values[4 + np.arange(4), 1 + 8])


def test_stmatrix_turns_an_accumulator_of_bytes():
    out = np.zeros((16, 16), np.uint8)
    fragment = RNG.integers(0, 256, (2, 32, 4), np.uint8)
    run(
        """
        ld.param.b64 %d1, [p0];
        ld.param.b64 %d2, [p1];
        mov.u32 %r0, %tid.x;
        mul.wide.u32 %d3, %r0, 4;
        add.s64 %d4, %d1, %d3;
        ld.global.b32 %r10, [%d4];
        ld.global.b32 %r11, [%d4+128];
        mov.u32 %r2, smem;
        shl.b32 %r3, %r0, 4;
        add.s32 %r3, %r2, %r3;
        stmatrix.sync.aligned.m16n8.x2.trans.shared.b8 [%r3], {%r10, %r11};
        bar.sync 0;
        setp.gt.u32 %p1, %r0, 15;
        @%p1 bra $done;
        ld.shared.v2.b64 {%d6, %d7}, [%r3];
        mul.wide.u32 %d5, %r0, 16;
        add.s64 %d5, %d2, %d5;
        st.global.v2.b64 [%d5], {%d6, %d7};
        $done:
        ret;
        """,
        fragment=fragment,
        out=out,
    )
    for matrix in range(2):
        whole = np.zeros((16, 8), np.uint8)  # as mma m16n8 holds its result: rows t / 4 and t / 4 + 8, columns 2 (t % 4) ..
        for item in range(4):
            whole[LANE // 4 + 8 * (item // 2), 2 * (LANE % 4) + item % 2] = fragment[matrix, :, item]
        np.testing.assert_array_equal(out[8 * matrix : 8 * matrix + 8], whole.T)
