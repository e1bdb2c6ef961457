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

__device__ __forceinline__ bool qf_ll_differs(const uint4 &v, uint32_t tag, uint32_t mask)
{
    return (((v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)) & mask) != 0;
}

/* The consumers' barrier: all their warps and nobody else. */
template <int threads> __device__ __forceinline__ void qf_consumer_barrier()
{
    __syncwarp();
    qf_named_barrier(1, threads);
}

struct qf_decode_watch {
    uint32_t *header;
    volatile int32_t *failed;
    uint32_t backoff_ns;
};

/* True once it is time to give up; n counts this wait's polls. */
__device__ __forceinline__ bool qf_ll_give_up(const qf_decode_watch &watch, uint32_t n)
{
    if (watch.backoff_ns != 0) {
        __nanosleep(watch.backoff_ns);
    }
    if ((n & 63u) != 0) {
        return false;
    }
    if (*watch.failed) {
        return true;
    }
    if ((n & 4095u) == 0) {
        volatile uint32_t *error = watch.header + QF_DECODE_ERROR;
        if (*error != 0 || n >= QF_DECODE_PATIENCE_POLLS) {
            *error = 1;
            *watch.failed = 1;
            return true;
        }
    }
    return false;
}

/* Loads again until all four words bear the tag. */
__device__ __forceinline__ void qf_ll_wait(uint4 &v, const void *p, uint32_t tag, uint32_t mask,
                                           const qf_decode_watch &watch)
{
    for (uint32_t n = 1; qf_ll_differs(v, tag, mask); n++) {
        if (qf_ll_give_up(watch, n)) {
            break;
        }
        v = qf_ll_load(p);
    }
}

/* Four neighbouring sums of up to four pieces, bit s of `slots` for piece s: loads of all, */
__device__ __forceinline__ void qf_ll_load_slots(uint4 (&v)[4], const uint32_t *words, int64_t stride, uint32_t slots)
{
#pragma unroll
    for (int s = 0; s < 4; s++) {
        if (slots >> s & 1) {
            v[s] = qf_ll_load(words + s * stride);
        }
    }
}

/* then their addition in order of slot. */
__device__ __forceinline__ void qf_ll_add_slots(float4 &sum, uint4 (&v)[4], const uint32_t *words, int64_t stride,
                                                uint32_t slots, uint32_t tag, const qf_decode_watch &watch)
{
#pragma unroll
    for (int s = 0; s < 4; s++) {
        if (slots >> s & 1) {
            qf_ll_wait(v[s], words + s * stride, tag, 3u, watch);
            sum.x += qf_ll_decode(v[s].x);
            sum.y += qf_ll_decode(v[s].y);
            sum.z += qf_ll_decode(v[s].z);
            sum.w += qf_ll_decode(v[s].w);
        }
    }
}

/* The sum over all slots. */
__device__ __forceinline__ float4 qf_ll_sum(const uint32_t *words, int64_t stride, uint32_t slots, uint32_t tag,
                                            const qf_decode_watch &watch)
{
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (; slots != 0; slots >>= 4, words += 4 * stride) {
        uint4 v[4];
        qf_ll_load_slots(v, words, stride, slots);
        qf_ll_add_slots(sum, v, words, stride, slots, tag, watch);
    }
    return sum;
}

/* What a CTA knows throughout. */
struct qf_decode_cta {
    qf_decode_fixed *fixed;
    const qf_decode_layer_entry *layers;
    float *ssq;            /* (2, tiles of 128 of all tokens), then r (2, 8) */
    const uint8_t *masks;  /* qkv's, o's, down's slot masks by row tile */
    float *saved_o, *saved_down; /* residual of this CTA's rows of o and of down: (local tile, token, 16) */
    float *red;
    char *x;
    qf_decode_watch watch;
};

__device__ __forceinline__ uint32_t qf_sum_tag(uint32_t epoch) { return epoch >> 1 & 3u; }

/* The residual stream's next state h = the sum of the pieces (which hold the last state: see qf_decode_finish), of all
 * tokens; x = bf16(h * norm weight), not yet divided by the root mean square, whose sums of squares go to `ssq`; and
 * h of the rows to which this CTA will add (`save`). With `all` false only those rows are wanted. */
template <int tokens, int threads>
static __device__ __forceinline__ void qf_gather_residual(const qf_decode_params &p, const qf_decode_cta &cta,
                                                          const uint32_t *words, const uint8_t *masks, uint32_t tag,
                                                          const float *norm, float *ssq, const qf_decode_phase *save,
                                                          float *saved, bool all)
{
    int save_begin = save ? save->tile0 : 0, save_end = save ? save_begin + save->local_tiles : 0;
    int begin = all ? 0 : save_begin * 4, vectors = all ? p.hidden_size / 4 : (save_end - save_begin) * 4;
    int total = vectors * p.num_seqs;
    int64_t stride = (int64_t)p.num_seqs * p.hidden_size;
    constexpr int ahead = 2;
    for (int q0 = threadIdx.x; q0 < total; q0 += ahead * threads) { /* whole warps where `all`: 32 divides vectors */
        uint4 v[ahead][4];
        float4 w[ahead], h[ahead];
        int token[ahead], i[ahead];
        uint32_t slots[ahead];
        const uint32_t *from[ahead];
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            int q = q0 + j * threads;
            token[j] = tokens == 1 ? 0 : q / vectors;
            i[j] = begin + q - token[j] * vectors;
            slots[j] = q < total && words != nullptr ? masks[i[j] >> 2] : 0;
            from[j] = words + (int64_t)token[j] * p.hidden_size + 4 * i[j];
            h[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (q < total && words == nullptr) {
                h[j] = *(reinterpret_cast<const float4 *>(p.residual + (int64_t)token[j] * p.hidden_size) + i[j]);
            }
            w[j] = all && q < total ? __ldg(reinterpret_cast<const float4 *>(norm) + i[j]) : make_float4(0, 0, 0, 0);
            qf_ll_load_slots(v[j], from[j], stride, slots[j]);
        }
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            int q = q0 + j * threads;
            if (q >= total) {
                break;
            }
            qf_ll_add_slots(h[j], v[j], from[j], stride, slots[j], tag, cta.watch);
            if (uint32_t more = slots[j] >> 4) {
                from[j] += 4 * stride;
                qf_ll_load_slots(v[j], from[j], stride, more);
                qf_ll_add_slots(h[j], v[j], from[j], stride, more, tag, cta.watch);
            }
            int tile = i[j] >> 2;
            if (tile >= save_begin && tile < save_end) {
                *reinterpret_cast<float4 *>(saved + ((tile - save_begin) * tokens + token[j]) * 16 + (i[j] & 3) * 4) =
                    h[j];
            }
            if (all) {
                uint2 x = make_uint2(qf_pack_bf16(h[j].x * w[j].x, h[j].y * w[j].y),
                                     qf_pack_bf16(h[j].z * w[j].z, h[j].w * w[j].w));
                *reinterpret_cast<uint2 *>(cta.x + ((i[j] >> 1) * tokens + token[j]) * 16 + (i[j] & 1) * 8) = x;
                float square = h[j].x * h[j].x + h[j].y * h[j].y + h[j].z * h[j].z + h[j].w * h[j].w;
#pragma unroll
                for (int mask = 16; mask != 0; mask >>= 1) {
                    square += __shfl_xor_sync(~0u, square, mask);
                }
                if ((threadIdx.x & 31) == 0) {
                    ssq[q >> 5] = square;
                }
            }
        }
    }
}

/* x = `blocks` k blocks of a matrix of bf16 words (num_seqs, width) from element first on; zeros beyond width. */
template <int tokens, int threads>
static __device__ __forceinline__ void qf_gather_words(const qf_decode_params &p, const qf_decode_cta &cta,
                                                       const uint32_t *words, int width, int first, int blocks,
                                                       uint32_t tag)
{
    constexpr int ahead = 4;
    int vectors = blocks * 32, total = vectors * p.num_seqs;
    for (int q0 = threadIdx.x; q0 < total; q0 += ahead * threads) {
        uint4 v[ahead];
        const uint32_t *from[ahead];
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            int q = q0 + j * threads, token = tokens == 1 ? 0 : q / vectors, k = first + (q - token * vectors) * 4;
            from[j] = q < total && k < width ? words + (int64_t)token * width + k : nullptr;
            v[j] = from[j] ? qf_ll_load(from[j]) : make_uint4(tag, tag, tag, tag);
        }
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            int q = q0 + j * threads, token = tokens == 1 ? 0 : q / vectors, i = q - token * vectors;
            if (q < total) {
                qf_ll_wait(v[j], from[j], tag, 0xffffu, cta.watch);
                uint2 x = make_uint2(__byte_perm(v[j].x, v[j].y, 0x7632), __byte_perm(v[j].z, v[j].w, 0x7632));
                *reinterpret_cast<uint2 *>(cta.x + ((i >> 1) * tokens + token) * 16 + (i & 1) * 8) = x;
            }
        }
    }
}

#endif
