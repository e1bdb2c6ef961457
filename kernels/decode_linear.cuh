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

enum qf_decode_format { QF_FORMAT_4_128, QF_FORMAT_4, QF_FORMAT_8_128, QF_FORMAT_8, QF_FORMAT_16 };

__device__ constexpr int qf_format_bits(int format)
{
    return format == QF_FORMAT_16 ? 16 : format == QF_FORMAT_8_128 || format == QF_FORMAT_8 ? 8 : 4;
}

/* A fragment of integers without arithmetic: an integer q of at most 8 bits is, as the bits of a bf16 number, q 2^-133
 * (below 128 such a number has no leading one, and from there on its exponent is the least, which is the same scale). So
 * the bits of two nibbles of a 16-bit half are q and 16 q: rows g + 8 (registers 1 and 3) come out 16 times too large,
 * and x is stored times 2^96 (QF_DECODE_X_SCALE) so that sums are far from both ends of float32. */
__device__ __forceinline__ void qf_raw_4(uint32_t word, uint32_t (&a)[4])
{
    const uint32_t upper = word >> 8;
    a[0] = word & 0x000f000fu;
    a[1] = word & 0x00f000f0u;
    a[2] = upper & 0x000f000fu;
    a[3] = upper & 0x00f000f0u;
}

__device__ __forceinline__ void qf_raw_8(uint32_t low, uint32_t high, uint32_t (&a)[4])
{
    a[0] = __byte_perm(low, 0, 0x4140);
    a[1] = __byte_perm(low, 0, 0x4342);
    a[2] = __byte_perm(high, 0, 0x4140);
    a[3] = __byte_perm(high, 0, 0x4342);
}

/* The two sums of x of this lane's tokens (columns 2t and 2t + 1), times 2^-133. */
template <int tokens> __device__ __forceinline__ float2 qf_x_sums(uint32_t sums, int slot)
{
    const uint32_t at = sums + slot * tokens * 4;
    if (tokens == 1) {
        float v = __uint_as_float(qf_lds_32(at));
        return make_float2(v, v);
    }
    const uint32_t to = at + (2 * (threadIdx.x & 3)) % (tokens == 1 ? 1 : tokens) * 4;
    return make_float2(__uint_as_float(qf_lds_32(to)), __uint_as_float(qf_lds_32(to + 4)));
}

/* acc += scale (c - zero sum of x), for the rows g and g + 8. c may be the sum of two chains. */
template <int bits, int tokens>
__device__ __forceinline__ void qf_apply_scales(uint32_t row, const float2 s, const float (&c)[4], const float (&d)[4],
                                                float (&acc)[4])
{
    const uint32_t words[2] = {qf_lds_32(row), qf_lds_32(row + 32)};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float scale = __half2float(__ushort_as_half((unsigned short)(words[i] & 0xffffu)));
        const float zero = qf_bf16_high(words[i]) * (bits == 4 && i == 1 ? -16.0f : -1.0f);
        acc[2 * i] += scale * ((c[2 * i] + d[2 * i]) + zero * s.x);
        if (tokens > 1) {
            acc[2 * i + 1] += scale * ((c[2 * i + 1] + d[2 * i + 1]) + zero * s.y);
        }
    }
}

/* Shared addresses of a unit (1,024 bytes of weights: a block of 4 bits, half a block of 8, a quarter of 16): its words
 * and its piece of x at this lane's place, the block's scales at this lane's row, its sums of x; its first 32 k. */
struct qf_decode_unit_at {
    uint32_t data, scales, x, sums;
    int32_t first_32;
};

/* Adds `count` units to acc[i]: their chains of products are independent, so one's latency hides behind the other's. */
template <int format, int tokens, int count>
__device__ __forceinline__ void qf_decode_units(const qf_decode_unit_at (&at)[count], int shift, float (&acc)[count][4])
{
    constexpr int bits = qf_format_bits(format), steps = 32 / bits; /* k16 steps of a unit */
    constexpr bool whole = format == QF_FORMAT_4_128 || format == QF_FORMAT_8_128;
    uint32_t words[count][8];
#pragma unroll
    for (int u = 0; u < count; u++) {
        const uint4 low = qf_lds_128(at[u].data), high = qf_lds_128(at[u].data + 512);
        words[u][0] = low.x, words[u][1] = low.y, words[u][2] = low.z, words[u][3] = low.w;
        words[u][4] = high.x, words[u][5] = high.y, words[u][6] = high.z, words[u][7] = high.w;
    }
    float even[count][4] = {}, odd[count][4] = {};
#pragma unroll
    for (int j = 0; j < steps / 2; j++) { /* 32 k */
#pragma unroll
        for (int u = 0; u < count; u++) {
            const uint4 b = qf_lds_128(at[u].x + j * tokens * 64);
            uint32_t a[4];
            if (bits == 16) {
                const uint32_t a0[4] = {words[u][0], words[u][1], words[u][2], words[u][3]};
                const uint32_t a1[4] = {words[u][4], words[u][5], words[u][6], words[u][7]};
                qf_mma_bf16(acc[u], a0, b.x, b.y);
                qf_mma_bf16(odd[u], a1, b.z, b.w);
                continue;
            }
            if (!whole) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    even[u][i] = odd[u][i] = 0.0f;
                }
            }
            if (bits == 4) {
                qf_raw_4(words[u][2 * j], a);
                qf_mma_bf16(even[u], a, b.x, b.y);
                qf_raw_4(words[u][2 * j + 1], a);
                qf_mma_bf16(odd[u], a, b.z, b.w);
            } else {
                qf_raw_8(words[u][(4 * j) % 8], words[u][(4 * j + 1) % 8], a);
                qf_mma_bf16(even[u], a, b.x, b.y);
                qf_raw_8(words[u][(4 * j + 2) % 8], words[u][(4 * j + 3) % 8], a);
                qf_mma_bf16(odd[u], a, b.z, b.w);
            }
            if (!whole) {
                const uint32_t group = at[u].scales + ((at[u].first_32 + j) >> (2 - shift)) * 64;
                qf_apply_scales<bits, tokens>(group, qf_x_sums<tokens>(at[u].sums, at[u].first_32 + j), even[u], odd[u],
                                              acc[u]);
            }
        }
    }
#pragma unroll
    for (int u = 0; u < count; u++) {
        if (bits == 16) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                acc[u][i] += odd[u][i];
            }
        } else if (whole) {
            float2 s = qf_x_sums<tokens>(at[u].sums, 4);
            if (bits == 8 && at[u].first_32 == 0) { /* a block's sum counts once, with its second half */
                s = make_float2(0.0f, 0.0f);
            }
            qf_apply_scales<bits, tokens>(at[u].scales, s, even[u], odd[u], acc[u]);
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
__device__ __forceinline__ void qf_decode_consume(const qf_decode_params &p, int kind, int half, qf_decode_ring &ring,
                                                  qf_decode_walk &walk)
{
    constexpr int unit_shift = format == QF_FORMAT_16 ? 2 : qf_format_bits(format) == 8 ? 1 : 0; /* units of a block */
    constexpr int chunk_blocks = QF_DECODE_CHUNK_UNITS >> unit_shift;
    constexpr bool whole = format == QF_FORMAT_4_128 || format == QF_FORMAT_8_128;
    const qf_decode_phase &ph = qf_fixed().phase[kind];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int blocks = ph.blocks, offset = ph.offset, kbs = ph.kbs, chunks = (blocks + chunk_blocks - 1) / chunk_blocks;
    const uint32_t reciprocal = ph.reciprocal;
    const int limit = (walk.group + 1) * qf_decode_half_tiles(tokens) * kbs;
    const uint32_t base = qf_shared_address(qf_decode_shared), sums = base + p.map.sums;
    const uint32_t x = base + p.map.x + ((lane >> 2) % tokens) * 64 + (lane & 3) * 16;
    const int shift = whole ? 0 : p.linear[kind].group_shift;
    for (;;) {
        if (!walk.open) {
            if (walk.chunk == chunks) {
                return;
            }
            int units = min(chunk_blocks, blocks - walk.chunk * chunk_blocks) << unit_shift;
            int per = (units + QF_DECODE_WARPS - 1) / QF_DECODE_WARPS;
            walk.unit = warp * per;
            walk.end = min(walk.unit + per, units);
            walk.open = true;
            qf_ring_wait(&qf_fixed().full[ring.stage], ring.parity, &qf_fixed().failed);
        }
        const uint32_t stage = qf_ring_address(p, ring);
        int at = offset + walk.chunk * chunk_blocks + (walk.unit >> unit_shift);
        int tile = (int)__umulhi((uint32_t)at, reciprocal), k = at - tile * kbs;
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
            const uint32_t to_x = x + (k * 4 + first_32) * (tokens * 64), to_sums = sums + k * (32 * tokens);
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
__device__ __forceinline__ void qf_decode_finish(const qf_decode_params &p, int kind, int layer, uint32_t epoch,
                                                 int half, int group)
{
    constexpr int pairs = tokens == 1 ? 1 : tokens / 2, vec = tokens == 1 ? 2 : 4, places = 8 * pairs;
    constexpr int half_tiles = qf_decode_half_tiles(tokens);
    const int place = threadIdx.x % places, local = threadIdx.x / places, tile = group * half_tiles + local;
    if (local >= half_tiles || tile >= qf_fixed().phase[kind].local_tiles) {
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
    const float multiplier = qf_layer(p, layer)->multiplier[kind & 3];
#pragma unroll
    for (int i = 0; i < (tokens == 1 ? 1 : 2); i++) {
        int token = first_token + i;
        if (token >= p.num_seqs) {
            break;
        }
        float scale = normed ? multiplier * qf_norm_factors<tokens>(p, kind)[token] : multiplier;
        float high_scale = p.linear[kind].bits == 4 ? scale * 0.0625f : scale; /* see qf_raw_4 */
        float low = sum[i] * scale, high = sum[i + 2] * high_scale; /* rows g and g + 8 */
        if (kind == QF_DECODE_GATE_UP) { /* of gate and of up */
            float value = low / (1.0f + __expf(-low)) * high;
            qf_ll_store(qf_exchange(p, epoch) + p.ll.act + (int64_t)token * p.act_size +
                            (qf_fixed().phase[kind].tile0 + tile) * 8 + g,
                        (qf_pack_bf16(0.0f, value * QF_DECODE_X_SCALE) & 0xffff0000u) | (epoch & 0xffffu));
        } else {
            qf_decode_store<tokens>(p, kind, layer, epoch, tile, g, token, low);
            qf_decode_store<tokens>(p, kind, layer, epoch, tile, g + 8, token, high);
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
                                                             uint32_t epoch, qf_decode_ring &ring, int &half)
{
    const int bits = p.linear[kind].bits, shift = p.linear[kind].group_shift;
    const int format = bits == 16                 ? QF_FORMAT_16
                       : bits == 8 && shift == 0 ? QF_FORMAT_8_128
                       : bits == 8               ? QF_FORMAT_8
                       : shift == 0              ? QF_FORMAT_4_128
                                                 : QF_FORMAT_4;
    constexpr int half_tiles = qf_decode_half_tiles(tokens);
    qf_decode_walk walk = {};
    walk.tile = -1;
    for (; walk.group * half_tiles < qf_fixed().phase[kind].local_tiles; walk.group++) {
        switch (format) {
        case QF_FORMAT_4_128:
            qf_decode_consume<QF_FORMAT_4_128, tokens>(p, kind, half, ring, walk);
            break;
        case QF_FORMAT_4:
            qf_decode_consume<QF_FORMAT_4, tokens>(p, kind, half, ring, walk);
            break;
        case QF_FORMAT_8_128:
            qf_decode_consume<QF_FORMAT_8_128, tokens>(p, kind, half, ring, walk);
            break;
        case QF_FORMAT_8:
            qf_decode_consume<QF_FORMAT_8, tokens>(p, kind, half, ring, walk);
            break;
        default:
            qf_decode_consume<QF_FORMAT_16, tokens>(p, kind, half, ring, walk);
        }
        qf_decode_leave<tokens>(p, half, walk);
        qf_decode_stamp(p, step, QF_STAMP_UNITS); /* the last group's counts */
        qf_consumer_barrier();
        qf_decode_finish<tokens>(p, kind, step >> 2, epoch, half, walk.group);
        half ^= 1;
    }
}

#endif
