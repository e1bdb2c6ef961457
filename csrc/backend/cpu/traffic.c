/* What a step moves on the CPU, by formula: for the meter. Everything that an op reads or writes counts once, wherever it
 * lies: caches are not modelled, so these are not bytes of the memory bus. */
#include "backend/cpu/cpu_backend.h"

/* Float32 words of a token between the ops of a layer: see forward.c. */
static uint64_t layer_words(const qf_model_config *config)
{
    uint64_t hidden = (uint64_t)config->hidden_size, inter = (uint64_t)config->intermediate_size;
    uint64_t head = (uint64_t)config->head_dim;
    uint64_t q = (uint64_t)config->num_heads * head, kv = (uint64_t)config->num_kv_heads * head;
    return 2 * 4 * hidden         /* norms: residual and delta in, residual and result out */
           + hidden + q + 2 * kv  /* q, k, v: in, out */
           + q + 2 * kv + head    /* rope: in, with cosines and sines; k and v go to the cache, which counts apart */
           + q                    /* rope: q out */
           + 2 * q                /* attention: in, out */
           + q + hidden           /* o: in, out */
           + hidden + 2 * inter   /* gate and up: in, out */
           + 2 * inter + inter    /* silu: in, out */
           + inter + hidden;      /* down: in, out */
}

/* Bytes of a token's inputs of a layer's linears, rounded to int8: written, and read. */
static uint64_t layer_int8_bytes(const qf_model_config *config)
{
    uint64_t q = (uint64_t)config->num_heads * (uint64_t)config->head_dim;
    return 2 * (2 * (uint64_t)config->hidden_size + q + (uint64_t)config->intermediate_size);
}

void qf_cpu_traffic(const qf_backend *base, int32_t num_tokens, int32_t num_rows, qf_step_traffic *out)
{
    const qf_cpu_backend *self = (const qf_cpu_backend *)base;
    const qf_model_config *config = &self->config;
    bool int8 = self->activation == QF_ACTIVATION_I8;
    uint64_t tokens = (uint64_t)num_tokens, rows = (uint64_t)num_rows, layers = (uint64_t)config->num_layers;
    uint64_t hidden = (uint64_t)config->hidden_size;
    bool shared = self->shard.size > 1;
    uint64_t vocab = (uint64_t)config->vocab_size, all_vocab = (uint64_t)self->shard.vocab_size;
    uint64_t words = layers * layer_words(config) + hidden /* the embedding's result */
                     + (shared ? (2 * layers + 1) * 2 * hidden : 0) /* sums over the ranks: this rank's share of each */
                     + hidden                              /* what the last norm moves beyond the first, without a delta */
                     + (uint64_t)config->head_dim;         /* cosines and sines: out */
    uint64_t row_words = 2 * hidden                        /* gathered */
                         + 2 * hidden                      /* the last norm */
                         + hidden + vocab                  /* the head: in, out */
                         + (shared ? 2 * vocab : 0)        /* to rank 0 */
                         + (self->shard.rank == 0 ? all_vocab : 0); /* the sampler's reading */
    *out = (qf_step_traffic){
        .layers_bytes = self->layers_bytes,
        .head_bytes = (rows + (uint64_t)self->ws.logit_rows - 1) / (uint64_t)self->ws.logit_rows * self->head_bytes,
        .embedding_bytes = tokens * hidden * qf_dtype_size(self->embedding_dtype),
        .activation_bytes = tokens * (4 * words + (int8 ? layers * layer_int8_bytes(config) : 0)),
        .logit_bytes = rows * (4 * row_words + (int8 ? 2 * hidden : 0))};
}
