/* The supply of linear_wgmma.cu's kernel: shapes, the order of work, the copies of activations and of weights. */
#ifndef QF_LINEAR_WGMMA_FEED_CUH
#define QF_LINEAR_WGMMA_FEED_CUH

#include "common/dequant.cuh"
#include "common/launch.cuh"
#include "common/wgmma.cuh"

/* What follows from the bits of the weights and the size of a tile. */
template <int num_bits, int num_tokens, int num_row_tiles> struct qf_wg_shape {
    static constexpr int bits = num_bits, tokens = num_tokens;
    static constexpr int row_tiles = num_row_tiles; /* of 16 rows, a block: one per consumer warp */
    /* Two warpgroups take registers from a third, whose first warp copies x; of three, 128 a thread are enough. */
    static constexpr bool shares_registers = row_tiles == 8;
    static constexpr int threads = 32 * row_tiles + (shares_registers ? 128 : 32);
    static constexpr int token_tiles = tokens / 8;
    /* Blocks that share one tile of x, each fetching a part for all. */
    static constexpr int cluster = tokens >= 32 ? 2 : 1;
    static constexpr int blocks_per_sm = tokens <= 32 ? 3 : tokens <= 64 ? 2 : 1;
    static constexpr bool persistent = blocks_per_sm == 1; /* a block takes units in turn */
    /* k of a stage: a block of the weights, or half a one where x would leave too few stages. */
    static constexpr int stage_k = bits < 16 ? 128 : 64;
    static constexpr int slices = stage_k / 64;
    /* Barriers of a stage, for an equal part of its k each: in wide tiles one for each 64 k. */
    static constexpr int parts = persistent ? slices : 1;
    static constexpr int part_slices = slices / parts;
    /* Steps of 16 k in a batch of qf_wg_sum: the A registers of two batches must fit beside the results. */
    static constexpr int steps = bits == 4 && (tokens == 8 || tokens == 64) ? 4 : bits == 16 && tokens == 64 ? 4 : 2;
    /* Registers of a thread, as setmaxnreg shares them out: 2 consumers + producer = 3 x those at the launch. */
    static constexpr int consumer_registers = blocks_per_sm == 1 ? 232 : blocks_per_sm == 2 ? 96 : 64;
    static constexpr int producer_registers = blocks_per_sm == 2 ? 48 : 40;
    static constexpr int slice_bytes = token_tiles * 1024;
    static constexpr int x_bytes = slices * slice_bytes;
    static constexpr int weight_bytes = stage_k * 2 * bits;          /* of a row tile */
    static constexpr int scale_bytes = bits == 16 ? 0 : stage_k * 2; /* of a row tile, groups of 32 */
    static constexpr int slot_bytes = weight_bytes + scale_bytes;    /* a warp's part of a stage */
    static constexpr int stage_bytes = x_bytes + row_tiles * slot_bytes;
    /* An SM has 228 KB; a block takes 1 KB for itself, and 256 bytes of barriers. */
    static constexpr int room = (blocks_per_sm == 1 ? 227 * 1024 : 228 * 1024 / blocks_per_sm - 1024) - 256;
    static constexpr int stages = room / stage_bytes > 8 ? 8 : room / stage_bytes;
    static constexpr int shared_bytes = stages * stage_bytes;
    static_assert(stages >= 2, "a tile needs two stages");
};

typedef struct qf_wg_params {
    const uint8_t *weights, *scales, *x;
    const float *bias;
    float *out;
    uint16_t *act;
    float scale_multiplier;
    int32_t n, k, group_shift; /* groups of 2^group_shift */
    int32_t num_tokens, num_splits;
    int32_t silu_mul;
    int32_t row_groups;   /* of cluster x 8 row tiles */
    int32_t token_groups; /* tiles of `tokens` tokens */
    int32_t units;        /* row_groups x token_groups x num_splits */
} qf_wg_params;

/* Token groups that are worked on side by side, so that L2 holds their part of x while the weights pass. */
#define QF_WG_RASTER 16

#ifdef QF_SM90A

typedef struct qf_wg_unit {
    int row_tile;           /* first of this block */
    int token_tile;         /* first, in tiles of 8 */
    int split;
    int k_begin, k_end;
} qf_wg_unit;

/* Token groups run fastest, so the blocks at work at one time share weights and, `row_groups` apart, x. */
template <typename shape>
__device__ __forceinline__ qf_wg_unit qf_wg_unit_get(const qf_wg_params &p, int unit, int rank)
{
    int per_raster = p.row_groups * p.num_splits * QF_WG_RASTER;
    int raster = unit / per_raster;
    int rest = unit - raster * per_raster;
    int width = min(QF_WG_RASTER, p.token_groups - raster * QF_WG_RASTER);
    int token_group = raster * QF_WG_RASTER + rest % width;
    rest /= width;
    int blocks = p.k / 128;
    qf_wg_unit u;
    u.split = rest / p.row_groups;
    u.row_tile = ((rest - u.split * p.row_groups) * shape::cluster + rank) * shape::row_tiles;
    u.token_tile = token_group * shape::token_tiles;
    u.k_begin = u.split * blocks / p.num_splits * 128;
    u.k_end = (u.split + 1) * blocks / p.num_splits * 128;
    return u;
}

/* --- producer: one warp, the activations ---------------------------------------------------------------------- */

/* Copies of a stage. A bulk copy takes its operands from uniform registers, so lanes that copy different things take
 * turns: one lane copies whole slices; only tiles of fewer than 8 tokens take a lane for each core matrix. */
template <typename shape> struct qf_wg_copier {
    const uint8_t *source;    /* at k = 0 */
    uint32_t target;          /* offset in the stage */
    uint32_t bytes;           /* of a copy; 0: none */
    uint32_t k_bytes;         /* of source for one k */
    uint32_t stage_bytes;     /* that arrive in a stage, from both blocks of a cluster */
    bool spread;              /* rows of 8 k are spread to whole core matrices */

    __device__ __forceinline__ void set(const qf_wg_params &p, const qf_wg_unit &u, int rank, int lane)
    {
        const int tiles = (p.num_tokens + 7) / 8;
        const int width = p.num_tokens > 4 ? 8 : p.num_tokens > 2 ? 4 : p.num_tokens; /* of a token tile */
        const int there = min(shape::token_tiles, tiles - u.token_tile);
        stage_bytes = shape::part_slices * there * width * 128;
        spread = shape::tokens == 8 && width < 8;
        if (spread) {
            source = p.x + lane * width * 16;
            target = lane * 128;
            bytes = lane < 8 * shape::part_slices ? width * 16 : 0;
            k_bytes = width * 2;
        } else {
            const int share = (shape::token_tiles + shape::cluster - 1) / shape::cluster;
            const int first = rank * share;
            source = p.x + (int64_t)(u.token_tile + first) * 1024;
            target = first * 1024;
            bytes = lane == 0 ? max(0, min(share, there - first)) * 1024 : 0;
            k_bytes = tiles * 16;
        }
    }

    __device__ __forceinline__ void copy(uint8_t *stage, uint64_t *full, int k)
    {
        const uint8_t *from = source + (uint32_t)k * k_bytes; /* below 2^32, as the launcher checks */
        if (bytes == 0) {
            return;
        }
        if (spread) {
            qf_bulk_copy(stage + target, from, bytes, full);
            return;
        }
#pragma unroll
        for (int slice = 0; slice < shape::part_slices; slice++) {
            uint8_t *to = stage + target + slice * shape::slice_bytes;
            if (shape::cluster > 1) {
                qf_bulk_copy_multicast(to, from + slice * 64 * k_bytes, bytes, full, (1 << shape::cluster) - 1);
            } else {
                qf_bulk_copy(to, from + slice * 64 * k_bytes, bytes, full);
            }
        }
    }
};

template <typename shape>
__device__ __forceinline__ void qf_wg_produce(const qf_wg_params &p, uint8_t *shared, uint64_t *full, uint64_t *empty,
                                              int rank, int first_unit, int unit_step)
{
    const int lane = threadIdx.x % 32;
    int part = 0; /* of all stages */
    uint32_t phase = 0;
    qf_grid_dependency_wait();
    for (int unit = first_unit; unit < p.units; unit += unit_step) {
        const qf_wg_unit u = qf_wg_unit_get<shape>(p, unit, rank);
        qf_wg_copier<shape> copier;
        copier.set(p, u, rank, lane);
#pragma unroll 1
        for (int k = u.k_begin; k < u.k_end; k += 64 * shape::part_slices) {
            qf_mbarrier_wait_bounded(&empty[part], phase ^ 1);
            if (lane == 0) {
                qf_mbarrier_arrive_expect(&full[part], copier.stage_bytes);
            }
            __syncwarp();
            uint8_t *to = shared + part / shape::parts * shape::stage_bytes;
            copier.copy(to + part % shape::parts * (shape::part_slices * shape::slice_bytes), &full[part], k);
            if (++part == shape::stages * shape::parts) {
                part = 0;
                phase ^= 1;
            }
        }
    }
}

/* --- weights: each consumer warp fetches its own ---------------------------------------------------------------- */

/* Copies 16 bytes, bringing what stands beside them into L2. */
__device__ __forceinline__ void qf_wg_copy_16(uint32_t shared, const void *global)
{
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

/* Where a warp's copies stand, a ring of stages ahead of its sums: `at` counts stages of k of its row tiles from the
 * start of the matrix. A lane copies the words of weights that it reads itself; a row tile beyond the last is the last,
 * and its sums are dropped. */
template <typename shape> struct qf_wg_feed {
    uint32_t at, end;        /* of the unit being fetched */
    uint32_t next, next_end; /* of the one after it, which has a ring of stages at least, or none */
    const uint8_t *weights, *scales; /* of the matrix, at this lane's bytes */
    uint32_t slot;        /* of this warp, at this lane's bytes: a shared address in the first stage */
    uint32_t scale_bytes; /* of a stage */

    static __device__ __forceinline__ void range(const qf_wg_params &p, int unit, int rank, uint32_t &from,
                                                 uint32_t &to)
    {
        const qf_wg_unit u = qf_wg_unit_get<shape>(p, unit, rank);
        const int row_tile = min(u.row_tile + (int)threadIdx.x / 32, p.n / 16 - 1);
        from = (row_tile * p.k + u.k_begin) / shape::stage_k;
        to = (row_tile * p.k + u.k_end) / shape::stage_k;
    }
    __device__ __forceinline__ void set(const qf_wg_params &p, const uint8_t *shared, int unit, int rank)
    {
        range(p, unit, rank, at, end);
        next = next_end = 0;
        const int lane = threadIdx.x % 32;
        weights = p.weights + lane * 16;
        scales = p.scales + lane * 16;
        slot = qf_shared_address(shared) + shape::x_bytes + threadIdx.x / 32 * shape::slot_bytes + lane * 16;
        scale_bytes = max(shape::stage_k >> p.group_shift, 1) * 64;
    }
    __device__ __forceinline__ void set_next(const qf_wg_params &p, int unit, int rank)
    {
        next = next_end = 0;
        if (shape::persistent && unit < p.units) {
            range(p, unit, rank, next, next_end);
        }
    }

    /* Fills this warp's part of a stage, which it has read, if anything is left to fetch. */
    __device__ __forceinline__ void fetch(int stage)
    {
        const uint32_t to = slot + stage * shape::stage_bytes;
        if (shape::persistent && at == end) {
            at = next, end = next_end;
            next = next_end;
        }
        __syncwarp();
        if (at < end) {
            const uint8_t *from = weights + (uint64_t)at * shape::weight_bytes;
#pragma unroll
            for (int i = 0; i < shape::weight_bytes; i += 512) {
                qf_wg_copy_16(to + i, from + i);
            }
            if (shape::bits < 16 && threadIdx.x % 32 * 16 < scale_bytes) {
                qf_wg_copy_16(to + shape::weight_bytes, scales + (uint64_t)at * scale_bytes);
            }
            at++;
        }
        qf_cp_async_commit();
    }

    /* Waits for the oldest stage of the ring. */
    __device__ __forceinline__ void wait()
    {
        qf_cp_async_wait<shape::stages - 1>();
        __syncwarp();
    }
};

#endif /* QF_SM90A */
#endif
