/* out = x W^T + bias: the choice between the two linear kernels.
 *
 * linear_mma streams weights through registers and reads x from L2 or shared memory; it is the better one while a
 * step's time is that of reading the weights. linear_wgmma feeds the tensor cores at full rate. The table tells from
 * how many tokens on it wins; sm_80's path has no second kernel. With batch_invariant one kernel serves every
 * num_tokens, so that a token's sums have one order: wgmma where it is, mma elsewhere.
 *
 * Measured: see PERF.md. */
#include "common/launch.cuh"

/* Smallest num_tokens that wgmma takes, by bits of the weights. */
static const struct {
    int32_t bits, min_tokens;
} qf_linear_wgmma_from[] = {{4, 33}, {8, 33}, {16, 33}};

static bool qf_linear_takes_wgmma(const qf_cuda_device *device, int32_t bits, int32_t num_tokens, bool batch_invariant)
{
    if (!device->hopper) {
        return false;
    }
    if (batch_invariant) {
        return true;
    }
    for (size_t i = 0; i < sizeof qf_linear_wgmma_from / sizeof qf_linear_wgmma_from[0]; i++) {
        if (qf_linear_wgmma_from[i].bits == bits) {
            return num_tokens >= qf_linear_wgmma_from[i].min_tokens;
        }
    }
    return false;
}

extern "C" int32_t qf_cuda_linear_splits(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits,
                                         int32_t num_tokens, qf_cuda_epilogue epilogue, bool batch_invariant)
{
    return qf_linear_takes_wgmma(device, bits, num_tokens, batch_invariant)
               ? qf_cuda_linear_wgmma_splits(device, n, k, bits, num_tokens, epilogue, batch_invariant)
               : qf_cuda_linear_mma_splits(device, n, k, bits, num_tokens, epilogue, batch_invariant);
}

extern "C" qf_status qf_cuda_linear(const qf_cuda_linear_args *args, const qf_cuda_device *device, cudaStream_t stream,
                                    qf_error *err)
{
    return qf_linear_takes_wgmma(device, args->weight.bits, args->num_tokens, args->batch_invariant)
               ? qf_cuda_linear_wgmma(args, device, stream, err)
               : qf_cuda_linear_mma(args, device, stream, err);
}
