/* Decode attention over an int4 cache of head_dim 128 on Hopper: the arithmetic of a unit. What is computed, and in which
 * numbers: attention_decode_lowbit_tile.cuh. What differs: words of keys are decoded by each lane that wants them, out of
 * registers, which spares shared memory its reads; and the bias terms of a unit are used in the pass that makes them. */
#ifndef QF_ATTENTION_DECODE_WIDE_TILE_CUH
#define QF_ATTENTION_DECODE_WIDE_TILE_CUH

#include "attention_decode_wide_stage.cuh"

/* Values' words of a unit to operands, for all lanes: lane l has those of positions 2 l and 2 l + 1. Steps: (32 pairs of
 * positions, groups) pairs in fp16; behind them step times zero. */
static __device__ __forceinline__ void wide_decode(wide_state &s, uint8_t *const (&stages)[2], uint8_t *units,
                                                   uint32_t lane)
{
    const uint4 words = *reinterpret_cast<const uint4 *>((lane < 16 ? stages[0] : stages[1]) + WIDE_CODES +
                                                         lane % 16 * 16);
    const uint32_t pair[4] = {__byte_perm(words.x, words.z, 0x5410), __byte_perm(words.x, words.z, 0x7632),
                              __byte_perm(words.y, words.w, 0x5410), __byte_perm(words.y, words.w, 0x7632)};
    hold_steps(s, __vmaxu2(__vmaxu2(pair[0], pair[1]), __vmaxu2(pair[2], pair[3])));
    uint32_t step[4], zero[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        step[i] = value_steps<QF_CUDA_KV_INT4>(pair[i], s.exponent);
        zero[i] = mul_f16(step[i], zeros_f16(pair[i]));
    }
    *reinterpret_cast<uint4 *>(units + lane * 16) = make_uint4(step[0], step[1], step[2], step[3]);
    *reinterpret_cast<uint4 *>(units + WIDE_UNITS + lane * 16) = make_uint4(zero[0], zero[1], zero[2], zero[3]);
}

/* The bias terms of a unit, less the maximum, as S^T of four tiles. */
static __device__ __forceinline__ void wide_bias(const lowbit_queries<128> &queries, const uint8_t *coarse,
                                                 const uint4 *fine, uint32_t lane, const float (&maximum)[2],
                                                 float (&x)[4][4])
{
    float sums[4] = {}, y[2][2][4] = {}, base[2];
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk++) {
        uint32_t b[4];
        turn_chunk(queries, coarse, lane, chunk, b, sums);
#pragma unroll
        for (int part = 0; part < 2; part++) {
            fine_product<128, true>(y[0][part], fine, 0, chunk, part, b);
            fine_product<128, true>(y[1][part], fine, 1, chunk, part, b);
        }
    }
    base_terms(queries, sums, lane, maximum, base);
    const float2 unscale = bias_factors(queries, lane);
#pragma unroll
    for (int m = 0; m < 2; m++) {
        float before[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float factor = i % 2 == 0 ? unscale.x : unscale.y;
            const float even = __fmaf_rn(y[m][0][i], factor, base[i % 2]);
            before[i] = __fmaf_rn(y[m][1][i], -factor, even);
            x[2 + m][i] = __fmaf_rn(y[m][1][i], factor, even);
        }
        turn_round(before, x[1 - m]);
    }
}

/* x += codes Q^T, scaled: of the two tiles of a stage. */
static __device__ __forceinline__ void wide_scores(const uint8_t *stage, uint32_t lane, const lowbit_queries<128> &queries,
                                                   const uint4 (&q)[4], float (&x)[4][4], int first)
{
    const uint32_t g = lane / 4, t = lane % 4;
    uint32_t k[2][2][4], words[2][2][2];
    float sum[2][4] = {};
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t row = 16 * m + 8 * r;
            load_words<4>(k[m][r], stage + row * WIDE_ROW + lane * 16);
            load_words<2>(words[m][r], stage + WIDE_CODES + (row + g) * 8);
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++) {
        uint32_t zero[2];
#pragma unroll
        for (int r = 0; r < 2; r++) { /* k: group t */
            const uint32_t word = __byte_perm(words[m][r][0], words[m][r][1], 0x1000 + t * 0x2200);
            zero[r] = __float_as_uint(qf_kv_int4_step_high(word) * (qf_kv_int4_zero_high(word) - 128.0f));
        }
#pragma unroll
        for (int part = 0; part < 2; part++) {
            mma_tf32(sum[m], zero[0], zero[1], __float_as_uint(queries.sums[32 * part + 8 * t + g]));
        }
    }
#pragma unroll
    for (int group = 0; group < 4; group++) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            uint32_t k0[4], k8[4];
            float part[4] = {};
            qf_kv_key_fp16<QF_CUDA_KV_INT4>(k[m][0] + group, k0);
            qf_kv_key_fp16<QF_CUDA_KV_INT4>(k[m][1] + group, k8);
            const uint32_t low[4] = {k0[0], k8[0], k0[1], k8[1]}, high[4] = {k0[2], k8[2], k0[3], k8[3]};
            mma_f16(part, low, q[group].x, q[group].y);
            mma_f16(part, high, q[group].z, q[group].w);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t word = words[m][i / 2][group / 2];
                const float step = group % 2 == 0 ? qf_kv_int4_step_low(word) : qf_kv_int4_step_high(word);
                sum[m][i] = __fmaf_rn(part[i], step, sum[m][i]);
            }
        }
    }
    const float2 both = *reinterpret_cast<const float2 *>(queries.factor + 2 * t);
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[first + m][i] = __fmaf_rn(sum[m][i], i % 2 == 0 ? both.x : both.y, x[first + m][i]);
        }
    }
}

/* As soften_lowbit, of four tiles. */
static __device__ __forceinline__ void wide_soften(wide_state &s, bool fresh, float (&x)[4][4], uint32_t (&p)[4][2])
{
    float most[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        most[e] = fmaxf(x[0][e], x[0][e + 2]);
#pragma unroll
        for (int m = 1; m < 4; m++) {
            most[e] = fmaxf(most[e], fmaxf(x[m][e], x[m][e + 2]));
        }
    }
    if (__any_sync(ALL_LANES, fresh || fmaxf(most[0], most[1]) > LOWBIT_LAG)) {
        float scale[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            most[e] = fresh ? most[e] : fmaxf(most[e], 0.0f);
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) {
                most[e] = fmaxf(most[e], __shfl_xor_sync(ALL_LANES, most[e], offset));
            }
            scale[e] = fresh ? 0.0f : power_of_two(-most[e]);
            s.maximum[e] += most[e];
            s.excess[2 + e] *= scale[e];
        }
        scale_outputs(s, scale[0], scale[1]);
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[m][i] -= most[i % 2];
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[m][i] = power_of_two(x[m][i]);
        }
        p[m][0] = qf_movmatrix_trans(pack_f16(x[m][0], x[m][1]));
        p[m][1] = qf_movmatrix_trans(pack_f16(x[m][2], x[m][3]));
    }
}

/* O^T += V^T P^T of a tile; values: this lane's address of rows 0 .. 7 of the tile for ldmatrix; units: of t's first pair. */
static __device__ __forceinline__ void wide_weigh(wide_state &s, const uint8_t *values, const uint8_t *units,
                                                  const uint8_t *zeros, const uint32_t (&p)[2])
{
    uint32_t v[2][4], step[2][4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        qf_ldmatrix_x4_trans(v[h], values + 8 * h * WIDE_ROW);
        load_words<4>(step[h], units + 64 * h);
    }
    mma_f16(s.excess,
            make_uint4(*reinterpret_cast<const uint32_t *>(zeros), ONES_F16,
                       *reinterpret_cast<const uint32_t *>(zeros + 64), ONES_F16),
            p[0], p[1]);
#pragma unroll
    for (int group = 0; group < 4; group++) {
        uint32_t x[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            qf_kv_key_fp16<QF_CUDA_KV_INT4>(v[h] + group, x[h]);
        }
        const uint32_t b0 = mul_f16(p[0], step[0][group]), b1 = mul_f16(p[1], step[1][group]);
        const uint32_t first[4] = {x[0][0], x[0][1], x[1][0], x[1][1]};
        const uint32_t second[4] = {x[0][2], x[0][3], x[1][2], x[1][3]};
        mma_f16(s.o[2 * group], first, b0, b1);
        mma_f16(s.o[2 * group + 1], second, b0, b1);
    }
}

#endif
