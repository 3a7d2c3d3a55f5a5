"""Modules with lines changed on purpose."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from dsv4lab.lab import edits
from dsv4lab.lab.edits import difference, edited


def test_a_copy_is_changed_and_the_module_is_not() -> None:
    before = inspect.getsource(edits)
    copy = edited(edits, {'"""The changed lines as a unified diff."""': '"""Other words."""'})
    assert copy.difference.__doc__ == "Other words." and edits.difference.__doc__ != "Other words."
    assert inspect.getsource(edits) == before and copy.__name__ != edits.__name__
    assert Path(inspect.getfile(copy)).name == "edits.py" and inspect.getsource(copy) != before


def test_a_removed_statement_becomes_pass_and_the_difference_shows_it() -> None:
    copy = edited(edits, {"global _folder": ""})
    shown = difference(edits, copy).splitlines()
    assert shown[:2] == ["--- edits.py", "+++ edited"]
    assert "-    global _folder" in shown and "+    pass" in shown
    assert len([line for line in shown if line[:1] in "+-"]) == 4


def test_two_copies_live_side_by_side() -> None:
    first, second = (edited(edits, {"n=context": f"n={n}"}) for n in (0, 5))
    assert inspect.getsource(first) != inspect.getsource(second)
    assert len(first.difference(edits, second)) < len(second.difference(edits, second))


@pytest.mark.parametrize(("text", "times"), [("no such line", 0), ("inspect.getsource(", 2)])
def test_a_text_must_be_there_once(text: str, times: int) -> None:
    with pytest.raises(ValueError, match=rf"dsv4lab.lab.edits must contain .* once, got {times} times"):
        edited(edits, {text: ""})
