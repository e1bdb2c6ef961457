/* One model over several devices behind backend.h: a backend for each rank, on a thread of its own, with the rank's part
 * of the checkpoint and a communicator between them. All ranks get the same batches by pointer; rank 0 writes results.
 *
 * options->rank_backend says what a rank is, tensor_parallel_size how many there are. A rank that fails, or takes longer
 * than step_timeout_ms, aborts the communicator: the step ends with that error on all ranks, and so does all that comes
 * after it. Memory: of devices, the largest rank's figures, since each has its own; of the CPU, the sums. All ranks have
 * the same number of KV blocks. */
#ifndef QF_BACKEND_PARALLEL_H
#define QF_BACKEND_PARALLEL_H

#include "backend/backend.h"

const qf_backend_vtable *qf_parallel_backend_vtable(const qf_backend_vtable *rank_backend);

#endif
