"""Compile-time choices of the kernel that unpacks what a call's queries see. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.kernels.cache.plan import WARP, KeyPlan

WARPS = 32
THREADS = WARPS * WARP  # of a CTA, one a multiprocessor: each reads all positions, so few large ones; a thread a sequence
MAX_SEQS = THREADS
GROUP = 8  # rows that attention has next to each other, and copies together where they are in line


def rows_in_line(queries: int, rings: int, *, ring_len: int, entries: int) -> int:
    """Most rows that sequences in line take, whatever their queries' positions. entries: most of a sequence."""
    near, far = (-(-count // GROUP) * GROUP for count in (ring_len + GROUP - 1, entries))
    return min(rings, queries) * (near + far)


@dataclass(frozen=True)
class UnpackConfig:
    """window, entries: the keys of either pool, packed ones of equal records; entries None where there are none. line: rows
    stand one sequence after another; then they may be plain ones. quads: in line, dims 8 t + 2 i and the next of every 32 stand
    at 8 i + 2 t, t and i below 4: where `wgmma` has what the four lanes of a row have eight next to each other.
    """

    window: KeyPlan
    entries: KeyPlan | None
    line: bool = False
    quads: bool = False

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.quads and not self.line:
            raise ValueError("quads must be false for rows that are not in line, got True")
        for name, key in (("window", self.window), ("entries", self.entries)):
            if key is None:
                continue
            key.check()
            if key.kind != "kv" or (key.record == "plain" and not self.line):
                raise ValueError(f"{name} must be packed kv keys, got {key.kind} keys as {key.record!r}")
            if (key.record, key.dim) != (self.window.record, self.window.dim):
                raise ValueError(
                    f"entries must be as the window's keys, {self.window.record!r} of {self.window.dim}, "
                    f"got {key.record!r} of {key.dim}"
                )
