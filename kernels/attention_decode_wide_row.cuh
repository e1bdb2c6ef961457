/* Decode attention over an int4 cache of head_dim 128 on Hopper: a row's own q, key and value, straight from what the QKV
 * linear made, where no kernel came between (qf_cuda_attention_args.qkv). Bit for bit what rope_kv_write makes of them.
 *
 * Warps 0 .. 7 take a query head each. An item that ends with the row's own position has it in the share of the CTA's last
 * warp, which makes the row's codes and words in shared memory, sends them to the cache, and puts them in their stage when
 * that has come: what the cache had there is of no account, so stages are sent for as if all had been written before.
 *
 * What the QKV linear made is sent for before the first stages: behind their copies it would wait for them, and the time of
 * rope_kv_write, which those copies hide, would be spent all the same. */
#ifndef QF_ATTENTION_DECODE_WIDE_ROW_CUH
#define QF_ATTENTION_DECODE_WIDE_ROW_CUH

#include "attention_decode_wide_stage.cuh"
#include "kv_row.cuh"

#define OWN_SPLITS 4 /* of the QKV linear, in flight at once: it has 1 to 4 for a few rows */

/* What a lane is sent of the row, before the first of it is used: cosines and sines, and up to 8 columns of OWN_SPLITS splits.
 * A query's warp has columns 32 i + lane of its head; the last warp, four of the first half of key or value, and of the second. */
struct own_parts {
    float turn[8], x[OWN_SPLITS][8];
};

/* Whether this warp is to make the row's own key and value. */
static __device__ __forceinline__ bool has_own_row(const qf_cuda_attention_item &item, int32_t first_head)
{
    return threadIdx.x / 32 == WIDE_WARPS - 1 && first_head == 0 && item.kv_end > item.first_position;
}

/* Where this lane's first column is in the row of qkv, and the cosine of it, if it has any and is turned. */
struct own_columns {
    const float *from, *turn;
    bool there, turned;
};

static __device__ __forceinline__ own_columns own_columns_of(const attention_params &p, const qf_cuda_attention_item &item,
                                                             int32_t kv_head, int32_t first_head)
{
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool query = warp < LOWBIT_HEADS, key = lane < 16, own = has_own_row(item, first_head);
    const int32_t column = query ? lane : lane % 16 * 4;
    const int32_t head = query ? kv_head * p.group + first_head + warp
                               : p.a.shape.num_heads + (key ? 0 : p.a.shape.num_kv_heads) + kv_head;
    return own_columns{p.a.qkv + (int64_t)item.first_row * p.a.qkv_stride + head * 128 + column,
                       p.a.cos_sin + (int64_t)item.first_row * 128 + column,
                       query ? warp < p.group - first_head : own,
                       query ? warp < p.group - first_head : own && key};
}

/* By all warps. */
static __device__ __forceinline__ own_parts send_for_own(const attention_params &p, const own_columns &c)
{
    const int64_t split_size = (int64_t)p.a.num_tokens * p.a.qkv_stride;
    own_parts o = {};
    if (threadIdx.x / 32 < LOWBIT_HEADS) {
        if (c.turned) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                o.turn[i] = load_floats(c.turn + 32 * i, floats<1>()).v[0];
            }
        }
#pragma unroll
        for (int s = 0; s < OWN_SPLITS; s++) {
            if (c.there && s < p.a.qkv_splits) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    o.x[s][i] = load_floats(c.from + s * split_size + 32 * i, floats<1>()).v[0];
                }
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const floats<4> v = c.turned ? load_floats(c.turn + 64 * i, floats<4>()) : floats<4>{};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                o.turn[4 * i + n] = v.v[n];
            }
        }
#pragma unroll
        for (int s = 0; s < OWN_SPLITS; s++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const bool load = c.there && s < p.a.qkv_splits;
                const floats<4> v = load ? load_floats(c.from + s * split_size + 64 * i, floats<4>())
                                         : floats<4>{};
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    o.x[s][4 * i + n] = v.v[n];
                }
            }
        }
    }
    return o;
}

/* Sums over splits, in order; those beyond OWN_SPLITS are loaded here. Column i is at offset i % 4 + i / 4 * step, or i * step. */
template <int columns, int neighbours>
static __device__ __forceinline__ void sum_parts(const attention_params &p, const own_columns &c, int32_t step,
                                                 const own_parts &o, float (&x)[columns])
{
    const int64_t split_size = (int64_t)p.a.num_tokens * p.a.qkv_stride;
#pragma unroll
    for (int i = 0; i < columns; i++) {
        x[i] = o.x[0][i];
    }
#pragma unroll
    for (int s = 1; s < OWN_SPLITS; s++) {
        if (s < p.a.qkv_splits) {
#pragma unroll
            for (int i = 0; i < columns; i++) {
                x[i] += o.x[s][i];
            }
        }
    }
#pragma unroll 1
    for (int32_t s = OWN_SPLITS; s < p.a.qkv_splits; s++) {
        if (c.there) {
#pragma unroll
            for (int i = 0; i < columns; i++) {
                x[i] += load_floats(c.from + s * split_size + i % neighbours + i / neighbours * step, floats<1>()).v[0];
            }
        }
    }
}

/* Columns 32 i + lane of the query of head first_head + warp, of what send_for_own() has sent for; zero where there is no such
 * head. */
static __device__ __forceinline__ void turn_query(const attention_params &p, const own_columns &c, const own_parts &o,
                                                  float (&x)[4])
{
    sum_parts<4, 1>(p, c, 32, o, x);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        floats<1> low = {{x[i]}}, high = {{x[i + 2]}};
        rotate<1>(floats<1>{{o.turn[i]}}, floats<1>{{o.turn[i + 2]}}, low, high);
        const uint32_t both = qf_pack_bf16(low.v[0], high.v[0]);
        x[i] = __uint_as_float(both << 16);
        x[i + 2] = __uint_as_float(both & 0xffff0000u);
    }
}

/* The row's own key and value, as they stand in the cache. */
struct own_row {
    uint4 codes[2][WIDE_ROW / 16];
    uint16_t words[2][4];
    int32_t position; /* -1: the cache has it, or the item does not */
};

static __device__ __forceinline__ own_row &own_row_place()
{
    __shared__ own_row place;
    return place;
}

/* Before the wait for the kernel before: the slot of the row's key and value. Below 0: they are not to be written; sequences
 * share a block that has them, or this warp does not write them. */
static __device__ __forceinline__ int32_t own_slot(const attention_params &p, const qf_cuda_attention_item &item,
                                                   int32_t first_head)
{
    return has_own_row(item, first_head) ? __ldcg(p.a.slot_mapping + item.first_row) : -1;
}

/* By the CTA's last warp, after that wait: makes the row of a kv head, and writes it. Lanes 0 .. 15 have the key. */
static __device__ __forceinline__ void make_own_row(const attention_params &p, const qf_cuda_attention_item &item,
                                                    int32_t kv_head, int32_t slot, const own_columns &c,
                                                    const own_parts &o)
{
    own_row &place = own_row_place();
    const int32_t lane = threadIdx.x % 32, side = lane / 16, i = lane % 16;
    if (lane == 0) {
        place.position = slot < 0 ? -1 : item.first_position;
    }
    if (slot < 0) {
        return;
    }
    float x[8];
    sum_parts<8, 4>(p, c, 64, o, x);
    floats<4> low = {{x[0], x[1], x[2], x[3]}}, high = {{x[4], x[5], x[6], x[7]}};
    if (side == 0) {
        rotate<4>(floats<4>{{o.turn[0], o.turn[1], o.turn[2], o.turn[3]}},
                  floats<4>{{o.turn[4], o.turn[5], o.turn[6], o.turn[7]}}, low, high);
    }
    const int32_t row = slot & ((1 << p.block_shift) - 1);
    store_low_bit<QF_CUDA_KV_INT4>(kv_row{reinterpret_cast<uint8_t *>(place.codes[side]), place.words[side], row}, 128,
                                   side == 0, 4 * i, low, high, true);
    __syncwarp();
    const kv_row to = find_low_bit<QF_CUDA_KV_INT4>(p.a.kv, side == 0, slot, kv_head);
    if (i < WIDE_ROW / 16) {
        reinterpret_cast<uint4 *>(to.codes)[i] = place.codes[side][i];
    } else if (i < WIDE_ROW / 16 + 4) {
        to.words[i - WIDE_ROW / 16] = place.words[side][i - WIDE_ROW / 16];
    }
}

/* The row's own key (side 0) or value to its place in the stages of a unit, if it is there. wide_clear() comes after. */
static __device__ __forceinline__ void put_own_row(int side, int32_t position, uint8_t *const (&stages)[2])
{
    const own_row &place = own_row_place();
    const int32_t at = place.position - position, lane = threadIdx.x % 32;
    if (place.position < 0 || at < 0 || at >= 64) {
        return;
    }
    uint8_t *const stage = at < 32 ? stages[0] : stages[1];
    if (lane < WIDE_ROW / 16) {
        reinterpret_cast<uint4 *>(stage + at % 32 * WIDE_ROW)[lane] = place.codes[side][lane];
    } else if (lane < WIDE_ROW / 16 + 4) {
        const int32_t i = lane - WIDE_ROW / 16;
        reinterpret_cast<uint16_t *>(stage + WIDE_CODES)[at % 32 * 4 + i] = place.words[side][i];
    }
    __syncwarp();
}

#endif
