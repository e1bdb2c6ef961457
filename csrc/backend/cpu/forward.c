/* The Qwen2 forward pass on the CPU. Reads top to bottom like the paper:
 *
 *   h = embed(tokens)
 *   for each layer:  h += o_proj(attention(rope(qkv_proj(norm(h)))))
 *                    h += down_proj(silu(gate_proj(norm(h))) * up_proj(norm(h)))
 *   logits = lm_head(norm(h))
 *
 * The residual stream is float32. A block's output is kept apart ("delta") and added by the norm that follows.
 *
 * A rank of several holds some heads, some features between gate and down, and some rows of the embedding and the head:
 * what the embedding, o_proj and down_proj give is summed over the ranks; the logits' columns come together on rank 0,
 * which samples and tells the others. */
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"

/* cos_sin[t] = cos(position * inv_freq) | sin(...), times the attention factor. The angle is rounded to float32 as
 * in the reference; cosine and sine are taken in double and rounded once, so they do not depend on the C library. */
static void rope_table(const qf_cpu_backend *self, const qf_batch *batch)
{
    int32_t half = self->config.head_dim / 2;
    double factor = self->config.rope.attention_factor;
    for (int32_t t = 0; t < batch->num_tokens; t++) {
        float *row = self->ws.cos_sin + (int64_t)t * self->config.head_dim;
        for (int32_t j = 0; j < half; j++) {
            float angle = (float)batch->positions[t] * self->inv_freq[j];
            row[j] = (float)(cos((double)angle) * factor);
            row[half + j] = (float)(sin((double)angle) * factor);
        }
    }
}

static void linear(qf_cpu_backend *self, const qf_cpu_linear *weight, const float *x, int32_t num_tokens, float *out)
{
    qf_cpu_linear_args args = {.x = x,
                               .linears = {weight},
                               .outs = {out},
                               .num_linears = 1,
                               .num_tokens = num_tokens,
                               .activation = self->activation};
    qf_cpu_linear_run(self->ctx, &args);
}

/* x (num_tokens, hidden_size) = the sum of what each rank has */
static qf_status sum_over_ranks(qf_cpu_backend *self, float *x, int32_t num_tokens, qf_error *err)
{
    qf_comm *comm = self->options.comm;
    if (comm == NULL) {
        return QF_OK;
    }
    qf_all_reduce_args args = {.in = x,
                               .out = x,
                               .count = (size_t)num_tokens * (size_t)self->config.hidden_size,
                               .dtype = QF_DTYPE_F32};
    return comm->vtable->all_reduce(comm, &args, err);
}

/* normed = norm(hidden += delta) */
static void norm(qf_cpu_backend *self, float *hidden, const float *delta, const float *weight, float *out,
                 int32_t num_tokens)
{
    qf_rmsnorm_args args = {.residual = hidden,
                            .delta = delta,
                            .weight = weight,
                            .out = out,
                            .num_tokens = num_tokens,
                            .hidden_size = self->config.hidden_size,
                            .eps = self->config.rms_norm_eps};
    qf_cpu_rmsnorm(self->ctx, &args);
}

typedef struct layer_tap {
    qf_tap_fn fn;
    void *arg;
    int32_t layer;
} layer_tap;

static void call_tap(const layer_tap *self, qf_linear_id id, const float *x, int32_t num_tokens, int32_t k)
{
    if (self->fn != NULL) {
        self->fn(self->arg, self->layer, id, x, num_tokens, k);
    }
}

/* delta = o_proj(attention(...)) */
static qf_status attention_block(qf_cpu_backend *self, const qf_cpu_layer *layer, const qf_batch *batch,
                                 const layer_tap *tap, qf_error *err)
{
    const qf_model_config *config = &self->config;
    const qf_cpu_workspace *ws = &self->ws;
    int32_t num_tokens = batch->num_tokens;

    call_tap(tap, QF_Q_PROJ, ws->normed, num_tokens, config->hidden_size);
    call_tap(tap, QF_K_PROJ, ws->normed, num_tokens, config->hidden_size);
    call_tap(tap, QF_V_PROJ, ws->normed, num_tokens, config->hidden_size);
    qf_cpu_linear_args qkv = {
        .x = ws->normed,
        .linears = {layer->linears[QF_Q_PROJ], layer->linears[QF_K_PROJ], layer->linears[QF_V_PROJ]},
        .outs = {ws->q, ws->k, ws->v},
        .num_linears = 3,
        .num_tokens = num_tokens,
        .activation = self->activation};
    qf_cpu_linear_run(self->ctx, &qkv);

    qf_rope_kv_write_args rope = {.q = ws->q,
                                  .k = ws->k,
                                  .v = ws->v,
                                  .cos_sin = ws->cos_sin,
                                  .slot_mapping = batch->slot_mapping,
                                  .cache = layer->cache,
                                  .num_tokens = num_tokens,
                                  .num_heads = config->num_heads,
                                  .k_bias = layer->key_bias.bias};
    if (batch->window_slot_mapping != NULL) {
        rope.window = layer->window;
        rope.window_slot_mapping = batch->window_slot_mapping;
    }
    qf_cpu_rope_kv_write(self->ctx, &rope);

    qf_attention_args attention = {.q = ws->q,
                                   .out = ws->attn,
                                   .cache = layer->cache,
                                   .query_start_loc = batch->query_start_loc,
                                   .seq_lens = batch->seq_lens,
                                   .block_tables = batch->block_tables,
                                   .block_table_stride = batch->block_table_stride,
                                   .num_seqs = batch->num_seqs,
                                   .num_heads = config->num_heads,
                                   .sliding_window = layer->sliding_window,
                                   .scale = (float)(1.0 / sqrt((double)config->head_dim)),
                                   .key_bias = layer->key_bias,
                                   .window = rope.window,
                                   .window_tables = batch->window_block_tables,
                                   .window_first_block = batch->window_first_block,
                                   .window_table_stride = batch->window_table_stride,
                                   .window_tokens = self->options.kv_window_tokens};
    qf_cpu_attention(self->ctx, &attention);

    call_tap(tap, QF_O_PROJ, ws->attn, num_tokens, config->num_heads * config->head_dim);
    linear(self, layer->linears[QF_O_PROJ], ws->attn, num_tokens, ws->delta);
    return sum_over_ranks(self, ws->delta, num_tokens, err);
}

/* delta = down_proj(silu(gate) * up), in chunks of rows that bound the workspace */
static qf_status mlp_block(qf_cpu_backend *self, const qf_cpu_layer *layer, int32_t num_tokens, const layer_tap *tap,
                           qf_error *err)
{
    const qf_model_config *config = &self->config;
    const qf_cpu_workspace *ws = &self->ws;
    for (int32_t start = 0; start < num_tokens; start += ws->mlp_rows) {
        int32_t count = num_tokens - start < ws->mlp_rows ? num_tokens - start : ws->mlp_rows;
        const float *x = ws->normed + (int64_t)start * config->hidden_size;
        call_tap(tap, QF_GATE_PROJ, x, count, config->hidden_size);
        call_tap(tap, QF_UP_PROJ, x, count, config->hidden_size);
        qf_cpu_linear_args gate_up = {.x = x,
                                      .linears = {layer->linears[QF_GATE_PROJ], layer->linears[QF_UP_PROJ]},
                                      .outs = {ws->gate, ws->up},
                                      .num_linears = 2,
                                      .num_tokens = count,
                                      .activation = self->activation};
        qf_cpu_linear_run(self->ctx, &gate_up);
        qf_silu_mul_args silu = {.gate = ws->gate,
                                 .up = ws->up,
                                 .out = ws->gate,
                                 .num_tokens = count,
                                 .intermediate_size = config->intermediate_size};
        qf_cpu_silu_mul(self->ctx, &silu);
        call_tap(tap, QF_DOWN_PROJ, ws->gate, count, config->intermediate_size);
        linear(self, layer->linears[QF_DOWN_PROJ], ws->gate, count,
               ws->delta + (int64_t)start * config->hidden_size);
    }
    return sum_over_ranks(self, ws->delta, num_tokens, err);
}

qf_status qf_cpu_forward_layers(qf_cpu_backend *self, int32_t first, int32_t last, const qf_batch *batch, float *hidden,
                                qf_tap_fn tap_fn, void *tap_arg, qf_error *err)
{
    const float *delta = NULL; /* nothing to add before the first norm */
    rope_table(self, batch);
    for (int32_t i = first; i < last; i++) {
        const qf_cpu_layer *layer = &self->layers[i];
        layer_tap tap = {.fn = tap_fn, .arg = tap_arg, .layer = i};
        norm(self, hidden, delta, layer->input_norm, self->ws.normed, batch->num_tokens);
        QF_TRY(attention_block(self, layer, batch, &tap, err));
        norm(self, hidden, self->ws.delta, layer->post_attention_norm, self->ws.normed, batch->num_tokens);
        QF_TRY(mlp_block(self, layer, batch->num_tokens, &tap, err));
        delta = self->ws.delta;
    }
    if (delta != NULL) {
        norm(self, hidden, delta, self->final_norm, NULL, batch->num_tokens);
    }
    return QF_OK;
}

typedef struct sample_job {
    qf_cpu_backend *self;
    const qf_logit_task *tasks; /* (num) */
    const float *logits;        /* (num, vocab_size) */
} sample_job;

static void sample_rows(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    const sample_job *job = arg;
    qf_cpu_backend *self = job->self;
    qf_sampler *sampler = self->samplers[worker];
    size_t vocab_size = (size_t)self->shard.vocab_size;
    for (int64_t i = begin; i < end; i++) {
        const qf_logit_task *task = &job->tasks[i];
        const float *logits = job->logits + (size_t)i * vocab_size;
        if (task->logits_out != NULL) {
            memcpy(task->logits_out, logits, vocab_size * sizeof *logits);
        }
        if (task->target_logprobs != NULL) {
            qf_logprobs(sampler, logits, task->target_token_id, task->num_target_logprobs, task->target_logprobs);
        }
        if (task->state != NULL) {
            int32_t token_id = -1;
            qf_sample(sampler, task->state, logits, task->bitmask, &token_id, task->logprobs);
            self->last_token[task->slot] = token_id;
            *task->token_id = token_id;
        }
    }
}

static qf_status gather_logits(qf_cpu_backend *self, int32_t count, qf_error *err)
{
    qf_comm *comm = self->options.comm;
    if (comm == NULL) {
        return QF_OK;
    }
    qf_gather_args args = {.in = self->ws.logits,
                           .out = self->ws.all_logits,
                           .num_rows = count,
                           .columns = self->config.vocab_size,
                           .first_column = self->shard.vocab.begin,
                           .out_columns = self->shard.vocab_size,
                           .root = 0,
                           .dtype = QF_DTYPE_F32};
    return comm->vtable->gather(comm, &args, err);
}

/* Rank 0's tokens to all: the next step may begin with them. */
static qf_status share_tokens(qf_cpu_backend *self, const qf_logit_task *tasks, int32_t count, qf_error *err)
{
    qf_comm *comm = self->options.comm;
    if (comm == NULL) {
        return QF_OK;
    }
    for (int32_t i = 0; i < count && self->shard.rank == 0; i++) {
        self->sampled[i] = tasks[i].state != NULL ? self->last_token[tasks[i].slot] : -1;
    }
    QF_TRY(comm->vtable->broadcast(comm, 0, self->sampled, (size_t)count * sizeof *self->sampled, NULL, err));
    for (int32_t i = 0; i < count; i++) {
        if (tasks[i].state != NULL) {
            self->last_token[tasks[i].slot] = self->sampled[i];
        }
    }
    return QF_OK;
}

/* Rows are gathered into chunks that bound the logits' memory. */
static qf_status logits_and_sampling(qf_cpu_backend *self, const qf_batch *batch, qf_error *err)
{
    const qf_cpu_workspace *ws = &self->ws;
    size_t hidden_size = (size_t)self->config.hidden_size;
    for (int32_t start = 0; start < batch->num_logit_tasks; start += ws->logit_rows) {
        int32_t left = batch->num_logit_tasks - start;
        int32_t count = left < ws->logit_rows ? left : ws->logit_rows;
        const qf_logit_task *tasks = batch->logit_tasks + start;
        for (int32_t i = 0; i < count; i++) {
            memcpy(ws->rows + (size_t)i * hidden_size, ws->hidden + (size_t)tasks[i].row * hidden_size,
                   hidden_size * sizeof(float));
        }
        norm(self, ws->rows, NULL, self->final_norm, ws->normed, count);
        linear(self, self->lm_head, ws->normed, count, ws->logits);
        QF_TRY(gather_logits(self, count, err));
        if (self->shard.rank == 0) {
            sample_job job = {.self = self, .tasks = tasks, .logits = ws->all_logits};
            qf_thread_pool_run(self->pool, sample_rows, &job, count, 1);
        }
        QF_TRY(share_tokens(self, tasks, count, err));
    }
    return QF_OK;
}

/* The token's row of the embedding, counted from this rank's first. */
static int32_t embedding_row(const qf_cpu_backend *self, int32_t token_id)
{
    if (token_id < 0) { /* sampled in the step before */
        token_id = self->last_token[-1 - token_id];
    }
    /* A slot whose last sample failed (its request is being ended) may hold -1. */
    return (token_id < 0 ? 0 : token_id) - self->shard.vocab.begin;
}

/* hidden = embedding of the tokens; the rows of tokens that are another rank's come from there. */
static qf_status embed(qf_cpu_backend *self, const qf_batch *batch, qf_error *err)
{
    for (int32_t t = 0; t < batch->num_tokens; t++) {
        int32_t row = embedding_row(self, batch->token_ids[t]);
        self->token_ids[t] = row >= 0 && row < self->config.vocab_size ? row : 0;
    }
    qf_embedding_args embedding = {.table = self->embedding,
                                   .table_dtype = self->embedding_dtype,
                                   .token_ids = self->token_ids,
                                   .out = self->ws.hidden,
                                   .num_tokens = batch->num_tokens,
                                   .hidden_size = self->config.hidden_size};
    qf_cpu_embedding(self->ctx, &embedding);
    for (int32_t t = 0; t < batch->num_tokens && self->shard.size > 1; t++) {
        int32_t row = embedding_row(self, batch->token_ids[t]);
        if (row < 0 || row >= self->config.vocab_size) {
            size_t width = (size_t)self->config.hidden_size;
            memset(self->ws.hidden + (size_t)t * width, 0, width * sizeof *self->ws.hidden);
        }
    }
    return sum_over_ranks(self, self->ws.hidden, batch->num_tokens, err);
}

qf_status qf_cpu_forward(qf_cpu_backend *self, const qf_batch *batch, qf_error *err)
{
    QF_TRY(embed(self, batch, err));
    QF_TRY(qf_cpu_forward_layers(self, 0, self->config.num_layers, batch, self->ws.hidden, NULL, NULL, err));
    return logits_and_sampling(self, batch, err);
}
