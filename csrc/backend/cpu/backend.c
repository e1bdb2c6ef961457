/* The CPU backend behind backend.h: memory plan, loading, steps. A step runs inside submit(), on the caller's
 * thread and the pool; collect() only hands its time over. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "backend/cpu/cpu_backend.h"
#include "base/alloc.h"

#define MAX_MLP_ROWS 512
#define MAX_LOGIT_ROWS 64

static int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }

static int32_t max_i32(int32_t a, int32_t b) { return a > b ? a : b; }

/* Reserves count floats at *offset (64-byte aligned) and returns where they are. */
static float *carve(void *storage, size_t *offset, int64_t rows, int64_t columns)
{
    float *at = storage != NULL ? (float *)(void *)((char *)storage + *offset) : NULL;
    *offset += ((size_t)rows * (size_t)columns * sizeof(float) + 63u) & ~(size_t)63u;
    return at;
}

size_t qf_cpu_workspace_layout(const qf_model_config *config, const qf_shard *shard,
                               const qf_backend_options *options, void *storage, qf_cpu_workspace *ws)
{
    int64_t tokens = options->max_num_batched_tokens;
    int64_t q_size = (int64_t)config->num_heads * config->head_dim;
    int64_t kv_size = (int64_t)config->num_kv_heads * config->head_dim;
    size_t offset = 0;
    ws->mlp_rows = min_i32(options->max_num_batched_tokens, MAX_MLP_ROWS);
    ws->logit_rows = min_i32(max_i32(options->max_num_seqs, 16), MAX_LOGIT_ROWS);
    ws->hidden = carve(storage, &offset, tokens, config->hidden_size);
    ws->normed = carve(storage, &offset, tokens, config->hidden_size);
    ws->delta = carve(storage, &offset, tokens, config->hidden_size);
    ws->q = carve(storage, &offset, tokens, q_size);
    ws->k = carve(storage, &offset, tokens, kv_size);
    ws->v = carve(storage, &offset, tokens, kv_size);
    ws->attn = carve(storage, &offset, tokens, q_size);
    ws->gate = carve(storage, &offset, ws->mlp_rows, config->intermediate_size);
    ws->up = carve(storage, &offset, ws->mlp_rows, config->intermediate_size);
    ws->cos_sin = carve(storage, &offset, tokens, config->head_dim);
    ws->rows = carve(storage, &offset, ws->logit_rows, config->hidden_size);
    ws->logits = carve(storage, &offset, ws->logit_rows, config->vocab_size);
    ws->all_logits = ws->logits;
    if (shard->size > 1 && shard->rank == 0) {
        ws->all_logits = carve(storage, &offset, ws->logit_rows, shard->vocab_size);
    }
    return offset;
}

static qf_cpu_linear_options layer_options(const qf_backend_options *options)
{
    return (qf_cpu_linear_options){.quantize_bits = options->quantize_bits,
                                   .group_size = options->quantize_group_size};
}

static qf_cpu_linear_options head_options(const qf_backend_options *options)
{
    return (qf_cpu_linear_options){.quantize_bits = options->head_bits == 16 ? 0 : options->head_bits,
                                   .group_size = options->quantize_group_size};
}

/* The rows and the widest input that a linear layer gets: the kernels' scratch is sized by them. */
static int32_t context_tokens(const qf_backend_options *options)
{
    return max_i32(options->max_num_batched_tokens, MAX_LOGIT_ROWS);
}

static int32_t context_features(const qf_model_config *config)
{
    return max_i32(config->intermediate_size, max_i32(config->hidden_size, config->num_heads * config->head_dim));
}

/* A layer's linear as it is packed: the bias of k_proj is kept apart where its cache is a low-bit one. */
static qf_linear_source packed_source(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t layer,
                                      qf_linear_id id)
{
    qf_linear_source source = *qf_checkpoint_linear(checkpoint, layer, id);
    if (id == QF_K_PROJ && qf_cpu_layer_is_low_bit(options, layer)) {
        source.bias = NULL;
    }
    return source;
}

static qf_status cpu_plan_memory(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                                 qf_memory_plan *out, qf_error *err)
{
    (void)err;
    const qf_model_config *config = qf_checkpoint_config(checkpoint);
    const qf_shard *shard = qf_checkpoint_get_shard(checkpoint);
    qf_cpu_linear_options layer = layer_options(options);
    qf_cpu_linear_options head = head_options(options);
    *out = (qf_memory_plan){0};
    out->embedding_bytes = (size_t)config->vocab_size * (size_t)config->hidden_size *
                           qf_dtype_size(qf_checkpoint_embedding_dtype(checkpoint));
    for (int32_t i = 0; i < config->num_layers; i++) {
        for (int32_t id = 0; id < QF_LINEARS_PER_LAYER; id++) {
            const qf_linear_source source = packed_source(checkpoint, options, i, (qf_linear_id)id);
            out->layers_bytes += qf_cpu_linear_bytes(&source, &layer);
        }
    }
    out->layers_bytes += (size_t)(2 * config->num_layers + 1) * (size_t)config->hidden_size * sizeof(float);
    out->head_bytes = qf_cpu_linear_bytes(qf_checkpoint_linear(checkpoint, 0, QF_LM_HEAD), &head);
    qf_cpu_workspace ws;
    out->workspace_bytes = qf_cpu_workspace_layout(config, shard, options, NULL, &ws) +
                           qf_cpu_context_bytes(options->num_threads, context_tokens(options),
                                                context_features(config)) +
                           (shard->rank == 0 ? (size_t)options->num_threads : 0) * qf_sampler_bytes(shard->vocab_size);
    qf_cpu_plan_kv(config, options, out);
    return QF_OK;
}

static void cpu_destroy(qf_backend *base)
{
    qf_cpu_backend *self = (qf_cpu_backend *)base;
    if (self == NULL) {
        return;
    }
    for (int32_t i = 0; self->layers != NULL && i < self->config.num_layers; i++) {
        for (int32_t id = 0; id < QF_LINEARS_PER_LAYER; id++) {
            qf_cpu_linear_destroy(self->layers[i].linears[id]);
        }
    }
    qf_cpu_linear_destroy(self->lm_head);
    for (int32_t i = 0; self->samplers != NULL && i < self->num_samplers; i++) {
        qf_sampler_destroy(self->samplers[i]);
    }
    qf_free(self->samplers);
    qf_free(self->sampled);
    qf_free(self->layers);
    qf_free(self->norms);
    qf_free(self->inv_freq);
    qf_free(self->last_token);
    qf_free(self->token_ids);
    qf_pages_free(self->embedding, self->embedding_bytes);
    qf_cpu_free_kv(self);
    qf_pages_free(self->workspace, self->workspace_bytes);
    qf_cpu_context_destroy(self->ctx);
    qf_thread_pool_destroy(self->pool);
    qf_free(self);
}

typedef struct embedding_job {
    const qf_checkpoint *checkpoint;
    char *out;
    size_t row_bytes;
} embedding_job;

static void read_embedding_rows(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    (void)worker;
    const embedding_job *job = arg;
    qf_checkpoint_read_embedding(job->checkpoint, (int32_t)begin, (int32_t)(end - begin),
                                 job->out + (size_t)begin * job->row_bytes);
}

static qf_status load_embedding(qf_cpu_backend *self, const qf_checkpoint *checkpoint, qf_error *err)
{
    self->embedding_dtype = qf_checkpoint_embedding_dtype(checkpoint);
    size_t row_bytes = (size_t)self->config.hidden_size * qf_dtype_size(self->embedding_dtype);
    self->embedding_bytes = (size_t)self->config.vocab_size * row_bytes;
    QF_TRY(qf_pages_alloc(&self->embedding, self->embedding_bytes, "the embedding", err));
    embedding_job job = {.checkpoint = checkpoint, .out = self->embedding, .row_bytes = row_bytes};
    qf_thread_pool_run(self->pool, read_embedding_rows, &job, self->config.vocab_size, 1024);
    return QF_OK;
}

static qf_status load_weights(qf_cpu_backend *self, const qf_checkpoint *checkpoint, const qf_memory_plan *plan,
                              qf_progress_fn progress, void *progress_arg, qf_error *err)
{
    const qf_model_config *config = &self->config;
    size_t hidden_size = (size_t)config->hidden_size;
    size_t total_bytes = plan->embedding_bytes + plan->layers_bytes + plan->head_bytes;
    size_t done_bytes = plan->embedding_bytes;
    qf_cpu_linear_options options = layer_options(&self->options);
    qf_cpu_linear_options head = head_options(&self->options);

    QF_TRY(load_embedding(self, checkpoint, err));
    QF_TRY(qf_alloc((void **)&self->layers, (size_t)config->num_layers, sizeof *self->layers, "the layers", err));
    QF_TRY(qf_alloc((void **)&self->norms, (size_t)(2 * config->num_layers + 1) * hidden_size, sizeof(float),
                    "the norm weights", err));
    float *norm = self->norms;
    for (int32_t i = 0; i < config->num_layers; i++) {
        qf_cpu_layer *layer = &self->layers[i];
        layer->sliding_window = qf_model_config_layer_slides(config, i) ? config->sliding_window : 0;
        layer->input_norm = norm;
        layer->post_attention_norm = norm + hidden_size;
        qf_checkpoint_read_norm(checkpoint, i, QF_INPUT_NORM, layer->input_norm);
        qf_checkpoint_read_norm(checkpoint, i, QF_POST_ATTENTION_NORM, layer->post_attention_norm);
        norm += 2 * hidden_size;
        for (int32_t id = 0; id < QF_LINEARS_PER_LAYER; id++) {
            const qf_linear_source source = packed_source(checkpoint, &self->options, i, (qf_linear_id)id);
            QF_TRY(qf_cpu_linear_create(&source, &options, self->pool, &layer->linears[id], err));
            done_bytes += qf_cpu_linear_bytes(&source, &options);
            self->base.num_widened += qf_cpu_linear_is_widened(layer->linears[id], &source, &options) ? 1 : 0;
        }
        if (progress != NULL && !progress(progress_arg, done_bytes, total_bytes)) {
            return QF_FAIL(err, QF_ERROR_STATE, "loading was stopped at %zu of %zu bytes", done_bytes, total_bytes);
        }
    }
    self->final_norm = norm;
    qf_checkpoint_read_norm(checkpoint, 0, QF_FINAL_NORM, self->final_norm);
    QF_TRY(qf_cpu_linear_create(qf_checkpoint_linear(checkpoint, 0, QF_LM_HEAD), &head, self->pool, &self->lm_head,
                                err));
    if (progress != NULL && !progress(progress_arg, total_bytes, total_bytes)) {
        return QF_FAIL(err, QF_ERROR_STATE, "loading was stopped at its end");
    }
    return QF_OK;
}

static qf_status alloc_step_state(qf_cpu_backend *self, qf_isa isa, qf_error *err)
{
    const qf_model_config *config = &self->config;
    const qf_backend_options *options = &self->options;
    QF_TRY(qf_cpu_context_create(isa, self->pool, context_tokens(options), context_features(config), &self->ctx,
                                 err));
    self->workspace_bytes = qf_cpu_workspace_layout(config, &self->shard, options, NULL, &self->ws);
    QF_TRY(qf_pages_alloc(&self->workspace, self->workspace_bytes, "the workspace", err));
    (void)qf_cpu_workspace_layout(config, &self->shard, options, self->workspace, &self->ws);
    QF_TRY(qf_alloc((void **)&self->inv_freq, (size_t)config->head_dim / 2, sizeof(float), "rope frequencies", err));
    qf_rope_inv_freq(&config->rope, config->head_dim, self->inv_freq);
    QF_TRY(qf_alloc((void **)&self->last_token, (size_t)options->max_num_seqs, sizeof(int32_t), "token slots", err));
    QF_TRY(qf_alloc((void **)&self->token_ids, (size_t)options->max_num_batched_tokens, sizeof(int32_t), "token ids",
                    err));
    QF_TRY(qf_alloc((void **)&self->sampled, (size_t)self->ws.logit_rows, sizeof(int32_t), "sampled tokens", err));
    self->num_samplers = self->shard.rank == 0 ? options->num_threads : 0;
    QF_TRY(qf_alloc((void **)&self->samplers, (size_t)self->num_samplers, sizeof *self->samplers, "samplers", err));
    for (int32_t i = 0; i < self->num_samplers; i++) {
        QF_TRY(qf_sampler_create(self->shard.vocab_size, &self->samplers[i], err));
    }
    return QF_OK;
}

static qf_status cpu_init(qf_cpu_backend *self, const qf_checkpoint *checkpoint, int32_t num_blocks,
                          qf_progress_fn progress, void *progress_arg, qf_error *err)
{
    qf_isa isa = qf_isa_detect();
    if (self->options.isa != NULL && !qf_isa_parse(self->options.isa, &isa)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "isa must be auto, scalar, avx2, avx512 or avx512_vnni; got \"%.40s\"", self->options.isa);
    }
    if (self->shard.size > 1 && self->options.comm == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rank %d of %d needs a communicator", self->shard.rank,
                       self->shard.size);
    }
    self->options.isa = qf_isa_name(isa);
    self->base.isa = self->options.isa;
    qf_memory_plan plan;
    QF_TRY(cpu_plan_memory(checkpoint, &self->options, &plan, err));
    QF_TRY(qf_thread_pool_create(self->options.num_threads, &self->pool, err));
    QF_TRY(alloc_step_state(self, isa, err));
    self->layers_bytes = plan.layers_bytes;
    self->head_bytes = plan.head_bytes;
    QF_TRY(load_weights(self, checkpoint, &plan, progress, progress_arg, err));
    QF_TRY(qf_cpu_alloc_kv(self, checkpoint, &plan, num_blocks, err));
    self->options.kv_16bit_layers = NULL; /* was the caller's */
    (void)snprintf(self->description, sizeof self->description, "CPU, %s, %d thread%s", qf_isa_name(isa),
                   self->options.num_threads, self->options.num_threads == 1 ? "" : "s");
    return QF_OK;
}

static qf_status cpu_create(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t num_blocks,
                            qf_progress_fn progress, void *progress_arg, qf_backend **out, qf_error *err)
{
    *out = NULL;
    qf_cpu_backend *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "the CPU backend", err));
    self->base.vtable = qf_cpu_backend_vtable();
    self->config = *qf_checkpoint_config(checkpoint);
    self->shard = *qf_checkpoint_get_shard(checkpoint);
    self->options = *options;
    self->activation = options->int8_activations ? QF_ACTIVATION_I8 : QF_ACTIVATION_F32;
    qf_status status = cpu_init(self, checkpoint, num_blocks, progress, progress_arg, err);
    if (status != QF_OK) {
        cpu_destroy(&self->base);
        return status;
    }
    *out = &self->base;
    return QF_OK;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static qf_status cpu_submit(qf_backend *base, const qf_batch *batch, qf_error *err)
{
    qf_cpu_backend *self = (qf_cpu_backend *)base;
    if (self->num_uncollected == 2) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "two steps are already in flight");
    }
    uint64_t start_ns = now_ns();
    QF_TRY(qf_cpu_forward(self, batch, err));
    self->step_ns[self->num_uncollected++] = now_ns() - start_ns;
    return QF_OK;
}

static qf_status cpu_collect(qf_backend *base, uint64_t *device_time_ns, qf_error *err)
{
    qf_cpu_backend *self = (qf_cpu_backend *)base;
    if (self->num_uncollected == 0) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "no step is in flight");
    }
    if (device_time_ns != NULL) {
        *device_time_ns = self->step_ns[0];
    }
    self->step_ns[0] = self->step_ns[1];
    self->num_uncollected--;
    return QF_OK;
}

static qf_status cpu_forward_layers(qf_backend *base, int32_t first, int32_t last, const qf_batch *batch,
                                    float *hidden, qf_tap_fn tap, void *tap_arg, qf_error *err)
{
    qf_cpu_backend *self = (qf_cpu_backend *)base;
    if (first < 0 || last > self->config.num_layers || first > last) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "layers [%d, %d) are not within the model's %d", first, last,
                       self->config.num_layers);
    }
    if (batch->num_tokens > self->options.max_num_batched_tokens) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%d tokens exceed max_num_batched_tokens %d",
                       batch->num_tokens, self->options.max_num_batched_tokens);
    }
    return qf_cpu_forward_layers(self, first, last, batch, hidden, tap, tap_arg, err);
}

static const char *cpu_describe(const qf_backend *base) { return ((const qf_cpu_backend *)base)->description; }

const qf_backend_vtable *qf_cpu_backend_vtable(void)
{
    static const qf_backend_vtable vtable = {.name = "cpu",
                                             .plan_memory = cpu_plan_memory,
                                             .create = cpu_create,
                                             .destroy = cpu_destroy,
                                             .submit = cpu_submit,
                                             .collect = cpu_collect,
                                             .forward_layers = cpu_forward_layers,
                                             .describe = cpu_describe,
                                             .traffic = qf_cpu_traffic};
    return &vtable;
}
