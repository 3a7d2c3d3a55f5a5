"""Defects seeded into six kernels of ours: `sim.explore` must find every one, call it by name, and be silent without them."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from dsv4lab import sim
from tests.sim.mutants.table import ARCHITECTURES, MUTANTS, Mutant

SEEDS = 3


@pytest.fixture(scope="module")
def explored(kernels: ModuleType) -> Callable[..., sim.Exploration]:
    """explored(kernel, mutant=None, **more): explore a kernel of the folder, compiled once, with or without a defect."""
    known: dict[tuple[str, str], Any] = {}

    def get(name: str, defect: str) -> Any:
        if (name, defect) not in known:
            module = import_module(f"tests.sim.mutants.{name}")
            tensors, expected = module.case()
            compiled = sim.compile(getattr(module, name), *tensors.values(), defect, arch=ARCHITECTURES[name])
            before = {key: tensor.clone() for key, tensor in tensors.items()}
            known[name, defect] = compiled, tensors, before, expected, getattr(module, "RTOL", 0.0)
        return known[name, defect]

    def explore(name: str, mutant: Mutant | None = None, **more: Any) -> sim.Exploration:
        by_source = mutant.defect if mutant is not None and mutant.edit is None else ""
        compiled, tensors, before, expected, rtol = get(name, by_source)
        for key, tensor in tensors.items():
            tensor.copy_(before[key])
        launches = compiled.capture(*tensors.values())
        if mutant is not None and mutant.edit is not None:
            launches = [replace(launch, kernel=mutant.edit(launch.kernel)) for launch in launches]
        memory = compiled.session.tensors.memory(tensors)
        return sim.explore(launches, memory=memory, seeds=SEEDS, expect=expected, rtol=rtol, raising=False, **more)

    return explore


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_kernel_without_defects_is_silent(explored, name):
    assert explored(name), str(explored(name))


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_seeded_defect_is_found_and_named(explored, mutant):
    found = explored(mutant.kernel, mutant)
    assert found.findings, f"{mutant}: not detected"
    assert found.findings[0].kind in mutant.kinds, str(found)
    assert f"{mutant.kernel}" in found.findings[0].text


def test_the_table_is_as_large_as_it_says():
    assert len(MUTANTS) >= 40 and {mutant.kernel for mutant in MUTANTS} == set(ARCHITECTURES)
    assert len(ARCHITECTURES) == 6 and len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)
