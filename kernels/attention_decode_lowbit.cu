/* Attention of single rows over a low-bit cache: dispatch and launch. The kernel is in attention_decode_lowbit.cuh;
 * shapes, items and checks are attention.cu's.
 *
 *   out[row][head] = sum over j of softmax_j(scale q[row][head] . (k[j] + R_j b)) v[j],   R_j b: the rotated bias of k_proj
 *
 * Shapes and layouts: q (num_tokens, num_heads, head_dim) bf16; keys and values as csrc/kv/format.h and
 * common/kv_codec.cuh say, in paged blocks; out: tiled bf16.
 *
 * Roofline: memory. A position of a kv head is 2 (head_dim + 2) bytes in 8 bits and 9/8 head_dim in 4: 32 sequences of
 * 8,192 of the 7B model 273 and 151 MB a layer, 62 and 34 us at 4.4 TB/s. Close by are the instructions: at that rate an SM
 * has some 124 cycles for 16 positions of 4 bits, about 500 warp instructions; the kernel takes about 400, of which the bias
 * is 50. Target: 75 % of the bandwidth in 8 bits, 65 % in int4.
 *
 * Plan: grid of two CTAs of 8 warps on each multiprocessor, which loop over (item, kv head).
 *
 *     positions of an item | warp 0 | warp 1 | .. | warp 7 |     each warp with a ring of stages of its own
 *
 * Measured: see PERF.md. */
#include "attention_decode_lowbit.cuh"

#define CTAS_PER_SM 2

typedef void (*lowbit_decode_kernel)(attention_params, int32_t);

struct lowbit_choice {
    lowbit_decode_kernel kernel;
    int32_t depth;
    size_t bytes;
};

/* As many stages as the device's shared memory takes. */
template <int format, int head_dim> static lowbit_choice choose(const qf_cuda_device *device)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    const int32_t depth = sizes::total(sizes::depth) + 4096 <= device->max_shared_bytes ? sizes::depth
                                                                                       : sizes::least_depth;
    return lowbit_choice{attention_decode_lowbit_kernel<format, head_dim>, depth, (size_t)sizes::total(depth)};
}

template <int head_dim> static lowbit_choice choose(const qf_cuda_device *device, qf_cuda_kv_format format)
{
    switch (format) {
    case QF_CUDA_KV_FP8: return choose<QF_CUDA_KV_FP8, head_dim>(device);
    case QF_CUDA_KV_INT8: return choose<QF_CUDA_KV_INT8, head_dim>(device);
    case QF_CUDA_KV_INT4: return choose<QF_CUDA_KV_INT4, head_dim>(device);
    default: return choose<QF_CUDA_KV_NF4, head_dim>(device);
    }
}

extern "C" qf_status qf_attention_decode_lowbit(const attention_params *p, const qf_cuda_device *device,
                                                cudaStream_t stream, qf_error *err)
{
    const qf_cuda_kv_format format = p->a.kv.format;
    const lowbit_choice choice = p->a.shape.head_dim == 64 ? choose<64>(device, format) : choose<128>(device, format);
    qf_status status = qf_allow_shared("attention (low-bit decode)", choice.kernel, choice.bytes, err);
    if (status != QF_OK) {
        return status;
    }
    QF_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(choice.kernel),
                                     cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    const int64_t units = (int64_t)p->a.max_decode_items * p->a.shape.num_kv_heads;
    const int64_t resident = (int64_t)device->sm_count * CTAS_PER_SM;
    return qf_launch("attention (low-bit decode)", choice.kernel,
                     dim3((unsigned)(units < resident ? units : resident)), dim3(LOWBIT_THREADS), choice.bytes,
                     device->dependent_launch, stream, err, *p, choice.depth);
}
