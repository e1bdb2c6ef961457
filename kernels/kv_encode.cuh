/* Low-bit keys and values: one row, held by head_dim / 8 neighbouring lanes, to codes and scale words. Bit for bit
 * csrc/kv/format.c. Lane j of a row holds columns 4 j .. 4 j + 3 and head_dim / 2 further on: eight lanes hold the whole of
 * two groups of 32. All lanes of the warp call these. */
#ifndef QF_KV_ENCODE_CUH
#define QF_KV_ENCODE_CUH

#include "common/kv_codec.cuh"

#define NF4_ZERO_CODE 7u

/* What four columns became: codes one a byte, in order. */
struct kv_codes {
    uint32_t low, high; /* of the two halves' columns */
    uint32_t low_word, high_word; /* scale words of their groups; 8 bits: one word, twice */
};

/* Reduced over the `lanes` lanes (a power of two) that hold a row or group; magnitudes order like their bits. */
static __device__ __forceinline__ uint32_t reduce_max(uint32_t x, int lanes)
{
    for (int offset = 1; offset < lanes; offset *= 2) {
        x = max(x, __shfl_xor_sync(0xffffffffu, x, offset));
    }
    return x;
}

static __device__ __forceinline__ uint32_t magnitude_max(const float (&x)[4])
{
    uint32_t r = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r = max(r, __float_as_uint(x[i]) & 0x7fffffffu);
    }
    return r;
}

/* Groups whose largest magnitude is in 2^-40 .. 2^40, or zero, are usual: there is no overflow on the way to a quotient, and
 * one that is not exact is too small to be seen. */
static __device__ __forceinline__ bool is_usual(uint32_t max_bits)
{
    return max_bits - 0x2b800000u <= 0x53800000u - 0x2b800000u || max_bits == 0;
}

/* What x is divided by. */
struct divisor {
    float y, inverse;
};

/* The inverse is rounded correctly, for a y of 8 bits. */
static __device__ __forceinline__ divisor divisor_of(float y)
{
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(y));
    return divisor{y, __fmaf_rn(r, __fmaf_rn(-y, r, 1.0f), r)};
}

/* x / y, rounded correctly. usual: by a divisor of 8 bits (all are, here) and without the branch that __fdiv_rn() has, so
 * that several are made at a time; zero may lose its sign. */
template <bool usual> static __device__ __forceinline__ float quotient(float x, divisor d)
{
    if constexpr (usual) {
        const float q = __fmul_rn(x, d.inverse);
        return __fmaf_rn(d.inverse, __fmaf_rn(-d.y, q, x), q);
    } else {
        return __fdiv_rn(x, d.y);
    }
}

/* The least bf16 not below max / limit; a NaN where there is none. */
template <bool usual> static __device__ __forceinline__ uint32_t scale_word(uint32_t max_bits, float limit)
{
    if (!usual && max_bits >= 0x7f800000u) {
        return QF_KV_BF16_NAN_WORD;
    }
    const float exact = quotient<usual>(__uint_as_float(max_bits), divisor{limit, 1.0f / limit});
    const uint32_t word = (__float_as_uint(exact) + 0xffffu) >> 16;
    return !usual && word >= 0x7f80u ? QF_KV_BF16_NAN_WORD : word;
}

/* y, with the sign of x. */
static __device__ __forceinline__ uint32_t encode_e4m3(float y, float x)
{
    const uint32_t magnitude = __float_as_uint(y) & 0x7fffffffu;
    uint32_t code;
    if (magnitude < 0x3c800000u) { /* below 2^-6: multiples of 2^-9 */
        code = (uint32_t)rintf(__uint_as_float(magnitude) * 512.0f);
    } else {
        code = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    }
    return ((__float_as_uint(x) >> 24) & 0x80u) | min(code, 0x7eu);
}

/* The number of middles of neighbouring levels that y is above. */
static __device__ __forceinline__ uint32_t encode_nf4(float y)
{
    const float levels[16] = {-1.0f,          -0.6953125f,    -0.5234375f,   -0.39453125f, -0.28515625f, -0.1845703125f,
                              -0.0908203125f, 0.0f,           0.07958984375f, 0.1611328125f, 0.24609375f,  0.337890625f,
                              0.44140625f,    0.5625f,        0.72265625f,   1.0f};
    uint32_t code = 0;
#pragma unroll
    for (int i = 0; i < 15; i++) {
        code += y > 0.5f * (levels[i] + levels[i + 1]) ? 1u : 0u;
    }
    return code;
}

/* Four columns with a scale word: fp8, int8, nf4. */
template <int format, bool usual>
static __device__ __forceinline__ uint32_t encode_scaled(const float (&x)[4], uint32_t word)
{
    const uint32_t empty = format == QF_CUDA_KV_NF4 && word == 0 ? NF4_ZERO_CODE * 0x01010101u : 0;
    if (!usual && (word == 0 || word == QF_KV_BF16_NAN_WORD)) {
        return empty;
    }
    const divisor scale = divisor_of(__uint_as_float(word << 16));
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float y = quotient<usual>(x[i], scale);
        uint32_t code;
        if constexpr (format == QF_CUDA_KV_FP8) {
            code = encode_e4m3(y, x[i]);
        } else if constexpr (format == QF_CUDA_KV_NF4) {
            code = encode_nf4(y);
        } else {
            code = (uint32_t)(int32_t)rintf(fminf(fmaxf(y, -127.0f), 127.0f)) & 0xffu;
        }
        codes |= code << (8 * i);
    }
    return word == 0 ? empty : codes;
}

/* Of a group of eight lanes: the least and the greatest, zero among them, and the largest magnitude. */
struct group_range {
    float low, high;
    uint32_t max_bits;
};

static __device__ __forceinline__ group_range range_of(const float (&x)[4])
{
    group_range r = {0.0f, 0.0f, magnitude_max(x)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r.low = fminf(r.low, x[i]);
        r.high = fmaxf(r.high, x[i]);
    }
    return r;
}

static __device__ __forceinline__ void widen(group_range &r, int offset)
{
    r.low = fminf(r.low, __shfl_xor_sync(0xffffffffu, r.low, offset));
    r.high = fmaxf(r.high, __shfl_xor_sync(0xffffffffu, r.high, offset));
    r.max_bits = max(r.max_bits, __shfl_xor_sync(0xffffffffu, r.max_bits, offset));
}

/* Four columns of such a group. */
template <bool usual>
static __device__ __forceinline__ uint32_t encode_int4(const float (&x)[4], const group_range &r, uint32_t &word)
{
    const float exact = quotient<usual>(__fsub_rn(r.high, r.low), divisor{15.0f, 1.0f / 15.0f});
    if (!usual && (r.max_bits >= 0x7f800000u || (__float_as_uint(exact) & 0x7f800000u) == 0x7f800000u)) {
        word = QF_KV_INT4_NAN_WORD;
        return 0;
    }
    const uint32_t bits = (__float_as_uint(exact) + 0x7ffffu) & 0xfff80000u;
    word = 0;
    if (!usual && bits < 0x00800000u) {
        return 0;
    }
    const divisor step = divisor_of(__uint_as_float(bits));
    const float zero = fminf(fmaxf(rintf(quotient<usual>(-r.low, step)), 0.0f), 15.0f);
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float code = __fadd_rn(rintf(quotient<usual>(x[i], step)), zero);
        codes |= (uint32_t)fminf(fmaxf(code, 0.0f), 15.0f) << (8 * i);
    }
    const bool empty = usual && r.max_bits == 0;
    word = empty ? 0 : (bits >> 19 & 0xfffu) << 4 | (uint32_t)zero;
    return empty ? 0 : codes;
}

template <int format, bool usual>
static __device__ __forceinline__ kv_codes encode_groups(const float (&low)[4], const float (&high)[4],
                                                         const group_range (&r)[2])
{
    kv_codes c;
    if constexpr (format == QF_CUDA_KV_INT4) {
        c.low = encode_int4<usual>(low, r[0], c.low_word);
        c.high = encode_int4<usual>(high, r[1], c.high_word);
    } else {
        const float limit = format == QF_CUDA_KV_FP8 ? 448.0f : format == QF_CUDA_KV_INT8 ? 127.0f : 1.0f;
        c.low_word = scale_word<usual>(r[0].max_bits, limit);
        c.high_word = format == QF_CUDA_KV_NF4 ? scale_word<usual>(r[1].max_bits, limit) : c.low_word;
        c.low = encode_scaled<format, usual>(low, c.low_word);
        c.high = encode_scaled<format, usual>(high, c.high_word);
    }
    return c;
}

/* A lane's eight columns; row_lanes = head_dim / 8. */
template <int format>
static __device__ __forceinline__ kv_codes encode_columns(const float (&low)[4], const float (&high)[4], int row_lanes)
{
    group_range r[2] = {};
    if constexpr (format == QF_CUDA_KV_INT4) {
        r[0] = range_of(low);
        r[1] = range_of(high);
#pragma unroll
        for (int offset = 1; offset < 8; offset *= 2) {
            widen(r[0], offset);
            widen(r[1], offset);
        }
    } else if constexpr (format == QF_CUDA_KV_NF4) {
        r[0].max_bits = reduce_max(magnitude_max(low), 8);
        r[1].max_bits = reduce_max(magnitude_max(high), 8);
    } else {
        r[0].max_bits = r[1].max_bits = reduce_max(max(magnitude_max(low), magnitude_max(high)), row_lanes);
    }
    return __all_sync(0xffffffffu, is_usual(r[0].max_bits) && is_usual(r[1].max_bits)) != 0
               ? encode_groups<format, true>(low, high, r)
               : encode_groups<format, false>(low, high, r);
}

/* --- codes to their places ------------------------------------------------------------------------------------- */

/* Bytes 0 .. 3 to nibbles 0 .. 3. */
static __device__ __forceinline__ uint32_t pack_nibbles(uint32_t codes)
{
    const uint32_t v = codes | codes >> 4;
    return __byte_perm(v, 0, 0x4420);
}

/* Columns d .. d + 3 (d a multiple of 4) of a row at `row`, which is row_index of its block. Lanes of an even and the next odd multiple are neighbours:
 * a word of int4's keys is both lanes' codes. */
template <int format>
static __device__ __forceinline__ void store_codes(uint8_t *row, int32_t row_index, uint32_t codes, int32_t head_dim,
                                                   int32_t d, bool key, bool store)
{
    constexpr bool nibbles = format == QF_CUDA_KV_INT4 || format == QF_CUDA_KV_NF4;
    const int32_t place = key ? qf_kv_key_place(format, head_dim, d) : qf_kv_value_place(format, head_dim, row_index, d);
    if constexpr (!nibbles) {
        if constexpr (format == QF_CUDA_KV_INT8) { /* code + 128; keys: bytes 0, 2, 1, 3 of the word */
            codes = (key ? __byte_perm(codes, 0, 0x3120) : codes) ^ 0x80808080u;
        }
        if (store) {
            *reinterpret_cast<uint32_t *>(row + place) = codes;
        }
        return;
    }
    if constexpr (format == QF_CUDA_KV_INT4) {
        /* Columns 2 i and 2 i + 1, i = 0, 1 (even lane) or 2, 3, to nibbles i and 4 + i. */
        const uint32_t mine = ((codes & 0xfu) | (codes >> 16 & 0xfu) << 4 | (codes >> 8 & 0xfu) << 16 |
                               (codes >> 24 & 0xfu) << 20)
                              << (d % 8 / 4 * 8);
        const uint32_t word = mine | __shfl_xor_sync(0xffffffffu, mine, 1);
        if (key) {
            if (store && d % 8 == 0) {
                *reinterpret_cast<uint32_t *>(row + place / 2) = word;
            }
            return;
        }
    }
    if (store) {
        *reinterpret_cast<uint16_t *>(row + place / 2) = (uint16_t)pack_nibbles(codes);
    }
}

#endif
