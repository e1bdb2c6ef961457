/* What a step moves in the GPU's memory, by formula: for the meter.
 *
 * Weights are read once a step, the head's once for every logit_rows rows; a layer that lives on the host comes over the
 * bus, is written to its slot and read from there. A buffer between two kernels is written by one and read by the next,
 * and counts as memory traffic only if it is too large to be found in the L2 cache again: see spills. What attention
 * keeps of split contexts, metadata and samplers' scratch are kilobytes, and left out. */
#include "backend/cuda/cuda_backend.h"

/* Whether a buffer of so many bytes leaves the L2 cache before it is read: weights and the KV cache stream through it
 * at the same time, and what is written stays in one of its halves. */
static bool spills(const qf_cuda_backend *self, uint64_t bytes) { return 2 * bytes > self->l2_bytes; }

/* Written by one kernel, read by another. */
static uint64_t passed_on(const qf_cuda_backend *self, uint64_t bytes)
{
    return spills(self, bytes) ? 2 * bytes : 0;
}

/* The partial sums of a linear. How many there are is asked for only where one of them may not fit. */
static uint64_t partials(const qf_cuda_backend *self, const qf_cuda_linear_layout *linear, int32_t num_tokens)
{
    uint64_t one = (uint64_t)num_tokens * (uint64_t)linear->n * sizeof(float);
    if (!spills(self, one * QF_CUDA_MAX_SPLITS)) {
        return 0;
    }
    int32_t splits = qf_cuda_linear_splits(&self->device, linear->n, linear->k, linear->bits, num_tokens, QF_CUDA_STORE,
                                           self->options.batch_invariant);
    return passed_on(self, one * (uint64_t)splits);
}

/* Of a layer; all layers have the shapes of the first. */
static uint64_t layer_bytes(const qf_cuda_backend *self, int32_t num_tokens)
{
    const qf_model_config *config = &self->config;
    const qf_cuda_layer_layout *layer = &self->layout.layers[0];
    uint64_t tokens = (uint64_t)num_tokens;
    uint64_t residual = tokens * (uint64_t)config->hidden_size * sizeof(float);
    uint64_t x = tokens * (uint64_t)self->hidden_k * sizeof(uint16_t);
    uint64_t q = tokens * (uint64_t)self->q_width * sizeof(uint16_t);
    uint64_t attn = tokens * (uint64_t)self->q_k * sizeof(uint16_t);
    uint64_t act = tokens * (uint64_t)layer->down.k * sizeof(uint16_t);
    uint64_t bytes = (spills(self, residual) ? 2 * 2 * residual : 0) /* both norms read and write it */
                     + 2 * passed_on(self, x)                        /* norm to q, k, v; norm to gate and up */
                     + partials(self, &layer->qkv, num_tokens)       /* to rope */
                     + passed_on(self, q)                            /* rope to attention */
                     + passed_on(self, attn)                         /* attention to o */
                     + partials(self, &layer->o, num_tokens)         /* to the norm */
                     + passed_on(self, act)                          /* gate and up to down */
                     + partials(self, &layer->down, num_tokens);     /* to the next layer's norm */
    if (self->any_perm) { /* inputs in another order: read, written, and read in place of the first */
        bytes += 2 * passed_on(self, x) + passed_on(self, attn) + passed_on(self, act);
    }
    return bytes;
}

/* The same of dtype="float32", whose kernels do one op each. */
static uint64_t layer_bytes_f32(const qf_cuda_backend *self, int32_t num_tokens)
{
    uint64_t tokens = (uint64_t)num_tokens * sizeof(float);
    uint64_t hidden = tokens * (uint64_t)self->config.hidden_size, q = tokens * (uint64_t)self->q_width;
    uint64_t qkv = q + 2 * tokens * (uint64_t)self->kv_width;
    uint64_t inter = tokens * (uint64_t)self->config.intermediate_size;
    return (spills(self, hidden) ? 2 * 2 * hidden : 0) /* the residual, in both norms */
           + 2 * passed_on(self, hidden)               /* norms to linears */
           + passed_on(self, qkv) + passed_on(self, q) /* to rope, to attention */
           + passed_on(self, q)                        /* attention to o */
           + 2 * passed_on(self, hidden)               /* o and down to the norms */
           + passed_on(self, 2 * inter)                /* gate and up to silu */
           + passed_on(self, inter);                   /* silu to down */
}

static uint64_t host_layers_bytes(const qf_cuda_backend *self)
{
    uint64_t bytes = 0;
    for (int32_t i = self->layout.num_layers - self->layout.num_host_layers; i < self->layout.num_layers; i++) {
        bytes += self->layout.layers[i].size_bytes;
    }
    return bytes;
}

void qf_cuda_traffic(const qf_backend *base, int32_t num_tokens, int32_t num_rows, qf_step_traffic *out)
{
    const qf_cuda_backend *self = (const qf_cuda_backend *)base;
    uint64_t tokens = (uint64_t)num_tokens, rows = (uint64_t)num_rows, logit_rows = (uint64_t)self->logit_rows;
    uint64_t hidden = (uint64_t)self->config.hidden_size;
    uint64_t embedding = tokens * hidden * (self->options.float32 ? sizeof(float) : sizeof(uint16_t));
    uint64_t host_layers = host_layers_bytes(self);
    uint64_t layer = self->options.float32 ? layer_bytes_f32(self, num_tokens) : layer_bytes(self, num_tokens);
    uint64_t at_once = rows < logit_rows ? rows : logit_rows;
    bool logits_spill = spills(self, at_once * (uint64_t)self->logits_stride * sizeof(float));
    *out = (qf_step_traffic){
        .layers_bytes = self->layout.layers_bytes + 2 * host_layers,
        .head_bytes = (rows + logit_rows - 1) / logit_rows * self->layout.head_bytes,
        .embedding_bytes = self->layout.embedding_on_host ? 0 : embedding,
        .activation_bytes = (uint64_t)self->config.num_layers * layer,
        .logit_bytes = logits_spill ? 2 * rows * (uint64_t)self->logits_stride * sizeof(float) : 0,
        .host_bytes = host_layers,
        .host_embedding_bytes = self->layout.embedding_on_host ? embedding : 0};
}
