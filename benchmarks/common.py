"""What the benchmarks share: cold and interleaved timing, ceilings, errors, the kernels behind a call, rows of JSON.

Timing. A candidate is a list of calls that go through copies of what they read, more than 300 MB together, so that none of it
is in the L2 cache. The list is recorded as a CUDA graph. All candidates' graphs are replayed in turn, ten times after three
that do not count, without a pause, so that a clock that drifts meets all of them alike. Times are those between two events
around a replay, over the number of calls: best and median of ten.

A candidate that fails is reported with its reason and stops nothing, unless it took the GPU's context with it (`Broken`).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsv4lab import sim
from dsv4lab.kernels._common import cache, launch
from dsv4lab.lab.machine import revision

ROOT = Path(__file__).resolve().parents[1]
COLD_BYTES = 300e6  # several times the L2, 50 or 60 MB
MIN_GRAPH_US, MAX_GRAPH_US = 200.0, 4000.0  # of a candidate's graph: above the noise of events, below what is waited for gladly
_REPLAYS, _WARM_UP = 10, 3
_COPY_BYTES = [1 << power for power in range(20, 29)]  # 1 MiB to 256 MiB
_DEADLINE_S = 120.0  # for the replays of all candidates
_REASON_CHARACTERS = 200

Call = Callable[[], object]


class Broken(Exception):
    """The GPU's context is gone; nothing more can be measured in this process."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    best_us: float
    median_us: float


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no time."""

    reason: str


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes read and written a second; bf16: flops a second of an 8192^3 product; copies: microseconds of smaller copies,
    by their bytes read and written, which launch and end make slower than that.
    """

    copy: float
    bf16: float
    copies: Mapping[float, float] = field(default_factory=dict)

    def copy_us(self, nbytes: float) -> float | None:
        """What a copy of as many bytes takes, between two that were measured; None for fewer than the smallest of them."""
        sizes = sorted(self.copies)
        if not sizes or nbytes < sizes[0]:
            return None
        if nbytes >= sizes[-1]:
            return self.copies[sizes[-1]] + (nbytes - sizes[-1]) / self.copy * 1e6
        i = next(i for i, size in enumerate(sizes) if size > nbytes)
        low, high = sizes[i - 1], sizes[i]
        return self.copies[low] + (self.copies[high] - self.copies[low]) * (nbytes - low) / (high - low)

    def bound_us(self, nbytes: float, flops: float) -> tuple[float, str]:
        """The least microseconds that so many bytes and flops take, and which of them it is."""
        by_bytes, by_flops = nbytes / self.copy * 1e6, flops / self.bf16 * 1e6
        return max(by_bytes, by_flops), "bytes" if by_bytes >= by_flops else "flops"


def reason_of(error: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_REASON_CHARACTERS]


# ---- how much is measured ----------------------------------------------------------------------------------------------
def num_copies(nbytes: float) -> int:
    """Copies of something read by a call, so that calls that take turns find it cold."""
    return max(2, math.ceil(COLD_BYTES / max(nbytes, 1.0))) if nbytes >= 1e6 else 4


def repeated(calls: Sequence[Call], bound_us: float) -> list[Call]:
    """The calls of a graph that is neither too short to time nor long without need.

    Calls that are bound to take long are cut down to four at least, whose own traffic keeps the cache cold.
    """
    bound = max(bound_us, 0.5)
    if len(calls) * bound > MAX_GRAPH_US:
        return list(calls[: max(4, int(MAX_GRAPH_US / bound))])
    return list(calls) * max(1, math.ceil(MIN_GRAPH_US / (len(calls) * bound)))


# ---- time --------------------------------------------------------------------------------------------------------------
class Stopwatch:
    """Times candidates on a CUDA stream of its own."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def measure(self, candidates: Mapping[str, Sequence[Call]]) -> dict[str, Timing | Failure]:
        """Each candidate's time, or why there is none. Raises Broken."""
        found: dict[str, Timing | Failure] = {}
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for name, calls in candidates.items():
                try:
                    graphs[name] = self._record(name, calls)
                except Exception as error:
                    found[name] = Failure(reason_of(error))
                    still_alive()
            rounds = self._replay(graphs)
        for name, samples in rounds.items():
            each = [1e3 * ms / len(candidates[name]) for ms in samples]
            found[name] = Timing(min(each), statistics.median(each))
        return found

    def _record(self, name: str, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        for call in dict.fromkeys(calls):
            call()
        self._wait(f"the calls of {name}")
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls:
                call()
        except BaseException:
            try:
                graph.capture_end()
            except Exception as error:  # a capture that was broken off complains again
                print(f"  {name}: {reason_of(error)}", file=sys.stderr)
            raise
        graph.capture_end()
        return graph

    def _replay(self, graphs: Mapping[str, torch.cuda.CUDAGraph]) -> dict[str, list[float]]:
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
        for _ in range(_WARM_UP + _REPLAYS):
            for name, graph in graphs.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                events[name].append((start, end))
        self._wait(f"replays of {', '.join(graphs)}")
        return {name: [a.elapsed_time(b) for a, b in pairs[_WARM_UP:]] for name, pairs in events.items()}

    def _wait(self, what: str) -> None:
        """For the stream; past a deadline the process ends, since a kernel that hangs cannot be stopped. Raises Broken."""
        done = torch.cuda.Event()
        done.record()
        start = time.monotonic()
        try:
            while not done.query():
                if time.monotonic() - start > _DEADLINE_S:
                    print(f"hung: {what} did not end in {_DEADLINE_S:.0f} s", flush=True)
                    os._exit(70)
                time.sleep(1e-4)
        except RuntimeError as error:
            raise Broken(f"{what}: {reason_of(error)}") from error


def still_alive() -> None:
    """Raises Broken where the last failure was one that the context does not survive."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise Broken(reason_of(error)) from error


def measure_ceilings(stopwatch: Stopwatch) -> Ceilings:
    """Copy: x * 1 of 1 GiB into another, and of smaller ones. Raises RuntimeError where one of them cannot be measured."""
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found = stopwatch.measure({"copy": [lambda: torch.mul(source, 1.0, out=target)] * 4, "bf16": [lambda: a @ a.t()] * 2})
    copy, bf16 = found["copy"], found["bf16"]
    if isinstance(copy, Failure) or isinstance(bf16, Failure):
        raise RuntimeError(f"ceilings cannot be measured: {copy}, {bf16}")
    rate = 2 * source.nbytes / copy.best_us * 1e6
    copies = {float(size): [*small_copies(source, target, size)] for size in _COPY_BYTES}
    times = stopwatch.measure({str(size): repeated(calls, size / rate * 1e6) for size, calls in copies.items()})
    small = {size: time_.best_us for size in copies if isinstance(time_ := times[str(size)], Timing)}
    return Ceilings(rate, 2 * 8192**3 / bf16.best_us * 1e6, small)


def small_copies(source: torch.Tensor, target: torch.Tensor, nbytes: float) -> Iterator[Call]:
    """Copies of parts of one into the other, so many bytes read and written by each: enough of them that L2 has none."""
    numbers = int(nbytes) // 2 // source.element_size()
    for i in range(num_copies(nbytes)):
        a, b = (t.view(-1)[i * numbers : (i + 1) * numbers] for t in (source, target))
        yield partial(torch.mul, a, 1.0, out=b)


# ---- accuracy ----------------------------------------------------------------------------------------------------------
def relative_error(y: torch.Tensor, want: torch.Tensor) -> float:
    """|y - want| / |want|, Euclidean."""
    return float((y.double() - want.double()).norm() / want.double().norm())


def cosine(y: torch.Tensor, want: torch.Tensor) -> float:
    a, b = y.double().flatten(), want.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def sampled(m: int, most: int = 256) -> slice | torch.Tensor:
    """Rows that are compared with an oracle: all, or the first and the last."""
    if m <= most:
        return slice(None)
    return torch.cat([torch.arange(most // 2), torch.arange(m - most // 2, m)])


# ---- kernels -----------------------------------------------------------------------------------------------------------
@dataclass
class Seen:
    """A runtime that launches where another does and keeps the names of what is launched."""

    inner: launch.Runtime
    names: list[launch.Name] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.arch, self.multiprocessors = self.inner.arch, self.inner.multiprocessors
        self.libraries = self.inner.libraries

    def bind(self, host_code: bytes) -> bytes:
        return self.inner.bind(host_code)

    def know(self, ptx: str, cubin: bytes) -> None:
        self.inner.know(ptx, cubin)

    def clusters(self, size: int) -> int:
        return self.inner.clusters(size)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        name = launch.name_of(function)
        if name not in self.names:
            self.names.append(name)
        self.inner.call(function, *args)


@contextmanager
def seeing(tensor: torch.Tensor) -> Iterator[list[launch.Name]]:
    """Collects the names of the kernels that are launched inside."""
    seen = Seen(launch.runtime_of(tensor))
    with launch.running_on(seen):
        yield seen.names


def kernels_of(names: Sequence[launch.Name], arch: str) -> list[dict[str, Any]]:
    """Configuration, registers and spilled bytes of kernels, from the entries of the cache."""
    return [_kernel(name, arch) for name in names]


_known: dict[tuple[launch.Name, str], dict[str, Any]] = {}


def _kernel(name: launch.Name, arch: str) -> dict[str, Any]:
    if (name, arch) not in _known:
        row: dict[str, Any] = {"module": name.module, "config": name.config, "registers": None, "spill_bytes": None}
        try:
            parts = sim.resources(cache.read(entry(name, arch)).cubin).values()
            row["registers"] = max(part.registers for part in parts)
            row["spill_bytes"] = max(part.spill_store_bytes + part.spill_load_bytes for part in parts)
        except Exception as error:
            row["reason"] = reason_of(error)
        _known[name, arch] = row
    return _known[name, arch]


def entry(name: launch.Name, arch: str) -> Path:
    """The file of a kernel as its source is now. Raises FileNotFoundError."""
    want = {"module": name.module, "config": name.config, "arch": arch, "sources": cache.fingerprint(name.module)}
    for path in sorted(cache.folder().glob("*.kernel"), key=lambda path: -path.stat().st_mtime):
        with path.open("rb") as file:
            source = json.loads(file.readline())["source"]
        if want.items() <= source.items():
            return path
    raise FileNotFoundError(f"no entry of the kernel cache is {name}")


def symbols(ptx: str) -> list[str]:
    """Names of the kernels in a module's PTX."""
    return re.findall(r"\.entry\s+([\w$]+)", ptx)


# ---- rows --------------------------------------------------------------------------------------------------------------
@dataclass
class Bench:
    """Where rows go: everything that a benchmark needs to measure and to report. stop_at: of `time.monotonic`."""

    stopwatch: Any
    ceilings: Ceilings
    path: Path
    benchmark: str
    quick: bool = False
    match: str = ""
    stop_at: float = float("inf")
    rows: int = 0
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.head = {"benchmark": self.benchmark} | environment() | ceiling_fields(self.ceilings)

    def wants(self, name: str) -> bool:
        """Whether a shape is to be measured; past the time limit none is, and its name is kept."""
        if self.match and self.match not in name:
            return False
        if time.monotonic() > self.stop_at:
            self.skipped.append(name)
            return False
        return True

    def measure(
        self,
        name: str,
        fields: Mapping[str, Any],
        candidates: Mapping[str, Sequence[Call] | Failure],
        *,
        nbytes: float,
        flops: float,
    ) -> dict[str, Any]:
        """Time "ours" and its peers, write the row and print it short. fields: what else the row has."""
        bound, which = self.ceilings.bound_us(nbytes, flops)
        ready = {key: repeated(calls, bound) for key, calls in candidates.items() if not isinstance(calls, Failure)}
        times: dict[str, Timing | Failure] = {k: c for k, c in candidates.items() if isinstance(c, Failure)}
        times |= self.stopwatch.measure(ready)
        times = {key: times[key] for key in candidates}
        row = {"shape": name} | timing_fields(times, bound, which) | {"bound_us": bound, "bytes": nbytes, "flops": flops}
        row |= copy_fields(row, self.ceilings) | bar_fields(row, fields)
        self.write(row | dict(fields))
        print(line_of(row | dict(fields)), flush=True)
        return row

    def write(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(finite(self.head | dict(row)), separators=(",", ":")) + "\n")
        self.rows += 1

    def failed(self, name: str, fields: Mapping[str, Any], error: BaseException) -> None:
        """A row for something of ours that does not run; goes on, unless nothing can. Raises Broken."""
        self.write({"shape": name, "us": None, "reason": reason_of(error)} | dict(fields))
        print(f"{name:28} FAILED {reason_of(error)}", flush=True)
        if isinstance(error, Broken):
            raise error
        if torch.cuda.is_available():
            still_alive()


def attempt(build: Callable[[], Sequence[Call]]) -> Sequence[Call] | Failure:
    """A peer's calls, or why there are none. Raises Broken."""
    try:
        return build()
    except Exception as error:
        if torch.cuda.is_available():
            still_alive()
        return Failure(reason_of(error))


def timing_fields(times: Mapping[str, Timing | Failure], bound: float, which: str) -> dict[str, Any]:
    """us, percent_of_bound and the peers of a row; ratio: a peer's best over ours."""
    ours = times["ours"]
    row: dict[str, Any] = {"us": None, "us_median": None, "percent_of_bound": None, "bound": which, "peers": {}}
    if isinstance(ours, Timing):
        row |= {"us": round(ours.best_us, 3), "us_median": round(ours.median_us, 3)}
        row["percent_of_bound"] = round(100 * bound / ours.best_us, 1)
    else:
        row["reason"] = ours.reason
    for name, time_ in times.items():
        if name == "ours":
            continue
        if isinstance(time_, Failure):
            row["peers"][name] = {"us": None, "ratio": None, "reason": time_.reason}
        else:
            ratio = round(time_.best_us / ours.best_us, 3) if isinstance(ours, Timing) else None
            row["peers"][name] = {"us": round(time_.best_us, 3), "ratio": ratio}
    return row


def copy_fields(row: Mapping[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """percent_of_copy: of a copy of as many bytes, launch and end included, where bytes are the bound. A kernel of 13 MB whose
    copy runs at 69 % of the rate of large ones cannot be expected beyond that.
    """
    copy_us = ceilings.copy_us(row["bytes"]) if row["us"] and row["bound"] == "bytes" else None
    return {} if copy_us is None else {"copy_us": copy_us, "percent_of_copy": round(100 * copy_us / row["us"], 1)}


def bar_fields(row: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """tflops of a row with flops; percent_of_bar: of what the project has set itself, where `fields` say what that is in
    "bar_us", "bar_tflops" or "bar_percent" (of the bound). 100 is the bar reached, more is better.
    """
    us = row["us"]
    found = {"tflops": row["flops"] / us * 1e-6} if us and row["flops"] else {}
    if us and "bar_us" in fields:
        found["percent_of_bar"] = 100 * fields["bar_us"] / us
    elif "tflops" in found and "bar_tflops" in fields:
        found["percent_of_bar"] = 100 * found["tflops"] / fields["bar_tflops"]
    elif us and "bar_percent" in fields:
        found["percent_of_bar"] = 100 * row["percent_of_bound"] / fields["bar_percent"]
    return {name: round(value, 1) for name, value in found.items()}


def kernel_fields(kernels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """config, registers and spills: of the one kernel, or the worst of several, which are then listed without theirs."""
    registers = [kernel["registers"] for kernel in kernels if kernel["registers"] is not None]
    spills = [kernel["spill_bytes"] for kernel in kernels if kernel["spill_bytes"] is not None]
    row: dict[str, Any] = {
        "config": kernels[0]["config"] if len(kernels) == 1 else None,
        "registers": max(registers, default=None),
        "spill_bytes": max(spills, default=None),
    }
    if len(kernels) == 1:
        return row
    return row | {"kernels": [{key: part for key, part in kernel.items() if key != "config"} for kernel in kernels]}


def accuracy_fields(y: torch.Tensor, want: torch.Tensor, cublas: torch.Tensor | None) -> dict[str, Any]:
    """Errors against an oracle; of cuBLAS in BF16 on the same operands, too, and how ours compares."""
    error = relative_error(y, want)
    row: dict[str, Any] = {"relative_error": error, "cosine": cosine(y, want), "error_over_cublas": None}
    if cublas is not None:
        other = relative_error(cublas, want)
        row |= {"cublas_relative_error": other, "error_over_cublas": round(error / other, 3) if other else None}
    return row


def finite(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity; what is measured has five digits at most; tuples become lists."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if value.is_integer() else float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def line_of(row: Mapping[str, Any]) -> str:
    """A row in one short line."""
    us = "  failed" if row["us"] is None else f"{row['us']:8.2f}"
    parts = [f"{row['shape']:26} {row.get('format', ''):9} m {row.get('m', ''):>5} {us} us"]
    if row["percent_of_bound"] is not None:
        parts.append(f"{row['percent_of_bound']:5.1f}% {row['bound']}")
    if row.get("percent_of_copy") is not None:
        parts.append(f"{row['percent_of_copy']:.0f}% of copy")
    for name, peer in row["peers"].items():
        parts.append(f"{name} -" if peer["ratio"] is None else f"{name} {peer['ratio']:.2f}x")
    if row.get("tflops") is not None:
        parts.append(f"{row['tflops']:.0f} TFLOP/s")
    if row.get("percent_of_bar") is not None:
        parts.append(f"{row['percent_of_bar']:.0f}% of bar")
    if row.get("worst_row") is not None:
        parts.append(f"cos {row['cosine']:.6f} worst {row['worst_row']:.5f}")
    if row.get("error_over_cublas") is not None:
        parts.append(f"err {row['relative_error']:.1e} = {row['error_over_cublas']:.2f} cublas")
    if row.get("registers") is not None:
        parts.append(f"r{row['registers']} s{row['spill_bytes']}")
    parts += [f"{name} {row[name]}" for name in ("reason", "equal") if row.get(name) is not None]
    return "  ".join(parts)


def environment() -> dict[str, Any]:
    """Device, versions, commit and time, as every row has them."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "cutlass_dsl": version_of("nvidia-cutlass-dsl"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str | None:
    """What is measured: the commit of this tree, as `machine.revision` knows it; None outside of git.

    "+" at its end: tracked files differ, the rows themselves left aside, which change as suites end.
    """
    found = revision(9, apart_from="benchmarks/baselines")
    return None if found is None else f"{found[0]}{'+' * found[1]}"


def ceiling_fields(ceilings: Ceilings) -> dict[str, float]:
    return {"copy_TBs": round(ceilings.copy * 1e-12, 3), "bf16_TFLOPs": round(ceilings.bf16 * 1e-12, 1)}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
