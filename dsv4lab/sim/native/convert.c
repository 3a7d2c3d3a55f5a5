/* Conversions between integer, floating and packed narrow types, and between address windows. */
#include "numbers.h"

/* Integers: to the narrower type and then to the register's width, extended by the target type's sign. */
#define RESIZE(name, S, T, R) UNARY(name, R, S, (R)(T)x)
#define TO_INTEGERS(from, S)                                                                                        \
    RESIZE(from##_u8_16, S, u8, u16) RESIZE(from##_s8_16, S, int8_t, s16)                                           \
    RESIZE(from##_u8_32, S, u8, u32) RESIZE(from##_s8_32, S, int8_t, s32)                                           \
    RESIZE(from##_u16_16, S, u16, u16) RESIZE(from##_s16_16, S, s16, s16)                                           \
    RESIZE(from##_u16_32, S, u16, u32) RESIZE(from##_s16_32, S, s16, s32)                                           \
    RESIZE(from##_u32_32, S, u32, u32) RESIZE(from##_s32_32, S, s32, s32)                                           \
    RESIZE(from##_u64_64, S, u64, u64) RESIZE(from##_s64_64, S, s64, s64)
#define NAMES(from)                                                                                                  \
    {"cvt.u8.16." #from, from##_u8_16}, {"cvt.s8.16." #from, from##_s8_16}, {"cvt.u8.32." #from, from##_u8_32},       \
    {"cvt.s8.32." #from, from##_s8_32}, {"cvt.u16.16." #from, from##_u16_16}, {"cvt.s16.16." #from, from##_s16_16},   \
    {"cvt.u16.32." #from, from##_u16_32}, {"cvt.s16.32." #from, from##_s16_32}, {"cvt.u32.32." #from, from##_u32_32}, \
    {"cvt.s32.32." #from, from##_s32_32}, {"cvt.u64.64." #from, from##_u64_64}, {"cvt.s64.64." #from, from##_s64_64}
TO_INTEGERS(u16, u16)
TO_INTEGERS(s16, s16)
TO_INTEGERS(u32, u32)
TO_INTEGERS(s32, s32)
TO_INTEGERS(u64, u64)
TO_INTEGERS(s64, s64)
/* An 8-bit source is the low byte of a 16- or 32-bit register. */
#define FROM_BYTE(type, T, width, R)                                                                              \
    UNARY(type##_of_##width##_16, u16, R, (s16)(T)x) UNARY(type##_of_##width##_32, u32, R, (s32)(T)x)             \
    UNARY(type##_of_##width##_64, u64, R, (s64)(T)x) UNARY(type##_of_##width##_f32, float, R, (float)(T)x)
FROM_BYTE(u8, u8, 16, u16)
FROM_BYTE(s8, int8_t, 16, s16)
FROM_BYTE(u8, u8, 32, u32)
FROM_BYTE(s8, int8_t, 32, s32)
#define BYTES(type, width)                                                                                               \
    {"byte." #type "." #width ".16", type##_of_##width##_16}, {"byte." #type "." #width ".32", type##_of_##width##_32},   \
    {"byte." #type "." #width ".64", type##_of_##width##_64}, {"byte." #type "." #width ".f32", type##_of_##width##_f32}

#define TO_FLOATS(from, S)                                                                                    \
    UNARY(from##_f32, float, S, (float)x) UNARY(from##_f64, double, S, (double)x)                             \
    UNARY(from##_f16, u16, S, f64_to_f16((double)x)) UNARY(from##_bf16, u16, S, f32_to_bf16((float)x))
TO_FLOATS(u16, u16)
TO_FLOATS(s16, s16)
TO_FLOATS(u32, u32)
TO_FLOATS(s32, s32)
TO_FLOATS(u64, u64)
TO_FLOATS(s64, s64)
#define FLOAT_NAMES(from)                                                                                             \
    {"cvt.f32." #from, from##_f32}, {"cvt.f64." #from, from##_f64}, {"cvt.f16." #from, from##_f16},                    \
    {"cvt.bf16." #from, from##_bf16}

/* Floats to integers, beyond the range to its end. A NaN becomes 0, or only the top bit where either type has 64 bits. variant: rni, rzi, rmi, rpi, + 4: flush subnormals */
static inline double integral(double x, int how)
{
    switch (how & 3) {
    case 0: return rint(x);
    case 1: return trunc(x);
    case 2: return floor(x);
    default: return ceil(x);
    }
}
#define CLIPPED(name, T, low, high)                                                   \
    static inline T name(double x, u64 nan)                                           \
    {                                                                                 \
        return x != x ? (T)nan : x <= (double)low ? low : x >= (double)high ? high : (T)x; \
    }
CLIPPED(clip_u16, u16, 0, UINT16_MAX)
CLIPPED(clip_s16, s16, INT16_MIN, INT16_MAX)
CLIPPED(clip_u32, u32, 0, UINT32_MAX)
CLIPPED(clip_s32, s32, INT32_MIN, INT32_MAX)
CLIPPED(clip_u64, u64, 0, UINT64_MAX)
CLIPPED(clip_s64, s64, INT64_MIN, INT64_MAX)
/* wide: 1 for float64 */
#define FROM_FLOAT(from, A, read, wide)                                                                             \
    UNARY(from##_to_u16, u16, A, clip_u16(integral(read(x), s->variant), (u64)wide << 15))                          \
    UNARY(from##_to_s16, s16, A, clip_s16(integral(read(x), s->variant), (u64)wide << 15))                          \
    UNARY(from##_to_u32, u32, A, clip_u32(integral(read(x), s->variant), (u64)wide << 31))                          \
    UNARY(from##_to_s32, s32, A, clip_s32(integral(read(x), s->variant), (u64)wide << 31))                          \
    UNARY(from##_to_u64, u64, A, clip_u64(integral(read(x), s->variant), (u64)1 << 63))                             \
    UNARY(from##_to_s64, s64, A, clip_s64(integral(read(x), s->variant), (u64)1 << 63))
#define FROM_NAMES(from)                                                                                     \
    {"cvt.u16." #from, from##_to_u16}, {"cvt.s16." #from, from##_to_s16}, {"cvt.u32." #from, from##_to_u32}, \
    {"cvt.s32." #from, from##_to_s32}, {"cvt.u64." #from, from##_to_u64}, {"cvt.s64." #from, from##_to_s64}
#define SINGLE_READ(x) (s->variant & 4 ? flushed(x) : x)
FROM_FLOAT(f32, float, SINGLE_READ, 0)
FROM_FLOAT(f64, double, , 1)
FROM_FLOAT(f16, u16, f16_to_f32, 0)
FROM_FLOAT(bf16, u16, bf16_to_f32, 0)

UNARY(f16_to_single, float, u16, canonical(f16_to_f32(x)))
UNARY(bf16_to_single, float, u16, bf16_to_f32(x))
UNARY(f32_to_double, double, float, x)
UNARY(bf16_to_double, double, u16, (double)bf16_to_f32(x))
UNARY(f64_to_single, float, double, (float)x)
UNARY(f32_integral, float, float, canonical((float)integral(SINGLE_READ(x), s->variant)))

/* A binary format of at most 19 encoded bits; nan, inf: -1 where the format has none. As FORMATS of numfmt.py. */
typedef struct {
    int exponent_bits, mantissa_bits, max, nan, inf;
} Format;
enum { E2M1, E2M3, E3M2, E4M3, E5M2, F16, BF16, TF32 };
static const Format formats[] = {{2, 1, 0x7, -1, -1},       {2, 3, 0x1F, -1, -1},         {3, 2, 0x1F, -1, -1},
                                 {4, 3, 0x7E, 0x7F, -1},    {5, 2, 0x7B, 0x7F, 0x7C},     {5, 10, 0x7BFF, 0x7FFF, 0x7C00},
                                 {8, 7, 0x7F7F, 0x7FFF, 0x7F80}, {8, 10, 0x3FBFF, 0x3FFFF, 0x3FC00}};
/* Step.variant of encoders: rounding (rn, rna, rz, rp, rm), + 8: satfinite, + 16: relu */
static u32 encode(float value, const Format *t, int how)
{
    u32 bits = bits_of(value), magnitude = bits & 0x7FFFFFFF;
    int negative = bits >> 31, bias = (1 << (t->exponent_bits - 1)) - 1, sign = 1 << (t->exponent_bits + t->mantissa_bits);
    if (magnitude > 0x7F800000)
        return (u32)(t->nan < 0 ? t->max : t->nan);
    int exponent = (int)(magnitude >> 23), fraction = (int)(magnitude & 0x7FFFFF);
    s64 significand = exponent ? fraction | 0x800000 : fraction;
    int target = (exponent ? exponent : 1) - 127 + bias;
    int shift = 23 - t->mantissa_bits + (target < 1 ? 1 - target : 0);
    shift = shift < 40 ? shift : 40;
    s64 quotient = significand >> shift, rest = significand - (quotient << shift), half = (s64)1 << (shift > 1 ? shift - 1 : 0);
    int up = 0;
    switch (how & 7) {
    case 0: up = rest > half || (rest == half && (quotient & 1)); break;
    case 1: up = rest >= half; break;
    case 2: break;
    case 3: up = rest && !negative; break;
    default: up = rest && negative;
    }
    s64 code = ((s64)((target > 1 ? target : 1) - 1) << t->mantissa_bits) + quotient + (shift && up);
    if (code > t->max) {
        if (how & 8 || (t->inf < 0 && t->nan < 0))
            code = t->max;
        else {
            int stays = magnitude != 0x7F800000 &&
                        ((how & 7) == 2 || ((how & 7) >= 3 && negative == ((how & 7) == 3)));
            code = stays ? t->max : t->inf < 0 ? t->nan : t->inf;
        }
    }
    if (negative)
        code = how & 16 ? 0 : code | sign;
    return (u32)code;
}

/* size: bits of one element; the first source is the upper one. list: `count` float32 slots. k: format. */
OP(pack_narrow)
{
    const Format *t = &formats[s->k];
    const s32 *slots = f->cta->program->lists + s->list;
    int width = f->cta->program->widths[s->d];
    for (s32 i = 0; i < f->n; i++) {
        if (!holds(m, i))
            continue;
        u32 total = 0;
        for (s32 j = 0; j < s->count; j++)
            total = total << s->size | encode(ROW(float, slots[j])[i], t, s->variant);
        if (width == 4)
            ROW(u32, s->d)[i] = total;
        else if (width == 2)
            ROW(u16, s->d)[i] = (u16)total;
        else
            ROW(u8, s->d)[i] = (u8)total;
    }
    return DONE;
}
BINARY(pair_f16, u32, float, float, (u32)f32_to_f16(x) << 16 | f32_to_f16(y))
BINARY(pair_bf16, u32, float, float, (u32)f32_to_bf16(x) << 16 | f32_to_bf16(y))
UNARY(single_to_f16, u16, float, f32_to_f16(x))
UNARY(single_to_bf16, u16, float, f32_to_bf16(x))
UNARY(f16_to_bf16, u16, u16, f32_to_bf16(f16_to_f32(x)))
UNARY(bf16_to_f16, u16, u16, f32_to_f16(bf16_to_f32(x)))
UNARY(single_encoded, u16, float, encode(x, &formats[s->k], s->variant))
/* Ties away (variant 1): a NaN keeps its upper bits; with .satfinite what has the largest exponent loses one unit. */
static u32 to_tf32(float x, int how)
{
    if ((how & 7) != 1 || x == x)
        return encode(x, &formats[TF32], how) << 13;
    return (bits_of(x) & 0xFFFFE000) - (how & 8 ? 0x2000 : 0);
}
UNARY(single_to_tf32, u32, float, to_tf32(x, s->variant))

static float decode(u32 code, const Format *t)
{
    int sign = 1 << (t->exponent_bits + t->mantissa_bits), bias = (1 << (t->exponent_bits - 1)) - 1;
    int magnitude = (int)code & (sign - 1), exponent = magnitude >> t->mantissa_bits;
    int fraction = magnitude & ((1 << t->mantissa_bits) - 1);
    float value = ldexpf((float)(exponent ? fraction + (1 << t->mantissa_bits) : fraction),
                         (exponent ? exponent : 1) - bias - t->mantissa_bits);
    if (t->inf >= 0)
        value = magnitude == t->inf ? INFINITY : magnitude > t->inf ? NAN : value;
    else if (magnitude == t->nan)
        value = NAN;
    return (int)code & sign ? -value : value;
}

/* Two narrow floats (k: format, size: bits of one) to f16x2 (variant 0) or bf16x2 (1), + 2: relu. */
OP(unpack_narrow)
{
    const Format *t = &formats[s->k];
    u32 mask = t->exponent_bits + t->mantissa_bits == 5 ? 63 : (1u << s->size) - 1;
    int width = f->cta->program->widths[s->a];
    u32 *d = ROW(u32, s->d);
    for (s32 i = 0; i < f->n; i++) {
        if (!holds(m, i))
            continue;
        u32 raw = width == 4 ? ROW(u32, s->a)[i] : width == 2 ? ROW(u16, s->a)[i] : ROW(u8, s->a)[i], out = 0;
        for (int j = 0; j < 2; j++) {
            float value = decode(raw >> (j * s->size) & mask, t);
            if (s->variant & 2 && value == value && signbit(value))
                value = 0;
            out |= (u32)(s->variant & 1 ? f32_to_bf16(value) : f32_to_f16(value)) << (16 * j);
        }
        d[i] = out;
    }
    return DONE;
}

/* k: what is added to an address, modulo the width */
UNARY(cvta_32, u32, u32, (u64)x + (u64)s->k)
UNARY(cvta_64, u64, u64, x + (u64)s->k)

const Entry convert_entries[] = {
    NAMES(u16), NAMES(s16), NAMES(u32), NAMES(s32), NAMES(u64), NAMES(s64), BYTES(u8, 16), BYTES(s8, 16), BYTES(u8, 32),
    BYTES(s8, 32), FLOAT_NAMES(u16), FLOAT_NAMES(s16), FLOAT_NAMES(u32), FLOAT_NAMES(s32), FLOAT_NAMES(u64), FLOAT_NAMES(s64),
    FROM_NAMES(f32), FROM_NAMES(f64), FROM_NAMES(f16), FROM_NAMES(bf16),
    {"cvt.f32.f16", f16_to_single}, {"cvt.f32.bf16", bf16_to_single}, {"cvt.f64.f32", f32_to_double},
    {"cvt.f64.bf16", bf16_to_double},
    {"cvt.f32.f64", f64_to_single}, {"integral.f32", f32_integral}, {"pack.narrow", pack_narrow}, {"pair.f16", pair_f16},
    {"pair.bf16", pair_bf16}, {"cvt.f16.f32", single_to_f16}, {"cvt.bf16.f32", single_to_bf16}, {"cvt.bf16.f16", f16_to_bf16},
    {"cvt.f16.bf16", bf16_to_f16}, {"encode.f32", single_encoded}, {"cvt.tf32.f32", single_to_tf32},
    {"unpack.narrow", unpack_narrow}, {"cvta.32", cvta_32}, {"cvta.64", cvta_64}, {0, 0},
};
