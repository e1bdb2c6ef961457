/* Decode attention over an int4 cache of head_dim 128, by bulk copies (Hopper): the walk of a warp over its positions, and
 * what it has on its way from memory.
 *
 * An item's positions are cut into units of 64 at multiples of that, and each of 12 warps takes its 12th of them, one after
 * the other. A unit comes as two stages of 32. Keys and values of a stage, codes | words, are places of two rings of the warp,
 * with a barrier each, for which one of its lanes sends; with a unit's first keys comes the unit's row of the coarse table.
 * Keys' places are filled anew as soon as scores are made. All is copied as it stands in memory: blocks hold 32 positions or
 * more, and rows of values have their pieces of 16 bytes in an order for which ldmatrix asks no bank twice
 * (common/kv_codec.cuh). */
#ifndef QF_ATTENTION_DECODE_WIDE_STAGE_CUH
#define QF_ATTENTION_DECODE_WIDE_STAGE_CUH

#include "attention_decode_lowbit.cuh"

#define WIDE_WARPS 12
#define WIDE_THREADS (32 * WIDE_WARPS)
#define WIDE_DEPTH 3 /* stages */
#define WIDE_ROW 64  /* bytes of a position's codes */
#define WIDE_CODES (32 * WIDE_ROW)
#define WIDE_WORDS (32 * 8)
#define WIDE_STAGE (WIDE_CODES + WIDE_WORDS) /* keys or values */
#define WIDE_COARSE 512 /* a row of the coarse table */
#define WIDE_UNITS 512  /* values' steps of a unit, decoded; their zeros take as much */

typedef lowbit_sizes<QF_CUDA_KV_INT4, 128> wide_sizes;
typedef lowbit_shared<QF_CUDA_KV_INT4, 128> wide_shared;
typedef lowbit_state<QF_CUDA_KV_INT4, 128> wide_state;

/* Of a warp: the ring | two rows of the coarse table | decoded scales. */
#define WIDE_OWN (2 * WIDE_DEPTH * WIDE_STAGE + 2 * WIDE_COARSE + 2 * WIDE_UNITS)
#define WIDE_BARRIERS 576 /* bytes: of all warps */
#define WIDE_FIXED (wide_sizes::fixed + WIDE_BARRIERS)
#define WIDE_SHARED (WIDE_FIXED + WIDE_WARPS * WIDE_OWN)
static_assert(WIDE_WARPS * WIDE_DEPTH * 16 <= WIDE_BARRIERS && WIDE_FIXED % 128 == 0, "places");
static_assert(WIDE_WARPS * LOWBIT_HEADS * (wide_sizes::result_row + 2) * 4 <= WIDE_WARPS * WIDE_OWN, "results' places");

/* A warp's walk: units first .. end - 1. */
struct wide_walk {
    int32_t begin, end_position; /* positions that are seen */
    uint32_t first, end;
    int32_t own_position; /* and later ones: written by the kernel before */
    uint32_t lane;
    const uint8_t *k, *v;   /* of the kv head, in block 0: codes */
    uint32_t words;         /* from codes in block 0 to words */
    uint32_t barriers, ring; /* in shared memory; behind the ring are the coarse rows */
    const int32_t *table;
    uint32_t code_pieces; /* lane i: of the i-th stage of the 32 that are copied now, pieces from block 0's start */
    uint32_t word_pieces;
};

/* The 32 stages from `first` on; those that are not seen become ones that are, and are masked. */
static __device__ __forceinline__ void wide_load_blocks(const attention_params &p, wide_walk &w, uint32_t first)
{
    const int32_t shift = p.block_shift - 5;
    const int32_t stage = min(max((int32_t)(first + w.lane), w.begin >> 5), (w.end_position - 1) >> 5);
    const int32_t row = stage & ((1 << shift) - 1);
    const uint32_t block_pieces = (uint32_t)p.a.shape.num_kv_heads * (WIDE_STAGE / 16) << shift;
    const uint32_t block = (uint32_t)__ldcg(w.table + (stage >> shift)) * block_pieces;
    w.code_pieces = block + row * (WIDE_CODES / 16);
    w.word_pieces = block + row * (WIDE_WORDS / 16);
}

static __device__ __forceinline__ wide_walk wide_start(const attention_params &p, const qf_cuda_attention_item &item,
                                                       int32_t kv_head, uint32_t barriers, uint32_t ring,
                                                       int32_t table_start)
{
    wide_walk w;
    const uint32_t warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), first = (uint32_t)item.kv_begin / 64;
    const uint32_t num = (uint32_t)(item.kv_end - 1) / 64 + 1 - first;
    w.lane = threadIdx.x % 32;
    w.begin = item.kv_begin;
    w.end_position = item.kv_end;
    w.own_position = item.first_position;
    w.first = first + num * warp / WIDE_WARPS;
    w.end = first + num * (warp + 1) / WIDE_WARPS;
    const int64_t rows = (int64_t)p.a.shape.num_kv_heads << p.block_shift, row = (int64_t)kv_head << p.block_shift;
    w.k = static_cast<const uint8_t *>(p.a.kv.k) + row * WIDE_ROW;
    w.v = static_cast<const uint8_t *>(p.a.kv.v) + row * WIDE_ROW;
    w.words = (uint32_t)(rows * WIDE_ROW - row * (WIDE_ROW - 8));
    w.barriers = barriers;
    w.ring = ring;
    w.table = p.a.block_tables + table_start;
    w.code_pieces = w.word_pieces = 0;
    return w;
}

/* Where a stage is in memory: pieces from block 0's start. */
struct wide_place {
    uint32_t codes, words;
};

/* Stages are located in order, each once. AHEAD: before the walk, perhaps the first; LOCATED: that one's blocks are known. */
enum wide_time { WALKING, AHEAD, LOCATED };

template <wide_time time>
static __device__ __forceinline__ wide_place wide_locate(const attention_params &p, wide_walk &w, uint32_t s)
{
    if (s < 2 * w.end && (s == 2 * w.first && time != WALKING ? time == AHEAD : s % 32 == 0)) {
        wide_load_blocks(p, w, s & ~31u);
    }
    return {__shfl_sync(ALL_LANES, w.code_pieces, s % 32), __shfl_sync(ALL_LANES, w.word_pieces, s % 32)};
}

/* Sends for the keys (part 0; with a unit's first the row of the coarse table) or values (1) of stage s, if there is such a
 * one, to place `slot` of their ring. */
template <bool biased, int part>
static __device__ __forceinline__ void wide_send(const attention_params &p, const wide_walk &w, const wide_place &place,
                                                 uint32_t s, uint32_t slot)
{
    const uint32_t index = part * WIDE_DEPTH + slot, to = w.ring + index * WIDE_STAGE, barrier = w.barriers + index * 8;
    if (s < 2 * w.end && qf_elected()) {
        const uint8_t *from = part == 0 ? w.k : w.v;
        const bool coarse = biased && part == 0 && s % 2 == 0;
        qf_barrier_expect(barrier, WIDE_STAGE + (coarse ? WIDE_COARSE : 0));
        qf_bulk_copy_to(to, from + (uint64_t)place.codes * 16, WIDE_CODES, barrier);
        qf_bulk_copy_to(to + WIDE_CODES, from + (uint64_t)place.words * 16 + w.words, WIDE_WORDS, barrier);
        if (coarse) {
            qf_bulk_copy_to(w.ring + 2 * WIDE_DEPTH * WIDE_STAGE + s / 2 % 2 * WIDE_COARSE,
                      reinterpret_cast<const uint8_t *>(p.a.bias_coarse + (uint64_t)(s / 2) * 128), WIDE_COARSE, barrier);
        }
    }
}

/* Words of positions of a unit that are not seen become zero: what stands there may be no number. stages: of keys or
 * values. */
static __device__ __forceinline__ void wide_clear(const wide_walk &w, int32_t position, uint8_t *const (&stages)[2])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int32_t at = position + 32 * h + (int32_t)w.lane;
        if (at < w.begin || at >= w.end_position) {
            reinterpret_cast<uint2 *>(stages[h] + WIDE_CODES)[w.lane] = make_uint2(0, 0);
        }
    }
    qf_fence_async_shared();
    __syncwarp();
}

#endif
