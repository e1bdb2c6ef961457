/* Attention of single rows over a low-bit cache: dispatch and launch. The kernel is in attention_decode_lowbit.cuh;
 * shapes, items and checks are attention.cu's. The one of attention_decode_wide.cuh can take its rows from what the QKV linear
 * made, and write their keys and values to the cache itself: a kernel less between two that wait for each other.
 *
 *   out[row][head] = sum over j of softmax_j(scale q[row][head] . (k[j] + R_j b)) v[j],   R_j b: the rotated bias of k_proj
 *
 * Shapes and layouts: q (num_tokens, num_heads, head_dim) bf16; keys and values as csrc/kv/format.h and
 * common/kv_codec.cuh say, in paged blocks; out: tiled bf16.
 *
 * Roofline: memory. A position of a kv head is 2 (head_dim + 2) bytes in 8 bits and 9/8 head_dim in 4: 32 sequences of
 * 8,192 of the 7B model 273 and 151 MB a layer, 62 and 34 us at 4.4 TB/s. Close by are the instructions: at that rate an SM
 * has some 250 cycles for 16 positions of 8 bits and 124 for 16 of 4, about 1,000 and 500 warp instructions at best, and half
 * of that at the rate that 16 warps reach. Target: 75 % of the bandwidth in 8 bits, 65 % in int4.
 *
 * Plan: a CTA of 16 warps on each multiprocessor, which loops over (item, kv head).
 *
 *     positions of an item | warp 0 | warp 1 | .. | warp 15 |     each warp with a ring of stages of its own
 *
 * What the instructions of a stage (hd 128; 32 positions of 4 bits, 16 of 8; without those of a unit of 64) are spent on:
 *   int4  80 + 96 code words to operands | 38 products | 32 float32 of groups' steps | 55 scale words | 24 copies | softmax, places
 *   8 bits  32 + 48 codes to operands | 24 products | 12 copies | softmax, places
 * and a unit's bias takes some 220 more. Of int4's 43 us of walk at 32 x 8K keys and values took 10 each when nothing was copied,
 * scale words and softmax 5.5, and the bias 13: not by its instructions, but by what it read from shared memory, which is
 * halved since. Copies alone take 32 to 35 us.
 *
 * On Hopper int4 of head_dim 128 in blocks of 32 and more has a kernel of its own (attention_decode_wide.cuh): 12 warps, 64
 * positions at a time, bulk copies; some 580 instructions and 145 wavefronts of shared memory for 32 positions instead of 697
 * and 262, which filled its pipe. 32 x 8,192 of the 7B model 42.6 us instead of 49.7, 1 x 131,072 28.2 instead of 33.8.
 *
 * Tried and lost:
 *   there: keys and values in one ring, 1.4 us more at 1 x 131,072; shares of warps in stages of 32, which halve units: 2.7 us
 *     more at 32 x 8,192, 1.3 at 1 x 131,072, and 0.2 less at 1 x 8,192; barriers beside the stages, 0.6 and 0.3 us more; all
 *     three stages sent for before q is loaded, 1.2 us more in both.
 *   bf16 operands: 3 to 5 instructions a pair in 8 bits, and int4's zeros had to be taken off again; and scale words
 *     decoded by each lane that wants one, 220 instructions: in all 1,060 a stage of int4 instead of about 750, 74 us
 *     instead of 55 at 32 x 8K, and fp8 106 us instead of 80.
 *   two CTAs of 8 warps: fp8 82 us and, at 1 x 128K, 52 us instead of 47, and no room in shared memory for the bias's fine
 *     table, whose misses in L1 cost int4 6 us (62 of 32 x 8K). They were better where CTAs have several short items: int4
 *     34 us instead of 39 at 64 x 2K.
 *   one kernel with and without bias: a branch in each stage, which keeps the bias's products apart from those of keys
 *     (int8 82 us instead of 78).
 *   the maximum found by shuffles in every stage: 24 instructions and three latencies; now only when a weight would exceed 2^6.
 *   the merge of splits spread over all CTAs of an item, each waiting for the others: the last one ends 1.7 us sooner, but
 *     none makes room before for the next kernel, which begins that much later.
 *   partial results handed to a CTA that polls for them, by counters or by words that are zero until they come: 1.3 to 5 us
 *     more at 1 x 131,072; four CTAs that share the columns, or a kernel of its own for the merge: 0.4 and 0.9 us less at
 *     1 x 8,192, 1 to 2 more at 1 x 131,072, no difference in the engine.
 *   rows taken from the QKV linear's sums by the 16-warp kernels as well: fp8 1 us more, at 32 x 8,192 3.
 *   the next linears' weights brought to L2, 12 to 25 MB: during the walk it takes longer by what is saved after it; at its
 *     end 0.5 us of 43 are saved, since L2 gives them hardly faster than memory does.
 *   codes marked as the first to leave L2 (evict_first): 8 bits won 2 us of 73, int4 lost 1 of 50; and for head_dim 64 ptxas
 *     13.0 makes instructions of it that the device refuses.
 *
 * Shared memory: 113 to 214 KiB at least, by format and head_dim: where that is not to be had the planner makes no decode
 * items (qf_cuda_attention_shape.decode_ctas below 0).
 *
 * Measured: see PERF.md. */
#include "attention_decode_wide.cuh"

typedef void (*lowbit_decode_kernel)(attention_params, int32_t);

struct lowbit_choice {
    lowbit_decode_kernel kernel;
    int32_t depth;
    size_t bytes;
};

#define STATIC_BYTES 4096 /* of shared memory beside what is asked for, more than enough */

/* As many stages as the device's shared memory takes. */
template <int format, int head_dim> static lowbit_choice choose(const qf_cuda_device *device, bool biased)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    const int32_t depth = sizes::total(sizes::depth) + STATIC_BYTES <= device->max_shared_bytes ? sizes::depth
                                                                                       : sizes::least_depth;
    return lowbit_choice{biased ? attention_decode_lowbit_kernel<format, head_dim, true>
                                : attention_decode_lowbit_kernel<format, head_dim, false>,
                         depth, (size_t)sizes::total(depth)};
}

template <int head_dim>
static lowbit_choice choose(const qf_cuda_device *device, qf_cuda_kv_format format, bool biased)
{
    switch (format) {
    case QF_CUDA_KV_FP8: return choose<QF_CUDA_KV_FP8, head_dim>(device, biased);
    case QF_CUDA_KV_INT8: return choose<QF_CUDA_KV_INT8, head_dim>(device, biased);
    case QF_CUDA_KV_INT4: return choose<QF_CUDA_KV_INT4, head_dim>(device, biased);
    default: return choose<QF_CUDA_KV_NF4, head_dim>(device, biased);
    }
}

static lowbit_choice choose(const qf_cuda_device *device, qf_cuda_kv_format format, int32_t head_dim, bool biased)
{
    return head_dim == 64 ? choose<64>(device, format, biased) : choose<128>(device, format, biased);
}

extern "C" bool qf_cuda_attention_decode_fits(const qf_cuda_device *device, qf_cuda_kv_format format, int32_t head_dim)
{
    return format == QF_CUDA_KV_16 ||
           choose(device, format, head_dim, true).bytes + STATIC_BYTES <= (size_t)device->max_shared_bytes;
}

/* The kernel of attention_decode_wide.cuh: bulk copies, and stages of 32 positions in one block. */
static bool is_wide(const qf_cuda_device *device, const qf_cuda_kv *kv)
{
    return device->hopper && kv->format == QF_CUDA_KV_INT4 && kv->head_dim == 128 && kv->block_size >= 32 &&
           WIDE_SHARED + STATIC_BYTES <= device->max_shared_bytes;
}

extern "C" bool qf_cuda_attention_takes_rows(const qf_cuda_device *device, const qf_cuda_kv *kv)
{
    return is_wide(device, kv);
}

static qf_status launch_wide(const attention_params *p, const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    void (*const kernels[2][2])(attention_params) = {
        {attention_decode_wide_kernel<false, false>, attention_decode_wide_kernel<false, true>},
        {attention_decode_wide_kernel<true, false>, attention_decode_wide_kernel<true, true>}};
    void (*const kernel)(attention_params) = kernels[p->a.kv.k_bias != NULL][p->a.qkv != NULL];
    qf_status status = qf_allow_shared("attention (low-bit decode)", kernel, WIDE_SHARED, err);
    if (status != QF_OK) {
        return status;
    }
    QF_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                     cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    const int64_t units = (int64_t)p->a.max_decode_items * p->a.shape.num_kv_heads;
    return qf_launch("attention (low-bit decode)", kernel,
                     dim3((unsigned)(units < device->sm_count ? units : device->sm_count)), dim3(WIDE_THREADS),
                     WIDE_SHARED, device->dependent_launch, stream, err, *p);
}

extern "C" qf_status qf_attention_decode_lowbit(const attention_params *p, const qf_cuda_device *device,
                                                cudaStream_t stream, qf_error *err)
{
    const qf_cuda_kv_format format = p->a.kv.format;
    const bool biased = p->a.kv.k_bias != NULL;
    if (is_wide(device, &p->a.kv)) {
        return launch_wide(p, device, stream, err);
    }
    const lowbit_choice choice = choose(device, format, p->a.shape.head_dim, biased);
    qf_status status = qf_allow_shared("attention (low-bit decode)", choice.kernel, choice.bytes, err);
    if (status != QF_OK) {
        return status;
    }
    QF_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(choice.kernel),
                                     cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    const int64_t units = (int64_t)p->a.max_decode_items * p->a.shape.num_kv_heads;
    const int64_t resident = (int64_t)device->sm_count * LOWBIT_CTAS;
    return qf_launch("attention (low-bit decode)", choice.kernel,
                     dim3((unsigned)(units < resident ? units : resident)), dim3(LOWBIT_THREADS), choice.bytes,
                     device->dependent_launch, stream, err, *p, choice.depth);
}
