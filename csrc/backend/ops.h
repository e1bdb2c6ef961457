/* Arguments of every op, shared by the backends: qf_cpu_<op> and qf_cuda_<op> take the same struct.
 * Activations are float32 unless said otherwise. */
#ifndef QF_BACKEND_OPS_H
#define QF_BACKEND_OPS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/dtype.h"
#include "kv/format.h"

/* out[t] = table[token_ids[t]] */
typedef struct qf_embedding_args {
    const void *table;        /* (vocab_size, hidden_size) table_dtype: F32, BF16 or F16 */
    qf_dtype table_dtype;
    const int32_t *token_ids; /* (num_tokens) */
    float *out;               /* (num_tokens, hidden_size) */
    int32_t num_tokens, hidden_size;
} qf_embedding_args;

/* residual += delta (if any);  out = residual / sqrt(mean(residual^2) + eps) * weight */
typedef struct qf_rmsnorm_args {
    float *residual;     /* (num_tokens, hidden_size) */
    const float *delta;  /* (num_tokens, hidden_size) or NULL */
    const float *weight; /* (hidden_size) */
    float *out;          /* (num_tokens, hidden_size); NULL: only the addition */
    int32_t num_tokens, hidden_size;
    float eps;
} qf_rmsnorm_args;

/* out = silu(gate) * up */
typedef struct qf_silu_mul_args {
    const float *gate, *up; /* (num_tokens, intermediate_size) */
    float *out;             /* (num_tokens, intermediate_size); may be gate */
    int32_t num_tokens, intermediate_size;
} qf_silu_mul_args;

/* One layer's part of the paged KV cache. The layout inside a block is the backend's. */
typedef struct qf_kv_cache {
    void *k, *v;        /* (num_blocks, ...) */
    qf_dtype dtype;     /* F32 or BF16; not of a low-bit format */
    int32_t num_blocks, block_size;
    int32_t num_kv_heads, head_dim;
    qf_kv_format format; /* QF_KV_AUTO: as dtype says */
} qf_kv_cache;

/* Rotates q in place and k on its way into the cache (rotate-half pairs j, j + head_dim / 2); stores k and v at
 * slot_mapping. cos_sin rows already hold the attention factor. A low-bit cache gets the rotated k as it is, rounded;
 * what a window over it gets is rotate(k + k_bias). A slot of -1 leaves the cache (not the window) as it is. */
typedef struct qf_rope_kv_write_args {
    float *q;                    /* (num_tokens, num_heads * head_dim) rotated in place */
    const float *k, *v;          /* (num_tokens, num_kv_heads * head_dim) */
    const float *cos_sin;        /* (num_tokens, head_dim): cosines then sines, each head_dim / 2 */
    const int32_t *slot_mapping; /* (num_tokens) block * block_size + offset */
    qf_kv_cache cache;
    int32_t num_tokens, num_heads;
    const float *k_bias;                /* (num_kv_heads, head_dim) for the window: k comes without it; NULL: none */
    qf_kv_cache window;                 /* BF16; k NULL: none */
    const int32_t *window_slot_mapping; /* (num_tokens) */
} qf_rope_kv_write_args;

/* Positions whose bias is rotated together: p = tile + i is R_tile first, then R_i. */
#define QF_BIAS_TILE 32

/* The bias that a low-bit cache's keys are stored without, and what rotates it to their positions. */
typedef struct qf_key_bias {
    const float *bias;      /* (num_kv_heads, head_dim) not rotated */
    const float *tile_turn; /* (tiles, head_dim) cosines then sines of tile * QF_BIAS_TILE, times the attention factor */
    const float *step_turn; /* (head_dim / 2, 2, QF_BIAS_TILE) cosines and sines of 0 .. QF_BIAS_TILE - 1 */
} qf_key_bias;

/* Causal attention over the paged cache, which already holds this step's keys and values. Reads K and V as stored.
 * The order of every reduction depends on absolute positions alone, so a row's result does not depend on the
 * chunk, the batch or the number of threads. */
typedef struct qf_attention_args {
    const float *q;                 /* (num_tokens, num_heads * head_dim) rotated */
    float *out;                     /* (num_tokens, num_heads * head_dim) */
    qf_kv_cache cache;
    const int32_t *query_start_loc; /* (num_seqs + 1) first row of each sequence */
    const int32_t *seq_lens;        /* (num_seqs) positions in the cache, this step's included */
    const int32_t *block_tables;    /* (num_seqs, block_table_stride) */
    int32_t block_table_stride;
    int32_t num_seqs, num_heads;
    int32_t sliding_window;         /* newest tokens a query sees, itself included; 0: all */
    float scale;                    /* head_dim^-0.5 */
    qf_key_bias key_bias;           /* low-bit caches */
    /* A query at p reads the window's copy of k where p - k < window_tokens and k lies in its blocks. */
    qf_kv_cache window;             /* BF16; k NULL: none */
    const int32_t *window_tables;   /* (num_seqs, window_table_stride): entry i is block first_block[seq] + i */
    const int32_t *window_first_block; /* (num_seqs) */
    int32_t window_table_stride, window_tokens;
} qf_attention_args;

#endif
