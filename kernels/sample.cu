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
 *   all_greedy:  (chunks, rows) maxima with ids; the last CTA merges those of all rows
 *   otherwise:   scan   (chunks, rows)  validity, edited copy (if the row has edits), maxima of blocks and chunks
 *                mass   (chunks, rows)  weights under the row's maximum, for rows that need all of them: sums of groups
 *                                       (draw by id, logprobs) or a histogram over 2,048 bins (top_p)
 *                finish (rows)          512 threads: the draw (sample_finish.cuh, sample_select.cuh)
 *   The last CTA of a step's last kernel sends its results to the host too (step_publish.cuh).
 *   A small top_k (Qwen2.5's 20) needs no weights but its candidates': blocks whose maxima reach the 20th largest of
 *   the maxima hold them all.
 *
 * Weights are summed as integers of 2^-44: the same bits in any order, so histograms may use atomics, and a row's token
 * does not depend on how many rows there are. Against the host's sums in double a total is off by less than 9e-9.
 *
 * Measured: see PERF.md.
 * Not taken: a counter by which the last CTA of scan or mass goes on (a fence and an atomic cost about what a dependent
 * launch does; greedy rows and results have one, which saves two launches); sums in double (atomics would have an order); a sort of the row (several passes where the histogram needs one). */
#include "sample_edit.cuh"
#include "sample_finish.cuh"
#include "sample_greedy.cuh"

/* --- first kernel --------------------------------------------------------------------------------------------- */

/* No NaN and no +inf among a lane's share of a group. */
static __device__ __forceinline__ bool qf_sample_is_finite(const float4 (&v)[4])
{
    bool finite = true;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        finite = finite && v[j].x < INFINITY && v[j].y < INFINITY && v[j].z < INFINITY && v[j].w < INFINITY;
    }
    return finite;
}

/* The key of a lane's smallest logit above -inf. */
static __device__ __forceinline__ uint32_t qf_sample_least_key(const float4 (&v)[4])
{
    float least = INFINITY;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float x[4];
        qf_sample_unpack(v[j], x);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            least = x[e] > -INFINITY ? fminf(least, x[e]) : least;
        }
    }
    return qf_sample_key(least);
}

/* The keys of a group's block maxima, block j's in lane j. */
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
        stats.w |= qf_sample_is_finite(v) ? 0u : 1u;
        if (plan.edits) {
            qf_sample_edit(&work, r, plan, row, group, v);
        } else if ((group + 1) * QF_SAMPLE_GROUP > r->real_vocab_size) {
            qf_sample_cut_off(r->real_vocab_size, group, v);
        }
        stats.y = min(stats.y, qf_sample_least_key(v));
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
    work->arrivals = (uint32_t *)qf_sample_take(&next, QF_CUDA_SAMPLE_ZEROED_BYTES); /* one place for any num_rows */
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
    if (args->publish != NULL && (args->num_rows == 0 || args->publish->token_ids != args->token_ids)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "sample: %d rows' tokens at %p; those to publish at %p: must be the same, and at least one",
                       args->num_rows, (void *)args->token_ids, (const void *)args->publish->token_ids);
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
    work->finish_lanes = 1;
    while (work->finish_lanes * QF_SAMPLE_LANE_WORDS < work->num_chunks) {
        work->finish_lanes *= 2;
    }
}

extern "C" qf_status qf_cuda_sample(const qf_cuda_sample_args *args, const qf_cuda_device *device, cudaStream_t stream,
                                    qf_error *err)
{
    QF_TRY(qf_sample_check(args, err));
    if (args->num_rows == 0) {
        return QF_OK;
    }
    qf_sample_work work = {};
    work.args = *args;
    work.publishes = args->publish != NULL;
    if (work.publishes) {
        work.io = *args->publish;
    }
    (void)qf_sample_lay_out(&work, (char *)args->workspace, args->vocab_size, args->num_rows);
    qf_sample_cut(&work, device);
    work.vectors = (uintptr_t)args->logits % 16 == 0 && args->logits_stride % 4 == 0;
    work.count_vectors = (uintptr_t)args->counts % 8 == 0 && args->vocab_size % 4 == 0;
    bool dependent = device->dependent_launch;
    dim3 chunks(work.num_chunks, args->num_rows), threads(QF_SAMPLE_CHUNK_THREADS);
    if (args->all_greedy) {
        return qf_launch("sample", qf_sample_greedy_kernel, chunks, threads, 0, dependent, stream, err, work);
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
