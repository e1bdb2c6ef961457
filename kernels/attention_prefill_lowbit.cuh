/* Attention of many rows over a low-bit cache: attention_prefill.cuh with tiles that are turned into bf16 on their way.
 *
 *   key(p) = dequant(stored) + R_p(b) f        b: the bias of k_proj, f: attention's factor, which the coarse table has
 *
 * b may be hundreds of times as large as what is stored, so a key rounded to bf16 would lose much of that. The sum is taken in
 * float32 and kept as two bf16 numbers, keys and keys_low; the second takes part in those steps of 16 columns only where b is
 * large (BIAS_LIMIT), for elsewhere its rounding is no more than what a 16-bit cache has. R_p = R_i R_p0 with p0 the
 * tile's first position: rows of two float32 tables.
 *
 * Shared memory: Q | keys | keys_low | values (bf16, swizzled) | codes of keys and values, their scales, as stored |
 * cosines and sines of p0 | b | R_p0(b). A tile is copied (cp.async) while the one before is used, and converted when all warps
 * have done with that: two barriers a tile. A thread converts the same columns j .. j + 7 and j + head_dim / 2 .. of some
 * keys, since a rotation mixes the two.
 *
 * A 16-bit window (window_tokens): rows read positions less than that behind them from a second, bf16 cache. Its tiles take
 * their turn within each QF_CUDA_SPLIT_TOKENS positions behind the low-bit ones, and the masks of the two kinds
 * complete each other; so what a row gets still depends on its position alone. */
#ifndef QF_ATTENTION_PREFILL_LOWBIT_CUH
#define QF_ATTENTION_PREFILL_LOWBIT_CUH

#include "attention_prefill_lowbit_convert.cuh"

#define BIAS_LIMIT 8.0f /* of a pair: such a key element is rounded by up to 0.016 */

/* x += what the keys' rounding left out. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void add_low_scores(const uint16_t *queries, const uint16_t *keys_low, uint32_t steps,
                                                      float (&x)[m_tiles][PREFILL_TILE / 8][4])
{
    const int lane = thread_now() % 32, warp = thread_now() / 32;
    const int q_row = warp * 16 * m_tiles + lane % 16, q_chunk = lane / 16;
    const int k_row = lane % 8 + lane / 16 * 8, k_chunk = lane / 8 % 2;
#pragma unroll 1
    for (int step = 0; step < head_dim / 16; step++) {
        if ((steps >> (step % (head_dim / 32)) & 1) == 0) {
            continue;
        }
        uint32_t q[m_tiles][4];
#pragma unroll
        for (int i = 0; i < m_tiles; i++) {
            qf_ldmatrix_x4(q[i], queries + swizzled<head_dim>(q_row + 16 * i, 2 * step + q_chunk));
        }
#pragma unroll
        for (int n = 0; n < PREFILL_TILE / 16; n++) {
            uint32_t k[4];
            qf_ldmatrix_x4(k, keys_low + swizzled<head_dim>(16 * n + k_row, 2 * step + k_chunk));
#pragma unroll
            for (int i = 0; i < m_tiles; i++) {
                qf_mma_bf16(x[i][2 * n], q[i], k[0], k[1]);
                qf_mma_bf16(x[i][2 * n + 1], q[i], k[2], k[3]);
            }
        }
    }
}

/* The kv head's bias to shared memory; and which steps need low parts. Ends without a barrier. */
template <int head_dim>
static __device__ __forceinline__ void load_bias(const attention_params &p, lowbit_item &it, float *bias)
{
    constexpr int half = head_dim / 2;
    const int j = threadIdx.x;
    if (j >= half) {
        return;
    }
    float low = 0.0f, high = 0.0f;
    if (p.a.kv.k_bias != NULL) {
        const float *from = p.a.kv.k_bias + it.base.kv_head * head_dim + j;
        low = __ldg(from);
        high = __ldg(from + half);
    }
    bias[j] = low;
    bias[half + j] = high;
    /* A NaN counts as large. */
    const uint32_t large = __ballot_sync(0xffffffffu, !(low * low + high * high < BIAS_LIMIT * BIAS_LIMIT));
    if (j % 32 == 0) {
        const uint32_t steps = (uint32_t)((large & 0xffffu) != 0) | (uint32_t)((large >> 16) != 0) << 1;
        atomicOr(&it.low_steps, steps << (j / 16));
    }
}

/* Positions begin .. end - 1 that the row at `position` reads from one of the caches. Neither end falls where the position
 * rises. */
struct lowbit_range {
    int32_t begin, end;
};

static __device__ __forceinline__ lowbit_range range_of(const attention_params &p, int32_t window_first, int32_t position,
                                                        bool in_window)
{
    const int32_t begin = position - p.window + 1;
    const int32_t border =
        p.a.window_tokens > 0 ? min(max(position - p.a.window_tokens, window_first - 1), position) + 1 : position + 1;
    return in_window ? lowbit_range{max(begin, border), position + 1} : lowbit_range{begin, border};
}

/* Scores of positions that a row does not read here: -inf. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void mask_ranges(const attention_params &p, const lowbit_item &it, lowbit_tile now,
                                                   const prefill_rows_state<head_dim, m_tiles> &s,
                                                   float (&x)[m_tiles][PREFILL_TILE / 8][4])
{
    const int32_t first = now.tile * PREFILL_TILE + 2 * (int32_t)(threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < m_tiles; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int32_t token = s.tokens >> (8 * (2 * i + h)) & 0xff;
            const lowbit_range r = range_of(p, it.window_start, it.base.item.first_position + token, now.in_window);
            const int32_t begin = r.begin - first, end = r.end - first;
#pragma unroll
            for (int n = 0; n < PREFILL_TILE / 8; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if (8 * n + e < begin || 8 * n + e >= end) {
                        x[i][n][2 * h + e] = -INFINITY;
                    }
                }
            }
        }
    }
}

template <int head_dim, int m_tiles>
static __device__ __forceinline__ void use_tile(const attention_params &p, const lowbit_item &it, lowbit_tile now,
                                                const lowbit_shared<head_dim, m_tiles> &m,
                                                prefill_rows_state<head_dim, m_tiles> &s)
{
    const prefill_span span = it.spans[threadIdx.x / 32];
    const lowbit_range head = range_of(p, it.window_start, span.first, now.in_window);
    const lowbit_range tail = range_of(p, it.window_start, span.last, now.in_window);
    const int32_t first = now.tile * PREFILL_TILE, end = first + PREFILL_TILE;
    if (!span.used || first >= tail.end || end <= head.begin) {
        return;
    }
    float x[m_tiles][PREFILL_TILE / 8][4];
    tile_scores<head_dim, m_tiles>(m.queries, m.keys, x);
    if (!now.in_window && it.low_steps != 0) {
        add_low_scores<head_dim, m_tiles>(m.queries, m.keys_low, it.low_steps, x);
    }
    if (first < tail.begin || end > head.end) {
        mask_ranges<head_dim, m_tiles>(p, it, now, s, x);
    }
    soften_rows<head_dim, m_tiles>(s, p.scale_log2, x);
    tile_values<head_dim, m_tiles>(s, m.values, x);
}

/* Behind a barrier that the CTA's copies have ended before: the tile as bf16, for all. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void prepare_tile(const attention_params &p, const lowbit_item &it, lowbit_tile now,
                                                    int32_t parity, const lowbit_shared<head_dim, m_tiles> &m)
{
    if (now.in_window) {
        copy_window_tile<head_dim, m_tiles>(p, it, now.tile, it.base.blocks[parity], m);
        qf_cp_async_commit();
        qf_cp_async_wait<0>();
    } else {
        convert_tile<head_dim, m_tiles>(p, it, now.tile, m);
    }
    __syncthreads();
}

/* The codes of the tile after this one, and the block numbers of the one after that, set out. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void prefetch_tiles(const attention_params &p, lowbit_item &it, lowbit_tile next,
                                                      int32_t parity, const lowbit_shared<head_dim, m_tiles> &m)
{
    if (next.tile < 0) {
        return;
    }
    if (!next.in_window) {
        copy_codes<head_dim, m_tiles>(p, it, next.tile, it.base.blocks[parity ^ 1], m);
    }
    fetch_tile_blocks(p, it, next_tile(it, next), parity);
    qf_cp_async_commit();
}

template <int head_dim, int m_tiles, bool invariant>
static __device__ __forceinline__ void lowbit_tiles(const attention_params &p, lowbit_item &it,
                                                    const lowbit_shared<head_dim, m_tiles> &m)
{
    prefill_rows_state<head_dim, m_tiles> s, total;
    clear<head_dim, m_tiles>(s);
    if (invariant) {
        clear<head_dim, m_tiles>(total);
    }
    it.spans[threadIdx.x / 32] = set_tokens<head_dim, m_tiles>(p, it.base, s); /* the same from each lane */
    lowbit_tile now = first_from(it, it.base.first_tile, it.window_first);
    fetch_tile_blocks(p, it, now, 0);
    fetch_tile_blocks(p, it, next_tile(it, now), 1);
    qf_cp_async_commit();
    copy_queries<head_dim, m_tiles>(p, it.base, m.queries);
    load_bias<head_dim>(p, it, m.bias);
    qf_cp_async_wait<0>();
    __syncthreads(); /* the first two tiles' blocks, the bias */
    if (!now.in_window) {
        copy_codes<head_dim, m_tiles>(p, it, now.tile, it.base.blocks[0], m);
        qf_cp_async_commit();
    }
    int32_t parity = 0;
#pragma unroll 1
    while (now.tile >= 0) {
        qf_cp_async_wait<0>();
        if (!now.in_window && p.a.kv.k_bias != NULL) {
            turn_bias<head_dim, m_tiles>(m);
        }
        __syncthreads(); /* the codes are there, and all warps have used the tile before */
        prepare_tile<head_dim, m_tiles>(p, it, now, parity, m);
        prefetch_tiles<head_dim, m_tiles>(p, it, next_tile(it, now), parity, m);
        use_tile<head_dim, m_tiles>(p, it, now, m, s);
        const lowbit_tile next = next_tile(it, now); /* found anew: registers are scarce */
        if (invariant && (next.tile < 0 || split_of(next.tile) != split_of(now.tile))) {
            end_split<head_dim, m_tiles>(total, s, p.scale_log2);
        }
        now = next;
        parity ^= 1;
    }
    if (invariant) {
        store_rows<head_dim, m_tiles>(p, it.base, total);
    } else {
        finish_sums<head_dim, m_tiles>(s, p.scale_log2);
        store_rows<head_dim, m_tiles>(p, it.base, s);
    }
}

/* By one thread: the item, and the tiles of both caches that its rows see. */
static __device__ __forceinline__ void open_item(const attention_params &p, int32_t unit, lowbit_item &it)
{
    const int32_t num_kv_heads = p.a.shape.num_kv_heads;
    prefill_item &base = it.base;
    base.unit = unit;
    base.item = load_item(p.a.items + p.a.prefill_offset + unit / num_kv_heads);
    base.kv_head = unit % num_kv_heads;
    base.first_tile = base.item.kv_begin / PREFILL_TILE;
    base.table = p.a.block_tables + __ldcg(p.a.block_table_start + base.item.seq);
    base.end_tile = (base.item.kv_end + PREFILL_TILE - 1) / PREFILL_TILE;
    it.low_steps = 0;
    it.end_tile = base.end_tile;
    it.window_table = NULL;
    it.window_start = it.window_first = it.window_end = 0;
    if (p.a.window_tokens > 0) {
        const int32_t first = base.item.first_position, last = first + base.item.num_rows - 1;
        it.window_start = __ldcg(p.a.window_first + base.item.seq);
        it.window_table = p.a.block_tables + __ldcg(p.a.window_table_start + base.item.seq);
        const int32_t end = min(range_of(p, it.window_start, last, false).end, base.item.kv_end);
        it.end_tile = (max(end, 0) + PREFILL_TILE - 1) / PREFILL_TILE;
        it.window_first = max(range_of(p, it.window_start, first, true).begin, base.item.kv_begin) / PREFILL_TILE;
        it.window_end = base.end_tile;
    }
}

template <int head_dim, int m_tiles, bool invariant>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_prefill_lowbit_kernel(const __grid_constant__ attention_params p)
{
    extern __shared__ __align__(128) uint16_t prefill_shared[];
    __shared__ lowbit_item it;
    qf_grid_launch_dependents();
    /* Items and tables were copied before the step's first kernel, an ordinary launch: they may be read at once. */
    const int32_t num_kv_heads = p.a.shape.num_kv_heads;
    if ((int32_t)blockIdx.x >= __ldcg(p.a.num_items + 1) * num_kv_heads) {
        qf_grid_dependency_wait(); /* a kernel's end implies its predecessor's */
    }
    const lowbit_shared<head_dim, m_tiles> m(prefill_shared, p.a.kv.format >= QF_CUDA_KV_INT4 ? head_dim / 2 : head_dim);
    for (int32_t unit = blockIdx.x; unit < __ldcg(p.a.num_items + 1) * num_kv_heads;
         unit = it.base.unit + gridDim.x) {
        __syncthreads(); /* shared memory is written anew */
        if (threadIdx.x == 0) {
            open_item(p, unit, it);
        }
        if (unit == (int32_t)blockIdx.x) {
            qf_grid_dependency_wait();
        }
        __syncthreads();
        lowbit_tiles<head_dim, m_tiles, invariant>(p, it, m);
        if (it.base.item.num_splits == 1) {
            zero_padding(p, it.base.item, it.base.kv_head);
        } else if (last_to_arrive(p, it.base.item.counter, it.base.kv_head, it.base.item.num_splits)) {
            merge_splits(p, it.base.item, it.base.kv_head);
        }
    }
}

#endif
