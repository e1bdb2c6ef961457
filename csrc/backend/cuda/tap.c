/* What a linear layer sees, for calibration: rows of float32 on the host. Slow; never in a serving step. */
#include "backend/cuda/cuda_backend.h"
#include "base/alloc.h"

qf_status qf_cuda_tap(qf_cuda_backend *self, qf_tap_fn tap, void *tap_arg, int32_t layer, qf_linear_id first,
                      int32_t num_ids, const void *x, bool tiled, int32_t width, int32_t k, int32_t num_tokens,
                      qf_error *err)
{
    if (tap == NULL) {
        return QF_OK;
    }
    qf_status status;
    size_t bytes = (size_t)width * (size_t)num_tokens * sizeof(float);
    float *host = NULL;
    void *rows = NULL;
    QF_TRY_GOTO(qf_alloc((void **)&host, bytes, 1, "tapped rows", err), done);
    if (tiled) {
        cudaError_t result = cudaMalloc(&rows, bytes);
        if (result != cudaSuccess) {
            (void)cudaGetLastError();
            status = QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "%zu bytes of device memory for tapped rows: %s", bytes,
                             cudaGetErrorString(result));
            goto done;
        }
        QF_TRY_GOTO(qf_cuda_untile(x, rows, width, k, num_tokens, self->stream, err), done);
        x = rows;
    }
    cudaError_t result = cudaMemcpyAsync(host, x, bytes, cudaMemcpyDeviceToHost, self->stream);
    result = result == cudaSuccess ? cudaStreamSynchronize(self->stream) : result;
    if (result != cudaSuccess) {
        (void)cudaGetLastError();
        status = QF_FAIL(err, QF_ERROR_BACKEND, "copying tapped rows: %s", cudaGetErrorString(result));
        goto done;
    }
    for (int32_t i = 0; i < num_ids; i++) {
        tap(tap_arg, layer, (qf_linear_id)((int)first + i), host, num_tokens, width);
    }
    status = QF_OK;
done:
    (void)cudaFree(rows);
    qf_free(host);
    return status;
}
