"""Defects seeded into six kernels of ours: `sim.explore` must find every one, call it by name, and be silent without them."""

from types import ModuleType

import pytest

from tests.sim.mutants.runner import DOCUMENT, Runner
from tests.sim.mutants.table import ARCHITECTURES, MUTANTS


@pytest.fixture(scope="module")
def runner(kernels: ModuleType) -> Runner:
    """Where CuTeDSL is missing, `kernels` skips."""
    return Runner()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_kernel_without_defects_is_silent(runner, name):
    found = runner.explore(name)
    assert found, str(found)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_seeded_defect_is_found_and_named(runner, mutant):
    found = runner.explore(mutant.kernel, mutant)
    assert found.findings, f"{mutant}: not detected"
    assert found.findings[0].kind in mutant.kinds, str(found)
    assert f"{mutant.kernel}" in found.findings[0].text


def test_the_table_is_as_large_as_it_says():
    assert len(MUTANTS) >= 40 and {mutant.kernel for mutant in MUTANTS} == set(ARCHITECTURES)
    assert len(ARCHITECTURES) == 6 and len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)


def test_the_document_has_every_row():
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in DOCUMENT.read_text().splitlines()]
    written = [row for row in rows if len(row) == 3 and row[0] not in ("defect", "---")]
    assert [row[0] for row in written] == [mutant.defect for mutant in MUTANTS]
    assert all(row[1] in mutant.kinds for row, mutant in zip(written, MUTANTS, strict=True))
