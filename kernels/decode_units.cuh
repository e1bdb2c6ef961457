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

enum qf_decode_format { QF_FORMAT_4_128, QF_FORMAT_4, QF_FORMAT_8_128, QF_FORMAT_8, QF_FORMAT_16 };

__device__ constexpr int qf_format_bits(int format)
{
    return format == QF_FORMAT_16 ? 16 : format == QF_FORMAT_8_128 || format == QF_FORMAT_8 ? 8 : 4;
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

/* The two sums of x of this lane's tokens (columns 2t and 2t + 1), times 2^-133. */
template <int tokens> __device__ __forceinline__ float2 qf_x_sums(uint32_t sums, int slot)
{
    const uint32_t at = sums + slot * tokens * 4;
    if (tokens == 1) {
        float v = __uint_as_float(qf_lds_32(at));
        return make_float2(v, v);
    }
    const uint32_t to = at + (2 * (threadIdx.x & 3)) % (tokens == 1 ? 1 : tokens) * 4;
    return make_float2(__uint_as_float(qf_lds_32(to)), __uint_as_float(qf_lds_32(to + 4)));
}

/* acc += scale (c - zero sum of x), for the rows g and g + 8. c may be the sum of two chains. */
template <int bits, int tokens>
__device__ __forceinline__ void qf_apply_scales(uint32_t row, const float2 s, const float (&c)[4], const float (&d)[4],
                                                float (&acc)[4])
{
    const uint32_t words[2] = {qf_lds_32(row), qf_lds_32(row + 32)};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float scale = __half2float(__ushort_as_half((unsigned short)(words[i] & 0xffffu)));
        const float zero = qf_bf16_high(words[i]) * (bits == 4 && i == 1 ? -16.0f : -1.0f);
        acc[2 * i] += scale * ((c[2 * i] + d[2 * i]) + zero * s.x);
        if (tokens > 1) {
            acc[2 * i + 1] += scale * ((c[2 * i + 1] + d[2 * i + 1]) + zero * s.y);
        }
    }
}

/* Shared addresses of a unit (1,024 bytes of weights: a block of 4 bits, half a block of 8, a quarter of 16): its words
 * and its piece of x at this lane's place, the block's scales at this lane's row, its sums of x; its first 32 k. */
struct qf_decode_unit_at {
    uint32_t data, scales, x, sums;
    int32_t first_32;
};

/* Adds `count` units to acc[i]: their chains of products are independent, so one's latency hides behind the other's. */
template <int format, int tokens, int count>
__device__ __forceinline__ void qf_decode_units(const qf_decode_unit_at (&at)[count], int shift, float (&acc)[count][4])
{
    constexpr int bits = qf_format_bits(format), steps = 32 / bits; /* k16 steps of a unit */
    constexpr bool whole = format == QF_FORMAT_4_128 || format == QF_FORMAT_8_128;
    uint32_t words[count][8];
#pragma unroll
    for (int u = 0; u < count; u++) {
        const uint4 low = qf_lds_128(at[u].data), high = qf_lds_128(at[u].data + 512);
        words[u][0] = low.x, words[u][1] = low.y, words[u][2] = low.z, words[u][3] = low.w;
        words[u][4] = high.x, words[u][5] = high.y, words[u][6] = high.z, words[u][7] = high.w;
    }
    float even[count][4] = {}, odd[count][4] = {};
#pragma unroll
    for (int j = 0; j < steps / 2; j++) { /* 32 k */
#pragma unroll
        for (int u = 0; u < count; u++) {
            const uint4 b = qf_lds_128(at[u].x + j * tokens * 64);
            uint32_t a[4];
            if (bits == 16) {
                const uint32_t a0[4] = {words[u][0], words[u][1], words[u][2], words[u][3]};
                const uint32_t a1[4] = {words[u][4], words[u][5], words[u][6], words[u][7]};
                qf_mma_bf16(acc[u], a0, b.x, b.y);
                qf_mma_bf16(odd[u], a1, b.z, b.w);
                continue;
            }
            if (!whole) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    even[u][i] = odd[u][i] = 0.0f;
                }
            }
            if (bits == 4) {
                qf_raw_4(words[u][2 * j], a);
                qf_mma_bf16(even[u], a, b.x, b.y);
                qf_raw_4(words[u][2 * j + 1], a);
                qf_mma_bf16(odd[u], a, b.z, b.w);
            } else {
                qf_raw_8(words[u][(4 * j) % 8], words[u][(4 * j + 1) % 8], a);
                qf_mma_bf16(even[u], a, b.x, b.y);
                qf_raw_8(words[u][(4 * j + 2) % 8], words[u][(4 * j + 3) % 8], a);
                qf_mma_bf16(odd[u], a, b.z, b.w);
            }
            if (!whole) {
                const uint32_t group = at[u].scales + ((at[u].first_32 + j) >> (2 - shift)) * 64;
                qf_apply_scales<bits, tokens>(group, qf_x_sums<tokens>(at[u].sums, at[u].first_32 + j), even[u], odd[u],
                                              acc[u]);
            }
        }
    }
#pragma unroll
    for (int u = 0; u < count; u++) {
        if (bits == 16) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                acc[u][i] += odd[u][i];
            }
        } else if (whole) {
            float2 s = qf_x_sums<tokens>(at[u].sums, 4);
            if (bits == 8 && at[u].first_32 == 0) { /* a block's sum counts once, with its second half */
                s = make_float2(0.0f, 0.0f);
            }
            qf_apply_scales<bits, tokens>(at[u].scales, s, even[u], odd[u], acc[u]);
        }
    }
}

#endif
