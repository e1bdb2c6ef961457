/* The embedding: rows of bf16 or float32, on the device or in pinned host memory. */
#include <string.h>

#include "backend/cuda/weights_stage.h"
#include "base/alloc.h"

#define ROWS_AT_ONCE 64 /* a thread's share */

typedef struct embedding_task {
    const qf_checkpoint *checkpoint;
    qf_dtype from, to; /* to: BF16 or F32 */
    size_t width;
    int32_t first_row;
    char *out;  /* rows from first_row on */
    char *rows; /* (threads, raw row) or NULL: nothing is converted here */
} embedding_task;

static float value_at(const char *values, qf_dtype dtype, size_t index)
{
    float value;
    uint16_t half;
    if (dtype == QF_DTYPE_F32) {
        memcpy(&value, values + 4 * index, sizeof value);
        return value;
    }
    memcpy(&half, values + 2 * index, sizeof half);
    return dtype == QF_DTYPE_BF16 ? qf_bf16_to_f32(half) : qf_f16_to_f32(half);
}

static void convert_row(const embedding_task *task, const char *row, char *out)
{
    for (size_t i = 0; i < task->width; i++) {
        const float value = value_at(row, task->from, i);
        if (task->to == QF_DTYPE_F32) {
            memcpy(out + 4 * i, &value, sizeof value);
        } else {
            const uint16_t half = qf_f32_to_bf16(value);
            memcpy(out + 2 * i, &half, sizeof half);
        }
    }
}

static void read_rows(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    const embedding_task *task = arg;
    const size_t raw_bytes = task->width * qf_dtype_size(task->from);
    if (task->rows == NULL) {
        qf_checkpoint_read_embedding(task->checkpoint, task->first_row + (int32_t)begin, (int32_t)(end - begin),
                                     task->out + (size_t)begin * raw_bytes);
        return;
    }
    const size_t out_bytes = task->width * qf_dtype_size(task->to);
    char *row = task->rows + (size_t)worker * raw_bytes;
    for (int64_t i = begin; i < end; i++) {
        qf_checkpoint_read_embedding(task->checkpoint, task->first_row + (int32_t)i, 1, row);
        convert_row(task, row, task->out + (size_t)i * out_bytes);
    }
}

static qf_status load_to_host(qf_cuda_stager *stager, embedding_task *task, int32_t num_rows, qf_error *err)
{
    const size_t bytes = (size_t)num_rows * task->width * qf_dtype_size(task->to);
    char *rows = NULL;
    if (task->from != task->to) {
        QF_TRY(qf_alloc((void **)&rows, (size_t)qf_thread_pool_size(stager->pool),
                        task->width * qf_dtype_size(task->from), "rows of the embedding", err));
        task->rows = rows;
    }
    qf_thread_pool_run(stager->pool, read_rows, task, num_rows, ROWS_AT_ONCE);
    memset(task->out + bytes, 0, qf_cuda_align(bytes) - bytes);
    qf_free(rows);
    return QF_OK;
}

/* `count` raw rows in a slot become rows of the arena. */
static qf_status convert_on_device(qf_cuda_stager *stager, const embedding_task *task, const char *slot, int32_t count,
                                   char *out, qf_error *err)
{
    qf_repack_args args = {.num_parts = 1,
                           .rows = true,
                           .bits = 8 * (int32_t)qf_dtype_size(task->to),
                           .k = (int32_t)task->width,
                           .num_rows = count,
                           .data = out};
    args.parts[0] = (qf_repack_part){.weight = slot,
                                     .format = qf_cuda_float_format(task->from),
                                     .bits = 8 * (int32_t)qf_dtype_size(task->from),
                                     .n = count,
                                     .num_rows = count,
                                     .num_columns = (int32_t)task->width};
    return qf_cuda_repack(&args, stager->compute, err);
}

static qf_status load_to_device(qf_cuda_stager *stager, embedding_task *task, int32_t num_rows, char *out,
                                qf_error *err)
{
    const bool convert = task->from != task->to;
    const size_t raw_bytes = task->width * qf_dtype_size(task->from);
    const size_t out_bytes = task->width * qf_dtype_size(task->to);
    size_t fitting = stager->stage_bytes / raw_bytes;
    if (convert && fitting > QF_CUDA_EMBEDDING_CHUNK / raw_bytes) {
        fitting = QF_CUDA_EMBEDDING_CHUNK / raw_bytes;
    }
    /* Whole groups of 8 rows: then every run of converted rows begins on 16 bytes. */
    const int32_t most = fitting > 8 ? (int32_t)(fitting / 8 * 8) : 8;
    for (int32_t row = 0; row < num_rows; row += most) {
        const int32_t count = num_rows - row < most ? num_rows - row : most;
        const size_t bytes = (size_t)count * raw_bytes;
        char *target = out + (size_t)row * out_bytes;
        task->first_row = row;
        QF_TRY(qf_cuda_stager_open_stage(stager, &task->out, err));
        qf_thread_pool_run(stager->pool, read_rows, task, count, ROWS_AT_ONCE);
        if (!convert) {
            QF_TRY(qf_cuda_stager_send_stage(stager, target, bytes, stager->copy, err));
            continue;
        }
        char *slot;
        QF_TRY(qf_cuda_stager_open_slot(stager, &slot, err));
        QF_TRY(qf_cuda_stager_send_stage(stager, slot, bytes, stager->copy, err));
        QF_TRY(qf_cuda_stager_slot_filled(stager, err));
        QF_TRY(convert_on_device(stager, task, slot, count, target, err));
        QF_TRY(qf_cuda_stager_slot_done(stager, err));
    }
    return QF_OK;
}

qf_status qf_cuda_load_embedding(qf_cuda_stager *stager, const qf_checkpoint *checkpoint,
                                 const qf_cuda_weights_layout *layout, char *device, char *host, qf_error *err)
{
    const qf_model_config *config = qf_checkpoint_config(checkpoint);
    embedding_task task = {.checkpoint = checkpoint,
                           .from = qf_checkpoint_embedding_dtype(checkpoint),
                           .to = qf_cuda_embedding_dtype(layout),
                           .width = (size_t)config->hidden_size};
    if (layout->embedding_on_host) {
        task.out = host;
        return load_to_host(stager, &task, config->vocab_size, err);
    }
    return load_to_device(stager, &task, config->vocab_size, device + layout->embedding_offset, err);
}
