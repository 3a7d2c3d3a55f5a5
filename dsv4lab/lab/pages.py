"""Pages of docs/ that are generated: written, or held against what they should be."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv4lab.lab.files import write_atomically


def keep(module: str, page: Path, render: Callable[[], str], argv: Sequence[str] | None) -> int:
    """The command line of `python -m MODULE [--check] [--page PATH]`, whose page `render` gives; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"Write docs/{page.name}.")
    parser.add_argument("--check", action="store_true", help="change nothing, say whether the page is out of step")
    parser.add_argument("--page", type=Path, default=page, help=f"where the page is (default docs/{page.name})")
    options = parser.parse_args(argv)
    wanted = render()
    found = options.page.read_text(encoding="utf-8") if options.page.exists() else None
    if found == wanted:
        return 0
    if options.check:
        print(f"{options.page} is out of step; `python -m {module}` writes it", file=sys.stderr)
        return 1
    write_atomically(options.page, wanted)
    print(f"wrote {options.page}")
    return 0
