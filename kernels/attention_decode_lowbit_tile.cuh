/* Low-bit decode attention: the arithmetic of one stage of a warp. Lane (g, t) as in attention_decode.cuh.
 *
 *   S^T (16 positions x 8 heads) = sum over groups G of step_G (codes_G Q_G^T - (128 + zero_G) sum of Q_G)       (int4)
 *                                = scale (codes Q^T)                                                       (8 bits; nf4 by groups)
 *                                  + base + fine (c', d')^T                                                  (the bias)
 *   O^T (head_dim x 8 heads)    += (codes)^T (step_G P)^T - (zero)^T (step_G P)^T,  step_G P rounded to bf16
 *
 * Codes are exact in bf16. A value's step goes to the weights, group by group, so the sums need no scaling.
 *
 * The bias: with C_j = q_j b_j + q_j' b_j', D_j = q_j' b_j - q_j b_j', j' = j + head_dim / 2, the term of position
 * p0 + i is the sum over j of c'_j cos(i th_j) + d'_j sin(i th_j), where c' = C cos(p0 th) + D sin(p0 th) and d' = D cos(p0 th)
 * - C sin(p0 th). The sum of c' is the base, in float32: the large part. What is left, c' (cos - 1) + d' sin, is
 * small where biases are large (the slow frequencies), and goes through the tensor cores in fp16, c' and d' times a power of two
 * made from the largest |C| + |D| of the head. */
#ifndef QF_ATTENTION_DECODE_LOWBIT_TILE_CUH
#define QF_ATTENTION_DECODE_LOWBIT_TILE_CUH

#include "attention_decode_lowbit_stage.cuh"

static __device__ __forceinline__ void mma_f16(float (&c)[4], const uint4 &a, uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

/* `count` words of 32 bits from shared memory in one load. */
template <int count> static __device__ __forceinline__ void load_words(uint32_t *to, const void *from)
{
    if constexpr (count == 1) {
        to[0] = *static_cast<const uint32_t *>(from);
    } else if constexpr (count == 2) {
        const uint2 v = *static_cast<const uint2 *>(from);
        to[0] = v.x;
        to[1] = v.y;
    } else {
        const uint4 v = *static_cast<const uint4 *>(from);
        to[0] = v.x;
        to[1] = v.y;
        to[2] = v.z;
        to[3] = v.w;
    }
}

/* What the CTA made of its queries; in shared memory. */
template <int head_dim> struct lowbit_queries {
    const uint4 *q;          /* (head_dim / 32, 32 lanes) B operands: head g, columns 32 c + 8 t .. */
    const float *c, *d;      /* (8, head_dim / 2) C and D, times the head's power of two and log2(e) scale; of odd heads 16
                                and 16 change places, against bank conflicts */
    const float *minus_sums; /* (head_dim / 32, 8) of a group's q */
    const float *inverse;    /* (8) one over the power of two */
};

/* The bias terms of a unit's positions that are not computed yet, as S^T: the present stage's tiles come first. */
struct lowbit_bias {
    float x[QF_CUDA_BIAS_TILE / 16][4];
};

template <int head_dim> struct lowbit_state {
    float o[head_dim / 16][4];   /* tiles 2 G, 2 G + 1: rows g, g + 8 are columns 32 G + 4 g .. + 3 of the head */
    float maximum[2], sum[2];    /* heads 2t, 2t + 1: the maximum of the warp, the sum of this lane */
};

/* All of a unit at once, so that what it is made of need not be kept. */
template <int head_dim>
static __device__ __forceinline__ void start_unit(lowbit_bias &bias, const lowbit_queries<head_dim> &queries,
                                                  const uint8_t *coarse, const uint16_t *fine, uint32_t lane)
{
    const uint32_t g = lane / 4, t = lane % 4;
    const float *cosines = reinterpret_cast<const float *>(coarse) + 4 * t, *sines = cosines + head_dim / 2;
    const float *cs = queries.c + g * (head_dim / 2) + 4 * t, *ds = queries.d + g * (head_dim / 2) + 4 * t;
    const uint4 *a = reinterpret_cast<const uint4 *>(fine) + lane;
    float sum = 0.0f;
#pragma unroll
    for (int m = 0; m < QF_CUDA_BIAS_TILE / 16; m++) {
        bias.x[m][0] = bias.x[m][1] = bias.x[m][2] = bias.x[m][3] = 0.0f;
    }
#pragma unroll
    for (int chunk = 0; chunk < head_dim / 32; chunk++) {
        const float4 cosine = *reinterpret_cast<const float4 *>(cosines + 16 * chunk);
        const float4 sine = *reinterpret_cast<const float4 *>(sines + 16 * chunk);
        const uint32_t at = 16 * (chunk ^ g % 2);
        const float4 c = *reinterpret_cast<const float4 *>(cs + at);
        const float4 d = *reinterpret_cast<const float4 *>(ds + at);
        const float co[4] = {cosine.x, cosine.y, cosine.z, cosine.w}, si[4] = {sine.x, sine.y, sine.z, sine.w};
        const float ci[4] = {c.x, c.y, c.z, c.w}, di[4] = {d.x, d.y, d.z, d.w};
        uint32_t b[4]; /* (c', d') of head g in fp16 */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float turned_c = __fmaf_rn(ci[i], co[i], __fmul_rn(di[i], si[i]));
            const float turned_d = __fmaf_rn(di[i], co[i], -__fmul_rn(ci[i], si[i]));
            const __half2 pair = __floats2half2_rn(turned_c, turned_d);
            b[i] = *reinterpret_cast<const uint32_t *>(&pair);
            sum = __fadd_rn(sum, turned_c);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) { /* products that wait for each other stand apart */
#pragma unroll
            for (int m = 0; m < QF_CUDA_BIAS_TILE / 16; m++) {
                mma_f16(bias.x[m], __ldg(a + 32 * (m * (head_dim / 16) + 2 * chunk + h)), b[2 * h], b[2 * h + 1]);
            }
        }
    }
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const float inverse = queries.inverse[2 * t + e];
        const float base = __shfl_sync(ALL_LANES, sum, 8 * t + 4 * e) * inverse;
        const float unscale = inverse * (1.0f / (1 << QF_CUDA_BIAS_SHIFT));
#pragma unroll
        for (int m = 0; m < QF_CUDA_BIAS_TILE / 16; m++) {
            bias.x[m][e] = __fmaf_rn(bias.x[m][e], unscale, base);
            bias.x[m][e + 2] = __fmaf_rn(bias.x[m][e + 2], unscale, base);
        }
    }
}

/* The next stage's come first. */
template <int format, int head_dim> static __device__ __forceinline__ void next_bias(lowbit_bias &bias)
{
    constexpr int tiles = lowbit_sizes<format, head_dim>::tiles;
#pragma unroll
    for (int m = 0; m + tiles < QF_CUDA_BIAS_TILE / 16; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bias.x[m][i] = bias.x[m + tiles][i];
        }
    }
}

/* A lane's key codes of one row: columns 8 t .. of all groups. */
template <int format, int head_dim>
static __device__ __forceinline__ void load_key(uint32_t *words, const uint8_t *keys, uint32_t row, uint32_t t)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    if constexpr (sizes::row == 128) {
        load_words<4>(words, keys + key_piece<128>(row * 8 + t));
        load_words<4>(words + 4, keys + key_piece<128>(row * 8 + 4 + t));
    } else {
        load_words<sizes::row / 16>(words, keys + row * sizes::row + t * (sizes::row / 4));
    }
}

/* Two words of 16 bits a register; the 8-bit formats: one word, in the upper half, which is the scale. */
template <int format, int head_dim>
static __device__ __forceinline__ void load_key_scales(uint32_t *scales, const uint8_t *words, uint32_t row)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    if constexpr (sizes::words == 1) {
        scales[0] = (uint32_t) reinterpret_cast<const uint16_t *>(words)[row] << 16;
    } else {
        load_words<sizes::words / 2>(scales, words + row * 2 * sizes::words);
    }
}

/* The step of one group of a row. */
template <int format>
static __device__ __forceinline__ float group_step(const uint32_t *scales, int group)
{
    const uint32_t word = scales[group / 2];
    if constexpr (format == QF_CUDA_KV_INT4) {
        return group % 2 == 0 ? qf_kv_int4_step_low(word) : qf_kv_int4_step_high(word);
    }
    return group % 2 == 0 ? qf_bf16_low(word) : qf_bf16_high(word);
}

/* codes Q^T, scaled: x[i] += scale_log2 times it. */
template <int format, int head_dim>
static __device__ __forceinline__ void key_scores(const uint8_t *stage, const lowbit_queries<head_dim> &queries,
                                                  float scale_log2, uint32_t lane,
                                                  float (&x)[lowbit_sizes<format, head_dim>::tiles][4])
{
    typedef lowbit_sizes<format, head_dim> sizes;
    constexpr int per_group = sizes::row / 4 / (head_dim / 8); /* words of 32 bits of a row's group: 1, or 2 for 8 bits */
    constexpr int scale_words = (sizes::words + 1) / 2;
    const uint32_t g = lane / 4, t = lane % 4;
    uint32_t k[sizes::tiles][2][sizes::row / 16], scales[sizes::tiles][2][scale_words];
    float sum[sizes::tiles][4] = {}, other[sizes::tiles][4] = {};
#pragma unroll
    for (int m = 0; m < sizes::tiles; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            load_key<format, head_dim>(k[m][r], stage + m * 16 * sizes::row, g + 8 * r, t);
            load_key_scales<format, head_dim>(scales[m][r], stage + 2 * sizes::codes, 16 * m + g + 8 * r);
        }
    }
#pragma unroll
    for (int group = 0; group < head_dim / 32; group++) {
        const uint4 q = queries.q[32 * group + lane];
        float2 minus_sum = make_float2(0.0f, 0.0f);
        if constexpr (format == QF_CUDA_KV_INT4) {
            minus_sum = *reinterpret_cast<const float2 *>(queries.minus_sums + group * LOWBIT_HEADS + 2 * t);
        }
#pragma unroll
        for (int m = 0; m < sizes::tiles; m++) {
            uint32_t k0[4], k8[4];
            qf_kv_key_pairs<format>(k[m][0] + group * per_group, k0);
            qf_kv_key_pairs<format>(k[m][1] + group * per_group, k8);
            const uint32_t low[4] = {k0[0], k8[0], k0[1], k8[1]}, high[4] = {k0[2], k8[2], k0[3], k8[3]};
            if constexpr (sizes::words == 1) {
                float(&to)[4] = group % 2 == 0 ? sum[m] : other[m];
                qf_mma_bf16(to, low, q.x, q.y);
                qf_mma_bf16(to, high, q.z, q.w);
            } else {
                float part[4] = {};
                if constexpr (format == QF_CUDA_KV_INT4) {
                    const uint32_t w0 = scales[m][0][group / 2], w8 = scales[m][1][group / 2];
                    const float z0 = group % 2 == 0 ? qf_kv_int4_zero_low(w0) : qf_kv_int4_zero_high(w0);
                    const float z8 = group % 2 == 0 ? qf_kv_int4_zero_low(w8) : qf_kv_int4_zero_high(w8);
                    part[0] = z0 * minus_sum.x;
                    part[1] = z0 * minus_sum.y;
                    part[2] = z8 * minus_sum.x;
                    part[3] = z8 * minus_sum.y;
                }
                qf_mma_bf16(part, low, q.x, q.y);
                qf_mma_bf16(part, high, q.z, q.w);
                const float step0 = group_step<format>(scales[m][0], group);
                const float step8 = group_step<format>(scales[m][1], group);
                sum[m][0] = __fmaf_rn(part[0], step0, sum[m][0]);
                sum[m][1] = __fmaf_rn(part[1], step0, sum[m][1]);
                sum[m][2] = __fmaf_rn(part[2], step8, sum[m][2]);
                sum[m][3] = __fmaf_rn(part[3], step8, sum[m][3]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < sizes::tiles; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float dot = sum[m][i];
            if constexpr (sizes::words == 1) {
                dot = (dot + other[m][i]) * __uint_as_float(scales[m][i / 2][0]);
            }
            x[m][i] = __fmaf_rn(dot, scale_log2, x[m][i]);
        }
    }
}

/* Scores (-inf: not seen; one of the stage is) to weights, as B operands: p[m] = rows 2t .., 2t + 8 .. of tile m, head g. */
template <int head_dim, int tiles>
static __device__ __forceinline__ void soften_lowbit(lowbit_state<head_dim> &s, float (&x)[tiles][4],
                                                     uint32_t (&p)[tiles][2])
{
    float scale[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float maximum = s.maximum[e], sum = 0.0f;
#pragma unroll
        for (int m = 0; m < tiles; m++) {
            maximum = fmaxf(maximum, fmaxf(x[m][e], x[m][e + 2]));
        }
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
            maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, offset));
        }
        scale[e] = power_of_two(s.maximum[e] - maximum);
        s.maximum[e] = maximum;
#pragma unroll
        for (int m = 0; m < tiles; m++) {
            x[m][e] = power_of_two(x[m][e] - maximum);
            x[m][e + 2] = power_of_two(x[m][e + 2] - maximum);
            sum += x[m][e] + x[m][e + 2];
        }
        s.sum[e] = s.sum[e] * scale[e] + sum;
    }
    if (__any_sync(ALL_LANES, scale[0] != 1.0f || scale[1] != 1.0f)) { /* seldom: maxima settle */
#pragma unroll
        for (int i = 0; i < head_dim / 16; i++) {
            s.o[i][0] *= scale[0];
            s.o[i][1] *= scale[1];
            s.o[i][2] *= scale[0];
            s.o[i][3] *= scale[1];
        }
    }
#pragma unroll
    for (int m = 0; m < tiles; m++) {
        p[m][0] = qf_movmatrix_trans(qf_pack_bf16(x[m][0], x[m][1]));
        p[m][1] = qf_movmatrix_trans(qf_pack_bf16(x[m][2], x[m][3]));
    }
}

/* A lane's codes of a row of values: columns of g. */
template <int format, int head_dim>
static __device__ __forceinline__ void load_value(uint32_t *words, const uint8_t *values, uint32_t row, uint32_t g)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    constexpr int bytes = sizes::row / 8;
    const uint32_t piece = row * (sizes::row / 16) + g * bytes / 16;
    load_words<bytes / 4>(words, values + value_piece<sizes::row>(piece) + g * bytes % 16);
}

/* Words of rows 2t and 2t + 1 of a half tile, as pairs by group; the 8-bit formats have one pair. */
template <int format, int head_dim>
static __device__ __forceinline__ void load_value_scales(uint32_t *pairs, const uint8_t *words, uint32_t row)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    if constexpr (sizes::words == 1) {
        load_words<1>(pairs, words + row * 2);
    } else {
        uint32_t both[sizes::words]; /* (2 rows, words / 2) */
        load_words<sizes::words>(both, words + row * 2 * sizes::words);
#pragma unroll
        for (int i = 0; i < sizes::words / 2; i++) {
            pairs[2 * i] = __byte_perm(both[i], both[sizes::words / 2 + i], 0x5410);
            pairs[2 * i + 1] = __byte_perm(both[i], both[sizes::words / 2 + i], 0x7632);
        }
    }
}

/* O^T += V^T P^T of tile m of the stage. */
template <int format, int head_dim>
static __device__ __forceinline__ void weigh_tile(lowbit_state<head_dim> &s, const uint8_t *stage, int m,
                                                  uint32_t lane, const uint32_t (&p)[2])
{
    typedef lowbit_sizes<format, head_dim> sizes;
    const uint32_t g = lane / 4, t = lane % 4;
    const uint8_t *values = stage + sizes::codes + m * 16 * sizes::row;
    const uint8_t *words = stage + 2 * sizes::codes + sizes::scales;
    uint32_t v[2][2][sizes::row / 32], scales[2][sizes::words]; /* [rows + 8][row of the pair] */
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            load_value<format, head_dim>(v[h][e], values, 2 * t + e + 8 * h, g);
        }
        load_value_scales<format, head_dim>(scales[h], words, 16 * m + 2 * t + 8 * h);
    }
    uint32_t b[head_dim / 32][2];
#pragma unroll
    for (int group = 0; group < head_dim / 32; group++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t pair = scales[h][sizes::words == 1 ? 0 : group];
            b[group][h] = qf_mul_bf16(p[h], format == QF_CUDA_KV_INT4 ? qf_kv_int4_steps(pair) : pair);
        }
        if constexpr (format == QF_CUDA_KV_INT4) { /* rows of -(128 + zero): less work than subtracting it from codes */
            const uint32_t z0 = qf_kv_int4_minus_zeros(scales[0][group]);
            const uint32_t z8 = qf_kv_int4_minus_zeros(scales[1][group]);
            const uint32_t zeros[4] = {z0, z0, z8, z8};
            qf_mma_bf16(s.o[2 * group], zeros, b[group][0], b[group][1]);
            qf_mma_bf16(s.o[2 * group + 1], zeros, b[group][0], b[group][1]);
        }
    }
#pragma unroll
    for (int group = 0; group < head_dim / 32; group++) {
        uint32_t x[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int at = sizes::words == 1 ? group : group / 2;
            qf_kv_value_pairs<format>(v[h][0][at], v[h][1][at], group % 2, x[h]);
        }
        const uint32_t first[4] = {x[0][0], x[0][1], x[1][0], x[1][1]};
        const uint32_t second[4] = {x[0][2], x[0][3], x[1][2], x[1][3]};
        qf_mma_bf16(s.o[2 * group], first, b[group][0], b[group][1]);
        qf_mma_bf16(s.o[2 * group + 1], second, b[group][0], b[group][1]);
    }
}

/* One stage, which has a position that is seen. */
template <int format, int head_dim>
static __device__ __forceinline__ void compute_stage(const attention_params &p, const lowbit_walk &w, int32_t position,
                                                     uint8_t *stage, const lowbit_queries<head_dim> &queries,
                                                     const lowbit_bias &bias, lowbit_state<head_dim> &s)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    const uint32_t lane = w.lane, g = lane / 4;
    float x[sizes::tiles][4];
    uint32_t weights[sizes::tiles][2];
    const bool edge = position < w.begin || position + sizes::positions > w.end_position;
    if (edge) {
        clear_unseen<format, head_dim>(w, position, stage);
    }
#pragma unroll
    for (int m = 0; m < sizes::tiles; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[m][i] = bias.x[m][i];
        }
    }
    key_scores<format, head_dim>(stage, queries, p.scale_log2, lane, x);
    if (edge) {
#pragma unroll
        for (int m = 0; m < sizes::tiles; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int32_t at = position + 16 * m + g + 8 * (i / 2);
                x[m][i] = at >= w.begin && at < w.end_position ? x[m][i] : -INFINITY;
            }
        }
    }
    soften_lowbit<head_dim, sizes::tiles>(s, x, weights);
#pragma unroll
    for (int m = 0; m < sizes::tiles; m++) {
        weigh_tile<format, head_dim>(s, stage, m, lane, weights[m]);
    }
}

#endif
