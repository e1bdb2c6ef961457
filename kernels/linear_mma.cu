/* Linear layers on mma.sync: out[t][j] = sum over k of x[t][k] * w[j][k] + bias[j], w of 4, 8 or 16 bits.
 *
 * Shapes and layouts: x (num_tokens, k) tiled bf16; w (n, k) packed fragments and scales (qf_kernels.h); out
 * (num_splits, num_tokens, n) float32 partial sums, or, for gate_up, act = silu(gate) * up as tiled bf16. Weights are
 * the A operand of mma.m16n8k16, so a lane reads its fragments from global memory in 16-byte loads and nothing moves
 * between lanes; x is the B operand, and a core matrix of the tiled layout is what ldmatrix gives.
 *
 * Roofline: n k bits / 8 bytes of weights, 2 n k num_tokens operations. Up to about 32 tokens the weights' bytes are
 * the bound (H200: 4.4 TB/s; 7B gate_up of 4 bits: 16 us); from 64 tokens on the tensor cores (mma.sync reaches about
 * 0.6 of Hopper's peak). At 4 bits a block of 16 x 128 costs about 150 issue slots of the 216 that an SM of an
 * H200 has while the block's 1,024 bytes arrive: integer work on the weights must stay small. Targets: 0.85 of the
 * bandwidth for matrices over 30 MB, under 3 us for those below 4 MB; half of mma.sync's peak at 512 tokens.
 *
 * stream (1 to 8 tokens; linear_mma_stream.cuh). Grid (row_groups, num_splits), a CTA or two per SM.
 *
 *              k: share 0            share 1
 *     rows  +-------------------+-------------------+   A CTA has a run of row tiles and one share of k. In the order
 *           | CTA 0,0           | CTA 0,1           |   (row tile, k) its weights are one run of pieces of 1 KB (two
 *           |  w0 w0 w0 w0 w0 w1|                   |   16-byte loads a lane), which is cut evenly into runs for its
 *           |  w1 w1 w1 w1 w2 w2|                   |   warps: all are busy whatever k is.
 *           +-------------------+-------------------+
 *           | CTA 1,0           | CTA 1,1           |
 *
 *   Every warp keeps a ring of 4 pieces in registers (or of 6 in shared memory: linear_mma_stream_ring.cuh), filled
 *   before the wait for the kernel before this one; then x goes to shared memory as it is, once, behind the only barrier
 *   of the prologue. Where a warp's run leaves a row tile it puts its 16 x 8 sums into slot (row tile + warp): each step
 *   along the staircase of (row tile, warp) pairs has its own. After a barrier the slots of a row tile are added in the
 *   order of k and written. What that end needs (biases, which warps have shares of a row tile) is in tables made before
 *   the wait: between the wait and the exit nothing hides latency. At most 80 registers a thread, so that with 12 warps
 *   the next kernel's CTA fits beside this one and its first weights arrive while this one ends. The norm behind it and
 *   the one before it can be part of it: linear_mma_stream_norm.cuh.
 *
 * batch (9 to 32 tokens; linear_mma_batch.cuh). Grid (row_groups, num_splits), one CTA an SM.
 *
 *   row tile   blocks of the share: 0 1 2 3 | 4 5 6 7 | ..     A warp has a row tile (of 4 bits and over 16 tokens two)
 *      r         warp (r, slice):   0 1 0 1 | 0 1 0 1 |        and, where rows are few, every slices-th block of k. Its
 *      r + 1                        0 1 0 1 | 0 1 0 1 |        weights go through a ring in registers as in "stream".
 *                x in shared memory:  chunk      chunk
 *
 *   x of over 16 tokens would fill shared memory, so it passes through it in 3 stages of about 16 KB that all the warps
 *   use in step: one barrier a chunk, while each warp's ring of weights runs on. Where x has room (up to 16 tokens, and
 *   more if rows take several passes) it stays, and a warp waits for the copies of a chunk only, not for other warps. A
 *   CTA with more rows than warps goes over k again for the next ones (passes); the ring does not stop in between. Sums
 *   are stored straight from registers.
 *
 * tile (any number of tokens; linear_mma_tile.cuh). Grid (token passes, row groups, num_splits); 8 warps, or 4
 * where that leaves fewer SMs idle at the end.
 *
 *     token tiles of 8 a warp:   1, 2 (1 row tile)    4, 8 (2 row tiles)    above 64 tokens
 *     CTA tile, rows x tokens:   128 x 8, 16          256 x 32, 64          128 x 128 (4 x 2 warps)
 *
 *   A ring of stages of 64 columns in shared memory, filled by cp.async: weights and scales as packed, x as tiled; one
 *   barrier a stage. The weights of the first stages are asked for before the wait. Each warp turns its own row tiles
 *   into fragments; tokens are the fast grid dimension, so weights come from L2 for all but the first pass.
 *
 * Arithmetic: q - zero is exact in bf16; a scale group's products (in a tile's stage, at most 64 columns) are summed in
 * their own float32 accumulator, which is then scaled and added. A lane's sums in "tile" run over the share of k in
 * order, whatever the tile shape, so one token's result does not depend on num_tokens: batch_invariant uses "tile" with
 * shares chosen for 8 tokens.
 *
 * Measured (H200, 2026-11-22; us, weights not in L2, calls back to back in a graph with dependent launch; before
 * the end of "stream" was made shorter and shares and warps were set from a sweep). Share of 4.4 TB/s:
 *
 *                         4 bits                    8 bits                    16 bits
 *     tokens         1         8    16    32     1         8    16    32     1         8    16    32
 *     0.5B gate_up   4.3 25%   4.1   4.5   6.7   5.3 39%   5.3   6.1   7.9   7.1 56%   7.3   7.9   8.9
 *     0.5B down      2.4 22%   2.7   3.3   4.4   3.1 33%   3.3   4.0   4.8   4.4 45%   4.6   6.2   6.2
 *     7B qkv         4.4 45%   5.3   6.4   8.6   6.8 57%   7.7   9.7  11.9  10.0 75%  10.9  11.5  13.1
 *     7B o           4.0 39%   4.6   5.5   6.9   5.7 53%   6.5   7.9   9.5   8.5 69%   8.7   9.9  10.6
 *     7B gate_up    21.2 77%  22.0  30.9  46.5  38.7 82%  39.5  53.1  91.9  67.0 92%  67.6  67.0  68.3
 *     7B down       11.7 70%  13.2  19.5  26.1  20.5 77%  21.6  32.7  38.2  34.1 91%  35.6  36.7  38.9
 *     7B head       75.9 87%  84.0   136   149   142 90%   153   223   271   254 97%   259   256   264
 *
 * "tile" at 512 tokens: 0.20 to 0.30 of 770 TFLOP/s on 7B shapes (7B gate_up of 4 bits 658 us, of 16 bits 593 us):
 * where there is wgmma, linear.cu takes that from 33 tokens on.
 *
 * Tried and lost: bulk copies of 2 KB of weights per warp into shared memory for the GEMV (a sketch ran at half the
 * speed of loads into registers). Dequantisation of 4 bits with a shift for every register (2 to 4 % slower at 1 to 8
 * tokens on 7B shapes). More than one wave of CTAs in "stream" (7B gate_up, 4 bits, 8 tokens: 25.7 us for 23.1). 16
 * warps where 12 leave room for the next CTA (0.5B gate_up, 4 bits, 1 token: 4.8 us for 4.35; 24 were slower still).
 * The end of "stream" with one thread for each pair of act's elements, which divided to find its slots: 500 dependent
 * instructions in a row on one warp; gate_up then took 1.2 us longer than other matrices of its size. The RMS norm
 * before a linear layer made by every CTA of "stream" for itself, all rows read from L2 (us of linear, norm, linear as
 * three kernels | as two, H200, 4 bits, 1 token: 0.5B o + gate_up 6.5 | 6.2, 2 tokens 6.7 | 7.1, 4 tokens 7.1 | 8.6;
 * 0.5B down + qkv 5.3 | 5.1; 7B o + gate_up 26.7 | 27.8, 2 tokens 26.9 | 29.1). Two chains
 * of products a warp in "stream", for less latency: no difference in a layer. Products without unpacking at 2 to 4 tokens
 * as at one (4 tokens, 7B: gate_up 20.1 us for 19.4, o 4.5 for 3.9: scaling x takes longer than it saves). Weights of
 * gate_up brought to L2 while qkv and o run, 10 to 47 MB of them (7B, 1 token, a layer: 0 to 2 us longer).
 */
#include "linear_mma_plan.cuh"

typedef void (*qf_linear_mma_kernel)(qf_linear_mma_params);

/* ---- dispatch ------------------------------------------------------------------------------------------------- */

static qf_linear_mma_kernel qf_stream_ring_kernel_of(int32_t group_size, bool one)
{
    return group_size == 128  ? one ? qf_linear_stream_ring_kernel<1, true> : qf_linear_stream_ring_kernel<1, false>
           : group_size == 64 ? qf_linear_stream_ring_kernel<2, false>
                              : qf_linear_stream_ring_kernel<4, false>;
}

static qf_linear_mma_kernel qf_stream_kernel_of(int32_t bits, int32_t group_size)
{
    if (bits == 4) {
        return group_size == 128  ? qf_linear_stream_kernel<4, 1>
               : group_size == 64 ? qf_linear_stream_kernel<4, 2>
                                  : qf_linear_stream_kernel<4, 4>;
    }
    if (bits == 8) {
        return group_size == 32 ? qf_linear_stream_kernel<8, 2> : qf_linear_stream_kernel<8, 1>;
    }
    return qf_linear_stream_kernel<16, 1>;
}

template <int bits, int group_size, int tokens> static qf_linear_mma_kernel qf_batch_kernel_for()
{
    constexpr int groups = bits == 4 ? 128 / group_size : bits == 8 && group_size == 32 ? 2 : 1;
    return qf_linear_batch_kernel<bits, groups, tokens, qf_batch_rows(bits, group_size, tokens)>;
}

template <int tokens> static qf_linear_mma_kernel qf_batch_kernel_of_tokens(int32_t bits, int32_t group_size)
{
    if (bits == 4) {
        return group_size == 128  ? qf_batch_kernel_for<4, 128, tokens>()
               : group_size == 64 ? qf_batch_kernel_for<4, 64, tokens>()
                                  : qf_batch_kernel_for<4, 32, tokens>();
    }
    if (bits == 8) {
        return group_size == 32 ? qf_batch_kernel_for<8, 32, tokens>() : qf_batch_kernel_for<8, 128, tokens>();
    }
    return qf_batch_kernel_for<16, 128, tokens>();
}

static qf_linear_mma_kernel qf_batch_kernel_of(int32_t bits, int32_t group_size, int32_t num_tokens)
{
    return qf_batch_tokens(num_tokens) == 2 ? qf_batch_kernel_of_tokens<2>(bits, group_size)
                                            : qf_batch_kernel_of_tokens<4>(bits, group_size);
}

template <int bits> static qf_linear_mma_kernel qf_tile_kernel_of_tokens(int32_t tokens)
{
    return tokens == 1   ? qf_linear_tile_kernel<bits, 1>
           : tokens == 2 ? qf_linear_tile_kernel<bits, 2>
           : tokens == 4 ? qf_linear_tile_kernel<bits, 4>
                         : qf_linear_tile_kernel<bits, 8>;
}

static qf_linear_mma_kernel qf_tile_kernel_of(int32_t bits, int32_t tokens)
{
    return bits == 4   ? qf_tile_kernel_of_tokens<4>(tokens)
           : bits == 8 ? qf_tile_kernel_of_tokens<8>(tokens)
                       : qf_tile_kernel_of_tokens<16>(tokens);
}

/* ---- launcher ------------------------------------------------------------------------------------------------- */

/* Where norms made by linears win, and can be. */
extern "C" bool qf_cuda_linear_norm_fits(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits,
                                         int32_t num_tokens, int32_t num_splits, bool batch_invariant)
{
    qf_stream_plan plan;
    return !batch_invariant && bits == 4 && num_tokens <= QF_CUDA_NORM_TOKENS &&
           qf_stream_plan_make(device, n / 16, k / 128, bits, num_tokens, num_splits, true, &plan) && plan.resident;
}

static qf_status qf_linear_mma_check_norm(const qf_cuda_linear_args *args, const qf_cuda_device *device, qf_error *err)
{
    const qf_cuda_linear_norm *norm = &args->norm;
    const qf_cuda_weight *w = &args->weight;
    if ((norm->residual != NULL || args->squares != NULL) &&
        !qf_cuda_linear_norm_fits(device, w->n, w->k, w->bits, args->num_tokens, args->num_splits,
                                  args->batch_invariant)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_mma: no norm beside %d x %d of %d bits, %d tokens", w->n,
                       w->k, w->bits, args->num_tokens);
    }
    if (args->squares != NULL && (args->weight.k > QF_CUDA_MAX_SQUARES || (uintptr_t)args->squares % 16 != 0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_mma: squares at %p of %d columns; at most %d, aligned",
                       (const void *)args->squares, args->weight.k, QF_CUDA_MAX_SQUARES);
    }
    if (norm->residual == NULL) {
        return QF_OK;
    }
    if (args->epilogue != QF_CUDA_STORE || args->weight.n % 128 != 0 || norm->weight == NULL || norm->x == NULL ||
        norm->squares == NULL || (args->num_splits > 1 && norm->exchange == NULL)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_mma: a norm behind it: n = %d (a multiple of 128), epilogue %d, or a null pointer",
                       args->weight.n, (int)args->epilogue);
    }
    const uintptr_t all = (uintptr_t)norm->residual | (uintptr_t)norm->weight | (uintptr_t)norm->x;
    if (all % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_mma: a pointer of the norm is not aligned to 16 bytes");
    }
    if (norm->squares == args->squares || norm->x == args->x) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_mma: the norm behind it would write what it reads: %s",
                       norm->x == args->x ? "x" : "squares");
    }
    return QF_OK;
}

static qf_status qf_linear_mma_check(const qf_cuda_linear_args *args, const qf_cuda_device *device, qf_error *err)
{
    const qf_cuda_weight *w = &args->weight;
    if (w->bits != 4 && w->bits != 8 && w->bits != 16) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_mma: weights of %d bits; 4, 8 and 16 are supported",
                       w->bits);
    }
    if (w->bits != 16 && w->group_size != 32 && w->group_size != 64 && w->group_size != 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_mma: group size %d; 32, 64 and 128 are supported",
                       w->group_size);
    }
    if (w->n < 16 || w->n % 16 != 0 || w->k < 128 || w->k % 128 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_mma: n = %d, k = %d; packed weights have multiples of 16 and of 128", w->n, w->k);
    }
    if (args->num_tokens < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_mma: num_tokens %d; at least 1", args->num_tokens);
    }
    int32_t max_splits = args->epilogue == QF_CUDA_SILU_MUL ? 1 : QF_CUDA_MAX_SPLITS;
    max_splits = max_splits < w->k / 128 ? max_splits : w->k / 128;
    if (args->num_splits < 1 || args->num_splits > max_splits) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_mma: num_splits %d; 1 to %d for k = %d and this epilogue", args->num_splits, max_splits,
                       w->k);
    }
    if (args->epilogue != QF_CUDA_STORE && args->epilogue != QF_CUDA_SILU_MUL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_mma: unknown epilogue %d", (int)args->epilogue);
    }
    const bool adds = args->norm.residual != NULL;
    const void *output = adds ? args->norm.residual
                         : args->epilogue == QF_CUDA_STORE ? (const void *)args->out : (const void *)args->act;
    const void *x = args->x;
    if (w->data == nullptr || x == nullptr || output == nullptr || (w->bits != 16 && w->scales == nullptr)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_mma: null pointer: data %p, scales %p, x %p, output %p",
                       w->data, (const void *)w->scales, x, output);
    }
    if (((uintptr_t)w->data | (uintptr_t)x | (uintptr_t)output | (uintptr_t)w->scales | (uintptr_t)w->bias) % 16 !=
        0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_mma: data %p, scales %p, bias %p, x %p and output %p have to be aligned to 16 bytes",
                       w->data, (const void *)w->scales, (const void *)w->bias, x, output);
    }
    return qf_linear_mma_check_norm(args, device, err);
}

static qf_linear_mma_params qf_linear_mma_params_of(const qf_cuda_linear_args *args)
{
    const qf_cuda_weight *w = &args->weight;
    qf_linear_mma_params p = {};
    p.data = (const uint8_t *)w->data;
    p.scales = w->scales;
    p.bias = w->bias;
    p.x = (const uint8_t *)args->x;
    p.row_tiles = w->n / 16;
    p.blocks = w->k / 128;
    p.num_tokens = args->num_tokens;
    p.num_tiles = qf_cuda_num_tiles(args->num_tokens);
    p.tile_tokens = qf_cuda_tile_tokens(args->num_tokens);
    for (int32_t s = 0; s <= args->num_splits; s++) {
        p.share_begin[s] = (int32_t)((int64_t)s * p.blocks / args->num_splits);
    }
    p.group_size = w->bits == 16 ? 128 : w->group_size;
    p.multiplier = w->scale_multiplier;
    p.act_tiles = p.row_tiles;
    if (args->epilogue == QF_CUDA_SILU_MUL) {
        p.act = (uint32_t *)args->act;
        p.act_tiles = (w->n / 2 + 127) / 128 * 16;
    } else {
        p.out = args->out;
    }
    return p;
}

/* The same settings for every launch of a kernel, so that a captured one stays valid: as much shared memory as there
 * is, and an SM set up for it, because an SM has to run empty before it changes its share of L1 and two kernels that
 * want different shares never overlap. */
static qf_status qf_linear_mma_prepare(qf_linear_mma_kernel kernel, const qf_cuda_device *device, qf_error *err)
{
    QF_CUDA_TRY(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));
    return qf_allow_shared("linear_mma", kernel, (size_t)device->max_shared_bytes, err);
}

static qf_status qf_stream_launch(qf_linear_mma_params *p, const qf_stream_plan *plan, int32_t bits,
                                  int32_t num_splits, const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    const bool one = plan->ring && p->num_tokens == 1 && p->group_size == 128;
    qf_linear_mma_kernel kernel = plan->ring ? qf_stream_ring_kernel_of(p->group_size, one)
                                             : qf_stream_kernel_of(bits, p->group_size);
    p->multiplier *= one ? 137438953472.0f : 1.0f; /* 2^37: QF_STREAM_SUM_SCALE */
    p->group_tiles = p->row_tiles / plan->row_groups;
    p->larger_groups = p->row_tiles % plan->row_groups;
    p->table_offset = plan->table_offset;
    p->norm_offset = plan->norm_offset;
    p->slot_offset = plan->slot_offset;
    p->ring_offset = plan->ring_offset;
    QF_TRY(qf_linear_mma_prepare(kernel, device, err));
    return qf_launch("linear_mma", kernel, dim3(plan->row_groups, num_splits), dim3(32 * plan->warps),
                     (size_t)plan->shared_bytes, device->dependent_launch, stream, err, *p);
}

extern "C" qf_status qf_cuda_linear_mma(const qf_cuda_linear_args *args, const qf_cuda_device *device,
                                        cudaStream_t stream, qf_error *err)
{
    QF_TRY(qf_linear_mma_check(args, device, err));
    qf_linear_mma_params p = qf_linear_mma_params_of(args);
    const int32_t bits = args->weight.bits;
    p.norm = args->norm;
    p.squares = args->squares;
    p.eps = args->eps;
    qf_stream_plan streaming;
    if (!args->batch_invariant && p.num_tokens <= 8 &&
        qf_stream_plan_make(device, p.row_tiles, p.blocks, bits, p.num_tokens, args->num_splits,
                            args->norm.residual != NULL, &streaming)) {
        qf_stream_plan_ring(device, bits, p.group_size, p.num_tokens, &streaming);
        return qf_stream_launch(&p, &streaming, bits, args->num_splits, device, stream, err);
    }
    qf_linear_mma_kernel kernel;
    dim3 grid;
    int32_t warps, shared_bytes;
    qf_batch_plan batch;
    qf_tile_plan tile;
    if (!args->batch_invariant && p.num_tokens > 8 && p.num_tokens <= QF_BATCH_MAX_TOKENS &&
        qf_batch_plan_make(device, p.row_tiles, p.blocks, bits, p.group_size, p.num_tokens, args->num_splits,
                           &batch)) {
        kernel = qf_batch_kernel_of(bits, p.group_size, p.num_tokens);
        grid = dim3(batch.row_groups, args->num_splits);
        p.row_warps = batch.row_warps;
        p.slices = batch.slices;
        p.passes = batch.passes;
        p.chunk_blocks = batch.chunk_blocks;
        p.resident = batch.resident;
        p.chunk_columns = batch.chunk_blocks / batch.slices * (bits / 4);
        p.stage_bytes = batch.chunk_blocks * qf_batch_x_bytes(p.num_tiles);
        p.slot_offset = batch.slot_offset;
        warps = batch.row_warps * batch.slices;
        shared_bytes = batch.shared_bytes;
    } else if (qf_tile_plan_make(device, p.act_tiles > p.row_tiles ? p.act_tiles : p.row_tiles, p.blocks, bits,
                                 p.num_tokens, args->num_splits, &tile)) {
        kernel = qf_tile_kernel_of(bits, tile.tokens);
        grid = dim3(tile.passes, tile.row_groups, args->num_splits); /* row groups cover act's padding too */
        p.token_warps = tile.token_warps;
        warps = tile.row_warps * tile.token_warps;
        shared_bytes = tile.shared_bytes;
    } else {
        return QF_FAIL(err, QF_ERROR_BACKEND,
                       "linear_mma: n = %d, k = %d, %d bits, %d tokens: %d bytes of shared memory are too few",
                       args->weight.n, args->weight.k, bits, p.num_tokens, device->max_shared_bytes);
    }
    QF_TRY(qf_linear_mma_prepare(kernel, device, err));
    return qf_launch("linear_mma", kernel, grid, dim3(32 * warps), (size_t)shared_bytes, device->dependent_launch,
                     stream, err, p);
}
