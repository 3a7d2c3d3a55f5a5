"""The suites of hyper-connections and head without a GPU: bounds, peers, and each suite at a tiny size on the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compiling, head, mhc, triton_mhc
from benchmarks.operations import Args
from dsv4lab.reference import sampling
from tests.benchmarks.test_attention_suites import bench, on_reference, rows_of  # noqa: F401


@pytest.mark.parametrize("suite", [mhc, head], ids=["mhc", "head"])
def test_every_case_has_kernels(suite: Any) -> None:
    name = suite.__name__.rpartition(".")[2]
    jobs, failures = compiling.plan([name], quick=True)
    assert jobs and not failures


def test_quick_measures_what_the_bars_are_for() -> None:
    quick = {(case.name, case.m) for (case,) in mhc.cases(quick=True)}
    assert {(f"{size} post_pre", m) for size in ("flash", "pro") for m in (1, 4, 8, 8192)} <= quick
    assert quick <= {(case.name, case.m) for (case,) in mhc.cases(quick=False)}


def test_bars_are_for_few_tokens_or_many(tmp_path: Path, on_reference: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(mhc, "TOKENS", (9, 8))
    place = bench(tmp_path / "rows.jsonl", "mhc")
    (case,) = next(c for c in mhc.cases(quick=True) if c[0].operation == "embed_streams")
    for m in (8, 9, 10):
        mhc.measure(place, replace(case, name="pro embed", width=96, m=m), "cpu")
    few, many, neither = rows_of(place)
    assert (few["bar_us"], many["bar_percent"]) == (8.0, 85.0) and "percent_of_bar" not in neither


def tensors(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def moved(args: Args, got: Any) -> int:
    """Bytes of all that goes in and out, but for vectors of `D` and shorter, and of a table only what is looked up."""
    given, named = args
    if "num_streams" in named:
        return given[0].nbytes + got.nbytes // named["num_streams"] + got.nbytes
    return sum(t.nbytes for t in (*given, *tensors(got)) if t.dim() > 1)


@pytest.mark.parametrize("operation", ["mhc_pre", "mhc_post", "mhc_post_pre", "mhc_head", "embed_streams"])
def test_hyper_connections_on_the_reference(operation: str, tmp_path: Path, on_reference: None) -> None:  # noqa: F811
    (case,) = next(c for c in mhc.cases(quick=True) if c[0].operation == operation)
    case = replace(case, width=96, m=5)
    place = bench(tmp_path / "rows.jsonl", "mhc")
    mhc.measure(place, case, "cpu")
    (row,) = rows_of(place)
    assert row["us"] == 2.0 and row["peers"]["torch"]["ratio"] == 1.0 and row["operation"] == operation
    args, named = case.args("cpu")
    want = getattr(torch.ops.dsv4lab, operation)(*args, **named)
    assert row["bytes"] == case.nbytes == moved((args, named), want)
    if operation == "embed_streams":
        assert row["equal"] == 1.0
        assert torch.equal(case.peer(*args, **named), want)
        return
    assert row["cosine"] > 0.99999 and row["worst_row"] > 0.99999 and row["relative_error"] < 0.004
    if operation in ("mhc_pre", "mhc_post_pre"):
        assert row["comb_error"] < 1e-5 and row["comb_sums"] < 1e-4
    for a, b in zip(tensors(case.peer(*args, **named)), tensors(want), strict=True):
        near = dict(atol=1e-6, rtol=1e-5) if b.dtype == torch.float32 else dict(atol=2e-3, rtol=2**-7)  # one step of BF16
        torch.testing.assert_close(a, b, **near)


@pytest.mark.parametrize("name", ["flash pre fp8", "flash post_pre fp8", "flash pre nvfp4", "flash post_pre nvfp4"])
def test_codes_on_the_reference(name: str, tmp_path: Path, on_reference: None) -> None:  # noqa: F811
    (case,) = next(c for c in mhc.cases(quick=True) if c[0].name == name)
    case = replace(case, width=128, m=5)
    place = bench(tmp_path / "rows.jsonl", "mhc")
    mhc.measure(place, case, "cpu")
    (row,) = rows_of(place)
    assert row["relative_error"] < 0.004 and row["comb_error"] < 1e-5 and row["peers"]["unfused"]["us"] == 2.0
    args, named = case.args("cpu")
    want = getattr(torch.ops.dsv4lab, case.operation)(*args, **named)
    assert row["bytes"] == moved((args, named), want)
    found, codes = (r[-4].view(torch.uint8) for r in (case.peer(*args, **named), want))
    assert found.shape == codes.shape and float((found == codes).double().mean()) > 0.98


@pytest.mark.parametrize("operation", ["mhc_pre", "mhc_post"])
def test_the_triton_peer_is_timed_only_where_it_is_right(
    operation: str,
    tmp_path: Path,
    on_reference: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its place is taken by the torch peer, right and spoilt in one token's last stream or weight."""
    (case,) = next(c for c in mhc.cases(quick=True) if c[0].operation == operation)
    case = replace(case, width=96, m=5)

    def spoilt(*args: Any, **named: Any) -> Any:
        got = case.peer(*args, **named)
        tensors(got)[-1][2, -1] *= 1.1
        return got

    peers = []
    for peer in (case.peer, spoilt):
        monkeypatch.setattr(triton_mhc, operation, peer)
        place = bench(tmp_path / "rows.jsonl", "mhc")
        mhc.measure(place, case, "cpu")
        peers.append(rows_of(place)[-1]["peers"]["triton"])
    assert peers[0]["us"] == 2.0
    assert peers[1]["us"] is None and "the Triton kernel is wrong" in peers[1]["reason"]


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
    assert row["us"] == 2.0 and (row["shape"], row["m"], row["operation"]) == (case.name, case.m, case.operation)
    if "cosine" in row:
        assert row["cosine"] > 0.99999 and row["worst_row"] > 0.9999
    else:
        assert row["equal"] == 1.0
    peer = {"accept_drafts": None, "lm_head_peaks": "without peaks"}.get(case.operation, "torch")
    assert list(row["peers"]) == ([peer] if peer else [])
    if peer:
        assert row["peers"][peer]["us"] == 2.0


def test_integers_that_differ_are_seen() -> None:
    """In what comes out, and in what is changed in place."""
    for name, (make, oracle, _) in head.INTEGERS.items():
        args, named = make(5, "cpu")
        got = oracle(*args, **named)
        assert head.integer_figures(oracle, (args, named), got) == {"equal": 1.0}, name
        tensors(got)[0].flatten()[-1] += 1
        assert head.integer_figures(oracle, (args, named), got) == {"equal": 0.0}, name
    args, named = head.advance_args(5, "cpu")
    got = head.decoding.advance_decode(*args, **named)
    args[1][3] += 1
    assert head.integer_figures(head.decoding.advance_decode, (args, named), got) == {"equal": 0.0}


@pytest.mark.parametrize("kind", list(head.KINDS))
def test_the_sampling_peer_draws_from_the_references_distribution(kind: str) -> None:
    """Its filtered probabilities are the reference's, and its draws have a probability there."""
    torch.manual_seed(1)
    logits, t, k, p = head.sample_args(kind, 6, "cpu", draw=False)[0]
    logits, t = logits[:, :500].contiguous(), t
    want = sampling.probabilities(logits, temperature=t, top_k=k, top_p=p)
    if kind == "filtered":
        assert (head.torch_probabilities(kind, logits, t) - want).abs().max() < 1e-6
    drawn = torch.stack([head.torch_sample(kind, logits, t) for _ in range(50)], dim=1)
    assert want.gather(1, drawn).min() > 0
    if kind == "greedy":
        assert torch.equal(drawn, logits.argmax(-1)[:, None].expand(-1, 50))


def test_a_failure_is_a_row(tmp_path: Path, on_reference: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(mhc, "compared", lambda *_: 1 / 0)
    (case,) = next(iter(mhc.cases(quick=True)))
    place = bench(tmp_path / "rows.jsonl", "mhc")
    mhc.measure(place, replace(case, width=96, m=2), "cpu")
    (row,) = rows_of(place)
    assert row["us"] is None and "ZeroDivisionError" in row["peers"].get("ours", row).get("reason", "")
