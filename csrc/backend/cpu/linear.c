/* Running linear layers: preparing the input (permutation, rounding to int8) and sharing out the tiles.
 *
 * Linears of one call that want the same input (same group size and permutation) share its preparation and run in
 * one parallel region. The unit of work is two tiles (32 outputs) by a chunk of rows, chosen so that the chunk's
 * activations stay in the level-2 cache while a tile's weights stay in the level-1 cache. */
#include "backend/cpu/kernels.h"

#include <string.h>

#define QF_UNIT_TILES 2
#define QF_CHUNK_BYTES (512 << 10) /* activations of one chunk of rows */

typedef struct linear_task {
    qf_cpu_context *ctx;
    qf_linear_operands operands[QF_CPU_MAX_FUSED_LINEARS];
    int32_t num_units[QF_CPU_MAX_FUSED_LINEARS];
    int32_t num_linears;
    int32_t units_per_chunk; /* sum of num_units */
    int32_t chunk_rows, num_tokens;
    bool int8;
} linear_task;

typedef struct prepare_task {
    qf_cpu_context *ctx;
    const qf_cpu_linear *linear;
    const float *x;
    int32_t num_tokens;
    bool int8;
} prepare_task;

static bool is_quantized(const qf_cpu_linear *w) { return w->kind == QF_WEIGHT_W8 || w->kind == QF_WEIGHT_W4; }

static void prepare_blocks(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    (void)worker;
    const prepare_task *task = arg;
    const qf_cpu_linear *w = task->linear;
    const qf_cpu_context *ctx = task->ctx;
    const size_t k = (size_t)w->k, groups = (size_t)w->num_groups;
    for (int64_t block = begin; block < end; block++) {
        const int32_t row = (int32_t)block * ctx->kernels->rows_per_block;
        const int32_t left = task->num_tokens - row;
        const int32_t rows = left < ctx->kernels->rows_per_block ? left : ctx->kernels->rows_per_block;
        const float *x = task->x + (size_t)row * k;
        if (w->perm != NULL) {
            float *gathered = ctx->act_gathered + (size_t)row * k;
            for (int32_t r = 0; r < rows; r++) {
                for (size_t i = 0; i < k; i++) {
                    gathered[(size_t)r * k + i] = x[(size_t)r * k + (size_t)w->perm[i]];
                }
            }
            x = gathered;
        }
        if (task->int8) {
            ctx->kernels->quantize_rows(x, rows, w->k, w->group_size, w->num_groups,
                                        ctx->act_q + (size_t)row * groups * (size_t)w->group_size,
                                        ctx->act_scales + (size_t)row * groups, ctx->act_sums + (size_t)row * groups);
        }
    }
}

/* Gathers and rounds the input as the linear wants it, into the context's scratch. */
static void prepare_input(qf_cpu_context *ctx, const qf_cpu_linear *w, const qf_cpu_linear_args *args, bool int8)
{
    if (!int8 && w->perm == NULL) {
        return;
    }
    prepare_task task = {ctx, w, args->x, args->num_tokens, int8};
    const int32_t blocks = (args->num_tokens + ctx->kernels->rows_per_block - 1) / ctx->kernels->rows_per_block;
    if (ctx->num_threads == 1 || (int64_t)args->num_tokens * w->k <= QF_INLINE_ELEMENTS) {
        prepare_blocks(&task, 0, blocks, 0);
    } else {
        qf_thread_pool_run(ctx->pool, prepare_blocks, &task, blocks, 1);
    }
}

static void linear_units(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    (void)worker;
    const linear_task *task = arg;
    while (begin < end) {
        const int32_t chunk = (int32_t)(begin / task->units_per_chunk);
        int32_t unit = (int32_t)(begin % task->units_per_chunk), which = 0;
        while (unit >= task->num_units[which]) {
            unit -= task->num_units[which];
            which++;
        }
        /* Units of one linear and chunk that follow each other are one call. */
        const int64_t left = task->num_units[which] - unit;
        const int32_t count = (int32_t)(left < end - begin ? left : end - begin);
        qf_linear_operands operands = task->operands[which];
        operands.row_begin = chunk * task->chunk_rows;
        operands.row_end = task->num_tokens - operands.row_begin < task->chunk_rows
                               ? task->num_tokens
                               : operands.row_begin + task->chunk_rows;
        const int32_t tile_end = (unit + count) * QF_UNIT_TILES;
        const int32_t num_tiles = operands.linear->num_tiles;
        (task->int8 ? task->ctx->kernels->linear_i8 : task->ctx->kernels->linear_f32)(
            &operands, unit * QF_UNIT_TILES, tile_end < num_tiles ? tile_end : num_tiles);
        begin += count;
    }
}

static void run_units(linear_task *task, int32_t k)
{
    const qf_cpu_context *ctx = task->ctx;
    const int64_t row_bytes = (int64_t)k * (task->int8 ? 1 : 4);
    const int32_t block = ctx->kernels->rows_per_block;
    int64_t rows = QF_CHUNK_BYTES / row_bytes / block * block;
    if ((int64_t)task->units_per_chunk < 4 * (int64_t)ctx->num_threads) {
        /* Few tiles: more, smaller chunks of rows. */
        int64_t fewer = task->num_tokens / (4 * (int64_t)ctx->num_threads) / block * block;
        rows = fewer < rows ? fewer : rows;
    }
    rows = rows < block ? block : rows;
    task->chunk_rows = (int32_t)(rows < task->num_tokens ? rows : task->num_tokens);
    const int64_t num_chunks = (task->num_tokens + (int64_t)task->chunk_rows - 1) / task->chunk_rows;
    const int64_t total = num_chunks * task->units_per_chunk;
    const int64_t grain = total / (8 * (int64_t)ctx->num_threads);
    qf_thread_pool_run(ctx->pool, linear_units, task, total, grain > 1 ? grain : 1);
}

static bool same_input(const qf_cpu_linear *a, const qf_cpu_linear *b)
{
    if (is_quantized(a) != is_quantized(b) || a->group_size != b->group_size || (a->perm == NULL) != (b->perm == NULL)) {
        return false;
    }
    return a->perm == NULL || memcmp(a->perm, b->perm, (size_t)a->k * sizeof *a->perm) == 0;
}

void qf_cpu_linear_run(qf_cpu_context *ctx, const qf_cpu_linear_args *args)
{
    bool done[QF_CPU_MAX_FUSED_LINEARS] = {false};
    if (args->num_tokens <= 0) {
        return;
    }
    for (int32_t i = 0; i < args->num_linears; i++) {
        if (done[i]) {
            continue;
        }
        const qf_cpu_linear *w = args->linears[i];
        linear_task task = {.ctx = ctx, .num_tokens = args->num_tokens,
                            .int8 = is_quantized(w) && args->activation == QF_ACTIVATION_I8};
        prepare_input(ctx, w, args, task.int8);
        for (int32_t j = i; j < args->num_linears; j++) {
            if (done[j] || !same_input(w, args->linears[j])) {
                continue;
            }
            done[j] = true;
            const qf_linear_operands operands = {
                .linear = args->linears[j], .x = w->perm != NULL ? ctx->act_gathered : args->x, .q = ctx->act_q,
                .scales = ctx->act_scales, .sums = ctx->act_sums, .out = args->outs[j],
                .num_tokens = args->num_tokens};
            task.operands[task.num_linears] = operands;
            task.num_units[task.num_linears] = (args->linears[j]->num_tiles + QF_UNIT_TILES - 1) / QF_UNIT_TILES;
            task.units_per_chunk += task.num_units[task.num_linears];
            task.num_linears++;
        }
        run_units(&task, w->k);
    }
}
