"""How entries of tokens are sorted by expert and cut into tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from dsv4lab.viz._arrays import as_array, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import CYCLE, EMPTY, INK, text_on

_HUES = (*CYCLE, "#999999")
_SORTED = 3.2  # where the second strip begins, in strip heights


def plot_permutation(expert: Any, position: Any, tiles: Any, *, ax: Axes | None = None) -> Axes:
    """Above, entries as they come, token by token; below, the same sorted by expert, with brackets around tiles.

    expert (M, k) int: of each entry. position (M * k,) int: an entry's sorted row, -1 for one that is dropped, drawn pale.
    tiles (T, >= 3) int: expert, first row, end row. Texts are token numbers; a colour for each expert.
    Raises ValueError (shapes, range), TypeError (dtypes).
    """
    chosen = as_array("expert", expert, "M,k", kind="int")
    tokens, top_k = chosen.shape
    rows = as_array("position", position, "N", kind="int", shape=(tokens * top_k,))
    require_range("position", rows, -1, rows.size - 1)
    cut = as_array("tiles", tiles, "T,C", kind="int")
    if cut.shape[1] < 3:
        raise ValueError(f"tiles must have columns expert, first row, end row, got shape {cut.shape}")
    flat, count = chosen.ravel(), rows.size
    ax = one_axes(ax, (11.0, 3.6))
    for entry, row in enumerate(rows):
        token = entry // top_k
        color = _HUES[flat[entry] % len(_HUES)] if row >= 0 else EMPTY
        places = [(entry, 0.0)] if row < 0 else [(entry, 0.0), (int(row), _SORTED)]
        for x, y in places:
            ax.add_patch(Rectangle((x + 0.04, y), 0.92, 1, facecolor=color, edgecolor="none"))
            if count <= 64:
                ax.text(x + 0.5, y + 0.5, str(token), ha="center", va="center", fontsize=8, color=text_on(color))
        if row >= 0:
            ax.plot([entry + 0.5, row + 0.5], [1.02, _SORTED - 0.02], color=color, linewidth=1.1, alpha=0.75)
    for token in range(1, tokens):
        ax.plot([token * top_k] * 2, [-0.12, 1.12], color=INK, linewidth=0.8)
    for number, (_, first, end) in enumerate(cut[:, :3]):
        y = _SORTED + 1.15
        ax.plot([first + 0.1, first + 0.1, end - 0.1, end - 0.1], [y, y + 0.22, y + 0.22, y], color=INK, linewidth=1.2)
        ax.text(
            (first + end) / 2, y + 0.32, f"tile {number}" if end - first > 2 else str(number), ha="center", va="top", fontsize=8
        )
    ax.set(xlim=(0, count), ylim=(_SORTED + 2.2, -0.3), xlabel="entry above, sorted row below", ylabel="order of entries")
    ax.set_yticks([0.5, _SORTED + 0.5], ["as they come", "by expert"])
    ax.tick_params(axis="y", length=0)
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    handles = [Patch(color=_HUES[e % len(_HUES)], label=f"expert {e}") for e in np.unique(flat[rows >= 0])]
    if (rows < 0).any():
        handles.append(Patch(color=EMPTY, label="dropped"))
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=9, frameon=False, borderaxespad=0.1, handlelength=1.0
    )
    return ax
