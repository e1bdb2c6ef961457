/* The narrow waist between the engine and a device. At most twelve functions. */
#ifndef QF_BACKEND_BACKEND_H
#define QF_BACKEND_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "comm/comm.h"
#include "kv/format.h"
#include "model/checkpoint.h"
#include "sample/sampler.h"

/* How the ranks of a model over several devices reach each other. */
typedef enum qf_rank_comm { QF_RANK_COMM_AUTO = 0, QF_RANK_COMM_PEER, QF_RANK_COMM_NCCL } qf_rank_comm;

typedef enum qf_head_bits { QF_HEAD_AUTO = 0, QF_HEAD_4 = 4, QF_HEAD_8 = 8, QF_HEAD_16 = 16 } qf_head_bits;

/* Checked by the engine; the backend may refuse with QF_ERROR_NOT_IMPLEMENTED. */
typedef struct qf_backend_options {
    bool float32;             /* dtype: float32 (else bfloat16): also the dtype of the KV cache */
    bool int8_activations;    /* for 4- and 8-bit weights; false: float activations */
    int32_t quantize_bits;    /* 0: weights as stored; 4: quantise 16-bit weights while loading */
    int32_t quantize_group_size;
    int32_t head_bits;        /* 4, 8 or 16 (16: as the checkpoint has it) */
    int32_t block_size;
    qf_kv_format kv_format;      /* of the KV cache; QF_KV_AUTO: as float32 says */
    const uint8_t *kv_16bit_layers; /* (num_layers) 1: this layer's cache has 16 bits all the same; NULL: none */
    int32_t kv_window_tokens;    /* with a low-bit cache: the newest positions that a query reads in 16 bits; 0: none */
    int32_t max_num_seqs, max_num_batched_tokens, max_model_len;
    int32_t num_threads;
    const char *isa;          /* NULL: the best */
    /* Of devices with memory of their own: */
    int32_t device_ordinal;
    bool offload_embedding;      /* the embedding stays in pinned host memory */
    size_t offload_layers_bytes; /* at least this much of the layers' weights (whole layers, the last ones) too */
    bool batch_invariant;        /* one order of sums for every batch (the CPU's always is) */
    bool enforce_eager;          /* no captured graphs */
    /* Of a model over several devices (backend/parallel.h); the checkpoint that a rank is given is its part: */
    int32_t tensor_parallel_size; /* ranks; 0 and 1: one device */
    qf_comm *comm;                /* this rank's, borrowed; NULL: it is alone */
    const struct qf_backend_vtable *rank_backend; /* for the backend that runs the ranks: what each one is */
    qf_rank_comm rank_comm;       /* for create_comms, of devices */
    const char *nccl_library;     /* the same: NULL, or where to look for NCCL at last; of the caller of create */
    int32_t step_timeout_ms;      /* for the backend that runs the ranks: one that takes longer has failed; 0: no limit */
} qf_backend_options;

/* Bytes, exact, known before anything is allocated. */
typedef struct qf_memory_plan {
    size_t embedding_bytes, layers_bytes, head_bytes;
    size_t workspace_bytes; /* activations and the scratch of kernels */
    size_t kv_block_bytes; /* one block, all layers, K and V, with scales */
    size_t kv_window_bytes; /* all window blocks (num_window_blocks of them) */
    int32_t num_window_blocks;
    size_t host_bytes;     /* of a device backend: pinned host memory, weights and staging */
    size_t all_kv_block_bytes; /* of several devices: one block over all of them (the rest is of one); 0: of one */
} qf_memory_plan;

/* The memory of a device. */
typedef struct qf_device_memory {
    uint64_t available_bytes; /* that a new engine may use */
    uint64_t total_bytes;
    uint64_t overhead_bytes;  /* what this process holds there already: context and modules; 0: not known */
} qf_device_memory;

/* One row whose logits are needed. */
typedef struct qf_logit_task {
    int32_t row;               /* index into the step's tokens */
    qf_sample_state *state;    /* sample the next token from it, or NULL */
    const uint32_t *bitmask;   /* for sampling, or NULL */
    int32_t slot;              /* where the sampled token is kept for the next step */
    int32_t target_token_id;   /* prompt logprobs: the token that follows, or -1 */
    int32_t num_target_logprobs;
    float *logits_out;         /* (vocab_size) copy of the raw logits, or NULL */
    qf_logprob *logprobs;      /* (1 + num_logprobs), for the sampled token; NULL: none */
    qf_logprob *target_logprobs; /* (1 + num_target_logprobs) or NULL */
    int32_t *token_id;         /* the sampled token, -1 if the logits were not finite; NULL: none */
} qf_logit_task;

/* One step over a flattened batch. Pointers are valid until the step has been collected. */
typedef struct qf_batch {
    int32_t num_tokens, num_seqs, num_logit_tasks;
    const int32_t *token_ids;       /* (num_tokens); -1 - slot: the token last sampled in that slot */
    const int32_t *positions;       /* (num_tokens) */
    const int32_t *slot_mapping;    /* (num_tokens) block * block_size + offset */
    const int32_t *query_start_loc; /* (num_seqs + 1) */
    const int32_t *seq_lens;        /* (num_seqs) */
    const int32_t *block_tables;    /* (num_seqs, block_table_stride) */
    int32_t block_table_stride;
    /* The 16-bit window's blocks (kv_window_tokens > 0; else NULL). Entry i of a sequence's row holds the positions of
     * block window_first_block[seq] + i of the sequence; those from the first one that a query of this step sees are
     * there. */
    const int32_t *window_slot_mapping; /* (num_tokens) window block * block_size + offset */
    const int32_t *window_block_tables; /* (num_seqs, window_table_stride) */
    const int32_t *window_first_block;  /* (num_seqs) */
    int32_t window_table_stride;
    const qf_logit_task *logit_tasks; /* in order of row */
} qf_batch;

/* Bytes that a step moves besides the KV cache, by formula from the layout. */
typedef struct qf_step_traffic {
    uint64_t layers_bytes;     /* weights of the layers, as often as the kernels read them from the device's memory */
    uint64_t head_bytes;       /* the head's; 0 without logit rows */
    uint64_t embedding_bytes;  /* rows of the embedding, from the device's memory */
    uint64_t activation_bytes; /* written and read between kernels, of all tokens */
    uint64_t logit_bytes;      /* the same of the logit rows: the head's input and output */
    uint64_t host_bytes;       /* read from host memory for all tokens: offloaded layers */
    uint64_t host_embedding_bytes; /* rows of an offloaded embedding */
} qf_step_traffic;

/* Sees the float32 input of each linear: x (num_tokens, k). For calibration. */
typedef void (*qf_tap_fn)(void *arg, int32_t layer, qf_linear_id id, const float *x, int32_t num_tokens, int32_t k);

/* Called while weights load: done and total in bytes. From one thread at a time. false stops the load. */
typedef bool (*qf_progress_fn)(void *arg, size_t done_bytes, size_t total_bytes);

typedef struct qf_backend qf_backend;

typedef struct qf_backend_vtable {
    const char *name; /* "cpu", "cuda", "fake" */
    bool has_own_memory; /* a device: 16-bit activations, and steps worth overlapping with the host's turn */
    /* Of a device; NULL: the machine's memory is meant. */
    qf_status (*device_memory)(const qf_backend_options *options, qf_device_memory *out, qf_error *err);
    /* Exact memory, nothing allocated. */
    qf_status (*plan_memory)(const qf_checkpoint *checkpoint, const qf_backend_options *options, qf_memory_plan *out,
                             qf_error *err);
    /* Loads and packs the weights, allocates workspace and num_blocks KV blocks. The checkpoint may be closed after. */
    qf_status (*create)(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t num_blocks,
                        qf_progress_fn progress, void *progress_arg, qf_backend **out, qf_error *err);
    void (*destroy)(qf_backend *self); /* NULL-safe; waits for steps in flight */
    /* Starts a step; returns without waiting where the device allows. At most max_steps_in_flight are uncollected. */
    qf_status (*submit)(qf_backend *self, const qf_batch *batch, qf_error *err);
    /* Waits for the oldest step; its results stand behind the tasks' pointers. device_time_ns may be NULL. */
    qf_status (*collect)(qf_backend *self, uint64_t *device_time_ns, qf_error *err);
    /* Layers first .. last - 1 over a batch: hidden (num_tokens, hidden_size) float32 in and out. No step in flight. */
    qf_status (*forward_layers)(qf_backend *self, int32_t first, int32_t last, const qf_batch *batch, float *hidden,
                                qf_tap_fn tap, void *tap_arg, qf_error *err);
    /* One line: processor or device, instruction set, threads. */
    const char *(*describe)(const qf_backend *self);
    /* Of a step of so many tokens (>= 1) and logit rows. Called once a step. NULL: the plan's weights, once. */
    void (*traffic)(const qf_backend *self, int32_t num_tokens, int32_t num_rows, qf_step_traffic *out);
    /* Microjoules that the device took since some moment, by its own counter; false: not measured, and `note` says why.
     * Else `note` says what the figure covers. From any thread, one at a time. NULL: the device is the CPU. */
    bool (*energy)(qf_backend *self, uint64_t *energy_uj, char *note, size_t note_bytes);
    /* The communicator of `size` such backends, one handle each: out (size). NULL: threads over host memory. */
    qf_status (*create_comms)(const qf_backend_options *options, int32_t size, qf_comm **out, qf_error *err);
} qf_backend_vtable;

struct qf_backend {
    const qf_backend_vtable *vtable;
    const char *isa; /* the instruction set in use, a string literal; NULL: the backend has none to choose */
    int32_t num_widened; /* linears of a rank that are not held in 4 or 8 bits only because its columns cut their groups, or
                            their order of columns */
    bool left_behind; /* after collect failed: a thread hangs in a step for good, and may wake up and read its batch yet */
};

const qf_backend_vtable *qf_cpu_backend_vtable(void);

#endif
