#include "fake_backend.h"

#include <pthread.h>
#include <stdbool.h>
#include <time.h>

#include "base/alloc.h"

#define FAKE_BLOCK_BYTES 4096
#define FAKE_STEPS 2

typedef struct fake_backend {
    qf_backend base;
    int32_t block_size, vocab_size, max_model_len;
    int32_t *kv;         /* (num_blocks * block_size) token id of each position */
    int32_t *last_token; /* (max_num_seqs) */
    int32_t *context;    /* (max_model_len) */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t device;
    bool closing;
    const qf_batch *queue[FAKE_STEPS];
    int32_t num_queued, num_done;
    int64_t num_steps;
    int64_t fail_at_step;
    uint64_t random;
} fake_backend;

int32_t fake_next_token(const int32_t *context, int32_t num_tokens, int32_t vocab_size)
{
    uint64_t hash = 1469598103934665603u;
    for (int32_t i = 0; i < num_tokens; i++) {
        hash = (hash ^ (uint64_t)(uint32_t)context[i]) * 1099511628211u;
        hash ^= hash >> 29;
    }
    return (int32_t)((hash >> 20) % (uint64_t)vocab_size);
}

static void run_sequence(fake_backend *self, const qf_batch *batch, int32_t s, int32_t *task)
{
    const int32_t *table = batch->block_tables + (int64_t)s * batch->block_table_stride;
    for (int32_t row = batch->query_start_loc[s]; row < batch->query_start_loc[s + 1]; row++) {
        int32_t token_id = batch->token_ids[row];
        self->kv[batch->slot_mapping[row]] = token_id >= 0 ? token_id : self->last_token[-1 - token_id];
    }
    for (; *task < batch->num_logit_tasks && batch->logit_tasks[*task].row < batch->query_start_loc[s + 1]; (*task)++) {
        const qf_logit_task *t = &batch->logit_tasks[*task];
        int32_t length = batch->positions[t->row] + 1;
        for (int32_t i = 0; i < length; i++) {
            self->context[i] = self->kv[table[i / self->block_size] * self->block_size + i % self->block_size];
        }
        int32_t token_id = fake_next_token(self->context, length, self->vocab_size);
        if (t->bitmask != NULL && (t->bitmask[token_id / 32] >> (token_id % 32) & 1u) == 0) {
            token_id = -1; /* the test's masks allow exactly the expected token */
        }
        if (t->token_id != NULL) {
            self->last_token[t->slot] = token_id;
            *t->token_id = token_id;
        }
    }
}

static void *device_main(void *arg)
{
    fake_backend *self = arg;
    (void)pthread_mutex_lock(&self->lock);
    for (;;) {
        while (self->num_done == self->num_queued && !self->closing) {
            (void)pthread_cond_wait(&self->changed, &self->lock);
        }
        if (self->num_done == self->num_queued) {
            break;
        }
        const qf_batch *batch = self->queue[self->num_done];
        self->random = self->random * 6364136223846793005u + 1442695040888963407u;
        long delay_us = (long)(self->random >> 33) % 60;
        (void)pthread_mutex_unlock(&self->lock);
        struct timespec delay = {.tv_nsec = delay_us * 1000};
        (void)nanosleep(&delay, NULL);
        int32_t task = 0;
        for (int32_t s = 0; s < batch->num_seqs; s++) {
            run_sequence(self, batch, s, &task);
        }
        (void)pthread_mutex_lock(&self->lock);
        self->num_done++;
        (void)pthread_cond_broadcast(&self->changed);
    }
    (void)pthread_mutex_unlock(&self->lock);
    return NULL;
}

static qf_status fake_plan_memory(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                                  qf_memory_plan *out, qf_error *err)
{
    (void)checkpoint;
    (void)options;
    (void)err;
    *out = (qf_memory_plan){.kv_block_bytes = FAKE_BLOCK_BYTES};
    return QF_OK;
}

static void fake_destroy(qf_backend *base)
{
    fake_backend *self = (fake_backend *)base;
    if (self == NULL) {
        return;
    }
    (void)pthread_mutex_lock(&self->lock);
    self->closing = true;
    (void)pthread_cond_broadcast(&self->changed);
    (void)pthread_mutex_unlock(&self->lock);
    (void)pthread_join(self->device, NULL);
    (void)pthread_cond_destroy(&self->changed);
    (void)pthread_mutex_destroy(&self->lock);
    qf_free(self->kv);
    qf_free(self->last_token);
    qf_free(self->context);
    qf_free(self);
}

static qf_status create(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t num_blocks,
                        const qf_backend_vtable *vtable, int64_t fail_at_step, qf_backend **out, qf_error *err)
{
    fake_backend *self = NULL;
    qf_status status;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "a fake backend", err));
    self->base.vtable = vtable;
    self->block_size = options->block_size;
    self->vocab_size = qf_checkpoint_config(checkpoint)->vocab_size;
    self->fail_at_step = fail_at_step;
    QF_TRY_GOTO(qf_alloc((void **)&self->kv, (size_t)num_blocks * (size_t)options->block_size, sizeof(int32_t), "kv",
                         err), fail);
    QF_TRY_GOTO(qf_alloc((void **)&self->last_token, (size_t)options->max_num_seqs, sizeof(int32_t), "slots", err),
                fail);
    QF_TRY_GOTO(qf_alloc((void **)&self->context, (size_t)options->max_model_len, sizeof(int32_t), "context", err),
                fail);
    (void)pthread_mutex_init(&self->lock, NULL);
    (void)pthread_cond_init(&self->changed, NULL);
    (void)pthread_create(&self->device, NULL, device_main, self);
    *out = &self->base;
    return QF_OK;
fail:
    qf_free(self->kv);
    qf_free(self->last_token);
    qf_free(self->context);
    qf_free(self);
    return status;
}

static qf_status fake_create(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t num_blocks,
                             qf_progress_fn progress, void *progress_arg, qf_backend **out, qf_error *err)
{
    (void)progress;
    (void)progress_arg;
    return create(checkpoint, options, num_blocks, fake_backend_vtable(), 0, out, err);
}

static qf_status failing_create(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                                int32_t num_blocks, qf_progress_fn progress, void *progress_arg, qf_backend **out,
                                qf_error *err)
{
    (void)progress;
    (void)progress_arg;
    return create(checkpoint, options, num_blocks, failing_backend_vtable(), 5, out, err);
}

static qf_status fake_submit(qf_backend *base, const qf_batch *batch, qf_error *err)
{
    fake_backend *self = (fake_backend *)base;
    qf_status status = QF_OK;
    (void)pthread_mutex_lock(&self->lock);
    if (self->num_queued == FAKE_STEPS) {
        status = QF_FAIL(err, QF_ERROR_INTERNAL, "too many steps in flight");
    } else {
        self->queue[self->num_queued++] = batch;
        (void)pthread_cond_broadcast(&self->changed);
    }
    (void)pthread_mutex_unlock(&self->lock);
    return status;
}

static qf_status fake_collect(qf_backend *base, uint64_t *device_time_ns, qf_error *err)
{
    fake_backend *self = (fake_backend *)base;
    qf_status status = QF_OK;
    (void)pthread_mutex_lock(&self->lock);
    if (self->num_queued == 0) {
        (void)pthread_mutex_unlock(&self->lock);
        return QF_FAIL(err, QF_ERROR_INTERNAL, "no step is in flight");
    }
    while (self->num_done == 0) {
        (void)pthread_cond_wait(&self->changed, &self->lock);
    }
    self->queue[0] = self->queue[1];
    self->num_queued--;
    self->num_done--;
    if (device_time_ns != NULL) {
        *device_time_ns = 1000;
    }
    if (++self->num_steps == self->fail_at_step) {
        status = QF_FAIL(err, QF_ERROR_BACKEND, "the fake device failed at step %lld", (long long)self->num_steps);
    }
    (void)pthread_mutex_unlock(&self->lock);
    return status;
}

static qf_status fake_forward_layers(qf_backend *base, int32_t first, int32_t last, const qf_batch *batch,
                                     float *hidden, qf_tap_fn tap, void *tap_arg, qf_error *err)
{
    (void)base;
    (void)first;
    (void)last;
    (void)batch;
    (void)hidden;
    (void)tap;
    (void)tap_arg;
    return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED, "the fake backend has no layers");
}

static const char *fake_describe(const qf_backend *base)
{
    (void)base;
    return "fake";
}

const qf_backend_vtable *fake_backend_vtable(void)
{
    static const qf_backend_vtable vtable = {.name = "fake",
                                             .plan_memory = fake_plan_memory,
                                             .create = fake_create,
                                             .destroy = fake_destroy,
                                             .submit = fake_submit,
                                             .collect = fake_collect,
                                             .forward_layers = fake_forward_layers,
                                             .describe = fake_describe};
    return &vtable;
}

const qf_backend_vtable *failing_backend_vtable(void)
{
    static const qf_backend_vtable vtable = {.name = "failing",
                                             .plan_memory = fake_plan_memory,
                                             .create = failing_create,
                                             .destroy = fake_destroy,
                                             .submit = fake_submit,
                                             .collect = fake_collect,
                                             .forward_layers = fake_forward_layers,
                                             .describe = fake_describe};
    return &vtable;
}
