"""A module with some lines changed: to break a kernel on purpose, and show exactly what was broken."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

_folder: tempfile.TemporaryDirectory[str] | None = None  # kept until the process ends: compilers read the source again


def edited(module: ModuleType, changes: Mapping[str, str]) -> ModuleType:
    """A copy of `module` with each text of `changes` replaced; the module itself stays as it is.

    A text must occur once, and is stripped of nothing: give whole statements. An empty replacement becomes `pass` (so that a
    block may lose its only statement). The copy lies in a file of the same name. Raises ValueError for a text that is not
    there once.
    """
    global _folder
    source = inspect.getsource(module)
    for old, new in changes.items():
        if source.count(old) != 1:
            raise ValueError(f"{module.__name__} must contain {old!r} once, got {source.count(old)} times")
        source = source.replace(old, new or "pass")
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(prefix="dsv4lab-edited-")
    original = Path(inspect.getfile(module))
    path = Path(tempfile.mkdtemp(dir=_folder.name)) / original.name
    path.write_text(source, encoding="utf-8")
    name = f"{module.__name__}_{path.parent.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy


def difference(before: ModuleType, after: ModuleType, context: int = 1) -> str:
    """The changed lines as a unified diff."""
    old, new = (inspect.getsource(m).splitlines() for m in (before, after))
    name = Path(inspect.getfile(before)).name
    return "\n".join(difflib.unified_diff(old, new, name, "edited", lineterm="", n=context))
