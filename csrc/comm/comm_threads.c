/* Ranks as threads that share their memory. An all-reduce is cut among the ranks: each adds up its part of every
 * rank's input, in the order of the ranks, and writes it to every rank's output. So each element is added once, by one
 * thread, and all ranks get the same bits. */
/* needs: base/event.c base/cpu_count.c */
#include <stdatomic.h>
#include <string.h>

#include "base/alloc.h"
#include "base/event.h"
#include "base/threads.h"
#include "comm/comm.h"

#define MAX_RANKS 1024
#define SPIN_NS 20000
/* Elements of a part are a multiple of this, so that no cache line is written by two ranks. */
#define PART_UNIT 16
/* Partial sums stay in the first-level cache. */
#define CHUNK 1024

typedef struct rank_post {
    const float *in;
    void *out;
} rank_post;

/* What the ranks share. A rank writes its post, then passes the barrier; others read it before the next one. */
typedef struct thread_group {
    qf_event passed; /* the barrier opened, or the group was aborted */
    atomic_int num_arrived;
    atomic_bool aborted;
    atomic_int num_handles;
    int32_t size;
    int64_t spin_ns;
    rank_post *posts; /* (size) */
} thread_group;

typedef struct thread_comm {
    qf_comm base;
    thread_group *group;
} thread_comm;

static qf_status aborted(qf_error *err)
{
    return QF_FAIL(err, QF_ERROR_BACKEND, "the ranks' communicator was aborted");
}

/* All ranks arrive before one leaves. */
static qf_status meet(thread_group *group, qf_error *err)
{
    unsigned seen = qf_event_count(&group->passed);
    if (atomic_load(&group->aborted)) {
        return aborted(err);
    }
    if (atomic_fetch_add(&group->num_arrived, 1) == group->size - 1) {
        atomic_store(&group->num_arrived, 0);
        qf_event_signal(&group->passed);
        return QF_OK;
    }
    (void)qf_event_wait(&group->passed, seen, group->spin_ns, QF_EVENT_FOREVER);
    return atomic_load(&group->aborted) ? aborted(err) : QF_OK;
}

/* Elements begin .. end - 1 of every rank's output. */
static void add_up(const thread_group *group, size_t begin, size_t end)
{
    float sums[CHUNK];
    for (size_t at = begin; at < end; at += CHUNK) {
        size_t count = end - at < CHUNK ? end - at : CHUNK;
        memcpy(sums, group->posts[0].in + at, count * sizeof *sums);
        for (int32_t rank = 1; rank < group->size; rank++) {
            const float *in = group->posts[rank].in + at;
            for (size_t i = 0; i < count; i++) {
                sums[i] += in[i];
            }
        }
        for (int32_t rank = 0; rank < group->size; rank++) {
            memcpy((float *)group->posts[rank].out + at, sums, count * sizeof *sums);
        }
    }
}

static qf_status threads_all_reduce(qf_comm *base, const qf_all_reduce_args *args, qf_error *err)
{
    thread_group *group = ((thread_comm *)base)->group;
    if (args->dtype != QF_DTYPE_F32) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "an all-reduce between threads takes F32; got %s",
                       qf_dtype_name(args->dtype));
    }
    group->posts[base->rank] = (rank_post){.in = args->in, .out = args->out};
    QF_TRY(meet(group, err));
    size_t units = (args->count + PART_UNIT - 1) / PART_UNIT, rank = (size_t)base->rank, size = (size_t)base->size;
    size_t begin = units * rank / size * PART_UNIT, end = units * (rank + 1) / size * PART_UNIT;
    add_up(group, begin, end < args->count ? end : args->count);
    return meet(group, err);
}

static qf_status threads_gather(qf_comm *base, const qf_gather_args *args, qf_error *err)
{
    thread_group *group = ((thread_comm *)base)->group;
    size_t width = qf_dtype_size(args->dtype);
    size_t row_bytes = (size_t)args->columns * width, out_row_bytes = (size_t)args->out_columns * width;
    if (base->rank == args->root) {
        group->posts[base->rank].out = args->out;
    }
    QF_TRY(meet(group, err));
    char *out = (char *)group->posts[args->root].out + (size_t)args->first_column * width;
    for (size_t row = 0; row < (size_t)args->num_rows; row++) {
        memcpy(out + row * out_row_bytes, (const char *)args->in + row * row_bytes, row_bytes);
    }
    return meet(group, err);
}

static qf_status threads_broadcast(qf_comm *base, int32_t root, void *data, size_t size_bytes, void *stream,
                                   qf_error *err)
{
    (void)stream;
    thread_group *group = ((thread_comm *)base)->group;
    if (base->rank == root) {
        group->posts[root].out = data;
    }
    QF_TRY(meet(group, err));
    if (base->rank != root) {
        memcpy(data, group->posts[root].out, size_bytes);
    }
    return meet(group, err);
}

static qf_status threads_barrier(qf_comm *base, qf_error *err) { return meet(((thread_comm *)base)->group, err); }

static void threads_abort(qf_comm *base)
{
    thread_group *group = ((thread_comm *)base)->group;
    atomic_store(&group->aborted, true);
    qf_event_signal(&group->passed);
}

static void free_group(thread_group *group)
{
    qf_event_deinit(&group->passed);
    qf_free(group->posts);
    qf_free(group);
}

static void threads_destroy(qf_comm *base)
{
    if (base == NULL) {
        return;
    }
    thread_group *group = ((thread_comm *)base)->group;
    qf_free(base);
    if (atomic_fetch_sub(&group->num_handles, 1) == 1) {
        free_group(group);
    }
}

static qf_status create_group(int32_t size, thread_group **out, qf_error *err)
{
    qf_status status;
    thread_group *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "a communicator", err));
    QF_TRY_GOTO(qf_alloc((void **)&self->posts, (size_t)size, sizeof *self->posts, "a communicator's posts", err), fail);
    QF_TRY_GOTO(qf_event_init(&self->passed, err), fail);
    self->size = size;
    self->spin_ns = size <= qf_cpu_count() ? SPIN_NS : 0;
    *out = self;
    return QF_OK;
fail:
    qf_free(self->posts);
    qf_free(self);
    return status;
}

qf_status qf_comm_threads_create(int32_t size, qf_comm **out, qf_error *err)
{
    static const qf_comm_vtable vtable = {.name = "threads",
                                          .all_reduce = threads_all_reduce,
                                          .gather = threads_gather,
                                          .broadcast = threads_broadcast,
                                          .barrier = threads_barrier,
                                          .abort = threads_abort,
                                          .destroy = threads_destroy};
    if (size < 1 || size > MAX_RANKS) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "a communicator of %d ranks; expected 1 to %d", size, MAX_RANKS);
    }
    thread_group *group;
    QF_TRY(create_group(size, &group, err));
    for (int32_t rank = 0; rank < size; rank++) {
        thread_comm *comm;
        qf_status status = qf_alloc((void **)&comm, 1, sizeof *comm, "a communicator's handle", err);
        if (status != QF_OK) {
            for (int32_t i = 0; i < rank; i++) {
                qf_free(out[i]);
            }
            free_group(group);
            return status;
        }
        comm->base = (qf_comm){.vtable = &vtable, .rank = rank, .size = size};
        comm->group = group;
        out[rank] = &comm->base;
    }
    atomic_store(&group->num_handles, size);
    return QF_OK;
}
