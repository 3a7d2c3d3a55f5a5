"""Held-out text that travels with the package, so that perplexity is the same figure on every Python version.

    python -m training.heldout

Takes the smallest held-out files of the standard library outside its tests (the split of `training.data`) until the next
one would pass `MAX_BYTES`, and writes them with Python's licence to `dsv4lab/data/heldout.json.xz`.
"""

from __future__ import annotations

import json
import lzma
import platform
import sysconfig
from pathlib import Path

from dsv4lab.lab.perplexity import HELD_OUT
from training.data import stdlib_files

MAX_BYTES = 60_000


def main() -> None:
    """Write the file and say what it holds."""
    files = [f for f in stdlib_files() if f.held_out and "test" not in f.path]
    chosen: dict[str, str] = {}
    total = 0
    for f in sorted(files, key=lambda f: len(f.text.encode())):
        size = len(f.text.encode())
        if total + size > MAX_BYTES:
            break
        chosen[f.path] = f.text
        total += size
    record = {
        "source": "held-out files of the Python standard library; made by training/heldout.py",
        "python": platform.python_version(),
        "licence": (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text(encoding="utf-8"),
        "files": dict(sorted(chosen.items())),
    }
    HELD_OUT.write_bytes(
        lzma.compress((json.dumps(record, ensure_ascii=False) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME)
    )
    print(f"{HELD_OUT}: {len(chosen)} files, {total} bytes of text")


if __name__ == "__main__":
    main()
