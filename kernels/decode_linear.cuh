/* A CTA's part of one linear: its consumer warps take the units of each chunk of the ring in turn, every warp sums what
 * it has of a row tile in registers and leaves it in `red`; behind a barrier, 8 threads a tile add the warps' sums,
 * always as the same tree, and store the results.
 *
 * `red` is (row tiles, warps, 8 row pairs, 2 floats) and all zeros whenever a part is begun: who adds up a place also
 * clears it, before the barrier at which x of the next part is complete. So a warp without a unit in a tile adds
 * nothing. The same code serves qkv, o, gate_up and down; the head, of other formats and with more row tiles, has its
 * own. */
#ifndef QF_DECODE_LINEAR_CUH
#define QF_DECODE_LINEAR_CUH

#include "decode_gather.cuh"
#include "decode_units.cuh"

/* Where a warp stands in its part. */
struct qf_decode_walk {
    int32_t chunk, chunks;
    int32_t unit, end;     /* of the current chunk */
    int32_t tile;          /* local row tile whose sums are in acc; -1: none */
    float acc[2];          /* rows g and g + 8 */
};

/* Awaits the chunk and finds this warp's units of it. `blocks` blocks a chunk, 1 << unit_shift units a block. */
__device__ __forceinline__ void qf_decode_open(const qf_decode_ring &ring, int blocks, int unit_shift,
                                               qf_decode_walk &walk)
{
    const int chunk_blocks = QF_DECODE_CHUNK_UNITS >> unit_shift;
    const int units = min(chunk_blocks, blocks - walk.chunk * chunk_blocks) << unit_shift;
    const int per = (units + QF_DECODE_WARPS - 1) / QF_DECODE_WARPS;
    walk.unit = min((int)(threadIdx.x >> 5) * per, units);
    walk.end = min(walk.unit + per, units);
    qf_ring_wait(&qf_fixed().full[ring.stage], ring.parity, &qf_fixed().failed);
}

__device__ __forceinline__ void qf_decode_close(const qf_decode_params &p, qf_decode_ring &ring, qf_decode_walk &walk)
{
    __syncwarp();
    if ((threadIdx.x & 31) == 0) {
        qf_mbarrier_arrive(&qf_fixed().empty[ring.stage]);
    }
    qf_ring_advance(p, ring);
    walk.chunk++;
}

__device__ __forceinline__ void qf_decode_load(uint32_t unit, uint32_t (&words)[8])
{
    const uint32_t at = unit + (threadIdx.x & 31) * 16;
    const uint4 low = qf_shared_load_16(at), high = qf_shared_load_16(at + 512);
    words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
    words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
}

/* Leaves the sums of the walk's row tile for the adders; first: the row tile that stands first in `red`. */
__device__ __forceinline__ void qf_decode_leave(const qf_decode_params &p, int first, qf_decode_walk &walk)
{
    if (walk.tile >= 0 && (threadIdx.x & 3) == 0) {
        float *red = reinterpret_cast<float *>(qf_decode_shared + p.map.red);
        *reinterpret_cast<float2 *>(red + (walk.tile - first) * QF_DECODE_TILE_FLOATS + (threadIdx.x >> 2) * 2) =
            make_float2(walk.acc[0], walk.acc[1]);
    }
}

/* The warps' sums of one row pair of a tile. */
__device__ __forceinline__ float2 *qf_decode_red(const qf_decode_params &p, int tile, int g)
{
    return reinterpret_cast<float2 *>(reinterpret_cast<float *>(qf_decode_shared + p.map.red) +
                                      tile * QF_DECODE_TILE_FLOATS) + g;
}

/* Adds them up: as a tree, which is soon done. */
__device__ __forceinline__ float2 qf_decode_add_up(uint32_t red)
{
    float2 v[16];
#pragma unroll
    for (int w = 0; w < 16; w++) {
        v[w] = w < QF_DECODE_WARPS ? qf_lds_64(red + w * 64) : make_float2(0.0f, 0.0f);
    }
#pragma unroll
    for (int half = 8; half > 0; half /= 2) {
#pragma unroll
        for (int w = 0; w < half; w++) {
            if (w + half < QF_DECODE_WARPS) {
                v[w].x += v[w + half].x;
                v[w].y += v[w + half].y;
            }
        }
    }
    return v[0];
}

__device__ __forceinline__ void qf_decode_clear(uint32_t red)
{
#pragma unroll
    for (int w = 0; w < QF_DECODE_WARPS; w++) {
        qf_sts_64_if(red + w * 64, 0.0f, 0.0f, true);
    }
}

/* x / (1 + e^-x) */
__device__ __forceinline__ float qf_silu(float x) { return __fdividef(x, 1.0f + qf_exp2(-1.44269504f * x)); }

/* Where a warp stands in its part of a layer's linear: the unit that comes next, its words, and what finds it. */
struct qf_decode_run {
    int32_t left, first; /* blocks from the current chunk on; where it begins, as of `offset` of the part */
    int32_t kbs;
    uint32_t reciprocal;
    uint32_t data, end, scales; /* shared addresses of this lane's words and scales; end: behind the chunk's last */
    int32_t tile, k;
    uint32_t words[8], low_row, high_row;
};

/* Awaits the chunk and finds this warp's units of it: data == end if none, which happens in the last chunk only. */
__device__ __forceinline__ void qf_decode_open(const qf_decode_params &p, const qf_decode_ring &ring,
                                               qf_decode_run &run)
{
    const int lane = threadIdx.x & 31;
    const uint32_t units = (uint32_t)min(QF_DECODE_CHUNK_UNITS, run.left);
    const uint32_t per = (units + QF_DECODE_WARPS - 1) / QF_DECODE_WARPS;
    const uint32_t unit = min((threadIdx.x >> 5) * per, units), end = min(unit + per, units);
    const uint32_t stage = qf_ring_address(p, ring);
    qf_ring_wait(&qf_fixed().full[ring.stage], ring.parity, &qf_fixed().failed);
    run.data = stage + unit * 1024 + lane * 16;
    run.end = stage + end * 1024 + lane * 16;
    run.scales = stage + QF_DECODE_CHUNK_UNITS * 1024 + unit * 64 + (lane >> 2) * 4;
    const int at = run.first + (int)unit;
    run.tile = (int)__umulhi((uint32_t)at, run.reciprocal);
    run.k = at - run.tile * run.kbs;
}

/* Of a chunk that this warp has read. */
__device__ __forceinline__ void qf_decode_close(const qf_decode_params &p, qf_decode_ring &ring, qf_decode_run &run)
{
    __syncwarp();
    if ((threadIdx.x & 31) == 0) {
        qf_mbarrier_arrive(&qf_fixed().empty[ring.stage]);
    }
    qf_ring_advance(p, ring);
    run.left -= QF_DECODE_CHUNK_UNITS;
    run.first += QF_DECODE_CHUNK_UNITS;
}

__device__ __forceinline__ void qf_decode_load(qf_decode_run &run)
{
    const uint4 low = qf_shared_load_16(run.data), high = qf_shared_load_16(run.data + 512);
    run.low_row = qf_shared_load_4(run.scales);
    run.high_row = qf_shared_load_4(run.scales + 32);
    run.words[0] = low.x, run.words[1] = low.y, run.words[2] = low.z, run.words[3] = low.w;
    run.words[4] = high.x, run.words[5] = high.y, run.words[6] = high.z, run.words[7] = high.w;
}

/* Before x is there: awaits the first chunk and takes the first unit's words. */
__device__ __forceinline__ void qf_decode_begin(const qf_decode_params &p, const qf_decode_phase &ph,
                                                const qf_decode_ring &ring, qf_decode_run &run)
{
    run.left = ph.blocks;
    run.first = ph.offset;
    run.kbs = ph.kbs;
    run.reciprocal = ph.reciprocal;
    qf_decode_open(p, ring, run);
    static_assert(QF_DECODE_CHUNK_UNITS % QF_DECODE_WARPS == 0, "without a unit: read in vain, of the same stage");
    qf_decode_load(run);
}

/* From a chunk that this warp has read to the next; false behind the last unit. */
__device__ __forceinline__ bool qf_decode_next_chunk(const qf_decode_params &p, qf_decode_ring &ring,
                                                     qf_decode_run &run)
{
    qf_decode_close(p, ring, run);
    if (run.left <= 0) {
        return false;
    }
    qf_decode_open(p, ring, run);
    if (run.data == run.end) {
        qf_decode_close(p, ring, run);
        return false;
    }
    return true;
}

/* All units of this warp. While one is multiplied the next one's words and x are on their way, from the next chunk too:
 * a chunk is given back as soon as its last words are in registers. */
__device__ __forceinline__ void qf_decode_consume(const qf_decode_params &p, qf_decode_ring &ring, qf_decode_run &run)
{
    const int lane = threadIdx.x & 31;
    const uint32_t base = qf_shared_address(qf_decode_shared), sums = base + p.map.sums;
    const uint32_t x = base + p.map.x + (lane & 3) * 16;
    const uint32_t red = base + p.map.red + (threadIdx.x >> 2) * 8;
    if (run.data == run.end) {
        qf_decode_close(p, ring, run);
        return;
    }
    float acc[2] = {}, sum = __uint_as_float(qf_shared_load_4(sums + run.k * 4)), c[4][4], scale[2], zero[2];
    uint4 b[4] = {}; /* most lanes load nothing */
    int tile;
    qf_decode_load_x<4>(x + run.k * 256, b);
#pragma unroll 1
    for (;;) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.0f;
        }
        qf_decode_unit<4>(run.words, b, c);
        scale[0] = qf_half_low(run.low_row);
        scale[1] = qf_half_low(run.high_row);
        zero[0] = qf_bf16_high(run.low_row) * sum;
        zero[1] = qf_bf16_high(run.high_row) * (16.0f * sum);
        tile = run.tile;
        run.data += 1024;
        run.scales += 64;
        if (++run.k == run.kbs) {
            run.k = 0;
            run.tile++;
        }
        if (run.data == run.end && !qf_decode_next_chunk(p, ring, run)) {
            break;
        }
        qf_decode_load(run);
        qf_decode_load_x<4>(x + run.k * 256, b);
        sum = __uint_as_float(qf_shared_load_4(sums + run.k * 4));
        acc[0] += scale[0] * (qf_decode_unit_sum<4>(c, 0) - zero[0]);
        acc[1] += scale[1] * (qf_decode_unit_sum<4>(c, 2) - zero[1]);
        if (run.tile != tile) {
            qf_sts_64_if(red + tile * (QF_DECODE_TILE_FLOATS * 4), acc[0], acc[1], (lane & 3) == 0);
            acc[0] = acc[1] = 0.0f;
        }
    }
    acc[0] += scale[0] * (qf_decode_unit_sum<4>(c, 0) - zero[0]);
    acc[1] += scale[1] * (qf_decode_unit_sum<4>(c, 2) - zero[1]);
    qf_sts_64_if(red + tile * (QF_DECODE_TILE_FLOATS * 4), acc[0], acc[1], (lane & 3) == 0);
}

/* A row pair's results of a row tile: where they go, and what is added to them. */
struct qf_decode_result {
    uint32_t *to;
    uint32_t red, scale, saved; /* shared addresses: the warps' sums, what they are multiplied by, what is kept of h */
    bool adds; /* the first piece of the first range; of o and down, of rank 0 */
    float low, high;
};

template <bool ranks>
__device__ __forceinline__ void qf_decode_place(const qf_decode_params &p, const qf_decode_phase &ph, int kind,
                                                int tile, uint32_t epoch, qf_decode_result &result)
{
    const int slot = tile == 0 ? ph.first_slot : ph.slot, rows = kind == QF_DECODE_GATE_UP ? 8 : 16;
    uint32_t *half = ranks && (kind & 1) ? qf_row_exchange<ranks>(p, epoch) : qf_exchange(p, epoch);
    result.to = half + ph.out + slot * ph.n + (ph.tile0 + tile) * rows + (threadIdx.x & 7);
    result.adds = slot == 0 && kind != QF_DECODE_GATE_UP && tile < ph.local_tiles;
    result.low = result.high = 0.0f;
    result.red = qf_shared_address(qf_decode_red(p, tile, threadIdx.x & 7));
    result.scale = qf_shared_address(qf_norm_squares(p, kind) + p.hidden_size / 128);
    result.saved = qf_shared_address(qf_saved(p, kind) + tile * 16 + (threadIdx.x & 7));
}

/* What is kept of the residual for o and down. */
__device__ __forceinline__ void qf_decode_take_saved(qf_decode_result &result)
{
    if (result.adds) {
        result.low = __uint_as_float(qf_shared_load_4(result.saved));
        result.high = __uint_as_float(qf_shared_load_4(result.saved + 32));
    }
}

/* Adds up and stores the results of a row pair: qkv's, o's and down's are pieces, of which the first of the first range
 * carries what is added once; gate_up's tiles hold 8 rows of gate and the same of up. */
template <bool ranks>
__device__ __forceinline__ void qf_decode_store(const qf_decode_params &p, int kind, uint32_t epoch,
                                                const qf_decode_result &result)
{
    const float scale = __uint_as_float(qf_shared_load_4(result.scale));
    const float2 sum = qf_decode_add_up(result.red);
    const float low = sum.x * scale, high = sum.y * (scale * 0.0625f); /* see qf_raw_4 */
    if (kind == QF_DECODE_GATE_UP) {
        const float value = qf_silu(low) * (high * QF_DECODE_X_SCALE);
        qf_ll_store(result.to, (qf_pack_bf16(0.0f, value) & 0xffff0000u) | (epoch & 0xffffu));
    } else if (ranks && (kind & 1)) {
        qf_ranks_store(p, result.to, qf_ll_encode(low + result.low, qf_sum_tag(epoch)),
                       qf_ll_encode(high + result.high, qf_sum_tag(epoch)));
    } else {
        qf_ll_store(result.to, qf_ll_encode(low + result.low, qf_sum_tag(epoch)));
        qf_ll_store(result.to + 8, qf_ll_encode(high + result.high, qf_sum_tag(epoch)));
    }
    qf_decode_clear(result.red);
}

/* Row tiles beyond one a thread, which qkv never has. */
template <bool ranks>
static __device__ __noinline__ void qf_decode_store_more(const qf_decode_params &p, int kind, uint32_t epoch)
{
    const qf_decode_phase &ph = qf_fixed().phase[kind];
#pragma unroll 1
    for (int tile = (int)threadIdx.x / 8 + QF_DECODE_THREADS / 8; tile < ph.local_tiles;
         tile += QF_DECODE_THREADS / 8) {
        qf_decode_result result;
        qf_decode_place<ranks>(p, ph, kind, tile, epoch, result);
        qf_decode_take_saved(result);
        qf_decode_store<ranks>(p, kind, epoch, result);
    }
}

/* result: of this thread's first row tile. */
template <bool ranks>
__device__ __forceinline__ void qf_decode_finish(const qf_decode_params &p, int kind, int local_tiles, uint32_t epoch,
                                                 const qf_decode_result &result)
{
    if ((int)threadIdx.x / 8 < local_tiles) {
        qf_decode_store<ranks>(p, kind, epoch, result);
        if (local_tiles > QF_DECODE_THREADS / 8) {
            qf_decode_store_more<ranks>(p, kind, epoch);
        }
    }
}

/* The head's part, in groups of as many row tiles as `red` holds: logits, or NaN once the step has failed. */
template <int bits>
static __device__ __noinline__ void qf_decode_head(const qf_decode_params &p, qf_decode_ring ring)
{
    constexpr int unit_shift = bits == 16 ? 2 : bits == 8 ? 1 : 0; /* units of a block */
    const qf_decode_phase &ph = qf_fixed().phase[QF_DECODE_HEAD];
    const int lane = threadIdx.x & 31, kbs = ph.kbs, group = p.map.red_tiles;
    const uint32_t base = qf_shared_address(qf_decode_shared), x = base + p.map.x + (lane & 3) * 16;
    const float scale = qf_norm_squares(p, QF_DECODE_HEAD)[p.hidden_size / 128];
    const volatile int32_t *failed = &qf_fixed().failed;
    const int chunks = (ph.blocks + (QF_DECODE_CHUNK_UNITS >> unit_shift) - 1) >> (5 - unit_shift);
    qf_decode_walk walk = {0, chunks, 0, 0, -1, {}};
    bool open = false;
#pragma unroll 1
    for (int first = 0; first < ph.local_tiles; first += group) {
        const int limit = (first + group) * kbs;
#pragma unroll 1
        while (open || walk.chunk < walk.chunks) {
            if (!open) {
                qf_decode_open(ring, ph.blocks, unit_shift, walk);
                open = true;
            }
            const uint32_t stage = qf_ring_address(p, ring);
            int at = 0;
#pragma unroll 1
            for (; walk.unit < walk.end; walk.unit++) {
                const int block = walk.unit >> unit_shift, part = walk.unit & ((1 << unit_shift) - 1);
                at = walk.chunk * (QF_DECODE_CHUNK_UNITS >> unit_shift) + block;
                if (at >= limit) {
                    break;
                }
                const int tile = (int)__umulhi((uint32_t)at, ph.reciprocal), k = at - tile * kbs;
                if (tile != walk.tile) {
                    qf_decode_leave(p, first, walk);
                    walk.tile = tile;
                    walk.acc[0] = walk.acc[1] = 0.0f;
                }
                uint32_t words[8];
                float c[4][4] = {};
                uint4 b[16 / bits] = {};
                qf_decode_load(stage + walk.unit * 1024, words);
                qf_decode_load_x<bits>(x + k * 256 + part * (256 >> unit_shift), b);
                qf_decode_unit<bits>(words, b, c);
                const float low = qf_decode_unit_sum<bits>(c, 0), high = qf_decode_unit_sum<bits>(c, 2);
                if (bits == 16) {
                    walk.acc[0] += low;
                    walk.acc[1] += high;
                } else { /* a block's sum of x counts once, with its last unit */
                    const uint32_t scales = stage + QF_DECODE_CHUNK_UNITS * 1024 + block * 64 + (lane >> 2) * 4;
                    const float sum = part == (1 << unit_shift) - 1 ? qf_block_sums(p)[k] : 0.0f;
                    qf_apply_scales<bits>(qf_shared_load_4(scales), qf_shared_load_4(scales + 32), sum, low, high, walk.acc);
                }
            }
            if (walk.unit < walk.end) {
                break; /* the next group's */
            }
            qf_decode_close(p, ring, walk);
            open = false;
        }
        qf_decode_leave(p, first, walk);
        walk.tile = -1;
        qf_consumer_barrier();
#pragma unroll 1
        for (int tile = threadIdx.x >> 3; tile < group && first + tile < ph.local_tiles;
             tile += QF_DECODE_THREADS / 8) {
            const uint32_t red = qf_shared_address(qf_decode_red(p, tile, threadIdx.x & 7));
            const float2 sum = qf_decode_add_up(red);
            qf_decode_clear(red);
            float *to = p.logits + (ph.tile0 + first + tile) * 16 + (threadIdx.x & 7);
            to[0] = *failed ? __uint_as_float(0x7fc00000u) : sum.x * scale;
            to[8] = *failed ? __uint_as_float(0x7fc00000u) : sum.y * (bits == 4 ? scale * 0.0625f : scale);
        }
        qf_consumer_barrier();
    }
}

#endif
