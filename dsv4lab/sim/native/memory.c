/* Loads and stores of global, shared, local and parameter memory. Any irregular lane declines the whole instruction. */
#include "core.h"

enum { GENERIC, GLOBAL, SHARED, LOCAL, PARAM };
static const u64 SHARED_WINDOW = 1ull << 48, LOCAL_WINDOW = 1ull << 49, PARAM_WINDOW = 1ull << 50, WINDOW_BYTES = 1ull << 32;

/* Bytes of an access at `address`, or NULL. written: set to the flag of its first word, in shared memory. */
static u8 *place(const Frame *f, int space, u64 address, u32 width, s32 lane, int store, u8 **written, const Range **recent)
{
    const Cta *cta = f->cta;
    *written = 0;
    if (space == GENERIC) {
        if (address < SHARED_WINDOW)
            space = GLOBAL;
        else if (address < SHARED_WINDOW + WINDOW_BYTES)
            space = SHARED, address -= SHARED_WINDOW;
        else
            return 0;
    }
    if (address & (width - 1))
        return 0;
    if (space == SHARED) {
        u64 rank = address >> 24, offset = address & 0xFFFFFF;
        if (rank >= (u64)cta->ranks)
            return 0;
        const Shared *shared = &cta->shared[rank];
        if (offset + width > shared->size)
            return 0;
        *written = shared->written + (offset >> 2);
        if (!store && cta->check_reads) {
            for (u32 word = 0; word < (width + 3) / 4; word++)
                if (!(*written)[word])
                    return 0;
        }
        return shared->data + offset;
    }
    if (space == GLOBAL) {
        const Range *range = *recent;
        if (!range || address < range->start || address >= range->end) {
            s64 low = 0, high = cta->global_count;
            while (low < high) {
                s64 middle = (low + high) / 2;
                if (cta->globals[middle].start <= address)
                    low = middle + 1;
                else
                    high = middle;
            }
            if (!low)
                return 0;
            range = *recent = &cta->globals[low - 1];
        }
        return address + width <= range->end ? (u8 *)(uintptr_t)address : 0;
    }
    if (space == LOCAL) {
        u64 offset = address - LOCAL_WINDOW;
        if (!cta->local || offset >= cta->local_stride || offset + width > cta->local_stride)
            return 0;
        return cta->local + offset + (u64)(f->first + lane) * cta->local_stride;
    }
    u64 offset = address - PARAM_WINDOW;
    return !store && offset < cta->params_size && offset + width <= cta->params_size ? cta->params + offset : 0;
}

/* variant: address space, + 8: the base register has 4 bytes, + 16: values are sign-extended. */
static int places(const Frame *f, const Step *s, const u8 *m, int store, u8 **at, u8 **written)
{
    int space = s->variant & 7, narrow = s->variant & 8;
    u32 width = (u32)s->size * s->count;
    const u32 *base4 = ROW(u32, s->a);
    const u64 *base8 = ROW(u64, s->a);
    const Range *recent = 0;
    for (s32 i = 0; i < f->n; i++) {
        if (!holds(m, i))
            continue;
        at[i] = place(f, space, (narrow ? base4[i] : base8[i]) + (u64)s->k, width, i, store, &written[i], &recent);
        if (!at[i])
            return DECLINED;
    }
    return DONE;
}

#define COPY_IN(T, V) { T *d = ROW(T, slot); EACH({ V v; memcpy(&v, at[i] + j * sizeof v, sizeof v); d[i] = (T)v; }); }
OP(load)
{
    u8 *at[MOST_LANES], *written[MOST_LANES];
    const s32 *slots = f->cta->program->lists + s->list;
    if (places(f, s, m, 0, at, written))
        return DECLINED;
    int sign = s->variant & 16;
    for (s32 j = 0; j < s->count; j++) {
        s32 slot = slots[j];
        if (slot < 0)
            continue;
        switch (f->cta->program->widths[slot] * 16 + s->size) {
        case 8 * 16 + 8: COPY_IN(u64, u64) break;
        case 4 * 16 + 4: COPY_IN(u32, u32) break;
        case 2 * 16 + 2: COPY_IN(u16, u16) break;
        case 1 * 16 + 1: COPY_IN(u8, u8) break;
        case 8 * 16 + 4: if (sign) COPY_IN(s64, s32) else COPY_IN(u64, u32) break;
        case 8 * 16 + 2: if (sign) COPY_IN(s64, s16) else COPY_IN(u64, u16) break;
        case 8 * 16 + 1: if (sign) COPY_IN(s64, int8_t) else COPY_IN(u64, u8) break;
        case 4 * 16 + 2: if (sign) COPY_IN(s32, s16) else COPY_IN(u32, u16) break;
        case 4 * 16 + 1: if (sign) COPY_IN(s32, int8_t) else COPY_IN(u32, u8) break;
        case 2 * 16 + 1: if (sign) COPY_IN(s16, int8_t) else COPY_IN(u16, u8) break;
        default: return DECLINED;
        }
    }
    return DONE;
}

/* Later lanes win where addresses are equal. */
OP(store)
{
    u8 *at[MOST_LANES], *written[MOST_LANES];
    const s32 *slots = f->cta->program->lists + s->list;
    const u8 *widths = f->cta->program->widths;
    if (places(f, s, m, 1, at, written))
        return DECLINED;
    u32 words = ((u32)s->size * s->count + 3) / 4;
    for (s32 i = 0; i < f->n; i++) {
        if (!holds(m, i))
            continue;
        for (s32 j = 0; j < s->count; j++) /* little-endian: the low bytes come first */
            memcpy(at[i] + j * s->size, f->rows[slots[j]] + (s64)(f->first + i) * widths[slots[j]], s->size);
        if (written[i])
            memset(written[i], 1, words);
    }
    return DONE;
}

/* k: offset of a parameter read by name; the same value for every lane */
OP(load_param)
{
    const s32 *slots = f->cta->program->lists + s->list;
    for (s32 j = 0; j < s->count; j++) {
        s32 slot = slots[j];
        const u8 *from = f->cta->params + s->k + j * s->size;
        if (slot < 0)
            continue;
        u64 value = 0;
        memcpy(&value, from, s->size);
        if (s->variant & 16) {
            int unused = 64 - 8 * s->size;
            value = (u64)((s64)(value << unused) >> unused);
        }
        switch (f->cta->program->widths[slot]) {
        case 8: { u64 *d = ROW(u64, slot); EACH({ d[i] = value; }); break; }
        case 4: { u32 *d = ROW(u32, slot); EACH({ d[i] = (u32)value; }); break; }
        case 2: { u16 *d = ROW(u16, slot); EACH({ d[i] = (u16)value; }); break; }
        default: { u8 *d = ROW(u8, slot); EACH({ d[i] = (u8)value; }); }
        }
    }
    return DONE;
}

/* ldmatrix and stmatrix: `count` 8 x 8 matrices of 16-bit elements; lane 8 k + r gives the address of matrix k's row r.
 * variant: as for loads, + 32: transposed. */
static int matrix_rows(const Frame *f, const Step *s, int store, u8 **at, u8 **written)
{
    const u32 *base4 = ROW(u32, s->a);
    const u64 *base8 = ROW(u64, s->a);
    const Range *recent = 0;
    for (s32 w = 0; w < f->n; w += WARP)
        for (s32 i = w; i < w + 8 * s->count; i++) {
            at[i] = place(f, SHARED, (s->variant & 8 ? base4[i] : base8[i]) + (u64)s->k, 16, i, store, &written[i], &recent);
            if (!at[i])
                return DECLINED;
        }
    return DONE;
}

OP(load_matrix)
{
    u8 *at[MOST_LANES], *written[MOST_LANES];
    const s32 *slots = f->cta->program->lists + s->list;
    if (m || matrix_rows(f, s, 0, at, written))
        return DECLINED;
    for (s32 w = 0; w < f->n; w += WARP)
        for (s32 k = 0; k < s->count; k++) {
            u32 *d = ROW(u32, slots[k]) + w;
            for (s32 lane = 0; lane < WARP; lane++) {
                s32 row = lane / 4, column = 2 * (lane % 4);
                u16 low, high;
                if (s->variant & 32) {
                    memcpy(&low, at[w + 8 * k + column] + 2 * row, 2);
                    memcpy(&high, at[w + 8 * k + column + 1] + 2 * row, 2);
                } else {
                    memcpy(&low, at[w + 8 * k + row] + 2 * column, 2);
                    memcpy(&high, at[w + 8 * k + row] + 2 * column + 2, 2);
                }
                d[lane] = (u32)high << 16 | low;
            }
        }
    return DONE;
}

OP(store_matrix)
{
    u8 *at[MOST_LANES], *written[MOST_LANES];
    const s32 *slots = f->cta->program->lists + s->list;
    if (m || matrix_rows(f, s, 1, at, written))
        return DECLINED;
    for (s32 w = 0; w < f->n; w += WARP)
        for (s32 k = 0; k < s->count; k++) {
            const u32 *a = ROW(u32, slots[k]) + w;
            for (s32 r = 0; r < 8; r++) {
                u16 line[8];
                for (s32 column = 0; column < 8; column++) {
                    s32 row = s->variant & 32 ? column : r, other = s->variant & 32 ? r : column;
                    line[column] = (u16)(a[4 * row + other / 2] >> (16 * (other % 2)));
                }
                memcpy(at[w + 8 * k + r], line, 16);
                memset(written[w + 8 * k + r], 1, 4);
            }
        }
    return DONE;
}

/* mbarrier.try_wait and test_wait where all lanes' phases (b: parity, of `size` bytes) have completed. */
OP(try_wait)
{
    u8 *d = ROW(u8, s->d);
    const u32 *base4 = ROW(u32, s->a), *parity4 = ROW(u32, s->b);
    const u64 *base8 = ROW(u64, s->a), *parity8 = ROW(u64, s->b);
    for (s32 i = 0; i < f->n; i++) {
        if (!holds(m, i))
            continue;
        u64 address = (s->variant & 8 ? base4[i] : base8[i]) + (u64)s->k;
        address -= address >= SHARED_WINDOW ? SHARED_WINDOW : 0;
        u64 rank = address >> 24, offset = address & 0xFFFFFF, parity = (s->size == 4 ? parity4[i] : parity8[i]) & 1;
        if (rank >= (u64)f->cta->ranks || offset + 8 > f->cta->shared[rank].size || offset & 7)
            return DECLINED;
        u8 phase = f->cta->shared[rank].phases[offset >> 3];
        if (!phase || phase - 1u == parity)
            return DECLINED;
    }
    EACH({ d[i] = 1; });
    return DONE;
}

const Entry memory_entries[] = {
    {"load", load},
    {"store", store},
    {"load.param", load_param},
    {"load.matrix", load_matrix},
    {"store.matrix", store_matrix},
    {"try.wait", try_wait},
    {0, 0},
};
