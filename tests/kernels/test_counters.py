"""Counters of arrivals: one set a stream, and one a launch that a graph records."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4lab.kernels._common import counters as module
from dsv4lab.kernels._common.counters import counters


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device of streams and recordings, whose memory is the CPU's. made: sizes that were filled while recording."""
    now = SimpleNamespace(stream=1, recording=False, made=[])
    zeros = torch.zeros

    def on_cpu(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if now.recording:
            now.made.append(size)
        return zeros(*size, dtype=dtype)

    fake: dict[str, Any] = {
        "current_stream": lambda device: SimpleNamespace(cuda_stream=now.stream),
        "is_current_stream_capturing": lambda: now.recording,
        "synchronize": lambda device: None,
    }
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=SimpleNamespace(**fake), zeros=on_cpu, int32=torch.int32))
    monkeypatch.setattr(module, "_kept", {})
    monkeypatch.setattr(module, "_spares", {})
    monkeypatch.setattr(module, "_SPARES", 3)
    return now


DEVICE = torch.device("cuda:0")


def place(what: str = "a", count: int = 5) -> int:
    found = counters(what, DEVICE, count)
    assert found.shape == (count,) and found.dtype == torch.int32 and not found.any()
    return found.data_ptr()


def test_a_set_for_a_kernel_stream_and_size(gpu: SimpleNamespace) -> None:
    one = place()
    assert one == place() == place(count=256)
    assert len({one, place("b"), place(count=257), place(count=1024)}) == 4
    gpu.stream = 2
    assert place() != one


def test_a_graph_fills_nothing_while_spares_last(gpu: SimpleNamespace) -> None:
    one = place()
    gpu.recording = True
    assert place() == one  # recorded on the stream itself
    gpu.stream = 2
    taken = {place() for _ in range(3)}
    assert len(taken) == 3 and one not in taken and not gpu.made
    place(count=257)
    place()
    assert gpu.made == [(257,), (5,)]
    gpu.recording = False
    assert place() not in taken and place("b") not in taken


def test_a_graph_before_any_launch_makes_its_own(gpu: SimpleNamespace) -> None:
    gpu.recording = True
    place()
    assert gpu.made == [(5,)]


@pytest.mark.gpu
def test_a_recorded_launch_has_no_other_beside_it_on_the_gpu() -> None:
    """On torch's own stream for recordings, which no launch has been on before."""
    device = torch.device("cuda", torch.cuda.current_device())
    counters("test", device, 7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [counters("test", device, 7) for _ in range(2)]
    assert kept[0].data_ptr() != kept[1].data_ptr()
    for one in kept:
        assert not one.any()  # without a replay
