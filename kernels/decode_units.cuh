/* From a unit of packed weights in shared memory (1,024 bytes of one row tile) to sums in registers, on tensor cores. */
#ifndef QF_DECODE_UNITS_CUH
#define QF_DECODE_UNITS_CUH

#include "common/ptx.cuh"
#include "decode_plan.cuh"

__device__ __forceinline__ uint4 qf_lds_128(uint32_t address)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint32_t qf_lds_32(uint32_t address)
{
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
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
 * (below 128 such a number has no leading one, and from there on its exponent is the least, which is the same scale). So
 * the bits of two nibbles of a 16-bit half are q and 16 q: rows g + 8 (registers 1 and 3) come out 16 times too large,
 * and x is stored times 2^96 (QF_DECODE_X_SCALE) so that sums are far from both ends of float32. */
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
    acc[0] += __half2float(__ushort_as_half((unsigned short)(low & 0xffffu))) * (c_low - qf_bf16_high(low) * sum);
    acc[1] += __half2float(__ushort_as_half((unsigned short)(high & 0xffffu))) *
              (c_high - qf_bf16_high(high) * (bits == 4 ? 16.0f * sum : sum));
}

/* The products of one unit; words: of this lane; x: shared address of its first k at this lane's t. Of each accumulator
 * only column 0 is wanted: the low and the high row of lanes with t = 0. Four chains hide each other's latency. */
template <int bits>
__device__ __forceinline__ void qf_decode_unit(const uint32_t (&words)[8], uint32_t x, float &low, float &high)
{
    constexpr int steps = 32 / bits; /* k16 steps */
    float c[4][4] = {};
#pragma unroll
    for (int j = 0; j < steps / 2; j++) {
        const uint4 b = qf_lds_128(x + j * 64);
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
        qf_mma_bf16(c[2 * j % 4], a0, b.x, b.y);
        qf_mma_bf16(c[(2 * j + 1) % 4], a1, b.z, b.w);
    }
    low = steps > 2 ? (c[0][0] + c[1][0]) + (c[2][0] + c[3][0]) : c[0][0] + c[1][0];
    high = steps > 2 ? (c[0][2] + c[1][2]) + (c[2][2] + c[3][2]) : c[0][2] + c[1][2];
}

#endif
