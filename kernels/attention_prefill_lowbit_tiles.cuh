/* Low-bit prefill attention's tiles: which of the two caches' come in which order, and their way to shared memory as they
 * are stored. The whole is described in attention_prefill_lowbit.cuh. */
#ifndef QF_ATTENTION_PREFILL_LOWBIT_TILES_CUH
#define QF_ATTENTION_PREFILL_LOWBIT_TILES_CUH

#include "attention_prefill.cuh"

static_assert(PREFILL_TILE == QF_CUDA_BIAS_TILE, "tiles begin where the coarse table's rows do");

static inline size_t lowbit_prefill_shared_bytes(qf_cuda_kv_format format, int head_dim, int m_tiles)
{
    return sizeof(uint16_t) * head_dim * (PREFILL_ROWS(m_tiles) + 3 * PREFILL_TILE) + 3 * sizeof(float) * head_dim +
           2 * PREFILL_TILE * (qf_cuda_kv_row_bytes(format, head_dim) + 2 * qf_cuda_kv_words(format, head_dim));
}

template <int head_dim, int m_tiles> struct lowbit_shared {
    uint16_t *queries, *keys, *keys_low, *values;
    float *coarse, *bias, *turned;              /* (head_dim) each: R_p0, b, R_p0(b) */
    char *codes, *scales;                       /* keys', then values' */
    __device__ __forceinline__ lowbit_shared(uint16_t *base, int code_bytes)
        : queries(base),
          keys(base + PREFILL_ROWS(m_tiles) * head_dim),
          keys_low(keys + PREFILL_TILE * head_dim),
          values(keys_low + PREFILL_TILE * head_dim),
          coarse(reinterpret_cast<float *>(values + PREFILL_TILE * head_dim)),
          bias(coarse + head_dim),
          turned(bias + head_dim),
          codes(reinterpret_cast<char *>(turned + head_dim)),
          scales(codes + 2 * PREFILL_TILE * code_bytes)
    {
    }
};

/* A tile of one of the two caches. */
struct lowbit_tile {
    int32_t tile;
    bool in_window;
};

/* An item as the CTA sees it; in shared memory. `base.table` is the low-bit cache's. */
struct lowbit_item {
    prefill_item base;
    const int32_t *window_table;
    int32_t end_tile;                      /* low-bit tiles: base.first_tile .. end_tile - 1 */
    int32_t window_start;                  /* the first position of the sequence in the window's cache */
    int32_t window_first, window_end;      /* tiles of the window */
    uint32_t low_steps;                    /* of the kv head: bit s: step s of the keys' low parts counts */
    prefill_span spans[ATTENTION_WARPS];
};

static __device__ __forceinline__ int32_t split_of(int32_t tile) { return tile / PREFILL_SPLIT_TILES; }

/* Low-bit tiles of a split, then the window's, then the next split's. tile < 0: there is none. */
static __device__ __forceinline__ lowbit_tile first_from(const lowbit_item &it, int32_t low, int32_t window)
{
    const bool has_low = low < it.end_tile, has_window = window < it.window_end;
    if (has_low && (!has_window || split_of(low) <= split_of(window))) {
        return lowbit_tile{low, false};
    }
    return lowbit_tile{has_window ? window : -1, true};
}

static __device__ __forceinline__ lowbit_tile next_tile(const lowbit_item &it, lowbit_tile now)
{
    const int32_t split_begin = split_of(now.tile) * PREFILL_SPLIT_TILES;
    if (!now.in_window) {
        return first_from(it, now.tile + 1, max(it.window_first, split_begin));
    }
    /* The low-bit tiles of this split are done. */
    return first_from(it, max(it.base.first_tile, split_begin + PREFILL_SPLIT_TILES), now.tile + 1);
}

/* By threads 0 .. 3: fetches block numbers of the tile's runs of 16 positions. Like any cp.async of this thread. */
static __device__ __forceinline__ void fetch_tile_blocks(const attention_params &p, lowbit_item &it, lowbit_tile t,
                                                         int32_t parity)
{
    const int32_t first = t.tile * PREFILL_TILE + 16 * (int32_t)threadIdx.x;
    if (threadIdx.x < 4) {
        int32_t *to = &it.base.blocks[parity][threadIdx.x];
        /* Before window_start the window's table has no entries. */
        const int32_t begin = t.in_window ? max(it.base.item.kv_begin, it.window_start) : it.base.item.kv_begin;
        if (t.tile >= 0 && first < it.base.item.kv_end && first + 16 > begin) {
            copy_word(to, (t.in_window ? it.window_table : it.base.table) + (first >> p.block_shift));
        } else {
            *to = 0;
        }
    }
}

/* threadIdx.x, asked for anew, so that what follows from it is not kept in registers beside the rows' results. */
static __device__ __forceinline__ int thread_now()
{
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}

/* Codes, scale words and the rotation of a tile, as they are. What no row sees is left out, or garbage. Places in the cache
 * are counted in pieces of 16 bytes: there are fewer than 2^31. */
template <int head_dim, int m_tiles, bool nibbles>
static __device__ __forceinline__ void copy_codes(const attention_params &p, const lowbit_item &it, int32_t tile,
                                                  const int32_t *blocks, const lowbit_shared<head_dim, m_tiles> &m)
{
    constexpr int code_bytes = nibbles ? head_dim / 2 : head_dim, scale_bytes = nibbles ? head_dim / 16 : 2;
    constexpr int chunks = code_bytes / 16, rows = ATTENTION_THREADS / chunks;
    constexpr int scale_chunks = PREFILL_TILE / 16 * scale_bytes; /* 16 rows have scale_bytes of them */
    const int thread = thread_now(), in_block = (1 << p.block_shift) - 1;
    const int32_t head_rows = p.a.shape.num_kv_heads << p.block_shift, first_row = it.base.kv_head << p.block_shift;
    const int32_t scales_at = head_rows / 16 * code_bytes, block_size = scales_at + head_rows / 16 * scale_bytes;
    const int32_t begin = it.base.item.kv_begin - tile * PREFILL_TILE, end = it.base.item.kv_end - tile * PREFILL_TILE;
    const uint4 *k = static_cast<const uint4 *>(p.a.kv.k), *v = static_cast<const uint4 *>(p.a.kv.v);
    char *to = m.codes + thread * 16;
#pragma unroll
    for (int i = 0; i < PREFILL_TILE / rows; i++) {
        const int row = thread / chunks + i * rows;
        const int32_t from = blocks[row / 16] * block_size +
                             (first_row + ((tile * PREFILL_TILE + row) & in_block)) * chunks + thread % chunks;
        const bool seen = row >= begin && row < end;
        qf_cp_async_16_or_zero(to + i * ATTENTION_THREADS * 16, k + from, seen);
        qf_cp_async_16_or_zero(to + PREFILL_TILE * code_bytes + i * ATTENTION_THREADS * 16, v + from, seen);
    }
    if (thread < scale_chunks) {
        const int run = thread / scale_bytes;
        const int32_t from = blocks[run] * block_size + scales_at +
                             (first_row + ((tile * PREFILL_TILE + run * 16) & in_block)) / 16 * scale_bytes +
                             thread % scale_bytes;
        const bool seen = run * 16 + 16 > begin && run * 16 < end;
        qf_cp_async_16_or_zero(m.scales + thread * 16, k + from, seen);
        qf_cp_async_16_or_zero(m.scales + PREFILL_TILE * scale_bytes + thread * 16, v + from, seen);
    }
    if (p.a.kv.k_bias != NULL && thread < head_dim / 8) { /* cosines and sines of the same pairs: see turn_bias */
        const float *from = p.a.bias_coarse + (int64_t)tile * head_dim + 4 * thread;
        qf_cp_async_16(m.coarse + 4 * thread, from);
        qf_cp_async_16(m.coarse + head_dim / 2 + 4 * thread, from + head_dim / 2);
    }
}

template <int head_dim, int m_tiles>
static __device__ __forceinline__ void copy_codes(const attention_params &p, const lowbit_item &it, int32_t tile,
                                                  const int32_t *blocks, const lowbit_shared<head_dim, m_tiles> &m)
{
    if (p.a.kv.format >= QF_CUDA_KV_INT4) {
        copy_codes<head_dim, m_tiles, true>(p, it, tile, blocks, m);
    } else {
        copy_codes<head_dim, m_tiles, false>(p, it, tile, blocks, m);
    }
}

/* A tile of the 16-bit window, to its place: nothing is converted. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void copy_window_tile(const attention_params &p, const lowbit_item &it, int32_t tile,
                                                        const int32_t *blocks,
                                                        const lowbit_shared<head_dim, m_tiles> &m)
{
    constexpr int chunks = head_dim / 8;
    const int thread = thread_now();
    const int32_t begin = max(it.base.item.kv_begin, it.window_start) - tile * PREFILL_TILE;
    const int32_t end = it.base.item.kv_end - tile * PREFILL_TILE;
    const uint16_t *k = static_cast<const uint16_t *>(p.a.window_kv.k), *v = static_cast<const uint16_t *>(p.a.window_kv.v);
    for (int c = thread; c < PREFILL_TILE * chunks; c += ATTENTION_THREADS) {
        const int row = c / chunks;
        const int32_t head = blocks[row / 16] * p.a.shape.num_kv_heads + it.base.kv_head;
        const int32_t cache_row = (head << p.block_shift) + ((tile * PREFILL_TILE + row) & ((1 << p.block_shift) - 1));
        const int64_t from = (int64_t)cache_row * head_dim + (c % chunks) * 8;
        const bool seen = row >= begin && row < end;
        qf_cp_async_16_or_zero(m.keys + swizzled<head_dim>(row, c % chunks), k + from, seen);
        qf_cp_async_16_or_zero(m.values + swizzled<head_dim>(row, c % chunks), v + from, seen);
    }
}

#endif
