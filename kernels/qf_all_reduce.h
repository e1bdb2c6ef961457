/* The launchers of tensor parallelism: what the GPUs of one host hand each other through their own memory. As all
 * launchers (qf_kernels.h) these are asynchronous, allocate nothing and may be captured into graphs.
 *
 * Each rank owns a region of device memory that every other rank can write (peer access). A call stores what others need
 * into their regions and takes what it needs from its own: words are their own flags, empty until written and emptied by
 * whoever takes them (kernels/peers.cuh). A step's calls are the same on all ranks, in the same order.
 *
 * Every wait ends: after limit_ns, when the host sets `abort`, or when another rank gives up. Then `error` is set in host
 * memory, results are NaN, later calls give up at once, and the regions are of no use until all ranks have been reset. */
#ifndef QF_ALL_REDUCE_H
#define QF_ALL_REDUCE_H

#include "qf_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QF_CUDA_MAX_RANKS 8
#define QF_CUDA_MAX_SHARED_TOKENS 1024 /* of one call */

/* In pinned host memory, one for each rank. */
typedef struct qf_cuda_peer_host {
    uint32_t abort; /* the host's: anything but 0 ends all waits */
    uint32_t error; /* the device's: qf_cuda_peer_error in the upper 24 bits, a rank in the lower 8 */
} qf_cuda_peer_host;

typedef enum qf_cuda_peer_error {
    QF_CUDA_PEER_OK = 0,
    QF_CUDA_PEER_LATE,    /* the rank named did not come in time */
    QF_CUDA_PEER_ABORTED, /* the host said so, of the rank named */
    QF_CUDA_PEER_TOLD     /* the rank named gave up first */
} qf_cuda_peer_error;

/* What one rank needs to know of all. */
typedef struct qf_cuda_peers {
    int32_t rank, num_ranks;          /* 2 .. QF_CUDA_MAX_RANKS */
    char *regions[QF_CUDA_MAX_RANKS]; /* device: of each rank, as this rank's device sees them; 256-byte aligned */
    size_t exchange_bytes;            /* room for one call, of which a region has three; a multiple of 256 */
    qf_cuda_peer_host *host;          /* this rank's, as the device sees it */
    uint64_t limit_ns;                /* how long a kernel waits for another rank */
} qf_cuda_peers;

/* Bytes of a region. */
size_t qf_cuda_peer_region_bytes(size_t exchange_bytes);
/* Makes this rank's region empty. All ranks have done so before any of them calls anything else below. */
qf_status qf_cuda_peer_reset(const qf_cuda_peers *peers, cudaStream_t stream, qf_error *err);
/* Loads every kernel of this header onto the current device: before any other rank's kernel may wait, since loading may
 * have to wait for the device. */
qf_status qf_cuda_peer_load(qf_error *err);

/* residual[row] += the sum over ranks, in their order, of each rank's deltas, added in order; out as qf_cuda_rmsnorm.
 *   one shot: every rank sends its share to all and does all rows.
 *   two shots: row `row` is done by rank row % num_ranks, which alone gets the shares and keeps the residual, and sends the
 *              others the normalised row. Faster for more rows; the same bits.
 * One step's calls are all of one form: with two shots nobody else has a row's residual. */
typedef enum qf_cuda_all_reduce_form { QF_CUDA_ONE_SHOT = 0, QF_CUDA_TWO_SHOT } qf_cuda_all_reduce_form;

typedef struct qf_cuda_all_reduce_args {
    qf_cuda_rmsnorm_args norm; /* delta: this rank's, never NULL. out NULL: one shot, every rank gets every residual */
    bool fresh;                /* the residual has no value yet: it becomes the sum */
    qf_cuda_all_reduce_form form;
    uint32_t *calls; /* host: launches of this step so far; the caller sets it to 0 where a step begins */
} qf_cuda_all_reduce_args;
qf_status qf_cuda_all_reduce(const qf_cuda_all_reduce_args *args, const qf_cuda_peers *peers,
                             const qf_cuda_device *device, cudaStream_t stream, qf_error *err);
/* The faster form for a step of so many tokens. Host, pure. */
qf_cuda_all_reduce_form qf_cuda_all_reduce_choose(int32_t num_ranks, int32_t num_tokens, int32_t hidden_size);
/* Room for `rows` rows in one launch, with either form; larger calls are cut into launches. */
size_t qf_cuda_all_reduce_bytes(int32_t num_ranks, int32_t rows, int32_t hidden_size);

/* Rank 0's out[row][first_column + j] = part[row][j] of each rank. Between two calls lies an all-reduce or share_tokens. */
typedef struct qf_cuda_gather_args {
    const float *part; /* (num_rows, part_stride) */
    float *out;        /* (num_rows, out_stride), rank 0's, as this rank's device sees it */
    int32_t num_rows, part_stride, out_stride;
    int32_t first_column, num_columns; /* of this rank */
} qf_cuda_gather_args;
qf_status qf_cuda_gather(const qf_cuda_gather_args *args, const qf_cuda_peers *peers, const qf_cuda_device *device,
                         cudaStream_t stream, qf_error *err);

/* Rank 0's token_ids go to the other ranks' token_ids and last_token[rows[i].slot]. Between two calls lies an all-reduce or
 * a gather. peers NULL: token_ids are here already, and only last_token is set. */
typedef struct qf_cuda_share_tokens_args {
    const qf_cuda_sample_row *rows; /* (num_rows), the same on all ranks; rank 0 does not read it */
    int32_t *token_ids;             /* (num_rows) */
    int32_t *last_token;            /* (max_num_seqs) */
    int32_t num_rows;               /* <= QF_CUDA_MAX_SHARED_TOKENS */
} qf_cuda_share_tokens_args;
qf_status qf_cuda_share_tokens(const qf_cuda_share_tokens_args *args, const qf_cuda_peers *peers,
                               const qf_cuda_device *device, cudaStream_t stream, qf_error *err);

#ifdef __cplusplus
}
#endif

#endif
