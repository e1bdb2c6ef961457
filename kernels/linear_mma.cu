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
 *   Every warp keeps a ring of 4 pieces in registers, filled before the wait for the kernel before this
 *   one; then x goes to shared memory as it is, once, behind the only barrier of the prologue. Where a warp's run
 *   leaves a row tile it puts its 16 x 8 sums into slot (row tile + warp): each step along the staircase of (row tile,
 *   warp) pairs has its own. After a barrier the slots of a row tile are added in the order of k and written. At most
 *   80 registers a thread, so that with 12 warps the next kernel's CTA fits beside this one and its first weights
 *   arrive while this one ends.
 *
 * batch (9 to 32 tokens; linear_mma_batch.cuh). Grid (row_groups, num_splits), one CTA an SM.
 *
 *   row tile   blocks of the share: 0 1 2 3 | 4 5 6 7 | ..     A warp has a row tile (of 4 bits and over 16 tokens two)
 *      r         warp (r, slice):   0 1 0 1 | 0 1 0 1 |        and, where rows are few, every slices-th block of k. Its
 *      r + 1                        0 1 0 1 | 0 1 0 1 |        weights go through a ring in registers as in "stream".
 *                x in shared memory:  chunk      chunk
 *
 *   x would fill shared memory, so it passes through it in 3 stages of about 16 KB that all the warps use in step: one
 *   barrier a chunk, while each warp's ring of weights runs on. A CTA with more rows than warps goes over k again for
 *   the next ones (passes); the ring does not stop in between. Sums are stored straight from registers.
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
 * Measured: see PERF.md.
 *
 * Tried and lost: bulk copies of 2 KB of weights per warp into shared memory for the GEMV (a sketch ran at half the
 * speed of loads into registers). */
#include "linear_mma_batch.cuh"
#include "linear_mma_stream.cuh"
#include "linear_mma_tile.cuh"

typedef void (*qf_linear_mma_kernel)(qf_linear_mma_params);

/* ---- plans: which kernel, how the work is cut ---------------------------------------------------------------- */

typedef struct qf_stream_plan {
    int32_t row_groups, warps, ctas_per_sm;
    int32_t slot_offset, shared_bytes;
} qf_stream_plan;

typedef struct qf_batch_plan {
    int32_t row_groups, row_warps, slices, passes; /* a CTA has row_warps * slices warps */
    int32_t chunk_blocks, slot_offset, shared_bytes;
    double cost_us; /* an estimate, to compare num_splits by */
} qf_batch_plan;

typedef struct qf_tile_plan {
    int32_t tokens, token_warps, row_warps; /* token tiles of a warp; warps along tokens and along rows */
    int32_t passes, row_groups, shared_bytes;
    double cost_us;
} qf_tile_plan;

static int32_t qf_ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

/* False if it does not fit shared memory. */
static bool qf_stream_plan_make(const qf_cuda_device *device, int32_t row_tiles, int32_t blocks, int32_t bits,
                                int32_t num_tokens, int32_t num_splits, qf_stream_plan *plan)
{
    /* Weights of an SM in KB. Long runs want more warps than the 12 that leave room for the next kernel. */
    const double kilobytes = (double)row_tiles * blocks * (bits / 4) / device->sm_count;
    const int32_t share = qf_ceil_div(blocks, num_splits);
    plan->slot_offset = (share * 256 * qf_cuda_tile_tokens(num_tokens) + 16 + 127) / 128 * 128;
    plan->ctas_per_sm = kilobytes >= 128 && 2 * plan->slot_offset <= device->max_shared_bytes * 3 / 4 ? 2 : 1;
    for (int32_t waves = 1; waves <= 16; waves *= 2) {
        int32_t groups = device->sm_count * plan->ctas_per_sm * waves / num_splits;
        plan->row_groups = groups < 1 ? 1 : groups < row_tiles ? groups : row_tiles;
        int32_t tiles = qf_ceil_div(row_tiles, plan->row_groups), pieces = tiles * share * (bits / 4);
        plan->warps = plan->ctas_per_sm == 2 ? 12 : kilobytes >= 128 ? 24 : pieces >= 12 ? 12 : 8;
        plan->shared_bytes = plan->slot_offset + (tiles + plan->warps) * num_tokens * QF_STREAM_TOKEN_STRIDE * 4;
        if (plan->shared_bytes * plan->ctas_per_sm + 1024 * (plan->ctas_per_sm - 1) <= device->max_shared_bytes) {
            return true;
        }
    }
    return false;
}

/* Token tiles that the batch kernel is made for. */
static int32_t qf_batch_tokens(int32_t num_tokens) { return num_tokens <= 16 ? 2 : 4; }

/* False if it does not fit shared memory. */
static bool qf_batch_plan_make(const qf_cuda_device *device, int32_t row_tiles, int32_t blocks, int32_t bits,
                               int32_t group_size, int32_t num_tokens, int32_t num_splits, qf_batch_plan *plan)
{
    const int32_t tokens = qf_batch_tokens(num_tokens), rows = qf_batch_rows(bits, group_size, tokens);
    const int32_t units = qf_ceil_div(row_tiles, rows), max_warps = qf_batch_max_warps(bits, group_size, tokens);
    const int32_t share = qf_ceil_div(blocks, num_splits), num_tiles = qf_cuda_num_tiles(num_tokens);
    const int32_t groups = device->sm_count < num_splits ? 1 : device->sm_count / num_splits;
    plan->passes = qf_ceil_div(units, groups * max_warps);
    plan->row_warps = qf_ceil_div(units, groups * plan->passes);
    plan->row_groups = qf_ceil_div(units, plan->row_warps * plan->passes);
    int32_t limit = max_warps / plan->row_warps;
    limit = limit > QF_BATCH_MAX_SLICES ? QF_BATCH_MAX_SLICES : limit > share ? share : limit;
    for (; limit >= 1; limit--) {
        plan->slices = 1;
        for (int32_t s = 2; s <= limit; s++) { /* the fewest that shorten a warp's run over k as much */
            plan->slices = qf_ceil_div(share, s) < qf_ceil_div(share, plan->slices) ? s : plan->slices;
        }
        /* About 16 KB a chunk. */
        const int32_t longest = qf_ceil_div(share, plan->slices), usual = 8 / (num_tiles * plan->slices);
        const int32_t length = usual < 1 ? 1 : usual > longest ? longest : usual;
        plan->chunk_blocks = plan->slices * length;
        plan->slot_offset = QF_BATCH_STAGES * plan->chunk_blocks * qf_batch_x_bytes(num_tiles);
        plan->shared_bytes =
            plan->slot_offset + (plan->slices - 1) * plan->row_warps * qf_batch_slot_bytes(tokens, rows);
        if (plan->shared_bytes <= device->max_shared_bytes) {
            const double kilobytes = (double)plan->passes * plan->row_warps * rows * share * (bits / 4);
            const double x_kilobytes = (double)plan->passes * share * num_tiles * 2;
            /* An SM's weights come at 30 GB/s, with x from L2 at 45. A warp's piece takes 0.35 us at best. */
            const double turns = (double)plan->passes * qf_ceil_div(share, plan->slices) * (bits / 4);
            const double memory_us = kilobytes * 0.033, l2_us = (kilobytes + x_kilobytes) * 0.022;
            const double busy_us = memory_us > l2_us ? memory_us : l2_us, latency_us = 0.35 * turns;
            plan->cost_us = (busy_us > latency_us ? busy_us : latency_us) +
                            num_splits * (0.06 + 2.0 * num_tokens * row_tiles * 64 / 3e6);
            return true;
        }
    }
    return false;
}

/* Estimates a tile plan whose cut is set. False if it does not fit shared memory. */
static bool qf_tile_plan_cost(const qf_cuda_device *device, int32_t row_tiles, int32_t blocks, int32_t bits,
                              int32_t num_tokens, int32_t num_splits, qf_tile_plan *plan)
{
    const int32_t rows = plan->row_warps * qf_tile_warp_rows(plan->tokens), tokens = plan->tokens * plan->token_warps;
    plan->row_groups = qf_ceil_div(row_tiles, rows);
    plan->passes = qf_ceil_div(qf_cuda_num_tiles(num_tokens), tokens);
    plan->shared_bytes =
        qf_tile_stages(plan->tokens) * qf_tile_stage_bytes(bits, rows, tokens) + QF_TILE_ZERO_BYTES;
    if (plan->shared_bytes > device->max_shared_bytes) {
        return false;
    }
    const int32_t fit = device->max_shared_bytes / (plan->shared_bytes + 1024);
    const int32_t most = qf_tile_resident(plan->tokens) * 8 / (plan->row_warps * plan->token_warps);
    const int32_t resident = fit < 1 ? 1 : fit < most ? fit : most;
    /* An SM's time for one CTA: bytes at 33 GB/s, or MMA at one in 1.1 ns. The CTAs of an SM share it; those left after
     * the full waves have it to themselves. A CTA's ring of stages turns round in 0.8 us at best. */
    const double bytes_us = rows * 0.25 * bits / 33.0, mma_us = rows * tokens * 8 * 0.0011;
    const int32_t share = qf_ceil_div(blocks, num_splits);
    const double cta_us = share * ((bytes_us > mma_us ? bytes_us : mma_us) + 0.015);
    const int32_t ctas = plan->row_groups * plan->passes * num_splits, slots = device->sm_count * resident;
    const int32_t turns = ctas / slots * resident + qf_ceil_div(ctas % slots, device->sm_count);
    const double busy_us = turns * cta_us;
    const double latency_us = qf_ceil_div(ctas, slots) * share * 2 * 0.8 / (qf_tile_stages(plan->tokens) - 1);
    plan->cost_us = (busy_us > latency_us ? busy_us : latency_us) +
                    num_splits * (0.06 + 2.0 * num_tokens * row_tiles * 64 / 3e6);
    return true;
}

/* False if it does not fit shared memory. */
static bool qf_tile_plan_make(const qf_cuda_device *device, int32_t row_tiles, int32_t blocks, int32_t bits,
                              int32_t num_tokens, int32_t num_splits, qf_tile_plan *plan)
{
    const int32_t tiles = qf_cuda_num_tiles(num_tokens);
    bool found = false;
    for (int32_t warps = 8; warps >= 4; warps /= 2) {
        qf_tile_plan cut = {};
        cut.tokens = tiles > 4 ? 8 : tiles > 2 ? 4 : tiles;
        cut.token_warps = tiles > 8 ? 2 : 1;
        cut.row_warps = warps / cut.token_warps;
        if (qf_tile_plan_cost(device, row_tiles, blocks, bits, num_tokens, num_splits, &cut) &&
            (!found || cut.cost_us < 0.9 * plan->cost_us)) {
            *plan = cut;
            found = true;
        }
    }
    return found;
}

/* Shares for the stream kernel. Rows enough to keep every SM busy need none. Else 4: shorter runs over k mean less x to
 * wait for; but 2 where writing and adding that many partial sums costs more than that saves; and more for a long k,
 * whose x would fill shared memory. (Measured best or within 4 % of it on 0.5B and 7B shapes.) */
static int32_t qf_stream_splits(const qf_cuda_device *device, int32_t row_tiles, int32_t blocks, int32_t bits,
                                int32_t num_tokens)
{
    const int32_t usual = row_tiles * num_tokens > 1024 ? 2 : 4, longest = qf_ceil_div(blocks, 20);
    int32_t splits = row_tiles >= 8 * device->sm_count ? 1 : usual > longest ? usual : longest;
    int32_t limit = blocks < QF_CUDA_MAX_SPLITS ? blocks : QF_CUDA_MAX_SPLITS;
    qf_stream_plan plan;
    splits = splits < limit ? splits : limit;
    while (splits < limit && !qf_stream_plan_make(device, row_tiles, blocks, bits, num_tokens, splits, &plan)) {
        splits++;
    }
    return splits;
}

extern "C" int32_t qf_cuda_linear_mma_splits(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits,
                                             int32_t num_tokens, qf_cuda_epilogue epilogue, bool batch_invariant)
{
    const int32_t row_tiles = n / 16, blocks = k / 128;
    const int32_t limit = batch_invariant ? 4 : QF_CUDA_MAX_SPLITS; /* 4: prefill has that many partial sums too */
    if (epilogue == QF_CUDA_SILU_MUL || n < 16 || k < 128 || num_tokens < 1) {
        return 1;
    }
    if (!batch_invariant && num_tokens <= 8) {
        return qf_stream_splits(device, row_tiles, blocks, bits, num_tokens);
    }
    int32_t best = 1;
    double best_us = 0;
    for (int32_t splits = 1; splits <= limit && splits <= blocks; splits++) {
        qf_batch_plan batch;
        qf_tile_plan tile;
        double cost_us;
        if (!batch_invariant && num_tokens <= QF_BATCH_MAX_TOKENS &&
            qf_batch_plan_make(device, row_tiles, blocks, bits, 128, num_tokens, splits, &batch)) {
            cost_us = batch.cost_us;
        } else if (qf_tile_plan_make(device, row_tiles, blocks, bits, batch_invariant ? 8 : num_tokens, splits,
                                     &tile)) {
            cost_us = tile.cost_us;
        } else {
            continue;
        }
        if (best_us == 0 || cost_us < 0.98 * best_us) { /* fewer shares are less work for what comes next */
            best = splits;
            best_us = cost_us;
        }
    }
    return best;
}

/* ---- dispatch ------------------------------------------------------------------------------------------------- */

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

static qf_status qf_linear_mma_check(const qf_cuda_linear_args *args, qf_error *err)
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
    const void *output = args->epilogue == QF_CUDA_STORE ? (const void *)args->out : (const void *)args->act;
    if (w->data == nullptr || args->x == nullptr || output == nullptr || (w->bits != 16 && w->scales == nullptr)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_mma: null pointer: data %p, scales %p, x %p, output %p",
                       w->data, (const void *)w->scales, (const void *)args->x, output);
    }
    if (((uintptr_t)w->data | (uintptr_t)args->x | (uintptr_t)output | (uintptr_t)w->scales) % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_mma: data %p, scales %p, x %p and output %p have to be aligned to 16 bytes", w->data,
                       (const void *)w->scales, (const void *)args->x, output);
    }
    return QF_OK;
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

extern "C" qf_status qf_cuda_linear_mma(const qf_cuda_linear_args *args, const qf_cuda_device *device,
                                        cudaStream_t stream, qf_error *err)
{
    QF_TRY(qf_linear_mma_check(args, err));
    qf_linear_mma_params p = qf_linear_mma_params_of(args);
    const int32_t bits = args->weight.bits;
    qf_linear_mma_kernel kernel;
    dim3 grid;
    int32_t warps, shared_bytes;
    qf_stream_plan streaming;
    qf_batch_plan batch;
    qf_tile_plan tile;
    if (!args->batch_invariant && p.num_tokens <= 8 &&
        qf_stream_plan_make(device, p.row_tiles, p.blocks, bits, p.num_tokens, args->num_splits, &streaming)) {
        kernel = qf_stream_kernel_of(bits, p.group_size);
        grid = dim3(streaming.row_groups, args->num_splits);
        p.group_tiles = p.row_tiles / streaming.row_groups;
        p.larger_groups = p.row_tiles % streaming.row_groups;
        p.slot_offset = streaming.slot_offset;
        warps = streaming.warps;
        shared_bytes = streaming.shared_bytes;
    } else if (!args->batch_invariant && p.num_tokens > 8 && p.num_tokens <= QF_BATCH_MAX_TOKENS &&
               qf_batch_plan_make(device, p.row_tiles, p.blocks, bits, p.group_size, p.num_tokens, args->num_splits,
                                  &batch)) {
        kernel = qf_batch_kernel_of(bits, p.group_size, p.num_tokens);
        grid = dim3(batch.row_groups, args->num_splits);
        p.row_warps = batch.row_warps;
        p.slices = batch.slices;
        p.passes = batch.passes;
        p.chunk_blocks = batch.chunk_blocks;
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
