/* RMSNorm, with the addition of what the last linear layer made.
 *
 *   h = residual[row] + delta[0][row] + ... + delta[num_splits - 1][row]      (in this order)
 *   residual[row] = h                                                         (unless `rows` chooses the rows)
 *   out(., r) = bf16(h / sqrt(mean(h^2) + eps) * weight), 0 from hidden_size to k_padded
 *
 * Shapes and layouts: residual (num_tokens, hidden_size), delta (num_splits, num_tokens, delta_stride), weight
 * (hidden_size): float32; out: tiled (k_padded, num_rows) bf16; rows: (num_rows) or NULL. hidden_size is a multiple of
 * 4, at most 8,192.
 *
 * Roofline: memory, or rather latency. A row is 4 (2 + num_splits) hidden_size + 2 k_padded bytes: 2,048 rows of 3,584
 * with one split are 103 MB, 23 us at 4.4 TB/s; one row is 50 KB, and takes what a launch, one trip to L2, a reduction
 * and the stores take: target 2 us.
 *
 * Plan: a CTA a row, of up to 512 threads; the whole row stands in registers. Thread i holds the float4s i,
 * i + blockDim, ... (`vectors` of them: 1, 2 or 4):
 *
 *     | thread 0 | thread 1 | ... | thread T - 1 | thread 0 | thread 1 | ...   one float4 each
 *
 * Weights are fetched before the dependency wait. After it come the loads of the residual and of 8 / vectors splits,
 * all before the first addition. (Where there are more rows than multiprocessors: weights after the deltas, and one
 * split at a time, for three CTAs to a multiprocessor instead of one.)
 * The sum of squares: each thread over its own elements in order; a butterfly in the warp; the sums of 16 warps (0 for
 * those that are not there) in one tree, which every thread takes for itself, so that there is one barrier. The order
 * depends on hidden_size alone.
 * A lane stores 4 bf16 (8 bytes): two lanes fill a chunk, which is all that is contiguous of a row in tiles of 8
 * tokens; the neighbouring rows' CTAs fill the rest of the lines in L2.
 *
 * Measured: see PERF.md. */
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "layout.cuh"

#define MAX_THREADS 512
#define MAX_WARPS (MAX_THREADS / 32)
#define MAX_VECTORS 4 /* float4s of a thread */

/* Volatile, and not by the read-only path: so neither compiler nor assembler moves it behind the dependency wait. */
static __device__ __forceinline__ float4 load_now(const float4 *p)
{
    float4 v;
    asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

/* Thread's float4 number v, counted from the row's start. */
static __device__ __forceinline__ int32_t vector_index(int v) { return (int32_t)(threadIdx.x + v * blockDim.x); }

/* The same, or the row's last one beyond its end: loads need no branch, so they all go out at once. */
static __device__ __forceinline__ int32_t load_index(const qf_cuda_rmsnorm_args &a, int v)
{
    return min(vector_index(v), a.hidden_size / 4 - 1);
}

/* The weights of this thread's elements. */
template <int vectors>
static __device__ __forceinline__ void load_weights(const qf_cuda_rmsnorm_args &a, float4 (&weight)[vectors])
{
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        weight[v] = load_now(reinterpret_cast<const float4 *>(a.weight) + load_index(a, v));
    }
}

/* h = residual + deltas, `batch` of them in flight at once; zero beyond the row's end. */
template <int batch, int vectors>
static __device__ __forceinline__ void load_row(const qf_cuda_rmsnorm_args &a, int32_t row, float4 (&h)[vectors])
{
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f), none = make_float4(-0.0f, -0.0f, -0.0f, -0.0f);
    const float4 *residual = reinterpret_cast<const float4 *>(a.residual + (int64_t)row * a.hidden_size);
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        h[v] = residual[load_index(a, v)];
    }
    const float *delta = a.delta + (int64_t)row * a.delta_stride;
    const int64_t split_size = (int64_t)a.num_tokens * a.delta_stride;
#pragma unroll 1
    for (int32_t split = 0; split < a.num_splits; split += batch, delta += batch * split_size) {
        float4 d[batch][vectors];
#pragma unroll
        for (int b = 0; b < batch; b++) {
            const float4 *from = reinterpret_cast<const float4 *>(delta + b * split_size);
#pragma unroll
            for (int v = 0; v < vectors; v++) {
                d[b][v] = split + b < a.num_splits ? from[load_index(a, v)] : none;
            }
        }
        /* Where there is no such split: adding -0 changes nothing, not even the sign of a zero. */
#pragma unroll
        for (int b = 0; b < batch; b++) {
#pragma unroll
            for (int v = 0; v < vectors; v++) {
                h[v].x += d[b][v].x;
                h[v].y += d[b][v].y;
                h[v].z += d[b][v].z;
                h[v].w += d[b][v].w;
            }
        }
    }
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        h[v] = vector_index(v) < a.hidden_size / 4 ? h[v] : zero;
    }
}

static __device__ __forceinline__ float sum_of(float4 v) { return (v.x + v.y) + (v.z + v.w); }

/* The sum over the CTA, in every thread. Called once: the shared words are not used again. */
static __device__ __forceinline__ float sum_of_block(float sum)
{
    __shared__ __align__(16) float warp_sums[MAX_WARPS];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (threadIdx.x % 32 == 0) {
        warp_sums[threadIdx.x / 32] = sum;
    }
    /* Words of warps that this CTA has not. */
    if (threadIdx.x < MAX_WARPS && threadIdx.x >= blockDim.x / 32) {
        warp_sums[threadIdx.x] = 0.0f;
    }
    __syncthreads();
    const float4 *groups = reinterpret_cast<const float4 *>(warp_sums);
    return (sum_of(groups[0]) + sum_of(groups[1])) + (sum_of(groups[2]) + sum_of(groups[3]));
}

/* Four elements from k = 4 i on. */
static __device__ __forceinline__ void store_out(const qf_cuda_rmsnorm_args &a, int32_t i, uint2 packed)
{
    reinterpret_cast<uint2 *>(a.out)[2 * qf_tiled_chunk_index(4 * i, blockIdx.x, a.num_rows) + i % 2] = packed;
}

/* One row to a multiprocessor or fewer: up to 128 registers a thread, and the splits' loads in flight at once. More
 * rows: few registers, so that one CTA's loads fill the time of another's reduction. */
template <int vectors, bool many_rows>
static __global__ void __launch_bounds__(MAX_THREADS, !many_rows ? 1 : vectors > 2 ? 2 : 3)
    rmsnorm_kernel(qf_cuda_rmsnorm_args a, float inverse_size)
{
    qf_grid_launch_dependents();
    const int32_t num_vectors = a.hidden_size / 4;
    float4 weight[vectors], h[vectors];
    if (!many_rows && a.out != NULL) {
        load_weights(a, weight);
    }
    qf_grid_dependency_wait();
    const int32_t row = a.rows != NULL ? a.rows[blockIdx.x] : (int32_t)blockIdx.x;
    load_row<many_rows ? 1 : 8 / vectors>(a, row, h);
    if (many_rows && a.out != NULL) {
        load_weights(a, weight);
    }

    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        if (a.rows == NULL && a.num_splits > 0 && vector_index(v) < num_vectors) {
            reinterpret_cast<float4 *>(a.residual + (int64_t)row * a.hidden_size)[vector_index(v)] = h[v];
        }
        squares = fmaf(h[v].x, h[v].x, squares);
        squares = fmaf(h[v].y, h[v].y, squares);
        squares = fmaf(h[v].z, h[v].z, squares);
        squares = fmaf(h[v].w, h[v].w, squares);
    }
    if (a.out == NULL) {
        return;
    }
    const float inverse = rsqrtf(fmaf(sum_of_block(squares), inverse_size, a.eps));
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        if (vector_index(v) < num_vectors) {
            store_out(a, vector_index(v),
                      make_uint2(qf_pack_bf16(h[v].x * inverse * weight[v].x, h[v].y * inverse * weight[v].y),
                                 qf_pack_bf16(h[v].z * inverse * weight[v].z, h[v].w * inverse * weight[v].w)));
        }
    }
#pragma unroll 1
    for (int32_t i = num_vectors + (int32_t)threadIdx.x; i < a.k_padded / 4; i += (int32_t)blockDim.x) {
        store_out(a, i, make_uint2(0, 0));
    }
}

/* --- dispatch and launcher ------------------------------------------------------------------------------------ */

typedef void (*rmsnorm_kernel_fn)(qf_cuda_rmsnorm_args, float);

/* By log2 of `vectors`, and by the number of rows. */
static const rmsnorm_kernel_fn kernels[3][2] = {
    {rmsnorm_kernel<1, false>, rmsnorm_kernel<1, true>},
    {rmsnorm_kernel<2, false>, rmsnorm_kernel<2, true>},
    {rmsnorm_kernel<4, false>, rmsnorm_kernel<4, true>},
};

static qf_status check_shape(const qf_cuda_rmsnorm_args *a, qf_error *err)
{
    const int32_t max_hidden_size = 4 * MAX_THREADS * MAX_VECTORS;
    if (a->hidden_size < 4 || a->hidden_size > max_hidden_size || a->hidden_size % 4 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rmsnorm: hidden_size %d; expected a multiple of 4 up to %d",
                       a->hidden_size, max_hidden_size);
    }
    if (a->num_tokens < 1 || a->num_rows < 1 || (a->rows == NULL && a->num_rows != a->num_tokens)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "rmsnorm: %d rows of %d tokens; expected at least 1, and all tokens where `rows` is null",
                       a->num_rows, a->num_tokens);
    }
    if (a->out != NULL && (a->k_padded < a->hidden_size || a->k_padded % 128 != 0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "rmsnorm: k_padded %d; expected a multiple of 128 that is at least hidden_size, %d", a->k_padded,
                       a->hidden_size);
    }
    if (a->num_splits < 0 || a->num_splits > QF_CUDA_MAX_SPLITS || (a->delta != NULL) != (a->num_splits > 0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rmsnorm: %d splits, delta %s; expected 0 and null, or 1 .. %d",
                       a->num_splits, a->delta != NULL ? "given" : "null", QF_CUDA_MAX_SPLITS);
    }
    if (a->delta != NULL && (a->delta_stride < a->hidden_size || a->delta_stride % 4 != 0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "rmsnorm: delta_stride %d; expected a multiple of 4 that is at least hidden_size, %d",
                       a->delta_stride, a->hidden_size);
    }
    return QF_OK;
}

static qf_status check_pointers(const qf_cuda_rmsnorm_args *a, qf_error *err)
{
    if (a->residual == NULL || (a->out != NULL && a->weight == NULL)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rmsnorm: residual or weight is null");
    }
    if (a->out == NULL && (a->rows != NULL || a->delta == NULL)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rmsnorm: without out, with %s: there is nothing to do",
                       a->rows != NULL ? "`rows`" : "delta null");
    }
    const void *pointers[] = {a->residual, a->delta, a->weight, a->out};
    for (int i = 0; i < 4; i++) {
        if ((uintptr_t)pointers[i] % 16 != 0) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rmsnorm: a pointer is at %p; expected a multiple of 16",
                           pointers[i]);
        }
    }
    return QF_OK;
}

extern "C" qf_status qf_cuda_rmsnorm(const qf_cuda_rmsnorm_args *args, const qf_cuda_device *device,
                                     cudaStream_t stream, qf_error *err)
{
    QF_TRY(check_shape(args, err));
    QF_TRY(check_pointers(args, err));
    const int32_t num_vectors = args->hidden_size / 4;
    int32_t log2_vectors = 0;
    while (MAX_THREADS << log2_vectors < num_vectors) {
        log2_vectors++;
    }
    const int32_t vectors = 1 << log2_vectors;
    const int32_t threads = ((num_vectors + vectors - 1) / vectors + 31) / 32 * 32;
    const bool many_rows = args->num_rows > device->sm_count;
    return qf_launch("rmsnorm", kernels[log2_vectors][many_rows], dim3((unsigned)args->num_rows),
                     dim3((unsigned)threads), 0, device->dependent_launch, stream, err, *args,
                     1.0f / (float)args->hidden_size);
}
