"""Legal orders of execution: which warp goes on, and when an asynchronous operation takes effect.

eager   every asynchronous operation happens when it is issued, warps that run in step are executed together
lazy    an asynchronous operation happens only when no warp can go on without it
random  a seeded choice at every step between the warps that can run and the operations that are pending
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

KINDS = ("eager", "lazy", "random")


@dataclass
class Schedule:
    """One order of execution, fixed by its kind and, for random ones, its seed."""

    kind: str = "eager"
    seed: int = 0
    batch: bool = True  # run convergent warps of a CTA together; random schedules never do
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule must be one of {', '.join(KINDS)}, got {self.kind!r}")
        self.batch = self.batch and self.kind != "random"
        self.restart()

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """ "eager", "lazy" or "random:SEED"."""
        kind, _, seed = text.partition(":")
        return cls(kind, int(seed or 0))

    def __str__(self) -> str:
        return f"random:{self.seed}" if self.kind == "random" else self.kind

    def restart(self) -> None:
        """Begin again, so that the next launch meets the same choices."""
        self._random = random.Random(self.seed)

    def below(self, limit: int) -> int:
        """A choice from 0 .. limit - 1."""
        return self._random.randrange(limit)

    def chance(self, probability: float) -> bool:
        return self.kind == "random" and self._random.random() < probability

    def quantum(self) -> int:
        """Blocks of instructions that a warp may run before another gets its turn."""
        if self.kind != "random":
            return 2_000
        return 1 + int(self._random.expovariate(1 / 12))
