/* sources: base/status.c base/alloc.c base/dtype.c comm/comm_threads.c backend/ranks.c */
/* sanitizers: address thread */
/* alloc-faults: yes */
/* Threads that make the same calls: order, failures that end the others' waits, ranks that are late or never return. */
#include <time.h>

#include "backend/ranks.h"
#include "check.h"
#include "comm/comm.h"

enum { SIZE = 4, CALLS = 60 };

typedef struct owner {
    qf_comm *comms[SIZE];
    int32_t calls[SIZE][CALLS]; /* what each rank was asked, in its order */
    int32_t num_calls[SIZE];
    int32_t cleanups[SIZE];
    atomic_bool released; /* ends a rank that hangs */
    bool release_on_failure;
    atomic_int num_failures;
} owner;

static void pause_ms(long ms)
{
    struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    (void)nanosleep(&time, NULL);
}

static void on_failure(void *arg)
{
    owner *self = arg;
    atomic_fetch_add(&self->num_failures, 1);
    for (int32_t i = 0; i < SIZE; i++) {
        self->comms[i]->vtable->abort(self->comms[i]);
    }
    if (self->release_on_failure) {
        atomic_store(&self->released, true);
    }
}

static qf_status note(void *arg, int32_t rank, const void *value, qf_error *err)
{
    (void)err;
    owner *self = arg;
    self->calls[rank][self->num_calls[rank]++] = *(const int32_t *)value;
    return QF_OK;
}

static qf_status meet(void *arg, int32_t rank, const void *value, qf_error *err)
{
    (void)value;
    owner *self = arg;
    return self->comms[rank]->vtable->barrier(self->comms[rank], err);
}

/* One rank fails, the others wait for it. */
static qf_status fail_one(void *arg, int32_t rank, const void *value, qf_error *err)
{
    if (rank == *(const int32_t *)value) {
        return QF_FAIL(err, QF_ERROR_BACKEND, "rank %d is out of order", rank);
    }
    return meet(arg, rank, NULL, err);
}

static qf_status hang_one(void *arg, int32_t rank, const void *value, qf_error *err)
{
    (void)err;
    owner *self = arg;
    while (rank == *(const int32_t *)value && !atomic_load(&self->released)) {
        pause_ms(2);
    }
    return QF_OK;
}

static qf_status clean(void *arg, int32_t rank, const void *value, qf_error *err)
{
    (void)value;
    (void)err;
    ((owner *)arg)->cleanups[rank]++;
    return QF_OK;
}

static qf_status start(owner *self, qf_ranks **out, qf_error *err)
{
    memset(self, 0, sizeof *self);
    *out = NULL;
    QF_TRY(qf_comm_threads_create(SIZE, self->comms, err));
    qf_status status = qf_ranks_create(SIZE, 20000, self, on_failure, out, err);
    for (int32_t i = 0; status != QF_OK && i < SIZE; i++) {
        self->comms[i]->vtable->destroy(self->comms[i]);
    }
    return status;
}

static void finish(owner *self, qf_ranks *ranks)
{
    (void)qf_ranks_post(ranks, clean, NULL, true);
    CHECK(qf_ranks_destroy(ranks));
    for (int32_t i = 0; i < SIZE; i++) {
        CHECK_INT(self->cleanups[i], 1);
        self->comms[i]->vtable->destroy(self->comms[i]);
    }
}

static void test_order(void)
{
    owner self;
    qf_ranks *ranks;
    qf_error err;
    int32_t values[CALLS];
    CHECK_OK(start(&self, &ranks, &err));
    for (int32_t i = 0; i < CALLS; i += 3) { /* several posted at once */
        uint64_t ticket = 0;
        for (int32_t j = i; j < i + 3; j++) {
            values[j] = 7 * j;
            ticket = qf_ranks_post(ranks, note, &values[j], false);
            (void)qf_ranks_post(ranks, meet, NULL, false);
        }
        if (i % 2 == 0) {
            CHECK_OK(qf_ranks_wait(ranks, ticket, -1, &err));
        }
        CHECK_OK(qf_ranks_wait(ranks, ticket + 1, 60000, &err));
        CHECK(qf_ranks_done(ranks, ticket));
    }
    for (int32_t rank = 0; rank < SIZE; rank++) {
        CHECK_INT(self.num_calls[rank], CALLS);
        for (int32_t i = 0; i < CALLS; i++) {
            CHECK_INT(self.calls[rank][i], 7 * i);
        }
    }
    finish(&self, ranks);
    CHECK_INT(atomic_load(&self.num_failures), 0);
}

static void test_failure(void)
{
    for (int32_t bad = 0; bad < SIZE; bad++) {
        owner self;
        qf_ranks *ranks;
        qf_error err;
        CHECK_OK(start(&self, &ranks, &err));
        uint64_t ticket = qf_ranks_post(ranks, fail_one, &bad, false);
        uint64_t later = qf_ranks_post(ranks, note, &bad, false);
        CHECK_INT(qf_ranks_wait(ranks, ticket, -1, &err), QF_ERROR_BACKEND);
        CHECK(strstr(err.message, "is out of order") != NULL); /* not that the others were aborted */
        CHECK_INT(qf_ranks_wait(ranks, later, -1, &err), QF_ERROR_BACKEND);
        CHECK(strstr(err.message, "is out of order") != NULL);
        CHECK_INT(qf_ranks_wait(ranks, qf_ranks_post(ranks, note, &bad, false), -1, NULL), QF_ERROR_BACKEND);
        int32_t made = 0;
        for (int32_t i = 0; i < SIZE; i++) {
            made += self.num_calls[i];
        }
        CHECK_INT(made, 0);
        finish(&self, ranks);
    }
}

/* Late, but it comes back when it hears of it. */
static void test_late(void)
{
    owner self;
    qf_ranks *ranks;
    qf_error err;
    int32_t bad = 2;
    CHECK_OK(start(&self, &ranks, &err));
    self.release_on_failure = true;
    uint64_t ticket = qf_ranks_post(ranks, hang_one, &bad, false);
    CHECK_INT(qf_ranks_wait(ranks, ticket, 400, &err), QF_ERROR_BACKEND);
    CHECK(strstr(err.message, "1 of 4 ranks") != NULL && strstr(err.message, "400 ms") != NULL);
    finish(&self, ranks);
}

static owner lost_owner; /* what a rank that hangs may still touch is left to it */
static qf_ranks *lost_ranks;

static void test_lost(void)
{
    qf_error err;
    static const int32_t bad = 1;
    CHECK_OK(start(&lost_owner, &lost_ranks, &err));
    uint64_t ticket = qf_ranks_post(lost_ranks, hang_one, &bad, false);
    CHECK_INT(qf_ranks_wait(lost_ranks, ticket, 50, &err), QF_ERROR_BACKEND);
    for (int32_t i = 0; i < 2 * QF_RANKS_MAX_POSTED; i++) { /* nothing waits any more */
        CHECK_INT(qf_ranks_wait(lost_ranks, qf_ranks_post(lost_ranks, note, &bad, false), 50, &err), QF_ERROR_BACKEND);
    }
    CHECK(!qf_ranks_destroy(lost_ranks));
    atomic_store(&lost_owner.released, true); /* the thread ends: sanitizers want none to be left */
    pause_ms(100);
    CHECK_INT(lost_owner.num_calls[bad], 0);
}

static owner failed_owner;
static qf_ranks *failed_ranks;
static atomic_bool hangs; /* the one that hangs is in its call: after a failure none is made */

static qf_status fail_or_hang(void *arg, int32_t rank, const void *value, qf_error *err)
{
    static const int32_t fails = 3;
    if (rank == fails) {
        while (!atomic_load(&hangs)) {
            pause_ms(1);
        }
        return fail_one(arg, rank, &fails, err);
    }
    if (rank == *(const int32_t *)value) {
        atomic_store(&hangs, true);
    }
    return hang_one(arg, rank, value, err);
}

/* One fails and another does not return: the call's own time has nothing to do with it. */
static void test_failed_and_lost(void)
{
    qf_error err;
    static const int32_t bad = 1;
    struct timespec begin, end;
    CHECK_OK(start(&failed_owner, &failed_ranks, &err));
    (void)clock_gettime(CLOCK_MONOTONIC, &begin);
    uint64_t ticket = qf_ranks_post(failed_ranks, fail_or_hang, &bad, false);
    CHECK_INT(qf_ranks_wait(failed_ranks, ticket, 60000, &err), QF_ERROR_BACKEND);
    (void)clock_gettime(CLOCK_MONOTONIC, &end);
    CHECK(end.tv_sec - begin.tv_sec >= 3 && end.tv_sec - begin.tv_sec <= 10);
    CHECK(strcmp(err.message, "rank 3 is out of order") == 0);
    CHECK(qf_ranks_lost(failed_ranks));
    CHECK(!qf_ranks_destroy(failed_ranks));
    atomic_store(&failed_owner.released, true);
    pause_ms(100);
}

static void test_pause(void)
{
    owner self;
    qf_ranks *ranks;
    qf_error err;
    int32_t value = 1;
    CHECK_OK(start(&self, &ranks, &err));
    unsigned seen = qf_ranks_nudges(ranks);
    qf_ranks_nudge(ranks);
    qf_ranks_pause(ranks, seen);
    uint64_t ticket = qf_ranks_post(ranks, note, &value, false);
    for (;;) {
        seen = qf_ranks_nudges(ranks);
        if (qf_ranks_done(ranks, ticket)) {
            break;
        }
        qf_ranks_pause(ranks, seen);
    }
    CHECK_INT(self.num_calls[SIZE - 1], 1);
    finish(&self, ranks);
    CHECK(qf_ranks_destroy(NULL));
}

#ifdef CHECK_ALLOC_FAULTS
static void test_out_of_memory(void)
{
    for (int64_t n = 1;; n++) {
        owner self;
        qf_ranks *ranks;
        qf_error err;
        check_fail_alloc(n);
        qf_status status = start(&self, &ranks, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        if (status == QF_OK) {
            finish(&self, ranks);
        }
        if (!failed) {
            break;
        }
    }
}
#endif

int main(void)
{
    RUN(test_order);
    RUN(test_failure);
    RUN(test_late);
    RUN(test_lost);
    RUN(test_failed_and_lost);
    RUN(test_pause);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_out_of_memory);
#endif
    return check_report();
}
