/* The life of a sequence: add, accept, complete, finish, preempt. Planning is in plan.c, the invariants in check.c. */
#include "sched/scheduler.h"

#include <stddef.h>
#include <string.h>

#include "base/alloc.h"
#include "kv/window.h"
#include "sched/scheduler_state.h"

static qf_status check_window(const qf_scheduler_config *config, int32_t block_size, qf_error *err)
{
    const int64_t needed = qf_kv_window_blocks(config->window_tokens, block_size, config->max_model_len,
                                               config->max_num_seqs, config->max_num_batched_tokens);
    if (config->window_tokens < 0 || config->prefix_margin_tokens < 0 || config->num_window_blocks < needed) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "a window of %d tokens (at least 0) with a margin of %d (at least 0) needs %lld blocks; got %d",
                       config->window_tokens, config->prefix_margin_tokens, (long long)needed,
                       config->num_window_blocks);
    }
    return QF_OK;
}

static qf_status create_window(qf_scheduler *self, qf_error *err)
{
    const int32_t count = self->config.window_tokens > 0 ? self->config.num_window_blocks : 0;
    if (count == 0) {
        return QF_OK;
    }
    void *memory;
    QF_TRY(qf_alloc(&memory, (size_t)count, sizeof(int32_t), "the scheduler's window blocks", err));
    self->free_window_blocks = memory;
    QF_TRY(qf_alloc(&memory, (size_t)count, 1, "the scheduler's window marks", err));
    self->window_marks = memory;
    for (int32_t block = count - 1; block >= 0; block--) {
        self->free_window_blocks[self->num_free_window_blocks++] = block;
    }
    return QF_OK;
}

qf_status qf_scheduler_create(const qf_scheduler_config *config, qf_block_pool *pool, qf_scheduler **out,
                              qf_error *err)
{
    *out = NULL;
    if (config->max_num_seqs < 1 || config->max_num_batched_tokens < 1 || config->max_model_len < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "max_num_seqs %d, max_num_batched_tokens %d and max_model_len %d must be at least 1",
                       config->max_num_seqs, config->max_num_batched_tokens, config->max_model_len);
    }
    if (config->max_steps_in_flight < 1 || config->max_steps_in_flight > 2) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "max_steps_in_flight is %d, must be 1 or 2",
                       config->max_steps_in_flight);
    }
    QF_TRY(check_window(config, qf_block_pool_block_size(pool), err));
    const size_t num_slots = (size_t)config->max_num_seqs;
    qf_status status;
    void *memory;
    QF_TRY(qf_alloc(&memory, 1, sizeof(qf_scheduler), "the scheduler", err));
    qf_scheduler *self = memory;
    QF_TRY_GOTO(qf_alloc(&memory, num_slots, sizeof(qf_seq *), "the scheduler's slots", err), fail);
    self->slots = memory;
    QF_TRY_GOTO(qf_alloc(&memory, num_slots, sizeof(int32_t), "the scheduler's free slots", err), fail);
    self->free_slots = memory;
    QF_TRY_GOTO(qf_alloc(&memory, (size_t)qf_block_pool_num_blocks(pool), sizeof(int32_t),
                         "the scheduler's reference counts", err), fail);
    self->ref_counts = memory;

    self->config = *config;
    self->pool = pool;
    self->block_size = qf_block_pool_block_size(pool);
    self->next_step = 1;
    QF_TRY_GOTO(create_window(self, err), fail);
    for (int32_t slot = config->max_num_seqs - 1; slot >= 0; slot--) {
        self->free_slots[self->num_free_slots++] = slot;
    }
    *out = self;
    return QF_OK;
fail:
    qf_scheduler_destroy(self);
    return status;
}

void qf_scheduler_destroy(qf_scheduler *self)
{
    if (self != NULL) {
        qf_free(self->window_marks);
        qf_free(self->free_window_blocks);
        qf_free(self->ref_counts);
        qf_free(self->free_slots);
        qf_free(self->slots);
        qf_free(self);
    }
}

qf_status qf_step_plan_init(qf_step_plan *plan, int32_t max_num_seqs, qf_error *err)
{
    *plan = (qf_step_plan){0};
    if (max_num_seqs < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "a plan for %d sequences: must be at least 1", max_num_seqs);
    }
    void *memory;
    QF_TRY(qf_alloc(&memory, (size_t)max_num_seqs, sizeof *plan->entries, "a step plan", err));
    plan->entries = memory;
    return QF_OK;
}

void qf_step_plan_deinit(qf_step_plan *plan)
{
    qf_free(plan->entries);
    *plan = (qf_step_plan){0};
}

static qf_status check_new_seq(const qf_scheduler *self, const qf_seq *seq, qf_error *err)
{
    if (seq->num_prompt_tokens < 1 || seq->num_prompt_tokens > seq->max_total_tokens) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "the prompt has %d tokens, must be 1 to max_total_tokens %d",
                       seq->num_prompt_tokens, seq->max_total_tokens);
    }
    if (seq->max_total_tokens > self->config.max_model_len) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "prompt and output may reach %d tokens, max_model_len is %d",
                       seq->max_total_tokens, self->config.max_model_len);
    }
    int32_t num_blocks = qf_block_pool_num_blocks(self->pool);
    if (qf_blocks_for(self, seq->max_total_tokens) > num_blocks) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "prompt and output may reach %d tokens, the whole KV cache has %d blocks of %d tokens",
                       seq->max_total_tokens, num_blocks, self->block_size);
    }
    if (seq->max_prefix_hit < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "max_prefix_hit is %d, must be at least 0",
                       seq->max_prefix_hit);
    }
    if (seq->leader == seq || (seq->leader != NULL && seq->leader->state == QF_SEQ_NEW)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "the leader of sequence %llu was not added before it",
                       (unsigned long long)seq->id);
    }
    return QF_OK;
}

qf_status qf_scheduler_add(qf_scheduler *self, qf_seq *seq, qf_error *err)
{
    QF_TRY(check_new_seq(self, seq, err));
    seq->state = QF_SEQ_WAITING;
    seq->released = seq->paused = seq->mask_ready = seq->release_when_idle = false;
    seq->num_followers = 0;
    seq->slot = -1;
    seq->num_tokens = seq->num_prompt_tokens;
    seq->num_pending_tokens = seq->num_computed_tokens = seq->num_completed_tokens = 0;
    seq->num_cached_tokens = seq->num_published_blocks = seq->num_blocks = 0;
    seq->num_shared_tokens = seq->window_first = seq->window_end = 0;
    seq->num_steps_in_flight = seq->num_preemptions = 0;
    seq->arrival = self->next_arrival++;
    seq->prev = seq->next = NULL;
    if (seq->leader != NULL) {
        if (seq->leader->state == QF_SEQ_FINISHED) {
            seq->leader = NULL;
        } else {
            seq->leader->num_followers++;
        }
    }
    qf_seq_queue_insert_from_tail(&self->waiting, seq);
    return QF_OK;
}

void qf_scheduler_drop_leader(qf_seq *seq)
{
    if (seq->leader != NULL) {
        seq->leader->num_followers--;
        seq->leader = NULL;
    }
}

/* Returns the window blocks before `first`, an index into the table. */
static void release_window(qf_scheduler *self, qf_seq *seq, int32_t first)
{
    while (seq->window_first < seq->window_end && seq->window_first < first) {
        self->free_window_blocks[self->num_free_window_blocks++] = seq->window_table[seq->window_first++];
    }
}

/* Returns blocks and slot. From the last block to the first, so that tails are evicted before their prefixes. */
static void release(qf_scheduler *self, qf_seq *seq)
{
    while (seq->num_blocks > 0) {
        qf_block_pool_release(self->pool, seq->block_table[--seq->num_blocks]);
    }
    release_window(self, seq, seq->window_end);
    seq->num_shared_tokens = seq->window_first = seq->window_end = 0;
    if (seq->slot >= 0) {
        self->slots[seq->slot] = NULL;
        self->free_slots[self->num_free_slots++] = seq->slot;
        seq->slot = -1;
    }
    seq->num_published_blocks = 0;
    if (seq->release_when_idle) {
        seq->release_when_idle = false;
        self->num_releasing--;
    }
    seq->released = seq->state == QF_SEQ_FINISHED;
}

/* Now if no step in flight uses the blocks, else at the end of the last one. */
static void release_soon(qf_scheduler *self, qf_seq *seq)
{
    if (seq->num_steps_in_flight == 0) {
        release(self, seq);
    } else if (!seq->release_when_idle) {
        seq->release_when_idle = true;
        self->num_releasing++;
    }
}

void qf_scheduler_preempt(qf_scheduler *self, qf_seq *seq)
{
    qf_seq_queue_remove(&self->running, seq);
    seq->state = QF_SEQ_WAITING;
    seq->num_preemptions++;
    self->num_preemptions++;
    seq->num_computed_tokens = seq->num_completed_tokens = 0;
    seq->num_published_blocks = 0;
    qf_seq_queue_insert_from_head(&self->waiting, seq);
    release_soon(self, seq);
}

bool qf_scheduler_accept(qf_scheduler *self, const qf_step_entry *entry, int32_t token_id)
{
    (void)self;
    qf_seq *seq = entry->seq;
    if (seq->state == QF_SEQ_FINISHED) {
        return false;
    }
    seq->token_ids[seq->num_tokens++] = token_id;
    seq->num_pending_tokens--;
    return true;
}

/* Offers the blocks whose KV is final and whose tokens are known to the prefix cache. */
static void publish_blocks(qf_scheduler *self, qf_seq *seq)
{
    int32_t num_final = seq->num_completed_tokens < seq->num_tokens ? seq->num_completed_tokens : seq->num_tokens;
    int32_t num_full = num_final / self->block_size;
    for (int32_t i = seq->num_published_blocks; i < num_full; i++) {
        int32_t parent = i > 0 ? seq->block_table[i - 1] : QF_BLOCK_NONE;
        const int32_t *token_ids = seq->token_ids + (size_t)i * (size_t)self->block_size;
        (void)qf_block_pool_publish(self->pool, seq->block_table[i], parent, token_ids, seq->cache_salt);
        seq->num_published_blocks = i + 1;
    }
}

void qf_scheduler_complete(qf_scheduler *self, const qf_step_plan *plan)
{
    if (plan->num_entries == 0) {
        return;
    }
    self->num_steps_in_flight--;
    self->num_entries_in_flight -= plan->num_entries;
    for (int32_t i = 0; i < plan->num_entries; i++) {
        const qf_step_entry *entry = &plan->entries[i];
        qf_seq *seq = entry->seq;
        seq->num_steps_in_flight--;
        if (entry->preemptions == seq->num_preemptions) {
            seq->num_completed_tokens = entry->start + entry->num_tokens;
            publish_blocks(self, seq);
            release_window(self, seq, qf_first_window_block(self, seq->num_completed_tokens));
        }
        if (seq->num_steps_in_flight == 0 && seq->release_when_idle) {
            if (seq->state == QF_SEQ_FINISHED) {
                qf_seq_queue_remove(&self->ending, seq);
            }
            release(self, seq);
        }
    }
}

void qf_scheduler_finish(qf_scheduler *self, qf_seq *seq)
{
    if (seq->state == QF_SEQ_FINISHED) {
        return;
    }
    if (seq->state == QF_SEQ_NEW) { /* never added */
        seq->state = QF_SEQ_FINISHED;
        seq->released = true;
        return;
    }
    qf_seq_queue_remove(seq->state == QF_SEQ_RUNNING ? &self->running : &self->waiting, seq);
    seq->state = QF_SEQ_FINISHED;
    seq->num_pending_tokens = 0;
    if (seq->paused) {
        seq->paused = false;
        self->num_paused--;
    }
    qf_scheduler_drop_leader(seq);
    for (qf_seq *other = self->waiting.head; other != NULL && seq->num_followers > 0; other = other->next) {
        if (other->leader == seq) {
            qf_scheduler_drop_leader(other);
        }
    }
    if (seq->num_steps_in_flight > 0) {
        qf_seq_queue_insert_from_tail(&self->ending, seq);
    }
    release_soon(self, seq);
}

void qf_scheduler_set_paused(qf_scheduler *self, qf_seq *seq, bool paused)
{
    if ((seq->state == QF_SEQ_WAITING || seq->state == QF_SEQ_RUNNING) && seq->paused != paused) {
        seq->paused = paused;
        self->num_paused += paused ? 1 : -1;
    }
}

void qf_scheduler_set_mask_ready(qf_scheduler *self, qf_seq *seq)
{
    (void)self;
    seq->mask_ready = true;
}

bool qf_scheduler_has_work(const qf_scheduler *self)
{
    return self->waiting.count > 0 || self->running.count > 0 || self->num_steps_in_flight > 0;
}

void qf_scheduler_get_stats(const qf_scheduler *self, qf_scheduler_stats *out)
{
    *out = (qf_scheduler_stats){
        .num_running = self->running.count,
        .num_waiting = self->waiting.count,
        .num_paused = self->num_paused,
        .num_preemptions = self->num_preemptions,
        .prefix_queried_tokens = self->prefix_queried_tokens,
        .prefix_hit_tokens = self->prefix_hit_tokens,
    };
}
