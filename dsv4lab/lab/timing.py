"""Timing: the median of interleaved runs, with CUDA events where the work is on a GPU.

Interleaved: each round runs every candidate once, so that a clock that drifts or a busy machine hits all of them alike.
"""

from __future__ import annotations

import fcntl
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

_Sampler = Callable[[Callable[[], object]], float]
_L2_MARGIN = 2  # a buffer of twice the L2 leaves nothing of the last run in it


@dataclass(frozen=True)
class Timing:
    """Durations of one candidate, in seconds, in the order they were taken."""

    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Middle of the samples, in seconds."""
        return float(np.median(self.samples_s))

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile, in seconds: the spread to draw or to state beside the median."""
        low, high = np.quantile(self.samples_s, (0.25, 0.75))
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.quartiles_s
        return f"{format_seconds(self.median_s)} ({format_seconds(low)} to {format_seconds(high)}, {len(self.samples_s)} runs)"


def format_seconds(seconds: float) -> str:
    """A duration with three digits in the unit that suits it."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 20,
    warmup: int = 3,
    cold_l2: bool = True,
    graphs: bool = False,
) -> dict[str, Timing]:
    """Time callables against each other: `rounds` rounds, each running every candidate once, after `warmup` rounds.

    device: where the work happens; on CUDA the samples are event to event on the current stream, and with cold_l2 a buffer
    larger than the L2 cache is overwritten before each run. On the CPU the samples are wall-clock.
    graphs: on CUDA, replay each candidate from a CUDA graph, which has the GPU's time and not that of the host's calls; a
    candidate must be fit for one. Processes that time on a GPU of this machine take turns.
    Raises ValueError when there is nothing to time, rounds < 1 or warmup < 0.
    """
    if not candidates:
        raise ValueError("candidates must name at least one callable, got none")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be >= 1 and warmup >= 0, got {rounds} and {warmup}")
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return _rounds(candidates, _wall_seconds, rounds, warmup)
    recorded = {name: _graph(work).replay for name, work in candidates.items()} if graphs else candidates
    with _alone():
        return _rounds(recorded, _cuda_sampler(chosen, cold_l2), rounds, warmup)


def _rounds(candidates: Mapping[str, Callable[[], object]], run: _Sampler, rounds: int, warmup: int) -> dict[str, Timing]:
    for _ in range(warmup):
        for work in candidates.values():
            run(work)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, work in candidates.items():
            samples[name].append(run(work))
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


@contextmanager
def _alone() -> Iterator[None]:
    """Notebooks that run at the same time would measure each other."""
    with (Path(tempfile.gettempdir()) / "dsv4lab-timing.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _graph(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    work()  # what is compiled or allocated once is not part of it
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _wall_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cuda_sampler(device: torch.device, cold_l2: bool) -> _Sampler:
    num_bytes = _L2_MARGIN * torch.cuda.get_device_properties(device).L2_cache_size if cold_l2 else 0
    flush = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def sample(work: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        flush.zero_()  # while the GPU is at it, the host is ahead with what is timed
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3  # milliseconds

    return sample
