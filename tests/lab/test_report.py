"""The report: what a run, a failure, a crash and a damaged file look like on the page and in the JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from dsv4lab.lab import report, runner
from dsv4lab.lab.notebooks import NotebookError

Maker = Callable[..., Path]

GOOD = """\
from dsv4lab import lab
lab.environment("cpu")
lab.check("twins <&>", [1.0, 2.0], [1.0, 2.0], cosine=0.999)
lab.check_that("ratio", 1.01, "<=", 1.03)
lab.record("speed", 12.5, "token/s")"""
FIGURE = """\
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(8, 4), dpi=100)
ax.plot([0, 1])
plt.show()"""


class Page(HTMLParser):
    """Images, headings, ids and links of a page; complains about tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(found)
        if found.get("id"):
            self.ids.add(str(found["id"]))
        if tag == "a":
            self.links.append(str(found["href"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_page_and_one_json_tell_the_run(make_notebook: Maker, source: Path, tmp_path: Path) -> None:
    make_notebook("01_good", FIGURE, GOOD, parameters='device = "auto"')
    make_notebook("02_short", "from dsv4lab import lab\nlab.check('apart', [1.0, 2.0], [2.0, -1.0], cosine=0.9)")
    make_notebook("03_not_run", "pass")
    out = tmp_path / "out"
    runner.run_notebooks(["01", "02"], directory=source, output=out, device="cpu", jobs=2)
    written = report.write_report(out, notebooks=source)
    assert (written.passed, written.num_passed, written.num_run) == (False, 1, 2)

    data = json.loads(written.data.read_text())
    good, short, idle = data["notebooks"]
    assert (good["status"], short["status"], idle["status"]) == ("passed", "failed", "not run")
    assert [c["name"] for c in good["checks"]] == ["twins <&>", "ratio"]
    assert good["checks"][0]["measured"]["cosine"] == pytest.approx(1.0)
    assert good["values"][0] | {"kind": ""} == {"kind": "", "name": "speed", "value": 12.5, "unit": "token/s"}
    assert (good["figures"], good["parameters"], good["current"]) == (1, {"device": "cpu"}, True)
    assert good["seconds"] > 0
    assert short["checks"][0]["measured"]["cosine"] == pytest.approx(0.0)
    assert short["failure"]["cell"] == 1
    assert (data["checks"], data["checks_failed"]) == (3, 1)
    assert data["environment"]["torch"] and data["environment"]["device"].startswith("cpu")

    text = written.page.read_text()
    page = Page(text)
    assert "1 of 2 notebooks passed" in page.text and "twins <&>" in page.text and "CheckFailed: apart" in page.text
    assert "<&>" not in text
    heads = [text.count(f'<th scope="col">Check</th>{more}') for more in ("", '<th scope="col">Result</th>')]
    assert heads == [2, 1]  # results are told where one fell short
    (image,) = page.images
    assert str(image["src"]).startswith("data:image/png;base64,") and image["alt"]
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert all((out / link).exists() for link in page.links if not link.startswith("#"))
    assert "http" not in text and "<script" not in text


def test_a_page_beside_notebooks_leaves_to_them_what_they_show(make_notebook: Maker, source: Path, tmp_path: Path) -> None:
    make_notebook("01_good", FIGURE, GOOD)
    make_notebook("02_short", "from dsv4lab import lab\nlab.check('apart', [1.0, 2.0], [2.0, -1.0], cosine=0.9)")
    make_notebook("03_elsewhere", "from dsv4lab import lab\nlab.check_that('kept', 1, '==', 1)")
    out = tmp_path / "out"
    runner.run_notebooks(directory=source, output=out, device="cpu", jobs=2)
    page = Page(report.write_report(out, notebooks=source, beside=["01_good", "02_short"]).page.read_text())
    assert not page.images and "2 of 2" in page.text  # how many checks passed is said of all
    assert "ratio" not in page.text and "speed" not in page.text
    assert "bar >= 0.9" in page.text and "kept" in page.text


def test_numbers_are_short_and_none_is_rounded_to_one() -> None:
    found = [report._number(value) for value in (0.99999, 0.999999, 1.0, 1.13249e-06, 803.31, 4096.5, 7, "x")]
    assert found == ["0.99999", "0.999999", "1", "1.132e-06", "803.3", "4096.5", "7", "x"]


def stored_run(path: Path, **metadata: object) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x")])
    notebook.metadata["dsv4lab"] = metadata
    nbformat.write(notebook, path)


def test_runs_that_never_ended_and_damaged_files_do_not_pass(tmp_path: Path) -> None:
    stored_run(tmp_path / "01_good.ipynb", status="passed", seconds=1.0, cells=1, cells_started=1)
    stored_run(tmp_path / "02_partial.ipynb")
    (tmp_path / "03_damaged.ipynb").write_text('{"cells": [')
    written = report.write_report(tmp_path, notebooks=tmp_path / "none")
    assert (written.passed, written.num_passed, written.num_run) == (False, 1, 3)
    statuses = [entry["status"] for entry in json.loads(written.data.read_text())["notebooks"]]
    assert statuses == ["passed", "incomplete", "incomplete"]
    assert "cut short" in written.page.read_text()


def test_a_swallowed_check_is_still_a_shortfall(make_notebook: Maker, source: Path, tmp_path: Path) -> None:
    make_notebook(
        "01_swallow", "from dsv4lab import lab\ntry:\n    lab.check('c', 1.0, 2.0, max_abs=0)\nexcept Exception:\n    pass"
    )
    (outcome,) = runner.run_notebooks(directory=source, output=tmp_path / "out")
    assert outcome.status == "passed"
    written = report.write_report(tmp_path / "out", notebooks=source)
    assert not written.passed
    assert "went on after a check fell short: c" in written.page.read_text()


def test_a_changed_source_is_said(make_notebook: Maker, source: Path, tmp_path: Path) -> None:
    path = make_notebook("01_good", "pass")
    stored_run(tmp_path / "01_good.ipynb", status="passed", cells_started=1, source_sha256=runner.digest(path))
    assert "run it again" not in report.write_report(tmp_path, notebooks=source).page.read_text()
    make_notebook("01_good", "print(1)")
    assert "run it again" in report.write_report(tmp_path, notebooks=source).page.read_text()


def test_nothing_executed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match="no executed notebooks"):
        report.write_report(tmp_path)
