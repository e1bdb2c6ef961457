/* Attention of many rows: flash attention over the paged cache by mma.m16n8k16.
 *
 * The M rows of a CTA are (token, head of the group) pairs, token by token: row m is token m / group, head m % group. A
 * warp has 16 * m_tiles of them. Keys and values come in tiles of 64 positions, at multiples of 64:
 *
 *     S (M x 64) = Q K^T;  P = 2^(S scale - maximum);  O (M x head_dim) = O 2^(old maximum - maximum) + P V
 *
 * Shared memory: Q | K, K | V, V, rows of head_dim bf16 in chunks of 16 bytes; chunk c of row r stands at c ^ (r % 8),
 * so that the 8 rows of an ldmatrix lie in different banks. Tile i + 1 is copied (cp.async) while tile i is used; there
 * is one barrier a tile. The block numbers of tile i + 2 are fetched meanwhile.
 *
 * invariant: at each multiple of QF_CUDA_SPLIT_TOKENS the running result is put aside, merged with what came before,
 * and begun anew. What a row then gets depends on its position alone: tiles that it does not see leave its result as it
 * is (weights 0, a factor of 1). */
#ifndef QF_ATTENTION_PREFILL_CUH
#define QF_ATTENTION_PREFILL_CUH

#include "attention_merge.cuh"

#define PREFILL_TILE 64
#define PREFILL_SPLIT_TILES (QF_CUDA_SPLIT_TOKENS / PREFILL_TILE)

#define PREFILL_ROWS(m_tiles) (ATTENTION_WARPS * 16 * (m_tiles))

static inline size_t prefill_shared_bytes(int head_dim, int m_tiles)
{
    return sizeof(uint16_t) * head_dim * (PREFILL_ROWS(m_tiles) + 4 * PREFILL_TILE);
}

template <int head_dim> static __device__ __forceinline__ int swizzled(int row, int chunk)
{
    return row * head_dim + ((chunk ^ (row & 7)) * 8);
}

static __device__ __forceinline__ void copy_word(int32_t *shared, const int32_t *global)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(qf_shared_address(shared)), "l"(global) : "memory");
}

/* An item as the CTA sees it; in shared memory, for registers are scarce. */
struct prefill_item {
    qf_cuda_attention_item item;
    int32_t unit, kv_head, first_tile, end_tile;
    const int32_t *table;
    int32_t blocks[2][4]; /* of an even and an odd tile's four runs of 16 positions */
};

/* By threads 0 .. 3: fetches the tile's block numbers; 0 where a run is not seen. Like any cp.async of this thread. */
static __device__ __forceinline__ void fetch_blocks(const attention_params &p, prefill_item &it, int32_t tile)
{
    const int32_t first = tile * PREFILL_TILE + 16 * (int32_t)threadIdx.x;
    if (threadIdx.x < 4) {
        int32_t *to = &it.blocks[tile & 1][threadIdx.x];
        if (first < it.item.kv_end && first + 16 > it.item.kv_begin) {
            copy_word(to, it.table + (first >> p.block_shift));
        } else {
            *to = 0;
        }
    }
}

/* Keys and values of a tile; positions that no row sees become zeros, whatever the cache holds there. */
template <int head_dim>
static __device__ __forceinline__ void copy_tile(const attention_params &p, const prefill_item &it, int32_t tile,
                                                 uint16_t *keys, uint16_t *values)
{
    constexpr int chunks = head_dim / 8, step = ATTENTION_THREADS / chunks; /* rows copied at once: 8 or 16 */
    const int chunk = threadIdx.x % chunks, first_row = threadIdx.x / chunks;
    const uint16_t *k = static_cast<const uint16_t *>(p.a.kv.k) + first_row * head_dim + chunk * 8;
    const int64_t to_values = static_cast<const char *>(p.a.kv.v) - static_cast<const char *>(p.a.kv.k);
    const int to = swizzled<head_dim>(first_row, chunk);
    const int32_t begin = it.item.kv_begin - tile * PREFILL_TILE, end = it.item.kv_end - tile * PREFILL_TILE;
#pragma unroll
    for (int run = 0; run < PREFILL_TILE; run += 16) {
        /* A row of the layer's cache: there are fewer than 2^31. */
        const int32_t block = it.blocks[tile & 1][run / 16] * p.a.shape.num_kv_heads + it.kv_head;
        const int32_t cache_row =
            (block << p.block_shift) + ((tile * PREFILL_TILE + run) & ((1 << p.block_shift) - 1));
        const uint16_t *from = k + (int64_t)cache_row * head_dim;
#pragma unroll
        for (int row = run; row < run + 16; row += step) {
            const bool seen = row + first_row >= begin && row + first_row < end;
            const uint16_t *key = from + (row - run) * head_dim;
            qf_cp_async_16_or_zero(keys + to + row * head_dim, key, seen);
            qf_cp_async_16_or_zero(values + to + row * head_dim, reinterpret_cast<const char *>(key) + to_values, seen);
        }
    }
}

template <int head_dim, int m_tiles>
static __device__ __forceinline__ void copy_queries(const attention_params &p, const prefill_item &it, uint16_t *shared)
{
    constexpr int chunks = head_dim / 8, rows = ATTENTION_THREADS / chunks;
    const int chunk = threadIdx.x % chunks, used = it.item.num_rows * p.group;
    const uint16_t *q = static_cast<const uint16_t *>(p.a.q) + chunk * 8;
    for (int m = threadIdx.x / chunks; m < PREFILL_ROWS(m_tiles); m += rows) {
        const int token = m / p.group, head = it.kv_head * p.group + (m - token * p.group);
        const int64_t row = ((int64_t)(it.item.first_row + token) * p.a.shape.num_heads + head) * head_dim;
        qf_cp_async_16_or_zero(shared + swizzled<head_dim>(m, chunk), m < used ? q + row : q, m < used);
    }
}

/* A warp's rows. In m tile i, half h: row 16 i + 8 h + lane / 4 of the warp's. */
template <int head_dim, int m_tiles> struct prefill_rows_state {
    float o[m_tiles][head_dim / 8][4];
    float maximum[m_tiles][2], sum[m_tiles][2]; /* of raw scores; the sum is this lane's share */
    uint32_t tokens; /* byte 2 i + h: the row's token of the item's */
};

template <int head_dim, int m_tiles>
static __device__ __forceinline__ void clear(prefill_rows_state<head_dim, m_tiles> &s)
{
#pragma unroll
    for (int i = 0; i < m_tiles; i++) {
#pragma unroll
        for (int j = 0; j < head_dim / 8; j++) {
            s.o[i][j][0] = s.o[i][j][1] = s.o[i][j][2] = s.o[i][j][3] = 0.0f;
        }
        s.maximum[i][0] = s.maximum[i][1] = -INFINITY;
        s.sum[i][0] = s.sum[i][1] = 0.0f;
    }
}

template <int head_dim, int m_tiles>
static __device__ __forceinline__ void tile_scores(const uint16_t *queries, const uint16_t *keys,
                                                   float (&x)[m_tiles][PREFILL_TILE / 8][4])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int q_row = warp * 16 * m_tiles + lane % 16, q_chunk = lane / 16;
    const int k_row = lane % 8 + lane / 16 * 8, k_chunk = lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < m_tiles; i++) {
#pragma unroll
        for (int n = 0; n < PREFILL_TILE / 8; n++) {
            x[i][n][0] = x[i][n][1] = x[i][n][2] = x[i][n][3] = 0.0f;
        }
    }
#pragma unroll
    for (int step = 0; step < head_dim / 16; step++) {
        uint32_t q[m_tiles][4];
#pragma unroll
        for (int i = 0; i < m_tiles; i++) {
            qf_ldmatrix_x4(q[i], queries + swizzled<head_dim>(q_row + 16 * i, 2 * step + q_chunk));
        }
#pragma unroll
        for (int n = 0; n < PREFILL_TILE / 16; n++) {
            uint32_t k[4];
            qf_ldmatrix_x4(k, keys + swizzled<head_dim>(16 * n + k_row, 2 * step + k_chunk));
#pragma unroll
            for (int i = 0; i < m_tiles; i++) {
                qf_mma_bf16(x[i][2 * n], q[i], k[0], k[1]);
                qf_mma_bf16(x[i][2 * n + 1], q[i], k[2], k[3]);
            }
        }
    }
}

/* Scores of positions that a row does not see: -inf. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void mask_scores(const prefill_rows_state<head_dim, m_tiles> &s,
                                                   int32_t first_position, int32_t window, int32_t tile,
                                                   float (&x)[m_tiles][PREFILL_TILE / 8][4])
{
    const int32_t first = tile * PREFILL_TILE + 2 * (int32_t)(threadIdx.x % 4) - first_position;
#pragma unroll
    for (int i = 0; i < m_tiles; i++) {
#pragma unroll
        for (int n = 0; n < PREFILL_TILE / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int32_t token = s.tokens >> (8 * (2 * i + e / 2)) & 0xff;
                const int32_t behind = token - (first + 8 * n + e % 2);
                if (behind < 0 || behind >= window) {
                    x[i][n][e] = -INFINITY;
                }
            }
        }
    }
}

/* Scores to weights; what is there already is scaled to the new maximum. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void soften_rows(prefill_rows_state<head_dim, m_tiles> &s, float scale_log2,
                                                   float (&x)[m_tiles][PREFILL_TILE / 8][4])
{
#pragma unroll
    for (int i = 0; i < m_tiles; i++) {
        float factor[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float maximum = s.maximum[i][h];
#pragma unroll
            for (int n = 0; n < PREFILL_TILE / 8; n++) {
                maximum = fmaxf(maximum, fmaxf(x[i][n][2 * h], x[i][n][2 * h + 1]));
            }
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
            const float base = maximum == -INFINITY ? 0.0f : maximum; /* no position seen yet: all weights are 0 */
            factor[h] = power_of_two(__fmul_rn(s.maximum[i][h] - base, scale_log2));
            s.maximum[i][h] = maximum;
            const float shift = -__fmul_rn(base, scale_log2);
            float sum[2] = {0.0f, 0.0f};
#pragma unroll
            for (int n = 0; n < PREFILL_TILE / 8; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &v = x[i][n][2 * h + e];
                    v = power_of_two(__fmaf_rn(v, scale_log2, shift));
                    sum[e] += v;
                }
            }
            s.sum[i][h] = __fmaf_rn(s.sum[i][h], factor[h], sum[0] + sum[1]);
        }
        /* A factor of 1 changes nothing: leaving it out does not show. */
        if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int j = 0; j < head_dim / 8; j++) {
                s.o[i][j][0] *= factor[0];
                s.o[i][j][1] *= factor[0];
                s.o[i][j][2] *= factor[1];
                s.o[i][j][3] *= factor[1];
            }
        }
    }
}

template <int head_dim, int m_tiles>
static __device__ __forceinline__ void tile_values(prefill_rows_state<head_dim, m_tiles> &s, const uint16_t *values,
                                                   const float (&x)[m_tiles][PREFILL_TILE / 8][4])
{
    const int lane = threadIdx.x % 32, row = lane % 16, chunk = lane / 16;
#pragma unroll
    for (int step = 0; step < PREFILL_TILE / 16; step++) {
        uint32_t a[m_tiles][4];
#pragma unroll
        for (int i = 0; i < m_tiles; i++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float *pair = &x[i][2 * step + r / 2][2 * (r % 2)];
                a[i][r] = qf_pack_bf16(pair[0], pair[1]);
            }
        }
#pragma unroll
        for (int d = 0; d < head_dim / 16; d++) {
            uint32_t v[4];
            qf_ldmatrix_x4_trans(v, values + swizzled<head_dim>(16 * step + row, 2 * d + chunk));
#pragma unroll
            for (int i = 0; i < m_tiles; i++) {
                qf_mma_bf16(s.o[i][2 * d], a[i], v[0], v[1]);
                qf_mma_bf16(s.o[i][2 * d + 1], a[i], v[2], v[3]);
            }
        }
    }
}

/* The rows' sums over all lanes, and maxima in powers of two: what merges and the workspace take. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void finish_sums(prefill_rows_state<head_dim, m_tiles> &s, float scale_log2)
{
#pragma unroll
    for (int i = 0; i < m_tiles; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            s.sum[i][h] += __shfl_xor_sync(0xffffffffu, s.sum[i][h], 1);
            s.sum[i][h] += __shfl_xor_sync(0xffffffffu, s.sum[i][h], 2);
            s.maximum[i][h] = __fmul_rn(s.maximum[i][h], scale_log2);
        }
    }
}

/* total takes in the split that ends here, and the split begins anew. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void end_split(prefill_rows_state<head_dim, m_tiles> &total,
                                                 prefill_rows_state<head_dim, m_tiles> &s, float scale_log2)
{
    finish_sums<head_dim, m_tiles>(s, scale_log2);
#pragma unroll
    for (int i = 0; i < m_tiles; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (s.maximum[i][h] != -INFINITY) {
                const merge_weights w =
                    merge_split(total.maximum[i][h], total.sum[i][h], s.maximum[i][h], s.sum[i][h]);
#pragma unroll
                for (int j = 0; j < head_dim / 8; j++) {
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) {
                        total.o[i][j][e] = merge_value(total.o[i][j][e], s.o[i][j][e], w);
                    }
                }
            }
        }
    }
    clear<head_dim, m_tiles>(s);
}

/* Rows to the output, or to the workspace. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void store_rows(const attention_params &p, const prefill_item &it,
                                                  const prefill_rows_state<head_dim, m_tiles> &s)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, used = it.item.num_rows * p.group;
#pragma unroll
    for (int i = 0; i < m_tiles; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int m = (warp * m_tiles + i) * 16 + 8 * h + lane / 4;
            const int token = m / p.group, head = it.kv_head * p.group + (m - token * p.group);
            const int column = 2 * (lane % 4);
            if (m >= used) {
                continue;
            }
            if (it.item.num_splits == 1) {
                const float f = __frcp_rn(s.sum[i][h]);
#pragma unroll
                for (int j = 0; j < head_dim / 8; j++) {
                    *reinterpret_cast<uint32_t *>(
                        out_element(p, head * head_dim + 8 * j + column, it.item.first_row + token)) =
                        qf_pack_bf16(__fmul_rn(s.o[i][j][2 * h], f), __fmul_rn(s.o[i][j][2 * h + 1], f));
                }
            } else {
                float *unit = unit_of(p, it.item, it.item.split, token);
                float *values = unit_values(p, unit, head) + column;
                if (lane % 4 == 0) {
                    *reinterpret_cast<float2 *>(unit + 2 * head) = make_float2(s.maximum[i][h], s.sum[i][h]);
                }
#pragma unroll
                for (int j = 0; j < head_dim / 8; j++) {
                    *reinterpret_cast<float2 *>(values + 8 * j) = make_float2(s.o[i][j][2 * h], s.o[i][j][2 * h + 1]);
                }
            }
        }
    }
}

/* Positions of the warp's first and last row; rows beyond the item's count as its last one and are not stored. */
struct prefill_span {
    int32_t first, last;
    bool used;
};

template <int head_dim, int m_tiles>
static __device__ __forceinline__ prefill_span set_tokens(const attention_params &p, const prefill_item &it,
                                                             prefill_rows_state<head_dim, m_tiles> &s)
{
    const int lane = threadIdx.x % 32, m0 = threadIdx.x / 32 * 16 * m_tiles;
    const int32_t first = it.item.first_position, last_token = it.item.num_rows - 1;
    s.tokens = 0;
#pragma unroll
    for (int r = 0; r < 2 * m_tiles; r++) {
        s.tokens |= (uint32_t)min((m0 + 8 * r + lane / 4) / p.group, last_token) << (8 * r);
    }
    return prefill_span{first + min(m0 / p.group, last_token),
                        first + min((m0 + 16 * m_tiles - 1) / p.group, last_token),
                        m0 < it.item.num_rows * p.group};
}

template <int head_dim, int m_tiles, bool invariant>
static __device__ __forceinline__ void prefill_tiles(const attention_params &p, prefill_item &it, uint16_t *shared)
{
    constexpr int tile_size = PREFILL_TILE * head_dim;
    uint16_t *queries = shared, *keys = queries + PREFILL_ROWS(m_tiles) * head_dim, *values = keys + 2 * tile_size;
    prefill_rows_state<head_dim, m_tiles> s, total;
    clear<head_dim, m_tiles>(s);
    if (invariant) {
        clear<head_dim, m_tiles>(total);
    }
    const prefill_span span = set_tokens<head_dim, m_tiles>(p, it, s);
    fetch_blocks(p, it, it.first_tile);
    fetch_blocks(p, it, it.first_tile + 1);
    qf_cp_async_commit();
    copy_queries<head_dim, m_tiles>(p, it, queries);
    qf_cp_async_wait<0>();
    __syncthreads(); /* the first two tiles' blocks */
    copy_tile<head_dim>(p, it, it.first_tile, keys + (it.first_tile & 1) * tile_size,
                        values + (it.first_tile & 1) * tile_size);
    qf_cp_async_commit();
#pragma unroll 1
    for (int32_t tile = it.first_tile; tile < it.end_tile; tile++) {
        qf_cp_async_wait<0>();
        __syncthreads(); /* the tile is there, and all warps have used the one before */
        if (tile + 1 < it.end_tile) {
            const int other = (~tile & 1) * tile_size;
            copy_tile<head_dim>(p, it, tile + 1, keys + other, values + other);
            fetch_blocks(p, it, tile + 2);
            qf_cp_async_commit();
        }
        const int32_t first = tile * PREFILL_TILE, last = first + PREFILL_TILE - 1;
        if (span.used && first <= span.last && span.first - last < p.window) {
            float x[m_tiles][PREFILL_TILE / 8][4];
            tile_scores<head_dim, m_tiles>(queries, keys + (tile & 1) * tile_size, x);
            if (last > span.first || span.last - first >= p.window) {
                mask_scores<head_dim, m_tiles>(s, it.item.first_position, p.window, tile, x);
            }
            soften_rows<head_dim, m_tiles>(s, p.scale_log2, x);
            tile_values<head_dim, m_tiles>(s, values + (tile & 1) * tile_size, x);
        }
        if (invariant && ((tile + 1) % PREFILL_SPLIT_TILES == 0 || tile + 1 == it.end_tile)) {
            end_split<head_dim, m_tiles>(total, s, p.scale_log2);
        }
    }
    if (invariant) {
        store_rows<head_dim, m_tiles>(p, it, total);
    } else {
        finish_sums<head_dim, m_tiles>(s, p.scale_log2);
        store_rows<head_dim, m_tiles>(p, it, s);
    }
}

template <int head_dim, int m_tiles, bool invariant>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_prefill_kernel(const __grid_constant__ attention_params p)
{
    extern __shared__ __align__(128) uint16_t prefill_shared[];
    __shared__ prefill_item it;
    qf_grid_launch_dependents();
    /* Items and tables were copied before the step's first kernel, an ordinary launch: they may be read at once. */
    const int32_t num_kv_heads = p.a.shape.num_kv_heads;
    if ((int32_t)blockIdx.x >= __ldcg(p.a.num_items + 1) * num_kv_heads) {
        qf_grid_dependency_wait(); /* a kernel's end implies its predecessor's */
    }
    for (int32_t unit = blockIdx.x; unit < __ldcg(p.a.num_items + 1) * num_kv_heads; unit = it.unit + gridDim.x) {
        __syncthreads(); /* shared memory is written anew */
        if (threadIdx.x == 0) {
            it.unit = unit;
            it.item = load_item(p.a.items + p.a.prefill_offset + unit / num_kv_heads);
            it.kv_head = unit % num_kv_heads;
            it.first_tile = it.item.kv_begin / PREFILL_TILE;
            it.end_tile = (it.item.kv_end + PREFILL_TILE - 1) / PREFILL_TILE;
            it.table = p.a.block_tables + __ldcg(p.a.block_table_start + it.item.seq);
        }
        if (unit == (int32_t)blockIdx.x) {
            qf_grid_dependency_wait();
        }
        __syncthreads();
        prefill_tiles<head_dim, m_tiles, invariant>(p, it, prefill_shared);
        if (it.item.num_splits == 1) {
            zero_padding(p, it.item, it.kv_head);
        } else if (last_to_arrive(p, it.item.counter, it.kv_head, it.item.num_splits)) {
            merge_splits(p, it.item, it.kv_head);
        }
    }
}

#endif
