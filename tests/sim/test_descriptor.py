"""TMA descriptors: round trips, agreement with what CuTeDSL's host code and the driver's entry point write, refusals."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from dsv4lab import sim
from dsv4lab.sim.descriptor import DRIVER_TYPES, SWIZZLES, Im2col, TensorMap, decode, looks_like_descriptor

PLAIN = TensorMap(0x7F0012345670, "bf16", (96, 40), (256,), (64, 8), "128B")


@pytest.mark.parametrize("element", DRIVER_TYPES)
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_round_trip(element: str, swizzle: str, rank: int) -> None:
    draw = random.Random(f"{element} {swizzle} {rank}")
    made = TensorMap(
        address=draw.randrange(1 << 44) * 16,
        element=element,
        extents=tuple(draw.randint(1, 1 << 32) for _ in range(rank)),
        strides=tuple(draw.randrange(1 << 36) * 16 for _ in range(rank - 1)),
        box=(128, *(draw.randint(1, 256) for _ in range(rank - 1))),
        swizzle=swizzle,
        nan_fill=draw.random() < 0.5,
        l2_promotion=draw.randrange(4),
    )
    raw = made.encode()
    assert len(raw) == 128
    assert decode(raw) == made
    # Host code leaves the second half as it finds it.
    assert decode(raw[:64] + draw.randbytes(64)) == made


def test_the_fields_lie_where_the_hardware_reads_them() -> None:
    words = struct.unpack("<32I", replace(PLAIN, extents=(96, 40, 7), strides=(256, (1 << 36) + 16), box=(64, 8, 3)).encode())
    assert words[0] | words[1] << 32 == PLAIN.address
    assert words[2] == 2 | 2 << 4 | 10 << 7 | 3 << 13 | 1 << 21
    assert (words[3], words[4], words[7]) == (16, 1, 1 << 4)
    assert words[8:11] == (95, 39, 6)
    assert (words[13], words[14]) == (63 << 24, 7 | 2 << 8)


def test_sizes() -> None:
    assert PLAIN.box_bytes == 64 * 8 * 2
    assert PLAIN.tensor_bytes == 39 * 256 + 96 * 2
    assert replace(PLAIN, element="b4x16", box=(128, 8)).box_bytes == 128 * 8 // 2
    assert replace(PLAIN, element="b4x16_p64", box=(128, 8)).box_bytes == 128 * 8
    assert str(PLAIN) == ("bf16 tensor 96 x 40 at 0x7f0012345670, strides [256] bytes, box 64 x 8 = 1024 bytes, swizzle 128B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": 8}, "address must be a multiple of 16, got 0x8"),
        ({"strides": (24,)}, "strides must be multiples of 16"),
        ({"strides": ()}, "one stride fewer"),
        ({"box": (64, 257)}, r"box must lie in 1..256, got \(64, 257\)"),
        ({"extents": (0, 4)}, "extents must lie in"),
        ({"element": "f12"}, "element must be one of"),
        ({"box": (4, 8)}, "multiple of 16 bytes"),
    ],
)
def test_what_the_hardware_refuses_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change).encode()


@pytest.mark.parametrize("raw", [bytes(128), bytes(64), b"\xff" * 128])
def test_other_bytes_are_no_descriptor(raw: bytes) -> None:
    assert not looks_like_descriptor(raw)
    with pytest.raises(ValueError, match="descriptor"):
        decode(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": (1, 3), "box": (64, 12)},
        {"extents": (64, 16, 4), "strides": (128, 2048), "im2col": Im2col((-5,), (7,), 64, 1024), "box": (64, 1024)},
        {
            "extents": (64, 16, 12, 4),
            "strides": (128, 2048, 24576),
            "im2col": Im2col((-1, 127), (-128, 0), 32, 16),
            "box": (32, 16),
            "steps": (1, 2, 8, 1),
        },
        {
            "extents": (64, 16, 12, 6, 4),
            "strides": (128, 2048, 24576, 147456),
            "im2col": Im2col((-16, 15, 0), (1, -2, -3), 8, 1),
            "box": (8, 1),
        },
    ],
)
def test_element_strides_and_im2col_maps_survive(change: dict) -> None:
    made = replace(PLAIN, **change)
    assert decode(made.encode()) == made
    assert ("im2col" in str(made)) == ("im2col" in change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": (1, 9)}, "element strides must be 2 numbers from 1 to 8"),
        ({"im2col": Im2col((), (), 64, 8), "box": (64, 8)}, "an im2col map has rank 3 to 5"),
        (
            {"extents": (64, 16, 4), "strides": (128, 2048), "im2col": Im2col((0,), (40000,), 64, 8), "box": (64, 8)},
            r"corners must lie in -32768..32767 for rank 3, got \(0, 40000\)",
        ),
        (
            {"extents": (64, 16, 4), "strides": (128, 2048), "im2col": Im2col((0,), (0,), 64, 1025), "box": (64, 1025)},
            "copies 1 to 1024 pixels",
        ),
    ],
)
def test_what_im2col_maps_cannot_say_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change).encode()


@pytest.mark.parametrize("shape", [(64, 64), (100, 136), (513, 1024)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_descriptors_of_compiled_host_code(
    compiled: Callable[..., sim.Compiled], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Our encoder writes the same 64 bytes that CuTeDSL's host code packs."""
    source, target = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    (launch,) = compiled("tile_copy", source, target).capture(source, target)
    maps = sim.tensor_maps(launch)
    assert len(maps) == 2
    for param in launch.kernel.params:
        raw = launch.params[param.offset : param.offset + param.size]
        found = maps[param.name]
        assert found.extents == shape[::-1]
        assert found.element == ("f16" if dtype == torch.float16 else "bf16")
        assert found.encode()[:64] == raw[:64]


def test_the_entry_point_of_the_runtime_encodes_the_same(kernels: ModuleType) -> None:
    library = sim.enable("sm_90a").libraries[0]
    target = (ctypes.c_uint8 * 128)()

    def encode(element_stride: int = 1, swizzle: int = 3) -> int:
        return library._cuTensorMapEncodeTiled(
            target,
            DRIVER_TYPES.index("bf16"),
            2,
            ctypes.c_void_p(PLAIN.address),
            (ctypes.c_uint64 * 2)(96, 40),
            (ctypes.c_uint64 * 1)(256),
            (ctypes.c_uint32 * 2)(64, 8),
            (ctypes.c_uint32 * 2)(element_stride, 1),
            0,
            swizzle,
            0,
            0,
        )

    assert encode() == 0
    assert bytes(target) == PLAIN.encode()
    assert encode(element_stride=2) == 0
    assert decode(bytes(target)).steps == (2, 1)
    assert encode(element_stride=9) != 0
    assert encode(swizzle=7) != 0
