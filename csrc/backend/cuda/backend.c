/* The CUDA backend's steps, behind backend.h. A step is enqueued by submit(), which returns while the device works;
 * collect() waits for the oldest one.
 *
 * Its metadata goes ahead on a stream of its own, so that it is copied while the step before computes; buffers are used
 * by turns, and one is free again when the step before last has been collected. Results and times are written to host
 * memory by the device, a step's number last, which is what collect() waits for: between two steps nothing but the wait
 * for metadata that came long ago stands on the main stream. */
#include <stdatomic.h>
#include <time.h>

#include "backend/cuda/cuda.h"
#include "backend/cuda/cuda_backend.h"
#include "sample/state.h"

/* One token a sequence, each sampled on the device, and nothing else wanted: what graphs are captured for. */
static bool is_plain_decode(const qf_batch *batch)
{
    if (batch->num_tokens != batch->num_seqs || batch->num_logit_tasks != batch->num_seqs) {
        return false;
    }
    for (int32_t i = 0; i < batch->num_logit_tasks; i++) {
        const qf_logit_task *task = &batch->logit_tasks[i];
        if (task->state == NULL || task->logits_out != NULL || task->target_logprobs != NULL || qf_cuda_host_row(task)) {
            return false;
        }
    }
    return true;
}

#define SPINS_PER_QUERY 4096 /* looks at a step's number: some 0.2 ms */
#define SPINNING_QUERIES 10
#define SLEEP_NS 50000       /* between looks at a step that takes longer than that */

/* The step's metadata on its way to the device; the main stream waits for it. */
static qf_status send_meta(qf_cuda_backend *self, qf_cuda_step *step, size_t bytes, qf_error *err)
{
    char *to = self->ws.staging[step - self->steps];
    QF_CUDA_CHECK(cudaMemcpyAsync(to, step->meta, bytes, cudaMemcpyHostToDevice, self->meta_stream));
    QF_CUDA_CHECK(cudaEventRecord(step->sent, self->meta_stream));
    QF_CUDA_CHECK(cudaStreamWaitEvent(self->stream, step->sent, 0));
    return QF_OK;
}

static qf_status submit_graph(qf_cuda_backend *self, qf_cuda_step *step, const qf_batch *batch, int32_t padded,
                              qf_error *err)
{
    qf_cuda_meta host;
    qf_cuda_plan made;
    cudaGraphExec_t graph;
    qf_cuda_meta_layout(self, step->meta, padded, padded, padded, qf_cuda_step_max_items(self, NULL, padded), &host);
    QF_TRY(qf_cuda_step_build(self, step, batch, &host, &made, err));
    QF_TRY(qf_cuda_graph_get(self, padded, &made, &graph, err));
    QF_TRY(send_meta(self, step, made.meta_bytes, err));
    QF_CUDA_CHECK(cudaGraphLaunch(graph, self->stream));
    return QF_OK;
}

/* What only the host can do with a row: waits for the device. */
static qf_status finish_row_on_host(qf_cuda_backend *self, const qf_logit_task *task, const float *logits,
                                    int32_t *token_id, qf_error *err)
{
    size_t bytes = (size_t)self->vocab_size * sizeof(float);
    if (task->logits_out != NULL) {
        QF_CUDA_CHECK(cudaMemcpyAsync(task->logits_out, logits, bytes, cudaMemcpyDeviceToHost, self->stream));
    }
    if (!qf_cuda_host_row(task)) {
        return QF_OK;
    }
    QF_CUDA_CHECK(cudaMemcpyAsync(self->host_logits, logits, bytes, cudaMemcpyDeviceToHost, self->stream));
    QF_CUDA_CHECK(cudaStreamSynchronize(self->stream));
    qf_sample(self->sampler, task->state, self->host_logits, task->bitmask, task->token_id, task->logprobs);
    QF_CUDA_CHECK(cudaMemcpyAsync(self->ws.last_token + task->slot, task->token_id, sizeof(int32_t),
                                  cudaMemcpyHostToDevice, self->stream));
    if (self->rank.comm != NULL) { /* for the others */
        QF_CUDA_CHECK(cudaMemcpyAsync(token_id, task->token_id, sizeof(int32_t), cudaMemcpyHostToDevice, self->stream));
    }
    QF_CUDA_CHECK(cudaStreamSynchronize(self->stream));
    return QF_OK;
}

static qf_status logits_and_sampling(qf_cuda_backend *self, const qf_cuda_forward *f, const qf_batch *batch,
                                     int32_t delta_splits, qf_error *err)
{
    for (int32_t first = 0; first < batch->num_logit_tasks; first += self->logit_rows) {
        int32_t left = batch->num_logit_tasks - first;
        int32_t count = left < self->logit_rows ? left : self->logit_rows;
        if (self->options.float32) {
            QF_TRY(qf_cuda_reference_logits(self, f, first, count, err));
        } else {
            QF_TRY(qf_cuda_logits(self, f, first, count, delta_splits, err));
        }
        QF_TRY(qf_cuda_sample_rows(self, f, first, count, false, err));
        for (int32_t i = 0; i < count && qf_cuda_samples(self); i++) {
            QF_TRY(finish_row_on_host(self, &batch->logit_tasks[first + i],
                                      self->ws.all_logits + (size_t)i * (size_t)self->all_logits_stride,
                                      self->ws.token_ids + first + i, err));
        }
        QF_TRY(qf_cuda_share_sampled(self, f, first, count, err));
    }
    return QF_OK;
}

/* Lays out and sends the metadata of a step that is launched kernel by kernel. */
static qf_status begin_eager(qf_cuda_backend *self, qf_cuda_step *step, const qf_batch *batch, qf_cuda_meta *device_meta,
                             qf_cuda_forward *f, qf_error *err)
{
    qf_cuda_meta host;
    int32_t max_items = qf_cuda_step_max_items(self, batch, 0);
    qf_cuda_meta_layout(self, step->meta, batch->num_tokens, batch->num_seqs, batch->num_logit_tasks, max_items, &host);
    qf_cuda_meta_layout(self, self->ws.meta, batch->num_tokens, batch->num_seqs, batch->num_logit_tasks, max_items,
                        device_meta);
    *f = (qf_cuda_forward){.meta = device_meta};
    QF_TRY(qf_cuda_step_build(self, step, batch, &host, &f->plan, err));
    return send_meta(self, step, f->plan.meta_bytes, err);
}

static qf_status submit_eager(qf_cuda_backend *self, qf_cuda_step *step, const qf_batch *batch, qf_error *err)
{
    qf_cuda_meta meta;
    qf_cuda_forward f;
    int32_t delta_splits = 0;
    QF_TRY(begin_eager(self, step, batch, &meta, &f, err));
    QF_TRY(qf_cuda_begin(self, &f, true, err));
    if (self->options.float32) {
        QF_TRY(qf_cuda_reference_layers(self, &f, 0, self->config.num_layers, NULL, NULL, err));
    } else {
        QF_TRY(qf_cuda_layers(self, &f, 0, self->config.num_layers, NULL, NULL, &delta_splits, err));
    }
    QF_TRY(logits_and_sampling(self, &f, batch, delta_splits, err));
    return qf_cuda_step_publish(&self->io, step->num_results, step->num_logprobs, &self->device, self->stream,
                                err);
}

static qf_status cuda_submit(qf_backend *base, const qf_batch *batch, qf_error *err)
{
    qf_cuda_backend *self = (qf_cuda_backend *)base;
    if (self->num_submitted - self->num_collected == QF_CUDA_STEPS_IN_FLIGHT) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "two steps are already in flight");
    }
    qf_cuda_step *step = &self->steps[self->num_submitted % QF_CUDA_STEPS_IN_FLIGHT];
    step->num_results = 0;
    QF_CUDA_CHECK(cudaSetDevice(self->device.ordinal));
    int32_t padded = is_plain_decode(batch) ? qf_cuda_graph_size(self, batch->num_seqs) : 0;
    if (padded > 0) {
        QF_TRY(submit_graph(self, step, batch, padded, err));
    } else {
        QF_TRY(submit_eager(self, step, batch, err));
    }
    self->num_submitted++; /* only of steps that will publish: the device counts those */
    return QF_OK;
}

static bool is_done(const qf_cuda_step *step, uint32_t number)
{
    bool done = *(const volatile uint32_t *)&step->result->number == number;
    atomic_thread_fence(memory_order_acquire);
    return done;
}

static void pause_spinning(bool sleep)
{
    if (sleep) {
        struct timespec time = {.tv_nsec = SLEEP_NS};
        (void)nanosleep(&time, NULL);
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Until the device has published step `number`, counted from 1. A device that fails publishes nothing: its stream is
 * asked from time to time. */
static qf_status wait_for_step(qf_cuda_backend *self, const qf_cuda_step *step, uint32_t number, qf_error *err)
{
    bool sleep = false;
    for (int32_t queries = 0; !is_done(step, number); queries++) {
        for (int32_t i = 0; i < (sleep ? 16 : SPINS_PER_QUERY) && !is_done(step, number); i++) {
            pause_spinning(sleep);
        }
        cudaError_t state = cudaStreamQuery(self->stream);
        (void)cudaGetLastError();
        if (state != cudaSuccess && state != cudaErrorNotReady) {
            return QF_FAIL(err, QF_ERROR_BACKEND, "cuda:%d: %s", self->device.ordinal, cudaGetErrorString(state));
        }
        if (state == cudaSuccess && !is_done(step, number)) {
            return QF_FAIL(err, QF_ERROR_INTERNAL, "step %u has ended without results", number);
        }
        sleep = sleep || queries == SPINNING_QUERIES;
    }
    return QF_OK;
}

static void copy_logprobs(const qf_cuda_step *step, qf_logprob *out, int32_t offset, int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        const qf_cuda_logprob *from = &step->logprobs[offset + i];
        out[i] = (qf_logprob){.token_id = from->token_id, .rank = from->rank, .logprob = from->logprob};
    }
}

static void hand_out(qf_cuda_backend *self, const qf_cuda_step *step)
{
    for (int32_t i = 0; i < step->num_results; i++) {
        const qf_cuda_result *result = &step->results[i];
        if (result->state != NULL && !result->sampled_on_host) {
            int32_t token_id = step->token_ids[i];
            *result->token_id = token_id;
            self->slots[result->slot].num_in_flight--;
            if (token_id >= 0) {
                qf_sample_state_append(result->state, token_id);
                if (result->logprobs != NULL) {
                    copy_logprobs(step, result->logprobs, result->logprobs_offset, result->num_logprobs);
                }
            }
        }
        if (result->target_logprobs != NULL) {
            copy_logprobs(step, result->target_logprobs, result->target_logprobs_offset, result->num_target_logprobs);
        }
    }
}

static qf_status cuda_collect(qf_backend *base, uint64_t *device_time_ns, qf_error *err)
{
    qf_cuda_backend *self = (qf_cuda_backend *)base;
    if (self->num_submitted == self->num_collected) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "no step is in flight");
    }
    qf_cuda_step *step = &self->steps[self->num_collected % QF_CUDA_STEPS_IN_FLIGHT];
    self->num_collected++;
    QF_CUDA_CHECK(cudaSetDevice(self->device.ordinal));
    QF_TRY(wait_for_step(self, step, (uint32_t)self->num_collected, err));
    if (self->rank.comm != NULL) {
        QF_TRY(qf_cuda_comm_check(self->rank.comm, err));
    }
    uint64_t begin_ns = step->result->begin_ns, end_ns = step->result->end_ns;
    begin_ns = begin_ns < self->last_end_ns ? self->last_end_ns : begin_ns; /* time of two steps counts once */
    self->last_end_ns = end_ns;
    if (device_time_ns != NULL) {
        *device_time_ns = end_ns > begin_ns ? end_ns - begin_ns : 0;
    }
    hand_out(self, step);
    return QF_OK;
}

static qf_status run_layers(qf_cuda_backend *self, int32_t first, int32_t last, const qf_batch *batch, float *hidden,
                            qf_tap_fn tap, void *tap_arg, qf_error *err)
{
    qf_cuda_meta meta;
    qf_cuda_forward f;
    size_t bytes = (size_t)batch->num_tokens * (size_t)self->config.hidden_size * sizeof(float);
    QF_TRY(begin_eager(self, &self->steps[self->num_submitted % QF_CUDA_STEPS_IN_FLIGHT], batch, &meta, &f, err));
    QF_TRY(qf_cuda_begin(self, &f, false, err));
    QF_CUDA_CHECK(cudaMemcpyAsync(self->ws.residual, hidden, bytes, cudaMemcpyHostToDevice, self->stream));
    if (self->options.float32) {
        QF_TRY(qf_cuda_reference_layers(self, &f, first, last, tap, tap_arg, err));
    } else {
        int32_t delta_splits;
        QF_TRY(qf_cuda_layers(self, &f, first, last, tap, tap_arg, &delta_splits, err));
        QF_TRY(qf_cuda_flush_delta(self, &f, delta_splits, err));
    }
    QF_CUDA_CHECK(cudaMemcpyAsync(hidden, self->ws.residual, bytes, cudaMemcpyDeviceToHost, self->stream));
    QF_CUDA_CHECK(cudaStreamSynchronize(self->stream));
    return QF_OK; /* nothing was published: the next step has the same parity */
}

static qf_status cuda_forward_layers(qf_backend *base, int32_t first, int32_t last, const qf_batch *batch,
                                     float *hidden, qf_tap_fn tap, void *tap_arg, qf_error *err)
{
    qf_cuda_backend *self = (qf_cuda_backend *)base;
    if (first < 0 || last > self->config.num_layers || first > last) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "layers [%d, %d) are not within the model's %d", first, last,
                       self->config.num_layers);
    }
    if (batch->num_tokens > self->options.max_num_batched_tokens) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%d tokens exceed max_num_batched_tokens %d",
                       batch->num_tokens, self->options.max_num_batched_tokens);
    }
    if (self->num_submitted != self->num_collected) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "a step is in flight");
    }
    QF_CUDA_CHECK(cudaSetDevice(self->device.ordinal));
    return run_layers(self, first, last, batch, hidden, tap, tap_arg, err);
}

static const char *cuda_describe(const qf_backend *base) { return ((const qf_cuda_backend *)base)->description; }

const qf_backend_vtable *qf_cuda_backend_vtable(void)
{
    static const qf_backend_vtable vtable = {.name = "cuda",
                                             .has_own_memory = true,
                                             .device_memory = qf_cuda_device_memory,
                                             .plan_memory = qf_cuda_plan_memory,
                                             .create = qf_cuda_create,
                                             .destroy = qf_cuda_destroy,
                                             .submit = cuda_submit,
                                             .collect = cuda_collect,
                                             .forward_layers = cuda_forward_layers,
                                             .describe = cuda_describe,
                                             .traffic = qf_cuda_traffic,
                                             .energy = qf_cuda_energy_read,
                                             .create_comms = qf_cuda_create_comms};
    return &vtable;
}
