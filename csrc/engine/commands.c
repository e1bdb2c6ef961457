/* The driver's dealings with callers: new requests and signals in, ends of requests out. */
#include "engine/engine.h"

/* --- requests the driver knows ------------------------------------------------------------------------- */

static void link_live(qf_engine *e, qf_request *r)
{
    r->live = true;
    r->prev_live = NULL;
    r->next_live = e->live_head;
    if (e->live_head != NULL) {
        e->live_head->prev_live = r;
    }
    e->live_head = r;
}

/* Gives the driver's reference up, once the scheduler has let go of the sequence. */
void qf_driver_drop_if_released(qf_engine *e, qf_request *r)
{
    if (!r->live || !r->seq.released) {
        return;
    }
    r->live = false;
    *(r->prev_live != NULL ? &r->prev_live->next_live : &e->live_head) = r->next_live;
    if (r->next_live != NULL) {
        r->next_live->prev_live = r->prev_live;
    }
    (void)pthread_mutex_lock(&e->lock);
    qf_request_unref_locked(r);
    (void)pthread_mutex_unlock(&e->lock);
}

static void count_finish(qf_engine_stats *stats, qf_finish_reason reason)
{
    switch (reason) {
    case QF_FINISH_STOP: stats->num_finished_stop++; break;
    case QF_FINISH_LENGTH: stats->num_finished_length++; break;
    case QF_FINISH_ABORT: stats->num_finished_abort++; break;
    case QF_FINISH_ERROR: stats->num_finished_error++; break;
    case QF_FINISH_NONE: break;
    }
}

void qf_driver_update_stats(qf_engine *e)
{
    qf_scheduler_stats s;
    qf_scheduler_get_stats(e->scheduler, &s);
    qf_engine_stats *stats = &e->stats;
    stats->num_running = s.num_running;
    stats->num_waiting = s.num_waiting;
    stats->num_paused = s.num_paused;
    stats->num_preemptions = s.num_preemptions;
    stats->prefix_queried_tokens = s.prefix_queried_tokens;
    stats->prefix_hit_tokens = s.prefix_hit_tokens;
    stats->num_free_blocks = qf_block_pool_num_available(e->pool);
    stats->num_cached_blocks = qf_block_pool_num_cached(e->pool);
}

/* Tells the readers that the request is over. */
void qf_driver_publish_finish(qf_engine *e, qf_request *r)
{
    (void)pthread_mutex_lock(&e->lock);
    qf_driver_update_stats(e); /* whoever sees the end sees its blocks returned */
    r->finished = true;
    r->finished_time = qf_now_seconds();
    r->mask_position = -1;
    e->num_unfinished--;
    count_finish(&e->stats, r->finish_reason);
    qf_request_changed_locked(r);
    (void)pthread_mutex_unlock(&e->lock);
}

/* Ends a request that the scheduler has not finished: the sequence first, then the text that is still held back
 * (it belongs to the output except after a stop string). Readers hear of it at once, or when the step is over. */
void qf_driver_finish(qf_engine *e, qf_request *r, qf_finish_reason reason, const qf_error *error)
{
    qf_text_delta delta = {.stop_index = -1};
    qf_error text_error;
    qf_scheduler_finish(e->scheduler, &r->seq);
    if (r->detokenizer != NULL && r->stop_index < 0) {
        qf_status status = qf_detokenizer_finish(r->detokenizer, &delta, &text_error);
        if (status == QF_OK) {
            (void)pthread_mutex_lock(&e->lock);
            status = qf_request_append_text_locked(r, delta.text, delta.size_bytes, &text_error);
            (void)pthread_mutex_unlock(&e->lock);
        }
        if (status != QF_OK && reason != QF_FINISH_ERROR) {
            reason = QF_FINISH_ERROR;
            error = &text_error;
        }
    }
    (void)pthread_mutex_lock(&e->lock);
    if (delta.stop_index >= 0 && reason == QF_FINISH_LENGTH) { /* completed by the last bytes */
        r->stop_index = delta.stop_index;
        reason = QF_FINISH_STOP;
    }
    r->finish_reason = reason;
    if (error != NULL) {
        r->error = *error;
    }
    (void)pthread_mutex_unlock(&e->lock);
    if (e->finishing_step) {
        r->next_finishing = e->finishing_head;
        e->finishing_head = r;
    } else {
        qf_driver_publish_finish(e, r);
    }
}

/* --- commands ------------------------------------------------------------------------------------------ */

static void admit(qf_engine *e, qf_request *r)
{
    qf_error error;
    link_live(e, r);
    if (qf_scheduler_add(e->scheduler, &r->seq, &error) != QF_OK) {
        r->seq.released = true; /* the scheduler never knew it */
        r->seq.state = QF_SEQ_FINISHED;
        qf_driver_finish(e, r, QF_FINISH_ERROR, &error);
        qf_driver_drop_if_released(e, r);
    } else if (r->mask != NULL) {
        e->num_masks_waited++;
    }
}

static void obey(qf_engine *e, qf_request *r, uint32_t signals)
{
    if (r->live && r->seq.state != QF_SEQ_FINISHED) {
        if ((signals & QF_SIGNAL_CANCEL) != 0) {
            qf_driver_finish(e, r, QF_FINISH_ABORT, NULL);
        } else {
            if ((signals & QF_SIGNAL_RESUME) != 0) {
                qf_scheduler_set_paused(e->scheduler, &r->seq, false);
                (void)pthread_mutex_lock(&e->lock);
                r->paused = false;
                (void)pthread_mutex_unlock(&e->lock);
            }
            if ((signals & QF_SIGNAL_MASK) != 0) {
                qf_scheduler_set_mask_ready(e->scheduler, &r->seq);
            }
        }
    }
    qf_driver_drop_if_released(e, r);
}

/* Called with the lock held, returns with it held. */
void qf_driver_take_commands(qf_engine *e)
{
    while (e->inbox_head != NULL || e->signal_head != NULL) {
        qf_request *r = e->inbox_head;
        if (r != NULL) { /* before signals: a cancel may be for a request that is still in the inbox */
            e->inbox_head = r->next_new;
            if (e->inbox_head == NULL) {
                e->inbox_tail = NULL;
            }
            (void)pthread_mutex_unlock(&e->lock);
            admit(e, r);
            (void)pthread_mutex_lock(&e->lock);
            continue;
        }
        r = e->signal_head;
        e->signal_head = r->next_signal;
        uint32_t signals = r->signals;
        r->signals = 0;
        r->signalled = false;
        (void)pthread_mutex_unlock(&e->lock);
        obey(e, r, signals);
        (void)pthread_mutex_lock(&e->lock);
        qf_request_unref_locked(r);
    }
    if (e->reset_prefix_cache) {
        e->reset_prefix_cache = false;
        qf_block_pool_reset_prefix_cache(e->pool);
    }
}

/* Fails guided requests whose mask is late. */
void qf_driver_expire_masks(qf_engine *e)
{
    double now = qf_now_seconds();
    for (qf_request *r = e->live_head, *next; r != NULL; r = next) {
        next = r->next_live;
        if (r->mask == NULL || r->seq.state == QF_SEQ_FINISHED) {
            continue;
        }
        (void)pthread_mutex_lock(&e->lock);
        bool late = r->mask_position >= 0 && now - r->mask_asked_time > (double)r->mask_timeout_us * 1e-6;
        int32_t position = r->mask_position;
        (void)pthread_mutex_unlock(&e->lock);
        if (late) {
            qf_error error;
            (void)QF_FAIL(&error, QF_ERROR_STATE, "the grammar mask for position %d did not come within %.3f s", position,
                          (double)r->mask_timeout_us * 1e-6);
            qf_driver_finish(e, r, QF_FINISH_ERROR, &error);
            qf_driver_drop_if_released(e, r);
        }
    }
}
