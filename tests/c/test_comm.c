/* sources: base/status.c base/alloc.c base/dtype.c comm/comm_threads.c */
/* sanitizers: address thread */
/* alloc-faults: yes */
/* Ranks as threads: sums in the ranks' order with the same bits everywhere, and an abort that wakes whoever waits. */
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "base/event.h"
#include "check.h"
#include "comm/comm.h"

enum { MAX_RANKS = 8, MAX_COUNT = 5000, ROUNDS = 40 };

typedef void (*rank_fn)(qf_comm *comm, void *arg);

typedef struct rank_thread {
    pthread_t thread;
    qf_comm *comm;
    rank_fn fn;
    void *arg;
} rank_thread;

static void *rank_main(void *arg)
{
    rank_thread *self = arg;
    self->fn(self->comm, self->arg);
    return NULL;
}

/* Runs fn on every rank, each on its thread; between start and the end, `meanwhile` on this one. */
static void run_ranks(int32_t size, rank_fn fn, void *arg, void (*meanwhile)(qf_comm *comm))
{
    qf_comm *comms[MAX_RANKS];
    rank_thread threads[MAX_RANKS];
    qf_error err;
    CHECK_OK(qf_comm_threads_create(size, comms, &err));
    for (int32_t i = 0; i < size; i++) {
        CHECK(comms[i]->rank == i && comms[i]->size == size);
        threads[i] = (rank_thread){.comm = comms[i], .fn = fn, .arg = arg};
        CHECK(pthread_create(&threads[i].thread, NULL, rank_main, &threads[i]) == 0);
    }
    if (meanwhile != NULL) {
        meanwhile(comms[size - 1]);
    }
    for (int32_t i = 0; i < size; i++) {
        CHECK(pthread_join(threads[i].thread, NULL) == 0);
    }
    for (int32_t i = size - 1; i >= 0; i--) {
        comms[i]->vtable->destroy(comms[i]);
    }
}

/* Values whose sum depends on the order of addition. */
static float value_of(int32_t rank, int32_t round, size_t i)
{
    uint32_t x = (uint32_t)rank * 2654435761u + (uint32_t)round * 40503u + (uint32_t)i * 2246822519u;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    float big = x % 7 == 0 ? 1e6f : 1.0f;
    return big * ((float)(x >> 8) / 16777216.0f - 0.5f);
}

static void sum_all(qf_comm *comm, void *arg)
{
    static const size_t counts[] = {1, 2, 3, 15, 16, 17, 118, 1023, 1025, MAX_COUNT, 0};
    (void)arg;
    float *in = malloc(MAX_COUNT * sizeof *in), *out = malloc(MAX_COUNT * sizeof *out);
    qf_error err;
    for (int32_t round = 0; round < ROUNDS; round++) {
        size_t count = counts[(size_t)round % (sizeof counts / sizeof counts[0])];
        bool in_place = round % 3 == 0;
        for (size_t i = 0; i < count; i++) {
            in[i] = value_of(comm->rank, round, i);
        }
        qf_all_reduce_args args = {.in = in, .out = in_place ? in : out, .count = count, .dtype = QF_DTYPE_F32};
        CHECK_OK(comm->vtable->all_reduce(comm, &args, &err));
        int32_t wrong = 0;
        for (size_t i = 0; i < count; i++) {
            float sum = value_of(0, round, i);
            for (int32_t rank = 1; rank < comm->size; rank++) {
                sum += value_of(rank, round, i);
            }
            wrong += memcmp(&sum, &((const float *)args.out)[i], sizeof sum) != 0;
        }
        CHECK_INT(wrong, 0);
    }
    free(in);
    free(out);
}

/* Columns of uneven width go to one rank, numbers from one rank to all. */
static void share_all(qf_comm *comm, void *arg)
{
    enum { ROWS = 3, WIDEST = 2 * MAX_RANKS };
    (void)arg;
    int32_t size = comm->size, own = comm->rank + 1, total = size * (size + 1) / 2, first = comm->rank * own / 2;
    int32_t in[ROWS * WIDEST], out[ROWS * MAX_RANKS * WIDEST];
    qf_error err;
    for (int32_t root = 0; root < size; root++) {
        for (int32_t i = 0; i < ROWS * own; i++) {
            in[i] = 1000 * (i / own) + first + i % own + root;
        }
        qf_gather_args args = {.in = in, .out = comm->rank == root ? out : NULL, .num_rows = ROWS, .columns = own,
                               .first_column = first, .out_columns = total, .root = root, .dtype = QF_DTYPE_I32};
        CHECK_OK(comm->vtable->gather(comm, &args, &err));
        for (int32_t i = 0; comm->rank == root && i < ROWS * total; i++) {
            CHECK_INT(out[i], 1000 * (i / total) + i % total + root);
        }
        int64_t word[2] = {comm->rank, root};
        CHECK_OK(comm->vtable->broadcast(comm, root, word, sizeof word, NULL, &err));
        CHECK(word[0] == root && word[1] == root);
        CHECK_OK(comm->vtable->barrier(comm, &err));
    }
}

static void test_sums(void)
{
    static const int32_t sizes[] = {1, 2, 3, 4, 8};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        run_ranks(sizes[i], sum_all, NULL, NULL);
        run_ranks(sizes[i], share_all, NULL, NULL);
    }
}

/* --- abort ---------------------------------------------------------------------------------------------- */

static void pause_ms(long ms)
{
    struct timespec time = {.tv_sec = 0, .tv_nsec = ms * 1000000};
    (void)nanosleep(&time, NULL);
}

static void expect_abort(qf_comm *comm)
{
    float x[2] = {0};
    qf_error err = {0};
    qf_all_reduce_args sum = {.in = x, .out = x, .count = 2, .dtype = QF_DTYPE_F32};
    qf_gather_args gather = {.in = x, .out = x, .num_rows = 1, .columns = 1, .out_columns = 1, .dtype = QF_DTYPE_F32};
    CHECK_INT(comm->vtable->all_reduce(comm, &sum, &err), QF_ERROR_BACKEND);
    CHECK(strstr(err.message, "aborted") != NULL);
    CHECK_INT(comm->vtable->gather(comm, &gather, &err), QF_ERROR_BACKEND);
    CHECK_INT(comm->vtable->broadcast(comm, 0, x, sizeof x, NULL, &err), QF_ERROR_BACKEND);
    CHECK_INT(comm->vtable->barrier(comm, &err), QF_ERROR_BACKEND);
}

/* The last rank never comes: the others wait until somebody aborts. */
static void wait_for_absent(qf_comm *comm, void *arg)
{
    (void)arg;
    qf_error err;
    CHECK_OK(comm->vtable->barrier(comm, &err));
    if (comm->rank < comm->size - 1) {
        expect_abort(comm);
    }
}

static void abort_late(qf_comm *comm)
{
    pause_ms(30);
    comm->vtable->abort(comm);
    comm->vtable->abort(comm);
}

/* One rank aborts in the middle of a stream of calls: all end, at whatever call they were. */
static void abort_in_the_middle(qf_comm *comm, void *arg)
{
    float x[300] = {0};
    qf_error err;
    (void)arg;
    qf_all_reduce_args args = {.in = x, .out = x, .count = 300, .dtype = QF_DTYPE_F32};
    for (int32_t round = 0;; round++) {
        if (comm->rank == 1 && round == 50) {
            comm->vtable->abort(comm);
        }
        if (comm->vtable->all_reduce(comm, &args, &err) != QF_OK) {
            CHECK(round >= 49);
            break;
        }
    }
    expect_abort(comm);
}

static void test_abort(void)
{
    run_ranks(2, wait_for_absent, NULL, abort_late);
    run_ranks(5, wait_for_absent, NULL, abort_late);
    run_ranks(2, abort_in_the_middle, NULL, NULL);
    run_ranks(4, abort_in_the_middle, NULL, NULL);
}

static void test_refusals(void)
{
    qf_comm *comms[1];
    float x = 0.0f;
    qf_error err;
    CHECK_INT(qf_comm_threads_create(0, comms, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_INT(qf_comm_threads_create(1025, comms, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_OK(qf_comm_threads_create(1, comms, &err));
    qf_all_reduce_args args = {.in = &x, .out = &x, .count = 1, .dtype = QF_DTYPE_BF16};
    CHECK_INT(comms[0]->vtable->all_reduce(comms[0], &args, &err), QF_ERROR_INVALID_ARGUMENT);
    comms[0]->vtable->destroy(comms[0]);
}

/* --- events --------------------------------------------------------------------------------------------- */

static int64_t monotonic_ns(void)
{
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void *signal_late(void *arg)
{
    pause_ms(20);
    qf_event_signal(arg);
    return NULL;
}

static void test_event(void)
{
    qf_event event;
    qf_error err;
    pthread_t thread;
    CHECK_OK(qf_event_init(&event, &err));
    unsigned seen = qf_event_count(&event);
    int64_t start = monotonic_ns();
    CHECK(!qf_event_wait(&event, seen, 0, start + 20000000));
    CHECK(monotonic_ns() - start >= 20000000);
    CHECK(!qf_event_wait(&event, seen, 1000, start)); /* the deadline is over */
    CHECK(pthread_create(&thread, NULL, signal_late, &event) == 0);
    CHECK(qf_event_wait(&event, seen, 1000, QF_EVENT_FOREVER));
    CHECK(qf_event_wait(&event, seen, 0, start)); /* it has changed: no matter how late it is */
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_INT(qf_event_count(&event), seen + 1);
    qf_event_deinit(&event);
}

#ifdef CHECK_ALLOC_FAULTS
static void test_out_of_memory(void)
{
    for (int64_t n = 1;; n++) {
        qf_comm *comms[3];
        qf_error err;
        check_fail_alloc(n);
        qf_status status = qf_comm_threads_create(3, comms, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        for (int32_t i = 0; status == QF_OK && i < 3; i++) {
            comms[i]->vtable->destroy(comms[i]);
        }
        if (!failed) {
            break;
        }
    }
}
#endif

int main(void)
{
    RUN(test_event);
    RUN(test_sums);
    RUN(test_abort);
    RUN(test_refusals);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_out_of_memory);
#endif
    return check_report();
}
