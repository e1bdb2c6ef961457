/* A fork-join thread pool.
 *
 * qf_thread_pool_run() splits [0, total) into chunks of `grain` that workers claim with one atomic add; the
 * caller takes part. Who runs a chunk is not determined, so a task must own its outputs: then results do not
 * depend on the number of threads. Waiting spins for a few microseconds, then sleeps on a futex; a pool whose
 * spins keep failing, or that has more threads than the process may use, does not spin at all. */
#ifndef QF_BASE_THREADS_H
#define QF_BASE_THREADS_H

#include <stdint.h>

#include "base/status.h"

typedef struct qf_thread_pool qf_thread_pool;

/* Handles [begin, end). `worker` is in [0, num_threads): an index for scratch memory, not for results. */
typedef void (*qf_task_fn)(void *arg, int64_t begin, int64_t end, int32_t worker);

/* num_threads counts the caller: 1 makes no thread at all; 1..1024, else QF_ERROR_INVALID_ARGUMENT. */
qf_status qf_thread_pool_create(int32_t num_threads, qf_thread_pool **out, qf_error *err);
void qf_thread_pool_destroy(qf_thread_pool *self); /* NULL-safe; joins */
int32_t qf_thread_pool_size(const qf_thread_pool *self);

/* Returns when every chunk is done. One caller at a time; never called from inside a task. grain >= 1. */
void qf_thread_pool_run(qf_thread_pool *self, qf_task_fn fn, void *arg, int64_t total, int64_t grain);

/* CPUs that this process may use: affinity mask and cgroup quota, at least 1. */
int32_t qf_cpu_count(void);

/* The CPUs that cgroups (version 1 or 2) grant, rounded up; 0 if there is no quota. qf_cpu_count() passes
 * /proc/self/cgroup and /sys/fs/cgroup, a test its own files. */
int32_t qf_cgroup_cpu_limit(const char *membership_file, const char *root);

#endif
