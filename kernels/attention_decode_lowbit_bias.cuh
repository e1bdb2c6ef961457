/* Low-bit decode attention: the term of k_proj's bias, which is not in the cache.
 *
 * The bias: with C_j = q_j b_j + q_j' b_j', D_j = q_j' b_j - q_j b_j', j' = j + head_dim / 2, the term of position
 * p0 + i is the sum over j of c'_j cos(i th_j) + d'_j sin(i th_j), where c' = C cos(p0 th) + D sin(p0 th) and d' = D cos(p0 th)
 * - C sin(p0 th). p0 is the middle of a unit (C and D are turned by half a unit at first, then by the unit's start). The sum
 * of c' is the base, in float32: the large part. What is left, c' (cos - 1) + d' sin, is small where biases are large (the
 * slow frequencies), and goes through the tensor cores in fp16, c' and d' times a power of two made from the largest
 * |C| + |D| of the head. As cosines are even and sines odd, positions before the middle have the same two sums as those
 * behind, and differ in a sign: half of the products, and half of what is read from shared memory for them. */
#ifndef QF_ATTENTION_DECODE_LOWBIT_BIAS_CUH
#define QF_ATTENTION_DECODE_LOWBIT_BIAS_CUH

#include "attention_decode_lowbit_scales.cuh"

static __device__ __forceinline__ void mma_f16(float (&c)[4], const uint4 &a, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    mma_f16(c, make_uint4(a[0], a[1], a[2], a[3]), b0, b1);
}

static __device__ __forceinline__ uint32_t pack_f16(float low, float high)
{
    const __half2 r = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&r);
}

/* What the CTA made of its queries; in shared memory. */
template <int head_dim> struct lowbit_queries {
    const uint4 *q;          /* (head_dim / 32, 32 lanes) B operands in fp16: head g, columns 32 c + 8 t .., times the head's
                                power of two; int4: columns whose codes come 16 times too large, a 16th of it */
    const float *sums;       /* of such q, negative: int4: (2 parts, head_dim / 32, 8) in tf32, of a group, times 2^-24;
                                int8: (8) times 128 2^-24 */
    const float *factor;     /* (8) log2(e) scale over the power of two, times 2^24 for integers */
    const float *c, *d;      /* (8, head_dim / 2) C and D, times another power of two and log2(e) scale; of odd heads 16
                                and 16 change places, against bank conflicts */
    const float *inverse;    /* (8) one over that power of two */
};

/* A unit's bias terms, less the maximum. Of stages of one tile, what they are made of: (c', d') of head g as B operands in
 * fp16, and the sums of c' of heads 2t and 2t + 1; of stages of two, all of them, of the first stage and of the second. */
template <int head_dim, int tiles> struct lowbit_bias {
    uint32_t b[head_dim / 32][4];
    float base[2];
};
template <int head_dim> struct lowbit_bias<head_dim, 2> {
    float terms[2][4]; /* of a stage */
    float4 *second;    /* of this lane: of a unit's second stage */
};

/* The second stage of a unit begins. */
template <int head_dim> static __device__ __forceinline__ void load_terms(lowbit_bias<head_dim, 2> &bias)
{
#pragma unroll
    for (int m = 0; m < 2; m++) {
        load_words<4>(reinterpret_cast<uint32_t *>(bias.terms[m]), bias.second + 32 * m);
    }
}

template <int head_dim> static __device__ __forceinline__ void load_terms(lowbit_bias<head_dim, 1> &) {}

/* A chunk of 16 pairs of a unit: (c', d') of head g, and the sums of c'. */
template <int head_dim>
static __device__ __forceinline__ void turn_chunk(const lowbit_queries<head_dim> &queries, const uint8_t *coarse,
                                                  uint32_t lane, int chunk, uint32_t (&b)[4], float (&sums)[4])
{
    const uint32_t g = lane / 4, t = lane % 4, at = g * (head_dim / 2) + 4 * t + 16 * (chunk ^ g % 2);
    const float *cosines = reinterpret_cast<const float *>(coarse) + 4 * t + 16 * chunk;
    const float4 cosine = *reinterpret_cast<const float4 *>(cosines);
    const float4 sine = *reinterpret_cast<const float4 *>(cosines + head_dim / 2);
    const float4 c = *reinterpret_cast<const float4 *>(queries.c + at);
    const float4 d = *reinterpret_cast<const float4 *>(queries.d + at);
    const float co[4] = {cosine.x, cosine.y, cosine.z, cosine.w}, si[4] = {sine.x, sine.y, sine.z, sine.w};
    const float ci[4] = {c.x, c.y, c.z, c.w}, di[4] = {d.x, d.y, d.z, d.w};
    float turned_c[4], turned_d[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        turned_c[i] = __fmaf_rn(ci[i], co[i], __fmul_rn(di[i], si[i]));
        turned_d[i] = __fmaf_rn(di[i], co[i], -__fmul_rn(ci[i], si[i]));
        sums[i] = __fadd_rn(sums[i], turned_c[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        b[i] = pack_f16(turned_c[2 * i], turned_c[2 * i + 1]);
        b[2 + i] = pack_f16(turned_d[2 * i], turned_d[2 * i + 1]);
    }
}

/* One product of the fine table: of its tile m, cosines' or sines' part. fine: this lane's piece. */
template <int head_dim, bool fine_shared>
static __device__ __forceinline__ void fine_product(float (&y)[4], const uint4 *fine, uint32_t m, int chunk, int part,
                                                    const uint32_t (&b)[4])
{
    const uint4 *piece = fine + 32 * ((m * (head_dim / 32) + chunk) * 2 + part);
    mma_f16(y, fine_shared ? *piece : __ldg(piece), b[2 * part], b[2 * part + 1]);
}

/* Rows k of a tile of the fine table are positions before the middle, backwards. */
static __device__ __forceinline__ void turn_round(const float (&from)[4], float (&to)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[i] = __shfl_xor_sync(ALL_LANES, from[i ^ 2], 28);
    }
}

/* The sums of c' of heads 2t and 2t + 1, of what the lanes of each head have. */
template <int head_dim>
static __device__ __forceinline__ void base_terms(const lowbit_queries<head_dim> &queries, const float (&sums)[4],
                                                  uint32_t lane, const float (&maximum)[2], float (&base)[2])
{
    float sum = __fadd_rn(__fadd_rn(sums[0], sums[1]), __fadd_rn(sums[2], sums[3]));
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        base[e] = __fmaf_rn(__shfl_sync(ALL_LANES, sum, 8 * (lane % 4) + 4 * e), queries.inverse[2 * (lane % 4) + e],
                            -maximum[e]);
    }
}

/* What products of the fine table with (c', d') are multiplied by. */
template <int head_dim>
static __device__ __forceinline__ float2 bias_factors(const lowbit_queries<head_dim> &queries, uint32_t lane)
{
    const float2 inverse = *reinterpret_cast<const float2 *>(queries.inverse + 2 * (lane % 4));
    return make_float2(inverse.x * (1.0f / (1 << QF_CUDA_BIAS_SHIFT)), inverse.y * (1.0f / (1 << QF_CUDA_BIAS_SHIFT)));
}

/* A unit begins, with stage `stage` of it. fine: this lane's piece. */
template <int head_dim, int tiles, bool fine_shared>
static __device__ __forceinline__ void start_unit(lowbit_bias<head_dim, tiles> &bias,
                                                  const lowbit_queries<head_dim> &queries, const uint8_t *coarse,
                                                  const uint4 *fine, uint32_t lane, uint32_t stage,
                                                  const float (&maximum)[2])
{
    float sums[4] = {};
    if constexpr (tiles == 1) {
#pragma unroll
        for (int chunk = 0; chunk < head_dim / 32; chunk++) {
            turn_chunk(queries, coarse, lane, chunk, bias.b[chunk], sums);
        }
        base_terms(queries, sums, lane, maximum, bias.base);
    } else {
        float y[2][2][4] = {}, base[2];
#pragma unroll
        for (int chunk = 0; chunk < head_dim / 32; chunk++) {
            uint32_t b[4];
            turn_chunk(queries, coarse, lane, chunk, b, sums);
#pragma unroll
            for (int part = 0; part < 2; part++) {
                fine_product<head_dim, fine_shared>(y[0][part], fine, 0, chunk, part, b);
                fine_product<head_dim, fine_shared>(y[1][part], fine, 1, chunk, part, b);
            }
        }
        base_terms(queries, sums, lane, maximum, base);
        const float2 unscale = bias_factors(queries, lane);
#pragma unroll
        for (int m = 0; m < 2; m++) {
            float before[4], behind[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float factor = i % 2 == 0 ? unscale.x : unscale.y;
                const float even = __fmaf_rn(y[m][0][i], factor, base[i % 2]);
                before[i] = __fmaf_rn(y[m][1][i], -factor, even);
                behind[i] = __fmaf_rn(y[m][1][i], factor, even);
            }
            turn_round(before, bias.terms[1 - m]);
            store_floats<4>(bias.second + 32 * m, behind);
        }
        if (stage == 1) {
            load_terms(bias);
        }
    }
}

/* The bias terms of stage n as S^T. */
template <int head_dim, int tiles, bool fine_shared>
static __device__ __forceinline__ void bias_scores(lowbit_bias<head_dim, tiles> &bias,
                                                   const lowbit_queries<head_dim> &queries, const uint4 *fine,
                                                   uint32_t n, uint32_t lane, float (&x)[tiles][4])
{
    if constexpr (tiles == 1) {
        const uint32_t tile = n % (QF_CUDA_BIAS_TILE / 16);
        const bool before = tile < QF_CUDA_BIAS_TILE / 32; /* the middle */
        float y[2][4] = {}, term[4];
#pragma unroll
        for (int chunk = 0; chunk < head_dim / 32; chunk++) {
#pragma unroll
            for (int part = 0; part < 2; part++) {
                fine_product<head_dim, fine_shared>(y[part], fine, before ? 1 - tile : tile - 2, chunk, part,
                                                    bias.b[chunk]);
            }
        }
        const float2 unscale = bias_factors(queries, lane);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            term[i] = __fmaf_rn(before ? y[0][i] - y[1][i] : y[0][i] + y[1][i], i % 2 == 0 ? unscale.x : unscale.y,
                                bias.base[i % 2]);
            x[0][i] = term[i];
        }
        if (before) {
            turn_round(term, x[0]);
        }
    } else {
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[m][i] = bias.terms[m][i];
            }
        }
    }
}

/* The maximum has grown. */
template <int head_dim, int tiles>
static __device__ __forceinline__ void lower_bias(lowbit_bias<head_dim, tiles> &bias, const float (&by)[2])
{
    if constexpr (tiles == 1) {
        bias.base[0] -= by[0];
        bias.base[1] -= by[1];
    } else {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const float4 x = bias.second[32 * m];
            bias.second[32 * m] = make_float4(x.x - by[0], x.y - by[1], x.z - by[0], x.w - by[1]);
        }
    }
}

#endif
