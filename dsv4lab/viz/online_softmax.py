"""A softmax taken tile by tile: what each tile does to the running maximum, and to the sum so far."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4lab.viz._arrays import as_array, require_finite, require_positive, require_range
from dsv4lab.viz._axes import several_axes
from dsv4lab.viz._palette import BLUE, BOUND, INK, ORANGE, SKY


def plot_online_softmax(
    scores: Any, maxima: Any, shares: Any, *, tile: int, sink: float | None = None, unit: str = "base 2", axs: Any = None
) -> np.ndarray:
    """Above, scores and the running maximum; below, the sum after each tile over the final one, and what it was scaled by.

    scores (n,) in `unit`; maxima (t,): the running maximum after each of t = ceil(n / tile) tiles, rising; shares (t,) in
    [0, 1]: the sum so far in units of the final one, sink included. sink: its logit, drawn as a line; what the last share lacks
    to 1 is the sink's. Returns 2 Axes. Raises ValueError (shapes, range, a falling maximum), TypeError (dtypes).
    """
    values = as_array("scores", scores, "n")
    require_positive("tile", tile)
    tiles = -(-len(values) // tile)
    top, part = (as_array(name, given, "t", shape=(tiles,)) for name, given in (("maxima", maxima), ("shares", shares)))
    for name, array in (("scores", values), ("maxima", top)):
        require_finite(name, array)
    require_range("shares", part, 0.0, 1.0, slack=1e-6)
    if (np.diff(top) < 0).any():
        raise ValueError(f"maxima must not fall, got {top[:-1][np.diff(top) < 0][0]:g} followed by less")
    axs = several_axes(axs, 2, 1, (10.0, 4.6), sharex=True, height_ratios=(3, 2))
    edges = np.minimum(np.arange(tiles + 1) * tile, len(values)) - 0.5
    axs[0].plot(values, linestyle="none", marker=".", markersize=4, color=SKY, label="score of a key")
    axs[0].stairs(top, edges, baseline=None, color=INK, linewidth=1.8, label="maximum so far")
    if sink is not None:
        axs[0].axhline(sink, color=ORANGE, linewidth=1.4, linestyle="--", label="sink")
    axs[0].set_ylabel(f"score ({unit})")
    axs[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.1)
    axs[1].bar(edges[:-1], part, np.diff(edges), align="edge", color=BLUE, alpha=0.75, edgecolor="white")
    factors = np.exp2(np.r_[0.0, -np.diff(top)])
    for left, right, share, factor in zip(edges[:-1], edges[1:], part, factors, strict=True):
        text = "kept" if factor == 1 else f"x {factor:.3g}"
        axs[1].annotate(text, ((left + right) / 2, share), ha="center", va="bottom", fontsize=8)
    axs[1].axhline(1.0, color=BOUND, linewidth=1.2, label="all, with the sink")
    axs[1].legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0.1)
    axs[1].set(xlabel="key", ylabel="sum so far", ylim=(0, 1.25), xlim=(edges[0], edges[-1]))
    for ax in axs:
        ax.grid(False, axis="x")
        for edge in edges[1:-1]:
            ax.axvline(edge, color="#CCCCCC", linewidth=0.7, zorder=0)
    return axs
