/* What a row's parameters do to its logits before the draw: bitmask, biases, penalties, in this order. */
#ifndef QF_SAMPLE_EDIT_CUH
#define QF_SAMPLE_EDIT_CUH

#include "sample_common.cuh"

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

/* The bits of the ids from id on, from bit 0 (id % 4 == 0, so that four are in one word). */
static __device__ __forceinline__ uint32_t qf_sample_load_bits(const qf_sample_work *work, const qf_cuda_sample_row *r,
                                                               int32_t id)
{
    bool masks = r->bitmask_offset >= 0 && id < r->real_vocab_size;
    return masks ? work->args.bitmasks[r->bitmask_offset + id / 32] >> id % 32 : 0xffffffffu;
}

static __device__ __forceinline__ void qf_sample_mask(uint32_t bits, int32_t real_vocab_size, int32_t id, float (&x)[4])
{
#pragma unroll
    for (int e = 0; e < 4; e++) {
        x[e] = (bits >> e & 1u) != 0 && id + e < real_vocab_size ? x[e] : -INFINITY;
    }
}

/* The first id of a lane's logits of block j of a group. */
static __device__ __forceinline__ int32_t qf_sample_id(int32_t group, int j)
{
    return group * QF_SAMPLE_GROUP + j * QF_SAMPLE_BLOCK + 4 * (int32_t)(threadIdx.x % 32);
}

/* Masks what lies behind the vocabulary in use. */
static __device__ __forceinline__ void qf_sample_cut_off(int32_t real_vocab_size, int32_t group, float4 (&v)[4])
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float x[4];
        qf_sample_unpack(v[j], x);
        qf_sample_mask(0xffffffffu, real_vocab_size, qf_sample_id(group, j), x);
        v[j] = make_float4(x[0], x[1], x[2], x[3]);
    }
}

/* Masks the chunk into the edited copy and adds the biases there, each thread those of its own ids, in order. Ends
 * with the copy visible to the block. */
static __device__ __noinline__ void qf_sample_apply_biases(const qf_sample_work *work, const qf_cuda_sample_row *r,
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
        qf_sample_mask(qf_sample_load_bits(work, r, id), r->real_vocab_size, id, x);
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

/* Four counts from id on, two to a word. */
static __device__ __forceinline__ uint2 qf_sample_load_counts(const qf_sample_work *work, const uint16_t *counts,
                                                              int32_t id)
{
    int32_t size = work->args.vocab_size;
    if (work->count_vectors && id + 4 <= size) {
        return *reinterpret_cast<const uint2 *>(counts + id);
    }
    uint2 v;
    v.x = (id < size ? (uint32_t)counts[id] : 0) | (id + 1 < size ? (uint32_t)counts[id + 1] << 16 : 0);
    v.y = (id + 2 < size ? (uint32_t)counts[id + 2] : 0) | (id + 3 < size ? (uint32_t)counts[id + 3] << 16 : 0);
    return v;
}

/* A warp's group: raw in, edited out, and stored. All loads stand before the stores: the compiler cannot move them. */
static __device__ __forceinline__ void qf_sample_edit(const qf_sample_work *work, const qf_cuda_sample_row *r,
                                                      qf_sample_plan plan, int32_t row, int32_t group, float4 (&v)[4])
{
    float *edited = work->edited + (int64_t)row * work->stride;
    const uint16_t *counts = work->args.counts + (int64_t)r->slot * work->args.vocab_size;
    uint2 count[4];
    uint32_t bits[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int32_t id = qf_sample_id(group, j);
        bits[j] = qf_sample_load_bits(work, r, id);
        count[j] = plan.penalises ? qf_sample_load_counts(work, counts, id) : make_uint2(0u, 0u);
        if (r->num_bias > 0) {
            v[j] = *reinterpret_cast<const float4 *>(edited + id);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float x[4];
        int32_t id = qf_sample_id(group, j);
        qf_sample_unpack(v[j], x);
        qf_sample_mask(bits[j], r->real_vocab_size, id, x);
        x[0] = qf_sample_penalise(r, count[j].x & 0xffffu, x[0]);
        x[1] = qf_sample_penalise(r, count[j].x >> 16, x[1]);
        x[2] = qf_sample_penalise(r, count[j].y & 0xffffu, x[2]);
        x[3] = qf_sample_penalise(r, count[j].y >> 16, x[3]);
        v[j] = make_float4(x[0], x[1], x[2], x[3]);
        *reinterpret_cast<float4 *>(edited + id) = v[j];
    }
}

#endif
