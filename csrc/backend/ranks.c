/* needs: base/event.c base/cpu_count.c */
#include "backend/ranks.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/alloc.h"
#include "base/event.h"
#include "base/threads.h"

#define MAX_GRACE_MS 4000
#define NS_PER_MS 1000000

typedef struct posted_call {
    qf_rank_fn fn; /* NULL: the threads end */
    const void *arg;
    bool cleanup;
} posted_call;

typedef struct rank_thread {
    qf_ranks *ranks;
    int32_t index;
    pthread_t thread;
    bool started;
    atomic_ullong num_done; /* calls */
} rank_thread;

struct qf_ranks {
    int32_t size;
    int64_t spin_ns;
    void *owner;
    void (*on_failure)(void *owner);
    posted_call calls[QF_RANKS_MAX_POSTED]; /* a ring */
    atomic_ullong num_posted;
    qf_event posted, done;
    atomic_bool failed;
    pthread_mutex_t lock; /* of `error` */
    qf_error error;
    bool lost;            /* a rank was given up; the poster's */
    rank_thread *threads; /* (size) */
};

static int64_t now_ns(void)
{
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* The first failure wins. */
static void fail(qf_ranks *self, const qf_error *error)
{
    (void)pthread_mutex_lock(&self->lock);
    if (!atomic_load(&self->failed)) {
        self->error = *error;
        atomic_store(&self->failed, true);
    }
    (void)pthread_mutex_unlock(&self->lock);
    self->on_failure(self->owner);
}

/* --- a rank's thread ------------------------------------------------------------------------------------ */

static void *rank_main(void *arg)
{
    rank_thread *me = arg;
    qf_ranks *self = me->ranks;
    qf_error error;
#if defined(__linux__)
    char name[16]; /* the kernel's limit */
    (void)snprintf(name, sizeof name, "qf-rank-%d", (int)(me->index & 1023));
    (void)pthread_setname_np(pthread_self(), name);
#endif
    for (unsigned long long next = 0;; next++) {
        for (;;) {
            unsigned seen = qf_event_count(&self->posted);
            if (atomic_load(&self->num_posted) != next) {
                break;
            }
            (void)qf_event_wait(&self->posted, seen, self->spin_ns, QF_EVENT_FOREVER);
        }
        posted_call call = self->calls[next % QF_RANKS_MAX_POSTED];
        if (call.fn == NULL) {
            return NULL;
        }
        if ((call.cleanup || !atomic_load(&self->failed)) &&
            call.fn(self->owner, me->index, call.arg, &error) != QF_OK) {
            fail(self, &error);
        }
        atomic_store(&me->num_done, next + 1);
        qf_event_signal(&self->done);
    }
}

/* Signals stay with the threads of the program around us. */
static qf_status start_threads(qf_ranks *self, qf_error *err)
{
    sigset_t all, before;
    int code = 0;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int32_t i = 0; i < self->size && code == 0; i++) {
        rank_thread *rank = &self->threads[i];
        rank->ranks = self;
        rank->index = i;
        code = pthread_create(&rank->thread, NULL, rank_main, rank);
        rank->started = code == 0;
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return code == 0 ? QF_OK
                     : QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot start a rank's thread: %s", strerror(code));
}

/* --- creation ------------------------------------------------------------------------------------------- */

static qf_status init_events(qf_ranks *self, qf_error *err)
{
    QF_TRY(qf_event_init(&self->posted, err));
    qf_status status = qf_event_init(&self->done, err);
    if (status == QF_OK && pthread_mutex_init(&self->lock, NULL) != 0) {
        status = QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot create a lock for the ranks");
        qf_event_deinit(&self->done);
    }
    if (status != QF_OK) {
        qf_event_deinit(&self->posted);
    }
    return status;
}

qf_status qf_ranks_create(int32_t size, int64_t spin_ns, void *owner, void (*on_failure)(void *owner), qf_ranks **out,
                          qf_error *err)
{
    qf_status status;
    qf_ranks *self;
    *out = NULL;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "the ranks", err));
    self->size = size;
    self->spin_ns = size < qf_cpu_count() ? spin_ns : 0; /* the poster has a thread, too */
    self->owner = owner;
    self->on_failure = on_failure;
    QF_TRY_GOTO(qf_alloc((void **)&self->threads, (size_t)size, sizeof *self->threads, "the ranks' threads", err), fail);
    QF_TRY_GOTO(init_events(self, err), fail);
    status = start_threads(self, err);
    if (status != QF_OK) {
        (void)qf_ranks_destroy(self);
        return status;
    }
    *out = self;
    return QF_OK;
fail:
    qf_free(self->threads);
    qf_free(self);
    return status;
}

bool qf_ranks_destroy(qf_ranks *self)
{
    if (self == NULL) {
        return true;
    }
    unsigned long long num_posted = atomic_load(&self->num_posted);
    (void)qf_ranks_post(self, NULL, NULL, true);
    for (int32_t i = 0; i < self->size; i++) {
        rank_thread *rank = &self->threads[i];
        if (rank->started && self->lost && atomic_load(&rank->num_done) < num_posted) {
            (void)pthread_detach(rank->thread);
        } else if (rank->started) {
            (void)pthread_join(rank->thread, NULL);
        }
    }
    if (self->lost) {
        return false;
    }
    (void)pthread_mutex_destroy(&self->lock);
    qf_event_deinit(&self->posted);
    qf_event_deinit(&self->done);
    qf_free(self->threads);
    qf_free(self);
    return true;
}

/* --- calls ---------------------------------------------------------------------------------------------- */

uint64_t qf_ranks_post(qf_ranks *self, qf_rank_fn fn, const void *arg, bool cleanup)
{
    unsigned long long ticket = atomic_load(&self->num_posted);
    if (self->lost && fn != NULL) {
        return ticket; /* no rank takes it any more: the ring may be full */
    }
    self->calls[ticket % QF_RANKS_MAX_POSTED] = (posted_call){.fn = fn, .arg = arg, .cleanup = cleanup};
    atomic_store(&self->num_posted, ticket + 1);
    qf_event_signal(&self->posted);
    return ticket + 1;
}

bool qf_ranks_done(qf_ranks *self, uint64_t ticket)
{
    for (int32_t i = 0; i < self->size; i++) {
        if (atomic_load(&self->threads[i].num_done) < ticket) {
            return false;
        }
    }
    return true;
}

bool qf_ranks_lost(const qf_ranks *self) { return self->lost; }

unsigned qf_ranks_nudges(qf_ranks *self) { return qf_event_count(&self->done); }

void qf_ranks_nudge(qf_ranks *self) { qf_event_signal(&self->done); }

void qf_ranks_pause(qf_ranks *self, unsigned seen)
{
    (void)qf_event_wait(&self->done, seen, 0, QF_EVENT_FOREVER);
}

/* True once all ranks are done. With until_failure it is over as soon as one has failed, too. */
static bool wait_until(qf_ranks *self, uint64_t ticket, int64_t deadline_ns, bool until_failure)
{
    for (;;) {
        unsigned seen = qf_event_count(&self->done);
        if (qf_ranks_done(self, ticket)) {
            return true;
        }
        if (until_failure && atomic_load(&self->failed)) {
            return false;
        }
        if (!qf_event_wait(&self->done, seen, self->spin_ns, deadline_ns)) {
            return qf_ranks_done(self, ticket);
        }
    }
}

/* Which rank is to blame is not known: those that wait for it are late as well. */
static void fail_late(qf_ranks *self, uint64_t ticket, int64_t timeout_ms)
{
    qf_error error;
    int32_t num_late = 0;
    for (int32_t i = 0; i < self->size; i++) {
        num_late += atomic_load(&self->threads[i].num_done) < ticket ? 1 : 0;
    }
    (void)QF_FAIL(&error, QF_ERROR_BACKEND, "%d of %d ranks have not finished their step within %lld ms", num_late,
                  self->size, (long long)timeout_ms);
    fail(self, &error);
}

qf_status qf_ranks_wait(qf_ranks *self, uint64_t ticket, int64_t timeout_ms, qf_error *err)
{
    const bool bounded = timeout_ms >= 0;
    int64_t deadline_ns = bounded ? now_ns() + timeout_ms * NS_PER_MS : QF_EVENT_FOREVER;
    if (!self->lost && !wait_until(self, ticket, deadline_ns, true)) {
        if (!atomic_load(&self->failed)) {
            fail_late(self, ticket, timeout_ms);
        }
        int64_t grace_ms = timeout_ms < MAX_GRACE_MS ? timeout_ms : MAX_GRACE_MS;
        self->lost = !wait_until(self, ticket, bounded ? now_ns() + grace_ms * NS_PER_MS : QF_EVENT_FOREVER, false);
    }
    if (!atomic_load(&self->failed)) {
        return QF_OK;
    }
    (void)pthread_mutex_lock(&self->lock);
    qf_error error = self->error;
    (void)pthread_mutex_unlock(&self->lock);
    if (err != NULL) {
        *err = error;
    }
    return error.status;
}
