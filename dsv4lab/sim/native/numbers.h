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

/* Subnormals become zero of the same sign. */
static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

#endif
