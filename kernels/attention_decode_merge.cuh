/* Decode attention's last step: the partial results of one row's splits, added in two levels of a fixed order. */
#ifndef QF_ATTENTION_DECODE_MERGE_CUH
#define QF_ATTENTION_DECODE_MERGE_CUH

#include "attention_merge.cuh"

#define MERGE_FAN 8

/* acc and sum take in a partial result, whose maximum the weight stands for. */
static __device__ __forceinline__ void add_weighted(float4 &acc, float &sum, const float4 &x, float x_sum, float weight)
{
    sum = __fmaf_rn(x_sum, weight, sum);
    acc.x = __fmaf_rn(x.x, weight, acc.x);
    acc.y = __fmaf_rn(x.y, weight, acc.y);
    acc.z = __fmaf_rn(x.z, weight, acc.z);
    acc.w = __fmaf_rn(x.w, weight, acc.w);
}


/* Merges `count` partial results of a row, of splits first, first + step, .., in order: to the output, or in place of
 * split first's. All loads of MERGE_FAN of them, for two vectors a thread, are in flight at once. */
template <int head_dim, int threads>
static __device__ __forceinline__ void merge_partials(const attention_params &p, const qf_cuda_attention_item &item,
                                                      int32_t kv_head, int32_t first, int32_t step, int32_t count,
                                                      bool to_output)
{
    constexpr int vectors = head_dim / 4;
    __shared__ float2 merged[QF_ATTENTION_MAX_GROUP], sums[MERGE_FAN][QF_ATTENTION_MAX_GROUP];
    static_assert(MERGE_FAN * QF_ATTENTION_MAX_GROUP <= threads, "a thread loads one maximum and sum");
    const int32_t columns = p.group * vectors, stride = step * p.unit_words;
    const int32_t my_split = threadIdx.x / QF_ATTENTION_MAX_GROUP, my_head = threadIdx.x % QF_ATTENTION_MAX_GROUP;
    float *unit = unit_of(p, item, first, 0), *values = unit_values(p, unit, kv_head * p.group);
#pragma unroll 1
    for (int32_t begin = 0; begin < columns; begin += 2 * threads) {
        const int32_t i = begin + threadIdx.x;
        const int32_t at[2] = {min(i, columns - 1), min(i + threads, columns - 1)};
        float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
        float4 acc[2] = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll 1
        for (int32_t from = 0; from < count; from += MERGE_FAN) {
            float4 x[MERGE_FAN][2];
#pragma unroll
            for (int b = 0; b < MERGE_FAN; b++) {
                const float *split = values + (int64_t)min(from + b, count - 1) * stride;
                x[b][0] = __ldcg(reinterpret_cast<const float4 *>(split) + at[0]);
                x[b][1] = __ldcg(reinterpret_cast<const float4 *>(split) + at[1]);
            }
            if (my_split < MERGE_FAN && my_head < p.group) {
                sums[my_split][my_head] = __ldcg(reinterpret_cast<const float2 *>(
                    unit + (int64_t)min(from + my_split, count - 1) * stride + 2 * (kv_head * p.group + my_head)));
            }
            __syncthreads();
#pragma unroll
            for (int c = 0; c < 2; c++) {
                /* maximum, then weight; sum. A row has a position in each split: maxima are finite. */
                float2 w[MERGE_FAN];
                float next = maximum[c];
#pragma unroll
                for (int b = 0; b < MERGE_FAN; b++) {
                    w[b] = sums[b][at[c] / vectors];
                    w[b].x = from + b < count ? w[b].x : -INFINITY;
                    next = fmaxf(next, w[b].x);
                }
                const float old = power_of_two(maximum[c] - next);
                maximum[c] = next;
                sum[c] = __fmul_rn(sum[c], old);
                acc[c] = make_float4(acc[c].x * old, acc[c].y * old, acc[c].z * old, acc[c].w * old);
#pragma unroll
                for (int b = 0; b < MERGE_FAN; b++) {
                    add_weighted(acc[c], sum[c], x[b][c], w[b].y, power_of_two(w[b].x - next));
                }
            }
            __syncthreads(); /* sums are written anew */
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            if (i + c * threads >= columns) {
                continue;
            }
            if (to_output) {
                store_out(p, kv_head * p.group * head_dim + at[c] * 4, item.first_row, acc[c], sum[c]);
            } else {
                reinterpret_cast<float4 *>(values)[at[c]] = acc[c];
                if (at[c] % vectors == 0) {
                    merged[at[c] / vectors] = make_float2(maximum[c], sum[c]);
                }
            }
        }
    }
    if (!to_output) {
        __syncthreads(); /* merged is there, and all have read what it replaces */
        if ((int32_t)threadIdx.x < p.group) {
            reinterpret_cast<float2 *>(unit)[kv_head * p.group + threadIdx.x] = merged[threadIdx.x];
        }
    }
}

/* What follows an item's partial results: where there are more than MERGE_FAN splits, neighbours are merged first, each
 * MERGE_FAN by the last of them (their counter: the second one's), then those results by the last of these. Cut like
 * this, no CTA reads much, and the order of a merge still depends on the number of splits alone. */
template <int head_dim, int threads = ATTENTION_THREADS>
static __device__ __forceinline__ void merge_item(const attention_params &p, const qf_cuda_attention_item &item,
                                                  int32_t kv_head)
{
    const int32_t groups = (item.num_splits + MERGE_FAN - 1) / MERGE_FAN;
    bool last = groups == 1;
    int32_t first = item.split / MERGE_FAN * MERGE_FAN, count = min(MERGE_FAN, item.num_splits - first), step = 1;
    int32_t counter = last ? item.counter : item.partial + first + 1;
#pragma unroll 1
    for (;;) {
        if (count > 1) { /* else: the last split, alone in its group */
            if (!last_to_arrive(p, counter, kv_head, count)) {
                return;
            }
            merge_partials<head_dim, threads>(p, item, kv_head, first, step, count, last);
        }
        if (last) {
            break;
        }
        first = 0;
        count = groups;
        step = MERGE_FAN;
        counter = item.counter;
        last = true;
    }
    zero_padding(p, item, kv_head);
}

/* --- by CTAs that have many threads ------------------------------------------------------------------------------ */

#define MERGE_WIDE 64 /* results that are merged at once, at most */

/* Of shared memory before the vectors of merge_wide: weights, and a vector of each thread. */
template <int threads> static __host__ __device__ constexpr int32_t merge_wide_fixed()
{
    return MERGE_WIDE * QF_ATTENTION_MAX_GROUP * 4 + threads * 16;
}

/* The heads of a group that merge_wide takes, at most: a warp for each, and a thread for each vector. */
template <int head_dim, int threads> static __host__ __device__ constexpr int32_t merge_wide_heads()
{
    return threads / 32 < threads / (head_dim / 4) ? threads / 32 : threads / (head_dim / 4);
}

/* As merge_partials, of up to MERGE_WIDE results, which are all on their way at once, to shared memory (scratch). A warp
 * makes the weights of each head, and where there are threads for more than one, each takes every slices-th result of a
 * column; then those are added in order. */
template <int head_dim, int threads>
static __device__ __forceinline__ void merge_wide(const attention_params &p, const qf_cuda_attention_item &item,
                                                  int32_t kv_head, int32_t first, int32_t step, int32_t count,
                                                  bool to_output, uint8_t *scratch)
{
    constexpr int vectors = head_dim / 4;
    __shared__ float2 totals[QF_ATTENTION_MAX_GROUP];
    float *weights = reinterpret_cast<float *>(scratch);
    float4 *parts = reinterpret_cast<float4 *>(weights + MERGE_WIDE * QF_ATTENTION_MAX_GROUP);
    const int32_t columns = p.group * vectors, slices = threads / columns, stride = step * p.unit_words;
    const int32_t slice = (int32_t)threadIdx.x / columns, column = (int32_t)threadIdx.x - slice * columns;
    const int32_t begin = slice < slices ? slice : count; /* of this thread: slice, slice + slices, .. */
    float4 *x = parts + threads + column;                 /* result i at i * columns */
    float *unit = unit_of(p, item, first, 0), *values = unit_values(p, unit, kv_head * p.group);
#pragma unroll 4
    for (int32_t i = begin; i < count; i += slices) {
        qf_cp_async_16(x + i * columns, values + 4 * column + (int64_t)i * stride);
    }
    qf_cp_async_commit();
    const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp < p.group) {
        const float *sums = unit + 2 * (kv_head * p.group + warp);
        float2 s[(MERGE_WIDE + 31) / 32];
        float maximum = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < (MERGE_WIDE + 31) / 32; i++) {
            s[i] = make_float2(-INFINITY, 0.0f);
            if (32 * i + lane < count) {
                s[i] = __ldcg(reinterpret_cast<const float2 *>(sums + (int64_t)(32 * i + lane) * stride));
            }
            maximum = fmaxf(maximum, s[i].x);
        }
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
        }
#pragma unroll
        for (int i = 0; i < (MERGE_WIDE + 31) / 32; i++) {
            const float weight = power_of_two(s[i].x - maximum);
            sum = __fmaf_rn(s[i].y, weight, sum);
            if (32 * i + lane < count) {
                weights[(32 * i + lane) * QF_ATTENTION_MAX_GROUP + warp] = weight;
            }
        }
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        if (lane == 0) {
            totals[warp] = make_float2(maximum, sum);
        }
    }
    qf_cp_async_wait<0>();
    __syncthreads();
    const float *weight = weights + column / vectors;
    float unused = 0.0f;
    float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int32_t i = begin; i < count; i += slices) {
        add_weighted(acc, unused, x[i * columns], 0.0f, weight[i * QF_ATTENTION_MAX_GROUP]);
    }
    if (slice > 0 && slice < slices) {
        parts[(slice - 1) * columns + column] = acc;
    }
    __syncthreads();
    if (slice == 0) {
#pragma unroll 1
        for (int32_t i = 0; i + 1 < slices; i++) {
            add_weighted(acc, unused, parts[i * columns + column], 0.0f, 1.0f);
        }
        const float2 total = totals[column / vectors];
        if (to_output) {
            store_out(p, kv_head * p.group * head_dim + 4 * column, item.first_row, acc, total.y);
        } else {
            reinterpret_cast<float4 *>(values)[column] = acc;
            if (column % vectors == 0) {
                reinterpret_cast<float2 *>(unit)[kv_head * p.group + column / vectors] = total;
            }
        }
    }
    __syncthreads();
}

/* As merge_item: in one level where that takes all of the splits, else in groups of about the root of their number. */
template <int head_dim, int threads>
static __device__ __forceinline__ void merge_item_wide(const attention_params &p, const qf_cuda_attention_item &item,
                                                       int32_t kv_head, uint8_t *scratch, int32_t bytes)
{
    const int32_t room = (bytes - merge_wide_fixed<threads>()) / (p.group * head_dim * 4);
    const int32_t most = min(room, MERGE_WIDE);
    int32_t fan = item.num_splits;
    if (fan > most) {
        for (fan = 4; fan * fan < item.num_splits; fan++) {
        }
    }
    /* Nor where the last split is the other kernel's, which cuts by MERGE_FAN. The same in all of the item's CTAs. */
    if (fan > most || p.a.shape.kv_window > 0 || p.group > merge_wide_heads<head_dim, threads>()) {
        merge_item<head_dim, threads>(p, item, kv_head);
        return;
    }
    const int32_t groups = (item.num_splits + fan - 1) / fan;
    bool last = groups == 1;
    int32_t first = item.split / fan * fan, count = min(fan, item.num_splits - first), step = 1;
    int32_t counter = last ? item.counter : item.partial + first + 1;
#pragma unroll 1
    for (;;) {
        if (count > 1) { /* else: the last split, alone in its group */
            if (!last_to_arrive(p, counter, kv_head, count)) {
                return;
            }
            merge_wide<head_dim, threads>(p, item, kv_head, first, step, count, last, scratch);
        }
        if (last) {
            break;
        }
        first = 0;
        count = groups;
        step = fan;
        counter = item.counter;
        last = true;
    }
    zero_padding(p, item, kv_head);
}

#endif
