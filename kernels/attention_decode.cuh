/* Attention of single rows: one new token of a sequence against a run of its positions.
 *
 * A warp takes 16 positions at a time, keys and values as the A operands of mma.m16n8k16; the heads of the group are the
 * 8 (or twice 8) columns:
 *
 *     S^T (16 positions x 8 heads) = K (16 x head_dim) Q^T        O^T (head_dim x 8 heads) += V^T (head_dim x 16) P^T
 *
 * so a key or value element is read once for all heads of the group. Sums over k may run in any order if both operands
 * agree: lane (g, t) of a warp (g = lane / 4, t = lane % 4) takes 16 bytes of row g at column 32 c + 8 t, and its four
 * words are the k pairs of two steps. Of values it takes columns head_dim / 8 g .. of positions 2t, 2t + 1, 2t + 8, 2t
 * + 9, and pairs neighbouring positions by byte permutes: row g of tile 4 c + w is column head_dim / 8 g + 8 c + 2 w,
 * row g + 8 the next one. P^T comes from S^T by two 8 x 8 transposes within the warp.
 *
 * What is on its way from memory lands in shared memory, by asynchronous copies past L1, in a ring of each warp's own:
 *
 *     16 rows of keys | the same rows of values | keys | values | ..     as they stand in memory; a unit is 8 KB of them
 *
 * 2 CTAs share a multiprocessor, with 3 units a warp where there is room (192 KB), 2 on compute capability 8.0, 1 on 8.6 and
 * 8.9. The kernel asks for all shared memory, as the linear layers do: kernels that want L1 cut differently never overlap.
 * The warps' results stand where their rings were.
 *
 * Rows stand in the same banks. So lanes of odd g read keys, and lanes of odd t values, in the other order, two pieces at a
 * time, and exchange them in registers: no bank is asked twice for keys, and twice for values (4 times if head_dim is 64). */
#ifndef QF_ATTENTION_DECODE_CUH
#define QF_ATTENTION_DECODE_CUH

#include "attention_decode_merge.cuh"

#define DECODE_TILE 16
#define DECODE_CTAS 2                /* on a multiprocessor: csrc/backend/cuda/memory.c counts on it */
#define DECODE_UNIT_BYTES (8 * 1024) /* of a warp's ring */
#define DECODE_UNITS 3               /* of a ring at most; of so many that there is no room for another CTA */
/* At most: a CTA's static shared memory, and what the system takes for it. */
#define DECODE_OTHER_BYTES (3 * 1024)

/* Sizes of one head_dim. */
template <int head_dim> struct decode_sizes {
    static constexpr int part = DECODE_TILE * head_dim / 8;           /* 16-byte pieces of a tile's keys, or values */
    static constexpr int unit = DECODE_UNIT_BYTES / (2 * part * 16);  /* tiles in a unit of the ring */
    static constexpr int result_row = head_dim + 4;                   /* floats: padded against bank conflicts */
};

/* Past the read-only path: the kernel before wrote these. */
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
    uint4 q[heads8][head_dim / 32]; /* head 8 n + g, columns 32 c + 8 t .. */
    float o[heads8][head_dim / 16][4];
    float maximum[heads8][2], sum[heads8][2]; /* heads 2t, 2t + 1: the maximum of the warp, the sum of this lane */
};

struct decode_range {
    int32_t begin, end; /* positions */
    const uint16_t *k, *v; /* the kv head's part of block 0 */
    int64_t block_stride;
    int32_t block_mask;
};

/* Where a tile's rows start. */
template <int head_dim>
static __device__ __forceinline__ int64_t offset_of(const decode_range &r, int32_t tile, int32_t block)
{
    return block * r.block_stride + (tile * DECODE_TILE & r.block_mask) * head_dim;
}

/* Sends for a part of a tile, if there is such a tile: a piece of 16 bytes for each lane at a time, in the order of
 * memory. All lanes have read what stood there. */
template <int head_dim>
static __device__ __forceinline__ void send_for(const uint16_t *from, uint4 *to, bool there)
{
    if (there) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < decode_sizes<head_dim>::part; i += 32) {
            qf_cp_async_16(to + i + lane, from + (i + lane) * 8);
        }
    }
    qf_cp_async_commit(); /* even if there is nothing in it: groups are counted */
}

/* Keys and values of a tile are a group of copies each. The oldest group has come when no more are on their way than the
 * ring holds besides. */
template <int head_dim> static __device__ __forceinline__ void wait_for_oldest(int32_t depth)
{
    constexpr int unit = decode_sizes<head_dim>::unit;
    if (depth == 3 * unit) {
        qf_cp_async_wait<6 * unit - 1>();
    } else if (depth == 2 * unit) {
        qf_cp_async_wait<4 * unit - 1>();
    } else {
        qf_cp_async_wait<2 * unit - 1>();
    }
    __syncwarp();
}

/* Values of positions that are not seen become zero: what stands there may be no number. */
template <int head_dim>
static __device__ __forceinline__ void clear_unseen(const decode_range &r, int32_t first, uint4 *values)
{
    if (first >= r.begin && first + DECODE_TILE <= r.end) {
        return;
    }
    for (int i = threadIdx.x % 32; i < decode_sizes<head_dim>::part; i += 32) {
        const int32_t position = first + i / (head_dim / 8);
        if (position < r.begin || position >= r.end) {
            values[i] = make_uint4(0, 0, 0, 0);
        }
    }
    __syncwarp();
}

static __device__ __forceinline__ void exchange(bool wanted, uint4 &a, uint4 &b)
{
    const uint4 c = a;
    a = wanted ? b : a;
    b = wanted ? c : b;
}

/* S^T of the tile. */
template <int head_dim, int heads8>
static __device__ __forceinline__ void scores(const decode_state<head_dim, heads8> &s, const uint4 *keys,
                                              float (&x)[heads8][4])
{
#pragma unroll
    for (int n = 0; n < heads8; n++) {
        x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.0f;
    }
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, odd = g & 1;
    const uint4 *rows[2] = {keys + g * (head_dim / 8) + t, keys + (g + 8) * (head_dim / 8) + t};
#pragma unroll
    for (int c = 0; c < head_dim / 32; c += 2) { /* rows stand in the same banks: odd ones are read the other way round */
        uint4 k[2][2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            k[0][h] = rows[h][4 * c + 4 * odd];
            k[1][h] = rows[h][4 * c + 4 - 4 * odd];
            exchange(odd, k[0][h], k[1][h]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t low[4] = {k[i][0].x, k[i][1].x, k[i][0].y, k[i][1].y};
            const uint32_t high[4] = {k[i][0].z, k[i][1].z, k[i][0].w, k[i][1].w};
#pragma unroll
            for (int n = 0; n < heads8; n++) {
                qf_mma_bf16(x[n], low, s.q[n][c + i].x, s.q[n][c + i].y);
                qf_mma_bf16(x[n], high, s.q[n][c + i].z, s.q[n][c + i].w);
            }
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
static __device__ __forceinline__ void weigh_values(decode_state<head_dim, heads8> &s, const uint4 *values,
                                                    const uint32_t (&p)[heads8][2])
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, odd = t & 1;
    uint4 v[head_dim / 64][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 *row = values + (2 * t + (i & 1) + 8 * (i >> 1)) * (head_dim / 8) + head_dim / 64 * g;
        if constexpr (head_dim == 128) { /* as with keys */
            v[0][i] = row[odd];
            v[1][i] = row[1 - odd];
            exchange(odd, v[0][i], v[1][i]);
        } else {
            v[0][i] = row[0];
        }
    }
#pragma unroll
    for (int c = 0; c < head_dim / 64; c++) {
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const uint32_t v0 = word_of(v[c][0], w), v1 = word_of(v[c][1], w);
            const uint32_t v2 = word_of(v[c][2], w), v3 = word_of(v[c][3], w);
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

/* The warp's share of the item: tiles warp, warp + 4, ... of it. A tile's keys make room for those of the tile `depth`
 * turns on when they have been used, and so do its values.
 *
 * first_unit: the CTA's first, which has the wait for the kernel before in it. Block tables, and keys and values of
 * positions before the row's own, were written before this step's first kernel, which is launched the ordinary way: so
 * they are copied before the wait. The row's own position and its query come from the kernel before. */
template <int head_dim, int heads8>
static __device__ __forceinline__ void decode_warp(const attention_params &p, const qf_cuda_attention_item &item,
                                                   int32_t kv_head, bool first_unit, int32_t depth, uint4 *ring,
                                                   decode_state<head_dim, heads8> &s)
{
    constexpr int part = decode_sizes<head_dim>::part;
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
    bool waited = !first_unit;
#pragma unroll 1
    for (int32_t i = 0, tile = start; i < depth; i++, tile += ATTENTION_WARPS) {
        const int64_t at = offset_of<head_dim>(r, tile, __shfl_sync(0xffffffffu, blocks, i));
        if (!waited && (tile + 1) * DECODE_TILE > item.first_position) {
            qf_grid_dependency_wait();
            waited = true;
        }
        send_for<head_dim>(r.k + at, ring + 2 * part * i, tile < end);
        send_for<head_dim>(r.v + at, ring + 2 * part * i + part, tile < end);
    }
    if (!waited) {
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
            s.q[n][c] = head < p.group ? load_now(q + head * head_dim + 32 * c) : make_uint4(0, 0, 0, 0);
        }
    }
    uint4 *slot = ring, *const last = ring + 2 * part * (depth - 1);
#pragma unroll 1
    for (int32_t i = depth, tile = start; tile < end; i++, tile += ATTENTION_WARPS) {
        const int32_t next = tile + depth * ATTENTION_WARPS;
        float x[heads8][4];
        uint32_t weights[heads8][2];
        if (i % 32 == 0) {
            blocks = __ldcg(table + (min(next + ATTENTION_WARPS * lane, end - 1) >> shift));
        }
        wait_for_oldest<head_dim>(depth);
        scores<head_dim, heads8>(s, slot, x);
        const int64_t at = offset_of<head_dim>(r, next, __shfl_sync(0xffffffffu, blocks, i % 32));
        __syncwarp();
        send_for<head_dim>(r.k + at, slot, next < end);
        soften<head_dim, heads8>(s, r, tile * DECODE_TILE, p.scale_log2, x, weights);
        wait_for_oldest<head_dim>(depth);
        clear_unseen<head_dim>(r, tile * DECODE_TILE, slot + part);
        weigh_values<head_dim, heads8>(s, slot + part, weights);
        __syncwarp();
        send_for<head_dim>(r.v + at, slot + part, next < end);
        slot = slot == last ? ring : slot + 2 * part;
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

/* The warps' maxima and sums; their values stand where their rings were. */
template <int heads8> struct decode_shared {
    float maximum[ATTENTION_WARPS][8 * heads8], sum[ATTENTION_WARPS][8 * heads8];
    qf_cuda_attention_item item; /* for what comes after the products: registers are scarce */
};

template <int head_dim, int heads8>
static __device__ __forceinline__ void put_warp(const decode_state<head_dim, heads8> &s, decode_shared<heads8> &shared,
                                                float *values)
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
            for (int i = 0; i < head_dim / 16; i += 2) { /* tiles 4 c + w */
                *reinterpret_cast<float4 *>(values + head * decode_sizes<head_dim>::result_row + head_dim / 8 * g +
                                            2 * i) =
                    make_float4(s.o[n][i][e], s.o[n][i][e + 2], s.o[n][i + 1][e], s.o[n][i + 1][e + 2]);
            }
        }
    }
}

/* Merges the warps in order; the item's result goes out, or to the workspace. values: warp 0's. */
template <int head_dim, int heads8>
static __device__ __forceinline__ void merge_warps(const attention_params &p, int32_t kv_head,
                                                   const decode_shared<heads8> &shared, const float *values,
                                                   int32_t warp_floats)
{
    const qf_cuda_attention_item &item = shared.item;
    for (int32_t i = threadIdx.x; i < p.group * (head_dim / 4); i += ATTENTION_THREADS) {
        const int32_t local = i / (head_dim / 4), d = i % (head_dim / 4) * 4, head = kv_head * p.group + local;
        const float *from = values + local * decode_sizes<head_dim>::result_row + d;
        float maximum = shared.maximum[0][local], sum = 0.0f; /* warp 0 has a position, others may have none: -inf */
        float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 1; w < ATTENTION_WARPS; w++) {
            maximum = fmaxf(maximum, shared.maximum[w][local]);
        }
#pragma unroll
        for (int w = 0; w < ATTENTION_WARPS; w++) {
            add_weighted(acc, sum, *reinterpret_cast<const float4 *>(from + w * warp_floats), shared.sum[w][local],
                         power_of_two(shared.maximum[w][local] - maximum));
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

/* depth: tiles of a warp's ring; warp_bytes: of a warp's ring, or its results if those are more. */
template <int head_dim, int heads8>
static __global__ void __launch_bounds__(ATTENTION_THREADS, heads8 == 1 ? 3 : 2)
    attention_decode_kernel(const __grid_constant__ attention_params p, int32_t depth, int32_t warp_bytes)
{
    extern __shared__ __align__(128) uint8_t decode_rings[];
    __shared__ decode_shared<heads8> shared;
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
    uint8_t *const mine = decode_rings + threadIdx.x / 32 * warp_bytes;
    for (;;) {
        const int32_t kv_head = unit % num_kv_heads;
        decode_state<head_dim, heads8> s;
        if (threadIdx.x == 0) {
            shared.item = item;
        }
        decode_warp(p, item, kv_head, unit == (int32_t)blockIdx.x, depth, reinterpret_cast<uint4 *>(mine), s);
        __syncwarp(); /* all lanes have read what stood where results will */
        put_warp<head_dim, heads8>(s, shared, reinterpret_cast<float *>(mine));
        __syncthreads();
        merge_warps<head_dim, heads8>(p, kv_head, shared, reinterpret_cast<const float *>(decode_rings),
                                      warp_bytes / 4);
        if (shared.item.num_splits == 1) {
            zero_padding(p, shared.item, kv_head);
        } else {
            merge_item<head_dim>(p, shared.item, kv_head);
        }
        unit += gridDim.x;
        if (unit >= __ldcg(p.a.num_items) * num_kv_heads) {
            return;
        }
        item = load_item(p.a.items + unit / num_kv_heads);
        __syncthreads(); /* shared memory is written anew */
    }
}

#endif
