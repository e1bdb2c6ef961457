/* The float32 reference kernels: dtype="float32" runs on them, and the fast kernels are compared with them.
 *
 *   linear:    out[t][j] = sum over k, ascending, of x[t][k] * w[j][k], then + bias[j]
 *   rmsnorm:   residual += delta; out = residual / sqrt(mean(residual^2) + eps) * weight
 *   silu_mul:  gate = gate / (1 + exp(-gate)) * up
 *   attention: out = softmax(scale q K^T) V over the positions that a row sees, K and V in a paged float32 cache
 *
 * Shapes and layouts: all row by row, in float32; the cache is (num_blocks, num_kv_heads, block_size, head_dim).
 *
 * They are written to be plainly right. An output belongs to one thread (linear, silu_mul) or one warp, which sums in
 * an order that depends on nothing but the output's own position: not on the batch, not on a chunk. Where a product and
 * a sum are one operation it says fmaf, so that the compiler has no choice to make. linear adds in the order of the CPU
 * backend's scalar kernel, and gives its bits.
 *
 * Roofline: none is aimed at: linear is bound by shared memory, attention by the latency of one position after the
 * other. A model of hidden size 384 takes milliseconds a step, which is what they are for.
 *
 * Plan: linear: a CTA of 256 threads makes 64 x 64 outputs, a thread 4 x 4 of them, from tiles of 32 k in shared
 * memory:
 *
 *            w rows tx, tx + 16, tx + 32, tx + 48
 *     x rows ty, ty + 16, ... : the thread (tx, ty) of 16 x 16
 *
 * rmsnorm: a warp a row, lane i taking elements i, i + 32, ...
 * attention: a warp a (row, head); positions go in groups of 32 that begin at multiples of 32: scores one after the
 * other (a lane has every 32nd component, the warp adds them up), lane j keeping the j-th; their maximum; the running
 * sums are scaled to it; then the group's values one by one.
 *
 * Measured: see PERF.md. */
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "qf_attention.h"

#define FULL_WARP 0xffffffffu

/* Butterflies: every lane gets the same bits. */
static __device__ __forceinline__ float warp_sum(float x)
{
    for (int offset = 16; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(FULL_WARP, x, offset);
    }
    return x;
}

static __device__ __forceinline__ float warp_max(float x)
{
    for (int offset = 16; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    }
    return x;
}

/* --- linear --------------------------------------------------------------------------------------------------- */

#define LINEAR_TILE 64
#define LINEAR_K 32
#define LINEAR_THREADS 256

/* A tile of 64 rows by 32 k of a (num_rows, k) matrix, as (k, row); zero outside of the matrix. */
static __device__ __forceinline__ void load_tile(const float *matrix, int32_t row0, int32_t num_rows, int32_t k0,
                                                 int32_t k, float (&tile)[LINEAR_K][LINEAR_TILE + 1])
{
    const int32_t column = threadIdx.x % LINEAR_K;
#pragma unroll
    for (int32_t row = threadIdx.x / LINEAR_K; row < LINEAR_TILE; row += LINEAR_THREADS / LINEAR_K) {
        const bool inside = row0 + row < num_rows && k0 + column < k;
        tile[column][row] = inside ? matrix[(int64_t)(row0 + row) * k + k0 + column] : 0.0f;
    }
}

static __global__ void __launch_bounds__(LINEAR_THREADS) linear_f32_kernel(qf_cuda_linear_f32_args a)
{
    __shared__ float x[LINEAR_K][LINEAR_TILE + 1], w[LINEAR_K][LINEAR_TILE + 1];
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const int32_t row0 = blockIdx.x * LINEAR_TILE, token0 = blockIdx.y * LINEAR_TILE;
    const int32_t tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum[4][4] = {};
    for (int32_t k0 = 0; k0 < a.k; k0 += LINEAR_K) {
        load_tile(a.x, token0, a.num_tokens, k0, a.k, x);
        load_tile(a.w, row0, a.n, k0, a.k, w);
        __syncthreads();
#pragma unroll 8
        for (int32_t i = 0; i < LINEAR_K; i++) {
#pragma unroll
            for (int t = 0; t < 4; t++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    sum[t][j] = fmaf(x[i][ty + 16 * t], w[i][tx + 16 * j], sum[t][j]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < 4; t++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int32_t token = token0 + ty + 16 * t, row = row0 + tx + 16 * j;
            if (token < a.num_tokens && row < a.n) {
                a.out[(int64_t)token * a.n + row] = a.bias != NULL ? sum[t][j] + a.bias[row] : sum[t][j];
            }
        }
    }
}

extern "C" qf_status qf_cuda_linear_f32(const qf_cuda_linear_f32_args *args, cudaStream_t stream, qf_error *err)
{
    if (args->x == NULL || args->w == NULL || args->out == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "linear_f32: x, w or out is null");
    }
    const int32_t max_tokens = 65535 * LINEAR_TILE; /* the grid's second dimension */
    if (args->num_tokens < 1 || args->num_tokens > max_tokens || args->n < 1 || args->k < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "linear_f32: %d tokens, n %d, k %d; expected at least 1 each, and at most %d tokens",
                       args->num_tokens, args->n, args->k, max_tokens);
    }
    const dim3 grid((unsigned)(((int64_t)args->n + LINEAR_TILE - 1) / LINEAR_TILE),
                    (unsigned)((args->num_tokens + LINEAR_TILE - 1) / LINEAR_TILE));
    return qf_launch("linear_f32", linear_f32_kernel, grid, dim3(LINEAR_THREADS), 0, false, stream, err, *args);
}

/* --- rmsnorm -------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(32) rmsnorm_f32_kernel(qf_cuda_rmsnorm_f32_args a)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const int64_t row = a.rows != NULL ? a.rows[blockIdx.x] : (int32_t)blockIdx.x;
    float *residual = a.residual + row * a.hidden_size;
    const float *delta = a.delta != NULL ? a.delta + row * a.hidden_size : NULL;
    float squares = 0.0f;
    for (int32_t i = threadIdx.x; i < a.hidden_size; i += 32) {
        const float h = delta != NULL ? residual[i] + delta[i] : residual[i];
        squares = fmaf(h, h, squares);
    }
    const float inverse = 1.0f / sqrtf(warp_sum(squares) / (float)a.hidden_size + a.eps);
    for (int32_t i = threadIdx.x; i < a.hidden_size; i += 32) {
        const float h = delta != NULL ? residual[i] + delta[i] : residual[i];
        if (a.rows == NULL && delta != NULL) {
            residual[i] = h;
        }
        if (a.out != NULL) {
            a.out[(int64_t)blockIdx.x * a.hidden_size + i] = h * inverse * a.weight[i];
        }
    }
}

extern "C" qf_status qf_cuda_rmsnorm_f32(const qf_cuda_rmsnorm_f32_args *args, cudaStream_t stream, qf_error *err)
{
    if (args->residual == NULL || (args->out != NULL && args->weight == NULL)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rmsnorm_f32: residual or weight is null");
    }
    if (args->out == NULL && (args->rows != NULL || args->delta == NULL)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rmsnorm_f32: without out, with %s: there is nothing to do",
                       args->rows != NULL ? "`rows`" : "delta null");
    }
    if (args->num_rows < 1 || args->hidden_size < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rmsnorm_f32: %d rows of %d; expected at least 1",
                       args->num_rows, args->hidden_size);
    }
    return qf_launch("rmsnorm_f32", rmsnorm_f32_kernel, dim3((unsigned)args->num_rows), dim3(32), 0, false, stream, err,
                     *args);
}

/* --- silu_mul ------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(256) silu_mul_f32_kernel(float *gate, const float *up, int64_t size)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i < size) {
        const float g = gate[i];
        gate[i] = g / (1.0f + expf(-g)) * up[i];
    }
}

extern "C" qf_status qf_cuda_silu_mul_f32(float *gate, const float *up, int64_t size, cudaStream_t stream,
                                          qf_error *err)
{
    const int64_t max_size = (int64_t)INT32_MAX * 256;
    if (gate == NULL || up == NULL || size < 1 || size > max_size) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "silu_mul_f32: %lld elements, gate at %p, up at %p; expected 1 .. %lld, and both pointers",
                       (long long)size, (void *)gate, (const void *)up, (long long)max_size);
    }
    return qf_launch("silu_mul_f32", silu_mul_f32_kernel, dim3((unsigned)((size + 255) / 256)), dim3(256), 0, false,
                     stream, err, gate, up, size);
}

/* --- attention ------------------------------------------------------------------------------------------------ */

#define ATTENTION_WARPS 4
#define MAX_HEAD_DIM 256
#define LANE_COMPONENTS (MAX_HEAD_DIM / 32) /* components d = lane + 32 c of a head */

/* Row of the cache that holds a position of this sequence and KV head, as an index of elements. */
static __device__ __forceinline__ int64_t cache_row(const qf_cuda_attention_f32_args &a, int32_t seq, int32_t kv_head,
                                                    int32_t position)
{
    const int32_t block_size = a.shape.block_size;
    const int64_t block = a.block_tables[a.block_table_start[seq] + position / block_size];
    return ((block * a.shape.num_kv_heads + kv_head) * block_size + position % block_size) * a.shape.head_dim;
}

/* The sequence whose rows include `row`, or num_seqs. */
static __device__ __forceinline__ int32_t seq_of_row(const qf_cuda_attention_f32_args &a, int32_t row)
{
    int32_t seq = 0;
    while (seq < a.num_seqs && a.query_start_loc[seq + 1] <= row) {
        seq++;
    }
    return seq;
}

static __global__ void __launch_bounds__(32 * ATTENTION_WARPS, 4) attention_f32_kernel(qf_cuda_attention_f32_args a)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const int32_t lane = threadIdx.x % 32, head_dim = a.shape.head_dim;
    const int64_t item = (int64_t)blockIdx.x * ATTENTION_WARPS + threadIdx.x / 32;
    const int32_t row = (int32_t)(item / a.shape.num_heads), head = (int32_t)(item % a.shape.num_heads);
    const int32_t seq = row < a.num_tokens ? seq_of_row(a, row) : a.num_seqs;
    if (seq == a.num_seqs) {
        return; /* whole warps */
    }
    const int32_t kv_head = head / (a.shape.num_heads / a.shape.num_kv_heads);
    const int32_t end = a.seq_lens[seq] - (a.query_start_loc[seq + 1] - 1 - row); /* positions seen: begin .. end - 1 */
    const int32_t window = a.shape.sliding_window;
    const int32_t begin = window > 0 && end > window ? end - window : 0;
    const float *keys = static_cast<const float *>(a.kv.k), *values = static_cast<const float *>(a.kv.v);

    float q[LANE_COMPONENTS], sum[LANE_COMPONENTS];
#pragma unroll
    for (int c = 0; c < LANE_COMPONENTS; c++) {
        const int32_t d = lane + 32 * c;
        q[c] = d < head_dim ? a.q[item * head_dim + d] : 0.0f;
        sum[c] = 0.0f;
    }
    float largest = -INFINITY, total = 0.0f; /* of the groups so far */
    for (int32_t group = begin / 32 * 32; group < end; group += 32) {
        float score = -INFINITY; /* of position group + lane */
#pragma unroll 4
        for (int j = 0; j < 32; j++) {
            /* Positions outside of the range read a row inside of it, and are left out. */
            const int32_t position = min(max(group + j, begin), end - 1);
            const float *key = keys + cache_row(a, seq, kv_head, position);
            float product = 0.0f;
#pragma unroll
            for (int c = 0; c < LANE_COMPONENTS; c++) {
                if (lane + 32 * c < head_dim) {
                    product = fmaf(q[c], key[lane + 32 * c], product);
                }
            }
            product = __fmul_rn(warp_sum(product), a.scale);
            score = j == lane && position == group + j ? product : score;
        }
        const float new_largest = fmaxf(largest, warp_max(score));
        const float weight = expf(score - new_largest); /* 0 outside of the range */
        const float decay = expf(largest - new_largest);    /* 0 at first */
        largest = new_largest;
        total = fmaf(total, decay, warp_sum(weight));
#pragma unroll
        for (int c = 0; c < LANE_COMPONENTS; c++) {
            sum[c] *= decay;
        }
        const int32_t first = max(group, begin), last = min(group + 32, end);
#pragma unroll 4
        for (int32_t position = first; position < last; position++) {
            const float *value = values + cache_row(a, seq, kv_head, position);
            const float p = __shfl_sync(FULL_WARP, weight, position - group);
#pragma unroll
            for (int c = 0; c < LANE_COMPONENTS; c++) {
                if (lane + 32 * c < head_dim) {
                    sum[c] = fmaf(p, value[lane + 32 * c], sum[c]);
                }
            }
        }
    }
#pragma unroll
    for (int c = 0; c < LANE_COMPONENTS; c++) {
        if (lane + 32 * c < head_dim) {
            a.out[item * head_dim + lane + 32 * c] = sum[c] / total;
        }
    }
}

static qf_status check_attention(const qf_cuda_attention_f32_args *a, qf_error *err)
{
    const qf_cuda_attention_shape *s = &a->shape;
    if (a->q == NULL || a->out == NULL || a->kv.k == NULL || a->kv.v == NULL || a->query_start_loc == NULL ||
        a->seq_lens == NULL || a->block_tables == NULL || a->block_table_start == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention_f32: a pointer is null");
    }
    if (!a->kv.float32) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention_f32: the cache is bf16; expected float32");
    }
    if (s->head_dim < 1 || s->head_dim > MAX_HEAD_DIM || s->block_size < 1 || s->num_kv_heads < 1 ||
        s->num_heads < 1 || s->num_heads % s->num_kv_heads != 0 || s->sliding_window < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "attention_f32: %d heads of %d for %d KV heads, blocks of %d, sliding window %d; expected "
                       "head_dim 1 .. %d, heads a multiple of KV heads, blocks of at least 1, a window of at least 0",
                       s->num_heads, s->head_dim, s->num_kv_heads, s->block_size, s->sliding_window, MAX_HEAD_DIM);
    }
    if (a->kv.block_size != s->block_size || a->kv.num_kv_heads != s->num_kv_heads || a->kv.head_dim != s->head_dim) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "attention_f32: the cache is blocks of %d by %d KV heads of %d; expected %d by %d of %d",
                       a->kv.block_size, a->kv.num_kv_heads, a->kv.head_dim, s->block_size, s->num_kv_heads,
                       s->head_dim);
    }
    const int64_t warps = (int64_t)a->num_tokens * s->num_heads;
    if (a->num_seqs < 1 || a->num_tokens < 1 || warps > INT32_MAX) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "attention_f32: %d sequences, %d tokens of %d heads; expected at least 1 each, and at most %d "
                       "tokens times heads",
                       a->num_seqs, a->num_tokens, s->num_heads, INT32_MAX);
    }
    return QF_OK;
}

extern "C" qf_status qf_cuda_attention_f32(const qf_cuda_attention_f32_args *args, cudaStream_t stream, qf_error *err)
{
    QF_TRY(check_attention(args, err));
    const int64_t warps = (int64_t)args->num_tokens * args->shape.num_heads;
    return qf_launch("attention_f32", attention_f32_kernel,
                     dim3((unsigned)((warps + ATTENTION_WARPS - 1) / ATTENTION_WARPS)), dim3(32 * ATTENTION_WARPS), 0,
                     false, stream, err, *args);
}
