/* The RMS norm between two layers of "stream" of linear_mma.cu, for which there is no kernel then:
 *
 *   first layer:   residual += x W^T;  x' = bf16(residual * weight);  squares = sums of residual^2 over 16 columns
 *   second layer:  out = (x' W'^T) / sqrt(mean(residual^2) + eps) + bias
 *
 * The first layer's last share of k adds up the shares: the others leave their sums in words that are zero else, and
 * it takes them as they come and clears the words. All CTAs fit on the device at once; where something else holds part of
 * it, those that wait are the last of the grid: who they wait for has begun before them and waits for none of them.
 *
 * Measured, H200, 4 bits, us a layer of 2,048 positions in one graph (test_decode_chain), norms here | in kernels of their
 * own; cache of 16 bits, then fp8:
 *
 *     tokens       1             2             4             8
 *     0.5B    19.9 | 20.5   19.2 | 20.1   21.0 | 21.7   22.6 | 24.6
 *             20.8 | 21.1   20.4 | 21.1   21.6 | 21.7   24.0 | 23.6
 *     7B      49.2 | 51.8   51.8 | 54.6   57.1 | 59.8   62.9 | 64.4
 *             49.9 | 52.4   52.1 | 54.4   56.6 | 58.0   62.0 | 63.0
 *     14B     58.4 | 61.6   64.8 | 67.4   69.8 | 71.1   76.7 | 81.3
 *             58.0 | 58.5   61.6 | 63.6   68.3 | 69.1   70.7 | 75.2 */
#ifndef QF_LINEAR_MMA_STREAM_NORM_CUH
#define QF_LINEAR_MMA_STREAM_NORM_CUH

#include "linear_mma_common.cuh"

#define QF_STREAM_SQUARES (QF_CUDA_MAX_SQUARES / 16 / 128) /* float4s a lane */

/* In shared memory. */
struct qf_stream_norm {
    float *inverse;  /* (8) tokens: what the sums are multiplied by */
    float *weight;   /* (rows of the CTA) */
    float *residual; /* (num_tokens, rows of the CTA) */
};

/* Bytes of shared memory; tiles: row tiles of a CTA. */
__host__ __device__ constexpr int qf_stream_norm_bytes(int tiles, int num_tokens, bool adds)
{
    return 32 + (adds ? tiles * 64 * (num_tokens + 1) : 0);
}

__device__ __forceinline__ bool qf_stream_adds(const qf_linear_mma_params &p)
{
    return p.norm.residual != nullptr && blockIdx.y + 1 == gridDim.y;
}

/* Before the wait. The weights arrive with the next committed group. */
__device__ __forceinline__ qf_stream_norm qf_stream_norm_begin(const qf_linear_mma_params &p, uint8_t *shared,
                                                               int first_tile, int tiles)
{
    qf_stream_norm t;
    t.inverse = reinterpret_cast<float *>(shared + p.norm_offset);
    t.weight = t.inverse + 8;
    t.residual = t.weight + tiles * 16;
    if (threadIdx.x < 8 && p.squares == nullptr) {
        t.inverse[threadIdx.x] = p.multiplier;
    }
    if (qf_stream_adds(p)) {
#pragma unroll 1
        for (int i = threadIdx.x; i < tiles * 4; i += blockDim.x) {
            qf_cp_async_16(t.weight + i * 4, p.norm.weight + first_tile * 16 + i * 4);
        }
    }
    return t;
}

/* After the wait. The residual arrives with the next committed group. */
__device__ __forceinline__ void qf_stream_norm_load(const qf_linear_mma_params &p, const qf_stream_norm &t,
                                                    int first_tile, int tiles)
{
    if (qf_stream_adds(p)) {
#pragma unroll 1
        for (int i = threadIdx.x; i < tiles * 4 * p.num_tokens; i += blockDim.x) {
            const int token = qf_divide_small(i, tiles * 4), vector = i - token * tiles * 4;
            qf_cp_async_16(t.residual + i * 4,
                           p.norm.residual + (int64_t)token * p.row_tiles * 16 + first_tile * 16 + vector * 4);
        }
    }
}

/* Sums of squares of a token: one of the last warps has them. */
struct qf_stream_squares {
    float4 v[QF_STREAM_SQUARES];
    int token; /* this warp's; below 0: none */

    /* After the wait: from L2, for the kernel before has written them. */
    __device__ __forceinline__ void load(const qf_linear_mma_params &p, int warp, int lane)
    {
        token = p.squares == nullptr ? -1 : p.num_tokens - (int)blockDim.x / 32 + warp;
        if (token >= 0) {
#pragma unroll
            for (int i = 0; i < QF_STREAM_SQUARES; i++) {
                v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                const int at = i * 32 + lane;
                if (at < p.blocks * 2) {
                    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                                 : "=f"(v[i].x), "=f"(v[i].y), "=f"(v[i].z), "=f"(v[i].w)
                                 : "l"(p.squares + token * p.blocks * 8 + at * 4)
                                 : "memory");
                }
            }
        }
    }
    /* Before the barrier of the kernel's end. */
    __device__ __forceinline__ void put(const qf_linear_mma_params &p, const qf_stream_norm &t, int lane) const
    {
        if (token >= 0) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < QF_STREAM_SQUARES; i++) {
                sum += (v[i].x + v[i].y) + (v[i].z + v[i].w);
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            }
            if (lane == 0) {
                t.inverse[token] = p.multiplier * rsqrtf(sum / (float)(p.blocks * 128) + p.eps);
            }
        }
    }
};

/* A word of the exchange, in L2. */
__device__ __forceinline__ float qf_stream_peek(const float *p)
{
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void qf_stream_poke(float *p, float v)
{
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory");
}

/* h + the sums of all shares of k in order, of which the last is `own`; a zero means that a sum has not come, for sums
 * that are zero come as -0. Traps where they never come. */
__device__ __forceinline__ float qf_stream_collect(float *words, uint32_t stride, float h, float own)
{
    const int others = gridDim.y - 1;
    float w[QF_CUDA_MAX_SPLITS - 1] = {};
    bool all = others == 0;
#pragma unroll 1
    for (uint32_t tries = 0; !all; tries++) {
        all = true;
#pragma unroll
        for (int s = 0; s < QF_CUDA_MAX_SPLITS - 1; s++) {
            w[s] = qf_stream_peek(words + min(s, others - 1) * stride); /* the last one again: no branches */
        }
#pragma unroll
        for (int s = 0; s < QF_CUDA_MAX_SPLITS - 1; s++) {
            all = all && __float_as_uint(w[s]) != 0;
        }
        if (tries > 1u << 22) {
            __trap();
        }
    }
#pragma unroll
    for (int s = 0; s < QF_CUDA_MAX_SPLITS - 1; s++) {
        h += s < others ? w[s] : -0.0f;
    }
#pragma unroll 1
    for (int s = 0; s < others; s++) {
        qf_stream_poke(words + s * stride, 0.0f);
    }
    return h + own;
}

/* A warp's 16 rows of row tile `r` of the CTA, of two tokens: lanes of one that is not real have no sum. */
__device__ __forceinline__ void qf_stream_norm_finish(const qf_linear_mma_params &p, const qf_stream_norm &t, float sum,
                                                      int first_tile, int tiles, int r, int token, bool real)
{
    const int row = threadIdx.x % 16, n = p.row_tiles * 16, column = (first_tile + r) * 16 + row;
    const uint32_t at = token * n + column, share = p.num_tokens * n;
    if (!qf_stream_adds(p)) {
        if (real) {
            qf_stream_poke(p.norm.exchange + blockIdx.y * share + at, sum == 0.0f ? -0.0f : sum);
        }
        return;
    }
    float h = 0.0f, value = 0.0f;
    if (real) {
        h = qf_stream_collect(p.norm.exchange + at, share, t.residual[(token * tiles + r) * 16 + row], sum);
        value = h * t.weight[r * 16 + row];
        p.norm.residual[at] = h;
    }
    const float next = __shfl_down_sync(0xffffffffu, value, 1);
    if (real && row % 2 == 0) {
        reinterpret_cast<uint32_t *>(p.norm.x)[((column / 8) * p.tile_tokens + token) * 4 + column % 8 / 2] =
            qf_pack_bf16(value, next);
    }
    float squares = h * h;
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    if (real && row == 0) {
        p.norm.squares[token * p.row_tiles + first_tile + r] = squares;
    }
}

#endif
