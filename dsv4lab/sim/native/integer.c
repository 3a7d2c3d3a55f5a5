/* Integer arithmetic, logic, bit fields, comparison and selection. */
#include "core.h"

#define WIDTHS(M, name, ...) M(name##_16, u16, s16, __VA_ARGS__) M(name##_32, u32, s32, __VA_ARGS__) \
    M(name##_64, u64, s64, __VA_ARGS__)
#define UNSIGNED1(name, U, S, expression) UNARY(name, U, U, expression)
#define UNSIGNED2(name, U, S, expression) BINARY(name, U, U, U, expression)
#define UNSIGNED3(name, U, S, expression) TERNARY(name, U, U, U, U, expression)
#define SIGNED1(name, U, S, expression) UNARY(name, U, S, expression)
#define SIGNED2(name, U, S, expression) BINARY(name, U, S, S, expression)

WIDTHS(UNSIGNED2, add, x + y)
WIDTHS(UNSIGNED2, sub, x - y)
/* u16 operands are promoted to int, whose product may overflow, so products are formed in u64. */
WIDTHS(UNSIGNED2, mul, (u64)x *y)
WIDTHS(UNSIGNED3, mad, (u64)x *y + z)
WIDTHS(UNSIGNED2, and, x &y)
WIDTHS(UNSIGNED2, or, x | y)
WIDTHS(UNSIGNED2, xor, x ^ y)
WIDTHS(UNSIGNED1, not, ~x)
WIDTHS(UNSIGNED1, cnot, x == 0)
WIDTHS(UNSIGNED1, neg, 0 - x)
WIDTHS(SIGNED1, abs, x < 0 ? 0 - (u64)x : (u64)x)
WIDTHS(UNSIGNED2, umin, x < y ? x : y)
WIDTHS(UNSIGNED2, umax, x > y ? x : y)
WIDTHS(SIGNED2, smin, x < y ? x : y)
WIDTHS(SIGNED2, smax, x > y ? x : y)
BINARY(and_p, u8, u8, u8, x &y)
BINARY(or_p, u8, u8, u8, x | y)
BINARY(xor_p, u8, u8, u8, x ^ y)
UNARY(not_p, u8, u8, x ^ 1)

/* Amounts of the width or more shift everything out. */
#define SHIFTS(bits, U, S)                                                              \
    BINARY(shl_##bits, U, U, u32, y >= bits ? 0 : (u64)x << y)                          \
    BINARY(ushr_##bits, U, U, u32, y >= bits ? 0 : x >> y)                              \
    BINARY(sshr_##bits, U, S, u32, x >> (y < bits ? y : bits - 1))
SHIFTS(16, u16, s16)
SHIFTS(32, u32, s32)
SHIFTS(64, u64, s64)

#define WIDE(name, W, V, N)                                     \
    BINARY(name, W, N, N, (V)x *(V)y)                           \
    TERNARY(mad##name, W, N, N, W, (W)((V)x * (V)y) + z)
WIDE(uwide_16, u32, u32, u16)
WIDE(swide_16, u32, s32, s16)
WIDE(uwide_32, u64, u64, u32)
WIDE(swide_32, u64, s64, s32)

#define HIGH(name, U, V, N, bits)                               \
    BINARY(name, U, N, N, ((V)x * (V)y) >> bits)                \
    TERNARY(mad##name, U, N, N, U, (U)(((V)x * (V)y) >> bits) + z)
HIGH(uhigh_16, u16, u32, u16, 16)
HIGH(shigh_16, u16, s32, s16, 16)
HIGH(uhigh_32, u32, u64, u32, 32)
HIGH(shigh_32, u32, s64, s32, 32)
HIGH(uhigh_64, u64, u128, u64, 64)
HIGH(shigh_64, u64, __int128, s64, 64)

/* A divisor of 0 gives all ones, or the dividend; the least number divided by -1 is itself. */
WIDTHS(UNSIGNED2, udiv, y ? x / y : (u64)-1)
WIDTHS(UNSIGNED2, urem, y ? x % y : x)
WIDTHS(SIGNED2, sdiv, y == 0 ? (u64)-1 : y == -1 ? 0 - (u64)x : (u64)(x / y))
WIDTHS(SIGNED2, srem, y == 0 ? x : y == -1 ? 0 : x % y)

static u32 length(u64 x) { return x ? 64 - (u32)__builtin_clzll(x) : 0; }
static u64 reversed(u64 x, int bits)
{
    u64 out = 0;
    for (int i = 0; i < bits; i++)
        out |= (x >> i & 1) << (bits - 1 - i);
    return out;
}
#define COUNTS(bits, U, S)                                                                                          \
    UNARY(popc_##bits, u32, U, __builtin_popcountll(x))                                                             \
    UNARY(clz_##bits, u32, U, bits - length(x))                                                                     \
    UNARY(ubfind_##bits, u32, U, length(x) - 1)                                                                     \
    UNARY(sbfind_##bits, u32, S, length((U)(x < 0 ? ~x : x)) - 1)                                                   \
    UNARY(brev_##bits, U, U, reversed(x, bits))
COUNTS(32, u32, s32)
COUNTS(64, u64, s64)

static u64 below(u32 bits) { return bits >= 64 ? ~0ull : (1ull << bits) - 1; }
static u64 extract(u64 x, u32 start, u32 count, u32 bits, int sign)
{
    u32 top = start + count - 1 < bits - 1 ? start + count - 1 : bits - 1;
    u32 have = start >= bits ? 0 : count < bits - start ? count : bits - start;
    u64 value = start < bits ? (x >> start) & below(count) : 0;
    return value | (sign && count && (x >> top & 1) ? ~below(have) : 0);
}
static u64 insert(u64 x, u64 y, u32 start, u32 count)
{
    u64 place = start >= 64 ? 0 : below(count) << start;
    return (y & ~place) | (start >= 64 ? 0 : (x << start) & place);
}
#define FIELDS(bits, U)                                                                                   \
    TERNARY(ubfe_##bits, U, U, u32, u32, extract(x, y & 255, z & 255, bits, 0))                           \
    TERNARY(sbfe_##bits, U, U, u32, u32, extract(x, y & 255, z & 255, bits, 1))                           \
    OP(bfi_##bits)                                                                                        \
    {                                                                                                     \
        U *d = ROW(U, s->d);                                                                              \
        const U *a = ROW(U, s->a), *b = ROW(U, s->b);                                                     \
        const u32 *start = ROW(u32, s->c), *count = ROW(u32, s->list);                                    \
        EACH({ d[i] = (U)insert(a[i], b[i], start[i] & 255, count[i] & 255); });                          \
        return DONE;                                                                                      \
    }
FIELDS(32, u32)
FIELDS(64, u64)

static u32 funnel(u32 low, u32 high, u32 n, int left)
{
    u64 both = (u64)high << 32 | low;
    return (u32)(left ? both << n >> 32 : both >> n);
}
TERNARY(shf_l_wrap, u32, u32, u32, u32, funnel(x, y, z & 31, 1))
TERNARY(shf_l_clamp, u32, u32, u32, u32, funnel(x, y, z < 32 ? z : 32, 1))
TERNARY(shf_r_wrap, u32, u32, u32, u32, funnel(x, y, z & 31, 0))
TERNARY(shf_r_clamp, u32, u32, u32, u32, funnel(x, y, z < 32 ? z : 32, 0))

OP(lop3)
{
    u32 *d = ROW(u32, s->d);
    const u32 *a = ROW(u32, s->a), *b = ROW(u32, s->b), *c = ROW(u32, s->c);
    EACH({
        u32 value = 0;
        for (int term = 0; term < 8; term++)
            if (s->k >> term & 1)
                value |= (term & 4 ? a[i] : ~a[i]) & (term & 2 ? b[i] : ~b[i]) & (term & 1 ? c[i] : ~c[i]);
        d[i] = value;
    });
    return DONE;
}

static u32 permuted(u64 bytes, u32 choice)
{
    u32 out = 0;
    for (int k = 0; k < 4; k++) {
        u32 nibble = choice >> (4 * k) & 15, byte = (u32)(bytes >> (8 * (nibble & 7))) & 255;
        out |= (nibble & 8 ? (byte & 128 ? 255u : 0) : byte) << (8 * k);
    }
    return out;
}
TERNARY(prmt, u32, u32, u32, u32, permuted((u64)y << 32 | x, z))

/* variant: the predicate is negated */
#define SELECT(name, T)                                                     \
    OP(name)                                                                \
    {                                                                       \
        T *d = ROW(T, s->d);                                                \
        const T *a = ROW(T, s->a), *b = ROW(T, s->b);                       \
        const u8 *p = ROW(u8, s->c);                                        \
        u8 flip = s->variant;                                               \
        EACH({ d[i] = p[i] ^ flip ? a[i] : b[i]; });                        \
        return DONE;                                                        \
    }
SELECT(selp_16, u16)
SELECT(selp_32, u32)
SELECT(selp_64, u64)

/* d, list: predicates for the result and its inverse, each combined (size: 1 and, 2 or, 3 xor) with c (count: negated). */
static void put(const Frame *f, const Step *s, const u8 *m, s32 slot, const u8 *result, u8 invert)
{
    u8 *d = ROW(u8, slot);
    const u8 *c = s->size ? ROW(u8, s->c) : 0;
    u8 flip = (u8)s->count;
    if (s->size == 0)
        EACH({ d[i] = result[i] ^ invert; });
    else if (s->size == 1)
        EACH({ d[i] = (result[i] ^ invert) & (c[i] ^ flip); });
    else if (s->size == 2)
        EACH({ d[i] = (result[i] ^ invert) | (c[i] ^ flip); });
    else
        EACH({ d[i] = result[i] ^ invert ^ c[i] ^ flip; });
}
int native_compared(const Frame *f, const Step *s, const u8 *m, const u8 *result)
{
    u8 other[MOST_LANES]; /* the combining predicate may be the first target */
    if (s->d >= 0 && s->list >= 0 && s->size && s->c == s->d) {
        u8 *c = ROW(u8, s->c);
        memcpy(other, c, (size_t)f->n);
        put(f, s, m, s->list, result, 1);
        put(f, s, m, s->d, result, 0);
        return DONE;
    }
    if (s->d >= 0)
        put(f, s, m, s->d, result, 0);
    if (s->list >= 0)
        put(f, s, m, s->list, result, 1);
    return DONE;
}

#define COMPARE(name, T)                                                                  \
    OP(name)                                                                              \
    {                                                                                     \
        const T *a = ROW(T, s->a), *b = ROW(T, s->b);                                     \
        u8 r[MOST_LANES];                                                                 \
        s32 n = f->n;                                                                     \
        switch (s->variant) {                                                             \
        case 0: for (s32 i = 0; i < n; i++) r[i] = a[i] == b[i]; break;                   \
        case 1: for (s32 i = 0; i < n; i++) r[i] = a[i] != b[i]; break;                   \
        case 2: for (s32 i = 0; i < n; i++) r[i] = a[i] < b[i]; break;                    \
        case 3: for (s32 i = 0; i < n; i++) r[i] = a[i] <= b[i]; break;                   \
        case 4: for (s32 i = 0; i < n; i++) r[i] = a[i] > b[i]; break;                    \
        default: for (s32 i = 0; i < n; i++) r[i] = a[i] >= b[i];                         \
        }                                                                                 \
        return native_compared(f, s, m, r);                                               \
    }
COMPARE(setp_u16, u16)
COMPARE(setp_s16, s16)
COMPARE(setp_u32, u32)
COMPARE(setp_s32, s32)
COMPARE(setp_u64, u64)
COMPARE(setp_s64, s64)

BINARY(mapa_32, u32, u32, u32, (x & 0xFFFFFF) | y << 24)
BINARY(mapa_64, u64, u64, u32, (x & (s->variant ? 0xFFFFFF : 0xFFFFFFFF00FFFFFF)) | (u64)y << 24)

#define ALL(name, c) {#name ".16", c##_16}, {#name ".32", c##_32}, {#name ".64", c##_64}
const Entry integer_entries[] = {
    ALL(add, add), ALL(sub, sub), ALL(mul, mul), ALL(mad, mad), ALL(and, and), ALL(or, or), ALL(xor, xor), ALL(not, not),
    ALL(cnot, cnot), ALL(neg, neg), ALL(abs, abs), ALL(umin, umin), ALL(umax, umax), ALL(smin, smin), ALL(smax, smax),
    ALL(shl, shl), ALL(ushr, ushr), ALL(sshr, sshr), ALL(udiv, udiv), ALL(urem, urem), ALL(sdiv, sdiv), ALL(srem, srem),
    ALL(selp, selp), ALL(uhigh, uhigh), ALL(shigh, shigh), ALL(maduhigh, maduhigh), ALL(madshigh, madshigh),
    {"and.p", and_p}, {"or.p", or_p}, {"xor.p", xor_p}, {"not.p", not_p},
    {"uwide.16", uwide_16}, {"swide.16", swide_16}, {"uwide.32", uwide_32}, {"swide.32", swide_32},
    {"maduwide.16", maduwide_16}, {"madswide.16", madswide_16}, {"maduwide.32", maduwide_32}, {"madswide.32", madswide_32},
    {"popc.32", popc_32}, {"popc.64", popc_64}, {"clz.32", clz_32}, {"clz.64", clz_64},
    {"ubfind.32", ubfind_32}, {"ubfind.64", ubfind_64}, {"sbfind.32", sbfind_32}, {"sbfind.64", sbfind_64},
    {"brev.32", brev_32}, {"brev.64", brev_64}, {"ubfe.32", ubfe_32}, {"ubfe.64", ubfe_64}, {"sbfe.32", sbfe_32},
    {"sbfe.64", sbfe_64}, {"bfi.32", bfi_32}, {"bfi.64", bfi_64},
    {"shf.l.wrap", shf_l_wrap}, {"shf.l.clamp", shf_l_clamp}, {"shf.r.wrap", shf_r_wrap}, {"shf.r.clamp", shf_r_clamp},
    {"lop3", lop3}, {"prmt", prmt}, {"mapa.32", mapa_32}, {"mapa.64", mapa_64},
    {"setp.u16", setp_u16}, {"setp.s16", setp_s16}, {"setp.u32", setp_u32}, {"setp.s32", setp_s32},
    {"setp.u64", setp_u64}, {"setp.s64", setp_s64}, {0, 0},
};
