/* Ops that work row by row: embedding, rmsnorm, silu(gate) * up, rotary embedding with the write to the KV cache.
 * Rows are shared out over the pool; small ones run on the calling thread. */
#include "backend/cpu/kernels.h"

#include <string.h>

/* Runs fn over rows, inline when there is little to do. */
static void for_rows(qf_cpu_context *ctx, qf_task_fn fn, void *arg, int32_t num_rows, int32_t row_elements)
{
    const int64_t elements = (int64_t)num_rows * row_elements;
    if (num_rows <= 1 || elements <= QF_INLINE_ELEMENTS || ctx->num_threads == 1) {
        fn(arg, 0, num_rows, 0);
        return;
    }
    int64_t grain = QF_INLINE_ELEMENTS / 4 / (row_elements > 0 ? row_elements : 1);
    qf_thread_pool_run(ctx->pool, fn, arg, num_rows, grain > 1 ? grain : 1);
}

typedef struct row_task {
    const qf_cpu_kernels *kernels;
    const void *args;
} row_task;

static void embedding_task(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    (void)worker;
    const row_task *task = arg;
    const qf_embedding_args *a = task->args;
    const size_t row_bytes = (size_t)a->hidden_size * qf_dtype_size(a->table_dtype);
    for (int64_t t = begin; t < end; t++) {
        task->kernels->widen_row((const char *)a->table + (size_t)a->token_ids[t] * row_bytes, a->table_dtype,
                                 a->out + (size_t)t * (size_t)a->hidden_size, a->hidden_size);
    }
}

void qf_cpu_embedding(qf_cpu_context *ctx, const qf_embedding_args *args)
{
    row_task task = {ctx->kernels, args};
    for_rows(ctx, embedding_task, &task, args->num_tokens, args->hidden_size);
}

static void rmsnorm_task(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    (void)worker;
    const row_task *task = arg;
    const qf_rmsnorm_args *a = task->args;
    for (int64_t t = begin; t < end; t++) {
        const size_t at = (size_t)t * (size_t)a->hidden_size;
        task->kernels->rmsnorm_row(a->residual + at, a->delta != NULL ? a->delta + at : NULL, a->weight,
                                   a->out != NULL ? a->out + at : NULL, a->hidden_size, a->eps);
    }
}

void qf_cpu_rmsnorm(qf_cpu_context *ctx, const qf_rmsnorm_args *args)
{
    row_task task = {ctx->kernels, args};
    for_rows(ctx, rmsnorm_task, &task, args->num_tokens, args->hidden_size);
}

static void silu_mul_task(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    (void)worker;
    const row_task *task = arg;
    const qf_silu_mul_args *a = task->args;
    for (int64_t t = begin; t < end; t++) {
        const size_t at = (size_t)t * (size_t)a->intermediate_size;
        task->kernels->silu_mul(a->gate + at, a->up + at, a->out + at, a->intermediate_size);
    }
}

void qf_cpu_silu_mul(qf_cpu_context *ctx, const qf_silu_mul_args *args)
{
    row_task task = {ctx->kernels, args};
    for_rows(ctx, silu_mul_task, &task, args->num_tokens, args->intermediate_size);
}

/* Where component 0 of a token's key and value lies, in elements; keys are strided by 16. */
static size_t key_index(const qf_kv_cache *cache, int32_t slot, int32_t kv_head)
{
    const size_t block = (size_t)(slot / cache->block_size), offset = (size_t)(slot % cache->block_size);
    const size_t tiles = (size_t)cache->block_size / 16;
    const size_t tile = (block * (size_t)cache->num_kv_heads + (size_t)kv_head) * tiles + offset / 16;
    return tile * (size_t)cache->head_dim * 16 + offset % 16;
}

static size_t value_index(const qf_kv_cache *cache, int32_t slot, int32_t kv_head)
{
    const size_t block = (size_t)(slot / cache->block_size), offset = (size_t)(slot % cache->block_size);
    const size_t row = (block * (size_t)cache->num_kv_heads + (size_t)kv_head) * (size_t)cache->block_size + offset;
    return row * (size_t)cache->head_dim;
}

static void write_strided(void *cache, qf_dtype dtype, size_t index, size_t stride, const float *x, int32_t n)
{
    if (dtype == QF_DTYPE_F32) {
        float *out = (float *)cache + index;
        for (int32_t i = 0; i < n; i++) {
            out[(size_t)i * stride] = x[i];
        }
        return;
    }
    uint16_t *out = (uint16_t *)cache + index;
    for (int32_t i = 0; i < n; i++) {
        out[(size_t)i * stride] = qf_f32_to_bf16(x[i]);
    }
}

static void rope_task(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    (void)worker;
    const row_task *task = arg;
    const qf_rope_kv_write_args *a = task->args;
    const qf_kv_cache *cache = &a->cache;
    const size_t head_dim = (size_t)cache->head_dim;
    float rotated[QF_MAX_HEAD_DIM];
    for (int64_t t = begin; t < end; t++) {
        const float *cos_sin = a->cos_sin + (size_t)t * head_dim;
        float *q = a->q + (size_t)t * (size_t)a->num_heads * head_dim;
        const size_t kv = (size_t)t * (size_t)cache->num_kv_heads * head_dim;
        for (int32_t h = 0; h < a->num_heads; h++) {
            task->kernels->rope_head(q + (size_t)h * head_dim, cos_sin, q + (size_t)h * head_dim, cache->head_dim);
        }
        for (int32_t h = 0; h < cache->num_kv_heads; h++) {
            const int32_t slot = a->slot_mapping[t];
            task->kernels->rope_head(a->k + kv + (size_t)h * head_dim, cos_sin, rotated, cache->head_dim);
            write_strided(cache->k, cache->dtype, key_index(cache, slot, h), 16, rotated, cache->head_dim);
            write_strided(cache->v, cache->dtype, value_index(cache, slot, h), 1, a->v + kv + (size_t)h * head_dim,
                          cache->head_dim);
        }
    }
}

void qf_cpu_rope_kv_write(qf_cpu_context *ctx, const qf_rope_kv_write_args *args)
{
    row_task task = {ctx->kernels, args};
    for_rows(ctx, rope_task, &task, args->num_tokens,
             (args->num_heads + 2 * args->cache.num_kv_heads) * args->cache.head_dim);
}

size_t qf_cpu_kv_cache_bytes(int32_t num_blocks, int32_t block_size, int32_t num_kv_heads, int32_t head_dim,
                             qf_dtype dtype)
{
    return (size_t)num_blocks * (size_t)block_size * (size_t)num_kv_heads * (size_t)head_dim * qf_dtype_size(dtype);
}
