/* What a linear layer sees, for calibration: rows of float32 on the host, in one pinned buffer that stays until the
 * backend goes. Never in a serving step. */
#include "backend/cuda/cuda_backend.h"

static qf_status alloc_rows(qf_cuda_backend *self, qf_error *err)
{
    const qf_model_config *config = &self->config;
    int32_t widest = config->intermediate_size;
    widest = config->hidden_size > widest ? config->hidden_size : widest;
    widest = self->q_width > widest ? self->q_width : widest;
    if (self->tap_rows != NULL) {
        return QF_OK;
    }
    size_t bytes = (size_t)self->options.max_num_batched_tokens * (size_t)widest * sizeof(float);
    cudaError_t result = cudaHostAlloc((void **)&self->tap_rows, bytes, cudaHostAllocDefault);
    if (result != cudaSuccess) {
        (void)cudaGetLastError();
        self->tap_rows = NULL;
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "%zu bytes of pinned memory for tapped rows: %s", bytes,
                       cudaGetErrorString(result));
    }
    return QF_OK;
}

qf_status qf_cuda_tap(qf_cuda_backend *self, qf_tap_fn tap, void *tap_arg, int32_t layer, qf_linear_id first,
                      int32_t num_ids, const void *x, bool tiled, int32_t width, int32_t k, int32_t num_tokens,
                      qf_error *err)
{
    if (tap == NULL) {
        return QF_OK;
    }
    qf_status status = QF_OK;
    size_t bytes = (size_t)width * (size_t)num_tokens * sizeof(float);
    void *rows = NULL;
    QF_TRY(alloc_rows(self, err));
    if (tiled) {
        cudaError_t result = cudaMalloc(&rows, bytes);
        if (result != cudaSuccess) {
            (void)cudaGetLastError();
            return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "%zu bytes of device memory for tapped rows: %s", bytes,
                           cudaGetErrorString(result));
        }
        QF_TRY_GOTO(qf_cuda_untile(x, rows, width, k, num_tokens, self->stream, err), done);
        x = rows;
    }
    cudaError_t result = cudaMemcpyAsync(self->tap_rows, x, bytes, cudaMemcpyDeviceToHost, self->stream);
    result = result == cudaSuccess ? cudaStreamSynchronize(self->stream) : result;
    if (result != cudaSuccess) {
        (void)cudaGetLastError();
        status = QF_FAIL(err, QF_ERROR_BACKEND, "copying tapped rows: %s", cudaGetErrorString(result));
        goto done;
    }
    for (int32_t i = 0; i < num_ids; i++) {
        tap(tap_arg, layer, (qf_linear_id)((int)first + i), self->tap_rows, num_tokens, width);
    }
done:
    (void)cudaFree(rows);
    return status;
}
