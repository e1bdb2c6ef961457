/* The kernel of linear_wgmma_batch.cu for large linears of 4 bits and up to 32 tokens: see there. */
#ifndef QF_LINEAR_WGMMA_ROWS_CUH
#define QF_LINEAR_WGMMA_ROWS_CUH

#include "linear_wgmma_batch.cuh"

#define QF_WR_SLICES 3     /* warpgroups, each with every third block of k */
#define QF_WR_THREADS 384
#define QF_WR_MAX_STAGES 4 /* of x, one block of k, a warpgroup */
#define QF_WR_BARRIER_BYTES 256
#define QF_WR_UNIT_BYTES 1024 /* 16 rows x 128 k */
#define QF_WR_BANKS 2          /* blocks of k in a warp's ring of weights */

__host__ __device__ constexpr int qf_wr_ring_bytes(int rows)
{
    return QF_WR_THREADS / 32 * rows * (QF_WR_BANKS * QF_WR_UNIT_BYTES + (QF_WR_BANKS + 1) * 64);
}
/* The sums of all warpgroups, which pass through shared memory. */
__host__ __device__ constexpr int qf_wr_sums_bytes(int rows) { return QF_WR_SLICES * rows * 64 * 32 * 4; }

/* CTAs with so many row tiles each for so many shares of k: those of one share after those of another. */
struct qf_wr_kind {
    int32_t cta_tiles, ctas, first_share;
};

struct qf_wr_params {
    qf_linear_mma_params p;
    qf_wr_kind kinds[2];   /* wide, narrow */
    int32_t first_narrow;  /* CTA */
    int32_t stages;        /* of x, a warpgroup */
    uint32_t block_bytes;  /* of x, a block of k */
    int32_t weight_offset; /* bytes of shared memory before the warps' rings */
};

#ifdef QF_SM90A

/* A stage of x of a warpgroup: its address, its barriers: it is there, it is read. */
__device__ __forceinline__ uint32_t qf_wr_stage(const qf_wr_params &w, uint32_t shared, int slice, int slot)
{
    return shared + QF_WR_BARRIER_BYTES + (slice * w.stages + slot) * w.block_bytes;
}
__device__ __forceinline__ uint32_t qf_wr_full(uint32_t shared, int slice, int slot)
{
    return shared + slice * 64 + slot * 8;
}
__device__ __forceinline__ uint32_t qf_wr_empty(uint32_t shared, int slice, int slot)
{
    return qf_wr_full(shared, slice, slot) + 32;
}

__device__ __forceinline__ void qf_wr_init(uint32_t barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void qf_wr_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* The blocks of k of a warpgroup: of its CTA's share every third, as many as the others have; then all warpgroups have
 * the one or two that are left, and of these every third row tile. */
struct qf_wr_blocks {
    int slice, whole, all;
};

/* From block `block` to the next, in blocks of k. */
__device__ __forceinline__ int qf_wr_step(const qf_wr_blocks &b, int block)
{
    return block + 1 < b.whole ? QF_WR_SLICES : block + 1 == b.whole ? QF_WR_SLICES - b.slice : 1;
}

/* The row tiles, as bits, of block `block`. */
__device__ __forceinline__ uint32_t qf_wr_mask(const qf_wr_blocks &b, int block)
{
    return block < b.whole ? 0x1fu : block >= b.all ? 0u : 0x9u << (block == b.whole ? b.slice : 2 - b.slice);
}

/* 16 bytes of weights to a shared address, if `wanted` is not 0. */
__device__ __forceinline__ void qf_wr_copy_16(uint32_t to, const void *from, uint32_t wanted)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n"
                 "@p cp.async.cg.shared.global.L2::256B [%0], [%1], 16;\n}" ::"r"(to),
                 "l"(from), "r"(wanted)
                 : "memory");
}

/* A warp's weights: rings of k blocks in shared memory, of words, which a lane reads as it copied them, and of scales,
 * with one block more. */
struct qf_wr_feed {
    const uint8_t *data, *scales; /* of the next block, at this lane's bytes */
    uint32_t row_data;            /* from a row tile of this warp to the next */

    /* Fetches the words of row tile r, if it is in `mask`. */
    __device__ __forceinline__ void fetch(uint32_t to, int r, uint32_t mask)
    {
        const uint8_t *from = data + r * row_data;
        qf_wr_copy_16(to, from, mask & 1u << r);
        qf_wr_copy_16(to + 512, from + 512, mask & 1u << r);
        qf_cp_async_commit();
    }
    /* The scales of all row tiles, by four lanes each; before the words of the first. */
    __device__ __forceinline__ void fetch_scales(uint32_t to, uint32_t mask, int lane)
    {
        qf_wr_copy_16(to, scales, mask & 1u << lane / 4);
    }
    /* To block `block` + 1. */
    __device__ __forceinline__ void next(const qf_wr_blocks &b, int block)
    {
        const int step = qf_wr_step(b, block);
        data += step * 1024;
        scales += step * 64;
    }
};

/* One thread: asks for a block of x. */
__device__ __forceinline__ void qf_wr_fill(const qf_wr_params &w, uint32_t shared, int slice, int slot,
                                           const uint8_t *from)
{
    const uint32_t full = qf_wr_full(shared, slice, slot);
    qf_barrier_expect(full, w.block_bytes);
    qf_bulk_copy_to(qf_wr_stage(w, shared, slice, slot), from, w.block_bytes, full);
}

/* What a CTA computes. */
struct qf_wr_place {
    int first_tile, tiles, share;
};

__device__ __forceinline__ qf_wr_place qf_wr_place_get(const qf_wr_params &w, bool narrow)
{
    const qf_wr_kind &kind = w.kinds[narrow];
    const int cta = narrow ? blockIdx.x - w.first_narrow : blockIdx.x, share = qf_divide_small(cta, kind.ctas);
    qf_wr_place place;
    place.first_tile = (cta - share * kind.ctas) * kind.cta_tiles;
    place.tiles = min(kind.cta_tiles, w.p.row_tiles - place.first_tile);
    place.share = share + kind.first_share;
    return place;
}

/* Where a warpgroup is in its stages of x. */
struct qf_wr_x {
    const uint8_t *next; /* one thread: the block to ask for */
    int asked;           /* blocks asked for */
    int slot, refilled;
    uint32_t phase, refill_phase;

    __device__ __forceinline__ void ask(const qf_wr_params &w, uint32_t shared, const qf_wr_blocks &b, int to)
    {
        qf_wr_fill(w, shared, b.slice, to, next);
        next += qf_wr_step(b, asked++) * w.block_bytes;
    }
    /* To block `block`, all products with the one before done. What is asked for takes the place of the one before
     * that, which the other warps have long read. */
    __device__ __forceinline__ void turn(const qf_wr_params &w, uint32_t shared, const qf_wr_blocks &b, int block,
                                         int lane)
    {
        if (block > 0 && lane == 0) {
            qf_wr_arrive(qf_wr_empty(shared, b.slice, slot == 0 ? w.stages - 1 : slot - 1));
            if (threadIdx.x % 128 == 0 && block > 1) {
                if (block - 2 + w.stages < b.all) {
                    qf_barrier_wait(qf_wr_empty(shared, b.slice, refilled), refill_phase);
                    ask(w, shared, b, refilled);
                }
                if (++refilled == w.stages) {
                    refilled = 0;
                    refill_phase ^= 1;
                }
            }
        }
        __syncwarp();
        qf_barrier_wait(qf_wr_full(shared, b.slice, slot), phase);
    }
    __device__ __forceinline__ void advance(int stages)
    {
        if (++slot == stages) {
            slot = 0;
            phase ^= 1;
        }
    }
};

/* A lane's part of a unit. */
struct qf_wr_unit {
    uint32_t words[8];
    qf_row_scales scales;

    __device__ __forceinline__ void load(uint32_t from, uint32_t scales_from)
    {
        const uint4 low = qf_shared_load_16(from);
        const uint32_t row0 = qf_shared_load_4(scales_from), row8 = qf_shared_load_4(scales_from + 32);
        const uint4 high = qf_shared_load_16(from + 512);
        scales = qf_wb_scales<4>(row0, row8);
        words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
        words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
    }
    /* Four steps of 16 k. */
    __device__ __forceinline__ void unpack(uint32_t (&a)[4][4], int half) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            qf_quick_dequant_4(words[4 * half + i], scales, a[i]);
        }
    }
};

/* A warp's work. */
template <int rows> struct qf_wr_work {
    static constexpr int banks = QF_WR_BANKS, bank_bytes = rows * QF_WR_UNIT_BYTES;
    static constexpr int scale_banks = banks + 1, scale_bank_bytes = rows * 64;
    qf_wr_blocks blocks;
    qf_wr_feed feed;
    qf_wr_x x;
    uint32_t tile_mask; /* row tiles that are there */
    /* Shared addresses: at this lane's bytes, the ring of words and the block's place; at its row's scales, the block's
     * place, and that of the block before, which the next to be fetched takes. */
    uint32_t ring, from, scales_from, scales_to;
    int bank, scale_bank, lane;

    /* Fetches what the ring has room for, readies the barriers, and asks for x. */
    __device__ __forceinline__ void start(const qf_wr_params &w, const qf_wr_place &place, uint32_t shared, int slice,
                                          int warp)
    {
        const qf_linear_mma_params &p = w.p;
        const int share_blocks = p.share_begin[place.share + 1] - p.share_begin[place.share];
        lane = threadIdx.x % 32;
        blocks.slice = slice;
        blocks.whole = (int)((uint32_t)share_blocks / QF_WR_SLICES);
        blocks.all = share_blocks - blocks.whole * (QF_WR_SLICES - 1);
        const int first_block = p.share_begin[place.share] + (blocks.whole > 0 ? slice : 0);
        tile_mask = (1u << ((place.tiles - warp + 3) >> 2)) - 1;
        ring = from = shared + w.weight_offset + (slice * 4 + warp) * (banks * bank_bytes) + lane * 16;
        const uint32_t scale_ring = shared + w.weight_offset + QF_WR_THREADS / 32 * banks * bank_bytes +
                                    (slice * 4 + warp) * (scale_banks * scale_bank_bytes);
        scales_from = scale_ring + lane / 4 * 4;
        scales_to = scale_ring + banks * scale_bank_bytes + lane * 16;
        bank = scale_bank = 0;
        const int64_t unit = (int64_t)(place.first_tile + warp) * p.blocks + first_block;
        feed.data = p.data + unit * 1024 + lane * 16;
        feed.row_data = p.blocks * 4096;
        feed.scales = reinterpret_cast<const uint8_t *>(p.scales) + unit * 64 + lane / 4 * (p.blocks * 256) +
                      lane % 4 * 16;
#pragma unroll
        for (int i = 0; i < banks; i++) {
            const uint32_t mask = qf_wr_mask(blocks, i) & tile_mask;
            feed.fetch_scales(scale_ring + i * scale_bank_bytes + lane * 16, mask, lane);
#pragma unroll
            for (int r = 0; r < rows; r++) {
                feed.fetch(ring + (i * rows + r) * QF_WR_UNIT_BYTES, r, mask);
            }
            feed.next(blocks, i);
        }
        if (threadIdx.x % 128 < 2 * QF_WR_MAX_STAGES) {
            const int i = threadIdx.x % 128;
            qf_wr_init(qf_wr_full(shared, slice, i), i < QF_WR_MAX_STAGES ? 1 : 4);
            qf_mbarrier_init_fence();
        }
        __syncthreads();
        qf_grid_dependency_wait();
        x = {p.x + (int64_t)first_block * w.block_bytes, 0, 0, 0, 0, 0};
        if (threadIdx.x % 128 == 0) {
            for (int i = 0; i < min(w.stages, blocks.all); i++) {
                x.ask(w, shared, blocks, i);
            }
        }
        __syncwarp();
    }

    /* To the next block's places. */
    __device__ __forceinline__ void advance(const qf_wr_params &w)
    {
        from += bank_bytes;
        if (++bank == banks) {
            bank = 0;
            from = ring;
        }
        scales_to = scales_from - lane / 4 * 4 + lane * 16;
        scales_from += scale_bank_bytes;
        if (++scale_bank == scale_banks) {
            scale_bank = 0;
            scales_from -= scale_banks * scale_bank_bytes;
        }
        x.advance(w.stages);
    }

    __device__ __forceinline__ uint32_t x_descriptor(const qf_wr_params &w, uint32_t shared) const
    {
        return (uint32_t)qf_wgmma_descriptor(qf_wr_stage(w, shared, blocks.slice, x.slot));
    }
};

/* acc = the products of the whole blocks. A unit's products with q - zero are a sum of their own, c, which is scaled
 * and added when the next unit is unpacked. */
template <int rows>
__device__ __forceinline__ void qf_wr_sum(float (&acc)[rows][16], qf_wr_work<rows> &work, const qf_wr_params &w,
                                          uint32_t shared)
{
    constexpr int banks = QF_WR_BANKS;
    const uint32_t half = w.block_bytes / 2 / 16; /* in descriptors */
    float c[16], previous[2] = {0.0f, 0.0f};
    uint32_t a[2][4][4];
    qf_wr_unit u;
#pragma unroll
    for (int i = 0; i < 16; i++) {
#pragma unroll
        for (int r = 0; r < rows; r++) {
            acc[r][i] = 0.0f;
        }
        c[i] = 0.0f;
    }
#pragma unroll 1
    for (int block = 0; block < work.blocks.whole; block++) {
        const uint32_t mask = qf_wr_mask(work.blocks, block + banks) & work.tile_mask;
#pragma unroll
        for (int r = 0; r < rows; r++) {
            qf_cp_async_wait<banks * rows - 1>();
            if (r == 0) {
                __syncwarp(); /* all lanes' scales; those of the block before are read */
            }
            u.load(work.from + r * QF_WR_UNIT_BYTES, work.scales_from + r * 64);
            u.unpack(a[0], 0);
            qf_wgmma_wait<0>(); /* the unit before */
            qf_wgmma_pin(c);
            qf_wb_add(acc[(r + rows - 1) % rows], previous, c);
            previous[0] = u.scales.scale[0];
            previous[1] = u.scales.scale[1];
            if (r == 0) {
                work.x.turn(w, shared, work.blocks, block, work.lane);
            }
            const uint32_t x = work.x_descriptor(w, shared);
            qf_wb_multiply<32, true>(c, a[0], x);
            u.unpack(a[1], 1);
            qf_wb_multiply<32, false>(c, a[1], x + half);
            if (r == 0) {
                work.feed.fetch_scales(work.scales_to, mask, work.lane);
            }
            work.feed.fetch(work.from + r * QF_WR_UNIT_BYTES, r, mask);
            qf_wgmma_wait<1>(); /* a[0] is read */
        }
        work.feed.next(work.blocks, block + banks);
        work.advance(w);
    }
    qf_wgmma_wait<0>();
    qf_wgmma_pin(c);
    qf_wb_add(acc[rows - 1], previous, c);
}

/* acc += those of the blocks that are left, a third of the row tiles each. */
template <int rows>
__device__ __forceinline__ void qf_wr_sum_rest(float (&acc)[rows][16], qf_wr_work<rows> &work, const qf_wr_params &w,
                                               uint32_t shared)
{
    const uint32_t half = w.block_bytes / 2 / 16;
    qf_cp_async_wait<0>();
    __syncwarp();
#pragma unroll 1
    for (int block = work.blocks.whole; block < work.blocks.all; block++) {
        const uint32_t mask = qf_wr_mask(work.blocks, block);
        work.x.turn(w, shared, work.blocks, block, work.lane);
        const uint32_t x = work.x_descriptor(w, shared);
#pragma unroll
        for (int r = 0; r < rows; r++) {
            if ((mask & 1u << r) == 0) {
                continue;
            }
            float c[16];
            uint32_t a[2][4][4];
            qf_wr_unit u;
            u.load(work.from + r * QF_WR_UNIT_BYTES, work.scales_from + r * 64);
            u.unpack(a[0], 0);
            qf_wb_multiply<32, true>(c, a[0], x);
            u.unpack(a[1], 1);
            qf_wb_multiply<32, false>(c, a[1], x + half);
            qf_wgmma_wait<0>();
            qf_wgmma_pin(c);
            qf_wb_add(acc[r], u.scales.scale, c);
        }
        work.advance(w);
    }
}

/* Adds the warpgroups' sums in order and stores them; a warpgroup has every third row of tiles. */
template <int rows>
__device__ __forceinline__ void qf_wr_finish(const float (&acc)[rows][16], const qf_wr_params &w,
                                             const qf_wr_place &place, uint8_t *shared, int slice, int warp)
{
    float4 *sums = reinterpret_cast<float4 *>(shared + QF_WR_BARRIER_BYTES) + threadIdx.x % 128;
    __syncthreads(); /* the sums are where x and weights were */
#pragma unroll
    for (int i = 0; i < rows * 4; i++) {
        const float *v = &acc[i / 4][i % 4 * 4];
        sums[(slice * rows * 4 + i) * 128] = make_float4(v[0], v[1], v[2], v[3]);
    }
    __syncthreads();
#pragma unroll 1
    for (int r = slice; r < rows && r * 4 + warp < place.tiles; r += QF_WR_SLICES) {
        float sum[16];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float4 v[QF_WR_SLICES];
#pragma unroll
            for (int s = 0; s < QF_WR_SLICES; s++) {
                v[s] = sums[((s * rows + r) * 4 + i) * 128];
            }
            sum[4 * i] = v[0].x + v[1].x + v[2].x;
            sum[4 * i + 1] = v[0].y + v[1].y + v[2].y;
            sum[4 * i + 2] = v[0].z + v[1].z + v[2].z;
            sum[4 * i + 3] = v[0].w + v[1].w + v[2].w;
        }
        qf_wb_store<32>(w.p, sum, place.first_tile + r * 4 + warp, threadIdx.x % 32, place.share);
    }
}

template <int rows>
__device__ __forceinline__ void qf_wr_run(const qf_wr_params &w, bool narrow, uint8_t *shared, int warp)
{
    const qf_wr_place place = qf_wr_place_get(w, narrow);
    qf_wr_work<rows> work;
    float acc[rows][16];
    work.start(w, place, qf_shared_address(shared), warp >> 2, warp & 3);
    qf_wr_sum<rows>(acc, work, w, qf_shared_address(shared));
    qf_wr_sum_rest<rows>(acc, work, w, qf_shared_address(shared));
    qf_wr_finish<rows>(acc, w, place, shared, threadIdx.x / 128, threadIdx.x / 32 % 4);
}

#endif /* QF_SM90A */

/* Wide CTAs have `rows` row tiles a warp, narrow ones one less. */
template <int rows>
static __global__ void __launch_bounds__(QF_WR_THREADS, 1)
    qf_linear_wgmma_rows_kernel(const __grid_constant__ qf_wr_params w)
{
#ifdef QF_SM90A
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); /* known to be the same in all lanes */
    qf_grid_launch_dependents();
    if ((int)blockIdx.x < w.first_narrow) {
        qf_wr_run<rows>(w, false, shared, warp);
    } else {
        qf_wr_run<rows - 1>(w, true, shared, warp);
    }
    if (w.p.act != nullptr && blockIdx.x == 0) {
        qf_wb_pad(w.p, QF_WR_THREADS);
    }
#endif
}

#endif
