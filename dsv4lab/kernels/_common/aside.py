"""Work beside other work, on a second CUDA stream; on a CPU it is simply done first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_side_streams: dict[torch.device, torch.cuda.Stream] = {}
_start: ContextVar[torch.cuda.Event | None] = ContextVar("dsv4lab_aside_start", default=None)


@contextmanager
def starting(device: torch.device) -> Iterator[None]:
    """Where the first that runs aside inside the block may start: here, and not only where it is launched.

    Its inputs must be complete here, and alive until it is joined. (What follows may be given the first one's memory again,
    and so has to wait for those that read it.)
    """
    event = None
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
    token = _start.set(event)
    try:
        yield
    finally:
        _start.reset(token)


class Aside:
    """Work that runs beside what follows it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda" and device not in _side_streams:
            _side_streams[device] = torch.cuda.Stream(device)

    @contextmanager
    def run(self) -> Iterator[None]:
        """What is launched inside the block waits for all that came before it, or before `starting`, and for nothing after."""
        if self.device.type != "cuda":
            yield
            return
        side, start = _side_streams[self.device], _start.get()
        if start is None:
            side.wait_stream(torch.cuda.current_stream(self.device))
        else:
            side.wait_event(start)
            _start.set(None)
        with torch.cuda.stream(side):
            yield

    def join(self) -> None:
        """From here on, results of the block may be used. Must come before its inputs are freed; a CUDA graph holds both."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(_side_streams[self.device])
