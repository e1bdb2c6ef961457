/* What one sequence's sampling remembers, and what it does to a row of logits before the draw. */
#ifndef QF_SAMPLE_STATE_H
#define QF_SAMPLE_STATE_H

#include "sample/sampler.h"

/* One token that penalties touch. */
typedef struct qf_token_count {
    int32_t token_id;
    int32_t num_output;
} qf_token_count;

struct qf_sample_state {
    qf_sampling_params params; /* its pointers lead to the copies below */
    int32_t vocab_size, real_vocab_size;
    int32_t num_output_tokens;

    /* Copies of the lists of the parameters, each NULL when empty. */
    qf_logit_bias *logit_bias;
    int32_t *allowed_token_ids;
    int32_t *stop_token_ids;
    qf_bad_words *bad_words;
    int32_t *bad_word_ids;

    /* The last `tail_capacity` output tokens, oldest first: as many as the longest bad word looks back. */
    int32_t *tail;
    int32_t tail_capacity, tail_length;

    /* Distinct tokens seen, in order of appearance, and an open-addressing index of them, plus one (0: empty,
     * so that fresh memory needs no touching). Both stay
     * NULL without penalties. At most half of the slots are ever used. */
    qf_token_count *counts;
    int32_t *slots;
    int32_t num_counts, max_counts;
    uint32_t slot_mask;
};

/* True if qf_sample_state_apply would change a row now. */
bool qf_sample_state_edits_row(const qf_sample_state *self);

/* row = logits after masks (to -inf), biases and penalties. logits, row: (real_vocab_size), without NaN or +inf
 * on both sides. bitmask may be NULL. */
void qf_sample_state_apply(const qf_sample_state *self, const uint32_t *bitmask, const float *logits, float *row);

#endif
