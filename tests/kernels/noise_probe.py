"""A kernel that only makes noise: the device functions of the sampler on given words.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Uint32

from dsv4lab.kernels._common.order import image, value_of
from dsv4lab.kernels.head.sampler import noise

THREADS = 128


@cute.kernel
def _probe(words: Any, uniform: Any, exponential: Any, gumbel: Any, philox: Any, back: Any) -> None:
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * THREADS + thread
    if i < words.shape[0]:
        word = Uint32(words[i])
        w = noise.uniform(word)
        uniform[i], exponential[i], gumbel[i] = w, noise.exponential(w), noise.gumbel(word)
        back[i] = value_of(image(noise.from_bits(word)))
        four = noise.words(word, (Uint32(words[0]), word), (word, Uint32(words[1])), noise.RESIDUAL)
        for j in cutlass.range_constexpr(noise.GROUP):
            philox[i, j] = four[j]


@cute.jit
def probe(words: Any, uniform: Any, exponential: Any, gumbel: Any, philox: Any, back: Any) -> None:
    """words (N,) u32 -> uniform, exponential, gumbel (N,) f32 of them; philox (N, 4) u32 of counters and keys made of them;
    back (N,) f32, the words as floats to their images and back."""
    grid = [cute.ceil_div(words.shape[0], THREADS), 1, 1]
    _probe(words, uniform, exponential, gumbel, philox, back).launch(grid=grid, block=[THREADS, 1, 1])
