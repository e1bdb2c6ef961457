/* The low-bit KV cache as the kernels see it: where a code stands in its row, and codes to bf16 (prefill) or fp16 (decode).
 * What codes and words mean: csrc/kv/format.h; the layout of a block: qf_kv_cache.h.
 *
 * A row's place is counted in codes: bytes, or nibbles (nibble n in bits 4 n of the little-endian words). Both orders
 * are made for the A operand of mma.m16n8k16, whose lane is (g, t) = (lane / 4, lane % 4):
 *
 *   keys    d = 32 G + 8 t + 2 i + e: lane t's eight columns of group G are one word (4 bits) or two (8 bits), the pair
 *           (e = 0, 1) being the k pair of a register. Pair i of int4 stands in bits 4 i and 16 + 4 i; of int8 in bytes
 *           i % 2 and i % 2 + 2 of word i / 2; of fp8 and nf4 the columns are in order.
 *   values  d = 32 G + 4 g + n: lane g's four rows of group G's two tiles are four neighbouring codes; in 8 bits lane g's
 *           of all groups are neighbours. In 4 bits a group is a piece of 16 bytes, and pieces of a row change places so that
 *           those of a group of 8 rows lie in all banks of shared memory, whole blocks of rows copied as they are.
 *
 * int8 is stored as code + 128. */
#ifndef QF_COMMON_KV_CODEC_CUH
#define QF_COMMON_KV_CODEC_CUH

#include "common/dequant.cuh"
#include "qf_kernels.h"

#define QF_KV_INT4_NAN_WORD 0xfff0u
#define QF_KV_BF16_NAN_WORD 0x7fc0u

/* As qf_cuda_kv_words and qf_cuda_kv_row_bytes, on the device. */
static __host__ __device__ constexpr int32_t qf_kv_words(int format, int32_t head_dim)
{
    return format == QF_CUDA_KV_FP8 || format == QF_CUDA_KV_INT8 ? 1 : head_dim / 32;
}
static __host__ __device__ constexpr int32_t qf_kv_row_bytes(int format, int32_t head_dim)
{
    return format == QF_CUDA_KV_FP8 || format == QF_CUDA_KV_INT8 ? head_dim : head_dim / 2;
}

/* --- where codes stand -------------------------------------------------------------------------------------- */

static __host__ __device__ __forceinline__ int32_t qf_kv_key_place(int format, int32_t head_dim, int32_t d)
{
    const int32_t group = d / 32, t = d % 32 / 8, i = d % 8 / 2, e = d % 2;
    if (format == QF_CUDA_KV_INT4) {
        return t * (head_dim / 4) + 8 * group + i + 4 * e;
    }
    if (format == QF_CUDA_KV_NF4) {
        return t * (head_dim / 4) + 8 * group + 2 * i + e;
    }
    return (group / 2 * 4 + t) * 16 + group % 2 * 8 + (format == QF_CUDA_KV_FP8 ? d % 8 : i / 2 * 4 + i % 2 + 2 * e);
}

/* The piece of 16 bytes of a row of values in 4 bits where a group stands; row: within its block. */
static __host__ __device__ __forceinline__ int32_t qf_kv_value_piece(int32_t head_dim, int32_t row, int32_t group)
{
    return head_dim == 128 ? group ^ (row >> 1 & 3) : group ^ (row >> 2 & 1);
}

static __host__ __device__ __forceinline__ int32_t qf_kv_value_place(int format, int32_t head_dim, int32_t row, int32_t d)
{
    if (format == QF_CUDA_KV_INT4 || format == QF_CUDA_KV_NF4) {
        return qf_kv_value_piece(head_dim, row, d / 32) * 32 + d % 32;
    }
    return d % 32 / 4 * (head_dim / 8) + 4 * (d / 32) + d % 4;
}

/* A code as it is stored. */
static __host__ __device__ __forceinline__ uint8_t qf_kv_stored(int format, uint8_t code)
{
    return (uint8_t)(format == QF_CUDA_KV_INT8 ? code ^ 0x80u : code);
}

/* --- scale words -------------------------------------------------------------------------------------------- */

/* (v & mask) | bits */
static __device__ __forceinline__ uint32_t qf_kv_and_or(uint32_t v, uint32_t mask, uint32_t bits)
{
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(bits));
    return r;
}

/* A pair of int4's words: steps as bf16 (exact), and 128 + zero as bf16. */
static __device__ __forceinline__ uint32_t qf_kv_int4_steps(uint32_t words) { return (words & 0xfff0fff0u) >> 1; }

static __device__ __forceinline__ uint32_t qf_kv_int4_zeros(uint32_t words)
{
    return qf_kv_and_or(words, 0x000f000fu, 0x43004300u);
}

/* The low or high word of a pair: its step, and 128 + zero, in float32. */
static __device__ __forceinline__ float qf_kv_int4_step_low(uint32_t words)
{
    return __uint_as_float((words << 15) & 0x7ff80000u);
}
static __device__ __forceinline__ float qf_kv_int4_step_high(uint32_t words)
{
    return __uint_as_float((words & 0xfff00000u) >> 1);
}
static __device__ __forceinline__ float qf_kv_int4_zero_low(uint32_t words)
{
    return __uint_as_float(qf_kv_and_or(words << 16, 0x000f0000u, 0x43000000u));
}
static __device__ __forceinline__ float qf_kv_int4_zero_high(uint32_t words)
{
    return __uint_as_float(qf_kv_and_or(words, 0x000f0000u, 0x43000000u));
}

/* --- codes to bf16 ------------------------------------------------------------------------------------------ */

/* The nibbles in bits 0 and 16: 128 + code, exact. */
static __device__ __forceinline__ uint32_t qf_kv_nibble_pair(uint32_t v)
{
    return qf_kv_and_or(v, 0x000f000fu, 0x43004300u);
}

/* The bytes code + 128 in bits 0 and 16: with upper bit s and the other seven bits l, (128 + l) - (256 - 128 s), exact. */
static __device__ __forceinline__ uint32_t qf_kv_int8_pair(uint32_t v)
{
    return qf_sub_bf16(qf_kv_and_or(v, 0x007f007fu, 0x43004300u), qf_kv_and_or(~v, 0x00800080u, 0x43004300u));
}

/* The e4m3 bytes in bits 8 and 24: exponent and mantissa in bf16's places, times 2^(127 - 7): exact, subnormal codes
 * too. */
static __device__ __forceinline__ uint32_t qf_kv_e4m3_pair(uint32_t v)
{
    return qf_mul_bf16(qf_kv_and_or(v, 0x80008000u, (v >> 4) & 0x07f007f0u), 0x7b807b80u);
}

/* nf4: four nibbles (bits 0 .. 15 of `low_bits`, the low three bits of each, and of `high_bits`, the fourth one) to two
 * pairs of neighbours, by bytes of the 16 levels in bf16 or fp16. */
template <bool fp16 = false>
static __device__ __forceinline__ void qf_kv_nf4_pairs(uint32_t low_bits, uint32_t high_bits, uint32_t &first,
                                                       uint32_t &second)
{
    const uint32_t mask = __byte_perm(0x0000ff00u, 0, high_bits);
    const uint32_t high_negative =
        fp16 ? __byte_perm(0xb6b8b9bcu, 0x00adb1b4u, low_bits) : __byte_perm(0xbebfbfbfu, 0x00bdbebeu, low_bits);
    const uint32_t high_positive =
        fp16 ? __byte_perm(0x3533312du, 0x3c393837u, low_bits) : __byte_perm(0x3e3e3e3du, 0x3f3f3f3eu, low_bits);
    const uint32_t low_negative =
        fp16 ? __byte_perm(0x50309000u, 0x00d0e890u, low_bits) : __byte_perm(0xca063280u, 0x00ba3d92u, low_bits);
    const uint32_t low_positive =
        fp16 ? __byte_perm(0x68e02818u, 0x00c88010u, low_bits) : __byte_perm(0xad7c25a3u, 0x803910e2u, low_bits);
    const uint32_t high = (high_positive & mask) | (high_negative & ~mask);
    const uint32_t low = (low_positive & mask) | (low_negative & ~mask);
    first = __byte_perm(low, high, 0x5140);
    second = __byte_perm(low, high, 0x7362);
}

/* Eight neighbouring columns of a key (words: one for 4 bits, two for 8) to four pairs, without their scale; int4:
 * 128 + code. */
template <int format> static __device__ __forceinline__ void qf_kv_key_pairs(const uint32_t *words, uint32_t (&x)[4])
{
    if constexpr (format == QF_CUDA_KV_INT4) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = qf_kv_nibble_pair(words[0] >> (4 * i));
        }
    } else if constexpr (format == QF_CUDA_KV_NF4) {
        const uint32_t low_bits = words[0] & 0x77777777u, high_bits = (words[0] >> 3) & 0x11111111u;
        qf_kv_nf4_pairs(low_bits, high_bits, x[0], x[1]);
        qf_kv_nf4_pairs(low_bits >> 16, high_bits >> 16, x[2], x[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t word = words[i / 2];
            x[i] = format == QF_CUDA_KV_INT8 ? qf_kv_int8_pair(i % 2 == 0 ? word : word >> 8)
                                             : qf_kv_e4m3_pair(__byte_perm(word, 0, i % 2 == 0 ? 0x1404 : 0x3424));
        }
    }
}

/* --- codes to fp16 ------------------------------------------------------------------------------------------
 *
 * Integers need no conversion: bits 0 .. 9 of an fp16 number are an integer times 2^-24, as subnormal numbers, which the
 * tensor cores take at full rate and exactly.
 *   int8  (code + 128) 2^-24
 *   int4  code 2^-24 in pairs 0 and 2 (columns 0 and 2 of values), code 2^-20 in 1 and 3
 *   fp8, nf4: the code's value */
#define QF_KV_FP16_UNIT 5.9604644775390625e-08f /* 2^-24 */

/* Four e4m3 bytes to two pairs of neighbours. */
static __device__ __forceinline__ void qf_kv_e4m3_fp16(uint32_t v, uint32_t &low, uint32_t &high)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(low), "=r"(high)
        : "r"(v));
#else
    const __half2 scale = __half2half2(__ushort_as_half(0x5c00)); /* 2^8 */
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t bytes = __byte_perm(v, 0, i == 0 ? 0x1404 : 0x3424);
        const uint32_t bits = qf_kv_and_or(bytes, 0x80008000u, (bytes >> 1) & 0x3f803f80u); /* fp16's places */
        const __half2 r = __hmul2(*reinterpret_cast<const __half2 *>(&bits), scale);
        (i == 0 ? low : high) = *reinterpret_cast<const uint32_t *>(&r);
    }
#endif
}

/* As qf_kv_key_pairs. */
template <int format> static __device__ __forceinline__ void qf_kv_key_fp16(const uint32_t *words, uint32_t (&x)[4])
{
    if constexpr (format == QF_CUDA_KV_INT4) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = (words[0] >> (i / 2 * 8)) & (i % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
        }
    } else if constexpr (format == QF_CUDA_KV_NF4) {
        const uint32_t low_bits = words[0] & 0x77777777u, high_bits = (words[0] >> 3) & 0x11111111u;
        qf_kv_nf4_pairs<true>(low_bits, high_bits, x[0], x[1]);
        qf_kv_nf4_pairs<true>(low_bits >> 16, high_bits >> 16, x[2], x[3]);
    } else if constexpr (format == QF_CUDA_KV_FP8) {
        qf_kv_e4m3_fp16(words[0], x[0], x[1]);
        qf_kv_e4m3_fp16(words[1], x[2], x[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = i % 2 == 0 ? words[i / 2] & 0x00ff00ffu : __byte_perm(words[i / 2], 0, 0x4341);
        }
    }
}

/* The four columns of one group (8 bits: a word of each row) of two rows a and b of values: x[n] is column n of a, then of b,
 * without their scale. */
template <int format> static __device__ __forceinline__ void qf_kv_value_fp16(uint32_t a, uint32_t b, uint32_t (&x)[4])
{
    if constexpr (format == QF_CUDA_KV_INT8) {
        const uint32_t even = __byte_perm(a, b, 0x6420), odd = __byte_perm(a, b, 0x7531);
        x[0] = even & 0x00ff00ffu;
        x[1] = odd & 0x00ff00ffu;
        x[2] = __byte_perm(even, 0, 0x4341);
        x[3] = __byte_perm(odd, 0, 0x4341);
    } else {
        qf_kv_e4m3_fp16(__byte_perm(a, b, 0x5140), x[0], x[1]);
        qf_kv_e4m3_fp16(__byte_perm(a, b, 0x7362), x[2], x[3]);
    }
}

/* The same in 4 bits: a's four codes and b's are the halves of v. */
template <int format> static __device__ __forceinline__ void qf_kv_value_halves_fp16(uint32_t v, uint32_t (&x)[4])
{
    if constexpr (format == QF_CUDA_KV_INT4) {
        qf_kv_key_fp16<format>(&v, x);
    } else {
        const uint32_t low_bits = v & 0x77777777u, high_bits = (v >> 3) & 0x11111111u;
        uint32_t a01, a23, b01, b23;
        qf_kv_nf4_pairs<true>(low_bits, high_bits, a01, a23);
        qf_kv_nf4_pairs<true>(low_bits >> 16, high_bits >> 16, b01, b23);
        x[0] = __byte_perm(a01, b01, 0x5410);
        x[1] = __byte_perm(a01, b01, 0x7632);
        x[2] = __byte_perm(a23, b23, 0x5410);
        x[3] = __byte_perm(a23, b23, 0x7632);
    }
}

#endif
