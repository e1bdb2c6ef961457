/* needs: backend/parallel_plan.c backend/ranks.c comm/comm_threads.c */
#include "backend/parallel.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "backend/parallel_plan.h"
#include "backend/ranks.h"
#include "base/alloc.h"
#include "model/parallel.h"

/* A device's step may be shorter than waking a thread, and its rank's thread has nothing else to do. */
#define HOST_SPIN_NS 20000
#define DEVICE_SPIN_NS 200000
/* 24 days. A wait without an end would go on when a rank has failed and another hangs. */
#define NO_LIMIT_MS INT32_MAX

typedef struct rank_state {
    qf_backend_options options;
    qf_checkpoint *view; /* while loading */
    qf_comm *comm;
    qf_backend *backend;
    struct parallel_backend *owner;
    int32_t rank;
    uint64_t step_ns;       /* of the step collected last */
    size_t done_bytes;      /* of loading; guarded by the owner's lock */
} rank_state;

typedef struct parallel_backend {
    qf_backend base;
    const qf_backend_vtable *inner;
    int32_t size, hidden_size;
    int64_t step_timeout_ms;
    rank_state *ranks; /* (size) */
    qf_ranks *threads;
    /* Loading: ranks report under the lock, and the creating thread tells the caller. */
    pthread_mutex_t lock;
    bool stop_loading;
    size_t total_bytes;
    int32_t num_blocks;
    char description[384];
} parallel_backend;

/* --- loading -------------------------------------------------------------------------------------------- */

static void abort_ranks(void *owner)
{
    parallel_backend *self = owner;
    for (int32_t i = 0; i < self->size; i++) {
        self->ranks[i].comm->vtable->abort(self->ranks[i].comm);
    }
}

static bool report_rank(void *arg, size_t done_bytes, size_t total_bytes)
{
    (void)total_bytes;
    rank_state *rank = arg;
    parallel_backend *self = rank->owner;
    (void)pthread_mutex_lock(&self->lock);
    rank->done_bytes = done_bytes;
    bool go_on = !self->stop_loading;
    (void)pthread_mutex_unlock(&self->lock);
    qf_ranks_nudge(self->threads);
    return go_on;
}

static qf_status create_rank(void *owner, int32_t index, const void *arg, qf_error *err)
{
    (void)arg;
    parallel_backend *self = owner;
    rank_state *rank = &self->ranks[index];
    return self->inner->create(rank->view, &rank->options, self->num_blocks, report_rank, rank, &rank->backend, err);
}

static qf_status destroy_rank(void *owner, int32_t index, const void *arg, qf_error *err)
{
    (void)arg;
    (void)err;
    parallel_backend *self = owner;
    self->inner->destroy(self->ranks[index].backend);
    self->ranks[index].backend = NULL;
    return QF_OK;
}

/* Waits for the ranks, and passes their progress on: to the caller on its own thread. */
static qf_status wait_for_load(parallel_backend *self, uint64_t ticket, qf_progress_fn progress, void *progress_arg,
                               qf_error *err)
{
    size_t told_bytes = SIZE_MAX;
    for (;;) {
        unsigned seen = qf_ranks_nudges(self->threads);
        bool done = qf_ranks_done(self->threads, ticket);
        size_t done_bytes = 0;
        (void)pthread_mutex_lock(&self->lock);
        for (int32_t i = 0; i < self->size; i++) {
            done_bytes += self->ranks[i].done_bytes;
        }
        bool stopped = self->stop_loading;
        (void)pthread_mutex_unlock(&self->lock);
        done_bytes = done_bytes < self->total_bytes ? done_bytes : self->total_bytes;
        if (progress != NULL && !stopped && done_bytes != told_bytes && done_bytes > 0) {
            told_bytes = done_bytes;
            if (!progress(progress_arg, done_bytes, self->total_bytes)) {
                (void)pthread_mutex_lock(&self->lock);
                self->stop_loading = true;
                (void)pthread_mutex_unlock(&self->lock);
            }
        }
        if (done) {
            break;
        }
        qf_ranks_pause(self->threads, seen);
    }
    QF_TRY(qf_ranks_wait(self->threads, ticket, -1, err));
    /* The ranks had reported everything before the caller said no. */
    return self->stop_loading ? QF_FAIL(err, QF_ERROR_STATE, "loading was stopped at its end") : QF_OK;
}

static qf_status prepare_ranks(parallel_backend *self, const qf_checkpoint *checkpoint,
                               const qf_backend_options *options, qf_error *err)
{
    qf_status status;
    qf_comm **comms;
    QF_TRY(qf_alloc((void **)&comms, (size_t)self->size, sizeof(qf_comm *), "communicators", err));
    status = self->inner->create_comms != NULL ? self->inner->create_comms(options, self->size, comms, err)
                                               : qf_comm_threads_create(self->size, comms, err);
    for (int32_t i = 0; status == QF_OK && i < self->size; i++) {
        self->ranks[i].comm = comms[i];
    }
    qf_free(comms);
    QF_TRY(status);
    for (int32_t i = 0; i < self->size; i++) {
        rank_state *rank = &self->ranks[i];
        qf_memory_plan plan;
        rank->owner = self;
        rank->rank = i;
        rank->options = qf_parallel_rank_options(options, i);
        rank->options.comm = rank->comm;
        QF_TRY(qf_checkpoint_shard(checkpoint, i, self->size, &rank->view, err));
        QF_TRY(self->inner->plan_memory(rank->view, &rank->options, &plan, err));
        self->total_bytes += plan.embedding_bytes + plan.layers_bytes + plan.head_bytes;
    }
    return QF_OK;
}

static void close_views(parallel_backend *self)
{
    for (int32_t i = 0; i < self->size; i++) {
        qf_checkpoint_close(self->ranks[i].view);
        self->ranks[i].view = NULL;
    }
}

static void parallel_destroy(qf_backend *base)
{
    parallel_backend *self = (parallel_backend *)base;
    if (self == NULL) {
        return;
    }
    if (self->threads != NULL) {
        (void)qf_ranks_post(self->threads, destroy_rank, NULL, true);
        if (!qf_ranks_destroy(self->threads)) {
            return; /* a rank hangs, and may wake up yet: what it holds is left to it */
        }
    }
    close_views(self);
    for (int32_t i = 0; i < self->size; i++) {
        if (self->ranks[i].comm != NULL) {
            self->ranks[i].comm->vtable->destroy(self->ranks[i].comm);
        }
    }
    (void)pthread_mutex_destroy(&self->lock);
    qf_free(self->ranks);
    qf_free(self);
}

static void describe_ranks(parallel_backend *self)
{
    int32_t num_widened = 0;
    for (int32_t i = 0; i < self->size; i++) {
        num_widened += self->ranks[i].backend->num_widened;
    }
    (void)snprintf(self->description, sizeof self->description, "%d x %s", self->size,
                   self->inner->describe(self->ranks[0].backend));
    if (num_widened > 0) {
        const size_t used = strlen(self->description);
        (void)snprintf(self->description + used, sizeof self->description - used,
                       ", %d parts of linears in %s bits: cut inside groups", num_widened,
                       self->inner->has_own_memory ? "16" : "32");
    }
}

static qf_status load(parallel_backend *self, const qf_checkpoint *checkpoint, const qf_backend_options *options,
                      qf_progress_fn progress, void *progress_arg, qf_error *err)
{
    QF_TRY(prepare_ranks(self, checkpoint, options, err));
    int64_t spin_ns = self->inner->has_own_memory ? DEVICE_SPIN_NS : HOST_SPIN_NS;
    QF_TRY(qf_ranks_create(self->size, spin_ns, self, abort_ranks, &self->threads, err));
    uint64_t ticket = qf_ranks_post(self->threads, create_rank, NULL, false);
    QF_TRY(wait_for_load(self, ticket, progress, progress_arg, err));
    close_views(self);
    self->base.isa = self->ranks[0].backend->isa;
    describe_ranks(self);
    return QF_OK;
}

static qf_status parallel_create(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                                 int32_t num_blocks, qf_progress_fn progress, void *progress_arg, qf_backend **out,
                                 qf_error *err)
{
    parallel_backend *self;
    *out = NULL;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "the backend of several ranks", err));
    if (pthread_mutex_init(&self->lock, NULL) != 0) {
        qf_free(self);
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot create a lock for the ranks");
    }
    self->base.vtable = qf_parallel_backend_vtable(options->rank_backend);
    self->inner = options->rank_backend;
    self->step_timeout_ms = options->step_timeout_ms > 0 ? options->step_timeout_ms : NO_LIMIT_MS;
    self->num_blocks = num_blocks;
    self->hidden_size = qf_checkpoint_config(checkpoint)->hidden_size;
    qf_status status = qf_alloc((void **)&self->ranks, (size_t)options->tensor_parallel_size, sizeof *self->ranks,
                                "the ranks", err);
    if (status == QF_OK) {
        self->size = options->tensor_parallel_size;
        status = load(self, checkpoint, options, progress, progress_arg, err);
    }
    if (status != QF_OK) {
        parallel_destroy(&self->base);
        return status;
    }
    *out = &self->base;
    return QF_OK;
}

/* --- steps ---------------------------------------------------------------------------------------------- */

static qf_status submit_rank(void *owner, int32_t index, const void *arg, qf_error *err)
{
    parallel_backend *self = owner;
    return self->inner->submit(self->ranks[index].backend, arg, err);
}

static qf_status collect_rank(void *owner, int32_t index, const void *arg, qf_error *err)
{
    (void)arg;
    parallel_backend *self = owner;
    rank_state *rank = &self->ranks[index];
    return self->inner->collect(rank->backend, &rank->step_ns, err);
}

/* A failure shows when the step is collected. */
static qf_status parallel_submit(qf_backend *base, const qf_batch *batch, qf_error *err)
{
    (void)err;
    (void)qf_ranks_post(((parallel_backend *)base)->threads, submit_rank, batch, false);
    return QF_OK;
}

static qf_status parallel_collect(qf_backend *base, uint64_t *device_time_ns, qf_error *err)
{
    parallel_backend *self = (parallel_backend *)base;
    uint64_t ticket = qf_ranks_post(self->threads, collect_rank, NULL, false);
    qf_status status = qf_ranks_wait(self->threads, ticket, self->step_timeout_ms, err);
    self->base.left_behind = qf_ranks_lost(self->threads);
    QF_TRY(status);
    uint64_t longest_ns = 0;
    for (int32_t i = 0; i < self->size; i++) {
        longest_ns = self->ranks[i].step_ns > longest_ns ? self->ranks[i].step_ns : longest_ns;
    }
    if (device_time_ns != NULL) {
        *device_time_ns = longest_ns;
    }
    return QF_OK;
}

typedef struct layers_call {
    int32_t first, last;
    const qf_batch *batch;
    float *hidden; /* (size, num_tokens, hidden_size): the ranks add to it in place */
    size_t count;  /* num_tokens * hidden_size */
} layers_call;

static qf_status forward_rank(void *owner, int32_t index, const void *arg, qf_error *err)
{
    parallel_backend *self = owner;
    const layers_call *call = arg;
    return self->inner->forward_layers(self->ranks[index].backend, call->first, call->last, call->batch,
                                       call->hidden + (size_t)index * call->count, NULL, NULL, err);
}

static qf_status parallel_forward_layers(qf_backend *base, int32_t first, int32_t last, const qf_batch *batch,
                                         float *hidden, qf_tap_fn tap, void *tap_arg, qf_error *err)
{
    (void)tap_arg;
    parallel_backend *self = (parallel_backend *)base;
    if (tap != NULL) {
        return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED, "a tap with tensor_parallel_size=%d: a rank sees only its part of "
                       "a linear's input", self->size);
    }
    layers_call call = {.first = first, .last = last, .batch = batch,
                        .count = (size_t)batch->num_tokens * (size_t)self->hidden_size};
    size_t bytes = call.count * sizeof *hidden;
    QF_TRY(qf_alloc((void **)&call.hidden, (size_t)self->size, bytes, "the ranks' hidden states", err));
    for (size_t i = 0; i < (size_t)self->size; i++) {
        memcpy(call.hidden + i * call.count, hidden, bytes);
    }
    uint64_t ticket = qf_ranks_post(self->threads, forward_rank, &call, false);
    qf_status status = qf_ranks_wait(self->threads, ticket, -1, err);
    memcpy(hidden, call.hidden, bytes);
    qf_free(call.hidden);
    return status;
}

/* --- figures -------------------------------------------------------------------------------------------- */

static const char *parallel_describe(const qf_backend *base) { return ((const parallel_backend *)base)->description; }

static void parallel_traffic(const qf_backend *base, int32_t num_tokens, int32_t num_rows, qf_step_traffic *out)
{
    const parallel_backend *self = (const parallel_backend *)base;
    if (self->inner->traffic == NULL) {
        return; /* the caller has filled in what it assumes then */
    }
    *out = (qf_step_traffic){0};
    for (int32_t i = 0; i < self->size; i++) {
        qf_step_traffic rank;
        self->inner->traffic(self->ranks[i].backend, num_tokens, num_rows, &rank);
        out->layers_bytes += rank.layers_bytes;
        out->head_bytes += rank.head_bytes;
        out->embedding_bytes += rank.embedding_bytes;
        out->activation_bytes += rank.activation_bytes;
        out->logit_bytes += rank.logit_bytes;
        out->host_bytes += rank.host_bytes;
        out->host_embedding_bytes += rank.host_embedding_bytes;
    }
}

/* Measured only where every device is. */
static bool parallel_energy(qf_backend *base, uint64_t *energy_uj, char *note, size_t note_bytes)
{
    parallel_backend *self = (parallel_backend *)base;
    uint64_t total_uj = 0;
    if (self->inner->energy == NULL) {
        (void)snprintf(note, note_bytes, "the devices have no counter");
        return false;
    }
    for (int32_t i = 0; i < self->size; i++) {
        uint64_t rank_uj = 0;
        if (!self->inner->energy(self->ranks[i].backend, &rank_uj, note, note_bytes)) {
            return false;
        }
        total_uj += rank_uj;
    }
    *energy_uj = total_uj;
    size_t used = strlen(note);
    (void)snprintf(note + used, note_bytes - used, "; %d devices", self->size);
    return true;
}

#define COMMON                                                                                                     \
    .plan_memory = qf_parallel_plan_memory, .create = parallel_create, .destroy = parallel_destroy,                   \
    .submit = parallel_submit, .collect = parallel_collect, .forward_layers = parallel_forward_layers,             \
    .describe = parallel_describe, .traffic = parallel_traffic

const qf_backend_vtable *qf_parallel_backend_vtable(const qf_backend_vtable *rank_backend)
{
    static const qf_backend_vtable on_host = {.name = "cpu", COMMON};
    static const qf_backend_vtable on_devices = {.name = "cuda",
                                                 .has_own_memory = true,
                                                 .device_memory = qf_parallel_device_memory,
                                                 .energy = parallel_energy,
                                                 COMMON};
    return rank_backend->has_own_memory ? &on_devices : &on_host;
}
