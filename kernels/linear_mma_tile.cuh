/* The GEMM of linear_mma.cu for any number of tokens: see "tile" there. */
#ifndef QF_LINEAR_MMA_TILE_CUH
#define QF_LINEAR_MMA_TILE_CUH

#include "linear_mma_common.cuh"

#define QF_TILE_SCALE_BYTES 128 /* of a row tile in a stage: 64 columns of at least 32 a group, 16 words a group */
#define QF_TILE_ZERO_BYTES 128  /* zeros for lanes without a token, at the end of shared memory */

__host__ __device__ constexpr int qf_tile_stages(int warp_tokens) { return warp_tokens <= 2 ? 6 : warp_tokens <= 4 ? 4 : 3; }
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
    const int bytes = min(cta.tokens, p.num_tiles - cta.first_token) * tile_bytes * 8;
    (void)bytes;
    for (int i = threadIdx.x * 16; i < bytes / 8 * 8; i += blockDim.x * 16) {
        qf_cp_async_16(stage + i, x + i);
    }
}
#endif
