/* A CTA's part of one linear: its consumer warps take the units of each chunk of the ring in turn, every warp sums what
 * it has of a row tile in registers and leaves it in `red`; behind a barrier, 8 threads a tile add the warps' sums in order
 * of warp and store the results.
 *
 * `red` is (row tiles, warps, 8 row pairs, 2 floats) and all zeros whenever a part is begun: who adds up a place also
 * clears it, before the barrier at which x of the next part is complete. So a warp without a unit in a tile adds nothing.
 * The same code serves qkv, o, gate_up and down; the head, of other formats and with more row tiles, has its own. */
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
__device__ __forceinline__ void qf_decode_open(const qf_decode_ring &ring, int blocks, int unit_shift, qf_decode_walk &walk)
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
    const uint4 low = qf_lds_128(at), high = qf_lds_128(at + 512);
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

/* Adds up one row pair of a tile in `red`, and clears it. */
__device__ __forceinline__ float2 qf_decode_add_up(const qf_decode_params &p, int tile, int g)
{
    float2 *from = reinterpret_cast<float2 *>(reinterpret_cast<float *>(qf_decode_shared + p.map.red) +
                                              tile * QF_DECODE_TILE_FLOATS) + g;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < QF_DECODE_WARPS; w++) {
        const float2 v = from[w * 8];
        sum.x += v.x;
        sum.y += v.y;
    }
#pragma unroll
    for (int w = 0; w < QF_DECODE_WARPS; w++) {
        from[w * 8] = make_float2(0.0f, 0.0f);
    }
    return sum;
}

/* Before x is there: awaits the first chunk and takes the first unit's words. */
__device__ __forceinline__ void qf_decode_begin(const qf_decode_params &p, const qf_decode_phase &ph,
                                                const qf_decode_ring &ring, qf_decode_walk &walk, uint32_t (&words)[8])
{
    walk.chunk = 0;
    walk.chunks = (ph.blocks + QF_DECODE_CHUNK_UNITS - 1) / QF_DECODE_CHUNK_UNITS;
    walk.tile = -1;
    walk.acc[0] = walk.acc[1] = 0.0f;
    qf_decode_open(ring, ph.blocks, 0, walk);
    qf_decode_load(qf_ring_address(p, ring) + walk.unit * 1024, words);
}

/* All units of this warp. */
__device__ __forceinline__ void qf_decode_consume(const qf_decode_params &p, const qf_decode_phase &ph,
                                                  qf_decode_ring &ring, qf_decode_walk &walk, uint32_t (&words)[8])
{
    const int lane = threadIdx.x & 31, kbs = ph.kbs;
    const uint32_t base = qf_shared_address(qf_decode_shared), sums = base + p.map.sums;
    const uint32_t x = base + p.map.x + (lane & 3) * 16;
#pragma unroll 1
    for (;;) {
        const uint32_t stage = qf_ring_address(p, ring);
        const int at = ph.offset + walk.chunk * QF_DECODE_CHUNK_UNITS + walk.unit;
        int tile = (int)__umulhi((uint32_t)at, ph.reciprocal), k = at - tile * kbs;
        uint32_t data = stage + walk.unit * 1024, scales = stage + QF_DECODE_CHUNK_UNITS * 1024 + walk.unit * 64 +
                                                           (lane >> 2) * 4;
        const uint32_t end = stage + walk.end * 1024;
#pragma unroll 1
        while (data < end) {
            if (tile != walk.tile) {
                qf_decode_leave(p, 0, walk);
                walk.tile = tile;
                walk.acc[0] = walk.acc[1] = 0.0f;
            }
            const uint32_t low_row = qf_lds_32(scales), high_row = qf_lds_32(scales + 32);
            const float sum = __uint_as_float(qf_lds_32(sums + k * 4));
            uint32_t next[8]; /* beyond the last unit: read in vain, from the same stage */
            qf_decode_load(data + 1024, next);
            float low, high;
            qf_decode_unit<4>(words, x + k * 256, low, high);
            qf_apply_scales<4>(low_row, high_row, sum, low, high, walk.acc);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                words[i] = next[i];
            }
            data += 1024;
            scales += 64;
            if (++k == kbs) {
                k = 0;
                tile++;
            }
        }
        qf_decode_close(p, ring, walk);
        if (walk.chunk == walk.chunks) {
            break;
        }
        qf_decode_open(ring, ph.blocks, 0, walk);
        qf_decode_load(qf_ring_address(p, ring) + walk.unit * 1024, words);
    }
    qf_decode_leave(p, 0, walk);
}

/* Adds up and stores the results of the part: qkv's, o's and down's are pieces, of which the first of the first range
 * carries what is added once; gate_up's tiles hold 8 rows of gate and the same of up. */
__device__ __forceinline__ void qf_decode_finish(const qf_decode_params &p, const qf_decode_phase &ph, int kind,
                                                 float multiplier, uint32_t epoch)
{
    const int g = threadIdx.x & 7;
    uint32_t *out = qf_exchange(p, epoch) + ph.out;
#pragma unroll 1
    for (int tile = threadIdx.x >> 3; tile < ph.local_tiles; tile += QF_DECODE_THREADS / 8) {
        const float scale = kind & 1 ? multiplier : multiplier * qf_norm_squares(p, kind)[p.hidden_size / 128];
        const float2 sum = qf_decode_add_up(p, tile, g);
        float low = sum.x * scale, high = sum.y * (scale * 0.0625f); /* see qf_raw_4 */
        if (kind == QF_DECODE_GATE_UP) {
            const float value = __fdividef(low, 1.0f + __expf(-low)) * high;
            qf_ll_store(out + (ph.tile0 + tile) * 8 + g,
                        (qf_pack_bf16(0.0f, value * QF_DECODE_X_SCALE) & 0xffff0000u) | (epoch & 0xffffu));
            continue;
        }
        const int slot = tile == 0 ? ph.first_slot : ph.slot;
        if (slot == 0) {
            const float *saved = qf_saved(p, kind) + tile * 16 + g;
            low += saved[0];
            high += saved[8];
        }
        uint32_t *to = out + slot * ph.n + (ph.tile0 + tile) * 16 + g;
        qf_ll_store(to, qf_ll_encode(low, qf_sum_tag(epoch)));
        qf_ll_store(to + 8, qf_ll_encode(high, qf_sum_tag(epoch)));
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
    const float r = qf_norm_squares(p, QF_DECODE_HEAD)[p.hidden_size / 128];
    const float scale = qf_layer(p, p.num_layers)->multiplier[0] * r;
    const volatile int32_t *failed = &qf_fixed().failed;
    qf_decode_walk walk = {0, (ph.blocks + (QF_DECODE_CHUNK_UNITS >> unit_shift) - 1) >> (5 - unit_shift), 0, 0, -1, {}};
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
                float low, high;
                qf_decode_load(stage + walk.unit * 1024, words);
                qf_decode_unit<bits>(words, x + k * 256 + part * (256 >> unit_shift), low, high);
                if (bits == 16) {
                    walk.acc[0] += low;
                    walk.acc[1] += high;
                } else { /* a block's sum of x counts once, with its last unit */
                    const uint32_t scales = stage + QF_DECODE_CHUNK_UNITS * 1024 + block * 64 + (lane >> 2) * 4;
                    const float sum = part == (1 << unit_shift) - 1 ? qf_block_sums(p)[k] : 0.0f;
                    qf_apply_scales<bits>(qf_lds_32(scales), qf_lds_32(scales + 32), sum, low, high, walk.acc);
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
        for (int tile = threadIdx.x >> 3; tile < group && first + tile < ph.local_tiles; tile += QF_DECODE_THREADS / 8) {
            const float2 sum = qf_decode_add_up(p, tile, threadIdx.x & 7);
            float *to = p.logits + (ph.tile0 + first + tile) * 16 + (threadIdx.x & 7);
            to[0] = *failed ? __uint_as_float(0x7fc00000u) : sum.x * scale;
            to[8] = *failed ? __uint_as_float(0x7fc00000u) : sum.y * (bits == 4 ? scale * 0.0625f : scale);
        }
        qf_consumer_barrier();
    }
}

#endif
