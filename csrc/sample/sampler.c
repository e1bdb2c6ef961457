#include "sample/sampler.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "base/alloc.h"
#include "base/math.h"
#include "sample/philox.h"
#include "sample/select.h"
#include "sample/state.h"

typedef struct scratch {
    void **out;
    size_t count, size;
} scratch;

enum { NUM_SCRATCH = 11 };

static void list_scratch(qf_sampler *self, int32_t vocab_size, scratch arrays[NUM_SCRATCH])
{
    size_t size = (size_t)vocab_size;
    const scratch all[NUM_SCRATCH] = {
        {(void **)&self->row, size, sizeof *self->row},
        {(void **)&self->weights, size, sizeof *self->weights},
        {(void **)&self->sorted, size, sizeof *self->sorted},
        {(void **)&self->block_max, size / QF_SCAN_BLOCK + 1, sizeof *self->block_max},
        {(void **)&self->mass, size / QF_MASS_BLOCK + 1, sizeof *self->mass},
        {(void **)&self->bucket_mass, QF_NUM_BUCKETS, sizeof *self->bucket_mass},
        {(void **)&self->ids, size + 1, sizeof *self->ids},
        {(void **)&self->buckets, size, sizeof *self->buckets},
        {(void **)&self->keys, size, sizeof *self->keys},
        {(void **)&self->spare_keys, size, sizeof *self->spare_keys},
        {(void **)&self->digits, QF_NUM_DIGITS * QF_NUM_BUCKETS, sizeof *self->digits},
    };
    memcpy(arrays, all, sizeof all);
}

size_t qf_sampler_bytes(int32_t vocab_size)
{
    qf_sampler none;
    scratch arrays[NUM_SCRATCH];
    list_scratch(&none, vocab_size, arrays);
    size_t bytes = sizeof none;
    for (int i = 0; i < NUM_SCRATCH; i++) {
        bytes += arrays[i].count * arrays[i].size;
    }
    return bytes;
}

qf_status qf_sampler_create(int32_t vocab_size, qf_sampler **out, qf_error *err)
{
    *out = NULL;
    if (vocab_size < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "vocab_size is %d: must be at least 1", vocab_size);
    }
    qf_sampler *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "sampler", err));
    self->vocab_size = vocab_size;
    scratch arrays[NUM_SCRATCH];
    list_scratch(self, vocab_size, arrays);
    qf_status status;
    for (size_t i = 0; i < NUM_SCRATCH; i++) {
        QF_TRY_GOTO(qf_alloc(arrays[i].out, arrays[i].count, arrays[i].size, "sampler scratch", err), fail);
    }
    *out = self;
    return QF_OK;
fail:
    qf_sampler_destroy(self);
    return status;
}

void qf_sampler_destroy(qf_sampler *self)
{
    if (self == NULL) {
        return;
    }
    qf_free(self->row);
    qf_free(self->weights);
    qf_free(self->sorted);
    qf_free(self->block_max);
    qf_free(self->mass);
    qf_free(self->bucket_mass);
    qf_free(self->ids);
    qf_free(self->buckets);
    qf_free(self->keys);
    qf_free(self->spare_keys);
    qf_free(self->digits);
    qf_free(self);
}

/* The first token, by id, at which the running sum of weights passes u * total. A token of weight 0 never passes. */
static int32_t draw_by_id(const qf_sampler *self, int32_t size, double total, double u)
{
    double target = u * total;
    double sum = 0.0, before = 0.0;
    int32_t last = 0;
    for (int32_t first = 0; first < size; first += QF_MASS_BLOCK) {
        double mass = self->mass[first / QF_MASS_BLOCK];
        if (mass > 0.0) {
            last = first;
            before = sum;
            sum += mass;
        }
        if (sum > target) {
            break;
        }
    }
    /* Rounding may leave the target just behind the block's last token: that one is taken then. */
    sum = before;
    int32_t end = size - last < QF_MASS_BLOCK ? size : last + QF_MASS_BLOCK;
    int32_t token_id = -1;
    for (int32_t i = last; i < end; i++) {
        if (self->weights[i] > 0.0f) {
            token_id = i;
            sum += (double)self->weights[i];
            if (sum > target) {
                break;
            }
        }
    }
    return token_id;
}

/* Cuts the candidates, whose weights are in self->sorted, after the one at which their sum reaches limit; draws one
 * of those left, in their order. */
static int32_t draw_sorted(const qf_sampler *self, int32_t count, double limit, double u)
{
    double sum = 0.0;
    int32_t kept = 0;
    while (kept < count && (kept == 0 || sum < limit)) {
        sum += (double)self->sorted[kept++];
    }
    double target = u * sum;
    int32_t chosen = 0;
    sum = 0.0;
    for (int32_t i = 0; i < kept; i++) {
        if (self->sorted[i] > 0.0f) {
            chosen = i;
            sum += (double)self->sorted[i];
            if (sum > target) {
                break;
            }
        }
    }
    return qf_key_token_id(self->keys[chosen]);
}

static int32_t draw_top_k(qf_sampler *self, const qf_sampling_params *p, const float *x, int32_t size, float max,
                          double u)
{
    int32_t count = qf_row_select_top(self, x, size, p->top_k);
    double total = 0.0;
    for (int32_t i = 0; i < count; i++) {
        self->sorted[i] = qf_weight(x[qf_key_token_id(self->keys[i])], max, 1.0f / p->temperature, p->min_p);
        total += (double)self->sorted[i];
    }
    return draw_sorted(self, count, p->top_p < 1.0f ? total * (double)p->top_p : INFINITY, u);
}

static int32_t draw_top_p(qf_sampler *self, const qf_sampling_params *p, const float *x, int32_t size, float max,
                          double u)
{
    double top_p = (double)p->top_p;
    double total = qf_row_weights(self, x, size, max, p->temperature, p->min_p);
    int32_t count = qf_row_select_nucleus(self, x, size, max, p->temperature, p->min_p, total, top_p);
    for (int32_t i = 0; i < count; i++) {
        self->sorted[i] = self->weights[qf_key_token_id(self->keys[i])];
    }
    return draw_sorted(self, count, total * top_p, u);
}

static int32_t draw(qf_sampler *self, const qf_sample_state *state, const float *x, int32_t size, float max)
{
    const qf_sampling_params *p = &state->params;
    if (p->temperature == 0.0f) {
        return qf_row_find(self, x, size, max);
    }
    uint32_t words[4];
    qf_philox4x32(p->seed, p->sample_index, (uint32_t)state->num_output_tokens, words);
    double u = qf_uniform_from_words(words);
    if (p->top_k > 0 && p->top_k < size) {
        return draw_top_k(self, p, x, size, max, u);
    }
    if (p->top_p < 1.0f) {
        return draw_top_p(self, p, x, size, max, u);
    }
    return draw_by_id(self, size, qf_row_weights(self, x, size, max, p->temperature, p->min_p), u);
}

void qf_sample(qf_sampler *self, qf_sample_state *state, const float *logits, const uint32_t *bitmask,
               int32_t *token_id, qf_logprob *logprobs)
{
    *token_id = -1;
    const float *x = logits;
    int32_t size = state->real_vocab_size;
    float max;
    if (!qf_row_scan(self, logits, size, &max) || !qf_row_is_valid(logits + size, state->vocab_size - size)) {
        return;
    }
    if (bitmask != NULL || qf_sample_state_edits_row(state)) {
        qf_sample_state_apply(state, bitmask, logits, self->row);
        x = self->row;
        (void)qf_row_scan(self, x, size, &max);
    }
    if (max == -INFINITY) {
        return;
    }
    *token_id = draw(self, state, x, size, max);
    if (state->params.num_logprobs >= 0) {
        qf_logprobs(self, logits, *token_id, state->params.num_logprobs, logprobs);
    }
    qf_sample_state_append(state, *token_id);
}

/* 1 + the number of tokens before target_id when logits descend and ties ascend by id. After qf_row_scan. */
static int32_t rank_of(const qf_sampler *self, const float *logits, int32_t size, int32_t target_id)
{
    float x = logits[target_id];
    int32_t rank = 1;
    for (int32_t first = 0; first < size; first += QF_SCAN_BLOCK) {
        if (self->block_max[first / QF_SCAN_BLOCK] < x) {
            continue;
        }
        int32_t end = size - first < QF_SCAN_BLOCK ? size : first + QF_SCAN_BLOCK;
        for (int32_t i = first; i < end; i++) {
            rank += logits[i] > x || (logits[i] == x && i < target_id) ? 1 : 0;
        }
    }
    return rank;
}

void qf_logprobs(qf_sampler *self, const float *logits, int32_t target_id, int32_t num_top, qf_logprob *out)
{
    int32_t size = self->vocab_size;
    float max;
    bool valid = qf_row_scan(self, logits, size, &max) && max > -INFINITY;
    out[0] = (qf_logprob){.token_id = target_id, .rank = 0, .logprob = NAN};
    for (int32_t i = 1; i <= num_top; i++) {
        out[i] = (qf_logprob){.token_id = -1, .rank = 0, .logprob = valid ? -INFINITY : NAN};
    }
    if (!valid) {
        return;
    }
    double log_total = qf_log(qf_row_weights(self, logits, size, max, 1.0f, 0.0f));
    out[0].rank = rank_of(self, logits, size, target_id);
    out[0].logprob = (float)((double)logits[target_id] - (double)max - log_total);
    int32_t count = qf_row_select_top(self, logits, size, num_top);
    for (int32_t i = 0; i < count; i++) {
        int32_t token_id = qf_key_token_id(self->keys[i]);
        float logprob = (float)((double)logits[token_id] - (double)max - log_total);
        out[1 + i] = (qf_logprob){.token_id = token_id, .rank = 1 + i, .logprob = logprob};
    }
}
