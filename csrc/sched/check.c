/* Every invariant of the scheduler, recomputed from its sequences. */
#include <stddef.h>
#include <string.h>

#include "sched/scheduler_state.h"

/* Sums over all sequences. */
typedef struct totals {
    int32_t num_entries, num_slots, num_releasing, num_paused, num_with_leader, num_followers, num_window_blocks;
} totals;

#define CHECK_SEQ(seq, cond)                                                                                       \
    do {                                                                                                           \
        if (!(cond)) {                                                                                             \
            return QF_FAIL(err, QF_ERROR_INTERNAL, "sequence %llu does not satisfy: %s",                           \
                           (unsigned long long)(seq)->id, #cond);                                                  \
        }                                                                                                          \
    } while (0)

#define CHECK_TOTAL(what, actual, expected)                                                                        \
    do {                                                                                                           \
        if ((actual) != (expected)) {                                                                              \
            return QF_FAIL(err, QF_ERROR_INTERNAL, "%s: %d, but the sequences give %d", what, (actual), (expected)); \
        }                                                                                                          \
    } while (0)

static qf_status check_running(const qf_scheduler *self, const qf_seq *seq, qf_error *err)
{
    const int32_t target = seq->num_tokens + seq->num_pending_tokens;
    const int32_t num_final = seq->num_completed_tokens < seq->num_tokens ? seq->num_completed_tokens : seq->num_tokens;
    CHECK_SEQ(seq, seq->slot >= 0 && !seq->release_when_idle && seq->leader == NULL);
    CHECK_SEQ(seq, seq->num_computed_tokens >= 1 && seq->num_computed_tokens <= target);
    CHECK_SEQ(seq, seq->num_completed_tokens >= 0 && seq->num_completed_tokens <= seq->num_computed_tokens);
    CHECK_SEQ(seq, seq->num_steps_in_flight > 0 || seq->num_completed_tokens == seq->num_computed_tokens);
    CHECK_SEQ(seq, target <= seq->max_total_tokens);
    CHECK_SEQ(seq, seq->num_blocks >= qf_blocks_for(self, seq->num_computed_tokens));
    CHECK_SEQ(seq, seq->num_blocks <= qf_blocks_for(self, seq->max_total_tokens));
    const int32_t num_written = num_final > seq->num_shared_tokens ? num_final : seq->num_shared_tokens;
    CHECK_SEQ(seq, seq->num_published_blocks == num_written / self->block_size);
    CHECK_SEQ(seq, seq->num_shared_tokens < seq->num_tokens && seq->num_shared_tokens % self->block_size == 0);
    if (self->config.window_tokens > 0) {
        CHECK_SEQ(seq, seq->window_end == qf_blocks_for(self, seq->num_computed_tokens));
        CHECK_SEQ(seq, seq->window_first >= qf_first_window_block(self, seq->num_completed_tokens));
    }
    CHECK_SEQ(seq, !seq->guided || seq->num_pending_tokens <= 1);
    return QF_OK;
}

static qf_status check_seq(const qf_scheduler *self, const qf_seq *seq, qf_error *err)
{
    CHECK_SEQ(seq, !seq->released);
    CHECK_SEQ(seq, seq->num_tokens >= seq->num_prompt_tokens && seq->num_tokens <= seq->max_total_tokens);
    CHECK_SEQ(seq, seq->num_pending_tokens >= 0 && seq->num_pending_tokens <= seq->num_steps_in_flight);
    CHECK_SEQ(seq, seq->num_steps_in_flight >= 0 && seq->num_steps_in_flight <= self->num_steps_in_flight);
    CHECK_SEQ(seq, seq->num_cached_tokens >= 0 && seq->num_cached_tokens < seq->num_prompt_tokens);
    CHECK_SEQ(seq, seq->num_cached_tokens % self->block_size == 0 && seq->num_cached_tokens <= seq->max_prefix_hit);
    CHECK_SEQ(seq, seq->slot < self->config.max_num_seqs && (seq->slot < 0 || self->slots[seq->slot] == seq));
    if (seq->state == QF_SEQ_RUNNING) {
        return check_running(self, seq, err);
    }
    const bool in_flight = seq->num_steps_in_flight > 0;
    CHECK_SEQ(seq, seq->release_when_idle == in_flight && (seq->slot >= 0) == in_flight);
    CHECK_SEQ(seq, (seq->num_blocks > 0) == in_flight);
    CHECK_SEQ(seq, in_flight || seq->window_end == 0);
    if (seq->state == QF_SEQ_WAITING) {
        CHECK_SEQ(seq, seq->num_computed_tokens == 0 && seq->num_completed_tokens == 0);
        CHECK_SEQ(seq, seq->num_published_blocks == 0 && (!in_flight || seq->num_preemptions > 0));
    } else {
        CHECK_SEQ(seq, in_flight && seq->num_pending_tokens == 0 && !seq->paused && seq->leader == NULL);
        CHECK_SEQ(seq, seq->num_followers == 0);
    }
    return QF_OK;
}

/* Checks one queue and adds its sequences to the totals and to the recomputed ref counts. */
static qf_status check_queue(const qf_scheduler *self, const qf_seq_queue *queue, qf_seq_state state, totals *sum,
                             qf_error *err)
{
    const qf_seq *prev = NULL;
    int32_t count = 0;
    for (const qf_seq *seq = queue->head; seq != NULL; seq = seq->next) {
        count++;
        CHECK_SEQ(seq, count <= queue->count && seq->prev == prev && seq->state == state);
        CHECK_SEQ(seq, prev == NULL || qf_seq_before(prev, seq));
        QF_TRY(check_seq(self, seq, err));
        for (int32_t i = 0; i < seq->num_blocks; i++) {
            CHECK_SEQ(seq, seq->block_table[i] >= 0 && seq->block_table[i] < qf_block_pool_num_blocks(self->pool));
            self->ref_counts[seq->block_table[i]]++;
        }
        CHECK_SEQ(seq, seq->window_first <= seq->window_end);
        for (int32_t i = seq->window_first; i < seq->window_end; i++) {
            const int32_t block = seq->window_table[i];
            CHECK_SEQ(seq, block >= 0 && block < self->config.num_window_blocks && self->window_marks[block] == 0);
            self->window_marks[block] = 1;
            sum->num_window_blocks++;
        }
        sum->num_entries += seq->num_steps_in_flight;
        sum->num_slots += seq->slot >= 0;
        sum->num_releasing += seq->release_when_idle;
        sum->num_paused += seq->paused;
        sum->num_with_leader += seq->leader != NULL;
        sum->num_followers += seq->num_followers;
        prev = seq;
    }
    CHECK_TOTAL("the count of a queue", queue->count, count);
    if (queue->tail != prev) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "the tail of a queue of %d is not its last sequence", count);
    }
    return QF_OK;
}

qf_status qf_scheduler_check(const qf_scheduler *self, qf_error *err)
{
    QF_TRY(qf_block_pool_check(self->pool, err));
    const int32_t num_blocks = qf_block_pool_num_blocks(self->pool);
    memset(self->ref_counts, 0, (size_t)num_blocks * sizeof *self->ref_counts);
    totals sum = {0};
    const int32_t num_window_blocks = self->config.window_tokens > 0 ? self->config.num_window_blocks : 0;
    if (num_window_blocks > 0) {
        memset(self->window_marks, 0, (size_t)num_window_blocks);
    }
    QF_TRY(check_queue(self, &self->waiting, QF_SEQ_WAITING, &sum, err));
    QF_TRY(check_queue(self, &self->running, QF_SEQ_RUNNING, &sum, err));
    QF_TRY(check_queue(self, &self->ending, QF_SEQ_FINISHED, &sum, err));
    CHECK_TOTAL("entries in flight", self->num_entries_in_flight, sum.num_entries);
    CHECK_TOTAL("window blocks in use", num_window_blocks - self->num_free_window_blocks, sum.num_window_blocks);
    for (int32_t i = 0; i < self->num_free_window_blocks; i++) {
        if (self->window_marks[self->free_window_blocks[i]] != 0) {
            return QF_FAIL(err, QF_ERROR_INTERNAL, "window block %d is free and in use", self->free_window_blocks[i]);
        }
    }
    CHECK_TOTAL("slots in use", self->config.max_num_seqs - self->num_free_slots, sum.num_slots);
    CHECK_TOTAL("sequences that will release blocks", self->num_releasing, sum.num_releasing);
    CHECK_TOTAL("paused sequences", self->num_paused, sum.num_paused);
    CHECK_TOTAL("followers", sum.num_followers, sum.num_with_leader);
    for (int32_t i = 0; i < self->num_free_slots; i++) {
        if (self->slots[self->free_slots[i]] != NULL) {
            return QF_FAIL(err, QF_ERROR_INTERNAL, "slot %d is free and in use", self->free_slots[i]);
        }
    }
    if (self->num_steps_in_flight < 0 || self->num_steps_in_flight > self->config.max_steps_in_flight ||
        (self->num_steps_in_flight == 0) != (self->num_entries_in_flight == 0)) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "%d steps in flight with %d entries, the limit is %d steps",
                       self->num_steps_in_flight, self->num_entries_in_flight, self->config.max_steps_in_flight);
    }
    for (int32_t block = 0; block < num_blocks; block++) {
        int32_t ref_count = qf_block_pool_ref_count(self->pool, block);
        if (ref_count != self->ref_counts[block]) {
            return QF_FAIL(err, QF_ERROR_INTERNAL, "block %d has ref count %d, but %d tables hold it", block, ref_count,
                           self->ref_counts[block]);
        }
    }
    return QF_OK;
}
