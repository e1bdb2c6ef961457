/* CPU ranks of which one fails, or hangs, when a test wants it. */
#ifndef QF_TESTS_FAULTY_RANKS_H
#define QF_TESTS_FAULTY_RANKS_H

#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "backend/cpu/cpu_backend.h"
#include "sample/state.h"

#if defined(__has_feature)
#define WITH_ADDRESS_SANITIZER __has_feature(address_sanitizer)
#elif defined(__SANITIZE_ADDRESS__)
#define WITH_ADDRESS_SANITIZER 1
#endif
#if WITH_ADDRESS_SANITIZER
#include <sanitizer/lsan_interface.h>
#else
static void __lsan_disable(void) {}
static void __lsan_enable(void) {}
#endif

/* A CPU backend whose rank `bad_rank` fails, or hangs, at its n-th call of a kind. One test at a time. */
static struct {
    int32_t bad_rank;
    atomic_int submits_left, collects_left; /* until the failure; negative: none */
    bool hangs;
    bool goes_on; /* after it hung: it writes its results as if nobody had given it up */
    bool fails_to_load;
} fault;

static atomic_bool hang_released, hang_over;

static int32_t rank_of(const qf_backend *backend) { return ((const qf_cpu_backend *)backend)->shard.rank; }

static void write_results(const qf_batch *batch)
{
    for (int32_t i = 0; i < batch->num_logit_tasks; i++) {
        const qf_logit_task *task = &batch->logit_tasks[i];
        if (task->state != NULL) {
            *task->token_id = 1;
            qf_sample_state_append(task->state, 1);
        }
        if (task->logprobs != NULL) {
            task->logprobs[0] = (qf_logprob){.token_id = 1};
        }
    }
}

static qf_status faulty_submit(qf_backend *self, const qf_batch *batch, qf_error *err)
{
    if (rank_of(self) == fault.bad_rank && atomic_fetch_sub(&fault.submits_left, 1) == 0) {
        while (fault.hangs && !atomic_load(&hang_released)) {
            struct timespec time = {.tv_nsec = 1000000};
            (void)nanosleep(&time, NULL);
        }
        if (fault.goes_on) {
            write_results(batch);
        }
        atomic_store(&hang_over, true);
        return QF_FAIL(err, QF_ERROR_BACKEND, "rank %d lost its device", fault.bad_rank);
    }
    return qf_cpu_backend_vtable()->submit(self, batch, err);
}

static qf_status faulty_collect(qf_backend *self, uint64_t *device_time_ns, qf_error *err)
{
    if (rank_of(self) == fault.bad_rank && atomic_fetch_sub(&fault.collects_left, 1) == 0) {
        return QF_FAIL(err, QF_ERROR_BACKEND, "rank %d lost its device", fault.bad_rank);
    }
    return qf_cpu_backend_vtable()->collect(self, device_time_ns, err);
}

static qf_status faulty_create(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t num_blocks,
                               qf_progress_fn progress, void *progress_arg, qf_backend **out, qf_error *err)
{
    if (fault.fails_to_load && qf_checkpoint_get_shard(checkpoint)->rank == fault.bad_rank) {
        *out = NULL;
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "rank %d has no memory", fault.bad_rank);
    }
    if (fault.hangs) {
        __lsan_disable(); /* nobody frees what belongs to a rank that hangs */
    }
    qf_status status =
        qf_cpu_backend_vtable()->create(checkpoint, options, num_blocks, progress, progress_arg, out, err);
    if (fault.hangs) {
        __lsan_enable();
    }
    return status;
}

static qf_backend_vtable faulty_vtable(int32_t bad_rank, int32_t submits, int32_t collects)
{
    qf_backend_vtable vtable = *qf_cpu_backend_vtable();
    vtable.create = faulty_create;
    vtable.submit = faulty_submit;
    vtable.collect = faulty_collect;
    memset(&fault, 0, sizeof fault);
    fault.bad_rank = bad_rank;
    atomic_store(&fault.submits_left, submits);
    atomic_store(&fault.collects_left, collects);
    return vtable;
}

#endif
