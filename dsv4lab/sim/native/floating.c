/* Floating-point arithmetic and comparison. */
#include "numbers.h"

/* Step.variant of arithmetic */
enum { FTZ = 1, SAT = 2, RELU = 4 };

static inline float before(float x, int how) { return how & FTZ ? flushed(x) : x; }
static inline float after(float x, int how)
{
    if (how & FTZ)
        x = flushed(x);
    if (how & SAT)
        x = x > 0 ? (x < 1 ? x : 1) : 0;
    return how & RELU && x == x && signbit(x) ? 0 : x;
}

/* Without .NaN a number wins against NaN; +0 is greater than -0. */
static inline float least(float x, float y)
{
    if (x != x || y != y)
        return canonical(x != x ? y : x);
    return x == y ? as_float(bits_of(x) | bits_of(y)) : x < y ? x : y;
}
static inline float greatest(float x, float y)
{
    if (x != x || y != y)
        return canonical(x != x ? y : x);
    return x == y ? as_float(bits_of(x) & bits_of(y)) : x > y ? x : y;
}
static inline float least_nan(float x, float y) { return x != x || y != y ? as_float(0x7FFFFFFF) : least(x, y); }
static inline float greatest_nan(float x, float y) { return x != x || y != y ? as_float(0x7FFFFFFF) : greatest(x, y); }
/* .xorsign.abs: of magnitudes, with the product's sign. */
static inline float crossed(float out, float x, float y) { return out == out && signbit(x) != signbit(y) ? -out : out; }

/* float32, with modifiers; packed pairs are two elements a lane. */
#define SINGLE(name, parts, sources, expression)                                                     \
    OP(name)                                                                                         \
    {                                                                                                \
        float *d = (float *)(f->rows[s->d]) + (s64)f->first * parts;                                 \
        const float *a = (const float *)(f->rows[s->a]) + (s64)f->first * parts;                     \
        const float *b = sources > 1 ? (const float *)(f->rows[s->b]) + (s64)f->first * parts : a;   \
        const float *c = sources > 2 ? (const float *)(f->rows[s->c]) + (s64)f->first * parts : a;   \
        const int how = s->variant;                                                                  \
        if (!m && !how) {                                                                            \
            for (s32 i = 0; i < f->n * parts; i++) {                                                 \
                float x = a[i], y = b[i], z = c[i];                                                  \
                (void)x, (void)y, (void)z;                                                           \
                d[i] = canonical(expression);                                                        \
            }                                                                                        \
            return DONE;                                                                             \
        }                                                                                            \
        for (s32 i = 0; i < f->n * parts; i++) {                                                     \
            float x = before(a[i], how), y = before(b[i], how), z = before(c[i], how);               \
            (void)x, (void)y, (void)z;                                                               \
            if (holds(m, i / parts))                                                                 \
                d[i] = after(canonical(expression), how);                                            \
        }                                                                                            \
        return DONE;                                                                                 \
    }
#define SINGLES(name, sources, expression) SINGLE(name##_f32, 1, sources, expression) \
    SINGLE(name##_f32x2, 2, sources, expression)

/* float16 and bfloat16, singly or in pairs: computed in float32 (or wider) and rounded. */
#define HALF(name, parts, sources, expression, read, write)                                  \
    OP(name)                                                                                 \
    {                                                                                        \
        u16 *d = (u16 *)(f->rows[s->d]) + (s64)f->first * parts;                             \
        const u16 *a = (const u16 *)(f->rows[s->a]) + (s64)f->first * parts;                 \
        const u16 *b = sources > 1 ? (const u16 *)(f->rows[s->b]) + (s64)f->first * parts : a; \
        const u16 *c = sources > 2 ? (const u16 *)(f->rows[s->c]) + (s64)f->first * parts : a; \
        const int how = s->variant;                                                          \
        for (s32 i = 0; i < f->n * parts; i++) {                                             \
            if (!holds(m, i / parts))                                                        \
                continue;                                                                    \
            float x = read(a[i]), y = read(b[i]), z = read(c[i]);                            \
            (void)x, (void)y, (void)z;                                                       \
            d[i] = write(expression, how);                                                   \
        }                                                                                    \
        return DONE;                                                                         \
    }
/* Modifiers apply to the rounded value, which makes no difference to these. */
static inline u16 to_f16(double x, int how) { return f32_to_f16(after(f16_to_f32(f64_to_f16(x)), how)); }
static inline u16 to_bf16(float x, int how) { return f32_to_bf16(after(x, how)); }
#define HALVES(name, sources, wide, narrow)                                        \
    HALF(name##_f16, 1, sources, wide, f16_to_f32, to_f16)                         \
    HALF(name##_f16x2, 2, sources, wide, f16_to_f32, to_f16)                       \
    HALF(name##_bf16, 1, sources, narrow, bf16_to_f32, to_bf16)                    \
    HALF(name##_bf16x2, 2, sources, narrow, bf16_to_f32, to_bf16)

#define EVERY(name, sources, expression) SINGLES(name, sources, expression) HALVES(name, sources, expression, expression)
EVERY(add, 2, x + y)
EVERY(sub, 2, x - y)
/* .ftz looks at the exact product or sum: one that only rounding makes a normal number becomes zero. */
SINGLES(mul, 2, how & FTZ && fabs((double)x * (double)y) < 0x1p-126 ? copysignf(0.0f, x * y) : x * y)
HALVES(mul, 2, x * y, x * y)
SINGLES(fma, 3, how & FTZ && fabs(odd_sum(x, y, z)) < 0x1p-126 ? copysignf(0.0f, fmaf(x, y, z)) : fmaf(x, y, z))
HALVES(fma, 3, (double)x *(double)y + (double)z, fma_odd(x, y, z))
SINGLES(div, 2, x / y)
EVERY(min, 2, least(x, y))
EVERY(max, 2, greatest(x, y))
EVERY(minnan, 2, least_nan(x, y))
EVERY(maxnan, 2, greatest_nan(x, y))
EVERY(min3, 3, least(least(x, y), z))
EVERY(max3, 3, greatest(greatest(x, y), z))
EVERY(minnan3, 3, least_nan(least_nan(x, y), z))
EVERY(maxnan3, 3, greatest_nan(greatest_nan(x, y), z))
EVERY(maxcross, 2, crossed(greatest(fabsf(x), fabsf(y)), x, y))
EVERY(maxnancross, 2, crossed(greatest_nan(fabsf(x), fabsf(y)), x, y))

/* 2^x as numfmt.exp2 computes it, operation for operation. */
static double power_of_two(double x)
{
    static const double terms[] = {0x1.0000000000000p+0, 0x1.62e42fefa39efp-1, 0x1.ebfbdff82c58fp-3,
                                  0x1.c6b08d704a0c0p-5, 0x1.3b2ab6fba4e77p-7, 0x1.5d87fe78a6731p-10,
                                  0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20,
                                  0x1.b5253d395e7c4p-24, 0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32,
                                  0x1.c3bd650fc2986p-36};
    x = x < -1100 ? -1100 : x > 1100 ? 1100 : x;
    double whole = rint(x), rest = x - whole, out = terms[12];
    for (int k = 11; k >= 0; k--)
        out = out * rest + terms[k];
    return x == x ? ldexp(out, (int)whole) : x;
}

/* Elementary functions are evaluated in float64 and rounded. */
SINGLE(rcp_f32, 1, 1, (float)(1.0 / (double)x))
SINGLE(ex2_f32, 1, 1, (float)power_of_two((double)x))
SINGLE(sqrt_f32, 1, 1, (float)sqrt((double)x))
SINGLE(rsqrt_f32, 1, 1, (float)(1.0 / sqrt((double)x)))

BINARY(add_f64, double, double, double, x + y)
BINARY(sub_f64, double, double, double, x - y)
BINARY(mul_f64, double, double, double, x * y)
BINARY(div_f64, double, double, double, x / y)
TERNARY(fma_f64, double, double, double, double, fma(x, y, z))

/* Half-precision first operands, float32 the last one and the result. */
#define MIXED(name, narrow, sources, read, expression)                                          \
    OP(name)                                                                                    \
    {                                                                                           \
        float *d = ROW(float, s->d);                                                            \
        const u16 *a = ROW(u16, s->a), *b = sources > 2 ? ROW(u16, s->b) : a;                   \
        const float *c = ROW(float, s->c);                                                      \
        const int how = s->variant;                                                             \
        EACH({                                                                                  \
            float x = before(read(a[i]), how), y = before(read(b[i]), how), z = before(c[i], how); \
            (void)y;                                                                            \
            d[i] = after(canonical(expression), how);                                           \
        });                                                                                     \
        return DONE;                                                                            \
    }
#define MIXES(narrow, read)                                     \
    MIXED(mixed_add_##narrow, narrow, 2, read, x + z)           \
    MIXED(mixed_sub_##narrow, narrow, 2, read, x - z)           \
    MIXED(mixed_fma_##narrow, narrow, 3, read, fmaf(x, y, z))
MIXES(f16, f16_to_f32)
MIXES(bf16, bf16_to_f32)

/* Only the sign bit changes; k: which. */
/* k: the sign bits */
#define HALF_NAN(x, inf) (((x) & 0x7FFF) > (inf) ? 0x7FFF : (x))
#define PAIR_NAN(x, inf) ((u32)HALF_NAN((x) >> 16, inf) << 16 | (u32)HALF_NAN((x) & 0xFFFF, inf))
#define SIGN(name, expression)                                                                  \
    UNARY(name##_f16, u16, u16, HALF_NAN(expression, 0x7C00))                                   \
    UNARY(name##_bf16, u16, u16, HALF_NAN(expression, 0x7F80))                                  \
    UNARY(name##_f16x2, u32, u32, PAIR_NAN((u32)(expression), 0x7C00u))                         \
    UNARY(name##_bf16x2, u32, u32, PAIR_NAN((u32)(expression), 0x7F80u))                        \
    UNARY(name##_f32, u32, u32, ((expression) & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFFFFFF : (expression)) \
    UNARY(name##_f64, u64, u64, expression) UNARY(name##_f32x2, u64, u64, expression)
SIGN(sign_neg, x ^ (u64)s->k)
SIGN(sign_abs, x & ~(u64)s->k)
#define SIGNS(name)                                                                                              \
    {"sign." #name ".f16", sign_##name##_f16}, {"sign." #name ".bf16", sign_##name##_bf16},                      \
    {"sign." #name ".f16x2", sign_##name##_f16x2}, {"sign." #name ".bf16x2", sign_##name##_bf16x2},              \
    {"sign." #name ".f32", sign_##name##_f32}, {"sign." #name ".f64", sign_##name##_f64}, {"sign." #name ".f32x2", sign_##name##_f32x2}
BINARY(copysign_f32, u32, u32, u32, (y & 0x7FFFFFFF) | (x & 0x80000000))

/* variant: eq ne lt le gt ge, equ neu ltu leu gtu geu, num nan */
#define COMPARES(name, T, read)                                                                          \
    OP(name)                                                                                             \
    {                                                                                                    \
        const T *a = ROW(T, s->a), *b = ROW(T, s->b);                                                    \
        u8 r[MOST_LANES];                                                                                \
        for (s32 i = 0; i < f->n; i++) {                                                                 \
            double x = read(a[i]), y = read(b[i]);                                                       \
            int nan = x != x || y != y;                                                                  \
            switch (s->variant) {                                                                        \
            case 0: r[i] = x == y; break;                                                                \
            case 1: r[i] = x != y && !nan; break;                                                        \
            case 2: r[i] = x < y; break;                                                                 \
            case 3: r[i] = x <= y; break;                                                                \
            case 4: r[i] = x > y; break;                                                                 \
            case 5: r[i] = x >= y; break;                                                                \
            case 6: r[i] = x == y || nan; break;                                                         \
            case 7: r[i] = x != y; break;                                                                \
            case 8: r[i] = x < y || nan; break;                                                          \
            case 9: r[i] = x <= y || nan; break;                                                         \
            case 10: r[i] = x > y || nan; break;                                                         \
            case 11: r[i] = x >= y || nan; break;                                                        \
            case 12: r[i] = !nan; break;                                                                 \
            default: r[i] = (u8)nan;                                                                     \
            }                                                                                            \
        }                                                                                                \
        return native_compared(f, s, m, r);                                                              \
    }
int native_compared(const Frame *f, const Step *s, const u8 *m, const u8 *result);
COMPARES(setp_f16, u16, f16_to_f32)
COMPARES(setp_bf16, u16, bf16_to_f32)
COMPARES(setp_f32, float, )
COMPARES(setp_f64, double, )

#define TWO(name, c) {#name ".f32", c##_f32}, {#name ".f32x2", c##_f32x2}
#define SIX(name, c) TWO(name, c), {#name ".f16", c##_f16}, {#name ".f16x2", c##_f16x2}, {#name ".bf16", c##_bf16}, \
    {#name ".bf16x2", c##_bf16x2}
const Entry float_entries[] = {
    SIX(add, add), SIX(sub, sub), SIX(mul, mul), SIX(fma, fma), TWO(div, div), SIX(min, min), SIX(max, max),
    SIX(minnan, minnan), SIX(maxnan, maxnan), SIX(min3, min3), SIX(max3, max3), SIX(minnan3, minnan3), SIX(maxnan3, maxnan3),
    SIX(maxcross, maxcross), SIX(maxnancross, maxnancross),
    {"rcp.f32", rcp_f32}, {"ex2.f32", ex2_f32}, {"sqrt.f32", sqrt_f32}, {"rsqrt.f32", rsqrt_f32},
    {"add.f64", add_f64}, {"sub.f64", sub_f64}, {"mul.f64", mul_f64}, {"div.f64", div_f64}, {"fma.f64", fma_f64},
    {"mixed.add.f16", mixed_add_f16}, {"mixed.sub.f16", mixed_sub_f16}, {"mixed.fma.f16", mixed_fma_f16},
    {"mixed.add.bf16", mixed_add_bf16}, {"mixed.sub.bf16", mixed_sub_bf16}, {"mixed.fma.bf16", mixed_fma_bf16},
    SIGNS(neg), SIGNS(abs), {"copysign.f32", copysign_f32},
    {"setp.f16", setp_f16}, {"setp.bf16", setp_bf16}, {"setp.f32", setp_f32}, {"setp.f64", setp_f64}, {0, 0},
};
