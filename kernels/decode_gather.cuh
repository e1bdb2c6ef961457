/* How a CTA of the decode kernel makes x, the B operand of a linear, in shared memory, out of other CTAs' results. */
#ifndef QF_DECODE_GATHER_CUH
#define QF_DECODE_GATHER_CUH

#include "decode_exchange.cuh"

#define QF_DECODE_THREADS (QF_DECODE_WARPS * 32) /* that consume */

/* Puts four k (vector i of them) into x, as bf16 pairs; returns their sum, times 2^-133 as integers of weights are. x
 * is (k block, 32 k, 4 t, 4 words): the words that lane t of a fragment needs of two k16 steps lie together. */
__device__ __forceinline__ float qf_put_x(const qf_decode_params &p, int i, uint2 pairs)
{
    uint32_t *to = reinterpret_cast<uint32_t *>(qf_decode_shared + p.map.x + (i >> 3) * 64 + (i & 1) * 32 +
                                                (i >> 1 & 3) * 4);
    to[0] = pairs.x;
    to[4] = pairs.y;
    float sum = (qf_bf16_low(pairs.x) + qf_bf16_high(pairs.x)) + (qf_bf16_low(pairs.y) + qf_bf16_high(pairs.y));
    return sum * 0x1p-100f * 0x1p-33f;
}

/* The sums over a warp of `count` values each, in fewer shuffles than one by one: lane i returns that of value
 * i / (32 / count). */
template <int count> __device__ __forceinline__ float qf_warp_sums(float (&v)[count])
{
    const int lane = threadIdx.x & 31;
    int mask = 16;
#pragma unroll
    for (int left = count / 2; left > 0; left /= 2, mask /= 2) {
        const bool upper = (lane & mask) != 0;
#pragma unroll
        for (int i = 0; i < left; i++) {
            const float keep = upper ? v[i + left] : v[i], send = upper ? v[i] : v[i + left];
            v[i] = keep + __shfl_xor_sync(~0u, send, mask);
        }
    }
#pragma unroll
    for (; mask > 0; mask /= 2) {
        v[0] += __shfl_xor_sync(~0u, v[0], mask);
    }
    return v[0];
}

/* The CTAs start at different k blocks, lest all ask the same place for the same words at once. */
__device__ __forceinline__ int qf_gather_turn(int i, int vectors, int turn)
{
    i += turn;
    return i < vectors ? i : i - vectors;
}

/* The sums of x over each k block. */
__device__ __forceinline__ float *qf_block_sums(const qf_decode_params &p)
{
    return reinterpret_cast<float *>(qf_decode_shared + p.map.sums);
}

/* Before a gather: warp 0 awaits one vector a lane, spread over the row; the others wait for it at a barrier. So one
 * warp asks again and again instead of eight, which would keep L2 from what they wait for, and all that is wanted has
 * mostly come when it is asked for. at: word of the vector; slot: qf_ll_give_up's. */
template <bool ranks, bool sums>
static __device__ __noinline__ void qf_gather_await(const qf_decode_params &p, const uint32_t *words, int at,
                                                    bool wanted, uint32_t tag, uint32_t mask,
                                                    int32_t slot = QF_DECODE_LOCAL)
{
    if (threadIdx.x < 32) {
#pragma unroll 1
        for (uint32_t n = 1; wanted && (qf_ll_differs(qf_ll_load<ranks && sums>(words + at), tag) & mask) != 0; n++) {
            if (qf_ll_give_up<ranks>(p, n, slot)) {
                break;
            }
        }
    }
    qf_consumer_barrier();
}

/* Which slot a lane awaits of a row tile, -1 if none: half of the lanes the first, the others the last, so that with
 * several ranks at least one of the two comes from another. masks: of the tile. */
static __device__ __forceinline__ int qf_ranks_probe(const uint8_t *masks, int tiles, int groups, int lane)
{
    const int group = lane & 1 ? groups - 1 : 0;
    const uint32_t first = masks[0], last = masks[group * tiles];
    return (lane & 1) != 0 && last != 0 ? 4 * group + 31 - __clz((int)last) : __ffs((int)first) - 1;
}

/* A gather of the residual: what is where, and what of it is wanted. */
struct qf_decode_rows_wanted {
    const uint32_t *words; /* the first slot */
    const uint8_t *masks;
    const float4 *norm;
    float *squares, *saved;
    int begin, vectors, turn;    /* vectors of four k */
    int save_begin, save_end;    /* row tiles to keep h of */
    int tiles, groups;           /* of masks; of four slots */
    int32_t slot_base;           /* qf_ll_give_up's */
    uint32_t tag;
    bool all, first_layer;
};

/* The sum of a vector's slots; what is not there is 0. */
template <int slots> static __device__ __forceinline__ float4 qf_add_slots(const uint4 *v)
{
    float4 h = make_float4(qf_ll_decode(v[0].x), qf_ll_decode(v[0].y), qf_ll_decode(v[0].z), qf_ll_decode(v[0].w));
#pragma unroll
    for (int s = 1; s < slots; s++) {
        h.x += qf_ll_decode(v[s].x);
        h.y += qf_ll_decode(v[s].y);
        h.z += qf_ll_decode(v[s].z);
        h.w += qf_ll_decode(v[s].w);
    }
    return h;
}

/* h of this thread's next `per` vectors i[], the first of them number q0: all slots of all ranks, in their order, of which
 * 8 / per of each vector are in flight at once. first_layer: 0. */
template <bool ranks, int per>
static __device__ __forceinline__ void qf_gather_sums(const qf_decode_params &p, const qf_decode_rows_wanted &want, int q0,
                                                      const int (&i)[per], float4 (&sum)[per])
{
    constexpr int slots = 8 / per;
    const int groups = ranks && per == 2 ? want.groups : 1;
#pragma unroll 1
    for (int g = 0; g < groups; g++) {
        uint4 v[8]; /* vector j's slot s: slots * j + s */
        int at[8];
        uint32_t wanted = 0;
#pragma unroll
        for (int j = 0; j < per; j++) {
            if (q0 + j * QF_DECODE_THREADS < want.vectors) {
                wanted |= want.first_layer ? 0u : (uint32_t)want.masks[g * want.tiles + (i[j] >> 2)] << (slots * j);
            }
#pragma unroll
            for (int s = 0; s < slots; s++) {
                at[slots * j + s] = (4 * g + s) * p.hidden_size + 4 * i[j];
            }
        }
        qf_ll_get<ranks, true>(p, v, want.words, at, wanted, want.tag, 3u, want.slot_base + 4 * g, slots);
#pragma unroll
        for (int j = 0; j < per; j++) {
            const float4 more = qf_add_slots<slots>(v + slots * j);
            sum[j] = g == 0 ? more : make_float4(sum[j].x + more.x, sum[j].y + more.y, sum[j].z + more.z,
                                                 sum[j].w + more.w);
        }
    }
}

/* per: vectors that a thread has in flight, of 8 / per slots each. */
template <bool ranks, int per>
static __device__ __forceinline__ void qf_gather_rounds(const qf_decode_params &p, const qf_decode_rows_wanted &want)
{
    constexpr int lanes = 16 / per; /* of a warp that get the same of qf_warp_sums */
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int q0 = threadIdx.x; q0 < want.vectors; q0 += per * QF_DECODE_THREADS) { /* whole warps where `all` */
        float4 w[per], sum[per];
        int i[per];
        float reduced[2 * per] = {};
#pragma unroll
        for (int j = 0; j < per; j++) {
            const int q = q0 + j * QF_DECODE_THREADS;
            i[j] = want.begin + qf_gather_turn(q, want.vectors, want.turn);
            w[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (q < want.vectors && want.all) {
                w[j] = __ldg(want.norm + i[j]);
            }
        }
        qf_gather_sums<ranks, per>(p, want, q0, i, sum);
#pragma unroll
        for (int j = 0; j < per; j++) {
            const int tile = i[j] >> 2;
            if (q0 + j * QF_DECODE_THREADS >= want.vectors) {
                break;
            }
            float4 h = sum[j];
            if (want.first_layer) {
                h = *reinterpret_cast<const float4 *>(p.residual + 4 * i[j]);
            }
            if (tile >= want.save_begin && tile < want.save_end) {
                *reinterpret_cast<float4 *>(want.saved + (tile - want.save_begin) * 16 + (i[j] & 3) * 4) = h;
            }
            if (want.all) {
                const float scale = QF_DECODE_X_SCALE;
                reduced[j] = qf_put_x(p, i[j],
                                      make_uint2(qf_pack_bf16(h.x * w[j].x * scale, h.y * w[j].y * scale),
                                                 qf_pack_bf16(h.z * w[j].z * scale, h.w * w[j].w * scale)));
                reduced[per + j] = h.x * h.x + h.y * h.y + h.z * h.z + h.w * h.w;
            }
        }
        if (want.all) {
            const float total = qf_warp_sums(reduced);
            const int q = q0 - lane + lane / lanes % per * QF_DECODE_THREADS;
            const int block = qf_gather_turn(q, want.vectors, want.turn) >> 5;
            if (lane % lanes == 0 && q < want.vectors) {
                *((lane < 16 ? qf_block_sums(p) : want.squares) + block) = total;
            }
        }
    }
}

/* For qkv, gate_up and the head. The residual stream's next state h = the sum of the pieces (which hold the last state:
 * see qf_decode_finish); x = bf16(h * norm weight), not yet divided by the root mean square, whose sums of squares are
 * left aside; and h of the rows to which this CTA will add. Without a part here only those are wanted; with several ranks
 * only rank 0 adds it. */
template <bool ranks>
static __device__ __forceinline__ void qf_gather_rows(const qf_decode_params &p, int kind, int layer, uint32_t epoch)
{
    const bool mid = kind == QF_DECODE_GATE_UP;
    const qf_decode_phase &ph = qf_fixed().phase[kind], &next = qf_fixed().phase[mid ? QF_DECODE_DOWN : QF_DECODE_O];
    const bool saves = kind != QF_DECODE_HEAD && (!ranks || p.peers.rank == 0);
    const uint32_t from_epoch = mid ? epoch : epoch - 1;
    const int tiles = p.linear[QF_DECODE_O].tiles, lane = threadIdx.x & 31;
    qf_decode_rows_wanted want;
    want.first_layer = !mid && layer == 0;
    want.all = ph.blocks > 0;
    want.save_begin = next.tile0;
    want.save_end = next.tile0 + (saves ? next.local_tiles : 0);
    want.begin = want.all ? 0 : want.save_begin * 4;
    want.vectors = want.all ? p.hidden_size / 4 : (want.save_end - want.save_begin) * 4;
    want.turn = want.all ? ph.turn : 0;
    want.tag = qf_sum_tag(from_epoch);
    want.words = qf_row_exchange<ranks>(p, from_epoch) + (mid ? p.ll.o : p.ll.down);
    want.tiles = tiles;
    want.groups = !ranks ? 1 : mid ? p.rows[0].groups : p.rows[1].groups;
    want.masks = reinterpret_cast<const uint8_t *>(qf_decode_shared + p.map.masks) + p.linear[QF_DECODE_QKV].tiles +
                 (mid ? 0 : ranks ? p.rows[0].groups * tiles : tiles);
    want.slot_base = mid ? 0 : QF_DECODE_OF_DOWN;
    want.norm = reinterpret_cast<const float4 *>(qf_layer(p, layer)->norm[mid]);
    want.squares = qf_norm_squares(p, kind);
    want.saved = qf_saved(p, mid ? QF_DECODE_DOWN : QF_DECODE_O);
    const int probe = want.begin + lane * want.vectors / 32;
    const uint8_t *mask = want.masks + (probe >> 2);
    const bool any = want.vectors > 0 && !want.first_layer;
    if (ranks) {
        const int slot = any ? qf_ranks_probe(mask, tiles, want.groups, lane) : -1;
        qf_gather_await<true, true>(p, want.words, slot * p.hidden_size + 4 * probe, slot >= 0, want.tag, 3u,
                                    want.slot_base + slot);
    } else {
        const uint32_t slots = any ? *mask : 0;
        const int slot = slots & 1 ? 0 : 31 - __clz((int)slots | 1);
        qf_gather_await<false, false>(p, want.words, slot * p.hidden_size + 4 * probe, slots != 0, want.tag, 3u);
    }
    if (mid ? p.few[0] : p.few[1]) {
        qf_gather_rounds<ranks, 4>(p, want);
    } else {
        qf_gather_rounds<ranks, 2>(p, want);
    }
}

/* For o and down. x = this part's range of k of a row of bf16 words; zeros beyond its width. */
template <bool ranks>
static __device__ __forceinline__ void qf_gather_words(const qf_decode_params &p, int kind, uint32_t epoch)
{
    constexpr int ahead = 5;
    const qf_decode_phase &ph = qf_fixed().phase[kind];
    const bool o = kind == QF_DECODE_O;
    const int first = ph.ks0 * 128, width = (o ? p.q_size : p.act_size) - first;
    const int vectors = ph.kbs * 32, lane = threadIdx.x & 31, turn = ph.turn;
    const uint32_t *words = qf_exchange(p, epoch) + (o ? p.ll.attention : p.ll.act) + first, tag = epoch & 0xffffu;
    const int probe = 4 * (lane * vectors / 32);
    qf_gather_await<ranks, false>(p, words, probe, probe < width, tag, 0xffffu);
#pragma unroll 1
    for (int q0 = threadIdx.x; q0 < vectors; q0 += ahead * QF_DECODE_THREADS) {
        uint4 v[ahead];
        int at[ahead];
        uint32_t wanted = 0;
        float sums[8] = {};
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            const int q = q0 + j * QF_DECODE_THREADS;
            at[j] = 4 * qf_gather_turn(q, vectors, turn);
            wanted |= q < vectors && at[j] < width ? 1u << j : 0u;
        }
        qf_ll_get<ranks, false>(p, v, words, at, wanted, tag, 0xffffu);
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            if (q0 + j * QF_DECODE_THREADS < vectors) { /* true of a whole warp or of none of it */
                sums[j] = qf_put_x(p, at[j] >> 2, make_uint2(__byte_perm(v[j].x, v[j].y, 0x7632),
                                                             __byte_perm(v[j].z, v[j].w, 0x7632)));
            }
        }
        const float sum = qf_warp_sums(sums);
        const int q = q0 - lane + (lane >> 2) * QF_DECODE_THREADS;
        if ((lane & 3) == 0 && (lane >> 2) < ahead && q < vectors) {
            qf_block_sums(p)[qf_gather_turn(q, vectors, turn) >> 5] = sum;
        }
    }
}

#endif
