/* A step's metadata in, its results out, through pinned host memory that the device reads and writes itself.
 *
 *   fetch:    device buffer = host[n % 2]         n counts the steps of this backend, on the device and on the host alike
 *   publish:  host results[n % 2] = token ids, log-probabilities;  n += 1
 *
 * Shapes: the buffers start with a qf_cuda_step_header; sizes are multiples of 16 bytes.
 * Roofline: some KB over PCIe: latency, about 2 us; a copy by the copy engine costs more around it than in it, and a
 * kernel can stand inside a captured graph, where its source may change from step to step.
 * Plan: every thread moves 16 bytes at a time, block-strided. What is always there (fixed_bytes) is read without waiting
 * for the header, which tells how much follows. The step's parity travels in the device's header, so that nobody reads
 * the counter while publish changes it.
 * Measured: see PERF.md. */
#include "common/launch.cuh"
#include "common/ptx.cuh"

#define THREADS 256
#define MAX_BLOCKS 64

static __global__ void __launch_bounds__(THREADS) qf_fetch_kernel(const qf_cuda_step_io io, int32_t fixed_vectors)
{
    const uint32_t parity = *io.counter & 1u;
    const uint4 *from = (const uint4 *)io.host_meta[parity];
    uint4 *to = (uint4 *)io.device_meta;
    const int32_t first = blockIdx.x * THREADS + threadIdx.x, stride = gridDim.x * THREADS;
    const uint32_t total = ((const volatile qf_cuda_step_header *)from)->meta_bytes / 16;
    for (int32_t i = first; i < fixed_vectors; i += stride) {
        uint4 v = __ldcv(from + i);
        if (i == 0) {
            v.w = parity; /* qf_cuda_step_header.parity */
        }
        to[i] = v;
    }
    for (uint32_t i = fixed_vectors + first; i < total; i += stride) {
        to[i] = __ldcv(from + i);
    }
}

static __global__ void __launch_bounds__(THREADS) qf_publish_kernel(const qf_cuda_step_io io)
{
    const qf_cuda_step_header header = *(const qf_cuda_step_header *)io.device_meta;
    int32_t *ids = io.host_token_ids[header.parity & 1u];
    int32_t *logprobs = (int32_t *)io.host_logprobs[header.parity & 1u];
    const int32_t first = blockIdx.x * THREADS + threadIdx.x, stride = gridDim.x * THREADS;
    const int32_t words = (int32_t)header.num_logprobs * (int32_t)(sizeof(qf_cuda_logprob) / sizeof(int32_t));
    for (int32_t i = first; i < (int32_t)header.num_results; i += stride) {
        ids[i] = io.token_ids[i];
    }
    for (int32_t i = first; i < words; i += stride) {
        logprobs[i] = ((const int32_t *)io.logprobs)[i];
    }
    if (first == 0) {
        *io.counter += 1;
    }
    __threadfence_system();
}

static int32_t blocks_for(int64_t vectors)
{
    int64_t blocks = (vectors + THREADS - 1) / THREADS;
    return blocks < 1 ? 1 : blocks > MAX_BLOCKS ? MAX_BLOCKS : (int32_t)blocks;
}

extern "C" qf_status qf_cuda_step_fetch(const qf_cuda_step_io *io, size_t fixed_bytes, cudaStream_t stream,
                                        qf_error *err)
{
    if (fixed_bytes < sizeof(qf_cuda_step_header) || fixed_bytes % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "fetch: fixed_bytes is %zu: must be a multiple of 16, at least %zu",
                       fixed_bytes, sizeof(qf_cuda_step_header));
    }
    int32_t vectors = (int32_t)(fixed_bytes / 16);
    return qf_launch("fetch", qf_fetch_kernel, dim3(blocks_for(2 * (int64_t)vectors)), dim3(THREADS), 0, false, stream,
                     err, *io, vectors);
}

extern "C" qf_status qf_cuda_step_publish(const qf_cuda_step_io *io, int32_t max_results, int32_t max_logprobs,
                                          cudaStream_t stream, qf_error *err)
{
    if (max_results < 0 || max_logprobs < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "publish: %d results and %d logprobs: must be at least 0",
                       max_results, max_logprobs);
    }
    return qf_launch("publish", qf_publish_kernel, dim3(blocks_for((int64_t)max_results + 3 * (int64_t)max_logprobs)),
                     dim3(THREADS), 0, false, stream, err, *io);
}
