#include "base/event.h"

#include <string.h>
#include <time.h>

#define PAUSES_PER_CLOCK_READ 16
#define NS_PER_SECOND 1000000000

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
    return (int64_t)time.tv_sec * NS_PER_SECOND + time.tv_nsec;
}

qf_status qf_event_init(qf_event *self, qf_error *err)
{
    pthread_condattr_t attr;
    atomic_init(&self->count, 0);
    atomic_init(&self->num_sleeping, 0);
    int code = pthread_mutex_init(&self->lock, NULL);
    if (code == 0) {
        (void)pthread_condattr_init(&attr);
        (void)pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
        code = pthread_cond_init(&self->changed, &attr);
        (void)pthread_condattr_destroy(&attr);
        if (code != 0) {
            (void)pthread_mutex_destroy(&self->lock);
        }
    }
    return code == 0 ? QF_OK : QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot create an event: %s", strerror(code));
}

void qf_event_deinit(qf_event *self)
{
    (void)pthread_cond_destroy(&self->changed);
    (void)pthread_mutex_destroy(&self->lock);
}

unsigned qf_event_count(qf_event *self) { return atomic_load(&self->count); }

void qf_event_signal(qf_event *self)
{
    atomic_fetch_add(&self->count, 1);
    /* Either this sees the sleeper, or the sleeper sees the new count: all four accesses are sequentially consistent. */
    if (atomic_load(&self->num_sleeping) > 0) {
        (void)pthread_mutex_lock(&self->lock); /* who saw the old count is in its wait now */
        (void)pthread_cond_broadcast(&self->changed);
        (void)pthread_mutex_unlock(&self->lock);
    }
}

static bool spin(qf_event *self, unsigned seen, int64_t until_ns)
{
    do {
        for (int i = 0; i < PAUSES_PER_CLOCK_READ; i++) {
            if (atomic_load_explicit(&self->count, memory_order_acquire) != seen) {
                return true;
            }
            cpu_pause();
        }
    } while (now_ns() < until_ns);
    return false;
}

bool qf_event_wait(qf_event *self, unsigned seen, int64_t spin_ns, int64_t deadline_ns)
{
    if (qf_event_count(self) != seen || (spin_ns > 0 && spin(self, seen, now_ns() + spin_ns))) {
        return true;
    }
    struct timespec until = {.tv_sec = (time_t)(deadline_ns / NS_PER_SECOND),
                             .tv_nsec = (long)(deadline_ns % NS_PER_SECOND)};
    bool in_time = true;
    (void)pthread_mutex_lock(&self->lock);
    atomic_fetch_add(&self->num_sleeping, 1);
    while (qf_event_count(self) == seen && in_time) {
        if (deadline_ns == QF_EVENT_FOREVER) {
            (void)pthread_cond_wait(&self->changed, &self->lock);
        } else {
            in_time = pthread_cond_timedwait(&self->changed, &self->lock, &until) == 0;
        }
    }
    atomic_fetch_sub(&self->num_sleeping, 1);
    (void)pthread_mutex_unlock(&self->lock);
    return qf_event_count(self) != seen;
}
