/* out = x W^T + bias by wgmma, weights of 4, 8 and 16 bits; sm_90a.
 *
 * Layouts: qf_kernels.h. D^T = W x: the weights are the A operand, taken from registers, where a warp's fragment of a
 * wgmma.m64nNk16 is that of an mma.m16n8k16; x is the B operand, taken from shared memory, where its tiles are core
 * matrices as they stand in device memory. So nothing is transposed, and weights are unpacked in registers.
 *
 * Roofline, H200. FLOPs 2 n k m at 770 TFLOP/s measured; bytes n k bits / 8 at 4.4 TB/s: 4 bits are bound by memory
 * below about 44 tokens, 16 bits below 175. Between L2 and the SMs a tile of 128 rows x N tokens moves
 * 16 bits + 2 N / cluster bytes for 256 N FLOPs of a k. Targets: 600 TFLOP/s from 2,048 tokens on; 60 % of the
 * bandwidth at 16 to 64 tokens.
 *
 * Plan. A block computes 128 rows x N tokens (N = 8 .. 256) of one share of k, or 192 rows x 128 tokens with three
 * warpgroups of consumers; two blocks with adjacent rows form a cluster (N >= 32) and share the tokens.
 *
 *                      tokens (N)                   warp 8       copies x: half of it for both blocks, a ring of
 *                   +--------------+                             stages ahead of the consumers
 *     row tile 0    | warp 0       |  warpgroup 0   warps 0..7   fetch their own 16 rows of weights and scales a ring
 *     ...           | ...          |                             ahead (cp.async), unpack some k to bf16 while the k
 *     row tile 3    | warp 3       |                             before are multiplied, start wgmma, release x
 *     row tile 4    | warp 4       |  warpgroup 1
 *     ...           | ...          |                stage        64 or 128 k: [x][weights and scales of each warp], a
 *     row tile 7    | warp 7       |                             full barrier (bytes of x) and an empty one (warps of
 *                   +--------------+                             the cluster); in wide tiles a pair for each 64 k
 *
 * A tile of fewer than 8 tokens is spread to core matrices by the copies. Weights are made in bf16: 8 bits as
 * bf16(scale (q - zero)); 4 bits, in one operation less, as bf16(q scale - bf16(zero scale)), which is the same
 * where zero is a power of two (8) and else off by 2^-9 of zero scale more. scale is rounded to bf16 first;
 * scale_multiplier is in the epilogue. N <= 64 has two or three blocks an SM, so that one's prologue and epilogue
 * hide behind another's work; N >= 128 has one, and its blocks take tiles in turn while the copies run ahead into
 * the next. Sums run over k in ascending order in one accumulator, whatever N is. N = 232 is there for 2,048 tokens:
 * 14 row groups (n = 3,584) make 126 tiles for 66 clusters, two rounds of 232 tokens where N = 256 makes two of 256.
 * 192 rows are there for rounds too: 37,888 rows x 256 tokens are 396 tiles of 192 x 128, three rounds of 132, where
 * 128 x 256 makes 296, three rounds of twice that.
 *
 * At N = 128 the loop is bound by the instructions around wgmma, not by unpacking: 4 bits with the words fed to
 * wgmma as they are took as long. 64 k of 128 x 128 take 423 ns (632 with 230 instructions a warp for each, half of
 * them addresses and waits; 128 k an iteration take 120), 192 x 128 take 584.
 *
 * Tried and lost:
 *   - Fewer registers by no setmaxnreg and one warp of copies: registers are granted by quarter SM, so that 9 warps
 *     have 168 each as 12 have, and two blocks of 9 warps 96.
 *   - Bulk copies of weights and scales by the producer. A bulk copy takes uniform registers, so the lanes' copies of
 *     17 pieces a stage went one after the other, about 100 cycles each: 1,650 cycles for 64 k of 4 bits, where the
 *     tensor cores need 1,024 at N = 256 and the bandwidth 260 at N = 8. At 16 bits the kernel with bulk copies took 10
 *     to 23 % longer where N = 128 is best, and at N = 256 between 22 % longer (k = 896) and 12 % less (k = 18,944); a
 *     7B layer's four linears took 4 % less at 8,192 tokens, 2 % less at 2,048, as long at 512, longer below.
 *   - 64 k unpacked behind four wgmma in a row in wide tiles: their times added up (about 1,450 cycles for 64 k of 4
 *     bits at N = 256, 1,220 at N = 128). Warpgroups that took turns did not help.
 *   - An earlier loop of the wide tiles, and its stages of 64 k, at N = 64: 26 % slower at 4 bits, 13 at 8, 4 at 16.
 *   - Divisions with a branch each in the epilogue, which run one after the other.
 *
 * Measured, H200, 2026-11-22, cold L2: us of the best tile and shares of k, and % of the larger of bytes / 4.4 TB/s and
 * FLOPs / 770 TFLOP/s. The table of times below chooses these, or within 8 %; 8 bits of 2,048 tokens were not measured.
 *
 *     n x k           bits |  64 tokens        128        256        512       2,048
 *     37888 x 3584       4 |    55.0 41%    70.4 64%   105.6 86%   190.5 95%   679.6 106%
 *     (SILU_MUL)         8 |    62.2 51%    76.5 59%   115.4 78%   195.5 92%
 *                       16 |    77.6 80%    79.2 78%   112.0 81%   199.1 91%   712.5 101%
 *     3584 x 18944       4 |    24.9 45%    34.6 65%    54.2 83%   100.2 90%   356.9 101%
 *                        8 |    28.5 56%    39.1 58%    54.0 84%   107.5 84%
 *                       16 |    40.7 76%    43.4 71%    57.9 78%   110.2 82%   386.8 93%
 *     4608 x 3584        4 |     8.9 31%    13.4 41%    21.2 52%    34.3 64%    98.3 89%
 *                        8 |    10.7 36%    13.9 40%    22.0 50%    33.3 66%
 *                       16 |    12.3 61%    14.7 51%    20.4 54%    33.8 65%    97.9 90%
 *     3584 x 3584        4 |     8.0 27%    10.1 42%    15.4 55%    23.7 72%    72.8 94%
 *                        8 |     9.1 33%    10.9 39%    15.5 55%    23.9 71%
 *                       16 |    10.6 55%    11.7 50%    15.9 54%    24.0 71%    76.5 89%
 *
 * A 7B layer's four linears: 4 bits 97, 129, 196, 349, 1,208 us; 16 bits 141, 149, 206, 367, 1,274; with 8,192 tokens
 * 5,834 and 5,510 before the loop of wide tiles was made shorter. cuBLAS, 16 bits: 126, 130, 180, 324 us up to 512. */
#include "linear_wgmma_tile.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define QF_WG_CLUSTER(size)
#else
#define QF_WG_CLUSTER(size) __cluster_dims__(size, 1, 1)
#endif

template <typename shape>
static __global__ void __launch_bounds__(shape::threads, shape::blocks_per_sm)
    QF_WG_CLUSTER(shape::cluster) qf_linear_wgmma_kernel(const __grid_constant__ qf_wg_params p)
{
#ifdef QF_SM90A
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t full[shape::stages * shape::parts], empty[shape::stages * shape::parts];

    const int rank = shape::cluster > 1 ? (int)qf_cluster_rank() : 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < shape::stages * shape::parts; i++) {
            qf_mbarrier_init(&full[i], 1);
            qf_mbarrier_init(&empty[i], shape::row_tiles * shape::cluster);
        }
        qf_mbarrier_init_fence();
    }
    qf_grid_launch_dependents();
    if (shape::cluster > 1) {
        qf_cluster_sync();
    } else {
        __syncthreads();
    }

    const int first_unit = blockIdx.x / shape::cluster, unit_step = gridDim.x / shape::cluster;
    if (threadIdx.x >= 32 * shape::row_tiles) {
        if constexpr (shape::shares_registers) {
            qf_release_registers<shape::producer_registers>();
        }
        if (threadIdx.x < 32 * shape::row_tiles + 32) {
            qf_wg_produce<shape>(p, shared, full, empty, rank, first_unit, unit_step);
        }
    } else {
        if constexpr (shape::shares_registers) {
            qf_take_registers<shape::consumer_registers>();
        }
        qf_wg_feed<shape> feed;
        feed.set(p, shared, first_unit, rank);
#pragma unroll 1
        for (int i = 0; i < shape::stages; i++) {
            feed.fetch(i);
        }
        qf_grid_dependency_wait();
        const qf_wg_place at = qf_wg_place_get<shape>(shared, full, empty);
        int stage = 0;
        uint32_t phase = 0;
        for (int unit = first_unit; unit < p.units; unit += unit_step) {
            float d[shape::tokens / 2];
            feed.set_next(p, unit + unit_step, rank);
            qf_wg_unit u = qf_wg_unit_get<shape>(p, unit, rank);
            const int blocks = (u.k_end - u.k_begin) / 128;
            if constexpr (shape::persistent) {
                qf_wg_sum_wide<shape>(d, p, feed, at, stage, phase, blocks);
            } else {
                qf_wg_sum<shape>(d, p, feed, shared, full, empty, stage, phase, blocks);
            }
            asm volatile("" : "+r"(unit)); /* the unit is worked out again rather than kept in registers */
            u = qf_wg_unit_get<shape>(p, unit, rank);
            if (p.silu_mul) {
                qf_wg_silu_store<shape::tokens>(p, u, d);
            } else {
                qf_wg_store<shape::tokens>(p, u, d);
            }
        }
    }
    if (shape::cluster > 1) {
        __syncwarp();
        qf_cluster_sync(); /* a block's shared memory stays until the other has no more copies and arrivals for it */
    }
#endif
}
/* --- dispatch ---------------------------------------------------------------------------------------------------- */

typedef qf_status qf_wg_launcher(qf_wg_params *p, const qf_cuda_device *device, cudaStream_t stream, qf_error *err);

template <typename shape>
static qf_status qf_wg_launch(qf_wg_params *p, const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    int row_tiles = p->n / 16;
    if (p->silu_mul) {
        row_tiles = (row_tiles + 15) / 16 * 16; /* the padding up to act_k is written too */
    }
    const int group_rows = shape::row_tiles * shape::cluster;
    p->row_groups = (row_tiles + group_rows - 1) / group_rows;
    p->token_groups = (p->num_tokens + shape::tokens - 1) / shape::tokens;
    p->units = p->row_groups * p->token_groups * p->num_splits;
    int clusters = p->units;
    /* Blocks that take several units know where the next one's weights are, not the one's after it. */
    const bool long_units = p->k / 128 / p->num_splits * (128 / shape::stage_k) >= shape::stages;
    if (shape::persistent && long_units && clusters > device->sm_count / shape::cluster) {
        clusters = device->sm_count / shape::cluster;
    }
    qf_status status = qf_allow_shared("linear_wgmma", qf_linear_wgmma_kernel<shape>, shape::shared_bytes, err);
    if (status != QF_OK) {
        return status;
    }
    return qf_launch("linear_wgmma", qf_linear_wgmma_kernel<shape>, dim3((unsigned)(clusters * shape::cluster)),
                     dim3(shape::threads), shape::shared_bytes, device->dependent_launch, stream, err, *p);
}

/* Tiles of a block, by number: tokens and row tiles. */
#define QF_WG_TILES 9
static const struct {
    int32_t tokens, row_tiles;
} qf_wg_tiles[QF_WG_TILES] = {{8, 8},    {16, 8},  {32, 8},   {64, 8},  {128, 8},
                              {128, 12}, {192, 8}, {232, 8}, {256, 8}};
#define QF_WG_TILE(bits, tokens, rows) qf_wg_launch<qf_wg_shape<bits, tokens, rows>>
#define QF_WG_ROW(bits)                                                                                            \
    {                                                                                                              \
        QF_WG_TILE(bits, 8, 8), QF_WG_TILE(bits, 16, 8), QF_WG_TILE(bits, 32, 8), QF_WG_TILE(bits, 64, 8),         \
            QF_WG_TILE(bits, 128, 8), QF_WG_TILE(bits, 128, 12), QF_WG_TILE(bits, 192, 8),                         \
            QF_WG_TILE(bits, 232, 8), QF_WG_TILE(bits, 256, 8)                                                     \
    }
static qf_wg_launcher *const qf_wg_launchers[3][QF_WG_TILES] = {QF_WG_ROW(4), QF_WG_ROW(8), QF_WG_ROW(16)};

/* --- choices ------------------------------------------------------------------------------------------------------ */

/* Nanoseconds, on an H200: 64 k of a block that has an SM to itself (waits between its steps), its share when the SM is
 * full (issue slots, tensor cores, L2), and the ends of a block (first copies, epilogue). Fitted to measured times. */
static const struct {
    float alone[QF_WG_TILES], share[QF_WG_TILES], end[QF_WG_TILES];
} qf_wg_times[3] = {
    /* 4 bits */
    {{336, 682, 642, 509, 423, 584, 533, 608, 643},
     {196, 137, 251, 280, 423, 584, 533, 608, 643},
     {354, 136, 260, 33, 224, 300, 56, 38, 578}},
    /* 8 bits */
    {{752, 422, 746, 590, 460, 627, 547, 610, 664},
     {147, 326, 257, 320, 460, 627, 547, 610, 664},
     {409, 462, 361, 50, 50, 266, 91, 300, 645}},
    /* 16 bits */
    {{640, 452, 601, 493, 427, 566, 569, 636, 687},
     {142, 280, 242, 275, 427, 566, 569, 636, 687},
     {469, 571, 727, 572, 190, 1400, 100, 382, 911}}};

/* Nanoseconds that the whole takes with tiles of `tokens` tokens: full rounds of blocks over the SMs and the rest, not
 * less than reading the weights, and the partial sums written here and read by the next kernel. */
static double qf_wg_cost(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits, int32_t num_tokens,
                         int32_t num_splits, int width)
{
    const double memory_bytes_per_ns = 3900, sums_bytes_per_ns = 3000;
    const int32_t tokens = qf_wg_tiles[width].tokens, cluster = tokens >= 32 ? 2 : 1;
    const int32_t per_sm = tokens <= 32 ? 3 : tokens <= 64 ? 2 : 1;
    const int32_t group_rows = 16 * qf_wg_tiles[width].row_tiles * cluster;
    const int row = bits == 4 ? 0 : bits == 8 ? 1 : 2;
    const double alone = qf_wg_times[row].alone[width], share = qf_wg_times[row].share[width];
    const double end = qf_wg_times[row].end[width];
    const int64_t blocks = (int64_t)((n + group_rows - 1) / group_rows) * cluster *
                           ((num_tokens + tokens - 1) / tokens) * num_splits;
    const int64_t slots = (int64_t)device->sm_count * per_sm, rest = blocks % slots;
    const double steps = 2.0 * ((k / 128 + num_splits - 1) / num_splits);
    double ns = (double)(blocks / slots) * (steps * fmax(alone, share * per_sm) + end * per_sm);
    if (rest > 0) {
        double side_by_side = (double)((rest + device->sm_count - 1) / device->sm_count);
        ns += steps * fmax(alone, share * side_by_side) + end * side_by_side;
    }
    ns = fmax(ns, (double)n * k * bits / 8 / memory_bytes_per_ns);
    return num_splits > 1 ? ns + 4.0 * num_splits * num_tokens * n / sums_bytes_per_ns : ns;
}

/* The width of the tiles: its index. Tokens up to 8 take the narrowest, whose copies alone know thinner tiles. */
static int qf_wg_width(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits, int32_t num_tokens,
                       int32_t num_splits, double *cost)
{
    int best = 0;
    double best_cost = 0;
    for (int i = 0; i < QF_WG_TILES; i++) {
        double c = qf_wg_cost(device, n, k, bits, num_tokens, num_splits, i);
        if (i == 0 || c < best_cost) {
            best = i;
            best_cost = c;
        }
        if (qf_wg_tiles[i].tokens >= num_tokens &&
            (i + 1 == QF_WG_TILES || qf_wg_tiles[i + 1].tokens > qf_wg_tiles[i].tokens)) {
            break;
        }
    }
    if (cost != NULL) {
        *cost = best_cost;
    }
    return best;
}

extern "C" int32_t qf_cuda_linear_wgmma_splits(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits,
                                               int32_t num_tokens, qf_cuda_epilogue epilogue, bool batch_invariant)
{
    const int32_t blocks = k / 128;
    if (epilogue != QF_CUDA_STORE || blocks < 2) {
        return 1;
    }
    if (batch_invariant) {
        /* By shape alone: enough blocks for the SMs when tokens are few, partial sums small enough when many. */
        const int32_t rows = (n + 127) / 128, most = n <= 1024 ? 4 : 2;
        int32_t splits = 1;
        while (splits < most && rows * splits < device->sm_count && blocks >= 4 * splits) {
            splits *= 2;
        }
        return splits;
    }
    /* Prefill of 1,024 tokens and more has two: the room for partial sums is that of the largest step. */
    int32_t best = 1, limit = 2048 / num_tokens;
    limit = limit < 2 ? 2 : limit > QF_CUDA_MAX_SPLITS ? QF_CUDA_MAX_SPLITS : limit;
    double best_cost = 0;
    for (int32_t splits = 1; splits <= limit && splits <= blocks; splits++) {
        double cost;
        (void)qf_wg_width(device, n, k, bits, num_tokens, splits, &cost);
        if (splits == 1 || cost < best_cost) {
            best = splits;
            best_cost = cost;
        }
    }
    return best;
}

/* --- launcher ----------------------------------------------------------------------------------------------------- */

static qf_status qf_wg_check(const qf_cuda_linear_args *args, const qf_cuda_device *device, qf_error *err)
{
    const qf_cuda_weight *w = &args->weight;
    if (!device->hopper) {
        return QF_FAIL(err, QF_ERROR_BACKEND, "linear_wgmma: compute capability %d has no wgmma; it needs sm_90a",
                       device->compute_capability);
    }
    if (w->n <= 0 || w->n % 16 != 0 || w->k <= 0 || w->k % 128 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma: n = %d, k = %d; need multiples of 16 and 128",
                       w->n, w->k);
    }
    if (w->bits != 4 && w->bits != 8 && w->bits != 16) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma: bits = %d; need 4, 8 or 16", w->bits);
    }
    if (w->bits != 16 && w->group_size != 32 && w->group_size != 64 && w->group_size != 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma: group_size = %d; need 32, 64 or 128",
                       w->group_size);
    }
    if (w->data == NULL || args->x == NULL || (w->bits != 16 && w->scales == NULL)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma: data, x or scales is NULL");
    }
    if (((uintptr_t)w->data | (uintptr_t)w->scales | (uintptr_t)args->x) % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma: data, scales or x is not aligned to 16 bytes");
    }
    if (args->num_tokens <= 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma: num_tokens = %d; need at least 1",
                       args->num_tokens);
    }
    if ((uint64_t)qf_cuda_num_tiles(args->num_tokens) * w->k > UINT32_MAX / 16) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma: x of %d tokens and k = %d exceeds 4 GB",
                       args->num_tokens, w->k);
    }
    if (args->num_splits < 1 || args->num_splits > QF_CUDA_MAX_SPLITS) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma: num_splits = %d; need 1 to %d", args->num_splits,
                       QF_CUDA_MAX_SPLITS);
    }
    if (args->epilogue == QF_CUDA_STORE ? args->out == NULL : args->act == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma: the output of epilogue %d is NULL",
                       (int)args->epilogue);
    }
    if (args->epilogue != QF_CUDA_STORE && (args->epilogue != QF_CUDA_SILU_MUL || args->num_splits != 1)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_wgmma: epilogue %d with %d splits; SILU_MUL needs 1",
                       (int)args->epilogue, args->num_splits);
    }
    return QF_OK;
}

static qf_status qf_wg_start(const qf_cuda_linear_args *args, const qf_cuda_device *device, int width,
                             cudaStream_t stream, qf_error *err)
{
    const qf_cuda_weight *w = &args->weight;
    qf_wg_params p = {};
    p.weights = (const uint8_t *)w->data;
    p.scales = (const uint8_t *)w->scales;
    p.x = (const uint8_t *)args->x;
    p.bias = w->bias;
    p.out = args->out;
    p.act = args->act;
    p.scale_multiplier = w->bits == 16 ? 1.0f : w->bits == 8 ? w->scale_multiplier : w->scale_multiplier * 0x1p32f;
    p.n = w->n;
    p.k = w->k;
    p.group_shift = w->bits == 16 || w->group_size == 128 ? 7 : w->group_size == 64 ? 6 : 5;
    p.num_tokens = args->num_tokens;
    p.num_splits = args->num_splits;
    p.silu_mul = args->epilogue == QF_CUDA_SILU_MUL;
    return qf_wg_launchers[w->bits == 4 ? 0 : w->bits == 8 ? 1 : 2][width](&p, device, stream, err);
}

extern "C" qf_status qf_cuda_linear_wgmma(const qf_cuda_linear_args *args, const qf_cuda_device *device,
                                          cudaStream_t stream, qf_error *err)
{
    qf_status status = qf_wg_check(args, device, err);
    if (status != QF_OK) {
        return status;
    }
    const qf_cuda_weight *w = &args->weight;
    int width = qf_wg_width(device, w->n, w->k, w->bits, args->num_tokens, args->num_splits, NULL);
    return qf_wg_start(args, device, width, stream, err);
}
