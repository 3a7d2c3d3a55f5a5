/* Instructions of whole warps. The loop calls them with every lane present (m is NULL). */
#include "core.h"

/* d: register for the elected lane, b: predicate; -1: none */
OP(elect)
{
    if (m)
        return DECLINED;
    for (s32 i = 0; i < f->n; i++) {
        if (s->d >= 0)
            ROW(u32, s->d)[i] = 0;
        if (s->b >= 0)
            ROW(u8, s->b)[i] = i % WARP == 0;
    }
    return DONE;
}

/* variant: 0 all, 1 any, 2 uni, 3 ballot, + 4: the predicate (a) is negated */
OP(vote)
{
    if (m)
        return DECLINED;
    u8 flip = s->variant >> 2;
    for (s32 w = 0; w < f->n; w += WARP) {
        const u8 *p = ROW(u8, s->a) + w;
        u32 bits = 0;
        for (s32 i = 0; i < WARP; i++)
            bits |= (u32)(p[i] ^ flip) << i;
        if ((s->variant & 3) == 3)
            for (s32 i = 0; i < WARP; i++)
                ROW(u32, s->d)[w + i] = bits;
        else {
            int all = bits == 0xFFFFFFFF, any = bits != 0;
            u8 result = (u8)((s->variant & 3) == 0 ? all : (s->variant & 3) == 1 ? any : all || !any);
            memset(ROW(u8, s->d) + w, result, WARP);
        }
    }
    return DONE;
}

/* variant: 0 idx, 1 bfly, 2 up, 3 down; list: slot of the predicate, -1: none */
OP(shuffle)
{
    if (m)
        return DECLINED;
    for (s32 w = 0; w < f->n; w += WARP) {
        u32 out[WARP];
        u8 valid[WARP];
        const u32 *a = ROW(u32, s->a) + w, *b = ROW(u32, s->b) + w, *c = ROW(u32, s->c) + w;
        for (s32 lane = 0; lane < WARP; lane++) {
            s32 step = b[lane] & 31, segment = c[lane] >> 8 & 31, clamp = c[lane] & 31, source, inside;
            s32 low = lane & segment, high = low | (clamp & ~segment);
            switch (s->variant) {
            case 0: source = low | (step & ~segment); inside = source <= high; break;
            case 1: source = lane ^ step; inside = source <= high; break;
            case 2: source = lane - step; inside = source >= high; break;
            default: source = lane + step; inside = source <= high;
            }
            out[lane] = a[inside ? source : lane];
            valid[lane] = (u8)inside;
        }
        if (s->d >= 0)
            memcpy(ROW(u32, s->d) + w, out, sizeof out);
        if (s->list >= 0)
            memcpy(ROW(u8, s->list) + w, valid, sizeof valid);
    }
    return DONE;
}

/* variant: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor, + 8: signed */
OP(reduce)
{
    if (m)
        return DECLINED;
    for (s32 w = 0; w < f->n; w += WARP) {
        const u32 *a = ROW(u32, s->a) + w;
        u32 out = a[0];
        for (s32 i = 1; i < WARP; i++) {
            u32 x = a[i];
            int less = s->variant & 8 ? (s32)x < (s32)out : x < out;
            switch (s->variant & 7) {
            case 0: out += x; break;
            case 1: out = less ? x : out; break;
            case 2: out = less ? out : x; break;
            case 3: out &= x; break;
            case 4: out |= x; break;
            default: out ^= x;
            }
        }
        for (s32 i = 0; i < WARP; i++)
            ROW(u32, s->d)[w + i] = out;
    }
    return DONE;
}

const Entry collective_entries[] = {
    {"elect", elect}, {"vote", vote}, {"shuffle", shuffle}, {"reduce", reduce}, {0, 0},
};
