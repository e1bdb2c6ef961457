/* Arguments of every op, shared by the backends: qf_cpu_<op> and qf_cuda_<op> take the same struct.
 * Activations are float32 unless said otherwise. */
#ifndef QF_BACKEND_OPS_H
#define QF_BACKEND_OPS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/dtype.h"

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
    qf_dtype dtype;     /* F32 or BF16 */
    int32_t num_blocks, block_size;
    int32_t num_kv_heads, head_dim;
} qf_kv_cache;

/* Rotates q in place and k on its way into the cache (rotate-half pairs j, j + head_dim / 2); stores k and v at
 * slot_mapping. cos_sin rows already hold the attention factor. */
typedef struct qf_rope_kv_write_args {
    float *q;                    /* (num_tokens, num_heads * head_dim) rotated in place */
    const float *k, *v;          /* (num_tokens, num_kv_heads * head_dim) */
    const float *cos_sin;        /* (num_tokens, head_dim): cosines then sines, each head_dim / 2 */
    const int32_t *slot_mapping; /* (num_tokens) block * block_size + offset */
    qf_kv_cache cache;
    int32_t num_tokens, num_heads;
} qf_rope_kv_write_args;

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
} qf_attention_args;

#endif
