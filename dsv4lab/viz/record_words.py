"""What lies in the 32-bit words of a record of memory, a line of banks after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from dsv4lab.viz._arrays import as_array, require_labels, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import CYCLE, EMPTY, text_on

_BANKS = 32
_HUES = (*CYCLE, "#999999")


def plot_record_words(
    group: Any, texts: Sequence[str], groups: Sequence[str], *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Words in order of memory, 32 a line: one bank each. A colour for each group, -1 pale; a short text in every word.

    group (words,) int: index into groups. texts: one for each word, "" for none. groups: their names, at most eight.
    Raises ValueError (shapes, range), TypeError (dtypes).
    """
    held = as_array("group", group, "W", kind="int")
    if not 1 <= len(groups) <= len(_HUES):
        raise ValueError(f"groups must be 1 to {len(_HUES)} names, got {len(groups)}")
    require_range("group", held, -1, len(groups) - 1)
    words = require_labels("texts", texts, len(held)) or []
    lines = -(-len(held) // _BANKS)
    ax = one_axes(ax, (12.0, 0.46 * lines + 1.5))
    for index, (owner, text) in enumerate(zip(held, words, strict=True)):
        line, bank = divmod(index, _BANKS)
        color = EMPTY if owner < 0 else _HUES[owner]
        ax.add_patch(Rectangle((bank, line), 1, 1, facecolor=color, edgecolor="white", linewidth=1.0))
        if text:
            ax.text(
                bank + 0.5, line + 0.5, text, ha="center", va="center", fontsize=7, linespacing=0.95, color=text_on(color)
            )  # fmt: skip
    ax.set(xlim=(0, _BANKS), ylim=(lines, 0), xlabel="bank (32-bit word of a 128-byte line)", ylabel="line")
    ax.set_xticks(np.arange(0, _BANKS, 4) + 0.5, [str(b) for b in range(0, _BANKS, 4)])
    ax.set_yticks(np.arange(lines) + 0.5, [str(n) for n in range(lines)])
    ax.tick_params(length=0)
    ax.grid(False)
    handles = [Patch(color=_HUES[i], label=name) for i, name in enumerate(groups)]
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=8, frameon=False, borderaxespad=0.1,
        columnspacing=1.1, handlelength=1.0, handletextpad=0.4, title=title or None, alignment="left", title_fontsize=9.5,
    )  # fmt: skip
    return ax
