/* How GPUs of one host hand words to each other: every word is its own flag.
 *
 * A region, in each rank's memory:
 *
 *     header | flags of gather (ranks, blocks) | tokens | exchange buffer 0 | 1 | 2 | the decode kernel's sums
 *
 * The last part has rules of its own (decode_exchange.cuh). All other words but the header's are empty (QF_PEER_EMPTY, a NaN as float32, and as a pair of bf16) until a rank, its owner or
 * another, stores something else there. The reader polls the very words it needs until none is empty, and stores
 * emptiness into them again: one trip over the link carries flag and data, with no fence, no flag and no barrier. Only
 * that a 4-byte store is seen whole is relied on; 16-byte accesses are four of those, in any order. Values that would look
 * empty are NaNs and are sent as another NaN.
 *
 * Why a word is never written while it may still hold, or be read as, something else. Let f be a call after e that uses
 * the same words, with at least one all-reduce g between them. A rank writes for f only when its own g has ended (the
 * order of its stream), for which it needed this rank's share of g; this rank sent that after its own e had ended, reads
 * and emptying stores included (its kernel waits for the one before). The launcher gives neighbouring launches different
 * buffers of the three: the first launch of a step takes buffer 2, those that follow 0 and 1 by turns; a step has at least
 * two, or one and the decode kernel, which does for an all-reduce here: to end it needs, as g does, what every rank sends
 * when its own e has ended. So the numbers are the same in every step, and a captured graph needs no counter in memory. Gather's flags and the
 * tokens are used once between two all-reduces, or in turn: rank 0 sends tokens only when it has taken all flags, and the
 * others set flags again only when they have taken the tokens.
 *
 * A poll that fails 128 times looks whether somebody gave up, then at the clock and at the host's word. Who gives up says
 * so to its own rank, all other ranks and the host. */
#ifndef QF_PEERS_CUH
#define QF_PEERS_CUH

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "qf_all_reduce.h"

#define QF_PEER_EMPTY 0xffffffffu
#define QF_PEER_GATHER_BLOCKS 64
#define QF_PEER_BUFFERS 3
#define QF_PEER_DECODE_BYTES ((size_t)2 << 20) /* of the decode kernel's part */

enum { QF_PEER_ERROR = 0, QF_PEER_REPORTED = 1 }; /* words of the header */
enum {
    QF_PEER_HEADER_BYTES = 256,
    QF_PEER_FLAGS = QF_PEER_HEADER_BYTES,
    QF_PEER_TOKENS = QF_PEER_FLAGS + QF_CUDA_MAX_RANKS * QF_PEER_GATHER_BLOCKS * 4,
    QF_PEER_EXCHANGE = QF_PEER_TOKENS + QF_CUDA_MAX_SHARED_TOKENS * 4
};

#define QF_PEER_POLLS_PER_LOOK 128u
#define QF_PEER_LOOKS_PER_HOST_WORD 32u /* that one is at the other end of PCIe */

__device__ __forceinline__ uint32_t qf_peer_load(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ uint2 qf_peer_load(const uint2 *p)
{
    uint2 v;
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ uint4 qf_peer_load(const uint4 *p)
{
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ void qf_peer_store(uint32_t *p, uint32_t v)
{
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void qf_peer_store(uint2 *p, uint2 v)
{
    asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void qf_peer_store(uint4 *p, uint4 v)
{
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void qf_peer_clear(uint2 *p) { qf_peer_store(p, make_uint2(QF_PEER_EMPTY, QF_PEER_EMPTY)); }

__device__ __forceinline__ void qf_peer_clear(uint4 *p)
{
    qf_peer_store(p, make_uint4(QF_PEER_EMPTY, QF_PEER_EMPTY, QF_PEER_EMPTY, QF_PEER_EMPTY));
}

__device__ __forceinline__ bool qf_peer_is_full(uint2 v) { return v.x != QF_PEER_EMPTY && v.y != QF_PEER_EMPTY; }

__device__ __forceinline__ bool qf_peer_is_full(uint4 v)
{
    return v.x != QF_PEER_EMPTY && v.y != QF_PEER_EMPTY && v.z != QF_PEER_EMPTY && v.w != QF_PEER_EMPTY;
}

/* Never empty. */
__device__ __forceinline__ float qf_peer_encode(float v)
{
    return __float_as_uint(v) == QF_PEER_EMPTY ? __uint_as_float(0x7fffffffu) : v;
}

__device__ __forceinline__ uint64_t qf_peer_clock()
{
    uint64_t ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

/* The moment to give up at, 0 if that is now; deadline is 0 at a wait's first look. source: whom this thread waits for. */
static __device__ __forceinline__ uint64_t qf_peer_look(const qf_cuda_peers &p, uint64_t deadline, uint32_t looks,
                                                        int32_t source)
{
    uint32_t *header = reinterpret_cast<uint32_t *>(p.regions[p.rank]);
    const uint64_t now = qf_peer_clock();
    uint32_t error = qf_peer_load(header + QF_PEER_ERROR);
    if (error == QF_CUDA_PEER_OK) {
        const bool aborted = looks % QF_PEER_LOOKS_PER_HOST_WORD == 0 && qf_peer_load(&p.host->abort) != 0;
        if (!aborted && (deadline == 0 || now < deadline)) {
            return deadline == 0 ? now + p.limit_ns : deadline;
        }
        error = aborted ? QF_CUDA_PEER_ABORTED << 8 | (uint32_t)p.rank : QF_CUDA_PEER_LATE << 8 | (uint32_t)source;
        if (atomicCAS(header + QF_PEER_ERROR, (uint32_t)QF_CUDA_PEER_OK, error) == QF_CUDA_PEER_OK) {
            for (int32_t r = 0; r < p.num_ranks; r++) {
                if (r != p.rank) {
                    qf_peer_store(reinterpret_cast<uint32_t *>(p.regions[r]) + QF_PEER_ERROR,
                                  QF_CUDA_PEER_TOLD << 8 | (uint32_t)p.rank);
                }
            }
        }
    }
    if (atomicExch(header + QF_PEER_REPORTED, 1u) == 0) {
        qf_peer_store(&p.host->error, error);
        __threadfence_system();
    }
    return 0;
}

/* One thread's wait. */
struct qf_peer_wait {
    uint64_t deadline = 0;
    uint32_t polls = 0;
    /* After a poll that found something missing: true once it is time to give up. */
    __device__ __forceinline__ bool give_up(const qf_cuda_peers &p, int32_t source)
    {
        if (++polls % QF_PEER_POLLS_PER_LOOK != 0) {
            return false;
        }
        deadline = qf_peer_look(p, deadline, polls / QF_PEER_POLLS_PER_LOOK, source);
        return deadline == 0;
    }
};

/* A word, once it is not empty, which it then is again; QF_PEER_EMPTY if it stays so. */
__device__ __forceinline__ uint32_t qf_peer_take(const qf_cuda_peers &p, uint32_t *word, int32_t source)
{
    qf_peer_wait wait;
    uint32_t v = qf_peer_load(word);
    while (v == QF_PEER_EMPTY && !wait.give_up(p, source)) {
        v = qf_peer_load(word);
    }
    qf_peer_store(word, QF_PEER_EMPTY);
    return v;
}

/* Host: bytes before the decode kernel's part of a region. */
static inline size_t qf_peer_decode_at(size_t exchange_bytes)
{
    return QF_PEER_EXCHANGE + QF_PEER_BUFFERS * exchange_bytes;
}

/* Host: what every launcher checks. */
static inline qf_status qf_peer_check(const char *name, const qf_cuda_peers *p, qf_error *err)
{
    if (p->num_ranks < 2 || p->num_ranks > QF_CUDA_MAX_RANKS || p->rank < 0 || p->rank >= p->num_ranks) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s: rank %d of %d; expected 2 to %d ranks", name, p->rank,
                       p->num_ranks, QF_CUDA_MAX_RANKS);
    }
    for (int32_t r = 0; r < p->num_ranks; r++) {
        if (p->regions[r] == NULL || (uintptr_t)p->regions[r] % 256 != 0) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s: rank %d's region is at %p; expected a multiple of 256",
                           name, r, (const void *)p->regions[r]);
        }
    }
    if (p->host == NULL || p->exchange_bytes % 256 != 0 || p->limit_ns == 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "%s: no host words, no limit of time, or %zu bytes of exchange (not a multiple of 256)", name,
                       p->exchange_bytes);
    }
    return QF_OK;
}

#endif
