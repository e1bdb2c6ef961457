/* out = x W^T + bias by wgmma for a few tokens, 5 to 64: weights of 4 and 8 bits in groups of 128; sm_90a.
 *
 * Layouts: qf_kernels.h. As in linear_wgmma.cu weights are the A operand, unpacked in registers, and x is the B
 * operand, in shared memory as it stands in device memory; two sizes, of 32 and 64 tokens.
 *
 * Roofline, H200: n k bits / 8 bytes at 4.4 TB/s: a unit of 16 rows x 128 k is 1,088 bytes at 4 bits, 65 clocks of an
 * SM. At 4 bits it takes about 90 clocks with 32 tokens (linear_wgmma_rows.cuh; else 115) and 130 with 64, whatever the
 * share of memory. The tensor cores need 32 and 64 of them. A unit is about 180 instructions of a warp, in
 * linear_wgmma_rows.cuh 125. At 8 bits, 2,112 bytes, memory is the bound. Target: 0.8 of the bandwidth at 8 bits, 0.6
 * at 4.
 *
 * Plan. Grid (row groups, num_splits), a CTA per SM, of up to 4 warpgroups (64 tokens: 3).
 *
 *     row tiles of the CTA    blocks of its share of k     A warpgroup has 4 row tiles, or 8 where there are more, in
 *       0 ..  3  warpgroup 0   0 1 2 3 4 ..                turns; where rows are few, several have the same ones and
 *       4 ..  7  warpgroup 1   0 1 2 3 4 ..                every slices-th block each, and their sums are added in
 *       8 .. 11  warpgroup 2   0 1 2 3 4 ..                order at the end.
 *      12 .. 15  warpgroup 0   0 1 2 3 4 ..
 *
 *   Each warp brings its own units by cp.async to a ring of 4 of its own, so that weights need no barrier; a
 *   ring in registers would not be one: the compiler counts all its loads with one scoreboard, and the oldest is then
 *   waited for together with the newest. x passes through a ring of stages that all warps share, as much as there is
 *   room for, filled by bulk copies of the first thread: 3 stages behind its own work, so that it seldom waits for the
 *   others. While a half of a unit is multiplied the next is unpacked; waits are filled by the other warpgroups.
 *
 * Large linears of 4 bits, up to 32 tokens: linear_wgmma_rows.cuh. 3 warpgroups have all row tiles of the CTA, 3 to 5 a
 * warp in turns, and every third block of k each; of the one or two blocks that are left at the end of the share, a
 * third of the row tiles. A warp's ring of units holds two of its blocks (6 to 10 units), which keeps memory busy from
 * before the kernel before has ended, and its places are known to the compiler; a warpgroup has stages of x of its own.
 * The sums pass through shared memory, and each warpgroup adds and stores a third of the row tiles.
 *   A warpgroup works on 64 rows, so that 224 row tiles (n = 3,584) are 14 CTAs of 16 or 19 of 12 for a share of k, and
 *   no equal shares make them 132 CTAs: where the results are partial sums, the first shares are of "wide" CTAs with
 *   `rows` row tiles a warp, the others of "narrow" ones with one less and the more blocks of k.
 *
 * Arithmetic: q - zero (or a quarter, or a 64th of it) is exact in bf16; the products of a unit, a scale group, are
 * summed in their own float32 accumulator, which is then scaled and added. So the error is that of float32.
 *
 * Measured, H200, 2026-11-23, cold L2, us of this kernel | the one that was taken before, best shares of k (4 bits of
 * the first two linears: 17 tokens, not 16):
 *
 *     n x k         bits |   16 tokens       32 tokens       64 tokens
 *     37888 x 3584     4 |  26.9 | 31.4     27.1 | 47.9     39.8 | 55.6
 *                      8 |  37.6 | 53.5     37.1 | 50.4     42.6 | 62.4
 *     3584 x 18944     4 |  15.2 | 18.9     15.6 | 24.6     25.0 | 25.9
 *                      8 |  20.5 | 30.8     21.2 | 34.0     25.6 | 29.0
 *     4608 x 3584      4 |   6.0 |  6.4      6.3 |  8.2      8.0 |  9.0
 *                      8 |   6.8 |  9.5      7.4 | 10.4      8.9 | 10.7
 *     3584 x 3584      4 |   5.1 |  5.5      5.3 |  7.2      6.5 |  8.0
 *                      8 |   6.1 |  7.9      6.4 |  7.7      7.5 |  9.3
 *     9728 x 896       4 |   5.0 |  4.5      5.1 |  6.9      6.3 |  8.7
 *     896 x 4864       4 |   3.0 |  3.1      3.2 |  4.8      3.8 |  6.4
 *
 * Tried and lost: mma.sync in place of wgmma, two or three row tiles a warp, with the same two rings (7B's four linears
 * at 32 tokens and 4 bits 80 us; at 16 tokens gate_up took 26.1 us with three row tiles a warp, and the four 54).
 * Rings of 6 units (0 to 8 % slower at 4 bits). Unpacking a unit's first half before the wait for the unit before,
 * forced by a branch: no gain. 5 x 64 rows by four warpgroups (2, 1, 1, 1): 4 to 7 % slower than by three (2, 2, 1),
 * which took 32.6 us for gate_up. In linear_wgmma_rows.cuh, 7B's four linears at 32 tokens, 54.9 us as it is: quarters
 * of a unit in turns with two accumulators 57.0; warpgroups that start their wgmma in turns, by named barriers, 56.2 (a
 * turn a unit) and 58.4 (two). Equal shares of k: down takes about 1 us longer. A warpgroup that copies, with
 * setmaxnreg: the compiler did not use the registers it was given, and spilled. */
#include "linear_wgmma_batch.cuh"
#include "linear_wgmma_rows.cuh"

typedef void (*qf_wb_kernel)(qf_wb_params);

typedef struct qf_wb_plan {
    int32_t cta_tiles, row_groups, slices, stages;
    int32_t grid_rows, weight_offset, shared_bytes;
    double cost_us;
    int32_t rows; /* linear_wgmma_rows.cuh: row tiles a warp of the wide CTAs; or 0, and what follows is not set */
    int32_t wide_shares, narrow_shares, wide_blocks; /* wide_blocks: of all wide shares */
    int32_t wide_ctas, narrow_ctas;                  /* of a share */
} qf_wb_plan;

/* --- choices ------------------------------------------------------------------------------------------------------ */

static int32_t qf_wb_ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

/* What a plan takes, with the next kernel's reads of the partial sums: fitted to times on an H200. A block of k of a
 * warpgroup's 64 rows takes the longer the fewer warpgroups there are to fill its waits. */
static double qf_wb_cost_us(const qf_wb_plan *plan, int32_t bits, int32_t num_tokens, int32_t row_tiles, int32_t share,
                            int32_t num_splits, int32_t waves)
{
    static const double block_us[2][4] = {{0.40, 0.26, 0.21, 0.19}, {0.40, 0.29, 0.245, 0.245}};
    const int32_t groups = plan->row_groups * plan->slices;
    const double busy_us = qf_wb_ceil_div(plan->cta_tiles, 4) * share * block_us[num_tokens > 32][groups - 1];
    const double memory_us = plan->cta_tiles * share * qf_wb_unit_bytes(bits) / 31.5e3;
    const double x_us = share * qf_cuda_num_tiles(num_tokens) * 0.022;
    return 2.5 + waves * (fmax(busy_us, memory_us) + x_us) +
           num_splits * (0.06 + 1.0 * num_tokens * row_tiles * 64 / 3e6);
}

/* Sets the stages of x; with fewer slices if those of so many do not fit. False if nothing does. */
static bool qf_wb_plan_fit(const qf_cuda_device *device, int32_t bits, int32_t num_tokens, int32_t share,
                           qf_wb_plan *plan)
{
    const int32_t tokens = num_tokens <= 32 ? 32 : 64, block_bytes = qf_cuda_num_tiles(num_tokens) * 2048;
    for (; plan->slices >= 1; plan->slices--) {
        const int32_t warps = 4 * plan->row_groups * plan->slices;
        const int32_t ring_bytes = warps * QF_WB_DEPTH * qf_wb_unit_bytes(bits);
        const int32_t stage_bytes = plan->slices * block_bytes;
        const int32_t wanted = qf_wb_ceil_div(share, plan->slices);
        int32_t fit = (device->max_shared_bytes - QF_WB_BARRIER_BYTES - ring_bytes) / stage_bytes;
        fit = fit < QF_WB_MAX_STAGES ? fit : QF_WB_MAX_STAGES;
        plan->stages = wanted < fit ? wanted : fit;
        plan->weight_offset = QF_WB_BARRIER_BYTES + plan->stages * stage_bytes;
        plan->shared_bytes = plan->weight_offset + ring_bytes;
        const int32_t slot_bytes = (plan->slices - 1) * plan->row_groups * tokens * 256;
        if (plan->shared_bytes < QF_WB_BARRIER_BYTES + slot_bytes) {
            plan->shared_bytes = QF_WB_BARRIER_BYTES + slot_bytes;
        }
        if ((plan->stages == wanted || plan->stages >= 6) && plan->shared_bytes <= device->max_shared_bytes) {
            return true;
        }
    }
    return false;
}

/* The first block of a share of k; of num_splits, the end. */
static int32_t qf_wb_share_begin(const qf_wb_plan *plan, int32_t blocks, int32_t num_splits, int32_t share)
{
    if (plan->rows == 0) {
        return (int32_t)((int64_t)share * blocks / num_splits);
    }
    const int32_t wide = plan->wide_shares;
    return share <= wide ? share * plan->wide_blocks / wide
                         : plan->wide_blocks +
                               (share - wide) * (blocks - plan->wide_blocks) / (num_splits - wide);
}

/* Sets the stages of x; false if they do not fit. */
static bool qf_wr_plan_fit(const qf_cuda_device *device, int32_t num_tokens, int32_t share, qf_wb_plan *plan)
{
    const int32_t block_bytes = qf_cuda_num_tiles(num_tokens) * 2048, wanted = share / QF_WR_SLICES + QF_WR_SLICES - 1;
    const int32_t ring_bytes = qf_wr_ring_bytes(plan->rows), sums_bytes = qf_wr_sums_bytes(plan->rows);
    int32_t fit = (device->max_shared_bytes - QF_WR_BARRIER_BYTES - ring_bytes) / (QF_WR_SLICES * block_bytes);
    fit = fit < QF_WR_MAX_STAGES ? fit : QF_WR_MAX_STAGES;
    plan->stages = wanted < fit ? wanted : fit;
    plan->weight_offset = QF_WR_BARRIER_BYTES + plan->stages * QF_WR_SLICES * block_bytes;
    plan->shared_bytes = plan->weight_offset + ring_bytes;
    if (plan->shared_bytes < QF_WR_BARRIER_BYTES + sums_bytes) {
        plan->shared_bytes = QF_WR_BARRIER_BYTES + sums_bytes;
    }
    return (plan->stages == wanted || plan->stages >= 3) && plan->shared_bytes <= device->max_shared_bytes;
}

/* The kernel of linear_wgmma_rows.cuh with `rows` and `wide_shares`, all CTAs at once. False if it cannot. */
static bool qf_wr_plan_make(const qf_cuda_device *device, int32_t row_tiles, int32_t blocks, int32_t num_tokens,
                            int32_t num_splits, int32_t rows, int32_t wide_shares, qf_wb_plan *plan)
{
    const int32_t narrow_shares = num_splits - wide_shares, narrow = rows - 1;
    if (blocks / num_splits < 9) {
        return false; /* short shares are better the other kernel's */
    }
    plan->rows = rows;
    plan->wide_shares = wide_shares;
    plan->narrow_shares = narrow_shares;
    plan->wide_ctas = qf_wb_ceil_div(row_tiles, 4 * rows);
    plan->narrow_ctas = narrow_shares > 0 ? qf_wb_ceil_div(row_tiles, 4 * narrow) : 0;
    plan->wide_blocks = blocks;
    if (narrow_shares > 0) { /* rows x blocks the same for all */
        const int32_t weight = wide_shares * narrow, all = weight + narrow_shares * rows;
        plan->wide_blocks = (2 * blocks * weight + all) / (2 * all);
    } else if (plan->wide_ctas < device->sm_count / num_splits) { /* fewer tiles each, where that leaves `rows` */
        plan->wide_ctas = device->sm_count / num_splits;
        if (qf_wb_ceil_div(row_tiles, plan->wide_ctas) <= 4 * narrow) {
            return false;
        }
    }
    plan->wide_ctas = qf_wb_ceil_div(row_tiles, qf_wb_ceil_div(row_tiles, plan->wide_ctas)); /* none without tiles */
    if (narrow_shares > 0) {
        plan->narrow_ctas = qf_wb_ceil_div(row_tiles, qf_wb_ceil_div(row_tiles, plan->narrow_ctas));
    }
    if (plan->wide_blocks < wide_shares || blocks - plan->wide_blocks < narrow_shares ||
        plan->wide_ctas * wide_shares + plan->narrow_ctas * narrow_shares > device->sm_count) {
        return false;
    }
    int32_t most = 0, share = 0, tile_blocks = 0; /* of a warpgroup, in units; of a CTA */
    for (int32_t s = 0; s < num_splits; s++) {
        const int32_t begin = qf_wb_share_begin(plan, blocks, num_splits, s);
        const int32_t count = qf_wb_share_begin(plan, blocks, num_splits, s + 1) - begin;
        const int32_t units = qf_wb_ceil_div(count * (s < wide_shares ? rows : narrow), QF_WR_SLICES);
        const int32_t tiles = qf_wb_ceil_div(row_tiles, s < wide_shares ? plan->wide_ctas : plan->narrow_ctas);
        most = units > most ? units : most;
        share = count > share ? count : share;
        tile_blocks = tiles * count > tile_blocks ? tiles * count : tile_blocks;
    }
    plan->cost_us = 2.5 + fmax(most * 0.42, tile_blocks * 1088 / 31.5e3) +
                    share * qf_cuda_num_tiles(num_tokens) * 0.022 +
                    num_splits * (0.06 + 1.0 * num_tokens * row_tiles * 64 / 3e6);
    return qf_wr_plan_fit(device, num_tokens, share, plan);
}

/* False if it does not fit shared memory. */
static bool qf_wb_plan_make(const qf_cuda_device *device, int32_t row_tiles, int32_t blocks, int32_t bits,
                            int32_t num_tokens, int32_t num_splits, qf_wb_plan *plan)
{
    const int32_t tokens = num_tokens <= 32 ? 32 : 64, most = qf_wb_max_groups(tokens);
    const int32_t share = qf_wb_ceil_div(blocks, num_splits);
    const int32_t ctas = device->sm_count > num_splits ? device->sm_count / num_splits : 1;
    const int32_t waves = qf_wb_ceil_div(row_tiles, ctas * most * 8);
    plan->cta_tiles = qf_wb_ceil_div(row_tiles, ctas * waves);
    plan->grid_rows = qf_wb_ceil_div(row_tiles, plan->cta_tiles);
    const int32_t groups = qf_wb_ceil_div(plan->cta_tiles, 4);
    plan->row_groups = groups <= most ? groups : groups <= 6 ? 3 : most; /* 2, 2, 1 ends before 2, 1, 1, 1 */
    plan->slices = most / plan->row_groups < share ? most / plan->row_groups : share;
    plan->rows = 0;
    bool fits = qf_wb_plan_fit(device, bits, num_tokens, share, plan);
    if (fits) {
        plan->cost_us = qf_wb_cost_us(plan, bits, num_tokens, row_tiles, share, num_splits, waves);
    }
    for (int32_t rows = 4; rows <= 5 && bits == 4 && tokens == 32; rows++) {
        for (int32_t wide_shares = num_splits; wide_shares > 0; wide_shares--) {
            qf_wb_plan other;
            if (qf_wr_plan_make(device, row_tiles, blocks, num_tokens, num_splits, rows, wide_shares, &other) &&
                (!fits || other.cost_us < plan->cost_us)) {
                *plan = other;
                fits = true;
            }
        }
    }
    return fits;
}

extern "C" int32_t qf_cuda_linear_wgmma_batch_splits(const qf_cuda_device *device, int32_t n, int32_t k,
                                                     int32_t bits, int32_t num_tokens, qf_cuda_epilogue epilogue)
{
    int32_t best = 1;
    double best_us = 0;
    for (int32_t splits = 1; splits <= QF_CUDA_MAX_SPLITS && splits <= k / 128; splits++) {
        qf_wb_plan plan;
        if (epilogue == QF_CUDA_SILU_MUL && splits > 1) {
            break;
        }
        if (qf_wb_plan_make(device, n / 16, k / 128, bits, num_tokens, splits, &plan) &&
            (best_us == 0 || plan.cost_us < best_us)) {
            best = splits;
            best_us = plan.cost_us;
        }
    }
    return best;
}

static qf_wb_kernel qf_wb_kernel_of(int32_t bits, int32_t num_tokens)
{
    if (bits == 8) {
        return num_tokens <= 32 ? qf_linear_wgmma_batch_kernel<8, 32> : qf_linear_wgmma_batch_kernel<8, 64>;
    }
    return num_tokens <= 32 ? qf_linear_wgmma_batch_kernel<4, 32> : qf_linear_wgmma_batch_kernel<4, 64>;
}

/* --- launcher ----------------------------------------------------------------------------------------------------- */

static qf_status qf_wb_check(const qf_cuda_linear_args *args, const qf_cuda_device *device, qf_error *err)
{
    const qf_cuda_weight *w = &args->weight;
    if (!device->hopper) {
        return QF_FAIL(err, QF_ERROR_BACKEND, "linear_wgmma_batch: compute capability %d has no wgmma; it needs sm_90a",
                       device->compute_capability);
    }
    if ((w->bits != 4 && w->bits != 8) || w->group_size != 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_wgmma_batch: %d bits in groups of %d; need 4 or 8, and 128",
                       w->bits, w->group_size);
    }
    if (w->n < 16 || w->n % 16 != 0 || w->k < 128 || w->k % 128 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_wgmma_batch: n = %d, k = %d; need multiples of 16 and 128",
                       w->n, w->k);
    }
    if (args->num_tokens < 5 || args->num_tokens > 64 || args->batch_invariant) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_wgmma_batch: %d tokens%s; need 5 to 64, in any order of sums",
                       args->num_tokens, args->batch_invariant ? ", batch-invariant" : "");
    }
    if (args->epilogue != QF_CUDA_STORE && args->epilogue != QF_CUDA_SILU_MUL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma_batch: unknown epilogue %d", (int)args->epilogue);
    }
    int32_t most = args->epilogue == QF_CUDA_SILU_MUL ? 1 : QF_CUDA_MAX_SPLITS;
    most = most < w->k / 128 ? most : w->k / 128;
    if (args->num_splits < 1 || args->num_splits > most) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_wgmma_batch: num_splits %d; 1 to %d for k = %d and this epilogue", args->num_splits,
                       most, w->k);
    }
    const void *output = args->epilogue == QF_CUDA_STORE ? (const void *)args->out : (const void *)args->act;
    if (w->data == NULL || w->scales == NULL || args->x == NULL || output == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_wgmma_batch: null pointer: data %p, scales %p, x %p, output %p", w->data,
                       (const void *)w->scales, (const void *)args->x, output);
    }
    if (((uintptr_t)w->data | (uintptr_t)w->scales | (uintptr_t)args->x) % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_wgmma_batch: data %p, scales %p and x %p have to be aligned to 16 bytes", w->data,
                       (const void *)w->scales, (const void *)args->x);
    }
    return QF_OK;
}

/* As in linear_mma.cu: the same settings for every launch, and SMs need not run empty between kernels. */
template <typename Params>
static qf_status qf_wb_allow(void (*kernel)(Params), const qf_cuda_device *device, qf_error *err)
{
    QF_CUDA_TRY(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));
    return qf_allow_shared("linear_wgmma_batch", kernel, (size_t)device->max_shared_bytes, err);
}

static qf_status qf_wr_start(const qf_wb_plan *plan, const qf_linear_mma_params *p, const qf_cuda_device *device,
                             cudaStream_t stream, qf_error *err)
{
    qf_wr_params params = {};
    params.p = *p;
    params.kinds[0].ctas = plan->wide_ctas;
    params.kinds[0].cta_tiles = qf_wb_ceil_div(p->row_tiles, plan->wide_ctas);
    params.first_narrow = plan->wide_ctas * plan->wide_shares;
    int32_t ctas = params.first_narrow;
    if (plan->narrow_ctas > 0) {
        params.kinds[1].ctas = plan->narrow_ctas;
        params.kinds[1].cta_tiles = qf_wb_ceil_div(p->row_tiles, plan->narrow_ctas);
        params.kinds[1].first_share = plan->wide_shares;
        ctas += plan->narrow_ctas * plan->narrow_shares;
    }
    params.stages = plan->stages;
    params.block_bytes = (uint32_t)p->num_tiles * 2048;
    params.weight_offset = plan->weight_offset;
    void (*kernel)(qf_wr_params) = plan->rows == 5 ? qf_linear_wgmma_rows_kernel<5> : qf_linear_wgmma_rows_kernel<4>;
    QF_TRY(qf_wb_allow(kernel, device, err));
    return qf_launch("linear_wgmma_batch", kernel, dim3(ctas), dim3(QF_WR_THREADS), (size_t)plan->shared_bytes,
                     device->dependent_launch, stream, err, params);
}

extern "C" qf_status qf_cuda_linear_wgmma_batch(const qf_cuda_linear_args *args, const qf_cuda_device *device,
                                                cudaStream_t stream, qf_error *err)
{
    QF_TRY(qf_wb_check(args, device, err));
    const qf_cuda_weight *w = &args->weight;
    qf_wb_params params = {};
    qf_linear_mma_params *p = &params.p;
    qf_wb_plan plan;
    p->row_tiles = p->act_tiles = w->n / 16;
    p->blocks = w->k / 128;
    if (!qf_wb_plan_make(device, p->row_tiles, p->blocks, w->bits, args->num_tokens, args->num_splits, &plan)) {
        return QF_FAIL(err, QF_ERROR_BACKEND,
                       "linear_wgmma_batch: n = %d, k = %d, %d tokens: %d bytes of shared memory are too few", w->n,
                       w->k, args->num_tokens, device->max_shared_bytes);
    }
    p->data = (const uint8_t *)w->data;
    p->scales = w->scales;
    p->bias = w->bias;
    p->x = (const uint8_t *)args->x;
    p->multiplier = w->scale_multiplier;
    p->num_tokens = args->num_tokens;
    p->num_tiles = qf_cuda_num_tiles(args->num_tokens);
    for (int32_t s = 0; s <= args->num_splits; s++) {
        p->share_begin[s] = qf_wb_share_begin(&plan, p->blocks, args->num_splits, s);
    }
    if (args->epilogue == QF_CUDA_SILU_MUL) {
        p->act = (uint32_t *)args->act;
        p->act_tiles = (w->n / 2 + 127) / 128 * 16;
    } else {
        p->out = args->out;
    }
    if (plan.rows > 0) {
        return qf_wr_start(&plan, p, device, stream, err);
    }
    params.cta_tiles = plan.cta_tiles;
    params.row_groups = plan.row_groups;
    params.slices = plan.slices;
    params.stages = plan.stages;
    params.block_bytes = (uint32_t)p->num_tiles * 2048;
    params.stage_bytes = (uint32_t)plan.slices * params.block_bytes;
    params.weight_offset = plan.weight_offset;
    qf_wb_kernel kernel = qf_wb_kernel_of(w->bits, args->num_tokens);
    QF_TRY(qf_wb_allow(kernel, device, err));
    return qf_launch("linear_wgmma_batch", kernel, dim3(plan.grid_rows, args->num_splits),
                     dim3(128 * plan.row_groups * plan.slices), (size_t)plan.shared_bytes, device->dependent_launch,
                     stream, err, params);
}
