"""Which scale of a matrix lies in which byte of tensor memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_array, require_range
from dsv4lab.viz._axes import figure_of, one_axes
from dsv4lab.viz._palette import sequential

_WORD = 4  # bytes of a cell


def plot_scale_words(row: Any, block: Any, *, first_column: int = 0, ax: Axes | None = None) -> Axes:
    """Lanes down, the four bytes of every column across; colour is the row of the matrix.

    Above each column its rows and K blocks, first to last; wide bars part columns of different blocks. row, block (lanes,
    columns, 4) int >= 0: of the scale in each byte. first_column: number of the first. Raises ValueError (shapes, negative),
    TypeError (dtypes).
    """
    rows = as_array("row", row, "L,C,B", kind="int", shape=(None, None, _WORD))
    blocks = as_array("block", block, "L,C,B", kind="int", shape=rows.shape)
    for name, values in (("row", rows), ("block", blocks)):
        require_range(name, values, 0, np.inf)
    lanes, columns, _ = rows.shape
    ax = one_axes(ax, (12.0, 4.2))
    image = ax.imshow(
        rows.reshape(lanes, -1), cmap=sequential(), aspect="auto", interpolation="nearest", extent=(0, columns, lanes, 0),
    )  # fmt: skip
    for column in range(columns + 1):
        new = column in (0, columns) or (blocks[:, column] != blocks[:, column - 1]).any()
        ax.axvline(column, color="white", linewidth=4.0 if new else 0.8)
    spans = [f"rows {_span(rows[:, column])}\nblocks {_span(blocks[:, column])}" for column in range(columns)]
    above = ax.secondary_xaxis("top")
    above.set_xticks(np.arange(columns) + 0.5, spans, fontsize=7.5 if columns <= 12 else 6.0)
    above.tick_params(length=0)
    above.spines["top"].set_visible(False)
    ax.set(xlabel="TMEM column (four bytes each)", ylabel="lane, from the first of its group")
    ax.set_xticks(np.arange(columns) + 0.5, [str(first_column + c) for c in range(columns)])
    ax.grid(False)
    figure_of(ax).colorbar(image, ax=ax, label="row of the matrix", pad=0.01)
    return ax


def _span(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low}-{high}"
