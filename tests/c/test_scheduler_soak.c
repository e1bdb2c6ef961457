/* The scheduler over long random schedules with a fake device. The device keeps, for every position of every block, a
 * hash of all tokens up to there; a step checks the whole context that it reads against what the sequence's tokens
 * give, and samples from the last hash. So each sequence must end with exactly the tokens that it would get alone.
 *
 * Half of the worlds have a 16-bit window over LAYERS layers. The device then keeps for each copy how many layers of it are
 * exact: the first always, layer m + 1 at a position where layer m is in all positions of its window. Every position
 * that is not recomputed for its copies alone must find all layers exact. */
/* sources: base/status.c base/alloc.c base/hash.c kv/block_pool.c sched/queue.c sched/scheduler.c sched/plan.c
 *          sched/check.c */
/* sanitizers: address */
#include "check.h"

#include <stdlib.h>

#include "kv/block_pool.h"
#include "kv/window.h"
#include "sched/scheduler.h"

#define MAX_JOBS 24
#define MAX_LEN 48
#define MAX_BLOCKS 64
#define MAX_SLOTS 8
#define LAYERS 2
#define MAX_WINDOW_BLOCKS (MAX_SLOTS * MAX_LEN)
#define VOCAB 3 /* few tokens: many shared prefixes */

typedef struct job {
    qf_seq seq;
    int32_t token_ids[MAX_LEN];
    int32_t block_table[MAX_LEN], window_table[MAX_LEN];
    int32_t expected[MAX_LEN]; /* the prompt and what it gives alone */
    uint64_t chain[MAX_LEN];   /* the device's hash at each position */
    int32_t stop_at;           /* finished when it has this many tokens */
    int32_t mask_for;          /* the position that the last mask was for, or -1 */
    uint64_t group;            /* sequences of a group share prompts */
    bool prompt_seen;          /* its prompt was computed once */
} job;

typedef struct step {
    qf_step_plan plan;
    int32_t tables[MAX_SLOTS][MAX_LEN]; /* as they were when the step was submitted */
    int32_t known[MAX_SLOTS];           /* num_tokens then */
    int32_t windows[MAX_SLOTS][MAX_LEN], window_first[MAX_SLOTS], shared[MAX_SLOTS]; /* the same of the window */
} step;

typedef struct world {
    uint64_t random;
    int32_t block_size, depth, budget;
    qf_block_pool *pool;
    qf_scheduler *scheduler;
    job *jobs[MAX_JOBS];
    step steps[2];
    int32_t first_step, num_steps; /* a ring of the steps in flight */
    uint64_t kv[MAX_BLOCKS][MAX_LEN];
    int32_t window;
    uint64_t copies[MAX_WINDOW_BLOCKS][MAX_LEN]; /* the hash of the position whose copy is there */
    int32_t exact[MAX_WINDOW_BLOCKS][MAX_LEN];   /* layers of it that are exact */
    int32_t slot_token[MAX_SLOTS];
    uint64_t next_id;
    int64_t num_finished, num_cancelled, num_hits;
} world;

static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static int32_t below(world *w, int32_t limit)
{
    w->random += 0x9e3779b97f4a7c15u;
    return (int32_t)(mix(w->random) % (uint64_t)limit);
}

static uint64_t chain_next(uint64_t before, int32_t token_id) { return mix(before * 31 + (uint64_t)token_id + 1); }

static void check_all(world *w)
{
    qf_error err;
    CHECK_OK(qf_scheduler_check(w->scheduler, &err));
}

static void add_job(world *w, int32_t max_len)
{
    int32_t index = below(w, MAX_JOBS);
    if (w->jobs[index] != NULL) {
        return;
    }
    job *j = calloc(1, sizeof *j);
    qf_seq *seq = &j->seq;
    seq->id = ++w->next_id;
    seq->owner = j;
    seq->priority = below(w, 3) == 0 ? below(w, 3) - 1 : 0;
    seq->max_total_tokens = 1 + below(w, max_len);
    seq->num_prompt_tokens = 1 + below(w, seq->max_total_tokens);
    seq->cache_salt = below(w, 8) == 0;
    seq->max_prefix_hit = below(w, 4) == 0 ? below(w, max_len) : INT32_MAX;
    seq->guided = below(w, 4) == 0;
    seq->token_ids = j->token_ids;
    seq->block_table = j->block_table;
    seq->window_table = w->window > 0 ? j->window_table : NULL;
    j->mask_for = -1;
    j->group = (uint64_t)below(w, 3);
    int32_t leader = below(w, MAX_JOBS);
    if (below(w, 3) == 0 && w->jobs[leader] != NULL) {
        seq->leader = &w->jobs[leader]->seq;
        j->group = w->jobs[leader]->group;
    }
    uint64_t hash = seq->cache_salt;
    for (int32_t i = 0; i < seq->max_total_tokens; i++) {
        bool prompt = i < seq->num_prompt_tokens;
        uint64_t source = prompt ? mix(j->group * 100 + (uint64_t)i) : hash;
        j->expected[i] = (int32_t)(source % VOCAB);
        if (prompt && i > 0 && i == seq->num_prompt_tokens - 1) {
            j->expected[i] = (int32_t)(seq->id % VOCAB);
        }
        j->token_ids[i] = prompt ? j->expected[i] : -99;
        hash = j->chain[i] = chain_next(hash, j->expected[i]);
    }
    int32_t num_out = seq->max_total_tokens - seq->num_prompt_tokens;
    j->stop_at = num_out > 0 ? seq->num_prompt_tokens + 1 + below(w, num_out) : seq->num_prompt_tokens;
    qf_error err;
    CHECK_OK(qf_scheduler_add(w->scheduler, seq, &err));
    w->jobs[index] = j;
}

static void end_job(world *w, job *j, bool cancelled)
{
    CHECK(memcmp(j->token_ids, j->expected, (size_t)j->seq.num_tokens * sizeof *j->token_ids) == 0);
    if (cancelled) {
        w->num_cancelled++;
    } else {
        CHECK_INT(j->seq.num_tokens, j->stop_at);
        w->num_finished++;
        w->num_hits += j->seq.num_cached_tokens;
    }
    qf_scheduler_finish(w->scheduler, &j->seq);
    qf_scheduler_finish(w->scheduler, &j->seq);
    CHECK_INT(j->seq.state, QF_SEQ_FINISHED);
}

/* Frees what is released, so that any later use of it is seen by the address sanitizer. */
static void free_released(world *w)
{
    for (int i = 0; i < MAX_JOBS; i++) {
        if (w->jobs[i] != NULL && w->jobs[i]->seq.released) {
            free(w->jobs[i]);
            w->jobs[i] = NULL;
        }
    }
}

/* The rules that the plan itself shows. */
static void check_entry(world *w, const qf_step_plan *plan, int32_t index)
{
    const qf_step_entry *entry = &plan->entries[index];
    qf_seq *seq = entry->seq;
    CHECK(seq->state == QF_SEQ_RUNNING && !seq->paused && entry->num_tokens > 0 && entry->slot == seq->slot);
    CHECK_INT(entry->start + entry->num_tokens, seq->num_computed_tokens);
    CHECK(seq->num_computed_tokens < seq->max_total_tokens || seq->num_prompt_tokens == seq->max_total_tokens);
    CHECK(!entry->samples || seq->num_pending_tokens >= 1);
    if (entry->samples && seq->guided) {
        CHECK_INT(((job *)seq->owner)->mask_for, entry->start + entry->num_tokens);
        CHECK_INT(seq->num_pending_tokens, 1);
    }
    for (int32_t i = 0; i < index; i++) {
        CHECK(plan->entries[i].seq != seq && plan->entries[i].slot != entry->slot);
    }
    step *s = &w->steps[(w->first_step + w->num_steps) % 2];
    memcpy(s->tables[index], seq->block_table, (size_t)seq->num_blocks * sizeof(int32_t));
    s->known[index] = seq->num_tokens;
    s->shared[index] = seq->num_shared_tokens;
    s->window_first[index] = seq->window_first;
    if (w->window > 0) {
        memcpy(s->windows[index], seq->window_table, (size_t)seq->window_end * sizeof(int32_t));
    }
}

static bool leader_was_ready(const job *leader)
{
    return leader->prompt_seen || leader->seq.state == QF_SEQ_FINISHED;
}

static int32_t schedule(world *w)
{
    bool held_back[MAX_JOBS] = {false};
    for (int i = 0; i < MAX_JOBS; i++) {
        job *j = w->jobs[i];
        held_back[i] = j != NULL && j->seq.state == QF_SEQ_WAITING && j->seq.leader != NULL &&
                       !leader_was_ready(j->seq.leader->owner);
    }
    step *s = &w->steps[(w->first_step + w->num_steps) % 2];
    qf_step_plan full = {0};
    qf_step_plan *plan = w->num_steps < w->depth ? &s->plan : &full;
    qf_scheduler_schedule(w->scheduler, plan);
    check_all(w);
    if (w->num_steps == w->depth) {
        CHECK_INT(plan->num_entries, 0);
        return 0;
    }
    int32_t num_tokens = 0;
    CHECK(plan->num_entries <= MAX_SLOTS);
    for (int32_t i = 0; i < plan->num_entries; i++) {
        check_entry(w, plan, i);
        num_tokens += plan->entries[i].num_tokens;
    }
    CHECK_INT(plan->num_tokens, num_tokens);
    CHECK(num_tokens <= w->budget);
    for (int i = 0; i < MAX_JOBS; i++) {
        CHECK(!held_back[i] || w->jobs[i]->seq.state == QF_SEQ_WAITING);
    }
    w->num_steps += plan->num_entries > 0;
    return plan->num_entries;
}

/* Writes the copy of position i, whose hash is given, and checks those that it reads. */
static void run_window(world *w, const step *s, int32_t index, int32_t i, uint64_t hash)
{
    const int32_t *table = s->windows[index];
    const job *j = s->plan.entries[index].seq->owner;
    const int32_t b = w->block_size;
    int32_t least = LAYERS;
    for (int32_t k = i - w->window + 1 > 0 ? i - w->window + 1 : 0; k < i; k++) {
        if (k / b < s->window_first[index]) {
            least = 0;
            continue;
        }
        CHECK(w->copies[table[k / b]][k % b] == j->chain[k]);
        const int32_t exact = w->exact[table[k / b]][k % b];
        least = exact < least ? exact : least;
    }
    CHECK(i < s->shared[index] || least == LAYERS);
    w->copies[table[i / b]][i % b] = hash;
    w->exact[table[i / b]][i % b] = least < LAYERS ? least + 1 : LAYERS;
}

/* Runs the oldest step on the fake device, all at once and as late as can be. */
static void run_entry(world *w, const step *s, int32_t index, int32_t *sampled)
{
    const qf_step_entry *entry = &s->plan.entries[index];
    const int32_t *table = s->tables[index];
    const job *j = entry->seq->owner;
    int32_t b = w->block_size;
    uint64_t hash = entry->seq->cache_salt;
    for (int32_t i = 0; i < entry->start; i++) {
        hash = w->kv[table[i / b]][i % b];
        CHECK(hash == j->chain[i]);
    }
    for (int32_t i = entry->start; i < entry->start + entry->num_tokens; i++) {
        int32_t token_id = i < s->known[index] ? j->token_ids[i] : w->slot_token[entry->slot];
        hash = chain_next(hash, token_id);
        if (i >= s->shared[index]) {
            w->kv[table[i / b]][i % b] = hash;
        }
        CHECK(w->kv[table[i / b]][i % b] == hash);
        if (w->window > 0) {
            run_window(w, s, index, i, hash);
        }
    }
    sampled[index] = (int32_t)(hash % VOCAB);
}

static void complete(world *w)
{
    step *s = &w->steps[w->first_step];
    int32_t sampled[MAX_SLOTS];
    for (int32_t i = 0; i < s->plan.num_entries; i++) {
        run_entry(w, s, i, sampled);
    }
    for (int32_t i = 0; i < s->plan.num_entries; i++) {
        const qf_step_entry *entry = &s->plan.entries[i];
        job *j = entry->seq->owner;
        if (!entry->samples) {
            continue;
        }
        w->slot_token[entry->slot] = sampled[i];
        bool finished = entry->seq->state == QF_SEQ_FINISHED;
        CHECK_INT(qf_scheduler_accept(w->scheduler, entry, sampled[i]), !finished);
        if (!finished && j->seq.num_tokens == j->stop_at) {
            end_job(w, j, false);
        }
    }
    check_all(w);
    qf_scheduler_complete(w->scheduler, &s->plan);
    w->first_step = (w->first_step + 1) % 2;
    w->num_steps--;
    check_all(w);
    for (int32_t i = 0; i < s->plan.num_entries; i++) {
        qf_seq *seq = s->plan.entries[i].seq;
        job *j = seq->owner;
        j->prompt_seen |= seq->num_completed_tokens >= seq->num_prompt_tokens ||
                          seq->num_tokens > seq->num_prompt_tokens;
        bool scoring = seq->num_prompt_tokens == seq->max_total_tokens;
        if (scoring && seq->state == QF_SEQ_RUNNING && seq->num_completed_tokens == seq->num_prompt_tokens) {
            end_job(w, j, false);
        }
    }
    check_all(w);
    free_released(w);
}

static void set_masks(world *w, int32_t one_in)
{
    for (int i = 0; i < MAX_JOBS; i++) {
        job *j = w->jobs[i];
        if (j != NULL && j->seq.guided && j->mask_for != j->seq.num_tokens && below(w, one_in) == 0) {
            j->mask_for = j->seq.num_tokens;
            qf_scheduler_set_mask_ready(w->scheduler, &j->seq);
        }
    }
}

static void random_event(world *w, int32_t max_len)
{
    job *j = w->jobs[below(w, MAX_JOBS)];
    switch (below(w, 12)) {
    case 0: case 1: add_job(w, max_len); break;
    case 2:
        if (j != NULL) {
            qf_scheduler_set_paused(w->scheduler, &j->seq, !j->seq.paused);
        }
        break;
    case 3:
        if (j != NULL && j->seq.state != QF_SEQ_FINISHED && below(w, 6) == 0) {
            end_job(w, j, true);
            check_all(w);
            free_released(w);
        }
        break;
    case 4: set_masks(w, 2); break;
    case 5:
        if (below(w, 40) == 0) {
            qf_block_pool_reset_prefix_cache(w->pool);
        }
        break;
    case 6: case 7: case 8: (void)schedule(w); break;
    default:
        if (w->num_steps > 0) {
            complete(w);
        }
    }
    check_all(w);
}

/* Nothing is paused and all masks are there: with no step in flight a step must always be possible. */
static void drain(world *w)
{
    for (int round = 0; qf_scheduler_has_work(w->scheduler); round++) {
        for (int i = 0; i < MAX_JOBS; i++) {
            if (w->jobs[i] != NULL) {
                qf_scheduler_set_paused(w->scheduler, &w->jobs[i]->seq, false);
            }
        }
        set_masks(w, 1);
        bool idle = w->num_steps == 0;
        int32_t num_entries = schedule(w);
        if ((idle && num_entries == 0) || round > 20000) {
            CHECK(!"the scheduler is stuck");
            return;
        }
        if (w->num_steps == w->depth || num_entries == 0) {
            complete(w);
        }
    }
    for (int i = 0; i < MAX_JOBS; i++) {
        CHECK(w->jobs[i] == NULL);
    }
    CHECK_INT(qf_block_pool_num_available(w->pool), qf_block_pool_num_blocks(w->pool));
    check_all(w);
}

static void soak(uint64_t seed, int32_t depth, int32_t num_events, uint64_t *num_preemptions, int64_t *num_hits)
{
    world *w = calloc(1, sizeof *w);
    w->random = seed;
    w->depth = depth;
    w->block_size = 1 + below(w, 5);
    w->budget = 1 + below(w, 24);
    int32_t num_blocks = 4 + below(w, 28);
    int32_t max_len = num_blocks * w->block_size < MAX_LEN ? num_blocks * w->block_size : MAX_LEN;
    qf_scheduler_config config = {
        .max_num_seqs = 1 + below(w, MAX_SLOTS),
        .max_num_batched_tokens = w->budget,
        .max_model_len = max_len,
        .max_steps_in_flight = depth,
    };
    w->window = seed % 2 == 0 ? 1 + below(w, 9) : 0;
    config.window_tokens = w->window;
    config.prefix_margin_tokens = LAYERS * (w->window > 0 ? w->window - 1 : 0);
    config.num_window_blocks = (int32_t)qf_kv_window_blocks(w->window, w->block_size, max_len, config.max_num_seqs,
                                                            w->budget);
    qf_error err;
    CHECK_OK(qf_block_pool_create(num_blocks, w->block_size, below(w, 4) > 0, seed, &w->pool, &err));
    CHECK_OK(qf_scheduler_create(&config, w->pool, &w->scheduler, &err));
    for (int i = 0; i < 2; i++) {
        CHECK_OK(qf_step_plan_init(&w->steps[i].plan, config.max_num_seqs, &err));
    }
    for (int i = 0; i < num_events; i++) {
        random_event(w, max_len);
    }
    drain(w);
    qf_scheduler_stats stats;
    qf_scheduler_get_stats(w->scheduler, &stats);
    CHECK_INT(stats.num_running + stats.num_waiting + stats.num_paused, 0);
    *num_preemptions += stats.num_preemptions;
    *num_hits += w->num_hits;
    CHECK(w->num_finished > 0);
    for (int i = 0; i < 2; i++) {
        qf_step_plan_deinit(&w->steps[i].plan);
    }
    for (int i = 0; i < MAX_JOBS; i++) {
        free(w->jobs[i]); /* only there after a failure */
    }
    qf_scheduler_destroy(w->scheduler);
    qf_block_pool_destroy(w->pool);
    free(w);
}

static void soak_depth(int32_t depth)
{
    uint64_t num_preemptions = 0;
    int64_t num_hits = 0;
    for (uint64_t seed = 1; seed <= 60; seed++) {
        soak(seed * 7919 + (uint64_t)depth, depth, 1500, &num_preemptions, &num_hits);
    }
    printf("depth %d: %llu preemptions, %lld tokens hit\n", depth, (unsigned long long)num_preemptions,
           (long long)num_hits);
    CHECK(num_preemptions > 300);
    CHECK(num_hits > 1000);
}

static void test_soak_one_step_in_flight(void) { soak_depth(1); }
static void test_soak_two_steps_in_flight(void) { soak_depth(2); }

int main(void)
{
    RUN(test_soak_one_step_in_flight);
    RUN(test_soak_two_steps_in_flight);
    return check_report();
}
