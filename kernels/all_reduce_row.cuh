/* A row of an all-reduce as its cluster of CTAs holds it in registers: loads, the sum of squares, stores of the normalised
 * row. all_reduce.cu draws who holds what. */
#ifndef QF_ALL_REDUCE_ROW_CUH
#define QF_ALL_REDUCE_ROW_CUH

#include "layout.cuh"
#include "peers.cuh"

#define MAX_THREADS 512
#define MAX_WARPS 64 /* of a row: 8,192 elements */
#define MAX_HIDDEN_SIZE (MAX_WARPS * 128)

typedef struct all_reduce_params {
    qf_cuda_rmsnorm_args norm;
    qf_cuda_peers peers;
    int64_t exchange;  /* bytes from a region's start to this launch's buffer */
    int64_t rows_at;   /* two shots: bytes from there to x */
    int32_t first_row; /* of `out`, of this launch */
    int32_t spread;    /* two shots: the ranks among which shares are dealt: num_ranks, or 1 if `rows` is given */
    bool fresh;
    float inverse_size;
} all_reduce_params;

/* --- clusters: there are none before sm_90 ----------------------------------------------------------------------- */

/* The sums of a row's warps, and how many bytes of them are still to come from the cluster. */
typedef struct row_sums {
    float of_warp[MAX_WARPS];
    uint64_t arrived;
} row_sums;

/* Prepares for `warps` sums. Followed by cluster_wait() before the first is sent. Not a word of this orders what goes to
 * global memory: a fence there would wait for the stores to other GPUs. */
static __device__ __forceinline__ void cluster_prepare(row_sums *sums, int32_t warps)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
        qf_mbarrier_init(&sums->arrived, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        qf_mbarrier_arrive_expect(&sums->arrived, (uint32_t)warps * (uint32_t)sizeof(float));
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
    (void)sums;
    (void)warps;
#endif
}

static __device__ __forceinline__ void cluster_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/* Stores a sum into CTA `rank` of the cluster. */
static __device__ __forceinline__ void cluster_send(row_sums *sums, int32_t warp, uint32_t rank, float v)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n"
                 ".reg .b32 there, barrier;\n"
                 "mapa.shared::cluster.u32 there, %0, %2;\n"
                 "mapa.shared::cluster.u32 barrier, %1, %2;\n"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [barrier];\n"
                 "}" ::"r"(qf_shared_address(&sums->of_warp[warp])),
                 "r"(qf_shared_address(&sums->arrived)), "r"(rank), "r"(__float_as_uint(v))
                 : "memory");
#else
    (void)rank;
    sums->of_warp[warp] = v;
#endif
}

/* --- a thread's part of a row ----------------------------------------------------------------------------------- */

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

/* Number of this thread's float4 v in the row; the grid is (C, rows). */
static __device__ __forceinline__ int32_t vector_index(int v)
{
    return (int32_t)(threadIdx.x + (blockIdx.x + v * gridDim.x) * blockDim.x);
}

/* The same, or the row's last one beyond its end: loads need no branch, so they all go out at once. */
static __device__ __forceinline__ int32_t load_index(const qf_cuda_rmsnorm_args &a, int v)
{
    return min(vector_index(v), a.hidden_size / 4 - 1);
}

static __device__ __forceinline__ bool is_inside(const qf_cuda_rmsnorm_args &a, int v)
{
    return vector_index(v) < a.hidden_size / 4;
}

static __device__ __forceinline__ void add(float4 &h, const float4 &c)
{
    h.x += c.x;
    h.y += c.y;
    h.z += c.z;
    h.w += c.w;
}

template <int vectors>
static __device__ __forceinline__ void load_weights(const qf_cuda_rmsnorm_args &a, float4 (&weight)[vectors])
{
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        weight[v] = load_now(reinterpret_cast<const float4 *>(a.weight) + load_index(a, v));
    }
}

/* This rank's share: its splits in order, `batch` in flight at once; never a value that would look empty. */
template <int batch, int vectors>
static __device__ __forceinline__ void load_share(const qf_cuda_rmsnorm_args &a, int32_t row, float4 (&share)[vectors])
{
    const float4 none = make_float4(-0.0f, -0.0f, -0.0f, -0.0f); /* adding it changes nothing, not even a zero's sign */
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        share[v] = none;
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
#pragma unroll
        for (int b = 0; b < batch; b++) {
#pragma unroll
            for (int v = 0; v < vectors; v++) {
                add(share[v], d[b][v]);
            }
        }
    }
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        share[v] = make_float4(qf_peer_encode(share[v].x), qf_peer_encode(share[v].y), qf_peer_encode(share[v].z),
                               qf_peer_encode(share[v].w));
    }
}

/* What the sum starts from. */
template <int vectors>
static __device__ __forceinline__ void load_residual(const all_reduce_params &p, int32_t row, float4 (&h)[vectors])
{
    const qf_cuda_rmsnorm_args &a = p.norm;
    const float4 *residual = reinterpret_cast<const float4 *>(a.residual + (int64_t)row * a.hidden_size);
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        h[v] = p.fresh ? make_float4(-0.0f, -0.0f, -0.0f, -0.0f) : residual[load_index(a, v)];
    }
}

/* --- the norm ------------------------------------------------------------------------------------------------------ */

/* Warps of a row, those beyond its end included. */
template <int vectors> static __device__ __forceinline__ int32_t warps_of_row()
{
    return (int32_t)(gridDim.x * blockDim.x / 32) * vectors;
}

/* The sum over the row's cluster, in every thread. */
template <int vectors>
static __device__ __forceinline__ float sum_of_squares(const qf_cuda_rmsnorm_args &a, const float4 (&h)[vectors],
                                                       row_sums *sums)
{
    const int32_t lane = (int32_t)threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        float sum = h[v].x * h[v].x;
        sum = fmaf(h[v].y, h[v].y, sum);
        sum = fmaf(h[v].z, h[v].z, sum);
        sum = fmaf(h[v].w, h[v].w, sum);
        sum = is_inside(a, v) ? sum : 0.0f;
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        const int32_t warp = vector_index(v) / 32;
        if (gridDim.x == 1) {
            if (lane == 0) {
                sums->of_warp[warp] = sum;
            }
        } else if (lane < (int32_t)gridDim.x) {
            cluster_send(sums, warp, (uint32_t)lane, sum);
        }
    }
    if (gridDim.x == 1) {
        __syncthreads();
    } else {
        qf_mbarrier_wait(&sums->arrived, 0);
    }
    const int32_t warps = warps_of_row<vectors>();
    float sum = (lane < warps ? sums->of_warp[lane] : 0.0f) + (lane + 32 < warps ? sums->of_warp[lane + 32] : 0.0f);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    return sum;
}

/* Four elements of a row of out, from k = 4 i on. */
static __device__ __forceinline__ void store_out(const qf_cuda_rmsnorm_args &a, int32_t row, int32_t i, uint2 packed)
{
    reinterpret_cast<uint2 *>(a.out)[2 * qf_tiled_chunk_index(4 * i, row, a.num_rows) + i % 2] = packed;
}

static __device__ __forceinline__ void store_padding(const qf_cuda_rmsnorm_args &a, int32_t row)
{
#pragma unroll 1
    for (int32_t i = a.hidden_size / 4 + vector_index(0); i < a.k_padded / 4; i += (int32_t)(gridDim.x * blockDim.x)) {
        store_out(a, row, i, make_uint2(0, 0));
    }
}

static __device__ __forceinline__ uint2 pack_normed(const float4 &h, float inverse, const float4 &w)
{
    return make_uint2(qf_pack_bf16(h.x * inverse * w.x, h.y * inverse * w.y),
                      qf_pack_bf16(h.z * inverse * w.z, h.w * inverse * w.w));
}

#endif
