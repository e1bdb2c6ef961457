/* The way from mapped files to the device: pinned stages, filled by the thread pool and emptied by the copy engine, and
 * two slots of raw tensors on the device, each filled while the other is repacked.
 *
 *   files -> (threads) stage 0..3 -> (copy stream) slot 0, 1 -> (compute stream) repacked weights
 *
 * Everything that writes repacked weights runs on the compute stream, in one order. */
#ifndef QF_BACKEND_CUDA_WEIGHTS_STAGE_H
#define QF_BACKEND_CUDA_WEIGHTS_STAGE_H

#include "backend/cuda/weights_job.h"

#define QF_CUDA_STAGES 4
#define QF_CUDA_SLOTS 2

typedef struct qf_cuda_stager {
    qf_thread_pool *pool;
    cudaStream_t copy, compute;
    char *pinned;       /* (QF_CUDA_STAGES, stage_bytes) */
    size_t stage_bytes;
    char *slots;        /* device: (QF_CUDA_SLOTS, slot_bytes) */
    size_t slot_bytes;
    cudaEvent_t stage_free[QF_CUDA_STAGES], slot_full[QF_CUDA_SLOTS], slot_free[QF_CUDA_SLOTS];
    int32_t stage, slot; /* in use, or the next to be */
} qf_cuda_stager;

/* `out` is zeroed by the caller, and may be deinitialised after a failure. */
qf_status qf_cuda_stager_init(qf_cuda_stager *out, qf_thread_pool *pool, size_t stage_bytes, char *slots,
                              size_t slot_bytes, qf_error *err);
void qf_cuda_stager_deinit(qf_cuda_stager *self); /* waits for the device */
qf_status qf_cuda_stager_finish(qf_cuda_stager *self, qf_error *err);

/* A stage to write into, once the device has read what was there before. */
qf_status qf_cuda_stager_open_stage(qf_cuda_stager *self, char **out, qf_error *err);
/* Its bytes to `target` on the device, in the order of `stream`. */
qf_status qf_cuda_stager_send_stage(qf_cuda_stager *self, void *target, size_t bytes, cudaStream_t stream,
                                    qf_error *err);

/* A slot that the copy stream may write, once what was there has been repacked. */
qf_status qf_cuda_stager_open_slot(qf_cuda_stager *self, char **out, qf_error *err);
/* What the compute stream does from here on sees the slot's contents. */
qf_status qf_cuda_stager_slot_filled(qf_cuda_stager *self, qf_error *err);
/* What the compute stream did so far was the last that reads the slot. */
qf_status qf_cuda_stager_slot_done(qf_cuda_stager *self, qf_error *err);

/* The job's raw tensors into the open slot. */
qf_status qf_cuda_stager_fill_slot(qf_cuda_stager *self, const qf_cuda_job *job, char *slot, qf_error *err);

/* The embedding to its place on the device, or to host memory, as the layout says. */
qf_status qf_cuda_load_embedding(qf_cuda_stager *stager, const qf_checkpoint *checkpoint,
                                 const qf_cuda_weights_layout *layout, char *device, char *host, qf_error *err);

/* The power of two that a fused linear's scales are stored without. largest_of_thread: (pool size) scratch. */
float qf_cuda_scale_multiplier(const qf_cuda_fused *fused, qf_thread_pool *pool, uint32_t *largest_of_thread);

/* What a call to CUDA returned, as a status; `bytes` is what it was to allocate, or 0. */
qf_status qf_cuda_check(cudaError_t status, const char *what, size_t bytes, const char *file, int line, qf_error *err);
#define QF_CUDA_CALL(call) QF_TRY(qf_cuda_check((call), #call, 0, __FILE__, __LINE__, err))

#endif
