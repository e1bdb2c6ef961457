/* sources: base/threads.c base/status.c base/alloc.c */
/* sanitizers: address thread */
/* alloc-faults: yes */
#include "base/threads.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

#define MAX_TOTAL 1000

/* Plain, not atomic: ThreadSanitizer then proves that every item has one owner, and that what a worker wrote is
 * seen by the caller once the run returns. */
typedef struct tally {
    int counts[MAX_TOTAL];
    int64_t begins[MAX_TOTAL], ends[MAX_TOTAL]; /* by item: the chunk that handled it */
    int64_t per_worker[16];
    int32_t num_threads;
    int64_t grain;
} tally;

static void count_items(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    tally *t = arg;
    CHECK(worker >= 0 && worker < t->num_threads);
    t->per_worker[worker] += end - begin; /* one thread per index at a time, or this is a race */
    for (int64_t i = begin; i < end; i++) {
        t->counts[i]++;
        t->begins[i] = begin;
        t->ends[i] = end;
    }
}

static void check_cover(qf_thread_pool *pool, int64_t total, int64_t grain)
{
    tally t = {.num_threads = qf_thread_pool_size(pool), .grain = grain};
    qf_thread_pool_run(pool, count_items, &t, total, grain);
    int64_t sum = 0;
    for (int32_t w = 0; w < t.num_threads; w++) {
        sum += t.per_worker[w];
    }
    CHECK_INT(sum, total > 0 ? total : 0);
    bool once = true, chunked = true;
    for (int64_t i = 0; i < MAX_TOTAL; i++) {
        once = once && t.counts[i] == (i < total ? 1 : 0);
        if (i < total) {
            /* The chunks are those of one thread, whoever ran them. */
            int64_t begin = i / grain * grain;
            int64_t end = total - begin > grain ? begin + grain : total;
            chunked = chunked && t.begins[i] == begin && t.ends[i] == end;
        }
    }
    CHECK(once);
    CHECK(chunked);
}

static void test_every_item_once(void)
{
    static const int64_t totals[] = {-1, 0, 1, 2, 3, 17, 118, 1000};
    static const int64_t grains[] = {1, 2, 3, 17, 118, 999, 1000, 5000, INT64_MAX};
    for (int32_t num_threads = 1; num_threads <= 5; num_threads++) {
        qf_error err;
        qf_thread_pool *pool = NULL;
        CHECK_OK(qf_thread_pool_create(num_threads, &pool, &err));
        CHECK_INT(qf_thread_pool_size(pool), num_threads);
        for (size_t i = 0; i < sizeof totals / sizeof totals[0]; i++) {
            for (size_t j = 0; j < sizeof grains / sizeof grains[0]; j++) {
                check_cover(pool, totals[i], grains[j]);
            }
        }
        qf_thread_pool_destroy(pool);
    }
}

typedef struct chain {
    int64_t values[2][64]; /* (round % 2, item) */
    int round;
} chain;

/* Every item needs its neighbours of the round before, which other threads wrote. */
static void next_round(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    chain *c = arg;
    (void)worker;
    const int64_t *from = c->values[c->round % 2];
    int64_t *to = c->values[(c->round + 1) % 2];
    for (int64_t i = begin; i < end; i++) {
        to[i] = (from[(i + 1) % 64] + 2 * from[(i + 63) % 64]) % 1000003;
    }
}

/* Many short runs one after the other: the publishing, sleeping and waking is where a pool goes wrong. */
static void test_many_runs(void)
{
    int64_t expected = -1;
    for (int32_t num_threads = 1; num_threads <= 6; num_threads++) {
        qf_error err;
        qf_thread_pool *pool = NULL;
        chain c = {.round = 0};
        for (int i = 0; i < 64; i++) {
            c.values[0][i] = i;
        }
        CHECK_OK(qf_thread_pool_create(num_threads, &pool, &err));
        for (; c.round < 3000; c.round++) {
            qf_thread_pool_run(pool, next_round, &c, 64, 1 + c.round % 40);
            if (c.round % 500 == 0) {
                struct timespec pause = {0, 200000}; /* long enough for every worker to go to sleep */
                (void)nanosleep(&pause, NULL);
            }
        }
        qf_thread_pool_destroy(pool);
        int64_t sum = 0;
        for (int i = 0; i < 64; i++) {
            sum = (sum * 31 + c.values[c.round % 2][i]) % 1000003;
        }
        expected = expected < 0 ? sum : expected;
        CHECK_INT(sum, expected); /* the same for every number of threads */
    }
}

static void sleep_a_little(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    int64_t *done = arg;
    (void)worker;
    struct timespec pause = {0, 2000000};
    (void)nanosleep(&pause, NULL);
    for (int64_t i = begin; i < end; i++) {
        done[i]++;
    }
}

/* Chunks that last longer than any spin: the caller sleeps and must be woken. All threads have to take part for the
 * runs to last about 2 ms each, so this also sees workers that are never woken. */
static void test_long_chunks_and_waking(void)
{
    qf_error err;
    qf_thread_pool *pool = NULL;
    CHECK_OK(qf_thread_pool_create(4, &pool, &err));
    for (int run = 0; run < 10; run++) {
        int64_t done[4] = {0};
        qf_thread_pool_run(pool, sleep_a_little, done, 4, 1);
        CHECK(done[0] == 1 && done[1] == 1 && done[2] == 1 && done[3] == 1);
    }
    qf_thread_pool_destroy(pool);
}

typedef struct meeting {
    atomic_int arrived;
    int expected;
    bool all_came[8];
} meeting;

/* Each chunk waits for the others: only as many threads as chunks can finish this. */
static void meet(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    meeting *m = arg;
    (void)end;
    (void)worker;
    atomic_fetch_add(&m->arrived, 1);
    for (int i = 0; i < 20000 && atomic_load(&m->arrived) < m->expected; i++) {
        struct timespec pause = {0, 500000};
        (void)nanosleep(&pause, NULL);
    }
    m->all_came[begin] = atomic_load(&m->arrived) == m->expected;
}

static void test_threads_run_at_once(void)
{
    qf_error err;
    qf_thread_pool *pool = NULL;
    CHECK_OK(qf_thread_pool_create(8, &pool, &err));
    for (int run = 0; run < 5; run++) {
        meeting m = {.expected = 8};
        qf_thread_pool_run(pool, meet, &m, 8, 1);
        for (int i = 0; i < 8; i++) {
            CHECK(m.all_came[i]);
        }
    }
    qf_thread_pool_destroy(pool);
}

static void remember_thread(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    pthread_t *thread = arg;
    CHECK(begin == 0 && end == 5 && worker == 0);
    *thread = pthread_self();
}

static void test_small_runs_are_inline(void)
{
    qf_error err;
    qf_thread_pool *pool = NULL;
    CHECK_OK(qf_thread_pool_create(3, &pool, &err));
    pthread_t thread;
    qf_thread_pool_run(pool, remember_thread, &thread, 5, 5);
    CHECK(pthread_equal(thread, pthread_self()));
    qf_thread_pool_destroy(pool);
}

static void read_signal_mask(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    atomic_int *unblocked = arg;
    (void)begin;
    (void)end;
    sigset_t mask;
    (void)pthread_sigmask(SIG_SETMASK, NULL, &mask);
    if (worker != 0 && !sigismember(&mask, SIGINT)) {
        atomic_fetch_add(unblocked, 1);
    }
    struct timespec pause = {0, 200000};
    (void)nanosleep(&pause, NULL);
}

static void test_signals_stay_with_the_program(void)
{
    qf_error err;
    qf_thread_pool *pool = NULL;
    atomic_int unblocked = 0;
    CHECK_OK(qf_thread_pool_create(3, &pool, &err));
    qf_thread_pool_run(pool, read_signal_mask, &unblocked, 9, 1);
    CHECK_INT(unblocked, 0);
    sigset_t mask;
    (void)pthread_sigmask(SIG_SETMASK, NULL, &mask);
    CHECK(!sigismember(&mask, SIGINT)); /* creating the pool left the caller's mask alone */
    qf_thread_pool_destroy(pool);
}

static void test_create_and_destroy(void)
{
    qf_error err;
    qf_thread_pool *pool = NULL;
    for (int i = 0; i < 100; i++) { /* destroyed while workers start, spin or sleep */
        CHECK_OK(qf_thread_pool_create(1 + i % 7, &pool, &err));
        if (i % 3 == 0) {
            check_cover(pool, 50, 1);
        }
        qf_thread_pool_destroy(pool);
    }
    qf_thread_pool_destroy(NULL);
}

static void test_limits(void)
{
    static const int32_t refused[] = {INT32_MIN, -1, 0, 1025, INT32_MAX};
    qf_error err;
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        qf_thread_pool *pool = (qf_thread_pool *)&err;
        CHECK_STATUS(qf_thread_pool_create(refused[i], &pool, &err), QF_ERROR_INVALID_ARGUMENT);
        CHECK(pool == NULL && strstr(err.message, "1024") != NULL);
    }
}

static void test_cpu_count(void)
{
    cpu_set_t before, one;
    int32_t count = qf_cpu_count();
    CHECK(count >= 1);
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
    CHECK(count <= CPU_COUNT(&before));
    size_t first = 0;
    while (!CPU_ISSET(first, &before)) {
        first++;
    }
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    if (sched_setaffinity(0, sizeof one, &one) == 0) {
        CHECK_INT(qf_cpu_count(), 1);
        CHECK(sched_setaffinity(0, sizeof before, &before) == 0);
    }
    CHECK_INT(qf_cpu_count(), count);
}

static void write_file(const char *folder, const char *name, const char *text)
{
    char path[512];
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    for (char *slash = strchr(path + strlen(folder) + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        (void)mkdir(path, 0700);
        *slash = '/';
    }
    FILE *file = fopen(path, "w");
    CHECK(file != NULL && fputs(text, file) >= 0 && fclose(file) == 0);
}

static int32_t limit_of(const char *folder, const char *membership)
{
    char path[512];
    write_file(folder, "membership", membership);
    (void)snprintf(path, sizeof path, "%s/membership", folder);
    return qf_cgroup_cpu_limit(path, folder);
}

static void test_cgroup_limits(void)
{
    char folder[] = "/tmp/qf-test-threads-XXXXXX";
    CHECK(mkdtemp(folder) != NULL);
    CHECK_INT(limit_of(folder, "0::/\n"), 0);
    write_file(folder, "cpu.max", "max 100000\n");
    CHECK_INT(limit_of(folder, "0::/\n"), 0);
    write_file(folder, "cpu.max", "250000 100000\n");
    CHECK_INT(limit_of(folder, "0::/\n"), 3);              /* rounded up */
    CHECK_INT(limit_of(folder, "0::/host/only/path\n"), 3); /* a path that is not there: the root still counts */
    write_file(folder, "slice/job/cpu.max", "100000 100000\n");
    CHECK_INT(limit_of(folder, "0::/slice/job\n"), 1);
    CHECK_INT(limit_of(folder, "0::/slice/job/deeper"), 1); /* a group lives under its parents' quotas */
    write_file(folder, "slice/cpu.max", "1 100000");
    CHECK_INT(limit_of(folder, "0::/slice\n"), 1);
    write_file(folder, "cpu/box/cpu.cfs_quota_us", "400001\n");
    write_file(folder, "cpu/box/cpu.cfs_period_us", "100000\n");
    write_file(folder, "cpu.max", "max 100000\n");
    CHECK_INT(limit_of(folder, "4:memory:/x\n3:cpu,cpuacct:/box\n0::/\n"), 5);
    CHECK_INT(limit_of(folder, "3:cpuset,cpu:/box\n"), 5);
    CHECK_INT(limit_of(folder, "3:cpu:/box\n"), 5);
    CHECK_INT(limit_of(folder, "3:cpuset:/box\n2:cpuacct:/box\n"), 0); /* not the controllers of the quota */
    write_file(folder, "cpu/box/cpu.cfs_quota_us", "-1\n");
    CHECK_INT(limit_of(folder, "3:cpu:/box\n"), 0);
    CHECK_INT(limit_of(folder, "nonsense"), 0);
    CHECK_INT(limit_of(folder, "::::\n\n:\n"), 0);
    CHECK_INT(qf_cgroup_cpu_limit("/nonexistent", folder), 0);
    static const char *const made[] = {"membership", "cpu.max", "slice/job/cpu.max", "slice/job", "slice/cpu.max", "slice",
                                       "cpu/box/cpu.cfs_quota_us", "cpu/box/cpu.cfs_period_us", "cpu/box", "cpu"};
    for (size_t i = 0; i < sizeof made / sizeof made[0]; i++) {
        char path[512];
        (void)snprintf(path, sizeof path, "%s/%s", folder, made[i]);
        CHECK(remove(path) == 0);
    }
    CHECK(remove(folder) == 0);
}

#ifdef CHECK_ALLOC_FAULTS
static void test_alloc_faults(void)
{
    for (int64_t n = 1; n < 100; n++) {
        qf_error err;
        qf_thread_pool *pool = NULL;
        check_fail_alloc(n);
        qf_status status = qf_thread_pool_create(3, &pool, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        CHECK((pool == NULL) == failed);
        qf_thread_pool_destroy(pool);
        if (!failed) {
            CHECK(n > 2); /* the pool and its threads */
            return;
        }
    }
    CHECK(false);
}
#endif

int main(void)
{
    RUN(test_every_item_once);
    RUN(test_many_runs);
    RUN(test_long_chunks_and_waking);
    RUN(test_threads_run_at_once);
    RUN(test_small_runs_are_inline);
    RUN(test_signals_stay_with_the_program);
    RUN(test_create_and_destroy);
    RUN(test_limits);
    RUN(test_cpu_count);
    RUN(test_cgroup_limits);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_alloc_faults);
#endif
    return check_report();
}
