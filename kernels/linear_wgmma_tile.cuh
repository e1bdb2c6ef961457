/* The parts of linear_wgmma.cu's kernel: shapes, the order of work, the producer warp, the consumers. */
#ifndef QF_LINEAR_WGMMA_TILE_CUH
#define QF_LINEAR_WGMMA_TILE_CUH

#include "common/dequant.cuh"
#include "common/launch.cuh"
#include "common/wgmma.cuh"

#define QF_WG_ROW_TILES 8 /* of 16 rows, a block: one per consumer warp */
#define QF_WG_THREADS (32 * QF_WG_ROW_TILES + 128) /* and a warpgroup whose first warp copies x */

/* What follows from bits and tokens of a tile. */
template <int bits, int tokens> struct qf_wg_shape {
    static constexpr int token_tiles = tokens / 8;
    /* Blocks that share one tile of x, each fetching a part for all. */
    static constexpr int cluster = tokens >= 32 ? 2 : 1;
    static constexpr int blocks_per_sm = tokens <= 32 ? 3 : tokens <= 64 ? 2 : 1;
    static constexpr bool persistent = blocks_per_sm == 1; /* a block takes units in turn */
    /* k of a stage: a block of the weights, or half a one where x would leave too few stages. */
    static constexpr int stage_k = tokens <= 64 && bits < 16 ? 128 : 64;
    static constexpr int slices = stage_k / 64;
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

/* The words of a stage of 64 k as they stand in shared memory, and their scales; 16 bits are A registers there. */
template <int bits, int tokens> struct qf_wg_words {
    typedef qf_wg_shape<bits, tokens> shape;
    const uint8_t *slot;
    uint32_t word[bits < 16 ? bits : 1], scale[2];
    qf_row_scales rows;

    __device__ __forceinline__ void load_scales(int group)
    {
        const uint32_t *scales = reinterpret_cast<const uint32_t *>(slot + shape::weight_bytes) + group * 16;
        rows = qf_unpack_scales<bits>(scales[threadIdx.x % 32 / 4], scales[threadIdx.x % 32 / 4 + 8]);
        scale[0] = qf_pack_bf16(rows.scale[0], rows.scale[0]);
        scale[1] = qf_pack_bf16(rows.scale[1], rows.scale[1]);
    }
    __device__ __forceinline__ void load(const uint8_t *stage)
    {
        slot = stage + shape::x_bytes + threadIdx.x / 32 * shape::slot_bytes;
        if constexpr (bits < 16) {
#pragma unroll
            for (int i = 0; i < bits / 4; i++) {
                uint4 w = reinterpret_cast<const uint4 *>(slot + i * 512)[threadIdx.x % 32];
                word[4 * i] = w.x, word[4 * i + 1] = w.y, word[4 * i + 2] = w.z, word[4 * i + 3] = w.w;
            }
            load_scales(0);
        }
    }
    /* The A registers of a step of 16 k; steps in ascending order. */
    __device__ __forceinline__ void unpack(int step, int group_shift, uint32_t (&a)[4])
    {
        if constexpr (bits == 16) {
            uint4 w = reinterpret_cast<const uint4 *>(slot + step * 512)[threadIdx.x % 32];
            a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
        } else {
            if (step == 2 && group_shift == 5) {
                load_scales(1);
            }
            if constexpr (bits == 4) {
                qf_dequant_4(word[step], rows, a);
            } else {
                qf_dequant_8(word[2 * step], word[2 * step + 1], rows, a);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = qf_mul_bf16(a[i], scale[i & 1]);
            }
        }
    }
};

/* d += a batch: starts its steps as one group, and waits until no more than `pending` groups run. */
template <int tokens, int steps, int pending>
__device__ __forceinline__ void qf_wg_multiply(float (&d)[tokens / 2], const uint32_t (&a)[steps][4], uint64_t x)
{
    qf_wgmma_fence();
#pragma unroll
    for (int s = 0; s < steps; s++) {
        qf_wgmma<tokens>::add(d, a[s], x + s * QF_WGMMA_STEP);
    }
    qf_wgmma_commit();
    qf_wgmma_wait<pending>();
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

/* d = the products of `blocks` blocks of 128 k, from the stages on from `stage`, in tiles whose SM has other blocks too.
 * While one batch is multiplied the next is unpacked into the other set of A registers. */
template <int bits, int tokens>
__device__ __forceinline__ void qf_wg_sum(float (&d)[tokens / 2], const qf_wg_params &p, qf_wg_feed<bits, tokens> &feed,
                                          uint8_t *shared, uint64_t *full, uint64_t *empty, int &stage,
                                          uint32_t &phase, int blocks)
{
    typedef qf_wg_shape<bits, tokens> shape;
    constexpr int steps = shape::steps, batches = 8 / steps;
    uint32_t a[2][steps][4];
    int previous = 0; /* the stage of the batch before */
    const uint32_t x = qf_shared_address(shared);
    feed.wait();
    qf_wg_load<bits, tokens, steps>(a[0], shared + stage * shape::stage_bytes, 0, p.group_shift);
    qf_mbarrier_wait_bounded(&full[stage], phase);
    for (int block = 0; block < blocks; block++) {
#pragma unroll
        for (int i = 0; i < batches; i++) {
            const int k = i * 16 * steps % shape::stage_k, next_k = (k + 16 * steps) % shape::stage_k;
            const uint32_t batch = x + stage * shape::stage_bytes + k / 64 * shape::slice_bytes + k % 64 * 16;
            qf_wg_multiply<tokens, steps, 1>(d, a[i & 1], qf_wgmma_descriptor(batch));
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

/* The same in wide tiles, which have the SM to themselves. A warp stands still from a wgmma with A in registers to the
 * start of the next one, so the unpacking lies between the steps: step i + 2 is unpacked while i and i + 1 run. */
template <int bits, int tokens>
__device__ __forceinline__ void qf_wg_sum_wide(float (&d)[tokens / 2], const qf_wg_params &p,
                                               qf_wg_feed<bits, tokens> &feed, uint8_t *shared, uint64_t *full,
                                               uint64_t *empty, int &stage, uint32_t &phase, int blocks)
{
    typedef qf_wg_shape<bits, tokens> shape;
    static_assert(shape::stage_k == 64, "four steps a stage");
    uint32_t a[4][1][4];
    qf_wg_words<bits, tokens> words;
    feed.wait();
    words.load(shared + stage * shape::stage_bytes);
    words.unpack(0, p.group_shift, a[0][0]);
    words.unpack(1, p.group_shift, a[1][0]);
    qf_mbarrier_wait_bounded(&full[stage], phase);
    int previous = stage;
#pragma unroll 1
    for (int left = 2 * blocks; left > 0; left--) {
        const uint64_t x = qf_wgmma_descriptor(qf_shared_address(shared) + stage * shape::stage_bytes);
        qf_wg_multiply<tokens, 1, 2>(d, a[0], x);
        words.unpack(2, p.group_shift, a[2][0]);
        qf_wg_multiply<tokens, 1, 2>(d, a[1], x + QF_WGMMA_STEP);
        if (left < 2 * blocks) {
            qf_wg_release<shape::cluster>(&empty[previous]);
        }
        words.unpack(3, p.group_shift, a[3][0]);
        feed.fetch(p, shared + stage * shape::stage_bytes);
        previous = stage;
        if (++stage == shape::stages) {
            stage = 0;
            phase ^= 1;
        }
        /* After the last stage these words are not those of this sum, or none at all; they are not multiplied. */
        feed.wait();
        words.load(shared + stage * shape::stage_bytes);
        qf_wg_multiply<tokens, 1, 2>(d, a[2], x + 2 * QF_WGMMA_STEP);
        words.unpack(0, p.group_shift, a[0][0]);
        qf_wg_multiply<tokens, 1, 2>(d, a[3], x + 3 * QF_WGMMA_STEP);
        words.unpack(1, p.group_shift, a[1][0]);
        if (left > 1) {
            qf_mbarrier_wait_bounded(&full[stage], phase);
        }
    }
    qf_wgmma_wait<0>();
    qf_wgmma_pin(d);
    qf_wg_release<shape::cluster>(&empty[previous]);
}

#endif /* QF_SM90A */
#endif
