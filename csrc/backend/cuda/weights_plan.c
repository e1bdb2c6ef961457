/* The layout of the weights: formats and offsets, to the byte, before anything is allocated.
 *
 * A fused linear keeps 4 or 8 bits if all its parts have them, in one format, with groups that can be cut into groups
 * of 32, 64 or 128, and in one order of columns. All else becomes 16 bits (dequantised, if it was not dense). What
 * is rounded while loading becomes 16 bits where a rank's columns cut its groups into pieces below 32. */
#include "backend/cuda/weights.h"

#include <string.h>

#include "backend/cuda/weights_job.h"
#include "base/alloc.h"

static int32_t round_up(int32_t value, int32_t unit) { return (value + unit - 1) / unit * unit; }

static int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }

/* --- formats -------------------------------------------------------------------------------------------- */

static bool is_dense(const qf_linear_source *source) { return source->bits > 8; }

/* Columns that share a scale as packed, or 0 if the groups cannot be packed. */
static int32_t packed_group(const qf_linear_source *source)
{
    if (source->num_groups <= 1) {
        return 128;
    }
    for (int32_t group = 128; group >= 32; group /= 2) {
        if (source->group_size % group == 0) {
            return group;
        }
    }
    return 0;
}

static bool same_order(const qf_linear_source *a, const qf_linear_source *b)
{
    if (a->perm == NULL || b->perm == NULL) {
        return a->perm == b->perm;
    }
    return memcmp(a->perm, b->perm, (size_t)a->k * sizeof *a->perm) == 0;
}

/* The packed group if the parts can be packed as they are, else 0. */
static int32_t common_group(const qf_cuda_fused *fused)
{
    const qf_linear_source *first = fused->parts[0];
    int32_t group = 128;
    for (int32_t i = 0; i < fused->num_parts; i++) {
        const qf_linear_source *part = fused->parts[i];
        if (is_dense(part) || part->bits != first->bits || part->format != first->format ||
            !same_order(part, first)) {
            return 0;
        }
        group = min_i32(group, packed_group(part));
    }
    return group;
}

static bool all_dense(const qf_cuda_fused *fused)
{
    bool dense = true;
    for (int32_t i = 0; i < fused->num_parts; i++) {
        dense = dense && is_dense(fused->parts[i]);
    }
    return dense;
}

/* Groups that a rank's columns cut are rounded whole, and stored in pieces; in 16 bits if those are too small. */
static void choose_rounding(const qf_cuda_fused *fused, int32_t bits, int32_t group_size, qf_cuda_linear_layout *out)
{
    const int32_t before = fused->parts[0]->first_column % group_size;
    int32_t group = group_size;
    while (group >= 32 && before % group != 0) {
        group /= 2;
    }
    out->quantize_bits = bits;
    out->quantize_group_size = group_size;
    if (group >= 32) {
        out->bits = bits;
        out->group_size = group;
    }
}

/* Everything but the offsets. */
static void choose_format(const qf_cuda_fused *fused, int32_t quantize_bits, const qf_backend_options *options,
                          qf_cuda_linear_layout *out)
{
    int32_t n = 0;
    for (int32_t i = 0; i < fused->num_parts; i++) {
        n += fused->parts[i]->n;
    }
    *out = (qf_cuda_linear_layout){.real_n = n, .real_k = fused->parts[0]->k, .scale_multiplier = 1.0f};
    out->group_size = 128;
    if (options->float32) {
        out->bits = 32;
        out->n = out->real_n;
        out->k = out->real_k;
        return;
    }
    out->n = fused->interleave ? 2 * round_up(fused->parts[0]->n, 8) : round_up(n, 16);
    out->k = round_up(out->real_k, 128);
    out->bits = 16;
    int32_t group = common_group(fused);
    if (quantize_bits != 0 && all_dense(fused)) {
        choose_rounding(fused, quantize_bits, options->quantize_group_size, out);
    } else if (group != 0) {
        out->bits = fused->parts[0]->bits;
        out->group_size = group;
    }
}

/* Whether the linear would have 4 or 8 bits on one device. */
static bool is_widened(const qf_cuda_fused *fused, const qf_cuda_linear_layout *linear)
{
    qf_cuda_fused whole = *fused;
    for (int32_t i = 0; i < fused->num_parts; i++) {
        whole.parts[i] = fused->parts[i]->whole != NULL ? fused->parts[i]->whole : fused->parts[i];
    }
    return linear->bits == 16 && (linear->quantize_bits != 0 || common_group(&whole) != 0);
}

/* --- offsets -------------------------------------------------------------------------------------------- */

static size_t take(size_t *at, size_t bytes)
{
    size_t offset = *at;
    *at += qf_cuda_align(bytes);
    return offset;
}

/* Bias and order of columns: what the host fills in. It stands before all packed data, so that one copy brings it. */
static void place_small(const qf_cuda_fused *fused, qf_cuda_linear_layout *linear, size_t *at)
{
    bool has_bias = false;
    for (int32_t i = 0; i < fused->num_parts; i++) {
        has_bias = has_bias || fused->parts[i]->bias != NULL;
    }
    bool has_perm = linear->bits <= 8 && fused->parts[0]->perm != NULL;
    linear->bias = has_bias ? take(at, (size_t)linear->n * sizeof(float)) : SIZE_MAX;
    linear->perm = has_perm ? take(at, (size_t)linear->k * sizeof(int32_t)) : SIZE_MAX;
}

static void place_packed(qf_cuda_linear_layout *linear, size_t *at)
{
    size_t n = (size_t)linear->n, k = (size_t)linear->k;
    linear->data = take(at, n * k * (size_t)linear->bits / 8);
    linear->scales = linear->bits <= 8 ? take(at, n * k / (size_t)linear->group_size * sizeof(uint32_t)) : SIZE_MAX;
}

/* Room for the bias of k_proj apart from the others', where the layer's keys are stored without it. */
static size_t place_k_bias(const qf_checkpoint *checkpoint, int32_t index, const qf_backend_options *options,
                           size_t *at)
{
    const qf_linear_source *k = qf_checkpoint_linear(checkpoint, index, QF_K_PROJ);
    if (k->bias == NULL || !qf_kv_is_low_bit(qf_cuda_layer_kv_format(options, index))) {
        return SIZE_MAX;
    }
    return take(at, (size_t)k->n * sizeof(float));
}

/* Returns how many of its linears are widened. */
static int32_t plan_layer(const qf_checkpoint *checkpoint, int32_t index, const qf_backend_options *options,
                          qf_cuda_layer_layout *out)
{
    size_t hidden_bytes = (size_t)qf_checkpoint_config(checkpoint)->hidden_size * sizeof(float);
    size_t at = 0;
    int32_t num_widened = 0;
    out->input_norm = take(&at, hidden_bytes);
    out->post_attention_norm = take(&at, hidden_bytes);
    out->k_bias = place_k_bias(checkpoint, index, options, &at);
    for (int32_t id = 0; id < QF_CUDA_LINEARS_PER_LAYER; id++) {
        qf_cuda_fused fused;
        qf_cuda_linear_layout *linear = qf_cuda_layer_linear(out, (qf_cuda_linear_id)id);
        qf_cuda_fused_get(checkpoint, index, (qf_cuda_linear_id)id, options->float32, &fused);
        choose_format(&fused, options->quantize_bits, options, linear);
        num_widened += is_widened(&fused, linear) ? 1 : 0;
        place_small(&fused, linear, &at);
    }
    for (int32_t id = 0; id < QF_CUDA_LINEARS_PER_LAYER; id++) {
        place_packed(qf_cuda_layer_linear(out, (qf_cuda_linear_id)id), &at);
    }
    out->size_bytes = at;
    return num_widened;
}

static void plan_head(const qf_checkpoint *checkpoint, const qf_backend_options *options, qf_cuda_weights_layout *out)
{
    size_t at = 0;
    qf_cuda_fused fused;
    qf_cuda_fused_get(checkpoint, 0, QF_CUDA_HEAD, options->float32, &fused);
    choose_format(&fused, options->head_bits == 16 ? 0 : options->head_bits, options, &out->head);
    out->final_norm = take(&at, (size_t)qf_checkpoint_config(checkpoint)->hidden_size * sizeof(float));
    place_small(&fused, &out->head, &at);
    place_packed(&out->head, &at);
    out->head_bytes = at;
}

/* A checkpoint of a tied model may still have a head of its own. */
static bool head_is_tied(const qf_checkpoint *checkpoint)
{
    const qf_linear_source *head = qf_checkpoint_linear(checkpoint, 0, QF_LM_HEAD);
    return qf_checkpoint_config(checkpoint)->tie_word_embeddings &&
           (head->format == QF_LINEAR_DUMMY ||
            (head->format == QF_LINEAR_DENSE && strcmp(head->weight.name, "model.embed_tokens.weight") == 0));
}

static void plan_embedding(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                           qf_cuda_weights_layout *out)
{
    const qf_model_config *config = qf_checkpoint_config(checkpoint);
    out->embedding_on_host = options->offload_embedding;
    out->head_is_embedding = !options->offload_embedding && out->head.bits >= 16 && head_is_tied(checkpoint);
    out->embedding_bits = options->float32 ? 32 : out->head_is_embedding ? -16 : 16;
    if (out->embedding_on_host) {
        out->host_bytes += qf_cuda_embedding_rows_bytes(out, config);
    } else if (!out->head_is_embedding) {
        out->embedding_bytes = qf_cuda_embedding_rows_bytes(out, config);
    }
}

/* --- staging -------------------------------------------------------------------------------------------- */

static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

static size_t linear_raw_bytes(const qf_checkpoint *checkpoint, int32_t layer, qf_cuda_linear_id id,
                               const qf_backend_options *options, const qf_cuda_linear_layout *linear)
{
    qf_cuda_fused fused;
    qf_cuda_job job;
    size_t most = 0;
    qf_cuda_fused_get(checkpoint, layer, id, options->float32, &fused);
    int32_t step = qf_cuda_job_rows(&fused, linear);
    for (int32_t row = 0; row < linear->n; row += step) {
        qf_cuda_job_make(&fused, linear, row, NULL, NULL, &job);
        most = max_size(most, job.bytes);
    }
    return most;
}

static void plan_staging(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                         qf_cuda_weights_layout *out)
{
    const qf_model_config *config = qf_checkpoint_config(checkpoint);
    qf_dtype dtype = qf_checkpoint_embedding_dtype(checkpoint);
    if (out->embedding_bytes > 0 && dtype != qf_cuda_embedding_dtype(out)) {
        size_t row_bytes = (size_t)config->hidden_size * qf_dtype_size(dtype);
        out->raw_bytes = max_size(8 * row_bytes, QF_CUDA_EMBEDDING_CHUNK / row_bytes * row_bytes);
    }
    for (int32_t i = 0; i < out->num_layers; i++) {
        for (int32_t id = 0; id < QF_CUDA_LINEARS_PER_LAYER; id++) {
            const qf_cuda_linear_layout *linear = qf_cuda_layer_linear(&out->layers[i], (qf_cuda_linear_id)id);
            out->raw_bytes = max_size(out->raw_bytes, linear_raw_bytes(checkpoint, i, (qf_cuda_linear_id)id, options,
                                                                      linear));
        }
    }
    out->raw_bytes = max_size(out->raw_bytes, linear_raw_bytes(checkpoint, 0, QF_CUDA_HEAD, options, &out->head));
    out->raw_bytes = qf_cuda_align(out->raw_bytes);
}

/* --- interface ------------------------------------------------------------------------------------------ */

static qf_status check_options(const qf_backend_options *options, qf_error *err)
{
    int32_t bits[2] = {options->quantize_bits, options->head_bits == 16 ? 0 : options->head_bits};
    for (int i = 0; i < 2; i++) {
        if (bits[i] != 0 && bits[i] != 4 && bits[i] != 8) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s: %d, must be 0, 4, 8%s",
                           i == 0 ? "quantize_bits" : "head_bits", bits[i], i == 0 ? "" : " or 16");
        }
    }
    int32_t group = options->quantize_group_size;
    if ((bits[0] != 0 || bits[1] != 0) && group != 32 && group != 64 && group != 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "group_size: %d, must be 32, 64 or 128", group);
    }
    return QF_OK;
}

qf_status qf_cuda_weights_plan(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                               qf_cuda_weights_layout *out, qf_error *err)
{
    *out = (qf_cuda_weights_layout){0};
    QF_TRY(check_options(options, err));
    int32_t num_layers = qf_checkpoint_config(checkpoint)->num_layers;
    QF_TRY(qf_alloc((void **)&out->layers, (size_t)num_layers, sizeof *out->layers, "the layers' layout", err));
    out->num_layers = num_layers;
    plan_head(checkpoint, options, out);
    plan_embedding(checkpoint, options, out);
    for (int32_t i = 0; i < num_layers; i++) {
        out->num_widened += plan_layer(checkpoint, i, options, &out->layers[i]);
        out->layers_bytes += out->layers[i].size_bytes;
    }
    size_t offloaded_bytes = 0;
    for (int32_t i = num_layers - 1; i >= 0 && offloaded_bytes < options->offload_layers_bytes; i--) {
        size_t bytes = out->layers[i].size_bytes;
        offloaded_bytes += bytes;
        out->num_host_layers++;
        out->slot_bytes = max_size(out->slot_bytes, bytes);
    }
    out->layers_bytes -= offloaded_bytes;
    out->host_bytes += offloaded_bytes;
    out->layers_offset = out->embedding_bytes;
    out->head_offset = out->layers_offset + out->layers_bytes;
    out->device_bytes = out->head_offset + out->head_bytes;
    plan_staging(checkpoint, options, out);
    return QF_OK;
}

void qf_cuda_weights_layout_deinit(qf_cuda_weights_layout *self)
{
    qf_free(self->layers);
    *self = (qf_cuda_weights_layout){0};
}

size_t qf_cuda_weights_scratch_bytes(const qf_cuda_weights_layout *layout)
{
    return 2 * layout->raw_bytes + layout->slot_bytes;
}

static const void *at(const void *base, size_t offset)
{
    return offset == SIZE_MAX ? NULL : (const void *)((uintptr_t)base + offset);
}

qf_cuda_weight qf_cuda_weight_at(const qf_cuda_linear_layout *linear, const void *base)
{
    return (qf_cuda_weight){.data = at(base, linear->data),
                            .scales = at(base, linear->scales),
                            .bias = at(base, linear->bias),
                            .perm = at(base, linear->perm),
                            .n = linear->n,
                            .k = linear->k,
                            .bits = linear->bits,
                            .group_size = linear->group_size,
                            .scale_multiplier = linear->scale_multiplier};
}

void qf_cuda_layer_at(const qf_cuda_layer_layout *layout, void *base, qf_cuda_layer *out)
{
    *out = (qf_cuda_layer){.qkv = qf_cuda_weight_at(&layout->qkv, base),
                           .o = qf_cuda_weight_at(&layout->o, base),
                           .gate_up = qf_cuda_weight_at(&layout->gate_up, base),
                           .down = qf_cuda_weight_at(&layout->down, base),
                           .input_norm = at(base, layout->input_norm),
                           .post_attention_norm = at(base, layout->post_attention_norm),
                           .k_bias = at(base, layout->k_bias)};
}
