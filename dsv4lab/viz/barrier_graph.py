"""Who arrives at which barrier, and who waits there."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import EMPTY, INK, hue

Edge = tuple[str, str, int]
_COLUMNS = ((0.0, 31.0), (39.0, 61.0), (69.0, 100.0))  # arriving, barriers, waiting
_HEIGHT = 0.78
_CROWD = 24  # rows from which on a box has one line of text


def plot_barrier_graph(arrivals: Sequence[Edge], waits: Sequence[Edge], *, ax: Axes | None = None) -> Axes:
    """Three columns: what arrives, the barriers, who waits. Line width grows with the logarithm of the count beside it.

    arrivals: (who, barrier, times). waits: (barrier, who, times). Names are shown as they are, wrapped; the barriers keep the
    order in which they are named first. A barrier without an arrival or without a wait has a dashed frame.
    Raises ValueError (nothing to draw, times < 1).
    """
    if not arrivals and not waits:
        raise ValueError("arrivals and waits must not both be empty")
    for name, edges in (("arrivals", arrivals), ("waits", waits)):
        for edge in edges:
            if len(edge) != 3 or int(edge[2]) < 1:
                raise ValueError(f"{name} must hold (from, to, times >= 1), got {edge!r}")
    barriers = list(dict.fromkeys([b for _, b, _ in arrivals] + [b for b, _, _ in waits]))
    left = _ordered([(who, barriers.index(b)) for who, b, _ in arrivals])
    right = _ordered([(who, barriers.index(b)) for b, who, _ in waits])
    rows = max(len(left), len(barriers), len(right))
    ax = one_axes(ax, (11.0, float(np.clip(0.8 + (0.3 if rows > _CROWD else 0.56) * rows, 2.4, 16.0))))
    places = [_spread(names, rows) for names in (left, barriers, right)]
    fed, used = {b for _, b, _ in arrivals}, {b for b, _, _ in waits}
    for column, names in enumerate((left, barriers, right)):
        for name in names:
            index = barriers.index(name) if column == 1 else None
            open_ended = column == 1 and (name not in fed or name not in used)
            color = EMPTY if index is None else hue(index)
            _box(ax, _COLUMNS[column], places[column][name], name, color, open_ended, crowded=rows > _CROWD)
    for who, barrier, times in arrivals:
        start, stop = (_COLUMNS[0][1], places[0][who]), (_COLUMNS[1][0], places[1][barrier])
        _edge(ax, start, stop, times, hue(barriers.index(barrier)), 0.25)
    for barrier, who, times in waits:
        start, stop = (_COLUMNS[1][1], places[1][barrier]), (_COLUMNS[2][0], places[2][who])
        _edge(ax, start, stop, times, hue(barriers.index(barrier)), 0.75)
    for (low, high), text in zip(_COLUMNS, ("arrives", "barrier", "waits"), strict=True):
        ax.text((low + high) / 2, -0.75, text, ha="center", va="bottom", fontsize=10, fontweight="bold", color=INK)
    ax.set(xlim=(-1, 101), ylim=(rows - 0.4, -1.0))
    ax.set_axis_off()
    return ax


def _ordered(edges: Sequence[tuple[str, int]]) -> list[str]:
    """Names by the mean position of the barriers they belong to, so that few lines cross."""
    seen: dict[str, list[int]] = {}
    for name, position in edges:
        seen.setdefault(name, []).append(position)
    return sorted(seen, key=lambda name: float(np.mean(seen[name])))


def _spread(names: Sequence[str], rows: int) -> dict[str, float]:
    step = rows / max(len(names), 1)
    return {name: step * (i + 0.5) - 0.5 for i, name in enumerate(names)}


def _box(ax: Axes, span: tuple[float, float], y: float, text: str, color: str, dashed: bool, *, crowded: bool) -> None:
    low, high = span
    ax.add_patch(
        FancyBboxPatch(
            (low, y - _HEIGHT / 2), high - low, _HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", mutation_aspect=0.1,
            facecolor=color if color == EMPTY else color + "38", edgecolor=INK if dashed else "#999999",
            linestyle="--" if dashed else "-", linewidth=1.4 if dashed else 0.6, zorder=3,
        )
    )  # fmt: skip
    if crowded:
        text = text.replace("\n", ", ")
    width = int((high - low) * 1.45)
    shown = text if crowded else "\n".join(fill(line, width, max_lines=2, placeholder=" ...") for line in text.split("\n")[:2])
    size = 7.2 if crowded else 8.2 if shown.count("\n") < 2 else 6.8
    ax.text((low + high) / 2, y, shown, ha="center", va="center", fontsize=size, color=INK, zorder=4, linespacing=1.1)


def _edge(ax: Axes, start: tuple[float, float], stop: tuple[float, float], times: int, color: str, at: float) -> None:
    (x0, y0), (x1, y1) = start, stop
    middle = (x0 + x1) / 2
    curve = Path([start, (middle, y0), (middle, y1), stop], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    width = 0.9 + 0.7 * np.log2(times)
    ax.add_patch(PathPatch(curve, facecolor="none", edgecolor=color, linewidth=min(width, 5.0), alpha=0.75, zorder=2))
    t = at
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    x = sum(w * p for w, p in zip(weights, (x0, middle, middle, x1), strict=True))
    y = sum(w * p for w, p in zip(weights, (y0, y0, y1, y1), strict=True))
    ax.text(
        x, y, f"{times}", ha="center", va="center", fontsize=7.5, color=INK, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
    )  # fmt: skip
