/* Number formats: the same roundings as numfmt.py, bit for bit except for the payload of NaNs. */
#ifndef DSV4LAB_SIM_NUMBERS_H
#define DSV4LAB_SIM_NUMBERS_H

#include "core.h"
#include <math.h>

static inline u32 bits_of(float x) { u32 u; memcpy(&u, &x, 4); return u; }
static inline float as_float(u32 u) { float x; memcpy(&x, &u, 4); return x; }
static inline u64 bits_of_double(double x) { u64 u; memcpy(&u, &x, 8); return u; }

static inline float f16_to_f32(u16 h)
{
    u32 sign = (u32)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31)
        return as_float(sign | 0x7F800000 | fraction << 13);
    if (exponent)
        return as_float(sign | (exponent + 112) << 23 | fraction << 13);
    return as_float(sign | bits_of((float)fraction * 0x1p-24f));
}

/* Arithmetic makes every NaN the same one. */
static inline float canonical(float x) { return x == x ? x : as_float(0x7FFFFFFF); }

/* Round to nearest even; NaN becomes 0x7fff. */
static inline u16 f32_to_f16(float x)
{
    u32 u = bits_of(x), sign = u >> 16 & 0x8000;
    u &= 0x7FFFFFFF;
    if (u > 0x7F800000)
        return 0x7FFF;
    if (u >= 0x477FF000)
        return (u16)(sign | 0x7C00);
    if (u < 0x38800000) /* subnormal: the sum's unit in the last place is 2^-24 */
        return (u16)(sign | (bits_of(as_float(u) + 0.5f) - 0x3F000000));
    return (u16)(sign | ((u + 0xC8000FFF + (u >> 13 & 1)) >> 13));
}

/* By way of a float rounded to odd, which then rounds as the double would. */
static inline u16 f64_to_f16(double x)
{
    float near = (float)x;
    u32 u = bits_of(near);
    if (x == x && (double)near != x) {
        if (fabs((double)near) > fabs(x))
            u--;
        u |= 1;
    }
    return f32_to_f16(as_float(u));
}

static inline float bf16_to_f32(u16 h) { return as_float((u32)h << 16); }

static inline u16 f32_to_bf16(float x)
{
    u32 u = bits_of(x);
    if ((u & 0x7FFFFFFF) > 0x7F800000)
        return 0x7FFF;
    return (u16)((u + ((u >> 16 & 1) + 0x7FFF)) >> 16);
}

/* x * y + z rounded to odd in double: comparing or rounding it to float is as good as with the exact sum. */
static inline double odd_sum(float x, float y, float z)
{
    double product = (double)x * (double)y, total = product + (double)z; /* the product is exact */
    double other = total - product, error = (product - (total - other)) + ((double)z - other);
    u64 wide;
    memcpy(&wide, &total, 8);
    if (error != 0 && isfinite(total) && !(wide & 1))
        wide += (error > 0) == (total > 0) ? 1 : (u64)-1;
    memcpy(&total, &wide, 8);
    return total;
}

/* The same of bfloat16 numbers, rounded to odd as a float, so that rounding it to bfloat16 rounds once. */
static inline float fma_odd(float x, float y, float z)
{
    double total = odd_sum(x, y, z);
    float near = (float)total;
    u32 u = bits_of(near);
    if (isfinite(total) && (double)near != total) {
        if (fabs((double)near) > fabs(total))
            u--;
        u |= 1;
    }
    return as_float(u);
}

/* Subnormals become zero of the same sign. */
static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

#endif
