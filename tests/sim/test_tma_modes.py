"""TMA beyond plain boxes: element strides, and im2col copies against torch's unfold."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch

from dsv4lab import sim
from dsv4lab.sim.assembly import kernel, launch_of, memory_of
from dsv4lab.sim.descriptor import Im2col, TensorMap
from dsv4lab.sim.errors import MemoryFault
from dsv4lab.sim.machine import Machine

RNG = np.random.default_rng(5)


def _aligned(tensor: TensorMap) -> np.ndarray:
    """The descriptor's bytes at an address that the copy engine accepts."""
    room = np.zeros(256, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + 128] = np.frombuffer(tensor.encode(), np.uint8)
    return room[start : start + 128]


def _load(
    source: np.ndarray, tensor: TensorMap, coordinates: list[int], size: int, offsets: tuple[int, ...] = ()
) -> np.ndarray:
    """Load one box and return its bytes."""
    out, descriptor = np.zeros(size // 4, np.uint32), _aligned(tensor)
    mode = "tile" if tensor.im2col is None else "im2col"
    shift = f", {{{', '.join(f'%h{k}' for k in range(len(offsets)))}}}" if offsets else ""
    moves = "".join(f"mov.b16 %h{k}, {value};" for k, value in enumerate(offsets))
    body = f"""
    ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; {moves}
    setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {size};
    @%p1 cp.async.bulk.tensor.{tensor.rank}d.shared::cta.global.{mode}.mbarrier::complete_tx::bytes [%r1+1024],
        [%d1, {{{", ".join(map(str, coordinates))}}}], [%r1]{shift};
    W: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra W;
    mov.b32 %r5, %r0;
    L: setp.ge.u32 %p2, %r5, {size // 4}; @%p2 bra E; shl.b32 %r2, %r5, 2; add.s32 %r3, %r1, %r2; ld.shared.b32 %r4, [%r3+1024];
    cvt.u64.u32 %d3, %r2; add.s64 %d4, %d2, %d3; st.global.b32 [%d4], %r4; add.s32 %r5, %r5, 32; bra L; E: ret;
    """
    memory = memory_of(source=source, descriptor=descriptor, out=out)
    Machine(memory, "lazy").run(launch_of(kernel(body, 2), descriptor, out, shared=32768))
    return out.view(np.uint8)


@pytest.mark.parametrize("start", [[0, 0, 0], [8, 1, -1], [-8, -4, 3], [16, 7, 2]])
def test_element_strides_leave_elements_out(start):
    source = RNG.integers(1, 1 << 16, (6, 11, 40), np.uint16)
    tensor = TensorMap(source.ctypes.data, "u16", (40, 11, 6), (80, 880), (16, 8, 5), steps=(1, 3, 2))
    got = _load(source, tensor, start, 16 * 3 * 3 * 2).view(np.uint16).reshape(3, 3, 16)  # ceil(8 / 3), ceil(5 / 2)
    expected = np.zeros((3, 3, 16), np.uint16)
    for index in np.ndindex(*expected.shape):
        place = [o + i * s for o, i, s in zip(start[::-1], index, (2, 3, 1), strict=True)]
        if all(0 <= p < n for p, n in zip(place, source.shape, strict=True)):
            expected[index] = source[tuple(place)]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("pad", "stride"), [(0, 1), (1, 1), (1, 2), (2, 3)])
def test_im2col_columns_are_those_of_unfold(pad, stride):
    """A 3 x 3 filter over (N, H, W, C): for each tap, columns of all output pixels, cut into boxes of 16."""
    taps, channels, (images, height, width) = 3, 32, (3, 7, 9)
    source = RNG.integers(-99, 99, (images, height, width, channels)).astype(np.float16)
    lower, upper = (-pad, -pad), (pad - taps + 1, pad - taps + 1)
    tensor = TensorMap(
        source.ctypes.data,
        "f16",
        (channels, width, height, images),
        tuple(s for s in source.strides[2::-1]),
        (16, 16),
        im2col=Im2col(lower, upper, 16, 16),
        steps=(1, stride, stride, 1),
    )
    image = torch.from_numpy(source.astype(np.float32)).permute(0, 3, 1, 2)
    columns = torch.nn.functional.unfold(image, taps, padding=pad, stride=stride)  # (N, C * 9, pixels)
    rows = (height + 2 * pad - taps) // stride + 1
    across = (width + 2 * pad - taps) // stride + 1
    expected = columns.reshape(images, channels, taps, taps, rows * across).permute(2, 3, 0, 4, 1).numpy()
    for down, right in ((0, 0), (1, 2), (2, 1)):
        every = expected[down, right].reshape(-1, channels)
        for first in range(0, images * rows * across, 16):
            image_number, pixel = divmod(first, rows * across)
            h, w = divmod(pixel, across)
            start = [16, w * stride - pad, h * stride - pad, image_number]
            box = _load(source, tensor, start, 16 * 16 * 2, (right, down)).view(np.float16).reshape(16, 16)
            wanted = every[first : first + 16, 16:]
            np.testing.assert_array_equal(box[: len(wanted)], wanted)
            np.testing.assert_array_equal(box[len(wanted) :], 0)  # images that do not exist


@pytest.mark.parametrize("reduction", ["", "add"])
def test_im2col_stores_reach_the_pixels_of_the_box_alone(reduction):
    target = RNG.integers(-9, 9, (2, 5, 8, 8)).astype(np.float16)  # (N, H, W, C)
    before, source = target.copy(), RNG.integers(-9, 9, (16, 8)).astype(np.float16)
    corners = Im2col((1, -1), (-2, 0), 8, 16)
    strides = tuple(s for s in target.strides[2::-1])
    tensor = TensorMap(target.ctypes.data, "f16", (8, 8, 5, 2), strides, (8, 16), im2col=corners)
    family = "cp.reduce" if reduction else "cp"
    body = f"""
    ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem;
    shl.b32 %r2, %r0, 3; add.s32 %r3, %r1, %r2; cvt.u64.u32 %d3, %r2; add.s64 %d4, %d2, %d3;
    ld.global.b64 %d5, [%d4]; st.shared.b64 [%r3], %d5; fence.proxy.async.shared::cta; bar.sync 0;
    setp.ne.u32 %p1, %r0, 0; @%p1 bra E;
    {family}.async.bulk.tensor.4d.global.shared::cta{"." + reduction if reduction else ""}.im2col_no_offs.bulk_group
        [%d1, {{0, 1, -1, 0}}], [%r1];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; E: ret;
    """
    descriptor = _aligned(tensor)
    memory = memory_of(target=target, source=source, descriptor=descriptor)
    Machine(memory).run(launch_of(kernel(body, 2), descriptor, source))
    expected, pixel = before.copy(), [1, -1, 0]  # w, h, n
    for column in source:
        w, h, n = pixel
        if 0 <= h < 5:
            expected[n, h, w] = expected[n, h, w] + column if reduction else column
        pixel = [w + 1, h, n] if w < 5 else [1, h + 1, n] if h < 4 else [1, -1, n + 1]
    np.testing.assert_array_equal(target, expected)


def test_a_descriptor_must_be_of_the_instruction_s_mode():
    source = np.zeros((4, 8, 64), np.float16)
    tensor = TensorMap(source.ctypes.data, "f16", (64, 8, 4), (128, 1024), (64, 4), im2col=Im2col((0,), (0,), 64, 4))
    descriptor = _aligned(tensor)
    body = """ld.param.b64 %d1, [p0]; mov.b32 %r1, smem; mbarrier.init.shared.b64 [%r1], 1;
    cp.async.bulk.tensor.3d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1+1024], [%d1, {0, 0, 0}], [%r1]; ret;"""
    with pytest.raises(MemoryFault, match="with a descriptor of a im2col map"):
        Machine(memory_of(source=source, descriptor=descriptor)).run(launch_of(kernel(body), descriptor))


def test_cutedsl_host_code_writes_the_im2col_maps_that_we_read(kernels: ModuleType, compiled: Callable[..., sim.Compiled]):
    x, out = torch.zeros(4 * 12 * 16, 64, dtype=torch.float16), torch.zeros(8, dtype=torch.float16)
    (launch,) = compiled("im2col_map", x, out).capture(x, out)
    (found,) = sim.tensor_maps(launch).values()
    assert found.im2col == Im2col(lower=(-1, -2), upper=(-1, 0), channels=64, pixels=32)
    assert found.steps == (1, 2, 1, 1) and found.swizzle == "128B"
    raw = next(launch.params[p.offset : p.offset + 64] for p in launch.kernel.params if p.size == 128)
    assert struct.unpack("<16I", found.encode()[:64]) == struct.unpack("<16I", raw)
