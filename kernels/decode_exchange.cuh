/* How CTAs of the decode kernel hand results to each other: every word carries its own flag.
 *
 * A result is one relaxed 4-byte store; a reader polls the very words it needs, 16 bytes a load, until each bears the
 * tag of this layer: one trip through L2 carries flag and data, and no fence, flag or grid barrier is needed.
 *   partial sums (float32): the two lowest bits of the mantissa hold the tag, epoch / 2 mod 4; what is lost is 2^-22.
 *   bf16 values: upper half the value, lower half the tag, epoch mod 2^16.
 *   attention's partials: pairs of a float32 and a 32-bit tag, stored as 8 bytes.
 * The epoch counts layers, over all steps; the exchange buffer has two halves used in turn, by epoch & 1. Each num_seqs
 * has its own buffer and its own epoch, because the short tags need that every word of a buffer is written each time
 * the buffer is used: the word then bears the tag of two layers ago until the new one comes. (Memory starts as zeros,
 * epochs at 2.) Attention's partials, whose number varies, are shared by all and have tags that do not come again.
 *
 * No word is overwritten while somebody may still read its last value. Let X(e + 2) overwrite X(e), X any of qkv,
 * attention (and its partials), o, act, down. Every part of qkv(e + 2) and of o(e + 2) first reads complete rows of
 * down(e + 1), all of them or those that it keeps; the rest of layer e + 2 reads results of these. So whoever writes
 * X(e + 2) knows of a complete row of down(e + 1), which needs all of act(e + 1), and every CTA has row tiles of
 * gate_up: so every CTA had stored its share of act(e + 1). Before it stored that, it had, in its program order, read
 * what it needs of every phase of layer e and of down(e) (words are in registers before their tags are accepted, and a
 * barrier of all its warps comes before the store). Only the zeros of padding in attention(e + 2) wait for nothing in
 * layer e + 2; but their CTA has read all of o(e + 1), whose parts read complete rows of down(e), which, likewise, needs
 * that every CTA has read all of o(e), which is complete when the last reader of attention(e) has read it.
 * The kernel's end orders one step before the next. The epochs are advanced by CTA 0 in its head phase, when it has read
 * all of down(last): by then every CTA has read them. Keys and values written to the cache are read by nobody within
 * the step: who needs the newest row takes it from qkv's results.
 *
 * Polls are bounded; a poll that gives up sets the error word, which is never cleared, and everybody who waits looks
 * there now and then. A failed CTA writes NaN logits. */
#ifndef QF_DECODE_EXCHANGE_CUH
#define QF_DECODE_EXCHANGE_CUH

#include "decode_ring.cuh"
#include "decode_step.cuh"

enum { QF_DECODE_ERROR = 0, QF_DECODE_EPOCH = 1, QF_DECODE_REGION_EPOCH = 2 }; /* words of the header */

#define QF_DECODE_PATIENCE_POLLS (1u << 20) /* half a second or more */

__device__ __forceinline__ uint4 qf_ll_load(const void *p)
{
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ void qf_ll_store(uint32_t *p, uint32_t v)
{
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void qf_ll_store(uint32_t *p, uint32_t v, uint32_t w)
{
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v), "r"(w) : "memory");
}

/* A pair is one 8-byte store, so that value and tag cannot part. */
__device__ __forceinline__ void qf_ll_store_pair(uint2 *p, float value, uint32_t tag)
{
    asm volatile("{\n.reg .b64 pair;\nmov.b64 pair, {%1,%2};\nst.relaxed.gpu.global.b64 [%0], pair;\n}" ::"l"(p),
                 "r"(__float_as_uint(value)), "r"(tag)
                 : "memory");
}

__device__ __forceinline__ uint2 qf_ll_load_pair(const uint2 *p)
{
    uint2 v;
    asm volatile("{\n.reg .b64 pair;\nld.relaxed.gpu.global.b64 pair, [%2];\nmov.b64 {%0,%1}, pair;\n}"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(p));
    return v;
}

/* Rounds to 22 bits of mantissa (infinity and NaN stay what they are) and puts the tag in. */
__device__ __forceinline__ uint32_t qf_ll_encode(float value, uint32_t tag)
{
    uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7f800000u) != 0x7f800000u) {
        bits += 2;
    } else if (bits & 0x7fffffu) {
        bits |= 0x400000u;
    }
    return (bits & ~3u) | tag;
}

__device__ __forceinline__ float qf_ll_decode(uint32_t word) { return __uint_as_float(word & ~3u); }

__device__ __forceinline__ uint64_t qf_global_nanoseconds()
{
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

/* The consumers' barrier: all their warps and nobody else. */
__device__ __forceinline__ void qf_consumer_barrier()
{
    __syncwarp();
    qf_named_barrier(1, QF_DECODE_WARPS * 32);
}

/* For measurements: when this CTA's first thread came by. */
__device__ __forceinline__ void qf_decode_stamp(const qf_decode_params &p, int step, int index)
{
    if (p.stamps != nullptr && threadIdx.x == 0) {
        long long *to = p.stamps + ((int64_t)blockIdx.x * (4 * p.num_layers + 1) + step) * QF_STAMPS;
        to[index] = clock64();
        if (index == QF_STAMP_START) {
            to[QF_STAMP_GLOBAL] = (long long)qf_global_nanoseconds();
        }
    }
}

/* True once it is time to give up; n counts this wait's polls. */
__device__ __forceinline__ bool qf_ll_give_up(const qf_decode_params &p, uint32_t n)
{
    if (p.backoff_ns != 0) {
        __nanosleep(p.backoff_ns);
    }
    if ((n & 63u) != 0) {
        return false;
    }
    volatile int32_t *failed = &qf_fixed().failed;
    if (*failed) {
        return true;
    }
    if ((n & 4095u) == 0) {
        volatile uint32_t *error = p.header + QF_DECODE_ERROR;
        if (*error != 0 || n >= QF_DECODE_PATIENCE_POLLS) {
            *error = 1;
            *failed = 1;
            return true;
        }
    }
    return false;
}

/* Polls one place of four words until all bear the tag: what is waited for first, where polling for everything would
 * take bandwidth from the weights. */
__device__ __forceinline__ void qf_ll_await(const qf_decode_params &p, const uint32_t *from, uint32_t tag, uint32_t mask)
{
    for (uint32_t n = 1;; n++) {
        const uint4 v = qf_ll_load(from);
        if ((((v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)) & mask) == 0 || qf_ll_give_up(p, n)) {
            break;
        }
    }
}

/* Polls `count` places of four words, those with from[i] not NULL, all at once, until all bear the tag. */
template <int count>
__device__ __forceinline__ void qf_ll_get(const qf_decode_params &p, uint4 (&v)[count],
                                          const uint32_t *const (&from)[count], uint32_t tag, uint32_t mask)
{
#pragma unroll
    for (int i = 0; i < count; i++) {
        v[i] = from[i] ? qf_ll_load(from[i]) : make_uint4(tag, tag, tag, tag);
    }
    for (uint32_t n = 1;; n++) {
        uint32_t differs = 0;
#pragma unroll
        for (int i = 0; i < count; i++) {
            differs |= ((v[i].x ^ tag) | (v[i].y ^ tag) | (v[i].z ^ tag) | (v[i].w ^ tag)) & mask;
        }
        if (differs == 0 || qf_ll_give_up(p, n)) {
            break;
        }
#pragma unroll
        for (int i = 0; i < count; i++) {
            if ((((v[i].x ^ tag) | (v[i].y ^ tag) | (v[i].z ^ tag) | (v[i].w ^ tag)) & mask) != 0) {
                v[i] = qf_ll_load(from[i]);
            }
        }
    }
}

__device__ __forceinline__ uint32_t qf_ll_differs(const uint4 &v, uint32_t tag)
{
    return (v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag);
}

/* sums[i] = four neighbouring sums at words + at[i] over the slots in slots[i], in order of slot. All are polled at
 * once, `width` slots of each a time. */
template <int width, int count>
__device__ __forceinline__ void qf_ll_sum(const qf_decode_params &p, float4 (&sums)[count], const uint32_t *words,
                                          const int32_t (&at)[count], uint32_t (&slots)[count], int32_t stride,
                                          uint32_t tag)
{
#pragma unroll
    for (int i = 0; i < count; i++) {
        sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    for (;;) { /* again only where there are more than `width` slots */
        uint4 v[count][width];
        uint32_t more = 0;
#pragma unroll
        for (int i = 0; i < width * count; i++) {
            v[i / width][i % width] = make_uint4(~tag, tag, tag, tag); /* differs: is loaded */
        }
        for (uint32_t n = 1;; n++) {
            uint32_t differs = 0;
#pragma unroll
            for (int i = 0; i < width * count; i++) {
                if ((slots[i / width] >> (i % width) & 1) != 0 && (qf_ll_differs(v[i / width][i % width], tag) & 3u) != 0) {
                    v[i / width][i % width] = qf_ll_load(words + at[i / width] + (i % width) * stride);
                }
            }
#pragma unroll
            for (int i = 0; i < width * count; i++) {
                differs |= (slots[i / width] >> (i % width) & 1) != 0 ? qf_ll_differs(v[i / width][i % width], tag) & 3u : 0u;
            }
            if (differs == 0 || qf_ll_give_up(p, n)) {
                break;
            }
        }
#pragma unroll
        for (int i = 0; i < width * count; i++) {
            if ((slots[i / width] >> (i % width) & 1) != 0) {
                sums[i / width].x += qf_ll_decode(v[i / width][i % width].x);
                sums[i / width].y += qf_ll_decode(v[i / width][i % width].y);
                sums[i / width].z += qf_ll_decode(v[i / width][i % width].z);
                sums[i / width].w += qf_ll_decode(v[i / width][i % width].w);
            }
        }
#pragma unroll
        for (int i = 0; i < count; i++) {
            slots[i] >>= width;
            more |= slots[i];
        }
        if (more == 0) {
            break;
        }
        words += width * (int64_t)stride;
    }
}

__device__ __forceinline__ uint32_t qf_sum_tag(uint32_t epoch) { return epoch >> 1 & 3u; }

/* The half of the exchange buffer of an epoch. */
__device__ __forceinline__ uint32_t *qf_exchange(const qf_decode_params &p, uint32_t epoch)
{
    return p.exchange + (epoch & 1) * (int64_t)p.ll.words;
}

/* Sums of squares of 128 k of one token (token, hidden_size / 128), and behind them 1 / root mean square of the tokens;
 * gate_up has its own. */
template <int tokens> __device__ __forceinline__ float *qf_norm_sums(const qf_decode_params &p, int kind)
{
    return reinterpret_cast<float *>(qf_decode_shared + p.map.ssq) +
           (kind == QF_DECODE_GATE_UP ? tokens * p.hidden_size / 128 + QF_DECODE_MAX_SEQS : 0);
}
template <int tokens> __device__ __forceinline__ float *qf_norm_factors(const qf_decode_params &p, int kind)
{
    return qf_norm_sums<tokens>(p, kind) + tokens * p.hidden_size / 128;
}

/* What is added once to this CTA's rows: the residual, of o and down, (local tile, token, 16); qkv's bias (local tile,
 * 16). */
__device__ __forceinline__ float *qf_saved(const qf_decode_params &p, int kind)
{
    return reinterpret_cast<float *>(qf_decode_shared + (kind == QF_DECODE_QKV ? p.map.saved_qkv
                                                         : kind == QF_DECODE_O ? p.map.saved_o
                                                                               : p.map.saved_down));
}

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
            i[j] = begin + q - token[j] * vectors;
            slots[j] = q < total && !first_layer ? masks[i[j] >> 2] : 0;
            at[j] = token[j] * p.hidden_size + 4 * i[j];
            w[j] = all && q < total ? __ldg(norm + i[j]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            reduced[j] = reduced[ahead + j] = 0.0f;
        }
        if (ahead > 1 && p.backoff_ns != 0 && slots[0] != 0) {
            qf_ll_await(p, words + at[0] + (31 - __clz(slots[0])) * (p.num_seqs * p.hidden_size), tag, 3);
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
                *(which < ahead ? qf_block_sum(p, tokens, (q - of * vectors) >> 5, of) : sums + (q >> 5)) = sum;
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
    const int vectors = qf_fixed().phase[kind].kbs * 32, total = vectors * p.num_seqs;
    for (int q0 = threadIdx.x; q0 < total; q0 += ahead * threads) {
        uint4 v[ahead];
        const uint32_t *from[ahead];
        int i[ahead], token[ahead];
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            int q = q0 + j * threads;
            token[j] = tokens == 1 ? 0 : q / vectors;
            i[j] = q - token[j] * vectors;
            from[j] = q < total && first + 4 * i[j] < width ? words + (int64_t)token[j] * width + first + 4 * i[j]
                                                            : nullptr;
        }
        if (ahead > 1 && p.backoff_ns != 0 && from[0] != nullptr) {
            qf_ll_await(p, from[0], epoch & 0xffffu, 0xffffu);
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
            *qf_block_sum(p, tokens, (q - of * vectors) >> 5, of) = sum;
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
