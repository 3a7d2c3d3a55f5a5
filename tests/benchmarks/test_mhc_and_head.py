"""The suites of hyper-connections and head without a GPU: bounds, peers, and each suite at a tiny size on the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compiling, eager, head, mhc, triton_mhc
from benchmarks.common import Failure
from tests.benchmarks.test_attention_suites import bench, on_reference, rows_of  # noqa: F401


@pytest.mark.parametrize("suite", [mhc, head], ids=["mhc", "head"])
def test_every_case_has_kernels(suite: Any) -> None:
    name = suite.__name__.rpartition(".")[2]
    jobs, failures = compiling.plan([name], quick=True)
    assert jobs and not failures


@pytest.mark.parametrize("operation", ["mhc_pre", "mhc_post", "mhc_post_pre", "mhc_head", "embed_streams"])
def test_hyper_connections_on_the_reference(operation: str, tmp_path: Path, on_reference: None) -> None:  # noqa: F811
    (case,) = next(c for c in mhc.cases(quick=True) if c[0].operation == operation)
    case = replace(case, width=96, m=5)
    place = bench(tmp_path / "rows.jsonl", "mhc")
    mhc.measure(place, case, "cpu")
    (row,) = rows_of(place)
    assert row["us"] == 2.0 and row["peers"]["torch"]["ratio"] == 1.0 and row["operation"] == operation
    assert row.get("equal", row.get("cosine")) > 0.9999
    if "comb_error" in row:
        assert row["comb_error"] < 1e-5 and row["comb_sums"] < 1e-3
    args, named = case.args("cpu")
    assert row["bytes"] == pytest.approx(case.nbytes)
    peers = case.peer(*args, **named)
    want = getattr(torch.ops.dsv4lab, operation)(*args, **named)
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (peers, want)), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("name", sorted({c[0].name for c in head.cases(quick=True) if not c[0].name.startswith("pro")}))
def test_the_head_on_the_reference(
    name: str,
    tmp_path: Path,
    on_reference: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "VOCAB", 640)
    monkeypatch.setattr(head, "FLASH", replace(head.FLASH, hidden_size=64))
    monkeypatch.setattr(head, "PRO", replace(head.PRO, hidden_size=64))
    (case,) = next(c for c in head.cases(quick=True) if c[0].name == name)
    place = bench(tmp_path / "rows.jsonl", "head")
    head.measure(place, case, "cpu")
    (row,) = rows_of(place)
    assert row["us"] == 2.0 and row.get("equal", row.get("cosine", 1.0)) > 0.999
    if case.operation != "accept_drafts":
        assert row["peers"]["torch"]["us"] == 2.0


def test_a_failure_is_a_row(tmp_path: Path, on_reference: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(mhc, "compared", lambda *_: 1 / 0)
    (case,) = next(iter(mhc.cases(quick=True)))
    place = bench(tmp_path / "rows.jsonl", "mhc")
    mhc.measure(place, replace(case, width=96, m=2), "cpu")
    assert rows_of(place)[0]["us"] is None and isinstance(Failure("x"), Failure)
    assert triton_mhc._ROWS == 16 and eager.EPS == mhc.EPS
