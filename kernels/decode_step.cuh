/* What tests and measurements may ask of the decode kernel beyond qf_kernels.h. */
#ifndef QF_DECODE_STEP_CUH
#define QF_DECODE_STEP_CUH

#include "qf_decode.h"

/* Times of a CTA in a linear, in its multiprocessor's clocks; at the start also in nanoseconds of all. */
enum {
    QF_STAMP_START,
    QF_STAMP_Q, QF_STAMP_TILES, QF_STAMP_ATTENTION, /* o only: q is there, tiles done, published */
    QF_STAMP_GATHERED, QF_STAMP_X, QF_STAMP_UNITS, QF_STAMP_END,
    QF_STAMP_GLOBAL,
    QF_STAMPS
};

typedef struct qf_cuda_decode_options {
    int32_t max_stages; /* of the ring; 0: as many as fit */
    int32_t splits;     /* k ranges of down; 0: chosen */
    long long *stamps;  /* device: (sm_count, 4 num_layers + 1, QF_STAMPS), zeros where a CTA is not; or NULL */
    bool unsafe;        /* launched without the promise that all CTAs run at once: for several ranks on one device */
} qf_cuda_decode_options;

qf_status qf_cuda_decode_with(const qf_cuda_decode_args *args, const qf_cuda_decode_options *options,
                              const qf_cuda_device *device, cudaStream_t stream, qf_error *err);

#endif
