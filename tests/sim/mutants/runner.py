"""Explores the kernels of this folder, with and without defects; `python -m tests.sim.mutants.runner` writes docs/'s table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from dsv4lab import sim
from tests.sim.mutants.table import ARCHITECTURES, MUTANTS, Mutant

SEEDS = 3
DOCUMENT = Path(__file__).parents[3] / "docs" / "simulator-mutants.md"
HEADER = """# What the simulator's checks find: {total} seeded defects

Written by `python -m tests.sim.mutants.runner` from `tests/sim/mutants/table.py`; `tests/sim/test_mutants.py` asserts every
row, and that `sim.explore` (eager, lazy and {seeds} random schedules, all checks, expected results) reports nothing on the
{kernels} kernels without defects. "reported as" is the kind of the first finding, "under" the schedule that showed it;
exploring stops there.

| reported as | defects |
|---|---|
{kinds}

"""


class Runner:
    """Compiles a kernel once for each of its source's defects and explores it as often as asked."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Any] = {}

    def _get(self, name: str, defect: str) -> Any:
        if (name, defect) not in self._known:
            module = import_module(f"tests.sim.mutants.{name}")
            tensors, expected = module.case()
            compiled = sim.compile(getattr(module, name), *tensors.values(), defect, arch=ARCHITECTURES[name])
            before = {key: tensor.clone() for key, tensor in tensors.items()}
            self._known[name, defect] = compiled, tensors, before, expected, getattr(module, "RTOL", 0.0)
        return self._known[name, defect]

    def explore(self, name: str, mutant: Mutant | None = None, **more: Any) -> sim.Exploration:
        """What `sim.explore` says of a kernel, without defects or with one. more: further arguments of `sim.explore`."""
        by_source = mutant.defect if mutant is not None and mutant.edit is None else ""
        compiled, tensors, before, expected, rtol = self._get(name, by_source)
        for key, tensor in tensors.items():
            tensor.copy_(before[key])
        launches = compiled.capture(*tensors.values())
        if mutant is not None and mutant.edit is not None:
            launches = [replace(launch, kernel=mutant.edit(launch.kernel)) for launch in launches]
        memory = compiled.session.tensors.memory(tensors)
        return sim.explore(launches, memory=memory, seeds=SEEDS, expect=expected, rtol=rtol, raising=False, **more)


def document(explore: Callable[..., sim.Exploration]) -> str:
    """The table of all defects as Markdown."""
    kinds: Counter[str] = Counter()
    lines: list[str] = []
    for name, arch in ARCHITECTURES.items():
        lines += [f"## {name} ({arch})", "", str(import_module(f"tests.sim.mutants.{name}").__doc__).strip(), ""]
        lines += ["| defect | reported as | under |", "|---|---|---|"]
        for mutant in (mutant for mutant in MUTANTS if mutant.kernel == name):
            first = explore(name, mutant).findings[0]
            kinds[first.kind] += 1
            lines.append(f"| {mutant.defect} | {first.kind} | {first.schedules[0]} |")
        lines.append("")
    counts = "\n".join(f"| {kind} | {count} |" for kind, count in kinds.most_common())
    return HEADER.format(total=len(MUTANTS), seeds=SEEDS, kernels=len(ARCHITECTURES), kinds=counts) + "\n".join(lines)


if __name__ == "__main__":
    sim.enable()
    DOCUMENT.write_text(document(Runner().explore))
