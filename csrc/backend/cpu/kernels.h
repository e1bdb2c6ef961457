/* Inside the CPU ops: the packed linear layer, and the table of kernels that each instruction set fills.
 *
 * The bodies (linear_body.h, attention_body.h, elementwise_body.h) are written once over the sixteen-lane types of
 * simd_<isa>.h; kernels_<isa>.c compiles them for one instruction set. All of them give the same bits. */
#ifndef QF_BACKEND_CPU_KERNELS_H
#define QF_BACKEND_CPU_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/cpu/cpu.h"

#if defined(__x86_64__)
#define QF_CPU_X86 1
#else
#define QF_CPU_X86 0
#endif

#define QF_TILE 16            /* outputs (rows of W) per tile: the lanes of a vector */
#define QF_MAX_ROWS 8         /* rows of x per register block, at most */
#define QF_SPLIT_TOKENS 512   /* absolute positions per attention partial */
#define QF_ATTENTION_ROWS 8   /* (token, head) rows that share one pass over K and V */
#define QF_MAX_HEAD_DIM 256

/* The layout is drawn at the top of linear_pack.c. */
struct qf_cpu_linear {
    qf_weight_kind kind;
    int32_t n, k;
    int32_t num_tiles;       /* ceil(n / 16), made even for 4 and 8 bits */
    int32_t group_size;      /* of the packed groups: 8 .. 128; 0 for 16- and 32-bit weights */
    int32_t num_groups;      /* packed groups: ceil(k / group_size) */
    bool wide_scales;        /* float32 scales in the header, where float16 would not be exact */
    size_t header_bytes;     /* of one tile in a record: 64, or 128 with wide scales */
    size_t record_bytes;     /* one group of two tiles */
    size_t tile_bytes;       /* one tile's share: num_groups * record_bytes / 2, or k * 16 values */
    const uint8_t *weights;  /* num_tiles * tile_bytes */
    const float *bias;       /* (num_tiles * 16) or NULL */
    const int32_t *perm;     /* (k) or NULL */
    void *pages;             /* one allocation: weights, bias, perm */
    size_t pages_bytes;
};

/* A matrix product's operands. The int8 activations of block b of rows (rows_per_block each, R in the last one)
 * start at q + b * rows_per_block * k_padded and lie as (k_padded / 4, R, 4): one broadcast load feeds a row, and
 * consecutive loads are consecutive in memory. scales and sums: (num_groups, R) per block. */
typedef struct qf_linear_operands {
    const qf_cpu_linear *linear;
    const float *x;        /* (num_tokens, k), for float activations */
    const int8_t *q;
    const float *scales;
    const int32_t *sums;
    float *out;            /* (num_tokens, n) */
    int32_t num_tokens;
    int32_t row_begin, row_end; /* rows to compute; row_begin is a multiple of rows_per_block */
} qf_linear_operands;

/* One row block of one sequence and KV head, and one split of its positions. */
typedef struct qf_attention_rows {
    int32_t num_rows;
    int32_t kv_head;
    const int32_t *block_table;            /* (max_blocks) of this sequence; entry 0 is its block first_block */
    int32_t first_block;
    const int32_t *window_table;           /* the same of the 16-bit window; NULL: none */
    int32_t window_first_block;
    int32_t first[QF_ATTENTION_ROWS];      /* visible positions of each row: first .. end - 1 */
    int32_t end[QF_ATTENTION_ROWS];
    int32_t recent[QF_ATTENTION_ROWS];     /* those from here on are read from the window; end: none */
} qf_attention_rows;

/* Softmax numerators of some positions: maximum, sum of exponentials, weighted sum of V. */
typedef struct qf_attention_partial {
    float max, sum;
    float acc[QF_MAX_HEAD_DIM]; /* (head_dim) */
} qf_attention_partial;

/* A record's scales while it is unpacked. Not on the stack, where gcc 12 with the address sanitizer takes arrays to be
 * 64-byte aligned that are not. */
typedef struct qf_unpack_scratch {
    float scales[QF_MAX_HEAD_DIM / QF_KV_GROUP][16];
    int32_t zeros[QF_MAX_HEAD_DIM / QF_KV_GROUP][16]; /* of int4 */
} qf_unpack_scratch;

#define QF_UNPACKED_VALUES 4096 /* floats of values that are unpacked at a time: at least sixteen rows */

typedef struct qf_attention_scratch {
    float q[QF_MAX_HEAD_DIM * QF_ATTENTION_ROWS];         /* (head_dim, num_rows) scaled */
    float scores[QF_ATTENTION_ROWS][QF_SPLIT_TOKENS];
    qf_attention_partial part[QF_ATTENTION_ROWS];         /* of one split */
    qf_attention_partial total[QF_ATTENTION_ROWS];
    /* Of low-bit caches: */
    float window_scores[QF_ATTENTION_ROWS][QF_SPLIT_TOKENS];
    float keys[2][QF_MAX_HEAD_DIM * 16];                  /* two tiles, unpacked, with their bias */
    float values[QF_UNPACKED_VALUES];                     /* (positions, head_dim) unpacked */
    qf_unpack_scratch unpack;
    float turned_bias[QF_MAX_HEAD_DIM];                   /* at the first position of its tile */
} qf_attention_scratch;

typedef struct qf_cpu_kernels {
    int32_t rows_per_block;
    /* x: (rows, k), rows <= rows_per_block; writes one block as qf_linear_operands says. */
    void (*quantize_rows)(const float *x, int32_t rows, int32_t k, int32_t group_size, int32_t num_groups, int8_t *q,
                          float *scales, int32_t *sums);
    void (*linear_i8)(const qf_linear_operands *operands, int32_t tile_begin, int32_t tile_end);
    void (*linear_f32)(const qf_linear_operands *operands, int32_t tile_begin, int32_t tile_end);
    /* Positions [begin, end) of one split: fills scratch->part[row] for rows that see any of them. */
    void (*attention_split)(const qf_attention_args *args, const qf_attention_rows *rows,
                            qf_attention_scratch *scratch, int32_t begin, int32_t end);
    void (*attention_merge)(qf_attention_partial *total, const qf_attention_partial *part, int32_t head_dim);
    void (*attention_finish)(const qf_attention_partial *total, float *out, int32_t head_dim);
    void (*rmsnorm_row)(float *residual, const float *delta, const float *weight, float *out, int32_t n, float eps);
    void (*silu_mul)(const float *gate, const float *up, float *out, int32_t n);
    void (*widen_row)(const void *row, qf_dtype dtype, float *out, int32_t n);
    /* Rotates head_dim values; x and out may be the same. */
    void (*rope_head)(const float *x, const float *cos_sin, float *out, int32_t head_dim);
} qf_cpu_kernels;

extern const qf_cpu_kernels qf_cpu_kernels_scalar;
#if QF_CPU_X86
extern const qf_cpu_kernels qf_cpu_kernels_avx2;
extern const qf_cpu_kernels qf_cpu_kernels_avx512;
extern const qf_cpu_kernels qf_cpu_kernels_avx512_vnni;
#endif

struct qf_cpu_context {
    const qf_cpu_kernels *kernels;
    qf_thread_pool *pool;
    int32_t num_threads;
    int32_t max_num_tokens, max_features;
    int8_t *act_q;          /* (max_num_tokens, padded max_features) */
    float *act_scales;      /* (max_num_tokens, padded max_features / 8) */
    int32_t *act_sums;      /* (max_num_tokens, padded max_features / 8) */
    float *act_gathered;    /* (max_num_tokens, max_features) permuted input */
    qf_attention_scratch *attention_scratch;   /* (num_threads) */
    qf_attention_partial *attention_partials;  /* (max_partials) */
    int32_t max_partials;
    void *pages;
    size_t pages_bytes;
};

/* Records of 4- and 8-bit weights hold two tiles: pair p begins at p * 2 * tile_bytes. */
static inline const uint8_t *qf_cpu_pair(const qf_cpu_linear *w, int32_t tile)
{
    return w->weights + (size_t)(tile / 2) * 2 * w->tile_bytes;
}

/* A low-bit cache's record of sixteen positions of a KV head: their codes, then their scale words (scales, 16). Keys:
 * (head_dim, 16) bytes, or with 4 bits (head_dim / 2, 16), component j in the low nibble and j + head_dim / 2, its
 * partner in the rotation, in the high one. Values: (16, head_dim) bytes, or (16, head_dim / 32, 16) with components
 * i and i + 16 of a group of 32 in one byte. */
static inline size_t qf_cpu_kv_record(const qf_kv_cache *cache, int32_t block, int32_t kv_head, int32_t offset)
{
    const size_t tiles = (size_t)cache->block_size / 16;
    const size_t tile = ((size_t)block * (size_t)cache->num_kv_heads + (size_t)kv_head) * tiles + (size_t)offset / 16;
    return tile * 16 * qf_kv_row_bytes(cache->format, cache->head_dim);
}

/* Below this many elements an op runs on the calling thread: a dispatch costs more. Results do not depend on it. */
#define QF_INLINE_ELEMENTS 16384

/* Runs fn over rows, inline when there is little to do. */
void qf_cpu_for_rows(qf_cpu_context *ctx, qf_task_fn fn, void *arg, int32_t num_rows, int32_t row_elements);

/* The group size that a source's groups are packed with: a power of two from 8 to 128; 0: none fits. */
int32_t qf_cpu_packed_group(int32_t group_size, int32_t num_groups);

#endif
