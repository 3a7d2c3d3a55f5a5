"""What ran on a GPU, from a profile of torch: whose kernels, how long each, and which launch each came from.

Our kernels are methods of classes below `dsv4lab.kernels`; CuTeDSL writes both names into the symbol, which the profiler shows
for launches and for replays of CUDA graphs alike. Everything else that computes is *foreign*: where a model is to run on our
kernels alone, there may be copies, fills and gathers of torch beside them, and nothing more.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from dsv4lab.dispatch import kernel_rooms
from dsv4lab.ops import Call

_OURS = re.compile(r"^kernel_cutlass_(?P<method>\w+?)_dsv4labkernels(?P<module>[a-z0-9]*?)(?P<cls>[A-Z]\w*?)_object_at")
# Of torch, what moves values and computes none: a conversion of the dtype is a copy. Functors' names stand inside the kernel's.
_COPIES = (
    r"^Mem(cpy|set)\b",
    r"\b(direct|bfloat16|float16|float8\w*)_copy_kernel_cuda\b",
    r"\bFillFunctor<",
    r"\bCatArrayBatchedCopy",
    r"\bindex_kernel_impl<",
    r"\bindexSelect(Small|Large)Index\b",
    r"\bvectorized_gather_kernel\b",
    r"\b_cuda_scatter_gather_internal_kernel<false\b",  # true: a scatter
)
_COPY = re.compile("|".join(_COPIES))
_SHORT = 60  # characters of a foreign kernel's name


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill that ran. Times in microseconds since the profile began."""

    name: str
    start_us: float
    end_us: float
    stream: int = 0

    @property
    def us(self) -> float:
        return self.end_us - self.start_us


def kernels_of(profile: Any) -> list[Kernel]:
    """What a finished `torch.profiler.profile` saw on GPUs, in the order in which it began, without ranges that users name."""
    found = [
        Kernel(event.name, event.time_range.start, event.time_range.end, event.device_resource_id)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(found, key=lambda kernel: (kernel.start_us, kernel.end_us))


# ---- whose it is -------------------------------------------------------------------------------------------------------
def is_ours(name: str) -> bool:
    """Whether a kernel of this name was compiled from `dsv4lab.kernels`."""
    return _OURS.match(name) is not None


def is_copy(name: str) -> bool:
    """Whether it is a copy, a fill, a concatenation or a gather by index: memory is moved, nothing is computed."""
    return not is_ours(name) and _COPY.search(name) is not None


def foreign(found: Any) -> list[str]:
    """Names of kernels that are neither ours nor copies, each once: of a finished profile, or of names. Empty is good."""
    return sorted({name for name in _names(found) if not is_ours(name) and not is_copy(name)})


def _names(found: Any) -> Iterable[str]:
    return (kernel.name for kernel in kernels_of(found)) if hasattr(found, "events") else found


def short(name: str) -> str:
    """A name that fits into a table: the class of one of ours, with its method unless that is `kernel`."""
    if match := _OURS.match(name):
        return match["cls"] if match["method"] == "kernel" else f"{match['cls']}.{match['method']}"
    if is_copy(name):
        return next(label for part, label in _COPY_LABELS.items() if part in name)
    return name if len(name) <= _SHORT else f"{name[: _SHORT - 3]}..."


def rooms(found: Any) -> set[str]:
    """Where our kernels come from: folders of `dsv4lab.kernels`, such as "attention". found: as for `foreign`."""
    modules = [match["module"] for name in _names(found) if (match := _OURS.match(name))]
    return {room for room in kernel_rooms().values() if any(module.startswith(room) for module in modules)}


def rooms_called(calls: Iterable[Call]) -> set[str]:
    """The same of the kernels that observed operations have."""
    known = kernel_rooms()
    return {known[call.name] for call in calls if call.name in known}


def graph_replays(profile: Any) -> int:
    """How many CUDA graphs the host launched."""
    return sum(event.name.startswith("cudaGraphLaunch") for event in profile.events())


def by_name(profile: Any) -> list[dict[str, Any]]:
    """What ran, as rows of a table: ours first, then copies, then all else, each by the time it took in all."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in kernels_of(profile):
        whose = "ours" if is_ours(kernel.name) else "copies" if is_copy(kernel.name) else "others"
        groups[whose, short(kernel.name)].append(kernel.us)
    order = sorted(groups, key=lambda key: (("ours", "copies", "others").index(key[0]), -sum(groups[key]), key[1]))
    return [{"whose": key[0], "kernel": key[1], "count": len(us := groups[key]), "us": round(sum(us), 1)} for key in order]


_COPY_LABELS = {
    "Memcpy": "memcpy",
    "Memset": "memset",
    "_copy_kernel_cuda": "torch copy",
    "FillFunctor": "torch fill",
    "CatArrayBatchedCopy": "torch cat",
    "index": "torch index",
    "gather": "torch gather",
}


# ---- how long ----------------------------------------------------------------------------------------------------------
def runs_of(kernels: Sequence[Kernel], count: int) -> list[list[Kernel]]:
    """The kernels of each of `count` equal runs that waited for each other. Raises ValueError where the runs differ."""
    size, rest = divmod(len(kernels), count)
    runs = [list(kernels[i * size : (i + 1) * size]) for i in range(count)]
    if rest or any(Counter(k.name for k in run) != Counter(k.name for k in runs[0]) for run in runs):
        raise ValueError(f"a profile must hold {count} equal runs, got {len(kernels)} kernels that do not split into them")
    return runs


def added_us(kernels: Sequence[Kernel]) -> list[float]:
    """By how much each kernel makes its stream's work longer.

    That is from the end of what ran before it in its stream, or from its own start where that came later, to its end. A launch
    may begin while the one ahead of it still runs and wait for it (programmatic dependent launch): what it waits is not its own
    time, what it does meanwhile costs nothing. A kernel that ends inside of another's time ran beside it, and counts as it ran.
    """
    ends: dict[int, float] = {}
    found = []
    for kernel in kernels:
        before = ends.get(kernel.stream, kernel.start_us)
        own = kernel.end_us - max(kernel.start_us, before)
        found.append(own if own > 0 else kernel.us)
        ends[kernel.stream] = max(before, kernel.end_us)
    return found


# ---- where it came from ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Launch:
    """What the host launched: the names of the kernels that it may start, and the stream, by any number."""

    names: Collection[str]
    stream: int = 0


def launches_of(kernels: Sequence[Kernel], launched: Sequence[Launch]) -> list[int | None]:
    """Of each kernel, the launch that it came from; None where that cannot be told. launched: in the host's order.

    Kernels of one name are taken to have begun in the order of their launches. A launch may start one of them several times, if
    all do it equally often. Where two streams run kernels of one name, those of a stream belong together if the numbers of
    kernels tell the streams apart; a CUDA graph's streams are not those that it was captured on.
    """
    queues: dict[str, list[int]] = defaultdict(list)
    for number, launch in enumerate(launched):
        for name in launch.names:
            queues[name].append(number)
    places: dict[str, list[int]] = defaultdict(list)
    for place, kernel in enumerate(kernels):
        places[kernel.name].append(place)
    found: list[int | None] = [None] * len(kernels)
    for name, mine in places.items():
        groups = _paired([(i, launched[i].stream) for i in queues[name]], [(i, kernels[i].stream) for i in mine])
        for queue, ran in groups:
            each, rest = divmod(len(ran), len(queue)) if queue else (0, 0)
            for place, at in enumerate(ran):
                found[at] = queue[place // each] if each and not rest else None
    return found


def _paired(launched: list[tuple[int, int]], ran: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """Launches and kernels of one name, each with its stream: by streams where their numbers say which is which, else all."""

    def by_stream(pairs: list[tuple[int, int]]) -> list[list[int]]:
        groups: dict[int, list[int]] = defaultdict(list)
        for number, stream in pairs:
            groups[stream].append(number)
        return sorted(groups.values(), key=len)

    first, second = by_stream(launched), by_stream(ran)
    sizes = [len(group) for group in first]
    if sizes == [len(group) for group in second] and len(set(sizes)) == len(sizes):
        return list(zip(first, second, strict=True))
    return [([number for number, _ in launched], [number for number, _ in ran])]


@dataclass(frozen=True)
class Row:
    """Kernels of one name from one launch. us: `added_us`, runs_us: from start to end; both the median of all runs."""

    name: str
    launch: int | None
    count: int
    us: float
    runs_us: float


def rows_of(kernels: Sequence[Kernel], count: int, launched: Sequence[Launch]) -> list[Row]:
    """A table of `count` equal runs, in the order of launches; what came from none of them stands at the end.

    Raises ValueError as `runs_of`.
    """
    times: dict[tuple[int | None, str], list[list[tuple[float, float]]]] = defaultdict(lambda: [[] for _ in range(count)])
    for number, run in enumerate(runs_of(kernels, count)):
        for kernel, launch, us in zip(run, launches_of(run, launched), added_us(run), strict=True):
            times[launch, kernel.name][number].append((us, kernel.us))
    order = sorted(times, key=lambda key: len(launched) if key[0] is None else key[0])
    return [
        Row(
            name,
            launch,
            max(len(run) for run in times[launch, name]),
            median(sum(us for us, _ in run) for run in times[launch, name]),
            median(sum(us for _, us in run) for run in times[launch, name]),
        )
        for launch, name in order
    ]
