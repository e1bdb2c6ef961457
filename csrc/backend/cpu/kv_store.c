/* The CPU backend's KV cache: which layer stores what, how many bytes that is, and where it lies. */
/* needs: kv/format.c */
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/alloc.h"
#include "kv/window.h"

static qf_kv_format layer_format(const qf_backend_options *options, int32_t layer)
{
    if (qf_kv_is_low_bit(options->kv_format)) {
        const bool wide = options->kv_16bit_layers != NULL && options->kv_16bit_layers[layer] != 0;
        return wide ? QF_KV_BF16 : options->kv_format;
    }
    return options->kv_format != QF_KV_AUTO ? options->kv_format : options->float32 ? QF_KV_F32 : QF_KV_BF16;
}

bool qf_cpu_layer_is_low_bit(const qf_backend_options *options, int32_t layer)
{
    return qf_kv_is_low_bit(layer_format(options, layer));
}

/* One of k and v of a layer. */
static size_t layer_bytes(const qf_model_config *config, const qf_backend_options *options, int32_t num_blocks,
                          qf_kv_format format)
{
    return qf_cpu_kv_cache_bytes(num_blocks, options->block_size, config->num_kv_heads, config->head_dim, format);
}

static int32_t num_low_bit_layers(const qf_model_config *config, const qf_backend_options *options)
{
    int32_t count = 0;
    for (int32_t i = 0; i < config->num_layers; i++) {
        count += qf_cpu_layer_is_low_bit(options, i);
    }
    return count;
}

static size_t bias_floats(const qf_model_config *config)
{
    return (size_t)config->num_kv_heads * (size_t)config->head_dim;
}

void qf_cpu_plan_kv(const qf_model_config *config, const qf_backend_options *options, qf_memory_plan *plan)
{
    const int32_t low_bit = num_low_bit_layers(config, options);
    for (int32_t i = 0; i < config->num_layers; i++) {
        plan->kv_block_bytes += 2 * layer_bytes(config, options, 1, layer_format(options, i));
    }
    if (low_bit == 0) {
        return;
    }
    plan->layers_bytes += (size_t)low_bit * bias_floats(config) * sizeof(float);
    plan->workspace_bytes += (qf_cpu_tile_turn_floats(config->head_dim, options->max_model_len) +
                              qf_cpu_step_turn_floats(config->head_dim)) * sizeof(float);
    plan->num_window_blocks =
        (int32_t)qf_kv_window_blocks(options->kv_window_tokens, options->block_size, options->max_model_len,
                                     options->max_num_seqs, options->max_num_batched_tokens);
    plan->kv_window_bytes =
        2 * (size_t)low_bit * layer_bytes(config, options, plan->num_window_blocks, QF_KV_BF16);
}

/* The turns of the keys' biases, and room for the biases. */
static qf_status alloc_bias(qf_cpu_backend *self, const qf_checkpoint *checkpoint, int32_t low_bit, qf_error *err)
{
    const qf_model_config *config = &self->config;
    const size_t tile_floats = qf_cpu_tile_turn_floats(config->head_dim, self->options.max_model_len);
    const size_t step_floats = qf_cpu_step_turn_floats(config->head_dim), floats = bias_floats(config);
    self->bias_bytes = (tile_floats + step_floats + (size_t)low_bit * floats) * sizeof(float);
    QF_TRY(qf_pages_alloc((void **)&self->bias, self->bias_bytes, "the key biases", err));
    float *tile_turn = self->bias, *step_turn = tile_turn + tile_floats, *bias = step_turn + step_floats;
    qf_cpu_fill_turns(self->inv_freq, (float)config->rope.attention_factor, config->head_dim,
                      self->options.max_model_len, tile_turn, step_turn);
    for (int32_t i = 0; i < config->num_layers; i++) {
        if (!qf_cpu_layer_is_low_bit(&self->options, i)) {
            continue;
        }
        const qf_linear_source *source = qf_checkpoint_linear(checkpoint, i, QF_K_PROJ);
        if (source->bias != NULL) {
            memcpy(bias, source->bias, floats * sizeof(float));
        } else {
            memset(bias, 0, floats * sizeof(float));
        }
        self->layers[i].key_bias = (qf_key_bias){.bias = bias, .tile_turn = tile_turn, .step_turn = step_turn};
        bias += floats;
    }
    return QF_OK;
}

static qf_kv_cache make_cache(const qf_cpu_backend *self, char *at, size_t bytes, int32_t num_blocks,
                              qf_kv_format format)
{
    return (qf_kv_cache){.k = at,
                         .v = at + bytes,
                         .dtype = format == QF_KV_F32 ? QF_DTYPE_F32 : QF_DTYPE_BF16,
                         .num_blocks = num_blocks,
                         .block_size = self->options.block_size,
                         .num_kv_heads = self->config.num_kv_heads,
                         .head_dim = self->config.head_dim,
                         .format = qf_kv_is_low_bit(format) ? format : QF_KV_AUTO};
}

qf_status qf_cpu_alloc_kv(qf_cpu_backend *self, const qf_checkpoint *checkpoint, const qf_memory_plan *plan,
                          int32_t num_blocks, qf_error *err)
{
    const qf_model_config *config = &self->config;
    const qf_backend_options *options = &self->options;
    const int32_t low_bit = num_low_bit_layers(config, options);
    if (low_bit > 0) {
        QF_TRY(alloc_bias(self, checkpoint, low_bit, err));
    }
    self->kv_bytes = plan->kv_block_bytes * (size_t)num_blocks;
    QF_TRY(qf_pages_alloc(&self->kv, self->kv_bytes, "the KV cache", err));
    self->window_bytes = plan->kv_window_bytes;
    if (self->window_bytes > 0) {
        QF_TRY(qf_pages_alloc(&self->window, self->window_bytes, "the KV cache's 16-bit window", err));
    }
    char *at = self->kv, *window = self->window;
    for (int32_t i = 0; i < config->num_layers; i++) {
        const qf_kv_format format = layer_format(options, i);
        const size_t bytes = layer_bytes(config, options, num_blocks, format);
        self->layers[i].cache = make_cache(self, at, bytes, num_blocks, format);
        at += 2 * bytes;
        if (window != NULL && qf_kv_is_low_bit(format)) {
            const size_t window_bytes = layer_bytes(config, options, plan->num_window_blocks, QF_KV_BF16);
            self->layers[i].window = make_cache(self, window, window_bytes, plan->num_window_blocks, QF_KV_BF16);
            window += 2 * window_bytes;
        }
    }
    return QF_OK;
}

void qf_cpu_free_kv(qf_cpu_backend *self)
{
    qf_pages_free(self->bias, self->bias_bytes);
    qf_pages_free(self->kv, self->kv_bytes);
    qf_pages_free(self->window, self->window_bytes);
}
