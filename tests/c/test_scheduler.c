/* The scheduler's rules, one by one: what is planned. Memory is in test_scheduler_memory.c, random schedules are in
 * test_scheduler_soak.c. */
/* sources: base/status.c base/alloc.c base/hash.c kv/block_pool.c sched/queue.c sched/scheduler.c sched/plan.c
 *          sched/check.c */
/* sanitizers: address */
/* alloc-faults: yes */
#include "check.h"

#include <stdlib.h>

#include "scheduler_fixture.h"

static void test_chunks_share_the_budget(void)
{
    fixture f = make(16, 4, 6, 1);
    test_seq a, b;
    fill(&a, 0, 4, 6);
    fill(&b, 100, 9, 12);
    add(&f, &a);
    add(&f, &b);
    CHECK_INT(schedule(&f, &f.first), 2);
    CHECK_INT(f.first.step, 1);
    CHECK_INT(f.first.num_tokens, 6);
    check_entry(&f.first, &a, 0, 4, true);
    check_entry(&f.first, &b, 0, 2, false);
    CHECK_INT(schedule(&f, &f.second), 0); /* one step in flight at most */
    CHECK_INT(f.second.step, 0);
    complete(&f, &f.first);
    CHECK_INT(a.token_ids[4], 1004);
    CHECK_INT(schedule(&f, &f.first), 2);
    CHECK_INT(f.first.step, 2);
    check_entry(&f.first, &a, 4, 1, true);
    check_entry(&f.first, &b, 2, 5, false);
    complete(&f, &f.first);
    CHECK_INT(a.seq.num_tokens, 6); /* at its limit: its last token is never fed */
    CHECK_INT(schedule(&f, &f.first), 1);
    check_entry(&f.first, &b, 7, 2, true);
    complete(&f, &f.first);
    finish(&f, &a);
    CHECK(a.seq.released);
    finish(&f, &b);
    drop(&f);
}

static void test_two_steps_in_flight(void)
{
    fixture f = make(16, 4, 16, 2);
    qf_step_plan third;
    qf_error err;
    CHECK_OK(qf_step_plan_init(&third, 4, &err));
    test_seq a;
    fill(&a, 0, 3, 5);
    add(&f, &a);
    CHECK_INT(schedule(&f, &f.first), 1);
    check_entry(&f.first, &a, 0, 3, true);
    CHECK_INT(schedule(&f, &f.second), 1);
    check_entry(&f.second, &a, 3, 1, true); /* feeds the token that is not known yet */
    CHECK_INT(a.seq.num_pending_tokens, 2);
    CHECK_INT(schedule(&f, &third), 0);
    complete(&f, &f.first);
    CHECK_INT(schedule(&f, &third), 0); /* 4 known and 1 pending: all 5 tokens are there or on their way */
    complete(&f, &f.second);
    CHECK_INT(a.seq.num_tokens, 5);
    CHECK_INT(a.seq.num_completed_tokens, 4);
    finish(&f, &a);
    qf_step_plan_deinit(&third);
    drop(&f);
}

static void test_nothing_sampled(void)
{
    fixture f = make(16, 4, 4, 2);
    test_seq a;
    fill(&a, 0, 7, 7);
    add(&f, &a);
    CHECK_INT(schedule(&f, &f.first), 1);
    check_entry(&f.first, &a, 0, 4, false);
    CHECK_INT(schedule(&f, &f.second), 1);
    check_entry(&f.second, &a, 4, 3, false);
    complete(&f, &f.first);
    complete(&f, &f.second);
    CHECK_INT(a.seq.num_completed_tokens, 7);
    CHECK_INT(step(&f), 0);
    finish(&f, &a);
    CHECK(a.seq.released);
    drop(&f);
}

static void test_guided(void)
{
    fixture f = make(16, 4, 16, 2);
    test_seq a;
    fill(&a, 0, 6, 20);
    a.seq.guided = true;
    add(&f, &a);
    CHECK_INT(schedule(&f, &f.first), 1);
    check_entry(&f.first, &a, 0, 5, false); /* all but the position that needs the mask */
    CHECK_INT(schedule(&f, &f.second), 0);
    qf_scheduler_set_mask_ready(f.scheduler, &a.seq);
    CHECK_INT(schedule(&f, &f.second), 1);
    check_entry(&f.second, &a, 5, 1, true);
    CHECK(!a.seq.mask_ready);
    complete(&f, &f.first);
    qf_scheduler_set_mask_ready(f.scheduler, &a.seq);
    CHECK_INT(schedule(&f, &f.first), 0); /* the mask is there, but the token before is not known yet */
    complete(&f, &f.second);
    CHECK_INT(schedule(&f, &f.first), 1);
    check_entry(&f.first, &a, 6, 1, true);
    complete(&f, &f.first);
    finish(&f, &a);

    test_seq b, c;
    fill(&b, 100, 1, 4); /* nothing of it can run without the mask: it does not hold others back */
    b.seq.guided = true;
    fill(&c, 200, 2, 4);
    add(&f, &b);
    add(&f, &c);
    CHECK_INT(schedule(&f, &f.first), 1);
    CHECK(entry_of(&f.first, &c) != NULL);
    complete(&f, &f.first);
    finish(&f, &b);
    finish(&f, &c);
    drop(&f);
}

static void test_leader(void)
{
    fixture f = make(16, 4, 5, 1);
    test_seq leader, follower, orphan;
    fill(&leader, 0, 9, 12);
    fill(&follower, 0, 9, 12);
    follower.seq.leader = &leader.seq;
    add(&f, &leader);
    add(&f, &follower);
    CHECK_INT(step(&f), 1);
    CHECK_INT(schedule(&f, &f.first), 1); /* budget is left, but the leader is not done */
    CHECK_INT(f.first.num_tokens, 4);
    complete(&f, &f.first);
    CHECK_INT(schedule(&f, &f.first), 2);
    check_entry(&f.first, &follower, 8, 1, true); /* two blocks from the leader's prompt */
    CHECK_INT(follower.seq.num_cached_tokens, 8);
    CHECK(follower.seq.leader == NULL);
    CHECK_INT(leader.seq.num_followers, 0);
    complete(&f, &f.first);
    finish(&f, &follower);
    finish(&f, &leader);

    fill(&leader, 500, 9, 12);
    fill(&orphan, 500, 9, 12);
    orphan.seq.leader = &leader.seq;
    add(&f, &leader);
    add(&f, &orphan);
    finish(&f, &leader); /* its memory may go now */
    CHECK(leader.seq.released && orphan.seq.leader == NULL);
    CHECK_INT(step(&f), 1);
    finish(&f, &orphan);

    fill(&follower, 600, 2, 3);
    follower.seq.leader = &leader.seq; /* finished already */
    add(&f, &follower);
    CHECK(follower.seq.leader == NULL);
    finish(&f, &follower);
    drop(&f);
}

static void test_finish_with_steps_in_flight(void)
{
    fixture f = make(8, 1, 16, 2);
    test_seq a, b;
    fill(&a, 0, 4, 12);
    fill(&b, 100, 4, 12);
    add(&f, &a);
    add(&f, &b);
    CHECK_INT(schedule(&f, &f.first), 1);
    CHECK_INT(schedule(&f, &f.second), 1);
    CHECK(qf_scheduler_accept(f.scheduler, &f.first.entries[0], 7));
    finish(&f, &a);
    finish(&f, &a);
    CHECK(!a.seq.released);
    qf_scheduler_complete(f.scheduler, &f.first);
    check(&f);
    CHECK_INT(schedule(&f, &f.first), 0); /* the only slot is not back yet */
    CHECK(!qf_scheduler_accept(f.scheduler, &f.second.entries[0], 8));
    CHECK_INT(a.seq.num_tokens, 5);
    qf_scheduler_complete(f.scheduler, &f.second);
    check(&f);
    CHECK(a.seq.released);
    CHECK_INT(qf_block_pool_num_cached(f.pool), 1); /* published after it was finished */
    CHECK_INT(step(&f), 1);
    finish(&f, &b);

    test_seq never;
    fill(&never, 0, 1, 1);
    qf_scheduler_finish(f.scheduler, &never.seq);
    CHECK(never.seq.released);
    qf_scheduler_set_paused(f.scheduler, &never.seq, true);
    CHECK(!never.seq.paused);
    drop(&f);
}

/* Runs one prompt of 12 tokens to its end, so that 3 blocks are cached, then probes with another. */
/* Two equal prompts computed side by side: the second's blocks are duplicates, its later blocks are still found. */
static void test_refusals(void)
{
    fixture f = make(4, 2, 8, 1);
    qf_error err;
    test_seq a, b;
    fill(&a, 0, 4, 17); /* 16 tokens fit into the pool */
    CHECK_STATUS(qf_scheduler_add(f.scheduler, &a.seq, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(strstr(err.message, "17 tokens") != NULL && strstr(err.message, "4 blocks of 4 tokens") != NULL);
    a.seq.max_total_tokens = MAX_LEN + 1;
    CHECK_STATUS(qf_scheduler_add(f.scheduler, &a.seq, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(strstr(err.message, "max_model_len is 64") != NULL);
    a.seq.max_total_tokens = 3;
    CHECK_STATUS(qf_scheduler_add(f.scheduler, &a.seq, &err), QF_ERROR_INVALID_ARGUMENT);
    a.seq.max_total_tokens = 16;
    a.seq.num_prompt_tokens = 0;
    CHECK_STATUS(qf_scheduler_add(f.scheduler, &a.seq, &err), QF_ERROR_INVALID_ARGUMENT);
    a.seq.num_prompt_tokens = 4;
    a.seq.max_prefix_hit = -1;
    CHECK_STATUS(qf_scheduler_add(f.scheduler, &a.seq, &err), QF_ERROR_INVALID_ARGUMENT);
    a.seq.max_prefix_hit = 0;
    fill(&b, 0, 1, 1);
    a.seq.leader = &b.seq; /* not added */
    CHECK_STATUS(qf_scheduler_add(f.scheduler, &a.seq, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_INT(a.seq.state, QF_SEQ_NEW);
    a.seq.leader = NULL;
    add(&f, &a);
    finish(&f, &a);
    drop(&f);

    qf_scheduler *scheduler;
    const qf_scheduler_config bad[] = {
        {0, 1, 1, 1, 0, 0, 0}, {1, 0, 1, 1, 0, 0, 0}, {1, 1, 0, 1, 0, 0, 0}, {1, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 3, 0, 0, 0}, {1, 1, 9, 1, -1, 9, 0}, {1, 1, 9, 1, 3, 9, -1}, {1, 1, 9, 1, 3, 1, 0}};
    qf_block_pool *pool;
    CHECK_OK(qf_block_pool_create(1, 1, false, 0, &pool, &err));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK_STATUS(qf_scheduler_create(&bad[i], pool, &scheduler, &err), QF_ERROR_INVALID_ARGUMENT);
        CHECK(scheduler == NULL);
    }
    qf_step_plan plan;
    CHECK_STATUS(qf_step_plan_init(&plan, 0, &err), QF_ERROR_INVALID_ARGUMENT);
    qf_step_plan_deinit(&plan);
    qf_scheduler_destroy(NULL);
    qf_block_pool_destroy(pool);
}

static void test_ten_thousand_waiting(void)
{
    enum { COUNT = 10000 };
    fixture f = make(8, 2, 8, 1);
    test_seq *seqs = calloc(COUNT, sizeof *seqs);
    qf_error err;
    for (int32_t i = 0; i < COUNT; i++) {
        fill(&seqs[i], i * 2, 2, 3);
        seqs[i].seq.priority = i % 2;
        CHECK_OK(qf_scheduler_add(f.scheduler, &seqs[i].seq, &err));
    }
    check(&f);
    for (int32_t i = 0; i < COUNT; i += 2) { /* even ones have the better priority: all before the odd ones */
        int32_t index = i < COUNT / 2 ? i * 2 : (i - COUNT / 2) * 2 + 1;
        qf_scheduler_schedule(f.scheduler, &f.first);
        CHECK(f.first.num_entries == 2 && f.first.entries[0].seq == &seqs[index].seq);
        for (int32_t k = 0; k < f.first.num_entries; k++) {
            CHECK(qf_scheduler_accept(f.scheduler, &f.first.entries[k], 1));
            qf_scheduler_finish(f.scheduler, f.first.entries[k].seq);
        }
        qf_scheduler_complete(f.scheduler, &f.first);
    }
    drop(&f);
    free(seqs);
}

#ifdef CHECK_ALLOC_FAULTS
static qf_status create_all(qf_error *err)
{
    const qf_scheduler_config config = {3, 8, MAX_LEN, 2, 7, 3 * MAX_LEN, 12};
    qf_block_pool *pool;
    qf_scheduler *scheduler = NULL;
    qf_step_plan plan = {0};
    qf_status status = qf_block_pool_create(5, BLOCK, true, 1, &pool, err);
    if (status == QF_OK) {
        status = qf_scheduler_create(&config, pool, &scheduler, err);
    }
    if (status == QF_OK) {
        status = qf_step_plan_init(&plan, config.max_num_seqs, err);
    }
    qf_step_plan_deinit(&plan);
    qf_scheduler_destroy(scheduler);
    qf_block_pool_destroy(pool);
    return status;
}

static void test_alloc_faults(void)
{
    for (int64_t n = 1;; n++) {
        qf_error err;
        check_fail_alloc(n);
        qf_status status = create_all(&err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_STATUS(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        if (!failed) {
            CHECK(n > 8);
            break;
        }
    }
}

/* The step path never allocates: it works while every allocation would fail. */
static void test_no_allocation_after_creation(void)
{
    fixture f = make(4, 2, 16, 1);
    test_seq a, b;
    fill(&a, 0, 6, 12);
    fill(&b, 100, 6, 12);
    check_fail_alloc(1);
    add(&f, &a);
    add(&f, &b);
    for (int i = 0; i < 4; i++) {
        CHECK(step(&f) > 0);
    }
    finish(&f, &a);
    CHECK_INT(step(&f), 1);
    finish(&f, &b);
    CHECK(!check_alloc_failed());
    check_fail_alloc(0);
    drop(&f);
}
#endif

int main(void)
{
    RUN(test_chunks_share_the_budget);
    RUN(test_two_steps_in_flight);
    RUN(test_nothing_sampled);
    RUN(test_guided);
    RUN(test_leader);
    RUN(test_finish_with_steps_in_flight);
    RUN(test_refusals);
    RUN(test_ten_thousand_waiting);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_alloc_faults);
    RUN(test_no_allocation_after_creation);
#endif
    return check_report();
}
