/* Attention of single rows over a low-bit cache: one new token of a sequence against a run of its positions.
 *
 * A CTA of 16 warps takes an item and a kv head, 8 heads of its group at a time; each warp a 16th of the positions in
 * stages (attention_decode_lowbit_stage.cuh), whose scale words are decoded by attention_decode_lowbit_scales.cuh and whose
 * arithmetic is in attention_decode_lowbit_tile.cuh. Warps are merged in order, splits as in attention_decode_merge.cuh.
 *
 *     shared memory:  fine table (rows below 128 bytes) | C | D | Q | sums of Q | powers of two | factors |
 *                     16 warps x (decoded scales | rows of the coarse table | terms of a stage | depth stages)
 *                     afterwards the warps' results stand where that was, and then the partial results of other CTAs */
#ifndef QF_ATTENTION_DECODE_LOWBIT_CUH
#define QF_ATTENTION_DECODE_LOWBIT_CUH

#include "attention_decode_lowbit_tile.cuh"

/* Places in shared memory. */
template <int format, int head_dim> struct lowbit_shared {
    uint8_t *stages, *coarse, *decoded; /* this warp's */
    float4 *terms;                      /* this lane's */
    float *c, *d;
    uint4 *q, *fine;
    float *sums, *inverse, *factor;
    float *maximum, *sum, *values; /* (16 warps, 8 heads), the same, and with (result_row) behind */
};

template <int format, int head_dim>
static __device__ __forceinline__ lowbit_shared<format, head_dim> lay_out(uint8_t *base, int depth)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    const int warp = threadIdx.x / 32;
    lowbit_shared<format, head_dim> s;
    s.fine = reinterpret_cast<uint4 *>(base);
    /* What a shuffle gave is kept, not made anew in every stage. */
    const int own_at = __shfl_sync(ALL_LANES, sizes::fixed + warp * (sizes::own + depth * sizes::stage), 0);
    uint8_t *const at = base + sizes::fine, *const own = base + own_at;
    s.decoded = own;
    s.coarse = own + sizes::decoded;
    s.terms = reinterpret_cast<float4 *>(own + sizes::decoded + sizes::coarse) + threadIdx.x % 32;
    s.c = reinterpret_cast<float *>(at);
    s.d = reinterpret_cast<float *>(at + sizes::c);
    s.q = reinterpret_cast<uint4 *>(at + 2 * sizes::c);
    s.sums = reinterpret_cast<float *>(at + 2 * sizes::c + sizes::q);
    s.inverse = reinterpret_cast<float *>(at + 2 * sizes::c + sizes::q + sizes::sums);
    s.factor = s.inverse + LOWBIT_HEADS;
    s.stages = own + sizes::own;
    s.values = reinterpret_cast<float *>(base + sizes::fixed);
    s.maximum = s.values + LOWBIT_WARPS * LOWBIT_HEADS * sizes::result_row;
    s.sum = s.maximum + LOWBIT_WARPS * LOWBIT_HEADS;
    return s;
}

/* The greatest of the warp's lanes. */
static __device__ __forceinline__ float warp_max(float x)
{
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    }
    return x;
}

/* The power of two, as its exponent's bits, that brings the largest to 2^12 .. 2^13: within fp16, with a factor of
 * attention below 8 too. One over it is the one of 254 less that. */
static __device__ __forceinline__ uint32_t power_for(float largest)
{
    return min(max(266 - (int32_t)(__float_as_uint(largest) >> 23), 30), 224);
}

/* Head `warp`: its q in fp16 and what offsets of codes are made up with. x: columns 32 i + lane. */
template <int format, int head_dim>
static __device__ __forceinline__ void prepare_operand(const float (&x)[head_dim / 32], float scale_log2,
                                                       const lowbit_shared<format, head_dim> &shared)
{
    constexpr bool integer = format == QF_CUDA_KV_INT4 || format == QF_CUDA_KV_INT8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float largest = 0.0f, total = 0.0f, sums[head_dim / 32];
#pragma unroll
    for (int i = 0; i < head_dim / 32; i++) {
        largest = fmaxf(largest, fabsf(x[i]));
        sums[i] = x[i];
    }
    if constexpr (integer) {
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
#pragma unroll
            for (int i = 0; i < head_dim / 32; i++) {
                sums[i] += __shfl_xor_sync(ALL_LANES, sums[i], offset);
            }
        }
    }
    const uint32_t exponent = power_for(warp_max(largest));
    const float power = __uint_as_float(exponent << 23);
    const float own = format == QF_CUDA_KV_INT4 && lane / 2 % 2 == 1 ? 0.0625f * power : power;
    __half *q = reinterpret_cast<__half *>(shared.q + 4 * warp + lane / 8) + lane % 8;
#pragma unroll
    for (int i = 0; i < head_dim / 32; i++) {
        q[32 * 8 * i] = __float2half_rn(x[i] * own);
        const float sum = sums[i] * power;
        total += sum;
        if (format == QF_CUDA_KV_INT4 && lane == 0) {
            const float exact = -sum * QF_KV_FP16_UNIT;
            const float high = __uint_as_float(__float_as_uint(exact) & 0xffffe000u);
            shared.sums[i * LOWBIT_HEADS + warp] = high;
            shared.sums[(head_dim / 32 + i) * LOWBIT_HEADS + warp] =
                __uint_as_float(__float_as_uint(exact - high) & 0xffffe000u);
        }
    }
    if (lane == 0) {
        if (format == QF_CUDA_KV_INT8) {
            shared.sums[warp] = total * (-128.0f * QF_KV_FP16_UNIT);
        }
        shared.factor[warp] =
            scale_log2 * __uint_as_float((254 - exponent) << 23) * (integer ? 1.0f / QF_KV_FP16_UNIT : 1.0f);
    }
}

/* Operands made of the query of head `warp`, below 8. x: columns 32 i + lane. */
template <int format, int head_dim>
static __device__ __forceinline__ void prepare_head(const attention_params &p, const float (&x)[head_dim / 32],
                                                    const float (&b)[head_dim / 32], const float (&middle)[head_dim / 32],
                                                    const lowbit_shared<format, head_dim> &shared)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float c[head_dim / 64], d[head_dim / 64], largest = 0.0f;
    prepare_operand<format, head_dim>(x, p.scale_log2, shared);
#pragma unroll
    for (int i = 0; i < head_dim / 64; i++) {
        const int j = i + head_dim / 64;
        const float c0 = __fmaf_rn(x[i], b[i], __fmul_rn(x[j], b[j])) * p.scale_log2;
        const float d0 = __fmaf_rn(x[j], b[i], -__fmul_rn(x[i], b[j])) * p.scale_log2;
        c[i] = __fmaf_rn(c0, middle[i], __fmul_rn(d0, middle[j]));
        d[i] = __fmaf_rn(d0, middle[i], -__fmul_rn(c0, middle[j]));
        largest = fmaxf(largest, fabsf(c[i]) + fabsf(d[i]));
    }
    const uint32_t exponent = power_for(warp_max(largest));
    const float power = __uint_as_float(exponent << 23);
#pragma unroll
    for (int i = 0; i < head_dim / 64; i++) {
        const int at = warp * (head_dim / 2) + ((32 * i + lane) ^ warp % 2 * 16);
        shared.c[at] = c[i] * power;
        shared.d[at] = d[i] * power;
    }
    if (lane == 0) {
        shared.inverse[warp] = __uint_as_float((254 - exponent) << 23);
    }
}

/* Operands made of up to 8 queries: warp w makes head w's. Rows of heads that there are not are zero. */
template <int format, int head_dim>
static __device__ __forceinline__ void prepare_queries(const attention_params &p, const qf_cuda_attention_item &item,
                                                       int32_t kv_head, int32_t first_head, const float (&b)[head_dim / 32],
                                                       const float (&middle)[head_dim / 32],
                                                       const lowbit_shared<format, head_dim> &shared)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num = p.group - first_head;
    if (warp >= LOWBIT_HEADS) {
        return;
    }
    const uint16_t *q = static_cast<const uint16_t *>(p.a.q) +
                        ((int64_t)item.first_row * p.a.shape.num_heads + kv_head * p.group + first_head) * head_dim;
    float x[head_dim / 32];
#pragma unroll
    for (int i = 0; i < head_dim / 32; i++) {
        x[i] = warp < num ? __uint_as_float((uint32_t)__ldcg(q + warp * head_dim + 32 * i + lane) << 16) : 0.0f;
    }
    prepare_head<format, head_dim>(p, x, b, middle, shared);
}

/* The first `depth` stages are sent for: before the wait for the kernel before, as decode_warp() in attention_decode.cuh says,
 * if none of their positions is the row's own. */
template <int format, int head_dim, bool biased>
static __device__ __forceinline__ void begin_walk(const attention_params &p, lowbit_walk &w, bool first_unit, int depth,
                                                  const lowbit_shared<format, head_dim> &shared)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    bool waited = !first_unit;
#pragma unroll 1
    for (int s = 0; s < depth; s++) {
        if (!waited && (int32_t)((w.first + s + 1) * sizes::positions) > w.own_position) {
            qf_grid_dependency_wait();
            waited = true;
        }
        copy_stage<format, head_dim, biased, true>(p, w, w.first + s, shared.stages + s * sizes::stage, shared.coarse);
    }
    if (!waited) {
        qf_grid_dependency_wait();
    }
}

template <int format, int head_dim, bool biased>
static __device__ __forceinline__ void walk(const attention_params &p, lowbit_walk &w, uint32_t depth,
                                            const lowbit_shared<format, head_dim> &shared,
                                            lowbit_state<format, head_dim> &state)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    depth = sizes::depth == sizes::least_depth ? sizes::depth : depth;
    const lowbit_queries<head_dim> queries = {shared.q, shared.sums,    shared.factor,
                                              shared.c, shared.d, shared.inverse};
    lowbit_bias<head_dim, sizes::tiles> bias = {};
    if constexpr (sizes::tiles == 2) {
        bias.second = shared.terms;
    }
    bool fresh = true;
    const uint4 *fine = (sizes::fine > 0 ? shared.fine : reinterpret_cast<const uint4 *>(p.a.bias_fine)) + w.lane;
    uint8_t *stage = shared.stages, *const last = stage + (depth - 1) * sizes::stage;
#pragma unroll
    for (int i = 0; i < head_dim / 16; i++) {
        state.o[i][0] = state.o[i][1] = state.o[i][2] = state.o[i][3] = 0.0f;
    }
    state.excess[0] = state.excess[1] = state.excess[2] = state.excess[3] = 0.0f;
    state.exponent = 0;
    state.maximum[0] = state.maximum[1] = 0.0f;
    state.sum[0] = state.sum[1] = 0.0f;
#pragma unroll 1
    for (uint32_t s = w.first; s < w.end; s++) {
        if (depth == sizes::depth) {
            qf_cp_async_wait<sizes::depth - 1>();
        } else {
            qf_cp_async_wait<sizes::least_depth - 1>();
        }
        __syncwarp();
        if (biased && (s % sizes::stages == 0 || fresh)) {
            start_unit<head_dim, sizes::tiles, (sizes::fine > 0)>(
                bias, queries, shared.coarse + s / sizes::stages % sizes::coarse_slots * head_dim * 4, fine, w.lane,
                s % sizes::stages, state.maximum);
        } else if (biased && sizes::tiles == 2) {
            load_terms(bias);
        }
        compute_stage<format, head_dim, biased>(w, s, fresh, stage, shared.decoded, queries, bias, fine, state);
        fresh = false;
        __syncwarp(); /* all have read what is written anew */
        copy_stage<format, head_dim, biased, false>(p, w, s + depth, stage, shared.coarse);
        stage = stage == last ? shared.stages : stage + sizes::stage;
    }
    qf_cp_async_wait<0>();
#pragma unroll
    for (int e = 0; e < 2; e++) {
        state.maximum[e] = fresh ? -INFINITY : state.maximum[e];
        if constexpr (format == QF_CUDA_KV_INT4) {
            state.sum[e] = state.excess[2 + e];
        } else {
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) {
                state.sum[e] += __shfl_xor_sync(ALL_LANES, state.sum[e], offset);
            }
        }
    }
}

template <int format, int head_dim>
static __device__ __forceinline__ void put_results(const lowbit_state<format, head_dim> &s,
                                                   const lowbit_shared<format, head_dim> &shared)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    constexpr bool integer = format == QF_CUDA_KV_INT4 || format == QF_CUDA_KV_INT8;
    constexpr float unit = integer ? 1.0f / QF_KV_FP16_UNIT : 1.0f, odd = format == QF_CUDA_KV_INT4 ? 0.0625f : 1.0f;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const float power = __uint_as_float((s.exponent + (127 - 112)) << 23);
    float excess[head_dim / 32][2] = {}; /* of a group's columns */
    if constexpr (sizes::zeros) {
#pragma unroll
        for (int group = 0; group < head_dim / 32; group++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                excess[group][e] = __shfl_sync(ALL_LANES, s.excess[e], 4 * group + t) +
                                   __shfl_sync(ALL_LANES, s.excess[e], 4 * (sizes::words + group) + t);
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int row = warp * LOWBIT_HEADS + 2 * t + e;
        if (g == 0) {
            shared.maximum[row] = s.maximum[e];
            shared.sum[row] = s.sum[e];
        }
#pragma unroll
        for (int i = 0; i < head_dim / 16; i += 2) {
            float x[4] = {s.o[i][e], s.o[i][e + 2] * odd, s.o[i + 1][e], s.o[i + 1][e + 2] * odd};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                x[n] = (format == QF_CUDA_KV_INT8 ? x[n] - s.excess[e] : x[n]) * unit;
                x[n] = (sizes::zeros ? x[n] - excess[i / 2][e] : x[n]) * power;
            }
            *reinterpret_cast<float4 *>(shared.values + row * sizes::result_row + 16 * i + 4 * g) =
                make_float4(x[0], x[1], x[2], x[3]);
        }
    }
}

/* Merges the warps in order; the results of these heads go out, or to the workspace. */
template <int format, int head_dim, int warps>
static __device__ __forceinline__ void merge_results(const attention_params &p, const qf_cuda_attention_item &item,
                                                     int32_t kv_head, int32_t first_head,
                                                     const lowbit_shared<format, head_dim> &shared)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    static_assert(warps <= 16 && LOWBIT_HEADS == 8, "16 lanes have a head's weights");
    __shared__ float2 totals[LOWBIT_HEADS];
    const int32_t num = min(p.group - first_head, LOWBIT_HEADS);
    if (threadIdx.x < 16 * LOWBIT_HEADS) { /* -inf: of a warp that had nothing to do */
        const int32_t local = threadIdx.x / 16, own_warp = threadIdx.x % 16;
        const int32_t row = min(own_warp, warps - 1) * LOWBIT_HEADS + local;
        const bool there = own_warp < warps;
        const float own = there ? shared.maximum[row] : -INFINITY;
        float maximum = own;
#pragma unroll
        for (int offset = 1; offset < 16; offset *= 2) {
            maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, offset));
        }
        const float weight = power_of_two(own - maximum);
        float sum = there ? shared.sum[row] * weight : 0.0f;
#pragma unroll
        for (int offset = 1; offset < 16; offset *= 2) {
            sum += __shfl_xor_sync(ALL_LANES, sum, offset);
        }
        if (there) {
            shared.maximum[row] = weight;
        }
        if (threadIdx.x % 16 == 0) {
            totals[local] = make_float2(maximum, sum);
        }
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < num * (head_dim / 4); i += 32 * warps) {
        const int32_t local = i / (head_dim / 4), d = i % (head_dim / 4) * 4;
        const int32_t head = kv_head * p.group + first_head + local;
        float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float unused = 0.0f;
#pragma unroll
        for (int w = 0; w < warps; w++) {
            const int32_t row = w * LOWBIT_HEADS + local;
            add_weighted(acc, unused, *reinterpret_cast<const float4 *>(shared.values + row * sizes::result_row + d), 0.0f,
                         shared.maximum[row]);
        }
        const float2 total = totals[local];
        if (item.num_splits == 1) {
            store_out(p, head * head_dim + d, item.first_row, acc, total.y);
        } else {
            float *unit = unit_of(p, item, item.split, 0);
            *reinterpret_cast<float4 *>(unit_values(p, unit, head) + d) = acc;
            if (d == 0) {
                *reinterpret_cast<float2 *>(unit + 2 * head) = total;
            }
        }
    }
}

/* By a warp: the unit's item, and how many units there are, all in one load. */
static __device__ __forceinline__ void load_unit(const attention_params &p, int32_t u, qf_cuda_attention_item &item,
                                                 int32_t &unit, int32_t &num_units, int32_t &kv_head)
{
    constexpr int words = sizeof(item) / 4;
    const int32_t lane = threadIdx.x % 32, heads = p.a.shape.num_kv_heads;
    const int32_t *from = lane < words ? reinterpret_cast<const int32_t *>(p.a.items + u / heads) + lane : p.a.num_items;
    const int32_t word = __ldcg(from);
    if (lane < words) {
        reinterpret_cast<int32_t *>(&item)[lane] = word;
    } else if (lane == words) {
        unit = u;
        num_units = word * heads;
        kv_head = u % heads;
    }
}

template <int format, int head_dim, bool biased>
static __global__ void __launch_bounds__(LOWBIT_THREADS, LOWBIT_CTAS)
    attention_decode_lowbit_kernel(const __grid_constant__ attention_params p, int32_t depth)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    extern __shared__ __align__(128) uint8_t dynamic[];
    __shared__ qf_cuda_attention_item item; /* registers are scarce: these are read anew where they are wanted */
    __shared__ int32_t unit, num_units, kv_head;
    qf_grid_launch_dependents();
    /* Items were copied before the step's first kernel. The grid is no larger than the array, so that the first item is
     * loaded before it is known to be there. */
    const lowbit_shared<format, head_dim> shared = lay_out<format, head_dim>(dynamic, depth);
    if constexpr (biased) { /* no kernel of the step writes it; it has come when the first stage has */
        for (int32_t i = threadIdx.x; i < lowbit_sizes<format, head_dim>::fine / 16; i += LOWBIT_THREADS) {
            qf_cp_async_16(shared.fine + i, reinterpret_cast<const uint4 *>(p.a.bias_fine) + i);
        }
        qf_cp_async_commit();
    }
    for (int32_t u = blockIdx.x;;) {
        if (threadIdx.x < 32) {
            load_unit(p, u, item, unit, num_units, kv_head);
        }
        __syncthreads();
        if (u >= num_units) {
            break;
        }
#pragma unroll 1
        for (int32_t first_head = 0; first_head < p.group; first_head += LOWBIT_HEADS) {
            lowbit_state<format, head_dim> state;
            lowbit_walk w = start_walk<format, head_dim>(p, item, kv_head, threadIdx.x % 32);
            float b[head_dim / 32] = {}, middle[head_dim / 32] = {}; /* sent for before the wait for the kernel before */
            if constexpr (biased) {
                const float *turn = reinterpret_cast<const float *>(p.a.bias_fine + QF_CUDA_BIAS_TILE / 2 * head_dim);
#pragma unroll
                for (int i = 0; i < head_dim / 32; i++) {
                    b[i] = __ldg(p.a.kv.k_bias + kv_head * head_dim + 32 * i + threadIdx.x % 32);
                    middle[i] = __ldg(turn + 32 * i + threadIdx.x % 32);
                }
            }
            /* The last stage ahead is sent for when q has come, which waits behind copies otherwise. */
            const int ahead = depth - 1;
            begin_walk<format, head_dim, biased>(p, w, unit == (int32_t)blockIdx.x && first_head == 0, ahead, shared);
            prepare_queries<format, head_dim>(p, item, kv_head, first_head, b, middle, shared);
            copy_stage<format, head_dim, biased, true>(p, w, w.first + ahead, shared.stages + ahead * sizes::stage,
                                                       shared.coarse);
            if (biased) { /* the fine table, which all threads have copied */
                depth == lowbit_sizes<format, head_dim>::depth ? qf_cp_async_wait<lowbit_sizes<format, head_dim>::depth>()
                                                               : qf_cp_async_wait<lowbit_sizes<format, head_dim>::least_depth>();
            }
            __syncthreads();
            walk<format, head_dim, biased>(p, w, depth, shared, state);
            __syncthreads(); /* results stand where stages were */
            put_results<format, head_dim>(state, shared);
            __syncthreads();
            merge_results<format, head_dim, LOWBIT_WARPS>(p, item, kv_head, first_head, shared);
            __syncthreads(); /* shared memory is written anew */
        }
        if (item.num_splits == 1) {
            zero_padding(p, item, kv_head);
        } else {
            merge_item_wide<head_dim, LOWBIT_THREADS>(p, item, kv_head, reinterpret_cast<uint8_t *>(shared.values),
                                                      LOWBIT_WARPS * (lowbit_sizes<format, head_dim>::own +
                                                                      depth * lowbit_sizes<format, head_dim>::stage));
        }
        u = unit + (int32_t)gridDim.x;
        if (u >= num_units) {
            break;
        }
        __syncthreads(); /* item is written anew */
    }
    qf_grid_dependency_wait(); /* a kernel's end implies its predecessor's, whether it had work or not */
}

#endif
