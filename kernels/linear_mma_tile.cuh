/* The GEMM of linear_mma.cu for any number of tokens: see "tile" there. */
#ifndef QF_LINEAR_MMA_TILE_CUH
#define QF_LINEAR_MMA_TILE_CUH

#include "linear_mma_common.cuh"

#define QF_TILE_SCALE_BYTES 128 /* of a row tile in a stage: 64 columns of at least 32 a group, 16 words a group */
#define QF_TILE_ZERO_BYTES 128  /* zeros for lanes without a token, at the end of shared memory */

__host__ __device__ constexpr int qf_tile_stages(int warp_tokens)
{
    return warp_tokens <= 2 ? 6 : warp_tokens <= 4 ? 4 : 3;
}
/* CTAs of an SM that the registers allow. */
__host__ __device__ constexpr int qf_tile_resident(int warp_tokens)
{
    return warp_tokens <= 2 ? 3 : warp_tokens <= 4 ? 2 : 1;
}
/* Row tiles of a warp: more where x would otherwise be read too often. */
__host__ __device__ constexpr int qf_tile_warp_rows(int warp_tokens) { return warp_tokens <= 2 ? 1 : 2; }
__host__ __device__ constexpr int qf_tile_weight_bytes(int bits) { return 128 * bits; } /* of a row tile in a stage */

/* Shared memory of a stage: x (64 columns of the CTA's tokens), weights, scales. */
__host__ __device__ constexpr int qf_tile_stage_bytes(int bits, int cta_rows, int cta_tokens)
{
    return cta_tokens * 1024 + cta_rows * (qf_tile_weight_bytes(bits) + (bits == 16 ? 0 : QF_TILE_SCALE_BYTES));
}

/* What a CTA works on; rows and tokens count tiles of 16 and 8. */
struct qf_tile_cta {
    int first_row, rows, first_token, tokens;
    int first_chunk, chunks; /* of 64 columns */
};

template <int bits>
static __device__ __forceinline__ void qf_tile_load_weights(const qf_linear_mma_params &p, const qf_tile_cta &cta,
                                                            uint8_t *stage, int chunk)
{
    constexpr int row_bytes = qf_tile_weight_bytes(bits), row_copies = row_bytes / 16;
    const int block = chunk / 2, half = chunk % 2;
    for (int i = threadIdx.x; i < cta.rows * row_copies; i += blockDim.x) {
        int row = min(cta.first_row + i / row_copies, p.row_tiles - 1); /* beyond the last: anything, never stored */
        int64_t source = ((int64_t)row * p.blocks + block) * (2 * row_bytes) + half * row_bytes + i % row_copies * 16;
        qf_cp_async_16(stage + i * 16, p.data + source);
    }
    if constexpr (bits != 16) {
        const int groups = 128 / p.group_size;
        const int copies = p.group_size == 32 ? 8 : 4, first = groups == 1 ? 0 : half * (groups / 2);
        stage += cta.rows * row_bytes;
        for (int i = threadIdx.x; i < cta.rows * copies; i += blockDim.x) {
            int row = i / copies, copy = i % copies;
            int64_t block_index = (int64_t)min(cta.first_row + row, p.row_tiles - 1) * p.blocks + block;
            qf_cp_async_16(stage + row * QF_TILE_SCALE_BYTES + copy * 16,
                           p.scales + (block_index * groups + first) * 16 + copy * 4);
        }
    }
}

static __device__ __forceinline__ void qf_tile_load_x(const qf_linear_mma_params &p, const qf_tile_cta &cta,
                                                      uint8_t *stage, int chunk)
{
    const int tile_bytes = 128 * p.tile_tokens;
    const uint8_t *x = p.x + ((int64_t)chunk * p.num_tiles + cta.first_token) * tile_bytes;
    const int bytes = min(cta.tokens, p.num_tiles - cta.first_token) * tile_bytes;
    for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) {
        qf_cp_async_16(stage + i, x + i);
    }
}

/* acc += scale * c for all of a warp's tiles. */
template <int rows, int tokens>
static __device__ __forceinline__ void qf_tile_add(float (&acc)[rows][tokens][4], const qf_row_scales (&scales)[rows],
                                                   float (&c)[rows][tokens][4])
{
#pragma unroll
    for (int r = 0; r < rows; r++) {
#pragma unroll
        for (int t = 0; t < tokens; t++) {
            qf_add_scaled(acc[r][t], scales[r].scale, c[r][t]);
        }
    }
}

template <int bits, int rows>
static __device__ __forceinline__ void qf_tile_scales(qf_row_scales (&scales)[rows], const uint8_t *stage_scales,
                                                      int group, int lane)
{
#pragma unroll
    for (int r = 0; r < rows; r++) {
        const uint32_t *words =
            reinterpret_cast<const uint32_t *>(stage_scales + r * QF_TILE_SCALE_BYTES) + group * 16 + lane / 4;
        scales[r] = qf_unpack_scales<bits == 16 ? 4 : bits>(words[0], words[8]);
    }
}

/* Two k16 steps, the pair-th of the stage, of all of a warp's tiles. first: c is set, not added to. */
template <int bits, int rows, int tokens, bool first>
static __device__ __forceinline__ void qf_tile_steps(float (&c)[rows][tokens][4], const qf_row_scales (&scales)[rows],
                                                     const uint8_t *weights, const uint8_t *x, int pair, int lane)
{
    constexpr int loads = bits / 4; /* of 16 bytes a lane for 64 columns */
    uint32_t a[rows][2][4];
#pragma unroll
    for (int r = 0; r < rows; r++) {
        const uint4 *source = reinterpret_cast<const uint4 *>(weights + r * qf_tile_weight_bytes(bits)) + lane;
        if constexpr (bits == 16) {
#pragma unroll
            for (int s = 0; s < 2; s++) {
                uint4 v = source[(2 * pair + s) * 32];
                const uint32_t words[4] = {v.x, v.y, v.z, v.w};
                qf_fragment<bits>(a[r][s], words, 0, scales[r]);
            }
        } else {
            uint4 v = source[pair * (loads / 2) * 32]; /* 4 bits: the compiler keeps the one load of both pairs */
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int s = 0; s < 2; s++) {
                qf_fragment<bits>(a[r][s], words, bits == 4 ? 2 * pair + s : s, scales[r]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < tokens; t++) {
        uint32_t b[4];
        qf_ldmatrix_x4(b, x + t * 1024);
#pragma unroll
        for (int r = 0; r < rows; r++) {
            if (first) {
                qf_mma_bf16_first(c[r][t], a[r][0], b[0], b[1]);
            } else {
                qf_mma_bf16(c[r][t], a[r][0], b[0], b[1]);
            }
        }
#pragma unroll
        for (int r = 0; r < rows; r++) {
            qf_mma_bf16(c[r][t], a[r][1], b[2], b[3]);
        }
    }
}

/* One stage, 64 columns: x at this lane's row for ldmatrix; x_step: from one pair of k16 steps to the next. */
template <int bits, int rows, int tokens>
static __device__ __forceinline__ void qf_tile_multiply(float (&acc)[rows][tokens][4], const uint8_t *weights,
                                                        const uint8_t *stage_scales, const uint8_t *x, int x_step,
                                                        bool two_groups, int lane)
{
    qf_row_scales scales[rows] = {};
    if constexpr (bits == 16) {
        qf_tile_steps<bits, rows, tokens, false>(acc, scales, weights, x, 0, lane);
        qf_tile_steps<bits, rows, tokens, false>(acc, scales, weights, x + x_step, 1, lane);
    } else {
        float c[rows][tokens][4];
        qf_tile_scales<bits>(scales, stage_scales, 0, lane);
        qf_tile_steps<bits, rows, tokens, true>(c, scales, weights, x, 0, lane);
        if (two_groups) {
            qf_tile_add(acc, scales, c);
            qf_tile_scales<bits>(scales, stage_scales, 1, lane);
#pragma unroll
            for (int i = 0; i < rows * tokens * 4; i++) {
                c[i / 4 / tokens][i / 4 % tokens][i % 4] = 0.0f;
            }
        }
        qf_tile_steps<bits, rows, tokens, false>(c, scales, weights, x + x_step, 1, lane);
        qf_tile_add(acc, scales, c);
    }
}

/* A row tile times a token tile: partial sums, or silu(gate) * up with gate in rows 0 .. 7 and up in rows 8 .. 15. */
static __device__ __forceinline__ void qf_tile_finish(const qf_linear_mma_params &p, const float (&acc)[4], int row,
                                                      int token_tile, int lane)
{
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        value[i] = row < p.row_tiles
                       ? qf_finish(acc[i], p.multiplier, p.bias, row * 16 + lane / 4 + i / 2 * 8, blockIdx.z == 0)
                       : 0.0f;
    }
    if (p.act == nullptr) {
        float *out = p.out + ((int64_t)blockIdx.z * p.num_tokens + token_tile * 8) * (p.row_tiles * 16) + row * 16;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = lane % 4 * 2 + i % 2;
            if (row < p.row_tiles && token_tile * 8 + token < p.num_tokens) {
                out[(int64_t)token * (p.row_tiles * 16) + lane / 4 + i / 2 * 8] = value[i];
            }
        }
        return;
    }
    /* Held: (row lane / 4, tokens 2 (lane % 4) and next); a core matrix wants (token lane / 4, two rows). */
    uint32_t word = qf_pack_bf16(qf_silu_mul(value[0], value[2]), qf_silu_mul(value[1], value[3]));
    word = qf_movmatrix_trans(word);
    int64_t matrix = ((int64_t)(row / 8) * p.num_tiles + token_tile) * 8 + row % 8;
    if (row < p.act_tiles && token_tile < p.num_tiles && lane < 4 * p.tile_tokens) {
        p.act[matrix * 4 * p.tile_tokens + lane] = word;
    }
}

/* bits; token tiles of a warp. Grid (token passes, row groups, shares of k). */
template <int bits, int tokens>
static __global__ void __launch_bounds__(256, qf_tile_resident(tokens))
    qf_linear_tile_kernel(const __grid_constant__ qf_linear_mma_params p)
{
    constexpr int rows = qf_tile_warp_rows(tokens), stages = qf_tile_stages(tokens);
    extern __shared__ __align__(128) uint8_t shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    qf_tile_cta cta;
    cta.rows = (int)blockDim.x / 32 / p.token_warps * rows;
    cta.tokens = p.token_warps * tokens;
    cta.first_row = blockIdx.y * cta.rows;
    cta.first_token = blockIdx.x * cta.tokens;
    cta.first_chunk = 2 * p.share_begin[blockIdx.z];
    cta.chunks = 2 * p.share_begin[blockIdx.z + 1] - cta.first_chunk;
    const int stage_bytes = qf_tile_stage_bytes(bits, cta.rows, cta.tokens), x_bytes = cta.tokens * 1024;

    qf_grid_launch_dependents();
    if (threadIdx.x == 0) {
        *reinterpret_cast<uint4 *>(shared + stages * stage_bytes) = make_uint4(0, 0, 0, 0);
    }
    for (int s = 0; s < stages - 1 && s < cta.chunks; s++) {
        qf_tile_load_weights<bits>(p, cta, shared + s * stage_bytes + x_bytes, cta.first_chunk + s);
    }
    qf_grid_dependency_wait();
    for (int s = 0; s < stages - 1; s++) { /* the first group holds all the weights above too */
        if (s < cta.chunks) {
            qf_tile_load_x(p, cta, shared + s * stage_bytes, cta.first_chunk + s);
        }
        qf_cp_async_commit();
    }

    const int warp_row = warp / p.token_warps * rows, warp_token = warp % p.token_warps * tokens;
    const int weight_offset = x_bytes + warp_row * qf_tile_weight_bytes(bits);
    const int scale_offset = x_bytes + cta.rows * qf_tile_weight_bytes(bits) + warp_row * QF_TILE_SCALE_BYTES;
    int x_offset = warp_token * 1024 + lane * 16, x_step = 512;
    bool real = true;
    if (tokens == 1) { /* perhaps fewer than 8 tokens a tile: lanes without one point at zeros */
        real = lane % 8 < p.tile_tokens;
        x_offset = lane / 8 * 16 * p.tile_tokens + lane % 8 * 16;
        x_step = real ? 64 * p.tile_tokens : 0;
    }
    float acc[rows][tokens][4] = {};
    int slot = 0;
    for (int chunk = 0; chunk < cta.chunks; chunk++) {
        qf_cp_async_wait<stages - 2>();
        __syncthreads();
        int ahead = chunk + stages - 1;
        if (ahead < cta.chunks) {
            uint8_t *stage = shared + (slot == 0 ? stages - 1 : slot - 1) * stage_bytes;
            qf_tile_load_weights<bits>(p, cta, stage + x_bytes, cta.first_chunk + ahead);
            qf_tile_load_x(p, cta, stage, cta.first_chunk + ahead);
        }
        qf_cp_async_commit();
        const uint8_t *stage = shared + slot * stage_bytes;
        const uint8_t *x = real ? stage + x_offset : shared + stages * stage_bytes;
        qf_tile_multiply<bits, rows, tokens>(acc, stage + weight_offset, stage + scale_offset, x, x_step,
                                             p.group_size == 32, lane);
        slot = slot + 1 == stages ? 0 : slot + 1;
    }
#pragma unroll
    for (int r = 0; r < rows; r++) {
#pragma unroll
        for (int t = 0; t < tokens; t++) {
            qf_tile_finish(p, acc[r][t], cta.first_row + warp_row + r, cta.first_token + warp_token + t, lane);
        }
    }
}

#endif
