/* The loop over instructions, and the table of operations by name. */
#include "core.h"

static const Entry *const tables[] = {control_entries, integer_entries,    float_entries,
                                      convert_entries, memory_entries, collective_entries};

/* The address of an operation, 0 if there is none of that name. */
u64 native_find(const char *name)
{
    for (u64 t = 0; t < sizeof tables / sizeof *tables; t++)
        for (const Entry *entry = tables[t]; entry->name; entry++)
            if (!strcmp(entry->name, name))
                return (u64)(uintptr_t)entry->run;
    return 0;
}

/* Names of all operations, one after another; NULL past the last. */
const char *native_name(s64 index)
{
    for (u64 t = 0; t < sizeof tables / sizeof *tables; t++)
        for (const Entry *entry = tables[t]; entry->name; entry++)
            if (!index--)
                return entry->name;
    return 0;
}

u64 native_step_bytes(void) { return sizeof(Step); }

/* Lanes of the guard that are active, as bytes in `out`; returns how many. */
static s32 guarded(const Frame *f, const Step *s, const u8 *m, u8 *out)
{
    const u8 *p = ROW(u8, s->guard);
    s32 active = 0;
    for (s32 i = 0; i < f->n; i++) {
        out[i] = (p[i] ^ s->negated) & (m ? m[i] : 1);
        active += out[i];
    }
    return active;
}

static s32 lanes_of(const u8 *m, s32 n)
{
    s32 active = 0;
    if (!m)
        return n;
    for (s32 i = 0; i < n; i++)
        active += m[i];
    return active;
}

static int watched(const Program *program, s64 pc, const u8 *watch)
{
    for (s32 i = program->touch_start[pc]; i < program->touch_start[pc + 1]; i++)
        if (watch[program->touched[i]])
            return 1;
    return 0;
}

static void ran(Progress *progress, s64 from, s64 to)
{
    if (!progress->runs || from == to)
        return;
    progress->runs[progress->used][0] = from;
    progress->runs[progress->used++][1] = to;
}

/* Execute lanes first .. first + n - 1 from progress->pc until the turn is over or an instruction must be declined.
 *
 * limit: the turn also ends where a block ends at or behind this instruction. watch: slots that belong to a wgmma in flight, or
 * NULL; instructions that touch them are declined, moves only if `moves_too`. see: traffic that observers want to see and that
 * is declined for them. Returns DONE, DECLINED, or FULL where there is no room for another run; progress->pc is the next
 * instruction, or the declined one.
 */
int native_run(const Cta *cta, s64 first, s64 n, s64 limit, const u8 *mask, const u8 *watch, int moves_too, int see,
               Progress *progress)
{
    const Program *program = cta->program;
    const Frame frame = {cta, cta->rows, (s32)first, (s32)n}, *f = &frame;
    const s64 warps = n / WARP;
    const s32 lanes = lanes_of(mask, f->n);
    s64 pc = progress->pc, left = progress->left, count = 0, from = pc;
    progress->used = 0;
    int result = DONE;
    u8 chosen[MOST_LANES];
    while (left > 0) {
        if (pc >= program->total)
            break;
        const Step *s = &program->steps[pc];
        const u8 *m = mask;
        s32 active = lanes;
        int over = s->ends;
        if ((!s->run && s->kind != BRANCH) || (s->traffic & see) ||
            (watch && (moves_too || !s->move) && watched(program, pc, watch))) {
            result = DECLINED;
            break;
        }
        if (s->guard >= 0) {
            active = guarded(f, s, mask, chosen);
            m = active == f->n ? 0 : chosen;
        }
        if (s->kind == BRANCH) {
            if (active && active != lanes) {
                result = DECLINED;
                break;
            }
            over = 1;
            pc++;
            if (active && pc != s->k) {
                ran(progress, from, pc);
                from = pc = s->k;
            }
        } else {
            if (active) {
                if (s->kind == STOP) {
                    if (active != lanes || (s->convergent && mask) || (s->single && warps > 1)) {
                        result = DECLINED;
                        break;
                    }
                    m = mask;
                }
                if (s->run(f, s, m)) {
                    result = DECLINED;
                    break;
                }
            }
            pc++;
            over |= s->kind == STOP;
        }
        count += warps;
        if (over) {
            left--;
            if (pc >= limit)
                break;
            if (progress->runs && progress->used == progress->room - 1) {
                result = FULL;
                break;
            }
        }
    }
    ran(progress, from, pc);
    progress->pc = pc;
    progress->left = left;
    progress->count = count;
    return result;
}
