/* Passes over one row of logits: scanning, weights, and choosing the largest without sorting the vocabulary.
 * Rows hold no NaN and no +inf after qf_row_scan has said so; -inf is a masked token and is never chosen. */
#ifndef QF_SAMPLE_SELECT_H
#define QF_SAMPLE_SELECT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/math.h"
#include "sample/sampler.h"

#define QF_SCAN_BLOCK 64     /* logits with one maximum in common */
#define QF_MASS_BLOCK 1024   /* weights with one sum in common */
#define QF_NUM_BUCKETS 2048  /* of the logit range, when a nucleus is narrowed; also the radix of the sort */
#define QF_NUM_DIGITS 3      /* 11 bits each */

struct qf_sampler {
    int32_t vocab_size;
    float *row;           /* (vocab_size) logits after masks and penalties */
    float *weights;       /* (vocab_size) e^((logit - max) / temperature), by token id */
    float *sorted;        /* (vocab_size) weights of the candidates in their order; a heap while selecting */
    float *block_max;     /* (ceil(vocab_size / QF_SCAN_BLOCK)) */
    double *mass;         /* (ceil(vocab_size / QF_MASS_BLOCK)) sums of weights */
    double *bucket_mass;  /* (QF_NUM_BUCKETS) */
    int32_t *ids;         /* (vocab_size + 1) token ids of candidates, ascending */
    uint16_t *buckets;    /* (vocab_size) of the candidates */
    uint64_t *keys;       /* (vocab_size) candidates: see qf_key_token_id */
    uint64_t *spare_keys; /* (vocab_size) the sort's other half */
    uint32_t *digits;     /* (QF_NUM_DIGITS, QF_NUM_BUCKETS) */
};

/* A candidate: the logit's order in the upper half (smaller is larger), the token id in the lower; so ascending keys
 * are descending logits with ties by ascending id. */
static inline int32_t qf_key_token_id(uint64_t key) { return (int32_t)(uint32_t)key; }

/* The weight of a logit, relative to the largest one's; 0 below min_p. */
static inline float qf_weight(float x, float max, float inverse_temperature, float min_p)
{
    float w = qf_expf_nonpositive((x - max) * inverse_temperature);
    return qf_select_float(w < min_p, 0.0f, w);
}

/* The maximum, and every block's own in self->block_max. Returns false if a NaN or +inf is there. x: (size) */
bool qf_row_scan(qf_sampler *self, const float *x, int32_t size, float *max);

/* No NaN and no +inf. x: (size) */
bool qf_row_is_valid(const float *x, int32_t size);

/* The first token id whose logit is max, after qf_row_scan of the same row. */
int32_t qf_row_find(const qf_sampler *self, const float *x, int32_t size, float max);

/* self->weights and self->mass; weights below min_p become 0. Returns the total. x: (size) */
double qf_row_weights(qf_sampler *self, const float *x, int32_t size, float max, float temperature, float min_p);

/* The `count` largest logits in order, into self->keys, after qf_row_scan of the same row. Returns how many there
 * are: fewer if fewer are unmasked. */
int32_t qf_row_select_top(qf_sampler *self, const float *x, int32_t size, int32_t count);

/* After qf_row_scan and qf_row_weights: all tokens that can be in the nucleus (the largest weights whose sum reaches
 * top_p * total), in order, and some more behind them, into self->keys. Returns how many. */
int32_t qf_row_select_nucleus(qf_sampler *self, const float *x, int32_t size, float max, float temperature,
                              float min_p, double total, double top_p);

#endif
