"""The page docs/simulator-conformance.md from a sweep's results: python sample_table.py RESULTS.json PAGE.md."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from datetime import date
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from sample_sweep import RACES, SCHEDULES, Facts, Results, Sample, load_samples, passed

_RANDOM = [schedule for schedule in SCHEDULES if schedule.startswith("random")]
_WHOSE = {
    "finding": "found in the sample",
    "compiler": "does not compile",
    "environment": "needs more than kernels",
    "tolerance": "check too strict",
    "simulator": "gap of the simulator",
}


def page(samples: list[Sample], results: Results, remark: str = "") -> str:
    """The whole page, with a remark about how the results came about. Raises KeyError for a sample without results."""
    missing = [s.name for s in samples if any(x not in results.get(s.name, {}) for x in (*SCHEDULES, RACES))]
    if missing:
        raise KeyError(f"no complete results for {', '.join(missing)}")
    return "\n".join([*_introduction(remark), *_summary(samples, results), *_families(samples, results)]) + "\n"


def _introduction(remark: str) -> Iterator[str]:
    yield "# NVIDIA's samples in the simulator"
    yield ""
    yield (
        f"Generated {date.today().isoformat()} by `tests/sim/sample_table.py` from a sweep of NVIDIA's CuTeDSL samples "
        f"(`examples/python/CuTeDSL` of CUTLASS, unmodified, not part of this repository) with nvidia-cutlass-dsl "
        f"{version('nvidia-cutlass-dsl')}. A sample's own comparison with torch decides; shapes are small."
    )
    yield ""
    yield (
        "Columns: eager and lazy schedules, how many of five random ones pass (seeds 0 to 4), and what the race checker says "
        "of an eager run. What passes everything is not in the tables but counted in the summary, and named in "
        "`tests/sim/nvidia_samples.toml`. A line `[without CHECK]` is the sample above it with one check of the simulator "
        "turned off, to show that nothing else is wrong with it."
    )
    if remark:
        yield ""
        yield remark
    yield ""
    yield "```"
    yield "python tests/sim/sample_sweep.py EXAMPLES results.json --jobs 16      # six minutes on 16 cores"
    yield "python tests/sim/sample_table.py results.json docs/simulator-conformance.md"
    yield "DSV4LAB_CUTLASS_EXAMPLES=EXAMPLES python -m pytest tests/sim/test_samples.py"
    yield "```"


def _all(facts: dict[str, Facts], schedules: Iterable[str]) -> bool:
    return all(passed(facts[schedule]) for schedule in schedules)


def _summary(samples: list[Sample], results: Results) -> Iterator[str]:
    yield ""
    yield "## Summary"
    yield ""
    yield "| family | samples | eager | lazy | every schedule | no races |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for family, group in groupby(samples, lambda sample: sample.family):
        whole = [results[s.name] for s in group if not s.skip]
        counts = [sum(_all(facts, some) for facts in whole) for some in (["eager"], ["lazy"], SCHEDULES)]
        quiet = sum(_quiet(facts[RACES]) for facts in whole)
        yield f"| {family} | {len(whole)} | {counts[0]} | {counts[1]} | {counts[2]} | {quiet} |"
    scripts = [s for s in samples if s.family in ("Primitives", "cute_ext") and not s.skip]
    paths = {s.path for s in scripts}
    good = paths - {s.path for s in scripts if not _all(results[s.name], SCHEDULES)}
    yield ""
    yield f"Of the {len(paths)} primitives and cute_ext scripts, {len(good)} pass every schedule."


def _quiet(facts: Facts) -> bool:
    return passed(facts) and not facts.get("races")


def _families(samples: list[Sample], results: Results) -> Iterator[str]:
    for family, group in groupby(samples, lambda sample: sample.family):
        every = list(group)
        twice = {(sample.path, sample.arguments) for sample in every if sample.skip}
        some = [s for s in every if (s.path, s.arguments) in twice or not _whole(results[s.name])]
        if not some:
            continue
        yield ""
        yield f"## {family} ({some[0].arch}{'' if some[0].required else ', beyond what is promised'})"
        yield ""
        yield "| sample | eager | lazy | random | races | warp-instructions | why not |"
        yield "| --- | --- | --- | --- | --- | ---: | --- |"
        for sample in some:
            yield _row(sample, results[sample.name])


def _whole(facts: dict[str, Facts]) -> bool:
    return _all(facts, SCHEDULES) and _quiet(facts[RACES])


def _row(sample: Sample, facts: dict[str, Facts]) -> str:
    cells = ["pass" if passed(facts[schedule]) else "-" for schedule in ("eager", "lazy")]
    cells.append(f"{sum(passed(facts[schedule]) for schedule in _RANDOM)}/{len(_RANDOM)}")
    races = facts[RACES]
    found = len(races.get("races", ()))
    cells.append("none" if _quiet(races) else str(found) if found else "-")
    cells.append(f"{facts['eager'].get('instructions', 0):,}" if facts["eager"].get("launches") else "no launch")
    return f"| {_name(sample)} | {' | '.join(cells)} | {_why(sample, facts)} |"


def _name(sample: Sample) -> str:
    if sample.skip:
        return "".join(f"[without {check}]" for check in sample.skip)
    path = Path(sample.path)
    return f"`{path.name}`{' ' + ' '.join(sample.arguments) if sample.arguments else ''}"


def _why(sample: Sample, facts: dict[str, Facts]) -> str:
    failing = [schedule for schedule in SCHEDULES if not passed(facts[schedule])]
    notes = [note for note in sample.notes if not sample.skip and (failing or note.races)]
    words = [f"{_WHOSE[note.kind]}: {note.text}" for note in notes if not note.races or facts[RACES].get("races")]
    if failing and not words:
        first = str(facts[failing[0]]["error"]).strip().splitlines()[0]
        words = [f"unexplained ({', '.join(failing)}): {first}"]
    races = facts[RACES].get("races", ())
    if races and not failing and not words:
        words = [f"not judged: {_headline(races[0])}"]
    return " ".join(words).replace("|", "\\|")


def _headline(finding: str) -> str:
    """A race in one line: what, and the source lines of both accesses."""
    first = re.sub(r" on .*?: ", ": ", finding.splitlines()[0], count=1)
    lines = re.findall(r"\(instruction \d+, [^)]*?([\w.]+\.py:\d+)\)", finding)
    return f"{first} ({' and '.join(dict.fromkeys(lines))})" if lines else first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--remark", default="", help="a sentence about how the results came about")
    options = parser.parse_args()
    options.page.write_text(page(load_samples(), json.loads(options.results.read_text()), options.remark), encoding="utf-8")


if __name__ == "__main__":
    main()
