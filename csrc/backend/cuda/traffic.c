/* What a step moves in the GPU's memory, by formula: for the meter.
 *
 * Weights are read once a step, the head's once for every logit_rows rows; a layer that lives on the host comes over the
 * bus, is written to its slot and read from there. Weights and keys and values pass through the L2 cache without
 * displacing what is kept there. A buffer between two kernels is written by one and read by the next; how much of it
 * memory sees follows from what passes through the cache in between: see missed. What attention keeps of split contexts,
 * metadata and samplers' scratch are kilobytes, and left out.
 *
 * Against ncu's dram__bytes_read + dram__bytes_write (H200, 7B, 2026-11-23, benchmarks/gpu_meter.py): decode steps of 1
 * and 16 sequences -0.3 and -0.1 %; for a step of 2,048 tokens see PERF.md. */
#include "backend/cuda/cuda_backend.h"

#define MAX_STAGES 16
/* Tiles of the kernels for many tokens: tokens (192 to 256, by shape) and rows of weights. */
#define TILE_TOKENS 256
#define TILE_ROWS 128

/* A kernel between two others: what it reads of the one before, what it reads that is older, what it writes. */
typedef struct stage {
    uint64_t in, old, out;
} stage;

typedef struct stages {
    stage list[MAX_STAGES];
    int32_t count;
    uint64_t read_again; /* by later waves of a linear's tiles */
} stages;

/* What stays in the cache: each of its two halves keeps what its own SMs touch, so what all touch is there twice, and
 * what streams through takes some room. Chosen so that a step of 2,048 tokens agrees with ncu. */
static uint64_t kept_bytes(const qf_cuda_backend *self) { return self->l2_bytes * 2 / 5; }

/* Of a buffer of so many bytes, what is no longer in the cache when `passed` bytes, the buffer's among them, have come by
 * since: the rest is found in proportion. */
static uint64_t missed(const qf_cuda_backend *self, uint64_t bytes, uint64_t passed)
{
    uint64_t kept = kept_bytes(self);
    return passed <= kept ? 0 : bytes - (uint64_t)((double)bytes * ((double)kept / (double)passed));
}

static void add(stages *self, uint64_t in, uint64_t old, uint64_t out)
{
    self->list[self->count++] = (stage){in, old, out};
}

/* A linear with n outputs: an input that the cache cannot keep is read by every wave of tiles. */
static void add_linear(const qf_cuda_backend *self, stages *all, uint64_t in, uint64_t out, int32_t n,
                       int32_t num_tokens)
{
    int64_t tiles = (int64_t)((num_tokens + TILE_TOKENS - 1) / TILE_TOKENS) * ((n + TILE_ROWS - 1) / TILE_ROWS);
    int64_t waves = (tiles + self->device.sm_count - 1) / self->device.sm_count;
    if (in > kept_bytes(self) && waves > 1) {
        all->read_again += in * (uint64_t)(waves - 1);
    }
    add(all, in, 0, out);
}

/* The stages follow each other in a circle. */
static uint64_t moved(const qf_cuda_backend *self, const stages *all)
{
    uint64_t total = 0, bytes = all->read_again;
    for (int32_t i = 0; i < all->count; i++) {
        total += all->list[i].in + all->list[i].old + all->list[i].out;
    }
    for (int32_t i = 0; i < all->count; i++) {
        const stage *one = &all->list[i], *before = &all->list[i == 0 ? all->count - 1 : i - 1];
        bytes += missed(self, one->in, before->in + before->old + before->out) /* read while it is new */
                 + missed(self, one->old, total / 2)                           /* touched half a layer ago */
                 + missed(self, one->out, total);                              /* written anew a layer later */
    }
    return bytes;
}

/* The partial sums of a linear. How many there are is asked for only where one of them may not fit. */
static uint64_t partials(const qf_cuda_backend *self, const qf_cuda_linear_layout *linear, int32_t num_tokens)
{
    uint64_t one = (uint64_t)num_tokens * (uint64_t)linear->n * sizeof(float);
    if (one * QF_CUDA_MAX_SPLITS <= kept_bytes(self) / 8) {
        return one;
    }
    int32_t splits = qf_cuda_linear_splits(&self->device, linear->n, linear->k, linear->bits, num_tokens, QF_CUDA_STORE,
                                           self->options.batch_invariant);
    return one * (uint64_t)splits;
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
    uint64_t qkv = partials(self, &layer->qkv, num_tokens), o = partials(self, &layer->o, num_tokens);
    uint64_t down = partials(self, &layer->down, num_tokens);
    stages all = {.count = 0};
    add(&all, down, residual, residual + x); /* norm */
    if (self->any_perm) {                    /* an input in another order: read and written once more */
        add(&all, x, 0, x);
    }
    add_linear(self, &all, x, qkv, layer->qkv.n, num_tokens);
    add(&all, qkv, 0, q); /* rope */
    add(&all, q, 0, attn);
    if (self->any_perm) {
        add(&all, attn, 0, attn);
    }
    add_linear(self, &all, attn, o, layer->o.n, num_tokens);
    add(&all, o, residual, residual + x); /* norm */
    if (self->any_perm) {
        add(&all, x, 0, x);
    }
    add_linear(self, &all, x, act, layer->gate_up.n, num_tokens);
    if (self->any_perm) {
        add(&all, act, 0, act);
    }
    add_linear(self, &all, act, down, layer->down.n, num_tokens);
    return moved(self, &all);
}

/* The same of dtype="float32", whose kernels do one op each. */
static uint64_t layer_bytes_f32(const qf_cuda_backend *self, int32_t num_tokens)
{
    uint64_t tokens = (uint64_t)num_tokens * sizeof(float);
    uint64_t hidden = tokens * (uint64_t)self->config.hidden_size, q = tokens * (uint64_t)self->q_width;
    uint64_t qkv = q + 2 * tokens * (uint64_t)self->kv_width;
    uint64_t inter = tokens * (uint64_t)self->config.intermediate_size;
    stages all = {.count = 0};
    add(&all, hidden, hidden, 2 * hidden); /* norm: the sum so far, and its input */
    add(&all, hidden, 0, qkv);
    add(&all, qkv, 0, q); /* rope */
    add(&all, q, 0, q);   /* attention */
    add(&all, q, 0, hidden);
    add(&all, hidden, hidden, 2 * hidden);
    add(&all, hidden, 0, 2 * inter);
    add(&all, 2 * inter, 0, inter); /* silu */
    add(&all, inter, 0, hidden);
    return moved(self, &all);
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
    uint64_t logits = at_once * (uint64_t)self->logits_stride * sizeof(float);
    *out = (qf_step_traffic){
        .layers_bytes = self->layout.layers_bytes + 2 * host_layers,
        .head_bytes = (rows + logit_rows - 1) / logit_rows * self->layout.head_bytes,
        .embedding_bytes = self->layout.embedding_on_host ? 0 : embedding,
        .activation_bytes = (uint64_t)self->config.num_layers * layer,
        .logit_bytes = at_once == 0 ? 0 : 2 * missed(self, logits, logits) * rows / at_once,
        .host_bytes = host_layers,
        .host_embedding_bytes = self->layout.embedding_on_host ? embedding : 0};
}
