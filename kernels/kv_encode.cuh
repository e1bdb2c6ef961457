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

/* The least bf16 not below max / limit; a NaN where there is none. */
static __device__ __forceinline__ uint32_t scale_word(uint32_t max_bits, float limit)
{
    if (max_bits >= 0x7f800000u) {
        return QF_KV_BF16_NAN_WORD;
    }
    const uint32_t word = (__float_as_uint(__fdiv_rn(__uint_as_float(max_bits), limit)) + 0xffffu) >> 16;
    return word >= 0x7f80u ? QF_KV_BF16_NAN_WORD : word;
}

static __device__ __forceinline__ uint32_t encode_e4m3(float y)
{
    const uint32_t bits = __float_as_uint(y), magnitude = bits & 0x7fffffffu;
    uint32_t code;
    if (magnitude < 0x3c800000u) { /* below 2^-6: multiples of 2^-9 */
        code = (uint32_t)rintf(__uint_as_float(magnitude) * 512.0f);
    } else {
        code = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    }
    return ((bits >> 24) & 0x80u) | min(code, 0x7eu);
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
template <int format> static __device__ __forceinline__ uint32_t encode_scaled(const float (&x)[4], uint32_t word)
{
    if (word == 0 || word == QF_KV_BF16_NAN_WORD) {
        return format == QF_CUDA_KV_NF4 && word == 0 ? NF4_ZERO_CODE * 0x01010101u : 0;
    }
    const float scale = __uint_as_float(word << 16);
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float y = __fdiv_rn(x[i], scale);
        uint32_t code;
        if constexpr (format == QF_CUDA_KV_FP8) {
            code = encode_e4m3(y);
        } else if constexpr (format == QF_CUDA_KV_NF4) {
            code = encode_nf4(y);
        } else {
            code = (uint32_t)(int32_t)rintf(fminf(fmaxf(y, -127.0f), 127.0f)) & 0xffu;
        }
        codes |= code << (8 * i);
    }
    return codes;
}

/* Four columns of a group of eight lanes. */
static __device__ __forceinline__ uint32_t encode_int4(const float (&x)[4], uint32_t &word)
{
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) {
        low = fminf(low, __shfl_xor_sync(0xffffffffu, low, offset));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, offset));
    }
    const uint32_t max_bits = reduce_max(magnitude_max(x), 8);
    const float exact = __fdiv_rn(__fsub_rn(high, low), 15.0f);
    if (max_bits >= 0x7f800000u || (__float_as_uint(exact) & 0x7f800000u) == 0x7f800000u) {
        word = QF_KV_INT4_NAN_WORD;
        return 0;
    }
    const uint32_t bits = (__float_as_uint(exact) + 0x7ffffu) & 0xfff80000u;
    word = 0;
    if (bits < 0x00800000u) {
        return 0;
    }
    const float step = __uint_as_float(bits);
    const float zero = fminf(fmaxf(rintf(__fdiv_rn(-low, step)), 0.0f), 15.0f);
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float code = __fadd_rn(rintf(__fdiv_rn(x[i], step)), zero);
        codes |= (uint32_t)fminf(fmaxf(code, 0.0f), 15.0f) << (8 * i);
    }
    word = (bits >> 19 & 0xfffu) << 4 | (uint32_t)zero;
    return codes;
}

/* A lane's eight columns; row_lanes = head_dim / 8. */
template <int format>
static __device__ __forceinline__ kv_codes encode_columns(const float (&low)[4], const float (&high)[4], int row_lanes)
{
    kv_codes r;
    if constexpr (format == QF_CUDA_KV_INT4) {
        r.low = encode_int4(low, r.low_word);
        r.high = encode_int4(high, r.high_word);
        return r;
    }
    if constexpr (format == QF_CUDA_KV_NF4) {
        r.low_word = scale_word(reduce_max(magnitude_max(low), 8), 1.0f);
        r.high_word = scale_word(reduce_max(magnitude_max(high), 8), 1.0f);
    } else {
        const uint32_t max_bits = reduce_max(max(magnitude_max(low), magnitude_max(high)), row_lanes);
        r.low_word = r.high_word = scale_word(max_bits, format == QF_CUDA_KV_FP8 ? 448.0f : 127.0f);
    }
    r.low = encode_scaled<format>(low, r.low_word);
    r.high = encode_scaled<format>(high, r.high_word);
    return r;
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
