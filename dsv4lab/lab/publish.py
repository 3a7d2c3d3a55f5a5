"""Executed notebooks made small enough to be kept in the repository: `executed/<device>/`.

Of each output one form stays (a picture, or its text, not HTML and text), and of a cell's metadata its tags. Pictures become
PNG of few colours, as large as the budget of the whole folder allows; GitHub and nbconvert show no WebP. The folder gets
`index.md` and `report.html`, which is made from the records of checks before those leave the notebooks, where their tables
stay; it has no thumbnails, the notebooks beside it have the pictures. Both say when and at which commit
each notebook ran, which need not be the commit that publishes it.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

from dsv4lab.lab.checks import MIME
from dsv4lab.lab.files import write_atomically
from dsv4lab.lab.notebooks import NotebookError, lines_of
from dsv4lab.lab.report import utc, write_report
from dsv4lab.lab.runner import NOTEBOOKS

NOTEBOOK_BYTES = 400_000  # of one notebook, the house's limit
PICTURES = ((911, 16), (720, 16), (640, 12), (560, 12), (480, 12), (480, 8))  # pixels across, colours: best first
_SOURCES = "../../notebooks/"  # from executed/<device>/
COLOUR_DISTANCE = 70  # summed over red, green and blue: nearer ones, such as the shades of an edge, are taken for one colour


@dataclass(frozen=True)
class Published:
    """What was written: bytes of the folder and of its largest notebook, and how its pictures are kept."""

    folder: Path
    bytes: int
    largest: int
    notebooks: int
    width: int
    colours: int
    passed: bool

    def __str__(self) -> str:
        return (
            f"{self.notebooks} notebooks in {self.folder}: {self.bytes:,} bytes, the largest notebook {self.largest:,}; "
            f"pictures up to {self.width} px in {self.colours} colours"
        )


def publish(
    source: Path,
    destination: Path,
    *,
    budget: int,
    most: int | None = None,
    only: Sequence[str] = (),
    notebooks: Path = NOTEBOOKS,
) -> Published:
    """Write the executed notebooks of `source` compactly to `destination`, replacing it, in at most `budget` bytes.

    most: pictures of a notebook that are kept, the first ones; all by default. only: names of notebooks that are kept, all by
    default; index and report are of all of them, and lead to the sources of the others. Each notebook stays under
    NOTEBOOK_BYTES. Raises NotebookError where `source` has no notebook or not those of `only`, where the folders are one, or
    where even the smallest pictures do not fit; `destination` is then as it was.
    """
    executed = sorted(source.glob("*.ipynb"))
    if not executed:
        raise NotebookError(f"there are no executed notebooks in {source}; `dsv4lab run` makes them")
    if missing := sorted(set(only) - {path.stem for path in executed}):
        raise NotebookError(f"only must name executed notebooks of {source}, got {', '.join(missing)}")
    if source.resolve() == destination.resolve():
        raise NotebookError(f"what is published must go to another folder than {source}")
    if source.resolve() in destination.resolve().parents or destination.resolve() in source.resolve().parents:
        raise NotebookError(f"neither of {source} and {destination} may lie in the other")
    for width, colours in PICTURES:
        with tempfile.TemporaryDirectory(prefix="dsv4lab-publish-") as scratch:
            folder = Path(scratch) / "published"
            folder.mkdir()
            for path in executed:
                write_atomically(folder / path.name, compact(path, width=width, colours=colours, most=most))
            report = write_report(folder, notebooks=notebooks, pictures=False)
            left_out = [folder / path.name for path in executed if only and path.stem not in only]
            facts = json.loads(report.data.read_text(encoding="utf-8"))
            write_atomically(folder / "index.md", _index(facts, [path.stem for path in left_out], budget))
            report.data.unlink()
            write_atomically(report.page, _terse(report.page.read_text(encoding="utf-8")))
            for path in left_out:
                path.unlink()
            for page in (report.page, folder / "index.md"):
                write_atomically(page, _to_sources(page.read_text(encoding="utf-8"), [path.name for path in left_out]))
            for path in folder.glob("*.ipynb"):
                write_atomically(path, _without_records(path))
            sizes = {path: path.stat().st_size for path in folder.iterdir()}
            total, largest = sum(sizes.values()), max(size for path, size in sizes.items() if path.suffix == ".ipynb")
            if total <= budget and largest < NOTEBOOK_BYTES:
                if destination.exists():
                    shutil.rmtree(destination)
                shutil.copytree(folder, destination)
                return Published(destination, total, largest, len(only or executed), width, colours, report.passed)
    raise NotebookError(
        f"{source} must fit {budget:,} bytes, a notebook {NOTEBOOK_BYTES:,}; "
        f"with the smallest pictures it takes {total:,} and {largest:,}"
    )


def compact(path: Path, *, width: int, colours: int, most: int | None = None) -> str:
    """An executed notebook with the same cells, records, texts and errors, its first pictures smaller: JSON, a line a cell."""
    pictures = 0
    stored = json.loads(nbformat.writes(nbformat.read(path, as_version=4)))
    for cell in stored["cells"]:
        cell["source"] = "".join(cell["source"])
        cell["metadata"] = {"tags": tags} if (tags := cell["metadata"].get("tags")) else {}  # without papermill's clock
        for output in cell.get("outputs", []):
            if "data" in output:
                if "image/png" in output["data"]:
                    pictures += 1
                    if most is not None and pictures > most:
                        output["data"] = {"text/plain": "(this picture is not published; running the notebook draws it)"}
                output["data"] = _smallest(output["data"], width, colours)
                output["metadata"] = {}
            if "text" in output:
                output["text"] = "".join(output["text"])
    return lines_of(stored)


def _without_records(path: Path) -> str:
    """The notebook without records, and with neighbouring texts in one output: each takes 80 bytes, and there are hundreds."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    for cell in stored["cells"]:
        joined: list[dict[str, Any]] = []
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(MIME, None)
            if joined and _is_text(output) and _is_text(joined[-1]):
                joined[-1]["data"]["text/plain"] += "\n\n" + output["data"]["text/plain"]
            else:
                joined.append(output)
        if "outputs" in cell:
            cell["outputs"] = joined
    return lines_of(stored)


def _is_text(output: dict[str, Any]) -> bool:
    return output["output_type"] == "display_data" and list(output["data"]) == ["text/plain"]


def _smallest(data: dict[str, Any], width: int, colours: int) -> dict[str, Any]:
    """A picture where there is one; else the text, or HTML without a text of its own; records of checks always."""
    kept = {MIME: data[MIME]} if MIME in data else {}
    if "image/png" in data:
        return kept | {"image/png": _palette_png("".join(data["image/png"]), width, colours)}
    plain = "".join(data.get("text/plain", ""))
    if plain and not plain.startswith("<"):  # "<IPython.core.display.HTML object>" says nothing
        return kept | {"text/plain": plain}
    return kept | {
        kind: "".join(v) if isinstance(v, list) else v for kind, v in data.items() if kind not in (MIME, "text/plain")
    }


def _palette_png(png: str, width: int, colours: int) -> str:
    image: Image.Image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.quantize(palette=_palette(image, colours), dither=Image.Dither.NONE).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def _palette(image: Image.Image, colours: int) -> Image.Image:
    """A picture that carries the palette: the most frequent colours that are well apart.

    The usual median cut spends colours on the shades of smoothed edges; plots look better without, in half the bytes.
    """
    counts: list[tuple[int, Any]] = list(image.getcolors(image.width * image.height) or [])
    chosen: list[tuple[int, int, int]] = []
    for _, (red, green, blue) in sorted(counts, key=lambda found: (-found[0], found[1])):
        if all(abs(red - r) + abs(green - g) + abs(blue - b) > COLOUR_DISTANCE for r, g, b in chosen):
            chosen.append((red, green, blue))
            if len(chosen) == colours:
                break
    palette = Image.new("P", (1, 1))
    palette.putpalette([level for value in chosen for level in value])
    return palette


def _to_sources(page: str, names: Sequence[str]) -> str:
    """A page whose links to these notebooks, in Markdown or HTML, lead to their sources."""
    for name in names:
        page = re.sub(rf'(?<=[("]){re.escape(name)}(?=[)"])', f"{_SOURCES}{name}", page)
    return page


def _terse(page: str) -> str:
    """A report without what HTML lets one leave out: lines between tags, space before the end of a cell, end tags of cells and
    rows, scopes of headers that are the first of their row or stand in a row of headers, quotes of plain values.
    """
    page = re.sub(r">\s*\n\s*<", "><", page)
    page = re.sub(r"\s*</(?:td|th|tr|dt|dd)>", "", page)
    page = re.sub(r'(<th) scope="(?:col|row)"', r"\1", page)
    return re.sub(r'(<[^<>]*?) (class|colspan)="([\w-]+)"', r"\1 \2=\3", page)


def _index(data: dict[str, Any], left_out: Sequence[str], budget: int) -> str:
    return "\n".join(_lines(data, left_out, budget)) + "\n"


def _lines(data: dict[str, Any], left_out: Sequence[str], budget: int) -> Iterator[str]:
    facts = data["environment"]
    yield f"# Executed notebooks: {facts.get('device') or data['host']}"
    yield ""
    yield f"{data['notebooks_passed']} of {data['notebooks_run']} passed, {data['checks']} checks,"
    yield f"{data['checks_failed']} of them short; {data['seconds']:.0f} s together. [Report](report.html)"
    yield ""
    if left_out:
        yield f"Left out, {len(left_out)} of {data['notebooks_run']}, so that the folder keeps within {budget:,} bytes:"
        yield f"{', '.join(left_out)}. Their titles lead to the sources; what they checked and found is in the report."
        yield ""
    yield "| Notebook | | Checks | Seconds | Ran at commit | Started |"
    yield "|---|---|---|---|---|---|"
    for entry in data["notebooks"]:
        if "file" in entry:
            name = f"[{entry['title'] or entry['name']}]({entry['file']})"
            ran = f"{entry['commit'] or ''} | {utc(entry['started'] or '')}"
            yield f"| {name} | {entry['status']} | {len(entry['checks'])} | {entry['seconds']} | {ran} |"
