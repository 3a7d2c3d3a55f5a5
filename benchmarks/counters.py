"""Where a kernel's time goes: `run.py --counters`, by the hardware counters that Nsight Compute (`ncu`) reads.

The first call of each case is watched, warm but for the L2 cache, which ncu empties. A report has the kernel's time alone,
percent of issue slots and memory, registers; what warps were seen waiting for ("selected" is issuing); warp instructions by
opcode, with their share of the samples; and the instructions with the most of them. Samples are of all warps: a producer that
waits, as it should, has as many as a warp that is late.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Bench, Call, Failure

WHOLE = ("layers", "attention_layer")  # suites that time whole steps themselves
_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "LaunchStats", "SourceCounters")
_FIGURES = ("Duration", "Issue Slots Busy", "DRAM Throughput", "Registers Per Thread")
_LABEL = "== "
_OPCODES, _STALLS, _HOTTEST = 16, 6, 12  # that a report has
Row = Mapping[str, str]


class Counting(Bench):
    """Calls what would be measured once, where ncu watches, after a line with its label."""

    def measure(
        self, name: str, fields: Mapping[str, Any], candidates: Mapping[str, Sequence[Call] | Failure], **bounds: float
    ) -> dict[str, Any]:
        calls = candidates["ours"]
        if not isinstance(calls, Failure):
            calls[0]()
            torch.cuda.synchronize()
            print(f"{_LABEL}{name} {fields.get('m', '')}", flush=True)
            torch.cuda.profiler.start()
            calls[0]()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        return {"us": None}


@dataclass(frozen=True)
class Kernel:
    """One launch: its symbol, `_FIGURES` as ncu writes them, and a row for each instruction."""

    name: str
    figures: Mapping[str, str]
    code: Sequence[Row]


def report(suite: str, command: Sequence[str]) -> int:
    """Print what a suite's kernels do. command: measures it in a process of its own. Returns an exit status."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("--counters needs ncu (Nsight Compute) on PATH, found none")
    with tempfile.TemporaryDirectory() as folder:
        record = str(Path(folder) / "counters.ncu-rep")
        watch = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--kernel-name", "regex:dsv4lab"]
        watch += [part for section in _SECTIONS for part in ("--section", section)] + ["-f", "-o", record]
        ran = subprocess.run([*watch, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if not Path(record).is_file():
            print(ran.stdout, file=sys.stderr)
            return ran.returncode or 1
        pages = [
            subprocess.run([ncu, "-i", record, "--csv", "--page", page], capture_output=True, text=True, check=True).stdout
            for page in ("details", "source")
        ]
    print(*(line for line in ran.stdout.splitlines() if "FAILED" in line), sep="\n", file=sys.stderr)
    for label, kernel in zip(labels(ran.stdout), kernels(*pages), strict=True):
        print(f"\n{suite} {label}\n" + text(kernel), flush=True)
    return ran.returncode


def labels(log: str) -> list[str]:
    """The label before each kernel that ncu said it watched."""
    found, label = [], ""
    for line in log.splitlines():
        if line.startswith(_LABEL):
            label = line.removeprefix(_LABEL)
        elif line.startswith("==PROF== Profiling"):
            found.append(label)
    return found


def kernels(details: str, source: str) -> list[Kernel]:
    """All launches of ncu's CSV pages, in their order."""
    figures: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(details[details.index('"ID"') :])):
        if row["Metric Name"] in _FIGURES:
            unit = row["Metric Unit"].replace("register/thread", "registers")
            figures.setdefault(row["ID"], {})[row["Metric Name"]] = f"{row['Metric Value']} {unit}"
    parts = re.split(r'^"Kernel Name","?(.*?)"?,?$', source, flags=re.MULTILINE)[1:]
    codes = [list(csv.DictReader(io.StringIO(part.strip()))) for part in parts[1::2]]
    if len(codes) != len(figures):
        raise ValueError(f"ncu's pages must tell of the same launches, got {len(figures)} and {len(codes)}")
    return [Kernel(*three) for three in zip(parts[::2], figures.values(), codes, strict=True)]


def text(kernel: Kernel) -> str:
    """The report of one."""
    samples, executed = Counter[str](), Counter[str]()
    stalls: Counter[str] = Counter()
    for row in kernel.code:
        opcode = _opcode(row["Source"])
        samples[opcode] += _count(row, "# Samples")
        executed[opcode] += _count(row, "Instructions Executed")
        stalls.update(_stalls(row))
    whole = max(samples.total(), 1)
    lines = [re.sub(r"_object_at_.*|^kernel_cutlass_kernel_", "", kernel.name) + ": " + ", ".join(
        f"{name} {kernel.figures.get(name, '?')}" for name in _FIGURES
    )]  # fmt: skip
    lines.append("  stalls   " + ", ".join(f"{name} {100 * n / whole:.0f}%" for name, n in stalls.most_common(_STALLS)))
    some = [f"{op} {n:,} ({100 * samples[op] / whole:.0f}%)" for op, n in executed.most_common(_OPCODES)]
    lines.append(f"  opcodes  {executed.total():,}: " + ", ".join(some))
    for row in sorted(kernel.code, key=lambda row: -_count(row, "# Samples"))[:_HOTTEST]:
        seen = ", ".join(name for name, n in _stalls(row).most_common(2) if n)
        lines.append(f"  {100 * _count(row, '# Samples') / whole:5.1f}%  {row['Source'].strip():70} {seen}")
    return "\n".join(lines)


def _count(row: Row, column: str) -> int:
    """A number that ncu leaves out where there is none."""
    return int(row.get(column) or 0)


def _stalls(row: Row) -> Counter[str]:
    prefix = "stall_"
    return Counter(
        {key.removeprefix(prefix): int(n) for key, n in row.items() if key.startswith(prefix) and "(" not in key and n}
    )


def _opcode(instruction: str) -> str:
    """FFMA of "@P0 FFMA.FTZ R1, ..."."""
    words = instruction.split()
    return next(word for word in words if word[0] != "@").split(".")[0].rstrip(";")
