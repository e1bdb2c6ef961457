/* The scheduler's rules, one by one: who holds blocks, who gives them up, and prefix hits. */
/* sources: base/status.c base/alloc.c base/hash.c kv/block_pool.c sched/queue.c sched/scheduler.c sched/plan.c
 *          sched/check.c */
/* sanitizers: address */
#include "check.h"

#include "scheduler_fixture.h"

static void test_paused(void)
{
    fixture f = make(4, 2, 16, 1);
    test_seq a, b, c;
    fill(&a, 0, 4, 16);
    fill(&b, 100, 4, 16);
    fill(&c, 200, 4, 12);
    add(&f, &a);
    add(&f, &b);
    CHECK_INT(step(&f), 2);
    qf_scheduler_set_paused(f.scheduler, &a.seq, true);
    CHECK_INT(schedule(&f, &f.first), 1);
    CHECK(entry_of(&f.first, &b) != NULL);
    complete(&f, &f.first);
    CHECK_INT(a.seq.num_blocks, 1); /* it keeps what it has */
    qf_scheduler_stats stats;
    qf_scheduler_get_stats(f.scheduler, &stats);
    CHECK_INT(stats.num_paused, 1);
    add(&f, &c); /* both slots are taken: the paused one makes room, though it ranks first */
    CHECK_INT(schedule(&f, &f.first), 2);
    CHECK_INT(a.seq.state, QF_SEQ_WAITING);
    CHECK_INT(a.seq.num_preemptions, 1);
    CHECK(entry_of(&f.first, &c) != NULL);
    complete(&f, &f.first);
    qf_scheduler_set_paused(f.scheduler, &a.seq, false);
    finish(&f, &b);
    CHECK_INT(schedule(&f, &f.first), 2);
    check_entry(&f.first, &a, 4, 1, true); /* its own first block is still cached */
    CHECK_INT(a.seq.num_cached_tokens, 0); /* but only the first admission counts */
    complete(&f, &f.first);
    finish(&f, &a);
    finish(&f, &c);
    drop(&f);
}

static void test_paused_is_the_first_victim(void)
{
    fixture f = make(3, 4, 16, 1);
    test_seq a, b, c;
    fill(&a, 0, 4, 12);
    fill(&b, 100, 4, 12);
    fill(&c, 200, 3, 12);
    add(&f, &a);
    add(&f, &b);
    add(&f, &c);
    CHECK_INT(step(&f), 3);
    qf_scheduler_set_paused(f.scheduler, &a.seq, true);
    CHECK_INT(schedule(&f, &f.first), 2); /* b takes the paused one's block, not that of c, which ranks below */
    CHECK_INT(a.seq.state, QF_SEQ_WAITING);
    CHECK_INT(b.seq.num_blocks, 2);
    CHECK_INT(c.seq.num_blocks, 1);
    complete(&f, &f.first);
    finish(&f, &a);
    finish(&f, &b);
    finish(&f, &c);
    drop(&f);
}

static void test_preemption_takes_the_worst(void)
{
    fixture f = make(3, 4, 16, 1);
    test_seq urgent, early, late, next;
    fill(&early, 0, 4, 12);
    fill(&late, 100, 3, 12);
    fill(&urgent, 200, 4, 12);
    fill(&next, 300, 2, 4);
    urgent.seq.priority = -1;
    late.seq.priority = 1;
    early.seq.priority = 1;
    add(&f, &early);
    add(&f, &late);
    add(&f, &urgent);
    CHECK_INT(schedule(&f, &f.first), 3);
    CHECK(f.first.entries[0].seq == &urgent.seq && f.first.entries[2].seq == &late.seq);
    complete(&f, &f.first);
    next.seq.priority = -2;
    add(&f, &next); /* ranks first, but nothing is admitted in a step that preempts */
    CHECK_INT(schedule(&f, &f.first), 1);
    check_entry(&f.first, &urgent, 4, 1, true);
    CHECK_INT(late.seq.num_preemptions, 1);
    CHECK_INT(early.seq.num_preemptions, 1); /* it needed a block too, and was the worst that was left */
    CHECK_INT(next.seq.state, QF_SEQ_WAITING);
    complete(&f, &f.first);
    CHECK_INT(schedule(&f, &f.first), 2); /* `early` needs 2 blocks and 0 are left; `late` may not overtake it */
    CHECK(entry_of(&f.first, &next) != NULL && entry_of(&f.first, &urgent) != NULL);
    complete(&f, &f.first);
    finish(&f, &urgent);
    finish(&f, &next);
    CHECK_INT(step(&f), 2);
    qf_scheduler_stats stats;
    qf_scheduler_get_stats(f.scheduler, &stats);
    CHECK_INT(stats.num_preemptions, 2);
    finish(&f, &early);
    finish(&f, &late);
    drop(&f);
}

static void test_victim_with_steps_in_flight(void)
{
    fixture f = make(2, 2, 16, 2);
    test_seq a, b, later;
    fill(&a, 0, 3, 8);
    fill(&b, 100, 3, 8);
    fill(&later, 200, 3, 8);
    add(&f, &a);
    add(&f, &b);
    add(&f, &later);
    CHECK_INT(schedule(&f, &f.first), 2);
    CHECK_INT(schedule(&f, &f.second), 2); /* both fill their first block */
    complete(&f, &f.first);
    CHECK_INT(schedule(&f, &f.first), 0); /* a needs a block; b is the victim, but a step in flight uses its block */
    CHECK_INT(b.seq.state, QF_SEQ_WAITING);
    CHECK_INT(b.seq.num_blocks, 1);
    CHECK(b.seq.slot >= 0 && b.seq.release_when_idle);
    CHECK_INT(schedule(&f, &f.first), 0); /* nobody else is preempted meanwhile */
    CHECK_INT(a.seq.state, QF_SEQ_RUNNING);
    complete(&f, &f.second);
    CHECK_INT(b.seq.num_blocks, 0);
    CHECK_INT(b.seq.slot, -1);
    CHECK_INT(b.seq.num_tokens, 5); /* the token sampled in its older life counts */
    CHECK_INT(b.seq.num_computed_tokens, 0);
    CHECK_INT(b.seq.num_published_blocks, 0);
    CHECK_INT(schedule(&f, &f.first), 1);
    check_entry(&f.first, &a, 4, 1, true);
    complete(&f, &f.first);
    finish(&f, &a);
    CHECK_INT(schedule(&f, &f.first), 1); /* b is back in its place, before the one that arrived later */
    check_entry(&f.first, &b, 0, 5, true);
    CHECK_INT(f.first.entries[0].preemptions, 1);
    complete(&f, &f.first);
    finish(&f, &b);
    finish(&f, &later);
    drop(&f);
}

static void test_own_victim(void)
{
    fixture f = make(2, 2, 16, 1);
    test_seq a, b, urgent;
    fill(&a, 0, 4, 8);
    a.seq.guided = true;
    fill(&b, 100, 4, 8);
    fill(&urgent, 200, 2, 4);
    urgent.seq.priority = -1;
    add(&f, &a);
    add(&f, &b);
    CHECK_INT(step(&f), 2);
    add(&f, &urgent);
    CHECK_INT(schedule(&f, &f.first), 1); /* b is the worst and makes room; the step would be empty without more */
    CHECK_INT(b.seq.state, QF_SEQ_WAITING);
    CHECK(entry_of(&f.first, &urgent) != NULL);
    complete(&f, &f.first);
    finish(&f, &a);
    finish(&f, &b);
    finish(&f, &urgent);
    drop(&f);
}

static void test_paused_makes_room_only_where_it_helps(void)
{
    fixture f = make(3, 4, 16, 1);
    test_seq idle, busy, large, small;
    fill(&idle, 0, 3, 4);
    fill(&busy, 100, 5, 8);
    fill(&large, 200, 9, 12);
    fill(&small, 300, 3, 4);
    add(&f, &idle);
    add(&f, &busy);
    CHECK_INT(step(&f), 2); /* all 3 blocks are in use */
    qf_scheduler_set_paused(f.scheduler, &idle.seq, true);
    add(&f, &large);
    CHECK_INT(step(&f), 1);
    CHECK_INT(idle.seq.state, QF_SEQ_RUNNING); /* its block would not have been enough */
    finish(&f, &large);
    add(&f, &small);
    CHECK_INT(step(&f), 2);
    CHECK_INT(idle.seq.state, QF_SEQ_WAITING);
    CHECK_INT(small.seq.state, QF_SEQ_RUNNING);
    finish(&f, &idle);
    finish(&f, &busy);
    finish(&f, &small);
    drop(&f);
}

static int32_t cached_tokens_for(int32_t num_prompt, int32_t max_prefix_hit, uint64_t salt)
{
    fixture f = make(16, 2, 32, 1);
    test_seq a, b;
    fill(&a, 0, 12, 13);
    add(&f, &a);
    CHECK_INT(step(&f), 1);
    finish(&f, &a);
    CHECK_INT(qf_block_pool_num_cached(f.pool), 3);
    fill(&b, 0, num_prompt, num_prompt + 2);
    b.seq.max_prefix_hit = max_prefix_hit;
    b.seq.cache_salt = salt;
    add(&f, &b);
    CHECK_INT(schedule(&f, &f.first), 1);
    check_entry(&f.first, &b, b.seq.num_cached_tokens, num_prompt - b.seq.num_cached_tokens, true);
    qf_scheduler_stats stats;
    qf_scheduler_get_stats(f.scheduler, &stats);
    CHECK_INT(stats.prefix_queried_tokens, 12 + num_prompt);
    CHECK_INT(stats.prefix_hit_tokens, b.seq.num_cached_tokens);
    complete(&f, &f.first);
    finish(&f, &b);
    drop(&f);
    return b.seq.num_cached_tokens;
}

static void test_prefix_hits(void)
{
    CHECK_INT(cached_tokens_for(13, INT32_MAX, 0), 12);
    CHECK_INT(cached_tokens_for(12, INT32_MAX, 0), 8); /* one token at least is computed */
    CHECK_INT(cached_tokens_for(11, INT32_MAX, 0), 8);
    CHECK_INT(cached_tokens_for(4, INT32_MAX, 0), 0);
    CHECK_INT(cached_tokens_for(13, 11, 0), 8); /* the limit, rounded down to blocks */
    CHECK_INT(cached_tokens_for(13, 0, 0), 0);
    CHECK_INT(cached_tokens_for(13, INT32_MAX, 5), 0);
}

static void test_duplicates_continue_the_chain(void)
{
    fixture f = make(16, 2, 32, 1);
    test_seq a, b, c;
    fill(&a, 0, 8, 9);
    fill(&b, 0, 12, 13);
    add(&f, &a);
    add(&f, &b);
    CHECK_INT(step(&f), 2);
    CHECK(a.block_table[0] != b.block_table[0]);
    CHECK(qf_block_pool_is_published(f.pool, a.block_table[1]));
    CHECK(!qf_block_pool_is_published(f.pool, b.block_table[1]));
    CHECK(qf_block_pool_is_published(f.pool, b.block_table[2]));
    fill(&c, 0, 14, 15);
    int32_t shared = b.block_table[2];
    finish(&f, &a);
    finish(&f, &b);
    add(&f, &c);
    CHECK_INT(schedule(&f, &f.first), 1);
    CHECK_INT(c.seq.num_cached_tokens, 12);
    CHECK_INT(c.block_table[2], shared);
    complete(&f, &f.first);
    finish(&f, &c);
    drop(&f);
}

static void test_what_comes_back_is_waited_for(void)
{
    fixture f = make(4, 2, 16, 2);
    test_seq a, b, c;
    fill(&a, 0, 3, 8);
    fill(&b, 100, 3, 8);
    fill(&c, 200, 3, 8);
    add(&f, &a);
    add(&f, &b);
    CHECK_INT(step(&f), 2);
    qf_scheduler_set_paused(f.scheduler, &b.seq, true);
    CHECK_INT(schedule(&f, &f.first), 1);
    finish(&f, &a);
    add(&f, &c);
    CHECK_INT(schedule(&f, &f.second), 0); /* a slot is on its way back: the paused sequence keeps its own */
    CHECK_INT(b.seq.state, QF_SEQ_RUNNING);
    complete(&f, &f.first);
    CHECK_INT(step(&f), 1);
    CHECK_INT(c.seq.state, QF_SEQ_RUNNING);
    CHECK_INT(b.seq.num_preemptions, 0);
    finish(&f, &b);
    finish(&f, &c);
    drop(&f);
}

int main(void)
{
    RUN(test_paused);
    RUN(test_paused_is_the_first_victim);
    RUN(test_preemption_takes_the_worst);
    RUN(test_victim_with_steps_in_flight);
    RUN(test_own_victim);
    RUN(test_paused_makes_room_only_where_it_helps);
    RUN(test_what_comes_back_is_waited_for);
    RUN(test_prefix_hits);
    RUN(test_duplicates_continue_the_chain);
    return check_report();
}
