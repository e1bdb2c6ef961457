/* out = x W^T + bias by wgmma for a few tokens, 5 to 64: weights of 4 and 8 bits in groups of 128; sm_90a.
 *
 * Layouts: qf_kernels.h. As in linear_wgmma.cu weights are the A operand, unpacked in registers, and x is the B
 * operand, in shared memory as it stands in device memory; two sizes, of 32 and 64 tokens.
 *
 * Roofline, H200: n k bits / 8 bytes at 4.4 TB/s: a unit of 16 rows x 128 k is 1,088 bytes at 4 bits, 65 clocks of an
 * SM. At 4 bits it takes about 95 clocks with 32 tokens (where all rows are a warpgroup's; else 115) and 130 with 64,
 * whatever the share of memory: eight wgmma of 64 rows for 4 units, so each takes 47 to 67, where the tensor cores need
 * 16 and 32. A unit is about 180 instructions of a warp. At 8 bits, 2,112 bytes, memory is the bound. Target: 0.8 of the
 * bandwidth at 8 bits, 0.6 at 4.
 *
 * Plan. Grid (row groups, num_splits), a CTA per SM, of up to 4 warpgroups (64 tokens: 3).
 *
 *     row tiles of the CTA    blocks of its share of k     A warpgroup has 4 row tiles, or 8 where there are more, in
 *       0 ..  3  warpgroup 0   0 1 2 3 4 ..                turns; where rows are few, several have the same ones and
 *       4 ..  7  warpgroup 1   0 1 2 3 4 ..                every slices-th block each, and their sums are added in
 *       8 .. 11  warpgroup 2   0 1 2 3 4 ..                order at the end.
 *      12 .. 15  warpgroup 0   0 1 2 3 4 ..
 *
 *   13 to 20 row tiles of 4 bits are no even work for 3 or 4 warpgroups: up to 32 tokens, 3 have them all ("all rows", 4
 *   or 5 row tiles a warp in turns) and every third block each, with more registers for each.
 *
 *   Each warp brings its own units by cp.async to a ring of 4 of its own, so that weights need no barrier; a
 *   ring in registers would not be one: the compiler counts all its loads with one scoreboard, and the oldest is then
 *   waited for together with the newest. x passes through a ring of stages that all warps share, as much as there is
 *   room for, filled by bulk copies of the first thread: 3 stages behind its own work, so that it seldom waits for the
 *   others. While a half of a unit is multiplied the next is unpacked; waits are filled by the other warpgroups.
 *
 * Arithmetic: q - zero (or a quarter, or a 64th of it) is exact in bf16; the products of a unit, a scale group, are
 * summed in their own float32 accumulator, which is then scaled and added. So the error is that of float32.
 *
 * Measured, H200, 2026-11-23, cold L2, us of this kernel | the one that was taken before, best shares of k:
 *
 *     n x k         bits |   16 tokens       32 tokens       64 tokens
 *     37888 x 3584     4 |  27.3 | 31.4     27.9 | 47.9     39.8 | 55.6
 *                      8 |  37.6 | 53.5     37.1 | 50.4     42.6 | 62.4
 *     3584 x 18944     4 |  16.2 | 18.9     16.6 | 24.6     25.0 | 25.9
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
 * which took 32.6 us for gate_up. */
#include "linear_wgmma_batch.cuh"

typedef void (*qf_wb_kernel)(qf_wb_params);

typedef struct qf_wb_plan {
    int32_t cta_tiles, row_groups, slices, stages;
    int32_t grid_rows, weight_offset, shared_bytes;
    int32_t all_rows; /* each warpgroup has all row tiles of the CTA, so many a warp; or 0 */
    double cost_us;
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
    const double one_us = plan->all_rows > 0 ? 0.165 : block_us[num_tokens > 32][groups - 1];
    const double busy_us = qf_wb_ceil_div(plan->cta_tiles, 4) * share * one_us;
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
        const int32_t slot_bytes = (plan->slices - 1) * plan->row_groups * tokens * 256 *
                                   (plan->all_rows > 0 ? plan->all_rows : 1);
        if (plan->shared_bytes < QF_WB_BARRIER_BYTES + slot_bytes) {
            plan->shared_bytes = QF_WB_BARRIER_BYTES + slot_bytes;
        }
        if ((plan->stages == wanted || plan->stages >= 6) && plan->shared_bytes <= device->max_shared_bytes) {
            return true;
        }
    }
    return false;
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
    plan->all_rows = 0;
    bool fits = qf_wb_plan_fit(device, bits, num_tokens, share, plan);
    if (fits) {
        plan->cost_us = qf_wb_cost_us(plan, bits, num_tokens, row_tiles, share, num_splits, waves);
    }
    if (bits == 4 && tokens == 32 && (groups == 4 || groups == 5) && share >= 9) {
        qf_wb_plan all = *plan;
        all.row_groups = 1;
        all.slices = 3;
        all.all_rows = groups;
        if (qf_wb_plan_fit(device, bits, num_tokens, share, &all)) {
            all.cost_us = qf_wb_cost_us(&all, bits, num_tokens, row_tiles, share, num_splits, waves);
            if (!fits || all.cost_us < plan->cost_us) {
                *plan = all;
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

static qf_wb_kernel qf_wb_kernel_of(int32_t bits, int32_t num_tokens, int32_t all_rows)
{
    if (bits == 8) {
        return num_tokens <= 32 ? qf_linear_wgmma_batch_kernel<8, 32, 0> : qf_linear_wgmma_batch_kernel<8, 64, 0>;
    }
    return num_tokens > 32 ? qf_linear_wgmma_batch_kernel<4, 64, 0>
           : all_rows == 5 ? qf_linear_wgmma_batch_kernel<4, 32, 5>
           : all_rows == 4 ? qf_linear_wgmma_batch_kernel<4, 32, 4>
                           : qf_linear_wgmma_batch_kernel<4, 32, 0>;
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
        p->share_begin[s] = (int32_t)((int64_t)s * p->blocks / args->num_splits);
    }
    if (args->epilogue == QF_CUDA_SILU_MUL) {
        p->act = (uint32_t *)args->act;
        p->act_tiles = (w->n / 2 + 127) / 128 * 16;
    } else {
        p->out = args->out;
    }
    params.cta_tiles = plan.cta_tiles;
    params.row_groups = plan.row_groups;
    params.slices = plan.slices;
    params.stages = plan.stages;
    params.block_bytes = (uint32_t)p->num_tiles * 2048;
    params.stage_bytes = (uint32_t)plan.slices * params.block_bytes;
    params.weight_offset = plan.weight_offset;
    qf_wb_kernel kernel = qf_wb_kernel_of(w->bits, args->num_tokens, plan.all_rows);
    /* As in linear_mma.cu: the same settings for every launch, and SMs need not run empty between kernels. */
    QF_CUDA_TRY(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));
    QF_TRY(qf_allow_shared("linear_wgmma_batch", kernel, (size_t)device->max_shared_bytes, err));
    return qf_launch("linear_wgmma_batch", kernel, dim3(plan.grid_rows, args->num_splits),
                     dim3(128 * plan.row_groups * plan.slices), (size_t)plan.shared_bytes, device->dependent_launch,
                     stream, err, params);
}
