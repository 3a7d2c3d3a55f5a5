"""What the row quantisers quantise: x, its RMS norm or SwiGLU of two inputs, in registers; and what threads of a row agree on.

RMSNorm is `reference.norm`'s, which works in float64 and rounds once: squares are added up in float64, and 1 / rms goes on as
two float32 of which the sum is good to 2^-48, so that x w / rms = fma(x w, high, (x w) low) has one rounding, to float32, with
x w exact for BF16. The result differs from the reference's where the exact one lies within 2^-47 of a rounding boundary. Where
a row is so large or so small that this would over- or underflow, and for float32 rows, products are float64.

SwiGLU is float32: exp within 2^-22, 1 / (1 + exp) within 2^-23, five more roundings: together less than 2^-20 of the value, or
2^-110 where that underflows, before it is rounded to BF16.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Float64, Int32, Uint32

from dsv4lab.kernels.quant.rows import encode as enc
from dsv4lab.kernels.quant.rows.config import CHUNK, WARP, RowsConfig

_NEAR = 2.0**80  # mean squares between this and its reciprocal: products of the norm stay normal numbers
_LOG2_E = 1.4426950216293335  # its float32, and what that lacks
_LOG2_E_REST = 1.925963033500e-08
_LN_2 = 0.6931471805599453
_FAR = 200.0  # exp(-200) is 0 in float32


class RowSources:
    """Loads and row-wide sums of `QuantizeRows`. `shared` and `columns` (K) are set when its kernel begins."""

    config: RowsConfig
    shared: Any
    columns: Any

    def _chunk(self, c: int, thread: Any) -> Any:
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
            self._norm(held, other, thread, per_column, eps)
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
    def _norm(self, held: Any, weight: Any, thread: Any, per_column: Any, eps: Any) -> None:
        config = self.config
        total = Float64(0.0)
        for c in cutlass.range_constexpr(config.chunks):
            sum_ = _sum_of_squares(enc.floats(self._words(held, c), config.element))
            total = total + (sum_ if self._inside(self._chunk(c, thread)) else Float64(0.0))
        total = self._over_row_f64(total, thread)
        square = total * per_column + eps
        near = square >= Float64(1.0 / _NEAR) and square <= Float64(_NEAR)
        inverse = _rsqrt64(square)
        size = Float32(1.0)  # a power of two that goes from 1 / rms to x
        if not near:
            inverse = Float64(1.0) / _sqrt64(square)
            if cutlass.const_expr(config.element == "bf16"):
                size = _power_of_two(inverse)
        high, low = _split(inverse / size.to(Float64) if not near else inverse)
        weight_words = CHUNK // 2 if config.weight == "bf16" else CHUNK
        for c in cutlass.range_constexpr(config.chunks):
            factors = cute.make_rmem_tensor((weight_words,), Uint32)
            self._load_chunk(factors, weight, Int32(0), self._chunk(c, thread), config.weight)
            w = enc.floats([factors[i] for i in range(weight_words)], config.weight)
            values = enc.floats(self._words(held, c), config.element)
            x = cute.make_rmem_tensor((CHUNK,), Float32)
            for i in cutlass.range_constexpr(CHUNK):
                x[i] = values[i]
            if cutlass.const_expr(config.element == "bf16"):
                if not near:
                    for i in cutlass.range_constexpr(CHUNK):
                        x[i] = enc.mul(x[i], size)
                scaled = [_scaled(x[i], w[i], high, low, config.weight) for i in range(CHUNK)]
            else:
                scaled = [(x[i].to(Float64) * inverse * w[i].to(Float64)).to(Float32) for i in range(CHUNK)]
            words = enc.words_of(scaled, config.element)
            for i in cutlass.range_constexpr(config.words):
                held[c * config.words + i] = words[i]

    # ---- SwiGLU ----------------------------------------------------------------------------------------------------------
    @cute.jit
    def _swiglu(self, held: Any, second: Any, factor: Any, limit: Any) -> None:
        """silu(min(gate, limit)) * clamp(up, -limit, limit) * factor, rounded to the element."""
        config = self.config
        for c in cutlass.range_constexpr(config.chunks):
            gates = enc.floats(self._words(held, c), config.element)
            ups = enc.floats(self._words(second, c), config.element)
            results = []
            for i in cutlass.range_constexpr(CHUNK):
                gate = cute.arch.fmin(gates[i], limit, nan=True)
                up = cute.arch.fmax(cute.arch.fmin(ups[i], limit, nan=True), enc.negative(limit), nan=True)
                result = enc.mul(enc.mul(gate, _sigmoid(gate)), up)
                if cutlass.const_expr(config.weighted):
                    result = enc.mul(result, factor)
                results.append(result)
            words = enc.words_of(results, config.element)
            for i in cutlass.range_constexpr(config.words):
                held[c * config.words + i] = words[i]

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
    def _over_row_f64(self, value: Any, thread: Any) -> Any:
        """The sum over the threads of a row, in the same order for every one."""
        threads, shared = self.config.threads, self.shared
        for distance in halves(min(threads, WARP)):
            low, high = _halves_of(value)
            value = value + _joined(cute.arch.shuffle_sync_bfly(low, distance), cute.arch.shuffle_sync_bfly(high, distance))
        if cutlass.const_expr(threads > WARP):
            first = thread // threads * (threads // WARP)
            if thread % WARP == 0:
                low, high = _halves_of(value)
                shared[thread // WARP * 2] = low
                shared[thread // WARP * 2 + 1] = high
            cute.arch.barrier()
            value = Float64(0.0)
            for i in cutlass.range_constexpr(threads // WARP):
                value = value + _joined(shared[(first + i) * 2], shared[(first + i) * 2 + 1])
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
    """1 / (1 + exp(-x)), from the exponential that does not overflow."""
    minus = enc.negative(cute.arch.fmin(_absolute(x), Float32(_FAR), nan=True))
    power = enc.mul(minus, Float32(_LOG2_E))
    rest = enc.fma(minus, Float32(_LOG2_E_REST), enc.fma(minus, Float32(_LOG2_E), enc.negative(power)))
    e = cute.arch.inline_ptx("ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[power])
    e = enc.fma(e, enc.mul(rest, Float32(_LN_2)), e)
    r = cute.arch.rcp_approx(enc.add(e, Float32(1.0)))
    return r if x >= 0.0 else enc.mul(e, r)


def _sum_of_squares(values: list[Any]) -> Any:
    """In float64, in four strands."""
    wide = [value.to(Float64) for value in values]
    strands = [value * value for value in wide[:4]]
    for i, value in enumerate(wide[4:]):
        strands[i % 4] = _fma64(value, value, strands[i % 4])
    return (strands[0] + strands[1]) + (strands[2] + strands[3])


@cute.jit
def _power_of_two(value: Any) -> Any:
    """The power of two at or below a positive float64, within float32's normal range; 1 for zero, infinity and NaN."""
    _, high = _halves_of(value)
    exponent = Int32((high >> 20) & Uint32(0x7FF)) - 1023
    bounded = cutlass.max(cutlass.min(exponent, 126), -126)
    result = Uint32((bounded + 127) << 23).bitcast(Float32)
    return Float32(1.0) if exponent == -1023 or exponent == 1024 else result


def _fma64(a: Any, b: Any, c: Any) -> Any:
    return cute.arch.inline_ptx("fma.rn.f64 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float64], read_only_args=[a, b, c])


def _absolute(a: Any) -> Any:
    return cute.arch.inline_ptx("abs.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


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
