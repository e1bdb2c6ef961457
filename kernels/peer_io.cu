/* The small pieces of tensor parallelism: logits to rank 0, sampled tokens from it.
 *
 *   gather:        rank 0's out[row][first_column + j] = part[row][j], of every rank
 *   share_tokens:  every rank's token_ids[i], and last_token[rows[i].slot], = rank 0's token_ids[i]
 *
 * Shapes: qf_all_reduce.h. Roofline of gather: rank 0's link. A row of 152,064 float32 columns on 4 GPUs brings 456 KB in:
 * 1.2 us at 390 GB/s, 75 us for 64 rows; each rank sends a third of it. One row is latency: about 3 us. Tokens: latency,
 * about 2 us, hidden behind the end of rank 0's step.
 *
 * Plan of gather: GATHER_BLOCKS blocks on every rank copy strips of all rows, straight into rank 0's memory. A block's
 * stores are many and are looked at by another kernel, so here a flag follows them: all its threads' stores, a barrier, a
 * fence of the system, the flag. Rank 0's block b takes the flags of the others' blocks b, so when its kernel ends
 * everything is there. Tokens are words of their own, one more than the token so that none looks empty.
 *
 * Measured: see PERF.md. */
#include "peers.cuh"

#define THREADS 512
#define TOKEN_THREADS 256

extern "C" qf_status qf_cuda_all_reduce_load(qf_error *err);

/* --- gather ------------------------------------------------------------------------------------------------------- */

typedef struct gather_params {
    qf_cuda_gather_args args;
    qf_cuda_peers peers;
} gather_params;

/* `width` values of T of each row. */
template <typename T> static __device__ __forceinline__ void copy_rows(const qf_cuda_gather_args &a)
{
    constexpr int32_t floats = sizeof(T) / sizeof(float);
    const int32_t width = a.num_columns / floats, stride = (int32_t)gridDim.x * THREADS;
    const int32_t first = (int32_t)(blockIdx.x * THREADS + threadIdx.x);
    for (int32_t row = 0; row < a.num_rows; row++) {
        const T *from = reinterpret_cast<const T *>(a.part + (int64_t)row * a.part_stride);
        T *to = reinterpret_cast<T *>(a.out + (int64_t)row * a.out_stride + a.first_column);
#pragma unroll 4
        for (int32_t i = first; i < width; i += stride) {
            to[i] = from[i];
        }
    }
}

template <typename T>
static __global__ void __launch_bounds__(THREADS) qf_gather_kernel(const __grid_constant__ gather_params p)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    copy_rows<T>(p.args);
    uint32_t *flags = reinterpret_cast<uint32_t *>(p.peers.regions[0] + QF_PEER_FLAGS) + blockIdx.x;
    if (p.peers.rank != 0) {
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence_system();
            qf_peer_store(flags + p.peers.rank * QF_PEER_GATHER_BLOCKS, 1u);
        }
    } else if (threadIdx.x > 0 && (int32_t)threadIdx.x < p.peers.num_ranks) {
        (void)qf_peer_take(p.peers, flags + threadIdx.x * QF_PEER_GATHER_BLOCKS, (int32_t)threadIdx.x);
        __threadfence_system(); /* what the flag stands for comes before what follows this kernel */
    }
}

/* --- tokens -------------------------------------------------------------------------------------------------------- */

typedef struct share_params {
    qf_cuda_share_tokens_args args;
    qf_cuda_peers peers;
} share_params;

static __global__ void __launch_bounds__(TOKEN_THREADS) qf_share_tokens_kernel(const __grid_constant__ share_params p)
{
    const qf_cuda_share_tokens_args &a = p.args;
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    for (int32_t i = (int32_t)threadIdx.x; i < a.num_rows; i += TOKEN_THREADS) {
        if (p.peers.num_ranks == 0) { /* they have come some other way */
            if (a.rows[i].slot >= 0) {
                a.last_token[a.rows[i].slot] = a.token_ids[i];
            }
        } else if (p.peers.rank == 0) {
            const uint32_t word = (uint32_t)max(a.token_ids[i], -1) + 1u;
            for (int32_t r = 1; r < p.peers.num_ranks; r++) {
                qf_peer_store(reinterpret_cast<uint32_t *>(p.peers.regions[r] + QF_PEER_TOKENS) + i, word);
            }
        } else {
            uint32_t *words = reinterpret_cast<uint32_t *>(p.peers.regions[p.peers.rank] + QF_PEER_TOKENS);
            const uint32_t word = qf_peer_take(p.peers, words + i, 0);
            const int32_t token = word == QF_PEER_EMPTY ? -1 : (int32_t)(word - 1u), slot = a.rows[i].slot;
            a.token_ids[i] = token;
            if (slot >= 0) {
                a.last_token[slot] = token;
            }
        }
    }
}

/* --- launchers ------------------------------------------------------------------------------------------------------ */

extern "C" size_t qf_cuda_peer_region_bytes(size_t exchange_bytes)
{
    return qf_peer_decode_at(exchange_bytes) + QF_PEER_DECODE_BYTES;
}

extern "C" qf_status qf_cuda_peer_reset(const qf_cuda_peers *peers, cudaStream_t stream, qf_error *err)
{
    QF_TRY(qf_peer_check("peer_reset", peers, err));
    char *region = peers->regions[peers->rank];
    QF_CUDA_TRY(cudaMemsetAsync(region, 0xff, qf_peer_decode_at(peers->exchange_bytes), stream));
    QF_CUDA_TRY(cudaMemsetAsync(region, 0, QF_PEER_HEADER_BYTES, stream));
    return QF_OK;
}

extern "C" qf_status qf_cuda_peer_load(qf_error *err)
{
    cudaFuncAttributes attributes;
    QF_CUDA_TRY(cudaFuncGetAttributes(&attributes, qf_gather_kernel<float>));
    QF_CUDA_TRY(cudaFuncGetAttributes(&attributes, qf_gather_kernel<float4>));
    QF_CUDA_TRY(cudaFuncGetAttributes(&attributes, qf_share_tokens_kernel));
    return qf_cuda_all_reduce_load(err);
}

extern "C" qf_status qf_cuda_gather(const qf_cuda_gather_args *args, const qf_cuda_peers *peers,
                                    const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    QF_TRY(qf_peer_check("gather", peers, err));
    if (args->part == NULL || args->out == NULL || args->num_rows < 1 || args->first_column < 0 ||
        args->num_columns < 0 || args->num_columns > args->part_stride ||
        args->num_columns > args->out_stride - args->first_column) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "gather: %d rows, columns %d .. + %d of %d here, of %d there; or part or out is null",
                       args->num_rows, args->first_column, args->num_columns, args->part_stride, args->out_stride);
    }
    const bool wide = (args->first_column | args->num_columns | args->part_stride | args->out_stride) % 4 == 0 &&
                      ((uintptr_t)args->part | (uintptr_t)args->out) % 16 == 0;
    const gather_params params = {.args = *args, .peers = *peers};
    return qf_launch("gather", wide ? qf_gather_kernel<float4> : qf_gather_kernel<float>, dim3(QF_PEER_GATHER_BLOCKS),
                     dim3(THREADS), 0, device->dependent_launch, stream, err, params);
}

extern "C" qf_status qf_cuda_share_tokens(const qf_cuda_share_tokens_args *args, const qf_cuda_peers *peers,
                                          const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    share_params params = {};
    params.args = *args;
    if (peers != NULL) {
        QF_TRY(qf_peer_check("share_tokens", peers, err));
        params.peers = *peers;
    }
    if (args->token_ids == NULL || args->num_rows < 1 || args->num_rows > QF_CUDA_MAX_SHARED_TOKENS ||
        ((peers == NULL || peers->rank != 0) && (args->rows == NULL || args->last_token == NULL))) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "share_tokens: %d rows, expected 1 to %d; or token_ids, rows or last_token is null", args->num_rows,
                       QF_CUDA_MAX_SHARED_TOKENS);
    }
    return qf_launch("share_tokens", qf_share_tokens_kernel, dim3(1), dim3(TOKEN_THREADS), 0, device->dependent_launch,
                     stream, err, params);
}
