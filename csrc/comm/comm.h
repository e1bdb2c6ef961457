/* What the ranks of a model over several devices say to each other. One handle a rank; a rank's calls come from one
 * thread at a time, and all ranks make the same calls in the same order. Whatever waits for other ranks ends with
 * QF_ERROR_BACKEND once any rank, or any other thread, has called abort: after that every call fails. Another rank may
 * still be reading a buffer then: buffers live until all ranks are out of their calls. */
#ifndef QF_COMM_COMM_H
#define QF_COMM_COMM_H

#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/status.h"

typedef struct qf_comm qf_comm;

/* Data lies where the communicator's kind says: in host memory, or on the rank's device, where calls are queued on
 * `stream` and return before they are done. */
typedef struct qf_all_reduce_args {
    const void *in; /* (count) */
    void *out;      /* (count); may be `in`, else they do not overlap */
    size_t count;
    qf_dtype dtype;
    void *stream;   /* NULL in host memory */
} qf_all_reduce_args;

/* Each rank has some columns of a matrix; the root gets them all. */
typedef struct qf_gather_args {
    const void *in; /* (num_rows, columns), this rank's */
    void *out;      /* (num_rows, out_columns), read on the root only */
    int32_t num_rows;
    int32_t columns, first_column; /* of this rank, among out_columns */
    int32_t out_columns;
    int32_t root;
    qf_dtype dtype;
    void *stream;
} qf_gather_args;

typedef struct qf_comm_vtable {
    const char *name; /* "threads", "nccl" */
    /* out = sum over the ranks, added in an order that depends on nothing but their number: the same bits on every
     * rank, and from run to run. */
    qf_status (*all_reduce)(qf_comm *self, const qf_all_reduce_args *args, qf_error *err);
    qf_status (*gather)(qf_comm *self, const qf_gather_args *args, qf_error *err);
    qf_status (*broadcast)(qf_comm *self, int32_t root, void *data, size_t size_bytes, void *stream, qf_error *err);
    qf_status (*barrier)(qf_comm *self, qf_error *err); /* of the ranks' threads */
    void (*abort)(qf_comm *self);                       /* from any thread, any number of times; does not wait */
    void (*destroy)(qf_comm *self);                     /* no call is under way on this handle */
} qf_comm_vtable;

struct qf_comm {
    const qf_comm_vtable *vtable;
    int32_t rank, size;
};

/* Over threads of this process and host memory. out: (size) handles; each is destroyed by itself, in any order. */
qf_status qf_comm_threads_create(int32_t size, qf_comm **out, qf_error *err);

#endif
