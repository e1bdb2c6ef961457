/* schedule(): which tokens run in the next step. The rules are in scheduler.h. */
#include <stddef.h>

#include "sched/scheduler_state.h"

static int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }

/* What of `seq` may run now from position `num_computed` on, under the budget, blocks aside. */
static int32_t plannable_tokens(const qf_seq *seq, int32_t num_computed, int32_t budget, bool *samples)
{
    *samples = false;
    const int32_t target = seq->num_tokens + seq->num_pending_tokens;
    const bool generates = seq->num_prompt_tokens < seq->max_total_tokens;
    if (seq->paused || (generates && target >= seq->max_total_tokens)) {
        return 0;
    }
    int32_t num_tokens = min_i32(target - num_computed, budget);
    if (generates && num_tokens > 0 && num_computed + num_tokens == target) {
        if (!seq->guided || (seq->mask_ready && seq->num_pending_tokens == 0)) {
            *samples = true;
        } else {
            num_tokens--; /* all but the position that needs the mask */
        }
    }
    return num_tokens;
}

/* Window blocks for all positions that are planned. */
static void take_window(qf_scheduler *self, qf_seq *seq)
{
    const int32_t end = self->config.window_tokens > 0 ? qf_blocks_for(self, seq->num_computed_tokens) : 0;
    while (seq->window_end < end) {
        seq->window_table[seq->window_end++] = self->free_window_blocks[--self->num_free_window_blocks];
    }
}

static void add_entry(qf_scheduler *self, qf_step_plan *plan, qf_seq *seq, int32_t num_tokens, bool samples)
{
    plan->entries[plan->num_entries++] = (qf_step_entry){
        .seq = seq,
        .slot = seq->slot,
        .start = seq->num_computed_tokens,
        .num_tokens = num_tokens,
        .samples = samples,
        .preemptions = seq->num_preemptions,
    };
    plan->num_tokens += num_tokens;
    seq->num_computed_tokens += num_tokens;
    take_window(self, seq);
    seq->num_steps_in_flight++;
    self->num_entries_in_flight++;
    if (samples) {
        seq->num_pending_tokens++;
        seq->mask_ready = false;
    }
}

/* The lowest in rank of the paused running sequences, or NULL. */
static qf_seq *worst_paused(const qf_scheduler *self)
{
    qf_seq *seq = self->num_paused > 0 ? self->running.tail : NULL;
    while (seq != NULL && !seq->paused) {
        seq = seq->prev;
    }
    return seq;
}

static void take_blocks(qf_scheduler *self, qf_seq *seq, int32_t num_blocks)
{
    while (seq->num_blocks < num_blocks) {
        seq->block_table[seq->num_blocks++] = qf_block_pool_take(self->pool);
    }
}

/* Makes the table of a running sequence cover num_blocks blocks. That is one more at most, since it was admitted with
 * blocks for all tokens known then: so while it waits for one, there is none that others could take instead.
 * False: not in this step; `seq` may be preempted. */
static bool grow(qf_scheduler *self, qf_seq *seq, int32_t num_blocks, bool *preempted)
{
    while (qf_block_pool_num_available(self->pool) < num_blocks - seq->num_blocks) {
        if (self->num_releasing > 0) {
            return false;
        }
        qf_seq *victim = worst_paused(self);
        if (victim == NULL) {
            victim = self->running.tail;
        }
        qf_scheduler_preempt(self, victim);
        *preempted = true;
        if (victim == seq) {
            return false;
        }
    }
    take_blocks(self, seq, num_blocks);
    return true;
}

static void plan_running(qf_scheduler *self, qf_step_plan *plan, bool *preempted)
{
    qf_seq *seq = self->running.head;
    while (seq != NULL && plan->num_tokens < self->config.max_num_batched_tokens) {
        bool samples;
        int32_t budget = self->config.max_num_batched_tokens - plan->num_tokens;
        int32_t num_tokens = plannable_tokens(seq, seq->num_computed_tokens, budget, &samples);
        if (num_tokens > 0 &&
            grow(self, seq, qf_blocks_for(self, seq->num_computed_tokens + num_tokens), preempted)) {
            add_entry(self, plan, seq, num_tokens, samples);
        }
        if (seq->state != QF_SEQ_RUNNING) {
            break; /* its own victim: it was the last, and `next` now links the waiting queue */
        }
        seq = seq->next;
    }
}

/* Fills block_table with the longest chain of published blocks that may be hit; takes no reference. At least one
 * token is left to compute, since something must give the logits. */
static int32_t find_prefix(const qf_scheduler *self, qf_seq *seq)
{
    int32_t limit = min_i32(seq->num_tokens - 1, seq->max_prefix_hit) / self->block_size;
    int32_t parent = QF_BLOCK_NONE, num_hits = 0;
    while (num_hits < limit) {
        const int32_t *token_ids = seq->token_ids + (size_t)num_hits * (size_t)self->block_size;
        parent = qf_block_pool_find(self->pool, parent, token_ids, seq->cache_salt);
        if (parent == QF_BLOCK_NONE) {
            break;
        }
        seq->block_table[num_hits++] = parent;
    }
    return num_hits;
}

/* Where to begin after `num_hits` blocks that were hit: with a window some of their tokens are computed again. 0: the hit
 * saves nothing. */
static int32_t first_after_hits(const qf_scheduler *self, int32_t num_hits)
{
    const int32_t margin = self->config.window_tokens > 0 ? self->config.prefix_margin_tokens : 0;
    const int32_t first = num_hits * self->block_size - margin;
    return first > 0 ? first / self->block_size * self->block_size : 0;
}

/* Blocks that must be available to admit `seq`: new ones, and hits that nobody uses yet. */
static int32_t blocks_to_admit(const qf_scheduler *self, const qf_seq *seq, int32_t num_hits)
{
    int32_t num_blocks = qf_blocks_for(self, seq->num_tokens) - num_hits;
    for (int32_t i = 0; i < num_hits; i++) {
        num_blocks += qf_block_pool_ref_count(self->pool, seq->block_table[i]) == 0;
    }
    return num_blocks;
}

/* A slot and blocks for a waiting sequence, preempting paused ones if that can be enough. */
static bool make_room(qf_scheduler *self, const qf_seq *seq, int32_t num_hits)
{
    int64_t reclaimable = qf_block_pool_num_available(self->pool);
    for (const qf_seq *other = self->num_paused > 0 ? self->running.head : NULL; other != NULL; other = other->next) {
        reclaimable += other->paused ? other->num_blocks : 0;
    }
    if (blocks_to_admit(self, seq, num_hits) > reclaimable) {
        return false;
    }
    while (self->num_free_slots == 0 ||
           blocks_to_admit(self, seq, num_hits) > qf_block_pool_num_available(self->pool)) {
        qf_seq *victim = self->num_releasing == 0 ? worst_paused(self) : NULL;
        if (victim == NULL) {
            return false;
        }
        qf_scheduler_preempt(self, victim);
    }
    return true;
}

static void admit(qf_scheduler *self, qf_seq *seq, int32_t num_hits, int32_t first)
{
    qf_scheduler_drop_leader(seq);
    for (int32_t i = 0; i < num_hits; i++) {
        qf_block_pool_ref(self->pool, seq->block_table[i]);
    }
    seq->num_blocks = seq->num_published_blocks = num_hits;
    seq->num_shared_tokens = num_hits * self->block_size;
    seq->num_computed_tokens = seq->num_completed_tokens = first;
    seq->window_first = seq->window_end = self->config.window_tokens > 0 ? first / self->block_size : 0;
    take_blocks(self, seq, qf_blocks_for(self, seq->num_tokens));
    if (seq->num_preemptions == 0) {
        seq->num_cached_tokens = seq->num_computed_tokens;
        self->prefix_queried_tokens += (uint64_t)seq->num_prompt_tokens;
        self->prefix_hit_tokens += (uint64_t)seq->num_cached_tokens;
    }
    qf_seq_queue_remove(&self->waiting, seq);
    seq->state = QF_SEQ_RUNNING;
    seq->slot = self->free_slots[--self->num_free_slots];
    self->slots[seq->slot] = seq;
    qf_seq_queue_insert_from_tail(&self->running, seq);
}

/* A sampled token tells too: the leader may have been preempted since its prompt was computed. */
static bool leader_ready(const qf_seq *leader)
{
    return leader == NULL || leader->num_tokens > leader->num_prompt_tokens ||
           leader->num_completed_tokens >= leader->num_prompt_tokens;
}

static void plan_waiting(qf_scheduler *self, qf_step_plan *plan)
{
    qf_seq *next;
    for (qf_seq *seq = self->waiting.head; seq != NULL; seq = next) {
        next = seq->next; /* stays in the queue: only `seq` leaves it here, and victims are paused */
        int32_t budget = self->config.max_num_batched_tokens - plan->num_tokens;
        if (budget == 0 || (self->num_free_slots == 0 && self->num_paused == 0)) {
            return;
        }
        bool samples;
        if (plannable_tokens(seq, 0, budget, &samples) == 0 || !leader_ready(seq->leader)) {
            continue; /* paused, at its end, without its mask, or behind its leader: no reason to hold others back */
        }
        bool no_blocks = qf_block_pool_num_available(self->pool) == 0 && self->num_paused == 0;
        if (seq->num_steps_in_flight > 0 || no_blocks) {
            return; /* before hashing its prefix in vain, step after step */
        }
        int32_t num_hits = find_prefix(self, seq);
        const int32_t first = first_after_hits(self, num_hits);
        num_hits = first > 0 ? num_hits : 0;
        int32_t num_tokens = plannable_tokens(seq, first, budget, &samples);
        if (num_tokens == 0) {
            continue; /* all but the position that needs the mask is in the prefix cache */
        }
        if (!make_room(self, seq, num_hits)) {
            return;
        }
        admit(self, seq, num_hits, first);
        add_entry(self, plan, seq, num_tokens, samples);
    }
}

void qf_scheduler_schedule(qf_scheduler *self, qf_step_plan *plan)
{
    plan->step = 0;
    plan->num_entries = plan->num_tokens = 0;
    if (self->num_steps_in_flight >= self->config.max_steps_in_flight) {
        return;
    }
    bool preempted = false;
    plan_running(self, plan, &preempted);
    if (!preempted || (plan->num_entries == 0 && self->num_steps_in_flight == 0)) {
        plan_waiting(self, plan);
    }
    if (plan->num_entries > 0) {
        plan->step = self->next_step++;
        self->num_steps_in_flight++;
    }
}
