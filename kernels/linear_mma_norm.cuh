/* x of the stream kernel from the residual stream: see "norm" in linear_mma.cu. */
#ifndef QF_LINEAR_MMA_NORM_CUH
#define QF_LINEAR_MMA_NORM_CUH

#include "linear_mma_common.cuh"

#define QF_NORM_MAX_WARPS 16 /* of rmsnorm.cu's CTA */
#define QF_NORM_MAX_BYTES 65536 /* of rows an SM: more takes L2 longer than a kernel for the norm takes */

__device__ __forceinline__ float qf_norm_sum(float4 v) { return (v.x + v.y) + (v.z + v.w); }

__device__ __forceinline__ void qf_norm_add(float4 &h, float4 d)
{
    h.x += d.x;
    h.y += d.y;
    h.z += d.z;
    h.w += d.w;
}

/* Asks for the rows of all tokens: residual, then the splits; (1 + num_splits, num_tokens, hidden_size). */
static __device__ __forceinline__ void qf_norm_fetch(const qf_linear_mma_params &p, float *rows)
{
    const qf_linear_norm &norm = p.norm;
    for (int t = 0; t < p.num_tokens; t++) {
        const float *residual = norm.residual + (int64_t)t * norm.hidden_size;
        const float *delta = norm.delta + (int64_t)t * norm.delta_stride;
        for (int i = threadIdx.x * 4; i < norm.hidden_size; i += blockDim.x * 4) {
            float *row = rows + t * norm.hidden_size + i;
            qf_cp_async_16(row, residual + i);
            for (int s = 0; s < norm.num_splits; s++) {
                row += p.num_tokens * norm.hidden_size;
                qf_cp_async_16(row, delta + (int64_t)s * p.num_tokens * norm.delta_stride + i);
            }
        }
    }
}

/* One warp of rmsnorm.cu's CTA for token t: h over the residual's row, and the warp's sum of squares. */
static __device__ __forceinline__ void qf_norm_squares(const qf_linear_mma_params &p, float *rows, float *sum, int t,
                                                       int thread)
{
    const qf_linear_norm &norm = p.norm;
    const int split_size = p.num_tokens * norm.hidden_size;
    const bool stores = blockIdx.x == 0 && blockIdx.y == 0;
    float squares = 0.0f;
    for (int i = thread * 4; i < norm.hidden_size; i += norm.threads * 4) {
        float *row = rows + t * norm.hidden_size + i;
        float4 h = *reinterpret_cast<float4 *>(row);
        for (int s = 1; s <= norm.num_splits; s++) {
            qf_norm_add(h, *reinterpret_cast<float4 *>(row + s * split_size));
        }
        *reinterpret_cast<float4 *>(row) = h;
        if (stores) {
            *reinterpret_cast<float4 *>(norm.residual_out + (int64_t)t * norm.hidden_size + i) = h;
        }
        squares = fmaf(h.x, h.x, squares);
        squares = fmaf(h.y, h.y, squares);
        squares = fmaf(h.z, h.z, squares);
        squares = fmaf(h.w, h.w, squares);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    if (thread % 32 == 0) {
        *sum = squares;
    }
}

/* Waits for the kernel before this one, then writes the CTA's share of x as the tiled layout has it. sums: 16 floats a
 * token. The rows stand where the partial sums will; the norm's weights of the share behind them. */
static __device__ __forceinline__ void qf_stream_norm(const qf_linear_mma_params &p, uint8_t *shared, float *sums,
                                                      int first_block, int share_blocks)
{
    const qf_linear_norm &norm = p.norm;
    float *rows = reinterpret_cast<float *>(shared + p.slot_offset);
    float *weight = rows + (1 + norm.num_splits) * p.num_tokens * norm.hidden_size;
    const int first = first_block * 128, size = share_blocks * 128, real = min(size, norm.hidden_size - first);
    for (int i = threadIdx.x * 4; i < real; i += blockDim.x * 4) {
        qf_cp_async_16(weight + i, norm.weight + first + i);
    }
    const int row_warps = norm.threads / 32;
    for (int i = threadIdx.x; i < p.num_tokens * QF_NORM_MAX_WARPS; i += blockDim.x) {
        if (i % QF_NORM_MAX_WARPS >= row_warps) {
            sums[i] = 0.0f;
        }
    }
    qf_grid_dependency_wait();
    qf_norm_fetch(p, rows);
    qf_cp_async_commit();
    qf_cp_async_wait<0>();
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < p.num_tokens * row_warps; i += blockDim.x / 32) {
        const int t = qf_divide_small(i, row_warps), w = i - t * row_warps;
        qf_norm_squares(p, rows, sums + t * QF_NORM_MAX_WARPS + w, t, w * 32 + lane);
    }
    __syncthreads();
    for (int t = 0; t < p.num_tokens; t++) {
        const float4 *groups = reinterpret_cast<const float4 *>(sums + t * QF_NORM_MAX_WARPS);
        const float sum =
            (qf_norm_sum(groups[0]) + qf_norm_sum(groups[1])) + (qf_norm_sum(groups[2]) + qf_norm_sum(groups[3]));
        const float inverse = rsqrtf(fmaf(sum, norm.inverse_size, norm.eps));
        for (int i = threadIdx.x * 4; i < size; i += blockDim.x * 4) {
            uint2 packed = make_uint2(0, 0);
            if (i < real) {
                const float4 h = *reinterpret_cast<const float4 *>(rows + t * norm.hidden_size + first + i);
                const float4 w = *reinterpret_cast<const float4 *>(weight + i);
                packed = make_uint2(qf_pack_bf16(h.x * inverse * w.x, h.y * inverse * w.y),
                                    qf_pack_bf16(h.z * inverse * w.z, h.w * inverse * w.w));
            }
            *reinterpret_cast<uint2 *>(shared + (i / 8 * p.tile_tokens + t) * 16 + i % 8 * 2) = packed;
        }
    }
}

#endif
