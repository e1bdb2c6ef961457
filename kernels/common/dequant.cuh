/* From packed weights to the A fragments of mma.m16n8k16 and wgmma (bf16). Layouts: qf_kernels.h. */
#ifndef QF_COMMON_DEQUANT_CUH
#define QF_COMMON_DEQUANT_CUH

#include "common/ptx.cuh"

/* Scale and zero point of the two rows of a lane (lane / 4 and lane / 4 + 8). */
struct qf_row_scales {
    float scale[2];   /* without the weight's scale_multiplier */
    uint32_t zero[2]; /* 4 bits: bf16 pair of 128 + zero; 8 bits: float bits of 2^23 + zero */
};

template <int bits> __device__ __forceinline__ qf_row_scales qf_unpack_scales(uint32_t row0, uint32_t row8)
{
    qf_row_scales r;
    const uint32_t words[2] = {row0, row8};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        r.scale[i] = __half2float(__ushort_as_half((unsigned short)(words[i] & 0xffffu)));
        float zero = qf_bf16_high(words[i]);
        r.zero[i] = bits == 4 ? qf_pack_bf16(128.0f + zero, 128.0f + zero) : __float_as_uint(8388608.0f + zero);
    }
    return r;
}

/* a - b of bf16 pairs; exact here. */
__device__ __forceinline__ uint32_t qf_sub_bf16(uint32_t a, uint32_t b)
{
    __nv_bfloat162 r = __hsub2(*reinterpret_cast<__nv_bfloat162 *>(&a), *reinterpret_cast<__nv_bfloat162 *>(&b));
    return *reinterpret_cast<uint32_t *>(&r);
}

__device__ __forceinline__ uint32_t qf_mul_bf16(uint32_t a, uint32_t b)
{
    __nv_bfloat162 r = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&a), *reinterpret_cast<__nv_bfloat162 *>(&b));
    return *reinterpret_cast<uint32_t *>(&r);
}

/* 4 bits: one word -> the four registers of a k16 step, as the integers q - zero. 0x4300 | q is bf16 128 + q. */
__device__ __forceinline__ void qf_dequant_4(uint32_t word, const qf_row_scales &s, uint32_t (&a)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t v;
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(word >> (4 * i)), "r"(0x000f000fu), "r"(0x43004300u));
        a[i] = qf_sub_bf16(v, s.zero[i & 1]);
    }
}

/* 8 bits: two words -> the four registers of a k16 step, as the integers q - zero (at most 255 in size: exact).
 * 0x4b000000 | q is float32 2^23 + q. */
__device__ __forceinline__ void qf_dequant_8(uint32_t low, uint32_t high, const qf_row_scales &s, uint32_t (&a)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t word = i < 2 ? low : high;
        uint32_t first = __byte_perm(word, 0x4b000000u, 0x7440u + 2 * (i & 1));
        uint32_t second = __byte_perm(word, 0x4b000000u, 0x7441u + 2 * (i & 1));
        float zero = __uint_as_float(s.zero[i & 1]);
        a[i] = qf_pack_bf16(__uint_as_float(first) - zero, __uint_as_float(second) - zero);
    }
}

#endif
