"""Counters in global memory by which CTAs find out who comes last."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_SIZE = 256  # counters of a set, where that is enough
_SPARES = 1024  # sets for graphs: one a launch that is recorded
_kept: dict[tuple[str, torch.device, int, int], torch.Tensor] = {}
_spares: dict[torch.device, tuple[torch.Tensor, Iterator[torch.Tensor]]] = {}  # all of them, which stay; those left


def counters(what: str, device: torch.device, count: int) -> torch.Tensor:
    """(count,) i32 zeros that every launch leaves as it found them; what: the kernel that counts.

    One set for each stream, since launches of a kernel on one do not overlap: they count behind `griddepcontrol.wait`. Sets are
    kept for good, larger ones beside smaller: a CUDA graph may hold them. A launch that a graph records on a stream without one
    takes a spare set for good, so that the graph has no launch more that makes zeros, and that its neighbours would wait for;
    where there is no spare one left, it has.
    """
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    size = max(1 << max(count - 1, 0).bit_length(), _SIZE)
    known = _kept.get((what, device, stream, size))
    if known is not None:
        return known[:count]
    if not (on_gpu and torch.cuda.is_current_stream_capturing()):
        if on_gpu and device not in _spares:
            sets = torch.zeros(_SPARES, _SIZE, dtype=torch.int32, device=device)
            _spares[device] = sets, iter(sets)
            torch.cuda.synchronize(device)  # whoever takes them is on another stream
        known = _kept[what, device, stream, size] = torch.zeros(size, dtype=torch.int32, device=device)
        return known[:count]
    if size == _SIZE and device in _spares:
        spare = next(_spares[device][1], None)
        if spare is not None:
            return spare[:count]
    return torch.zeros(count, dtype=torch.int32, device=device)
