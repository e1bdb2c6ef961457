/* The arena's plan: sizes before anything is allocated, the same arithmetic when it is laid out. */
#include "backend/cuda/cuda_backend.h"

#define ALIGN 256u
#define MAX_LOGIT_ROWS 256

static int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }

static int32_t max_i32(int32_t a, int32_t b) { return a > b ? a : b; }

static int32_t round_up(int32_t value, int32_t unit) { return (value + unit - 1) / unit * unit; }

void qf_cuda_backend_shape(qf_cuda_backend *self)
{
    const qf_model_config *config = &self->config;
    const qf_backend_options *options = &self->options;
    self->q_width = config->num_heads * config->head_dim;
    self->kv_width = config->num_kv_heads * config->head_dim;
    self->hidden_k = round_up(config->hidden_size, 128);
    self->q_k = round_up(self->q_width, 128);
    self->logit_rows = min_i32(max_i32(options->max_num_seqs, 16), MAX_LOGIT_ROWS);
    self->logits_stride = options->float32 ? config->vocab_size : self->layout.head.n;
    self->all_logits_stride = self->shard.size > 1 ? round_up(self->vocab_size, 16) : self->logits_stride;
    self->logprob_capacity =
        (options->max_num_batched_tokens + options->max_num_seqs) * (1 + QF_CUDA_MAX_TOP_LOGPROBS);
    self->any_perm = false;
    self->any_sliding = false;
    self->any_low_bit = false;
    for (int32_t i = 0; i < config->num_layers; i++) {
        const qf_cuda_layer_layout *layer = &self->layout.layers[i];
        self->any_perm = self->any_perm || layer->qkv.perm != SIZE_MAX || layer->o.perm != SIZE_MAX ||
                         layer->gate_up.perm != SIZE_MAX || layer->down.perm != SIZE_MAX;
        self->any_sliding = self->any_sliding || qf_model_config_layer_slides(config, i);
        self->any_low_bit = self->any_low_bit || qf_kv_is_low_bit(qf_cuda_layer_kv_format(options, i));
    }
    self->kv_window = self->any_low_bit ? options->kv_window_tokens : 0;
    self->any_perm = self->any_perm || self->layout.head.perm != SIZE_MAX;
    self->meta_bytes = qf_cuda_meta_capacity(self);
}

/* The most float32 words that the partial sums of a linear take at any number of tokens. */
static size_t partial_words(const qf_cuda_backend *self, const qf_cuda_linear_layout *linear, int32_t max_tokens)
{
    size_t most = 0;
    for (int32_t tokens = 1; tokens <= max_tokens; tokens++) {
        int32_t splits = qf_cuda_linear_splits(&self->device, linear->n, linear->k, linear->bits, tokens,
                                               QF_CUDA_STORE, self->options.batch_invariant);
        size_t words = (size_t)splits * (size_t)tokens * (size_t)linear->n;
        most = words > most ? words : most;
    }
    return most;
}

static size_t layers_partial_words(const qf_cuda_backend *self, bool qkv)
{
    size_t most = 0;
    const qf_cuda_linear_layout *last[2] = {NULL, NULL};
    for (int32_t i = 0; i < self->config.num_layers; i++) {
        const qf_cuda_layer_layout *layer = &self->layout.layers[i];
        const qf_cuda_linear_layout *linears[2] = {qkv ? &layer->qkv : &layer->o, qkv ? &layer->qkv : &layer->down};
        for (int j = 0; j < 2; j++) {
            if (last[j] == NULL || last[j]->n != linears[j]->n || last[j]->k != linears[j]->k ||
                last[j]->bits != linears[j]->bits) {
                size_t words = partial_words(self, linears[j], self->options.max_num_batched_tokens);
                most = words > most ? words : most;
                last[j] = linears[j];
            }
        }
    }
    return most;
}

/* Whether the linears may make the norms of few rows. */
static bool makes_norms_inside(const qf_cuda_backend *self)
{
    const int32_t hidden = self->config.hidden_size;
    return !self->options.float32 && !self->options.batch_invariant && self->shard.size == 1 &&
           self->layout.num_host_layers == 0 && hidden % 128 == 0 && hidden <= QF_CUDA_MAX_SQUARES;
}

/* Reserves bytes at *offset and returns where they are; NULL while only sizes are counted. */
static void *carve(char *storage, size_t *offset, size_t bytes)
{
    void *at = storage != NULL ? storage + *offset : NULL;
    *offset += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return at;
}

static size_t tiled_bytes(int32_t k, int32_t num_tokens)
{
    return (size_t)k * (size_t)round_up(num_tokens, 8) * sizeof(uint16_t);
}

static void carve_activations(qf_cuda_backend *self, char *storage, size_t *at)
{
    const qf_model_config *config = &self->config;
    qf_cuda_workspace *ws = &self->ws;
    int32_t num_tokens = self->options.max_num_batched_tokens;
    size_t tokens = (size_t)num_tokens;
    size_t hidden = (size_t)config->hidden_size, q_width = (size_t)self->q_width;
    size_t inter = (size_t)config->intermediate_size;
    int32_t inter_k = round_up(config->intermediate_size, 128);

    ws->residual = carve(storage, at, tokens * hidden * sizeof(float));
    ws->cos_sin = carve(storage, at, tokens * (size_t)config->head_dim * sizeof(float));
    if (self->options.float32) {
        ws->qkv = carve(storage, at, tokens * (q_width + 2 * (size_t)self->kv_width) * sizeof(float));
        ws->q = carve(storage, at, tokens * q_width * sizeof(float));
        ws->delta = carve(storage, at, tokens * hidden * sizeof(float));
        ws->normed = carve(storage, at, tokens * hidden * sizeof(float));
        ws->attn_f32 = carve(storage, at, tokens * q_width * sizeof(float));
        ws->gate_up_f32 = carve(storage, at, 2 * tokens * inter * sizeof(float));
        ws->logit_x_f32 = carve(storage, at, (size_t)self->logit_rows * hidden * sizeof(float));
        return;
    }
    ws->qkv = carve(storage, at, layers_partial_words(self, true) * sizeof(float));
    ws->q = carve(storage, at, tokens * q_width * sizeof(uint16_t));
    ws->delta = carve(storage, at, layers_partial_words(self, false) * sizeof(float));
    ws->x = carve(storage, at, tiled_bytes(self->hidden_k, num_tokens));
    if (makes_norms_inside(self)) {
        ws->squares = carve(storage, at, QF_CUDA_NORM_TOKENS * hidden / 16 * sizeof(float));
    }
    ws->attn = carve(storage, at, tiled_bytes(self->q_k, num_tokens));
    ws->act = carve(storage, at, tiled_bytes(inter_k, num_tokens));
    ws->logit_x = carve(storage, at, tiled_bytes(self->hidden_k, self->logit_rows));
    if (self->any_perm) {
        int32_t widest = max_i32(self->hidden_k, max_i32(self->q_k, inter_k));
        ws->permuted = carve(storage, at, tiled_bytes(widest, num_tokens));
    }
}

qf_cuda_attention_shape qf_cuda_backend_attention_shape(const qf_cuda_backend *self, bool sliding)
{
    const qf_model_config *config = &self->config;
    qf_cuda_kv_format format = qf_cuda_kernel_kv_format(self->options.kv_format);
    bool fits = !self->any_low_bit || qf_cuda_attention_decode_fits(&self->device, format, config->head_dim);
    int32_t decode_ctas = !fits ? -1 : self->any_low_bit ? 1 : 2;
    return (qf_cuda_attention_shape){.num_heads = config->num_heads,
                                     .num_kv_heads = config->num_kv_heads,
                                     .head_dim = config->head_dim,
                                     .block_size = self->options.block_size,
                                     .sliding_window = sliding ? config->sliding_window : 0,
                                     .kv_window = self->kv_window,
                                     .decode_ctas = self->device.sm_count * decode_ctas};
}

static void decode_shape(const qf_cuda_backend *self, qf_cuda_decode_args *out)
{
    *out = (qf_cuda_decode_args){.host_layers = self->decode_layers,
                                 .num_layers = self->config.num_layers,
                                 .hidden_size = self->config.hidden_size,
                                 .intermediate_size = self->config.intermediate_size,
                                 .num_heads = self->config.num_heads,
                                 .num_kv_heads = self->config.num_kv_heads,
                                 .head_dim = self->config.head_dim,
                                 .block_size = self->options.block_size,
                                 .num_seqs = 1};
    out->head.n = self->layout.head.n;
    out->head.k = self->layout.head.k;
    out->head.bits = self->layout.head.bits;
    out->head.group_size = self->layout.head.group_size;
}

qf_status qf_cuda_workspace_layout(qf_cuda_backend *self, char *storage, size_t *bytes, qf_error *err)
{
    (void)err;
    const qf_backend_options *options = &self->options;
    qf_cuda_workspace *ws = &self->ws;
    size_t seqs = (size_t)options->max_num_seqs;
    size_t vocab_size = (size_t)self->vocab_size, sampled = qf_cuda_samples(self) ? vocab_size : 0;
    qf_cuda_attention_shape shape = qf_cuda_backend_attention_shape(self, false);
    size_t at = 0;
    carve_activations(self, storage, &at);
    ws->logits = carve(storage, &at, (size_t)self->logit_rows * (size_t)self->logits_stride * sizeof(float));
    ws->all_logits = ws->logits;
    if (self->shard.size > 1) {
        size_t rows = qf_cuda_samples(self) ? (size_t)self->logit_rows : 0;
        ws->all_logits = carve(storage, &at, rows * (size_t)self->all_logits_stride * sizeof(float));
    }
    ws->inv_freq = carve(storage, &at, (size_t)self->config.head_dim / 2 * sizeof(float));
    if (self->any_low_bit) {
        size_t row = (size_t)self->config.head_dim, tiles = (size_t)qf_cuda_kv_bias_tiles(self);
        ws->bias_coarse = carve(storage, &at, tiles * row * sizeof(float));
        ws->bias_fine = carve(storage, &at, QF_CUDA_BIAS_TILE * row * sizeof(uint16_t));
        ws->bias_rotation = carve(storage, &at, QF_CUDA_BIAS_TILE * row * sizeof(float));
    }
    ws->count_list = carve(storage, &at, sampled * sizeof *ws->count_list);
    ws->token_ids = carve(storage, &at, (size_t)options->max_num_batched_tokens * sizeof(int32_t));
    ws->logprobs = carve(storage, &at, (size_t)self->logprob_capacity * sizeof *ws->logprobs);
    ws->meta = carve(storage, &at, self->meta_bytes);
    ws->slots[0] = carve(storage, &at, self->layout.slot_bytes);
    ws->slots[1] = carve(storage, &at, self->layout.slot_bytes);
    ws->decode_layers = carve(storage, &at, (size_t)self->config.num_layers * sizeof *ws->decode_layers);
    ws->zero_begin = storage != NULL ? storage + at : NULL;
    for (int i = 0; i < QF_CUDA_STEPS_IN_FLIGHT; i++) {
        ws->staging[i] = carve(storage, &at, self->meta_bytes);
    }
    ws->last_token = carve(storage, &at, seqs * sizeof(int32_t));
    ws->step_state = carve(storage, &at, sizeof *ws->step_state);
    ws->counts = carve(storage, &at, seqs * sampled * sizeof(uint16_t));
    if (makes_norms_inside(self)) {
        ws->exchange = carve(storage, &at, (QF_CUDA_MAX_SPLITS - 1) * QF_CUDA_NORM_TOKENS *
                                               (size_t)self->config.hidden_size * sizeof(float));
    }
    ws->attention = carve(storage, &at,
                          options->float32 ? 0
                                           : qf_cuda_attention_workspace_bytes(&shape, options->max_num_seqs,
                                                                               options->max_num_batched_tokens,
                                                                               options->max_model_len));
    ws->sample = carve(storage, &at,
                       sampled > 0 ? qf_cuda_sample_workspace_bytes(self->vocab_size, self->logit_rows) : 0);
    if (self->decode_kernel) {
        qf_cuda_decode_args decode;
        decode_shape(self, &decode);
        ws->decode = carve(storage, &at,
                           qf_cuda_decode_workspace_bytes(&decode, &self->device, options->max_model_len));
    }
    ws->zero_end = storage != NULL ? storage + at : NULL;
    *bytes = at;
    return QF_OK;
}
