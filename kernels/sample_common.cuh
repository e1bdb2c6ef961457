/* What the sampling kernels share: the order of logits as integers, weights and their fixed-point masses, the random
 * words, a row's plan, views of rows, and the workspace. */
#ifndef QF_SAMPLE_COMMON_CUH
#define QF_SAMPLE_COMMON_CUH

#include <float.h>
#include <math.h>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "step_publish.cuh"

#define QF_SAMPLE_BLOCK 128     /* logits with one maximum in common: a warp's 16-byte loads */
#define QF_SAMPLE_GROUP 512     /* logits that a warp has in flight: four blocks, one mass */
#define QF_SAMPLE_CHUNK_WARPS 4 /* of the kernels that cut rows into chunks */
#define QF_SAMPLE_CHUNK_THREADS (32 * QF_SAMPLE_CHUNK_WARPS)
#define QF_SAMPLE_BINS 2048     /* of a histogram */
#define QF_SAMPLE_LIST 2048     /* candidates that are sorted in shared memory */
#define QF_SAMPLE_MAX_LISTED 1024 /* a larger top_k is found through histograms */
#define QF_SAMPLE_MAX_VOCAB (1 << 19) /* so that masses of a row add up to less than 2^63 */

/* --- order ---------------------------------------------------------------------------------------------------- */

/* Ascending with the logit; -0 and 0 are equal. NaN has no place: rows are checked first. */
#define QF_SAMPLE_MASKED 0x007fffffu /* the key of -inf; smaller keys do not occur */
#define QF_SAMPLE_LEAST 0x00800000u  /* the key of -FLT_MAX */

static __device__ __forceinline__ uint32_t qf_sample_key(float x)
{
    uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float qf_sample_logit(uint32_t key)
{
    return __uint_as_float((key & 0x80000000u) != 0 ? key ^ 0x80000000u : ~key);
}

/* Ascending: logits descending, ties by ascending id. */
static __device__ __forceinline__ uint64_t qf_sample_place(uint32_t key, int32_t id)
{
    return (uint64_t)~key << 32 | (uint32_t)id;
}

static __device__ __forceinline__ float qf_sample_place_logit(uint64_t place)
{
    return qf_sample_logit(~(uint32_t)(place >> 32));
}

/* --- weights -------------------------------------------------------------------------------------------------- */

typedef struct qf_sample_scale {
    float max, inverse_temperature, min_p;
} qf_sample_scale;

static __device__ __forceinline__ float qf_sample_exponent(qf_sample_scale s, float x)
{
    return __fmul_rn(__fsub_rn(x, s.max), s.inverse_temperature);
}

/* e^((x - max) / temperature), 0 below min_p: the same operations as the host's, none of them fused, so the same bits
 * (csrc/base/math.h explains them). */
static __device__ __forceinline__ float qf_sample_weight(qf_sample_scale s, float x)
{
    float y = qf_sample_exponent(s, x);
    float t = __fadd_rn(__fmul_rn(y, 0x1.715476p+0f), 12582912.0f);
    float n = __fsub_rn(t, 12582912.0f);
    float r = __fsub_rn(y, __fmul_rn(n, 0x1.62e400p-1f));
    r = __fsub_rn(r, __fmul_rn(n, 0x1.7f7d1cp-20f));
    float q = __fadd_rn(__fmul_rn(0x1.6a2434p-10f, r), 0x1.1239e2p-7f);
    q = __fadd_rn(__fmul_rn(q, r), 0x1.5558f2p-5f);
    q = __fadd_rn(__fmul_rn(q, r), 0x1.555492p-3f);
    q = __fadd_rn(__fmul_rn(q, r), 0x1.fffffcp-2f);
    float p = __fadd_rn(__fadd_rn(__fmul_rn(q, __fmul_rn(r, r)), r), 1.0f);
    float w = __fmul_rn(p, __uint_as_float((__float_as_uint(t) - 0x4b400000u + 127u) << 23));
    w = y < -87.0f ? 0.0f : w;
    return w < s.min_p ? 0.0f : w;
}

/* Units of 2^-44. The largest weight of a row is 1, so a row's total is off by less than 2^-44 vocab_size of it
 * (9e-9), and integers add up to the same in any order. Weights below 5.7e-14 have no mass and are never drawn. */
static __device__ __forceinline__ uint64_t qf_sample_mass(qf_sample_scale s, float x)
{
    return __float2ull_rz(__fmul_rn(qf_sample_weight(s, x), 0x1p44f));
}
#define QF_SAMPLE_RANGE 31.0f /* exponents below -31 have no mass */

/* Bins of equal width in the exponent; monotone in x, whatever is rounded. */
static __device__ __forceinline__ float qf_sample_bin_scale(qf_sample_scale s, uint32_t min_key)
{
    float range = fminf(-qf_sample_exponent(s, qf_sample_logit(min_key)), QF_SAMPLE_RANGE);
    return range > 0.0f ? fminf(__fdiv_rn((float)QF_SAMPLE_BINS, range), 1e30f) : 0.0f;
}

static __device__ __forceinline__ int32_t qf_sample_bin(qf_sample_scale s, float bin_scale, float x)
{
    float position = __fmul_rn(-qf_sample_exponent(s, x), bin_scale);
    return position < (float)(QF_SAMPLE_BINS - 1) ? (int32_t)position : QF_SAMPLE_BINS - 1;
}

/* Adds to a 64-bit word of shared memory through its halves, whose atomics are fast; the sum has no order. */
static __device__ __forceinline__ void qf_sample_add_shared(uint64_t *word, uint64_t value)
{
    uint32_t *half = reinterpret_cast<uint32_t *>(word);
    uint32_t low = (uint32_t)value, old = atomicAdd(half, low);
    uint32_t high = (uint32_t)(value >> 32) + (old + low < old ? 1u : 0u);
    if (high != 0) {
        atomicAdd(half + 1, high);
    }
}

/* --- random words --------------------------------------------------------------------------------------------- */

/* The first 53 bits of Philox4x32-10, the lowest set: u is this times 2^-53. */
static __device__ __forceinline__ uint64_t qf_sample_uniform(const qf_cuda_sample_row *r)
{
    uint32_t x0 = r->position, x1 = r->sample_index, x2 = 0, x3 = 0, k0 = r->seed_low, k1 = r->seed_high;
    for (int round = 0; round < 10; round++) {
        uint32_t a = 0xD2511F53u, b = 0xCD9E8D57u;
        uint32_t y0 = __umulhi(b, x2) ^ x1 ^ k0, y2 = __umulhi(a, x0) ^ x3 ^ k1;
        x1 = b * x2;
        x3 = a * x0;
        x0 = y0;
        x2 = y2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return ((uint64_t)x0 << 32 | x1) >> 11 | 1u;
}

/* The least running sum that passes u * total: floor(u * total) + 1, exactly; at most total. */
static __device__ __forceinline__ uint64_t qf_sample_target(uint64_t uniform, uint64_t total)
{
    return (__umul64hi(uniform, total) << 11 | (uniform * total) >> 53) + 1;
}

/* The least sum that holds top_p of the total; top_p < 1, total >= 2^44. */
static __device__ __forceinline__ uint64_t qf_sample_limit(uint64_t total, float top_p)
{
    return __double2ull_ru((double)total * (double)top_p);
}

/* --- what a row asks for -------------------------------------------------------------------------------------- */

typedef enum qf_sample_mode {
    QF_SAMPLE_NOTHING = 0, /* no draw */
    QF_SAMPLE_GREEDY,
    QF_SAMPLE_TOP_K, /* few candidates, by the maxima of blocks */
    QF_SAMPLE_BY_BIN, /* top_p, or a large top_k: histogram */
    QF_SAMPLE_BY_ID
} qf_sample_mode;

typedef struct qf_sample_plan {
    qf_sample_mode mode;
    bool penalises, edits; /* edits: the row to draw from is not the logits' own */
    bool logprobs;
} qf_sample_plan;

static __device__ __forceinline__ qf_sample_plan qf_sample_plan_make(const qf_cuda_sample_row *r)
{
    qf_sample_plan plan;
    bool draws = r->slot >= 0;
    bool filters_k = r->top_k > 0 && r->top_k < r->real_vocab_size;
    plan.mode = !draws                    ? QF_SAMPLE_NOTHING
                : r->temperature == 0.0f  ? QF_SAMPLE_GREEDY
                : filters_k               ? (r->top_k <= QF_SAMPLE_MAX_LISTED ? QF_SAMPLE_TOP_K : QF_SAMPLE_BY_BIN)
                : r->top_p < 1.0f         ? QF_SAMPLE_BY_BIN
                                          : QF_SAMPLE_BY_ID;
    plan.penalises = draws && r->uses_counts != 0 &&
                     (r->repetition_penalty != 1.0f || r->presence_penalty != 0.0f || r->frequency_penalty != 0.0f);
    plan.edits = draws && (plan.penalises || r->bitmask_offset >= 0 || r->num_bias > 0);
    plan.logprobs = (draws && r->num_logprobs >= 0) || r->target_id >= 0;
    return plan;
}

/* --- workspace ------------------------------------------------------------------------------------------------ */

/* All by row but the first; a row's `stride` is vocab_size up to the next group. Nothing else needs to be zeroed. */
typedef struct qf_sample_work {
    qf_cuda_sample_args args;
    uint32_t *arrivals;      /* (1) of a kernel's CTAs, to find the last: zero before and after */
    float *edited;           /* (num_rows, stride) logits after masks and penalties, of rows that have any */
    uint64_t *mass;          /* (num_rows, num_groups) by id; if all are greedy, (num_rows, num_chunks) of maxima */
    uint64_t *raw_mass;      /* (num_rows, num_groups) of the logits as they came, temperature 1 */
    uint64_t *bin_mass;      /* (num_rows, QF_SAMPLE_BINS) */
    uint32_t *bin_count;     /* (num_rows, QF_SAMPLE_BINS) */
    uint4 *stats;            /* (num_rows, num_chunks) max key, min key above -inf, raw max key, 1 if not finite */
    uint32_t *block_max;     /* (num_rows, num_blocks) keys */
    uint32_t *raw_block_max; /* (num_rows, num_blocks) */
    int32_t stride, num_groups, num_blocks;
    int32_t steps, num_chunks; /* a chunk: `steps` groups for each of its CTA's warps */
    int32_t finish_lanes;    /* that merge a greedy row's chunks: a power of two up to 32 */
    bool publishes;
    qf_cuda_step_io io;      /* if it publishes */
    bool vectors, count_vectors; /* 16-byte loads of logits, 8-byte loads of counts are aligned */
} qf_sample_work;

/* What is drawn from: row i's logits, or its edited copy; ids from `limit` on read as masked. */
typedef struct qf_sample_view {
    const float *x;
    const uint32_t *block_max;
    int32_t limit, num_blocks;
    bool vectors;
} qf_sample_view;

static __device__ __forceinline__ qf_sample_view qf_sample_raw_view(const qf_sample_work *work, int32_t row)
{
    qf_sample_view view;
    view.x = work->args.logits + (int64_t)row * work->args.logits_stride;
    view.block_max = work->raw_block_max + (int64_t)row * work->num_blocks;
    view.limit = work->args.vocab_size;
    view.num_blocks = work->num_blocks;
    view.vectors = work->vectors;
    return view;
}

static __device__ __forceinline__ qf_sample_view qf_sample_draw_view(const qf_sample_work *work, int32_t row,
                                                                      bool edits)
{
    qf_sample_view view = qf_sample_raw_view(work, row);
    view.block_max = work->block_max + (int64_t)row * work->num_blocks;
    view.limit = work->args.rows[row].real_vocab_size;
    if (edits) {
        view.x = work->edited + (int64_t)row * work->stride;
        view.limit = work->stride;
        view.vectors = true;
    }
    return view;
}

static __device__ __forceinline__ float4 qf_sample_load_guarded(qf_sample_view view, int32_t id)
{
    float4 v;
    v.x = id < view.limit ? view.x[id] : -INFINITY;
    v.y = id + 1 < view.limit ? view.x[id + 1] : -INFINITY;
    v.z = id + 2 < view.limit ? view.x[id + 2] : -INFINITY;
    v.w = id + 3 < view.limit ? view.x[id + 3] : -INFINITY;
    return v;
}

/* A warp's four blocks (first ids), four logits of each for a lane: all loads in flight at once. */
static __device__ __forceinline__ void qf_sample_load(qf_sample_view view, const int32_t (&first)[4], float4 (&v)[4])
{
    int32_t last = max(max(first[0], first[1]), max(first[2], first[3]));
    int32_t lane = 4 * (threadIdx.x % 32);
    if (view.vectors && last + QF_SAMPLE_BLOCK <= view.limit) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[j] = *reinterpret_cast<const float4 *>(view.x + first[j] + lane);
        }
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[j] = qf_sample_load_guarded(view, first[j] + lane);
        }
    }
}

static __device__ __forceinline__ void qf_sample_load_group(qf_sample_view view, int32_t group, float4 (&v)[4])
{
    int32_t first[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        first[j] = group * QF_SAMPLE_GROUP + j * QF_SAMPLE_BLOCK;
    }
    qf_sample_load(view, first, v);
}

static __device__ __forceinline__ void qf_sample_unpack(float4 v, float (&x)[4])
{
    x[0] = v.x;
    x[1] = v.y;
    x[2] = v.z;
    x[3] = v.w;
}

/* The words of a row's chunks put together. */
static __device__ __forceinline__ uint4 qf_sample_merge(uint4 a, uint4 b)
{
    return make_uint4(max(a.x, b.x), min(a.y, b.y), max(a.z, b.z), a.w | b.w);
}

static __device__ __forceinline__ uint4 qf_sample_merge_warp(uint4 a)
{
    return make_uint4(__reduce_max_sync(0xffffffffu, a.x), __reduce_min_sync(0xffffffffu, a.y),
                      __reduce_max_sync(0xffffffffu, a.z), __reduce_or_sync(0xffffffffu, a.w));
}

#define QF_SAMPLE_NO_STATS make_uint4(QF_SAMPLE_MASKED, 0xffffffffu, QF_SAMPLE_MASKED, 0u)

/* The whole block's; every thread gets it. scratch: one word of shared memory a warp. */
static __device__ __forceinline__ uint4 qf_sample_merge_block(uint4 a, uint4 *scratch)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    a = qf_sample_merge_warp(a);
    if (lane == 0) {
        scratch[warp] = a;
    }
    __syncthreads();
    return qf_sample_merge_warp(lane < blockDim.x / 32 ? scratch[lane] : QF_SAMPLE_NO_STATS);
}

static __device__ __forceinline__ uint4 qf_sample_row_stats(const qf_sample_work *work, int32_t row, uint4 *scratch)
{
    uint4 stats = QF_SAMPLE_NO_STATS;
    for (int32_t i = threadIdx.x; i < work->num_chunks; i += blockDim.x) {
        stats = qf_sample_merge(stats, work->stats[(int64_t)row * work->num_chunks + i]);
    }
    return qf_sample_merge_block(stats, scratch);
}

#endif
