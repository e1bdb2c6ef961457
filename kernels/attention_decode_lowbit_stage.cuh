/* Low-bit decode attention: the walk of a warp over its positions, and what it has on its way from memory.
 *
 * An item's positions are cut into stages of 16 or 32, at multiples of that, and each warp takes its 16th of them, one
 * after the other. A stage is keys' codes | values' codes | keys' words | values' words in shared memory, copied
 * asynchronously `depth` stages ahead. The bias is made for units of QF_CUDA_BIAS_TILE = 64 positions: with the first stage
 * of a unit that a warp sees comes the unit's row of the coarse table.
 *
 * Rows of values in 8 bits are read by lane (g, t) at columns of g, rows 2t and 2t + 1: 16-byte pieces and rows change places
 * so that no bank is asked twice; so do pieces of keys of 128 bytes. Values in 4 bits stand in memory as ldmatrix wants them. */
#ifndef QF_ATTENTION_DECODE_LOWBIT_STAGE_CUH
#define QF_ATTENTION_DECODE_LOWBIT_STAGE_CUH

#include "attention_decode_merge.cuh"
#include "common/kv_codec.cuh"

#define LOWBIT_THREADS 512
#define LOWBIT_CTAS 1 /* on a multiprocessor: their shared memory has no room for more */
#define LOWBIT_WARPS (LOWBIT_THREADS / 32)
#define LOWBIT_HEADS 8 /* at a time: columns of the products, and a warp each for what is made of the queries */
#define ALL_LANES 0xffffffffu

/* `count` words of 32 bits from shared memory in one load. */
template <int count> static __device__ __forceinline__ void load_words(uint32_t *to, const void *from)
{
    if constexpr (count == 1) {
        to[0] = *static_cast<const uint32_t *>(from);
    } else if constexpr (count == 2) {
        const uint2 v = *static_cast<const uint2 *>(from);
        to[0] = v.x;
        to[1] = v.y;
    } else {
        const uint4 v = *static_cast<const uint4 *>(from);
        to[0] = v.x;
        to[1] = v.y;
        to[2] = v.z;
        to[3] = v.w;
    }
}

template <int count> static __device__ __forceinline__ void store_floats(void *to, const float (&x)[count])
{
    static_assert(count == 2 || count == 4, "one store");
    if constexpr (count == 2) {
        *static_cast<float2 *>(to) = make_float2(x[0], x[1]);
    } else {
        *static_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
    }
}

/* Sizes of one format and head_dim; all in bytes unless named otherwise. */
template <int format, int head_dim> struct lowbit_sizes {
    static constexpr int words = qf_kv_words(format, head_dim), row = qf_kv_row_bytes(format, head_dim);
    static constexpr int tiles = row == 128 ? 1 : 2, positions = 16 * tiles; /* of a stage */
    static constexpr int stages = QF_CUDA_BIAS_TILE / positions;             /* of a unit */
    static constexpr int depth = row == 128 ? 3 : row == 64 ? 2 : 4, least_depth = 2;
    static constexpr int coarse_slots = (depth - 1) / stages + 2, coarse = coarse_slots * head_dim * 4; /* on their way */
    static constexpr int codes = positions * row, scales = positions * 2 * words;
    static constexpr int stage = 2 * (codes + scales);
    /* Scale words of a stage in 4 bits, decoded: attention_decode_lowbit_scales.cuh. */
    static constexpr bool grouped = words > 1, zeros = format == QF_CUDA_KV_INT4;
    static constexpr int key_steps = grouped ? positions * words * 4 : 0, key_zeros = zeros ? key_steps : 0;
    static constexpr int value_unit = zeros ? 16 : 8, value_units = grouped ? tiles * words * 4 * value_unit : 0;
    static constexpr int decoded = key_steps + key_zeros + value_units;
    static constexpr int c = LOWBIT_HEADS * head_dim / 2 * 4, q = head_dim / 32 * 32 * 16;
    static constexpr int sums = 2 * LOWBIT_HEADS * (head_dim / 32) * 4;
    static constexpr int fine = row < 128 ? QF_CUDA_BIAS_TILE / 2 * head_dim * 2 : 0; /* there is no room beside rows of 128 */
    static constexpr int fixed = fine + 2 * c + q + sums + 2 * LOWBIT_HEADS * 4, terms = tiles == 2 ? 1024 : 0;
    static constexpr int own = decoded + coarse + terms; /* of a warp */
    static constexpr int result_row = head_dim + 4; /* floats */
    static constexpr int results = LOWBIT_WARPS * LOWBIT_HEADS * (result_row + 2) * 4;
    static_assert(results <= LOWBIT_WARPS * (own + least_depth * stage), "results stand where stages were");
    static constexpr int total(int with_depth) { return LOWBIT_WARPS * (own + with_depth * stage) + fixed; }
};

/* A warp's walk over an item's positions: stages first .. end - 1. */
struct lowbit_walk {
    int32_t begin, end_position; /* positions that are seen */
    uint32_t first, end;
    int32_t own_position;        /* and later ones: written by the kernel before */
    uint32_t lane;
    uint32_t first_piece; /* in block 0, this lane's of the kv head's codes, in pieces of 16 bytes */
    const uint8_t *words; /* in block 0, of its side's words */
    uint32_t key_at, value_at; /* in a stage's codes of a tile: this lane's first row; of values */
    uint32_t value_to;         /* where its first piece of a tile's values goes */
    const int32_t *table;
    /* Lane i: of the i-th tile of the 32 that are copied now, pieces from block 0's start to the tile's. */
    uint32_t code_pieces, word_pieces;
};

/* The 32 tiles from `first` on; those that are not seen become ones that are, and are masked. */
template <int format, int head_dim>
static __device__ __forceinline__ void load_blocks(const attention_params &p, lowbit_walk &w, uint32_t first)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    const int32_t tile = min(max((int32_t)(first + w.lane), w.begin >> 4), (w.end_position - 1) >> 4);
    const int32_t shift = p.block_shift - 4, row = tile & ((1 << shift) - 1);
    const uint32_t block_pieces = (uint32_t)p.a.shape.num_kv_heads * (sizes::row + 2 * sizes::words) << shift;
    const uint32_t block = (uint32_t)__ldcg(w.table + (tile >> shift)) * block_pieces;
    w.code_pieces = block + row * sizes::row;
    w.word_pieces = block + row * (2 * sizes::words);
}

/* Where 16-byte piece `piece` of 16 rows of values, or keys, stands in shared memory. */
template <int row_bytes> static __device__ __forceinline__ uint32_t value_piece(uint32_t piece)
{
    const uint32_t per_row = row_bytes / 16, r = piece / per_row, c = piece % per_row;
    if (row_bytes == 128) {
        return r * 128 + ((c ^ (r >> 1 & 3) * 2) * 16);
    }
    return (r ^ (r >> 2 & 1)) * row_bytes + (row_bytes == 64 ? (c ^ (r >> 1 & 1) * 2) * 16 : c * 16);
}

template <int row_bytes> static __device__ __forceinline__ uint32_t key_piece(uint32_t piece)
{
    return row_bytes == 128 ? piece / 8 * 128 + ((piece % 8 ^ (piece / 8 & 1) * 4) * 16) : piece * 16;
}

template <int format, int head_dim>
static __device__ __forceinline__ lowbit_walk start_walk(const attention_params &p, const qf_cuda_attention_item &item,
                                                         int32_t kv_head, uint32_t lane)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    lowbit_walk w;
    const uint32_t warp = threadIdx.x / 32, first = (uint32_t)item.kv_begin / sizes::positions;
    const uint32_t num = (uint32_t)(item.kv_end - 1) / sizes::positions + 1 - first;
    w.lane = lane;
    w.begin = item.kv_begin;
    w.end_position = item.kv_end;
    w.own_position = item.first_position;
    w.first = first + num * warp / LOWBIT_WARPS;
    w.end = first + num * (warp + 1) / LOWBIT_WARPS;
    const int64_t rows = (int64_t)p.a.shape.num_kv_heads << p.block_shift, row = (int64_t)kv_head << p.block_shift;
    w.first_piece = (uint32_t)(row * sizes::row / 16) + lane;
    constexpr uint32_t pieces = 2 * sizes::words; /* of a tile's words; a lane has one, of keys or values */
    w.words = static_cast<const uint8_t *>(lane / (sizes::tiles * pieces) % 2 == 0 ? p.a.kv.k : p.a.kv.v) +
              rows * sizes::row + row * (2 * sizes::words) + lane % pieces * 16;
    w.table = p.a.block_tables + __ldcg(p.a.block_table_start + item.seq);
    w.code_pieces = w.word_pieces = 0;
    const uint32_t g = lane / 4, t = lane % 4;
    w.key_at = sizes::row == 128 ? key_piece<128>(g * 8 + t) : g * sizes::row + t * (sizes::row / 4);
    const uint32_t byte = g * (sizes::row / 8);
    w.value_at = value_piece<sizes::row>(2 * t * (sizes::row / 16) + byte / 16) + byte % 16;
    w.value_to = sizes::grouped ? lane * 16 : value_piece<sizes::row>(lane);
    if constexpr (sizes::grouped) { /* for ldmatrix: rows 0 .. 7 and pieces of four groups, or rows 0 .. 15 and two */
        const uint32_t rows8 = sizes::row == 64 ? lane % 8 : lane / 16 * 8 + lane % 8;
        const uint32_t group = sizes::row == 64 ? lane / 8 : lane / 8 % 2;
        w.value_at = rows8 * sizes::row + qf_kv_value_piece(head_dim, rows8, group) * 16;
    }
    /* What a shuffle gave is kept, not made anew in every stage. */
    w.key_at = __shfl_sync(ALL_LANES, w.key_at, lane);
    w.value_at = __shfl_sync(ALL_LANES, w.value_at, lane);
    w.value_to = __shfl_sync(ALL_LANES, w.value_to, lane);
    w.lane = __shfl_sync(ALL_LANES, w.lane, lane);
    w.end = __shfl_sync(ALL_LANES, w.end, lane);
    return w;
}

/* Sends for stage s and commits, even if there is nothing to send. `stage` and `coarse` are the warp's places. Stages
 * are copied in order, each once; ahead: before the walk, perhaps the first. */
template <int format, int head_dim, bool biased, bool ahead>
static __device__ __forceinline__ void copy_stage(const attention_params &p, lowbit_walk &w, uint32_t s, uint8_t *stage,
                                                  uint8_t *coarse)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    if (s < w.end) {
        const uint32_t n = s * sizes::tiles;
        if (n % 32 == 0 || (ahead && s == w.first)) {
            load_blocks<format, head_dim>(p, w, n & ~31u);
        }
#pragma unroll
        for (int m = 0; m < sizes::tiles; m++) {
            const uint32_t pieces = __shfl_sync(ALL_LANES, w.code_pieces, (n + m) % 32) + w.first_piece;
            const uint8_t *k = static_cast<const uint8_t *>(p.a.kv.k) + (uint64_t)pieces * 16;
            const uint8_t *v = static_cast<const uint8_t *>(p.a.kv.v) + (uint64_t)pieces * 16;
            uint8_t *to = stage + m * 16 * sizes::row;
#pragma unroll
            for (int i = 0; i < sizes::row / 32; i++) {
                /* Pieces 32 further on are 4, 8 or 16 rows further on: only rows of 128 bytes change places otherwise. */
                const uint32_t key = key_piece<sizes::row>(w.lane) + 512 * i;
                const uint32_t value = (w.value_to ^ (sizes::row == 128 && i % 2 ? 64 : 0)) + 512 * i;
                qf_cp_async_16(to + key, k + 512 * i);
                qf_cp_async_16(to + sizes::codes + value, v + 512 * i);
            }
        }
        constexpr uint32_t pieces = 2 * sizes::words;
        const uint32_t at = __shfl_sync(ALL_LANES, w.word_pieces, (n + w.lane / pieces % sizes::tiles) % 32);
        if (2 * sizes::tiles * pieces == 32 || w.lane < 2 * sizes::tiles * pieces) {
            qf_cp_async_16(stage + 2 * sizes::codes + w.lane * 16, w.words + (uint64_t)at * 16);
        }
        if (biased && (s % sizes::stages == 0 || (ahead && s == w.first))) {
            const uint32_t unit = s / sizes::stages;
            if (head_dim == 128 || w.lane < head_dim / 4) {
                qf_cp_async_16(coarse + unit % sizes::coarse_slots * head_dim * 4 + w.lane * 16,
                               p.a.bias_coarse + (uint64_t)unit * head_dim + w.lane * 4);
            }
        }
    }
    qf_cp_async_commit();
}

/* Words of positions that are not seen become zero: what stands there may be no number. */
template <int format, int head_dim>
static __device__ __forceinline__ void clear_unseen(const lowbit_walk &w, int32_t position, uint8_t *stage)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    const int32_t i = (int32_t)w.lane;
    if (i < sizes::positions && (position + i < w.begin || position + i >= w.end_position)) {
        uint16_t *words = reinterpret_cast<uint16_t *>(stage + 2 * sizes::codes) + i * sizes::words;
#pragma unroll
        for (int j = 0; j < sizes::words; j++) {
            words[j] = 0;
            words[sizes::scales / 2 + j] = 0;
        }
        if constexpr (format == QF_CUDA_KV_FP8) { /* codes, too, may be no numbers */
#pragma unroll
            for (int c = 0; c < sizes::row / 16; c++) {
                *reinterpret_cast<uint4 *>(stage + sizes::codes + i / 16 * 16 * sizes::row +
                                           value_piece<sizes::row>(i % 16 * (sizes::row / 16) + c)) = make_uint4(0, 0, 0, 0);
            }
        }
    }
    __syncwarp();
}

#endif
