/* Where an element of a tiled activation stands: the formula of qf_kernels.h, and its inverse. */
#ifndef QF_LAYOUT_CUH
#define QF_LAYOUT_CUH

#include "qf_kernels.h"

/* qf_cuda_num_tiles and qf_cuda_tile_tokens, which are the host's. */
__host__ __device__ __forceinline__ int32_t qf_num_tiles(int32_t num_tokens) { return (num_tokens + 7) / 8; }
__host__ __device__ __forceinline__ int32_t qf_tile_tokens(int32_t num_tokens)
{
    return num_tokens > 4 ? 8 : num_tokens > 2 ? 4 : num_tokens > 1 ? 2 : 1;
}

/* Number of the chunk (16 bytes: eight k from a multiple of 8 on) that holds element (k, t) of a tiled (any k,
 * num_tokens) matrix, as chunks lie in memory. */
__device__ __forceinline__ int64_t qf_tiled_chunk_index(int32_t k, int32_t t, int32_t num_tokens)
{
    const int32_t tile_tokens = qf_tile_tokens(num_tokens);
    const int64_t tile = (int64_t)(k / 64) * qf_num_tiles(num_tokens) + t / 8;
    return (tile * 8 + k / 8 % 8) * tile_tokens + t % 8;
}

/* Index of element (k, t). */
__device__ __forceinline__ int64_t qf_tiled_index(int32_t k, int32_t t, int32_t num_tokens)
{
    return qf_tiled_chunk_index(k, t, num_tokens) * 8 + k % 8;
}

/* The inverse: the first k and the token of the chunk with this number. */
struct qf_tiled_chunk {
    int32_t k, t;
};

__device__ __forceinline__ qf_tiled_chunk qf_tiled_chunk_at(int64_t chunk, int32_t num_tokens)
{
    const int32_t num_tiles = qf_num_tiles(num_tokens), tile_tokens = qf_tile_tokens(num_tokens);
    const int32_t column = (int32_t)(chunk % tile_tokens);
    chunk /= tile_tokens;
    const int32_t k8 = (int32_t)(chunk % 8);
    chunk /= 8;
    return {(int32_t)(chunk / num_tiles) * 64 + k8 * 8, (int32_t)(chunk % num_tiles) * 8 + column};
}

#endif
