/* The weight ring of the decode kernel: one producer warp streams every byte that this CTA will need, in the order in
 * which its consumer warps will want it, through `stages` equal stages of shared memory.
 *
 * A stage holds one chunk: up to 32 units of 1,024 bytes of weights followed by their scales, or one tile of keys and
 * values. Barrier counts: full[i] 32 (every lane of the producer arrives once a chunk: by cp.async's own arrival, or,
 * of a bulk chunk, lane 0 with the bytes to come and the others plainly); empty[i] one arrival of every consumer warp.
 * Chunk number c uses stage c % stages; the n-th use of a stage (n from 0) completes phase n of its full barrier, which
 * consumers await with parity n & 1; the producer awaits phase n - 1 of empty with parity (n & 1) ^ 1, which for n = 0
 * is the phase before the first and counts as complete.
 *
 * Every wait is bounded. Where one runs out, `failed` is set, here and (decode_exchange.cuh) for all CTAs; from then on
 * nobody waits, the producer ends, and the consumers run through on whatever memory holds. */
#ifndef QF_DECODE_RING_CUH
#define QF_DECODE_RING_CUH

#include "common/ptx.cuh"
#include "decode_plan.cuh"

/* This CTA's part of a linear. Blocks are numbered along the part: block 0 is k block `offset` of row tile tile0. */
struct qf_decode_phase {
    int32_t blocks, tile0, offset; /* blocks = 0: no part */
    int32_t local_tiles;
    int32_t kbs, ks0;              /* k blocks of the range, and its first */
    uint32_t reciprocal;           /* of kbs */
    int32_t first_slot, slot;      /* of the first row tile, and of the others */
    int32_t out, n;                /* results: word offset in a half of the exchange buffer, and words a slot */
    int32_t turn;                  /* vector of x with which this CTA begins to gather */
};

/* This CTA's share of the attention of a layer: a kv head and a run of tiles of positions. */
struct qf_decode_item {
    int32_t head, split, num_splits; /* head = -1: no share */
    int32_t tile_begin, tile_end;
    int32_t start, length;           /* positions that are seen */
    int32_t fresh;                   /* position of the new token, if this is the last split; else far below */
    int64_t place;                   /* where the new token's key and value belong in the cache, or -1 */
};

/* What stands at the start of shared memory. */
struct qf_decode_fixed {
    uint64_t full[QF_DECODE_MAX_STAGES], empty[QF_DECODE_MAX_STAGES];
    qf_decode_phase phase[QF_DECODE_KINDS];
    qf_decode_item items[2]; /* of the first layer's window, and of the other */
    int32_t window;          /* the first layer's */
    int32_t failed;
    uint32_t epoch;
    long long patience; /* clocks */
    uint64_t deadline;  /* of waits for other ranks; 0: nobody has waited long so far */
    int64_t away[QF_CUDA_MAX_RANKS - 1]; /* bytes from this rank's region to those of the ranks after it, in a circle */
};
static_assert(sizeof(qf_decode_fixed) <= 1024, "see qf_decode_plan_shared");

/* All of shared memory; what stands where: p.map. */
extern __shared__ __align__(128) char qf_decode_shared[];

__device__ __forceinline__ qf_decode_fixed &qf_fixed()
{
    return *reinterpret_cast<qf_decode_fixed *>(qf_decode_shared);
}

__device__ __forceinline__ const qf_decode_layer_entry *qf_layer(const qf_decode_params &p, int layer)
{
    return reinterpret_cast<const qf_decode_layer_entry *>(qf_decode_shared + p.map.layers) + layer;
}

/* Where a warp stands in the ring. */
struct qf_decode_ring {
    int32_t stage;
    uint32_t parity;
};

__device__ __forceinline__ uint32_t qf_ring_address(const qf_decode_params &p, const qf_decode_ring &r)
{
    return qf_shared_address(qf_decode_shared) + p.map.ring + r.stage * p.map.stage_bytes;
}

__device__ __forceinline__ void qf_ring_advance(const qf_decode_params &p, qf_decode_ring &r)
{
    if (++r.stage == p.map.stages) {
        r.stage = 0;
        r.parity ^= 1;
    }
}

__device__ __forceinline__ bool qf_mbarrier_test(uint64_t *barrier, uint32_t parity)
{
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred p;\n"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
#else
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
#endif
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(done)
                 : "r"(qf_shared_address(barrier)), "r"(parity)
                 : "memory");
    return done != 0;
}

/* About two seconds at any clock of these cards; of several ranks so much more than the limit of waits for another. */
#define QF_DECODE_PATIENCE_CLOCKS 4000000000ll
#define QF_DECODE_CLOCKS_PER_NS 3

/* Waits at most that long; false once the step has failed. */
static __device__ __noinline__ bool qf_ring_wait_long(uint64_t *barrier, uint32_t parity, volatile int32_t *failed)
{
    long long start = clock64();
    while (!qf_mbarrier_test(barrier, parity)) {
        if (*failed) {
            return false;
        }
        if (clock64() - start > qf_fixed().patience) {
            *failed = 1;
            return false;
        }
    }
    return true;
}

/* Of a whole warp. */
__device__ __forceinline__ bool qf_ring_wait(uint64_t *barrier, uint32_t parity, volatile int32_t *failed)
{
    bool done = qf_mbarrier_test(barrier, parity) || qf_mbarrier_test(barrier, parity) ||
                qf_ring_wait_long(barrier, parity, failed);
    return __all_sync(~0u, done);
}

/* The cp.async copies of this thread so far arrive on the barrier when they have landed; counts as its arrival. */
__device__ __forceinline__ void qf_cp_async_arrive(uint64_t *barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(qf_shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void qf_cp_async_at(uint32_t shared, const char *global)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void qf_cp_async_at_or_zero(uint32_t shared, const char *global, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

/* Copies a contiguous run, by one bulk copy of lane 0 or by the whole warp; bytes is a multiple of 16. */
__device__ __forceinline__ void qf_ring_copy(bool bulk, uint32_t shared, const char *global, int bytes,
                                             uint64_t *barrier, int lane)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (bulk) {
        if (lane == 0) {
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         ::"r"(shared),
                         "l"(global), "r"(bytes), "r"(qf_shared_address(barrier))
                         : "memory");
        }
        return;
    }
#endif
#pragma unroll 4
    for (int i = lane * 16; i < bytes; i += 512) {
        qf_cp_async_at(shared + i, global + i);
    }
}

/* Ends a chunk of `bytes` bytes. */
__device__ __forceinline__ void qf_ring_arrive(bool bulk, uint64_t *barrier, int bytes, int lane)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (bulk) {
        if (lane == 0) {
            qf_mbarrier_arrive_expect(barrier, (uint32_t)bytes);
        } else {
            qf_mbarrier_arrive(barrier);
        }
        return;
    }
#endif
    qf_cp_async_arrive(barrier);
}

/* Streams this CTA's part of one linear. Returns false once the step has failed. */
static __device__ __forceinline__ bool qf_produce_linear(const qf_decode_params &p, int kind,
                                                         const qf_decode_layer_entry *layer, qf_decode_ring &ring,
                                                         int lane)
{
    const qf_decode_linear &l = p.linear[kind];
    const qf_decode_phase &ph = qf_fixed().phase[kind];
    const char *data = layer->data[kind & 3], *scales = layer->scales[kind & 3];
    const int block_bytes = 256 * l.bits, scale_bytes = l.scale_bytes, chunk = QF_DECODE_CHUNK_UNITS * 4 / l.bits;
    int tile = ph.tile0, k = ph.offset;
#pragma unroll 1
    for (int v = 0; v < ph.blocks; v += chunk) {
        int left = min(chunk, ph.blocks - v), total = left * (block_bytes + scale_bytes);
        uint64_t *full = &qf_fixed().full[ring.stage];
        if (!qf_ring_wait(&qf_fixed().empty[ring.stage], ring.parity ^ 1, &qf_fixed().failed)) {
            return false;
        }
        uint32_t to = qf_ring_address(p, ring), to_scales = to + QF_DECODE_CHUNK_UNITS * 1024;
        if (p.bulk) { /* the bytes to come are announced before any can arrive */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
            qf_fence_async_shared(); /* what was read and written here before comes before the copy engine's writes */
#endif
            qf_ring_arrive(true, full, total, lane);
        }
#pragma unroll 1
        while (left > 0) { /* runs of contiguous blocks: to the end of the range in this row tile, or all */
            int run = ph.kbs == l.kb ? left : min(left, ph.kbs - k);
            int64_t block = (int64_t)tile * l.kb + ph.ks0 + k;
            qf_ring_copy(p.bulk, to, data + block * block_bytes, run * block_bytes, full, lane);
            if (scale_bytes != 0) {
                qf_ring_copy(p.bulk, to_scales, scales + block * scale_bytes, run * scale_bytes, full, lane);
            }
            to += run * block_bytes;
            to_scales += run * scale_bytes;
            left -= run;
            k += run;
            int tiles = k / ph.kbs;
            tile += tiles;
            k -= tiles * ph.kbs;
        }
        if (!p.bulk) {
            qf_ring_arrive(false, full, total, lane);
        }
        qf_ring_advance(p, ring);
    }
    return true;
}

/* Streams the old keys and values of this CTA's item. A tile is 32 KB: rows of head_dim of keys, then of values,
 * 16-byte pieces of row r exchanged by r & 7 so that ldmatrix meets no bank twice. Rows that are not seen, among them
 * that of the new token, become zeros. */
template <int head_dim>
static __device__ __forceinline__ bool qf_produce_attention(const qf_decode_params &p,
                                                            const qf_decode_layer_entry *layer, qf_decode_ring &ring,
                                                            int lane)
{
    constexpr int tile_rows = 8192 / head_dim, pieces = head_dim / 8, rows_a_step = 32 / pieces;
    const qf_decode_item &item = qf_fixed().items[layer->other_window];
    if (item.head < 0) {
        return true;
    }
    const int32_t *table = p.block_tables + p.block_table_start[0];
    const int length = item.length, start = item.start, size = p.block_size;
    const int row0 = lane / pieces, piece = lane % pieces, run = min(size, tile_rows), blocks = tile_rows / run;
    const int shift = 31 - __clz(size), run_shift = 31 - __clz(run); /* powers of two */
    int next_id = 0;                    /* lane i: the next tile's block i, or the block that holds the tile */
    if (lane < blocks && item.tile_begin * tile_rows + lane * run < length) {
        next_id = table[(item.tile_begin * tile_rows + lane * run) >> shift];
    }
#pragma unroll 1
    for (int tile = item.tile_begin; tile < item.tile_end; tile++) {
        const int first = tile * tile_rows, id = next_id, next = first + tile_rows + lane * run;
        const bool whole = first >= start && first + tile_rows < length;
        next_id = 0;
        if (tile + 1 < item.tile_end && lane < blocks && next < length) {
            next_id = table[next >> shift];
        }
        if (!qf_ring_wait(&qf_fixed().empty[ring.stage], ring.parity ^ 1, &qf_fixed().failed)) {
            return false;
        }
        const uint32_t to = qf_ring_address(p, ring);
        if (whole) {
#pragma unroll 1
            for (int b = 0; b < blocks; b++) {
                int64_t at = (((int64_t)__shfl_sync(~0u, id, b) * p.num_kv_heads + item.head) * size +
                              (first & (size - 1))) * (head_dim * 2) + lane * 16;
                const char *k = layer->k + at, *v = layer->v + at;
#pragma unroll 4
                for (int r = 0; r < run; r += rows_a_step) {
                    int row = b * run + r + row0;
                    uint32_t place = to + row * (head_dim * 2) + ((piece ^ (row & 7)) << 4);
                    qf_cp_async_at(place, k + r * (head_dim * 2));
                    qf_cp_async_at(place + 16384, v + r * (head_dim * 2));
                }
            }
        } else {
#pragma unroll 1
            for (int r = row0; r < tile_rows; r += rows_a_step) {
                int position = first + r;
                bool valid = position >= start && position < length - 1;
                int block = __shfl_sync(~0u, id, r >> run_shift);
                int64_t at = valid ? (((int64_t)block * p.num_kv_heads + item.head) * size + (position & (size - 1))) *
                                             (head_dim * 2) + piece * 16
                                   : 0;
                uint32_t place = to + r * (head_dim * 2) + ((piece ^ (r & 7)) << 4);
                qf_cp_async_at_or_zero(place, layer->k + at, valid);
                qf_cp_async_at_or_zero(place + 16384, layer->v + at, valid);
            }
        }
        qf_cp_async_arrive(&qf_fixed().full[ring.stage]);
        qf_ring_advance(p, ring);
    }
    return true;
}

__device__ __forceinline__ void qf_prefetch_l2(const char *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* Brings a layer's norm weights and bias into L2, where all CTAs will want them at once: a line a CTA. */
static __device__ __forceinline__ void qf_produce_small(const qf_decode_params &p, const qf_decode_layer_entry *layer,
                                                        int lane)
{
    const int line = (int)blockIdx.x + (lane >> 2) * (int)gridDim.x, which = lane & 3;
    const float *from = which == 0 ? layer->norm[0] : which == 1 ? layer->norm[1] : which == 2 ? layer->bias : nullptr;
    if (from != nullptr && line * 32 < (which == 2 ? p.linear[QF_DECODE_QKV].n : p.hidden_size)) {
        qf_prefetch_l2(reinterpret_cast<const char *>(from + line * 32));
    }
}

template <int head_dim> static __device__ __forceinline__ void qf_decode_produce(const qf_decode_params &p)
{
    qf_decode_ring ring = {0, 0};
    const int lane = threadIdx.x & 31;
    qf_produce_small(p, qf_layer(p, 0), lane);
#pragma unroll 1
    for (int step = 0; step <= 4 * p.num_layers; step++) {
        const qf_decode_layer_entry *layer = qf_layer(p, step >> 2);
        const int kind = step == 4 * p.num_layers ? (int)QF_DECODE_HEAD : step & 3;
        if (kind == QF_DECODE_QKV) {
            qf_produce_small(p, layer + 1, lane);
        }
        if ((kind == QF_DECODE_O && !qf_produce_attention<head_dim>(p, layer, ring, lane)) ||
            !qf_produce_linear(p, kind, layer, ring, lane)) {
            return;
        }
    }
}

#endif
