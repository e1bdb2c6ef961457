/* The GPUs of one model on one host, and the memory through which they reach each other (kernels/qf_all_reduce.h). */
#ifndef QF_BACKEND_CUDA_PEERS_H
#define QF_BACKEND_CUDA_PEERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "qf_all_reduce.h"

typedef struct qf_cuda_group {
    int32_t num_ranks;
    int32_t ordinals[QF_CUDA_MAX_RANKS];
    qf_cuda_peers peers[QF_CUDA_MAX_RANKS];
    qf_cuda_peer_host *host; /* pinned: (num_ranks) */
} qf_cuda_group;

/* Lets every device reach the memory of all others; false, with the reason in `note`, where that cannot be (then NCCL does
 * all the work). The same device may be given more than once. */
bool qf_cuda_peers_enable(const int32_t *ordinals, int32_t num_ranks, char *note, size_t note_bytes);

/* Regions of qf_cuda_peer_region_bytes(exchange_bytes) on each device, empty, and the kernels loaded: call it before any
 * rank enqueues anything that waits. After qf_cuda_peers_enable. The calling thread's current device changes. */
qf_status qf_cuda_group_create(const int32_t *ordinals, int32_t num_ranks, size_t exchange_bytes, uint64_t limit_ns,
                               qf_cuda_group **out, qf_error *err);
void qf_cuda_group_destroy(qf_cuda_group *self); /* nothing that uses it is running; NULL-safe */

/* Empties all regions and forgets failures; nothing that uses them is running on any rank. */
qf_status qf_cuda_group_reset(qf_cuda_group *self, qf_error *err);
/* Ends all waits on all ranks within milliseconds. From any thread. */
void qf_cuda_group_abort(qf_cuda_group *self);
/* QF_ERROR_BACKEND, saying why, if a kernel of this rank has given up. Kernels that had ended by then are seen. */
qf_status qf_cuda_group_check(const qf_cuda_group *self, int32_t rank, qf_error *err);

#endif
