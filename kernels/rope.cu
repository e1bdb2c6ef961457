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
 * (padding) writes nothing to the cache. Low-bit caches take codes and scale words instead (kv_encode.cuh); what comes
 * here as k has no bias then. Beside them a 16-bit window may take k, its bias added, and v as a bf16 cache holds them.
 *
 * Roofline: memory. A token reads 4 num_splits qkv_stride bytes and writes half of one of them: 2,048 tokens of the 7B
 * model with one split move 57 MB, 13 us at 4.4 TB/s; one token is a launch and one trip to memory, target 2 us.
 *
 * Plan: one thread rotates `width` (4; 1 for float32) neighbouring pairs of one head, so it loads and stores vectors of
 * both halves of the head; threads in a row take neighbouring vectors, then heads, then tokens. All loads of up to 8
 * splits, and those of cosines and sines, go out before the first addition. Sums, rotations and rounding have one order, whatever the batch.
 * Low-bit rows are encoded by the head_dim / 8 neighbouring threads that hold them.
 *
 * Measured: see PERF.md. */
#include "common/launch.cuh"
#include "kv_row.cuh"
#include "qf_attention.h"

#define THREADS 128 /* few: what they have in flight lands in an L1 that is small beside the linears */
#define SPLIT_BATCH 8

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

static __device__ __forceinline__ uint16_t *row_of_16_bits(const qf_cuda_kv &kv, bool key, int32_t slot, int32_t kv_head)
{
    const int32_t block = slot / kv.block_size, offset = slot - block * kv.block_size;
    return static_cast<uint16_t *>(key ? kv.k : kv.v) +
           (((int64_t)block * kv.num_kv_heads + kv_head) * kv.block_size + offset) * kv.head_dim;
}

/* The copy in the 16-bit window: of a key with its bias, not rotated yet, or of a value. */
static __device__ __forceinline__ void store_window(const qf_cuda_rope_kv_write_args &a, bool key, int32_t slot,
                                                    int32_t kv_head, int32_t j, const floats<4> &cosine,
                                                    const floats<4> &sine, floats<4> low, floats<4> high)
{
    const int32_t half = a.kv.head_dim / 2;
    if (key) {
        if (a.kv.k_bias != NULL) {
            const floats<4> b = load_floats(a.kv.k_bias + kv_head * a.kv.head_dim + j, floats<4>());
            const floats<4> c = load_floats(a.kv.k_bias + kv_head * a.kv.head_dim + half + j, floats<4>());
#pragma unroll
            for (int i = 0; i < 4; i++) {
                low.v[i] = __fadd_rn(low.v[i], b.v[i]);
                high.v[i] = __fadd_rn(high.v[i], c.v[i]);
            }
        }
        rotate<4>(cosine, sine, low, high);
    }
    uint16_t *to = row_of_16_bits(a.window, key, slot, kv_head);
    store_vector(to + j, low);
    store_vector(to + half + j, high);
}

/* The same for a low-bit cache. Rows of one or more heads share a warp, and all its lanes take part in the encoding. */
template <int format>
static __global__ void __launch_bounds__(THREADS) rope_kv_write_low_bit_kernel(qf_cuda_rope_kv_write_args a)
{
    qf_grid_launch_dependents();
    const int32_t head_dim = a.kv.head_dim, half = head_dim / 2, num_kv_heads = a.kv.num_kv_heads;
    const int32_t vectors = half / 4, per_token = (a.num_heads + 2 * num_kv_heads) * vectors;
    const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int32_t token = (int32_t)(index / per_token), rest = (int32_t)(index - (int64_t)token * per_token);
    const int32_t head = rest / vectors, j = (rest - head * vectors) * 4;
    const bool is_query = head < a.num_heads, rotated = head < a.num_heads + num_kv_heads;
    const bool in_cache = token < a.num_tokens && !is_query;
    const int32_t slot = in_cache ? __ldcg(a.slot_mapping + token) : -1;
    const int32_t window_slot = in_cache && a.window_slot_mapping != NULL ? __ldcg(a.window_slot_mapping + token) : -1;
    const bool live = token < a.num_tokens && (is_query || slot >= 0 || window_slot >= 0);
    const int32_t kv_head = is_query ? 0 : (head - a.num_heads) % num_kv_heads;
    qf_grid_dependency_wait();
    floats<4> low = {}, high = {};
    if (live) {
        floats<4> cosine, sine;
        if (rotated) {
            cosine = load_floats(a.cos_sin + (int64_t)token * head_dim + j, floats<4>());
            sine = load_floats(a.cos_sin + (int64_t)token * head_dim + half + j, floats<4>());
        }
        sum_splits<4>(a.qkv + (int64_t)token * a.qkv_stride + head * head_dim + j, half,
                      (int64_t)a.num_tokens * a.qkv_stride, a.num_splits, low, high);
        if (window_slot >= 0) {
            store_window(a, rotated, window_slot, kv_head, j, cosine, sine, low, high);
        }
        if (rotated) {
            rotate<4>(cosine, sine, low, high);
        }
    }
    if (live && is_query) {
        uint16_t *to = static_cast<uint16_t *>(a.q) + ((int64_t)token * a.num_heads + head) * head_dim;
        store_vector(to + j, low);
        store_vector(to + half + j, high);
    }
    if (__any_sync(0xffffffffu, slot >= 0)) {
        store_low_bit<format>(find_low_bit<format>(a.kv, rotated, max(slot, 0), kv_head), head_dim, rotated, j, low, high,
                              slot >= 0);
    }
}

static qf_status check_low_bit(const qf_cuda_rope_kv_write_args *a, qf_error *err)
{
    const qf_cuda_kv *kv = &a->kv, *window = &a->window;
    if (kv->format < QF_CUDA_KV_16 || kv->format > QF_CUDA_KV_NF4 || (kv->format != QF_CUDA_KV_16 && kv->float32)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rope_kv_write: cache format %d (0 to %d)%s", (int)kv->format,
                       (int)QF_CUDA_KV_NF4, kv->float32 ? " of float32" : "");
    }
    if (kv->format != QF_CUDA_KV_16 && kv->head_dim != 64 && kv->head_dim != 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rope_kv_write: low-bit rows of head_dim %d (64 or 128)",
                       kv->head_dim);
    }
    if (a->window_slot_mapping == NULL) {
        return QF_OK;
    }
    if (kv->format == QF_CUDA_KV_16 || window->k == NULL || window->v == NULL || window->format != QF_CUDA_KV_16 ||
        window->float32 || window->block_size <= 0 || window->num_kv_heads != kv->num_kv_heads ||
        window->head_dim != kv->head_dim ||
        ((uintptr_t)window->k | (uintptr_t)window->v | (uintptr_t)kv->k_bias) % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "rope_kv_write: a window (blocks of %d, %d heads of %d, format %d) needs a low-bit cache of its "
                       "heads beside it, bf16 itself, aligned to 16 bytes",
                       window->block_size, window->num_kv_heads, window->head_dim, (int)window->format);
    }
    return QF_OK;
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

typedef void (*write_kernel)(qf_cuda_rope_kv_write_args);

static write_kernel write_kernel_of(const qf_cuda_kv *kv)
{
    switch (kv->format) {
    case QF_CUDA_KV_FP8: return rope_kv_write_low_bit_kernel<QF_CUDA_KV_FP8>;
    case QF_CUDA_KV_INT8: return rope_kv_write_low_bit_kernel<QF_CUDA_KV_INT8>;
    case QF_CUDA_KV_INT4: return rope_kv_write_low_bit_kernel<QF_CUDA_KV_INT4>;
    case QF_CUDA_KV_NF4: return rope_kv_write_low_bit_kernel<QF_CUDA_KV_NF4>;
    case QF_CUDA_KV_16: break;
    }
    return kv->float32 ? rope_kv_write_kernel<1, float> : rope_kv_write_kernel<4, uint16_t>;
}

extern "C" qf_status qf_cuda_rope_kv_write(const qf_cuda_rope_kv_write_args *args, const qf_cuda_device *device,
                                           cudaStream_t stream, qf_error *err)
{
    qf_status status = check_write(args, err);
    if (status == QF_OK) {
        status = check_low_bit(args, err);
    }
    if (status != QF_OK) {
        return status;
    }
    const int64_t pairs = (int64_t)args->num_tokens * (args->num_heads + 2 * args->kv.num_kv_heads) *
                          (args->kv.head_dim / 2);
    const int64_t threads = args->kv.float32 ? pairs : pairs / 4;
    const dim3 grid((unsigned)((threads + THREADS - 1) / THREADS));
    return qf_launch("rope_kv_write", write_kernel_of(&args->kv), grid, dim3(THREADS), 0, device->dependent_launch,
                     stream, err, *args);
}
