/* Sums of products as Hopper's tensor cores form them; accumulation.py says how, and has the same in numpy. */
#include "numbers.h"

enum { NOTHING = -1000000 }; /* the exponent of zero */

static inline s32 exponent_of(float x, s64 least)
{
    u32 magnitude = bits_of(x) & 0x7FFFFFFF;
    s32 exponent = (s32)(magnitude >> 23) - 127;
    return !magnitude ? NOTHING : exponent < least ? (s32)least : exponent;
}

/* out (m, n) = c + a (m, k) b (n, k)^T, addends cut off `places` binary places below the largest one's leading bit.
 * All finite; c may be NULL. ea, eb: room for m * k and n * k exponents; least_a, least_b: those of subnormal numbers. */
void native_aligned_sums(const float *a, const float *b, const float *c, double *out, s32 *ea, s32 *eb, s64 m, s64 n, s64 k,
                         s64 places, s64 least_a, s64 least_b)
{
    for (s64 i = 0; i < m * k; i++)
        ea[i] = exponent_of(a[i], least_a);
    for (s64 i = 0; i < n * k; i++)
        eb[i] = exponent_of(b[i], least_b);
    for (s64 i = 0; i < m; i++)
        for (s64 j = 0; j < n; j++) {
            const float *x = a + i * k, *y = b + j * k;
            const s32 *ex = ea + i * k, *ey = eb + j * k;
            s32 top = c ? exponent_of(c[i * n + j], -126) : NOTHING;
            for (s64 l = 0; l < k; l++)
                top = ex[l] + ey[l] > top ? ex[l] + ey[l] : top;
            if (top < NOTHING / 2) {
                out[i * n + j] = 0;
                continue;
            }
            double scale = ldexp(1.0, (int)(places - top)), total = c ? trunc((double)c[i * n + j] * scale) : 0;
            for (s64 l = 0; l < k; l++)
                total += (double)(s64)((double)x[l] * (double)y[l] * scale);
            out[i * n + j] = total / scale + 0.0;
        }
}
