/* The host reference sampler: logits in, one token out. The order is vLLM's:
 *   unused vocabulary rows, allowed ids, grammar bitmask, bad words, min_tokens, logit_bias  -> masks and biases
 *   repetition, presence, frequency penalties -> temperature -> min_p -> top_k -> top_p -> sample.
 * Reported logprobs are log-softmax of the raw logits, before all of this.
 * Randomness is a counter-based generator (Philox4x32-10; Salmon et al., 2011) keyed by seed, sample index and output
 * position, so a token depends on nothing else in the batch. Ties break towards the lower token id. Every
 * reduction has one fixed order.
 *
 * The draw, exactly. A token's weight is w = e^((logit - max) / temperature), 0 below e^-87. min_p keeps w >= min_p;
 * top_k keeps the first k by (logit descending, id ascending); top_p keeps, in that order and of the weight that is
 * left, the shortest beginning that holds at least top_p of it, and one token at least. With u in (0, 1) from the
 * upper 53 bits of the first two random words, the lowest bit set, the token is the first at which the running sum
 * of weights passes u times their total: in the order above if top_k or top_p filters, by ascending id if neither
 * does. temperature 0 takes the largest logit after masks, biases and penalties. */
#ifndef QF_SAMPLE_SAMPLER_H
#define QF_SAMPLE_SAMPLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "sample/params.h"

/* Parameters (copied) and the token counts that penalties need, of one sequence. */
typedef struct qf_sample_state qf_sample_state;

/* prompt_ids: (num_prompt_tokens). max_output_tokens bounds the calls of qf_sample_state_append. real_vocab_size:
 * token ids from there up to vocab_size are padding rows and never sampled. Allocates everything it will need. */
qf_status qf_sample_state_create(const qf_sampling_params *params, const int32_t *prompt_ids,
                                 int32_t num_prompt_tokens, int32_t max_output_tokens, int32_t vocab_size,
                                 int32_t real_vocab_size, qf_sample_state **out, qf_error *err);
void qf_sample_state_destroy(qf_sample_state *self); /* NULL-safe */
/* Appends an output token (qf_sample does it itself). */
void qf_sample_state_append(qf_sample_state *self, int32_t token_id);
int32_t qf_sample_state_num_output_tokens(const qf_sample_state *self);

typedef struct qf_logprob {
    int32_t token_id;
    int32_t rank; /* 1: the most likely */
    float logprob;
} qf_logprob;

/* Scratch for one row at a time: (vocab_size) floats and more; one per worker thread. */
typedef struct qf_sampler qf_sampler;
qf_status qf_sampler_create(int32_t vocab_size, qf_sampler **out, qf_error *err);
void qf_sampler_destroy(qf_sampler *self); /* NULL-safe */
size_t qf_sampler_bytes(int32_t vocab_size); /* what qf_sampler_create allocates */

/* Draws the token for output position qf_sample_state_num_output_tokens(state) and appends it to the state.
 * logits: (vocab_size) float32, read only. bitmask: ((vocab_size + 31) / 32) words, bit 1 = allowed, or NULL.
 * logprobs: (1 + max(num_logprobs, 0)) entries, the sampled token's first, then the top ones; untouched if
 * num_logprobs is -1. If NaN or +inf stands among the logits, or every token is masked, *token_id is -1 and the
 * state is unchanged. */
void qf_sample(qf_sampler *self, qf_sample_state *state, const float *logits, const uint32_t *bitmask,
               int32_t *token_id, qf_logprob *logprobs);

/* Log-softmax of raw logits (padding rows too): the entry of target_id first, then the num_top largest. out:
 * (1 + num_top). rank is the place in the order logit descending, id ascending. Where fewer than num_top logits are
 * above -inf, the rest has token_id -1, rank 0 and logprob -inf. If NaN or +inf stands among the logits, or all are
 * -inf, every logprob is NaN and every rank 0. */
void qf_logprobs(qf_sampler *self, const float *logits, int32_t target_id, int32_t num_top, qf_logprob *out);

/* The four random words: Philox4x32-10 of counter (position, sample_index, 0, 0) under key (seed's lower half, its
 * upper half). Exposed so that a device sampler can be tested. */
void qf_philox4x32(uint64_t seed, uint32_t sample_index, uint32_t position, uint32_t out[4]);

#endif
