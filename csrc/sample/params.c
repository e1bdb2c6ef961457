#include "sample/params.h"

#include <math.h>
#include <stddef.h>

void qf_sampling_params_init(qf_sampling_params *params)
{
    *params = (qf_sampling_params){
        .temperature = 1.0f,
        .top_p = 1.0f,
        .repetition_penalty = 1.0f,
        .num_logprobs = -1,
    };
}

static qf_status check_finite(const qf_sampling_params *p, qf_error *err)
{
    const struct {
        const char *name;
        float value;
    } fields[] = {
        {"temperature", p->temperature},
        {"top_p", p->top_p},
        {"min_p", p->min_p},
        {"repetition_penalty", p->repetition_penalty},
        {"presence_penalty", p->presence_penalty},
        {"frequency_penalty", p->frequency_penalty},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (!isfinite(fields[i].value)) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s is %g: must be finite", fields[i].name,
                           (double)fields[i].value);
        }
    }
    return QF_OK;
}

static qf_status check_ranges(const qf_sampling_params *p, qf_error *err)
{
    if (p->temperature < 0.0f || p->temperature > 100.0f) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "temperature is %g: must be 0 to 100", (double)p->temperature);
    }
    if (p->top_k < -1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "top_k is %d: must be at least 1, or 0 or -1 for off", p->top_k);
    }
    if (!(p->top_p > 0.0f) || p->top_p > 1.0f) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "top_p is %g: must be above 0 and at most 1", (double)p->top_p);
    }
    if (p->min_p < 0.0f || p->min_p > 1.0f) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "min_p is %g: must be 0 to 1", (double)p->min_p);
    }
    if (!(p->repetition_penalty > 0.0f)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repetition_penalty is %g: must be above 0",
                       (double)p->repetition_penalty);
    }
    if (p->presence_penalty < -2.0f || p->presence_penalty > 2.0f) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "presence_penalty is %g: must be -2 to 2",
                       (double)p->presence_penalty);
    }
    if (p->frequency_penalty < -2.0f || p->frequency_penalty > 2.0f) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "frequency_penalty is %g: must be -2 to 2",
                       (double)p->frequency_penalty);
    }
    if (p->min_tokens < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "min_tokens is %d: must be at least 0", p->min_tokens);
    }
    if (p->num_logprobs < -1 || p->num_logprobs > QF_MAX_LOGPROBS) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "num_logprobs is %d: must be -1 to %d", p->num_logprobs,
                       QF_MAX_LOGPROBS);
    }
    return QF_OK;
}

static qf_status check_list(const char *name, const void *items, int32_t count, qf_error *err)
{
    if (count < 0 || (count > 0 && items == NULL)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "num_%s is %d: %s", name, count,
                       count < 0 ? "must be at least 0" : "but there is no array");
    }
    return QF_OK;
}

static qf_status check_token_id(const char *name, int32_t index, int32_t token_id, int32_t vocab_size, qf_error *err)
{
    if (token_id < 0 || token_id >= vocab_size) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s[%d]: token id %d is outside the vocabulary of %d", name,
                       index, token_id, vocab_size);
    }
    return QF_OK;
}

static qf_status check_token_ids(const char *name, const int32_t *token_ids, int32_t count, int32_t vocab_size,
                                 qf_error *err)
{
    QF_TRY(check_list(name, token_ids, count, err));
    for (int32_t i = 0; i < count; i++) {
        QF_TRY(check_token_id(name, i, token_ids[i], vocab_size, err));
    }
    return QF_OK;
}

static qf_status check_bad_words(const qf_sampling_params *p, int32_t vocab_size, qf_error *err)
{
    QF_TRY(check_list("bad_words", p->bad_words, p->num_bad_words, err));
    for (int32_t i = 0; i < p->num_bad_words; i++) {
        const qf_bad_words *words = &p->bad_words[i];
        if (words->length < 1 || words->token_ids == NULL) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "bad_words[%d] has %d token ids: must be at least 1", i,
                           words->length);
        }
        for (int32_t j = 0; j < words->length; j++) {
            QF_TRY(check_token_id("bad_words", i, words->token_ids[j], vocab_size, err));
        }
    }
    return QF_OK;
}

static qf_status check_logit_bias(const qf_sampling_params *p, int32_t vocab_size, qf_error *err)
{
    QF_TRY(check_list("logit_bias", p->logit_bias, p->num_logit_bias, err));
    for (int32_t i = 0; i < p->num_logit_bias; i++) {
        QF_TRY(check_token_id("logit_bias", i, p->logit_bias[i].token_id, vocab_size, err));
        float bias = p->logit_bias[i].bias;
        if (!(bias >= -100.0f && bias <= 100.0f)) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "logit_bias of token id %d is %g: must be -100 to 100",
                           p->logit_bias[i].token_id, (double)bias);
        }
    }
    return QF_OK;
}

qf_status qf_sampling_params_check(const qf_sampling_params *params, int32_t vocab_size, qf_error *err)
{
    if (vocab_size < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "vocab_size is %d: must be at least 1", vocab_size);
    }
    QF_TRY(check_finite(params, err));
    QF_TRY(check_ranges(params, err));
    if (params->num_logprobs > vocab_size) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "num_logprobs is %d: more than the vocabulary of %d",
                       params->num_logprobs, vocab_size);
    }
    QF_TRY(check_logit_bias(params, vocab_size, err));
    QF_TRY(check_token_ids("allowed_token_ids", params->allowed_token_ids, params->num_allowed_token_ids, vocab_size,
                           err));
    if (params->allowed_token_ids != NULL && params->num_allowed_token_ids == 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "allowed_token_ids has 0 entries: must be at least 1");
    }
    QF_TRY(check_bad_words(params, vocab_size, err));
    return check_token_ids("stop_token_ids", params->stop_token_ids, params->num_stop_token_ids, vocab_size, err);
}
