/* Causal attention over the paged cache.
 *
 *   out[row][head] = sum over j of softmax_j(scale q[row][head] . k[j]) v[j],  j in (p - window, p],  p its position
 *
 * Shapes and layouts: q (num_tokens, num_heads, head_dim) bf16; caches (num_blocks, num_kv_heads, block_size, head_dim)
 * bf16, found through block tables; out: tiled bf16 (num_heads * head_dim padded to 128, num_tokens). Heads h of a
 * group of num_heads / num_kv_heads share a kv head. Softmax in float32, by powers of two; weights are rounded to bf16.
 *
 * Roofline. Decode: memory; a sequence of n positions reads 4 n num_kv_heads head_dim bytes: 256 sequences of 384 of
 * the 7B model 201 MB, 46 us at 4.4 TB/s. Prefill: tensor cores; 2 n^2 num_heads head_dim FLOPs of causal work: 8,192
 * tokens of the 7B model 481 GFLOP; mma.sync reaches little more than half of the 990 TFLOP/s of wgmma. Target 350.
 *
 * Plan. The host cuts the batch into items (csrc/backend/cuda/attention_plan.c); a CTA of 4 warps takes an (item, kv
 * head), long items first:
 *
 *     decode item:   1 row, a run of positions     -> attention_decode.cuh: warps take turns at tiles of 16 positions
 *     prefill item:  128 (64) rows of the group,   -> attention_prefill.cuh: warps own 32 (16) rows and walk over tiles
 *                    all or a run of positions        of 64 positions in shared memory; low-bit caches:
 *                                                     attention_prefill_lowbit.cuh
 *
 *     positions  | split 0 | split 1 | split 2 |..    items of one row tile: partial results (maximum, sum, values) in
 *                    |         |         |            the workspace; the CTA that arrives last at the tile's counter
 *                    +---------+---------+--> merge   merges all in order of split, so that timing does not show
 *
 * The decode grid is fixed (graphs), and its CTAs loop over the items that there are. Rows of a captured graph's
 * padding have no items.
 *
 * batch_invariant: all rows go through the prefill kernel with 64 rows, which computes each QF_CUDA_SPLIT_TOKENS
 * positions from scratch and merges them in order, in registers or by way of the workspace, with the same arithmetic; a
 * row of the tensor cores' product depends on no other row.
 *
 * Measured, decode (H200, 4.4 TB/s; calls back to back in a graph with dependent launch, caches not in L2; us, and share
 * of the bandwidth; rows x positions); below it an older kernel, which loaded keys and values to registers, with all of L1
 * and with the least of it:
 *
 *                    28/4 heads of 128                                                14/2 of 64          40/8 of 128
 *                    32 x 8K    1 x 128K   64 x 2K    64 x 384   256 x 384  1 x 8K     64 x 2K   1 x 8K    16 x 8K
 *     this kernel    127 96 %   69 89 %    63 97 %    14.4 80 %  52 88 %    11.0       19.5      7.1       128 95 %
 *     old, all       129 95 %   71 86 %    69 88 %    17.9 64 %  55 83 %    10.9       20.1      8.0
 *     old, least     153 80 %   83 73 %    82 74 %    19.9 57 %  67 68 %    11.4       22.0      8.2
 *
 * Tried and lost, decode (32 x 8K):
 *   loads to registers: linear layers want all of L1 as shared memory, and a multiprocessor stays as it was last set, so
 *     that what is on its way has 28 KB to land in. Hints to fetch more into L2: 139 us with all of L1.
 *   each lane copying just what it uses to places of its own, which needs no barrier of the warp: 178 us. A line of memory
 *     comes in one piece, and parts of it that go to the same banks come one after the other.
 *   bulk copies, one for a tile's keys and one for its values, with barriers in shared memory: within 2 %.
 *   3 CTAs a multiprocessor with rings of 2 units: as fast here, 70 us with 64 x 2K, 16.5 with 64 x 384. (48 x 1000 is cut
 *     better for 3 CTAs, 27 us instead of 35.)
 *   2 CTAs with rings of 2 units, which leave room for a third: 166 us, and no better with those of 1. It seems that CTAs of
 *     a launch that begins while the one before ends come to some multiprocessors by threes and to others by ones.
 *
 * Prefill: see PERF.md. */
#include "attention_decode.cuh"
#include "attention_prefill.cuh"

#define LOG2_E 1.44269504088896341f
#define INVARIANT_CTAS_PER_SM 8 /* a graph's bound is far above the true number */

/* --- dispatch ----------------------------------------------------------------------------------------------- */

typedef void (*attention_kernel)(attention_params);

typedef void (*decode_attention_kernel)(attention_params, int32_t, int32_t);

static decode_attention_kernel decode_kernel(const attention_params *p)
{
    const bool wide = p->group > 8;
    return p->a.shape.head_dim == 64 ? wide ? attention_decode_kernel<64, 2> : attention_decode_kernel<64, 1>
           : wide                    ? attention_decode_kernel<128, 2>
                                     : attention_decode_kernel<128, 1>;
}

static attention_kernel prefill_kernel(const attention_params *p)
{
    const bool invariant = p->a.batch_invariant;
    return p->a.shape.head_dim == 64
               ? invariant ? attention_prefill_kernel<64, 1, true> : attention_prefill_kernel<64, 2, false>
           : invariant ? attention_prefill_kernel<128, 1, true>
                       : attention_prefill_kernel<128, 2, false>;
}

/* --- launcher ----------------------------------------------------------------------------------------------- */

static qf_status check_shape(const qf_cuda_attention_args *a, qf_error *err)
{
    const qf_cuda_attention_shape *s = &a->shape;
    if (s->head_dim != 64 && s->head_dim != 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention: head_dim %d is not 64 or 128", s->head_dim);
    }
    if (s->num_kv_heads <= 0 || s->num_heads <= 0 || s->num_heads % s->num_kv_heads != 0 ||
        s->num_heads / s->num_kv_heads > QF_ATTENTION_MAX_GROUP) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention: %d heads for %d kv heads (a multiple, up to %d)",
                       s->num_heads, s->num_kv_heads, QF_ATTENTION_MAX_GROUP);
    }
    if (s->block_size < 16 || (s->block_size & (s->block_size - 1)) != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention: block_size %d is not a power of two from 16",
                       s->block_size);
    }
    if (s->sliding_window < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention: sliding_window %d is negative", s->sliding_window);
    }
    if (a->kv.float32 || a->kv.block_size != s->block_size || a->kv.num_kv_heads != s->num_kv_heads ||
        a->kv.head_dim != s->head_dim) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "attention: the cache (blocks of %d, %d heads of %d%s) is not of the shape given (%d, %d, %d)",
                       a->kv.block_size, a->kv.num_kv_heads, a->kv.head_dim, a->kv.float32 ? ", float32" : "",
                       s->block_size, s->num_kv_heads, s->head_dim);
    }
    return QF_OK;
}

static qf_status check_args(const qf_cuda_attention_args *a, qf_error *err)
{
    if (a->kv.k == NULL || a->kv.v == NULL || (a->q == NULL && a->qkv == NULL) || a->out == NULL || a->items == NULL ||
        a->num_items == NULL || a->block_tables == NULL || a->block_table_start == NULL || a->workspace == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention: a null pointer");
    }
    const uintptr_t all = (uintptr_t)a->kv.k | (uintptr_t)a->kv.v | (uintptr_t)a->q | (uintptr_t)a->out |
                          (uintptr_t)a->workspace;
    if (all % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention: a pointer is not aligned to 16 bytes");
    }
    const int32_t width = a->shape.num_heads * a->shape.head_dim;
    if (a->num_tokens <= 0 || a->out_k != (width + 127) / 128 * 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention: %d tokens, out_k %d for %d columns", a->num_tokens,
                       a->out_k, width);
    }
    if (a->max_decode_items < 0 || a->max_prefill_items < 0 || a->prefill_offset < 0 ||
        (a->batch_invariant && a->max_decode_items > 0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "attention: %d decode items (none if batch_invariant), %d prefill items from %d",
                       a->max_decode_items, a->max_prefill_items, a->prefill_offset);
    }
    if (!(a->scale > 0.0f)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention: scale %g is not positive", (double)a->scale);
    }
    return QF_OK;
}

/* Decode rows that come straight from the QKV linear. */
static qf_status check_own_rows(const qf_cuda_attention_args *a, const qf_cuda_device *device, qf_error *err)
{
    const int32_t width = (a->shape.num_heads + 2 * a->shape.num_kv_heads) * a->shape.head_dim;
    if (a->qkv == NULL) {
        return QF_OK;
    }
    if (!qf_cuda_attention_takes_rows(device, &a->kv) || a->window_tokens > 0 || a->shape.kv_window > 0 ||
        a->max_prefill_items > 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "attention: rows of qkv are for decode items alone, without a window, where the kernel takes them "
                       "(format %d of %d in blocks of %d, window %d, %d prefill items)",
                       (int)a->kv.format, a->kv.head_dim, a->kv.block_size,
                       a->window_tokens > 0 ? a->window_tokens : a->shape.kv_window, a->max_prefill_items);
    }
    if (a->cos_sin == NULL || a->slot_mapping == NULL || ((uintptr_t)a->qkv | (uintptr_t)a->cos_sin) % 16 != 0 ||
        a->qkv_splits <= 0 || a->qkv_stride < width || a->qkv_stride % 4 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "attention: rows of qkv need cos_sin and slot_mapping, 16-byte alignment, splits (%d) and a stride "
                       "(%d) that holds %d, a multiple of 4",
                       a->qkv_splits, a->qkv_stride, width);
    }
    return QF_OK;
}

/* What only a low-bit cache has. */
static qf_status check_low_bit(const qf_cuda_attention_args *a, qf_error *err)
{
    if (a->kv.format < QF_CUDA_KV_16 || a->kv.format > QF_CUDA_KV_NF4) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention: cache format %d is not known (0 to %d)",
                       (int)a->kv.format, (int)QF_CUDA_KV_NF4);
    }
    const uintptr_t tables = (uintptr_t)a->bias_coarse | (uintptr_t)a->bias_fine | (uintptr_t)a->bias_rotation;
    if (a->kv.format != QF_CUDA_KV_16 && a->kv.k_bias != NULL &&
        (a->bias_coarse == NULL || a->bias_fine == NULL || a->bias_rotation == NULL || tables % 16 != 0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "attention: a bias of keys needs its three tables, aligned to 16 bytes");
    }
    if (a->window_tokens < 0 || (a->window_tokens > 0 && a->kv.format == QF_CUDA_KV_16)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "attention: a 16-bit window of %d needs a low-bit cache",
                       a->window_tokens);
    }
    const uintptr_t window = (uintptr_t)a->window_kv.k | (uintptr_t)a->window_kv.v;
    if (a->window_tokens > 0 && (a->window_kv.k == NULL || a->window_kv.v == NULL || window % 16 != 0 ||
                                 a->window_table_start == NULL || a->window_first == NULL)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "attention: the 16-bit window's cache or tables are null or not aligned to 16 bytes");
    }
    return QF_OK;
}

/* Units of a warp's ring: as many as a multiprocessor's shared memory, 1 KB more than a block's, has room for. */
static int32_t decode_ring_units(const qf_cuda_device *device)
{
    int32_t units = DECODE_UNITS;
    while (units > 1 && DECODE_CTAS * (ATTENTION_WARPS * units * DECODE_UNIT_BYTES + DECODE_OTHER_BYTES) >
                            device->max_shared_bytes + 1024) {
        units--;
    }
    return units;
}

static qf_status launch_decode(const attention_params *p, const qf_cuda_device *device, cudaStream_t stream,
                               qf_error *err)
{
    if (p->a.kv.format != QF_CUDA_KV_16) {
        return qf_attention_decode_lowbit(p, device, stream, err);
    }
    const int32_t ring_bytes = decode_ring_units(device) * DECODE_UNIT_BYTES, head_dim = p->a.shape.head_dim;
    const int32_t results = (p->group > 8 ? 16 : 8) * (head_dim + 4) * (int32_t)sizeof(float);
    const int32_t warp_bytes = results > ring_bytes ? results : ring_bytes;
    const int32_t depth = ring_bytes / (4 * DECODE_TILE * head_dim); /* tiles of keys and values, 2 bytes each */
    const decode_attention_kernel kernel = decode_kernel(p);
    qf_status status = qf_allow_shared("attention (decode)", kernel, (size_t)warp_bytes * ATTENTION_WARPS, err);
    if (status != QF_OK) {
        return status;
    }
    QF_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                     cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    const int64_t units = (int64_t)p->a.max_decode_items * p->a.shape.num_kv_heads;
    const int64_t resident = (int64_t)device->sm_count * DECODE_CTAS;
    return qf_launch("attention (decode)", kernel, dim3((unsigned)(units < resident ? units : resident)),
                     dim3(ATTENTION_THREADS), (size_t)warp_bytes * ATTENTION_WARPS, device->dependent_launch, stream,
                     err, *p, depth, warp_bytes);
}

static qf_status launch_prefill(const attention_params *p, const qf_cuda_device *device, cudaStream_t stream,
                                qf_error *err)
{
    const size_t bytes = prefill_shared_bytes(p->a.shape.head_dim, p->a.batch_invariant ? 1 : 2);
    int64_t units = (int64_t)p->a.max_prefill_items * p->a.shape.num_kv_heads;
    const int64_t most = (int64_t)device->sm_count * INVARIANT_CTAS_PER_SM;
    if (p->a.batch_invariant && units > most) {
        units = most;
    }
    if (p->a.kv.format != QF_CUDA_KV_16) {
        return qf_attention_prefill_lowbit(p, (uint32_t)units, device, stream, err);
    }
    qf_status status = qf_allow_shared("attention (prefill)", prefill_kernel(p), bytes, err);
    if (status != QF_OK) {
        return status;
    }
    return qf_launch("attention (prefill)", prefill_kernel(p), dim3((unsigned)units), dim3(ATTENTION_THREADS), bytes,
                     device->dependent_launch, stream, err, *p);
}

static attention_params params_of(const qf_cuda_attention_args *args)
{
    const qf_cuda_attention_shape *s = &args->shape;
    attention_params p = {};
    p.a = *args;
    p.scale_log2 = args->scale * LOG2_E;
    while (1 << p.block_shift < s->block_size) {
        p.block_shift++;
    }
    p.group = s->num_heads / s->num_kv_heads;
    p.window = s->sliding_window > 0 ? s->sliding_window : INT32_MAX;
    p.num_tiles = qf_cuda_num_tiles(args->num_tokens);
    p.tile_tokens = qf_cuda_tile_tokens(args->num_tokens);
    p.unit_words = qf_attention_unit_words(s->num_heads, s->num_kv_heads, s->head_dim);
    p.unit_sums = qf_attention_unit_sums(s->num_heads);
    p.unit_counters = qf_attention_unit_counters(s->num_heads, s->head_dim);
    return p;
}

extern "C" qf_status qf_cuda_attention(const qf_cuda_attention_args *args, const qf_cuda_device *device,
                                       cudaStream_t stream, qf_error *err)
{
    qf_status status = check_args(args, err);
    if (status == QF_OK) {
        status = check_shape(args, err);
    }
    if (status == QF_OK) {
        status = check_low_bit(args, err);
    }
    if (status == QF_OK) {
        status = check_own_rows(args, device, err);
    }
    if (status != QF_OK) {
        return status;
    }
    const attention_params p = params_of(args);
    if (args->max_decode_items > 0) {
        status = launch_decode(&p, device, stream, err);
    }
    if (status == QF_OK && args->max_prefill_items > 0) {
        status = launch_prefill(&p, device, stream, err);
    }
    return status;
}
