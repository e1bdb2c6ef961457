/* Low-bit decode attention: scale words to operands, once for all lanes.
 *
 * A word is wanted by four or eight lanes; so each lane decodes some of the stage's and puts them where all find them. Of
 * the formats in 4 bits, in shared memory behind the ring (lowbit_sizes::decoded):
 *
 *   key_steps   (positions, words) float32
 *   key_zeros   (positions, words) float32: step times zero, exact in tf32 (int4)
 *   value units (tiles, words, 4 t) of s(2t, 2t + 1) | s(2t + 8, 2t + 9): in fp16, by the warp's exponent; int4 also
 *               s z(2t, 2t + 1) | s z(2t + 8, 2t + 9), exact: an A operand, whose row of a tile and a group takes up
 *               what all columns of the group have too much
 *
 * Steps of values have 8 bits of exponent and fp16 5: they are taken relative to a power of two of the warp, which grows
 * when a stage has a larger step than it can hold. What is then too small, 2^-20 of the largest, becomes 0 or less exact. */
#ifndef QF_ATTENTION_DECODE_LOWBIT_SCALES_CUH
#define QF_ATTENTION_DECODE_LOWBIT_SCALES_CUH

#include "attention_decode_lowbit_stage.cuh"

#define LOWBIT_STEP_RANGE 23 /* steps are below 2^9 in fp16, with weights below 2^6: products are in range */
#define LOWBIT_STEP_ROOM 3   /* powers of two by which a step may exceed those before it */
#define LOWBIT_LAST_EXPONENT 224 /* by this one a NaN (exponent 255) stays one in fp16 */

template <int format, int head_dim> struct lowbit_state {
    float o[head_dim / 16][4];   /* tiles 2 G, 2 G + 1: rows g, g + 8 are columns 32 G + 4 g .. + 3 of the head */
    float excess[4];             /* int8: what all rows of o have too much; int4: the first two: row g: what group
                                    g % words has too much, of tile g / words % 2; the last two: the sum of weights */
    float maximum[2], sum[2];    /* heads 2t, 2t + 1: about the maximum of the warp, the sum of this lane */
    uint32_t exponent;           /* 1.0 in a value's step is 2^(exponent - 112) */
};

/* Everything is multiplied: column e of a lane by scale[e]. */
template <int format, int head_dim>
static __device__ __forceinline__ void scale_outputs(lowbit_state<format, head_dim> &s, float first, float second)
{
#pragma unroll
    for (int i = 0; i < head_dim / 16; i++) {
        s.o[i][0] *= first;
        s.o[i][1] *= second;
        s.o[i][2] *= first;
        s.o[i][3] *= second;
    }
    if constexpr (format == QF_CUDA_KV_INT8 || format == QF_CUDA_KV_INT4) {
        s.excess[0] *= first;
        s.excess[1] *= second;
    }
}

/* Of a scale word: the bits below its exponent. */
template <int format> static __device__ __forceinline__ constexpr int exponent_shift()
{
    return format == QF_CUDA_KV_INT4 ? 8 : 7;
}

/* The exponent grows if need be; `largest`: pairs of words of the stage's values that this lane has. */
template <int format, int head_dim>
static __device__ __forceinline__ void hold_steps(lowbit_state<format, head_dim> &s, uint32_t largest)
{
    constexpr int shift = exponent_shift<format>();
    const uint32_t limit = (s.exponent << shift) * 0x10001u + ((LOWBIT_STEP_RANGE + 1) << shift) * 0x10001u - 0x10001u;
    if (__any_sync(ALL_LANES, __vmaxu2(largest, limit) != limit)) { /* seldom */
        const uint32_t exponent = max(largest & 0xffffu, largest >> 16) >> shift;
        const int32_t most = (int32_t)__reduce_max_sync(ALL_LANES, exponent);
        const uint32_t next =
            (uint32_t)min(max(most - (LOWBIT_STEP_RANGE - LOWBIT_STEP_ROOM), 0), LOWBIT_LAST_EXPONENT);
        const uint32_t by = next - s.exponent;
        const float factor = by > 126 ? 0.0f : __uint_as_float((127 - by) << 23);
        scale_outputs(s, factor, factor);
        s.exponent = next;
    }
}

/* A pair of words to steps in fp16. */
template <int format> static __device__ __forceinline__ uint32_t value_steps(uint32_t words, uint32_t exponent)
{
    const uint32_t base = (exponent << exponent_shift<format>()) * 0x10001u;
    const uint32_t above = __vmaxu2(words, base) - base;
    return format == QF_CUDA_KV_INT4 ? (above << 2) & 0xffc0ffc0u : above << 3;
}

static __device__ __forceinline__ uint32_t mul_f16(uint32_t a, uint32_t b)
{
    const __half2 r = __hmul2(*reinterpret_cast<const __half2 *>(&a), *reinterpret_cast<const __half2 *>(&b));
    return *reinterpret_cast<const uint32_t *>(&r);
}

/* The zero points of a pair of int4's words in fp16: 1024 + zero, less 1024. */
static __device__ __forceinline__ uint32_t zeros_f16(uint32_t words)
{
    const uint32_t above = qf_kv_and_or(words, 0x000f000fu, 0x64006400u), offset = 0x64006400u;
    const __half2 r = __hsub2(*reinterpret_cast<const __half2 *>(&above), *reinterpret_cast<const __half2 *>(&offset));
    return *reinterpret_cast<const uint32_t *>(&r);
}

/* Of a stage in 4 bits. Warps do not wait for each other: lanes do, before and behind. */
template <int format, int head_dim>
static __device__ __forceinline__ void decode_scales(lowbit_state<format, head_dim> &s, const uint8_t *stage,
                                                     uint8_t *decoded, uint32_t lane)
{
    typedef lowbit_sizes<format, head_dim> sizes;
    static_assert(sizes::positions == 32 && sizes::tiles * sizes::words * 4 <= 32, "a lane has one of each");
    const uint32_t unit = lane % (sizes::tiles * sizes::words * 4); /* lanes of head_dim 64 do the same twice */
    const uint32_t row = unit / (4 * sizes::words) * 16 + 2 * (unit % 4), group = unit / 4 % sizes::words;
    const uint16_t *value_words =
        reinterpret_cast<const uint16_t *>(stage + 2 * sizes::codes + sizes::scales) + row * sizes::words + group;
    uint32_t pair[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        pair[h] = value_words[8 * h * sizes::words] | (uint32_t)value_words[(8 * h + 1) * sizes::words] << 16;
    }
    uint32_t key_words[sizes::words / 2];
    load_words<sizes::words / 2>(key_words, stage + 2 * sizes::codes + lane * (2 * sizes::words));
    float step[sizes::words], zero[sizes::words];
#pragma unroll
    for (int i = 0; i < sizes::words; i++) {
        const uint32_t word = key_words[i / 2];
        if constexpr (format == QF_CUDA_KV_INT4) {
            step[i] = i % 2 == 0 ? qf_kv_int4_step_low(word) : qf_kv_int4_step_high(word);
            zero[i] = step[i] * ((i % 2 == 0 ? qf_kv_int4_zero_low(word) : qf_kv_int4_zero_high(word)) - 128.0f);
        } else {
            step[i] = i % 2 == 0 ? qf_bf16_low(word) : qf_bf16_high(word);
        }
    }
    store_floats<sizes::words>(decoded + lane * (4 * sizes::words), step);
    uint8_t *steps = decoded + sizes::key_steps + sizes::key_zeros + unit * sizes::value_unit;
    hold_steps(s, __vmaxu2(pair[0], pair[1]));
    const uint32_t first = value_steps<format>(pair[0], s.exponent), second = value_steps<format>(pair[1], s.exponent);
    if constexpr (sizes::zeros) {
        store_floats<sizes::words>(decoded + sizes::key_steps + lane * (4 * sizes::words), zero);
        *reinterpret_cast<uint4 *>(steps) =
            make_uint4(first, second, mul_f16(first, zeros_f16(pair[0])), mul_f16(second, zeros_f16(pair[1])));
    } else {
        *reinterpret_cast<uint2 *>(steps) = make_uint2(first, second);
    }
    __syncwarp();
}

/* The same in 8 bits, where a lane keeps what it wants: of each tile, rows 2t, 2t + 1 and 2t + 8, 2t + 9. */
template <int format, int head_dim>
static __device__ __forceinline__ void load_value_steps(lowbit_state<format, head_dim> &s, const uint8_t *stage,
                                                        uint32_t lane,
                                                        uint32_t (&steps)[lowbit_sizes<format, head_dim>::tiles][2])
{
    typedef lowbit_sizes<format, head_dim> sizes;
    const uint8_t *words = stage + 2 * sizes::codes + sizes::scales + lane % 4 * 4;
    uint32_t largest = 0;
#pragma unroll
    for (int m = 0; m < sizes::tiles; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            steps[m][h] = *reinterpret_cast<const uint32_t *>(words + 32 * m + 16 * h);
            largest = __vmaxu2(largest, steps[m][h]);
        }
    }
    hold_steps(s, largest);
#pragma unroll
    for (int m = 0; m < sizes::tiles; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            steps[m][h] = value_steps<format>(steps[m][h], s.exponent);
        }
    }
}

#endif
