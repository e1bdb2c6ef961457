/* Threads that run the same sequence of calls, one thread a rank: whoever posts a call goes on at once, and may wait
 * for it later. A rank whose call fails fails them all: the first error is kept, `on_failure` is called (it ends what
 * the others wait for), and calls that come after are not made any more, but for those that clean up. */
#ifndef QF_BACKEND_RANKS_H
#define QF_BACKEND_RANKS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct qf_ranks qf_ranks;

/* On the rank's own thread. */
typedef qf_status (*qf_rank_fn)(void *owner, int32_t rank, const void *arg, qf_error *err);

#define QF_RANKS_MAX_POSTED 8 /* calls that not all ranks have made */

/* on_failure: from a rank's thread or a waiting one; may be called more than once, at the same time. spin_ns: who waits
 * looks for so long before it sleeps, where there are CPUs enough. */
qf_status qf_ranks_create(int32_t size, int64_t spin_ns, void *owner, void (*on_failure)(void *owner), qf_ranks **out,
                          qf_error *err);

/* Ends the threads after the calls that are posted. False: a rank hangs in its call (a wait said so before). Its thread
 * is left behind, and with it all that it may still touch: neither `self` nor what belongs to the owner may be freed. */
bool qf_ranks_destroy(qf_ranks *self); /* NULL-safe: true */

/* From one thread at a time, like wait. Returns the call's ticket. cleanup: the call is made after a failure, too. */
uint64_t qf_ranks_post(qf_ranks *self, qf_rank_fn fn, const void *arg, bool cleanup);

/* Until every rank has made the call. timeout_ms < 0: for ever. A rank that takes longer counts as failed. Once one has
 * failed, and on_failure has been called, the others have as long again, 4 s at most; one that has not returned by then is
 * given up. Returns the first failure, if there was one. */
qf_status qf_ranks_wait(qf_ranks *self, uint64_t ticket, int64_t timeout_ms, qf_error *err);

/* A wait has given a rank up. From the thread that waits. */
bool qf_ranks_lost(const qf_ranks *self);

/* For a caller with something to do meanwhile: is it done, and if not, a pause that qf_ranks_nudge() ends, or a rank
 * that is done with a call. */
bool qf_ranks_done(qf_ranks *self, uint64_t ticket);
unsigned qf_ranks_nudges(qf_ranks *self);
void qf_ranks_pause(qf_ranks *self, unsigned seen);
void qf_ranks_nudge(qf_ranks *self);

#endif
