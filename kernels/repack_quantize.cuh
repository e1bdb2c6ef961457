/* The search of csrc/model/quantize.c for the grid of one group, by 16 threads: thread j holds the values that the
 * host adds into its partial sum j, and totals add the partial sums in the same order, so every bit is the same. No
 * product may be contracted into a fused multiply-add, whatever the compiler's flags: hence the intrinsics. */
#ifndef QF_REPACK_QUANTIZE_CUH
#define QF_REPACK_QUANTIZE_CUH

#include <cuda_fp16.h>
#include <stdint.h>

#define QF_QUANTIZE_THREADS 16
#define QF_QUANTIZE_VALUES 8 /* of a thread, at most: groups of 128 */

struct qf_quantize_grid {
    float scale, inverse;
    float low, high; /* -zero, and max - zero */
};

/* One thread's share of a group. */
struct qf_quantize_group {
    float w[QF_QUANTIZE_VALUES];
    int32_t count; /* of w: group_size / 16 */
    uint32_t mask; /* the 16 threads in their warp */
    float max;     /* 2^bits - 1 */
};

__device__ __forceinline__ float qf_quantize_clamp(float x, float low, float high)
{
    x = x > low ? x : low;
    return x < high ? x : high;
}

/* To an integer, nearest even. */
__device__ __forceinline__ float qf_quantize_round(float x)
{
    return __fsub_rn(__fadd_rn(x, 12582912.0f), 12582912.0f);
}

__device__ __forceinline__ float qf_quantize_f16(float scale)
{
    return __half2float(__float2half_rn(qf_quantize_clamp(scale, 0x1p-24f, 65504.0f)));
}

__device__ __forceinline__ qf_quantize_grid qf_quantize_grid_of(float scale, float zero, float max)
{
    qf_quantize_grid g;
    g.scale = qf_quantize_f16(scale);
    g.inverse = __fdiv_rn(1.0f, g.scale);
    g.low = -zero;
    g.high = __fsub_rn(max, zero);
    return g;
}

__device__ __forceinline__ qf_quantize_grid qf_quantize_grid_of_range(float low, float high, float max)
{
    if (low == high) {
        return qf_quantize_grid_of(1.0f, 0.0f, max);
    }
    float scale = qf_quantize_f16(__fdiv_rn(__fsub_rn(high, low), max));
    return qf_quantize_grid_of(scale, qf_quantize_round(qf_quantize_clamp(__fdiv_rn(-low, scale), 0.0f, max)), max);
}

__device__ __forceinline__ float qf_quantize_nearest(const qf_quantize_grid &g, float w)
{
    return qf_quantize_round(qf_quantize_clamp(__fmul_rn(w, g.inverse), g.low, g.high));
}

/* The 16 partial sums in order. */
__device__ __forceinline__ float qf_quantize_total(const qf_quantize_group &group, float sum)
{
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < QF_QUANTIZE_THREADS; j++) {
        total = __fadd_rn(total, __shfl_sync(group.mask, sum, j, QF_QUANTIZE_THREADS));
    }
    return total;
}

__device__ __forceinline__ float qf_quantize_error(const qf_quantize_group &group, const qf_quantize_grid &g)
{
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < QF_QUANTIZE_VALUES; i++) {
        if (i < group.count) {
            float error = __fsub_rn(__fmul_rn(qf_quantize_nearest(g, group.w[i]), g.scale), group.w[i]);
            sum = __fadd_rn(sum, __fmul_rn(error, error));
        }
    }
    return qf_quantize_total(group, sum);
}

/* sum(w d) / sum(d d), or 0. */
__device__ __forceinline__ float qf_quantize_fit(const qf_quantize_group &group, const qf_quantize_grid &g)
{
    float products = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < QF_QUANTIZE_VALUES; i++) {
        if (i < group.count) {
            float d = qf_quantize_nearest(g, group.w[i]);
            products = __fadd_rn(products, __fmul_rn(group.w[i], d));
            squares = __fadd_rn(squares, __fmul_rn(d, d));
        }
    }
    float square = qf_quantize_total(group, squares);
    float product = qf_quantize_total(group, products);
    return square > 0.0f ? __fdiv_rn(product, square) : 0.0f;
}

__device__ __forceinline__ bool qf_quantize_try(const qf_quantize_group &group, const qf_quantize_grid &candidate,
                                                qf_quantize_grid &best, float &best_error)
{
    float error = qf_quantize_error(group, candidate);
    if (!(error < best_error)) {
        return false;
    }
    best = candidate;
    best_error = error;
    return true;
}

/* Range factors from 0.965 down to 0.615, then each end alone, then the scale fitted to the codes. */
__device__ __forceinline__ void qf_quantize_refine(const qf_quantize_group &group, float low, float high,
                                                   qf_quantize_grid &best, float &error)
{
    float factor = 1.0f;
#pragma unroll 1
    for (int step = 1; step < 12 && error > 0.0f; step++) {
        float f = __fsub_rn(1.0f, __fmul_rn(0.035f, (float)step));
        qf_quantize_grid g = qf_quantize_grid_of_range(__fmul_rn(low, f), __fmul_rn(high, f), group.max);
        factor = qf_quantize_try(group, g, best, error) ? f : factor;
    }
#pragma unroll 1
    for (int i = 0; i < 4 && error > 0.0f; i++) {
        float low_side = i == 0 ? 1.06f : i == 2 ? 0.94f : 1.0f;
        float high_side = i == 1 ? 1.06f : i == 3 ? 0.94f : 1.0f;
        qf_quantize_grid g = qf_quantize_grid_of_range(__fmul_rn(__fmul_rn(low, factor), low_side),
                                                       __fmul_rn(__fmul_rn(high, factor), high_side), group.max);
        (void)qf_quantize_try(group, g, best, error);
    }
#pragma unroll 1
    for (int i = 0; i < 3 && error > 0.0f; i++) {
        float scale = qf_quantize_fit(group, best);
        if (!(scale > 0.0f) ||
            !qf_quantize_try(group, qf_quantize_grid_of(scale, -best.low, group.max), best, error)) {
            break;
        }
    }
}

/* All 16 threads get the same grid. */
__device__ __forceinline__ qf_quantize_grid qf_quantize_search(const qf_quantize_group &group)
{
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int i = 0; i < QF_QUANTIZE_VALUES; i++) {
        if (i < group.count) {
            low = group.w[i] < low ? group.w[i] : low;
            high = group.w[i] > high ? group.w[i] : high;
        }
    }
#pragma unroll
    for (int distance = QF_QUANTIZE_THREADS / 2; distance > 0; distance /= 2) {
        float other_low = __shfl_xor_sync(group.mask, low, distance, QF_QUANTIZE_THREADS);
        float other_high = __shfl_xor_sync(group.mask, high, distance, QF_QUANTIZE_THREADS);
        low = other_low < low ? other_low : low;
        high = other_high > high ? other_high : high;
    }
    qf_quantize_grid best = qf_quantize_grid_of_range(low, high, group.max);
    bool one_sided = low == 0.0f || high == 0.0f;
    bool coarse = group.max < 255.0f;
    if (!coarse && !one_sided) {
        return best;
    }
    float error = qf_quantize_error(group, best);
    if (coarse) {
        qf_quantize_refine(group, low, high, best, error);
    }
    if (one_sided && error > 0.0f) {
        float size = high > -low ? high : -low;
        qf_quantize_grid g = qf_quantize_grid_of(size, high > -low ? 0.0f : group.max, group.max);
        (void)qf_quantize_try(group, g, best, error);
    }
    return best;
}

#endif
