/* out = x W^T + bias: the choice between the three linear kernels.
 *
 * linear_mma streams weights through registers and reads x from L2 or shared memory; it is the better one while a
 * step's time is that of reading the weights. linear_wgmma feeds the tensor cores at full rate. The table tells from
 * how many tokens on it wins; sm_80's path has no second kernel. With batch_invariant one kernel serves every
 * num_tokens, so that a token's sums have one order: wgmma where it is, mma elsewhere.
 *
 * Measured, H200, 2026-11-22, cold L2, us of mma | wgmma, best shares of k, the larger linears of 7B:
 *
 *     n x k         bits |    16 tokens       32 tokens       64 tokens
 *     37888 x 3584     4 |  30.4 | 48.3     46.2 | 47.8    144.0 | 55.0
 *                      8 |  52.2 | 57.0     89.6 | 50.1    147.9 | 62.2
 *                     16 |  67.0 | 77.4     68.3 | 77.7     94.6 | 83.5
 *     3584 x 18944     4 |  18.0 | 36.4     23.8 | 33.0     49.5 | 24.9
 *                      8 |  29.6 | 40.3     36.5 | 34.1     56.1 | 28.5
 *                     16 |  35.2 | 48.0     38.9 | 42.7    103.9 | 41.2
 *     4608 x 3584      4 |   5.8 | 10.4      7.5 |  9.8     26.5 |  8.9
 *                      8 |   8.7 | 11.0     10.0 | 10.3     29.7 | 10.7
 *     3584 x 3584      4 |   5.2 |  7.8      7.0 |  7.2     20.7 |  8.0
 *                      8 |   7.6 |  7.9      9.3 |  7.6     22.2 |  9.1
 *
 * So between these two mma has up to 32 tokens and wgmma the rest; but at 8 bits wgmma has large linears of long rows
 * from 17 tokens on. 0.5B's gate_up and down (k = 896, or 4 million weights) are 1.2 to 2.5 times as fast by mma at 32
 * tokens. linear_wgmma_batch has 4 and 8 bits in groups of 128 (the table there): of 17 to 64 tokens all, of 9 to 16
 * those of 8 bits, and those of 4 bits with few rows or 100 million weights. Shares of k are chosen without the group
 * size: other groups take the shares of groups of 128. */
#include "common/launch.cuh"

/* Smallest num_tokens that wgmma takes, by bits of the weights. */
static const struct {
    int32_t bits, min_tokens;
} qf_linear_wgmma_from[] = {{4, 33}, {8, 33}, {16, 33}};

static bool qf_linear_takes_wgmma(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits,
                                  int32_t num_tokens, bool batch_invariant)
{
    if (!device->hopper) {
        return false;
    }
    if (batch_invariant) {
        return true;
    }
    if (bits == 8 && num_tokens > 16 && k >= 2048 && (int64_t)n * k >= 12000000) {
        return true;
    }
    for (size_t i = 0; i < sizeof qf_linear_wgmma_from / sizeof qf_linear_wgmma_from[0]; i++) {
        if (qf_linear_wgmma_from[i].bits == bits) {
            return num_tokens >= qf_linear_wgmma_from[i].min_tokens;
        }
    }
    return false;
}

static bool qf_linear_takes_batch(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits,
                                  int32_t num_tokens, bool batch_invariant)
{
    if (!device->hopper || batch_invariant || bits == 16 || num_tokens < 9 || num_tokens > 64) {
        return false;
    }
    return num_tokens > 16 || bits == 8 || n <= 8192 || (int64_t)n * k >= 100000000;
}

extern "C" int32_t qf_cuda_linear_splits(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits,
                                         int32_t num_tokens, qf_cuda_epilogue epilogue, bool batch_invariant)
{
    if (qf_linear_takes_batch(device, n, k, bits, num_tokens, batch_invariant)) {
        return qf_cuda_linear_wgmma_batch_splits(device, n, k, bits, num_tokens, epilogue);
    }
    return qf_linear_takes_wgmma(device, n, k, bits, num_tokens, batch_invariant)
               ? qf_cuda_linear_wgmma_splits(device, n, k, bits, num_tokens, epilogue, batch_invariant)
               : qf_cuda_linear_mma_splits(device, n, k, bits, num_tokens, epilogue, batch_invariant);
}

extern "C" qf_status qf_cuda_linear(const qf_cuda_linear_args *args, const qf_cuda_device *device, cudaStream_t stream,
                                    qf_error *err)
{
    if (args->norm.residual != NULL || args->squares != NULL) {
        return qf_cuda_linear_mma(args, device, stream, err); /* the only one that makes norms, or says why not */
    }
    if (args->weight.group_size == 128 && qf_linear_takes_batch(device, args->weight.n, args->weight.k,
                                                                args->weight.bits, args->num_tokens,
                                                                args->batch_invariant)) {
        return qf_cuda_linear_wgmma_batch(args, device, stream, err);
    }
    return qf_linear_takes_wgmma(device, args->weight.n, args->weight.k, args->weight.bits, args->num_tokens,
                                 args->batch_invariant)
               ? qf_cuda_linear_wgmma(args, device, stream, err)
               : qf_cuda_linear_mma(args, device, stream, err);
}
