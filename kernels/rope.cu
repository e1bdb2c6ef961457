/* Rotary position embedding, and the write of new keys and values to the paged cache.
 *
 *   x = sum over s of qkv[s][t]     (in order of s)
 *   out_j       = x_j cos_j - x_{j + h/2} sin_j               j < h/2, h = head_dim, for q and k
 *   out_{j+h/2} = x_{j + h/2} cos_j + x_j sin_j
 *   q[t] = out;  cache_k[slot] = out;  cache_v[slot] = x
 *
 * Shapes: qkv (num_splits, num_tokens, qkv_stride) float32, a row being num_heads heads of q, then num_kv_heads of k,
 * then as many of v; cos_sin (num_tokens, head_dim) float32 (rope_table.cuh); q (num_tokens, num_heads, head_dim) and the caches
 * (num_blocks, num_kv_heads, block_size, head_dim), bf16 or float32. slot = block * block_size + offset; a negative one
 * (padding) writes nothing to the cache.
 *
 * Roofline: memory. A token reads 4 num_splits qkv_stride bytes and writes half of one of them: 2,048 tokens of the 7B
 * model with one split move 57 MB, 13 us at 4.4 TB/s; one token is a launch and one trip to memory, target 2 us.
 *
 * Plan: one thread rotates `width` (4; 1 for float32) neighbouring pairs of one head, so it loads and stores vectors of
 * both halves of the head; threads in a row take neighbouring vectors, then heads, then tokens. All loads of up to 8
 * splits, and those of cosines and sines, go out before the first addition. Sums, rotations and rounding have one order, whatever the batch.
 *
 * Measured: see PERF.md. */
#include "common/launch.cuh"
#include "common/ptx.cuh"

#define THREADS 256
#define SPLIT_BATCH 8

template <int width> struct floats {
    float v[width];
};

/* Plain loads, 16 bytes for width 4. Volatile: they stay behind the dependency wait, and all go out before their use.
 * */
static __device__ __forceinline__ floats<4> load_floats(const float *p, floats<4>)
{
    floats<4> r;
    asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(r.v[0]), "=f"(r.v[1]), "=f"(r.v[2]), "=f"(r.v[3])
                 : "l"(p)
                 : "memory");
    return r;
}

static __device__ __forceinline__ floats<1> load_floats(const float *p, floats<1>)
{
    floats<1> r;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(r.v[0]) : "l"(p) : "memory");
    return r;
}

/* low and high: the sums over splits of the two halves' vectors at `p`. */
template <int width>
static __device__ __forceinline__ void sum_splits(const float *p, int32_t half, int64_t split_size, int32_t num_splits,
                                                  floats<width> &low, floats<width> &high)
{
#pragma unroll 1
    for (int32_t first = 0; first < num_splits; first += SPLIT_BATCH) {
        floats<width> a[SPLIT_BATCH], b[SPLIT_BATCH];
#pragma unroll
        for (int s = 0; s < SPLIT_BATCH; s++) {
            if (first + s < num_splits) {
                const float *from = p + (first + s) * split_size;
                a[s] = load_floats(from, floats<width>());
                b[s] = load_floats(from + half, floats<width>());
            }
        }
#pragma unroll
        for (int s = 0; s < SPLIT_BATCH; s++) {
            if (first + s < num_splits) {
#pragma unroll
                for (int i = 0; i < width; i++) {
                    low.v[i] = first + s == 0 ? a[s].v[i] : low.v[i] + a[s].v[i];
                    high.v[i] = first + s == 0 ? b[s].v[i] : high.v[i] + b[s].v[i];
                }
            }
        }
    }
}

static __device__ __forceinline__ void store_vector(float *p, const floats<1> &x) { *p = x.v[0]; }

static __device__ __forceinline__ void store_vector(uint16_t *p, const floats<4> &x)
{
    *reinterpret_cast<uint2 *>(p) = make_uint2(qf_pack_bf16(x.v[0], x.v[1]), qf_pack_bf16(x.v[2], x.v[3]));
}

template <int width>
static __device__ __forceinline__ void rotate(const floats<width> &c, const floats<width> &s, floats<width> &low,
                                              floats<width> &high)
{
#pragma unroll
    for (int i = 0; i < width; i++) {
        const float x = low.v[i], y = high.v[i];
        low.v[i] = __fmaf_rn(x, c.v[i], -__fmul_rn(y, s.v[i]));
        high.v[i] = __fmaf_rn(y, c.v[i], __fmul_rn(x, s.v[i]));
    }
}

template <int width, typename T>
static __global__ void __launch_bounds__(THREADS) rope_kv_write_kernel(qf_cuda_rope_kv_write_args a)
{
    qf_grid_launch_dependents();
    const int32_t head_dim = a.kv.head_dim, half = head_dim / 2, num_kv_heads = a.kv.num_kv_heads;
    const int32_t vectors = half / width, per_token = (a.num_heads + 2 * num_kv_heads) * vectors;
    const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int32_t token = (int32_t)(index / per_token), rest = (int32_t)(index - (int64_t)token * per_token);
    const int32_t head = rest / vectors, j = (rest - head * vectors) * width;
    /* The step's first kernel lets no other start before its metadata is in place: slots may be read before the wait. */
    const int32_t slot = head < a.num_heads ? 0 : token < a.num_tokens ? __ldcg(a.slot_mapping + token) : -1;
    qf_grid_dependency_wait();
    if (token >= a.num_tokens || slot < 0) {
        return;
    }
    floats<width> low, high, cosine, sine;
    if (head < a.num_heads + num_kv_heads) {
        cosine = load_floats(a.cos_sin + (int64_t)token * head_dim + j, floats<width>());
        sine = load_floats(a.cos_sin + (int64_t)token * head_dim + half + j, floats<width>());
    }
    sum_splits<width>(a.qkv + (int64_t)token * a.qkv_stride + head * head_dim + j, half,
                      (int64_t)a.num_tokens * a.qkv_stride, a.num_splits, low, high);
    if (head < a.num_heads + num_kv_heads) {
        rotate<width>(cosine, sine, low, high);
    }
    T *to;
    if (head < a.num_heads) {
        to = static_cast<T *>(a.q) + ((int64_t)token * a.num_heads + head) * head_dim;
    } else {
        const int32_t kv_head = (head - a.num_heads) % num_kv_heads;
        const int32_t block = slot / a.kv.block_size, offset = slot - block * a.kv.block_size;
        to = static_cast<T *>(head < a.num_heads + num_kv_heads ? a.kv.k : a.kv.v) +
             (((int64_t)block * num_kv_heads + kv_head) * a.kv.block_size + offset) * head_dim;
    }
    store_vector(to + j, low);
    store_vector(to + half + j, high);
}

static qf_status check_write(const qf_cuda_rope_kv_write_args *a, qf_error *err)
{
    if (a->qkv == NULL || a->cos_sin == NULL || a->slot_mapping == NULL || a->q == NULL || a->kv.k == NULL ||
        a->kv.v == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rope_kv_write: a null pointer");
    }
    if (a->num_tokens <= 0 || a->num_splits <= 0 || a->num_heads <= 0 || a->kv.num_kv_heads <= 0 ||
        a->kv.block_size <= 0 || a->kv.head_dim <= 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "rope_kv_write: %d tokens, %d splits, %d and %d heads of %d, blocks of %d (must be positive)",
                       a->num_tokens, a->num_splits, a->num_heads, a->kv.num_kv_heads, a->kv.head_dim,
                       a->kv.block_size);
    }
    const int32_t unit = a->kv.float32 ? 2 : 8;
    if (a->kv.head_dim % unit != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rope_kv_write: head_dim %d is not a multiple of %d",
                       a->kv.head_dim, unit);
    }
    const int64_t width = (int64_t)(a->num_heads + 2 * a->kv.num_kv_heads) * a->kv.head_dim;
    if (a->qkv_stride < width || (!a->kv.float32 && a->qkv_stride % 4 != 0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "rope_kv_write: qkv_stride %d for rows of %lld (must hold them, a multiple of 4 for bf16)",
                       a->qkv_stride, (long long)width);
    }
    const uintptr_t all = (uintptr_t)a->qkv | (uintptr_t)a->cos_sin | (uintptr_t)a->q | (uintptr_t)a->kv.k |
                          (uintptr_t)a->kv.v;
    if (all % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rope_kv_write: a pointer is not aligned to 16 bytes");
    }
    return QF_OK;
}

extern "C" qf_status qf_cuda_rope_kv_write(const qf_cuda_rope_kv_write_args *args, const qf_cuda_device *device,
                                           cudaStream_t stream, qf_error *err)
{
    qf_status status = check_write(args, err);
    if (status != QF_OK) {
        return status;
    }
    const int64_t pairs = (int64_t)args->num_tokens * (args->num_heads + 2 * args->kv.num_kv_heads) *
                          (args->kv.head_dim / 2);
    const int64_t threads = args->kv.float32 ? pairs : pairs / 4;
    const dim3 grid((unsigned)((threads + THREADS - 1) / THREADS));
    return qf_launch("rope_kv_write",
                     args->kv.float32 ? rope_kv_write_kernel<1, float> : rope_kv_write_kernel<4, uint16_t>, grid,
                     dim3(THREADS), 0, device->dependent_launch, stream, err, *args);
}
