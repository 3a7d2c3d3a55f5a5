"""Notebook files: finding them by name, their cells, and their parameters."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

PARAMETERS_TAG = "parameters"
_WORDS = {"true": True, "false": False, "none": None}


class NotebookError(ValueError):
    """A notebook or a parameter that does not exist or does not fit; the message lists what there is."""


@dataclass(frozen=True)
class Notebook:
    """One source notebook: where it is, its cells as (id, kind, text), and the defaults in its `parameters` cell."""

    path: Path
    cells: tuple[tuple[str, str, str], ...]
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The file's name without suffix, such as `01_tour`."""
        return self.path.stem

    def position_of(self, cell_id: str) -> int | None:
        """1-based place of a cell among all cells, or None for a cell that the source does not have."""
        return next((place for place, (known, _, _) in enumerate(self.cells, start=1) if known == cell_id), None)

    def first_line(self, cell_id: str) -> str:
        """First line of a cell that is code and no comment, for a reader who must find the cell."""
        text = next((text for known, _, text in self.cells if known == cell_id), "")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return next((line for line in lines if not line.startswith("#")), lines[0] if lines else "")


def lines_of(notebook: Mapping[str, Any]) -> str:
    """A notebook as JSON, a line a cell."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    cells = ",\n".join(compact(cell) for cell in notebook["cells"])
    return f'{{"cells":[\n{cells}\n],{compact({key: v for key, v in notebook.items() if key != "cells"})[1:]}\n'


def read_notebook(path: Path) -> Notebook:
    """Read a source notebook. Raises NotebookError for a file that is no notebook or a parameters cell of non-literals."""
    try:
        stored = nbformat.read(path, as_version=4)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise NotebookError(f"{path} is not a readable notebook: {error}") from None
    parameters: dict[str, Any] = {}
    for cell in stored.cells:
        if PARAMETERS_TAG in cell.metadata.get("tags", []):
            parameters |= parse_parameters(cell.source, path.name)
    return Notebook(path, tuple((cell.get("id", ""), cell.cell_type, cell.source) for cell in stored.cells), parameters)


def parse_parameters(source: str, where: str) -> dict[str, Any]:
    """Names and literal defaults assigned in a `parameters` cell. Raises NotebookError where a value is not a literal."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise NotebookError(f"{where}: the parameters cell must be plain assignments, got {error.msg}") from None
    found: dict[str, Any] = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        try:
            if not isinstance(target, ast.Name) or not isinstance(value, ast.AST):
                raise ValueError("not an assignment to a name")
            found[target.id] = ast.literal_eval(value)
        except ValueError:
            raise NotebookError(
                f"{where}: the parameters cell must assign literals to names, got `{ast.unparse(node)}`"
            ) from None
    return found


def find_notebooks(directory: Path, names: Sequence[str] = ()) -> list[Notebook]:
    """The notebooks of a directory in order: all, or those named.

    A name is the file's name, with or without suffix and leading number: `01_tour.ipynb`, `01_tour`, `tour`, `01`.
    Raises NotebookError listing the known ones for a name that fits none or several, and for an empty directory.
    """
    known = sorted(directory.glob("*.ipynb"))
    if not known:
        raise NotebookError(f"there are no notebooks in {directory}")
    if not names:
        return [read_notebook(path) for path in known]
    chosen: dict[Path, None] = {}
    for name in names:
        stem = re.sub(r"\.(ipynb|py)$", "", Path(name).name)
        exact = [path for path in known if path.stem == stem]
        fits = exact or [path for path in known if stem in path.stem.split("_", 1)]
        if len(fits) != 1:
            what = "fits several of" if fits else "is none of"
            listed = fits or known
            raise NotebookError(f"notebook {name!r} {what}: {', '.join(path.stem for path in listed)}")
        chosen[fits[0]] = None
    return [read_notebook(path) for path in sorted(chosen)]


def parse_assignments(texts: Iterable[str]) -> dict[str, Any]:
    """`name=value` texts of a command line as typed values: Python literals, true, false and none; otherwise strings.

    Raises NotebookError for a text that is not `name=value`.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise NotebookError(f"a parameter must be written name=value, got {text!r}")
        found[name.strip()] = _literal(value.strip())
    return found


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def choose_parameters(notebook: Notebook, given: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """The given values that a notebook has parameters for, in the type of its defaults.

    strict: a name the notebook does not have is an error (it was asked for by name), otherwise it is left out.
    Raises NotebookError listing the notebook's parameters, or naming a value of another type than the default's or JSON's.
    """
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name not in notebook.parameters:
            if strict:
                known = ", ".join(notebook.parameters) or "no parameters"
                raise NotebookError(f"{notebook.name} has no parameter {name!r}; it has {known}")
            continue
        chosen[name] = _fit(notebook, name, value)
        try:
            json.dumps(chosen[name], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise NotebookError(f"{notebook.name}: {name} must be what JSON can hold, got {value!r}") from error
    return chosen


def _fit(notebook: Notebook, name: str, value: Any) -> Any:
    default = notebook.parameters[name]
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, str):
        return str(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        return type(default)(value)
    raise NotebookError(f"{notebook.name}: {name} must be of type {type(default).__name__}, got {value!r}")
