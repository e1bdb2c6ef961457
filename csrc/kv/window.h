/* The 16-bit window over a low-bit cache: how many blocks it takes. Pure arithmetic, for backends, engine and scheduler.
 *
 * A query at position p reads 16-bit keys and values of the positions k with p - k < window. A sequence holds window
 * blocks for the positions that a step in flight or to come reads so. */
#ifndef QF_KV_WINDOW_H
#define QF_KV_WINDOW_H

#include <stdint.h>

#define QF_KV_WINDOW_STEPS 2 /* most steps in flight: both may hold blocks for new tokens */

/* Blocks of one sequence, at most: window - 1 positions before the first query and num_tokens new ones, anyhow placed. */
static inline int64_t qf_kv_window_seq_blocks(int32_t window, int32_t block_size, int32_t max_model_len,
                                              int64_t num_tokens)
{
    const int64_t length = (int64_t)window - 1 + num_tokens;
    const int64_t blocks = (length + block_size - 2) / block_size + 1;
    const int64_t all = ((int64_t)max_model_len + block_size - 1) / block_size;
    return blocks < all ? blocks : all;
}

/* Blocks of all sequences together, at most: the pool of so many never runs out. 0 without a window. */
static inline int64_t qf_kv_window_blocks(int32_t window, int32_t block_size, int32_t max_model_len, int32_t max_num_seqs,
                                          int32_t max_num_batched_tokens)
{
    if (window <= 0) {
        return 0;
    }
    const int64_t all = ((int64_t)max_model_len + block_size - 1) / block_size * max_num_seqs;
    const int64_t still = ((int64_t)window + block_size - 3 + block_size) / block_size + 1; /* without its new tokens */
    const int64_t added = (QF_KV_WINDOW_STEPS * (int64_t)max_num_batched_tokens + block_size - 1) / block_size;
    const int64_t blocks = still * max_num_seqs + added;
    return blocks < all ? blocks : all;
}

#endif
