"""Published notebooks: what stays of them, and that the budgets are kept."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from dsv4lab.lab import publish
from dsv4lab.lab.checks import MIME
from dsv4lab.lab.notebooks import NotebookError

RECORD = {
    "kind": "check",
    "name": "close",
    "passed": True,
    "shape": [2],
    "measured": {"cosine": 0.5, "max_abs": 0.25},
    "bars": {"max_abs": ["<=", 0.5]},
    "shortfall": "",
}
LARGE = 10**6  # bytes of a picture that all fit


def executed(path: Path, *, pictures: int = 2, status: str = "passed", **run: str) -> None:
    """A notebook as a run leaves it, with noisy pictures, which are hard to compress."""
    rng = np.random.default_rng(0)
    cell = nbformat.v4.new_code_cell("draw()\n")
    for _ in range(pictures):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (100, 911, 3), dtype=np.uint8)).save(stream, format="PNG")
        png = base64.b64encode(stream.getvalue()).decode()
        cell.outputs.append(nbformat.v4.new_output("display_data", {"image/png": png, "text/plain": "<Figure>"}))
    cell.outputs.append(nbformat.v4.new_output("display_data", {"text/html": "<b>12 us</b>", "text/plain": "12 us"}))
    cell.outputs.append(nbformat.v4.new_output("display_data", {"text/html": "<b>only</b>", "text/plain": "<IPython object>"}))
    cell.outputs.append(nbformat.v4.new_output("stream", name="stdout", text="said\n"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A title\n[Text](01_a.ipynb)"), cell])
    notebook.metadata["dsv4lab"] = {"status": status, "seconds": 1.5, "cells": 2, "cells_started": 2} | run
    nbformat.write(notebook, path)


def read(path: Path) -> tuple[list[set[str]], nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [set(output.get("data", {})) for output in notebook.cells[1].outputs], notebook


def test_one_form_of_each_output_stays(tmp_path: Path) -> None:
    source, out = tmp_path / "raw", tmp_path / "h200"
    source.mkdir()
    executed(source / "01_a.ipynb")
    written = publish.publish(source, out, budget=2_000_000, notebooks=source)
    kinds, notebook = read(out / "01_a.ipynb")
    assert kinds == [{"image/png"}, {"image/png"}, set(), {"text/html"}, set()]
    assert notebook.cells[0].source == "# A title\n[Text](01_a.ipynb)"
    assert notebook.cells[1].source == "draw()\n"
    assert [notebook.cells[1].outputs[i].text for i in (2, -1)] == ["12 us\n", "said\n"]
    assert notebook.metadata == {"dsv4lab": {"status": "passed"}, "language_info": {"name": "python"}}
    assert written.passed
    assert written.bytes == sum(path.stat().st_size for path in out.iterdir())
    assert {path.name for path in out.iterdir()} == {"01_a.ipynb", "index.md", "report.html"}
    assert "[A title](01_a.ipynb) | passed | 0 | 1.5 |  |  |" in (out / "index.md").read_text()
    assert "Left out" not in (out / "index.md").read_text()


def test_each_run_s_own_commit_and_time_are_said(tmp_path: Path) -> None:
    source, out = tmp_path / "raw", tmp_path / "out"
    source.mkdir()
    executed(source / "01_a.ipynb", commit="0123456789ab", started="2026-11-28T17:33:45+00:00")
    executed(source / "02_b.ipynb", commit="ba9876543210 with local changes", started="2026-11-27T01:02:03+02:00")
    publish.publish(source, out, budget=2_000_000, notebooks=source)
    index, report = (out / "index.md").read_text(), (out / "report.html").read_text()
    for commit, time in (
        ("0123456789ab", "2026-11-28 17:33 UTC"),
        ("ba9876543210 with local changes", "2026-11-26 23:02 UTC"),
    ):
        assert f"| 1.5 | {commit} | {time} |" in index
        assert f"<td>{commit}<td>{time}" in report


def test_records_make_the_report_and_leave_the_notebook(tmp_path: Path) -> None:
    kept = publish._smallest({MIME: RECORD, "text/html": "<table>", "text/plain": "close 1.0"}, LARGE)
    assert kept == {MIME: RECORD, "text/plain": "close 1.0"}
    path = tmp_path / "a.ipynb"
    executed(path, pictures=0)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs.append(nbformat.v4.new_output("display_data", kept))
    nbformat.write(notebook, path)
    path.write_text(publish.compact(path, picture_bytes=LARGE))
    assert read(path)[0][-1] == {MIME, "text/plain"}
    path.write_text(publish._without_records(path))
    assert read(path)[1].cells[1].outputs[-1].text == "said\nPASSED close (2,): cosine 0.50000000, max_abs 0.25 <= 0.5\n"


def test_neighbouring_texts_share_an_output(tmp_path: Path) -> None:
    texts = [nbformat.v4.new_output("display_data", {"text/plain": text}) for text in ("one", "two  ", "three")]
    texts.insert(2, nbformat.v4.new_output("stream", name="stdout", text="between\n"))
    cell = nbformat.v4.new_code_cell("x", outputs=texts, metadata={"tags": ["parameters"], "execution": {"a": "b"}})
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A"), cell]), path)
    path.write_text(publish.compact(path, picture_bytes=LARGE))
    path.write_text(publish._without_records(path))
    _, notebook = read(path)
    (output,) = notebook.cells[1].outputs
    assert (output.output_type, output.text) == ("stream", "one\ntwo\nbetween\nthree\n")
    assert notebook.cells[1].metadata == {"tags": ["parameters"]}


def picture_of(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_pictures_get_the_colours_that_matter() -> None:
    """A line on white with a shade beside it: the palette has the ground's and both lines' colours, not the shade."""
    image = Image.new("RGB", (61, 40), "white")
    image.paste((0, 114, 178), (0, 10, 61, 14))
    image.paste((10, 130, 190), (0, 14, 61, 16))
    image.paste((213, 94, 0), (0, 30, 61, 31))
    small = image.quantize(palette=publish._palette(image, 3), dither=Image.Dither.NONE)
    with Image.open(io.BytesIO(publish._palette_png(small))) as kept:
        assert (kept.mode, kept.size) == ("P", (61, 40))
        found = kept.convert("RGB")
    assert {value for _, value in found.getcolors()} == {(255, 255, 255), (0, 114, 178), (213, 94, 0)}
    assert [found.getpixel((60, y)) for y in (0, 13, 15, 30)] == [(255, 255, 255), (0, 114, 178), (0, 114, 178), (213, 94, 0)]


def test_a_picture_is_as_good_as_its_bytes_allow() -> None:
    rng = np.random.default_rng(1)
    png = picture_of(Image.fromarray(rng.integers(0, 255, (50, 1200, 3), dtype=np.uint8)))
    drawn = publish._palette_pngs(png)
    assert [Image.open(io.BytesIO(each)).width for each in drawn] == [width for width, _ in publish.PICTURES]
    for limit, want in ((LARGE, drawn[0]), (len(drawn[2]), drawn[2]), (0, min(drawn, key=len))):
        assert base64.b64decode(publish._smallest({"image/png": png}, limit)["image/png"]) == want
    assert len(publish._palette_pngs(picture_of(Image.new("RGB", (9, 9), "white")))) == 1  # no colours, no widths to choose


def test_a_terse_report_says_the_same() -> None:
    page = (
        '<table class="checks">\n<tr><th scope="row">a "b" c</th>\n<td colspan="4">1 &lt; 2 </td></tr>\n</table>'
        ' <a href="x.ipynb">x</a> <b>y</b>'
    )
    terse = '<table class=checks><tr><th>a "b" c<td colspan=4>1 &lt; 2</table> <a href="x.ipynb">x</a> <b>y</b>'
    assert publish._terse(page) == terse


def test_pictures_shrink_until_the_budget_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    executed(source / "01_a.ipynb")
    wide = publish.publish(source, tmp_path / "wide", budget=2_000_000, notebooks=source)
    tight = publish.publish(source, tmp_path / "tight", budget=wide.bytes * 3 // 5, notebooks=source)
    assert tight.picture_bytes < wide.picture_bytes
    assert tight.bytes <= wide.bytes * 3 // 5
    with pytest.raises(NotebookError, match=r"must fit 1,000 bytes"):
        publish.publish(source, tmp_path / "tight", budget=1000, notebooks=source)
    assert (tmp_path / "tight" / "01_a.ipynb").exists()  # what was published stays


def test_a_picture_left_out_is_said(tmp_path: Path) -> None:
    executed(tmp_path / "a.ipynb")
    text = publish.compact(tmp_path / "a.ipynb", picture_bytes=LARGE, most=1)
    assert text.count("image/png") == 1
    assert text.count("not published") == 1


def test_a_failed_run_is_not_called_passed_and_folders_differ(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    with pytest.raises(NotebookError, match="no executed notebooks"):
        publish.publish(source, tmp_path / "out", budget=10**6)
    executed(source / "01_a.ipynb", pictures=0, status="failed")
    assert not publish.publish(source, tmp_path / "out", budget=10**6, notebooks=source).passed
    with pytest.raises(NotebookError, match="another folder"):
        publish.publish(source, source, budget=10**6)
    with pytest.raises(NotebookError, match="may lie in the other"):
        publish.publish(source, tmp_path, budget=10**6)


def test_some_notebooks_are_kept_and_the_others_sources_linked(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    for name in ("01_a", "02_b"):
        executed(source / f"{name}.ipynb")
    written = publish.publish(source, tmp_path / "out", budget=10**6, only=["02_b"], notebooks=source)
    out = tmp_path / "out"
    assert written.notebooks == 1 and sorted(p.name for p in out.iterdir()) == ["02_b.ipynb", "index.md", "report.html"]
    index, report = (out / "index.md").read_text(), (out / "report.html").read_text()
    assert "(../../notebooks/01_a.ipynb)" in index and "(02_b.ipynb)" in index
    assert read(out / "02_b.ipynb")[1].cells[0].source == "# A title\n[Text](../../notebooks/01_a.ipynb)"
    assert "Left out, 1 of 2, so that the folder keeps within 1,000,000 bytes:\n01_a." in index
    assert 'href="../../notebooks/01_a.ipynb"' in report and 'href="02_b.ipynb"' in report
    with pytest.raises(NotebookError, match="got 03_c"):
        publish.publish(source, tmp_path / "out", budget=10**6, only=["02_b", "03_c"], notebooks=source)
