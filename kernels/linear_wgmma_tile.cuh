/* The parts of linear_wgmma.cu's kernel: shapes, the order of work, the producer warp, the consumers, the epilogue. */
#ifndef QF_LINEAR_WGMMA_TILE_CUH
#define QF_LINEAR_WGMMA_TILE_CUH

#include "common/dequant.cuh"
#include "common/launch.cuh"
#include "common/wgmma.cuh"

#define QF_WG_ROW_TILES 8 /* of 16 rows, a block: one per consumer warp */
#define QF_WG_THREADS (32 * QF_WG_ROW_TILES + 128) /* and a warpgroup whose first warp copies x */

/* Up to how many bits the two warpgroups take turns at the tensor cores. */
#ifndef QF_WG_TURNS_BITS
#define QF_WG_TURNS_BITS 0
#endif

/* What follows from bits and tokens of a tile. */
template <int bits, int tokens> struct qf_wg_shape {
    static constexpr int token_tiles = tokens / 8;
    /* Blocks that share one tile of x, each fetching a part for all. */
    static constexpr int cluster = tokens >= 32 ? 2 : 1;
    static constexpr int blocks_per_sm = tokens <= 32 ? 3 : tokens <= 64 ? 2 : 1;
    static constexpr bool persistent = blocks_per_sm == 1; /* a block takes units in turn */
    static constexpr bool turns = blocks_per_sm == 1 && bits <= QF_WG_TURNS_BITS;
    /* k of a stage: a block of the weights, or half a one where x would leave too few stages. */
    static constexpr int stage_k = tokens <= 64 && bits < 16 ? 128 : 64;
    static constexpr int slices = stage_k / 64;
    /* Steps of 16 k in a batch: the A registers of two batches must fit beside the results. */
    static constexpr int steps = (tokens <= 32 && bits > 4) || tokens == 16 || tokens == 32 || (tokens == 64 && bits == 8) ? 2 : 4;
    /* Registers of a thread, as setmaxnreg shares them out: 2 consumers + producer = 3 x those at the launch. */
    static constexpr int consumer_registers = blocks_per_sm == 1 ? 232 : blocks_per_sm == 2 ? 96 : 64;
    static constexpr int producer_registers = blocks_per_sm == 2 ? 48 : 40;
    static constexpr int slice_bytes = token_tiles * 1024;
    static constexpr int x_bytes = slices * slice_bytes;
    static constexpr int weight_bytes = stage_k * 2 * bits;          /* of a row tile */
    static constexpr int scale_bytes = bits == 16 ? 0 : stage_k * 2; /* of a row tile, groups of 32 */
    static constexpr int slot_bytes = weight_bytes + scale_bytes;    /* a warp's part of a stage */
    static constexpr int stage_bytes = x_bytes + QF_WG_ROW_TILES * slot_bytes;
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
template <int bits, int tokens>
__device__ __forceinline__ qf_wg_unit qf_wg_unit_get(const qf_wg_params &p, int unit, int rank)
{
    typedef qf_wg_shape<bits, tokens> shape;
    int per_raster = p.row_groups * p.num_splits * QF_WG_RASTER;
    int raster = unit / per_raster;
    int rest = unit - raster * per_raster;
    int width = min(QF_WG_RASTER, p.token_groups - raster * QF_WG_RASTER);
    int token_group = raster * QF_WG_RASTER + rest % width;
    rest /= width;
    int blocks = p.k / 128;
    qf_wg_unit u;
    u.split = rest / p.row_groups;
    u.row_tile = ((rest - u.split * p.row_groups) * shape::cluster + rank) * QF_WG_ROW_TILES;
    u.token_tile = token_group * shape::token_tiles;
    u.k_begin = u.split * blocks / p.num_splits * 128;
    u.k_end = (u.split + 1) * blocks / p.num_splits * 128;
    return u;
}

/* --- producer: one warp, the activations ---------------------------------------------------------------------- */

/* Copies of a stage. A bulk copy takes its operands from uniform registers, so lanes that copy different things take
 * turns: one lane copies whole slices; only tiles of fewer than 8 tokens take a lane for each core matrix. */
template <int bits, int tokens> struct qf_wg_copier {
    typedef qf_wg_shape<bits, tokens> shape;
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
        stage_bytes = shape::slices * there * width * 128;
        spread = tokens == 8 && width < 8;
        if (spread) {
            source = p.x + lane * width * 16;
            target = lane * 128;
            bytes = lane < 8 * shape::slices ? width * 16 : 0;
            k_bytes = width * 2;
        } else {
            const int share = shape::token_tiles / shape::cluster;
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
        for (int slice = 0; slice < shape::slices; slice++) {
            uint8_t *to = stage + target + slice * shape::slice_bytes;
            if (shape::cluster > 1) {
                qf_bulk_copy_multicast(to, from + slice * 64 * k_bytes, bytes, full, (1 << shape::cluster) - 1);
            } else {
                qf_bulk_copy(to, from + slice * 64 * k_bytes, bytes, full);
            }
        }
    }
};

template <int bits, int tokens>
__device__ __forceinline__ void qf_wg_produce(const qf_wg_params &p, uint8_t *shared, uint64_t *full, uint64_t *empty,
                                              int rank, int first_unit, int unit_step)
{
    typedef qf_wg_shape<bits, tokens> shape;
    const int lane = threadIdx.x % 32;
    int stage = 0;
    uint32_t phase = 0;
    qf_grid_dependency_wait();
    for (int unit = first_unit; unit < p.units; unit += unit_step) {
        const qf_wg_unit u = qf_wg_unit_get<bits, tokens>(p, unit, rank);
        qf_wg_copier<bits, tokens> copier;
        copier.set(p, u, rank, lane);
#pragma unroll 1
        for (int k = u.k_begin; k < u.k_end; k += shape::stage_k) {
            qf_mbarrier_wait_bounded(&empty[stage], phase ^ 1);
            if (lane == 0) {
                qf_mbarrier_arrive_expect(&full[stage], copier.stage_bytes);
            }
            __syncwarp();
            copier.copy(shared + stage * shape::stage_bytes, &full[stage], k);
            if (++stage == shape::stages) {
                stage = 0;
                phase ^= 1;
            }
        }
    }
}

/* --- weights: each consumer warp fetches its own ---------------------------------------------------------------- */

/* Where a warp's copies stand, a ring of stages ahead of its sums: `at` counts stages of its row tiles' k from the start
 * of the matrix. A lane copies the words of weights that it reads itself; a row tile beyond the last is the last, and
 * its sums are dropped. */
template <int bits, int tokens> struct qf_wg_feed {
    typedef qf_wg_shape<bits, tokens> shape;
    uint32_t at, end;        /* of the unit being fetched */
    uint32_t next, next_end; /* of the one after it, which has a ring of stages at least, or none */

    static __device__ __forceinline__ void range(const qf_wg_params &p, int unit, int rank, uint32_t &from, uint32_t &to)
    {
        const qf_wg_unit u = qf_wg_unit_get<bits, tokens>(p, unit, rank);
        const int row_tile = min(u.row_tile + (int)threadIdx.x / 32, p.n / 16 - 1);
        from = (row_tile * p.k + u.k_begin) / shape::stage_k;
        to = (row_tile * p.k + u.k_end) / shape::stage_k;
    }
    __device__ __forceinline__ void set(const qf_wg_params &p, int unit, int rank)
    {
        range(p, unit, rank, at, end);
        next = next_end = 0;
    }
    __device__ __forceinline__ void set_next(const qf_wg_params &p, int unit, int rank)
    {
        next = next_end = 0;
        if (shape::persistent && unit < p.units) {
            range(p, unit, rank, next, next_end);
        }
    }

    /* Fills this warp's part of a stage, which it has read, if anything is left to fetch. */
    __device__ __forceinline__ void fetch(const qf_wg_params &p, uint8_t *stage)
    {
        const int lane = threadIdx.x % 32;
        uint8_t *slot = stage + shape::x_bytes + threadIdx.x / 32 * shape::slot_bytes + lane * 16;
        if (shape::persistent && at == end) {
            at = next, end = next_end;
            next = next_end;
        }
        __syncwarp();
        if (at < end) {
            const uint8_t *weights = p.weights + (uint64_t)at * shape::weight_bytes + lane * 16;
#pragma unroll
            for (int i = 0; i < shape::weight_bytes; i += 512) {
                qf_cp_async_16_stream(slot + i, weights + i);
            }
            if (bits < 16 && lane < max(shape::stage_k >> p.group_shift, 1) * 4) {
                const uint32_t group = at * shape::stage_k >> p.group_shift;
                qf_cp_async_16_stream(slot + shape::weight_bytes, p.scales + (uint64_t)group * 64 + lane * 16);
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

/* --- consumers: two warpgroups -------------------------------------------------------------------------------- */

/* The A registers of `steps` steps of 16 k, `k` into the stage. */
template <int bits, int tokens, int steps>
__device__ __forceinline__ void qf_wg_load(uint32_t (&a)[steps][4], const uint8_t *stage, int k, int group_shift)
{
    typedef qf_wg_shape<bits, tokens> shape;
    const int lane = threadIdx.x % 32, row_tile = threadIdx.x / 32;
    const uint8_t *weights = stage + shape::x_bytes + row_tile * shape::slot_bytes;
    if constexpr (bits == 16) {
#pragma unroll
        for (int s = 0; s < steps; s++) {
            uint4 w = reinterpret_cast<const uint4 *>(weights + (k + 16 * s) * 32)[lane];
            a[s][0] = w.x, a[s][1] = w.y, a[s][2] = w.z, a[s][3] = w.w;
        }
    } else {
        /* 4 bits: 64 k are 32 lanes x 16 bytes; 8 bits: 32 k are. */
        uint32_t word[steps * bits / 4];
        if constexpr (bits == 4 && steps == 2) {
            uint2 w = *reinterpret_cast<const uint2 *>(weights + k / 64 * 512 + lane * 16 + k % 64 / 4);
            word[0] = w.x, word[1] = w.y;
        } else {
#pragma unroll
            for (int i = 0; i < steps * bits / 16; i++) {
                uint4 w = reinterpret_cast<const uint4 *>(weights + k * 2 * bits + i * 512)[lane];
                word[4 * i] = w.x, word[4 * i + 1] = w.y, word[4 * i + 2] = w.z, word[4 * i + 3] = w.w;
            }
        }
        const uint32_t *scales = reinterpret_cast<const uint32_t *>(weights + shape::weight_bytes) +
                                 (k >> group_shift) * 16 + lane / 4;
        qf_row_scales r = qf_unpack_scales<bits>(scales[0], scales[8]);
        uint32_t scale[2] = {qf_pack_bf16(r.scale[0], r.scale[0]), qf_pack_bf16(r.scale[1], r.scale[1])};
#pragma unroll
        for (int s = 0; s < steps; s++) {
            if (s == 2 && group_shift == 5) {
                r = qf_unpack_scales<bits>(scales[16], scales[24]);
                scale[0] = qf_pack_bf16(r.scale[0], r.scale[0]);
                scale[1] = qf_pack_bf16(r.scale[1], r.scale[1]);
            }
            if constexpr (bits == 4) {
                qf_dequant_4(word[s], r, a[s]);
            } else {
                qf_dequant_8(word[2 * s], word[2 * s + 1], r, a[s]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[s][i] = qf_mul_bf16(a[s][i], scale[i & 1]);
            }
        }
    }
}

/* d += a batch: starts its steps as one group, and waits for the group before it. With turns the other warpgroup's
 * batch comes between, so that one warpgroup unpacks while the other's products run. */
template <int tokens, int steps, bool turns>
__device__ __forceinline__ void qf_wg_multiply(float (&d)[tokens / 2], const uint32_t (&a)[steps][4], uint32_t x,
                                               uint64_t *turn, uint32_t &turn_phase)
{
    if (turns) {
        qf_mbarrier_wait_bounded(&turn[threadIdx.x / 128], turn_phase);
        turn_phase ^= 1;
    }
    qf_wgmma_fence();
#pragma unroll
    for (int s = 0; s < steps; s++) {
        qf_wgmma<tokens>::add(d, a[s], qf_wgmma_descriptor(x, s));
    }
    qf_wgmma_commit();
    if (turns && threadIdx.x % 32 == 0) {
        qf_mbarrier_arrive(&turn[1 - threadIdx.x / 128]);
    }
    qf_wgmma_wait<1>();
}

/* Tells every block whose copies write this stage that this warp has read it. */
template <int cluster> __device__ __forceinline__ void qf_wg_release(uint64_t *empty)
{
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if (cluster == 1) {
        if (lane == 0) {
            qf_mbarrier_arrive(empty);
        }
    } else if (lane < cluster) {
        qf_mbarrier_arrive_remote(empty, lane);
    }
}

/* d = the products of `blocks` blocks of 128 k, from the stages on from `stage`. While one batch is multiplied the next
 * is unpacked into the other set of A registers. */
template <int bits, int tokens>
__device__ __forceinline__ void qf_wg_sum(float (&d)[tokens / 2], const qf_wg_params &p, qf_wg_feed<bits, tokens> &feed,
                                          uint8_t *shared, uint64_t *full, uint64_t *empty, int &stage,
                                          uint32_t &phase, uint64_t *turn, uint32_t &turn_phase, int blocks)
{
    typedef qf_wg_shape<bits, tokens> shape;
    constexpr int steps = shape::steps, batches = 8 / steps;
    uint32_t a[2][steps][4];
    int previous = 0; /* the stage of the batch before */
    const uint32_t x = qf_shared_address(shared);
#pragma unroll
    for (int i = 0; i < tokens / 2; i++) {
        d[i] = 0.0f;
    }
    if (blocks == 0) {
        return;
    }
    feed.wait();
    qf_wg_load<bits, tokens, steps>(a[0], shared + stage * shape::stage_bytes, 0, p.group_shift);
    qf_mbarrier_wait_bounded(&full[stage], phase);
    for (int block = 0; block < blocks; block++) {
#pragma unroll
        for (int i = 0; i < batches; i++) {
            const int k = i * 16 * steps % shape::stage_k, next_k = (k + 16 * steps) % shape::stage_k;
            qf_wg_multiply<tokens, steps, shape::turns>(
                d, a[i & 1], x + stage * shape::stage_bytes + k / 64 * shape::slice_bytes + k % 64 * 16, turn,
                turn_phase);
            if (k == 0 && (i > 0 || block > 0)) {
                qf_wg_release<shape::cluster>(&empty[previous]);
            }
            previous = stage;
            if (next_k == 0) {
                feed.fetch(p, shared + stage * shape::stage_bytes);
                if (++stage == shape::stages) {
                    stage = 0;
                    phase ^= 1;
                }
            }
            if (i + 1 < batches || block + 1 < blocks) {
                if (next_k == 0) {
                    feed.wait();
                }
                qf_wg_load<bits, tokens, steps>(a[(i + 1) & 1], shared + stage * shape::stage_bytes, next_k,
                                                p.group_shift);
                if (next_k == 0) {
                    qf_mbarrier_wait_bounded(&full[stage], phase);
                }
            }
        }
    }
    qf_wgmma_wait<0>();
    qf_wgmma_pin(d);
    qf_wg_release<shape::cluster>(&empty[previous]);
}

/* --- epilogues ------------------------------------------------------------------------------------------------- */

/* out[split][token][row] for 16 rows of this warp. */
template <int tokens>
__device__ __forceinline__ void qf_wg_store(const qf_wg_params &p, const qf_wg_unit &u, const float (&d)[tokens / 2])
{
    const int lane = threadIdx.x % 32, row_tile = u.row_tile + threadIdx.x / 32;
    if (row_tile >= p.n / 16) {
        return;
    }
    const int row = row_tile * 16 + lane / 4;
    const int left = p.num_tokens - u.token_tile * 8 - 2 * (lane % 4); /* tokens from this lane's first on */
    float bias[2] = {0.0f, 0.0f};
    if (p.bias != nullptr && u.split == 0) {
        bias[0] = p.bias[row];
        bias[1] = p.bias[row + 8];
    }
    float *out = p.out + ((int64_t)u.split * p.num_tokens + u.token_tile * 8 + 2 * (lane % 4)) * p.n + row;
#pragma unroll
    for (int j = 0; j < tokens / 8; j++) {
        if (8 * j < left) {
            out[0] = fmaf(d[4 * j], p.scale_multiplier, bias[0]);
            out[8] = fmaf(d[4 * j + 2], p.scale_multiplier, bias[1]);
        }
        if (8 * j + 1 < left) {
            out[p.n] = fmaf(d[4 * j + 1], p.scale_multiplier, bias[0]);
            out[p.n + 8] = fmaf(d[4 * j + 3], p.scale_multiplier, bias[1]);
        }
        out += 8 * (int64_t)p.n;
    }
}

__device__ __forceinline__ float qf_wg_silu_mul(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

/* Rows g and g + 8 are gate and up of feature 8 row_tile + g; a core matrix of `act` is stored by one warp at once. */
template <int tokens>
__device__ __forceinline__ void qf_wg_silu_store(const qf_wg_params &p, const qf_wg_unit &u,
                                                 const float (&d)[tokens / 2])
{
    const int lane = threadIdx.x % 32, row_tile = u.row_tile + threadIdx.x / 32;
    const int row_tiles = p.n / 16;
    if (row_tile >= (row_tiles + 15) / 16 * 16) {
        return;
    }
    const bool real = row_tile < row_tiles; /* or padding up to act_k */
    const int tiles = (p.num_tokens + 7) / 8;
    const int width = p.num_tokens > 4 ? 8 : p.num_tokens > 2 ? 4 : p.num_tokens;
    float bias[2] = {0.0f, 0.0f};
    if (p.bias != nullptr && real) {
        bias[0] = p.bias[row_tile * 16 + lane / 4];
        bias[1] = p.bias[row_tile * 16 + lane / 4 + 8];
    }
    uint32_t *act = reinterpret_cast<uint32_t *>(p.act) +
                    (((int64_t)(row_tile / 8) * tiles + u.token_tile) * 8 + row_tile % 8) * (width * 4) + lane;
#pragma unroll
    for (int j = 0; j < tokens / 8; j++) {
        float low = qf_wg_silu_mul(fmaf(d[4 * j], p.scale_multiplier, bias[0]),
                                   fmaf(d[4 * j + 2], p.scale_multiplier, bias[1]));
        float high = qf_wg_silu_mul(fmaf(d[4 * j + 1], p.scale_multiplier, bias[0]),
                                    fmaf(d[4 * j + 3], p.scale_multiplier, bias[1]));
        uint32_t word = qf_movmatrix_trans(qf_pack_bf16(low, high));
        if (u.token_tile + j < tiles && lane / 4 < width) {
            act[j * 256] = real ? word : 0u;
        }
    }
}

#endif /* QF_SM90A */
#endif
