/* A counter that threads wait on: it only goes up, and every step wakes all who wait.
 *
 * A waiter reads the count, looks at what it waits for, and waits for the count to change; whoever changes that thing
 * signals afterwards. So no wake-up is lost, and several conditions may share one event. */
#ifndef QF_BASE_EVENT_H
#define QF_BASE_EVENT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct qf_event {
    atomic_uint count;
    atomic_int num_sleeping; /* in, or about to enter, their sleep */
    pthread_mutex_t lock;    /* only sleepers, and who wakes them, take it */
    pthread_cond_t changed;
} qf_event;

#define QF_EVENT_FOREVER INT64_MAX

qf_status qf_event_init(qf_event *self, qf_error *err);
void qf_event_deinit(qf_event *self); /* nobody waits */

unsigned qf_event_count(qf_event *self);
void qf_event_signal(qf_event *self);

/* Returns true once the count is no longer `seen`: watches it for spin_ns, then sleeps. False: it is `deadline_ns` by
 * CLOCK_MONOTONIC (QF_EVENT_FOREVER: never). */
bool qf_event_wait(qf_event *self, unsigned seen, int64_t spin_ns, int64_t deadline_ns);

#endif
