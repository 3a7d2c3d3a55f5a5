"""One page and one JSON about the notebooks that were executed: what passed, by how much, how long it took, where.

Everything comes from the executed notebooks themselves: the outcome in their metadata, the records of `lab.checks` in
their outputs, and their figures.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from PIL import Image

from dsv4lab.lab.checks import MIME
from dsv4lab.lab.files import write_atomically
from dsv4lab.lab.machine import commit, processor
from dsv4lab.lab.notebooks import NotebookError
from dsv4lab.lab.runner import EXECUTED, FAILED, NOTEBOOKS, PASSED, digest

INCOMPLETE, NOT_RUN = "incomplete", "not run"
_THUMBNAIL_PX = 480  # the longer side; a page of them stays small enough to mail
_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Report:
    """Where the two files are, and whether everything that ran passed."""

    page: Path
    data: Path
    passed: bool
    num_passed: int
    num_run: int


def write_report(output: Path = EXECUTED, *, notebooks: Path = NOTEBOOKS, beside: Collection[str] | None = None) -> Report:
    """Write `report.html` and `report.json` into the folder of executed notebooks.

    beside: names of notebooks that will be read beside the page, which leaves what they show to them: results, and checks that
    passed. It has no thumbnails of figures then; by default it shows all.
    Passed means: at least one notebook was executed, every one of them ended well, and no stored check fell short.
    Raises NotebookError when the folder holds no executed notebook.
    """
    executed = sorted(output.glob("*.ipynb"))
    if not executed:
        raise NotebookError(f"there are no executed notebooks in {output}; `dsv4lab run` makes them")
    sources = {path.stem: path for path in sorted(notebooks.glob("*.ipynb"))}
    entries, figures = [], {}
    for path in executed:
        entry, found = _summarise(path, sources.get(path.stem))
        figures[path.stem] = found if beside is None else []
        entries.append(entry)
    ran = {path.stem for path in executed}
    entries += [{"name": name, "status": NOT_RUN, "checks": [], "values": []} for name in sources if name not in ran]
    entries.sort(key=lambda entry: str(entry["name"]))
    judged = [entry for entry in entries if entry["status"] != NOT_RUN]
    passing = [entry for entry in judged if entry["status"] == PASSED]
    environments = [entry["environment"] for entry in judged if entry.get("environment")]
    data = {
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "passed": len(passing) == len(judged),
        "notebooks_passed": len(passing),
        "notebooks_run": len(judged),
        "checks": sum(len(entry["checks"]) for entry in judged),
        "checks_failed": sum(not check["passed"] for entry in judged for check in entry["checks"]),
        "seconds": round(sum(entry.get("seconds") or 0.0 for entry in judged), 2),
        "commit": commit(),
        "host": processor(),
        "environment": environments[0] if environments else {},
        "notebooks": entries,
    }
    page, record = output / "report.html", output / "report.json"
    write_atomically(record, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(page, _page(data, figures, beside or ()))
    return Report(page, record, bool(data["passed"]), len(passing), len(judged))


def _summarise(path: Path, source: Path | None) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The facts about one executed notebook, and its figures as thumbnails."""
    try:
        stored = nbformat.read(path, as_version=4)
        run = dict(stored.metadata.get("dsv4lab", {}))
        records = list(_records(stored))
        figures = list(_figures(stored))
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        broken = {"cell": None, "line": "", "error": f"the file is not a readable notebook: {error}"}
        return {"name": path.stem, "status": INCOMPLETE, "failure": broken, "checks": [], "values": []}, []
    status: str = run.get("status", INCOMPLETE)
    failure = run.get("failure")
    short = [r["name"] for r in records if r.get("passed") is False]
    if status == PASSED and short:
        # a cell that catches CheckFailed does not turn the check into a pass
        status = FAILED
        failure = {"cell": None, "line": "", "error": f"the notebook went on after a check fell short: {', '.join(short)}"}
    environment: dict[str, str] = next((r["facts"] for r in records if r["kind"] == "environment"), {})
    return {
        "name": path.stem,
        "title": _title(stored),
        "file": path.name,
        "status": status,
        "failure": failure,
        "seconds": run.get("seconds"),
        "started": run.get("started"),
        "commit": run.get("commit"),
        "parameters": run.get("parameters", {}),
        "cells": run.get("cells", len(stored.cells)),
        "cells_started": run.get("cells_started"),
        "current": source is not None and run.get("source_sha256") == digest(source),
        "environment": environment,
        "checks": [r for r in records if r["kind"] in ("check", "bar")],
        "values": [r for r in records if r["kind"] == "value"],
        "figures": len(figures),
    }, figures


def _outputs(stored: nbformat.NotebookNode) -> Iterator[dict[str, Any]]:
    for cell in stored.cells:
        for output in cell.get("outputs", []):
            yield output.get("data", {})


def _records(stored: nbformat.NotebookNode) -> Iterator[dict[str, Any]]:
    for data in _outputs(stored):
        if MIME in data:
            yield json.loads(json.dumps(data[MIME]))


def _title(stored: nbformat.NotebookNode) -> str:
    for cell in stored.cells:
        heading = re.match(r"#\s+(.+)", cell.source) if cell.cell_type == "markdown" else None
        if heading:
            return heading.group(1).strip()
    return ""


def _figures(stored: nbformat.NotebookNode) -> Iterator[dict[str, str]]:
    """Each figure as a data URI, with the heading above it for those who cannot see it."""
    section, number = "", 0
    for cell in stored.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#{1,4}\s+(.+)$", cell.source, flags=re.MULTILINE)
            section = headings[-1].strip() if headings else section
        for output in cell.get("outputs", []):
            source = _thumbnail(output.get("data", {}))
            if source:
                number += 1
                yield {"source": source, "caption": f"Figure {number}" + (f": {section}" if section else "")}


def _thumbnail(data: dict[str, Any]) -> str | None:
    if "image/png" in data:
        try:
            image: Image.Image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
            image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
            # a palette halves the size of a plot and cannot be told apart at this scale
            image = image.convert("RGB").quantize(colors=128)
        except (OSError, ValueError):
            return None
        stream = io.BytesIO()
        image.save(stream, format="PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    if "image/svg+xml" in data:
        return "data:image/svg+xml;base64," + base64.b64encode(str(data["image/svg+xml"]).encode()).decode()
    return None


def _page(data: dict[str, Any], figures: dict[str, list[dict[str, str]]], beside: Collection[str]) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "number": _number,
        "utc": utc,
        "cosine": lambda value: f"{round(value, 8):.10g}" if isinstance(value, float) else str(value),
    }
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(figures=figures, beside=beside, plain=_plain, **data)


def utc(started: str) -> str:
    """A time of ISO 8601 as reports print it, to the minute: "2026-11-28 17:33 UTC"; of an empty one nothing."""
    return f"{datetime.fromisoformat(started).astimezone(UTC):%Y-%m-%d %H:%M} UTC" if started else ""


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    digits = 8 if abs(value - 1) < 0.01 else 6 if abs(value) >= 1000 else 4  # 0.99999 is no 1
    return f"{value:.{digits}g}"


def _plain(text: str) -> str:
    """Text of a title or an error without terminal colours and markup entities."""
    return html.unescape(re.sub(r"\x1b\[[0-9;]*m", "", text))
