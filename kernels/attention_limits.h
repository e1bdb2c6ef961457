/* What the plan of attention (host, C) and its kernels agree on. */
#ifndef QF_ATTENTION_LIMITS_H
#define QF_ATTENTION_LIMITS_H

#include <stdint.h>

/* Query rows (token, head of the group) a prefill CTA takes: as many whole tokens as fit. */
#define QF_ATTENTION_ROWS 128
#define QF_ATTENTION_INVARIANT_ROWS 64
#define QF_ATTENTION_MAX_GROUP 16

/* Splits of decode rows are multiples of it: a tile of 16 positions for each of a CTA's warps. */
#define QF_ATTENTION_DECODE_TOKENS 64

static inline int32_t qf_attention_tile_tokens(int32_t num_heads, int32_t num_kv_heads, int batch_invariant)
{
    int32_t group = num_heads / num_kv_heads;
    int32_t rows = batch_invariant ? QF_ATTENTION_INVARIANT_ROWS : QF_ATTENTION_ROWS;
    return group < rows ? rows / group : 1;
}

/* The workspace is an array of units. A unit holds one split of one token:
 *   (num_heads, 2) maximum and sum | (num_heads, head_dim) weighted sum of values | (num_kv_heads) arrival counters,
 * each part padded to 16 bytes, in float32 words. Where CTAs wait for each other they say whose unit's counters. */
static inline int32_t qf_attention_unit_sums(int32_t num_heads) { return (2 * num_heads + 3) / 4 * 4; }

static inline int32_t qf_attention_unit_counters(int32_t num_heads, int32_t head_dim)
{
    return qf_attention_unit_sums(num_heads) + num_heads * head_dim;
}

static inline int32_t qf_attention_unit_words(int32_t num_heads, int32_t num_kv_heads, int32_t head_dim)
{
    return qf_attention_unit_counters(num_heads, head_dim) + (num_kv_heads + 3) / 4 * 4;
}

#endif
