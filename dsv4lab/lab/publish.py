"""Executed notebooks made small enough to be kept in the repository: `executed/<device>/`.

Cells keep sources, tags and outputs, each output in one form: texts of a cell run on in one output, a check is one line of
text, a picture a PNG of few colours, as large as the budget of the whole folder allows; GitHub and nbconvert show no WebP. The
folder gets `index.md` and `report.html`, both made from the records of checks before those leave the notebooks. The report
leaves to the notebooks what these show. Both say when and at which commit each notebook ran, which need not be the commit that
publishes it.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsv4lab.lab.checks import MIME, line_of
from dsv4lab.lab.files import write_atomically
from dsv4lab.lab.notebooks import NotebookError, lines_of
from dsv4lab.lab.report import utc, write_report
from dsv4lab.lab.runner import NOTEBOOKS

NOTEBOOK_BYTES = 400_000  # of one notebook, the house's limit
PICTURES = ((911, 16), (800, 16), (720, 16), (640, 12), (560, 12), (480, 12), (480, 8))  # pixels across, colours: best first
# of a PNG, by turns; where none of PICTURES fits, the smallest
PICTURE_BYTES = (24_000, 16_000, 12_000, 9_000, 7_000, 6_000, 5_000, 4_000, 3_000, 0)
_SOURCES = "../../notebooks/"  # from executed/<device>/
_RUN = ("status", "commit", "started")  # facts about the run that a notebook keeps


@dataclass(frozen=True)
class Published:
    """What was written: bytes of the folder, of its largest notebook, and those of a PNG that decided its size and colours."""

    folder: Path
    bytes: int
    largest: int
    notebooks: int
    picture_bytes: int
    passed: bool

    def __str__(self) -> str:
        return (
            f"{self.notebooks} notebooks in {self.folder}: {self.bytes:,} bytes, the largest notebook {self.largest:,}; "
            f"pictures as large as {self.picture_bytes:,} bytes allow"
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
    for picture_bytes in PICTURE_BYTES:
        with tempfile.TemporaryDirectory(prefix="dsv4lab-publish-") as scratch:
            folder = Path(scratch) / "published"
            folder.mkdir()
            for path in executed:
                write_atomically(folder / path.name, compact(path, picture_bytes=picture_bytes, most=most))
            passed = _write_pages(folder, only or [path.stem for path in executed], budget, notebooks)
            for path in folder.glob("*.ipynb"):
                write_atomically(path, _without_records(path))
            sizes = {path: path.stat().st_size for path in folder.iterdir()}
            total, largest = sum(sizes.values()), max(size for path, size in sizes.items() if path.suffix == ".ipynb")
            if total <= budget and largest < NOTEBOOK_BYTES:
                if destination.exists():
                    shutil.rmtree(destination)
                shutil.copytree(folder, destination)
                return Published(destination, total, largest, len(only or executed), picture_bytes, passed)
    raise NotebookError(
        f"{source} must fit {budget:,} bytes, a notebook {NOTEBOOK_BYTES:,}; "
        f"with the smallest pictures it takes {total:,} and {largest:,}"
    )


def _write_pages(folder: Path, kept: Sequence[str], budget: int, notebooks: Path) -> bool:
    """Write index and report of a folder of compact notebooks, and remove those that are not kept; -> whether all passed."""
    report = write_report(folder, notebooks=notebooks, beside=kept)
    left_out = [path for path in sorted(folder.glob("*.ipynb")) if path.stem not in kept]
    facts = json.loads(report.data.read_text(encoding="utf-8"))
    write_atomically(folder / "index.md", _index(facts, [path.stem for path in left_out], budget))
    report.data.unlink()
    write_atomically(report.page, _terse(report.page.read_text(encoding="utf-8")))
    for path in left_out:
        path.unlink()
    for page in (report.page, folder / "index.md", *sorted(folder.glob("*.ipynb"))):
        write_atomically(page, _to_sources(page.read_text(encoding="utf-8"), [path.name for path in left_out]))
    return report.passed


def compact(path: Path, *, picture_bytes: int, most: int | None = None) -> str:
    """An executed notebook with the same cells, records, texts and errors, its first pictures smaller: JSON, a line a cell."""
    pictures = 0
    stored = json.loads(nbformat.writes(nbformat.read(path, as_version=4)))
    stored["nbformat_minor"] = 4  # the last one whose cells need no ids
    for cell in stored["cells"]:
        cell.pop("id", None)
        cell["source"] = "".join(cell["source"])
        cell["metadata"] = {"tags": tags} if (tags := cell["metadata"].get("tags")) else {}  # without papermill's clock
        for output in cell.get("outputs", []):
            if "data" in output:
                if "image/png" in output["data"]:
                    pictures += 1
                    if most is not None and pictures > most:
                        output["data"] = {"text/plain": "(a picture that is not published)"}
                output["data"] = _smallest(output["data"], picture_bytes)
                output["metadata"] = {}
            if "text" in output:
                output["text"] = "".join(output["text"])
    return lines_of(stored)


def _without_records(path: Path) -> str:
    """The notebook without records, and with texts that follow each other in one output: each takes 80 bytes of its own."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    run = stored["metadata"].get("dsv4lab", {})
    stored["metadata"] = {"dsv4lab": {key: run[key] for key in _RUN if key in run}, "language_info": {"name": "python"}}
    for cell in stored["cells"]:
        joined: list[dict[str, Any]] = []
        for output in cell.get("outputs", []):
            text = _text_of(output)
            if text is None:
                output.get("data", {}).pop(MIME, None)
                joined.append(output)
            elif joined and joined[-1].get("name") == "stdout":
                joined[-1]["text"] += text
            else:
                joined.append({"name": "stdout", "output_type": "stream", "text": text})
        if "outputs" in cell:
            cell["outputs"] = joined
    return lines_of(stored)


def _text_of(output: dict[str, Any]) -> str | None:
    """What an output says, in whole lines, where it says no more than a text can; else None."""
    data = output.get("data", {})
    if output.get("name") == "stdout":
        text = output["text"]
    elif MIME in data and "image/png" not in data:
        text = line_of(data[MIME])
    elif list(data) == ["text/plain"]:
        text = data["text/plain"]
    else:
        return None
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def _smallest(data: dict[str, Any], picture_bytes: int) -> dict[str, Any]:
    """A picture where there is one; else the text, or HTML without a text of its own; records of checks always."""
    kept = {MIME: data[MIME]} if MIME in data else {}
    if "image/png" in data:
        drawn = _palette_pngs("".join(data["image/png"]))
        png = next((each for each in drawn if len(each) <= picture_bytes), min(drawn, key=len))
        return kept | {"image/png": base64.b64encode(png).decode()}
    plain = "".join(data.get("text/plain", ""))
    if plain and not plain.startswith("<"):  # "<IPython.core.display.HTML object>" says nothing
        return kept | {"text/plain": plain}
    return kept | {
        kind: "".join(v) if isinstance(v, list) else v for kind, v in data.items() if kind not in (MIME, "text/plain")
    }


@lru_cache(maxsize=400)  # the pictures of a run, drawn once for all budgets
def _palette_pngs(png: str) -> tuple[bytes, ...]:
    """A picture, given in base64, as PICTURES have it, each but once."""
    image: Image.Image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    drawn: dict[bytes, None] = {}
    for width, colours in PICTURES:
        small = image.copy()
        small.thumbnail((width, 4 * width), Image.Resampling.HAMMING)  # leaves fewer shades than the sharper ones
        drawn[_palette_png(small.quantize(palette=_palette(image, colours), dither=Image.Dither.NONE))] = None
    return tuple(drawn)


def _palette_png(image: Image.Image) -> bytes:
    """A picture of a palette of at most 16 colours as a PNG of four bits a pixel, unfiltered: a fifth smaller than Pillow's."""
    pixels: NDArray[np.uint8] = np.asarray(image)
    height, width = pixels.shape
    even = np.pad(pixels, ((0, 0), (0, width % 2)))
    lines = np.pad(even[:, ::2] << 4 | even[:, 1::2], ((0, 0), (1, 0)))  # a line starts with its filter, 0
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0),
        b"PLTE": bytes(image.getpalette() or [])[: 3 * (int(pixels.max()) + 1)],
        b"IDAT": zlib.compress(lines.tobytes(), 9),
        b"IEND": b"",
    }
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _palette(image: Image.Image, colours: int) -> Image.Image:
    """A picture that carries the palette: one after the other, the colour that is worst kept by those before it.

    The usual median cut spends colours on the shades of smoothed edges; plots look better without, in half the bytes.
    """
    found: list[tuple[int, Any]] = sorted(image.getcolors(image.width * image.height) or [])
    counts, values = np.array([count for count, _ in found]), np.array([value for _, value in found], np.int64)
    chosen: list[NDArray[np.int64]] = []
    error = np.ones(len(found), np.int64)  # squared distance of each to the nearest that is chosen
    while len(chosen) < colours and error.any():
        chosen.append(values[(counts * error).argmax()])
        distance = ((values - chosen[-1]) ** 2).sum(axis=1)
        error = distance if len(chosen) == 1 else np.minimum(error, distance)
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate(chosen).tolist())
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
