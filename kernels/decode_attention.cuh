/* Attention of the decode kernel. An item is one kv head of one sequence and a run of tiles of positions (8192 /
 * head_dim positions, one ring stage, each); all its G query heads share the tiles. All consumer warps of a CTA work on
 * one tile at a time:
 *
 *   scores   S (8 heads, positions) = q K^T: a warp takes 8 positions x 64 of head_dim by mma.m16n8k16 (heads are the
 *            rows, 8 .. 15 are nought) and leaves them in shared memory;
 *   barrier  (the one barrier a tile)
 *   values   O (8 heads, head_dim) += P V: a warp takes 8 columns and 64 positions (8 warps: all of the tile), reads
 *            those scores in the layout of the A operand, and keeps maximum and sum of each head itself.
 *
 * Scores have two buffers, so the next tile's may be written while slow warps read this one's. The newest key and value
 * come from qkv's results, not from the cache (where the last split's CTA writes them); the warps that read their rows
 * put them into the tile, which has zeros there.
 *
 * The splits of a sequence depend on its length alone: at least 256 positions, and at most max_splits. With several, an
 * item leaves (m, l, O) and warps all over the grid merge them, in order of split. */
#ifndef QF_DECODE_ATTENTION_CUH
#define QF_DECODE_ATTENTION_CUH

#include "decode_linear.cuh"

/* Shared memory of an item, in place of x. */
template <int head_dim> struct qf_decode_attention_shared {
    static constexpr int rows = 8192 / head_dim, q_stride = head_dim + 8, score_stride = rows + 8;
    static constexpr int parts = head_dim / 64;
    __nv_bfloat16 q[8 * q_stride];
    __nv_bfloat16 newest[2][head_dim]; /* key, value */
    float scores[2][parts][8][score_stride];
    float4 other[8][32]; /* what the upper half of the positions gave (16 warps, head_dim 64) */
};

/* Gathers q of the item's heads and, if `newest`, the new key and value; rotates; rounds; stores to the cache. */
template <int head_dim, int threads>
static __device__ __forceinline__ void qf_attention_gather(const qf_decode_params &p, const qf_decode_item &item,
                                                           uint32_t epoch, const qf_decode_layer_entry *layer,
                                                           bool newest, qf_decode_attention_shared<head_dim> &sh)
{
    constexpr int half = head_dim / 2, quads = half / 4;
    static_assert(9 * quads + head_dim / 4 <= threads, "one round");
    const int group = p.num_heads / p.num_kv_heads, n = p.linear[QF_DECODE_QKV].n, id = threadIdx.x;
    const int rotated = (group + (newest ? 1 : 0)) * quads, plain = newest ? head_dim / 4 : 0;
    if (id < rotated + plain) {
        const uint8_t *masks = reinterpret_cast<const uint8_t *>(qf_decode_shared + p.map.masks);
        const int slot = newest ? p.slot_mapping[item.seq] : -1;
        const int64_t place = (((int64_t)(slot / p.block_size) * p.num_kv_heads + item.head) * p.block_size +
                               slot % p.block_size) * (head_dim * 2);
        const bool rotate = id < rotated; /* else v: two quads of it are summed, both are the same */
        const int head = id / quads, j = rotate ? id % quads * 4 : (id - rotated) * 4;
        const int row = !rotate        ? (p.num_heads + p.num_kv_heads + item.head) * head_dim
                        : head < group ? (item.head * group + head) * head_dim
                                       : (p.num_heads + item.head) * head_dim;
        const int other = rotate ? half : 0;
        const int32_t at[2] = {item.seq * n + row + j, item.seq * n + row + j + other};
        uint32_t slots[2] = {masks[(row + j) >> 4], rotate ? masks[(row + j + other) >> 4] : 0u};
        float4 c = make_float4(1.0f, 1.0f, 1.0f, 1.0f), s = make_float4(0.0f, 0.0f, 0.0f, 0.0f), sums[2];
        if (rotate) {
            c = *reinterpret_cast<const float4 *>(p.cos_sin + item.seq * head_dim + j);
            s = *reinterpret_cast<const float4 *>(p.cos_sin + item.seq * head_dim + half + j);
        }
        qf_ll_sum<2>(p, sums, qf_exchange(p, epoch) + p.ll.qkv, at, slots, p.num_seqs * n, qf_sum_tag(epoch));
        const float4 a = sums[0], b = sums[1];
        uint2 low = make_uint2(qf_pack_bf16(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y),
                               qf_pack_bf16(a.z * c.z - b.z * s.z, a.w * c.w - b.w * s.w));
        uint2 high = make_uint2(qf_pack_bf16(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y),
                                qf_pack_bf16(b.z * c.z + a.z * s.z, b.w * c.w + a.w * s.w));
        __nv_bfloat16 *to = !rotate ? sh.newest[1] : head < group ? sh.q + head * sh.q_stride : sh.newest[0];
        *reinterpret_cast<uint2 *>(to + j) = low;
        if (rotate) {
            *reinterpret_cast<uint2 *>(to + half + j) = high;
        }
        if (slot >= 0 && !(rotate && head < group)) {
            char *cache = (rotate ? layer->k : layer->v) + place;
            *reinterpret_cast<uint2 *>(cache + j * 2) = low;
            if (rotate) {
                *reinterpret_cast<uint2 *>(cache + (half + j) * 2) = high;
            }
        }
    }
}

/* Scores of this warp's share of a tile: 8 positions x 64 of head_dim a time. `fresh`: row of the newest key, or -1. */
template <int head_dim, int warps>
__device__ __forceinline__ void qf_attention_scores(const qf_decode_params &p, qf_decode_attention_shared<head_dim> &sh,
                                                    uint32_t keys, int buffer, int first, int start, int length,
                                                    int fresh)
{
    typedef qf_decode_attention_shared<head_dim> shape;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    for (int u = warp; u < shape::rows / 8 * shape::parts; u += warps) {
        int row0 = u % (shape::rows / 8) * 8, part = u / (shape::rows / 8);
        if (fresh >= row0 && fresh < row0 + 8) { /* only this warp reads this row's part */
            if (lane < 8) {
                int piece = part * 8 + lane;
                uint32_t to = keys + fresh * (head_dim * 2) + ((piece ^ (fresh & 7)) << 4);
                uint4 v = *reinterpret_cast<const uint4 *>(sh.newest[0] + piece * 8);
                asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                             : "memory");
            }
            __syncwarp();
        }
        float c[4] = {}, d[4] = {};
        const uint32_t q = qf_shared_address(sh.q) + (lane & 7) * (shape::q_stride * 2) + (lane >> 3) * 16;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t a[4], b[4];
            int piece = part * 8 + i * 4 + (lane >> 3);
            qf_ldmatrix_at(a, q + (part * 8 + i * 4) * 16);
            qf_ldmatrix_at(b, keys + (row0 + (lane & 7)) * (head_dim * 2) + ((piece ^ (lane & 7)) << 4));
            const uint32_t a0[4] = {a[0], 0, a[1], 0}, a1[4] = {a[2], 0, a[3], 0};
            qf_mma_bf16(c, a0, b[0], b[1]);
            qf_mma_bf16(d, a1, b[2], b[3]);
        }
        float2 s = make_float2((c[0] + d[0]) * p.scale_log2, (c[1] + d[1]) * p.scale_log2);
        int position = first + row0 + 2 * t;
        s.x = position >= start && position < length ? s.x : -INFINITY;
        s.y = position + 1 >= start && position + 1 < length ? s.y : -INFINITY;
        *reinterpret_cast<float2 *>(&sh.scores[buffer][part][g][row0 + 2 * t]) = s;
    }
}

/* This warp's columns of the output: 8 (or 16) of head_dim, over `reach` positions of each tile. */
template <int head_dim, int warps> struct qf_attention_state {
    static constexpr int slices = head_dim / 8, halves = warps > slices ? warps / slices : 1;
    static constexpr int columns = warps < slices ? slices / warps : 1, reach = 8192 / head_dim / halves;
    float acc[columns][2], m, l; /* of head lane / 4; l: this lane's positions only */
};

template <int head_dim, int warps>
__device__ __forceinline__ void qf_attention_values(qf_decode_attention_shared<head_dim> &sh, uint32_t values,
                                                    int buffer, int fresh, qf_attention_state<head_dim, warps> &state)
{
    typedef qf_attention_state<head_dim, warps> shape;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int from = warp / (shape::slices / shape::columns) * shape::reach;
    const int slice = warp % (shape::slices / shape::columns) * shape::columns;
    if (fresh >= from && fresh < from + shape::reach) { /* only this warp reads these columns of this row */
        if (lane < shape::columns) {
            uint32_t to = values + fresh * (head_dim * 2) + (((slice + lane) ^ (fresh & 7)) << 4);
            uint4 v = *reinterpret_cast<const uint4 *>(sh.newest[1] + (slice + lane) * 8);
            asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                         : "memory");
        }
        __syncwarp();
    }
    float s[shape::reach / 8][2], largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < shape::reach / 8; i++) {
        float2 v = *reinterpret_cast<const float2 *>(&sh.scores[buffer][0][g][from + i * 8 + 2 * t]);
        if (head_dim == 128) {
            float2 w = *reinterpret_cast<const float2 *>(
                &sh.scores[buffer][head_dim / 64 - 1][g][from + i * 8 + 2 * t]);
            v.x += w.x;
            v.y += w.y;
        }
        s[i][0] = v.x;
        s[i][1] = v.y;
        largest = fmaxf(largest, fmaxf(v.x, v.y));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    float m = fmaxf(state.m, largest), shift = m == -INFINITY ? 0.0f : m, factor = exp2f(state.m - shift);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < shape::reach / 8; i++) {
        s[i][0] = exp2f(s[i][0] - shift);
        s[i][1] = exp2f(s[i][1] - shift);
        sum += s[i][0] + s[i][1];
    }
    state.m = m;
    state.l = state.l * factor + sum;
#pragma unroll
    for (int column = 0; column < shape::columns; column++) {
        float c[4] = {state.acc[column][0] * factor, state.acc[column][1] * factor, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < shape::reach / 32; i++) {
            uint32_t b[4];
            int row = from + i * 32 + lane;
            qf_ldmatrix_trans_at(b, values + row * (head_dim * 2) + (((slice + column) ^ (row & 7)) << 4));
            const uint32_t a0[4] = {qf_pack_bf16(s[4 * i][0], s[4 * i][1]), 0,
                                    qf_pack_bf16(s[4 * i + 1][0], s[4 * i + 1][1]), 0};
            const uint32_t a1[4] = {qf_pack_bf16(s[4 * i + 2][0], s[4 * i + 2][1]), 0,
                                    qf_pack_bf16(s[4 * i + 3][0], s[4 * i + 3][1]), 0};
            qf_mma_bf16(c, a0, b[0], b[1]);
            qf_mma_bf16(c, a1, b[2], b[3]);
        }
        state.acc[column][0] = c[0];
        state.acc[column][1] = c[1];
    }
}

/* Publishes an item's output, or its part of it. Holds one barrier if the positions of a tile are shared out. */
template <int head_dim, int warps>
__device__ __forceinline__ void qf_attention_publish(const qf_decode_params &p, const qf_decode_item &item,
                                                     qf_decode_attention_shared<head_dim> &sh,
                                                     qf_attention_state<head_dim, warps> &state, uint32_t epoch,
                                                     uint32_t partial_tag)
{
    typedef qf_attention_state<head_dim, warps> shape;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int group = p.num_heads / p.num_kv_heads, slice = warp % (shape::slices / shape::columns) * shape::columns;
    state.l += __shfl_xor_sync(~0u, state.l, 1);
    state.l += __shfl_xor_sync(~0u, state.l, 2);
    if (shape::halves == 2) {
        if (warp >= shape::slices) {
            sh.other[slice][lane] = make_float4(state.acc[0][0], state.acc[0][1], state.m, state.l);
        }
        qf_consumer_barrier<warps * 32>();
        if (warp >= shape::slices) {
            return;
        }
        float4 o = sh.other[slice][lane];
        float m = fmaxf(state.m, o.z), shift = m == -INFINITY ? 0.0f : m;
        float mine = exp2f(state.m - shift), theirs = exp2f(o.z - shift);
        state.acc[0][0] = state.acc[0][0] * mine + o.x * theirs;
        state.acc[0][1] = state.acc[0][1] * mine + o.y * theirs;
        state.l = state.l * mine + o.w * theirs;
        state.m = m;
    }
    if (g >= group) {
        return;
    }
    int head = item.head * group + g;
    if (item.num_splits == 1) {
        float factor = 1.0f / state.l;
#pragma unroll
        for (int column = 0; column < shape::columns; column++) {
            int d = head * head_dim + (slice + column) * 8 + 2 * t;
            uint32_t pair = qf_pack_bf16(state.acc[column][0] * factor, state.acc[column][1] * factor);
            qf_ll_store(qf_exchange(p, epoch) + p.ll.attention + (int64_t)item.seq * (p.num_heads * head_dim) + d,
                        pair << 16 | (epoch & 0xffffu), (pair & 0xffff0000u) | (epoch & 0xffffu));
        }
        return;
    }
    const int64_t index = ((int64_t)item.seq * p.num_heads + head) * p.max_splits + item.split;
    uint2 *partials = p.partials + (epoch & 1) * p.partials_half;
#pragma unroll
    for (int column = 0; column < shape::columns; column++) {
        uint2 *to = partials + index * head_dim + (slice + column) * 8 + 2 * t;
        qf_ll_store_pair(to, state.acc[column][0], partial_tag);
        qf_ll_store_pair(to + 1, state.acc[column][1], partial_tag);
    }
    if (slice == 0 && t == 0) {
        uint2 *to = partials + p.partials_ml + index * 2;
        qf_ll_store_pair(to, state.m, partial_tag);
        qf_ll_store_pair(to + 1, state.l, partial_tag);
    }
}

/* Polls `count` pairs at once, those with from[i] not NULL, until all bear the tag; the others give 0. */
template <int count>
__device__ __forceinline__ void qf_pair_get(const qf_decode_params &p, float (&values)[count],
                                            const uint2 *const (&from)[count], uint32_t tag)
{
    uint2 v[count];
#pragma unroll
    for (int i = 0; i < count; i++) {
        v[i] = from[i] ? qf_ll_load_pair(from[i]) : make_uint2(0, tag);
    }
    for (uint32_t n = 1;; n++) {
        uint32_t differs = 0;
#pragma unroll
        for (int i = 0; i < count; i++) {
            differs |= v[i].y ^ tag;
        }
        if (differs == 0 || qf_ll_give_up(p, n)) {
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

/* Merges the splits of the sequences that have several: a warp takes 32 columns of one head of one sequence; lane i
 * weighs split i. */
template <int head_dim, int warps>
static __device__ __forceinline__ void qf_attention_merge(const qf_decode_params &p, const qf_decode_items &items,
                                                          uint32_t epoch, uint32_t tag)
{
    static_assert(QF_DECODE_MAX_SPLITS == 32, "a lane for each");
    constexpr int slices = head_dim / 32, ahead = 8;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, count = p.num_seqs * p.num_heads * slices;
    const uint2 *partials = p.partials + (epoch & 1) * p.partials_half;
    for (int u = qf_decode_first_item(p) + warp * (int)gridDim.x; u < count; u += warps * (int)gridDim.x) {
        int slice = u % slices, row = u / slices, seq = row / p.num_heads;
        int splits = (items.base[seq + 1] - items.base[seq]) / p.num_kv_heads;
        if (splits == 1) {
            continue;
        }
        const uint2 *ml = partials + p.partials_ml + ((int64_t)row * p.max_splits + lane) * 2;
        const uint2 *from = partials + (int64_t)row * p.max_splits * head_dim + slice * 32 + lane;
        const uint2 *const both[2] = {lane < splits ? ml : nullptr, lane < splits ? ml + 1 : nullptr};
        float pair[2], acc = 0.0f;
        qf_pair_get(p, pair, both, tag);
        float m = lane < splits ? pair[0] : -INFINITY, largest = m;
#pragma unroll
        for (int mask = 16; mask != 0; mask >>= 1) {
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, mask));
        }
        float weight = exp2f(m - largest), sum = pair[1] * weight;
#pragma unroll
        for (int mask = 16; mask != 0; mask >>= 1) {
            sum += __shfl_xor_sync(~0u, sum, mask);
        }
        for (int first = 0; first < splits; first += ahead) {
            const uint2 *places[ahead];
            float values[ahead];
#pragma unroll
            for (int j = 0; j < ahead; j++) {
                places[j] = first + j < splits ? from + (int64_t)(first + j) * head_dim : nullptr;
            }
            qf_pair_get(p, values, places, tag);
#pragma unroll
            for (int j = 0; j < ahead; j++) {
                acc += values[j] * __shfl_sync(~0u, weight, (first + j) & 31);
            }
        }
        qf_ll_store(qf_exchange(p, epoch) + p.ll.attention + (int64_t)row * head_dim + slice * 32 + lane,
                    (qf_pack_bf16(0.0f, acc / sum) & 0xffff0000u) | (epoch & 0xffffu));
    }
}

/* The attention of this CTA in one layer. Barriers of all consumer warps, per item with tiles: one when q is there, one
 * a tile, one in publish where halves are merged, one at the end (behind which q, newest and x may be written again). */
template <int head_dim, int warps>
static __device__ __forceinline__ void qf_decode_attention(const qf_decode_params &p, int layer_index, uint32_t epoch,
                                                           qf_decode_ring &ring)
{
    typedef qf_decode_attention_shared<head_dim> shape;
    shape &sh = *reinterpret_cast<shape *>(qf_decode_shared + p.map.x);
    const qf_decode_layer_entry *layer = qf_layer(p, layer_index);
    const qf_decode_items &items = qf_fixed().items[layer->window == qf_fixed().window[0] ? 0 : 1];
    const uint32_t partial_tag = (qf_fixed().epoch + layer_index) | 0x80000000u;
    const int count = items.base[p.num_seqs];
    for (int j = qf_decode_first_item(p); j < count; j += (int)gridDim.x) {
        const qf_decode_item item = qf_decode_find_item(p, items, j);
        const int length = p.seq_lens[item.seq], start = items.start[item.seq];
        if (item.tile_begin == item.tile_end) { /* padding: a row of zeros */
            int width = p.num_heads / p.num_kv_heads * head_dim;
            uint32_t *out = qf_exchange(p, epoch) + p.ll.attention + (int64_t)item.seq * (p.num_heads * head_dim);
            for (int i = threadIdx.x; i < width; i += warps * 32) {
                qf_ll_store(out + item.head * width + i, epoch & 0xffffu);
            }
            continue;
        }
        const bool newest = item.split == item.num_splits - 1;
        qf_attention_gather<head_dim, warps * 32>(p, item, epoch, layer, newest, sh);
        qf_consumer_barrier<warps * 32>();
        qf_attention_state<head_dim, warps> state = {};
        state.m = -INFINITY;
        int buffer = 0;
        for (int tile = item.tile_begin; tile < item.tile_end; tile++, buffer ^= 1) {
            const int first = tile * shape::rows, fresh = newest ? length - 1 - first : -1; /* beyond: another tile's */
            const uint32_t keys = qf_ring_address(p, ring);
            qf_ring_wait(&qf_fixed().full[ring.stage], ring.parity, &qf_fixed().failed);
            qf_attention_scores<head_dim, warps>(p, sh, keys, buffer, first, start, length, fresh);
            qf_consumer_barrier<warps * 32>();
            qf_attention_values<head_dim, warps>(sh, keys + 16384, buffer, fresh, state);
            __syncwarp();
            if ((threadIdx.x & 31) == 0) {
                qf_mbarrier_arrive(&qf_fixed().empty[ring.stage]);
            }
            qf_ring_advance(p, ring);
        }
        qf_attention_publish<head_dim, warps>(p, item, sh, state, epoch, partial_tag);
        qf_consumer_barrier<warps * 32>();
    }
    bool several = false;
    for (int s = 0; s < p.num_seqs; s++) {
        several |= items.base[s + 1] - items.base[s] > p.num_kv_heads;
    }
    if (several) {
        qf_attention_merge<head_dim, warps>(p, items, epoch, partial_tag);
    }
}

#endif
