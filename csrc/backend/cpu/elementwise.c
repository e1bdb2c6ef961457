/* Ops that work row by row: embedding, rmsnorm, silu(gate) * up. kv_write.c has the rotary embedding.
 * Rows are shared out over the pool; small ones run on the calling thread. */
/* needs: backend/cpu/kv_write.c */
#include "backend/cpu/kernels.h"

#include <string.h>

void qf_cpu_for_rows(qf_cpu_context *ctx, qf_task_fn fn, void *arg, int32_t num_rows, int32_t row_elements)
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
    qf_cpu_for_rows(ctx, embedding_task, &task, args->num_tokens, args->hidden_size);
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
    qf_cpu_for_rows(ctx, rmsnorm_task, &task, args->num_tokens, args->hidden_size);
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
    qf_cpu_for_rows(ctx, silu_mul_task, &task, args->num_tokens, args->intermediate_size);
}
