/* Creation, shutdown and the small queries of an engine. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/eventfd.h>
#endif

#include "base/alloc.h"
#include "base/hash.h"
#include "engine/engine.h"

/* --- creation and destruction -------------------------------------------------------------------------- */

static qf_status open_event_fd(qf_engine *self, qf_error *err)
{
#ifdef __linux__
    self->event_read_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    self->event_write_fd = self->event_read_fd;
    if (self->event_read_fd >= 0) {
        return QF_OK;
    }
#else
    int fds[2];
    if (pipe(fds) == 0) {
        self->event_read_fd = fds[0];
        self->event_write_fd = fds[1];
        for (int i = 0; i < 2; i++) {
            (void)fcntl(fds[i], F_SETFD, FD_CLOEXEC);
            (void)fcntl(fds[i], F_SETFL, O_NONBLOCK);
        }
        return QF_OK;
    }
#endif
    return QF_FAIL(err, QF_ERROR_IO, "cannot create an event descriptor: %s", strerror(errno));
}

/* What only the driver uses: freed as soon as it has stopped. */
static void free_machinery(qf_engine *self)
{
    qf_energy_stop(self);
    qf_rapl_deinit(&self->sampler.rapl);
    if (self->backend != NULL) {
        self->left_behind = self->backend->left_behind;
        self->backend->vtable->destroy(self->backend);
        self->backend = NULL;
    }
    qf_scheduler_destroy(self->scheduler);
    self->scheduler = NULL;
    qf_block_pool_destroy(self->pool);
    self->pool = NULL;
    for (int32_t i = 0; i < QF_MAX_STEPS_IN_FLIGHT && !self->left_behind; i++) {
        qf_step_deinit(&self->steps[i]);
    }
}

void qf_engine_free(qf_engine *self)
{
    free_machinery(self);
    qf_meter_deinit(&self->meter);
    qf_vocabulary_destroy(self->vocabulary);
    if (self->event_read_fd >= 0) {
        (void)close(self->event_read_fd);
    }
    if (self->event_write_fd >= 0 && self->event_write_fd != self->event_read_fd) {
        (void)close(self->event_write_fd);
    }
    (void)pthread_cond_destroy(&self->sampler.wake);
    (void)pthread_cond_destroy(&self->wake);
    (void)pthread_mutex_destroy(&self->lock);
    if (!self->left_behind) {
        qf_free(self);
    }
}

static qf_status create_machinery(qf_engine *self, const qf_engine_options *options, const qf_checkpoint *checkpoint,
                                  qf_error *err)
{
    const qf_resolved_options *resolved = &self->resolved;
    qf_scheduler_config scheduler = {.max_num_seqs = resolved->backend.max_num_seqs,
                                     .max_num_batched_tokens = resolved->backend.max_num_batched_tokens,
                                     .max_model_len = resolved->backend.max_model_len,
                                     .max_steps_in_flight = resolved->max_steps_in_flight,
                                     .window_tokens = resolved->backend.kv_window_tokens,
                                     .num_window_blocks = resolved->plan.num_window_blocks};
    if (scheduler.window_tokens > 0) { /* at most 1024 layers of windows below 2^21 */
        int32_t layers = self->config.num_layers - resolved->num_kv_cache_16bit_layers;
        int64_t margin = (int64_t)layers * (scheduler.window_tokens - 1);
        scheduler.prefix_margin_tokens = margin < INT32_MAX ? (int32_t)margin : INT32_MAX;
    }
    QF_TRY(qf_block_pool_create(resolved->num_blocks, resolved->backend.block_size, resolved->enable_prefix_caching,
                                qf_random_u64(), &self->pool, err));
    QF_TRY(qf_scheduler_create(&scheduler, self->pool, &self->scheduler, err));
    for (int32_t i = 0; i < QF_MAX_STEPS_IN_FLIGHT; i++) {
        QF_TRY(qf_step_init(&self->steps[i], resolved, err));
    }
    QF_TRY(open_event_fd(self, err));
    QF_TRY(resolved->vtable->create(checkpoint, &resolved->backend, resolved->num_blocks, options->progress,
                                    options->progress_arg, &self->backend, err));
    self->isa = self->backend->isa != NULL ? self->backend->isa : "";
    (void)snprintf(self->description, sizeof self->description, "%s",
                   resolved->vtable->describe(self->backend));
    qf_memory_report_fill(resolved, &self->stats.memory);
    self->stats.num_free_blocks = resolved->num_blocks;
    qf_meter_init(&self->meter, options->meter, &self->config, &resolved->plan, resolved->backend.block_size,
                  qf_now_ns());
    if (qf_kv_is_low_bit(resolved->backend.kv_format)) {
        qf_meter_set_kv(&self->meter, &self->config, &resolved->backend);
    }
    if (options->meter) {
        qf_energy_open(self);
        QF_TRY(qf_energy_start(self, err));
    }
    sigset_t all, before; /* signals stay with the threads of the program around us */
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int code = pthread_create(&self->driver, NULL, qf_driver_main, self);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (code != 0) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot start the driver thread: %s", strerror(code));
    }
    self->driver_started = true;
    return QF_OK;
}

static qf_status init_locks(qf_engine *self, qf_error *err)
{
    pthread_condattr_t attr;
    (void)pthread_condattr_init(&attr);
    (void)pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    int failed = pthread_mutex_init(&self->lock, NULL);
    if (failed == 0) {
        failed = pthread_cond_init(&self->wake, &attr);
        if (failed == 0) {
            failed = pthread_cond_init(&self->sampler.wake, &attr);
            if (failed != 0) {
                (void)pthread_cond_destroy(&self->wake);
            }
        }
        if (failed != 0) {
            (void)pthread_mutex_destroy(&self->lock);
        }
    }
    (void)pthread_condattr_destroy(&attr);
    if (failed != 0) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot create the engine's lock: %s", strerror(failed));
    }
    return QF_OK;
}

qf_status qf_engine_create_with(const qf_engine_options *options, const qf_backend_vtable *backend, qf_engine **out,
                                qf_error *err)
{
    qf_status status;
    *out = NULL;
    double start = qf_now_seconds();
    qf_engine *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "an engine", err));
    status = init_locks(self, err);
    if (status != QF_OK) {
        qf_free(self);
        return status;
    }
    self->references = 1;
    self->event_read_fd = -1;
    self->event_write_fd = -1;
    self->backend_name = backend->name;
    qf_checkpoint *checkpoint = NULL;
    QF_TRY_GOTO(qf_options_resolve(options, backend, &checkpoint, &self->resolved, err), fail);
    self->config = *qf_checkpoint_config(checkpoint);
    QF_TRY_GOTO(create_machinery(self, options, checkpoint, err), fail);
    qf_checkpoint_close(checkpoint);
    self->resolved.backend.isa = NULL; /* were the caller's strings */
    self->resolved.backend.nccl_library = NULL;
    self->load_seconds = qf_now_seconds() - start;
    *out = self;
    return QF_OK;
fail:
    qf_checkpoint_close(checkpoint);
    qf_engine_free(self);
    return status;
}

void qf_engine_stop(qf_engine *self)
{
    (void)pthread_mutex_lock(&self->lock);
    self->stopping = true;
    bool join = self->driver_started && !self->driver_joined;
    self->driver_joined = true;
    (void)pthread_cond_signal(&self->wake);
    (void)pthread_mutex_unlock(&self->lock);
    if (join) {
        (void)pthread_join(self->driver, NULL);
        qf_energy_stop(self);
    }
    (void)pthread_mutex_lock(&self->lock);
    self->driver_gone = self->driver_gone || join || !self->driver_started;
    (void)pthread_cond_broadcast(&self->wake);
    while (!self->driver_gone) { /* another caller is joining it */
        (void)pthread_cond_wait(&self->wake, &self->lock);
    }
    (void)pthread_mutex_unlock(&self->lock);
}

void qf_engine_destroy(qf_engine *self)
{
    if (self == NULL) {
        return;
    }
    qf_engine_stop(self);
    free_machinery(self);
    (void)pthread_mutex_lock(&self->lock);
    bool last = --self->references == 0;
    (void)pthread_mutex_unlock(&self->lock);
    if (last) {
        qf_engine_free(self);
    }
}

/* --- queries ------------------------------------------------------------------------------------------- */

qf_status qf_engine_set_vocabulary(qf_engine *self, const uint8_t *bytes, const uint32_t *offsets,
                                   const uint8_t *special, int32_t num_tokens, qf_error *err)
{
    if (num_tokens < 1 || num_tokens > self->config.vocab_size) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "the tokenizer has %d tokens; the model has %d rows", num_tokens,
                       self->config.vocab_size);
    }
    qf_vocabulary *vocabulary;
    QF_TRY(qf_vocabulary_create(bytes, offsets, special, num_tokens, &vocabulary, err));
    (void)pthread_mutex_lock(&self->lock);
    bool is_set = self->vocabulary != NULL;
    if (!is_set) {
        self->vocabulary = vocabulary;
    }
    (void)pthread_mutex_unlock(&self->lock);
    if (is_set) {
        qf_vocabulary_destroy(vocabulary);
        return QF_FAIL(err, QF_ERROR_STATE, "the vocabulary is set already");
    }
    return QF_OK;
}

void qf_engine_get_info(const qf_engine *self, qf_engine_info *out)
{
    const qf_model_config *config = &self->config;
    const qf_resolved_options *resolved = &self->resolved;
    *out = (qf_engine_info){.backend = self->backend_name,
                            .description = self->description,
                            .isa = self->isa,
                            .vocab_size = config->vocab_size,
                            .hidden_size = config->hidden_size,
                            .intermediate_size = config->intermediate_size,
                            .num_layers = config->num_layers,
                            .num_heads = config->num_heads,
                            .num_kv_heads = config->num_kv_heads,
                            .head_dim = config->head_dim,
                            .max_position_embeddings = config->max_position_embeddings,
                            .max_model_len = resolved->backend.max_model_len,
                            .block_size = resolved->backend.block_size,
                            .num_blocks = resolved->num_blocks,
                            .max_num_seqs = resolved->backend.max_num_seqs,
                            .max_num_batched_tokens = resolved->backend.max_num_batched_tokens,
                            .max_steps_in_flight = resolved->max_steps_in_flight,
                            .dtype = resolved->dtype,
                            .activation_dtype = resolved->activation_dtype,
                            .quantization = resolved->quantization,
                            .lm_head_dtype = resolved->lm_head_dtype,
                            .kv_cache_dtype = resolved->kv_cache_dtype,
                            .kv_cache_16bit_window = resolved->backend.kv_window_tokens,
                            .kv_cache_16bit_layers = resolved->kv_cache_16bit_layers,
                            .num_kv_cache_16bit_layers = resolved->num_kv_cache_16bit_layers,
                            .num_threads = resolved->backend.num_threads,
                            .tensor_parallel_size = resolved->backend.tensor_parallel_size,
                            .load_seconds = self->load_seconds};
}

void qf_engine_get_stats(qf_engine *self, qf_engine_stats *out)
{
    (void)pthread_mutex_lock(&self->lock);
    *out = self->stats;
    (void)pthread_mutex_unlock(&self->lock);
}

void qf_engine_get_meter(qf_engine *self, qf_meter_stats *out)
{
    (void)pthread_mutex_lock(&self->lock);
    qf_meter_get_stats(&self->meter, qf_now_ns(), out);
    (void)pthread_mutex_unlock(&self->lock);
}

int qf_engine_event_fd(const qf_engine *self) { return self->event_read_fd; }

void qf_engine_reset_prefix_cache(qf_engine *self)
{
    (void)pthread_mutex_lock(&self->lock);
    self->reset_prefix_cache = true;
    (void)pthread_cond_signal(&self->wake);
    (void)pthread_mutex_unlock(&self->lock);
}
