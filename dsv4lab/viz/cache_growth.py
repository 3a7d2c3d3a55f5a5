"""What a cache takes as a sequence grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from dsv4lab.viz._arrays import as_array, as_series, require_finite, require_positive
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BOUND, dash, hue

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def plot_cache_growth(
    tokens: Any, sizes: Mapping[str, Any], *, marks: Mapping[str, float] | None = None, ax: Axes | None = None
) -> Axes:
    """Bytes against tokens, on log axes, a line for each way to keep them; the last size is in the legend.

    tokens (n,) > 0. sizes: name to (n,) bytes > 0. marks: name to a number of bytes, drawn as a line.
    Raises ValueError (shapes, not positive, not finite), TypeError (dtypes).
    """
    at = as_array("tokens", tokens, "n")
    series = as_series("sizes", sizes, "n")
    for name, values in (("tokens", at), *((f"sizes[{n!r}]", v) for n, v in series.items())):
        as_array(name, values, "n", shape=at.shape)
        require_finite(name, values)
        if values.min() <= 0:
            raise ValueError(f"{name} must be > 0, got {values.min():g}")
    for name, size in (marks or {}).items():
        require_positive(f"marks[{name!r}]", size)
    ax = one_axes(ax, (9.0, 4.0))
    for index, (name, values) in enumerate(series.items()):
        ax.plot(at, values, color=hue(index), linestyle=dash(index), label=f"{name}: {_size(values[-1])}")
    for name, size in (marks or {}).items():
        ax.axhline(size, color=BOUND, linewidth=1.4)
        ax.annotate(f"{name}: {_size(size)}", (0.01, size), xycoords=("axes fraction", "data"), va="bottom", fontsize=8.5)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _size(v)))
    ax.set(xlabel="tokens of the sequence", ylabel="memory (bytes)")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title=f"at {at[-1]:,.0f} tokens")
    return ax


def _size(value: float) -> str:
    scale, unit = next(u for u in _UNITS if np.isclose(value, u[0]) or value >= u[0] or u[0] == 1.0)
    return f"{value / scale:.3g} {unit}"
