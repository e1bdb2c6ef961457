/* Plans of linear_mma.cu: which kernel, how the work is cut. Host only. */
#ifndef QF_LINEAR_MMA_PLAN_CUH
#define QF_LINEAR_MMA_PLAN_CUH

#include "linear_mma_batch.cuh"
#include "linear_mma_stream_ring.cuh"
#include "linear_mma_tile.cuh"

typedef struct qf_stream_plan {
    int32_t row_groups, warps, ctas_per_sm;
    int32_t table_offset, norm_offset, slot_offset, ring_offset, shared_bytes;
    bool ring; /* weights in flight to shared memory */
    bool resident; /* all CTAs are on the device at once */
} qf_stream_plan;

typedef struct qf_batch_plan {
    int32_t row_groups, row_warps, slices, passes; /* a CTA has row_warps * slices warps */
    int32_t chunk_blocks, slot_offset, shared_bytes;
    bool resident;
    double cost_us; /* an estimate, to compare num_splits by */
} qf_batch_plan;

typedef struct qf_tile_plan {
    int32_t tokens, token_warps, row_warps; /* token tiles of a warp; warps along tokens and along rows */
    int32_t passes, row_groups, shared_bytes;
    double cost_us;
} qf_tile_plan;

static int32_t qf_ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

/* Warps of a stream CTA that is alone on its SM. Long runs want more than the 12 that leave room for the next kernel;
 * 8 where 12 would not shorten a warp's run (nor the end's). */
static int32_t qf_stream_warps(double kilobytes, int32_t pieces, int32_t tiles, int32_t num_tokens, int32_t num_splits)
{
    if (kilobytes >= 128) {
        return 24;
    }
    if (kilobytes >= 80 && (num_tokens > 4 || num_splits == 1)) {
        return 16;
    }
    const bool shorter = qf_ceil_div(pieces, 12) < qf_ceil_div(pieces, 8);
    return shorter || tiles * qf_cuda_tile_tokens(num_tokens) > 16 ? 12 : 8;
}

static bool qf_stream_fits(const qf_cuda_device *device, const qf_stream_plan *plan)
{
    return plan->shared_bytes * plan->ctas_per_sm + 1024 * (plan->ctas_per_sm - 1) <= device->max_shared_bytes;
}

/* Puts the warps' rings behind the rest of a plan where they pay, if there is room. */
static void qf_stream_plan_ring(const qf_cuda_device *device, int32_t bits, int32_t group_size, int32_t num_tokens,
                                qf_stream_plan *plan)
{
    if (!device->hopper || bits != 4 || num_tokens > 4) {
        return;
    }
    qf_stream_plan with = *plan;
    with.ring_offset = (plan->shared_bytes + 127) / 128 * 128;
    with.shared_bytes = with.ring_offset + plan->warps * QF_STREAM_RING_DEPTH * qf_stream_slot_bytes(128 / group_size);
    with.ring = true;
    if (qf_stream_fits(device, &with)) {
        *plan = with;
    }
}

/* False if it does not fit shared memory. adds: the norm behind the layer is made in it. */
static bool qf_stream_plan_make(const qf_cuda_device *device, int32_t row_tiles, int32_t blocks, int32_t bits,
                                int32_t num_tokens, int32_t num_splits, bool adds, qf_stream_plan *plan)
{
    const double kilobytes = (double)row_tiles * blocks * (bits / 4) / device->sm_count; /* of weights an SM */
    const int32_t share = qf_ceil_div(blocks, num_splits);
    /* Behind x 16 bytes of zeros, a barrier, and one token's sums of blocks. */
    plan->table_offset = (share * (256 * qf_cuda_tile_tokens(num_tokens) + 4) + 32 + 127) / 128 * 128;
    const bool two = kilobytes >= 128 && bits == 4 && num_tokens <= 4 &&
                     2 * plan->table_offset <= device->max_shared_bytes * 3 / 4;
    plan->ctas_per_sm = two ? 2 : 1;
    plan->ring = false;
    plan->ring_offset = 0;
    for (int32_t waves = 1; waves <= 16; waves *= 2) {
        int32_t groups = device->sm_count * plan->ctas_per_sm * waves / num_splits;
        plan->row_groups = groups < 1 ? 1 : groups < row_tiles ? groups : row_tiles;
        int32_t tiles = qf_ceil_div(row_tiles, plan->row_groups), pieces = tiles * share * (bits / 4);
        plan->warps = two ? 12 : qf_stream_warps(kilobytes, pieces, tiles, num_tokens, num_splits);
        const int32_t table_bytes = (row_tiles / plan->row_groups + 1) * 68;
        plan->norm_offset = (plan->table_offset + table_bytes + 15) / 16 * 16;
        plan->slot_offset = (plan->norm_offset + qf_stream_norm_bytes(tiles, num_tokens, adds) + 127) / 128 * 128;
        plan->resident = waves == 1;
        const int32_t bytes = (tiles + plan->warps) * num_tokens * QF_STREAM_TOKEN_STRIDE * 4;
        plan->shared_bytes = plan->slot_offset + bytes;
        if (qf_stream_fits(device, plan)) {
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
        const int32_t slot_bytes = (plan->slices - 1) * plan->row_warps * qf_batch_slot_bytes(tokens, rows);
        const int32_t chunks = qf_ceil_div(share, plan->chunk_blocks);
        const int32_t chunk_bytes = plan->chunk_blocks * qf_batch_x_bytes(num_tiles);
        plan->resident = (tokens == 2 || plan->passes > 1) && chunks <= QF_BATCH_MAX_CHUNKS &&
                         chunks * chunk_bytes + slot_bytes + 256 <= device->max_shared_bytes;
        plan->slot_offset = (plan->resident ? chunks : QF_BATCH_STAGES) * chunk_bytes;
        plan->shared_bytes = QF_BATCH_MAX_CHUNKS * 8 + plan->slot_offset + slot_bytes;
        if (plan->shared_bytes <= device->max_shared_bytes) {
            const double kilobytes = (double)plan->passes * plan->row_warps * rows * share * (bits / 4);
            const double x_kilobytes = (double)plan->passes * share * num_tiles * 2;
            /* An SM's weights come at 30 GB/s, with x from L2 at 45, x to start with at 50. A warp's piece takes 0.35
             * us at best, one that has to be unpacked 0.8. */
            const double turns = (double)plan->passes * qf_ceil_div(share, plan->slices) * (bits / 4);
            const double memory_us = kilobytes * 0.033, l2_us = (kilobytes + x_kilobytes) * 0.022;
            const double busy_us = memory_us > l2_us ? memory_us : l2_us;
            const double latency_us = (bits == 16 ? 0.35 : 0.8 * rows) * turns;
            const double start_us = 0.02 * share * num_tiles * 2;
            plan->cost_us = start_us + (busy_us > latency_us ? busy_us : latency_us) +
                            num_splits * (0.06 + 1.0 * num_tokens * row_tiles * 64 / 3e6);
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

/* Shares for the stream kernel. Rows enough to keep every SM busy need none; nor do those of nearly a whole number of
 * row tiles an SM. Else 4: shorter runs over k mean less x to wait for; but 2 where writing and adding that many
 * partial sums costs more than that saves; and more for a long k, whose x would leave no room for a second CTA or at
 * all. (Measured best or within 4 % of it on 0.5B and 7B shapes.) */
static int32_t qf_stream_splits(const qf_cuda_device *device, int32_t row_tiles, int32_t blocks, int32_t bits,
                                int32_t num_tokens)
{
    const int32_t sms = device->sm_count, full = qf_ceil_div(row_tiles, sms) * sms;
    const bool even = row_tiles >= sms && bits <= 8 && blocks <= 40 && 5 * full <= 6 * row_tiles;
    const int32_t usual = row_tiles * num_tokens > 1024 ? 2 : 4;
    const int32_t longest = qf_ceil_div(blocks, bits == 4 && num_tokens <= 4 ? 20 : 40);
    int32_t splits = row_tiles >= 8 * sms || even ? 1 : usual > longest ? usual : longest;
    int32_t limit = blocks < QF_CUDA_MAX_SPLITS ? blocks : QF_CUDA_MAX_SPLITS;
    qf_stream_plan plan;
    splits = splits < limit ? splits : limit;
    while (splits < limit &&
           !qf_stream_plan_make(device, row_tiles, blocks, bits, num_tokens, splits, false, &plan)) {
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
    if (!batch_invariant && num_tokens <= QF_BATCH_MAX_TOKENS && row_tiles >= 8 * device->sm_count) {
        return 1; /* rows enough, and many sums */
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

#endif
