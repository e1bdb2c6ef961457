/* How the CUDA kernels lay out the paged KV cache, and the tables of the low-bit caches' bias term. */
#ifndef QF_KV_CACHE_H
#define QF_KV_CACHE_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "base/status.h"

/* How a cache stores its values. Low-bit keys are rotated without the bias of k_proj (csrc/kv/format.h says what codes
 * and scale words mean). */
typedef enum qf_cuda_kv_format {
    QF_CUDA_KV_16 = 0, /* bf16; float32 if qf_cuda_kv.float32 */
    QF_CUDA_KV_FP8,
    QF_CUDA_KV_INT8,
    QF_CUDA_KV_INT4,
    QF_CUDA_KV_NF4
} qf_cuda_kv_format;

/* One layer's keys or values: (num_blocks, num_kv_heads, block_size, head_dim), bf16 (or float32 for the reference).
 * Low-bit: a block is its codes, (num_kv_heads, block_size, head_dim bytes or half of that), then its scale words,
 * (num_kv_heads, block_size, 1 or head_dim / 32) of 16 bits, in order of position and group. The order of the codes
 * within a row is the kernels' own (common/kv_codec.cuh). */
typedef struct qf_cuda_kv {
    void *k, *v;
    int32_t block_size, num_kv_heads, head_dim;
    bool float32;
    qf_cuda_kv_format format;
    const float *k_bias; /* low-bit: (num_kv_heads, head_dim), not rotated; NULL: no bias */
} qf_cuda_kv;

/* Of one layer's low-bit keys or values, and of one such block (a multiple of 32). */
static inline int32_t qf_cuda_kv_words(qf_cuda_kv_format format, int32_t head_dim)
{
    return format == QF_CUDA_KV_16 ? 0 : format == QF_CUDA_KV_FP8 || format == QF_CUDA_KV_INT8 ? 1 : head_dim / 32;
}
static inline int32_t qf_cuda_kv_row_bytes(qf_cuda_kv_format format, int32_t head_dim) /* without scale words */
{
    return format == QF_CUDA_KV_16 ? 2 * head_dim
           : format == QF_CUDA_KV_FP8 || format == QF_CUDA_KV_INT8 ? head_dim : head_dim / 2;
}
static inline int64_t qf_cuda_kv_block_bytes(qf_cuda_kv_format format, int32_t num_kv_heads, int32_t block_size,
                                             int32_t head_dim)
{
    return (int64_t)num_kv_heads * block_size *
           (qf_cuda_kv_row_bytes(format, head_dim) + 2 * qf_cuda_kv_words(format, head_dim));
}

/* What adds the rotated bias of k_proj to low-bit keys (common/kv_codec.cuh), positions in tiles of
 * QF_CUDA_BIAS_TILE:
 *   coarse: (num_tiles, head_dim) float32: cos(angle) | sin(angle) of a tile's first position, times factor
 *   fine:   room for (QF_CUDA_BIAS_TILE, head_dim) fp16: cos(angle) - 1 and sin(angle) of 1/2 .. (QF_CUDA_BIAS_TILE - 1) / 2,
 *           times 2^QF_CUDA_BIAS_SHIFT, as A fragments of mma.m16n8k16; behind, in float32, cos(angle) | sin(angle) of the
 *           last of these
 *   rotation: (QF_CUDA_BIAS_TILE, head_dim) float32: cos(angle) | sin(angle) of 0 .. QF_CUDA_BIAS_TILE - 1
 * where angle = position * inv_freq[j] in double. One set of tables serves all layers. 16-byte aligned. */
#define QF_CUDA_BIAS_TILE 64
#define QF_CUDA_BIAS_SHIFT 14
typedef struct qf_cuda_kv_bias_tables_args {
    const float *inv_freq; /* (head_dim / 2) */
    double factor;         /* of attention: below 8 */
    float *coarse;
    uint16_t *fine;
    float *rotation;
    int32_t num_tiles, head_dim; /* num_tiles = ceil(max_model_len / QF_CUDA_BIAS_TILE) */
} qf_cuda_kv_bias_tables_args;
qf_status qf_cuda_kv_bias_tables(const qf_cuda_kv_bias_tables_args *args, cudaStream_t stream, qf_error *err);

#ifdef __cplusplus
}
#endif

#endif
