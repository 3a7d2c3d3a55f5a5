"""How evenly shared-memory accesses use the banks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv4lab.viz._arrays import as_array, require_labels, require_range
from dsv4lab.viz._axes import figure_of, several_axes
from dsv4lab.viz._palette import BLUE, BOUND, INK, VERMILION, sequential


def plot_bank_conflicts(words: Any, passes: Any, phases: Any, labels: Sequence[str], *, axs: Any = None) -> np.ndarray:
    """A row for each access instruction: left, the words a bank serves in a phase; right, passes against the least possible.

    words (I, B): words served by each bank. passes, phases (I,): of all executions together; phases is what an access without
    conflicts takes. labels: I names. Returns 2 Axes (map, bars).
    Raises ValueError (shapes, passes < phases), TypeError (dtypes).
    """
    served = as_array("words", words, "I,B")
    rows, banks = served.shape
    taken, least = (as_array(name, v, "I", shape=(rows,)) for name, v in (("passes", passes), ("phases", phases)))
    names = require_labels("labels", labels, rows) or []
    require_range("words", served, 0, np.inf)
    require_range("phases", least, 1, np.inf)
    if (taken < least).any():
        first = int(np.flatnonzero(taken < least)[0])
        raise ValueError(f"passes must be >= phases, got {taken[first]:g} < {least[first]:g} for {names[first]}")
    axs = several_axes(axs, 1, 2, (11.0, float(np.clip(1.5 + 0.3 * rows, 2.4, 9.0))), width_ratios=(2.2, 1.0), sharey=True)
    table, bars = axs
    share = served / least[:, None]
    image = table.imshow(
        np.where(served > 0, share, np.nan),
        cmap=sequential(),
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=max(2.0, float(share.max())),
    )
    table.set(xlabel="bank", ylabel="access", xticks=range(0, banks, 4))
    table.set_yticks(range(rows), names)
    table.tick_params(axis="y", labelsize=8)
    table.hlines(np.arange(1, rows) - 0.5, -0.5, banks - 0.5, color="white", linewidth=1.5)
    table.grid(False)
    figure_of(table).colorbar(image, ax=table, label="words a phase", pad=0.02)
    degree = taken / least
    place = np.arange(rows)
    bars.barh(place, degree, height=0.6, color=[VERMILION if d > 1.005 else BLUE for d in degree])
    bars.axvline(1, color=BOUND, linewidth=1.2, linestyle="--")
    for row, value in enumerate(degree):
        text = f"{taken[row]:.0f} of {least[row]:.0f}" if value > 1.005 else f"{taken[row]:.0f}"
        bars.text(value + 0.02 * max(degree.max(), 1), row, text, va="center", fontsize=8, color=INK)
    bars.set(xlim=(0, 1.5 * float(degree.max())), xlabel="passes / fewest possible")
    bars.tick_params(axis="y", length=0, labelleft=False)
    bars.grid(False, axis="y")
    return axs
