/* Sums of products as Hopper's tensor cores form them; accumulation.py says how, and has the same in numpy. */
#include "numbers.h"

enum { NOTHING = -1000000 }; /* the exponent of zero */

static inline s32 exponent_of(float x, s64 least)
{
    u32 magnitude = bits_of(x) & 0x7FFFFFFF;
    s32 exponent = (s32)(magnitude >> 23) - 127;
    return !magnitude ? NOTHING : exponent < least ? (s32)least : exponent;
}

#define COLUMNS 8 /* results that are formed side by side */

/* The loops below are worth the machine's widest vectors. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("O3", "no-trapping-math")))
#else
#define WIDE
#endif

/* One row of results: x (k) with exponents ex, y and ey (k, n); n a multiple of COLUMNS. c (n) or NULL. */
WIDE static void sums_of_row(const float *x, const s32 *ex, const double *y, const s32 *ey, const float *c, double *out, s64 n,
                             s64 k, s64 places)
{
    for (s64 first = 0; first < n; first += COLUMNS) {
        s32 top[COLUMNS];
        u64 up[COLUMNS], down[COLUMNS];
        double scale[COLUMNS], back[COLUMNS], total[COLUMNS];
        for (s64 j = 0; j < COLUMNS; j++)
            top[j] = c ? exponent_of(c[first + j], -126) : NOTHING;
        for (s64 l = 0; l < k; l++) {
            const s32 e = ex[l], *other = ey + l * n + first;
            for (s64 j = 0; j < COLUMNS; j++)
                top[j] = e + other[j] > top[j] ? e + other[j] : top[j];
        }
        for (s64 j = 0; j < COLUMNS; j++) { /* powers of two by their bits; every addend of a column without one is zero */
            s64 exponent = places - (top[j] < NOTHING / 2 ? 0 : top[j]);
            up[j] = (u64)(1023 + exponent) << 52, down[j] = (u64)(1023 - exponent) << 52;
        }
        memcpy(scale, up, sizeof scale), memcpy(back, down, sizeof back);
        for (s64 j = 0; j < COLUMNS; j++)
            total[j] = c ? trunc((double)c[first + j] * scale[j]) : 0;
        for (s64 l = 0; l < k; l++) {
            const double factor = x[l], *other = y + l * n + first;
            for (s64 j = 0; j < COLUMNS; j++)
                total[j] += trunc(factor * other[j] * scale[j]);
        }
        for (s64 j = 0; j < COLUMNS; j++)
            out[first + j] = total[j] * back[j] + 0.0;
    }
}

static int all_finite(const float *x, s64 count)
{
    u32 found = 0;
    for (s64 i = 0; i < count; i++)
        found |= (bits_of(x[i]) & 0x7F800000) == 0x7F800000;
    return !found;
}

/* Toward zero, to the given number of bits of the significand; from 2^128 on infinite. */
static inline float cut(double x, s64 bits)
{
    float near = (float)x;
    u32 u = bits_of(near) - (fabs((double)near) > fabs(x));
    u &= 0xFFFFFFFFu << (24 - bits);
    return fabs(x) >= 0x1p128 ? as_float((bits_of(near) & 0x80000000) | 0x7F800000) : as_float(u);
}

/* out = c + a b^T for `batch` matrices a (m, k), b (n, k), c (m, n) or NULL: addends cut off `places` binary places below the largest
 * one's leading bit, results cut to `bits` or, for half, rounded to float16. n a multiple of COLUMNS. least_a, least_b: exponents
 * of subnormal numbers. ea (m, k), eb (k, n), wide (k, n), sums (n): scratch. Declines infinities and NaN. */
int native_tensor_sums(const float *a, const float *b, const float *c, float *out, s32 *ea, s32 *eb, double *wide, double *sums,
                       s64 batch, s64 m, s64 n, s64 k, s64 places, s64 least_a, s64 least_b, s64 bits, int half)
{
    if (!all_finite(a, batch * m * k) || !all_finite(b, batch * n * k) || (c && !all_finite(c, batch * m * n)))
        return DECLINED;
    for (s64 item = 0; item < batch; item++, a += m * k, b += n * k, out += m * n, c = c ? c + m * n : 0) {
        for (s64 i = 0; i < m * k; i++)
            ea[i] = exponent_of(a[i], least_a);
        for (s64 j = 0; j < n; j++)
            for (s64 l = 0; l < k; l++) {
                eb[l * n + j] = exponent_of(b[j * k + l], least_b);
                wide[l * n + j] = b[j * k + l];
            }
        for (s64 i = 0; i < m; i++) {
            sums_of_row(a + i * k, ea + i * k, wide, eb, c ? c + i * n : 0, sums, n, k, places);
            for (s64 j = 0; j < n; j++)
                out[i * n + j] = half ? f16_to_f32(f64_to_f16(sums[j])) : cut(sums[j], bits);
        }
    }
    return DONE;
}
