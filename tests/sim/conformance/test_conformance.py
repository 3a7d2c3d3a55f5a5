"""Every form of the conformance suite in the simulator: its results, and where a GPU's are recorded, the GPU's bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dsv4lab import sim
from tests.sim.conformance import suite
from tests.sim.conformance.case import Group, digest, problems, run_simulated
from tests.sim.conformance.table import RECORD, TARGET, recorded, table

ASYNCHRONOUS = ("memory", "sync", "bulk", "wgmma")  # families in which effects may come late


@pytest.fixture(scope="module")
def simulated(kernels: object) -> Iterator[Callable[[Group], list[np.ndarray]]]:
    """A group's results under the eager schedule, run once."""
    known: dict[str, list[np.ndarray]] = {}

    def get(group: Group) -> list[np.ndarray]:
        if group.name not in known:
            known[group.name] = run_simulated(group)
        return known[group.name]

    yield get
    sim.enable("sm_90a")  # what the other tests of this folder rely on


@pytest.mark.parametrize("family", suite.FAMILIES)
def test_results(family: str, simulated: Callable[[Group], list[np.ndarray]]) -> None:
    wrong = [f"{g.name}: {text}" for g in suite.groups(family) for text in problems(g, simulated(g))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", ASYNCHRONOUS)
def test_results_do_not_depend_on_the_schedule(family: str, simulated: Callable[[Group], list[np.ndarray]]) -> None:
    for group in suite.groups(family):
        if "widths" in group.name:
            continue
        expected = simulated(group)
        for got, wanted, form in zip(run_simulated(group, "lazy"), expected, group.forms, strict=True):
            assert got.tobytes() == wanted.tobytes(), f"{group.name}: {form.label}"


@pytest.mark.skipif(not RECORD.exists(), reason="no record of a GPU's results")
@pytest.mark.parametrize("family", suite.FAMILIES)
def test_bits_are_those_of_the_gpu(family: str, simulated: Callable[[Group], list[np.ndarray]]) -> None:
    """What the record calls equal is so still; forms that the GPU has not run yet are named."""
    known = {(e["group"], e["form"]): e for e in recorded()["forms"]}
    for group in suite.groups(family):
        if group.arch != "sm_90a":
            continue
        for form, got in zip(group.forms, simulated(group), strict=True):
            entry = known.get((group.name, form.label))
            assert entry is not None, f"{group.name}: {form.label} has no record; run tests.sim.conformance.fidelity on a GPU"
            if entry.get("equal"):
                assert digest(got) == entry["gpu"], f"{group.name}: {form.label} no longer gives the GPU's bits"


@pytest.mark.gpu
def test_on_this_gpu(tmp_path: Path) -> None:
    """All forms natively and simulated: the GPU's results are within the stated bounds."""
    subprocess.run([sys.executable, "-m", "tests.sim.conformance.fidelity", str(tmp_path)], check=True, timeout=280)
    entries = recorded(tmp_path / "fidelity.json.xz")["forms"]
    wrong = [f"{e['group']}: {e.get('error') or e['gpu_problem']}" for e in entries if e.get("error") or e.get("gpu_problem")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not RECORD.exists(), reason="no record of a GPU's results")
def test_the_table_is_that_of_the_record() -> None:
    assert TARGET.read_text() == table(recorded())
