"""Pairs of numbers as arrows in their planes: what a rotation does to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Circle

from dsv4lab.viz._arrays import as_array, as_series, require_finite, require_labels
from dsv4lab.viz._axes import several_axes
from dsv4lab.viz._palette import dash, hue


def plot_pair_planes(
    vectors: Mapping[str, Any], titles: Sequence[str], *, words: tuple[str, str] = ("even dim", "odd dim"), axs: Any = None
) -> np.ndarray:
    """A plane for each pair, an arrow for each series, on a circle of the first one's length.

    vectors: series name to (n, 2). titles: n names. words: what the two numbers are.
    Returns n Axes. Raises ValueError (shapes, not finite, more than 8 pairs), TypeError (dtypes).
    """
    series = as_series("vectors", vectors, "n,2")
    first = next(iter(series.values()))
    pairs = len(first)
    for name, values in series.items():
        as_array(f"vectors[{name!r}]", values, "n,2", shape=(pairs, 2))
        require_finite(f"vectors[{name!r}]", values)
    if pairs > 8:
        raise ValueError(f"vectors must have at most 8 pairs, got {pairs}")
    names = require_labels("titles", titles, pairs) or []
    axs = several_axes(axs, 1, pairs, (2.1 * pairs + 2.2, 2.7))
    for pair, ax in enumerate(axs):
        reach = 1.12 * max(float(np.linalg.norm(values[pair])) for values in series.values()) or 1.0
        ax.add_patch(Circle((0, 0), float(np.linalg.norm(first[pair])), fill=False, edgecolor="#BBBBBB", linewidth=0.8))
        for index, (name, values) in enumerate(series.items()):
            x, y = values[pair]
            line = dict(color=hue(index), linestyle=dash(index), linewidth=2.4 - 0.4 * index)
            ax.plot([0, x], [0, y], label=name, marker="o", markersize=5, markevery=[1], **line)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel=words[0])
        ax.set_title(names[pair], fontsize=9.5)
        ax.set_xticks([0])
        ax.set_yticks([0])
    axs[0].set_ylabel(words[1])
    axs[-1].legend(loc="center left", bbox_to_anchor=(1.03, 0.5), frameon=False)
    return axs
