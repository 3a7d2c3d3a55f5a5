"""How often tokens were drawn, against their probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsv4lab.viz._arrays import as_array, require_range
from dsv4lab.viz._axes import several_axes
from dsv4lab.viz._palette import BLUE, BOUND, VERMILION

_Z = 1.959964  # two-sided 95 % of the normal distribution


def plot_draws(cases: Mapping[str, tuple[Any, Any]], *, columns: int = 2, axs: Any = None) -> np.ndarray:
    """A panel a case: frequencies as dots over the rank by probability, the probabilities as a line with the band that 95 % of
    fair draws fall into, log axes. In the title how many dots are within. Tokens that cannot be drawn are left out, and must
    not have been.

    cases: name to probabilities (V,) and counts (V,) int. Returns an Axes a case.
    Raises ValueError (shapes, ranges, no case, no draws, a draw of what has probability 0), TypeError (dtypes).
    """
    if not cases:
        raise ValueError("cases must not be empty, got an empty mapping")
    found = {}
    for name, (probabilities, counts) in cases.items():
        p = as_array(f"cases[{name!r}][0]", probabilities, "V")
        require_range(f"cases[{name!r}][0]", p, 0.0, 1.0, slack=1e-6)
        c = as_array(f"cases[{name!r}][1]", counts, "V", kind="int", shape=p.shape)
        if c.min() < 0 or not c.sum():
            raise ValueError(f"cases[{name!r}][1] must hold counts of one draw or more, got a sum of {c.sum()}")
        if c[p <= 0].any():
            raise ValueError(f"cases[{name!r}][1] must be 0 where the probability is, got {c[p <= 0].sum()} draws")
        order = np.argsort(-p, kind="stable")[: np.count_nonzero(p > 0)]
        found[name] = p[order], c[order], int(c.sum())
    across = min(columns, len(found))
    down = -(-len(found) // across)
    grid = (down, across) if axs is None else (len(found), 1)
    axs = several_axes(axs, *grid, (4.8 * across, 2.9 * down))
    for spare in axs[len(found) :]:
        spare.set_visible(False)
    for ax, (name, (p, c, total)) in zip(axs, found.items(), strict=False):
        rank, half = np.arange(1, len(p) + 1), _Z * np.sqrt(p * (1 - p) / total)
        floor = 0.4 / total  # below one draw
        ax.fill_between(rank, np.maximum(p - half, floor), p + half, color=BLUE, alpha=0.25, linewidth=0, label="95 % of draws")
        ax.plot(rank, p, color=BLUE, linewidth=1.3, label="probability")
        ax.plot(rank[c > 0], c[c > 0] / total, color=VERMILION, linestyle="none", marker=".", markersize=5, label="frequency")
        ax.axhline(1 / total, color=BOUND, linewidth=1, linestyle=":", label="one draw")
        often = p * total >= 10
        within = np.mean(np.abs(c / total - p)[often] <= half[often]) if often.any() else np.nan
        ax.set_title(f"{name}: {100 * within:.0f} % of {np.count_nonzero(often)} within", fontsize=9.5, fontweight="normal")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set(xlabel="rank by probability", ylabel="share of draws", ylim=(floor, 2 * p.max()))
    axs[0].legend(loc="lower left", frameon=False, fontsize=8.5)
    return axs[: len(found)]
