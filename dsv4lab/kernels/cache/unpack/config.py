"""Compile-time choices of the kernel that unpacks what a call's queries see. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.kernels.cache.plan import WARP, KeyPlan

WARPS = 32
THREADS = WARPS * WARP  # of a CTA, one a multiprocessor: each reads all positions, so few large ones; a thread a sequence
MAX_SEQS = THREADS


@dataclass(frozen=True)
class UnpackConfig:
    """window, entries: the keys of either pool, packed ones of equal records; entries None where there are none."""

    window: KeyPlan
    entries: KeyPlan | None

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        for name, key in (("window", self.window), ("entries", self.entries)):
            if key is None:
                continue
            key.check()
            if key.kind != "kv" or key.record == "plain":
                raise ValueError(f"{name} must be packed kv keys, got {key.kind} keys as {key.record!r}")
            if (key.record, key.dim) != (self.window.record, self.window.dim):
                raise ValueError(
                    f"entries must be as the window's keys, {self.window.record!r} of {self.window.dim}, "
                    f"got {key.record!r} of {key.dim}"
                )
