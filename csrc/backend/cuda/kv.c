/* The KV cache on the device: what a layer's blocks hold, where they are, and the tables of a low-bit cache's keys.
 *
 * A layer's K is the blocks of all sequences one after the other, then its V the same. Low-bit keys are stored without
 * the bias of k_proj; attention adds its rotation R_p(b) = R_i(R_p0(b)), p = p0 + i with p0 a multiple of a tile, from
 * tables of the cosines and sines of the p0 and of the i, which serve all layers. */
#include <stdio.h>

#include "backend/cuda/cuda_backend.h"
#include "base/alloc.h"
#include "kv/window.h"

qf_cuda_kv_format qf_cuda_kernel_kv_format(qf_kv_format format)
{
    switch (format) {
    case QF_KV_FP8_E4M3: return QF_CUDA_KV_FP8;
    case QF_KV_INT8: return QF_CUDA_KV_INT8;
    case QF_KV_INT4: return QF_CUDA_KV_INT4;
    case QF_KV_NF4: return QF_CUDA_KV_NF4;
    default: return QF_CUDA_KV_16;
    }
}

size_t qf_cuda_layer_block_bytes(const qf_cuda_backend *self, int32_t layer)
{
    return (size_t)self->options.block_size * (size_t)self->config.num_kv_heads *
           qf_kv_row_bytes(qf_cuda_layer_kv_format(&self->options, layer), self->config.head_dim);
}

qf_status qf_cuda_kv_check(const qf_cuda_backend *self, qf_error *err)
{
    const qf_backend_options *options = &self->options;
    if (qf_kv_is_low_bit(options->kv_format) && options->float32) {
        return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                       "kv_cache_dtype=\"%s\" with dtype=\"float32\" is not implemented on the GPU: the reference keeps "
                       "its cache in float32", qf_kv_format_name(options->kv_format));
    }
    return QF_OK;
}

int32_t qf_cuda_kv_window_blocks(const qf_cuda_backend *self)
{
    const qf_backend_options *options = &self->options;
    return (int32_t)qf_kv_window_blocks(self->kv_window, options->block_size, options->max_model_len,
                                        options->max_num_seqs, options->max_num_batched_tokens);
}

/* Of a layer's K in the window, and of its V. */
static size_t window_layer_bytes(const qf_cuda_backend *self, int32_t layer)
{
    bool low_bit = qf_kv_is_low_bit(qf_cuda_layer_kv_format(&self->options, layer));
    return !low_bit ? 0
                    : (size_t)qf_cuda_kv_window_blocks(self) * (size_t)self->options.block_size *
                          (size_t)self->kv_width * sizeof(uint16_t);
}

size_t qf_cuda_kv_window_bytes(const qf_cuda_backend *self)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < self->config.num_layers; i++) {
        bytes += 2 * window_layer_bytes(self, i);
    }
    return bytes;
}

qf_status qf_cuda_kv_layout(qf_cuda_backend *self, char *storage, int32_t num_blocks, qf_error *err)
{
    int32_t num_layers = self->config.num_layers;
    QF_TRY(qf_alloc((void **)&self->caches, (size_t)num_layers, sizeof *self->caches, "the layers' caches", err));
    QF_TRY(qf_alloc((void **)&self->windows, (size_t)num_layers, sizeof *self->windows, "the layers' windows", err));
    for (int32_t i = 0; i < num_layers; i++) {
        size_t bytes = (size_t)num_blocks * qf_cuda_layer_block_bytes(self, i);
        self->caches[i] = (qf_cuda_kv){.k = storage,
                                       .v = storage + bytes,
                                       .block_size = self->options.block_size,
                                       .num_kv_heads = self->config.num_kv_heads,
                                       .head_dim = self->config.head_dim,
                                       .float32 = self->options.float32,
                                       .format = qf_cuda_kernel_kv_format(qf_cuda_layer_kv_format(&self->options, i))};
        storage += 2 * bytes;
    }
    for (int32_t i = 0; i < num_layers && self->kv_window > 0; i++) {
        size_t bytes = window_layer_bytes(self, i);
        self->windows[i] = (qf_cuda_kv){.k = bytes > 0 ? storage : NULL,
                                        .v = bytes > 0 ? storage + bytes : NULL,
                                        .block_size = self->options.block_size,
                                        .num_kv_heads = self->config.num_kv_heads,
                                        .head_dim = self->config.head_dim};
        storage += 2 * bytes;
    }
    return QF_OK;
}

qf_status qf_cuda_kv_tables(qf_cuda_backend *self, qf_error *err)
{
    if (!self->any_low_bit) {
        return QF_OK;
    }
    qf_cuda_kv_bias_tables_args args = {.inv_freq = self->ws.inv_freq,
                                        .factor = self->config.rope.attention_factor,
                                        .coarse = self->ws.bias_coarse,
                                        .fine = self->ws.bias_fine,
                                        .rotation = self->ws.bias_rotation,
                                        .num_tiles = qf_cuda_kv_bias_tiles(self),
                                        .head_dim = self->config.head_dim};
    return qf_cuda_kv_bias_tables(&args, self->stream, err);
}

int32_t qf_cuda_kv_bias_tiles(const qf_cuda_backend *self)
{
    return (self->options.max_model_len + QF_CUDA_BIAS_TILE - 1) / QF_CUDA_BIAS_TILE;
}

void qf_cuda_kv_describe(const qf_cuda_backend *self, char *out, size_t out_bytes)
{
    int32_t num_16bit = 0;
    *out = '\0';
    for (int32_t i = 0; i < self->config.num_layers; i++) {
        num_16bit += self->caches[i].format == QF_CUDA_KV_16;
    }
    if (!self->any_low_bit) {
        return;
    }
    int used = snprintf(out, out_bytes, ", KV cache %s", qf_kv_format_name(self->options.kv_format));
    if (num_16bit > 0) {
        used += snprintf(out + used, out_bytes - (size_t)used, ", %d layers 16 bits", num_16bit);
    }
    if (self->kv_window > 0) {
        (void)snprintf(out + used, out_bytes - (size_t)used, ", 16-bit window %d", self->kv_window);
    }
}
