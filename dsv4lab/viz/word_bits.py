"""Whose bits a 32-bit word holds, and where shifts and masks bring them: rows of bits over the fields of two BF16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dsv4lab.viz._arrays import as_array, require_labels, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BOUND, CYCLE, EMPTY, INK, text_on

_HUES = (*CYCLE, "#999999")
_BITS = 32
_FIELDS = (("s", 1), ("exponent", 8), ("mantissa", 7)) * 2  # of two BF16, upper half first


def plot_word_bits(
    code: Any,
    bit: Any,
    rows: Sequence[str],
    *,
    bit_names: Sequence[str] = ("m", "e0", "e1", "s"),
    codes: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Words down, bits across, bit 31 at the left: a colour for each code, its bit's name inside; zeros are pale.

    code, bit (rows, 32) int, lowest bit first: which code a bit belongs to (at most eight) and which of its bits; -1: zero.
    rows: names. codes: what the codes are, for a legend. Raises ValueError (shapes, range), TypeError (dtypes).
    """
    owner = as_array("code", code, "R,B", kind="int", shape=(None, _BITS))
    which = as_array("bit", bit, "R,B", kind="int", shape=owner.shape)
    require_range("code", owner, -1, len(_HUES) - 1)
    require_range("bit", which, -1, len(bit_names) - 1)
    names = require_labels("rows", rows, len(owner)) or []
    ax = one_axes(ax, (12.0, 0.42 * len(owner) + 1.7))
    for (row, place), one in np.ndenumerate(owner):
        color = EMPTY if one < 0 else _HUES[one]
        ax.add_patch(Rectangle((_BITS - 1 - place, row), 1, 0.86, facecolor=color, edgecolor="white", linewidth=1.0))
        if one >= 0:
            ax.text(
                _BITS - 0.5 - place, row + 0.43, bit_names[int(which[row, place])], ha="center", va="center", fontsize=8.5,
                color=text_on(color),
            )  # fmt: skip
    left = 0
    for name, width in _FIELDS:
        ax.text(left + width / 2, -0.22, name, ha="center", va="bottom", fontsize=8.5, color=INK)
        left += width
        ax.axvline(
            left, color=BOUND, linewidth=1.6 if left == _BITS // 2 else 0.7, linestyle="-" if left == _BITS // 2 else ":"
        )
    ax.set(xlim=(0, _BITS), ylim=(len(owner), -0.75), xlabel="bit of the word; above: the fields of two BF16", ylabel="word")
    ax.set_xticks(np.arange(_BITS)[::4] + 0.5, [str(b) for b in range(_BITS - 1, -1, -4)])
    ax.set_yticks(np.arange(len(owner)) + 0.43, names)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    if codes is not None:
        handles = [Rectangle((0, 0), 1, 1, facecolor=_HUES[i], label=name) for i, name in enumerate(codes)]
        ax.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, borderaxespad=0.1,
            handlelength=1.0, handletextpad=0.4,
        )  # fmt: skip
    return ax
