/* One token for each row of logits: masks and biases, penalties, temperature, min_p, top_k, top_p, draw; and logprobs.
 *
 *   x = bitmask, biases, penalties of logits;  w = e^((x - max) / temperature), 0 below min_p
 *   order: x descending, id ascending. top_k: its first k; top_p: of those the shortest beginning with top_p of the sum
 *   token: the first at which the running sum of what is left passes u times its total (csrc/sample/sampler.h)
 *
 * logits (num_rows, vocab_size) float32; counts (slots, vocab_size) 16-bit; a row's parameters stand in device memory,
 * so that one captured graph serves all of them: the launches depend on num_rows and vocab_size alone.
 *
 * Roofline, vocab_size 151,936: 608 KB a row. A greedy row is read once: 0.14 us each at 4.4 TB/s, 35 us for 256, and
 * nothing but latency for one (target 6 us). Others read their row once from memory and once or twice more from L2 (up
 * to about 90 rows fit), 35 operations a logit where weights are needed: 1.4 times the arithmetic's time of the read.
 *
 * Plan. Rows are cut into blocks of 128 logits (one 16-byte load of each lane), groups of 512 (what a warp has in
 * flight) and chunks (one CTA of four warps, `steps` groups each); as many chunks as make about eight CTAs an SM.
 *
 *   row  | block block block block | ...                       |    |   ...   |       |
 *        | ------- group 0 ------- |  group 1    2    3        |  4 | ...     |       |
 *        |   warp 0, step 0           warp 1, 2, 3             |  warp 0, step 1      |  next chunk
 *
 *   all_greedy:  (chunks, rows) maxima with ids  ->  one warp a row
 *   otherwise:   scan   (chunks, rows)  validity, edited copy (if the row has edits), maxima of blocks and chunks
 *                mass   (chunks, rows)  weights under the row's maximum, for rows that need all of them: sums of groups
 *                                       (draw by id, logprobs) or a histogram over 2,048 bins (top_p)
 *                finish (rows)          512 threads: the draw (sample_finish.cuh, sample_select.cuh)
 *   A small top_k (Qwen2.5's 20) needs no weights but its candidates': blocks whose maxima reach the 20th largest of
 *   the maxima hold them all.
 *
 * Weights are summed as integers of 2^-44: the same bits in any order, so histograms may use atomics, and a row's token
 * does not depend on how many rows there are. Against the host's sums in double a total is off by less than 9e-9.
 *
 * Measured: see PERF.md.
 * Not taken: a counter by which a row's last CTA finishes it (a fence and an atomic cost what a dependent launch does);
 * sums in double (atomics would have an order); a sort of the row (several passes where the histogram needs one). */
#include "sample_finish.cuh"
#include "sample_greedy.cuh"

/* --- masks, biases, penalties --------------------------------------------------------------------------------- */

static __device__ __forceinline__ float qf_sample_finite(float x)
{
    return fminf(fmaxf(x, -FLT_MAX), FLT_MAX);
}

/* The host's operations, none fused. x is finite or -inf. */
static __device__ __forceinline__ float qf_sample_penalise(const qf_cuda_sample_row *r, uint32_t count, float x)
{
    if (count == 0 || x == -INFINITY) {
        return x;
    }
    uint32_t times = count & 0x7fffu;
    x = qf_sample_finite(x > 0.0f ? __fdiv_rn(x, r->repetition_penalty) : __fmul_rn(x, r->repetition_penalty));
    x = __fsub_rn(x, __fmul_rn(r->frequency_penalty, (float)times));
    x = __fsub_rn(x, times > 0 ? r->presence_penalty : 0.0f);
    return qf_sample_finite(x);
}

/* Masks four logits from id on (id % 4 == 0). */
static __device__ __forceinline__ void qf_sample_mask(const qf_sample_work *work, const qf_cuda_sample_row *r,
                                                      int32_t id, float (&x)[4])
{
    uint32_t bits = 0xffffffffu;
    if (r->bitmask_offset >= 0 && id < r->real_vocab_size) {
        bits = work->args.bitmasks[r->bitmask_offset + id / 32] >> id % 32;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        x[e] = (bits >> e & 1u) != 0 && id + e < r->real_vocab_size ? x[e] : -INFINITY;
    }
}

/* Masks the chunk into the edited copy and adds the biases there, each thread those of its own ids, in order. Ends
 * with the copy visible to the block. */
static __device__ __forceinline__ void qf_sample_apply_biases(const qf_sample_work *work, const qf_cuda_sample_row *r,
                                                           int32_t row, int32_t begin, int32_t end)
{
    const float *logits = work->args.logits + (int64_t)row * work->args.logits_stride;
    float *edited = work->edited + (int64_t)row * work->stride;
    int32_t thread = 4 * threadIdx.x;
    for (int32_t id = begin + thread; id < end; id += 4 * QF_SAMPLE_CHUNK_THREADS) {
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            x[e] = id + e < work->args.vocab_size ? logits[id + e] : -INFINITY;
        }
        qf_sample_mask(work, r, id, x);
        *reinterpret_cast<float4 *>(edited + id) = make_float4(x[0], x[1], x[2], x[3]);
    }
    const qf_cuda_logit_bias *biases = work->args.biases + r->bias_offset;
    int32_t num_bias = r->num_bias, limit = min(end, r->real_vocab_size);
    for (int32_t i = 0; i < num_bias; i++) { /* its own writes are visible to a thread without a barrier */
        int32_t id = biases[i].token_id;
        if (id >= begin && id < limit && (id - begin) / 4 % QF_SAMPLE_CHUNK_THREADS == (int32_t)threadIdx.x) {
            edited[id] = __fadd_rn(edited[id], biases[i].bias);
        }
    }
    __syncthreads();
}

static __device__ __forceinline__ void qf_sample_load_counts(const qf_sample_work *work, const uint16_t *counts,
                                                             int32_t id, uint32_t (&count)[4])
{
    if (work->count_vectors && id + 4 <= work->args.vocab_size) {
        uint2 v = *reinterpret_cast<const uint2 *>(counts + id);
        count[0] = v.x & 0xffffu;
        count[1] = v.x >> 16;
        count[2] = v.y & 0xffffu;
        count[3] = v.y >> 16;
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            count[e] = id + e < work->args.vocab_size ? counts[id + e] : 0;
        }
    }
}

/* Four logits from id on: raw in, edited out, and stored. */
static __device__ __forceinline__ void qf_sample_edit(const qf_sample_work *work, const qf_cuda_sample_row *r,
                                                      qf_sample_plan plan, int32_t row, int32_t id, float (&x)[4])
{
    float *edited = work->edited + (int64_t)row * work->stride + id;
    if (r->num_bias > 0) {
        qf_sample_unpack(*reinterpret_cast<const float4 *>(edited), x);
    } else {
        qf_sample_mask(work, r, id, x);
    }
    if (plan.penalises) {
        uint32_t count[4];
        qf_sample_load_counts(work, work->args.counts + (int64_t)r->slot * work->args.vocab_size, id, count);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            x[e] = qf_sample_penalise(r, count[e], x[e]);
        }
    }
    *reinterpret_cast<float4 *>(edited) = make_float4(x[0], x[1], x[2], x[3]);
}

/* --- first kernel --------------------------------------------------------------------------------------------- */

/* One group's logits as they came: is any not finite; the keys of its blocks' maxima, block j's in lane j. */
static __device__ __forceinline__ uint32_t qf_sample_block_maxima(const float4 (&v)[4])
{
    uint32_t own = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t key = qf_sample_key(fmaxf(fmaxf(v[j].x, v[j].y), fmaxf(v[j].z, v[j].w)));
        key = __reduce_max_sync(0xffffffffu, key);
        own = threadIdx.x % 32 == j ? key : own;
    }
    return own;
}

/* A histogram to be filled by the next kernel: this CTA's share of its bins. */
static __device__ __forceinline__ void qf_sample_clear_bins(const qf_sample_work *work, int32_t row)
{
    for (int i = blockIdx.x * QF_SAMPLE_CHUNK_THREADS + threadIdx.x; i < QF_SAMPLE_BINS;
         i += gridDim.x * QF_SAMPLE_CHUNK_THREADS) {
        work->bin_mass[(int64_t)row * QF_SAMPLE_BINS + i] = 0;
        work->bin_count[(int64_t)row * QF_SAMPLE_BINS + i] = 0;
    }
}

/* Grid (chunks, rows). */
static __global__ void __launch_bounds__(QF_SAMPLE_CHUNK_THREADS, 8)
    qf_sample_scan_kernel(const __grid_constant__ qf_sample_work work)
{
    __shared__ uint4 scratch[QF_SAMPLE_CHUNK_WARPS];
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    int32_t row = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const qf_cuda_sample_row own = work.args.rows[row], *r = &own;
    qf_sample_plan plan = qf_sample_plan_make(r);
    qf_sample_view raw = qf_sample_raw_view(&work, row);
    int32_t first_group = blockIdx.x * work.steps * QF_SAMPLE_CHUNK_WARPS;
    int32_t end_group = min(first_group + work.steps * QF_SAMPLE_CHUNK_WARPS, work.num_groups);
    if (plan.mode == QF_SAMPLE_BY_BIN) {
        qf_sample_clear_bins(&work, row);
    }
    if (plan.edits && r->num_bias > 0) {
        qf_sample_apply_biases(&work, &work.args.rows[row], row, first_group * QF_SAMPLE_GROUP,
                               end_group * QF_SAMPLE_GROUP);
    }
    uint4 stats = QF_SAMPLE_NO_STATS;
    for (int32_t group = first_group + warp; group < end_group; group += QF_SAMPLE_CHUNK_WARPS) {
        float4 v[4];
        qf_sample_load_group(raw, group, v);
        int64_t blocks = (int64_t)row * work.num_blocks + 4 * group + lane;
        if (plan.logprobs) {
            uint32_t key = qf_sample_block_maxima(v);
            if (lane < 4) {
                work.raw_block_max[blocks] = key;
                stats.z = max(stats.z, key);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x[4];
            int32_t id = group * QF_SAMPLE_GROUP + j * QF_SAMPLE_BLOCK + 4 * lane;
            qf_sample_unpack(v[j], x);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                stats.w |= x[e] < INFINITY ? 0u : 1u;
            }
            if (plan.edits) {
                qf_sample_edit(&work, r, plan, row, id, x);
            } else {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    x[e] = id + e < r->real_vocab_size ? x[e] : -INFINITY;
                }
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                stats.y = x[e] > -INFINITY ? min(stats.y, qf_sample_key(x[e])) : stats.y;
            }
            v[j] = make_float4(x[0], x[1], x[2], x[3]);
        }
        uint32_t key = qf_sample_block_maxima(v);
        if (lane < 4) {
            work.block_max[blocks] = key;
            stats.x = max(stats.x, key);
        }
    }
    stats = qf_sample_merge_block(stats, scratch);
    if (threadIdx.x == 0) {
        work.stats[(int64_t)row * work.num_chunks + blockIdx.x] = stats;
    }
}

/* --- second kernel -------------------------------------------------------------------------------------------- */

/* Sums of the chunk's groups. */
static __device__ __forceinline__ void qf_sample_group_masses(qf_sample_view view, qf_sample_scale scale,
                                                              int32_t first_group, int32_t end_group, uint64_t *mass)
{
    for (int32_t group = first_group + threadIdx.x / 32; group < end_group; group += QF_SAMPLE_CHUNK_WARPS) {
        float4 v[4];
        uint64_t sum = 0;
        qf_sample_load_group(view, group, v);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sum += qf_sample_mass(scale, v[j].x) + qf_sample_mass(scale, v[j].y) + qf_sample_mass(scale, v[j].z) +
                   qf_sample_mass(scale, v[j].w);
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        }
        if (threadIdx.x % 32 == 0) {
            mass[group] = sum;
        }
    }
}

/* Adds the chunk to the row's histogram. */
static __device__ __forceinline__ void qf_sample_chunk_bins(qf_sample_view view, qf_sample_scale scale,
                                                            float bin_scale, int32_t first_group, int32_t end_group,
                                                            uint64_t *bin_mass, uint32_t *bin_count)
{
    __shared__ uint64_t mass[QF_SAMPLE_BINS];
    __shared__ uint32_t count[QF_SAMPLE_BINS];
    for (int i = threadIdx.x; i < QF_SAMPLE_BINS; i += QF_SAMPLE_CHUNK_THREADS) {
        mass[i] = 0;
        count[i] = 0;
    }
    __syncthreads();
    for (int32_t group = first_group + threadIdx.x / 32; group < end_group; group += QF_SAMPLE_CHUNK_WARPS) {
        float4 v[4];
        qf_sample_load_group(view, group, v);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x[4];
            qf_sample_unpack(v[j], x);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                uint64_t m = qf_sample_mass(scale, x[e]);
                if (m != 0) {
                    int32_t bin = qf_sample_bin(scale, bin_scale, x[e]);
                    qf_sample_add_shared(&mass[bin], m);
                    atomicAdd(&count[bin], 1u);
                }
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < QF_SAMPLE_BINS; i += QF_SAMPLE_CHUNK_THREADS) {
        if (count[i] != 0) {
            atomicAdd(reinterpret_cast<unsigned long long *>(&bin_mass[i]), (unsigned long long)mass[i]);
            atomicAdd(&bin_count[i], count[i]);
        }
    }
}

/* Grid (chunks, rows). */
static __global__ void __launch_bounds__(QF_SAMPLE_CHUNK_THREADS, 8)
    qf_sample_mass_kernel(const __grid_constant__ qf_sample_work work)
{
    __shared__ uint4 scratch[QF_SAMPLE_CHUNK_WARPS];
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    int32_t row = blockIdx.y;
    const qf_cuda_sample_row *r = &work.args.rows[row];
    qf_sample_plan plan = qf_sample_plan_make(r);
    bool weighs = plan.mode == QF_SAMPLE_BY_ID || plan.mode == QF_SAMPLE_BY_BIN;
    if (!weighs && !plan.logprobs) {
        return;
    }
    uint4 stats = qf_sample_row_stats(&work, row, scratch);
    if (stats.w != 0) {
        return;
    }
    int32_t first_group = blockIdx.x * work.steps * QF_SAMPLE_CHUNK_WARPS;
    int32_t end_group = min(first_group + work.steps * QF_SAMPLE_CHUNK_WARPS, work.num_groups);
    if (weighs && stats.x != QF_SAMPLE_MASKED) {
        qf_sample_view view = qf_sample_draw_view(&work, row, plan.edits);
        qf_sample_scale scale = {qf_sample_logit(stats.x), __fdiv_rn(1.0f, r->temperature), r->min_p};
        if (plan.mode == QF_SAMPLE_BY_ID) {
            qf_sample_group_masses(view, scale, first_group, end_group, work.mass + (int64_t)row * work.num_groups);
        } else {
            qf_sample_chunk_bins(view, scale, qf_sample_bin_scale(scale, stats.y), first_group, end_group,
                                 work.bin_mass + (int64_t)row * QF_SAMPLE_BINS,
                                 work.bin_count + (int64_t)row * QF_SAMPLE_BINS);
        }
    }
    if (plan.logprobs && stats.z != QF_SAMPLE_MASKED) {
        qf_sample_scale scale = {qf_sample_logit(stats.z), 1.0f, 0.0f};
        qf_sample_group_masses(qf_sample_raw_view(&work, row), scale, first_group, end_group,
                               work.raw_mass + (int64_t)row * work.num_groups);
    }
}

/* --- launchers ------------------------------------------------------------------------------------------------ */

/* Takes `bytes` off the workspace; all arrays start at multiples of 256. */
static void *qf_sample_take(char **next, size_t bytes)
{
    char *taken = *next;
    *next += (bytes + 255) / 256 * 256;
    return taken;
}

/* Fills in the sizes and the arrays; returns the bytes of all of them. `workspace` may be NULL to count alone. */
static size_t qf_sample_lay_out(qf_sample_work *work, char *workspace, int32_t vocab_size, int32_t num_rows)
{
    work->num_groups = (vocab_size + QF_SAMPLE_GROUP - 1) / QF_SAMPLE_GROUP;
    work->stride = work->num_groups * QF_SAMPLE_GROUP;
    work->num_blocks = work->stride / QF_SAMPLE_BLOCK;
    size_t rows = (size_t)num_rows, groups = (size_t)work->num_groups, blocks = (size_t)work->num_blocks;
    char *next = workspace;
    work->edited = (float *)qf_sample_take(&next, rows * (size_t)work->stride * sizeof *work->edited);
    work->mass = (uint64_t *)qf_sample_take(&next, rows * groups * sizeof *work->mass);
    work->raw_mass = (uint64_t *)qf_sample_take(&next, rows * groups * sizeof *work->raw_mass);
    work->bin_mass = (uint64_t *)qf_sample_take(&next, rows * QF_SAMPLE_BINS * sizeof *work->bin_mass);
    work->bin_count = (uint32_t *)qf_sample_take(&next, rows * QF_SAMPLE_BINS * sizeof *work->bin_count);
    work->stats = (uint4 *)qf_sample_take(&next, rows * groups * sizeof *work->stats); /* chunks <= groups */
    work->block_max = (uint32_t *)qf_sample_take(&next, rows * blocks * sizeof *work->block_max);
    work->raw_block_max = (uint32_t *)qf_sample_take(&next, rows * blocks * sizeof *work->raw_block_max);
    return (size_t)(next - workspace);
}

extern "C" size_t qf_cuda_sample_workspace_bytes(int32_t vocab_size, int32_t max_rows)
{
    qf_sample_work work;
    return vocab_size < 1 || max_rows < 1 ? 0 : qf_sample_lay_out(&work, NULL, vocab_size, max_rows);
}

static qf_status qf_sample_check(const qf_cuda_sample_args *args, qf_error *err)
{
    if (args->vocab_size < 1 || args->vocab_size > QF_SAMPLE_MAX_VOCAB || args->logits_stride < args->vocab_size) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "sample: vocab_size is %d: must be 1 to %d and at most logits_stride, %d", args->vocab_size,
                       QF_SAMPLE_MAX_VOCAB, args->logits_stride);
    }
    if (args->num_rows < 0 || args->num_rows > 65535) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "sample: num_rows is %d: must be 0 to 65535", args->num_rows);
    }
    if (args->num_rows > 0 && (args->logits == NULL || args->rows == NULL || args->last_token == NULL ||
                               args->token_ids == NULL || args->workspace == NULL)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "sample: logits, rows, last_token, token_ids or workspace is NULL, for %d rows", args->num_rows);
    }
    if ((uintptr_t)args->workspace % 256 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "sample: workspace at %p: must be a multiple of 256",
                       args->workspace);
    }
    return QF_OK;
}

/* As many chunks a row as make about eight CTAs an SM, and no more than give every warp a group. */
static void qf_sample_cut(qf_sample_work *work, const qf_cuda_device *device)
{
    int32_t most = (work->num_groups + QF_SAMPLE_CHUNK_WARPS - 1) / QF_SAMPLE_CHUNK_WARPS;
    int32_t chunks = 8 * device->sm_count / work->args.num_rows;
    chunks = chunks < 1 ? 1 : chunks > most ? most : chunks;
    work->steps = (most + chunks - 1) / chunks;
    work->num_chunks = (most + work->steps - 1) / work->steps;
}

extern "C" qf_status qf_cuda_sample(const qf_cuda_sample_args *args, const qf_cuda_device *device, cudaStream_t stream,
                                    qf_error *err)
{
    QF_TRY(qf_sample_check(args, err));
    if (args->num_rows == 0) {
        return QF_OK;
    }
    qf_sample_work work;
    work.args = *args;
    (void)qf_sample_lay_out(&work, (char *)args->workspace, args->vocab_size, args->num_rows);
    qf_sample_cut(&work, device);
    work.vectors = (uintptr_t)args->logits % 16 == 0 && args->logits_stride % 4 == 0;
    work.count_vectors = (uintptr_t)args->counts % 8 == 0 && args->vocab_size % 4 == 0;
    bool dependent = device->dependent_launch;
    dim3 chunks(work.num_chunks, args->num_rows), threads(QF_SAMPLE_CHUNK_THREADS);
    if (args->all_greedy) {
        QF_TRY(qf_launch("sample", qf_sample_greedy_scan_kernel, chunks, threads, 0, dependent, stream, err, work));
        return qf_launch("sample", qf_sample_greedy_finish_kernel,
                         dim3((args->num_rows + QF_SAMPLE_CHUNK_WARPS - 1) / QF_SAMPLE_CHUNK_WARPS), threads, 0,
                         dependent, stream, err, work);
    }
    QF_TRY(qf_launch("sample", qf_sample_scan_kernel, chunks, threads, 0, dependent, stream, err, work));
    QF_TRY(qf_launch("sample", qf_sample_mass_kernel, chunks, threads, 0, dependent, stream, err, work));
    return qf_launch("sample", qf_sample_finish_kernel, dim3(args->num_rows), dim3(QF_SAMPLE_THREADS), 0, dependent,
                     stream, err, work);
}

/* --- counts of a new sequence --------------------------------------------------------------------------------- */

/* Bit 15s are joined and the lower bits added, saturating: the result has no order. */
static __global__ void qf_sample_count_kernel(uint16_t *counts, int32_t vocab_size, const qf_cuda_token_count *list,
                                              int32_t num)
{
    int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num || list[i].token_id < 0 || list[i].token_id >= vocab_size) {
        return;
    }
    unsigned short *word = counts + list[i].token_id, seen = *word, expected;
    uint32_t add = list[i].count;
    do {
        expected = seen;
        uint32_t times = (expected & 0x7fffu) + (add & 0x7fffu);
        unsigned short sum = (unsigned short)(((expected | add) & 0x8000u) | (times < 0x7fffu ? times : 0x7fffu));
        seen = atomicCAS(word, expected, sum);
    } while (seen != expected);
}

extern "C" qf_status qf_cuda_reset_counts(uint16_t *counts, int32_t slot, int32_t vocab_size,
                                          const qf_cuda_token_count *list, int32_t num, cudaStream_t stream,
                                          qf_error *err)
{
    if (counts == NULL || slot < 0 || vocab_size < 1 || num < 0 || (num > 0 && list == NULL)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "reset_counts: slot %d, vocab_size %d, %d tokens, counts at %p, list at %p: all must be there",
                       slot, vocab_size, num, (void *)counts, (const void *)list);
    }
    uint16_t *row = counts + (int64_t)slot * vocab_size;
    QF_CUDA_TRY(cudaMemsetAsync(row, 0, (size_t)vocab_size * sizeof *row, stream));
    if (num == 0) {
        return QF_OK;
    }
    return qf_launch("reset_counts", qf_sample_count_kernel, dim3((num + 255) / 256), dim3(256), 0, false, stream, err,
                     row, vocab_size, list, num);
}
