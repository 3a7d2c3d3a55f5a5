"""Bytes that a kernel moves against the fewest that it could."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_array, require_labels, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BOUND, INK, hue


def plot_traffic(
    moved: Mapping[str, Any], least: Any, labels: Sequence[str], *, unit: str = "KiB", ax: Axes | None = None
) -> Axes:
    """A bar for each tensor, stacked by who moves its bytes; a black mark where each byte counts once, and the ratio.

    moved: who to (n,) amounts in `unit`. least (n,): each byte touched counted once. labels: n names.
    Raises ValueError (shapes, negative amounts), TypeError (dtypes).
    """
    if not moved:
        raise ValueError("moved must not be empty, got an empty mapping")
    once = as_array("least", least, "n")
    parts = {who: as_array(f"moved[{who!r}]", v, "n", shape=once.shape) for who, v in moved.items()}
    names = require_labels("labels", labels, len(once)) or []
    for name, values in (("least", once), *parts.items()):
        require_range(name, values, 0, np.inf)
    ax = one_axes(ax, (8.5, float(np.clip(1.4 + 0.42 * len(once), 2.2, 8.0))))
    left = np.zeros(len(once))
    place = np.arange(len(once))
    for index, (who, values) in enumerate(parts.items()):
        ax.barh(place, values, left=left, height=0.6, color=hue(index), label=who)
        left += values
    ax.vlines(once, place - 0.38, place + 0.38, color=BOUND, linewidth=2.2, label="each byte once")
    reach = max(float(left.max()), float(once.max()), 1e-12)
    for row, (total, floor) in enumerate(zip(left, once, strict=True)):
        text = f"{total:.4g} {unit}, {total / floor:.3g}x" if floor else f"{total:.4g} {unit}"
        ax.text(max(total, floor) + 0.015 * reach, row, text, va="center", fontsize=8.5, color=INK)
    ax.set(xlim=(0, 1.28 * reach), ylim=(len(once) - 0.4, -0.6), xlabel=f"moved ({unit})", ylabel="tensor")
    ax.set_yticks(place, names)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.1, frameon=False)
    return ax
