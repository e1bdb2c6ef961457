/* NCCL, opened when it is first wanted: nothing links to it, and a machine without it runs on one device.
 *
 * One process, one thread a rank. Communicators are non-blocking: nothing here waits without a limit, and a rank that
 * hangs can be left behind by abort(). Streams are cudaStream_t, as void * so that no header of CUDA's is needed. */
#ifndef QF_COMM_COMM_NCCL_H
#define QF_COMM_COMM_NCCL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/status.h"

typedef struct qf_nccl qf_nccl;           /* the library */
typedef struct qf_nccl_comm qf_nccl_comm; /* one rank's communicator */

/* What ranks that belong together share. */
typedef struct qf_nccl_id {
    char bytes[128];
} qf_nccl_id;

/* path: the library's file, or NULL: libnccl.so.2 as the loader finds it. QF_ERROR_BACKEND says what to install. */
qf_status qf_nccl_open(const char *path, qf_nccl **out, qf_error *err);
void qf_nccl_close(qf_nccl *self); /* after all its communicators; NULL-safe */
int32_t qf_nccl_version(const qf_nccl *self); /* 22803 is 2.28.3 */

qf_status qf_nccl_make_id(const qf_nccl *self, qf_nccl_id *out, qf_error *err);

/* Of the calling thread's current device; every rank's thread calls it at the same time. */
qf_status qf_nccl_comm_create(const qf_nccl *library, const qf_nccl_id *id, int32_t rank, int32_t num_ranks,
                              uint32_t limit_ms, qf_nccl_comm **out, qf_error *err);
/* Waits for what is enqueued, at most for the limit; then aborts. NULL-safe. */
void qf_nccl_comm_destroy(qf_nccl_comm *self);

/* out = sum over ranks of in: F32 or BF16; in place if they are the same. Asynchronous on `stream`. The first call of a
 * communicator connects it, which a graph cannot capture: make one before. All ranks call at the same time. */
qf_status qf_nccl_all_reduce(qf_nccl_comm *self, const void *in, void *out, size_t count, qf_dtype dtype, void *stream,
                             qf_error *err);
qf_status qf_nccl_broadcast(qf_nccl_comm *self, int32_t root, void *data, size_t size_bytes, void *stream,
                            qf_error *err);
/* Columns of a matrix, of every rank but the root, to the root: out[row] + first_byte[r] .. of size_bytes[r] = in[row] of
 * rank r. out, first_byte: the root's alone. */
typedef struct qf_nccl_columns {
    int32_t root, num_rows;
    const char *in;
    char *out;
    size_t in_row_bytes, out_row_bytes;
    const size_t *first_byte, *size_bytes; /* (num_ranks) */
} qf_nccl_columns;
qf_status qf_nccl_gather(qf_nccl_comm *self, const qf_nccl_columns *args, void *stream, qf_error *err);
/* QF_ERROR_BACKEND if something enqueued has failed. From any thread. */
qf_status qf_nccl_comm_check(qf_nccl_comm *self, qf_error *err);
/* Ends what is running on this rank, soon; of the communicator only destroy() is left. From any thread; waits for nothing. */
void qf_nccl_comm_abort(qf_nccl_comm *self);

#endif
