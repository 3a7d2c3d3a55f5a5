"""Which part of an on-chip memory holds something that is still needed, over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch

from dsv4lab.viz._arrays import as_array, require_finite, require_positive, require_range
from dsv4lab.viz._axes import several_axes
from dsv4lab.viz._palette import BLUE, BOUND, GREEN, ORANGE, VERMILION, hue

_COLORS = {"TMA": ORANGE, "threads": BLUE, "tensor core": VERMILION, "cp.async": GREEN}


def plot_memory_occupancy(
    low: Any,
    high: Any,
    start: Any,
    end: Any,
    kind: Any,
    *,
    kinds: Sequence[str],
    extent: float,
    unit: str = "KiB",
    time: str = "warp-instructions executed",
    axs: Any = None,
) -> np.ndarray:
    """A bar for each piece of memory from when it is written to when it is read last; above, how much is held at a time.

    low, high (n,): the piece, in `unit`. start, end (n,): in `time`; equal where it is never read. kind (n,) int: who wrote it,
    an index into `kinds`. extent: size of the memory, in `unit`. Returns 2 Axes (held, map).
    Raises ValueError (shapes, extent <= 0, a piece outside the memory, end before start), TypeError (dtypes).
    """
    bottom = as_array("low", low, "n")
    top, begin, finish = (
        as_array(name, value, "n", shape=bottom.shape) for name, value in (("high", high), ("start", start), ("end", end))
    )
    who = as_array("kind", kind, "n", kind="int", shape=bottom.shape)
    require_positive("extent", extent)
    require_range("kind", who, 0, len(kinds) - 1)
    for name, values in (("low", bottom), ("high", top)):
        require_finite(name, values)
        require_range(name, values, 0, extent, slack=1e-9)
    if (finish < begin).any() or (top < bottom).any():
        raise ValueError("end must be >= start and high >= low in every piece")
    axs = several_axes(axs, 2, 1, (11.0, 4.8), height_ratios=(1.0, 3.0), sharex=True)
    held, pieces = axs
    times = np.unique(np.concatenate([begin, finish]))
    change = np.zeros(len(times))
    np.add.at(change, np.searchsorted(times, begin), top - bottom)
    np.add.at(change, np.searchsorted(times, finish), bottom - top)
    level = np.maximum(np.cumsum(change), 0)
    held.fill_between(times, level, step="post", color=BLUE, alpha=0.25, linewidth=0)
    held.step(times, level, where="post", color=BLUE, linewidth=1.2)
    held.axhline(extent, color=BOUND, linewidth=1.0, linestyle="--")
    peak = int(level.argmax())
    note = f"most held: {level[peak]:.4g} of {extent:.4g} {unit}"
    held.set(ylim=(0, 1.15 * extent), ylabel=f"held ({unit})")
    held.set_title(note, fontsize=9.5, fontweight="normal")
    handles = []
    for index, name in enumerate(kinds):
        chosen = who == index
        if not chosen.any():
            continue
        color = _COLORS.get(name, hue(index))
        x0, x1, y0, y1 = begin[chosen], finish[chosen], bottom[chosen], top[chosen]
        corners = np.stack([x0, y0, x0, y1, x1, y1, x1, y0], axis=1).reshape(-1, 4, 2)
        pieces.add_collection(PolyCollection(list(corners), facecolor=color, linewidth=0))
        never = x1 <= x0
        pieces.vlines(x0[never], y0[never], y1[never], color=color, linewidth=1.2)
        pieces.vlines(x0[~never], y0[~never], y1[~never], color="white", linewidth=0.6)
        handles.append(Patch(color=color, label=f"written by {name}"))
    pieces.set(
        xlim=(float(begin.min()), float(finish.max()) + 1e-9), ylim=(extent, 0), xlabel=f"time ({time})",
        ylabel=f"place ({unit})",
    )  # fmt: skip
    pieces.grid(False)
    pieces.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.1, frameon=False)
    return axs
