/* The driver thread: takes commands in, plans a step, runs it, hands tokens out. Sleeps when there is nothing to do. */
/* needs: engine/meter.c engine/energy_sampler.c base/rapl.c */
#include <time.h>

#include "engine/engine.h"

/* --- tokens -------------------------------------------------------------------------------------------- */

static bool contains(const int32_t *ids, int32_t count, int32_t id)
{
    for (int32_t i = 0; i < count; i++) {
        if (ids[i] == id) {
            return true;
        }
    }
    return false;
}

/* One accepted token: text, stop conditions, readers. */
static void deliver(qf_engine *e, qf_request *r, int32_t token_id, int32_t parity)
{
    int32_t count = r->seq.num_tokens - r->seq.num_prompt_tokens;
    bool may_stop = count >= r->min_tokens;
    bool is_eos = may_stop && contains(r->eos_token_ids, r->num_eos_token_ids, token_id);
    bool is_stop = may_stop && contains(r->stop_token_ids, r->num_stop_token_ids, token_id);
    bool is_end = is_eos || is_stop;
    qf_text_delta delta = {.stop_index = -1};
    qf_error error;
    qf_status status = QF_OK;

    if (r->detokenizer != NULL && (!is_end || r->include_stop_str_in_output)) {
        status = qf_detokenizer_push(r->detokenizer, token_id, count > r->min_tokens, &delta, &error);
    }
    qf_finish_reason reason = QF_FINISH_NONE;
    if (is_end || delta.stop_index >= 0) {
        reason = QF_FINISH_STOP;
    } else if (r->seq.num_tokens == r->seq.max_total_tokens) {
        reason = QF_FINISH_LENGTH;
    }

    bool pause = false;
    double now = qf_now_seconds();
    (void)pthread_mutex_lock(&e->lock);
    if (status == QF_OK) {
        status = qf_request_append_token_locked(r, r->step_logprobs[parity], &error);
        if (status == QF_OK) {
            qf_meter_add_output(&e->meter, &r->account);
        }
    }
    if (status == QF_OK) {
        status = qf_request_append_text_locked(r, delta.text, delta.size_bytes, &error);
    }
    if (r->first_token_time == 0.0) {
        r->first_token_time = now;
    }
    r->last_token_time = now;
    if (reason == QF_FINISH_STOP) {
        r->stop_index = delta.stop_index;
        r->stop_token_id = is_stop && !is_eos ? token_id : -1;
    }
    if (reason == QF_FINISH_NONE && status == QF_OK) {
        if (r->mask != NULL) {
            r->mask_position = count;
            r->mask_told = false;
            r->mask_asked_time = now;
        }
        pause = r->max_unread_tokens > 0 && r->num_output_tokens - r->num_read_tokens >= r->max_unread_tokens;
        r->paused = pause;
        qf_request_changed_locked(r);
    }
    (void)pthread_mutex_unlock(&e->lock);

    if (status != QF_OK) {
        qf_driver_finish(e, r, QF_FINISH_ERROR, &error);
    } else if (reason != QF_FINISH_NONE) {
        qf_driver_finish(e, r, reason, NULL);
    } else if (pause) {
        qf_scheduler_set_paused(e->scheduler, &r->seq, true);
    }
}

/* --- steps --------------------------------------------------------------------------------------------- */

static void note_scheduled(qf_engine *e, qf_step *step)
{
    const qf_step_plan *plan = &step->plan;
    double now = qf_now_seconds();
    (void)pthread_mutex_lock(&e->lock);
    for (int32_t i = 0; i < plan->num_entries; i++) {
        qf_request *r = plan->entries[i].seq->owner;
        if (r->first_scheduled_time == 0.0) {
            r->first_scheduled_time = now;
            qf_meter_add_cached(&e->meter, &r->account, r->seq.num_cached_tokens);
        }
    }
    uint64_t held = (uint64_t)(e->resolved.num_blocks - qf_block_pool_num_available(e->pool));
    if (held * e->resolved.plan.kv_block_bytes > e->meter.peak_kv_bytes) {
        e->meter.peak_kv_bytes = held * e->resolved.plan.kv_block_bytes;
    }
    if (e->meter.enabled) {
        qf_meter_step_begun(&e->meter, &step->meter);
        qf_energy_wake_locked(e);
    }
    (void)pthread_mutex_unlock(&e->lock);
}

/* Who is in the step, for the meter: positions that were computed before, and the prompt's, are prefill. */
static void list_accounts(qf_step *step)
{
    step->meter.num_entries = step->plan.num_entries;
    for (int32_t i = 0; i < step->plan.num_entries; i++) {
        const qf_step_entry *planned = &step->plan.entries[i];
        qf_meter_entry *entry = &step->meter.entries[i];
        qf_request *r = planned->seq->owner;
        int32_t end = planned->start + planned->num_tokens;
        int32_t prefill_end = r->account.computed_end > r->seq.num_prompt_tokens ? r->account.computed_end
                                                                                : r->seq.num_prompt_tokens;
        int32_t prefill = (end < prefill_end ? end : prefill_end) - planned->start;
        entry->account = &r->account;
        entry->start = planned->start;
        entry->num_tokens = planned->num_tokens;
        entry->num_prefill_tokens = prefill > 0 ? prefill : 0;
        r->account.computed_end = end > r->account.computed_end ? end : r->account.computed_end;
    }
}

/* The step's bytes and operations: called while it runs. */
static void count_step(qf_engine *e, qf_step *step)
{
    int32_t num_rows = step->batch.num_logit_tasks;
    qf_step_traffic traffic = {.layers_bytes = e->resolved.plan.layers_bytes,
                               .head_bytes = num_rows > 0 ? e->resolved.plan.head_bytes : 0};
    if (e->backend->vtable->traffic != NULL) {
        e->backend->vtable->traffic(e->backend, step->batch.num_tokens, num_rows, &traffic);
    }
    qf_meter_step_count(&e->meter, &step->meter, &traffic);
}

/* Plans and starts one step; false if there is nothing to run. */
static bool start_step(qf_engine *e, qf_status *status, qf_error *err)
{
    int32_t parity = (int32_t)(e->num_submitted % QF_MAX_STEPS_IN_FLIGHT);
    qf_step *step = &e->steps[parity];
    qf_scheduler_schedule(e->scheduler, &step->plan);
    if (step->plan.num_entries == 0) {
        return false;
    }
    qf_step_build(step, e, parity);
    list_accounts(step);
    note_scheduled(e, step);
    *status = e->backend->vtable->submit(e->backend, &step->batch, err);
    e->num_submitted++;
    e->num_in_flight++;
    if (e->meter.enabled) {
        count_step(e, step);
    }
    return true;
}

/* True if the token went to its request. */
static bool take_token(qf_engine *e, const qf_step_entry *entry, int32_t parity)
{
    qf_request *r = entry->seq->owner;
    int32_t token_id = r->step_token[parity];
    if (entry->seq->state == QF_SEQ_FINISHED) {
        (void)qf_scheduler_accept(e->scheduler, entry, token_id < 0 ? 0 : token_id); /* dropped, but accounted for */
    } else if (token_id < 0) {
        qf_error error;
        (void)QF_FAIL(&error, QF_ERROR_BACKEND,
                      "no token can be sampled at position %d: the logits are not finite, or every token is masked",
                      entry->seq->num_tokens);
        qf_driver_finish(e, r, QF_FINISH_ERROR, &error);
        (void)qf_scheduler_accept(e->scheduler, entry, 0);
        e->forget_prefixes = true;
    } else if (qf_scheduler_accept(e->scheduler, entry, token_id)) {
        deliver(e, r, token_id, parity);
        return true;
    }
    return false;
}

/* Waits for the oldest step and hands its tokens out. */
static qf_status finish_step(qf_engine *e, qf_error *err)
{
    int32_t parity = (int32_t)(e->num_collected % QF_MAX_STEPS_IN_FLIGHT);
    qf_step *step = &e->steps[parity];
    const qf_step_plan *plan = &step->plan;
    uint64_t step_ns = 0;
    QF_TRY(e->backend->vtable->collect(e->backend, &step_ns, err));
    uint64_t end_ns = e->meter.enabled ? qf_now_ns() : 0;
    e->num_collected++;
    e->num_in_flight--;
    uint64_t num_sampled = 0, num_prompt = 0;
    e->finishing_step = true;
    for (int32_t i = 0; i < plan->num_entries; i++) {
        const qf_step_entry *entry = &plan->entries[i];
        int32_t prompt_left = entry->seq->num_prompt_tokens - entry->start;
        if (prompt_left > 0) {
            num_prompt += (uint64_t)(prompt_left < entry->num_tokens ? prompt_left : entry->num_tokens);
        }
        if (entry->samples && take_token(e, entry, parity)) {
            num_sampled++;
        }
    }
    qf_scheduler_complete(e->scheduler, plan);
    if (e->forget_prefixes) {
        e->forget_prefixes = false;
        qf_block_pool_reset_prefix_cache(e->pool);
    }
    for (int32_t i = 0; i < plan->num_entries; i++) {
        qf_request *r = plan->entries[i].seq->owner;
        bool whole = r->seq.num_completed_tokens == r->seq.num_prompt_tokens;
        if (r->sample == NULL && whole && r->seq.state != QF_SEQ_FINISHED) {
            qf_driver_finish(e, r, QF_FINISH_LENGTH, NULL); /* only the prompt was to be computed */
        }
    }
    e->finishing_step = false;
    if (e->meter.enabled) {
        qf_meter_step_share_time(&step->meter, step_ns);
    }
    (void)pthread_mutex_lock(&e->lock);
    if (e->meter.enabled) {
        qf_meter_step_ended(&e->meter, &step->meter, step_ns, end_ns);
    }
    e->stats.num_steps++;
    e->stats.num_generated_tokens += num_sampled;
    e->stats.num_prompt_tokens += num_prompt;
    e->stats.busy_ns += step_ns;
    qf_driver_update_stats(e);
    (void)pthread_mutex_unlock(&e->lock);
    while (e->finishing_head != NULL) {
        qf_request *r = e->finishing_head;
        e->finishing_head = r->next_finishing;
        qf_driver_publish_finish(e, r);
    }
    for (int32_t i = 0; i < plan->num_entries; i++) {
        qf_driver_drop_if_released(e, plan->entries[i].seq->owner);
    }
#ifdef QF_CHECK_INVARIANTS /* debug and test builds */
    QF_TRY(qf_scheduler_check(e->scheduler, err));
#endif
    return QF_OK;
}

/* A step whose tokens nobody wants any more, or that failed. */
static void meter_last_step(qf_engine *e, qf_meter_step *step, bool ended, uint64_t step_ns)
{
    uint64_t end_ns = qf_now_ns();
    if (ended) {
        qf_meter_step_share_time(step, step_ns);
    }
    (void)pthread_mutex_lock(&e->lock);
    if (ended) {
        qf_meter_step_ended(&e->meter, step, step_ns, end_ns);
    } else {
        qf_meter_step_lost(&e->meter, step);
    }
    (void)pthread_mutex_unlock(&e->lock);
}

/* A thread that hangs in this step knows where its requests' results go. */
static void leave_requests_behind(const qf_step_plan *plan)
{
    for (int32_t i = 0; i < plan->num_entries; i++) {
        qf_request *r = plan->entries[i].seq->owner;
        r->left_behind = true;
    }
}

/* Ends every request, waits for steps in flight, and leaves nothing with the scheduler. */
static void end_all(qf_engine *e, qf_finish_reason reason, const qf_error *error)
{
    for (qf_request *r = e->live_head, *next; r != NULL; r = next) {
        next = r->next_live;
        if (r->seq.state != QF_SEQ_FINISHED) {
            qf_driver_finish(e, r, reason, error);
        }
    }
    while (e->num_in_flight > 0) {
        int32_t parity = (int32_t)(e->num_collected % QF_MAX_STEPS_IN_FLIGHT);
        uint64_t step_ns = 0;
        bool ended = e->backend->vtable->collect(e->backend, &step_ns, NULL) == QF_OK;
        e->num_collected++;
        e->num_in_flight--;
        if (!ended && e->backend->left_behind) {
            leave_requests_behind(&e->steps[parity].plan);
        }
        if (e->meter.enabled) {
            meter_last_step(e, &e->steps[parity].meter, ended, step_ns);
        }
        qf_scheduler_complete(e->scheduler, &e->steps[parity].plan);
    }
    for (qf_request *r = e->live_head, *next; r != NULL; r = next) {
        next = r->next_live;
        qf_driver_drop_if_released(e, r);
    }
    (void)pthread_mutex_lock(&e->lock);
    qf_driver_update_stats(e);
    (void)pthread_mutex_unlock(&e->lock);
}

/* Called with the lock held: sleeps until a command comes, or 20 ms where masks may expire. */
static void wait_for_commands(qf_engine *e)
{
    if (!qf_scheduler_has_work(e->scheduler)) {
        e->num_masks_waited = 0;
    }
    if (e->num_masks_waited == 0) {
        (void)pthread_cond_wait(&e->wake, &e->lock);
        return;
    }
    struct timespec until;
    (void)clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += 20000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    (void)pthread_cond_timedwait(&e->wake, &e->lock, &until);
}

static void fail_engine(qf_engine *e, const qf_error *error)
{
    (void)pthread_mutex_lock(&e->lock);
    e->failed = true;
    e->failure = *error;
    e->stats.failed = true;
    (void)pthread_mutex_unlock(&e->lock);
    end_all(e, QF_FINISH_ERROR, error);
}

void *qf_driver_main(void *engine)
{
    qf_engine *e = engine;
    qf_error error;
    for (;;) {
        (void)pthread_mutex_lock(&e->lock);
        qf_driver_take_commands(e);
        bool stopping = e->stopping;
        bool failed = e->failed;
        qf_driver_update_stats(e);
        (void)pthread_mutex_unlock(&e->lock);
        if (stopping) {
            end_all(e, QF_FINISH_ABORT, NULL);
            (void)pthread_mutex_lock(&e->lock); /* signals that came meanwhile hold references */
            qf_driver_take_commands(e);
            (void)pthread_mutex_unlock(&e->lock);
            break;
        }
        if (failed) { /* requests that were on their way in when it failed */
            end_all(e, QF_FINISH_ERROR, &e->failure);
        }
        if (e->num_masks_waited > 0) {
            qf_driver_expire_masks(e);
        }
        qf_status status = QF_OK;
        if (!failed && e->num_in_flight < e->resolved.max_steps_in_flight && start_step(e, &status, &error)) {
            if (status == QF_OK && e->num_in_flight < e->resolved.max_steps_in_flight) {
                continue; /* one more may be planned behind it */
            }
        }
        if (status == QF_OK && e->num_in_flight > 0) {
            status = finish_step(e, &error);
        } else if (status == QF_OK) {
            (void)pthread_mutex_lock(&e->lock);
            if (e->inbox_head == NULL && e->signal_head == NULL && !e->stopping && !e->reset_prefix_cache) {
                wait_for_commands(e);
            }
            (void)pthread_mutex_unlock(&e->lock);
        }
        if (status != QF_OK) {
            fail_engine(e, &error);
        }
    }
    return NULL;
}
