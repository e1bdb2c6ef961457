/* Streams, events and pinned memory of loading. */
#include "backend/cuda/weights_stage.h"

#define COPY_BYTES ((size_t)256 << 10) /* a thread's share at a time */

qf_status qf_cuda_check(cudaError_t status, const char *what, size_t bytes, const char *file, int line, qf_error *err)
{
    if (status == cudaSuccess) {
        return QF_OK;
    }
    (void)cudaGetLastError(); /* an error that a caller handles must not meet the next one's check */
    if (status == cudaErrorMemoryAllocation && bytes > 0) {
        return qf_error_set(err, QF_ERROR_OUT_OF_MEMORY, file, line, "%s: cannot allocate %zu bytes", what, bytes);
    }
    qf_status result = status == cudaErrorMemoryAllocation ? QF_ERROR_OUT_OF_MEMORY : QF_ERROR_BACKEND;
    return qf_error_set(err, result, file, line, "%s: %s", what, cudaGetErrorString(status));
}

/* --- life ----------------------------------------------------------------------------------------------- */

static qf_status create_event(cudaEvent_t *out, qf_error *err)
{
    QF_CUDA_CALL(cudaEventCreateWithFlags(out, cudaEventDisableTiming));
    return QF_OK;
}

qf_status qf_cuda_stager_init(qf_cuda_stager *out, qf_thread_pool *pool, size_t stage_bytes, char *slots,
                              size_t slot_bytes, qf_error *err)
{
    out->pool = pool;
    out->stage_bytes = stage_bytes;
    out->slots = slots;
    out->slot_bytes = slot_bytes;
    QF_CUDA_CALL(cudaStreamCreateWithFlags(&out->copy, cudaStreamNonBlocking));
    QF_CUDA_CALL(cudaStreamCreateWithFlags(&out->compute, cudaStreamNonBlocking));
    for (int32_t i = 0; i < QF_CUDA_STAGES; i++) {
        QF_TRY(create_event(&out->stage_free[i], err));
    }
    for (int32_t i = 0; i < QF_CUDA_SLOTS; i++) {
        QF_TRY(create_event(&out->slot_full[i], err));
        QF_TRY(create_event(&out->slot_free[i], err));
    }
    void *pinned = NULL;
    QF_TRY(qf_cuda_check(cudaHostAlloc(&pinned, QF_CUDA_STAGES * stage_bytes, cudaHostAllocDefault),
                         "pinned memory to load weights through", QF_CUDA_STAGES * stage_bytes, __FILE__, __LINE__,
                         err));
    out->pinned = pinned;
    return QF_OK;
}

static void destroy_event(cudaEvent_t event)
{
    if (event != NULL) {
        (void)cudaEventDestroy(event);
    }
}

static void destroy_stream(cudaStream_t stream)
{
    if (stream != NULL) {
        (void)cudaStreamDestroy(stream);
    }
}

void qf_cuda_stager_deinit(qf_cuda_stager *self)
{
    if (self->copy != NULL) {
        (void)cudaStreamSynchronize(self->copy);
    }
    if (self->compute != NULL) {
        (void)cudaStreamSynchronize(self->compute);
    }
    for (int32_t i = 0; i < QF_CUDA_STAGES; i++) {
        destroy_event(self->stage_free[i]);
    }
    for (int32_t i = 0; i < QF_CUDA_SLOTS; i++) {
        destroy_event(self->slot_full[i]);
        destroy_event(self->slot_free[i]);
    }
    destroy_stream(self->copy);
    destroy_stream(self->compute);
    if (self->pinned != NULL) {
        (void)cudaFreeHost(self->pinned);
    }
    *self = (qf_cuda_stager){0};
}

qf_status qf_cuda_stager_finish(qf_cuda_stager *self, qf_error *err)
{
    QF_CUDA_CALL(cudaStreamSynchronize(self->copy));
    QF_CUDA_CALL(cudaStreamSynchronize(self->compute));
    return QF_OK;
}

/* --- stages and slots ----------------------------------------------------------------------------------- */

qf_status qf_cuda_stager_open_stage(qf_cuda_stager *self, char **out, qf_error *err)
{
    QF_CUDA_CALL(cudaEventSynchronize(self->stage_free[self->stage]));
    *out = self->pinned + (size_t)self->stage * self->stage_bytes;
    return QF_OK;
}

qf_status qf_cuda_stager_send_stage(qf_cuda_stager *self, void *target, size_t bytes, cudaStream_t stream,
                                    qf_error *err)
{
    const char *stage = self->pinned + (size_t)self->stage * self->stage_bytes;
    QF_CUDA_CALL(cudaMemcpyAsync(target, stage, bytes, cudaMemcpyHostToDevice, stream));
    QF_CUDA_CALL(cudaEventRecord(self->stage_free[self->stage], stream));
    self->stage = (self->stage + 1) % QF_CUDA_STAGES;
    return QF_OK;
}

qf_status qf_cuda_stager_open_slot(qf_cuda_stager *self, char **out, qf_error *err)
{
    QF_CUDA_CALL(cudaStreamWaitEvent(self->copy, self->slot_free[self->slot], 0));
    *out = self->slots + (size_t)self->slot * self->slot_bytes;
    return QF_OK;
}

qf_status qf_cuda_stager_slot_filled(qf_cuda_stager *self, qf_error *err)
{
    QF_CUDA_CALL(cudaEventRecord(self->slot_full[self->slot], self->copy));
    QF_CUDA_CALL(cudaStreamWaitEvent(self->compute, self->slot_full[self->slot], 0));
    return QF_OK;
}

qf_status qf_cuda_stager_slot_done(qf_cuda_stager *self, qf_error *err)
{
    QF_CUDA_CALL(cudaEventRecord(self->slot_free[self->slot], self->compute));
    self->slot = (self->slot + 1) % QF_CUDA_SLOTS;
    return QF_OK;
}

/* --- filling -------------------------------------------------------------------------------------------- */

typedef struct read_task {
    const qf_cuda_job *job;
    char *stage; /* bytes begin .. end - 1 of the slot */
    size_t begin, end;
} read_task;

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

static void read_units(void *arg, int64_t first, int64_t last, int32_t worker)
{
    (void)worker;
    const read_task *task = arg;
    const size_t begin = task->begin + (size_t)first * COPY_BYTES;
    const size_t end = min_size(task->end, task->begin + (size_t)last * COPY_BYTES);
    qf_cuda_job_read(task->job, begin, end, task->stage + (begin - task->begin));
}

qf_status qf_cuda_stager_fill_slot(qf_cuda_stager *self, const qf_cuda_job *job, char *slot, qf_error *err)
{
    for (size_t begin = 0; begin < job->bytes; begin += self->stage_bytes) {
        read_task task = {.job = job, .begin = begin, .end = min_size(job->bytes, begin + self->stage_bytes)};
        QF_TRY(qf_cuda_stager_open_stage(self, &task.stage, err));
        const size_t bytes = task.end - task.begin;
        qf_thread_pool_run(self->pool, read_units, &task, (int64_t)((bytes + COPY_BYTES - 1) / COPY_BYTES), 1);
        QF_TRY(qf_cuda_stager_send_stage(self, slot + begin, bytes, self->copy, err));
    }
    return QF_OK;
}
