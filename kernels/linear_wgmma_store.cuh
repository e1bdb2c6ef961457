/* The epilogues of linear_wgmma.cu's kernel: from the sums in registers to `out` or `act`. */
#ifndef QF_LINEAR_WGMMA_STORE_CUH
#define QF_LINEAR_WGMMA_STORE_CUH

#include "linear_wgmma_tile.cuh"

#ifdef QF_SM90A

/* out[split][token][row] for 16 rows of this warp. */
template <int tokens>
__device__ __forceinline__ void qf_wg_store(const qf_wg_params &p, const qf_wg_unit &u, const float (&d)[tokens / 2])
{
    const int lane = threadIdx.x % 32, row_tile = u.row_tile + threadIdx.x / 32;
    if (row_tile >= p.n / 16) {
        return;
    }
    const int row = row_tile * 16 + lane / 4;
    const int left = p.num_tokens - u.token_tile * 8 - 2 * (lane % 4); /* tokens from this lane's first on */
    float bias[2] = {0.0f, 0.0f};
    if (p.bias != nullptr && u.split == 0) {
        bias[0] = p.bias[row];
        bias[1] = p.bias[row + 8];
    }
    float *out = p.out + ((int64_t)u.split * p.num_tokens + u.token_tile * 8 + 2 * (lane % 4)) * p.n + row;
#pragma unroll
    for (int j = 0; j < tokens / 8; j++) {
        if (8 * j < left) {
            out[0] = fmaf(d[4 * j], p.scale_multiplier, bias[0]);
            out[8] = fmaf(d[4 * j + 2], p.scale_multiplier, bias[1]);
        }
        if (8 * j + 1 < left) {
            out[p.n] = fmaf(d[4 * j + 1], p.scale_multiplier, bias[0]);
            out[p.n + 8] = fmaf(d[4 * j + 3], p.scale_multiplier, bias[1]);
        }
        out += 8 * (int64_t)p.n;
    }
}

/* A division by the reciprocal, right to 2 units of 2^-23, has no branch, so that many run side by side. */
__device__ __forceinline__ float qf_wg_silu_mul(float gate, float up)
{
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

/* Rows g and g + 8 are gate and up of feature 8 row_tile + g; a core matrix of `act` is stored by one warp at once. */
template <int tokens>
__device__ __forceinline__ void qf_wg_silu_store(const qf_wg_params &p, const qf_wg_unit &u,
                                                 const float (&d)[tokens / 2])
{
    const int lane = threadIdx.x % 32, row_tile = u.row_tile + threadIdx.x / 32;
    const int row_tiles = p.n / 16;
    if (row_tile >= (row_tiles + 15) / 16 * 16) {
        return;
    }
    const bool real = row_tile < row_tiles; /* or padding up to act_k */
    const int tiles = (p.num_tokens + 7) / 8;
    const int width = p.num_tokens > 4 ? 8 : p.num_tokens > 2 ? 4 : p.num_tokens;
    float bias[2] = {0.0f, 0.0f};
    if (p.bias != nullptr && real) {
        bias[0] = p.bias[row_tile * 16 + lane / 4];
        bias[1] = p.bias[row_tile * 16 + lane / 4 + 8];
    }
    uint32_t *act = reinterpret_cast<uint32_t *>(p.act) +
                    (((int64_t)(row_tile / 8) * tiles + u.token_tile) * 8 + row_tile % 8) * (width * 4) + lane;
#pragma unroll
    for (int j = 0; j < tokens / 8; j++) {
        float low = qf_wg_silu_mul(fmaf(d[4 * j], p.scale_multiplier, bias[0]),
                                   fmaf(d[4 * j + 2], p.scale_multiplier, bias[1]));
        float high = qf_wg_silu_mul(fmaf(d[4 * j + 1], p.scale_multiplier, bias[0]),
                                    fmaf(d[4 * j + 3], p.scale_multiplier, bias[1]));
        uint32_t word = qf_movmatrix_trans(qf_pack_bf16(low, high));
        if (u.token_tile + j < tiles && lane / 4 < width) {
            act[j * 256] = real ? word : 0u;
        }
    }
}

#endif /* QF_SM90A */
#endif
