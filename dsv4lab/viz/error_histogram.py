"""Distribution of errors over many decades."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_series, require_finite
from dsv4lab.viz._axes import label_log, one_axes
from dsv4lab.viz._palette import dash, hue

_TAIL = 1e-3  # this share of the smallest errors goes into the first bin, so that one of them cannot stretch the axis


def plot_error_histogram(
    errors: Any,
    *,
    relative: bool = False,
    unit: str = "",
    quantiles: Sequence[float] = (0.5, 0.99),
    num_bins: int = 60,
    ax: Axes | None = None,
) -> Axes:
    """Histogram of |error| with logarithmic bins; quantiles and the maximum are marked, exact zeros are counted apart.
    The smallest 0.1 % share the first bin.

    errors: mapping of series name to an array of any shape, or one array. relative: errors are ratios (drawn without
    unit); otherwise `unit` names theirs. quantiles in [0, 1]. num_bins over the whole range.
    Raises ValueError (empty, not finite, quantile outside [0, 1]), TypeError (dtypes).
    """
    series = {name: np.abs(v).ravel() for name, v in as_series("errors", errors).items()}
    for name, values in series.items():
        require_finite(f"errors[{name!r}]" if name else "errors", values)
    if any(not 0 <= q <= 1 for q in quantiles):
        raise ValueError(f"quantiles must lie in [0, 1], got {tuple(quantiles)}")
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins}")

    ax = one_axes(ax, (8.0, 3.6))
    positive = np.concatenate([v[v > 0] for v in series.values()])
    top = float(positive.max()) if positive.size else 1.0
    low = float(np.quantile(positive, _TAIL)) if positive.size else 0.1
    edges = np.geomspace(low, top * 1.0001 if top > low else low * 10, num_bins + 1)
    for i, (name, values) in enumerate(series.items()):
        nonzero = np.clip(values[values > 0], edges[0], edges[-1])
        share = np.histogram(nonzero, edges)[0] * (100.0 / values.size)
        zeros = 100.0 * np.count_nonzero(values == 0) / values.size
        label = (name or "errors") + (f", {zeros:.3g} % exact" if zeros else "")
        ax.stairs(share, edges, color=hue(i), linestyle=dash(i), linewidth=1.5, label=label)
        ax.stairs(share, edges, color=hue(i), fill=True, alpha=0.15, linewidth=0)
        for rank, q in enumerate(quantiles):
            at = float(np.quantile(values, q))
            if at > 0:
                line = ("-", "--", "-.", ":")[rank % 4]
                mark = f"{100 * q:g} % below {at:.2g}"
                ax.axvline(at, color=hue(i), linewidth=1.0, linestyle=line, alpha=0.9, label=mark)
        if values.max() > 0:  # a log axis has no zero
            top_label = f"max {values.max():.2g}"
            ax.plot(values.max(), 0, marker="v", color=hue(i), clip_on=False, linestyle="none", label=top_label)
    ax.set_xscale("log")
    label_log(ax.xaxis, edges[0], edges[-1])
    kind = "relative error (no unit)" if relative else f"absolute error ({unit or 'units of the value'})"
    ax.set(xlabel=kind, ylabel="share of values per bin (%)")
    ax.set_ylim(bottom=0)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return ax
