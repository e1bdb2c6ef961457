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

#include "common/dequant.cuh"
#include "decode_exchange.cuh"

__device__ __forceinline__ uint4 qf_lds_128(uint32_t address)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint32_t qf_lds_32(uint32_t address)
{
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ void qf_ldmatrix_at(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void qf_ldmatrix_trans_at(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

enum qf_decode_format { QF_FORMAT_4_128, QF_FORMAT_4, QF_FORMAT_8, QF_FORMAT_16 };

/* Adds one unit (1,024 bytes of weights: a block of 4 bits, half a block of 8, a quarter of 16) to the sums of its
 * row tile. data, scales: shared addresses, of the unit and of the block's scales; x: of the unit's first k, with the
 * lane's place in an ldmatrix of four 8 x 8 matrices added; group: the unit's first scale group, in 32 k. */
template <int format, int tokens>
__device__ __forceinline__ void qf_decode_unit(uint32_t data, uint32_t scales, uint32_t x, int first_32, int shift,
                                               float (&acc)[4])
{
    const int lane = threadIdx.x & 31;
    const uint4 low = qf_lds_128(data + lane * 16), high = qf_lds_128(data + 512 + lane * 16);
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const uint32_t row = scales + (lane >> 2) * 4;
    uint32_t a[4], b[4];
    if (format == QF_FORMAT_4_128) {
        float even[4] = {}, odd[4] = {};
        const qf_row_scales s = qf_unpack_scales<4>(qf_lds_32(row), qf_lds_32(row + 32));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            qf_ldmatrix_at(b, x + j * tokens * 64);
            qf_dequant_4(words[2 * j], s, a);
            qf_mma_bf16(even, a, b[0], b[1]);
            qf_dequant_4(words[2 * j + 1], s, a);
            qf_mma_bf16(odd, a, b[2], b[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            acc[i] += s.scale[i >> 1] * (even[i] + odd[i]);
        }
    } else if (format == QF_FORMAT_16) {
        float odd[4] = {};
        qf_ldmatrix_at(b, x);
        const uint32_t a0[4] = {low.x, low.y, low.z, low.w}, a1[4] = {high.x, high.y, high.z, high.w};
        qf_mma_bf16(acc, a0, b[0], b[1]);
        qf_mma_bf16(odd, a1, b[2], b[3]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            acc[i] += odd[i];
        }
    } else { /* scaled every 32 k */
        constexpr int count = format == QF_FORMAT_4 ? 4 : 2;
#pragma unroll
        for (int j = 0; j < count; j++) {
            float even[4] = {}, odd[4] = {};
            const uint32_t group = row + ((first_32 + j) >> (2 - shift)) * 64;
            qf_ldmatrix_at(b, x + j * tokens * 64);
            if (format == QF_FORMAT_4) {
                const qf_row_scales s = qf_unpack_scales<4>(qf_lds_32(group), qf_lds_32(group + 32));
                qf_dequant_4(words[2 * j], s, a);
                qf_mma_bf16(even, a, b[0], b[1]);
                qf_dequant_4(words[2 * j + 1], s, a);
                qf_mma_bf16(odd, a, b[2], b[3]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    acc[i] += s.scale[i >> 1] * (even[i] + odd[i]);
                }
            } else {
                const qf_row_scales s = qf_unpack_scales<8>(qf_lds_32(group), qf_lds_32(group + 32));
                qf_dequant_8(words[4 * j], words[4 * j + 1], s, a);
                qf_mma_bf16(even, a, b[0], b[1]);
                qf_dequant_8(words[4 * j + 2], words[4 * j + 3], s, a);
                qf_mma_bf16(odd, a, b[2], b[3]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    acc[i] += s.scale[i >> 1] * (even[i] + odd[i]);
                }
            }
        }
    }
}

/* Where a warp stands in its part. */
struct qf_decode_walk {
    int32_t chunk;         /* the chunk that is next or open */
    int32_t unit, end;     /* of the current chunk; */
    bool open;             /* which has been awaited and not yet handed back */
    int32_t tile, group;   /* local row tile whose sums are in acc (-1: none); half of red in turn */
    float acc[4];
};

/* A half of `red`. */
template <int tokens, int warps> __device__ __forceinline__ float *qf_red(const qf_decode_params &p, int half)
{
    return reinterpret_cast<float *>(qf_decode_shared + p.map.red) +
           half * qf_decode_half_tiles(tokens) * qf_decode_tile_floats(tokens, warps);
}

/* Leaves the sums of the walk's row tile for the adders. */
template <int tokens, int warps>
__device__ __forceinline__ void qf_decode_leave(const qf_decode_params &p, int half, qf_decode_walk &walk)
{
    constexpr int pairs = tokens == 1 ? 1 : tokens / 2, vec = tokens == 1 ? 2 : 4;
    if (walk.tile >= 0) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
        float *to = qf_red<tokens, warps>(p, half) +
                    (walk.tile - walk.group * qf_decode_half_tiles(tokens)) * qf_decode_tile_floats(tokens, warps) +
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
template <int format, int tokens, int warps>
__device__ __forceinline__ void qf_decode_consume(const qf_decode_params &p, int kind, int half, qf_decode_ring &ring,
                                                  qf_decode_walk &walk)
{
    constexpr int unit_shift = format == QF_FORMAT_16 ? 2 : format == QF_FORMAT_8 ? 1 : 0; /* units of a block */
    constexpr int chunk_blocks = QF_DECODE_CHUNK_UNITS >> unit_shift;
    const qf_decode_phase &ph = qf_fixed().phase[kind];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int blocks = ph.blocks, offset = ph.offset, kbs = ph.kbs, chunks = (blocks + chunk_blocks - 1) / chunk_blocks;
    const uint32_t reciprocal = ph.reciprocal;
    const int limit = (walk.group + 1) * qf_decode_half_tiles(tokens) * kbs;
    const uint32_t x = qf_shared_address(qf_decode_shared) + p.map.x + ((lane >> 3) * tokens + (lane & 7) % tokens) * 16;
    const int shift = format == QF_FORMAT_4_128 ? 0 : p.linear[kind].group_shift;
    for (;;) {
        if (!walk.open) {
            if (walk.chunk == chunks) {
                return;
            }
            int units = min(chunk_blocks, blocks - walk.chunk * chunk_blocks) << unit_shift;
            int per = (units + warps - 1) / warps;
            walk.unit = warp * per;
            walk.end = min(walk.unit + per, units);
            walk.open = true;
            qf_ring_wait(&qf_fixed().full[ring.stage], ring.parity, &qf_fixed().failed);
        }
        const uint32_t stage = qf_ring_address(p, ring);
        for (; walk.unit < walk.end; walk.unit++) {
            int block = walk.unit >> unit_shift, part = walk.unit & ((1 << unit_shift) - 1);
            int at = offset + walk.chunk * chunk_blocks + block;
            if (at >= limit) {
                return;
            }
            int tile = (int)__umulhi((uint32_t)at, reciprocal), k = at - tile * kbs;
            if (tile != walk.tile) {
                qf_decode_leave<tokens, warps>(p, half, walk);
                walk.tile = tile;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    walk.acc[i] = 0.0f;
                }
            }
            int first_32 = part << (2 - unit_shift);
            qf_decode_unit<format, tokens>(stage + walk.unit * 1024,
                                           stage + QF_DECODE_CHUNK_UNITS * 1024 + block * (64 << shift),
                                           x + (k * 4 + first_32) * tokens * 64, first_32, shift, walk.acc);
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
__device__ __forceinline__ void qf_decode_store(const qf_decode_params &p, int kind, int layer, uint32_t epoch,
                                                int tile, int row, int token, float value)
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
            const float *bias = qf_layer(p, layer)->bias;
            value += bias ? __ldg(bias + at) : 0.0f;
        } else {
            value += qf_saved(p, kind)[(tile * tokens + token) * 16 + row];
        }
    }
    uint32_t *words = qf_exchange(p, epoch) +
                      (kind == QF_DECODE_QKV ? p.ll.qkv : kind == QF_DECODE_O ? p.ll.o : p.ll.down);
    qf_ll_store(words + ((int64_t)slot * p.num_seqs + token) * n + at, qf_ll_encode(value, qf_sum_tag(epoch)));
}

/* Adds up the warps' sums of one group of row tiles, clears them and stores the results. */
template <int tokens, int warps>
__device__ __forceinline__ void qf_decode_finish(const qf_decode_params &p, int kind, int layer, uint32_t epoch,
                                                 int half, int group)
{
    constexpr int pairs = tokens == 1 ? 1 : tokens / 2, vec = tokens == 1 ? 2 : 4, places = 8 * pairs;
    constexpr int half_tiles = qf_decode_half_tiles(tokens);
    const int place = threadIdx.x % places, local = threadIdx.x / places, tile = group * half_tiles + local;
    if (local >= half_tiles || tile >= qf_fixed().phase[kind].local_tiles) {
        return;
    }
    float *from = qf_red<tokens, warps>(p, half) + local * qf_decode_tile_floats(tokens, warps) + place * vec;
    float sum[4] = {};
#pragma unroll
    for (int w = 0; w < warps; w++) {
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
    const float multiplier = qf_layer(p, layer)->multiplier[kind & 3];
#pragma unroll
    for (int i = 0; i < (tokens == 1 ? 1 : 2); i++) {
        int token = first_token + i;
        if (token >= p.num_seqs) {
            break;
        }
        float scale = normed ? multiplier * qf_norm_factors<tokens>(p, kind)[token] : multiplier;
        float low = sum[i] * scale, high = sum[i + 2] * scale; /* rows g and g + 8 */
        if (kind == QF_DECODE_GATE_UP) { /* of gate and of up */
            float value = low / (1.0f + __expf(-low)) * high;
            qf_ll_store(qf_exchange(p, epoch) + p.ll.act + (int64_t)token * p.act_size +
                            (qf_fixed().phase[kind].tile0 + tile) * 8 + g,
                        (qf_pack_bf16(0.0f, value) & 0xffff0000u) | (epoch & 0xffffu));
        } else {
            qf_decode_store<tokens>(p, kind, layer, epoch, tile, g, token, low);
            qf_decode_store<tokens>(p, kind, layer, epoch, tile, g + 8, token, high);
        }
    }
#pragma unroll
    for (int w = 0; w < warps; w++) {
        if (tokens == 1) {
            *reinterpret_cast<float2 *>(from + w * places * vec) = make_float2(0.0f, 0.0f);
        } else {
            *reinterpret_cast<float4 *>(from + w * places * vec) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
}

/* The whole part. One barrier of all consumer warps for each group of row tiles, the same number for each warp whatever
 * units it has. `half` alternates over all linears. */
template <int tokens, int warps>
static __device__ __forceinline__ void qf_decode_linear_part(const qf_decode_params &p, int kind, int layer,
                                                             uint32_t epoch, qf_decode_ring &ring, int &half)
{
    const int bits = p.linear[kind].bits, shift = p.linear[kind].group_shift;
    const int format = bits == 16 ? QF_FORMAT_16 : bits == 8 ? QF_FORMAT_8 : shift == 0 ? QF_FORMAT_4_128 : QF_FORMAT_4;
    constexpr int half_tiles = qf_decode_half_tiles(tokens);
    qf_decode_walk walk = {};
    walk.tile = -1;
    for (; walk.group * half_tiles < qf_fixed().phase[kind].local_tiles; walk.group++) {
        switch (format) {
        case QF_FORMAT_4_128:
            qf_decode_consume<QF_FORMAT_4_128, tokens, warps>(p, kind, half, ring, walk);
            break;
        case QF_FORMAT_4:
            qf_decode_consume<QF_FORMAT_4, tokens, warps>(p, kind, half, ring, walk);
            break;
        case QF_FORMAT_8:
            qf_decode_consume<QF_FORMAT_8, tokens, warps>(p, kind, half, ring, walk);
            break;
        default:
            qf_decode_consume<QF_FORMAT_16, tokens, warps>(p, kind, half, ring, walk);
        }
        qf_decode_leave<tokens, warps>(p, half, walk);
        qf_consumer_barrier<warps * 32>();
        qf_decode_finish<tokens, warps>(p, kind, layer, epoch, half, walk.group);
        half ^= 1;
    }
}

#endif
