/* A CUDA backend's beginning and end: memory plan, arena, loading. */
#include <stdio.h>
#include <string.h>

#include "backend/cuda/cuda.h"
#include "backend/cuda/cuda_backend.h"
#include "base/alloc.h"

/* --- planning -------------------------------------------------------------------------------------------- */

static bool is_plain_w4(const qf_cuda_linear_layout *layout)
{
    return layout->bits == 4 && layout->group_size == 128 && layout->perm == SIZE_MAX;
}

/* Whether to make room for the decode kernel. It judges the loaded layers itself, later; what it can never take is
 * left out here. */
static bool wants_decode_kernel(const qf_cuda_backend *self)
{
    const qf_backend_options *options = &self->options;
    const qf_model_config *config = &self->config;
    if (options->float32 || options->batch_invariant || options->enforce_eager || self->any_low_bit ||
        self->layout.num_host_layers > 0 ||
        config->hidden_size % 128 != 0 || config->hidden_size < 256 ||
        config->num_heads > 8 * config->num_kv_heads) {
        return false;
    }
    for (int32_t i = 0; i < config->num_layers; i++) {
        const qf_cuda_layer_layout *layer = &self->layout.layers[i];
        if (!is_plain_w4(&layer->qkv) || !is_plain_w4(&layer->o) || !is_plain_w4(&layer->gate_up) ||
            !is_plain_w4(&layer->down)) {
            return false;
        }
    }
    return true;
}

static size_t step_pinned_bytes(const qf_cuda_backend *self)
{
    size_t bytes = self->meta_bytes + sizeof(qf_cuda_step_result) +
                   (size_t)self->options.max_num_batched_tokens * sizeof(int32_t) +
                   (size_t)self->logprob_capacity * sizeof(qf_cuda_logprob);
    return (bytes + 255) / 256 * 256;
}

static qf_cuda_weight shape_of(const qf_cuda_linear_layout *layout)
{
    return (qf_cuda_weight){.n = layout->n, .k = layout->k, .bits = layout->bits, .group_size = layout->group_size};
}

/* The decode kernel's workspace follows from the layers' shapes. */
static qf_status plan_decode(qf_cuda_backend *self, qf_error *err)
{
    self->decode_kernel = wants_decode_kernel(self);
    if (!self->decode_kernel) {
        return QF_OK;
    }
    QF_TRY(qf_alloc((void **)&self->decode_layers, (size_t)self->config.num_layers, sizeof *self->decode_layers,
                    "the layers", err));
    for (int32_t i = 0; i < self->config.num_layers; i++) {
        const qf_cuda_layer_layout *layer = &self->layout.layers[i];
        self->decode_layers[i] = (qf_cuda_decode_layer){.qkv = shape_of(&layer->qkv),
                                                        .o = shape_of(&layer->o),
                                                        .gate_up = shape_of(&layer->gate_up),
                                                        .down = shape_of(&layer->down)};
    }
    return QF_OK;
}

/* Of all layers, K and V. */
static size_t kv_block_bytes(const qf_cuda_backend *self)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < self->config.num_layers; i++) {
        bytes += 2 * qf_cuda_layer_block_bytes(self, i);
    }
    return bytes;
}

/* Device memory that is not of the arena: it belongs to the communicator, which was there before. */
static size_t comm_bytes(const qf_cuda_backend *self) { return self->shard.size > 1 ? qf_cuda_comm_bytes() : 0; }

/* Everything that follows from checkpoint and options; nothing is allocated on the device. */
static qf_status plan(qf_cuda_backend *self, const qf_checkpoint *checkpoint, const qf_backend_options *options,
                      qf_memory_plan *out, qf_error *err)
{
    self->config = *qf_checkpoint_config(checkpoint);
    self->shard = *qf_checkpoint_get_shard(checkpoint);
    self->vocab_size = self->shard.vocab_size;
    self->options = *options;
    if (!options->float32 && self->config.head_dim != 64 && self->config.head_dim != 128) {
        return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                       "head_dim %d: the GPU kernels are made for 64 and 128 (dtype=\"float32\" runs any)",
                       self->config.head_dim);
    }
    QF_TRY(qf_cuda_kv_check(self, err));
    QF_TRY(qf_cuda_device_get(options->device_ordinal, &self->device, err));
    QF_TRY(qf_cuda_weights_plan(checkpoint, options, &self->layout, err));
    qf_cuda_backend_shape(self);
    QF_TRY(plan_decode(self, err));
    size_t workspace_bytes;
    QF_TRY(qf_cuda_workspace_layout(self, NULL, &workspace_bytes, err));
    *out = (qf_memory_plan){.embedding_bytes = self->layout.embedding_bytes,
                            .layers_bytes = self->layout.layers_bytes,
                            .head_bytes = self->layout.head_bytes,
                            .workspace_bytes = workspace_bytes + comm_bytes(self),
                            .kv_block_bytes = kv_block_bytes(self),
                            .kv_window_bytes = qf_cuda_kv_window_bytes(self),
                            .num_window_blocks = qf_cuda_kv_window_blocks(self),
                            .host_bytes = self->layout.host_bytes + QF_CUDA_STEPS_IN_FLIGHT * step_pinned_bytes(self)};
    return QF_OK;
}

qf_status qf_cuda_plan_memory(const qf_checkpoint *checkpoint, const qf_backend_options *options, qf_memory_plan *out,
                              qf_error *err)
{
    qf_cuda_backend *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "the CUDA backend's plan", err));
    qf_status status = plan(self, checkpoint, options, out, err);
    qf_cuda_weights_layout_deinit(&self->layout);
    qf_free(self->decode_layers);
    qf_free(self);
    return status;
}

qf_status qf_cuda_device_memory(const qf_backend_options *options, qf_device_memory *out, qf_error *err)
{
    qf_cuda_device device;
    size_t available, total;
    QF_TRY(qf_cuda_device_get(options->device_ordinal, &device, err));
    QF_CUDA_CHECK(cudaMemGetInfo(&available, &total));
    *out = (qf_device_memory){.available_bytes = available,
                              .total_bytes = total,
                              .overhead_bytes = qf_cuda_process_bytes(options->device_ordinal)};
    return QF_OK;
}

/* --- creation -------------------------------------------------------------------------------------------- */

void qf_cuda_destroy(qf_backend *base)
{
    qf_cuda_backend *self = (qf_cuda_backend *)base;
    if (self == NULL) {
        return;
    }
    (void)cudaSetDevice(self->device.ordinal);
    if (self->stream != NULL) {
        (void)cudaStreamSynchronize(self->stream);
    }
    if (self->meta_stream != NULL) {
        (void)cudaStreamSynchronize(self->meta_stream);
    }
    qf_cuda_graphs_destroy(self);
    if (self->rank.comm != NULL) {
        qf_cuda_comm_disconnect(self->rank.comm);
    }
    qf_cuda_energy_deinit(&self->energy);
    for (int i = 0; i < QF_CUDA_STEPS_IN_FLIGHT; i++) {
        if (self->steps[i].sent != NULL) {
            (void)cudaEventDestroy(self->steps[i].sent);
        }
        qf_free(self->steps[i].results);
        if (self->slot_ready[i] != NULL) {
            (void)cudaEventDestroy(self->slot_ready[i]);
        }
        if (self->slot_free[i] != NULL) {
            (void)cudaEventDestroy(self->slot_free[i]);
        }
    }
    if (self->stream != NULL) {
        (void)cudaStreamDestroy(self->stream);
    }
    if (self->copy_stream != NULL) {
        (void)cudaStreamDestroy(self->copy_stream);
    }
    if (self->meta_stream != NULL) {
        (void)cudaStreamDestroy(self->meta_stream);
    }
    (void)cudaFree(self->arena);
    (void)cudaFree(self->scratch);
    (void)cudaFreeHost(self->host_arena);
    (void)cudaFreeHost(self->pinned);
    (void)cudaFreeHost(self->tap_rows);
    (void)cudaGetLastError(); /* what a failed device says to all of this is known already */
    qf_sampler_destroy(self->sampler);
    qf_free(self->slots);
    qf_free(self->count_list);
    qf_free(self->host_logits);
    qf_free(self->decode_layers);
    qf_free(self->caches);
    qf_free(self->windows);
    qf_cuda_weights_deinit(&self->weights);
    qf_cuda_weights_layout_deinit(&self->layout);
    qf_free(self);
}

static qf_status alloc_host(qf_cuda_backend *self, qf_error *err)
{
    const qf_backend_options *options = &self->options;
    size_t vocab_size = (size_t)self->vocab_size;
    size_t step_bytes = step_pinned_bytes(self);
    cudaError_t result = cudaHostAlloc(&self->pinned, QF_CUDA_STEPS_IN_FLIGHT * step_bytes, cudaHostAllocDefault);
    if (result == cudaSuccess && self->layout.host_bytes > 0) {
        result = cudaHostAlloc((void **)&self->host_arena, self->layout.host_bytes, cudaHostAllocDefault);
    }
    if (result != cudaSuccess) {
        (void)cudaGetLastError();
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "%zu bytes of pinned host memory: %s",
                       QF_CUDA_STEPS_IN_FLIGHT * step_bytes + self->layout.host_bytes, cudaGetErrorString(result));
    }
    for (int i = 0; i < QF_CUDA_STEPS_IN_FLIGHT; i++) {
        qf_cuda_step *step = &self->steps[i];
        step->meta = (char *)self->pinned + (size_t)i * step_bytes;
        step->result = (qf_cuda_step_result *)(void *)(step->meta + self->meta_bytes);
        *step->result = (qf_cuda_step_result){0};
        step->logprobs = (qf_cuda_logprob *)(void *)(step->result + 1);
        step->token_ids = (int32_t *)(void *)(step->logprobs + self->logprob_capacity);
        QF_TRY(qf_alloc((void **)&step->results, (size_t)options->max_num_batched_tokens, sizeof *step->results,
                        "a step's results", err));
        QF_CUDA_CHECK(cudaEventCreateWithFlags(&step->sent, cudaEventDisableTiming));
        QF_CUDA_CHECK(cudaEventCreateWithFlags(&self->slot_ready[i], cudaEventDisableTiming));
        QF_CUDA_CHECK(cudaEventCreateWithFlags(&self->slot_free[i], cudaEventDisableTiming));
    }
    QF_CUDA_CHECK(cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking));
    QF_CUDA_CHECK(cudaStreamCreateWithFlags(&self->copy_stream, cudaStreamNonBlocking));
    int least, greatest;
    QF_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    QF_CUDA_CHECK(cudaStreamCreateWithPriority(&self->meta_stream, cudaStreamNonBlocking, greatest));
    QF_TRY(qf_alloc((void **)&self->slots, (size_t)options->max_num_seqs, sizeof *self->slots, "slots", err));
    QF_TRY(qf_alloc((void **)&self->count_list, vocab_size, sizeof *self->count_list, "token counts", err));
    QF_TRY(qf_alloc((void **)&self->host_logits, vocab_size, sizeof *self->host_logits, "logits", err));
    return qf_sampler_create(self->vocab_size, &self->sampler, err);
}

static qf_status alloc_arena(qf_cuda_backend *self, const qf_memory_plan *memory, int32_t num_blocks, qf_error *err)
{
    size_t kv_bytes = memory->kv_block_bytes * (size_t)num_blocks + memory->kv_window_bytes;
    self->arena_bytes = self->layout.device_bytes + memory->workspace_bytes - comm_bytes(self) + kv_bytes;
    cudaError_t result = cudaMalloc((void **)&self->arena, self->arena_bytes);
    if (result != cudaSuccess) {
        size_t available = 0, total = 0;
        (void)cudaGetLastError();
        (void)cudaMemGetInfo(&available, &total);
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY,
                       "%zu bytes of device memory (weights %zu, workspace %zu, KV cache %zu: %d blocks of %zu, 16-bit "
                       "window %zu) are not to be had: %zu of %zu bytes are free",
                       self->arena_bytes, self->layout.device_bytes, memory->workspace_bytes, kv_bytes, num_blocks,
                       memory->kv_block_bytes, memory->kv_window_bytes, available, total);
    }
    char *workspace = self->arena + self->layout.device_bytes;
    size_t bytes;
    QF_TRY(qf_cuda_workspace_layout(self, workspace, &bytes, err));
    self->kv = workspace + bytes;
    return qf_cuda_kv_layout(self, self->kv, num_blocks, err);
}

/* Loading needs scratch memory: the parts of the arena that nothing uses yet, if they are large enough. */
static qf_status load(qf_cuda_backend *self, const qf_checkpoint *checkpoint, qf_progress_fn progress,
                      void *progress_arg, qf_error *err)
{
    size_t scratch_bytes = qf_cuda_weights_scratch_bytes(&self->layout);
    char *scratch = self->arena + self->layout.device_bytes;
    if (self->arena_bytes - self->layout.device_bytes < scratch_bytes) {
        cudaError_t result = cudaMalloc((void **)&self->scratch, scratch_bytes);
        if (result != cudaSuccess) {
            (void)cudaGetLastError();
            return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "%zu bytes of device memory for loading: %s", scratch_bytes,
                           cudaGetErrorString(result));
        }
        scratch = self->scratch;
    }
    qf_thread_pool *pool;
    QF_TRY(qf_thread_pool_create(self->options.num_threads, &pool, err));
    qf_status status =
        qf_cuda_weights_load(checkpoint, &self->options, &self->layout, &self->device, self->arena, self->host_arena,
                             scratch, scratch_bytes, pool, progress, progress_arg, &self->weights, err);
    qf_thread_pool_destroy(pool);
    (void)cudaFree(self->scratch);
    self->scratch = NULL;
    return status;
}

/* Ranks decode in one kernel all together or not at all: first they tell each other how, then whether they can. */
static qf_status agree_on_decode(qf_cuda_backend *self, qf_error *err)
{
    qf_cuda_rank *rank = &self->rank;
    qf_cuda_decode_args args;
    qf_cuda_decode_rank own = {0};
    bool can = false, all[QF_CUDA_MAX_RANKS];
    if (self->decode_kernel) {
        qf_cuda_decode_fill(self, 1, &args);
        qf_cuda_decode_describe(&args, &self->device, &own);
    }
    QF_TRY(qf_cuda_comm_tell(rank->comm, &own, sizeof own, rank->decode, err));
    if (own.supported && rank->peers != NULL && qf_cuda_decode_supported(&args, &self->device)) {
        can = true;
        QF_TRY(qf_cuda_decode_load(err));
        QF_TRY(qf_cuda_decode_reset(&args, &self->device, self->stream, err));
        QF_CUDA_CHECK(cudaStreamSynchronize(self->stream));
    }
    QF_TRY(qf_cuda_comm_tell(rank->comm, &can, sizeof can, all, err));
    self->decode_kernel = can;
    for (int32_t i = 0; i < self->shard.size; i++) {
        self->decode_kernel = self->decode_kernel && all[i];
    }
    return QF_OK;
}

/* The decode kernel's own table of layers. */
static qf_status fill_decode_layers(qf_cuda_backend *self, qf_error *err)
{
    size_t count = (size_t)self->config.num_layers;
    for (int32_t i = 0; i < self->config.num_layers; i++) {
        const qf_cuda_layer *layer = &self->weights.layers[i];
        self->decode_layers[i] = (qf_cuda_decode_layer){
            .qkv = layer->qkv,
            .o = layer->o,
            .gate_up = layer->gate_up,
            .down = layer->down,
            .input_norm = layer->input_norm,
            .post_attention_norm = layer->post_attention_norm,
            .k = self->caches[i].k,
            .v = self->caches[i].v,
            .sliding_window = qf_model_config_layer_slides(&self->config, i) ? self->config.sliding_window : 0};
    }
    QF_CUDA_CHECK(cudaMemcpyAsync(self->ws.decode_layers, self->decode_layers, count * sizeof *self->decode_layers,
                                  cudaMemcpyHostToDevice, self->stream));
    return QF_OK;
}

/* The decode kernel is used only if it takes these shapes and formats. */
static qf_status prepare_decode(qf_cuda_backend *self, qf_error *err)
{
    if (self->decode_kernel) {
        QF_TRY(fill_decode_layers(self, err));
    }
    if (self->rank.comm != NULL) {
        return agree_on_decode(self, err);
    }
    if (self->decode_kernel) {
        qf_cuda_decode_args args;
        qf_cuda_decode_fill(self, 1, &args);
        self->decode_kernel = qf_cuda_decode_supported(&args, &self->device);
    }
    return QF_OK;
}

static qf_status prepare_workspace(qf_cuda_backend *self, qf_error *err)
{
    size_t half = (size_t)self->config.head_dim / 2;
    float inv_freq[128];
    qf_rope_inv_freq(&self->config.rope, self->config.head_dim, inv_freq);
    QF_CUDA_CHECK(cudaMemcpyAsync(self->ws.inv_freq, inv_freq, half * sizeof(float), cudaMemcpyHostToDevice,
                                  self->stream));
    self->io = (qf_cuda_step_io){.staging = {self->ws.staging[0], self->ws.staging[1]},
                                 .device_meta = self->ws.meta,
                                 .token_ids = self->ws.token_ids,
                                 .logprobs = self->ws.logprobs,
                                 .state = self->ws.step_state,
                                 .host_token_ids = {self->steps[0].token_ids, self->steps[1].token_ids},
                                 .host_logprobs = {self->steps[0].logprobs, self->steps[1].logprobs},
                                 .host_results = {self->steps[0].result, self->steps[1].result}};
    QF_CUDA_CHECK(cudaMemsetAsync(self->ws.zero_begin, 0, (size_t)(self->ws.zero_end - self->ws.zero_begin),
                                  self->stream));
    QF_TRY(prepare_decode(self, err));
    QF_TRY(qf_cuda_kv_tables(self, err));
    QF_CUDA_CHECK(cudaStreamSynchronize(self->stream));
    return QF_OK;
}

static qf_status connect_ranks(qf_cuda_backend *self, qf_error *err)
{
    qf_comm *comm = self->options.comm;
    if (self->shard.size < 2) {
        return QF_OK;
    }
    if (comm == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rank %d of %d needs a communicator", self->shard.rank,
                       self->shard.size);
    }
    QF_CUDA_CHECK(cudaSetDevice(self->device.ordinal));
    QF_TRY(qf_cuda_comm_connect(comm, self->shard.vocab.begin, self->config.vocab_size, err));
    self->rank.comm = comm;
    self->rank.peers = qf_cuda_comm_peers(comm);
    return QF_OK;
}

static qf_status init(qf_cuda_backend *self, const qf_checkpoint *checkpoint, const qf_backend_options *options,
                      int32_t num_blocks, qf_progress_fn progress, void *progress_arg, qf_error *err)
{
    qf_memory_plan memory = {0};
    QF_TRY(plan(self, checkpoint, options, &memory, err));
    QF_TRY(connect_ranks(self, err));
    QF_TRY(alloc_host(self, err));
    QF_TRY(alloc_arena(self, &memory, num_blocks, err));
    if (self->rank.comm != NULL) {
        QF_TRY(qf_cuda_comm_share_root(self->rank.comm, self->ws.all_logits, &self->rank.root_logits, err));
    }
    QF_TRY(load(self, checkpoint, progress, progress_arg, err));
    QF_TRY(prepare_workspace(self, err));
    self->base.num_widened = self->layout.num_widened;
    struct cudaDeviceProp properties;
    QF_CUDA_CHECK(cudaGetDeviceProperties(&properties, self->device.ordinal));
    self->l2_bytes = (uint64_t)properties.l2CacheSize;
    char cache[96];
    qf_cuda_kv_describe(self, cache, sizeof cache);
    (void)snprintf(self->description, sizeof self->description, "%.96s, compute capability %d.%d, %d SMs%s",
                   properties.name, self->device.compute_capability / 10, self->device.compute_capability % 10,
                   self->device.sm_count, cache);
    self->options.kv_16bit_layers = NULL; /* the caller's: self->caches has what it said */
    if (self->rank.comm != NULL) {
        const size_t used = strlen(self->description);
        (void)snprintf(self->description + used, sizeof self->description - used, ", ranks over %s%s",
                       qf_cuda_comm_describe(self->rank.comm), self->decode_kernel ? ", decode in one kernel" : "");
    }
    return QF_OK;
}

qf_status qf_cuda_create(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t num_blocks,
                         qf_progress_fn progress, void *progress_arg, qf_backend **out, qf_error *err)
{
    *out = NULL;
    qf_cuda_backend *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "the CUDA backend", err));
    self->base.vtable = qf_cuda_backend_vtable();
    qf_status status = init(self, checkpoint, options, num_blocks, progress, progress_arg, err);
    if (status != QF_OK) {
        qf_cuda_destroy(&self->base);
        return status;
    }
    *out = &self->base;
    return QF_OK;
}
