/* The native core: instructions as fixed-size records, executed for all lanes of a unit of warps.
 *
 * An operation either executes an instruction whole or declines it without having changed anything (DECLINED). What is
 * declined goes to the numpy handlers, which are the reference and the only home of errors.
 */
#ifndef DSV4LAB_SIM_CORE_H
#define DSV4LAB_SIM_CORE_H

#include <stdint.h>
#include <string.h>

enum { WARP = 32, MOST_LANES = 1024 };
enum { DONE = 0, DECLINED = 1, FULL = 2 };
enum { PLAIN = 0, BRANCH = 1, STOP = 2 }; /* Step.kind */

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef unsigned __int128 u128;

typedef struct Frame Frame;
typedef struct Step Step;

/* m: one byte a lane, or NULL for all lanes. */
typedef int (*Operation)(const Frame *f, const Step *s, const u8 *m);

/* One instruction. Operands are register slots; -1: none. bytecode.py has the same layout. */
struct Step {
    Operation run;           /* NULL: not executed here */
    s64 k;                   /* constant: byte offset, truth table, branch target */
    s32 guard;               /* predicate slot */
    s32 d, a, b, c;
    s32 list;                /* first of `count` slots in Program.lists */
    u16 count, size;
    u8 kind, negated, ends;  /* negated: the guard; ends: a block ends here (a turn is counted in blocks) */
    u8 variant;              /* what the operation makes of it */
    u8 convergent, single;   /* needs whole warps; one warp at a time */
    u8 move;                 /* only moves registers, which is let through where wgmma owns them */
    u8 traffic;              /* observers want to see it */
};

typedef struct {
    const Step *steps;
    s64 total;
    const s32 *lists;
    const u8 *widths;        /* bytes of a register by slot; 0: predicate */
    const s32 *touch_start;  /* slots that instruction i touches: touched[touch_start[i] .. touch_start[i + 1] - 1] */
    const s32 *touched;
} Program;

typedef struct {
    u64 start, end;          /* addresses */
} Range;

typedef struct {
    u8 *data;
    u8 *written;             /* by 4-byte word */
    u64 size;
    const u8 *phases;        /* 1 + parity of the phase of the mbarrier at a multiple of 8; 0: none there */
} Shared;

/* A CTA as the operations see it. */
typedef struct {
    const Program *program;
    u8 *const *rows;         /* a register's values over the CTA's threads, by slot */
    const Range *globals;    /* sorted */
    s64 global_count;
    const Shared *shared;    /* of every CTA of the cluster, by rank */
    s64 ranks;
    s64 rank;
    u8 *params;
    u64 params_size;
    u8 *local;
    u64 local_stride;        /* bytes of a thread */
    s64 check_reads;         /* shared memory must have been written before it is read */
} Cta;

/* Where execution stands, the warp-instructions it took, and the way it went: runs of instructions, each from its first to behind
 * its last; NULL if nobody wants to know.
 */
typedef struct {
    s64 pc, left, count;
    s64 (*runs)[2];
    s64 room, used;
} Progress;

/* The lanes that execute. */
struct Frame {
    const Cta *cta;
    u8 *const *rows;
    s32 first, n;
};

typedef struct {
    const char *name;
    Operation run;
} Entry;

extern const Entry control_entries[], integer_entries[], float_entries[], convert_entries[], memory_entries[],
    collective_entries[];

#define ROW(T, slot) ((T *)f->rows[slot] + f->first)
#define OP(name) static int name(const Frame *f, const Step *s, const u8 *m)
/* Lanes are independent of one another, so a target may be a source as well. */
#define EACH(...)                               \
    do {                                        \
        if (!m)                                 \
            for (s32 i = 0; i < f->n; i++)      \
                __VA_ARGS__                     \
        else                                    \
            for (s32 i = 0; i < f->n; i++)      \
                if (m[i])                       \
                    __VA_ARGS__                 \
    } while (0)

#define UNARY(name, T, A, expression)           \
    OP(name)                                    \
    {                                           \
        T *d = ROW(T, s->d);                    \
        const A *a = ROW(A, s->a);              \
        EACH({ A x = a[i]; d[i] = (T)(expression); }); \
        return DONE;                            \
    }
#define BINARY(name, T, A, B, expression)       \
    OP(name)                                    \
    {                                           \
        T *d = ROW(T, s->d);                    \
        const A *a = ROW(A, s->a);              \
        const B *b = ROW(B, s->b);              \
        EACH({ A x = a[i]; B y = b[i]; d[i] = (T)(expression); }); \
        return DONE;                            \
    }
#define TERNARY(name, T, A, B, C, expression)   \
    OP(name)                                    \
    {                                           \
        T *d = ROW(T, s->d);                    \
        const A *a = ROW(A, s->a);              \
        const B *b = ROW(B, s->b);              \
        const C *c = ROW(C, s->c);              \
        EACH({ A x = a[i]; B y = b[i]; C z = c[i]; d[i] = (T)(expression); }); \
        return DONE;                            \
    }

static inline int holds(const u8 *m, s32 i) { return !m || m[i]; }

#endif
