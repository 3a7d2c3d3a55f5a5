"""What the row quantisers quantise: x, its RMS norm or SwiGLU of two inputs, in registers; and what threads of a row agree on.

RMSNorm is `reference.norm`'s, which works in float64 and rounds once: squares are added up in float64, and 1 / rms goes on as
two float32 of which the sum is good to 2^-48, so that x w / rms = fma(x w, high, (x w) low) has one rounding, to float32, with
x w exact for BF16. The result differs from the reference's where the exact one lies within 2^-47 of a rounding boundary. Where
a row is so large or so small that this would over- or underflow, and for float32 rows, products are float64.

SwiGLU is float32: exp2 within 2^-22, exp within 2^-21 (its power's rounding is made up for, up to 2^-22 at -88, from ln 2's
rounding), 1 / (1 + exp) within 2^-23, four more roundings: together less than 2^-20 of the value, or 2^-110 where that
underflows, before it is rounded to BF16.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Float64, Int32, Uint32

from dsv4lab.kernels.quant.rows import encode as enc
from dsv4lab.kernels.quant.rows.config import CHUNK, WARP, RowsConfig

_NEAR = 2.0**80  # mean squares between this and its reciprocal: products of the norm stay normal numbers
_LOG2_E = 1.4426950408889634
_LOG2_E_SHORT = 47274.0 / 2**15  # its first 16 bits
_LN_2 = 0.6931471805599453
_FAR = 88.0  # exp(88) is a float32; exp(-88) is not above float32's smallest normal number


class RowSources:
    """Loads and row-wide sums of `QuantizeRows`. `shared`, `factors` (the norm's weights, where a CTA keeps them) and `columns`
    (K) are set when its kernel begins.
    """

    config: RowsConfig
    shared: Any
    factors: Any
    columns: Any

    def _chunk(self, c: Any, thread: Any) -> Any:
        """The number of a thread's c-th chunk in its row."""
        return c * self.config.threads + thread % self.config.threads

    def _inside(self, chunk: Any) -> Any:
        """Whether a row has this chunk."""
        return Boolean(True) if self.config.full else chunk * CHUNK < self.columns

    def _words(self, held: Any, c: int) -> list[Any]:
        """The words of a thread's c-th chunk."""
        words = self.config.words
        return [held[c * words + i] for i in range(words)]

    # ---- loads -----------------------------------------------------------------------------------------------------------
    @cute.jit
    def _values(self, x: Any, other: Any, row_weight: Any, row: Any, thread: Any, per_column: Any, eps: Any, limit: Any) -> Any:
        """The words of all chunks of a thread; zeros past K where K is ragged, repeated chunks otherwise."""
        config = self.config
        held = self._load(x, row, thread)
        if cutlass.const_expr(config.source == "norm"):
            self._norm(held, x, other, row, thread, per_column, eps)
        elif cutlass.const_expr(config.source == "swiglu"):
            factor = Float32(1.0)
            if cutlass.const_expr(config.weighted):
                factor = row_weight[row]
            second = self._load(other, row, thread)
            self._swiglu(held, second, factor, limit)
        return held

    @cute.jit
    def _load(self, x: Any, row: Any, thread: Any) -> Any:
        config = self.config
        held = cute.make_rmem_tensor((config.chunks * config.words,), Uint32)
        for c in cutlass.range_constexpr(config.chunks):
            self._load_chunk(cute.local_tile(held, (config.words,), (c,)), x, row, self._chunk(c, thread), config.element)
        return held

    @cute.jit
    def _load_chunk(self, target: Any, x: Any, row: Any, chunk: Any, element: cutlass.Constexpr) -> None:
        if cutlass.const_expr(self.config.ragged):
            parts = []
            for i in cutlass.range_constexpr(CHUNK):
                column = chunk * CHUNK + i
                part = Uint32(x[row, cutlass.min(column, self.columns - 1)])
                parts.append(part if column < self.columns else Uint32(0))
            if cutlass.const_expr(element == "bf16"):
                parts = [parts[i] | (parts[i + 1] << 16) for i in range(0, CHUNK, 2)]
            for i in cutlass.range_constexpr(len(parts)):
                target[i] = parts[i]
        else:
            at = chunk
            if cutlass.const_expr(not self.config.full):
                at = cutlass.min(chunk, self.columns // CHUNK - 1)
            words = CHUNK // 2 if element == "bf16" else CHUNK
            cute.autovec_copy(cute.local_tile(x[row, None], (words,), (at,)), target)

    # ---- norm ------------------------------------------------------------------------------------------------------------
    @cute.jit
    def _norm(self, held: Any, x: Any, weight: Any, row: Any, thread: Any, per_column: Any, eps: Any) -> None:
        config = self.config
        square = self._mean_square(held, thread, per_column, eps)
        near = self._near(square)
        if near:
            high, low = _split(_rsqrt64(square))
            for c in cutlass.range_constexpr(config.chunks):
                factors = enc.floats(self._factors(weight, c, thread), config.weight)
                words = self._scaled_words(self._words(held, c), factors, high, low)
                for i in cutlass.range_constexpr(config.words):
                    held[c * config.words + i] = words[i]
        else:
            inverse = self._root(square)
            for c in cutlass.range_constexpr(config.chunks):
                words = self._far_words(x, weight, row, c, thread, inverse)
                for i in cutlass.range_constexpr(config.words):
                    held[c * config.words + i] = words[i]

    def _mean_square(self, held: Any, thread: Any, per_column: Any, eps: Any, parity: Any = None) -> Any:
        """The mean square of a row, eps added."""
        total = self._sum_of_squares(held, thread)
        return self._over_row_f64(total, thread, parity) * per_column + eps

    def _sum_of_squares(self, held: Any, thread: Any) -> Any:
        """Those of a thread."""
        config = self.config
        strands: list[Any] = []
        for c in range(config.chunks):
            words = self._words(held, c)
            if not config.full:
                inside = self._inside(self._chunk(c, thread))
                words = [Uint32(cutlass.select_(inside, word, Uint32(0))) for word in words]
            strands = _squares(_wide(words, config.element, apart=True), strands)
        return (strands[0] + strands[1]) + (strands[2] + strands[3])

    def _near(self, square: Any) -> Any:
        """Whether float32 products of the norm stay normal numbers."""
        if self.config.element == "f32":
            return Boolean(False)
        return (square >= Float64(1.0 / _NEAR)) & (square <= Float64(_NEAR))

    def _scaled_words(self, words: list[Any], w: list[Any], high: Any, low: Any) -> list[Any]:
        """Words of a chunk times weights, as float32, and 1 / rms."""
        config = self.config
        values = enc.floats(words, config.element)
        return enc.words_of([_scaled(values[i], w[i], high, low, config.weight) for i in range(CHUNK)], config.element)

    def _split_root(self, square: Any) -> tuple[Any, Any]:
        """1 / rms as two float32, of a mean square that is near."""
        return _split(_rsqrt64(square))

    def _root(self, square: Any) -> Any:
        """1 / rms of any mean square, as float64."""
        return Float64(1.0) / _sqrt64(square)

    def _far_words(self, x: Any, weight: Any, row: Any, c: Any, thread: Any, inverse: Any) -> list[Any]:
        """The same by float64, of a chunk that is loaded again: the compiler would do this beside the usual way, and select."""
        config = self.config
        mine = cute.make_rmem_tensor((config.words,), Uint32)
        self._load_chunk(mine, x, row, self._chunk(c, thread), config.element)
        w = _wide(self._factors(weight, c, thread), config.weight)
        values = _wide([mine[i] for i in range(config.words)], config.element)
        return enc.words_of([(values[i] * inverse * w[i]).to(Float32) for i in range(CHUNK)], config.element)

    def _factors(self, weight: Any, c: Any, thread: Any) -> list[Any]:
        """The words of the weights of a thread's c-th chunk."""
        words = CHUNK // 2 if self.config.weight == "bf16" else CHUNK
        held = cute.make_rmem_tensor((words,), Uint32)
        self._load_chunk(held, weight, Int32(0), self._chunk(c, thread), self.config.weight)
        return [held[i] for i in range(words)]

    def _keep(self, factors: list[Any], c: int, thread: Any) -> None:
        """Leave the weights of a thread's c-th chunk in shared memory, as float32; neighbours' vectors are neighbours."""
        for i in range(CHUNK // 4):
            place = (c * 4 + i) * self.config.threads + thread % self.config.threads
            for j in range(4):
                self.factors[j, place] = factors[4 * i + j]

    def _kept(self, c: int, thread: Any) -> list[Any]:
        """Those weights again."""
        held = cute.make_rmem_tensor((CHUNK,), Float32)
        for i in range(CHUNK // 4):
            place = (c * 4 + i) * self.config.threads + thread % self.config.threads
            cute.autovec_copy(self.factors[None, place], cute.local_tile(held, (4,), (i,)))
        return [held[i] for i in range(CHUNK)]

    # ---- SwiGLU ----------------------------------------------------------------------------------------------------------
    @cute.jit
    def _swiglu(self, held: Any, second: Any, factor: Any, limit: Any) -> None:
        """silu(min(gate, limit)) * clamp(up, -limit, limit) * factor, rounded to the element."""
        config = self.config
        for c in cutlass.range_constexpr(config.chunks):
            words = self._gated(self._words(held, c), self._words(second, c), factor, limit)
            for i in cutlass.range_constexpr(config.words):
                held[c * config.words + i] = words[i]

    def _gated(self, gates: list[Any], ups: list[Any], factor: Any, limit: Any) -> list[Any]:
        """SwiGLU of the words of a chunk. The sign of up goes to BF16 in pairs, which saves one of two comparisons."""
        config = self.config
        pairs = config.element == "bf16"
        results = []
        for gate, up in zip(enc.floats(gates, config.element), enc.floats(ups, config.element), strict=True):
            gate = cute.arch.fmin(gate, limit, nan=True)
            if pairs:
                up = cute.arch.fmin(enc.magnitude(up), limit, nan=True)
            else:
                up = cute.arch.fmax(cute.arch.fmin(up, limit, nan=True), enc.negative(limit), nan=True)
            result = enc.mul(enc.mul(gate, _sigmoid_of_bf16(gate) if pairs else _sigmoid(gate)), up)
            results.append(enc.mul(result, factor) if config.weighted else result)
        words = enc.words_of(results, config.element)
        return [word ^ (up & Uint32(enc.SIGNS)) for word, up in zip(words, ups, strict=True)] if pairs else words

    # ---- what threads agree on -------------------------------------------------------------------------------------------
    @cute.jit
    def _over_row(self, value: Any, thread: Any) -> Any:
        """The largest word among the threads of a row."""
        threads, shared = self.config.threads, self.shared
        for distance in halves(min(threads, WARP)):
            value = enc.max_u32(value, cute.arch.shuffle_sync_bfly(value, distance))
        if cutlass.const_expr(threads > WARP):
            first = thread // threads * (threads // WARP)
            if thread % WARP == 0:
                shared[thread // WARP] = value
            cute.arch.barrier()
            for i in cutlass.range_constexpr(threads // WARP):
                value = enc.max_u32(value, shared[first + i])
            cute.arch.barrier()
        return value

    @cute.jit
    def _over_cta(self, value: Any, thread: Any) -> Any:
        """The largest word among the threads of a CTA."""
        shared = self.shared
        for distance in halves(WARP):
            value = enc.max_u32(value, cute.arch.shuffle_sync_bfly(value, distance))
        if thread % WARP == 0:
            shared[thread // WARP] = value
        cute.arch.barrier()
        for i in cutlass.range_constexpr(self.config.threads * self.config.rows // WARP):
            value = enc.max_u32(value, shared[i])
        cute.arch.barrier()
        return value

    @cute.jit
    def _over_row_f64(self, value: Any, thread: Any, parity: Any = None) -> Any:
        """The sum over the threads of a row, in the same order for every one. parity: 0 and 1 in turn from call to call, which
        spares a barrier: who writes for the next one does not disturb who still reads.
        """
        threads, lanes, shared = self.config.threads, self.config.lanes, self.shared
        for distance in halves(lanes):
            low, high = _halves_of(value)
            value = value + _joined(cute.arch.shuffle_sync_bfly(low, distance), cute.arch.shuffle_sync_bfly(high, distance))
        if cutlass.const_expr(threads > lanes):
            start = Int32(0)
            if cutlass.const_expr(parity is not None):
                start = parity * (threads * self.config.rows // lanes)
            first = start + thread // threads * (threads // lanes)
            if thread % lanes == 0:
                low, high = _halves_of(value)
                shared[(start + thread // lanes) * 2] = low
                shared[(start + thread // lanes) * 2 + 1] = high
            if cutlass.const_expr(parity is not None and self.config.apart and self.config.rows > 1):
                for i in cutlass.range_constexpr(
                    self.config.rows
                ):  # rows do not wait for others; by constants, or all 16 are held
                    if thread // threads == i:
                        cute.arch.barrier(barrier_id=1 + i, number_of_threads=threads)
            else:
                cute.arch.barrier()
            value = _joined(shared[first * 2], shared[first * 2 + 1])
            for i in cutlass.range_constexpr(1, threads // lanes):
                value = value + _joined(shared[(first + i) * 2], shared[(first + i) * 2 + 1])
            if cutlass.const_expr(parity is None):
                cute.arch.barrier()
        return value


def halves(count: int) -> list[int]:
    """Distances of a butterfly over `count` lanes, a power of two."""
    return [count >> (i + 1) for i in range(count.bit_length() - 1)]


@cute.jit
def _scaled(x: Any, w: Any, high: Any, low: Any, weight: cutlass.Constexpr) -> Any:
    """x w (high + low), rounded once; low >= 0 keeps the sign of zeros."""
    product = enc.mul(x, w)
    rest = enc.mul(product, low)
    if cutlass.const_expr(weight == "f32"):  # the product is not exact
        rest = enc.fma(enc.fma(x, w, enc.negative(product)), high, rest)
    result = enc.fma(product, high, rest)
    if cutlass.const_expr(weight == "f32"):
        result = product if product == 0.0 else result
    return result


@cute.jit
def _sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)); 0 below -87.4, where 1 / exp(-x) is no normal number."""
    minus = enc.negative(cute.arch.fmax(cute.arch.fmin(x, Float32(_FAR)), Float32(-_FAR)))
    power = enc.mul(minus, Float32(_LOG2_E))
    e = cute.arch.inline_ptx("ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[power])
    e = enc.fma(e, enc.fma(power, Float32(-_LN_2), minus), e)  # what 2^power lacks, to first order
    return cute.arch.rcp_approx(enc.add(e, Float32(1.0)))


def _sigmoid_of_bf16(x: Any) -> Any:
    """1 / (1 + exp(-x)) of a BF16, or of a limit above 0; 0 below -87.4, as 1 / exp(-x) is no normal number there.

    log2(e) is 16 bits and a rest: with the first the product is exact, the rest is added to first order. The rest is positive:
    where exp(-x) is infinite, so is what is added.
    """
    e = cute.arch.inline_ptx(
        "ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[enc.mul(x, Float32(-_LOG2_E_SHORT))]
    )
    e = enc.fma(e, enc.mul(x, Float32(-(_LOG2_E - _LOG2_E_SHORT) * _LN_2)), e)
    return cute.arch.rcp_approx(enc.add(e, Float32(1.0)))


def _wide(words: list[Any], element: str, *, apart: bool = False) -> list[Any]:
    """The values of words as float64; apart: not by way of `encode.floats`, which the compiler would then keep in registers."""
    if apart and element == "bf16":
        return enc.wide_of_bf16(words)
    return [value.to(Float64) for value in enc.floats(words, element)]


def _squares(wide: list[Any], strands: list[Any]) -> list[Any]:
    """Four sums with the squares of float64 added."""
    sums = strands or [value * value for value in wide[:4]]
    for i in range(0 if strands else 4, len(wide), 4):
        sums = [_fma64(value, value, sum_) for value, sum_ in zip(wide[i : i + 4], sums, strict=True)]
    return sums


def _fma64(a: Any, b: Any, c: Any) -> Any:
    return cute.arch.inline_ptx("fma.rn.f64 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float64], read_only_args=[a, b, c])


def _sqrt64(a: Any) -> Any:
    return cute.arch.inline_ptx("sqrt.rn.f64 {$w0}, {$r0};", write_only_types=[Float64], read_only_args=[a])


def _rsqrt64(square: Any) -> Any:
    """1 / sqrt within 2^-50 of a float64 in float32's range: one step takes a float32 seed's error to the third power."""
    seed = cute.arch.inline_ptx(
        "rsqrt.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[square.to(Float32)]
    ).to(Float64)
    error = Float64(1.0) - square * seed * seed
    return seed + seed * error * (Float64(0.5) + Float64(0.375) * error)


def _split(value: Any) -> tuple[Any, Any]:
    """A float64 as two float32: rounded towards zero, and the rest."""
    high = cute.arch.inline_ptx("cvt.rz.f32.f64 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])
    return high, (value - high.to(Float64)).to(Float32)


def _halves_of(value: Any) -> tuple[Any, Any]:
    return cute.arch.inline_ptx("mov.b64 {{$w0}, {$w1}}, {$r0};", write_only_types=[Uint32, Uint32], read_only_args=[value])


def _joined(low: Any, high: Any) -> Any:
    return cute.arch.inline_ptx("mov.b64 {$w0}, {{$r0}, {$r1}};", write_only_types=[Float64], read_only_args=[low, high])
