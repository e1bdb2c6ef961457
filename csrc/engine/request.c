/* The callers' side of a request: submission, waiting, reading, cancelling. */
#include <string.h>
#include <time.h>

#include "base/alloc.h"
#include "base/hash.h"
#include "engine/engine.h"

double qf_now_seconds(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void qf_request_options_init(qf_request_options *options)
{
    *options = (qf_request_options){
        .max_tokens = -1, .num_prompt_logprobs = -1, .skip_special_tokens = true};
    qf_sampling_params_init(&options->sampling);
    options->sampling.num_logprobs = -1;
}

/* --- submission ---------------------------------------------------------------------------------------- */

static qf_status check_prompt(const qf_engine *engine, const qf_request_options *o, qf_error *err)
{
    int32_t max_model_len = engine->resolved.backend.max_model_len;
    if (o->num_prompt_tokens < 1 || o->prompt_token_ids == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "the prompt must have at least one token; got %d",
                       o->num_prompt_tokens);
    }
    if (o->num_prompt_tokens > max_model_len) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "the prompt has %d tokens; max_model_len is %d",
                       o->num_prompt_tokens, max_model_len);
    }
    for (int32_t i = 0; i < o->num_prompt_tokens; i++) {
        if (o->prompt_token_ids[i] < 0 || o->prompt_token_ids[i] >= engine->config.vocab_size) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "prompt token %d is %d; ids are 0 to %d", i,
                           o->prompt_token_ids[i], engine->config.vocab_size - 1);
        }
    }
    return QF_OK;
}

static qf_status check_options(const qf_engine *engine, const qf_request_options *o, qf_error *err)
{
    int32_t max_model_len = engine->resolved.backend.max_model_len;
    QF_TRY(check_prompt(engine, o, err));
    QF_TRY(qf_sampling_params_check(&o->sampling, engine->config.vocab_size, err));
    if (o->max_tokens < -1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "max_tokens must be at least 0 (or -1: no limit); got %d",
                       o->max_tokens);
    }
    if ((o->max_tokens > 0 && o->num_prompt_tokens > max_model_len - o->max_tokens) ||
        (o->max_tokens == -1 && o->num_prompt_tokens == max_model_len)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "%d prompt tokens and max_tokens %d do not fit into max_model_len %d", o->num_prompt_tokens,
                       o->max_tokens == -1 ? 1 : o->max_tokens, max_model_len);
    }
    int32_t max_tokens = o->max_tokens >= 0 ? o->max_tokens : max_model_len - o->num_prompt_tokens;
    if (o->sampling.min_tokens > max_tokens) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "min_tokens %d exceeds max_tokens %d", o->sampling.min_tokens,
                       max_tokens);
    }
    int32_t vocab_size = engine->config.vocab_size;
    int32_t max_logprobs = vocab_size < QF_MAX_LOGPROBS ? vocab_size : QF_MAX_LOGPROBS;
    if (o->num_prompt_logprobs < -1 || o->num_prompt_logprobs > max_logprobs) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "prompt_logprobs must be 0 to %d; got %d", max_logprobs,
                       o->num_prompt_logprobs);
    }
    if (o->logits_start < 0 || o->logits_stop < o->logits_start || o->logits_stop > o->num_prompt_tokens) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "logits rows [%d, %d) are not within the prompt's %d tokens",
                       o->logits_start, o->logits_stop, o->num_prompt_tokens);
    }
    if (o->max_unread_tokens < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "max_unread_tokens must be at least 0; got %d",
                       o->max_unread_tokens);
    }
    if (o->mask_timeout_us < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "mask_timeout must not be negative; got %lld us",
                       (long long)o->mask_timeout_us);
    }
    for (int32_t i = 0; i < o->num_eos_token_ids; i++) {
        if (o->eos_token_ids[i] < 0 || o->eos_token_ids[i] >= engine->config.vocab_size) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "eos token id %d is not within 0 to %d",
                           o->eos_token_ids[i], engine->config.vocab_size - 1);
        }
    }
    if (o->leader != NULL && o->leader->engine != engine) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "leader belongs to another engine");
    }
    return QF_OK;
}

static qf_status copy_ids(int32_t **out, const int32_t *ids, int32_t count, qf_error *err)
{
    QF_TRY(qf_alloc((void **)out, (size_t)count, sizeof(int32_t), "token ids", err));
    if (count > 0) {
        memcpy(*out, ids, (size_t)count * sizeof(int32_t));
    }
    return QF_OK;
}

/* The sampler masks every end token while below min_tokens, so it gets the end-of-text ids too. */
static qf_status create_sample_state(qf_request *r, const qf_request_options *o, int32_t max_tokens,
                                     int32_t real_vocab_size, qf_error *err)
{
    int32_t num_eos = o->ignore_eos ? 0 : o->num_eos_token_ids;
    int32_t num_stop = o->sampling.num_stop_token_ids + num_eos;
    int32_t *stop_ids = NULL;
    qf_sampling_params params = o->sampling;
    QF_TRY(qf_alloc((void **)&stop_ids, (size_t)num_stop, sizeof(int32_t), "stop token ids", err));
    for (int32_t i = 0; i < params.num_stop_token_ids; i++) {
        stop_ids[i] = params.stop_token_ids[i];
    }
    for (int32_t i = 0; i < num_eos; i++) {
        stop_ids[params.num_stop_token_ids + i] = o->eos_token_ids[i];
    }
    params.stop_token_ids = stop_ids;
    params.num_stop_token_ids = num_stop;
    params.seed = r->seed;
    qf_status status = qf_sample_state_create(&params, o->prompt_token_ids, o->num_prompt_tokens, max_tokens,
                                              r->engine->config.vocab_size, real_vocab_size, &r->sample, err);
    qf_free(stop_ids);
    return status;
}

static qf_status create_text(qf_request *r, const qf_request_options *o, const qf_vocabulary *vocabulary,
                             qf_error *err)
{
    if (vocabulary == NULL) {
        if (o->num_stop > 0) {
            return QF_FAIL(err, QF_ERROR_STATE, "stop strings need a vocabulary (set_vocabulary)");
        }
        return QF_OK;
    }
    qf_detokenizer_options options = {.stop = o->stop,
                                      .num_stop = o->num_stop,
                                      .include_stop_str_in_output = o->include_stop_str_in_output,
                                      .skip_special_tokens = o->skip_special_tokens};
    return qf_detokenizer_create(vocabulary, &options, &r->detokenizer, err);
}

static qf_status create_result_buffers(qf_request *r, const qf_request_options *o, qf_error *err)
{
    size_t vocab_size = (size_t)r->engine->config.vocab_size;
    if (r->num_logprobs >= 0 && r->sample != NULL) {
        for (int32_t i = 0; i < QF_MAX_STEPS_IN_FLIGHT; i++) {
            QF_TRY(qf_alloc((void **)&r->step_logprobs[i], (size_t)r->num_logprobs + 1, sizeof(qf_logprob),
                            "logprobs", err));
        }
    }
    if (r->num_prompt_logprobs >= 0) {
        QF_TRY(qf_alloc((void **)&r->prompt_logprobs,
                        (size_t)o->num_prompt_tokens * ((size_t)r->num_prompt_logprobs + 1), sizeof(qf_logprob),
                        "prompt logprobs", err));
    }
    if (o->logits_stop > o->logits_start) {
        QF_TRY(qf_alloc((void **)&r->logits, (size_t)(o->logits_stop - o->logits_start) * vocab_size, sizeof(float),
                        "logits", err));
    }
    if (o->guided && r->sample != NULL) {
        QF_TRY(qf_alloc((void **)&r->mask, (vocab_size + 31) / 32, sizeof(uint32_t), "a grammar mask", err));
    }
    return QF_OK;
}

static qf_status fill_seq(qf_request *r, const qf_request_options *o, int32_t max_tokens, qf_error *err)
{
    qf_seq *seq = &r->seq;
    int32_t block_size = r->engine->resolved.backend.block_size;
    seq->priority = o->priority;
    seq->num_prompt_tokens = o->num_prompt_tokens;
    seq->max_total_tokens = o->num_prompt_tokens + max_tokens;
    seq->cache_salt = o->cache_salt;
    seq->guided = r->mask != NULL;
    seq->owner = r;
    seq->max_prefix_hit = INT32_MAX;
    if (r->prompt_logprobs != NULL) {
        seq->max_prefix_hit = 0;
    } else if (r->logits != NULL) {
        seq->max_prefix_hit = o->logits_start;
    }
    size_t blocks = ((size_t)seq->max_total_tokens + (size_t)block_size - 1) / (size_t)block_size;
    QF_TRY(qf_alloc((void **)&seq->token_ids, (size_t)seq->max_total_tokens, sizeof(int32_t), "token ids", err));
    QF_TRY(qf_alloc((void **)&seq->block_table, blocks, sizeof(int32_t), "a block table", err));
    if (r->engine->resolved.backend.kv_window_tokens > 0) {
        QF_TRY(qf_alloc((void **)&seq->window_table, blocks, sizeof(int32_t), "a window's block table", err));
    }
    memcpy(seq->token_ids, o->prompt_token_ids, (size_t)o->num_prompt_tokens * sizeof(int32_t));
    return QF_OK;
}

/* Frees what a request owns, not its references. */
static void free_request(qf_request *r)
{
    if (r->left_behind) {
        return;
    }
    qf_sample_state_destroy(r->sample);
    qf_detokenizer_destroy(r->detokenizer);
    qf_free(r->seq.token_ids);
    qf_free(r->seq.block_table);
    qf_free(r->seq.window_table);
    qf_free(r->eos_token_ids);
    qf_free(r->stop_token_ids);
    for (int32_t i = 0; i < QF_MAX_STEPS_IN_FLIGHT; i++) {
        qf_free(r->step_logprobs[i]);
    }
    qf_free(r->text);
    qf_free(r->logprobs);
    qf_free(r->prompt_logprobs);
    qf_free(r->logits);
    qf_free(r->mask);
    (void)pthread_cond_destroy(&r->readable);
    qf_free(r);
}

static qf_status create_request(qf_engine *engine, const qf_request_options *o, const qf_vocabulary *vocabulary,
                                qf_request **out, qf_error *err)
{
    qf_status status;
    qf_request *r;
    QF_TRY(qf_alloc((void **)&r, 1, sizeof *r, "a request", err));
    pthread_condattr_t attr;
    (void)pthread_condattr_init(&attr);
    (void)pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    int failed = pthread_cond_init(&r->readable, &attr);
    (void)pthread_condattr_destroy(&attr);
    if (failed != 0) {
        qf_free(r);
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot create a condition variable");
    }
    int32_t max_model_len = engine->resolved.backend.max_model_len;
    int32_t max_tokens = o->max_tokens >= 0 ? o->max_tokens : max_model_len - o->num_prompt_tokens;
    r->engine = engine;
    r->seed = o->has_seed ? o->sampling.seed : qf_random_u64();
    r->include_stop_str_in_output = o->include_stop_str_in_output;
    r->min_tokens = o->sampling.min_tokens;
    r->num_logprobs = o->sampling.num_logprobs;
    r->num_prompt_logprobs = o->num_prompt_logprobs;
    r->logits_start = o->logits_start;
    r->logits_stop = o->logits_stop;
    r->max_unread_tokens = o->max_unread_tokens;
    r->mask_timeout_us = o->mask_timeout_us > 0 ? o->mask_timeout_us : 60 * (int64_t)1000000;
    r->notify = o->notify;
    r->tag = o->tag;
    r->mask_position = -1;
    r->stop_token_id = -1;
    r->stop_index = -1;
    r->num_eos_token_ids = o->ignore_eos ? 0 : o->num_eos_token_ids;
    r->num_stop_token_ids = o->sampling.num_stop_token_ids;
    int32_t real_vocab_size = vocabulary != NULL ? qf_vocabulary_size(vocabulary) : engine->config.vocab_size;
    QF_TRY_GOTO(copy_ids(&r->eos_token_ids, o->eos_token_ids, r->num_eos_token_ids, err), fail);
    QF_TRY_GOTO(copy_ids(&r->stop_token_ids, o->sampling.stop_token_ids, r->num_stop_token_ids, err), fail);
    if (max_tokens > 0) {
        QF_TRY_GOTO(create_sample_state(r, o, max_tokens, real_vocab_size, err), fail);
    }
    QF_TRY_GOTO(create_text(r, o, vocabulary, err), fail);
    QF_TRY_GOTO(create_result_buffers(r, o, err), fail);
    QF_TRY_GOTO(fill_seq(r, o, max_tokens, err), fail);
    *out = r;
    return QF_OK;
fail:
    free_request(r);
    return status;
}

/* Adds the request to the driver's inbox, or says why not. */
static qf_status enqueue(qf_engine *engine, qf_request *r, qf_request *leader, qf_error *err)
{
    qf_status status = QF_OK;
    (void)pthread_mutex_lock(&engine->lock);
    int32_t limit = engine->resolved.max_waiting_requests;
    if (engine->failed) {
        status = QF_FAIL(err, QF_ERROR_STATE, "the engine has failed: %.400s", engine->failure.message);
    } else if (engine->stopping) {
        status = QF_FAIL(err, QF_ERROR_STATE, "the engine is closed");
    } else if (limit > 0 && engine->num_unfinished >= limit) {
        status = QF_FAIL(err, QF_ERROR_STATE, "the queue is full: %d unfinished requests, max_waiting_requests is %d",
                         engine->num_unfinished, limit);
    } else {
        status = qf_meter_open(&engine->meter, &r->account, r->seq.num_prompt_tokens, err);
    }
    if (status == QF_OK) {
        engine->references++;
        engine->num_unfinished++;
        r->references = 2; /* the caller's and the driver's */
        r->arrival_time = qf_now_seconds();
        if (leader != NULL) {
            leader->references++;
            r->leader = leader;
            r->seq.leader = &leader->seq;
        }
        if (r->mask != NULL) {
            r->mask_position = 0;
            r->mask_asked_time = r->arrival_time;
            qf_request_changed_locked(r);
        }
        if (engine->inbox_tail != NULL) {
            engine->inbox_tail->next_new = r;
        } else {
            engine->inbox_head = r;
        }
        engine->inbox_tail = r;
        (void)pthread_cond_signal(&engine->wake);
    }
    (void)pthread_mutex_unlock(&engine->lock);
    return status;
}

qf_status qf_engine_submit(qf_engine *self, const qf_request_options *options, qf_request **out, qf_error *err)
{
    *out = NULL;
    QF_TRY(check_options(self, options, err));
    (void)pthread_mutex_lock(&self->lock);
    const qf_vocabulary *vocabulary = self->vocabulary; /* set once, lives as long as the engine */
    (void)pthread_mutex_unlock(&self->lock);
    qf_request *r = NULL;
    QF_TRY(create_request(self, options, vocabulary, &r, err));
    qf_status status = enqueue(self, r, options->leader, err);
    if (status != QF_OK) {
        free_request(r);
        return status;
    }
    *out = r;
    return QF_OK;
}

/* --- references and signals ---------------------------------------------------------------------------- */

void qf_request_unref_locked(qf_request *request)
{
    while (request != NULL && --request->references == 0) {
        qf_request *leader = request->leader; /* a chain, freed without recursion */
        request->engine->references--;
        qf_meter_close(&request->engine->meter, &request->account);
        free_request(request);
        request = leader;
    }
}

void qf_request_signal_locked(qf_request *request, uint32_t signals)
{
    qf_engine *engine = request->engine;
    request->signals |= signals;
    if (!request->signalled) {
        request->signalled = true;
        request->references++;
        request->next_signal = engine->signal_head;
        engine->signal_head = request;
    }
    (void)pthread_cond_signal(&engine->wake);
}

void qf_request_cancel(qf_request *self)
{
    qf_engine *engine = self->engine;
    (void)pthread_mutex_lock(&engine->lock);
    if (!self->finished) {
        qf_request_signal_locked(self, QF_SIGNAL_CANCEL);
    }
    (void)pthread_mutex_unlock(&engine->lock);
}

/* Takes a request that nobody will read off the ready list. */
static void forget_ready_locked(qf_engine *engine, qf_request *request)
{
    if (!request->in_ready_list) {
        return;
    }
    qf_request *previous = NULL;
    for (qf_request *r = engine->ready_head; r != NULL; previous = r, r = r->next_ready) {
        if (r == request) {
            *(previous != NULL ? &previous->next_ready : &engine->ready_head) = r->next_ready;
            if (engine->ready_tail == r) {
                engine->ready_tail = previous;
            }
            break;
        }
    }
    request->in_ready_list = false;
}

void qf_request_release(qf_request *self)
{
    if (self == NULL) {
        return;
    }
    qf_engine *engine = self->engine;
    (void)pthread_mutex_lock(&engine->lock);
    forget_ready_locked(engine, self);
    self->notify = false;
    if (!self->finished) {
        qf_request_signal_locked(self, QF_SIGNAL_CANCEL);
    }
    qf_request_unref_locked(self);
    bool last = engine->references == 0;
    (void)pthread_mutex_unlock(&engine->lock);
    if (last) {
        qf_engine_free(engine);
    }
}

qf_status qf_request_set_mask(qf_request *self, int32_t position, const uint32_t *words, int32_t num_words,
                              qf_error *err)
{
    qf_engine *engine = self->engine;
    int32_t expected = (engine->config.vocab_size + 31) / 32;
    if (num_words != expected) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "the mask has %d words; the vocabulary needs %d", num_words,
                       expected);
    }
    qf_status status = QF_OK;
    (void)pthread_mutex_lock(&engine->lock);
    if (self->finished) {
        /* Cancelled or stopped meanwhile: nothing waits for the mask any more. */
    } else if (self->mask == NULL || self->mask_position != position) {
        status = QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "no mask is awaited for position %d (awaited: %d)", position,
                         self->mask_position);
    } else {
        memcpy(self->mask, words, (size_t)num_words * sizeof *words);
        self->mask_position = -1;
        qf_request_signal_locked(self, QF_SIGNAL_MASK);
    }
    (void)pthread_mutex_unlock(&engine->lock);
    return status;
}
