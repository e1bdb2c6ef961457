/* Finding candidates of one row with one CTA: sums over bins, sorting, and the place in the order (logit descending,
 * id ascending) where a running count or mass reaches a target. All functions are called by the whole block, with the
 * same arguments in every thread, and return the same everywhere.
 *
 * A set of keys is an interval [low, high]. One that holds too many to be sorted is cut into 2,048 bins, and the bin
 * in which the target lies is taken, until what is left fits the list or is a single key: then ids decide.
 *
 *   keys      high |--bin 0--|--bin 1--|- ... -|--bin b--| ... | low
 *   prefix sums        s0        s1                 sb  >= target > s(b-1)      -> [low, high] := bin b
 */
#ifndef QF_SAMPLE_SELECT_CUH
#define QF_SAMPLE_SELECT_CUH

#include "sample_common.cuh"

#define QF_SAMPLE_THREADS 512
#define QF_SAMPLE_WARPS (QF_SAMPLE_THREADS / 32)
#define QF_SAMPLE_PER_THREAD (QF_SAMPLE_BINS / QF_SAMPLE_THREADS) /* 4 */

typedef struct qf_sample_shared {
    uint64_t mass[QF_SAMPLE_BINS]; /* by bin or by candidate; running sums after a scan */
    uint64_t list[QF_SAMPLE_LIST]; /* candidates: qf_sample_place */
    uint32_t count[QF_SAMPLE_BINS];
    uint64_t warp_mass[QF_SAMPLE_WARPS];
    uint32_t warp_count[QF_SAMPLE_WARPS];
    uint4 stats[QF_SAMPLE_WARPS];
    qf_sample_view view;   /* the row that is searched */
    qf_sample_scale scale; /* of its weights */
    int32_t found;
    uint32_t size;
} qf_sample_shared;

/* The CTA's own, named here so that functions which are not inlined know it for shared memory: the kernel is long and
 * runs once, so that short code (the instruction cache) is worth more than inlining. */
static __shared__ qf_sample_shared qf_sample_cta;

/* Pointers that come out of shared memory would be loaded from as generic ones. */
static __device__ __forceinline__ qf_sample_view qf_sample_current_view()
{
    qf_sample_view view = qf_sample_cta.view;
    __builtin_assume(__isGlobal(view.x));
    __builtin_assume(__isGlobal(view.block_max));
    return view;
}

/* What the functions below look at from now on. */
static __device__ __forceinline__ void qf_sample_look_at(qf_sample_view view, qf_sample_scale scale)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        qf_sample_cta.view = view;
        qf_sample_cta.scale = scale;
    }
    __syncthreads();
}

/* --- sums over the bins --------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void qf_sample_clear()
{
    __syncthreads();
    for (int i = threadIdx.x; i < QF_SAMPLE_BINS; i += QF_SAMPLE_THREADS) {
        qf_sample_cta.mass[i] = 0;
        qf_sample_cta.count[i] = 0;
    }
    __syncthreads();
}

/* mass and count become their running sums. */
static __device__ __noinline__ void qf_sample_scan()
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t mass[QF_SAMPLE_PER_THREAD];
    uint32_t count[QF_SAMPLE_PER_THREAD];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < QF_SAMPLE_PER_THREAD; j++) {
        mass[j] = qf_sample_cta.mass[threadIdx.x * QF_SAMPLE_PER_THREAD + j] + (j > 0 ? mass[j > 0 ? j - 1 : 0] : 0);
        count[j] = qf_sample_cta.count[threadIdx.x * QF_SAMPLE_PER_THREAD + j] + (j > 0 ? count[j > 0 ? j - 1 : 0] : 0);
    }
    uint64_t mass_through = mass[QF_SAMPLE_PER_THREAD - 1];
    uint32_t count_through = count[QF_SAMPLE_PER_THREAD - 1];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        uint64_t m = __shfl_up_sync(0xffffffffu, mass_through, distance);
        uint32_t c = __shfl_up_sync(0xffffffffu, count_through, distance);
        mass_through += lane >= distance ? m : 0;
        count_through += lane >= distance ? c : 0;
    }
    if (lane == 31) {
        qf_sample_cta.warp_mass[warp] = mass_through;
        qf_sample_cta.warp_count[warp] = count_through;
    }
    __syncthreads();
    uint64_t mass_before = mass_through - mass[QF_SAMPLE_PER_THREAD - 1];
    uint32_t count_before = count_through - count[QF_SAMPLE_PER_THREAD - 1];
    for (int i = 0; i < warp; i++) {
        mass_before += qf_sample_cta.warp_mass[i];
        count_before += qf_sample_cta.warp_count[i];
    }
#pragma unroll
    for (int j = 0; j < QF_SAMPLE_PER_THREAD; j++) {
        qf_sample_cta.mass[threadIdx.x * QF_SAMPLE_PER_THREAD + j] = mass_before + mass[j];
        qf_sample_cta.count[threadIdx.x * QF_SAMPLE_PER_THREAD + j] = count_before + count[j];
    }
    __syncthreads();
}

/* The first bin whose running sum reaches target (> 0), or -1. After a scan. */
static __device__ __noinline__ int32_t qf_sample_crossing(bool by_mass, uint64_t target)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        qf_sample_cta.found = -1;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < QF_SAMPLE_PER_THREAD; j++) {
        int i = threadIdx.x + j * QF_SAMPLE_THREADS;
        uint64_t through = by_mass ? qf_sample_cta.mass[i] : qf_sample_cta.count[i];
        uint64_t before = i == 0 ? 0 : by_mass ? qf_sample_cta.mass[i - 1] : qf_sample_cta.count[i - 1];
        if (before < target && target <= through) {
            qf_sample_cta.found = i;
        }
    }
    __syncthreads();
    return qf_sample_cta.found;
}

/* --- walking over a row's blocks ------------------------------------------------------------------------------ */

typedef struct qf_sample_walk {
    int32_t next;  /* first block of the next 512 */
    uint32_t left; /* of this lane's warp: lane l stands for block next - 512 + 16 l + warp */
} qf_sample_walk;

/* Four blocks (first ids) whose maxima reach `least`, with their logits; -1 where there are no more. False at the end.
 * Warps take turns, so that neighbouring blocks go to different warps. */
static __device__ __forceinline__ bool qf_sample_next(qf_sample_walk *walk, qf_sample_view view, uint32_t least,
                                                      int32_t (&first)[4], float4 (&v)[4])
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    while (walk->left == 0) {
        if (walk->next >= view.num_blocks) {
            return false;
        }
        int32_t block = walk->next + lane * QF_SAMPLE_WARPS + warp;
        walk->left = __ballot_sync(0xffffffffu, block < view.num_blocks && view.block_max[block] >= least);
        walk->next += 32 * QF_SAMPLE_WARPS;
    }
    int32_t from[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int32_t block = walk->next + (__ffs(walk->left) - 1 - 32) * QF_SAMPLE_WARPS + warp;
        first[j] = walk->left != 0 ? block * QF_SAMPLE_BLOCK : -1;
        from[j] = walk->left != 0 ? first[j] : first[0];
        walk->left &= walk->left - 1;
    }
    qf_sample_load(view, from, v);
    return true;
}

/* The places with keys in [low, high], of those at `low` only ids up to last_id, into the list, in no order. Returns
 * how many there are: more than QF_SAMPLE_LIST if they do not fit. */
static __device__ __noinline__ uint32_t qf_sample_gather(uint32_t low, int32_t last_id, uint32_t high)
{
    const qf_sample_view view = qf_sample_current_view();
    __syncthreads();
    if (threadIdx.x == 0) {
        qf_sample_cta.size = 0;
    }
    __syncthreads();
    qf_sample_walk walk = {0, 0};
    int32_t first[4];
    float4 v[4];
    while (qf_sample_next(&walk, view, low, first, v)) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x[4];
            qf_sample_unpack(v[j], x);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                uint32_t key = qf_sample_key(x[e]);
                int32_t id = first[j] + 4 * (threadIdx.x % 32) + e;
                if (first[j] >= 0 && key >= low && key <= high && (key > low || id <= last_id)) {
                    uint32_t at = atomicAdd(&qf_sample_cta.size, 1u);
                    if (at < QF_SAMPLE_LIST) {
                        qf_sample_cta.list[at] = qf_sample_place(key, id);
                    }
                }
            }
        }
    }
    __syncthreads();
    return qf_sample_cta.size;
}

/* Sorts the first n of the list. */
static __device__ __noinline__ void qf_sample_sort(uint32_t n)
{
    if (n <= 128) { /* each finds its rank */
        uint64_t own = threadIdx.x < n ? qf_sample_cta.list[threadIdx.x] : 0;
        uint32_t rank = 0;
        if (threadIdx.x < n) {
            for (uint32_t i = 0; i < n; i++) {
                rank += qf_sample_cta.list[i] < own ? 1 : 0;
            }
        }
        __syncthreads();
        if (threadIdx.x < n) {
            qf_sample_cta.list[rank] = own;
        }
        __syncthreads();
        return;
    }
    uint32_t size = 256;
    while (size < n) {
        size *= 2;
    }
    for (uint32_t i = n + threadIdx.x; i < size; i += QF_SAMPLE_THREADS) {
        qf_sample_cta.list[i] = ~0ull;
    }
    __syncthreads();
    for (uint32_t run = 2; run <= size; run *= 2) {
        for (uint32_t distance = run / 2; distance > 0; distance /= 2) {
            for (uint32_t i = threadIdx.x; i < size / 2; i += QF_SAMPLE_THREADS) {
                uint32_t at = 2 * i - (i & (distance - 1));
                uint64_t a = qf_sample_cta.list[at], b = qf_sample_cta.list[at + distance];
                if ((a > b) == ((at & run) == 0)) {
                    qf_sample_cta.list[at] = b;
                    qf_sample_cta.list[at + distance] = a;
                }
            }
            __syncthreads();
        }
    }
}

/* Running masses of the first n of the sorted list. */
static __device__ __forceinline__ void qf_sample_list_masses(uint32_t n)
{
    const qf_sample_scale scale = qf_sample_cta.scale;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < QF_SAMPLE_BINS; i += QF_SAMPLE_THREADS) {
        qf_sample_cta.mass[i] = i < n ? qf_sample_mass(scale, qf_sample_place_logit(qf_sample_cta.list[i])) : 0;
        qf_sample_cta.count[i] = 0;
    }
    qf_sample_scan();
}

/* --- the place that reaches a target -------------------------------------------------------------------------- */

/* Where a search stands: what came before the interval. */
typedef struct qf_sample_interval {
    uint32_t low, high;
    uint64_t mass_before;
    uint32_t count_before;
    uint32_t size; /* keys in the interval, at least as many; QF_SAMPLE_LIST + 1 if not known */
} qf_sample_interval;

typedef struct qf_sample_found {
    uint32_t key; /* 0: the target is not reached */
    int32_t id;
    uint64_t mass; /* the sum through it */
} qf_sample_found;

/* Running sums over 2,048 bins of the interval, in keys. */
static __device__ __noinline__ void qf_sample_histogram(uint32_t low, uint32_t high, int shift)
{
    const qf_sample_view view = qf_sample_current_view();
    const qf_sample_scale scale = qf_sample_cta.scale;
    qf_sample_clear();
    qf_sample_walk walk = {0, 0};
    int32_t first[4];
    float4 v[4];
    while (qf_sample_next(&walk, view, low, first, v)) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x[4];
            qf_sample_unpack(v[j], x);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                uint32_t key = qf_sample_key(x[e]);
                if (first[j] >= 0 && key >= low && key <= high) {
                    uint32_t bin = (high - key) >> shift;
                    uint64_t mass = qf_sample_mass(scale, x[e]);
                    atomicAdd(&qf_sample_cta.count[bin], 1u);
                    if (mass != 0) {
                        qf_sample_add_shared(&qf_sample_cta.mass[bin], mass);
                    }
                }
            }
        }
    }
    qf_sample_scan();
}

/* Bits to drop so that the interval has at most QF_SAMPLE_BINS bins. */
static __device__ __forceinline__ int qf_sample_shift(uint32_t low, uint32_t high)
{
    int bits = 32 - __clz((int)(high - low));
    return bits > 11 ? bits - 11 : 0;
}

/* The interval becomes its bin `bin`; after a scan. */
static __device__ __forceinline__ void qf_sample_enter(qf_sample_interval *in, int32_t bin, int shift)
{
    uint32_t high = in->high - ((uint32_t)bin << shift);
    uint32_t width = (1u << shift) - 1;
    in->low = high - in->low > width ? high - width : in->low;
    in->high = high;
    in->mass_before += bin > 0 ? qf_sample_cta.mass[bin - 1] : 0;
    in->count_before += bin > 0 ? qf_sample_cta.count[bin - 1] : 0;
    in->size = qf_sample_cta.count[bin] - (bin > 0 ? qf_sample_cta.count[bin - 1] : 0);
}

/* Of the tokens with this key, the nth by id (1: the first). There are that many. */
static __device__ __noinline__ int32_t qf_sample_nth_tied(uint32_t key, uint32_t nth)
{
    const qf_sample_view view = qf_sample_current_view();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int32_t share = (view.num_blocks + QF_SAMPLE_WARPS - 1) / QF_SAMPLE_WARPS;
    int32_t begin = warp * share, end = min(begin + share, view.num_blocks);
    uint32_t before = 0;
    for (int pass = 0; pass < 2; pass++) { /* counts; then the warp that holds it looks again */
        for (int32_t block = begin; block < end; block++) {
            float x[4];
            qf_sample_unpack(qf_sample_load_guarded(view, block * QF_SAMPLE_BLOCK + 4 * lane), x);
            uint32_t own = 0;
            for (int e = 0; e < 4; e++) {
                own += qf_sample_key(x[e]) == key ? 1 : 0;
            }
            uint32_t through = own;
            for (int distance = 1; distance < 32; distance *= 2) {
                uint32_t c = __shfl_up_sync(0xffffffffu, through, distance);
                through += lane >= distance ? c : 0;
            }
            uint32_t at = before + through - own;
            for (int e = 0; pass == 1 && e < 4; e++) {
                at += qf_sample_key(x[e]) == key ? 1 : 0;
                if (qf_sample_key(x[e]) == key && at == nth) {
                    qf_sample_cta.found = block * QF_SAMPLE_BLOCK + 4 * lane + e;
                }
            }
            before += __shfl_sync(0xffffffffu, through, 31);
        }
        __syncthreads();
        if (pass == 0) {
            if (lane == 0) {
                qf_sample_cta.warp_count[warp] = before;
            }
            __syncthreads();
            before = 0;
            for (int i = 0; i < warp; i++) {
                before += qf_sample_cta.warp_count[i];
            }
        }
    }
    return qf_sample_cta.found;
}

/* The place of the interval at which the running count or mass (from the row's first place on) reaches target. */
static __device__ __forceinline__ qf_sample_found qf_sample_locate(qf_sample_interval in, bool by_mass,
                                                                    uint64_t target)
{
    for (;;) {
        uint64_t rest = target - (by_mass ? in.mass_before : in.count_before);
        if (in.size <= QF_SAMPLE_LIST) {
            uint32_t n = qf_sample_gather(in.low, INT32_MAX, in.high);
            if (n <= QF_SAMPLE_LIST) {
                qf_sample_sort(n);
                qf_sample_list_masses(n);
                int32_t i = by_mass ? qf_sample_crossing(true, rest) : rest <= n ? (int32_t)rest - 1 : -1;
                uint64_t mass = in.mass_before + qf_sample_cta.mass[i < 0 ? QF_SAMPLE_BINS - 1 : i];
                if (i < 0) {
                    return (qf_sample_found){0, -1, mass};
                }
                uint64_t place = qf_sample_cta.list[i];
                return (qf_sample_found){~(uint32_t)(place >> 32), (int32_t)(uint32_t)place, mass};
            }
        }
        if (in.low == in.high) { /* one key, many ids; `rest` is within them */
            uint64_t each = qf_sample_mass(qf_sample_cta.scale, qf_sample_logit(in.low));
            uint64_t nth = by_mass ? (rest + each - 1) / each : rest;
            int32_t id = qf_sample_nth_tied(in.low, (uint32_t)nth);
            return (qf_sample_found){in.low, id, in.mass_before + nth * each};
        }
        int shift = qf_sample_shift(in.low, in.high);
        qf_sample_histogram(in.low, in.high, shift);
        int32_t bin = qf_sample_crossing(by_mass, rest);
        if (bin < 0) {
            return (qf_sample_found){0, -1, in.mass_before + qf_sample_cta.mass[QF_SAMPLE_BINS - 1]};
        }
        qf_sample_enter(&in, bin, shift);
    }
}

/* --- few candidates, by the maxima of blocks ------------------------------------------------------------------ */

/* A key that at least `count` blocks' maxima reach, and hardly more; the least key if there are not so many: then
 * `count` places, or all there are, are at or above it. */
static __device__ __noinline__ uint32_t qf_sample_threshold(uint32_t max_key, uint32_t count)
{
    const qf_sample_view view = qf_sample_current_view();
    uint32_t *maxima = reinterpret_cast<uint32_t *>(qf_sample_cta.list); /* num_blocks <= 4,096: they fit */
    if (count > (uint32_t)view.num_blocks) {
        return QF_SAMPLE_LEAST;
    }
    for (int32_t i = threadIdx.x; i < view.num_blocks; i += QF_SAMPLE_THREADS) {
        maxima[i] = view.block_max[i];
    }
    qf_sample_interval in = {QF_SAMPLE_LEAST, max_key, 0, 0, QF_SAMPLE_LIST + 1};
    for (;;) {
        int shift = qf_sample_shift(in.low, in.high);
        qf_sample_clear();
        for (int32_t i = threadIdx.x; i < view.num_blocks; i += QF_SAMPLE_THREADS) {
            if (maxima[i] >= in.low && maxima[i] <= in.high) {
                atomicAdd(&qf_sample_cta.count[(in.high - maxima[i]) >> shift], 1u);
            }
        }
        qf_sample_scan();
        int32_t bin = qf_sample_crossing(false, count - in.count_before);
        if (bin < 0) {
            return QF_SAMPLE_LEAST;
        }
        qf_sample_enter(&in, bin, shift);
        if (in.low == in.high || in.count_before + in.size <= count + 32) {
            return in.low;
        }
    }
}

/* The `count` first places (at most QF_SAMPLE_MAX_LISTED), sorted, in the list. Returns how many there are. */
static __device__ __noinline__ uint32_t qf_sample_top(uint32_t max_key, uint32_t count)
{
    if (count == 0) {
        return 0;
    }
    uint32_t low = qf_sample_threshold(max_key, count);
    uint32_t n = qf_sample_gather(low, INT32_MAX, max_key);
    if (n > QF_SAMPLE_LIST) {
        qf_sample_interval all = {low, max_key, 0, 0, QF_SAMPLE_LIST + 1};
        qf_sample_found last = qf_sample_locate(all, false, count);
        n = qf_sample_gather(last.key, last.id, max_key);
    }
    qf_sample_sort(n);
    return n < count ? n : count;
}

#endif
