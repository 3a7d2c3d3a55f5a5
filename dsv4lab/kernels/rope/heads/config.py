"""Compile-time choices of the rotation of heads, and which to take for a shape. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.kernels.quant.rows.config import CHUNK, WARP, RowsConfig

HEAD_DIM = 512  # values of a head
ROPE_DIM = 64  # of them, the last ones, are rotated: a pair for each lane of a warp
PASS_HEADS = 8  # heads that a CTA holds at a time, a warp's worth of chunks each
THREADS = PASS_HEADS * WARP
OUTS = ("same", "fp8", "nvfp4", "amax")
_PASSES = {"bf16": 4, "f32": 2}  # 32 words of a thread are under way together
_MANY_CTAS = 4 * 132  # of an H100 or H200, from which on longer CTAs leave no multiprocessor idle


@dataclass(frozen=True)
class HeadsConfig:
    """out: what becomes of the rotated heads: "same", values of the element; codes of "fp8" or "nvfp4"; "amax", NVFP4's
    global scale alone. element: of x, "bf16" or "f32". norm: heads are normalised and rotated forwards; otherwise
    backwards. passes: times that a CTA takes 8 heads of its token. group: values of an FP8 scale. scale: NVFP4's global scale,
    "one" given, "many", one a token.
    """

    out: str
    element: str
    norm: bool = False
    passes: int = 1
    group: int = CHUNK
    scale: str = ""

    @property
    def rows(self) -> RowsConfig:
        """The row quantiser that encodes a pass: 8 rows of a CTA, one chunk a thread."""
        return RowsConfig(
            "x", self.element, self.out, WARP, HEAD_DIM // (CHUNK * WARP), PASS_HEADS, self.group, self.scale, full=True
        )

    @property
    def heads(self) -> int:
        """Heads of a CTA."""
        return self.passes * PASS_HEADS

    def tasks(self, tokens: int, num_heads: int) -> int:
        """Runs of `heads` heads; none spans two tokens."""
        return tokens * -(-num_heads // self.heads)

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.out not in OUTS:
            raise ValueError(f"out must be one of {', '.join(OUTS)}, got {self.out!r}")
        if self.norm and self.out != "same":
            raise ValueError(f"out must be same for normalised heads, got {self.out!r}")
        if self.passes not in (1, 2, 4):
            raise ValueError(f"passes must be 1, 2 or 4, got {self.passes}")
        self.rows.check()

    @classmethod
    def for_shape(
        cls, tokens: int, num_heads: int, *, out: str, element: str, norm: bool = False, group: int = CHUNK, scale: str = ""
    ) -> HeadsConfig:
        """Four passes (two of float32) where that leaves CTAs enough, so that what a CTA prepares is shared and its loads are
        under way together; fewer for few tokens, which only wait, and for few heads, which would leave passes empty.
        """
        passes = _PASSES[element]
        while passes > 1:
            config = cls(out, element, norm, passes, group, scale)
            if config.tasks(tokens, num_heads) >= _MANY_CTAS and num_heads % config.heads == 0:
                return config
            passes //= 2
        return cls(out, element, norm, 1, group, scale)
