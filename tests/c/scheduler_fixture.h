/* A pool, a scheduler and small sequences for the tests of the scheduler's rules. Every call is followed by a check of
 * all invariants. */
#ifndef QF_TESTS_SCHEDULER_FIXTURE_H
#define QF_TESTS_SCHEDULER_FIXTURE_H

#include "check.h"

#include "kv/block_pool.h"
#include "sched/scheduler.h"

#define BLOCK 4
#define MAX_LEN 64

typedef struct test_seq {
    qf_seq seq;
    int32_t token_ids[MAX_LEN];
    int32_t block_table[MAX_LEN];
} test_seq;

typedef struct fixture {
    qf_block_pool *pool;
    qf_scheduler *scheduler;
    qf_step_plan first, second;
} fixture;

static inline fixture make(int32_t num_blocks, int32_t max_num_seqs, int32_t budget, int32_t depth)
{
    qf_error err;
    fixture f;
    qf_scheduler_config config = {.max_num_seqs = max_num_seqs,
                                  .max_num_batched_tokens = budget,
                                  .max_model_len = MAX_LEN,
                                  .max_steps_in_flight = depth};
    CHECK_OK(qf_block_pool_create(num_blocks, BLOCK, true, 42, &f.pool, &err));
    CHECK_OK(qf_scheduler_create(&config, f.pool, &f.scheduler, &err));
    CHECK_OK(qf_step_plan_init(&f.first, max_num_seqs, &err));
    CHECK_OK(qf_step_plan_init(&f.second, max_num_seqs, &err));
    return f;
}

static inline void check(fixture *f)
{
    qf_error err;
    CHECK_OK(qf_scheduler_check(f->scheduler, &err));
}

static inline void drop(fixture *f)
{
    check(f);
    CHECK_INT(qf_block_pool_num_available(f->pool), qf_block_pool_num_blocks(f->pool));
    CHECK(!qf_scheduler_has_work(f->scheduler));
    qf_step_plan_deinit(&f->first);
    qf_step_plan_deinit(&f->second);
    qf_scheduler_destroy(f->scheduler);
    qf_block_pool_destroy(f->pool);
}

/* The prompt is first_token, first_token + 1, ... */
static inline void fill(test_seq *t, int32_t first_token, int32_t num_prompt, int32_t max_total)
{
    *t = (test_seq){0};
    for (int32_t i = 0; i < num_prompt; i++) {
        t->token_ids[i] = first_token + i;
    }
    t->seq.token_ids = t->token_ids;
    t->seq.block_table = t->block_table;
    t->seq.num_prompt_tokens = num_prompt;
    t->seq.max_total_tokens = max_total;
    t->seq.max_prefix_hit = INT32_MAX;
    t->seq.id = (uint64_t)first_token;
}

static inline void add(fixture *f, test_seq *t)
{
    qf_error err;
    CHECK_OK(qf_scheduler_add(f->scheduler, &t->seq, &err));
    check(f);
}

static inline int32_t schedule(fixture *f, qf_step_plan *plan)
{
    qf_scheduler_schedule(f->scheduler, plan);
    check(f);
    return plan->num_entries;
}

/* Accepts 1000 + position for each sampling entry, then completes the step. */
static inline void complete(fixture *f, const qf_step_plan *plan)
{
    for (int32_t i = 0; i < plan->num_entries; i++) {
        if (plan->entries[i].samples) {
            (void)qf_scheduler_accept(f->scheduler, &plan->entries[i], 1000 + plan->entries[i].seq->num_tokens);
        }
    }
    qf_scheduler_complete(f->scheduler, plan);
    check(f);
}

static inline int32_t step(fixture *f)
{
    int32_t num_entries = schedule(f, &f->first);
    complete(f, &f->first);
    return num_entries;
}

static inline void finish(fixture *f, test_seq *t)
{
    qf_scheduler_finish(f->scheduler, &t->seq);
    check(f);
}

/* What the plan has for a sequence, or NULL. */
static inline const qf_step_entry *entry_of(const qf_step_plan *plan, const test_seq *t)
{
    for (int32_t i = 0; i < plan->num_entries; i++) {
        if (plan->entries[i].seq == &t->seq) {
            return &plan->entries[i];
        }
    }
    return NULL;
}

static inline void check_entry(const qf_step_plan *plan, const test_seq *t, int32_t start, int32_t num_tokens,
                               bool samples)
{
    const qf_step_entry *entry = entry_of(plan, t);
    CHECK(entry != NULL);
    if (entry != NULL) {
        CHECK_INT(entry->start, start);
        CHECK_INT(entry->num_tokens, num_tokens);
        CHECK_INT(entry->samples, samples);
        CHECK_INT(entry->slot, t->seq.slot);
    }
}

#endif
