/* A layer's attention, from what the QKV linear made to what the output projection takes: rotation, the write to the cache, and the
 * rows' attention over it. */
#include <math.h>

#include "backend/cuda/cuda_backend.h"

qf_status qf_cuda_attention_forward(qf_cuda_backend *self, const qf_cuda_forward *f, const qf_cuda_layer *weights,
                                    int32_t layer, int32_t num_splits, qf_error *err)
{
    const qf_model_config *config = &self->config;
    const qf_cuda_meta *meta = f->meta;
    bool sliding = qf_model_config_layer_slides(config, layer);
    qf_cuda_kv kv = self->caches[layer];
    kv.k_bias = weights->k_bias;
    bool window = self->kv_window > 0 && kv.format != QF_CUDA_KV_16;
    const qf_cuda_attention_plan *plan = sliding ? &f->plan.sliding : &f->plan.full;
    qf_cuda_rope_kv_write_args rope = {.qkv = self->ws.qkv,
                                       .num_splits = num_splits,
                                       .qkv_stride = self->layout.layers[layer].qkv.n,
                                       .cos_sin = self->ws.cos_sin,
                                       .slot_mapping = meta->slot_mapping,
                                       .q = self->ws.q,
                                       .kv = kv,
                                       .num_tokens = meta->num_tokens,
                                       .num_heads = config->num_heads,
                                       .window_slot_mapping = window ? meta->window_slot_mapping : NULL};
    if (window) {
        rope.window = self->windows[layer];
    }
    /* Few decode rows alone: attention rotates and writes them itself, where it can. */
    bool alone = !window && plan->num_decode_items > 0 && plan->num_prefill_items == 0 &&
                 meta->num_tokens <= QF_CUDA_ATTENTION_FEW_ROWS && qf_cuda_attention_takes_rows(&self->device, &kv);
    if (!alone) {
        QF_TRY(qf_cuda_rope_kv_write(&rope, &self->device, self->stream, err));
    }
    qf_cuda_attention_args args = {.shape = {.num_heads = config->num_heads,
                                             .num_kv_heads = config->num_kv_heads,
                                             .head_dim = config->head_dim,
                                             .block_size = self->options.block_size,
                                             .sliding_window = sliding ? config->sliding_window : 0,
                                             .kv_window = self->kv_window},
                                   .kv = kv,
                                   .q = self->ws.q,
                                   .out = self->ws.attn,
                                   .out_k = self->q_k,
                                   .items = sliding ? meta->sliding_items : meta->items,
                                   .num_items = meta->num_items + (sliding ? 2 : 0),
                                   .prefill_offset = f->captured ? 0 : plan->num_decode_items,
                                   .max_decode_items = plan->num_decode_items,
                                   .max_prefill_items = plan->num_prefill_items,
                                   .block_tables = meta->words,
                                   .block_table_start = meta->block_table_start,
                                   .workspace = self->ws.attention,
                                   .num_tokens = meta->num_tokens,
                                   .scale = (float)(1.0 / sqrt((double)config->head_dim)),
                                   .batch_invariant = self->options.batch_invariant,
                                   .bias_coarse = self->ws.bias_coarse,
                                   .bias_fine = self->ws.bias_fine,
                                   .bias_rotation = self->ws.bias_rotation};
    if (alone) {
        args.qkv = rope.qkv;
        args.qkv_splits = rope.num_splits;
        args.qkv_stride = rope.qkv_stride;
        args.cos_sin = rope.cos_sin;
        args.slot_mapping = rope.slot_mapping;
    }
    if (window) {
        args.window_kv = self->windows[layer];
        args.window_tokens = self->kv_window;
        args.window_table_start = meta->window_table_start;
        args.window_first = meta->window_first;
    }
    QF_TRY(qf_cuda_attention(&args, &self->device, self->stream, err));
    if (plan->num_window_items == 0) {
        return QF_OK;
    }
    /* The newest positions of decode rows, from the 16-bit cache that the layer has of them. */
    if (window) {
        args.kv = self->windows[layer];
        args.block_table_start = meta->window_table_start;
        args.window_tokens = 0;
    }
    args.items = meta->window_items[sliding];
    args.num_items = meta->num_items + (sliding ? 5 : 4);
    args.max_decode_items = plan->num_window_items;
    args.max_prefill_items = 0;
    return qf_cuda_attention(&args, &self->device, self->stream, err);
}
