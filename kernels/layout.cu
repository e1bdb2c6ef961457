/* The tiled layout: to and from rows of float32, and with its k permuted.
 *
 *   tile:    x(k, t) = bf16(rows[t][k]), 0 from `width` on
 *   untile:  rows[t][k] = x(k, t), k < width
 *   permute: out(k, t) = x(perm[k], t)
 *
 * Shapes and layouts: x, out: tiled (k, num_tokens) bf16 (qf_kernels.h); rows: (num_tokens, width) float32, any width
 * up to k; perm: (k), each in 0 .. k - 1.
 *
 * Roofline: memory. tile and untile move 4 width + 2 k bytes a token, once, for taps and tests: they need not be fast.
 * permute moves 4 k bytes a token, but gathers two bytes at a time: a 32-byte sector of x holds two tokens of 8 k, of
 * which a permutation wants one k, so it reads each sector up to eight times, from L2. Its checkpoints (act-order) are
 * rare; 2,048 tokens of k = 3,584 are 117 MB of sectors, tens of us beside a matrix product of 80 to 700.
 *
 * Plan: a thread takes a chunk, 8 k of one token: 16 bytes of the tiled side, one access. Chunks are numbered as they
 * lie in memory, so a warp's are contiguous:
 *
 *     k 0..7 of tokens 0..7 | k 8..15 of tokens 0..7 | ... k 56..63 | next tile of 8 tokens ... | next 64 k
 *     lanes 0..7              lanes 8..15              ...
 *
 * and in permute the 8 lanes of a tile gather from the same k: one line of 128 bytes.
 * Chunks of tokens beyond num_tokens are neither read nor written.
 *
 * Measured: see PERF.md. */
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "layout.cuh"

#define THREADS 256

static __device__ __forceinline__ int64_t thread_number()
{
    return (int64_t)blockIdx.x * THREADS + threadIdx.x;
}

static __host__ __device__ __forceinline__ int64_t num_chunks(int32_t k, int32_t num_tokens)
{
    return (int64_t)(k / 8) * qf_num_tiles(num_tokens) * qf_tile_tokens(num_tokens);
}

static __global__ void __launch_bounds__(THREADS) tile_kernel(const float *rows, uint4 *x, int32_t width, int32_t k,
                                                              int32_t num_tokens)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const qf_tiled_chunk at = qf_tiled_chunk_at(thread_number(), num_tokens);
    if (thread_number() >= num_chunks(k, num_tokens) || at.t >= num_tokens) {
        return;
    }
    const float *row = rows + (int64_t)at.t * width;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = at.k + i < width ? row[at.k + i] : 0.0f;
    }
    x[thread_number()] = make_uint4(qf_pack_bf16(v[0], v[1]), qf_pack_bf16(v[2], v[3]), qf_pack_bf16(v[4], v[5]),
                                    qf_pack_bf16(v[6], v[7]));
}

static __global__ void __launch_bounds__(THREADS) untile_kernel(const uint4 *x, float *rows, int32_t width, int32_t k,
                                                                int32_t num_tokens)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const qf_tiled_chunk at = qf_tiled_chunk_at(thread_number(), num_tokens);
    if (thread_number() >= num_chunks(k, num_tokens) || at.t >= num_tokens) {
        return;
    }
    const uint4 chunk = x[thread_number()];
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    float *row = rows + (int64_t)at.t * width;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (at.k + i < width) {
            row[at.k + i] = i % 2 == 0 ? qf_bf16_low(words[i / 2]) : qf_bf16_high(words[i / 2]);
        }
    }
}

static __global__ void __launch_bounds__(THREADS) permute_kernel(const uint16_t *x, const int32_t *perm, uint4 *out,
                                                                 int32_t k, int32_t num_tokens)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const qf_tiled_chunk at = qf_tiled_chunk_at(thread_number(), num_tokens);
    if (thread_number() >= num_chunks(k, num_tokens) || at.t >= num_tokens) {
        return;
    }
    const int4 first = *reinterpret_cast<const int4 *>(perm + at.k);
    const int4 second = *reinterpret_cast<const int4 *>(perm + at.k + 4);
    const int32_t from[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    uint32_t v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = x[qf_tiled_index(from[i], at.t, num_tokens)];
    }
    out[thread_number()] = make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
}

/* --- launchers ------------------------------------------------------------------------------------------------ */

static bool is_aligned(const void *pointer) { return (uintptr_t)pointer % 16 == 0; }

static qf_status check_shape(const char *name, const void *a, const void *b, int32_t width, int32_t k,
                             int32_t num_tokens, qf_error *err)
{
    if (a == NULL || b == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s: a pointer is null", name);
    }
    if (num_tokens < 1 || k < 128 || k % 128 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s: %d tokens, k %d; expected at least 1, a multiple of 128",
                       name, num_tokens, k);
    }
    if (width < 1 || width > k) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s: width %d; expected 1 .. %d", name, width, k);
    }
    return QF_OK;
}

static dim3 grid_of(int32_t k, int32_t num_tokens)
{
    return dim3((unsigned)((num_chunks(k, num_tokens) + THREADS - 1) / THREADS));
}

extern "C" qf_status qf_cuda_tile(const float *rows, uint16_t *x, int32_t width, int32_t k, int32_t num_tokens,
                                  cudaStream_t stream, qf_error *err)
{
    QF_TRY(check_shape("tile", rows, x, width, k, num_tokens, err));
    if (!is_aligned(x)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "tile: x is at %p; expected a multiple of 16", (void *)x);
    }
    return qf_launch("tile", tile_kernel, grid_of(k, num_tokens), dim3(THREADS), 0, false, stream, err, rows,
                     reinterpret_cast<uint4 *>(x), width, k, num_tokens);
}

extern "C" qf_status qf_cuda_untile(const uint16_t *x, float *rows, int32_t width, int32_t k, int32_t num_tokens,
                                    cudaStream_t stream, qf_error *err)
{
    QF_TRY(check_shape("untile", x, rows, width, k, num_tokens, err));
    if (!is_aligned(x)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "untile: x is at %p; expected a multiple of 16",
                       (const void *)x);
    }
    return qf_launch("untile", untile_kernel, grid_of(k, num_tokens), dim3(THREADS), 0, false, stream, err,
                     reinterpret_cast<const uint4 *>(x), rows, width, k, num_tokens);
}

extern "C" qf_status qf_cuda_permute(const uint16_t *x, const int32_t *perm, uint16_t *out, int32_t k,
                                     int32_t num_tokens, cudaStream_t stream, qf_error *err)
{
    QF_TRY(check_shape("permute", x, out, k, k, num_tokens, err));
    if (perm == NULL || out == x) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "permute: %s",
                       perm == NULL ? "perm is null" : "out is x; expected another matrix");
    }
    if (!is_aligned(out) || !is_aligned(perm)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "permute: out is at %p, perm at %p; expected multiples of 16",
                       (void *)out, (const void *)perm);
    }
    return qf_launch("permute", permute_kernel, grid_of(k, num_tokens), dim3(THREADS), 0, false, stream, err, x, perm,
                     reinterpret_cast<uint4 *>(out), k, num_tokens);
}
