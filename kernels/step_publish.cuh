/* The end of a step: results to pinned host memory. */
#ifndef QF_STEP_PUBLISH_CUH
#define QF_STEP_PUBLISH_CUH

#include "common/launch.cuh"
#include "common/ptx.cuh"

static __device__ __forceinline__ uint64_t qf_step_clock()
{
    uint64_t ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

/* True in the last of `num_blocks` blocks that comes here, which sees what the others have written before. Everybody in
 * the block calls it. */
static __device__ __forceinline__ bool qf_step_is_last(uint32_t *arrivals, uint32_t num_blocks)
{
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(arrivals, 1u) == num_blocks - 1;
        if (last) {
            *arrivals = 0;
            __threadfence();
        }
    }
    __syncthreads();
    return last;
}

static __device__ __forceinline__ qf_cuda_step_header qf_step_load_header(const qf_cuda_step_io &io)
{
    const uint4 *words = static_cast<const uint4 *>(io.device_meta);
    const uint4 a = __ldcg(words), b = __ldcg(words + 1);
    return (qf_cuda_step_header){a.x, a.y, a.z, a.w, b.x, b.y, {b.z, b.w}};
}

/* Results from `first` on, every `stride`th, which the host sees before anything that this block writes behind a
 * barrier. */
static __device__ __forceinline__ void qf_step_send(const qf_cuda_step_io &io, const qf_cuda_step_header &header,
                                                    int32_t first, int32_t stride)
{
    const bool odd = header.sequence & 1u;
    int32_t *ids = odd ? io.host_token_ids[1] : io.host_token_ids[0];
    int32_t *logprobs = reinterpret_cast<int32_t *>(odd ? io.host_logprobs[1] : io.host_logprobs[0]);
    const int32_t words = (int32_t)header.num_logprobs * (int32_t)(sizeof(qf_cuda_logprob) / sizeof(int32_t));
    for (int32_t i = first; i < (int32_t)header.num_results; i += stride) {
        ids[i] = __ldcg(io.token_ids + i);
    }
    for (int32_t i = first; i < words; i += stride) {
        logprobs[i] = __ldcg(reinterpret_cast<const int32_t *>(io.logprobs) + i);
    }
    __threadfence_system();
}

/* One thread, when all has been sent: the host may look, and the next step begins with its own metadata. */
static __device__ __forceinline__ void qf_step_finish(const qf_cuda_step_io &io, const qf_cuda_step_header &header)
{
    qf_cuda_step_result *result = header.sequence & 1u ? io.host_results[1] : io.host_results[0];
    io.state->counter = header.sequence + 1;
    result->begin_ns = __ldcg(&io.state->begin_ns);
    result->end_ns = qf_step_clock();
    __threadfence_system();
    *reinterpret_cast<volatile uint32_t *>(&result->number) = header.sequence + 1;
}

/* All of it, by one block. */
static __device__ __forceinline__ void qf_step_publish(const qf_cuda_step_io &io, const qf_cuda_step_header &header)
{
    qf_step_send(io, header, (int32_t)threadIdx.x, (int32_t)blockDim.x);
    __syncthreads();
    if (threadIdx.x == 0) {
        qf_step_finish(io, header);
    }
}

#endif
