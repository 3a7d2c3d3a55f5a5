"""NVIDIA's CuTeDSL samples in the simulator, under every schedule.

DSV4LAB_CUTLASS_EXAMPLES names their folder (`examples/python/CuTeDSL` of a CUTLASS checkout); without it they are skipped. One
sample of each family runs by default, all of them with DSV4LAB_SAMPLES=all. DSV4LAB_SAMPLE_LIMIT: seconds for each schedule.
"""

from __future__ import annotations

import os
import sys
from itertools import groupby
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import sample_sweep
from sample_table import page

EXAMPLES = os.environ.get("DSV4LAB_CUTLASS_EXAMPLES")
LIMIT = float(os.environ.get("DSV4LAB_SAMPLE_LIMIT", "300"))
SAMPLES = sample_sweep.load_samples()
FIRST = [next(iter(group)) for _, group in groupby(SAMPLES, lambda s: s.family)]
CHOSEN = SAMPLES if os.environ.get("DSV4LAB_SAMPLES") == "all" else FIRST


@pytest.mark.skipif(EXAMPLES is None, reason="set DSV4LAB_CUTLASS_EXAMPLES to CUTLASS's examples/python/CuTeDSL")
@pytest.mark.timeout(9 * LIMIT)
@pytest.mark.parametrize("sample", CHOSEN, ids=lambda s: s.name)
def test_sample_passes_every_schedule(sample):
    assert EXAMPLES is not None
    results = sample_sweep.run_sample(sample, Path(EXAMPLES), sample_sweep.SCHEDULES, LIMIT)
    failed = {schedule: facts["error"] for schedule, facts in results.items() if not sample_sweep.passed(facts)}
    if failed and sample.excused:
        pytest.xfail("; ".join(note.text for note in sample.notes))
    assert not failed


def test_every_family_of_the_specification_is_listed():
    families = {sample.family for sample in SAMPLES if sample.required}
    assert len([name for name in families if name.startswith("Hopper")]) == 7
    wanted = ("tutorials", "dense", "1 CTA", "2 CTAs", "grouped block-scaled", "FMHA forward", "FMHA backward", "MLA", "mixed")
    assert all(any(part in name for name in families if name.startswith("Blackwell")) for part in wanted)
    assert len({s.path for s in SAMPLES if s.family in ("Primitives", "cute_ext")}) >= 62


def test_the_page_tells_why_a_sample_fails():
    good = {"error": None, "launches": 1, "instructions": 1234, "races": []}
    results = {s.name: dict.fromkeys((*sample_sweep.SCHEDULES, sample_sweep.RACES), good) for s in SAMPLES}
    noted = next(s for s in SAMPLES if s.excused and s.notes[0].skip)
    plain = next(s for s in SAMPLES if not s.notes)
    results[noted.name] = {**results[noted.name], "random:3": {**good, "error": "MemoryFault: somewhere\n  in a kernel"}}
    results[plain.name] = {**results[plain.name], "lazy": {**good, "error": "Deadlock: a | b\n more"}}
    text = page(SAMPLES, results)
    assert f"found in the sample: {noted.notes[0].text}" in text
    assert "| pass | - | 5/5 | none | 1,234 | unexplained (lazy): Deadlock: a \\| b |" in text
    del results[plain.name]["eager"]
    with pytest.raises(KeyError, match="no complete results for"):
        page(SAMPLES, results)
