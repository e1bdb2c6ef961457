/* How CTAs of the decode kernel hand results to each other: every word carries its own flag.
 *
 * A result is one relaxed 4-byte store; a reader polls the very words it needs, 16 bytes a load, until each bears the
 * tag of this layer: one trip through L2 carries flag and data, and no fence, flag or grid barrier is needed.
 *   partial sums (float32): the two lowest bits of the mantissa hold the tag, epoch / 2 mod 4; what is lost is 2^-22.
 *   bf16 values: upper half the value, lower half the tag, epoch mod 2^16.
 *   attention's partials: pairs of a float32 and a 32-bit tag, stored as 8 bytes.
 * The epoch counts layers, over all steps; the exchange buffer has two halves used in turn, by epoch & 1. The short
 * tags need that every word of a half is written each time the half is used: the word then bears the tag of two layers
 * ago until the new one comes. (Memory starts as zeros, epochs at 2.) Attention's partials, whose number varies, have
 * tags that do not come again.
 *
 * No word is overwritten while somebody may still read its last value. Let X(e + 2) overwrite X(e), X any of qkv,
 * attention (and its partials), o, act, down. Every part of qkv(e + 2) and of o(e + 2) first reads complete rows of
 * down(e + 1), all of them or those that it keeps; the rest of layer e + 2 reads results of these. So whoever writes
 * X(e + 2) knows of a complete row of down(e + 1), which needs all of act(e + 1), and every CTA has row tiles of
 * gate_up: so every CTA had stored its share of act(e + 1). Before it stored that, it had, in its program order, read
 * what it needs of every phase of layer e and of down(e) (words are in registers before their tags are accepted, and a
 * barrier of all its warps comes before the store).
 * The kernel's end orders one step before the next. The epoch is advanced by CTA 0 behind its head, when it has read
 * all of down(last): by then every CTA has read the epoch. Keys and values written to the cache are read by nobody
 * within the step: who needs the newest row takes it from qkv's results.
 *
 *
 * Several ranks. Everything above is a rank's own, in its own memory, but for o's and down's sums: who makes a piece stores
 * it into every rank's memory, at the same offset of each region, in slots of its own (those of rank 0 come first); every
 * rank reads its own copy of all. A row is complete once all slots of all ranks are there. All ranks take the same steps, so
 * their epochs agree. "No word is overwritten while it may still be read" then holds across ranks:
 *   - Whoever writes X(e + 2), on whatever rank, depends through its own rank's qkv(e + 2) on complete rows of down(e + 1)
 *     (or is a part of qkv(e + 2) itself, which reads all rows): CTAs of a rank other than 0 that keep no rows and have no
 *     part in qkv get there by attention's results, which come from qkv's.
 *   - A complete row of down(e + 1) has a piece of each range of each rank t, which together need all of t's act(e + 1), to
 *     which every CTA of t contributes: so, as above, every CTA of t had read what it needs of layer e and of down(e).
 *   - Over the end of a step: the first layer's epoch f reads no down(f - 1). But who writes X(f) runs in a kernel that
 *     began when its own rank's last had ended, in which every CTA read complete rows of down(f - 1), for the head: so every
 *     CTA of every rank had read all of layer f - 2 and down(f - 2). X(f + 1) depends on down(f), the kernel of rank t that
 *     made its pieces began after t's last had ended, and that one read down(f - 1) to its end.
 * A store to another GPU and the loads there are of the system's scope; a relaxed 4-byte store is seen whole.
 *
 * Polls are bounded; a poll that gives up sets the error word, which is never cleared, and everybody who waits looks
 * there now and then. A failed CTA writes NaN logits. Of several ranks the error word is that of the region's header, the
 * limit is that of all-reduces, and who gives up tells the other ranks and the host (decode_ranks.cuh, peers.cuh). */
#ifndef QF_DECODE_EXCHANGE_CUH
#define QF_DECODE_EXCHANGE_CUH

#include "decode_ranks.cuh"
#include "decode_step.cuh"

enum { QF_DECODE_ERROR = 0, QF_DECODE_EPOCH = 1 }; /* words of the header */

#define QF_DECODE_PATIENCE_POLLS (1u << 20) /* half a second or more */

/* across: other GPUs store there, too. */
template <bool across> __device__ __forceinline__ uint4 qf_ll_load(const void *p)
{
    uint4 v;
    if (across) {
        asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(p));
    } else {
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(p));
    }
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

/* Cuts off the two lowest bits of the mantissa (infinity and NaN stay what they are) and puts the tag in. */
__device__ __forceinline__ uint32_t qf_ll_encode(float value, uint32_t tag)
{
    return (__float_as_uint(value) & ~3u) | tag;
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

static __device__ __noinline__ void qf_decode_put_stamp(long long *to, int index)
{
    to[index] = clock64();
    if (index == QF_STAMP_START) {
        to[QF_STAMP_GLOBAL] = (long long)qf_global_nanoseconds();
    }
}

/* For measurements: when this CTA's first thread came by. */
__device__ __forceinline__ void qf_decode_stamp(const qf_decode_params &p, int step, int index)
{
    if (p.stamps != nullptr && threadIdx.x == 0) {
        qf_decode_put_stamp(p.stamps + ((int64_t)blockIdx.x * (4 * p.num_layers + 1) + step) * QF_STAMPS, index);
    }
}

static __device__ __noinline__ bool qf_ll_lose_patience(uint32_t *error, uint32_t n)
{
    volatile int32_t *failed = &qf_fixed().failed;
    volatile uint32_t *shared_by_all = error;
    if (!*failed && (n & 4095u) == 0 && (*shared_by_all != 0 || n >= QF_DECODE_PATIENCE_POLLS)) {
        *shared_by_all = 1;
        *failed = 1;
    }
    return *failed != 0;
}

/* True once it is time to give up; n counts this wait's polls; slot: for whom, see qf_ranks_source. */
template <bool ranks>
__device__ __forceinline__ bool qf_ll_give_up(const qf_decode_params &p, uint32_t n, int32_t slot = QF_DECODE_LOCAL)
{
    return (n & 63u) == 0 && (ranks ? qf_ranks_look(p, n, slot) : qf_ll_lose_patience(p.header + QF_DECODE_ERROR, n));
}

__device__ __forceinline__ uint32_t qf_ll_differs(const uint4 &v, uint32_t tag)
{
    return (v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag);
}

/* Loads `count` places of four words, those that are wanted, again and again until each bears the tag, all that are
 * missing at once. What is not wanted is 0. sums: of o or down, place i being of slot first_slot +
 * i % slots. */
template <bool ranks, bool sums, int count>
__device__ __forceinline__ void qf_ll_get(const qf_decode_params &p, uint4 (&v)[count], const uint32_t *words,
                                          const int32_t (&at)[count], uint32_t wanted, uint32_t tag, uint32_t mask,
                                          int32_t first_slot = QF_DECODE_LOCAL, int32_t slots = 4)
{
#pragma unroll
    for (int i = 0; i < count; i++) {
        v[i] = make_uint4(0, 0, 0, 0);
    }
#pragma unroll 1
    for (uint32_t n = 1; wanted != 0; n++) {
#pragma unroll
        for (int i = 0; i < count; i++) {
            if (wanted >> i & 1) {
                v[i] = qf_ll_load<ranks && sums>(words + at[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < count; i++) {
            if ((qf_ll_differs(v[i], tag) & mask) == 0) {
                wanted &= ~(1u << i);
            }
        }
        if (wanted != 0 &&
            qf_ll_give_up<ranks>(p, n, sums ? first_slot + (__ffs((int)wanted) - 1) % slots : first_slot)) {
            break;
        }
    }
}

__device__ __forceinline__ uint32_t qf_sum_tag(uint32_t epoch) { return epoch >> 1 & 3u; }

/* The half of the exchange buffer of an epoch. */
__device__ __forceinline__ uint32_t *qf_exchange(const qf_decode_params &p, uint32_t epoch)
{
    return p.exchange + (epoch & 1) * (int64_t)p.ll.words;
}

/* Where o's and down's sums of an epoch are. */
template <bool ranks> __device__ __forceinline__ uint32_t *qf_row_exchange(const qf_decode_params &p, uint32_t epoch)
{
    return ranks ? reinterpret_cast<uint32_t *>(p.peers.regions[p.peers.rank] + p.rows_at) +
                       (epoch & 1) * (int64_t)p.row_words
                 : qf_exchange(p, epoch);
}

/* Sums of squares of each 128 of the residual, and behind them 1 / its root mean square; gate_up has its own. */
__device__ __forceinline__ float *qf_norm_squares(const qf_decode_params &p, int kind)
{
    return reinterpret_cast<float *>(qf_decode_shared + p.map.squares) +
           (kind == QF_DECODE_GATE_UP ? p.hidden_size / 128 + 1 : 0);
}

/* The residual in this CTA's rows, which is added once, of o and of any other linear: (local tile, 16). */
__device__ __forceinline__ float *qf_saved(const qf_decode_params &p, int kind)
{
    return reinterpret_cast<float *>(qf_decode_shared + (kind == QF_DECODE_O ? p.map.saved_o : p.map.saved_down));
}

#endif
