/* Every row greedy, nothing edited, nothing reported: the largest logit, ties to the lower id. A chunk's result is one
 * word, key << 32 | ~id, of which the row's is the largest; all bits are set where a logit is NaN or +inf. The last CTA
 * to arrive merges the chunks of all rows, a few lanes a row with all their loads in flight at once, and sends the
 * step's results if it is asked to: one launch from logits to tokens on the host. */
#ifndef QF_SAMPLE_GREEDY_CUH
#define QF_SAMPLE_GREEDY_CUH

#include "sample_finish.cuh"

#define QF_SAMPLE_INVALID (~0ull)

/* The warp's largest; every lane gets it. */
static __device__ __forceinline__ uint64_t qf_sample_largest_word(uint64_t word)
{
    uint32_t high = (uint32_t)(word >> 32), most = __reduce_max_sync(0xffffffffu, high);
    uint32_t low = __reduce_max_sync(0xffffffffu, high == most ? (uint32_t)word : 0u);
    return (uint64_t)most << 32 | low;
}

#define QF_SAMPLE_LANE_WORDS 8 /* that a lane merges: qf_sample_work.finish_lanes are as many as that takes */

/* The word of this CTA's chunk of `row`, in thread 0. */
static __device__ __forceinline__ uint64_t qf_sample_greedy_chunk(const qf_sample_work *work, int32_t row,
                                                                  uint64_t *scratch)
{
    int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int32_t real = work->args.rows[row].real_vocab_size;
    qf_sample_view raw = qf_sample_raw_view(work, row);
    int32_t first_group = blockIdx.x * work->steps * QF_SAMPLE_CHUNK_WARPS;
    int32_t end_group = min(first_group + work->steps * QF_SAMPLE_CHUNK_WARPS, work->num_groups);
    float best = -INFINITY;
    int32_t best_id = 0;
    bool valid = true;
    for (int32_t group = first_group + warp; group < end_group; group += QF_SAMPLE_CHUNK_WARPS) {
        float4 v[4];
        qf_sample_load_group(raw, group, v);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x[4];
            qf_sample_unpack(v[j], x);
#pragma unroll
            for (int e = 0; e < 4; e++) { /* a lane's ids ascend: the first of equals stays */
                int32_t id = group * QF_SAMPLE_GROUP + j * QF_SAMPLE_BLOCK + 4 * lane + e;
                bool better = x[e] > best && id < real;
                valid = valid && x[e] < INFINITY;
                best = better ? x[e] : best;
                best_id = better ? id : best_id;
            }
        }
    }
    uint64_t word = (uint64_t)qf_sample_key(best) << 32 | (uint32_t)~best_id;
    word = qf_sample_largest_word(valid ? word : QF_SAMPLE_INVALID);
    if (lane == 0) {
        scratch[warp] = word;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 1; i < QF_SAMPLE_CHUNK_WARPS; i++) {
            word = scratch[i] > word ? scratch[i] : word;
        }
    }
    return word;
}

/* All rows' tokens, from their chunks' words. */
static __device__ __forceinline__ void qf_sample_greedy_finish(const qf_sample_work *work)
{
    int32_t lanes = work->finish_lanes, lane = threadIdx.x & (lanes - 1), rows = QF_SAMPLE_CHUNK_THREADS / lanes;
    for (int32_t first = 0; first < work->args.num_rows; first += rows) {
        int32_t row = first + (int32_t)threadIdx.x / lanes;
        bool inside = row < work->args.num_rows;
        int32_t slot = inside ? work->args.rows[row].slot : -1;
        uint64_t word = 0;
#pragma unroll
        for (int j = 0; j < QF_SAMPLE_LANE_WORDS; j++) {
            int32_t i = lane + j * lanes;
            uint64_t other = inside && i < work->num_chunks
                                 ? __ldcg(reinterpret_cast<const unsigned long long *>(work->mass) +
                                          (int64_t)row * work->num_chunks + i)
                                 : 0;
            word = other > word ? other : word;
        }
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
            uint64_t other = __shfl_xor_sync(0xffffffffu, word, distance);
            word = other > word ? other : word;
        }
        if (inside && lane == 0) {
            bool drawn = word != QF_SAMPLE_INVALID && (uint32_t)(word >> 32) != QF_SAMPLE_MASKED && slot >= 0;
            int32_t token_id = drawn ? (int32_t)~(uint32_t)word : -1;
            work->args.token_ids[row] = token_id;
            if (slot >= 0) {
                work->args.last_token[slot] = token_id;
            }
        }
    }
}

/* Grid (chunks, rows). */
static __global__ void __launch_bounds__(QF_SAMPLE_CHUNK_THREADS, 8)
    qf_sample_greedy_kernel(const __grid_constant__ qf_sample_work work)
{
    __shared__ uint64_t scratch[QF_SAMPLE_CHUNK_WARPS];
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    int32_t row = blockIdx.y;
    uint64_t word = qf_sample_greedy_chunk(&work, row, scratch);
    if (threadIdx.x == 0) {
        work.mass[(int64_t)row * work.num_chunks + blockIdx.x] = word; /* chunks <= groups */
    }
    if (qf_step_is_last(work.arrivals, gridDim.x * gridDim.y)) {
        qf_sample_greedy_finish(&work);
        if (work.publishes) {
            qf_sample_publish(&work);
        }
    }
}

#endif
