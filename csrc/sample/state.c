#include "sample/state.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/math.h"

static qf_status copy_list(void **out, const void *items, int32_t count, size_t size, const char *what, qf_error *err)
{
    *out = NULL;
    if (count > 0) {
        QF_TRY(qf_alloc(out, (size_t)count, size, what, err));
        memcpy(*out, items, (size_t)count * size);
    }
    return QF_OK;
}

static qf_status copy_bad_words(qf_sample_state *self, const qf_sampling_params *params, qf_error *err)
{
    size_t total = 0;
    int32_t longest = 1;
    for (int32_t i = 0; i < params->num_bad_words; i++) {
        int32_t length = params->bad_words[i].length;
        longest = length > longest ? length : longest;
        total += (size_t)length;
    }
    if (total == 0) {
        return QF_OK;
    }
    QF_TRY(copy_list((void **)&self->bad_words, params->bad_words, params->num_bad_words, sizeof *self->bad_words,
                     "bad words", err));
    QF_TRY(qf_alloc((void **)&self->bad_word_ids, total, sizeof *self->bad_word_ids, "bad words", err));
    int32_t *next = self->bad_word_ids;
    for (int32_t i = 0; i < params->num_bad_words; i++) {
        size_t length = (size_t)self->bad_words[i].length;
        memcpy(next, params->bad_words[i].token_ids, length * sizeof *next);
        self->bad_words[i].token_ids = next;
        next += length;
    }
    self->tail_capacity = longest - 1;
    return qf_alloc((void **)&self->tail, (size_t)self->tail_capacity, sizeof *self->tail, "bad words", err);
}

static qf_status copy_params(qf_sample_state *self, const qf_sampling_params *params, qf_error *err)
{
    self->params = *params;
    qf_sampling_params *p = &self->params;
    if (p->temperature > 0.0f && p->temperature < 0.01f) {
        p->temperature = 0.01f;
    }
    QF_TRY(copy_list((void **)&self->logit_bias, params->logit_bias, params->num_logit_bias, sizeof *self->logit_bias,
                     "logit biases", err));
    QF_TRY(copy_list((void **)&self->allowed_token_ids, params->allowed_token_ids, params->num_allowed_token_ids,
                     sizeof *self->allowed_token_ids, "allowed token ids", err));
    QF_TRY(copy_list((void **)&self->stop_token_ids, params->stop_token_ids, params->num_stop_token_ids,
                     sizeof *self->stop_token_ids, "stop token ids", err));
    QF_TRY(copy_bad_words(self, params, err));
    p->logit_bias = self->logit_bias;
    p->allowed_token_ids = self->allowed_token_ids;
    p->stop_token_ids = self->stop_token_ids;
    p->bad_words = self->bad_words;
    return QF_OK;
}

/* Repetition counts the prompt too; the other two look at the output alone. */
static bool penalises_output(const qf_sampling_params *p)
{
    return p->repetition_penalty != 1.0f || p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f;
}

static qf_status create_counts(qf_sample_state *self, int32_t num_prompt_tokens, int32_t max_output_tokens,
                               qf_error *err)
{
    int64_t most = (int64_t)max_output_tokens;
    if (self->params.repetition_penalty != 1.0f) {
        most += num_prompt_tokens;
    }
    self->max_counts = (int32_t)(most < self->vocab_size ? most : self->vocab_size);
    size_t num_slots = 2;
    while (num_slots < 2 * (size_t)self->max_counts) {
        num_slots *= 2;
    }
    self->slot_mask = (uint32_t)(num_slots - 1);
    QF_TRY(qf_alloc((void **)&self->counts, (size_t)self->max_counts, sizeof *self->counts, "token counts", err));
    QF_TRY(qf_alloc((void **)&self->slots, num_slots, sizeof *self->slots, "token counts", err));
    return QF_OK;
}

static void count_token(qf_sample_state *self, int32_t token_id, int32_t num_output)
{
    uint32_t slot = ((uint32_t)token_id * 0x9E3779B1u >> 7) & self->slot_mask;
    while (self->slots[slot] > 0) {
        qf_token_count *count = &self->counts[self->slots[slot] - 1];
        if (count->token_id == token_id) {
            count->num_output += num_output;
            return;
        }
        slot = (slot + 1) & self->slot_mask;
    }
    if (self->num_counts < self->max_counts) {
        self->counts[self->num_counts] = (qf_token_count){.token_id = token_id, .num_output = num_output};
        self->slots[slot] = ++self->num_counts;
    }
}

static qf_status check_sizes(const int32_t *prompt_ids, int32_t num_prompt_tokens, int32_t max_output_tokens,
                             int32_t vocab_size, int32_t real_vocab_size, qf_error *err)
{
    if (real_vocab_size < 1 || real_vocab_size > vocab_size) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "real_vocab_size is %d: must be 1 to vocab_size, %d",
                       real_vocab_size, vocab_size);
    }
    if (num_prompt_tokens < 0 || max_output_tokens < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%d prompt tokens and %d output tokens: must be at least 0",
                       num_prompt_tokens, max_output_tokens);
    }
    for (int32_t i = 0; i < num_prompt_tokens; i++) {
        if (prompt_ids[i] < 0 || prompt_ids[i] >= vocab_size) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                           "prompt token id %d at position %d is outside the vocabulary of %d", prompt_ids[i], i,
                           vocab_size);
        }
    }
    return QF_OK;
}

qf_status qf_sample_state_create(const qf_sampling_params *params, const int32_t *prompt_ids,
                                 int32_t num_prompt_tokens, int32_t max_output_tokens, int32_t vocab_size,
                                 int32_t real_vocab_size, qf_sample_state **out, qf_error *err)
{
    *out = NULL;
    QF_TRY(qf_sampling_params_check(params, vocab_size, err));
    QF_TRY(check_sizes(prompt_ids, num_prompt_tokens, max_output_tokens, vocab_size, real_vocab_size, err));
    qf_sample_state *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "sampling state", err));
    self->vocab_size = vocab_size;
    self->real_vocab_size = real_vocab_size;
    qf_status status;
    QF_TRY_GOTO(copy_params(self, params, err), fail);
    if (penalises_output(&self->params)) {
        QF_TRY_GOTO(create_counts(self, num_prompt_tokens, max_output_tokens, err), fail);
    }
    if (self->params.repetition_penalty != 1.0f) {
        for (int32_t i = 0; i < num_prompt_tokens; i++) {
            count_token(self, prompt_ids[i], 0);
        }
    }
    *out = self;
    return QF_OK;
fail:
    qf_sample_state_destroy(self);
    return status;
}

void qf_sample_state_destroy(qf_sample_state *self)
{
    if (self == NULL) {
        return;
    }
    qf_free(self->logit_bias);
    qf_free(self->allowed_token_ids);
    qf_free(self->stop_token_ids);
    qf_free(self->bad_words);
    qf_free(self->bad_word_ids);
    qf_free(self->tail);
    qf_free(self->counts);
    qf_free(self->slots);
    qf_free(self);
}

void qf_sample_state_append(qf_sample_state *self, int32_t token_id)
{
    self->num_output_tokens++;
    if (self->tail_capacity > 0) {
        if (self->tail_length == self->tail_capacity) {
            memmove(self->tail, self->tail + 1, (size_t)(self->tail_length - 1) * sizeof *self->tail);
            self->tail_length--;
        }
        self->tail[self->tail_length++] = token_id;
    }
    if (self->counts != NULL && token_id >= 0 && token_id < self->vocab_size) {
        count_token(self, token_id, 1);
    }
}

int32_t qf_sample_state_num_output_tokens(const qf_sample_state *self) { return self->num_output_tokens; }

static bool masks_stop_tokens(const qf_sample_state *self)
{
    return self->params.num_stop_token_ids > 0 && self->num_output_tokens < self->params.min_tokens;
}

bool qf_sample_state_edits_row(const qf_sample_state *self)
{
    const qf_sampling_params *p = &self->params;
    return p->num_allowed_token_ids > 0 || p->num_bad_words > 0 || masks_stop_tokens(self) || p->num_logit_bias > 0 ||
           self->num_counts > 0;
}

static void mask_token(const qf_sample_state *self, float *row, int32_t token_id)
{
    if (token_id < self->real_vocab_size) {
        row[token_id] = -INFINITY;
    }
}

static void apply_bitmask(const uint32_t *bitmask, float *row, int32_t size)
{
    uint32_t bits[32];
    for (int i = 0; i < 32; i++) {
        bits[i] = 1u << i;
    }
    int32_t first = 0;
    for (; first + 32 <= size; first += 32) {
        uint32_t word = bitmask[first / 32];
        if (word == 0xffffffffu) {
            continue;
        }
        float *x = row + first;
        for (int i = 0; i < 32; i++) {
            x[i] = qf_select_float((word & bits[i]) == 0, -INFINITY, x[i]);
        }
    }
    for (int32_t i = first; i < size; i++) {
        row[i] = (bitmask[i / 32] & bits[i % 32]) != 0 ? row[i] : -INFINITY;
    }
}

static void apply_bad_words(const qf_sample_state *self, float *row)
{
    for (int32_t i = 0; i < self->params.num_bad_words; i++) {
        const qf_bad_words *words = &self->bad_words[i];
        int32_t before = words->length - 1;
        if (before > self->tail_length ||
            (before > 0 && memcmp(self->tail + (self->tail_length - before), words->token_ids,
                                  (size_t)before * sizeof *words->token_ids) != 0)) {
            continue;
        }
        mask_token(self, row, words->token_ids[before]);
    }
}

/* Penalties on huge logits could overflow: +inf would win every draw as NaN, -inf would read as masked. */
static float clamp_finite(float x)
{
    x = x > FLT_MAX ? FLT_MAX : x;
    return x < -FLT_MAX ? -FLT_MAX : x;
}

static void apply_penalties(const qf_sample_state *self, float *row)
{
    const qf_sampling_params *p = &self->params;
    for (int32_t i = 0; i < self->num_counts; i++) {
        qf_token_count count = self->counts[i];
        if (count.token_id >= self->real_vocab_size || row[count.token_id] == -INFINITY) {
            continue;
        }
        float x = row[count.token_id];
        x = clamp_finite(x > 0.0f ? x / p->repetition_penalty : x * p->repetition_penalty);
        x = x - p->frequency_penalty * (float)count.num_output;
        x = x - (count.num_output > 0 ? p->presence_penalty : 0.0f);
        row[count.token_id] = clamp_finite(x);
    }
}

void qf_sample_state_apply(const qf_sample_state *self, const uint32_t *bitmask, const float *logits, float *row)
{
    const qf_sampling_params *p = &self->params;
    int32_t size = self->real_vocab_size;
    if (p->num_allowed_token_ids > 0) {
        for (int32_t i = 0; i < size; i++) {
            row[i] = -INFINITY;
        }
        for (int32_t i = 0; i < p->num_allowed_token_ids; i++) {
            int32_t token_id = p->allowed_token_ids[i];
            if (token_id < size) {
                row[token_id] = logits[token_id];
            }
        }
    } else {
        memcpy(row, logits, (size_t)size * sizeof *row);
    }
    if (bitmask != NULL) {
        apply_bitmask(bitmask, row, size);
    }
    apply_bad_words(self, row);
    if (masks_stop_tokens(self)) {
        for (int32_t i = 0; i < p->num_stop_token_ids; i++) {
            mask_token(self, row, p->stop_token_ids[i]);
        }
    }
    for (int32_t i = 0; i < p->num_logit_bias; i++) {
        if (p->logit_bias[i].token_id < size) {
            row[p->logit_bias[i].token_id] += p->logit_bias[i].bias;
        }
    }
    apply_penalties(self, row);
}
