/* From a unit of packed weights in shared memory (1,024 bytes of one row tile) to sums in registers, on tensor
 * cores. */
#ifndef QF_DECODE_UNITS_CUH
#define QF_DECODE_UNITS_CUH

#include "common/ptx.cuh"
#include "decode_plan.cuh"

__device__ __forceinline__ float2 qf_lds_64(uint32_t address)
{
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ void qf_sts_32(uint32_t address, float x)
{
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

__device__ __forceinline__ void qf_sts_64_if(uint32_t address, float x, float y, bool wanted)
{
    if (wanted) {
        asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x), "f"(y) : "memory");
    }
}

/* 2^x; what is too small becomes 0. */
__device__ __forceinline__ float qf_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The float16 in the lower half. */
__device__ __forceinline__ float qf_half_low(uint32_t pair)
{
    return __half2float(__ushort_as_half((unsigned short)(pair & 0xffffu)));
}

__device__ __forceinline__ void qf_ldmatrix_at(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void qf_ldmatrix_trans_at(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

/* A fragment of integers without arithmetic: an integer q of at most 8 bits is, as the bits of a bf16 number, q 2^-133
 * (below 128 such a number has no leading one, and from there on its exponent is the least, which is the same scale).
 * So the bits of two nibbles of a 16-bit half are q and 16 q: rows g + 8 (registers 1 and 3) come out 16 times too
 * large, and x is stored times 2^96 (QF_DECODE_X_SCALE) so that sums are far from both ends of float32. */
__device__ __forceinline__ void qf_raw_4(uint32_t word, uint32_t (&a)[4])
{
    const uint32_t upper = word >> 8;
    a[0] = word & 0x000f000fu;
    a[1] = word & 0x00f000f0u;
    a[2] = upper & 0x000f000fu;
    a[3] = upper & 0x00f000f0u;
}

__device__ __forceinline__ void qf_raw_8(uint32_t low, uint32_t high, uint32_t (&a)[4])
{
    a[0] = __byte_perm(low, 0, 0x4140);
    a[1] = __byte_perm(low, 0, 0x4342);
    a[2] = __byte_perm(high, 0, 0x4140);
    a[3] = __byte_perm(high, 0, 0x4342);
}

/* acc += scale (c - zero sum of x), for the rows g and g + 8. */
template <int bits>
__device__ __forceinline__ void qf_apply_scales(uint32_t low, uint32_t high, float sum, float c_low, float c_high,
                                                float (&acc)[2])
{
    acc[0] += qf_half_low(low) * (c_low - qf_bf16_high(low) * sum);
    acc[1] += qf_half_low(high) * (c_high - qf_bf16_high(high) * (bits == 4 ? 16.0f * sum : sum));
}

/* Only lanes 0 .. 3 read, which is a quarter of the time for shared memory: of B only column 0 is wanted, theirs. What
 * the others hold comes out in other columns. */
__device__ __forceinline__ void qf_lds_128_if(uint4 &v, uint32_t address, bool wanted)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "r"(address), "r"((uint32_t)wanted)
                 : "memory");
}

/* The part of x that multiplies one unit; x: shared address of its first k at this lane's t. */
template <int bits> __device__ __forceinline__ void qf_decode_load_x(uint32_t x, uint4 (&b)[16 / bits])
{
    const bool wanted = (threadIdx.x & 31) < 4;
#pragma unroll
    for (int j = 0; j < 16 / bits; j++) {
        qf_lds_128_if(b[j], x + j * 64, wanted);
    }
}

/* The products of one unit; words: of this lane. Of each accumulator only column 0 is wanted: the low and the high row
 * of lanes with t = 0. Four chains hide each other's latency. */
template <int bits>
__device__ __forceinline__ void qf_decode_unit(const uint32_t (&words)[8], const uint4 (&b)[16 / bits],
                                               float (&c)[4][4])
{
    constexpr int steps = 32 / bits; /* k16 steps */
#pragma unroll
    for (int j = 0; j < steps / 2; j++) {
        uint32_t a0[4], a1[4];
        if (bits == 4) {
            qf_raw_4(words[(2 * j) % 8], a0);
            qf_raw_4(words[(2 * j + 1) % 8], a1);
        } else if (bits == 8) {
            qf_raw_8(words[(4 * j) % 8], words[(4 * j + 1) % 8], a0);
            qf_raw_8(words[(4 * j + 2) % 8], words[(4 * j + 3) % 8], a1);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a0[i] = words[i];
                a1[i] = words[4 + i];
            }
        }
        qf_mma_bf16(c[2 * j % 4], a0, b[j].x, b[j].y);
        qf_mma_bf16(c[(2 * j + 1) % 4], a1, b[j].z, b[j].w);
    }
}

/* Row 0: the low one, g; row 2: the high one, g + 8. */
template <int bits> __device__ __forceinline__ float qf_decode_unit_sum(const float (&c)[4][4], int row)
{
    return bits == 16 ? c[0][row] + c[1][row] : (c[0][row] + c[1][row]) + (c[2][row] + c[3][row]);
}

#endif
