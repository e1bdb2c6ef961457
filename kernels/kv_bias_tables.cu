/* The tables that add the rotated bias of k_proj to low-bit keys.
 *
 *   coarse[n][j] = factor cos(n T th_j), sines behind        rotation[i][j] = cos(i th_j), sines behind
 *   fine: 2^s (cos((k + 1/2) th_j) - 1) and 2^s sin((k + 1/2) th_j) in fp16,   k < T / 2, T = QF_CUDA_BIAS_TILE,
 *         s = QF_CUDA_BIAS_SHIFT: what lies k + 1/2 before and behind the middle of T positions differs in signs only
 *   behind fine: cos((T - 1) / 2 th_j), sines behind, in float32: from the first of T positions to their middle
 *
 * Shapes: coarse (num_tiles, head_dim) and rotation (T, head_dim) float32; fine (T / 32, head_dim / 32, 2, 32, 8) fp16, A
 * fragments of mma.m16n8k16: of tile m, chunk c, cosines' or sines', lane 4 g + t, element 2 r + e is row
 * k = 16 m + g + 8 (r % 2) and frequency j = 16 c + 4 t + 2 (r / 2) + e. The scaling by 2^s keeps the slow frequencies'
 * sines, of 1e-6 and less, at the full precision of fp16.
 *
 * Roofline: none; it runs once, at load. Plan: one thread a pair of entries. Angles, sines and cosines are taken in double
 * and rounded once.
 *
 * Measured: see PERF.md. */
#include "common/launch.cuh"
#include "common/ptx.cuh"

#define THREADS 256

static __global__ void __launch_bounds__(THREADS) bias_tables_kernel(qf_cuda_kv_bias_tables_args a)
{
    const int32_t half = a.head_dim / 2;
    const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int32_t row = (int32_t)(index / half), j = (int32_t)(index - (int64_t)row * half);
    if (row >= a.num_tiles + QF_CUDA_BIAS_TILE) {
        return;
    }
    const int32_t i = row - a.num_tiles; /* of the other two tables */
    const int64_t position = i < 0 ? (int64_t)row * QF_CUDA_BIAS_TILE : i;
    double sine, cosine;
    sincos((double)position * (double)a.inv_freq[j], &sine, &cosine);
    if (i < 0) {
        a.coarse[(int64_t)row * a.head_dim + j] = (float)(cosine * a.factor);
        a.coarse[(int64_t)row * a.head_dim + half + j] = (float)(sine * a.factor);
        return;
    }
    a.rotation[i * a.head_dim + j] = (float)cosine;
    a.rotation[i * a.head_dim + half + j] = (float)sine;
    if (i == QF_CUDA_BIAS_TILE / 2) {
        sincos(0.5 * (QF_CUDA_BIAS_TILE - 1) * (double)a.inv_freq[j], &sine, &cosine);
        float *middle = reinterpret_cast<float *>(a.fine + QF_CUDA_BIAS_TILE / 2 * a.head_dim);
        middle[j] = (float)cosine;
        middle[half + j] = (float)sine;
    } else if (i < QF_CUDA_BIAS_TILE / 2) {
        sincos(((double)i + 0.5) * (double)a.inv_freq[j], &sine, &cosine);
        const double scale = (double)(1 << QF_CUDA_BIAS_SHIFT);
        const int32_t lane = i % 8 * 4 + j % 16 / 4, element = 2 * (j % 4 / 2 * 2 + i % 16 / 8) + j % 2;
        __half *to = reinterpret_cast<__half *>(a.fine) + (i / 16 * (half / 16) + j / 16) * 512 + lane * 8 + element;
        to[0] = __float2half_rn((float)((cosine - 1.0) * scale));
        to[256] = __float2half_rn((float)(sine * scale));
    }
}

extern "C" qf_status qf_cuda_kv_bias_tables(const qf_cuda_kv_bias_tables_args *args, cudaStream_t stream,
                                            qf_error *err)
{
    const qf_cuda_kv_bias_tables_args *a = args;
    if (a->inv_freq == NULL || a->coarse == NULL || a->fine == NULL || a->rotation == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "kv_bias_tables: a null pointer");
    }
    if ((a->head_dim != 64 && a->head_dim != 128) || a->num_tiles <= 0 || !(a->factor > 0.0) || !(a->factor < 8.0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "kv_bias_tables: head_dim %d (64 or 128), %d tiles, factor %g (above 0, below 8)", a->head_dim,
                       a->num_tiles, a->factor);
    }
    const int64_t threads = (int64_t)(a->num_tiles + QF_CUDA_BIAS_TILE) * (a->head_dim / 2);
    return qf_launch("kv_bias_tables", bias_tables_kernel, dim3((unsigned)((threads + THREADS - 1) / THREADS)),
                     dim3(THREADS), 0, false, stream, err, *args);
}
