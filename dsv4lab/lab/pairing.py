"""Notebooks and their text twins, kept in step.

A notebook is written as `notebooks/NN_topic.py` in jupytext's percent format (`# %% [markdown]`, `# %%`,
`# %% tags=["parameters"]`); the `.ipynb` beside it is generated from that text: no outputs, no execution counts, minimal
metadata, and cell ids that follow from the cells alone, so that the same text always gives the same bytes.

    python -m dsv4lab.lab.pairing --write     generate every .ipynb from its .py
    python -m dsv4lab.lab.pairing --check     say which pairs are out of step, exit status 1 if any
    python -m dsv4lab.lab.pairing --adopt     the other way: rewrite the .py from an .ipynb that was edited, then --write
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupytext.config import JupytextConfiguration

from dsv4lab.lab.files import write_atomically
from dsv4lab.lab.notebooks import lines_of

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_CELL_FILTER = "tags,-all"  # cell metadata that belongs to the text; the rest is the editor's private state


def _config() -> JupytextConfiguration:
    return JupytextConfiguration(notebook_metadata_filter="-all", cell_metadata_filter=_CELL_FILTER)


def _cell(cell: Any, seen: dict[str, int]) -> dict[str, Any]:
    """One cell as stored: its id is a digest of its kind and text, numbered where the same text comes again."""
    digest = hashlib.sha256(f"{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:12]
    seen[digest] = seen.get(digest, 0) + 1
    tags = cell.metadata.get("tags")
    stored: dict[str, Any] = {
        "cell_type": cell.cell_type,
        "id": digest if seen[digest] == 1 else f"{digest}-{seen[digest]}",
        "metadata": {"tags": list(tags)} if tags else {},
        "source": cell.source,
    }
    if cell.cell_type == "code":
        stored |= {"execution_count": None, "outputs": []}
    return stored


def render_notebook(text: str) -> str:
    """The `.ipynb` JSON of a percent-format text; the same text always gives the same string."""
    notebook = jupytext.reads(text, fmt="py:percent", config=_config())
    seen: dict[str, int] = {}
    cells = [_cell(cell, seen) for cell in notebook.cells]
    stored = {"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5}
    nbformat.validate(nbformat.from_dict(stored))
    return lines_of(stored)


def render_text(notebook_json: str) -> str:
    """The percent-format text of an `.ipynb`: cells and tags, no outputs and no other metadata."""
    notebook = nbformat.reads(notebook_json, as_version=4)
    notebook.metadata = nbformat.from_dict({"kernelspec": _METADATA["kernelspec"]})
    return str(jupytext.writes(notebook, fmt="py:percent", config=_config()))


def out_of_step(directory: Path) -> list[str]:
    """What is wrong with the pairs of a directory, one sentence each; empty when every pair is in step."""
    texts = {path.stem: path for path in directory.glob("*.py")}
    notebooks = {path.stem: path for path in directory.glob("*.ipynb")}
    problems = [f"{notebooks[stem].name} has no text twin {stem}.py" for stem in sorted(notebooks.keys() - texts.keys())]
    for stem, path in sorted(texts.items()):
        text = path.read_text(encoding="utf-8")
        wanted = render_notebook(text)
        if stem not in notebooks:
            problems.append(f"{path.name} has no notebook {stem}.ipynb")
        elif notebooks[stem].read_text(encoding="utf-8") != wanted:
            problems.append(f"{stem}.ipynb differs from what {path.name} gives")
        if render_text(wanted) != text:
            problems.append(f"{path.name} is not in jupytext's own spelling")
    return problems


def write_pairs(directory: Path, stems: Sequence[str] = ()) -> list[Path]:
    """Generate the `.ipynb` of each text (all, or the given stems), and put the text into jupytext's own spelling.

    Returns the files that changed. Raises FileNotFoundError for a stem without a `.py`.
    """
    changed = []
    for path in _selected(directory, stems, ".py"):
        text = path.read_text(encoding="utf-8")
        notebook = render_notebook(text)
        for target, content in ((path, render_text(notebook)), (path.with_suffix(".ipynb"), notebook)):
            if not target.exists() or target.read_text(encoding="utf-8") != content:
                write_atomically(target, content)
                changed.append(target)
    return changed


def adopt(directory: Path, stems: Sequence[str] = ()) -> list[Path]:
    """Rewrite the text of each `.ipynb` (all, or the given stems) from the notebook. Returns the files that changed."""
    changed = []
    for path in _selected(directory, stems, ".ipynb"):
        text = render_text(path.read_text(encoding="utf-8"))
        twin = path.with_suffix(".py")
        if not twin.exists() or twin.read_text(encoding="utf-8") != text:
            write_atomically(twin, text)
            changed.append(twin)
    return changed


def _selected(directory: Path, stems: Sequence[str], suffix: str) -> list[Path]:
    if not stems:
        return sorted(directory.glob(f"*{suffix}"))
    paths = [directory / f"{Path(stem).stem if stem.endswith(('.py', '.ipynb')) else stem}{suffix}" for stem in stems]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no {path.name} in {directory}")
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dsv4lab.lab.pairing", description="Keep notebooks and text twins in step.")
    parser.add_argument("names", nargs="*", help="notebooks, with or without suffix; all by default")
    parser.add_argument("--directory", type=Path, default=NOTEBOOKS, help="where the pairs are (default: notebooks/)")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="change nothing, list the pairs that are out of step")
    mode.add_argument("--write", action="store_true", help="generate .ipynb from .py")
    mode.add_argument("--adopt", action="store_true", help="rewrite .py from .ipynb, then generate .ipynb again")
    options = parser.parse_args(argv)
    if options.check:
        problems = out_of_step(options.directory)
        for problem in problems:
            print(problem, file=sys.stderr)
        if problems:
            print("`make notebooks` takes the text, `python -m dsv4lab.lab.pairing --adopt NAME` the notebook", file=sys.stderr)
        return 1 if problems else 0
    changed = adopt(options.directory, options.names) if options.adopt else []
    changed += write_pairs(options.directory, options.names)
    for path in changed:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
