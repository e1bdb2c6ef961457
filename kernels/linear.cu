/* out = x W^T + bias: the choice between the two linear kernels.
 *
 * linear_mma streams weights through registers and reads x from L2 or shared memory; it is the better one while a
 * step's time is that of reading the weights. linear_wgmma feeds the tensor cores at full rate. The table tells from
 * how many tokens on it wins; sm_80's path has no second kernel. With batch_invariant one kernel serves every
 * num_tokens, so that a token's sums have one order: wgmma where it is, mma elsewhere.
 *
 * Measured, H200, 2026-11-22, cold L2, us of mma | wgmma, the larger linears of 7B:
 *
 *     n x k         bits |    16 tokens       32 tokens       64 tokens
 *     37888 x 3584     4 |  31.9 | 48.3     48.1 | 52.1    144.0 | 60.9
 *                      8 |  53.1 | 57.0     93.0 | 61.6    147.9 | 74.3
 *                     16 |  67.0 | 77.4     68.3 | 77.7     94.6 | 83.3
 *     3584 x 18944     4 |  20.0 | 36.4     26.9 | 36.5     49.5 | 28.2
 *                      8 |  32.7 | 40.3     38.2 | 43.7     56.1 | 34.9
 *                     16 |  36.7 | 48.0     38.9 | 42.7    103.9 | 53.4
 *
 * So mma has up to 32 tokens and wgmma the rest. Against that rule stand 8 bits of 37888 x 3584 at 32 tokens, and at 16
 * and 32 tokens, by 0.4 to 1.4 us, some linears of 4608 x 3584 and less. 0.5B's gate_up and down are 1.2 to 2.5 times
 * as fast by mma at 32 tokens. */
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
