/* Decode attention over an int4 cache of head_dim 128 on Hopper: a warp's walk, and the kernel.
 *
 * As attention_decode_lowbit.cuh, by 12 warps of 168 registers, each with 64 positions at a time: what is common to all
 * positions is read once for 64, and four tiles' products are independent of each other.
 *
 *     shared memory:  fine table | C | D | Q | sums of Q | powers of two | factors | barriers |
 *                     12 warps x (ring of keys | ring of values | rows of the coarse table | decoded scales)
 *                     afterwards the warps' results stand where that was, and then the partial results of other CTAs */
#ifndef QF_ATTENTION_DECODE_WIDE_CUH
#define QF_ATTENTION_DECODE_WIDE_CUH

#include "attention_decode_wide_row.cuh"
#include "attention_decode_wide_tile.cuh"

template <bool biased, bool own>
static __device__ __forceinline__ void wide_walk_units(const attention_params &p, wide_walk &w, const wide_shared &shared,
                                                       wide_state &state)
{
    const lowbit_queries<128> queries = {shared.q, shared.sums, shared.factor, shared.c, shared.d, shared.inverse};
    const uint32_t lane = w.lane, g = lane / 4, t = lane % 4;
    const uint32_t value_at = lane % 8 * WIDE_ROW + ((lane / 8 ^ lane % 8 / 2) * 16);
    const uint8_t *const units = shared.decoded + t * 16, *const zeros = units + WIDE_UNITS + g % 4 * 4;
    const uint4 *const fine = shared.fine + lane;
    bool fresh = true;
    uint32_t slot = 0, parity = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        state.o[i][0] = state.o[i][1] = state.o[i][2] = state.o[i][3] = 0.0f;
    }
    state.excess[0] = state.excess[1] = state.excess[2] = state.excess[3] = 0.0f;
    state.exponent = 0;
    state.maximum[0] = state.maximum[1] = 0.0f;
#pragma unroll 1
    for (uint32_t unit = w.first; unit < w.end; unit++) {
        const int32_t position = (int32_t)(unit * 64);
        uint32_t slots[2], parities[2];
        uint8_t *keys[2], *values[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            slots[h] = slot;
            parities[h] = parity;
            keys[h] = shared.stages + slot * WIDE_STAGE;
            values[h] = keys[h] + WIDE_DEPTH * WIDE_STAGE;
            slot = slot == WIDE_DEPTH - 1 ? 0 : slot + 1;
            parity ^= slot == 0;
        }
        qf_barrier_wait(w.barriers + slots[0] * 8, parities[0]);
        qf_barrier_wait(w.barriers + slots[1] * 8, parities[1]);
        float x[4][4];
        uint32_t weights[4][2];
        const bool edge = position < w.begin || position + 64 > w.end_position - own;
        if (edge) {
            if constexpr (own) {
                put_own_row(0, position, keys);
            }
            wide_clear(w, position, keys);
        }
        if constexpr (biased) {
            wide_bias(queries, shared.coarse + unit % 2 * WIDE_COARSE, fine, lane, state.maximum, x);
        } else {
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    x[m][i] = -state.maximum[i % 2];
                }
            }
        }
        uint4 q[4];
#pragma unroll
        for (int group = 0; group < 4; group++) {
            q[group] = queries.q[32 * group + lane];
        }
        wide_place places[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t next = 2 * unit + WIDE_DEPTH + h;
            wide_scores(keys[h], lane, queries, q, x, 2 * h);
            __syncwarp(); /* all have read what is written anew */
            places[h] = wide_locate<WALKING>(p, w, next);
            wide_send<biased, 0>(p, w, places[h], next, slots[h]);
        }
        qf_barrier_wait(w.barriers + (WIDE_DEPTH + slots[0]) * 8, parities[0]);
        qf_barrier_wait(w.barriers + (WIDE_DEPTH + slots[1]) * 8, parities[1]);
        if (edge) {
            if constexpr (own) {
                put_own_row(1, position, values);
            }
            wide_clear(w, position, values);
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int32_t at = position + 16 * m + (int32_t)g + 8 * (i / 2);
                    x[m][i] = at >= w.begin && at < w.end_position ? x[m][i] : -INFINITY;
                }
            }
        }
        wide_decode(state, values, shared.decoded, lane);
        wide_soften(state, fresh, x, weights);
        fresh = false;
        __syncwarp(); /* decoded steps are there */
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int m = 0; m < 2; m++) {
                wide_weigh(state, values[h] + value_at + m * 16 * WIDE_ROW, units + (2 * h + m) * 128,
                           zeros + (2 * h + m) * 128, weights[2 * h + m]);
            }
            __syncwarp(); /* all have read what is written anew */
            wide_send<biased, 1>(p, w, places[h], 2 * unit + WIDE_DEPTH + h, slots[h]);
        }
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
        state.maximum[e] = fresh ? -INFINITY : state.maximum[e];
        state.sum[e] = state.excess[2 + e];
        state.excess[e] = g < 4 ? state.excess[e] : 0.0f; /* rows 4 .. 7 are the same */
    }
}

/* Stages are sent for: before the wait for the kernel before, if none of their positions is the row's own. The last of the
 * ring is left for after the loads of q: these would queue behind it. */
template <bool biased>
static __device__ __forceinline__ void wide_begin(const attention_params &p, wide_walk &w, bool first_unit)
{
    bool waited = !first_unit;
#pragma unroll 1
    for (uint32_t s = 0; s < WIDE_DEPTH - 1; s++) {
        if (!waited && (int32_t)((2 * w.first + s + 1) * 32) > w.own_position) {
            qf_grid_dependency_wait();
            waited = true;
        }
        const wide_place place = wide_locate<AHEAD>(p, w, 2 * w.first + s);
        wide_send<biased, 0>(p, w, place, 2 * w.first + s, s);
        wide_send<biased, 1>(p, w, place, 2 * w.first + s, s);
    }
    if (!waited) {
        qf_grid_dependency_wait();
    }
}

/* The warps' barriers, with no phase ended. */
static __device__ __forceinline__ void wide_make_barriers(uint32_t barriers)
{
    if (threadIdx.x % 32 < 2 * WIDE_DEPTH) {
        const uint32_t barrier = barriers + threadIdx.x % 32 * 8;
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
        qf_fence_async_shared();
    }
    __syncwarp();
}

/* The heads' q comes to L2 before the stages' copies fill the queues of memory: the load that follows the wait for the
 * kernel before finds there what that has written or, if it was long ago, what this has brought. */
static __device__ __forceinline__ void wide_prefetch_queries(const attention_params &p, const qf_cuda_attention_item &item,
                                                             int32_t kv_head, int32_t first_head)
{
    const int32_t bytes = min(p.group - first_head, LOWBIT_HEADS) * 256, at = (int32_t)threadIdx.x * 128;
    if (at < bytes) {
        const char *q = static_cast<const char *>(p.a.q) +
                        ((int64_t)item.first_row * p.a.shape.num_heads + kv_head * p.group + first_head) * 256;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(q + at));
    }
}

template <bool biased, bool own>
static __global__ void __launch_bounds__(WIDE_THREADS, 1)
    attention_decode_wide_kernel(const __grid_constant__ attention_params p)
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t dynamic[];
    __shared__ qf_cuda_attention_item item; /* registers are scarce: these are read anew where they are wanted */
    __shared__ int32_t unit, num_units, kv_head;
    __shared__ int32_t starts[own ? WIDE_THREADS : 1];
    qf_grid_launch_dependents();
    const uint32_t warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0);
    wide_shared shared = lay_out<QF_CUDA_KV_INT4, 128>(dynamic, 0);
    const uint32_t place = WIDE_FIXED + warp * WIDE_OWN;
    const uint32_t barriers = qf_shared_address(dynamic) + wide_sizes::fixed + warp * (16 * WIDE_DEPTH);
    shared.stages = dynamic + place;
    shared.coarse = shared.stages + 2 * WIDE_DEPTH * WIDE_STAGE;
    shared.decoded = shared.coarse + 2 * WIDE_COARSE;
    shared.values = reinterpret_cast<float *>(dynamic + WIDE_FIXED);
    shared.maximum = shared.values + WIDE_WARPS * LOWBIT_HEADS * wide_sizes::result_row;
    shared.sum = shared.maximum + WIDE_WARPS * LOWBIT_HEADS;
    if constexpr (biased) { /* no kernel of the step writes it */
        constexpr int32_t first = own ? 32 : 0; /* the first warp loads the item */
        for (int32_t i = (int32_t)threadIdx.x - first; i >= 0 && i < wide_sizes::fine / 16; i += WIDE_THREADS - first) {
            qf_cp_async_16(shared.fine + i, reinterpret_cast<const uint4 *>(p.a.bias_fine) + i);
        }
        qf_cp_async_commit();
    }
    for (int32_t u = blockIdx.x;;) {
        /* Where the first sequences' block tables start comes with the item: a trip to memory less. Rows are of a sequence each. */
        const int32_t start = own && (int32_t)threadIdx.x < p.a.num_tokens ? __ldcg(p.a.block_table_start + threadIdx.x) : 0;
        if (threadIdx.x < 32) {
            load_unit(p, u, item, unit, num_units, kv_head);
        }
        if constexpr (own) {
            starts[threadIdx.x] = start;
        }
        __syncthreads();
        if (u >= num_units) {
            break;
        }
#pragma unroll 1
        for (int32_t first_head = 0; first_head < p.group; first_head += LOWBIT_HEADS) {
            if constexpr (!own) {
                wide_prefetch_queries(p, item, kv_head, first_head);
            }
            wide_state state;
            wide_walk w = wide_start(p, item, kv_head, barriers, qf_shared_address(shared.stages),
                                     own && item.seq < WIDE_THREADS
                                         ? starts[item.seq]
                                         : __ldcg(p.a.block_table_start + item.seq));
            if constexpr (own) {
                wide_load_blocks(p, w, 2 * w.first & ~31u);
            }
            float b[4] = {}, middle[4] = {}; /* sent for before the wait for the kernel before */
            if constexpr (biased) {
                const float *turn = reinterpret_cast<const float *>(p.a.bias_fine + QF_CUDA_BIAS_TILE / 2 * 128);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    b[i] = __ldg(p.a.kv.k_bias + kv_head * 128 + 32 * i + threadIdx.x % 32);
                    middle[i] = __ldg(turn + 32 * i + threadIdx.x % 32);
                }
            }
            wide_make_barriers(barriers);
            if constexpr (own) {
                const int32_t slot = own_slot(p, item, first_head);
                const own_columns columns = own_columns_of(p, item, kv_head, first_head);
                qf_grid_dependency_wait();
                const own_parts parts = send_for_own(p, columns);
#pragma unroll 1
                for (uint32_t s = 0; s < WIDE_DEPTH; s++) {
                    const wide_place place = wide_locate<LOCATED>(p, w, 2 * w.first + s);
                    wide_send<biased, 0>(p, w, place, 2 * w.first + s, s);
                    wide_send<biased, 1>(p, w, place, 2 * w.first + s, s);
                }
                if (warp < LOWBIT_HEADS) {
                    float x[4];
                    turn_query(p, columns, parts, x);
                    prepare_head<QF_CUDA_KV_INT4, 128>(p, x, b, middle, shared);
                } else if (warp == WIDE_WARPS - 1 && first_head == 0) {
                    make_own_row(p, item, kv_head, slot, columns, parts);
                }
            } else {
                wide_begin<biased>(p, w, unit == (int32_t)blockIdx.x && first_head == 0);
                prepare_queries<QF_CUDA_KV_INT4, 128>(p, item, kv_head, first_head, b, middle, shared);
                const uint32_t last = 2 * w.first + WIDE_DEPTH - 1;
                const wide_place place = wide_locate<AHEAD>(p, w, last);
                wide_send<biased, 0>(p, w, place, last, WIDE_DEPTH - 1);
                wide_send<biased, 1>(p, w, place, last, WIDE_DEPTH - 1);
            }
            qf_cp_async_wait<0>(); /* the fine table, which all threads have copied */
            __syncthreads();
            wide_walk_units<biased, own>(p, w, shared, state);
            __syncthreads(); /* results stand where stages were */
            put_results<QF_CUDA_KV_INT4, 128>(state, shared);
            __syncthreads();
            merge_results<QF_CUDA_KV_INT4, 128, WIDE_WARPS>(p, item, kv_head, first_head, shared);
            qf_fence_async_shared();
            __syncthreads(); /* shared memory is written anew */
        }
        if (item.num_splits == 1) {
            zero_padding(p, item, kv_head);
        } else {
            merge_item_wide<128, WIDE_THREADS>(p, item, kv_head, reinterpret_cast<uint8_t *>(shared.values),
                                               WIDE_WARPS * WIDE_OWN);
        }
        u = unit + (int32_t)gridDim.x;
        if (u >= num_units) {
            break;
        }
        qf_fence_async_shared();
        __syncthreads(); /* item is written anew */
    }
    qf_grid_dependency_wait(); /* a kernel's end implies its predecessor's, whether it had work or not */
#endif
}

#endif
