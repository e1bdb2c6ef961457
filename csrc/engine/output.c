/* From the driver to the readers: unread tokens, text and logprobs of each request, and who is told. */
#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/alloc.h"
#include "engine/engine.h"

static size_t row_entries(const qf_request *r) { return (size_t)r->num_logprobs + 1; }

static int32_t num_unread(const qf_request *r) { return r->num_output_tokens - r->num_read_tokens; }

static bool has_news_locked(const qf_request *r)
{
    return num_unread(r) > 0 || r->text_bytes > 0 || (r->mask_position >= 0 && !r->mask_told) ||
           (r->finished && !r->finish_read);
}

/* --- the driver's side --------------------------------------------------------------------------------- */

qf_status qf_request_append_text_locked(qf_request *r, const char *text, size_t text_bytes, qf_error *err)
{
    if (text_bytes > r->text_capacity - r->text_bytes) {
        size_t capacity = r->text_capacity > 0 ? r->text_capacity : 256;
        while (capacity - r->text_bytes < text_bytes) {
            capacity *= 2;
        }
        char *grown = qf_realloc(r->text, capacity, 1);
        if (grown == NULL) {
            return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot allocate %zu bytes of text", capacity);
        }
        r->text = grown;
        r->text_capacity = capacity;
    }
    if (text_bytes > 0) {
        memcpy(r->text + r->text_bytes, text, text_bytes);
        r->text_bytes += text_bytes;
    }
    return QF_OK;
}

qf_status qf_request_append_token_locked(qf_request *r, const qf_logprob *logprobs, qf_error *err)
{
    int32_t unread = num_unread(r);
    if (logprobs != NULL) {
        if (unread == r->logprobs_capacity) {
            int32_t capacity = r->logprobs_capacity > 0 ? 2 * r->logprobs_capacity : 16;
            qf_logprob *grown = qf_realloc(r->logprobs, (size_t)capacity * row_entries(r), sizeof *grown);
            if (grown == NULL) {
                return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot allocate logprobs of %d tokens", capacity);
            }
            r->logprobs = grown;
            r->logprobs_capacity = capacity;
        }
        memcpy(r->logprobs + (size_t)unread * row_entries(r), logprobs, row_entries(r) * sizeof *logprobs);
    }
    r->num_output_tokens++;
    return QF_OK;
}

void qf_request_changed_locked(qf_request *r)
{
    qf_engine *engine = r->engine;
    (void)pthread_cond_broadcast(&r->readable);
    if (!r->notify || r->in_ready_list || r->ready_told) {
        return;
    }
    bool was_empty = engine->ready_head == NULL;
    r->next_ready = NULL;
    if (was_empty) {
        engine->ready_head = r;
    } else {
        engine->ready_tail->next_ready = r;
    }
    engine->ready_tail = r;
    r->in_ready_list = true;
    if (was_empty) {
        uint64_t one = 1;
        while (write(engine->event_write_fd, &one, sizeof one) < 0 && errno == EINTR) {
        }
    }
}

int32_t qf_engine_take_ready(qf_engine *self, uint64_t *tags, int32_t capacity)
{
    int32_t count = 0;
    (void)pthread_mutex_lock(&self->lock);
    while (count < capacity && self->ready_head != NULL) {
        qf_request *r = self->ready_head;
        self->ready_head = r->next_ready;
        r->in_ready_list = false;
        if (has_news_locked(r)) { /* not read since it was put on the list */
            r->ready_told = true;
            tags[count++] = r->tag;
        }
    }
    if (self->ready_head == NULL) {
        self->ready_tail = NULL;
        uint64_t drained[16]; /* the descriptor does not block; an eventfd empties with the first read */
        while (read(self->event_read_fd, drained, sizeof drained) > 0) {
        }
    }
    (void)pthread_mutex_unlock(&self->lock);
    return count;
}

/* --- the reader's side --------------------------------------------------------------------------------- */

bool qf_request_wait(qf_request *self, int64_t timeout_us)
{
    qf_engine *engine = self->engine;
    struct timespec until = {0};
    if (timeout_us > 0) {
        (void)clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += (time_t)(timeout_us / 1000000);
        until.tv_nsec += (long)(timeout_us % 1000000) * 1000;
        if (until.tv_nsec >= 1000000000L) {
            until.tv_nsec -= 1000000000L;
            until.tv_sec++;
        }
    }
    (void)pthread_mutex_lock(&engine->lock);
    bool ready = has_news_locked(self);
    while (!ready && timeout_us != 0 && !(self->finished && self->finish_read)) {
        if (timeout_us < 0) {
            (void)pthread_cond_wait(&self->readable, &engine->lock);
        } else if (pthread_cond_timedwait(&self->readable, &engine->lock, &until) == ETIMEDOUT) {
            ready = has_news_locked(self);
            break;
        }
        ready = has_news_locked(self);
    }
    (void)pthread_mutex_unlock(&engine->lock);
    return ready;
}

static qf_status copy_unread_locked(qf_request *r, qf_output *out, qf_error *err)
{
    int32_t unread = num_unread(r);
    if (unread > 0) {
        QF_TRY(qf_alloc((void **)&out->token_ids, (size_t)unread, sizeof(int32_t), "output token ids", err));
        memcpy(out->token_ids, r->seq.token_ids + r->seq.num_prompt_tokens + r->num_read_tokens,
               (size_t)unread * sizeof(int32_t));
        out->num_tokens = unread;
    }
    if (r->text_bytes > 0) {
        QF_TRY(qf_alloc((void **)&out->text, r->text_bytes, 1, "output text", err));
        memcpy(out->text, r->text, r->text_bytes);
        out->text_bytes = r->text_bytes;
    }
    if (r->num_logprobs >= 0 && unread > 0) {
        QF_TRY(qf_alloc((void **)&out->logprobs, (size_t)unread * row_entries(r), sizeof(qf_logprob),
                        "output logprobs", err));
        memcpy(out->logprobs, r->logprobs, (size_t)unread * row_entries(r) * sizeof(qf_logprob));
        out->logprobs_stride = (int32_t)row_entries(r);
    }
    return QF_OK;
}

static void fill_finish_locked(qf_request *r, qf_output *out)
{
    out->finish_reason = r->finish_reason;
    out->stop_token_id = r->stop_token_id;
    out->stop_index = r->stop_index;
    out->error = r->error;
    out->seed = r->seed;
    out->num_prompt_tokens = r->seq.num_prompt_tokens;
    out->num_output_tokens = r->num_output_tokens;
    out->num_cached_tokens = r->seq.num_cached_tokens;
    out->num_preemptions = r->seq.num_preemptions;
    out->arrival_time = r->arrival_time;
    out->first_scheduled_time = r->first_scheduled_time;
    out->first_token_time = r->first_token_time;
    out->last_token_time = r->last_token_time;
    out->finished_time = r->finished_time;
    bool complete = r->finish_reason == QF_FINISH_STOP || r->finish_reason == QF_FINISH_LENGTH;
    if (complete && r->prompt_logprobs != NULL) {
        out->prompt_logprobs = r->prompt_logprobs;
        out->prompt_logprobs_stride = r->num_prompt_logprobs + 1;
        r->prompt_logprobs = NULL;
    }
    if (complete && r->logits != NULL) {
        out->logits = r->logits;
        out->num_logits_rows = r->logits_stop - r->logits_start;
        out->vocab_size = r->engine->config.vocab_size;
        r->logits = NULL;
    }
}

qf_status qf_request_read(qf_request *self, qf_output *out, qf_error *err)
{
    qf_engine *engine = self->engine;
    *out = (qf_output){.mask_position = -1, .stop_token_id = -1, .stop_index = -1};
    (void)pthread_mutex_lock(&engine->lock);
    qf_status status = copy_unread_locked(self, out, err);
    if (status == QF_OK) { /* nothing is lost when memory is out: the next read finds it */
        self->num_read_tokens = self->num_output_tokens;
        self->text_bytes = 0;
        if (self->mask_position >= 0 && !self->mask_told) {
            out->mask_position = self->mask_position;
            self->mask_told = true;
        }
        self->ready_told = false;
        if (self->finished && !self->finish_read) {
            out->finished = true;
            fill_finish_locked(self, out);
            self->finish_read = true;
        }
        if (self->paused && !self->finished) {
            qf_request_signal_locked(self, QF_SIGNAL_RESUME);
        }
    }
    (void)pthread_mutex_unlock(&engine->lock);
    if (status != QF_OK) {
        qf_output_deinit(out);
    }
    return status;
}

bool qf_request_usage(qf_request *self, qf_usage *out, qf_energy_source *sources, int32_t *num_sources)
{
    qf_engine *engine = self->engine;
    (void)pthread_mutex_lock(&engine->lock);
    *out = self->account.usage;
    *num_sources = engine->meter.num_sources;
    for (int32_t k = 0; k < engine->meter.num_sources; k++) {
        sources[k] = engine->meter.sources[k].source;
    }
    bool final = self->finished && qf_meter_is_final(&engine->meter, &self->account);
    (void)pthread_mutex_unlock(&engine->lock);
    return final;
}

void qf_output_deinit(qf_output *output)
{
    qf_free(output->token_ids);
    qf_free(output->text);
    qf_free(output->logprobs);
    qf_free(output->prompt_logprobs);
    qf_free(output->logits);
    *output = (qf_output){0};
}
