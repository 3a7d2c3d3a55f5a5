"""How fast the pairs of a rotary embedding turn, one table of frequencies beside another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dsv4lab.viz._arrays import as_series, require_finite, require_positive
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BOUND, EMPTY, dash, hue


def plot_frequency_tables(
    tables: Mapping[str, Any],
    *,
    ramp: tuple[float, float] | None = None,
    marks: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Tokens that each pair takes for one turn, 2 pi / f, on a log axis.

    tables: name to (n,) frequencies > 0 in radians a token. ramp: first and last pair of a blend, shaded. marks: name to a
    number of tokens, drawn as a line. Raises ValueError (empty, not positive, not finite), TypeError (dtypes).
    """
    series = as_series("tables", tables, "n")
    for name, values in series.items():
        require_finite(f"tables[{name!r}]", values)
        if values.min() <= 0:
            raise ValueError(f"tables[{name!r}] must be > 0, got {values.min():g}")
    for name, tokens in (marks or {}).items():
        require_positive(f"marks[{name!r}]", tokens)
    ax = one_axes(ax, (9.0, 4.0))
    if ramp is not None:
        ax.axvspan(*ramp, color=EMPTY, zorder=0, label=f"blend of pairs {ramp[0]:g} to {ramp[1]:g}")
    for index, (name, values) in enumerate(series.items()):
        turn = 2 * np.pi / values
        ax.plot(turn, color=hue(index), linestyle=dash(index), marker="o", markersize=3.5, label=name or "table")
    for name, tokens in (marks or {}).items():
        ax.axhline(tokens, color=BOUND, linewidth=1.1, linestyle=":")
        ax.annotate(name, (0.995, tokens), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8.5)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="pair i (dims 2i and 2i + 1 of the rotary part)", ylabel="tokens for one turn")
    ax.legend(loc="upper left", frameon=True)
    return ax
