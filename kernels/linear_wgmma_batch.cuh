/* The kernel of linear_wgmma_batch.cu: see there. */
#ifndef QF_LINEAR_WGMMA_BATCH_CUH
#define QF_LINEAR_WGMMA_BATCH_CUH

#include "common/dequant.cuh"
#include "common/launch.cuh"
#include "common/wgmma.cuh"
#include "linear_mma_common.cuh"

#define QF_WB_DEPTH 4        /* units of weights in flight a warp */
#define QF_WB_MAX_STAGES 28  /* of x */
#define QF_WB_BARRIER_BYTES 512
#define QF_WB_LAG 3 /* stages of x between the one in use and the one that is filled again */

/* A unit of weights: 16 rows x 128 k and their scales. */
__host__ __device__ constexpr int qf_wb_unit_bytes(int bits) { return 256 * bits + 64; }
/* Warpgroups of a CTA: as many as the registers hold. */
__host__ __device__ constexpr int qf_wb_max_groups(int tokens) { return tokens == 32 ? 4 : 3; }

struct qf_wb_params {
    qf_linear_mma_params p;
    int32_t cta_tiles;   /* row tiles of a CTA */
    int32_t row_groups;  /* warpgroups along the rows */
    int32_t slices;      /* warpgroups along k: every slices-th block each */
    int32_t stages;      /* of x, slices k blocks each */
    uint32_t block_bytes, stage_bytes; /* of x: a k block's, a stage's */
    int32_t weight_offset; /* bytes of shared memory before the warps' rings */
};

#ifdef QF_SM90A

/* A warp's weights: a ring of units (row tile, k block) in shared memory, filled in the order of their use. */
template <int bits, int rows> struct qf_wb_feed {
    static constexpr int unit_bytes = qf_wb_unit_bytes(bits), last = (QF_WB_DEPTH - 1) * unit_bytes;
    const uint8_t *data[rows], *scales[rows]; /* of the next unit of each row tile, at this lane's bytes */
    uint32_t ring, to;                        /* shared addresses at this lane's bytes */
    int left[rows];                           /* units to fetch; none of a row tile that is not there */

    /* Fetches the next unit, of row tile r; r takes turns. */
    __device__ __forceinline__ void fetch(const qf_wb_params &w, int r, int lane)
    {
        if (left[r] > 0) {
#pragma unroll
            for (int i = 0; i < 256 * bits; i += 512) {
                qf_copy_16_stream(to + i, data[r] + i);
            }
            if (lane < 4) {
                qf_copy_16_stream(to + 256 * bits, scales[r]);
            }
        }
        qf_cp_async_commit();
        data[r] += w.slices * (256 * bits);
        scales[r] += w.slices * 64;
        left[r]--;
        to = to == ring + last ? ring : to + unit_bytes;
    }
};

/* x, which the warps share, is in a ring of stages: shared addresses of its parts. */
__device__ __forceinline__ uint32_t qf_wb_full(uint32_t shared, int slot) { return shared + slot * 8; }
__device__ __forceinline__ uint32_t qf_wb_empty(uint32_t shared, int slot)
{
    return shared + (QF_WB_MAX_STAGES + slot) * 8;
}
__device__ __forceinline__ uint32_t qf_wb_stage(const qf_wb_params &w, uint32_t shared, int slot)
{
    return shared + QF_WB_BARRIER_BYTES + slot * w.stage_bytes;
}

/* One thread: asks for stage `stage` of this CTA's share. */
__device__ __forceinline__ void qf_wb_fill(const qf_wb_params &w, uint32_t shared, int stage)
{
    const int slot = stage % w.stages, first = w.p.share_begin[blockIdx.y] + stage * w.slices;
    const int blocks = min(w.slices, w.p.share_begin[blockIdx.y + 1] - first);
    const uint32_t bytes = blocks * w.block_bytes, barrier = qf_wb_full(shared, slot);
    qf_barrier_expect(barrier, bytes);
    qf_bulk_copy_to(qf_wb_stage(w, shared, slot), w.p.x + (int64_t)first * w.block_bytes, bytes, barrier);
}

/* acc += scale * c */
template <int size>
__device__ __forceinline__ void qf_wb_add(float (&acc)[size], const float (&scale)[2], const float (&c)[size])
{
#pragma unroll
    for (int i = 0; i < size; i++) {
        acc[i] = fmaf(scale[i / 2 % 2], c[i], acc[i]);
    }
}

/* Scales of a lane's rows, g = lane / 4 and g + 8, and the way to A registers: those hold q - zero, 4 bits of row g + 8
 * a quarter of it, 8 bits a 64th, all exact; scale makes up for it. */
template <int bits> __device__ __forceinline__ qf_row_scales qf_wb_scales(uint32_t row0, uint32_t row8)
{
    qf_row_scales scales;
    if (bits == 4) {
        scales = qf_unpack_scales<4>(row0, row8);
        qf_quick_scales(scales, row8);
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t row = i == 0 ? row0 : row8;
            const float zero = qf_bf16_high(row) * -0x1p-6f;
            scales.scale[i] = 64.0f * __half2float(__ushort_as_half((unsigned short)(row & 0xffffu)));
            scales.zero[i] = qf_pack_bf16(zero, zero);
        }
    }
    return scales;
}

/* Four steps of 16 k from half a unit, at this lane's bytes. 8 bits: q as a bf16's bits is q 2^-133; times 2^127, less
 * zero / 64, it is (q - zero) / 64. */
template <int bits>
__device__ __forceinline__ void qf_wb_unpack(uint32_t (&a)[4][4], const uint4 (&w)[bits / 4],
                                             const qf_row_scales &scales)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (bits == 4) {
            const uint32_t words[4] = {w[0].x, w[0].y, w[0].z, w[0].w};
            qf_quick_dequant_4(words[i], scales, a[i]);
        } else {
            const uint32_t words[4] = {w[i / 2].x, w[i / 2].y, w[i / 2].z, w[i / 2].w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32_t q = __byte_perm(words[i % 2 * 2 + j / 2], 0, j % 2 == 0 ? 0x4140 : 0x4342);
                a[i][j] = qf_fma_bf16(q, 0x7f007f00u, scales.zero[j % 2]);
            }
        }
    }
}

/* The words of half a unit. */
template <int bits> __device__ __forceinline__ void qf_wb_load(uint4 (&w)[bits / 4], uint32_t from)
{
#pragma unroll
    for (int i = 0; i < bits / 4; i++) {
        w[i] = qf_shared_load_16(from + i * 512);
    }
}

/* c = or += four steps, as one group. x: the lower word of the descriptor of the first. */
template <int tokens, bool first>
__device__ __forceinline__ void qf_wb_multiply(float (&c)[tokens / 2], const uint32_t (&a)[4][4], uint32_t x)
{
    qf_wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint64_t b = (uint64_t)(1024 >> 4) << 32 | (x + i * QF_WGMMA_STEP); /* never carries */
        if (first && i == 0) {
            qf_wgmma<tokens>::set(c, a[i], b);
        } else {
            qf_wgmma<tokens>::add(c, a[i], b);
        }
    }
    qf_wgmma_commit();
}

/* The first thread, of slice 0 and so with as many blocks as there are stages: asks for what follows stage `stage` in
 * its place, once all warps have read it. */
__device__ __forceinline__ void qf_wb_refill(const qf_wb_params &w, uint32_t shared, int stage, int blocks)
{
    if (stage >= 0 && stage + w.stages < blocks) {
        qf_barrier_wait(qf_wb_empty(shared, stage % w.stages), stage / w.stages & 1);
        qf_wb_fill(w, shared, stage + w.stages);
    }
}

/* acc = this warpgroup's products, of `rows` row tiles a warp and `blocks` blocks. A unit's products with q - zero are
 * a sum of their own, c, which is scaled and added when half of the next unit is unpacked. */
template <int bits, int tokens, int rows>
__device__ __forceinline__ void qf_wb_sum(float (&acc)[rows][tokens / 2], qf_wb_feed<bits, rows> &feed,
                                          const qf_wb_params &w, uint32_t shared, int slice, int blocks)
{
    const int lane = threadIdx.x % 32;
    float c[tokens / 2], previous[2] = {0.0f, 0.0f};
    uint32_t a[2][4][4];
#pragma unroll
    for (int i = 0; i < tokens / 2; i++) {
#pragma unroll
        for (int r = 0; r < rows; r++) {
            acc[r][i] = 0.0f;
        }
        c[i] = 0.0f;
    }
    const uint32_t half = w.block_bytes / 2 / 16; /* in descriptors */
    uint32_t from = feed.ring, phase = 0;
    int slot = 0;
    const uint32_t scale_from = 256 * bits - lane * 16 + lane / 4 * 4; /* from this lane's words to its scales */
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
#pragma unroll
        for (int r = 0; r < rows; r++) {
            qf_cp_async_wait<QF_WB_DEPTH - 1>();
            __syncwarp();
            uint4 low[bits / 4], high[bits / 4];
            qf_wb_load<bits>(low, from);
            const uint32_t row0 = qf_shared_load_4(from + scale_from), row8 = qf_shared_load_4(from + scale_from + 32);
            if (bits == 4) {
                qf_wb_load<bits>(high, from + 128 * bits);
            }
            const qf_row_scales scales = qf_wb_scales<bits>(row0, row8);
            qf_wb_unpack<bits>(a[0], low, scales);
            qf_wgmma_wait<0>(); /* the unit before */
            qf_wgmma_pin(c);
            qf_wb_add(acc[(r + rows - 1) % rows], previous, c);
            previous[0] = scales.scale[0];
            previous[1] = scales.scale[1];
            if (r == 0) {
                if (block > 0 && lane == 0) { /* the stage before is read */
                    const int done = slot == 0 ? w.stages - 1 : slot - 1;
                    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(qf_wb_empty(shared, done))
                                 : "memory");
                    if (threadIdx.x == 0) {
                        qf_wb_refill(w, shared, block - QF_WB_LAG, blocks);
                    }
                }
                __syncwarp();
                qf_barrier_wait(qf_wb_full(shared, slot), phase);
            }
            const uint32_t x =
                (uint32_t)qf_wgmma_descriptor(qf_wb_stage(w, shared, slot) + slice * w.block_bytes);
            qf_wb_multiply<tokens, true>(c, a[0], x);
            if (bits == 8) { /* not earlier: registers */
                qf_wb_load<bits>(high, from + 128 * bits);
            }
            from = from == feed.ring + feed.last ? feed.ring : from + feed.unit_bytes;
            qf_wb_unpack<bits>(a[1], high, scales);
            qf_wb_multiply<tokens, false>(c, a[1], x + half);
            feed.fetch(w, (r + QF_WB_DEPTH) % rows, lane);
            qf_wgmma_wait<1>(); /* a[0] is read */
        }
        if (++slot == w.stages) {
            slot = 0;
            phase ^= 1;
        }
    }
    qf_wgmma_wait<0>();
    qf_wgmma_pin(c);
    qf_wb_add(acc[rows - 1], previous, c);
}

/* A division by the reciprocal, right to 2 units of 2^-23, has no branch. */
__device__ __forceinline__ float qf_wb_silu_mul(float gate, float up)
{
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

/* A row tile: partial sums, or silu(gate) * up with gate in rows 0 .. 7 and up in rows 8 .. 15. */
template <int tokens>
__device__ __forceinline__ void qf_wb_store(const qf_linear_mma_params &p, const float (&acc)[tokens / 2], int tile,
                                            int lane, int share)
{
    const int n = p.row_tiles * 16, row = tile * 16 + lane / 4;
    float bias[2] = {0.0f, 0.0f};
    if (p.bias != nullptr && share == 0) {
        bias[0] = p.bias[row];
        bias[1] = p.bias[row + 8];
    }
    if (p.act == nullptr) {
        const int left = p.num_tokens - 2 * (lane % 4);
        float *out = p.out + ((int64_t)share * p.num_tokens + 2 * (lane % 4)) * n + row;
#pragma unroll
        for (int j = 0; j < tokens / 8; j++) {
            if (8 * j < left) {
                out[0] = fmaf(acc[4 * j], p.multiplier, bias[0]);
                out[8] = fmaf(acc[4 * j + 2], p.multiplier, bias[1]);
            }
            if (8 * j + 1 < left) {
                out[n] = fmaf(acc[4 * j + 1], p.multiplier, bias[0]);
                out[n + 8] = fmaf(acc[4 * j + 3], p.multiplier, bias[1]);
            }
            out += 8 * (int64_t)n;
        }
        return;
    }
    uint32_t *act = p.act + ((int64_t)(tile / 8) * p.num_tiles * 8 + tile % 8) * 32 + lane;
#pragma unroll
    for (int j = 0; j < tokens / 8; j++) {
        const float low = qf_wb_silu_mul(fmaf(acc[4 * j], p.multiplier, bias[0]),
                                         fmaf(acc[4 * j + 2], p.multiplier, bias[1]));
        const float high = qf_wb_silu_mul(fmaf(acc[4 * j + 1], p.multiplier, bias[0]),
                                          fmaf(acc[4 * j + 3], p.multiplier, bias[1]));
        const uint32_t word = qf_movmatrix_trans(qf_pack_bf16(low, high));
        if (j * 8 + lane / 4 < p.num_tokens) {
            act[j * 256] = word;
        }
    }
}

/* Adds the slices' sums in order in the warpgroups of slice 0. */
template <int tokens, int rows>
__device__ __forceinline__ void qf_wb_add_slices(float (&acc)[rows][tokens / 2], float *slots, int slices, int slice,
                                                 int row_groups, int row_group)
{
    constexpr int size = rows * tokens / 2;
    const int thread = threadIdx.x % 128;
    __syncthreads(); /* the slots are where x was */
    if (slice > 0) {
        float *slot = slots + ((slice - 1) * row_groups + row_group) * (size * 128) + thread;
#pragma unroll
        for (int i = 0; i < size; i++) {
            slot[i * 128] = acc[i / (tokens / 2)][i % (tokens / 2)];
        }
    }
    __syncthreads();
    for (int s = 1; s < slices && slice == 0; s++) {
        const float *slot = slots + ((s - 1) * row_groups + row_group) * (size * 128) + thread;
#pragma unroll
        for (int i = 0; i < size; i++) {
            acc[i / (tokens / 2)][i % (tokens / 2)] += slot[i * 128];
        }
    }
}

/* A warpgroup's whole work with `rows` row tiles a warp. */
template <int bits, int tokens, int rows>
__device__ __forceinline__ void qf_wb_run(const qf_wb_params &w, uint8_t *all_shared, int warp)
{
    const qf_linear_mma_params &p = w.p;
    const uint32_t shared = qf_shared_address(all_shared);
    const int lane = threadIdx.x % 32, group = warp / 4;
    const int slice = group / w.row_groups, row_group = group - slice * w.row_groups;
    const int first_block = p.share_begin[blockIdx.y] + slice;
    const int blocks = (p.share_begin[blockIdx.y + 1] - first_block + w.slices - 1) / w.slices;
    const int first_tile = blockIdx.x * w.cta_tiles, tiles = min(w.cta_tiles, p.row_tiles - first_tile);
    qf_wb_feed<bits, rows> feed;
#pragma unroll
    for (int r = 0; r < rows; r++) {
        const int tile = (r * w.row_groups + row_group) * 4 + warp % 4;
        const int64_t unit = (int64_t)(first_tile + tile) * p.blocks + first_block;
        feed.data[r] = p.data + unit * (256 * bits) + lane * 16;
        feed.scales[r] = reinterpret_cast<const uint8_t *>(p.scales) + unit * 64 + lane % 4 * 16;
        feed.left[r] = tile < tiles ? blocks : 0;
    }
    feed.ring = feed.to = shared + w.weight_offset + warp * (QF_WB_DEPTH * qf_wb_unit_bytes(bits)) + lane * 16;
#pragma unroll
    for (int i = 0; i < QF_WB_DEPTH; i++) {
        feed.fetch(w, i % rows, lane);
    }
    qf_grid_dependency_wait();
    if (threadIdx.x == 0) {
        for (int i = 0; i < min(w.stages, blocks); i++) {
            qf_wb_fill(w, shared, i);
        }
    }
    __syncwarp();
    float acc[rows][tokens / 2];
    qf_wb_sum<bits, tokens, rows>(acc, feed, w, shared, slice, blocks);
    if (w.slices > 1) {
        qf_wb_add_slices<tokens, rows>(acc, reinterpret_cast<float *>(all_shared + QF_WB_BARRIER_BYTES), w.slices,
                                       slice, w.row_groups, row_group);
    }
#pragma unroll
    for (int r = 0; r < rows; r++) {
        const int tile = (r * w.row_groups + row_group) * 4 + warp % 4;
        if (slice == 0 && tile < tiles) {
            qf_wb_store<tokens>(p, acc[r], first_tile + tile, lane, blockIdx.y);
        }
    }
}

#endif /* QF_SM90A */

/* act's padding along k. */
static __device__ __forceinline__ void qf_wb_pad(const qf_linear_mma_params &p, int threads)
{
    const int words = p.num_tiles * 32;
    for (int i = threadIdx.x; i < (p.act_tiles - p.row_tiles) * words; i += threads) {
        int row = p.row_tiles + i / words, token_tile = i % words / 32;
        p.act[(((row / 8) * p.num_tiles + token_tile) * 8 + row % 8) * 32 + i % 32] = 0;
    }
}

/* Grid (row tiles / cta_tiles, shares of k); row_groups x slices warpgroups. */
template <int bits, int tokens>
static __global__ void __launch_bounds__(128 * qf_wb_max_groups(tokens), 1)
    qf_linear_wgmma_batch_kernel(const __grid_constant__ qf_wb_params w)
{
#ifdef QF_SM90A
    extern __shared__ __align__(128) uint8_t shared[];
    const qf_linear_mma_params &p = w.p;
    const int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); /* known to be the same in all lanes */
    qf_grid_launch_dependents();
    if (threadIdx.x < w.stages) {
        uint64_t *barriers = reinterpret_cast<uint64_t *>(shared);
        qf_mbarrier_init(&barriers[threadIdx.x], 1);
        qf_mbarrier_init(&barriers[QF_WB_MAX_STAGES + threadIdx.x], blockDim.x / 32);
        qf_mbarrier_init_fence();
    }
    __syncthreads();
    if (w.cta_tiles > (w.row_groups + warp / 4) * 4) { /* then there is one slice */
        qf_wb_run<bits, tokens, 2>(w, shared, warp);
    } else {
        qf_wb_run<bits, tokens, 1>(w, shared, warp);
    }
    if (p.act != nullptr && blockIdx.x == 0) {
        qf_wb_pad(p, blockDim.x);
    }
#endif
}

#endif
