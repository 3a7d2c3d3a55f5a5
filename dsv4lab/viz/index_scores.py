"""Scores of the lightning indexer, with what it selected and what a query may see."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from dsv4lab.viz._arrays import as_array, as_selection, require_range
from dsv4lab.viz._axes import cell_marks, figure_of, one_axes
from dsv4lab.viz._palette import VERMILION, diverging, sequential


def plot_index_scores(
    scores: Any, *, selected: Any = None, visible: Any = None, query_start: int = 0, ax: Axes | None = None
) -> Axes:
    """Heat map of index scores, queries by entries.

    scores (S, T) real; NaN or infinite cells (masked) stay grey. selected: (S, K) indices, -1 = empty, or an (S, T) mask.
    visible (S,) int: number of entries query s may see; drawn as a step line, right of which cells stay grey whatever they are.
    query_start: position of the first query.
    Raises ValueError (shapes, ranges), TypeError (dtypes).
    """
    values = as_array("scores", scores, "S,T")
    queries, entries = values.shape
    mask = None if selected is None else as_selection("selected", selected, queries, entries)
    limit = None if visible is None else as_array("visible", visible, "S", kind="int", shape=(queries,))
    if limit is not None:
        require_range("visible", limit, 0, entries)
        values = np.where(np.arange(entries) < limit[:, None], values, np.nan)

    ax = one_axes(ax, (8.0, float(np.clip(1.6 + 0.07 * queries, 3.0, 6.0))))
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0:  # signed head weights give signed scores: centre the map on zero
        reach = max(-low, high)
        cmap, norm = diverging(), Normalize(-reach, reach)
    else:
        cmap, norm = sequential(), Normalize(low, high)
    extent = (-0.5, entries - 0.5, query_start + queries - 0.5, query_start - 0.5)
    shown = np.ma.masked_invalid(values)
    image = ax.imshow(shown, cmap=cmap, norm=norm, extent=extent, aspect="auto", interpolation="nearest")
    ax.grid(False)
    if mask is not None:
        cell_marks(ax, mask, "selected", y0=query_start)
    if limit is not None:
        edge = np.repeat(limit - 0.5, 2)
        level = query_start - 0.5 + np.repeat(np.arange(queries + 1), 2)[1:-1]
        ax.plot(edge, level, color=VERMILION, linewidth=1.6, label="visible to the left")
    ax.set(xlim=extent[:2], ylim=extent[2:], xlabel="compressed entry", ylabel="query position (token)")
    if mask is not None or limit is not None:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1, frameon=False, markerscale=1.6)
    figure_of(ax).colorbar(image, ax=ax, label="index score", pad=0.02)
    return ax
