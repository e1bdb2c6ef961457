/* What both attention kernels share: parameters, the merge of splits, the output's layout. */
#ifndef QF_ATTENTION_MERGE_CUH
#define QF_ATTENTION_MERGE_CUH

#include "attention_limits.h"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "qf_attention.h"

#define ATTENTION_THREADS 128
#define ATTENTION_WARPS (ATTENTION_THREADS / 32)

struct attention_params {
    qf_cuda_attention_args a;
    float scale_log2;    /* scale * log2(e): softmax by powers of two */
    int32_t block_shift; /* block_size = 1 << block_shift */
    int32_t group;       /* query heads of a kv head */
    int32_t window;      /* sliding window, or more than any position */
    int32_t num_tiles, tile_tokens;               /* of the tiled output */
    int32_t unit_words, unit_sums, unit_counters; /* of a unit of the workspace: all, and where parts start */
};

/* attention_prefill_lowbit.cu: num_blocks CTAs, and bounds as qf_cuda_attention has checked them. */
extern "C" qf_status qf_attention_prefill_lowbit(const attention_params *p, uint32_t num_blocks,
                                                 const qf_cuda_device *device, cudaStream_t stream, qf_error *err);

/* attention_decode_lowbit.cu: bounds as qf_cuda_attention has checked them. */
extern "C" qf_status qf_attention_decode_lowbit(const attention_params *p, const qf_cuda_device *device,
                                                cudaStream_t stream, qf_error *err);

static __device__ __forceinline__ float power_of_two(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* A running result (maximum, sum; maxima in powers of two) takes in a split's: acc = acc * old_weight +
 * split's * new_weight. Splits without a visible position (maximum -inf) must be left out. */
struct merge_weights {
    float old_weight, new_weight;
};

static __device__ __forceinline__ merge_weights merge_split(float &maximum, float &sum, float split_maximum,
                                                            float split_sum)
{
    const float next = fmaxf(maximum, split_maximum);
    const merge_weights w = {power_of_two(maximum - next), power_of_two(split_maximum - next)};
    sum = __fmaf_rn(split_sum, w.new_weight, __fmul_rn(sum, w.old_weight));
    maximum = next;
    return w;
}

static __device__ __forceinline__ float merge_value(float acc, float x, merge_weights w)
{
    return __fmaf_rn(x, w.new_weight, __fmul_rn(acc, w.old_weight));
}

/* Past L1; words of their own, for an item is aligned to nothing more. */
static __device__ __forceinline__ qf_cuda_attention_item load_item(const qf_cuda_attention_item *from)
{
    const int32_t *w = reinterpret_cast<const int32_t *>(from);
    return qf_cuda_attention_item{__ldcg(w),     __ldcg(w + 1), __ldcg(w + 2), __ldcg(w + 3), __ldcg(w + 4),
                                  __ldcg(w + 5), __ldcg(w + 6), __ldcg(w + 7), __ldcg(w + 8), __ldcg(w + 9)};
}

/* --- output ------------------------------------------------------------------------------------------------- */

/* Element (k, token) of the tiled output. */
static __device__ __forceinline__ uint16_t *out_element(const attention_params &p, int32_t k, int32_t token)
{
    const int64_t core = ((int64_t)(k >> 6) * p.num_tiles + (token >> 3)) * 8 + ((k >> 3) & 7);
    return p.a.out + (core * p.tile_tokens + (token & 7)) * 8 + (k & 7);
}

static __device__ __forceinline__ void store_out(const attention_params &p, int32_t k, int32_t token, float4 x,
                                                 float sum)
{
    const float f = __frcp_rn(sum);
    *reinterpret_cast<uint2 *>(out_element(p, k, token)) =
        make_uint2(qf_pack_bf16(__fmul_rn(x.x, f), __fmul_rn(x.y, f)),
                   qf_pack_bf16(__fmul_rn(x.z, f), __fmul_rn(x.w, f)));
}

/* The columns beyond the heads, by the CTA of the last kv head. */
static __device__ __forceinline__ void zero_padding(const attention_params &p, const qf_cuda_attention_item &item,
                                                    int32_t kv_head)
{
    const int32_t width = p.a.shape.num_heads * p.a.shape.head_dim, vectors = (p.a.out_k - width) / 8;
    if (kv_head != p.a.shape.num_kv_heads - 1) {
        return;
    }
    for (int32_t i = threadIdx.x; i < vectors * item.num_rows; i += ATTENTION_THREADS) {
        const int32_t row = i / vectors;
        *reinterpret_cast<uint4 *>(out_element(p, width + (i - row * vectors) * 8, item.first_row + row)) =
            make_uint4(0, 0, 0, 0);
    }
}

/* --- splits ------------------------------------------------------------------------------------------------- */

/* The unit (attention_limits.h) of split `split` of the item's row `row`. */
static __device__ __forceinline__ float *unit_of(const attention_params &p, const qf_cuda_attention_item &item,
                                                 int32_t split, int32_t row)
{
    return static_cast<float *>(p.a.workspace) + (int64_t)(item.partial + split * item.num_rows + row) * p.unit_words;
}

static __device__ __forceinline__ float *unit_values(const attention_params &p, float *unit, int32_t head)
{
    return unit + p.unit_sums + head * p.a.shape.head_dim;
}

/* Acquire and release at the device's scope: less than two __threadfence() cost. */
static __device__ __forceinline__ uint32_t add_one(uint32_t *counter)
{
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

/* Called by all threads when the CTA's partial results have been stored: true in the CTA that is the last of `expected`
 * to come to the counter of a unit, which sees the results of all. The counter is zero again after it. */
static __device__ bool last_to_arrive(const attention_params &p, int32_t unit, int32_t kv_head, int32_t expected)
{
    __shared__ uint32_t arrived;
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t *counter = static_cast<uint32_t *>(p.a.workspace) + (int64_t)unit * p.unit_words + p.unit_counters +
                            kv_head;
        arrived = add_one(counter); /* behind the barrier: releases the whole CTA's stores */
        if (arrived + 1 == (uint32_t)expected) {
            *counter = 0;
        }
    }
    __syncthreads();
    return arrived + 1 == (uint32_t)expected;
}

/* Merges the splits in their order, whoever came last. Partial results are read past L1. */
static __device__ void merge_splits(const attention_params &p, const qf_cuda_attention_item &item, int32_t kv_head)
{
    const int batch = 16; /* splits in flight */
    const int32_t head_dim = p.a.shape.head_dim, vectors = head_dim / 4, per_row = p.group * vectors;
    const int64_t stride = (int64_t)item.num_rows * p.unit_words;
    for (int32_t i = threadIdx.x; i < item.num_rows * per_row; i += ATTENTION_THREADS) {
        const int32_t row = i / per_row, head = kv_head * p.group + (i - row * per_row) / vectors;
        const int32_t d = (i % vectors) * 4;
        float *unit = unit_of(p, item, 0, row);
        const float *sums = unit + 2 * head, *values = unit_values(p, unit, head) + d;
        float maximum = -INFINITY, sum = 0.0f;
        float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int32_t first = 0; first < item.num_splits; first += batch) {
            float2 s[batch];
            float4 x[batch];
#pragma unroll
            for (int b = 0; b < batch; b++) {
                const int64_t at = min(first + b, item.num_splits - 1) * stride;
                s[b] = __ldcg(reinterpret_cast<const float2 *>(sums + at));
                x[b] = __ldcg(reinterpret_cast<const float4 *>(values + at));
            }
#pragma unroll
            for (int b = 0; b < batch; b++) {
                if (first + b < item.num_splits && s[b].x != -INFINITY) {
                    const merge_weights w = merge_split(maximum, sum, s[b].x, s[b].y);
                    acc.x = merge_value(acc.x, x[b].x, w);
                    acc.y = merge_value(acc.y, x[b].y, w);
                    acc.z = merge_value(acc.z, x[b].z, w);
                    acc.w = merge_value(acc.w, x[b].w, w);
                }
            }
        }
        store_out(p, head * head_dim + d, item.first_row + row, acc, sum);
    }
    zero_padding(p, item, kv_head);
}

#endif
