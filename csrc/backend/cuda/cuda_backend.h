/* The CUDA backend's state. */
#ifndef QF_BACKEND_CUDA_CUDA_BACKEND_H
#define QF_BACKEND_CUDA_CUDA_BACKEND_H

#include "backend/backend.h"
#include "backend/cuda/comm.h"
#include "backend/cuda/weights.h"
#include "base/threads.h"
#include "model/parallel.h"
#include "qf_attention.h"
#include "qf_decode.h"

#define QF_CUDA_STEPS_IN_FLIGHT 2
#define QF_CUDA_MAX_GRAPHS 64 /* more than the ladder has sizes, greedy and not */
#define QF_CUDA_MAX_TOP_LOGPROBS 64
/* A sequence of more positions decodes through the chain of kernels, whose attention has the better merge: 3 % faster at
 * 131,072 (7B, H200). The border is where the two were estimated to be equal; it was not measured. */
#define QF_CUDA_ONE_KERNEL_POSITIONS 32768

#define QF_CUDA_CHECK(call)                                                                                        \
    do {                                                                                                           \
        cudaError_t cuda_status_ = (call);                                                                         \
        if (cuda_status_ != cudaSuccess) {                                                                         \
            (void)cudaGetLastError();                                                                              \
            return QF_FAIL(err,                                                                                    \
                           cuda_status_ == cudaErrorMemoryAllocation ? QF_ERROR_OUT_OF_MEMORY : QF_ERROR_BACKEND,  \
                           "%s: %s", #call, cudaGetErrorString(cuda_status_));                                     \
        }                                                                                                          \
    } while (0)

/* Device memory of one step. Tokens: max_num_batched_tokens. */
typedef struct qf_cuda_workspace {
    float *residual;      /* (tokens, hidden_size) */
    float *qkv;           /* (splits, tokens, qkv.n) */
    void *q;              /* (tokens, num_heads, head_dim) bf16; float32 in the reference */
    float *delta;         /* (splits, tokens, n of o or down) */
    uint16_t *x;          /* tiled (hidden, tokens) */
    float *squares;       /* (QF_CUDA_NORM_TOKENS, hidden / 16): norms that the linears make; NULL: none, as exchange */
    float *exchange;      /* (QF_CUDA_MAX_SPLITS - 1, QF_CUDA_NORM_TOKENS, hidden), zero between kernels */
    uint16_t *attn;       /* tiled (num_heads * head_dim, tokens) */
    uint16_t *act;        /* tiled (intermediate, tokens) */
    uint16_t *permuted;   /* tiled, for act-order linears; NULL if there are none */
    float *normed, *attn_f32, *gate_up_f32; /* the float32 reference's */
    float *cos_sin;       /* (tokens, head_dim) */
    float *logits;        /* (logit_rows, logits_stride), this rank's */
    float *all_logits;    /* (logit_rows, all_logits_stride) of all ranks: rank 0's; the same as logits if it is alone */
    uint16_t *logit_x;    /* tiled (hidden, logit_rows) */
    float *logit_x_f32;   /* (logit_rows, hidden_size) */
    float *inv_freq;      /* (head_dim / 2) */
    /* Of low-bit layers (qf_cuda_kv_bias_tables_args); NULL without any. */
    float *bias_coarse;    /* (qf_cuda_kv_bias_tiles, head_dim) */
    uint16_t *bias_fine;   /* (QF_CUDA_BIAS_TILE, head_dim) */
    float *bias_rotation;  /* the same */
    int32_t *last_token;  /* (max_num_seqs) */
    uint16_t *counts;     /* (max_num_seqs, vocab_size) rank 0's alone, as all that samples */
    qf_cuda_token_count *count_list; /* (vocab_size) */
    int32_t *token_ids;   /* (tokens) sampled, by logit task */
    qf_cuda_logprob *logprobs; /* (logprob_capacity) */
    char *meta;           /* the step's metadata: see step.c */
    char *staging[2];     /* as the host sends it: steps take turns */
    qf_cuda_step_state *step_state; /* (1) */
    void *attention, *sample, *decode; /* kernels' own */
    void *slots[2];       /* of host layers' blobs */
    qf_cuda_decode_layer *decode_layers; /* (num_layers) */
    char *zero_begin, *zero_end;         /* the part that is zeroed once: staging, last_token, counts, kernels' own */
} qf_cuda_workspace;

/* Where a step's metadata lies in its buffer. On the device the lists of items have room for max_items; the host's are
 * as long as they are, once the step is built. */
typedef struct qf_cuda_meta {
    int32_t num_tokens, num_seqs, num_rows; /* capacities of this layout: padded in a graph */
    int32_t *token_ids, *positions, *slot_mapping; /* (num_tokens) */
    int32_t *window_slot_mapping; /* (num_tokens), or (0) without a 16-bit window */
    int32_t *query_start_loc; /* (num_seqs + 1) */
    int32_t *seq_lens, *block_table_start; /* (num_seqs) */
    int32_t *window_table_start, *window_first; /* (num_seqs) or (0): as qf_cuda_attention_args has them */
    int32_t *num_items;       /* (6): decode, prefill; the same of sliding layers; window items of both */
    qf_cuda_attention_item *window_items[2]; /* (num_seqs) each, or (0) without a 16-bit window: of full and sliding layers */
    int32_t *logit_rows;      /* (num_rows) */
    qf_cuda_sample_row *sample_rows; /* (num_rows) */
    qf_cuda_attention_item *items, *sliding_items;
    int32_t max_items;        /* of each of the two */
    qf_cuda_step_header *header;
    int32_t *words;           /* the whole buffer: tables, bitmasks and biases have indices from the device's */
    size_t fixed_bytes;       /* of what is there in every step: all before items */
    size_t items_bytes, sliding_bytes; /* the room of the two lists */
} qf_cuda_meta;

/* One task's result, for collect(). */
typedef struct qf_cuda_result {
    qf_sample_state *state;
    int32_t *token_id;
    int32_t slot;
    bool sampled_on_host; /* the state has it already */
    qf_logprob *logprobs, *target_logprobs;
    int32_t num_logprobs, num_target_logprobs; /* entries */
    int32_t logprobs_offset, target_logprobs_offset;
} qf_cuda_result;

typedef struct qf_cuda_step {
    char *meta;                 /* pinned (meta_bytes) */
    int32_t *token_ids;         /* pinned (tokens) */
    qf_cuda_logprob *logprobs;  /* pinned (logprob_capacity) */
    qf_cuda_step_result *result; /* pinned (1): its number tells that the device is done */
    qf_cuda_result *results;    /* (tokens) */
    int32_t num_results, num_logprobs;
    cudaEvent_t sent;           /* the metadata is on the device */
} qf_cuda_step;

/* What a slot's device state belongs to. */
typedef struct qf_cuda_slot {
    const qf_sample_state *state;
    int32_t next_position; /* of the next token drawn: those in flight are counted */
    int32_t num_in_flight; /* tokens drawn on the device that the state does not have yet */
} qf_cuda_slot;

typedef struct qf_cuda_graph {
    int32_t num_seqs; /* padded; 0: not captured */
    bool greedy, one_kernel;
    cudaGraphExec_t exec;
} qf_cuda_graph;

/* NVML's energy counter of the device. */
typedef struct qf_cuda_energy {
    void *library; /* NULL: not open */
    void *device;
    int (*shutdown)(void);
    int (*total)(void *, unsigned long long *); /* millijoules */
    char reason[160]; /* why it is not open; "": not tried */
} qf_cuda_energy;

/* A rank of several. The first three belong to the step that is being enqueued. */
typedef struct qf_cuda_rank {
    uint32_t calls;                  /* all-reduces so far */
    qf_cuda_all_reduce_form form;
    bool fresh;                      /* the residual is this rank's share of the embedding */
    qf_comm *comm;                   /* NULL: alone */
    const qf_cuda_peers *peers;      /* NULL: alone, or through comm's vtable */
    float *root_logits;              /* rank 0's all_logits */
    qf_cuda_decode_rank decode[QF_CUDA_MAX_RANKS]; /* how each rank's decode kernel cuts its work */
} qf_cuda_rank;

typedef struct qf_cuda_backend {
    qf_backend base;
    qf_model_config config; /* of this rank's part of the model, as the checkpoint */
    qf_shard shard;
    qf_cuda_rank rank;
    int32_t vocab_size, all_logits_stride; /* of all ranks */
    qf_backend_options options;
    qf_cuda_device device;
    qf_cuda_weights_layout layout;
    qf_cuda_weights weights;
    int32_t logit_rows, logits_stride, q_width, kv_width, hidden_k, q_k;
    size_t meta_bytes;
    int32_t logprob_capacity;
    bool any_perm, any_sliding, any_low_bit; /* layers */
    int32_t kv_window; /* with low-bit layers: the positions that are read in 16 bits; 0: none */

    char *arena;      /* weights, workspace, KV cache */
    size_t arena_bytes;
    char *host_arena; /* pinned: offloaded weights */
    void *pinned;     /* staging of steps */
    char *scratch;    /* only while loading, and only if the rest of the arena is too small for it */
    char *kv;
    qf_cuda_kv *caches; /* (num_layers) where each one's keys and values are; without k_bias, which is a weight */
    qf_cuda_kv *windows; /* (num_layers) the same of the 16-bit window; of 16-bit layers without memory */
    qf_cuda_workspace ws;
    qf_cuda_step_io io;
    cudaStream_t stream, copy_stream, meta_stream; /* all work, host layers, steps' metadata */
    cudaEvent_t slot_ready[2], slot_free[2];
    qf_cuda_step steps[QF_CUDA_STEPS_IN_FLIGHT];
    uint64_t num_submitted, num_collected;
    qf_cuda_slot *slots; /* (max_num_seqs) */
    qf_sampler *sampler; /* host, for rows that only the host can sample */
    qf_cuda_token_count *count_list; /* host (vocab_size) */
    float *host_logits;  /* (vocab_size) */
    float *tap_rows;     /* pinned: what a tap sees, (max_num_batched_tokens, the widest input); NULL before the first */
    qf_cuda_graph graphs[QF_CUDA_MAX_GRAPHS];
    qf_cuda_decode_layer *decode_layers; /* (num_layers), as ws.decode_layers */
    bool decode_kernel;  /* a sequence alone decodes in one kernel, on every rank */
    uint64_t l2_bytes;
    uint64_t last_end_ns; /* of the step collected last, by the device's clock */
    qf_cuda_energy energy;
    char description[256];
} qf_cuda_backend;

/* create.c: see the functions of the same names in backend.h */
qf_status qf_cuda_plan_memory(const qf_checkpoint *checkpoint, const qf_backend_options *options, qf_memory_plan *out,
                              qf_error *err);
qf_status qf_cuda_device_memory(const qf_backend_options *options, qf_device_memory *out, qf_error *err);
qf_status qf_cuda_create(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t num_blocks,
                         qf_progress_fn progress, void *progress_arg, qf_backend **out, qf_error *err);
void qf_cuda_destroy(qf_backend *base);

/* memory.c: lays the workspace out; with `storage` NULL only the size is computed. */
qf_status qf_cuda_workspace_layout(qf_cuda_backend *self, char *storage, size_t *bytes, qf_error *err);
/* Of all layers, or of those with a sliding window. */
qf_cuda_attention_shape qf_cuda_backend_attention_shape(const qf_cuda_backend *self, bool sliding);
/* The fields that depend on options and layout alone. */
void qf_cuda_backend_shape(qf_cuda_backend *self);

/* kv.c: the cache. Bytes of a block of a layer's K, and of its V. */
size_t qf_cuda_layer_block_bytes(const qf_cuda_backend *self, int32_t layer);
/* The options that the cache's formats must suit. */
qf_status qf_cuda_kv_check(const qf_cuda_backend *self, qf_error *err);
/* Blocks of the 16-bit window, and the bytes of all of them. */
int32_t qf_cuda_kv_window_blocks(const qf_cuda_backend *self);
size_t qf_cuda_kv_window_bytes(const qf_cuda_backend *self);
/* Lays out num_blocks blocks of each layer from `storage` on, in self->caches; then the window's, in self->windows. */
qf_status qf_cuda_kv_layout(qf_cuda_backend *self, char *storage, int32_t num_blocks, qf_error *err);
/* Tiles of QF_CUDA_BIAS_TILE positions that a sequence has. */
int32_t qf_cuda_kv_bias_tiles(const qf_cuda_backend *self);
/* The kernels' name of a format. */
qf_cuda_kv_format qf_cuda_kernel_kv_format(qf_kv_format format);
/* Fills the tables of keys' biases in the workspace. */
qf_status qf_cuda_kv_tables(qf_cuda_backend *self, qf_error *err);
/* "", or what the device's description says of a low-bit cache. */
void qf_cuda_kv_describe(const qf_cuda_backend *self, char *out, size_t out_bytes);

/* step.c */
size_t qf_cuda_meta_capacity(const qf_cuda_backend *self);
/* Lays metadata out in `buffer` for these capacities. */
void qf_cuda_meta_layout(const qf_cuda_backend *self, char *buffer, int32_t num_tokens, int32_t num_seqs,
                         int32_t num_rows, int32_t max_items, qf_cuda_meta *out);
int32_t qf_cuda_step_max_items(const qf_cuda_backend *self, const qf_batch *batch, int32_t padded_seqs);
typedef struct qf_cuda_plan {
    qf_cuda_attention_plan full, sliding;
    size_t meta_bytes;  /* to send */
    bool all_greedy;
    bool one_kernel; /* a sequence alone that the decode kernel takes */
} qf_cuda_plan;
/* Fills the step's metadata (padded to meta's capacities) and results. Host rows get slot -1 in their sample row. */
qf_status qf_cuda_step_build(qf_cuda_backend *self, qf_cuda_step *step, const qf_batch *batch, const qf_cuda_meta *host,
                             qf_cuda_plan *plan, qf_error *err);
/* True if only the host can sample this row: bad words, or more biases than a step's metadata has room for. */
bool qf_cuda_host_row(const qf_logit_task *task);

/* forward.c */
typedef struct qf_cuda_forward {
    const qf_cuda_meta *meta;   /* device pointers */
    qf_cuda_plan plan;          /* counts; in a graph, bounds */
    bool captured;              /* the counts are bounds: the device reads the true ones */
} qf_cuda_forward;
/* Metadata to its place, cosines and sines; and the tokens' embeddings, unless the residual comes from elsewhere. */
qf_status qf_cuda_begin(qf_cuda_backend *self, const qf_cuda_forward *f, bool embed, qf_error *err);
/* Layers over ws.residual. *delta_splits: how many parts of ws.delta are still to be added to the residual. */
qf_status qf_cuda_layers(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t last, qf_tap_fn tap,
                         void *tap_arg, int32_t *delta_splits, qf_error *err);
/* Final norm and head of rows first .. first + count - 1 of meta's logit rows, into ws.logits. */
qf_status qf_cuda_logits(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t count,
                         int32_t delta_splits, qf_error *err);
qf_status qf_cuda_flush_delta(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t delta_splits, qf_error *err);
/* publish: these are all of the step's rows, and nothing else comes: the results go out too. */
qf_status qf_cuda_sample_rows(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t count,
                              bool publish, qf_error *err);
/* The whole of a decode step, metadata to results: what is captured. */
qf_status qf_cuda_decode_forward(qf_cuda_backend *self, const qf_cuda_forward *f, qf_error *err);
/* All but the step's own pointers. */
void qf_cuda_decode_fill(const qf_cuda_backend *self, int32_t num_seqs, qf_cuda_decode_args *out);
/* attention.c: of a layer, from ws.qkv, partial sums of num_splits, to ws.attn. */
qf_status qf_cuda_attention_forward(qf_cuda_backend *self, const qf_cuda_forward *f, const qf_cuda_layer *weights,
                                    int32_t layer, int32_t num_splits, qf_error *err);
/* ranks.c: the collectives of a step; what the single kernel would do where there is one rank.
 * qf_cuda_rmsnorm, of the sum over ranks: of deltas (of one split if NCCL adds them up), or of a fresh residual. */
qf_status qf_cuda_reduce_norm(qf_cuda_backend *self, const qf_cuda_rmsnorm_args *args, qf_error *err);
/* The same for rows that a list chooses out of a sum that an earlier call of the step may have taken. */
qf_status qf_cuda_reduce_norm_rows(qf_cuda_backend *self, const qf_cuda_rmsnorm_args *args, bool first, qf_error *err);
/* ws.logits of all ranks to rank 0's ws.all_logits. */
qf_status qf_cuda_gather_logits(qf_cuda_backend *self, int32_t count, qf_error *err);
/* Rank 0's token ids of these rows to all: the next step may begin with them. */
qf_status qf_cuda_share_sampled(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t count,
                                qf_error *err);
static inline bool qf_cuda_samples(const qf_cuda_backend *self) { return self->shard.rank == 0; }

/* reference.c: the same in float32, one plain kernel per op */
qf_status qf_cuda_reference_layers(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t last,
                                   qf_tap_fn tap, void *tap_arg, qf_error *err);
qf_status qf_cuda_reference_logits(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t count,
                                   qf_error *err);

/* tap.c: device rows to the host, to the tap */
qf_status qf_cuda_tap(qf_cuda_backend *self, qf_tap_fn tap, void *tap_arg, int32_t layer, qf_linear_id first,
                      int32_t num_ids, const void *x, bool tiled, int32_t width, int32_t k, int32_t num_tokens,
                      qf_error *err);

/* nvml.c: bytes of device memory that this process holds; 0 where NVML is missing or cannot tell */
uint64_t qf_cuda_process_bytes(int32_t ordinal);
/* See energy in backend.h. Opens NVML at the first call and leaves it open until deinit. */
bool qf_cuda_energy_read(qf_backend *base, uint64_t *energy_uj, char *note, size_t note_bytes);
void qf_cuda_energy_deinit(qf_cuda_energy *self);

/* traffic.c */
void qf_cuda_traffic(const qf_backend *base, int32_t num_tokens, int32_t num_rows, qf_step_traffic *out);

/* graph.c */
/* The padded batch size that serves num_seqs; 0: none does. */
int32_t qf_cuda_graph_size(const qf_cuda_backend *self, int32_t num_seqs);
/* plan: of a step of so many sequences, padding included. */
qf_status qf_cuda_graph_get(qf_cuda_backend *self, int32_t num_seqs, const qf_cuda_plan *plan, cudaGraphExec_t *out,
                            qf_error *err);
void qf_cuda_graphs_destroy(qf_cuda_backend *self);

#endif
