/* The launchers of one decode step in one launch: a persistent kernel for one sequence of one new token, residual (already
 * embedded) to logits. As all launchers (qf_kernels.h) they are asynchronous, allocate nothing and may be captured.
 *
 * On the ranks of several GPUs each launches its own, all of them the same steps in the same order: the ranks' kernels run
 * at the same time and add o's and down's sums up over the ranks, in their order, through the peers' regions
 * (qf_all_reduce.h). So all ranks have the same bits of the residual; logits are this rank's. Heads, intermediate features
 * and the head's rows are its part of the model; they may differ from rank to rank. Waits end as those of all-reduces. */
#ifndef QF_DECODE_H
#define QF_DECODE_H

#include "qf_all_reduce.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qf_cuda_decode_layer {
    qf_cuda_weight qkv, o, gate_up, down;
    const float *input_norm, *post_attention_norm; /* (hidden_size) */
    void *k, *v;
    int32_t sliding_window;
} qf_cuda_decode_layer;

/* How a rank cuts o or down: what others need to find its sums. */
typedef struct qf_cuda_decode_cut {
    int32_t kb, splits, parts, max_pieces; /* kernels/decode_plan.cuh */
} qf_cuda_decode_cut;

typedef struct qf_cuda_decode_rank {
    bool supported; /* the rank's own shapes, formats and device */
    int32_t num_layers, hidden_size;
    qf_cuda_decode_cut o, down;
} qf_cuda_decode_rank;

/* num_seqs is 1; layers are of 4 bits and groups of 128, the head of 4, 8 (groups of 128) or 16 bits. o's and down's k may
 * be padded to the next 128. */
typedef struct qf_cuda_decode_args {
    const qf_cuda_decode_layer *layers; /* device: (num_layers) */
    const qf_cuda_decode_layer *host_layers; /* the same on the host, for planning */
    int32_t num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, block_size;
    float eps, scale;
    qf_cuda_weight head;
    const float *final_norm;
    float *residual;                  /* (num_seqs, hidden_size); the same on all ranks */
    float *logits;                    /* (num_seqs, head.n) */
    const float *cos_sin;             /* (num_seqs, head_dim) */
    const int32_t *slot_mapping, *seq_lens; /* (num_seqs) */
    const int32_t *block_tables, *block_table_start;
    int32_t num_seqs;
    void *workspace;
    const qf_cuda_peers *peers;       /* host; NULL: one GPU */
    const qf_cuda_decode_rank *ranks; /* host: (num_ranks) as each rank describes itself; NULL without peers */
} qf_cuda_decode_args;

/* True if this shape and these formats are supported on this device. With peers it is asked when all ranks have described
 * themselves, and the kernel is used only if all ranks hear yes. Host. */
bool qf_cuda_decode_supported(const qf_cuda_decode_args *args, const qf_cuda_device *device);
/* Of this rank; peers and ranks are not looked at. Host. */
void qf_cuda_decode_describe(const qf_cuda_decode_args *args, const qf_cuda_device *device, qf_cuda_decode_rank *out);
/* Enough with peers and without. */
size_t qf_cuda_decode_workspace_bytes(const qf_cuda_decode_args *args, const qf_cuda_device *device,
                                      int32_t max_model_len);
/* Makes the workspace and, with peers, what others write of this rank's region ready for the first step; all ranks have
 * done so before any of them takes it. */
qf_status qf_cuda_decode_reset(const qf_cuda_decode_args *args, const qf_cuda_device *device, cudaStream_t stream,
                               qf_error *err);
/* Loads the kernels onto the current device: before any other rank's may wait (qf_cuda_peer_load). */
qf_status qf_cuda_decode_load(qf_error *err);
qf_status qf_cuda_decode(const qf_cuda_decode_args *args, const qf_cuda_device *device, cudaStream_t stream,
                         qf_error *err);

#ifdef __cplusplus
}
#endif

#endif
