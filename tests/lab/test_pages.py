"""The command line of pages that are generated."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from dsv4lab.lab import layer_table, operator_map


@pytest.mark.parametrize("made", [layer_table, operator_map], ids=["layers", "operators"])
def test_check_says_when_the_page_is_stale(made: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / made.PAGE.name
    assert made.main(["--check", "--page", str(page)]) == 1
    assert made.main(["--page", str(page)]) == 0
    assert made.main(["--check", "--page", str(page)]) == 0
    page.write_text(page.read_text() + "more")
    assert made.main(["--check", "--page", str(page)]) == 1
