/* Attention of the decode kernel. A CTA has one kv head and a run of tiles of positions (8192 / head_dim positions, one
 * ring stage, each), or nothing; all query heads of the kv head (at most 8) share the tiles. Each consumer warp works
 * for itself on an eighth of the positions of every tile, by mma.m16n8k16 with the heads as rows (8 .. 15 are nought):
 *
 *   S (8 heads, 16 or 8 positions) = q K^T;  running maximum and sum of each head;  O (8 heads, head_dim) += P V
 *
 * where S as it comes out of the first product is, rounded, the A operand of the second. Behind the last tile the
 * warps' (m, l, O) meet in shared memory; three barriers in all (four for head_dim 128), none a tile.
 *
 * The newest key and value come from qkv's results, not from the cache (where the last split's CTA writes them); the
 * warp whose rows they are puts them into the tile, which has zeros there.
 *
 * The splits of the positions depend on the length alone: at least four tiles each, and at most max_splits. With several, a
 * CTA leaves (m, l, O) and warps all over the grid merge them, in order of split. */
#ifndef QF_DECODE_CUH
#define QF_DECODE_CUH

#include "decode_linear.cuh"

/* Shared memory of an item, in place of x. */
template <int head_dim> struct qf_decode_attention_shared {
    static constexpr int rows = 8192 / head_dim, stride = head_dim + 8;
    static constexpr int slots = 512 / head_dim; /* for O: of every warp, or of every other */
    __nv_bfloat16 q[8 * stride];
    __nv_bfloat16 newest[2][head_dim]; /* key, value */
    float o[slots][8][stride];
    float2 ml[QF_DECODE_WARPS][8];
};
static_assert(sizeof(qf_decode_attention_shared<64>) == qf_decode_attention_bytes(64), "see qf_decode_plan_shared");
static_assert(sizeof(qf_decode_attention_shared<128>) == qf_decode_attention_bytes(128), "see qf_decode_plan_shared");

__device__ __forceinline__ float4 qf_ll_add(const uint4 &a, const uint4 &b)
{
    return make_float4(qf_ll_decode(a.x) + qf_ll_decode(b.x), qf_ll_decode(a.y) + qf_ll_decode(b.y),
                       qf_ll_decode(a.z) + qf_ll_decode(b.z), qf_ll_decode(a.w) + qf_ll_decode(b.w));
}

/* Gathers q of the item's heads and, if the new token is its own, the new key and value; rotates; rounds; stores to the
 * cache. A thread has four neighbours in the first half of a head and the four that they rotate with, or four of v. */
template <int head_dim, bool ranks>
__device__ __forceinline__ void qf_attention_gather(const qf_decode_params &p, const qf_decode_item &item,
                                                    uint32_t epoch, const qf_decode_layer_entry *layer,
                                                    qf_decode_attention_shared<head_dim> &sh)
{
    constexpr int half = head_dim / 2, quads = half / 4;
    static_assert(9 * quads + head_dim / 4 <= QF_DECODE_THREADS, "one round");
    const int group = p.num_heads / p.num_kv_heads, n = p.linear[QF_DECODE_QKV].n, id = threadIdx.x;
    const bool newest = item.fresh >= 0;
    const int rotated = (group + (newest ? 1 : 0)) * quads, plain = newest ? head_dim / 4 : 0;
    if (id >= rotated + plain) {
        return;
    }
    const uint8_t *masks = reinterpret_cast<const uint8_t *>(qf_decode_shared + p.map.masks);
    const bool rotate = id < rotated;
    const int head = id / quads, j = rotate ? id % quads * 4 : (id - rotated) * 4;
    const int row = (!rotate        ? (p.num_heads + p.num_kv_heads + item.head) * head_dim
                     : head < group ? (item.head * group + head) * head_dim
                                    : (p.num_heads + item.head) * head_dim) + j;
    const int at[4] = {row, row + n, row + half, row + half + n};
    uint4 v[4];
    float4 c = make_float4(1.0f, 1.0f, 1.0f, 1.0f), s = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    uint32_t wanted = masks[row >> 4];
    if (rotate) {
        const float4 *rope = reinterpret_cast<const float4 *>(qf_decode_shared + p.map.rope + j * 4);
        c = rope[0];
        s = rope[half / 4];
        wanted |= (uint32_t)masks[(row + half) >> 4] << 2;
    }
    qf_ll_get<ranks, false>(p, v, qf_exchange(p, epoch) + p.ll.qkv, at, wanted, qf_sum_tag(epoch), 3u);
    const float4 a = qf_ll_add(v[0], v[1]), b = qf_ll_add(v[2], v[3]);
    const uint2 low = make_uint2(qf_pack_bf16(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y),
                                 qf_pack_bf16(a.z * c.z - b.z * s.z, a.w * c.w - b.w * s.w));
    const uint2 high = make_uint2(qf_pack_bf16(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y),
                                  qf_pack_bf16(b.z * c.z + a.z * s.z, b.w * c.w + a.w * s.w));
    __nv_bfloat16 *to = (!rotate ? sh.newest[1] : head < group ? sh.q + head * sh.stride : sh.newest[0]) + j;
    char *cache = (rotate ? layer->k : layer->v) + item.place + j * 2;
    const bool store = item.place >= 0 && !(rotate && head < group);
    *reinterpret_cast<uint2 *>(to) = low;
    if (store) {
        *reinterpret_cast<uint2 *>(cache) = low;
    }
    if (rotate) {
        *reinterpret_cast<uint2 *>(to + half) = high;
        if (store) {
            *reinterpret_cast<uint2 *>(cache + head_dim) = high;
        }
    }
}

/* What a warp has: q as A fragments, and O, m and l of head lane / 4. l: this lane's positions only. */
template <int head_dim> struct qf_attention_state {
    static constexpr int reach = 8192 / head_dim / QF_DECODE_WARPS; /* positions of a tile */
    uint32_t q[head_dim / 8];
    float o[head_dim / 8][2], m, l;
};

template <int head_dim>
__device__ __forceinline__ void qf_attention_begin(const qf_decode_attention_shared<head_dim> &sh,
                                                   qf_attention_state<head_dim> &state)
{
    const int lane = threadIdx.x & 31;
    const uint32_t q = qf_shared_address(sh.q) + (lane & 7) * (sh.stride * 2) + (lane >> 3) * 16;
#pragma unroll
    for (int i = 0; i < head_dim / 32; i++) {
        uint32_t v[4];
        qf_ldmatrix_at(v, q + i * 64);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            state.q[4 * i + j] = v[j];
        }
    }
#pragma unroll
    for (int i = 0; i < head_dim / 8; i++) {
        state.o[i][0] = state.o[i][1] = 0.0f;
    }
    state.m = -INFINITY;
    state.l = 0.0f;
}

/* Puts the newest key and value into this warp's rows of the tile; fresh: which row. */
template <int head_dim>
__device__ __forceinline__ void qf_attention_put_newest(const qf_decode_attention_shared<head_dim> &sh, uint32_t tile,
                                                        int fresh)
{
    constexpr int pieces = head_dim / 8;
    const int lane = threadIdx.x & 31;
    if (lane < 2 * pieces) {
        int piece = lane % pieces;
        uint32_t to = tile + lane / pieces * 16384 + fresh * (head_dim * 2) + ((piece ^ (fresh & 7)) << 4);
        uint4 v = *reinterpret_cast<const uint4 *>(sh.newest[lane / pieces] + piece * 8);
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
    }
    __syncwarp();
}

/* Adds this warp's positions of a tile; first: the tile's first position. */
template <int head_dim>
__device__ __forceinline__ void qf_attention_tile(float scale_log2, uint32_t tile, int first, int start, int length,
                                                  qf_attention_state<head_dim> &state)
{
    constexpr int reach = qf_attention_state<head_dim>::reach, groups = reach / 8, row_bytes = head_dim * 2;
    const int lane = threadIdx.x & 31, t = lane & 3, row0 = (threadIdx.x >> 5) * reach;
    float s[groups][2], largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < groups; n++) {
        float c[4] = {}, d[4] = {};
#pragma unroll
        for (int i = 0; i < head_dim / 32; i++) {
            uint32_t b[4];
            qf_ldmatrix_at(b, tile + (row0 + n * 8 + (lane & 7)) * row_bytes +
                                  (((i * 4 + (lane >> 3)) ^ (lane & 7)) << 4));
            const uint32_t a0[4] = {state.q[4 * i], 0, state.q[4 * i + 1], 0};
            const uint32_t a1[4] = {state.q[4 * i + 2], 0, state.q[4 * i + 3], 0};
            qf_mma_bf16(c, a0, b[0], b[1]);
            qf_mma_bf16(d, a1, b[2], b[3]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int position = first + row0 + n * 8 + 2 * t + i;
            s[n][i] = position >= start && position < length ? (c[i] + d[i]) * scale_log2 : -INFINITY;
            largest = fmaxf(largest, s[n][i]);
        }
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const float m = fmaxf(state.m, largest), shift = m == -INFINITY ? 0.0f : m, factor = qf_exp2(state.m - shift);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < groups; n++) {
        s[n][0] = qf_exp2(s[n][0] - shift);
        s[n][1] = qf_exp2(s[n][1] - shift);
        sum += s[n][0] + s[n][1];
    }
    state.m = m;
    state.l = state.l * factor + sum;
    const uint32_t a[4] = {qf_pack_bf16(s[0][0], s[0][1]), 0,
                           groups == 2 ? qf_pack_bf16(s[groups - 1][0], s[groups - 1][1]) : 0u, 0};
#pragma unroll
    for (int i = 0; i < head_dim / 8; i += 2 * (3 - groups)) { /* columns / 8 */
        /* groups 2: (positions 0 .. 7, 8 .. 15) x 2 columns; groups 1: 4 columns */
        const int row = row0 + (groups == 2 ? lane & 15 : lane & 7), column = i + (groups == 2 ? lane >> 4 : lane >> 3);
        uint32_t b[4];
        qf_ldmatrix_trans_at(b, tile + 16384 + row * row_bytes + ((column ^ (row & 7)) << 4));
#pragma unroll
        for (int j = 0; j < 2 * (3 - groups); j++) {
            float c[4] = {state.o[i + j][0] * factor, state.o[i + j][1] * factor, 0.0f, 0.0f};
            qf_mma_bf16(c, a, groups == 2 ? b[2 * j % 4] : b[j], groups == 2 ? b[(2 * j + 1) % 4] : 0u);
            state.o[i + j][0] = c[0];
            state.o[i + j][1] = c[1];
        }
    }
}

/* Leaves the warps' O, m and l in shared memory; ends with a barrier. */
template <int head_dim>
__device__ __forceinline__ void qf_attention_leave(qf_decode_attention_shared<head_dim> &sh,
                                                   qf_attention_state<head_dim> &state)
{
    constexpr int slots = qf_decode_attention_shared<head_dim>::slots;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    state.l += __shfl_xor_sync(~0u, state.l, 1);
    state.l += __shfl_xor_sync(~0u, state.l, 2);
    if (t == 0) {
        sh.ml[warp][g] = make_float2(state.m, state.l);
    }
    float *o = &sh.o[warp % slots][g][2 * t];
    if (warp >= slots || slots == QF_DECODE_WARPS) {
#pragma unroll
        for (int i = 0; i < head_dim / 8; i++) {
            *reinterpret_cast<float2 *>(o + i * 8) = make_float2(state.o[i][0], state.o[i][1]);
        }
    }
    qf_consumer_barrier();
    if (slots < QF_DECODE_WARPS) { /* then the lower warps add theirs to the upper ones' */
        if (warp < slots) {
            const float2 other = sh.ml[warp + slots][g];
            const float m = fmaxf(state.m, other.x), shift = m == -INFINITY ? 0.0f : m;
            const float mine = qf_exp2(state.m - shift), theirs = qf_exp2(other.x - shift);
#pragma unroll
            for (int i = 0; i < head_dim / 8; i++) {
                float2 v = *reinterpret_cast<float2 *>(o + i * 8);
                *reinterpret_cast<float2 *>(o + i * 8) =
                    make_float2(state.o[i][0] * mine + v.x * theirs, state.o[i][1] * mine + v.y * theirs);
            }
            __syncwarp();
            if (t == 0) {
                sh.ml[warp][g] = make_float2(m, state.l * mine + other.y * theirs);
            }
        }
        qf_consumer_barrier();
    }
}

/* Publishes an item's output, or its part of it: a thread two columns of a head. */
template <int head_dim>
__device__ __forceinline__ void qf_attention_publish(const qf_decode_params &p, const qf_decode_item &item,
                                                     const qf_decode_attention_shared<head_dim> &sh, uint32_t epoch,
                                                     uint32_t partial_tag)
{
    constexpr int slots = qf_decode_attention_shared<head_dim>::slots, pairs = head_dim / 2;
    const int group = p.num_heads / p.num_kv_heads;
#pragma unroll 1
    for (int u = threadIdx.x; u < group * pairs; u += QF_DECODE_THREADS) {
        const int g = u / pairs, d = u % pairs * 2, head = item.head * group + g;
        float m = -INFINITY, l = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
        for (int w = 0; w < slots; w++) {
            m = fmaxf(m, sh.ml[w][g].x);
        }
        const float shift = m == -INFINITY ? 0.0f : m;
#pragma unroll
        for (int w = 0; w < slots; w++) {
            const float2 ml = sh.ml[w][g], o = *reinterpret_cast<const float2 *>(&sh.o[w][g][d]);
            const float weight = qf_exp2(ml.x - shift);
            l += ml.y * weight;
            x += o.x * weight;
            y += o.y * weight;
        }
        if (item.num_splits == 1) { /* no position at all: padding, which gives zeros */
            const float factor = l > 0.0f ? __fdividef(QF_DECODE_X_SCALE, l) : 0.0f;
            const uint32_t pair = qf_pack_bf16(x * factor, y * factor);
            qf_ll_store(qf_exchange(p, epoch) + p.ll.attention + head * head_dim + d, pair << 16 | (epoch & 0xffffu),
                        (pair & 0xffff0000u) | (epoch & 0xffffu));
            continue;
        }
        const int index = head * p.max_splits + item.split;
        uint2 *partials = p.partials + (epoch & 1) * p.partials_half, *to = partials + index * head_dim + d;
        qf_ll_store_pair(to, x, partial_tag);
        qf_ll_store_pair(to + 1, y, partial_tag);
        if (d == 0) {
            to = partials + p.partials_ml + index * 2;
            qf_ll_store_pair(to, m, partial_tag);
            qf_ll_store_pair(to + 1, l, partial_tag);
        }
    }
}

/* Polls `count` pairs at once, those with from[i] not NULL, until all bear the tag; the others give 0. */
template <bool ranks, int count>
__device__ __forceinline__ void qf_pair_get(const qf_decode_params &p, float (&values)[count],
                                            const uint2 *const (&from)[count], uint32_t tag)
{
    uint2 v[count];
#pragma unroll
    for (int i = 0; i < count; i++) {
        v[i] = from[i] ? qf_ll_load_pair(from[i]) : make_uint2(0, tag);
    }
#pragma unroll 1
    for (uint32_t n = 1;; n++) {
        uint32_t differs = 0;
#pragma unroll
        for (int i = 0; i < count; i++) {
            differs |= v[i].y ^ tag;
        }
        if (differs == 0 || qf_ll_give_up<ranks>(p, n)) {
            break;
        }
#pragma unroll
        for (int i = 0; i < count; i++) {
            if (v[i].y != tag) {
                v[i] = qf_ll_load_pair(from[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < count; i++) {
        values[i] = __uint_as_float(v[i].x);
    }
}

/* Merges the splits: a warp takes 32 columns of a head; lane i weighs split i. */
template <int head_dim, bool ranks>
static __device__ __noinline__ void qf_attention_merge(const qf_decode_params &p, int splits, uint32_t epoch,
                                                       uint32_t tag)
{
    static_assert(QF_DECODE_MAX_SPLITS == 32, "a lane for each");
    constexpr int slices = head_dim / 32, ahead = 8;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint2 *partials = p.partials + (epoch & 1) * p.partials_half;
#pragma unroll 1
    for (int u = (int)blockIdx.x + warp * (int)gridDim.x; u < p.num_heads * slices;
         u += QF_DECODE_WARPS * (int)gridDim.x) {
        const int slice = u % slices, head = u / slices;
        const uint2 *ml = partials + p.partials_ml + (head * p.max_splits + lane) * 2;
        const uint2 *from = partials + head * p.max_splits * head_dim + slice * 32 + lane;
        const uint2 *const both[2] = {lane < splits ? ml : nullptr, lane < splits ? ml + 1 : nullptr};
        float pair[2], acc = 0.0f;
        qf_pair_get<ranks>(p, pair, both, tag);
        float m = lane < splits ? pair[0] : -INFINITY, largest = m;
#pragma unroll
        for (int mask = 16; mask != 0; mask >>= 1) {
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, mask));
        }
        float weight = qf_exp2(m - largest), sum = pair[1] * weight;
#pragma unroll
        for (int mask = 16; mask != 0; mask >>= 1) {
            sum += __shfl_xor_sync(~0u, sum, mask);
        }
#pragma unroll 1
        for (int first = 0; first < splits; first += ahead) {
            const uint2 *places[ahead];
            float values[ahead];
#pragma unroll
            for (int j = 0; j < ahead; j++) {
                places[j] = first + j < splits ? from + (first + j) * head_dim : nullptr;
            }
            qf_pair_get<ranks>(p, values, places, tag);
#pragma unroll
            for (int j = 0; j < ahead; j++) {
                acc += values[j] * __shfl_sync(~0u, weight, (first + j) & 31);
            }
        }
        qf_ll_store(qf_exchange(p, epoch) + p.ll.attention + head * head_dim + slice * 32 + lane,
                    (qf_pack_bf16(0.0f, acc * (QF_DECODE_X_SCALE / sum)) & 0xffff0000u) | (epoch & 0xffffu));
    }
}

/* The attention of this CTA in one layer. Barriers of all consumer warps, where it has an item: one when q is there,
 * those of qf_attention_leave, one at the end (behind which q, newest and x may be written again). */
template <int head_dim, bool ranks>
__device__ __forceinline__ void qf_decode_attention(const qf_decode_params &p, int layer_index, uint32_t epoch,
                                                    qf_decode_ring &ring)
{
    typedef qf_decode_attention_shared<head_dim> shape;
    shape &sh = *reinterpret_cast<shape *>(qf_decode_shared + p.map.x);
    const qf_decode_layer_entry *layer = qf_layer(p, layer_index);
    const qf_decode_item &item = qf_fixed().items[layer->other_window];
    const uint32_t partial_tag = epoch | 0x80000000u;
    if (item.head >= 0) {
        qf_attention_gather<head_dim, ranks>(p, item, epoch, layer, sh);
        qf_consumer_barrier();
        qf_decode_stamp(p, 4 * layer_index + 1, QF_STAMP_Q);
        qf_attention_state<head_dim> state;
        qf_attention_begin<head_dim>(sh, state);
#pragma unroll 1
        for (int tile = item.tile_begin; tile < item.tile_end; tile++) {
            const int first = tile * shape::rows, fresh = item.fresh - first; /* beyond 0 .. rows - 1: another tile's */
            const uint32_t at = qf_ring_address(p, ring);
            qf_ring_wait(&qf_fixed().full[ring.stage], ring.parity, &qf_fixed().failed);
            if (fresh >= 0 && fresh / state.reach == (int)threadIdx.x >> 5) {
                qf_attention_put_newest<head_dim>(sh, at, fresh);
            }
            qf_attention_tile<head_dim>(p.scale_log2, at, first, item.start, item.length, state);
            __syncwarp();
            if ((threadIdx.x & 31) == 0) {
                qf_mbarrier_arrive(&qf_fixed().empty[ring.stage]);
            }
            qf_ring_advance(p, ring);
        }
        qf_decode_stamp(p, 4 * layer_index + 1, QF_STAMP_TILES);
        qf_attention_leave<head_dim>(sh, state);
        qf_attention_publish<head_dim>(p, item, sh, epoch, partial_tag);
        qf_decode_stamp(p, 4 * layer_index + 1, QF_STAMP_ATTENTION);
        qf_consumer_barrier();
    }
    if (item.num_splits > 1) {
        qf_attention_merge<head_dim, ranks>(p, item.num_splits, epoch, partial_tag);
    }
}

#endif
