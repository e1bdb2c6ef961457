/* The ranks of a model over several GPUs (comm/comm.h): through each other's memory where they can reach it, which takes
 * all the collectives of a step and needs no library; else, or where it is asked for, through NCCL. */
#ifndef QF_BACKEND_CUDA_COMM_H
#define QF_BACKEND_CUDA_COMM_H

#include "backend/backend.h"
#include "comm/comm.h"
#include "qf_all_reduce.h"

/* A rank's exchange buffer, of which it has three: calls with more rows than fit are cut into several launches. */
#define QF_CUDA_EXCHANGE_BYTES ((size_t)16 << 20)

/* create_comms of backend.h. Devices are device_ordinal, the next one, ... */
qf_status qf_cuda_create_comms(const qf_backend_options *options, int32_t size, qf_comm **out, qf_error *err);

/* Device memory that a rank has besides its backend's own. */
size_t qf_cuda_comm_bytes(void);

/* The following take a communicator that qf_cuda_create_comms made. */

/* On each rank's thread and device, all at the same time, before anything else: connects NCCL if it is needed. The columns
 * are the rank's in a gather. */
qf_status qf_cuda_comm_connect(qf_comm *comm, int32_t first_column, int32_t num_columns, qf_error *err);
/* The end of it, by each rank that had come so far: on its thread, with nothing running and no graph left. */
void qf_cuda_comm_disconnect(qf_comm *comm);
/* All at the same time, too: rank 0's matrix, that a gather fills, as every rank's device sees it. NULL without peers. */
qf_status qf_cuda_comm_share_root(qf_comm *comm, float *own, float **out, qf_error *err);
/* All at the same time: `all` (size of the communicator) gets each rank's `own`, of bytes <= QF_CUDA_COMM_NOTE_BYTES. */
#define QF_CUDA_COMM_NOTE_BYTES 64
qf_status qf_cuda_comm_tell(qf_comm *comm, const void *own, size_t bytes, void *all, qf_error *err);
/* NULL: the ranks cannot reach each other's memory, and comm's vtable does the work. */
const qf_cuda_peers *qf_cuda_comm_peers(const qf_comm *comm);
/* Why a wait of this rank on the device has ended early, as an error. */
qf_status qf_cuda_comm_check(const qf_comm *comm, qf_error *err);
/* "peer memory", or "NCCL 2.28.3 (cuda:0 cannot reach ...)". */
const char *qf_cuda_comm_describe(const qf_comm *comm);

#endif
