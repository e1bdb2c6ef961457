/* The CPU backend's state. */
#ifndef QF_BACKEND_CPU_CPU_BACKEND_H
#define QF_BACKEND_CPU_CPU_BACKEND_H

#include "backend/backend.h"
#include "backend/cpu/cpu.h"
#include "model/parallel.h"

typedef struct qf_cpu_layer {
    float *input_norm;          /* (hidden_size) */
    float *post_attention_norm; /* (hidden_size) */
    qf_cpu_linear *linears[QF_LINEARS_PER_LAYER];
    qf_kv_cache cache;
    qf_kv_cache window;         /* the newest positions in 16 bits, over a low-bit cache; k NULL: none */
    qf_key_bias key_bias;       /* of k_proj, which has none itself where the cache is a low-bit one */
    int32_t sliding_window;     /* 0: none */
} qf_cpu_layer;

/* Activations of one step. Rows are tokens; everything float32. */
typedef struct qf_cpu_workspace {
    float *hidden;  /* (max_num_batched_tokens, hidden_size) the residual stream */
    float *normed;  /* (max_num_batched_tokens, hidden_size) */
    float *delta;   /* (max_num_batched_tokens, hidden_size) a block's output, added by the next norm */
    float *q;       /* (max_num_batched_tokens, num_heads * head_dim) */
    float *k, *v;   /* (max_num_batched_tokens, num_kv_heads * head_dim) */
    float *attn;    /* (max_num_batched_tokens, num_heads * head_dim) */
    float *gate;    /* (mlp_rows, intermediate_size) */
    float *up;      /* (mlp_rows, intermediate_size) */
    float *cos_sin; /* (max_num_batched_tokens, head_dim) */
    float *rows;    /* (logit_rows, hidden_size) */
    float *logits;  /* (logit_rows, vocab_size) of this rank */
    float *all_logits; /* (logit_rows, shard.vocab_size) rank 0: of all ranks; of one rank alone, logits */
    int32_t mlp_rows, logit_rows;
} qf_cpu_workspace;

typedef struct qf_cpu_backend {
    qf_backend base;
    qf_model_config config; /* a rank's: of its part */
    qf_shard shard;
    qf_backend_options options;
    qf_thread_pool *pool;
    qf_cpu_context *ctx;
    qf_activation activation;
    void *embedding; /* (vocab_size, hidden_size) embedding_dtype */
    qf_dtype embedding_dtype;
    size_t embedding_bytes;
    qf_cpu_layer *layers; /* (num_layers) */
    float *final_norm;    /* (hidden_size) */
    float *norms;         /* storage of all the norms: ((2 * num_layers + 1) * hidden_size) */
    qf_cpu_linear *lm_head;
    size_t layers_bytes, head_bytes; /* as planned */
    void *kv;             /* every layer's K, then V */
    void *window;         /* the same of the 16-bit window; NULL: none */
    float *bias;          /* the turns of key biases, and those; NULL: no low-bit cache */
    size_t kv_bytes, window_bytes, bias_bytes;
    qf_cpu_workspace ws;
    void *workspace;      /* storage of ws */
    size_t workspace_bytes;
    float *inv_freq;      /* (head_dim / 2) */
    int32_t *last_token;  /* (max_num_seqs) the token last sampled in each slot */
    int32_t *token_ids;   /* (max_num_batched_tokens) with placeholders resolved */
    int32_t *sampled;     /* (logit_rows) tokens on their way from rank 0 to the others */
    qf_sampler **samplers; /* (num_samplers) one per worker; rank 0 alone samples */
    int32_t num_samplers;
    uint64_t step_ns[2];  /* times of uncollected steps */
    int32_t num_uncollected;
    char description[160];
} qf_cpu_backend;

/* Every layer in [first, last), then nothing else: hidden (num_tokens, hidden_size) in and out. Fails only where other
 * ranks do. */
qf_status qf_cpu_forward_layers(qf_cpu_backend *self, int32_t first, int32_t last, const qf_batch *batch, float *hidden,
                                qf_tap_fn tap, void *tap_arg, qf_error *err);
/* A whole step: embedding, layers, final norm, logits, sampling. */
qf_status qf_cpu_forward(qf_cpu_backend *self, const qf_batch *batch, qf_error *err);

/* kv_store.c */
bool qf_cpu_layer_is_low_bit(const qf_backend_options *options, int32_t layer);
/* Adds what the cache takes to a plan that has none of it yet. */
void qf_cpu_plan_kv(const qf_model_config *config, const qf_backend_options *options, qf_memory_plan *plan);
/* Once layers and rope frequencies are there. */
qf_status qf_cpu_alloc_kv(qf_cpu_backend *self, const qf_checkpoint *checkpoint, const qf_memory_plan *plan,
                          int32_t num_blocks, qf_error *err);
void qf_cpu_free_kv(qf_cpu_backend *self);

/* traffic.c */
void qf_cpu_traffic(const qf_backend *base, int32_t num_tokens, int32_t num_rows, qf_step_traffic *out);

/* Lays the workspace out; with `storage` NULL only the size is computed. */
size_t qf_cpu_workspace_layout(const qf_model_config *config, const qf_shard *shard,
                               const qf_backend_options *options, void *storage, qf_cpu_workspace *ws);

#endif
