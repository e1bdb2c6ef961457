/* Attention of single rows: one new token of a sequence against a run of its positions.
 *
 * A warp takes 16 positions at a time, keys and values straight from memory to registers as the A operands of
 * mma.m16n8k16; the heads of the group are the 8 (or twice 8) columns:
 *
 *     S^T (16 positions x 8 heads) = K (16 x head_dim) Q^T        O^T (head_dim x 8 heads) += V^T (head_dim x 16) P^T
 *
 * so a key or value element is read once for all heads of the group. Sums over k may run in any order if both operands
 * agree: lane (g, t) of a warp (g = lane / 4, t = lane % 4) loads 16 bytes of row g at column 32 c + 8 t, and its four
 * words are the k pairs of two steps. Of values it loads columns 64 c + 8 g .. + 7 of positions 2t, 2t + 1, 2t + 8, 2t
 * + 9, and pairs neighbouring positions by byte permutes: row g of tile 4 c + w is column 64 c + 8 g + 2 w, row g + 8
 * the next one. P^T comes from S^T by two 8 x 8 transposes within the warp. */
#ifndef QF_ATTENTION_DECODE_CUH
#define QF_ATTENTION_DECODE_CUH

#include "attention_decode_merge.cuh"

#define DECODE_TILE 16

/* Volatile: the order of loads and products is the one written. Not the read-only path: the kernel before wrote these.
 * */
static __device__ __forceinline__ uint4 load_now(const uint16_t *p)
{
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

/* What a warp holds of its item. heads8: groups of 8 heads. */
template <int head_dim, int heads8> struct decode_state {
    uint4 *q; /* in shared memory, this lane's: [32 (head_dim / 32 n + c)] is head 8 n + g, columns 32 c + 8 t .. */
    uint4 k[2][head_dim / 32];       /* positions g and g + 8 */
    uint4 v[4][head_dim / 64];       /* positions 2t, 2t + 1, 2t + 8, 2t + 9 */
    float o[heads8][head_dim / 16][4];
    float maximum[heads8][2], sum[heads8][2]; /* heads 2t, 2t + 1: the maximum of the warp, the sum of this lane */
};

struct decode_range {
    int32_t begin, end; /* positions */
    const uint16_t *k, *v; /* the kv head's part of block 0 */
    int64_t block_stride;
    int32_t block_mask;
};

/* Row of position `position`, which is moved to the nearest of the tile's that is seen. Masks tell them apart. */
template <int head_dim>
static __device__ __forceinline__ int32_t row_offset(const decode_range &r, int32_t first, int32_t i)
{
    const int32_t position = min(max(first + i, r.begin), r.end - 1);
    return (position & r.block_mask) * head_dim;
}

template <int head_dim, int heads8>
static __device__ __forceinline__ void load_keys(decode_state<head_dim, heads8> &s, const decode_range &r,
                                                 int32_t first, int32_t block)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint16_t *from = r.k + block * r.block_stride + 8 * t;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint16_t *row = from + row_offset<head_dim>(r, first, g + 8 * h);
#pragma unroll
        for (int c = 0; c < head_dim / 32; c++) {
            s.k[h][c] = load_now(row + 32 * c);
        }
    }
}

template <int head_dim, int heads8>
static __device__ __forceinline__ void load_values(decode_state<head_dim, heads8> &s, const decode_range &r,
                                                   int32_t first, int32_t block)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint16_t *from = r.v + block * r.block_stride + 8 * g;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint16_t *row = from + row_offset<head_dim>(r, first, 2 * t + (i & 1) + 8 * (i >> 1));
#pragma unroll
        for (int c = 0; c < head_dim / 64; c++) {
            s.v[i][c] = load_now(row + 64 * c);
        }
    }
}

/* S^T of the tile. */
template <int head_dim, int heads8>
static __device__ __forceinline__ void scores(const decode_state<head_dim, heads8> &s, float (&x)[heads8][4])
{
#pragma unroll
    for (int n = 0; n < heads8; n++) {
        x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.0f;
    }
#pragma unroll
    for (int c = 0; c < head_dim / 32; c++) {
        const uint32_t low[4] = {s.k[0][c].x, s.k[1][c].x, s.k[0][c].y, s.k[1][c].y};
        const uint32_t high[4] = {s.k[0][c].z, s.k[1][c].z, s.k[0][c].w, s.k[1][c].w};
#pragma unroll
        for (int n = 0; n < heads8; n++) {
            const uint4 q = s.q[32 * (head_dim / 32 * n + c)];
            qf_mma_bf16(x[n], low, q.x, q.y);
            qf_mma_bf16(x[n], high, q.z, q.w);
        }
    }
}

/* Scores to weights, as the B operand of the values' product: p[n] = positions 2t.., 2t + 8.. of head g. */
template <int head_dim, int heads8>
static __device__ __forceinline__ void soften(decode_state<head_dim, heads8> &s, const decode_range &r, int32_t first,
                                              float scale_log2, float (&x)[heads8][4], uint32_t (&p)[heads8][2])
{
    const int g = threadIdx.x % 32 / 4;
    const bool seen[2] = {first + g >= r.begin && first + g < r.end, first + g + 8 >= r.begin && first + g + 8 < r.end};
#pragma unroll
    for (int n = 0; n < heads8; n++) {
        float scale[2];
#pragma unroll
        for (int e = 0; e < 2; e++) { /* a tile has a position that is seen, so the maximum is finite */
            x[n][e] = seen[0] ? x[n][e] * scale_log2 : -INFINITY;
            x[n][e + 2] = seen[1] ? x[n][e + 2] * scale_log2 : -INFINITY;
            float maximum = fmaxf(x[n][e], x[n][e + 2]);
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) {
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
            }
            maximum = fmaxf(s.maximum[n][e], maximum);
            scale[e] = power_of_two(s.maximum[n][e] - maximum);
            s.maximum[n][e] = maximum;
            x[n][e] = power_of_two(x[n][e] - maximum);
            x[n][e + 2] = power_of_two(x[n][e + 2] - maximum);
            s.sum[n][e] = s.sum[n][e] * scale[e] + (x[n][e] + x[n][e + 2]);
        }
#pragma unroll
        for (int i = 0; i < head_dim / 16; i++) {
            s.o[n][i][0] *= scale[0];
            s.o[n][i][1] *= scale[1];
            s.o[n][i][2] *= scale[0];
            s.o[n][i][3] *= scale[1];
        }
        p[n][0] = qf_movmatrix_trans(qf_pack_bf16(x[n][0], x[n][1]));
        p[n][1] = qf_movmatrix_trans(qf_pack_bf16(x[n][2], x[n][3]));
    }
}

static __device__ __forceinline__ uint32_t word_of(const uint4 &v, int w)
{
    return w == 0 ? v.x : w == 1 ? v.y : w == 2 ? v.z : v.w;
}

template <int head_dim, int heads8>
static __device__ __forceinline__ void weigh_values(decode_state<head_dim, heads8> &s, const uint32_t (&p)[heads8][2])
{
#pragma unroll
    for (int c = 0; c < head_dim / 64; c++) {
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const uint32_t v0 = word_of(s.v[0][c], w), v1 = word_of(s.v[1][c], w);
            const uint32_t v2 = word_of(s.v[2][c], w), v3 = word_of(s.v[3][c], w);
            const uint32_t a[4] = {__byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632),
                                   __byte_perm(v2, v3, 0x5410), __byte_perm(v2, v3, 0x7632)};
#pragma unroll
            for (int n = 0; n < heads8; n++) {
                qf_mma_bf16(s.o[n][4 * c + w], a, p[n][0], p[n][1]);
            }
        }
    }
}

template <int head_dim, int heads8>
static __device__ __forceinline__ void clear(decode_state<head_dim, heads8> &s)
{
#pragma unroll
    for (int n = 0; n < heads8; n++) {
#pragma unroll
        for (int i = 0; i < head_dim / 16; i++) {
            s.o[n][i][0] = s.o[n][i][1] = s.o[n][i][2] = s.o[n][i][3] = 0.0f;
        }
        s.maximum[n][0] = s.maximum[n][1] = -INFINITY;
        s.sum[n][0] = s.sum[n][1] = 0.0f;
    }
}

/* The warp's share of the item: tiles warp, warp + 4, ... of it. The next tile's keys are on their way from when this
 * one's have been used, and so are its values.
 *
 * first_unit: the CTA's first, which has the wait for the kernel before in it. Block tables, and keys and values of
 * positions before the row's own, were written before this step's first kernel, which is launched the ordinary way: so
 * they are loaded before the wait. The row's own position and its query come from the kernel before. */
template <int head_dim, int heads8>
static __device__ __forceinline__ void decode_warp(const attention_params &p, const qf_cuda_attention_item &item,
                                                   int32_t kv_head, bool first_unit,
                                                   decode_state<head_dim, heads8> &s)
{
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t head_stride = (int64_t)head_dim << p.block_shift;
    const decode_range r = {item.kv_begin,
                            item.kv_end,
                            static_cast<const uint16_t *>(p.a.kv.k) + kv_head * head_stride,
                            static_cast<const uint16_t *>(p.a.kv.v) + kv_head * head_stride,
                            p.a.shape.num_kv_heads * head_stride,
                            (1 << p.block_shift) - 1};
    const int32_t *table = p.a.block_tables + __ldcg(p.a.block_table_start + item.seq);
    const int32_t end = (r.end + DECODE_TILE - 1) / DECODE_TILE;
    const int32_t start = r.begin / DECODE_TILE + (int32_t)(threadIdx.x / 32);
    const uint16_t *q = static_cast<const uint16_t *>(p.a.q) +
                        ((int64_t)item.first_row * p.a.shape.num_heads + kv_head * p.group) * head_dim + 8 * t;
    /* Lane i knows the block of the warp's i-th tile of the next 32. */
    const int32_t shift = p.block_shift - 4;
    int32_t blocks = __ldcg(table + (min(start + ATTENTION_WARPS * lane, end - 1) >> shift));
    int32_t block = __shfl_sync(0xffffffffu, blocks, 0);
    const bool early = (start + 1) * DECODE_TILE <= item.first_position;
    if (first_unit && !early) {
        qf_grid_dependency_wait();
    }
    load_keys<head_dim, heads8>(s, r, start * DECODE_TILE, block); /* not used if start >= end */
    load_values<head_dim, heads8>(s, r, start * DECODE_TILE, block);
    if (first_unit && early) {
        qf_grid_dependency_wait();
    }
    clear<head_dim, heads8>(s);
    if (start >= end) {
        return;
    }
#pragma unroll
    for (int n = 0; n < heads8; n++) {
#pragma unroll
        for (int c = 0; c < head_dim / 32; c++) {
            const int head = 8 * n + g;
            s.q[32 * (head_dim / 32 * n + c)] =
                head < p.group ? load_now(q + head * head_dim + 32 * c) : make_uint4(0, 0, 0, 0);
        }
    }
#pragma unroll 1
    for (int32_t i = 0, tile = start; tile < end; i++, tile += ATTENTION_WARPS) {
        const int32_t next = tile + ATTENTION_WARPS;
        float x[heads8][4];
        uint32_t weights[heads8][2];
        if ((i + 1) % 32 == 0) {
            blocks = __ldcg(table + (min(next + ATTENTION_WARPS * lane, end - 1) >> shift));
        }
        block = __shfl_sync(0xffffffffu, blocks, (i + 1) % 32);
        scores<head_dim, heads8>(s, x);
        if (next < end) {
            load_keys<head_dim, heads8>(s, r, next * DECODE_TILE, block);
        }
        soften<head_dim, heads8>(s, r, tile * DECODE_TILE, p.scale_log2, x, weights);
        weigh_values<head_dim, heads8>(s, weights);
        if (next < end) {
            load_values<head_dim, heads8>(s, r, next * DECODE_TILE, block);
        }
    }
#pragma unroll
    for (int n = 0; n < heads8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) {
                s.sum[n][e] += __shfl_xor_sync(0xffffffffu, s.sum[n][e], offset);
            }
        }
    }
}

/* The warps' results in shared memory; rows of heads padded against bank conflicts. */
template <int head_dim, int heads8> struct decode_shared {
    float maximum[ATTENTION_WARPS][8 * heads8], sum[ATTENTION_WARPS][8 * heads8];
    __align__(16) float values[ATTENTION_WARPS][8 * heads8][head_dim + 4];
};

template <int head_dim, int heads8>
static __device__ __forceinline__ void put_warp(const decode_state<head_dim, heads8> &s,
                                                decode_shared<head_dim, heads8> &shared)
{
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < heads8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int head = 8 * n + 2 * t + e;
            if (g == 0) {
                shared.maximum[warp][head] = s.maximum[n][e];
                shared.sum[warp][head] = s.sum[n][e];
            }
#pragma unroll
            for (int i = 0; i < head_dim / 16; i += 2) { /* tiles 4 c + w: columns 64 c + 8 g + 2 w .. + 3 */
                *reinterpret_cast<float4 *>(&shared.values[warp][head][64 * (i / 4) + 8 * g + 2 * (i % 4)]) =
                    make_float4(s.o[n][i][e], s.o[n][i][e + 2], s.o[n][i + 1][e], s.o[n][i + 1][e + 2]);
            }
        }
    }
}

/* Merges the warps in order; the item's result goes out, or to the workspace. */
template <int head_dim, int heads8>
static __device__ __forceinline__ void merge_warps(const attention_params &p, const qf_cuda_attention_item &item,
                                                   int32_t kv_head, const decode_shared<head_dim, heads8> &shared)
{
    for (int32_t i = threadIdx.x; i < p.group * (head_dim / 4); i += ATTENTION_THREADS) {
        const int32_t local = i / (head_dim / 4), d = i % (head_dim / 4) * 4, head = kv_head * p.group + local;
        float maximum = shared.maximum[0][local], sum = 0.0f; /* warp 0 has a position, others may have none: -inf */
        float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 1; w < ATTENTION_WARPS; w++) {
            maximum = fmaxf(maximum, shared.maximum[w][local]);
        }
#pragma unroll
        for (int w = 0; w < ATTENTION_WARPS; w++) {
            add_weighted(acc, sum, *reinterpret_cast<const float4 *>(&shared.values[w][local][d]),
                         shared.sum[w][local], power_of_two(shared.maximum[w][local] - maximum));
        }
        if (item.num_splits == 1) {
            store_out(p, head * head_dim + d, item.first_row, acc, sum);
        } else {
            float *unit = unit_of(p, item, item.split, 0);
            *reinterpret_cast<float4 *>(unit_values(p, unit, head) + d) = acc;
            if (d == 0) {
                *reinterpret_cast<float2 *>(unit + 2 * head) = make_float2(maximum, sum);
            }
        }
    }
}
template <int head_dim, int heads8>
static __global__ void __launch_bounds__(ATTENTION_THREADS, heads8 == 1 ? 3 : 2)
    attention_decode_kernel(const __grid_constant__ attention_params p)
{
    __shared__ decode_shared<head_dim, heads8> shared;
    __shared__ qf_cuda_attention_item shared_item; /* for what comes after the products: registers are scarce */
    qf_grid_launch_dependents();
    /* Items were copied before the step's first kernel, as decode_warp says of tables. The grid is no larger than the
     * array, so that the first item is loaded before it is known to be there. */
    const int32_t num_kv_heads = p.a.shape.num_kv_heads, num_items = __ldcg(p.a.num_items);
    int32_t unit = blockIdx.x;
    qf_cuda_attention_item item = load_item(p.a.items + unit / num_kv_heads);
    if (unit >= num_items * num_kv_heads) {
        qf_grid_dependency_wait(); /* a kernel's end implies its predecessor's */
        return;
    }
    for (;;) {
        const int32_t kv_head = unit % num_kv_heads;
        decode_state<head_dim, heads8> s;
        if (threadIdx.x == 0) {
            shared_item = item;
        }
        /* A warp's queries stand where its results will. */
        s.q = reinterpret_cast<uint4 *>(shared.values[threadIdx.x / 32]) + threadIdx.x % 32;
        decode_warp<head_dim, heads8>(p, item, kv_head, unit == (int32_t)blockIdx.x, s);
        __syncwarp();
        put_warp<head_dim, heads8>(s, shared);
        __syncthreads();
        merge_warps<head_dim, heads8>(p, shared_item, kv_head, shared);
        if (shared_item.num_splits == 1) {
            zero_padding(p, shared_item, kv_head);
        } else {
            merge_item<head_dim>(p, shared_item, kv_head);
        }
        unit += gridDim.x;
        if (unit >= __ldcg(p.a.num_items) * num_kv_heads) {
            return;
        }
        item = load_item(p.a.items + unit / num_kv_heads);
        __syncthreads(); /* shared is written anew */
    }
}

#endif
