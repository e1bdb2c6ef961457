/* What the decode kernel does as one of several ranks: stores of o's and down's sums into all ranks' memory, the slots in
 * which they lie, and waits whose end all ranks hear of. Why it is safe: decode_exchange.cuh. */
#ifndef QF_DECODE_RANKS_CUH
#define QF_DECODE_RANKS_CUH

#include "decode_ring.cuh"

#define QF_DECODE_POLLS_PER_LOOK 512u

/* Two words of a sum, 8 apart, to every rank: the others' first, as they are further away. at: of the first in this rank's
 * memory. */
static __device__ __forceinline__ void qf_ranks_store(const qf_decode_params &p, uint32_t *at, uint32_t low, uint32_t high)
{
    const int64_t *away = qf_fixed().away;
    const int32_t others = p.peers.num_ranks - 1;
#pragma unroll 1
    for (int32_t i = 0; i < others; i++) {
        uint32_t *there = reinterpret_cast<uint32_t *>(reinterpret_cast<char *>(at) + away[i]);
        qf_peer_store(there, low);
        qf_peer_store(there + 8, high);
    }
    qf_peer_store(at, low);
    qf_peer_store(at + 8, high);
}

/* Bit `slot` is set where a row tile of o or down has a result of any rank. */
static __device__ __forceinline__ uint32_t qf_ranks_mask(const qf_decode_rows &rows, int num_ranks, int tiles, int tile)
{
    uint32_t mask = 0, one = 0;
#pragma unroll 1
    for (int r = 0; r < num_ranks; r++) {
        const qf_cuda_decode_cut &cut = rows.cut[r], &last = rows.cut[r > 0 ? r - 1 : 0];
        if (cut.splits * cut.max_pieces == 1) {
            one = 1;
        } else if (r == 0 || cut.kb != last.kb || cut.splits != last.splits || cut.parts != last.parts) {
            one = qf_decode_slot_mask(cut, tiles, tile);
        }
        mask |= one << rows.first_slot[r];
    }
    return mask;
}

/* Whose result the slot is for. slot: QF_DECODE_LOCAL, or of o, or of down plus QF_DECODE_OF_DOWN. */
enum { QF_DECODE_LOCAL = -1, QF_DECODE_OF_DOWN = 64 };

static __device__ __forceinline__ int32_t qf_ranks_source(const qf_decode_params &p, int32_t slot)
{
    if (slot == QF_DECODE_LOCAL) {
        return p.peers.rank;
    }
    const qf_decode_rows &rows = p.rows[slot >= QF_DECODE_OF_DOWN ? 1 : 0];
    int32_t r = 0;
#pragma unroll 1
    while (r + 1 < p.peers.num_ranks && rows.first_slot[r + 1] <= slot % QF_DECODE_OF_DOWN) {
        r++;
    }
    return r;
}

/* A wait's look around after n polls: true once it is time to give up. The time limit runs from this CTA's first look.
 * Who waits for its own rank waits a quarter longer: if that is held up by another rank, others say which. CTA 0 alone
 * looks at the host's word, whose loads are slow: as long as anybody waits in vain, it does. */
static __device__ __noinline__ bool qf_ranks_look(const qf_decode_params &p, uint32_t n, int32_t slot)
{
    volatile int32_t *failed = &qf_fixed().failed;
    volatile uint64_t *deadline = &qf_fixed().deadline;
    if (*failed != 0 || n % QF_DECODE_POLLS_PER_LOOK != 0) {
        return *failed != 0;
    }
    const int32_t source = qf_ranks_source(p, slot);
    const uint32_t looks = n / QF_DECODE_POLLS_PER_LOOK * (QF_DECODE_POLLS_PER_LOOK / QF_PEER_POLLS_PER_LOOK);
    const uint64_t set = *deadline, more = source == p.peers.rank ? p.peers.limit_ns / 4 : 0;
    const uint64_t until = qf_peer_look(p.peers, set == 0 ? 0 : set + more, blockIdx.x == 0 ? looks : 1, source);
    if (until == 0) {
        *failed = 1;
    } else if (set == 0) {
        *deadline = until;
    }
    return until == 0;
}

/* At the start: has some rank given up before? Then nobody waits, and the host hears of it. */
static __device__ __forceinline__ bool qf_ranks_failed(const qf_decode_params &p)
{
    const uint32_t *header = reinterpret_cast<const uint32_t *>(p.peers.regions[p.peers.rank]);
    if (qf_peer_load(header + QF_PEER_ERROR) == QF_CUDA_PEER_OK) {
        return false;
    }
    (void)qf_peer_look(p.peers, 1, 1, p.peers.rank);
    return true;
}

#endif
