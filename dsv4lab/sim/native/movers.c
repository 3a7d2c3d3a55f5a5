/* Data paths of the asynchronous units: operand tiles, accumulators, tensor boxes, TMEM fragments. Like operations, each
 * returns DECLINED, having changed nothing, where it meets anything that the Python code would report. */
#include "numbers.h"

enum { HALF_TILE, BRAIN_TILE, TF32_TILE, BYTE_TILE, NIBBLE_TILE }; /* native/movers.py has the same */

/* Elements at start + index[byte] of shared memory as float32, `count` bytes of them in all. table: values by code. */
int native_tile(const Shared *shared, int check_reads, const s64 *index, s64 count, s64 start, int kind, const float *table,
                float *out)
{
    s64 size = kind == TF32_TILE ? 4 : kind <= BRAIN_TILE ? 2 : 1;
    for (s64 i = 0; i < count; i += size) {
        s64 at = start + index[i];
        if (at < 0 || at + size > (s64)shared->size || (check_reads && !shared->written[at >> 2]))
            return DECLINED;
        const u8 *from = shared->data + at;
        u16 half;
        u32 word;
        switch (kind) {
        case HALF_TILE: memcpy(&half, from, 2); out[i / 2] = f16_to_f32(half); break;
        case BRAIN_TILE: memcpy(&half, from, 2); out[i / 2] = bf16_to_f32(half); break;
        case TF32_TILE: memcpy(&word, from, 4); out[i / 4] = as_float(word & 0xFFFFE000); break;
        case BYTE_TILE: out[i] = table[*from]; break;
        default: out[2 * i] = table[*from & 15]; out[2 * i + 1] = table[*from >> 4];
        }
    }
    return DONE;
}

/* Block scaling: row i's factors are bytes from `first` on of the word at TMEM lane (lane + i % 32), column + i / 32. */
void native_scale(const float *tile, s64 rows, s64 depth, s64 block, const u32 *cells, s64 columns, s64 lane, s64 column,
                  s64 first, const float *table, float *out)
{
    for (s64 i = 0; i < rows; i++) {
        u32 word = cells[(lane + i % 32) * columns + column + i / 32];
        for (s64 b = 0; b < depth / block; b++) {
            float factor = table[word >> (8 * (first + b)) & 255];
            for (s64 k = b * block; k < (b + 1) * block; k++)
                out[i * depth + k] = tile[i * depth + k] * factor;
        }
    }
}

/* A warpgroup's float32 accumulators: register j of thread t holds row 16 (t / 32) + t % 32 / 4 + 8 (j / 2 % 2), column
 * 8 (j / 4) + 2 (t % 4) + j % 2 of the 64 x n product. */
void native_accumulate(u8 *const *rows, s64 thread, const s32 *slots, s64 n, const float *product, int add)
{
    for (s64 j = 0; j < n / 2; j++) {
        float *d = (float *)rows[slots[j]] + thread;
        for (s64 t = 0; t < 128; t++) {
            float value = product[(16 * (t / 32) + t % 32 / 4 + 8 * (j / 2 % 2)) * n + 8 * (j / 4) + 2 * (t % 4) + j % 2];
            d[t] = add ? d[t] + value : value;
        }
    }
}

/* Registers from or to cells (rows of `columns`) of TMEM; place: (count, 32) cell of register j of thread t. */
void native_fragment(u8 *const *rows, s64 thread, const s32 *slots, s64 count, u32 *cells, const s64 *place, int store)
{
    for (s64 j = 0; j < count; j++) {
        u32 *d = (u32 *)rows[slots[j]] + thread;
        for (s64 t = 0; t < WARP; t++)
            if (store)
                cells[place[j * WARP + t]] = d[t];
            else
                d[t] = cells[place[j * WARP + t]];
    }
}

/* A TMA descriptor in bytes, innermost dimension first, as tma.Plan. */
typedef struct {
    u64 address;
    s64 rank, element_bytes, swizzle; /* bits of the address to exchange: 0, 0x10, 0x30 or 0x70 */
    s64 extents[5], strides[5], box[5];
} Box;

static s64 swizzled(s64 offset, s64 bits) { return offset ^ (offset >> 3 & bits); }

static const Range *range_of(const Cta *cta, u64 address)
{
    for (s64 i = cta->global_count - 1; i >= 0; i--)
        if (cta->globals[i].start <= address)
            return address < cta->globals[i].end ? &cta->globals[i] : 0;
    return 0;
}

/* Copy a box between the tensor and shared memory at `offset`. start: its coordinates. What lies outside the tensor reads as
 * zero and is not written. */
int native_box(const Cta *cta, const Shared *shared, s64 offset, const Box *box, const s64 *start, int store)
{
    s64 low[5] = {0}, high[5] = {1, 1, 1, 1, 1}, sides[5] = {1, 1, 1, 1, 1}, strides[5] = {0}, size = box->element_bytes;
    s64 bytes = size, extent = size, empty = 0, address = (s64)box->address;
    for (s64 i = 0; i < box->rank; i++) {
        sides[i] = box->box[i];
        strides[i] = box->strides[i];
        low[i] = start[i] < 0 ? -start[i] : 0;
        high[i] = box->extents[i] - start[i] < sides[i] ? box->extents[i] - start[i] : sides[i];
        empty |= high[i] <= low[i];
        bytes *= sides[i];
        address += (start[i] + low[i]) * strides[i];
        extent += (high[i] - low[i] - 1) * strides[i];
    }
    if (offset < 0 || offset + bytes > (s64)shared->size || (box->swizzle && offset + (bytes + 1023) / 1024 * 1024 > (s64)shared->size))
        return DECLINED;
    if (!empty) {
        const Range *range = range_of(cta, (u64)address);
        if (!range || (u64)(address + extent) > range->end)
            return DECLINED;
    }
    s64 run = sides[0] * size;
    if (store && cta->check_reads)
        for (s64 linear = 0; linear < bytes; linear += 4)
            if (!shared->written[swizzled(offset + linear, box->swizzle) >> 2])
                return DECLINED;
    s64 linear = 0;
    for (s64 c4 = 0; c4 < sides[4]; c4++)
        for (s64 c3 = 0; c3 < sides[3]; c3++)
            for (s64 c2 = 0; c2 < sides[2]; c2++)
                for (s64 c1 = 0; c1 < sides[1]; c1++, linear += run) {
                    int inside = !empty && c1 >= low[1] && c1 < high[1] && c2 >= low[2] && c2 < high[2] && c3 >= low[3] &&
                                 c3 < high[3] && c4 >= low[4] && c4 < high[4];
                    s64 from = inside ? low[0] * size : run, to = inside ? high[0] * size : run;
                    u8 *row = (u8 *)(uintptr_t)address + (c1 - low[1]) * strides[1] + (c2 - low[2]) * strides[2] +
                              (c3 - low[3]) * strides[3] + (c4 - low[4]) * strides[4];
                    for (s64 at = 0; at < run;) { /* within a 16-byte chunk, inside or outside */
                        s64 here = offset + linear + at, n = 16 - here % 16;
                        n = n < run - at ? n : run - at;
                        if (at < from)
                            n = n < from - at ? n : from - at;
                        else if (at < to)
                            n = n < to - at ? n : to - at;
                        u8 *place = shared->data + swizzled(here, box->swizzle);
                        int in = at >= from && at < to;
                        if (store) {
                            if (in)
                                memcpy(row + at - from, place, (size_t)n);
                        } else {
                            if (in)
                                memcpy(place, row + at - from, (size_t)n);
                            else
                                memset(place, 0, (size_t)n);
                            s64 first = (place - shared->data) >> 2, last = (place - shared->data + n - 1) >> 2;
                            memset(shared->written + first, 1, (size_t)(last - first + 1));
                        }
                        at += n;
                    }
                }
    return DONE;
}
