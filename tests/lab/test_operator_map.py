"""The operator map: nothing is missing, everything it links to is there, rows find their operation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dsv4lab import ops
from dsv4lab.lab import operator_map
from dsv4lab.lab.machine import ROOT

NAMES = list(ops.implementations())

# Operations that no notebook names, and that have no measured rows: why. All others must have both.
NO_NOTEBOOK = {
    "quantize_fp8_blocks": "packs weights when a model is made, no step of inference; notebook 09 has the format",
}
NO_KERNEL = "reference only: kernels decode weights on their way, and weights are packed once, when a checkpoint is loaded"
NO_ROWS = {"dequantize": NO_KERNEL, "quantize_fp8_blocks": NO_KERNEL}


@pytest.fixture(scope="module")
def listed() -> list[operator_map.Operation]:
    return operator_map.operations()


def test_every_operation_has_what_it_needs(listed: list[operator_map.Operation]) -> None:
    assert [operation.name for operation in listed] == NAMES
    for operation in listed:
        assert ("reference", *operation.kernels) == ops.implementations()[operation.name]
        assert operation.sections != operator_map.NONE, f"the oracle of {operation.name} must cite a section of the spec"
        assert operation.tests, f"{operation.name} has no test"
        assert bool(operation.notebooks) != (operation.name in NO_NOTEBOOK), f"{operation.name}: {operation.notebooks}"
        folders = [folder for found in operation.kernels.values() for folder in found]
        assert all((ROOT / folder).is_dir() for folder in folders)
        assert all((ROOT / path).is_file() for path in (operation.oracle_file, *operation.tests, *operation.notebooks))


def test_every_operation_with_a_kernel_is_measured(listed: list[operator_map.Operation]) -> None:
    tables = [operator_map.measured(operator_map.BASELINES / name, NAMES) for name in operator_map.DEVICES.values()]
    without = {name for name in NAMES if not any(table.get(name) for table in tables)}
    assert without == set(NO_ROWS)
    for operation in listed:
        assert bool(operation.kernels) != (operation.name in NO_ROWS), f"{operation.name} has kernels for {operation.kernels}"


def test_kernels_are_the_folders_that_are_reached(listed: list[operator_map.Operation]) -> None:
    by_name = {operation.name: operation for operation in listed}
    assert by_name["q_norm_rope"].kernels["sm_90a"] == ("dsv4lab/kernels/rope/heads",)
    assert "dsv4lab/kernels/gemm/mixed" in by_name["linear"].kernels["sm_90a"]
    assert "dsv4lab/kernels/gemm/w4a4" in by_name["linear"].kernels["sm_100a"]
    assert by_name["shared_expert"].oracle == "moe.expert"
    assert by_name["router_topk"].sections == "5.1"


def test_links_lead_somewhere() -> None:
    page = operator_map.render()
    links = dict(re.findall(r"^\[(.+)\]: \.\./(.+)$", page, re.MULTILINE))
    used = re.findall(r"\[([^]]+)\](?!:)", page)
    assert len(used) > 2 * len(NAMES) and set(used) == set(links)
    assert not [link for link in links.values() if not (ROOT / link).exists()]
    assert all(page.count(f"| `{name}` |") >= 2 for name in NAMES)


@pytest.mark.parametrize(
    ("suite", "shape", "operation"),
    [
        ("linear, spot check", "flash wq_b", "linear"),
        ("linear", "pro wo_a", "grouped_linear"),
        ("experts", "flash experts", "moe_experts"),
        ("experts", "flash product 1", None),
        ("indexer", "topk 512 of 1 x 262144", "index_topk"),
        ("quantizers", "quantize_nvfp4, scale given", "quantize_nvfp4"),
        ("hyper_connections", "flash mhc_post_pre", "mhc_post_pre"),
    ],
)
def test_a_row_finds_its_operation(suite: str, shape: str, operation: str | None) -> None:
    assert operator_map.operation_of({"benchmark": suite, "shape": shape}, NAMES) == operation


def test_a_row_that_names_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="must name an operation"):
        operator_map.operation_of({"benchmark": "new", "shape": "flash thing"}, NAMES)


def test_the_newest_row_of_a_shape_counts(tmp_path: Path) -> None:
    row = {"benchmark": "linear", "shape": "flash wq_a", "format": "nvfp4", "m": 1, "n": 2, "k": 3, "peers": {}}
    rows = [
        row | {"percent_of_bound": 90.0, "date": "2026-01-02"},
        row | {"percent_of_bound": 40.0, "date": "2026-01-03", "peers": {"a": {"ratio": 2.0}, "b": {"ratio": 1.5}, "c": {}}},
        row | {"percent_of_bound": 95.0, "date": "2026-01-01"},
        row | {"m": 8, "percent_of_bound": 30.0},
        row | {"m": 16, "percent_of_bound": None},
    ]
    path = tmp_path / "h200.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (found,) = operator_map.measured(path, NAMES).values()
    assert operator_map.best(found) == "40 % (flash wq_a nvfp4, 1), 1.50x b; lowest of 2: 30 %"
    assert operator_map.best([]) == operator_map.NONE
