"""Writes docs/simulator-fidelity.md from the record h200.json.xz: python -m tests.sim.conformance.table"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("h200.json.xz")
TARGET = Path(__file__).parents[3] / "docs" / "simulator-fidelity.md"
INTRODUCTION = """# The simulator's fidelity

Small kernels of ours, one form of an instruction each (`tests/sim/conformance`), ran on an {device} and in the simulator
on the same inputs: random bits, subnormal numbers, zeros, infinities and NaN, odd sizes, negative coordinates. Every form
also has an expected result, computed in plain Python and numpy. {equal} of {total} forms give equal bits on the GPU and
in the simulator; the others are listed below with their bounds. `tests/sim/conformance/test_conformance.py` holds the
simulator to the GPU's recorded bits where there is no GPU. This page is written by `python -m
tests.sim.conformance.table`.

What the H200 taught:

* wgmma and mma.sync add all products of one instruction's K, and C, in one step: aligned to the largest exponent, cut off
  25 binary places below it (13 for wgmma with 8-bit floats), the result cut off to 24 (14) bits or rounded to float16.
  The simulator does the same (`dsv4lab/sim/accumulation.py`), so these results are equal in every bit. mma.sync with
  8-bit floats is two float16 steps.
* Arithmetic of at most 32 bits makes every NaN 0x7fffffff (0x7fff); float64 keeps payloads, by a rule not modelled here.
* `.ftz` of mul and fma looks at the exact result, before rounding.
* A tensor copy's box must begin at a multiple of 16 bytes of its row, a store's coordinates must not be negative, and a
  reduction `add` has no s64: each is an illegal instruction on the GPU and an error here. Stores write rows up to a
  multiple of 16 bytes. NaN fill is 0x7ff7 in every 16 bits. Loads of tf32 round to nearest; f32_ftz flushes nothing.
* What tcgen05 does with sums is not known here: there was no Blackwell GPU. Its sums are float32 sums.
* A release does not wait for loads. Index scores released a stage right behind `ld.shared` of its keys, whose registers the
  wgmma then read; on an H200 stages were filled again under the loads until the release stood behind the products. In the
  SASS eight LDS precede SYNCS.ARRIVE, which waits for none of their scoreboards; a bulk copy that refills the stage belongs
  to another proxy, which the arrival does not order without `fence.proxy.async`. That the copy overtakes loads that bank
  conflicts hold up is our reading of it, not measured. The race check counts a load as ended when its value (or a later
  load's) is used, at `fence.proxy.async`, or at a named or cluster barrier; the last is assumed. It takes the PTX's order
  of use and release. ptxas changed it in three kernels, as racecheck's reports led us to see: their arrivals take values
  of what was loaded now (`rings.arrive_with`), and `tests/kernels/test_releases.py` looks at scoreboards in the SASS.
  wgmma, bulk and tensor copies read until the wait that ends them, under lazy and random schedules.
* Atomics on another CTA's shared memory are not all atomic. ptxas 13.0 makes 64-bit integer add, min, max, and, or, xor and
  sums of f16x2 and bf16x2, with `.shared::cluster` or a generic address, an ATOM that may decline, a compare-and-swap loop
  for memory of the own CTA, and a load and a store for the rest (sm_90a and sm_100a). `max.u64` lost a sampler's tokens on
  an H200; the others have the same code and were not run. All are refused. Of those allowed, f32 and f64 sums have a loop
  for another CTA's memory, 32-bit integers nothing but the ATOM; 64-bit `exch` and `cas` lack the loop for the own CTA, so
  we take their load and store to be for local memory only.
"""


def _differs(e: dict[str, Any]) -> str:
    if "error" in e:
        return "not run on the GPU"
    if e["only_nan"]:
        return f"{e['different']} of {e['elements']} elements: other NaN payloads"
    sizes = f"at most {e['ulp']:.3g} ulp, {e['absolute']:.3g} absolute, {e['relative']:.3g} relative"
    return f"{e['different']} of {e['elements']} elements, {sizes}"


def table(record: dict[str, Any]) -> str:
    """The page's text."""
    forms = record["forms"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for e in forms:
        groups.setdefault(e["group"], []).append(e)
    equal = sum(e.get("equal", False) for e in forms)
    out = [
        INTRODUCTION.format(device=record["device"], equal=equal, total=len(forms)),
        "| group | forms | equal bits | within bound |",
    ]
    out.append("|---|---|---|---|")
    for name, members in groups.items():
        within = sum("error" not in e and not e.get("gpu_problem") for e in members)
        out.append(f"| {name} | {len(members)} | {sum(e.get('equal', False) for e in members)} | {within} |")
    out += ["", "## Forms whose bits differ", "", "| form | difference | bound | why |", "|---|---|---|---|"]
    for e in forms:
        if not e.get("equal"):
            cells = (f"`{e['form']}`".replace("|", "\\|"), _differs(e), e["bound"], e.get("reason", ""))
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def recorded(path: Path = RECORD) -> dict[str, Any]:
    """What `fidelity` wrote: the device, and an entry for every form."""
    found: dict[str, Any] = json.loads(lzma.decompress(path.read_bytes()))
    return found


if __name__ == "__main__":
    TARGET.write_text(table(recorded()))
