/* Moves between registers, and instructions without an effect. */
#include "core.h"

OP(nothing) { (void)f, (void)s, (void)m; return DONE; }

UNARY(mov_8, u8, u8, x)
UNARY(mov_16, u16, u16, x)
UNARY(mov_32, u32, u32, x)
UNARY(mov_64, u64, u64, x)

/* Registers of the list, side by side, become one of `count` times their size. */
#define PACK(name, T)                                                  \
    OP(name)                                                           \
    {                                                                  \
        s32 parts = s->count;                                          \
        T *d = (T *)f->rows[s->d] + (s64)f->first * parts;             \
        for (s32 j = 0; j < parts; j++) {                              \
            const T *a = ROW(T, f->cta->program->lists[s->list + j]);  \
            EACH({ d[i * parts + j] = a[i]; });                        \
        }                                                              \
        return DONE;                                                   \
    }
PACK(pack_8, u8)
PACK(pack_16, u16)
PACK(pack_32, u32)

#define UNPACK(name, T)                                                     \
    OP(name)                                                                \
    {                                                                       \
        s32 parts = s->count;                                               \
        const T *a = (const T *)f->rows[s->a] + (s64)f->first * parts;      \
        for (s32 j = 0; j < parts; j++) {                                   \
            s32 slot = f->cta->program->lists[s->list + j];                 \
            if (slot < 0)                                                   \
                continue;                                                   \
            T *d = ROW(T, slot);                                            \
            EACH({ d[i] = a[i * parts + j]; });                             \
        }                                                                   \
        return DONE;                                                        \
    }
UNPACK(unpack_8, u8)
UNPACK(unpack_16, u16)
UNPACK(unpack_32, u32)

const Entry control_entries[] = {
    {"nothing", nothing},     {"mov.8", mov_8},         {"mov.16", mov_16},       {"mov.32", mov_32},
    {"mov.64", mov_64},       {"pack.8", pack_8},       {"pack.16", pack_16},     {"pack.32", pack_32},
    {"unpack.8", unpack_8},   {"unpack.16", unpack_16}, {"unpack.32", unpack_32}, {0, 0},
};
