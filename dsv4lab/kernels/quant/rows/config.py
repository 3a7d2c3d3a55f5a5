"""Compile-time choices of the row quantisers, and which to take for a shape. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

CHUNK = 16  # values that a thread handles at a time: an NVFP4 block, 32 bytes of BF16
WARP = 32
MAX_THREADS = 1024
_CTA_THREADS = 256  # of a CTA of several rows
_FEW_ROWS = 1056  # eight a multiprocessor of an H100 or H200: a CTA of four rows would leave some with one
SOURCES = ("x", "norm", "swiglu")
OUTS = ("nvfp4", "mxfp4", "fp8", "same", "amax")
ELEMENTS = ("bf16", "f32")
# Chunks of a thread. Four share the costs of a thread and leave room for 24 warps a multiprocessor (80 registers). Two where
# a chunk takes more registers than its words: of float32, decoded values, and of SwiGLU, which has two inputs.
_CHUNKS, _CHUNKS_HELD = 4, 2
_MOST_CHUNKS = 8
_BARRIERS = 15  # of a CTA, besides its usual one
_RESIDENT = 768  # threads of NVFP4 a multiprocessor of Hopper: 80 registers each, 107 to 122 where the compiler is free
# Norms that stream: two chunks need fewer registers, and half the code. Threads of a CTA, where rows are short, and of a
# multiprocessor. To NVFP4 a row has four warps at most, and of more than two whole ones, if it can; with more chunks there are
# more registers (H200, 8192 rows): 26.0 us of 4096 values, 43.6 of 7168 by 64 threads with seven, by 224 with two 44.9.
_NORM_CHUNKS, _NORM_CTA = 2, {"nvfp4": 128, "fp8": _CTA_THREADS}
_NORM_RESIDENT, _NORM_RESIDENT_MORE = {"nvfp4": 896, "fp8": 1024}, 512


@dataclass(frozen=True)
class RowsConfig:
    """source: what is quantised: "x" itself, its RMS "norm", or "swiglu" of two inputs. element: of them, "bf16" or "f32".
    out: codes of "nvfp4", "mxfp4", "fp8"; "same", no codes but the source's values; "amax", NVFP4's global scale alone.
    decoded: instead of codes, code * block scale in BF16. group: values that share a block scale.
    scale: NVFP4's global scale: "one" given, or "many" for equal runs of rows; "row", one a row from its amax.
    tiles: block scales go to atom128x4 tiles, not to a matrix. weight: element of the norm's weight.
    weighted: rows of "swiglu" have a factor.
    threads: of a row, each with `chunks` chunks of 16 values. rows: of a CTA. full: a row has exactly threads * chunks chunks.
    streams: on Hopper, a CTA of NVFP4 with one global scale, or of a norm's FP8, goes on from rows to rows. resident: threads
    that a multiprocessor of Hopper has room for, at least, which bounds their registers.
    ragged: K is not a multiple of 16, values are moved one by one.
    """

    source: str
    element: str
    out: str
    threads: int
    chunks: int
    rows: int
    group: int = CHUNK
    scale: str = ""
    full: bool = False
    ragged: bool = False
    decoded: bool = False
    tiles: bool = False
    weight: str = "bf16"
    weighted: bool = False
    streams: bool = False
    resident: int = _RESIDENT

    @property
    def reduces(self) -> bool:
        """Whether the threads of a row have something to agree on."""
        return self.source == "norm" or self.scale == "row"

    @property
    def apart(self) -> bool:
        """Whether rows have warps, and barriers, of their own."""
        return self.threads % WARP == 0 and self.rows <= _BARRIERS

    @property
    def keeps(self) -> bool:
        """Whether a CTA keeps the norm's weights in shared memory, as float32; not for one row, which would wait for it."""
        return self.source == "norm" and self.streams and self.chunks > 1

    @property
    def lanes(self) -> int:
        """Neighbouring lanes of one row, a power of two: a warp or, where rows meet in one, a part of it."""
        return min(self.threads & -self.threads, WARP)

    @property
    def words(self) -> int:
        """32-bit words of a chunk of x."""
        return CHUNK // 2 if self.element == "bf16" else CHUNK

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        for name, value, known in (
            ("source", self.source, SOURCES),
            ("element", self.element, ELEMENTS),
            ("out", self.out, OUTS),
            ("weight", self.weight, ELEMENTS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        groups = {"nvfp4": (16,), "mxfp4": (32,), "fp8": (64, 128)}.get(self.out, (CHUNK,))
        if self.group not in groups:
            raise ValueError(f"group of {self.out} must be {' or '.join(map(str, groups))}, got {self.group}")
        scales = ("one", "many", "row") if self.out == "nvfp4" else ("",)
        if self.scale not in scales:
            raise ValueError(f"scale of {self.out} must be one of {scales}, got {self.scale!r}")
        unit = _unit(self.reduces and self.threads > WARP, self.scale)
        if not 8 <= self.threads <= MAX_THREADS or self.threads % unit:
            raise ValueError(f"threads must be a multiple of {unit} from 8 to {MAX_THREADS}, got {self.threads}")
        if self.reduces and WARP % self.threads and self.threads < WARP:
            raise ValueError(f"threads must divide {WARP} or be more where rows are summed up, got {self.threads}")
        if self.rows < 1 or self.threads * self.rows > MAX_THREADS or self.threads * self.rows % WARP:
            raise ValueError(f"rows must fill warps and fit {MAX_THREADS} threads, got {self.rows} of {self.threads} threads")
        if self.ragged and self.out not in ("fp8", "same"):
            raise ValueError(f"out must be fp8 or same where K % {CHUNK} != 0, got {self.out}")
        if self.tiles and (self.out not in ("nvfp4", "mxfp4") or self.decoded):
            raise ValueError(f"tiles are for codes of nvfp4 and mxfp4, got {self.out}")
        simple = self.scale == "one" or (self.out == "fp8" and self.source == "norm")
        warps = self.source == "norm" or self.threads % WARP == 0  # each has chunks of one row
        if self.streams and not (simple and self.full and self.element == "bf16" and not self.decoded and warps):
            raise ValueError(
                "streams must be False but for codes of nvfp4, one global scale, or fp8 of norms, full rows of bf16, "
                "of SwiGLU by whole warps"
            )
        if self.resident < 1:
            raise ValueError(f"resident must be at least 1, got {self.resident}")
        if self.chunks < 1:
            raise ValueError(f"chunks must be at least 1, got {self.chunks}")


def for_shape(m: int, k: int, *, source: str, element: str, out: str, **rest: str | int) -> RowsConfig:
    """The configuration for m rows of k values; rest: the fields that say what is computed.

    Few rows: one chunk a thread and one row a CTA, since only latency counts. Many: a few chunks a thread, whose loads are all
    under way together, and up to 256 threads a CTA. Among the splits that leave the fewest threads without a chunk, the one
    nearest to the number of chunks wanted is taken, for NVFP4 norms one of few threads first.
    """
    return _choose(m < _FEW_ROWS, k, source, element, out, tuple(sorted(rest.items())))


@cache
def _choose(few: bool, k: int, source: str, element: str, out: str, fields: tuple[tuple[str, str | int], ...]) -> RowsConfig:
    rest: dict[str, Any] = dict(fields)
    total = -(-k // CHUNK)
    if rest.get("tiles"):  # threads fill the last tile's columns, too
        columns = 4 * rest.get("group", CHUNK) // CHUNK
        total = -(-total // columns) * columns
    reduces = source == "norm" or rest.get("scale") == "row"
    held = element == "f32" or rest.get("decoded") or source == "swiglu"
    simple = rest.get("scale") == "one" or (out == "fp8" and source == "norm" and not few)
    simple = simple and element == "bf16" and not rest.get("decoded")
    normed = simple and source == "norm" and not few
    lean = normed and out == "nvfp4"
    many = _NORM_CHUNKS if normed else _CHUNKS_HELD if held else _CHUNKS
    least = -(-total // MAX_THREADS)
    splits = []
    for chunks in range(least, max(least, 1 if few else _MOST_CHUNKS) + 1):
        threads = _threads(-(-total // chunks), reduces, str(rest.get("scale", "")))
        if threads <= MAX_THREADS:
            unlike = lean and (threads > _NORM_CTA[out] or (threads > 2 * WARP and threads % WARP > 0))
            splits.append((threads * chunks - total, unlike, abs(chunks - (1 if few else many)), threads, chunks))
    waste, _, _, threads, chunks = min(splits)
    fill = next(r for r in (1, 2, 4) if threads * r % WARP == 0)  # rows that fill warps
    rows = fill if few else max((_NORM_CTA[out] if normed else _CTA_THREADS) // threads // fill * fill, fill)
    full = waste == 0 and total * CHUNK == k
    # x itself: registers of the next row were spilled, and waited for
    streams = simple and full and (source == "norm" or (source == "swiglu" and threads % WARP == 0))
    if streams and normed:
        resident = _NORM_RESIDENT_MORE if lean and chunks > _NORM_CHUNKS else _NORM_RESIDENT[out]
        rest |= dict(resident=resident // (threads * rows) * threads * rows)
    config = RowsConfig(source, element, out, threads, chunks, rows, full=full, ragged=k % CHUNK != 0, streams=streams, **rest)
    config.check()
    return config


def _threads(wanted: int, reduces: bool, scale: str) -> int:
    """The next number of threads that a row may have."""
    if not reduces or wanted > WARP:
        unit = _unit(reduces, scale)
        return -(-wanted // unit) * unit
    return next(t for t in (8, 16, 32) if t >= wanted)


def _unit(reduces: bool, scale: str) -> int:
    """What the number of a row's threads is a multiple of. Halves of a warp may sum up two rows of one global scale."""
    if not reduces:
        return 8
    return WARP // 2 if scale == "one" else WARP
