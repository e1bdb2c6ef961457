/* A CTA's part of one linear: its consumer warps take the units of each chunk of the ring in turn, every warp sums what
 * it has of a row tile in registers and leaves it in `red`; when the tiles of a half of `red` are complete, one barrier,
 * and 8 or more threads a tile add the warps' sums in order of warp and store the results, while the others go on with
 * the other half.
 *
 * `red` is (2 halves, row tiles, warps, 8 row pairs, token pairs, 2 or 4 floats) and all zeros whenever a half is
 * begun: who adds up a place also clears it. So a warp without a unit in a tile adds nothing. A half is used again only
 * behind the next barrier, which every adder joins after clearing. */
#ifndef QF_DECODE_LINEAR_CUH
#define QF_DECODE_LINEAR_CUH

#include "decode_gather.cuh"
#include "decode_units.cuh"

/* Where a warp stands in its part, and what of the part it needs at hand: set up while x is awaited. */
struct qf_decode_walk {
    int32_t chunk;         /* the chunk that is next or open */
    int32_t unit, end;     /* of the current chunk; */
    bool open;             /* which has been awaited and not yet handed back */
    int32_t tile, group;   /* local row tile whose sums are in acc (-1: none); half of red in turn */
    float acc[4];
    int32_t blocks, offset, kbs, chunks, local_tiles, format, shift;
    uint32_t reciprocal, x, sums;
    float multiplier[2];   /* of the rows g and g + 8 */
};

__device__ __forceinline__ int qf_format_of(int bits, int shift)
{
    return bits == 16                ? QF_FORMAT_16
           : bits == 8 && shift == 0 ? QF_FORMAT_8_128
           : bits == 8               ? QF_FORMAT_8
           : shift == 0              ? QF_FORMAT_4_128
                                     : QF_FORMAT_4;
}

/* This warp's units of the chunk in turn, which is awaited. */
__device__ __forceinline__ void qf_decode_open(const qf_decode_ring &ring, int unit_shift, qf_decode_walk &walk)
{
    const int chunk_blocks = QF_DECODE_CHUNK_UNITS >> unit_shift, warp = threadIdx.x >> 5;
    int units = min(chunk_blocks, walk.blocks - walk.chunk * chunk_blocks) << unit_shift;
    int per = (units + QF_DECODE_WARPS - 1) / QF_DECODE_WARPS;
    walk.unit = min(warp * per, units);
    walk.end = min(walk.unit + per, units);
    walk.open = true;
    qf_ring_wait(&qf_fixed().full[ring.stage], ring.parity, &qf_fixed().failed);
}

template <int tokens>
__device__ __forceinline__ qf_decode_walk qf_decode_begin(const qf_decode_params &p, int kind, int layer,
                                                          const qf_decode_ring &ring)
{
    const qf_decode_phase &ph = qf_fixed().phase[kind];
    const int lane = threadIdx.x & 31, bits = p.linear[kind].bits, unit_shift = bits == 16 ? 2 : bits == 8 ? 1 : 0;
    const uint32_t base = qf_shared_address(qf_decode_shared);
    qf_decode_walk walk = {};
    walk.tile = -1;
    walk.blocks = ph.blocks;
    walk.offset = ph.offset;
    walk.kbs = ph.kbs;
    walk.reciprocal = ph.reciprocal;
    walk.local_tiles = ph.local_tiles;
    walk.chunks = (ph.blocks + (QF_DECODE_CHUNK_UNITS >> unit_shift) - 1) >> (5 - unit_shift);
    walk.shift = p.linear[kind].group_shift;
    walk.format = qf_format_of(bits, walk.shift);
    walk.x = base + p.map.x + ((lane >> 2) % tokens) * 64 + (lane & 3) * 16;
    walk.sums = base + p.map.sums;
    walk.multiplier[0] = qf_layer(p, layer)->multiplier[kind & 3];
    walk.multiplier[1] = bits == 4 ? walk.multiplier[0] * 0.0625f : walk.multiplier[0]; /* see qf_raw_4 */
    qf_decode_open(ring, unit_shift, walk);
    return walk;
}
static_assert(QF_DECODE_CHUNK_UNITS == 32, "see qf_decode_begin");

/* A half of `red`. */
template <int tokens> __device__ __forceinline__ float *qf_red(const qf_decode_params &p, int half)
{
    return reinterpret_cast<float *>(qf_decode_shared + p.map.red) +
           half * qf_decode_half_tiles(tokens) * qf_decode_tile_floats(tokens);
}

/* Leaves the sums of the walk's row tile for the adders. */
template <int tokens>
__device__ __forceinline__ void qf_decode_leave(const qf_decode_params &p, int half, qf_decode_walk &walk)
{
    constexpr int pairs = tokens == 1 ? 1 : tokens / 2, vec = tokens == 1 ? 2 : 4;
    if (walk.tile >= 0) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
        float *to = qf_red<tokens>(p, half) +
                    (walk.tile - walk.group * qf_decode_half_tiles(tokens)) * qf_decode_tile_floats(tokens) +
                    ((warp * 8 + g) * pairs + t) * vec;
        if (tokens == 1 && t == 0) {
            *reinterpret_cast<float2 *>(to) = make_float2(walk.acc[0], walk.acc[2]);
        } else if (tokens > 1 && t < pairs) {
            *reinterpret_cast<float4 *>(to) = make_float4(walk.acc[0], walk.acc[1], walk.acc[2], walk.acc[3]);
        }
        walk.tile = -1;
    }
}

/* Takes this warp's units up to the end of the current group of row tiles, or of the part. */
template <int format, int tokens>
__device__ __forceinline__ void qf_decode_consume(const qf_decode_params &p, int half, qf_decode_ring &ring,
                                                  qf_decode_walk &walk)
{
    constexpr int unit_shift = format == QF_FORMAT_16 ? 2 : qf_format_bits(format) == 8 ? 1 : 0; /* units of a block */
    constexpr int chunk_blocks = QF_DECODE_CHUNK_UNITS >> unit_shift;
    constexpr bool whole = format == QF_FORMAT_4_128 || format == QF_FORMAT_8_128;
    const int lane = threadIdx.x & 31, kbs = walk.kbs, limit = (walk.group + 1) * qf_decode_half_tiles(tokens) * kbs;
    const int shift = whole ? 0 : walk.shift;
    for (;;) {
        if (!walk.open) {
            if (walk.chunk == walk.chunks) {
                return;
            }
            qf_decode_open(ring, unit_shift, walk);
        }
        const uint32_t stage = qf_ring_address(p, ring);
        int at = walk.offset + walk.chunk * chunk_blocks + (walk.unit >> unit_shift);
        int tile = (int)__umulhi((uint32_t)at, walk.reciprocal), k = at - tile * kbs;
        while (walk.unit < walk.end) {
            if (at >= limit) {
                return;
            }
            if (tile != walk.tile) {
                qf_decode_leave<tokens>(p, half, walk);
                walk.tile = tile;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    walk.acc[i] = 0.0f;
                }
            }
            const int part = walk.unit & ((1 << unit_shift) - 1), block = walk.unit >> unit_shift;
            const int first_32 = part << (2 - unit_shift);
            const uint32_t data = stage + walk.unit * 1024 + lane * 16;
            const uint32_t scales = stage + QF_DECODE_CHUNK_UNITS * 1024 + block * (64 << shift) + (lane >> 2) * 4;
            const uint32_t to_x = walk.x + (k * 4 + first_32) * (tokens * 64), to_sums = walk.sums + k * (32 * tokens);
            /* two units at once where they are of one row tile: neighbours in k, or the halves of a block */
            constexpr int next_block = unit_shift == 0 ? 1 : 0;
            const bool two = walk.unit + 1 < walk.end && (next_block ? k + 1 < kbs : part + 1 < 1 << unit_shift);
            if (two) {
                constexpr int next_32 = next_block ? 4 : 4 >> unit_shift;
                const qf_decode_unit_at units[2] = {
                    {data, scales, to_x, to_sums, first_32},
                    {data + 1024, scales + next_block * (64 << shift), to_x + next_32 * (tokens * 64),
                     to_sums + next_block * (32 * tokens), next_block ? 0 : first_32 + next_32}};
                float sums_of[2][4] = {{walk.acc[0], walk.acc[1], walk.acc[2], walk.acc[3]}, {}};
                qf_decode_units<format, tokens, 2>(units, shift, sums_of);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    walk.acc[i] = sums_of[0][i] + sums_of[1][i];
                }
            } else {
                const qf_decode_unit_at units[1] = {{data, scales, to_x, to_sums, first_32}};
                float sums_of[1][4] = {{walk.acc[0], walk.acc[1], walk.acc[2], walk.acc[3]}};
                qf_decode_units<format, tokens, 1>(units, shift, sums_of);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    walk.acc[i] = sums_of[0][i];
                }
            }
            const int taken = two ? 2 : 1, blocks_on = ((walk.unit + taken) >> unit_shift) - block;
            walk.unit += taken;
            at += blocks_on;
            k += blocks_on;
            if (k == kbs) {
                k = 0;
                tile++;
            }
        }
        walk.open = false;
        walk.chunk++;
        __syncwarp();
        if (lane == 0) {
            qf_mbarrier_arrive(&qf_fixed().empty[ring.stage]);
        }
        qf_ring_advance(p, ring);
    }
}

/* Stores one row's result of one token; tile: local. */
template <int tokens>
__device__ __forceinline__ void qf_decode_store(const qf_decode_params &p, int kind, uint32_t epoch, int tile,
                                                int row, int token, float value)
{
    const qf_decode_phase &ph = qf_fixed().phase[kind];
    const int n = p.linear[kind].n, slot = tile == 0 ? ph.first_slot : ph.slot, at = (ph.tile0 + tile) * 16 + row;
    if (kind == QF_DECODE_HEAD) {
        const volatile int32_t *failed = &qf_fixed().failed;
        p.logits[(int64_t)token * n + at] = *failed ? __uint_as_float(0x7fc00000u) : value;
        return;
    }
    if (slot == 0) { /* the first piece of the first range carries what is added once */
        if (kind == QF_DECODE_QKV) {
            value += qf_saved(p, kind)[tile * 16 + row];
        } else {
            value += qf_saved(p, kind)[(tile * tokens + token) * 16 + row];
        }
    }
    uint32_t *words = qf_exchange(p, epoch) +
                      (kind == QF_DECODE_QKV ? p.ll.qkv : kind == QF_DECODE_O ? p.ll.o : p.ll.down);
    qf_ll_store(words + ((int64_t)slot * p.num_seqs + token) * n + at, qf_ll_encode(value, qf_sum_tag(epoch)));
}

/* Adds up the warps' sums of one group of row tiles, clears them and stores the results. */
template <int tokens>
__device__ __forceinline__ void qf_decode_finish(const qf_decode_params &p, int kind, uint32_t epoch, int half,
                                                 const qf_decode_walk &walk)
{
    constexpr int pairs = tokens == 1 ? 1 : tokens / 2, vec = tokens == 1 ? 2 : 4, places = 8 * pairs;
    constexpr int half_tiles = qf_decode_half_tiles(tokens);
    const int place = threadIdx.x % places, local = threadIdx.x / places, tile = walk.group * half_tiles + local;
    if (local >= half_tiles || tile >= walk.local_tiles) {
        return;
    }
    float *from = qf_red<tokens>(p, half) + local * qf_decode_tile_floats(tokens) + place * vec;
    float sum[4] = {};
#pragma unroll
    for (int w = 0; w < QF_DECODE_WARPS; w++) {
        if (tokens == 1) {
            float2 v = *reinterpret_cast<float2 *>(from + w * places * vec);
            sum[0] += v.x;
            sum[2] += v.y;
        } else {
            float4 v = *reinterpret_cast<float4 *>(from + w * places * vec);
            sum[0] += v.x;
            sum[1] += v.y;
            sum[2] += v.z;
            sum[3] += v.w;
        }
    }
    const int g = place / pairs, first_token = tokens == 1 ? 0 : 2 * (place % pairs);
    const bool normed = kind != QF_DECODE_O && kind != QF_DECODE_DOWN;
#pragma unroll
    for (int i = 0; i < (tokens == 1 ? 1 : 2); i++) {
        int token = first_token + i;
        if (token >= p.num_seqs) {
            break;
        }
        float r = normed ? qf_norm_factors<tokens>(p, kind)[token] : 1.0f;
        float low = sum[i] * (walk.multiplier[0] * r), high = sum[i + 2] * (walk.multiplier[1] * r); /* g and g + 8 */
        if (kind == QF_DECODE_GATE_UP) { /* of gate and of up */
            float value = low / (1.0f + __expf(-low)) * high;
            qf_ll_store(qf_exchange(p, epoch) + p.ll.act + (int64_t)token * p.act_size +
                            (qf_fixed().phase[kind].tile0 + tile) * 8 + g,
                        (qf_pack_bf16(0.0f, value * QF_DECODE_X_SCALE) & 0xffff0000u) | (epoch & 0xffffu));
        } else {
            qf_decode_store<tokens>(p, kind, epoch, tile, g, token, low);
            qf_decode_store<tokens>(p, kind, epoch, tile, g + 8, token, high);
        }
    }
#pragma unroll
    for (int w = 0; w < QF_DECODE_WARPS; w++) {
        if (tokens == 1) {
            *reinterpret_cast<float2 *>(from + w * places * vec) = make_float2(0.0f, 0.0f);
        } else {
            *reinterpret_cast<float4 *>(from + w * places * vec) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
}

/* The whole part. One barrier of all consumer warps for each group of row tiles, the same number for each warp whatever
 * units it has. `half` alternates over all linears. */
template <int tokens>
static __device__ __forceinline__ void qf_decode_linear_part(const qf_decode_params &p, int kind, int step,
                                                             uint32_t epoch, qf_decode_ring &ring, int &half,
                                                             qf_decode_walk &walk)
{
    for (; walk.group * qf_decode_half_tiles(tokens) < walk.local_tiles; walk.group++) {
        switch (walk.format) {
        case QF_FORMAT_4_128:
            qf_decode_consume<QF_FORMAT_4_128, tokens>(p, half, ring, walk);
            break;
        case QF_FORMAT_4:
            qf_decode_consume<QF_FORMAT_4, tokens>(p, half, ring, walk);
            break;
        case QF_FORMAT_8_128:
            qf_decode_consume<QF_FORMAT_8_128, tokens>(p, half, ring, walk);
            break;
        case QF_FORMAT_8:
            qf_decode_consume<QF_FORMAT_8, tokens>(p, half, ring, walk);
            break;
        default:
            qf_decode_consume<QF_FORMAT_16, tokens>(p, half, ring, walk);
        }
        qf_decode_leave<tokens>(p, half, walk);
        qf_decode_stamp(p, step, QF_STAMP_UNITS); /* the last group's counts */
        qf_consumer_barrier();
        qf_decode_finish<tokens>(p, kind, epoch, half, walk);
        half ^= 1;
    }
}

#endif
