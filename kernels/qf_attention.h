/* Attention's launchers: the write of keys and values, the host's plan of the work, and attention itself (qf_kernels.h: layouts and
 * what all launchers have in common; qf_kv_cache.h: the cache). */
#ifndef QF_ATTENTION_H
#define QF_ATTENTION_H

#include "qf_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Sums the splits of q | k | v, rotates q and k (pairs j, j + head_dim / 2), stores q and writes k, v to the cache. */
typedef struct qf_cuda_rope_kv_write_args {
    const float *qkv;      /* (num_splits, num_tokens, qkv_stride) */
    int32_t num_splits, qkv_stride;
    const float *cos_sin;  /* (num_tokens, head_dim) */
    const int32_t *slot_mapping; /* (num_tokens) block * block_size + offset */
    void *q;               /* (num_tokens, num_heads, head_dim) bf16, or float32 if kv.float32 */
    qf_cuda_kv kv;
    int32_t num_tokens, num_heads;
    /* With a low-bit cache: k with the rotated kv.k_bias and v once more, in bf16, whatever slot_mapping says. */
    qf_cuda_kv window;
    const int32_t *window_slot_mapping; /* (num_tokens) a negative one: not written; NULL: no window */
} qf_cuda_rope_kv_write_args;
qf_status qf_cuda_rope_kv_write(const qf_cuda_rope_kv_write_args *args, const qf_cuda_device *device,
                                cudaStream_t stream, qf_error *err);

/* A piece of attention work, made by qf_cuda_attention_plan on the host: rows first_row .. of one sequence against the
 * positions of one split. Prefill and batch_invariant rows are cut at multiples of QF_CUDA_SPLIT_TOKENS. */
#define QF_CUDA_SPLIT_TOKENS 256
typedef struct qf_cuda_attention_item {
    int32_t seq, first_row, num_rows; /* rows of the batch */
    int32_t first_position;           /* of first_row */
    int32_t kv_begin, kv_end;         /* positions */
    int32_t split, num_splits;        /* num_splits > 1: partial results at `partial` */
    int32_t partial;                  /* index of the first of this (rows)'s partials in the workspace */
    int32_t counter;                  /* index of the arrival counter */
} qf_cuda_attention_item;

typedef struct qf_cuda_attention_shape {
    int32_t num_heads, num_kv_heads, head_dim, block_size;
    int32_t sliding_window; /* 0: all */
    int32_t kv_window;      /* of a low-bit cache: the newest positions, which are read from a 16-bit one; 0: none */
    int32_t decode_ctas;    /* that the decode kernel has on the device at once: 2 a multiprocessor for 16 bits, 1 for low-bit
                               caches. 0: two on each of 132, whatever the device. Below 0: that kernel does not fit the
                               device, and decode rows are tiles of the prefill kernel */
} qf_cuda_attention_shape;

typedef struct qf_cuda_attention_plan {
    int32_t num_decode_items, num_prefill_items; /* decode items come first */
    int32_t num_partials, num_counters;
    int32_t num_window_items;
} qf_cuda_attention_plan;

/* Whether the decode kernel for a cache of this format fits the device's shared memory: see decode_ctas. */
bool qf_cuda_attention_decode_fits(const qf_cuda_device *device, qf_cuda_kv_format format, int32_t head_dim);

/* Whether decode items over such a cache can take their rows from what the QKV linear made: qf_cuda_attention_args.qkv. */
bool qf_cuda_attention_takes_rows(const qf_cuda_device *device, const qf_cuda_kv *kv);
#define QF_CUDA_ATTENTION_FEW_ROWS 16 /* up to so many rows it pays */

/* Host, pure. query_start_loc (num_seqs + 1), seq_lens (num_seqs): host. items: room for qf_cuda_attention_max_items.
 * With shape.kv_window single rows are prefill items, as with batch_invariant. */
void qf_cuda_attention_plan_make(const qf_cuda_attention_shape *shape, int32_t num_seqs,
                                 const int32_t *query_start_loc, const int32_t *seq_lens, bool batch_invariant,
                                 qf_cuda_attention_item *items, qf_cuda_attention_plan *plan);
/* The same with shape.kv_window and not batch_invariant: decode items end before the positions that their row reads in 16
 * bits (window_first as in qf_cuda_attention_args, host); those are one more split each, in window_items (num_seqs), for
 * a launch of their own with the 16-bit cache as kv and these as decode items. */
void qf_cuda_attention_plan_make_window(const qf_cuda_attention_shape *shape, int32_t num_seqs,
                                        const int32_t *query_start_loc, const int32_t *seq_lens,
                                        const int32_t *window_first, qf_cuda_attention_item *items,
                                        qf_cuda_attention_item *window_items, qf_cuda_attention_plan *plan);
int32_t qf_cuda_attention_max_items(const qf_cuda_attention_shape *shape, int32_t max_num_seqs,
                                    int32_t max_num_batched_tokens, int32_t max_model_len);
/* Workspace: zeroed once by the caller; the kernels leave its counters zero. */
size_t qf_cuda_attention_workspace_bytes(const qf_cuda_attention_shape *shape, int32_t max_num_seqs,
                                         int32_t max_num_batched_tokens, int32_t max_model_len);

/* Causal attention over the paged cache, which holds this step's keys and values already, or those of rows before the one of qkv. */
typedef struct qf_cuda_attention_args {
    qf_cuda_attention_shape shape;
    qf_cuda_kv kv;
    const void *q;                       /* (num_tokens, num_heads, head_dim) bf16 */
    /* qkv not NULL, where qf_cuda_attention_takes_rows and there are decode items alone: q comes from here, and each row's own
     * key and value go to the cache, as qf_cuda_rope_kv_write would have it (its fields of these names); q is not read. */
    const float *qkv, *cos_sin;
    const int32_t *slot_mapping;
    int32_t qkv_splits, qkv_stride;
    uint16_t *out;                       /* tiled (out_k, num_tokens) */
    int32_t out_k;                       /* num_heads * head_dim up to the next 128; zeros beyond */
    const qf_cuda_attention_item *items; /* decode items (room for max_decode_items), prefill: + prefill_offset */
    const int32_t *num_items;            /* (2) decode and prefill counts, read by the device */
    int32_t prefill_offset;
    int32_t max_decode_items, max_prefill_items; /* bounds the grids; 0: that kernel is not launched */
    const int32_t *block_tables;         /* ragged */
    const int32_t *block_table_start;    /* (num_seqs) index of each sequence's first block in block_tables */
    void *workspace;
    int32_t num_tokens;
    float scale;
    bool batch_invariant;                /* a row's result is the same from both kernels */
    const float *bias_coarse;            /* low-bit caches with k_bias: qf_cuda_kv_bias_tables; else NULL */
    const uint16_t *bias_fine;
    const float *bias_rotation;
    /* With a low-bit cache: the row at position p reads positions k > p - window_tokens, k >= window_first[seq], from a
     * bf16 cache with tables of its own, the others from kv. window_tokens 0: none. Decode items have it in their ends. */
    qf_cuda_kv window_kv;
    int32_t window_tokens;
    const int32_t *window_table_start;   /* (num_seqs) into block_tables: where block 0 of the sequence would stand */
    const int32_t *window_first;         /* (num_seqs) the first position of each sequence that is there */
} qf_cuda_attention_args;
qf_status qf_cuda_attention(const qf_cuda_attention_args *args, const qf_cuda_device *device, cudaStream_t stream,
                            qf_error *err);

/* Reference: float32 q and cache, one warp per (row, head). q, out: (num_tokens, num_heads, head_dim). */
typedef struct qf_cuda_attention_f32_args {
    qf_cuda_attention_shape shape;
    qf_cuda_kv kv;
    const float *q;
    float *out;
    const int32_t *query_start_loc, *seq_lens; /* device: (num_seqs + 1), (num_seqs) */
    const int32_t *block_tables, *block_table_start;
    int32_t num_seqs, num_tokens;
    float scale;
} qf_cuda_attention_f32_args;
qf_status qf_cuda_attention_f32(const qf_cuda_attention_f32_args *args, cudaStream_t stream, qf_error *err);

#ifdef __cplusplus
}
#endif

#endif
