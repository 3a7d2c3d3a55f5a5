"""What the bytes of a record are, field after field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import CYCLE, EMPTY, INK, text_on

_HUES = (*CYCLE[:6], "#999999")
_LEAST = 0.028  # of the axis: a narrower field has no text


def plot_record_bytes(records: Mapping[str, Sequence[tuple[str, int]]], *, ax: Axes | None = None) -> Axes:
    """A bar for each record, its fields in the order of memory and to scale; the total at the end.

    records: name to (field, bytes) pairs; a field has one colour in all of them, "padding" is pale.
    Raises ValueError (no records or fields, bytes below 1, more than seven fields besides padding).
    """
    if not records or not all(records.values()):
        raise ValueError(f"records must have fields, got {dict(records)}")
    fields = list(dict.fromkeys(name for parts in records.values() for name, _ in parts if name != "padding"))
    if len(fields) > len(_HUES):
        raise ValueError(f"records must have at most {len(_HUES)} fields, got {len(fields)}")
    colors = dict(zip(fields, _HUES, strict=False)) | {"padding": EMPTY}
    least = min(size for parts in records.values() for _, size in parts)
    if least < 1:
        raise ValueError(f"records must have fields of 1 byte or more, got {least}")
    widest = max(sum(size for _, size in parts) for parts in records.values())
    ax = one_axes(ax, (10.0, 1.3 + 0.5 * len(records)))
    for row, parts in enumerate(records.values()):
        left = 0
        for name, size in parts:
            ax.barh(row, size, left=left, height=0.66, color=colors[name], edgecolor="white", linewidth=0.8)
            if size >= _LEAST * widest:
                ax.text(left + size / 2, row, f"{size:,}", ha="center", va="center", fontsize=8, color=text_on(colors[name]))
            left += size
        ax.text(left + 0.01 * widest, row, f"{left:,} B", va="center", fontsize=9, color=INK)
    ax.set(xlim=(0, 1.1 * widest), ylim=(len(records) - 0.5, -0.5), xlabel="byte", ylabel="record")
    ax.set_yticks(np.arange(len(records)), list(records))
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    shown = [name for name in colors if any(name == part for parts in records.values() for part, _ in parts)]
    handles = [Patch(facecolor=colors[name], edgecolor="#BBBBBB", linewidth=0.5, label=name) for name in shown]
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=7,
        frameon=False,
        borderaxespad=0.1,
        columnspacing=1.1,
        handlelength=1.0,
        handletextpad=0.4,
    )
    return ax
