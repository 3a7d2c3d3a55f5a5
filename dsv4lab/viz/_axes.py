"""What figures share on the drawing side: axes, ticks through depth, marks in cells, labels that do not collide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

from dsv4lab.viz._palette import INK, hue


def one_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The caller's Axes, or that of a new figure of `size` inches."""
    if ax is not None:
        return ax
    return plt.subplots(figsize=size, layout="constrained")[1]


def several_axes(axs: Any, rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> np.ndarray:
    """A flat array of rows * columns Axes: the caller's, or those of a new figure of `size` inches."""
    if axs is None:
        figure = plt.figure(figsize=size, layout="constrained")
        return figure.subplots(rows, columns, squeeze=False, **kwargs).ravel()
    given = np.asarray(axs, dtype=object).ravel()
    if len(given) < rows * columns:
        raise ValueError(f"axs must hold {rows * columns} Axes, got {len(given)}")
    return given[: rows * columns]


def figure_of(ax: Axes) -> Figure:
    """The top figure an Axes belongs to."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("ax must belong to a figure, got an Axes that was removed")
    return figure


def depth_ticks(ax: Axes, count: int, names: Sequence[str] | None, *, axis: str = "x", most: int = 16) -> None:
    """Ticks at layers: every layer by name where that fits, else whole numbers."""
    target = ax.xaxis if axis == "x" else ax.yaxis
    if names is None:
        target.set_major_locator(MaxNLocator(integer=True, nbins=min(most, max(count, 2)), min_n_ticks=1))
        return
    step = -(-count // most)
    shown = range(0, count, step)
    target.set_major_locator(FixedLocator(list(shown)))
    target.set_ticklabels([names[i] for i in shown])
    if axis == "x" and len(shown) > 1 and max(len(names[i]) for i in shown) * len(shown) > 80:
        plt.setp(ax.get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")


def spread_line(ax: Axes, x: np.ndarray, values: np.ndarray, index: int, label: str | None, **line: Any) -> None:
    """One line through depth: values (L,) as they are, (L, T) as the median with the 5-95 % band."""
    options = {"color": hue(index), "label": label, "marker": "o", "markersize": 3.5 if len(x) < 30 else 0} | line
    if values.ndim == 1:
        ax.plot(x, values, **options)
        return
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95), axis=1)
    ax.plot(x, middle, **options)
    ax.fill_between(x, low, high, color=options["color"], alpha=0.18, linewidth=0)


def cell_marks(ax: Axes, mask: np.ndarray, label: str, *, x0: float = 0.0, y0: float = 0.0, dx: float = 1.0) -> None:
    """A dot in every cell of a (rows, columns) image where `mask` holds, sized to the cell."""
    rows, columns = np.nonzero(mask)
    box = ax.get_window_extent()
    cell = min(box.width / mask.shape[1], box.height / mask.shape[0]) * 72 / figure_of(ax).dpi
    side = float(np.clip(0.42 * cell, 2.4, 6.0))
    ax.scatter(
        x0 + columns * dx, y0 + rows, s=side**2, facecolor="white", edgecolor=INK, linewidth=min(0.8, side / 5), label=label,
    )  # fmt: skip


def place_labels(
    ax: Axes, points: np.ndarray, texts: Sequence[str], colors: Sequence[str], *, avoid: np.ndarray, size: float = 8.5
) -> None:
    """Write one text near each point (n, 2), each on the free side: greedy, by pixel boxes.

    avoid (m, 2): samples of lines that texts should stay off, in data units. Call it last, when limits and scales stand.
    """
    figure = figure_of(ax)
    figure.draw_without_rendering()
    frame = ax.get_window_extent()
    unit = figure.dpi / 72
    pixels = ax.transData.transform(points)
    edge = (frame.x0, frame.y0, frame.x1, frame.y1)
    taken = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in pixels]
    taken += [(x - 2 * unit, y - 2 * unit, x + 2 * unit, y + 2 * unit) for x, y in ax.transData.transform(avoid)]
    legend = ax.get_legend()
    if legend is not None:
        area = legend.get_window_extent()
        taken.append((area.x0, area.y0, area.x1, area.y1))
    for (x, y), point, text, color in zip(pixels, points, texts, colors, strict=True):
        lines = text.split("\n")
        width = max(len(line) for line in lines) * size * 0.62 * unit
        height = len(lines) * size * 1.35 * unit
        best: tuple[float, float, float, tuple[float, float, float, float]] | None = None
        for reach in (7, 15, 26, 40):
            for ux, uy in ((1, 0), (0, -1), (0, 1), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1)):
                cx = x + ux * (reach * unit + width / 2)
                cy = y + uy * (reach * unit + height / 2)
                box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                outside = width * height - _overlap(box, edge)
                cost = 4 * outside + 4 * sum(_overlap(box, other) for other in taken) + 3 * reach * unit
                if best is None or cost < best[0]:
                    best = (cost, (cx - x) / unit, (cy - y) / unit, box)
        assert best is not None  # the candidate list is never empty
        taken.append(best[3])
        far = abs(best[1]) - width / unit / 2 > 10 or abs(best[2]) - height / unit / 2 > 10
        ax.annotate(
            text, point, xytext=best[1:3], textcoords="offset points", ha="center", va="center", fontsize=size, color=color,
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.7} if far else None,
        )  # fmt: skip


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Shared area of two boxes (x0, y0, x1, y1)."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def label_log(axis: Axis, least: float, most: float) -> None:
    """Ticks of a logarithmic axis that are labelled once each: 1, 2 and 5 of a decade where there are few decades."""
    if most / least < 30:  # less than a decade and a half: one labelled tick would be too few
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.set_minor_formatter(NullFormatter())
