/* The forward pass in float32, one plain kernel per op: dtype="float32", and what the fast path is measured against. */
#include <math.h>

#include "backend/cuda/cuda_backend.h"

static qf_status linear(qf_cuda_backend *self, const float *w, const float *bias, const float *x, float *out, int32_t n,
                        int32_t k, int32_t num_tokens, qf_error *err)
{
    qf_cuda_linear_f32_args args = {.x = x, .w = w, .bias = bias, .out = out, .num_tokens = num_tokens, .n = n, .k = k};
    return qf_cuda_linear_f32(&args, self->stream, err);
}

static qf_status norm(qf_cuda_backend *self, const float *delta, const float *weight, float *out, const int32_t *rows,
                      int32_t num_rows, qf_error *err)
{
    if (self->rank.comm != NULL && rows == NULL && (delta != NULL || self->rank.fresh)) {
        const qf_cuda_rmsnorm_args sum = {.residual = self->ws.residual,
                                          .delta = delta,
                                          .num_splits = delta != NULL ? 1 : 0,
                                          .delta_stride = self->config.hidden_size,
                                          .num_tokens = num_rows,
                                          .num_rows = num_rows,
                                          .hidden_size = self->config.hidden_size};
        QF_TRY(qf_cuda_reduce_norm(self, &sum, err));
        delta = NULL;
    }
    if (delta == NULL && out == NULL) {
        return QF_OK;
    }
    qf_cuda_rmsnorm_f32_args args = {.residual = self->ws.residual,
                                     .delta = delta,
                                     .weight = weight,
                                     .out = out,
                                     .rows = rows,
                                     .num_rows = num_rows,
                                     .hidden_size = self->config.hidden_size,
                                     .eps = self->config.rms_norm_eps};
    return qf_cuda_rmsnorm_f32(&args, self->stream, err);
}

static qf_status attention(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t layer, qf_error *err)
{
    const qf_model_config *config = &self->config;
    qf_cuda_kv kv = self->caches[layer];
    qf_cuda_rope_kv_write_args rope = {.qkv = self->ws.qkv,
                                       .num_splits = 1,
                                       .qkv_stride = self->q_width + 2 * self->kv_width,
                                       .cos_sin = self->ws.cos_sin,
                                       .slot_mapping = f->meta->slot_mapping,
                                       .q = self->ws.q,
                                       .kv = kv,
                                       .num_tokens = f->meta->num_tokens,
                                       .num_heads = config->num_heads};
    QF_TRY(qf_cuda_rope_kv_write(&rope, &self->device, self->stream, err));
    qf_cuda_attention_f32_args args = {
        .shape = {.num_heads = config->num_heads,
                  .num_kv_heads = config->num_kv_heads,
                  .head_dim = config->head_dim,
                  .block_size = self->options.block_size,
                  .sliding_window = qf_model_config_layer_slides(config, layer) ? config->sliding_window : 0},
        .kv = kv,
        .q = self->ws.q,
        .out = self->ws.attn_f32,
        .query_start_loc = f->meta->query_start_loc,
        .seq_lens = f->meta->seq_lens,
        .block_tables = f->meta->words,
        .block_table_start = f->meta->block_table_start,
        .num_seqs = f->meta->num_seqs,
        .num_tokens = f->meta->num_tokens,
        .scale = (float)(1.0 / sqrt((double)config->head_dim))};
    return qf_cuda_attention_f32(&args, self->stream, err);
}

qf_status qf_cuda_reference_layers(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t last,
                                   qf_tap_fn tap, void *tap_arg, qf_error *err)
{
    const qf_model_config *config = &self->config;
    const qf_cuda_workspace *ws = &self->ws;
    int32_t num_tokens = f->meta->num_tokens, hidden = config->hidden_size, inter = config->intermediate_size;
    float *gate = ws->gate_up_f32, *up = gate + (size_t)num_tokens * (size_t)inter;
    const float *delta = NULL;
    for (int32_t i = first; i < last; i++) {
        const qf_cuda_layer *layer = &self->weights.layers[i];
        const float *gate_w = layer->gate_up.data, *up_w = gate_w + (size_t)inter * (size_t)hidden;
        QF_TRY(norm(self, delta, layer->input_norm, ws->normed, NULL, num_tokens, err));
        QF_TRY(qf_cuda_tap(self, tap, tap_arg, i, QF_Q_PROJ, 3, ws->normed, false, hidden, hidden, num_tokens, err));
        QF_TRY(linear(self, layer->qkv.data, layer->qkv.bias, ws->normed, ws->qkv, self->q_width + 2 * self->kv_width,
                      hidden, num_tokens, err));
        QF_TRY(attention(self, f, i, err));
        QF_TRY(qf_cuda_tap(self, tap, tap_arg, i, QF_O_PROJ, 1, ws->attn_f32, false, self->q_width, self->q_width,
                           num_tokens, err));
        QF_TRY(linear(self, layer->o.data, layer->o.bias, ws->attn_f32, ws->delta, hidden, self->q_width, num_tokens,
                      err));
        QF_TRY(norm(self, ws->delta, layer->post_attention_norm, ws->normed, NULL, num_tokens, err));
        QF_TRY(qf_cuda_tap(self, tap, tap_arg, i, QF_GATE_PROJ, 2, ws->normed, false, hidden, hidden, num_tokens, err));
        QF_TRY(linear(self, gate_w, NULL, ws->normed, gate, inter, hidden, num_tokens, err));
        QF_TRY(linear(self, up_w, NULL, ws->normed, up, inter, hidden, num_tokens, err));
        QF_TRY(qf_cuda_silu_mul_f32(gate, up, (int64_t)num_tokens * inter, self->stream, err));
        QF_TRY(qf_cuda_tap(self, tap, tap_arg, i, QF_DOWN_PROJ, 1, gate, false, inter, inter, num_tokens, err));
        QF_TRY(linear(self, layer->down.data, layer->down.bias, gate, ws->delta, hidden, inter, num_tokens, err));
        delta = ws->delta;
    }
    return delta != NULL ? norm(self, delta, self->weights.final_norm, NULL, NULL, num_tokens, err) : QF_OK;
}

qf_status qf_cuda_reference_logits(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t count,
                                   qf_error *err)
{
    QF_TRY(norm(self, NULL, self->weights.final_norm, self->ws.logit_x_f32, f->meta->logit_rows + first, count, err));
    QF_TRY(linear(self, self->weights.head.data, NULL, self->ws.logit_x_f32, self->ws.logits, self->config.vocab_size,
                  self->config.hidden_size, count, err));
    return qf_cuda_gather_logits(self, count, err);
}
