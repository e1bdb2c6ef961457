/* The last kernel of a step's sampling: one CTA a row draws its token, counts it, and reports logprobs. */
#ifndef QF_SAMPLE_FINISH_CUH
#define QF_SAMPLE_FINISH_CUH

#include "sample_select.cuh"

/* --- draws: from qf_sample_cta.view -------------------------------------------------------------------------- */

/* The largest logit's lowest id. */
static __device__ __forceinline__ int32_t qf_sample_draw_greedy(uint32_t max_key)
{
    const qf_sample_view view = qf_sample_current_view();
    if (threadIdx.x == 0) {
        qf_sample_cta.size = 0xffffffffu;
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < view.num_blocks; i += QF_SAMPLE_THREADS) {
        if (view.block_max[i] == max_key) {
            atomicMin(&qf_sample_cta.size, (uint32_t)i);
            break;
        }
    }
    __syncthreads();
    int32_t first = (int32_t)qf_sample_cta.size * QF_SAMPLE_BLOCK + 4 * (threadIdx.x % 32);
    float x[4];
    qf_sample_unpack(qf_sample_load_guarded(view, first), x);
    uint32_t id = 0xffffffffu;
#pragma unroll
    for (int e = 3; e >= 0; e--) {
        id = qf_sample_key(x[e]) == max_key ? (uint32_t)(first + e) : id;
    }
    return (int32_t)__reduce_min_sync(0xffffffffu, id); /* all warps look at the same block */
}

static __device__ __forceinline__ int32_t qf_sample_draw_top_k(uint32_t max_key, const qf_cuda_sample_row *r)
{
    uint32_t n = qf_sample_top(max_key, (uint32_t)r->top_k);
    qf_sample_list_masses(n);
    uint64_t kept = qf_sample_cta.mass[QF_SAMPLE_BINS - 1];
    if (r->top_p < 1.0f) {
        kept = qf_sample_cta.mass[qf_sample_crossing(true, qf_sample_limit(kept, r->top_p))];
    }
    int32_t i = qf_sample_crossing(true, qf_sample_target(qf_sample_uniform(r), kept));
    return (int32_t)(uint32_t)qf_sample_cta.list[i];
}

/* The masses of the row's groups (at most 1,024) as running sums; the last is the total. */
static __device__ __forceinline__ uint64_t qf_sample_sum_groups(const uint64_t *mass, int32_t num_groups)
{
    __syncthreads();
    for (int i = threadIdx.x; i < QF_SAMPLE_BINS; i += QF_SAMPLE_THREADS) {
        qf_sample_cta.mass[i] = i < num_groups ? mass[i] : 0;
    }
    qf_sample_scan();
    return qf_sample_cta.mass[QF_SAMPLE_BINS - 1];
}

/* The first id at which the sum by ascending id passes u times the total. */
static __device__ __forceinline__ int32_t qf_sample_draw_by_id(const uint64_t *mass, int32_t num_groups,
                                                               const qf_cuda_sample_row *r)
{
    const qf_sample_view view = qf_sample_current_view();
    uint64_t total = qf_sample_sum_groups(mass, num_groups);
    uint64_t target = qf_sample_target(qf_sample_uniform(r), total);
    int32_t group = qf_sample_crossing(true, target);
    target -= group > 0 ? qf_sample_cta.mass[group - 1] : 0;
    __syncthreads();
    for (int i = threadIdx.x; i < QF_SAMPLE_BINS; i += QF_SAMPLE_THREADS) {
        int32_t id = group * QF_SAMPLE_GROUP + i;
        bool inside = i < QF_SAMPLE_GROUP && id < view.limit;
        qf_sample_cta.mass[i] = inside ? qf_sample_mass(qf_sample_cta.scale, view.x[id]) : 0;
    }
    qf_sample_scan();
    return group * QF_SAMPLE_GROUP + qf_sample_crossing(true, target);
}

/* The least key whose bin is at most `bin`, no less than QF_SAMPLE_LEAST. Every warp finds it for itself: 32 probes at
 * a time. */
static __device__ __noinline__ uint32_t qf_sample_bin_edge(float bin_scale, int32_t bin, uint32_t max_key)
{
    const qf_sample_scale scale = qf_sample_cta.scale;
    uint32_t no = QF_SAMPLE_LEAST - 1, yes = max_key;
    while (yes - no > 1) {
        uint32_t probe = no + (uint32_t)((uint64_t)(yes - no) * (threadIdx.x % 32 + 1) / 33);
        bool reached = probe > no && qf_sample_bin(scale, bin_scale, qf_sample_logit(probe)) <= bin;
        uint32_t lanes = __ballot_sync(0xffffffffu, reached);
        int first = lanes != 0 ? __ffs(lanes) - 1 : 32; /* of those that say yes */
        uint32_t below = __shfl_sync(0xffffffffu, probe, first > 0 ? first - 1 : 0);
        uint32_t above = __shfl_sync(0xffffffffu, probe, first < 32 ? first : 31);
        yes = first < 32 ? above : yes;
        no = first > 0 ? below : no;
    }
    return yes;
}

/* Where the running count or mass reaches target, by way of the histogram that the second kernel made. */
static __device__ __noinline__ qf_sample_found qf_sample_locate_by_bin(const uint64_t *bin_mass,
                                                                       const uint32_t *bin_count, uint4 stats,
                                                                       bool by_mass, uint64_t target)
{
    __syncthreads();
    for (int i = threadIdx.x; i < QF_SAMPLE_BINS; i += QF_SAMPLE_THREADS) {
        qf_sample_cta.mass[i] = bin_mass[i];
        qf_sample_cta.count[i] = bin_count[i];
    }
    qf_sample_scan();
    int32_t bin = qf_sample_crossing(by_mass, target);
    if (bin < 0) { /* a top_k that reaches further than the tokens with any mass, or no limit at all */
        return (qf_sample_found){0, -1, qf_sample_cta.mass[QF_SAMPLE_BINS - 1]};
    }
    float bin_scale = qf_sample_bin_scale(qf_sample_cta.scale, stats.y);
    qf_sample_interval in;
    in.low = qf_sample_bin_edge(bin_scale, bin, stats.x);
    in.high = bin > 0 ? qf_sample_bin_edge(bin_scale, bin - 1, stats.x) - 1 : stats.x;
    in.mass_before = bin > 0 ? qf_sample_cta.mass[bin - 1] : 0;
    in.count_before = bin > 0 ? qf_sample_cta.count[bin - 1] : 0;
    in.size = qf_sample_cta.count[bin] - in.count_before;
    return qf_sample_locate(in, by_mass, target);
}

static __device__ __forceinline__ int32_t qf_sample_draw_by_bin(const uint64_t *bin_mass, const uint32_t *bin_count,
                                                                uint4 stats, const qf_cuda_sample_row *r)
{
    bool filters_k = r->top_k > 0 && r->top_k < r->real_vocab_size;
    uint64_t most = filters_k ? (uint64_t)r->top_k : ~0ull;
    uint64_t kept = qf_sample_locate_by_bin(bin_mass, bin_count, stats, false, most).mass;
    if (r->top_p < 1.0f) {
        uint64_t limit = qf_sample_limit(kept, r->top_p);
        kept = qf_sample_locate_by_bin(bin_mass, bin_count, stats, true, limit).mass;
    }
    uint64_t target = qf_sample_target(qf_sample_uniform(r), kept);
    return qf_sample_locate_by_bin(bin_mass, bin_count, stats, true, target).id;
}

/* `stats` is of valid logits. -1 if all are masked. */
static __device__ __forceinline__ int32_t qf_sample_draw(const qf_sample_work *work, int32_t row,
                                                         const qf_cuda_sample_row *r, qf_sample_plan plan, uint4 stats)
{
    if (stats.x == QF_SAMPLE_MASKED) {
        return -1;
    }
    float inverse_temperature = plan.mode == QF_SAMPLE_GREEDY ? 1.0f : __fdiv_rn(1.0f, r->temperature);
    qf_sample_scale scale = {qf_sample_logit(stats.x), inverse_temperature, r->min_p};
    qf_sample_look_at(qf_sample_draw_view(work, row, plan.edits), scale);
    if (plan.mode == QF_SAMPLE_GREEDY) {
        return qf_sample_draw_greedy(stats.x);
    }
    if (plan.mode == QF_SAMPLE_TOP_K) {
        return qf_sample_draw_top_k(stats.x, r);
    }
    if (plan.mode == QF_SAMPLE_BY_ID) {
        return qf_sample_draw_by_id(work->mass + (int64_t)row * work->num_groups, work->num_groups, r);
    }
    return qf_sample_draw_by_bin(work->bin_mass + (int64_t)row * QF_SAMPLE_BINS,
                                 work->bin_count + (int64_t)row * QF_SAMPLE_BINS, stats, r);
}

/* One thread: the token, for the host and for the next step, and its count. */
static __device__ __forceinline__ void qf_sample_store(const qf_cuda_sample_args *args, int32_t row,
                                                       const qf_cuda_sample_row *r, int32_t token_id)
{
    args->token_ids[row] = token_id;
    if (r->slot < 0) {
        return;
    }
    args->last_token[r->slot] = token_id;
    if (r->uses_counts != 0 && token_id >= 0) {
        uint16_t *count = args->counts + (int64_t)r->slot * args->vocab_size + token_id;
        uint32_t times = *count & 0x7fffu;
        *count = (uint16_t)(0x8000u | (times < 0x7fffu ? times + 1 : times));
    }
}

/* --- logprobs ------------------------------------------------------------------------------------------------- */

/* 1 + the places before id's. */
static __device__ __noinline__ int32_t qf_sample_rank(int32_t own_id)
{
    const qf_sample_view view = qf_sample_current_view();
    uint32_t own = qf_sample_key(view.x[own_id]);
    uint32_t before = 0;
    qf_sample_walk walk = {0, 0};
    int32_t first[4];
    float4 v[4];
    while (qf_sample_next(&walk, view, own, first, v)) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x[4];
            qf_sample_unpack(v[j], x);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                uint32_t key = qf_sample_key(x[e]);
                int32_t id = first[j] + 4 * (threadIdx.x % 32) + e;
                before += first[j] >= 0 && (key > own || (key == own && id < own_id)) ? 1 : 0;
            }
        }
    }
    before = __reduce_add_sync(0xffffffffu, before);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        qf_sample_cta.warp_count[threadIdx.x / 32] = before;
    }
    __syncthreads();
    before = threadIdx.x % 32 < QF_SAMPLE_WARPS ? qf_sample_cta.warp_count[threadIdx.x % 32] : 0;
    return 1 + (int32_t)__reduce_add_sync(0xffffffffu, before);
}

/* id's entry, then the first num_top of the sorted list, which holds n. log_total is NaN where the logits are not
 * valid: then so is everything. */
static __device__ __noinline__ void qf_sample_report(double log_total, int32_t id, int32_t num_top, uint32_t n,
                                                     qf_cuda_logprob *out)
{
    bool valid = log_total == log_total;
    double max = (double)qf_sample_cta.scale.max;
    int32_t rank = valid ? qf_sample_rank(id) : 0;
    for (int32_t i = threadIdx.x; i <= num_top; i += QF_SAMPLE_THREADS) {
        qf_cuda_logprob entry;
        if (i == 0) {
            entry.token_id = id;
            entry.rank = rank;
            entry.logprob = valid ? (float)((double)qf_sample_cta.view.x[id] - max - log_total) : NAN;
        } else if ((uint32_t)i <= n) {
            uint64_t place = qf_sample_cta.list[i - 1];
            entry.token_id = (int32_t)(uint32_t)place;
            entry.rank = i;
            entry.logprob = (float)((double)qf_sample_place_logit(place) - max - log_total);
        } else {
            entry.token_id = -1;
            entry.rank = 0;
            entry.logprob = valid ? -INFINITY : NAN;
        }
        out[i] = entry;
    }
}

/* Of the token drawn (if any) and of the target: log-softmax of the logits as they came. */
static __device__ __forceinline__ void qf_sample_logprobs(const qf_sample_work *work, int32_t row,
                                                          const qf_cuda_sample_row *r, uint4 stats, int32_t token_id)
{
    bool drawn = token_id >= 0 && r->num_logprobs >= 0;
    bool target = r->target_id >= 0 && r->target_id < work->args.vocab_size;
    if (!drawn && !target) {
        return;
    }
    int32_t num_top = drawn ? min(r->num_logprobs, QF_SAMPLE_MAX_LISTED) : 0;
    int32_t num_target_top = target ? min(max(r->num_target_logprobs, 0), QF_SAMPLE_MAX_LISTED) : 0;
    qf_sample_look_at(qf_sample_raw_view(work, row), (qf_sample_scale){qf_sample_logit(stats.z), 1.0f, 0.0f});
    uint32_t n = 0;
    double log_total = NAN;
    if (stats.w == 0 && stats.z != QF_SAMPLE_MASKED) {
        uint64_t total = qf_sample_sum_groups(work->raw_mass + (int64_t)row * work->num_groups, work->num_groups);
        log_total = log((double)total * 0x1p-44);
        n = qf_sample_top(stats.z, (uint32_t)max(num_top, num_target_top));
    }
    if (drawn) {
        qf_sample_report(log_total, token_id, num_top, n, work->args.logprobs + r->logprobs_offset);
    }
    if (target) {
        qf_sample_report(log_total, r->target_id, num_target_top, n,
                         work->args.logprobs + r->target_logprobs_offset);
    }
}

/* By a block that has come last: what it and the others have stored, to the host. */
static __device__ __forceinline__ void qf_sample_publish(const qf_sample_work *work)
{
    __syncthreads();
    qf_step_publish(work->io, qf_step_load_header(work->io));
}

/* --- kernel --------------------------------------------------------------------------------------------------- */

/* Grid (num_rows). */
static __global__ void __launch_bounds__(QF_SAMPLE_THREADS, 2)
    qf_sample_finish_kernel(const __grid_constant__ qf_sample_work work)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    int32_t row = blockIdx.x;
    const qf_cuda_sample_row *r = &work.args.rows[row];
    qf_sample_plan plan = qf_sample_plan_make(r);
    uint4 stats = qf_sample_row_stats(&work, row, qf_sample_cta.stats);
    int32_t token_id = -1;
    if (plan.mode != QF_SAMPLE_NOTHING && stats.w == 0) {
        token_id = qf_sample_draw(&work, row, r, plan, stats);
    }
    if (threadIdx.x == 0) {
        qf_sample_store(&work.args, row, r, token_id);
    }
    if (plan.logprobs) {
        qf_sample_logprobs(&work, row, r, stats, token_id);
    }
    if (work.publishes && qf_step_is_last(work.arrivals, gridDim.x)) {
        qf_sample_publish(&work);
    }
}

#endif
