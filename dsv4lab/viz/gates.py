"""How a gated pooling weighs its tokens, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

from dsv4lab.viz._arrays import as_array, require_labels, require_range
from dsv4lab.viz._axes import figure_of, several_axes
from dsv4lab.viz._palette import BLUE, BOUND, sequential


def plot_gates(
    weights: Any, *, tokens: Sequence[str] | None = None, cuts: Sequence[int] = (), title: str = "", axs: Any = None
) -> np.ndarray:
    """Weights of an entry's tokens in each of its channels, and their means beside; equal weights as a line.

    weights (T, C) in [0, 1], adding up to 1 in each channel. tokens: T texts. cuts: token rows before which a line is drawn.
    Returns 2 Axes. Raises ValueError (shapes, range, sums off by 1e-3), TypeError (dtypes).
    """
    shares = as_array("weights", weights, "T,C")
    count, channels = shares.shape
    require_range("weights", shares, 0.0, 1.0, slack=1e-6)
    off = float(np.abs(shares.sum(axis=0) - 1).max())
    if not off <= 1e-3:
        raise ValueError(f"weights must add up to 1 in every channel, got a sum off by {off:g}")
    texts = require_labels("tokens", tokens, count)
    height = float(np.clip(1.5 + 0.2 * count, 2.8, 4.4))
    axs = several_axes(axs, 1, 2, (10.0, height), sharey=True, width_ratios=(5, 1.2))
    norm = PowerNorm(0.5, 0.0, max(float(shares.max()), 1 / count))  # many tokens: most weights are small
    image = axs[0].imshow(shares, cmap=sequential(), norm=norm, aspect="auto", interpolation="nearest")
    for cut in cuts:
        axs[0].axhline(cut - 0.5, color="white", linewidth=2.5)
    axs[0].set(xlabel=f"channel (of {channels})", ylabel="token")
    if title:
        axs[0].set_title(title)
    if texts is None:
        axs[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axs[0].set_yticks(np.arange(count), texts)
    axs[1].barh(np.arange(count), shares.mean(axis=1), height=0.8, color=BLUE)
    axs[1].axvline(1 / count, color=BOUND, linewidth=1.2, label=f"equal: {1 / count:.3g}")
    axs[1].set_xlabel("mean weight")
    axs[1].set_xlim(left=0)
    axs[1].tick_params(axis="y", length=0)
    axs[1].legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0.1)
    for ax in axs:
        ax.grid(False)
    figure_of(axs[0]).colorbar(image, ax=axs[0], label="weight (square-root scale)", pad=0.01, fraction=0.05)
    return axs
