/* Loading: embedding, layers, head, in the order of the arena.
 *
 * A layer's blob begins with what the host prepares (norms, biases, orders of columns): one copy. Then each fused
 * linear is repacked, job by job. A layer that stays on the host is made in scratch and copied back. */
#include "backend/cuda/weights.h"

#include <string.h>

#include "backend/cuda/weights_stage.h"
#include "base/alloc.h"

#define STAGE_BYTES ((size_t)16 << 20)
#define MIN_STAGE_BYTES ((size_t)1 << 20)

typedef struct loader {
    const qf_checkpoint *checkpoint;
    const qf_model_config *config;
    qf_cuda_weights_layout *layout;
    qf_cuda_stager stager;
    char *device, *host, *blob; /* blob: in scratch, for a layer that stays on the host */
    bool float32;
    int32_t *groups;   /* (QF_REPACK_MAX_PARTS, longest k) groups of columns, or NULL: nothing needs them */
    size_t longest_k;
    uint32_t *largest; /* (threads) bits of the largest scale each has seen */
    qf_progress_fn progress;
    void *progress_arg;
    size_t done_bytes, total_bytes;
} loader;

static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

static qf_status report(loader *self, size_t bytes, qf_error *err)
{
    self->done_bytes += bytes;
    if (self->progress == NULL || self->progress(self->progress_arg, self->done_bytes, self->total_bytes)) {
        return QF_OK;
    }
    if (self->done_bytes == self->total_bytes) {
        return QF_FAIL(err, QF_ERROR_STATE, "loading was stopped at its end");
    }
    return QF_FAIL(err, QF_ERROR_STATE, "loading was stopped at %zu of %zu bytes", self->done_bytes,
                   self->total_bytes);
}

/* --- linears -------------------------------------------------------------------------------------------- */

/* What the host prepares of a linear: into a zeroed image of the blob. */
static void fill_small(const qf_cuda_fused *fused, const qf_cuda_linear_layout *linear, char *image)
{
    for (int32_t i = 0; linear->bias != SIZE_MAX && i < fused->num_parts; i++) {
        const qf_linear_source *part = fused->parts[i];
        for (int32_t row = 0; part->bias != NULL && row < part->n; row++) {
            const size_t at = linear->bias + (size_t)qf_cuda_fused_row(fused, i, row) * sizeof(float);
            memcpy(image + at, &part->bias[row], sizeof(float));
        }
    }
    for (int32_t i = 0; linear->perm != SIZE_MAX && i < linear->k; i++) {
        const int32_t column = i < linear->real_k ? fused->parts[0]->perm[i] : i;
        memcpy(image + linear->perm + (size_t)i * sizeof column, &column, sizeof column);
    }
}

/* The bias of k_proj leaves the fused one for a place of its own. */
static void set_k_bias_apart(const qf_cuda_fused *qkv, const qf_cuda_layer_layout *layer, char *image)
{
    const int32_t part = 1, size = qkv->parts[part]->n; /* q, k, v */
    if (layer->k_bias == SIZE_MAX) {
        return;
    }
    char *fused = image + layer->qkv.bias + (size_t)qf_cuda_fused_row(qkv, part, 0) * sizeof(float);
    memcpy(image + layer->k_bias, fused, (size_t)size * sizeof(float));
    memset(fused, 0, (size_t)size * sizeof(float));
}

/* Where a part is dequantised in act-order: the group of each of its columns. */
static void find_groups(loader *self, const qf_cuda_fused *fused, const qf_cuda_linear_layout *linear,
                        const int32_t **out)
{
    for (int32_t i = 0; i < fused->num_parts; i++) {
        const qf_linear_source *part = fused->parts[i];
        int32_t *groups = self->groups + (size_t)i * self->longest_k;
        out[i] = NULL;
        if (part->column_groups != NULL) {
            out[i] = part->column_groups;
        } else if (qf_cuda_needs_groups(part, linear)) {
            for (int32_t column = 0; column < part->k; column++) {
                groups[part->perm[column]] = column / part->group_size;
            }
            out[i] = groups;
        }
    }
}

static qf_status load_linear(loader *self, const qf_cuda_fused *fused, qf_cuda_linear_layout *linear, char *blob,
                             qf_error *err)
{
    qf_cuda_stager *stager = &self->stager;
    const int32_t *groups[QF_REPACK_MAX_PARTS];
    find_groups(self, fused, linear, groups);
    const bool as_stored = linear->bits <= 8 && linear->quantize_bits == 0;
    linear->scale_multiplier = as_stored ? qf_cuda_scale_multiplier(fused, stager->pool, self->largest) : 1.0f;
    const int32_t step = qf_cuda_job_rows(fused, linear);
    for (int32_t row = 0; row < linear->n; row += step) {
        qf_cuda_job job;
        char *slot;
        QF_TRY(qf_cuda_stager_open_slot(stager, &slot, err));
        qf_cuda_job_make(fused, linear, row, groups, slot, &job);
        QF_TRY(qf_cuda_stager_fill_slot(stager, &job, slot, err));
        QF_TRY(qf_cuda_stager_slot_filled(stager, err));
        job.args.inverse_multiplier = 1.0f / linear->scale_multiplier;
        job.args.data = blob + linear->data;
        job.args.scales = linear->scales != SIZE_MAX ? (uint32_t *)(void *)(blob + linear->scales) : NULL;
        QF_TRY(qf_cuda_repack(&job.args, stager->compute, err));
        QF_TRY(qf_cuda_stager_slot_done(stager, err));
    }
    return QF_OK;
}

/* --- embedding, layers, head ---------------------------------------------------------------------------- */

static qf_status load_embedding(loader *self, const void **out, qf_error *err)
{
    const qf_cuda_weights_layout *layout = self->layout;
    if (layout->head_is_embedding) {
        *out = self->device + layout->head_offset + layout->head.data;
        return QF_OK;
    }
    size_t bytes = layout->embedding_bytes;
    *out = self->device + layout->embedding_offset;
    if (layout->embedding_on_host) {
        void *seen = NULL;
        QF_CUDA_CALL(cudaHostGetDevicePointer(&seen, self->host, 0));
        *out = seen;
        bytes = qf_cuda_embedding_rows_bytes(layout, self->config);
    }
    QF_TRY(qf_cuda_load_embedding(&self->stager, self->checkpoint, layout, self->device, self->host, err));
    return report(self, bytes, err);
}

static qf_status load_layer(loader *self, int32_t index, char *blob, qf_error *err)
{
    qf_cuda_layer_layout *layer = &self->layout->layers[index];
    qf_cuda_fused fused[QF_CUDA_LINEARS_PER_LAYER];
    char *image;
    QF_TRY(qf_cuda_stager_open_stage(&self->stager, &image, err));
    memset(image, 0, layer->qkv.data); /* the first that the host does not prepare */
    qf_checkpoint_read_norm(self->checkpoint, index, QF_INPUT_NORM, (float *)(void *)(image + layer->input_norm));
    qf_checkpoint_read_norm(self->checkpoint, index, QF_POST_ATTENTION_NORM,
                            (float *)(void *)(image + layer->post_attention_norm));
    for (int32_t id = 0; id < QF_CUDA_LINEARS_PER_LAYER; id++) {
        qf_cuda_fused_get(self->checkpoint, index, (qf_cuda_linear_id)id, self->float32, &fused[id]);
        fill_small(&fused[id], qf_cuda_layer_linear(layer, (qf_cuda_linear_id)id), image);
    }
    set_k_bias_apart(&fused[QF_CUDA_QKV], layer, image);
    QF_TRY(qf_cuda_stager_send_stage(&self->stager, blob, layer->qkv.data, self->stager.compute, err));
    for (int32_t id = 0; id < QF_CUDA_LINEARS_PER_LAYER; id++) {
        QF_TRY(load_linear(self, &fused[id], qf_cuda_layer_linear(layer, (qf_cuda_linear_id)id), blob, err));
    }
    return QF_OK;
}

static qf_status load_layers(loader *self, qf_cuda_weights *out, qf_error *err)
{
    const qf_cuda_weights_layout *layout = self->layout;
    const int32_t on_device = layout->num_layers - layout->num_host_layers;
    char *device = self->device + layout->layers_offset;
    char *host = self->host + (layout->embedding_on_host ? qf_cuda_embedding_rows_bytes(layout, self->config) : 0);
    for (int32_t i = 0; i < layout->num_layers; i++) {
        const qf_cuda_layer_layout *layer = &layout->layers[i];
        if (i < on_device) {
            QF_TRY(load_layer(self, i, device, err));
            qf_cuda_layer_at(layer, device, &out->layers[i]);
            device += layer->size_bytes;
        } else {
            QF_CUDA_CALL(cudaMemsetAsync(self->blob, 0, layer->size_bytes, self->stager.compute));
            QF_TRY(load_layer(self, i, self->blob, err));
            QF_CUDA_CALL(cudaMemcpyAsync(host, self->blob, layer->size_bytes, cudaMemcpyDeviceToHost,
                                         self->stager.compute));
            qf_cuda_layer_at(layer, NULL, &out->layers[i]);
            out->layers[i].host_blob = host;
            host += layer->size_bytes;
        }
        QF_TRY(report(self, layer->size_bytes, err));
    }
    return QF_OK;
}

static qf_status load_head(loader *self, qf_cuda_weights *out, qf_error *err)
{
    qf_cuda_weights_layout *layout = self->layout;
    char *blob = self->device + layout->head_offset;
    qf_cuda_fused fused;
    char *image;
    qf_cuda_fused_get(self->checkpoint, 0, QF_CUDA_HEAD, self->float32, &fused);
    QF_TRY(qf_cuda_stager_open_stage(&self->stager, &image, err));
    memset(image, 0, layout->head.data);
    qf_checkpoint_read_norm(self->checkpoint, 0, QF_FINAL_NORM, (float *)(void *)(image + layout->final_norm));
    fill_small(&fused, &layout->head, image);
    QF_TRY(qf_cuda_stager_send_stage(&self->stager, blob, layout->head.data, self->stager.compute, err));
    QF_TRY(load_linear(self, &fused, &layout->head, blob, err));
    out->head = qf_cuda_weight_at(&layout->head, blob);
    out->final_norm = (const float *)(const void *)(blob + layout->final_norm);
    return QF_OK;
}

/* --- interface ------------------------------------------------------------------------------------------ */

/* Bytes of a stage: everything that one copy brings must fit. */
static size_t choose_stage_bytes(const loader *self)
{
    const qf_cuda_weights_layout *layout = self->layout;
    size_t row_bytes = (size_t)self->config->hidden_size * sizeof(float);
    size_t most = max_size(layout->raw_bytes, (size_t)self->config->vocab_size * row_bytes);
    size_t bytes = max_size(max_size(MIN_STAGE_BYTES, min_size(most, STAGE_BYTES)), 8 * row_bytes);
    bytes = max_size(bytes, layout->head.data);
    for (int32_t i = 0; i < layout->num_layers; i++) {
        bytes = max_size(bytes, layout->layers[i].qkv.data);
    }
    return qf_cuda_align(bytes);
}

static qf_status alloc_groups(loader *self, qf_error *err)
{
    bool needed = false;
    for (int32_t i = 0; i <= self->layout->num_layers; i++) {
        const bool head = i == self->layout->num_layers;
        for (int32_t id = head ? QF_CUDA_HEAD : 0; id < QF_CUDA_LINEARS_PER_LAYER + (head ? 1 : 0); id++) {
            const qf_cuda_linear_layout *linear =
                head ? &self->layout->head : qf_cuda_layer_linear(&self->layout->layers[i], (qf_cuda_linear_id)id);
            qf_cuda_fused fused;
            qf_cuda_fused_get(self->checkpoint, head ? 0 : i, (qf_cuda_linear_id)id, self->float32, &fused);
            self->longest_k = max_size(self->longest_k, (size_t)linear->real_k);
            for (int32_t part = 0; part < fused.num_parts; part++) {
                needed = needed || qf_cuda_needs_groups(fused.parts[part], linear);
            }
        }
    }
    return needed ? qf_alloc((void **)&self->groups, QF_REPACK_MAX_PARTS * self->longest_k, sizeof *self->groups,
                             "groups of columns", err)
                  : QF_OK;
}

static qf_status load_all(loader *self, int32_t ordinal, char *scratch, qf_thread_pool *pool, qf_cuda_weights *out,
                          qf_error *err)
{
    const qf_cuda_weights_layout *layout = self->layout;
    QF_CUDA_CALL(cudaSetDevice(ordinal));
    QF_TRY(qf_alloc((void **)&out->layers, (size_t)layout->num_layers, sizeof *out->layers, "the layers", err));
    out->num_layers = layout->num_layers;
    QF_TRY(qf_alloc((void **)&self->largest, (size_t)qf_thread_pool_size(pool), sizeof *self->largest,
                    "the largest scales", err));
    QF_TRY(alloc_groups(self, err));
    QF_TRY(qf_cuda_stager_init(&self->stager, pool, choose_stage_bytes(self), scratch, layout->raw_bytes, err));
    /* The streams here wait for no other: what the caller began in this memory must be over. */
    QF_CUDA_CALL(cudaDeviceSynchronize());
    /* Gaps between tensors hold zeros. Done before anything else begins on either stream. */
    QF_CUDA_CALL(cudaMemsetAsync(self->device, 0, layout->device_bytes, self->stager.compute));
    QF_CUDA_CALL(cudaStreamSynchronize(self->stager.compute));
    QF_TRY(load_embedding(self, &out->embedding, err));
    QF_TRY(load_layers(self, out, err));
    QF_TRY(load_head(self, out, err));
    QF_TRY(qf_cuda_stager_finish(&self->stager, err));
    return report(self, layout->head_bytes, err);
}

static qf_status check_memory(const qf_cuda_weights_layout *layout, const void *device, const void *host,
                              const void *scratch, size_t scratch_bytes, qf_error *err)
{
    const size_t needed = qf_cuda_weights_scratch_bytes(layout);
    if (scratch_bytes < needed) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%zu bytes of scratch to load weights: at least %zu",
                       scratch_bytes, needed);
    }
    if (device == NULL || (host == NULL && layout->host_bytes > 0) || (scratch == NULL && needed > 0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "no memory for weights: device %p, host %p, scratch %p", device,
                       host, scratch);
    }
    if (((uintptr_t)device | (uintptr_t)host | (uintptr_t)scratch) % QF_CUDA_ALIGN != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "memory for weights: device %p, host %p, scratch %p: must be "
                       "aligned to %zu bytes", device, host, scratch, QF_CUDA_ALIGN);
    }
    return QF_OK;
}

qf_status qf_cuda_weights_load(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                               qf_cuda_weights_layout *layout, const qf_cuda_device *device, void *device_memory,
                               void *host_memory, void *scratch, size_t scratch_bytes, qf_thread_pool *pool,
                               qf_progress_fn progress, void *progress_arg, qf_cuda_weights *out, qf_error *err)
{
    *out = (qf_cuda_weights){0};
    QF_TRY(check_memory(layout, device_memory, host_memory, scratch, scratch_bytes, err));
    loader self = {.checkpoint = checkpoint,
                   .config = qf_checkpoint_config(checkpoint),
                   .layout = layout,
                   .device = device_memory,
                   .host = host_memory,
                   .blob = (char *)scratch + QF_CUDA_SLOTS * layout->raw_bytes,
                   .float32 = options->float32,
                   .progress = progress,
                   .progress_arg = progress_arg,
                   .total_bytes = layout->device_bytes + layout->host_bytes};
    qf_status status = load_all(&self, device->ordinal, scratch, pool, out, err);
    qf_cuda_stager_deinit(&self.stager);
    qf_free(self.groups);
    qf_free(self.largest);
    if (status != QF_OK) {
        qf_cuda_weights_deinit(out);
    }
    return status;
}

void qf_cuda_weights_deinit(qf_cuda_weights *self)
{
    qf_free(self->layers);
    *self = (qf_cuda_weights){0};
}
