/* needs: base/cpu_count.c */
#include "base/threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "base/alloc.h"

#define MAX_THREADS 1024
#define CACHE_LINE 64

/* Longer than the serial work between two layers' operations, shorter than what a waiting core is worth. */
#define SPIN_NS 20000
/* A budget that fell below this is no budget: sleeping at once costs about as much. */
#define MIN_SPIN_NS 2000
#define PAUSES_PER_CLOCK_READ 16

/* One job at a time. A chunk is claimed by taking one from `unclaimed`; a claim that succeeds keeps the job open (its
 * chunk is not in `unfinished` yet), so the job's plain fields are read after the claim and never change under the
 * reader. A worker that comes late finds nothing to claim and touches nothing else, so the caller need not wait for
 * workers that never took part. */
struct qf_thread_pool {
    _Alignas(CACHE_LINE) atomic_llong unclaimed; /* <= 0: nothing to claim (late claims push it below zero) */
    _Alignas(CACHE_LINE) atomic_llong unfinished; /* chunks, claimed or not, that are not done */
    _Alignas(CACHE_LINE) atomic_uint epoch;       /* one up for every job: what idle workers watch and sleep on */
    atomic_int num_sleeping;                      /* workers in, or about to enter, their sleep on `epoch` */
    atomic_llong published_ns;                    /* when the job that found sleepers was published */
    _Alignas(CACHE_LINE) atomic_uint caller_waits; /* 1: the caller sleeps on this word */

    _Alignas(CACHE_LINE) qf_task_fn fn; /* the job */
    void *arg;
    int64_t total;
    int64_t grain;
    int64_t num_chunks;
    int64_t caller_spin_ns; /* the caller's own budget */

    int32_t num_threads; /* fixed once created */
    int32_t num_started;
    bool may_spin;
    atomic_bool stop;
    struct worker *workers; /* (num_threads - 1) */
#if !defined(__linux__)
    pthread_mutex_t mutex;
    pthread_cond_t changed;
#endif
};

typedef struct worker {
    qf_thread_pool *pool;
    pthread_t thread;
    int32_t index; /* 1..num_threads-1: the caller is 0 */
} worker;

static inline void cpu_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void)
{
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Sleeps while *word == expected; may return early for no reason, so callers loop. */
static void sleep_on(qf_thread_pool *self, atomic_uint *word, unsigned expected)
{
#if defined(__linux__)
    (void)self;
    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
#else
    (void)pthread_mutex_lock(&self->mutex);
    while (atomic_load(word) == expected) {
        (void)pthread_cond_wait(&self->changed, &self->mutex);
    }
    (void)pthread_mutex_unlock(&self->mutex);
#endif
}

/* Wakes up to `count` sleepers; the caller has changed *word before. */
static void wake(qf_thread_pool *self, atomic_uint *word, int32_t count)
{
#if defined(__linux__)
    (void)self;
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
#else
    (void)word;
    (void)count; /* one condition serves both words, so all have to look */
    (void)pthread_mutex_lock(&self->mutex);
    (void)pthread_mutex_unlock(&self->mutex);
    (void)pthread_cond_broadcast(&self->changed);
#endif
}

static void run_chunk(const qf_thread_pool *self, int64_t chunk, int32_t index)
{
    int64_t begin = chunk * self->grain;
    int64_t end = self->total - begin > self->grain ? begin + self->grain : self->total;
    self->fn(self->arg, begin, end, index);
}

/* Claims and runs chunks until none is left. True if this call finished the job's last chunk. */
static bool take_part(qf_thread_pool *self, int32_t index)
{
    int64_t done = 0;
    /* The plain load keeps threads that come late from fighting over the line. */
    while (atomic_load_explicit(&self->unclaimed, memory_order_relaxed) > 0) {
        int64_t left = atomic_fetch_sub_explicit(&self->unclaimed, 1, memory_order_acquire);
        if (left <= 0) {
            break;
        }
        run_chunk(self, self->num_chunks - left, index);
        done++;
    }
    return done > 0 && atomic_fetch_sub(&self->unfinished, done) == done;
}

/* Adapts a budget: what did not help is halved until it is nothing, what did is restored in full. */
static int64_t spin_budget_after(int64_t budget_ns, bool helped)
{
    if (helped) {
        return SPIN_NS;
    }
    return budget_ns / 2 >= MIN_SPIN_NS ? budget_ns / 2 : 0;
}

static bool spin_for_epoch(qf_thread_pool *self, unsigned seen, int64_t until_ns)
{
    do {
        for (int i = 0; i < PAUSES_PER_CLOCK_READ; i++) {
            if (atomic_load_explicit(&self->epoch, memory_order_acquire) != seen) {
                return true;
            }
            cpu_pause();
        }
    } while (now_ns() < until_ns);
    return false;
}

/* Returns once the epoch differs from `seen`. */
static void wait_for_epoch(qf_thread_pool *self, unsigned seen, int64_t *budget_ns)
{
    int64_t start_ns = self->may_spin ? now_ns() : 0;
    if (*budget_ns > 0) {
        bool helped = spin_for_epoch(self, seen, start_ns + *budget_ns);
        *budget_ns = spin_budget_after(*budget_ns, helped);
        if (helped) {
            return;
        }
    }
    /* Either the publisher sees this count, or this thread sees the new epoch: both are sequentially consistent. */
    atomic_fetch_add(&self->num_sleeping, 1);
    bool slept = false;
    while (atomic_load(&self->epoch) == seen) {
        sleep_on(self, &self->epoch, seen);
        slept = true;
    }
    atomic_fetch_sub(&self->num_sleeping, 1);
    /* Would spinning have helped? Then it is worth another try. */
    if (self->may_spin && slept && atomic_load(&self->published_ns) - start_ns < SPIN_NS) {
        *budget_ns = SPIN_NS;
    }
}

static void *worker_main(void *arg)
{
    const worker *me = arg;
    qf_thread_pool *self = me->pool;
    int64_t budget_ns = self->may_spin ? SPIN_NS : 0;
    unsigned seen = 0;
    for (;;) {
        wait_for_epoch(self, seen, &budget_ns);
        seen = atomic_load(&self->epoch);
        if (atomic_load(&self->stop)) {
            return NULL;
        }
        if (take_part(self, me->index) && atomic_load(&self->caller_waits) != 0 &&
            atomic_exchange(&self->caller_waits, 0) != 0) {
            wake(self, &self->caller_waits, 1);
        }
    }
}

static void wait_for_workers(qf_thread_pool *self)
{
    int64_t start_ns = self->may_spin ? now_ns() : 0;
    if (self->caller_spin_ns > 0) {
        bool helped = false;
        do {
            for (int i = 0; i < PAUSES_PER_CLOCK_READ && !helped; i++) {
                helped = atomic_load_explicit(&self->unfinished, memory_order_acquire) == 0;
                cpu_pause();
            }
        } while (!helped && now_ns() < start_ns + self->caller_spin_ns);
        self->caller_spin_ns = spin_budget_after(self->caller_spin_ns, helped);
        if (helped) {
            return;
        }
    }
    /* A worker still in the last lines of an earlier job may clear the flag too soon; the loop sets it again. */
    for (;;) {
        atomic_store(&self->caller_waits, 1);
        if (atomic_load(&self->unfinished) == 0) {
            break;
        }
        sleep_on(self, &self->caller_waits, 1);
    }
    atomic_store(&self->caller_waits, 0);
    if (self->may_spin && now_ns() - start_ns < SPIN_NS) {
        self->caller_spin_ns = SPIN_NS;
    }
}

void qf_thread_pool_run(qf_thread_pool *self, qf_task_fn fn, void *arg, int64_t total, int64_t grain)
{
    if (total <= 0) {
        return;
    }
    if (total <= grain) {
        fn(arg, 0, total, 0);
        return;
    }
    self->fn = fn;
    self->arg = arg;
    self->total = total;
    self->grain = grain;
    self->num_chunks = total / grain + (total % grain != 0 ? 1 : 0);
    if (self->num_threads == 1) { /* the same chunks in the same order, with no atomics */
        for (int64_t chunk = 0; chunk < self->num_chunks; chunk++) {
            run_chunk(self, chunk, 0);
        }
        return;
    }
    atomic_store_explicit(&self->unfinished, self->num_chunks, memory_order_relaxed);
    atomic_store_explicit(&self->unclaimed, self->num_chunks, memory_order_release);
    atomic_fetch_add(&self->epoch, 1);
    int32_t sleeping = (int32_t)atomic_load(&self->num_sleeping);
    if (sleeping > 0) {
        if (self->may_spin) {
            atomic_store(&self->published_ns, now_ns());
        }
        int64_t useful = self->num_chunks - 1;
        wake(self, &self->epoch, useful < sleeping ? (int32_t)useful : sleeping);
    }
    if (!take_part(self, 0) && atomic_load_explicit(&self->unfinished, memory_order_acquire) != 0) {
        wait_for_workers(self);
    }
}

static void *worker_start(void *arg)
{
#if defined(__linux__)
    char name[16]; /* the kernel's limit */
    (void)snprintf(name, sizeof name, "qf-worker-%d", (int)(((const worker *)arg)->index & 1023));
    (void)pthread_setname_np(pthread_self(), name);
#endif
    return worker_main(arg);
}

/* Signals stay with the threads of the program around us. */
static qf_status start_workers(qf_thread_pool *self, qf_error *err)
{
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int code = 0;
    for (int32_t i = 1; i < self->num_threads && code == 0; i++) {
        worker *w = &self->workers[i - 1];
        w->pool = self;
        w->index = i;
        code = pthread_create(&w->thread, NULL, worker_start, w);
        self->num_started += code == 0 ? 1 : 0;
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (code != 0) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot start thread %d of %d: pthread_create returned %d",
                       self->num_started + 2, self->num_threads, code);
    }
    return QF_OK;
}

qf_status qf_thread_pool_create(int32_t num_threads, qf_thread_pool **out, qf_error *err)
{
    qf_status status;
    *out = NULL;
    if (num_threads < 1 || num_threads > MAX_THREADS) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "num_threads is %d, but it must be from 1 to %d", num_threads,
                       MAX_THREADS);
    }
    /* Heap memory is aligned to 16 bytes only; pages are aligned to any cache line. */
    void *memory;
    QF_TRY(qf_pages_alloc(&memory, sizeof(qf_thread_pool), "thread pool", err));
    qf_thread_pool *self = memory;
    self->num_threads = num_threads;
    self->may_spin = num_threads <= qf_cpu_count();
    self->caller_spin_ns = self->may_spin ? SPIN_NS : 0;
#if !defined(__linux__)
    (void)pthread_mutex_init(&self->mutex, NULL);
    (void)pthread_cond_init(&self->changed, NULL);
#endif
    void *workers;
    QF_TRY_GOTO(qf_alloc(&workers, (size_t)num_threads - 1, sizeof(worker), "threads", err), fail);
    self->workers = workers;
    QF_TRY_GOTO(start_workers(self, err), fail);
    *out = self;
    return QF_OK;
fail:
    qf_thread_pool_destroy(self);
    return status;
}

void qf_thread_pool_destroy(qf_thread_pool *self)
{
    if (self == NULL) {
        return;
    }
    atomic_store(&self->stop, true);
    atomic_fetch_add(&self->epoch, 1);
    wake(self, &self->epoch, MAX_THREADS);
    for (int32_t i = 0; i < self->num_started; i++) {
        (void)pthread_join(self->workers[i].thread, NULL);
    }
#if !defined(__linux__)
    (void)pthread_cond_destroy(&self->changed);
    (void)pthread_mutex_destroy(&self->mutex);
#endif
    qf_free(self->workers);
    qf_pages_free(self, sizeof *self);
}

int32_t qf_thread_pool_size(const qf_thread_pool *self) { return self->num_threads; }
