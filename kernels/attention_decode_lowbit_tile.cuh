/* Low-bit decode attention: the arithmetic of one stage of a warp. Lane (g, t) as in attention_decode.cuh.
 *
 *   S^T (16 positions x 8 heads) = sum over groups G of step_G (codes_G Q_G^T) - (step_G zero_G) (sum of Q_G)^T     (int4)
 *                                = scale (codes Q^T)                                        (8 bits; nf4 by groups)
 *                                  + base + fine (c', d')^T                                 (attention_decode_lowbit_bias.cuh)
 *   O^T (head_dim x 8 heads)    += (codes)^T (step_G P)^T,  step_G P rounded to fp16, P before
 *   E^T (groups x 8 heads)      += (step_G zero_G)^T P^T: taken from all rows of the group at the end            (int4)
 *
 * Operands are fp16: an integer needs only a mask to become one, as a subnormal number (common/kv_codec.cuh), which keeps
 * conversion to 5 instructions a register's four pairs in int4 and 1 or 1.5 a pair in 8 bits. q is a bf16 number times a
 * power of two of the head, exact; weights have 11 bits, a value's step included, relative to powers of two that follow the
 * warp's maximum and its largest step. int8 is stored as code + 128: keys' sums start at -128 sum of Q, values' excess is
 * the product with a row of 128s, which uses the same rounded weights and so cancels to float32's rounding.
 * step_G zero_G has 9 bits and is exact in tf32 and fp16; the sum of Q is two tf32 numbers. Another row of the products
 * that make E has ones, and sums the weights. */
#ifndef QF_ATTENTION_DECODE_LOWBIT_TILE_CUH
#define QF_ATTENTION_DECODE_LOWBIT_TILE_CUH

#include "attention_decode_lowbit_bias.cuh"

#define LOWBIT_LAG 6.0f /* powers of two: weights are below 2^6 */
#define ONES_F16 0x3c003c00u

/* k = 4, in tf32. */
static __device__ __forceinline__ void mma_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b)
{
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}

/* A lane's key codes of one row: columns 8 t .. of all groups. */
template <int format, int head_dim>
static __device__ __forceinline__ void load_key(uint32_t (&words)[lowbit_sizes<format, head_dim>::row / 16],
                                                const uint8_t *keys, uint32_t at)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    if constexpr (sizes::row == 128) {
        load_words<4>(words, keys + at);
        load_words<4>(words + 4, keys + (at ^ 64));
    } else {
        load_words<sizes::row / 16>(words, keys + at);
    }
}

/* x += codes Q^T, scaled. */
template <int format, int head_dim>
static __device__ __forceinline__ void key_scores(const uint8_t *stage, const uint8_t *decoded, const lowbit_walk &w,
                                                  const lowbit_queries<head_dim> &queries,
                                                  float (&x)[lowbit_sizes<format, head_dim>::tiles][4])
{
    typedef lowbit_sizes<format, head_dim> sizes;
    constexpr int per_group = sizes::row / 4 / (head_dim / 8); /* words of 32 bits of a row's group: 1, or 2 for 8 bits */
    const uint32_t g = w.lane / 4, t = w.lane % 4;
    uint32_t k[sizes::tiles][2][sizes::row / 16];
    float step[sizes::tiles][2][sizes::words], sum[sizes::tiles][4] = {}, other[sizes::tiles][4] = {};
#pragma unroll
    for (int m = 0; m < sizes::tiles; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t row = 16 * m + 8 * r;
            load_key<format, head_dim>(k[m][r], stage + row * sizes::row, w.key_at);
            if constexpr (sizes::grouped) {
                load_words<sizes::words>(reinterpret_cast<uint32_t *>(step[m][r]),
                                         decoded + (row + g) * (4 * sizes::words));
            } else {
                const uint32_t word = reinterpret_cast<const uint16_t *>(stage + 2 * sizes::codes)[row + g];
                step[m][r][0] = __uint_as_float(word << 16);
            }
        }
        if constexpr (format == QF_CUDA_KV_INT8) { /* the 128 that codes are too large */
            const float2 offset = *reinterpret_cast<const float2 *>(queries.sums + 2 * t);
            sum[m][0] = sum[m][2] = offset.x;
            sum[m][1] = sum[m][3] = offset.y;
        }
        if constexpr (sizes::zeros) { /* k: groups, and the second part of the sums */
            const uint32_t *zeros = reinterpret_cast<const uint32_t *>(decoded + sizes::key_steps) +
                                    (16 * m + g) * sizes::words + t % sizes::words;
#pragma unroll
            for (int part = 0; part < sizes::words / 2; part++) {
                mma_tf32(sum[m], zeros[0], zeros[8 * sizes::words],
                         __float_as_uint(queries.sums[32 * part + 8 * t + g]));
            }
        }
    }
#pragma unroll
    for (int group = 0; group < head_dim / 32; group++) {
        const uint4 q = queries.q[32 * group + w.lane];
#pragma unroll
        for (int m = 0; m < sizes::tiles; m++) {
            uint32_t k0[4], k8[4];
            qf_kv_key_fp16<format>(k[m][0] + group * per_group, k0);
            qf_kv_key_fp16<format>(k[m][1] + group * per_group, k8);
            const uint32_t low[4] = {k0[0], k8[0], k0[1], k8[1]}, high[4] = {k0[2], k8[2], k0[3], k8[3]};
            if constexpr (sizes::grouped) {
                float part[4] = {};
                mma_f16(part, low, q.x, q.y);
                mma_f16(part, high, q.z, q.w);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sum[m][i] = __fmaf_rn(part[i], step[m][i / 2][group], sum[m][i]);
                }
            } else {
                float(&to)[4] = group % 2 == 0 ? sum[m] : other[m];
                mma_f16(to, low, q.x, q.y);
                mma_f16(to, high, q.z, q.w);
            }
        }
    }
    const float2 both = *reinterpret_cast<const float2 *>(queries.factor + 2 * t);
    const float factor[2] = {both.x, both.y};
#pragma unroll
    for (int m = 0; m < sizes::tiles; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (sizes::grouped) {
                x[m][i] = __fmaf_rn(sum[m][i], factor[i % 2], x[m][i]);
            } else {
                x[m][i] = __fmaf_rn(sum[m][i] + other[m][i], factor[i % 2] * step[m][i / 2][0], x[m][i]);
            }
        }
    }
}

/* Scores (less the maximum; -inf: not seen; one of the stage is) to weights, as B operands: p[m] = rows 2t .., 2t + 8 .. of
 * tile m, head g. What stands for the maximum may be less by LOWBIT_LAG: so it seldom changes, and lanes seldom have to tell
 * each other. fresh: there is none yet. */
template <int format, int head_dim>
static __device__ __forceinline__ void
soften_lowbit(lowbit_state<format, head_dim> &s, lowbit_bias<head_dim, lowbit_sizes<format, head_dim>::tiles> &bias,
              bool fresh, float (&x)[lowbit_sizes<format, head_dim>::tiles][4],
              uint32_t (&p)[lowbit_sizes<format, head_dim>::tiles][2])
{
    constexpr int tiles = lowbit_sizes<format, head_dim>::tiles;
    float most[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        most[e] = fmaxf(x[0][e], x[0][e + 2]);
        if (tiles == 2) {
            most[e] = fmaxf(most[e], fmaxf(x[tiles - 1][e], x[tiles - 1][e + 2]));
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
            (format == QF_CUDA_KV_INT4 ? s.excess[2 + e] : s.sum[e]) *= scale[e];
        }
        scale_outputs(s, scale[0], scale[1]);
        lower_bias(bias, most);
#pragma unroll
        for (int m = 0; m < tiles; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[m][i] -= most[i % 2];
            }
        }
    }
#pragma unroll
    for (int m = 0; m < tiles; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[m][i] = power_of_two(x[m][i]);
            if constexpr (format != QF_CUDA_KV_INT4) {
                s.sum[i % 2] += x[m][i];
            }
        }
        p[m][0] = qf_movmatrix_trans(pack_f16(x[m][0], x[m][1]));
        p[m][1] = qf_movmatrix_trans(pack_f16(x[m][2], x[m][3]));
    }
}

/* O^T += V^T P^T of tile m of the stage; steps: of the 8-bit formats. */
template <int format, int head_dim>
static __device__ __forceinline__ void weigh_tile(lowbit_state<format, head_dim> &s, const uint8_t *stage,
                                                  const uint8_t *decoded, int m, const lowbit_walk &w,
                                                  const uint32_t (&p)[2], const uint32_t (&steps)[2])
{
    typedef lowbit_sizes<format, head_dim> sizes;
    const uint8_t *values = stage + sizes::codes + m * 16 * sizes::row;
    const uint32_t unit = m * sizes::words * 4 + w.lane % 4;
    const uint8_t *units = decoded + sizes::key_steps + sizes::key_zeros;
    /* [rows + 8][row of the pair], or in 4 bits a word of each group, of both rows */
    uint32_t v[2][2][sizes::row / 32], halves[2][head_dim / 32], b[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if constexpr (sizes::grouped && sizes::row == 64) {
            qf_ldmatrix_x4_trans(halves[h], values + 8 * h * sizes::row + w.value_at);
        } else if constexpr (sizes::grouped) {
            if (h == 0) {
                uint32_t all[4];
                qf_ldmatrix_x4_trans(all, values + w.value_at);
                halves[0][0] = all[0], halves[0][1] = all[1], halves[1][0] = all[2], halves[1][1] = all[3];
            }
        }
        if constexpr (!sizes::grouped) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const uint32_t at = sizes::row == 128 ? w.value_at + 128 * e : w.value_at ^ (uint32_t)(sizes::row * e);
                load_words<sizes::row / 32>(v[h][e], values + 8 * h * sizes::row + at);
            }
        }
        b[h] = sizes::grouped ? 0 : mul_f16(p[h], steps[h]);
    }
    if constexpr (format == QF_CUDA_KV_INT8) { /* 128 of each */
        mma_f16(s.excess, make_uint4(0x00800080u, 0x00800080u, 0x00800080u, 0x00800080u), b[0], b[1]);
    }
    if constexpr (sizes::zeros) { /* this lane's: of a group of tile g / words */
        const uint2 z = *reinterpret_cast<const uint2 *>(
            units + w.lane % (sizes::tiles * sizes::words * 4) * sizes::value_unit + 8);
        const bool own = w.lane / (sizes::words * 4) % 2 == m;
        mma_f16(s.excess, make_uint4(own ? z.x : 0, ONES_F16, own ? z.y : 0, ONES_F16), p[0], p[1]);
    }
#pragma unroll
    for (int group = 0; group < head_dim / 32; group++) {
        if constexpr (sizes::grouped) {
            const uint2 both = *reinterpret_cast<const uint2 *>(units + (unit + 4 * group) * sizes::value_unit);
            b[0] = mul_f16(p[0], both.x);
            b[1] = mul_f16(p[1], both.y);
        }
        uint32_t x[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if constexpr (sizes::grouped) {
                qf_kv_value_halves_fp16<format>(halves[h][group], x[h]);
            } else {
                qf_kv_value_fp16<format>(v[h][0][group], v[h][1][group], x[h]);
            }
        }
        const uint32_t first[4] = {x[0][0], x[0][1], x[1][0], x[1][1]};
        const uint32_t second[4] = {x[0][2], x[0][3], x[1][2], x[1][3]};
        mma_f16(s.o[2 * group], first, b[0], b[1]);
        mma_f16(s.o[2 * group + 1], second, b[0], b[1]);
    }
}

/* Stage n, which has a position that is seen. */
template <int format, int head_dim, bool biased>
static __device__ __forceinline__ void
compute_stage(const lowbit_walk &w, uint32_t n, bool fresh, uint8_t *stage, uint8_t *decoded,
              const lowbit_queries<head_dim> &queries, lowbit_bias<head_dim, lowbit_sizes<format, head_dim>::tiles> &bias,
              const uint4 *fine, lowbit_state<format, head_dim> &s)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    const int32_t position = (int32_t)(n * sizes::positions);
    float x[sizes::tiles][4];
    uint32_t weights[sizes::tiles][2], steps[sizes::tiles][2] = {};
    const bool edge = position < w.begin || position + sizes::positions > w.end_position;
    if (edge) {
        clear_unseen<format, head_dim>(w, position, stage);
    }
    if constexpr (sizes::grouped) {
        decode_scales(s, stage, decoded, w.lane);
    } else {
        load_value_steps(s, stage, w.lane, steps);
    }
    if constexpr (biased) {
        bias_scores<head_dim, sizes::tiles, (sizes::fine > 0)>(bias, queries, fine, n, w.lane, x);
    } else {
#pragma unroll
        for (int m = 0; m < sizes::tiles; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[m][i] = -s.maximum[i % 2];
            }
        }
    }
    key_scores<format, head_dim>(stage, decoded, w, queries, x);
    if (edge) {
#pragma unroll
        for (int m = 0; m < sizes::tiles; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int32_t at = position + 16 * m + (int32_t)w.lane / 4 + 8 * (i / 2);
                x[m][i] = at >= w.begin && at < w.end_position ? x[m][i] : -INFINITY;
            }
        }
    }
    soften_lowbit<format, head_dim>(s, bias, fresh, x, weights);
#pragma unroll
    for (int m = 0; m < sizes::tiles; m++) {
        weigh_tile(s, stage, decoded, m, w, weights[m], steps[m]);
    }
}

#endif
