/* The scheduler's insides, shared by scheduler.c, plan.c and check.c only. */
#ifndef QF_SCHED_SCHEDULER_STATE_H
#define QF_SCHED_SCHEDULER_STATE_H

#include "sched/queue.h"

struct qf_scheduler {
    qf_scheduler_config config;
    qf_block_pool *pool;
    int32_t block_size;
    qf_seq_queue waiting; /* in order of rank */
    qf_seq_queue running; /* in order of rank */
    qf_seq_queue ending;  /* finished, with steps in flight */
    qf_seq **slots;       /* (max_num_seqs) who holds the slot, or NULL */
    int32_t *free_slots;  /* (max_num_seqs) a stack of num_free_slots */
    int32_t num_free_slots;
    int32_t *free_window_blocks; /* (num_window_blocks) a stack of num_free_window_blocks; NULL without a window */
    int32_t num_free_window_blocks;
    uint8_t *window_marks; /* (num_window_blocks) scratch of qf_scheduler_check */
    int32_t *ref_counts;  /* (num_blocks) scratch of qf_scheduler_check */
    int32_t num_releasing; /* sequences with release_when_idle: their blocks are on their way back */
    int32_t num_paused;    /* waiting and running */
    int32_t num_steps_in_flight, num_entries_in_flight;
    uint64_t next_step, next_arrival;
    uint64_t num_preemptions, prefix_queried_tokens, prefix_hit_tokens;
};

/* Blocks for `num_tokens` tokens, at least 1 of them. */
static inline int32_t qf_blocks_for(const qf_scheduler *self, int32_t num_tokens)
{
    return (num_tokens - 1) / self->block_size + 1;
}

/* The first block with a position that a query at `position` or later reads in 16 bits. */
static inline int32_t qf_first_window_block(const qf_scheduler *self, int32_t position)
{
    const int32_t first = position - self->config.window_tokens + 1;
    return first > 0 ? first / self->block_size : 0;
}

/* Running to waiting: recompute from the start. Blocks and slot go now, or when the last step in flight is over. */
void qf_scheduler_preempt(qf_scheduler *self, qf_seq *seq);
/* Forgets the leader: nothing is waited for any more. */
void qf_scheduler_drop_leader(qf_seq *seq);

#endif
