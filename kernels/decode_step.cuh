/* What tests and measurements may ask of the decode kernel beyond qf_kernels.h. */
#ifndef QF_DECODE_STEP_CUH
#define QF_DECODE_STEP_CUH

#include "qf_kernels.h"

typedef struct qf_cuda_decode_options {
    int32_t warps;      /* consumer warps: 16, or 8; 0: 16 */
    int32_t max_stages; /* of the ring; 0: as many as fit */
    int32_t backoff_ns; /* between polls; -1: by the size of a layer */
    int32_t splits;     /* k ranges of down; 0: chosen */
    long long *stamps;  /* device: (sm_count, 4 num_layers + 1, 4) clocks at: start, attention's end (o), gathered, end */
} qf_cuda_decode_options;

qf_status qf_cuda_decode_with(const qf_cuda_decode_args *args, const qf_cuda_decode_options *options,
                              const qf_cuda_device *device, cudaStream_t stream, qf_error *err);

#endif
