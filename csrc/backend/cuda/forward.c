/* The Qwen2 forward pass on a GPU. Reads top to bottom like the paper:
 *
 *   h = embed(tokens)
 *   for each layer:  h += o_proj(attention(rope(qkv_proj(norm(h)))))
 *                    h += down_proj(silu(gate_proj(norm(h))) * up_proj(norm(h)))
 *   logits = lm_head(norm(h))
 *
 * The residual stream is float32; a block's output stays apart, as one or more partial sums ("delta"), and is added by
 * the norm that follows; that of few tokens the linear layers add themselves, and make the norm. Everything is enqueued on
 * one stream; nothing here waits for the device. */
#include <math.h>

#include "backend/cuda/cuda_backend.h"

/* Of a linear whose x or whose sums belong to a norm that is made beside it (qf_cuda_linear_norm). */
typedef struct linear_norms {
    bool before;         /* x is not divided by its root mean square */
    const float *behind; /* the weight of the norm of the sums, or NULL */
} linear_norms;

/* across: its sums are to be added over the ranks. */
static qf_status linear(qf_cuda_backend *self, const qf_cuda_weight *weight, const uint16_t *x, int32_t num_tokens,
                        bool across, linear_norms norms, float *out, int32_t *num_splits, qf_error *err)
{
    if (weight->perm != NULL) {
        QF_TRY(qf_cuda_permute(x, weight->perm, self->ws.permuted, weight->k, num_tokens, self->stream, err));
        x = self->ws.permuted;
    }
    *num_splits = qf_cuda_linear_splits(&self->device, weight->n, weight->k, weight->bits, num_tokens, QF_CUDA_STORE,
                                        self->options.batch_invariant);
    if (across && self->rank.comm != NULL && self->rank.peers == NULL) {
        *num_splits = 1; /* NCCL adds up what it is given */
    }
    qf_cuda_linear_args args = {.weight = *weight,
                                .x = x,
                                .epilogue = QF_CUDA_STORE,
                                .out = out,
                                .num_tokens = num_tokens,
                                .num_splits = *num_splits,
                                .batch_invariant = self->options.batch_invariant,
                                .squares = norms.before ? self->ws.squares : NULL,
                                .eps = self->config.rms_norm_eps};
    if (norms.behind != NULL) {
        args.norm = (qf_cuda_linear_norm){.residual = self->ws.residual,
                                          .weight = norms.behind,
                                          .x = self->ws.x,
                                          .squares = self->ws.squares,
                                          .exchange = self->ws.exchange};
        *num_splits = 0;
    }
    return qf_cuda_linear(&args, &self->device, self->stream, err);
}

/* act = silu(gate) * up */
static qf_status gate_up(qf_cuda_backend *self, const qf_cuda_weight *weight, int32_t num_tokens, bool norm_before,
                         qf_error *err)
{
    const uint16_t *x = self->ws.x;
    if (weight->perm != NULL) {
        QF_TRY(qf_cuda_permute(x, weight->perm, self->ws.permuted, weight->k, num_tokens, self->stream, err));
        x = self->ws.permuted;
    }
    qf_cuda_linear_args args = {.weight = *weight,
                                .x = x,
                                .epilogue = QF_CUDA_SILU_MUL,
                                .act = self->ws.act,
                                .num_tokens = num_tokens,
                                .num_splits = 1,
                                .batch_invariant = self->options.batch_invariant,
                                .squares = norm_before ? self->ws.squares : NULL,
                                .eps = self->config.rms_norm_eps};
    return qf_cuda_linear(&args, &self->device, self->stream, err);
}

static bool norm_fits(const qf_cuda_backend *self, const qf_cuda_weight *w, int32_t num_tokens, qf_cuda_epilogue epilogue)
{
    const bool invariant = self->options.batch_invariant;
    const int32_t splits = qf_cuda_linear_splits(&self->device, w->n, w->k, w->bits, num_tokens, epilogue, invariant);
    return qf_cuda_linear_norm_fits(&self->device, w->n, w->k, w->bits, num_tokens, splits, invariant);
}

/* Whether the linears make the norms of these layers, which are on the device: few rows of one rank, with nobody to see x
 * in between. */
static bool norms_inside(const qf_cuda_backend *self, int32_t num_tokens, int32_t first, int32_t last, qf_tap_fn tap)
{
    bool fit = tap == NULL && self->ws.exchange != NULL;
    for (int32_t i = first; i < last && fit; i++) {
        const qf_cuda_layer *l = &self->weights.layers[i];
        fit = norm_fits(self, &l->qkv, num_tokens, QF_CUDA_STORE) && norm_fits(self, &l->o, num_tokens, QF_CUDA_STORE) &&
              norm_fits(self, &l->gate_up, num_tokens, QF_CUDA_SILU_MUL) &&
              norm_fits(self, &l->down, num_tokens, QF_CUDA_STORE);
    }
    return fit;
}

/* x = norm(residual += delta) */
static qf_status norm(qf_cuda_backend *self, const float *weight, int32_t num_tokens, int32_t num_splits,
                      uint16_t *out, qf_error *err)
{
    qf_cuda_rmsnorm_args args = {.residual = self->ws.residual,
                                 .delta = num_splits > 0 ? self->ws.delta : NULL,
                                 .num_splits = num_splits,
                                 .delta_stride = self->layout.layers[0].o.n,
                                 .weight = weight,
                                 .out = out,
                                 .num_tokens = num_tokens,
                                 .num_rows = num_tokens,
                                 .hidden_size = self->config.hidden_size,
                                 .k_padded = self->hidden_k,
                                 .eps = self->config.rms_norm_eps};
    return qf_cuda_reduce_norm(self, &args, err);
}

qf_status qf_cuda_begin(qf_cuda_backend *self, const qf_cuda_forward *f, bool embed, qf_error *err)
{
    const qf_cuda_meta *meta = f->meta;
    qf_cuda_rank *rank = &self->rank;
    rank->calls = 0;
    rank->fresh = embed && rank->comm != NULL;
    rank->form = rank->fresh && !self->options.float32
                     ? qf_cuda_all_reduce_choose(self->shard.size, meta->num_tokens, self->config.hidden_size)
                     : QF_CUDA_ONE_SHOT; /* every rank needs every row of the residual */
    qf_cuda_step_begin_args args = {.io = self->io,
                                    .fixed_bytes = meta->fixed_bytes,
                                    .items_bytes = meta->items_bytes,
                                    .sliding_bytes = meta->sliding_bytes,
                                    .positions = meta->positions,
                                    .inv_freq = self->ws.inv_freq,
                                    .factor = self->config.rope.attention_factor,
                                    .cos_sin = self->ws.cos_sin,
                                    .num_tokens = meta->num_tokens,
                                    .head_dim = self->config.head_dim};
    if (embed) {
        args.embedding = (qf_cuda_embedding_args){.table = self->weights.embedding,
                                                  .table_bits = self->layout.embedding_bits,
                                                  .k_padded = self->hidden_k,
                                                  .token_ids = meta->token_ids,
                                                  .last_token = self->ws.last_token,
                                                  .out = self->ws.residual,
                                                  .num_tokens = meta->num_tokens,
                                                  .hidden_size = self->config.hidden_size};
        if (rank->comm != NULL) {
            args.embedding.first_id = self->shard.vocab.begin;
            args.embedding.num_ids = self->shard.vocab.end - self->shard.vocab.begin;
        }
    }
    return qf_cuda_step_begin(&args, self->stream, err);
}

/* The layer's weights, brought into a slot first if they live on the host. */
static qf_status fetch_layer(qf_cuda_backend *self, int32_t index, qf_cuda_layer *out, qf_error *err)
{
    const qf_cuda_layer *layer = &self->weights.layers[index];
    *out = *layer;
    if (layer->host_blob == NULL) {
        return QF_OK;
    }
    const qf_cuda_layer_layout *layout = &self->layout.layers[index];
    int slot = index & 1;
    /* The copy starts when the slot's last user is done, beside the layers in between. */
    QF_CUDA_CHECK(cudaStreamWaitEvent(self->copy_stream, self->slot_free[slot], 0));
    QF_CUDA_CHECK(cudaMemcpyAsync(self->ws.slots[slot], layer->host_blob, layout->size_bytes, cudaMemcpyHostToDevice,
                                  self->copy_stream));
    QF_CUDA_CHECK(cudaEventRecord(self->slot_ready[slot], self->copy_stream));
    qf_cuda_layer_at(layout, self->ws.slots[slot], out);
    return QF_OK;
}

/* Fetches ahead: the copy of the layer after next runs while this one computes. */
static qf_status begin_fetching(qf_cuda_backend *self, int32_t first, qf_error *err)
{
    if (self->layout.num_host_layers == 0 || first >= self->config.num_layers) {
        return QF_OK;
    }
    for (int slot = 0; slot < 2; slot++) { /* both slots are free once what came before on the stream is done */
        QF_CUDA_CHECK(cudaEventRecord(self->slot_free[slot], self->stream));
    }
    return QF_OK;
}

static bool on_host(const qf_cuda_backend *self, int32_t layer)
{
    return layer < self->config.num_layers && self->weights.layers[layer].host_blob != NULL;
}

/* next_norm: the weight of the norm behind this layer if the linears make norms, else NULL; normed: x is made. */
static qf_status layer_forward(qf_cuda_backend *self, const qf_cuda_forward *f, const qf_cuda_layer *layer,
                               const float *next_norm, bool normed, int32_t index, qf_tap_fn tap, void *tap_arg,
                               int32_t *splits, qf_error *err)
{
    const qf_model_config *config = &self->config;
    int32_t num_tokens = f->meta->num_tokens;
    int32_t qkv_splits;
    const bool inside = next_norm != NULL;
    const linear_norms qkv_norms = {.before = normed}, down_norms = {.behind = next_norm};
    const linear_norms o_norms = {.behind = inside ? layer->post_attention_norm : NULL};
    if (!normed) {
        QF_TRY(norm(self, layer->input_norm, num_tokens, *splits, self->ws.x, err));
    }
    QF_TRY(qf_cuda_tap(self, tap, tap_arg, index, QF_Q_PROJ, 3, self->ws.x, true, config->hidden_size, self->hidden_k,
                       num_tokens, err));
    QF_TRY(linear(self, &layer->qkv, self->ws.x, num_tokens, false, qkv_norms, self->ws.qkv, &qkv_splits, err));
    QF_TRY(qf_cuda_attention_forward(self, f, layer, index, qkv_splits, err));
    QF_TRY(qf_cuda_tap(self, tap, tap_arg, index, QF_O_PROJ, 1, self->ws.attn, true, self->q_width, self->q_k,
                       num_tokens, err));
    QF_TRY(linear(self, &layer->o, self->ws.attn, num_tokens, true, o_norms, self->ws.delta, splits, err));
    if (!inside) {
        QF_TRY(norm(self, layer->post_attention_norm, num_tokens, *splits, self->ws.x, err));
    }
    QF_TRY(qf_cuda_tap(self, tap, tap_arg, index, QF_GATE_PROJ, 2, self->ws.x, true, config->hidden_size,
                       self->hidden_k, num_tokens, err));
    QF_TRY(gate_up(self, &layer->gate_up, num_tokens, inside, err));
    QF_TRY(qf_cuda_tap(self, tap, tap_arg, index, QF_DOWN_PROJ, 1, self->ws.act, true, config->intermediate_size,
                       layer->down.k, num_tokens, err));
    return linear(self, &layer->down, self->ws.act, num_tokens, true, down_norms, self->ws.delta, splits, err);
}

qf_status qf_cuda_layers(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t last, qf_tap_fn tap,
                         void *tap_arg, int32_t *delta_splits, qf_error *err)
{
    qf_cuda_layer next = {0};
    bool fetched = false;
    const bool inside = norms_inside(self, f->meta->num_tokens, first, last, tap);
    *delta_splits = 0;
    QF_TRY(begin_fetching(self, first, err));
    for (int32_t i = first; i < last; i++) {
        qf_cuda_layer layer = next;
        if (!fetched) {
            QF_TRY(fetch_layer(self, i, &layer, err));
        }
        fetched = i + 1 < last;
        if (fetched) {
            QF_TRY(fetch_layer(self, i + 1, &next, err));
        }
        if (on_host(self, i)) {
            QF_CUDA_CHECK(cudaStreamWaitEvent(self->stream, self->slot_ready[i & 1], 0));
        }
        const float *next_norm = fetched ? next.input_norm : self->weights.final_norm;
        QF_TRY(layer_forward(self, f, &layer, inside ? next_norm : NULL, inside && i > first, i, tap, tap_arg,
                             delta_splits, err));
        if (on_host(self, i)) {
            QF_CUDA_CHECK(cudaEventRecord(self->slot_free[i & 1], self->stream));
        }
    }
    return QF_OK;
}

qf_status qf_cuda_flush_delta(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t delta_splits, qf_error *err)
{
    if (delta_splits == 0) {
        return QF_OK;
    }
    return norm(self, self->weights.final_norm, f->meta->num_tokens, delta_splits, NULL, err);
}

qf_status qf_cuda_logits(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t count,
                         int32_t delta_splits, qf_error *err)
{
    const qf_cuda_weight *head = &self->weights.head;
    qf_cuda_rmsnorm_args args = {.residual = self->ws.residual,
                                 .delta = delta_splits > 0 ? self->ws.delta : NULL,
                                 .num_splits = delta_splits,
                                 .delta_stride = self->layout.layers[0].o.n,
                                 .weight = self->weights.final_norm,
                                 .out = self->ws.logit_x,
                                 .rows = f->meta->logit_rows + first,
                                 .num_tokens = f->meta->num_tokens,
                                 .num_rows = count,
                                 .hidden_size = self->config.hidden_size,
                                 .k_padded = self->hidden_k,
                                 .eps = self->config.rms_norm_eps};
    QF_TRY(qf_cuda_reduce_norm_rows(self, &args, first == 0, err));
    qf_cuda_linear_args linear_args = {.weight = *head,
                                       .x = self->ws.logit_x,
                                       .epilogue = QF_CUDA_STORE,
                                       .out = self->ws.logits,
                                       .num_tokens = count,
                                       .num_splits = 1,
                                       .batch_invariant = self->options.batch_invariant};
    QF_TRY(qf_cuda_linear(&linear_args, &self->device, self->stream, err));
    return qf_cuda_gather_logits(self, count, err);
}

qf_status qf_cuda_sample_rows(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t count,
                              bool publish, qf_error *err)
{
    if (!qf_cuda_samples(self)) {
        return publish ? qf_cuda_step_publish(&self->io, 0, 0, &self->device, self->stream, err) : QF_OK;
    }
    qf_cuda_sample_args args = {.logits = self->ws.all_logits,
                                .logits_stride = self->all_logits_stride,
                                .vocab_size = self->vocab_size,
                                .num_rows = count,
                                .rows = f->meta->sample_rows + first,
                                .bitmasks = (const uint32_t *)f->meta->words,
                                .biases = (const qf_cuda_logit_bias *)(const void *)f->meta->words,
                                .counts = self->ws.counts,
                                .last_token = self->ws.last_token,
                                .token_ids = self->ws.token_ids + first,
                                .logprobs = self->ws.logprobs,
                                .workspace = self->ws.sample,
                                .all_greedy = f->plan.all_greedy,
                                .publish = publish ? &self->io : NULL};
    return qf_cuda_sample(&args, &self->device, self->stream, err);
}

/* Every layer in one kernel. The ranks' parts of the embedding are added up before, their logits come together behind. */
static qf_status decode_kernel(qf_cuda_backend *self, const qf_cuda_forward *f, qf_error *err)
{
    qf_cuda_decode_args args;
    if (self->rank.comm != NULL) {
        self->rank.form = QF_CUDA_ONE_SHOT; /* every rank needs the row */
        QF_TRY(norm(self, self->weights.final_norm, 1, 0, NULL, err));
    }
    qf_cuda_decode_fill(self, f->meta->num_seqs, &args);
    args.slot_mapping = f->meta->slot_mapping;
    args.seq_lens = f->meta->seq_lens;
    args.block_tables = f->meta->words;
    args.block_table_start = f->meta->block_table_start;
    QF_TRY(qf_cuda_decode(&args, &self->device, self->stream, err));
    return qf_cuda_gather_logits(self, 1, err);
}

void qf_cuda_decode_fill(const qf_cuda_backend *self, int32_t num_seqs, qf_cuda_decode_args *out)
{
    const qf_model_config *config = &self->config;
    *out = (qf_cuda_decode_args){.layers = self->ws.decode_layers,
                                 .host_layers = self->decode_layers,
                                 .num_layers = config->num_layers,
                                 .hidden_size = config->hidden_size,
                                 .intermediate_size = config->intermediate_size,
                                 .num_heads = config->num_heads,
                                 .num_kv_heads = config->num_kv_heads,
                                 .head_dim = config->head_dim,
                                 .block_size = self->options.block_size,
                                 .eps = config->rms_norm_eps,
                                 .scale = (float)(1.0 / sqrt((double)config->head_dim)),
                                 .head = self->weights.head,
                                 .final_norm = self->weights.final_norm,
                                 .residual = self->ws.residual,
                                 .logits = self->ws.logits,
                                 .cos_sin = self->ws.cos_sin,
                                 .num_seqs = num_seqs,
                                 .workspace = self->ws.decode,
                                 .peers = self->rank.peers,
                                 .ranks = self->rank.decode};
}

/* A graph's rows fit the logits' buffer (qf_cuda_graph_size). */
qf_status qf_cuda_decode_forward(qf_cuda_backend *self, const qf_cuda_forward *f, qf_error *err)
{
    int32_t rows = f->meta->num_rows;
    QF_TRY(qf_cuda_begin(self, f, true, err));
    if (f->plan.one_kernel) {
        QF_TRY(decode_kernel(self, f, err));
    } else {
        int32_t delta_splits;
        QF_TRY(qf_cuda_layers(self, f, 0, self->config.num_layers, NULL, NULL, &delta_splits, err));
        QF_TRY(qf_cuda_logits(self, f, 0, rows, delta_splits, err));
    }
    if (qf_cuda_samples(self)) {
        QF_TRY(qf_cuda_sample_rows(self, f, 0, rows, true, err));
        return qf_cuda_share_sampled(self, f, 0, rows, err);
    }
    QF_TRY(qf_cuda_share_sampled(self, f, 0, rows, err));
    return qf_cuda_sample_rows(self, f, 0, rows, true, err); /* publishes alone */
}
