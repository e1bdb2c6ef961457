/* How a CTA of the decode kernel makes x, the B operand of a linear, in shared memory, out of other CTAs' results. */
#ifndef QF_DECODE_GATHER_CUH
#define QF_DECODE_GATHER_CUH

#include "decode_exchange.cuh"

/* Puts four k (vector i of them) of a token into x, as bf16 pairs; returns their sum, times 2^-133 as integers of weights
 * are. x is (k block, 32 k, token, 4 t, 4 words): the words that lane t of a fragment needs of two k16 steps lie
 * together. Sums are (k block, 8, token): 0 .. 3 of each 32 k, if a linear has groups as small, 4 of all. */
template <int tokens>
__device__ __forceinline__ float qf_put_x(const qf_decode_params &p, int i, int token, uint2 pairs)
{
    const int l = i & 31, block = i >> 5;
    uint32_t *to = reinterpret_cast<uint32_t *>(qf_decode_shared + p.map.x + ((block * 4 + (l >> 3)) * tokens + token) * 64 +
                                                (l & 1) * 32 + (l >> 1 & 3) * 4);
    to[0] = pairs.x;
    to[4] = pairs.y;
    float sum = (qf_bf16_low(pairs.x) + qf_bf16_high(pairs.x)) + (qf_bf16_low(pairs.y) + qf_bf16_high(pairs.y));
    sum = sum * 0x1p-100f * 0x1p-33f;
    if (p.fine_sums) {
        float fine = sum;
        fine += __shfl_xor_sync(~0u, fine, 1);
        fine += __shfl_xor_sync(~0u, fine, 2);
        fine += __shfl_xor_sync(~0u, fine, 4);
        if ((l & 7) == 0) {
            reinterpret_cast<float *>(qf_decode_shared + p.map.sums)[(block * 8 + (l >> 3)) * tokens + token] = fine;
        }
    }
    return sum;
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

__device__ __forceinline__ float *qf_block_sum(const qf_decode_params &p, int tokens, int block, int token)
{
    return reinterpret_cast<float *>(qf_decode_shared + p.map.sums) + (block * 8 + 4) * tokens + token;
}

/* For qkv, gate_up and the head. The residual stream's next state h = the sum of the pieces (which hold the last state:
 * see qf_decode_store), of all tokens; x = bf16(h * norm weight), not yet divided by the root mean square, whose sums of
 * squares are left aside; and h of the rows to which this CTA will add. Without a part here only those are wanted. */
template <int tokens, int ahead, int width>
__device__ __forceinline__ void qf_gather_rows(const qf_decode_params &p, int kind, int layer, uint32_t epoch)
{
    constexpr int threads = QF_DECODE_WARPS * 32;
    const bool mid = kind == QF_DECODE_GATE_UP, all = qf_fixed().phase[kind].blocks > 0;
    const int save_kind = mid ? QF_DECODE_DOWN : QF_DECODE_O;
    const int save_begin = qf_fixed().phase[save_kind].tile0;
    const int save_end = save_begin + (kind == QF_DECODE_HEAD ? 0 : qf_fixed().phase[save_kind].local_tiles);
    const int begin = all ? 0 : save_begin * 4, vectors = all ? p.hidden_size / 4 : (save_end - save_begin) * 4;
    const int total = vectors * p.num_seqs, lane = threadIdx.x & 31;
    const int turn = all ? (int)blockIdx.x % (vectors / 32) * 32 : 0;
    const bool first_layer = !mid && layer == 0;
    const uint32_t from_epoch = mid ? epoch : epoch - 1, tag = qf_sum_tag(from_epoch);
    const uint32_t *words = qf_exchange(p, from_epoch) + (mid ? p.ll.o : p.ll.down);
    const uint8_t *masks = reinterpret_cast<const uint8_t *>(qf_decode_shared + p.map.masks) +
                           p.linear[QF_DECODE_QKV].tiles + (mid ? 0 : p.linear[QF_DECODE_O].tiles);
    const float4 *norm = reinterpret_cast<const float4 *>(qf_layer(p, layer)->norm[mid]);
    float *sums = qf_norm_sums<tokens>(p, kind), *saved = qf_saved(p, save_kind);
    for (int q0 = threadIdx.x; q0 < total; q0 += ahead * threads) { /* whole warps where `all`: 32 divides vectors */
        float4 w[ahead], h[ahead];
        int token[ahead], i[ahead], at[ahead];
        uint32_t slots[ahead];
        float reduced[2 * ahead];
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            int q = q0 + j * threads;
            token[j] = tokens == 1 ? 0 : q / vectors;
            i[j] = begin + qf_gather_turn(q - token[j] * vectors, vectors, turn);
            slots[j] = q < total && !first_layer ? masks[i[j] >> 2] : 0;
            at[j] = token[j] * p.hidden_size + 4 * i[j];
            w[j] = all && q < total ? __ldg(norm + i[j]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            reduced[j] = reduced[ahead + j] = 0.0f;
        }
        qf_ll_sum<width>(p, h, words, at, slots, p.num_seqs * p.hidden_size, tag);
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            int q = q0 + j * threads, tile = i[j] >> 2;
            if (q >= total) {
                break;
            }
            if (first_layer) {
                h[j] = *reinterpret_cast<const float4 *>(p.residual + at[j]);
            }
            if (tile >= save_begin && tile < save_end) {
                *reinterpret_cast<float4 *>(saved + ((tile - save_begin) * tokens + token[j]) * 16 + (i[j] & 3) * 4) =
                    h[j];
            }
            if (all) {
                const float scale = QF_DECODE_X_SCALE;
                const uint2 x = make_uint2(qf_pack_bf16(h[j].x * w[j].x * scale, h[j].y * w[j].y * scale),
                                           qf_pack_bf16(h[j].z * w[j].z * scale, h[j].w * w[j].w * scale));
                reduced[j] = qf_put_x<tokens>(p, i[j], token[j], x);
                reduced[ahead + j] = h[j].x * h[j].x + h[j].y * h[j].y + h[j].z * h[j].z + h[j].w * h[j].w;
            }
        }
        if (all) {
            const float sum = qf_warp_sums(reduced);
            const int which = lane / (16 / ahead), q = q0 - lane + which % ahead * threads; /* the warp's first thread's */
            if (lane % (16 / ahead) == 0 && q < total) {
                const int of = tokens == 1 ? 0 : q / vectors;
                const int block = qf_gather_turn(q - of * vectors, vectors, turn) >> 5;
                *(which < ahead ? qf_block_sum(p, tokens, block, of) : sums + of * (vectors >> 5) + block) = sum;
            }
        }
    }
}

template <int tokens, int ahead>
__device__ __forceinline__ void qf_gather_rows_by(const qf_decode_params &p, int kind, int layer, uint32_t epoch)
{
    const int slots = kind == QF_DECODE_GATE_UP ? p.o_slots : p.down_slots;
    if (slots == 1) {
        qf_gather_rows<tokens, ahead, 1>(p, kind, layer, epoch);
    } else if (slots == 2) {
        qf_gather_rows<tokens, ahead, 2>(p, kind, layer, epoch);
    } else {
        qf_gather_rows<tokens, ahead, 4>(p, kind, layer, epoch);
    }
}

/* qkv's bias is fetched while the residual is awaited. */
template <int tokens, int threads>
static __device__ __forceinline__ void qf_gather_residual(const qf_decode_params &p, int kind, int layer,
                                                          uint32_t epoch)
{
    const qf_decode_phase &ph = qf_fixed().phase[kind];
    const int rows = kind == QF_DECODE_QKV && ph.blocks > 0 ? ph.local_tiles * 16 : 0;
    const float *from = qf_layer(p, layer)->bias;
    float bias = from && (int)threadIdx.x < rows ? __ldg(from + ph.tile0 * 16 + threadIdx.x) : 0.0f;
    if (p.hidden_size / 4 * p.num_seqs <= threads) {
        qf_gather_rows_by<tokens, 1>(p, kind, layer, epoch);
    } else {
        qf_gather_rows_by<tokens, 4>(p, kind, layer, epoch);
    }
    for (int i = threadIdx.x; i < rows; i += threads) {
        if (i >= threads) {
            bias = from ? __ldg(from + ph.tile0 * 16 + i) : 0.0f;
        }
        qf_saved(p, QF_DECODE_QKV)[i] = bias;
    }
}

/* For o and down. x = this part's range of k of a matrix of bf16 words (num_seqs, width); zeros beyond width. */
template <int tokens, int threads, int ahead>
__device__ __forceinline__ void qf_gather_words_by(const qf_decode_params &p, int kind, uint32_t epoch)
{
    const bool o = kind == QF_DECODE_O;
    const uint32_t *words = qf_exchange(p, epoch) + (o ? p.ll.attention : p.ll.act);
    const int width = o ? p.num_heads * p.head_dim : p.act_size, first = qf_fixed().phase[kind].ks0 * 128;
    const int kbs = qf_fixed().phase[kind].kbs, vectors = kbs * 32, total = vectors * p.num_seqs;
    const int turn = (int)blockIdx.x % kbs * 32;
    for (int q0 = threadIdx.x; q0 < total; q0 += ahead * threads) {
        uint4 v[ahead];
        const uint32_t *from[ahead];
        int i[ahead], token[ahead];
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            int q = q0 + j * threads;
            token[j] = tokens == 1 ? 0 : q / vectors;
            i[j] = qf_gather_turn(q - token[j] * vectors, vectors, turn);
            from[j] = q < total && first + 4 * i[j] < width ? words + (int64_t)token[j] * width + first + 4 * i[j]
                                                            : nullptr;
        }
        qf_ll_get(p, v, from, epoch & 0xffffu, 0xffffu);
        float sums[ahead];
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            sums[j] = 0.0f;
            if (q0 + j * threads < total) { /* true of a whole warp or of none of it; no word: the tag alone, which is 0 */
                const uint2 x = make_uint2(__byte_perm(v[j].x, v[j].y, 0x7632), __byte_perm(v[j].z, v[j].w, 0x7632));
                sums[j] = qf_put_x<tokens>(p, i[j], token[j], x);
            }
        }
        const float sum = qf_warp_sums(sums);
        const int lane = threadIdx.x & 31, q = q0 - lane + lane / (32 / ahead) * threads;
        if (lane % (32 / ahead) == 0 && q < total) {
            const int of = tokens == 1 ? 0 : q / vectors;
            *qf_block_sum(p, tokens, qf_gather_turn(q - of * vectors, vectors, turn) >> 5, of) = sum;
        }
    }
}

template <int tokens, int threads>
static __device__ __forceinline__ void qf_gather_words(const qf_decode_params &p, int kind, uint32_t epoch)
{
    if (qf_fixed().phase[kind].kbs * 32 * p.num_seqs <= threads) {
        qf_gather_words_by<tokens, threads, 1>(p, kind, epoch);
    } else {
        qf_gather_words_by<tokens, threads, 8>(p, kind, epoch);
    }
}

#endif
