/* What the two kernels of linear_mma.cu share: their parameters, dequantisation by number of bits, the epilogue's
 * arithmetic. */
#ifndef QF_LINEAR_MMA_COMMON_CUH
#define QF_LINEAR_MMA_COMMON_CUH

#include "common/dequant.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"

/* A launch as the device sees it. Shares of k, row groups and token passes are the grid. */
struct qf_linear_mma_params {
    const uint8_t *data;
    const uint32_t *scales;
    const float *bias;
    const uint8_t *x; /* tiled bf16 */
    float *out;       /* STORE: (num_splits, num_tokens, n) */
    uint32_t *act;    /* SILU_MUL: tiled bf16, as words; else NULL */
    int32_t row_tiles, blocks; /* n / 16, k / 128 */
    int32_t act_tiles;         /* SILU_MUL: core matrices of act along k, padding included; else row_tiles */
    int32_t num_tokens, num_tiles, tile_tokens;
    int32_t share_begin[QF_CUDA_MAX_SPLITS + 1]; /* first k block of each share of k; the end */
    int32_t group_size;
    int32_t group_tiles, larger_groups; /* stream kernel: row tiles of a CTA; the first CTAs have one more */
    int32_t table_offset; /* stream kernel: bytes of shared memory before the CTA's tables */
    int32_t slot_offset; /* stream and batch kernels: bytes of shared memory before the partial sums */
    int32_t ring_offset; /* stream kernel: bytes of shared memory before the warps' rings, if those are there */
    /* batch kernel: warps along rows and along k, runs over k; a chunk's k blocks, a warp's pieces, bytes of x */
    int32_t row_warps, slices, passes;
    int32_t chunk_blocks, chunk_columns, stage_bytes;
    int32_t resident; /* batch kernel: x stays in shared memory */
    int32_t token_warps; /* tile kernel: warps side by side along the tokens */
    float multiplier;
    /* stream kernel: the norm before this layer, whose division is left to its end; the norm behind it, which its last
     * share of k makes (linear_mma_stream_norm.cuh) */
    const float *squares;
    float eps;
    qf_cuda_linear_norm norm;
    int32_t norm_offset; /* bytes of shared memory before the norms' tables */
};

/* a / b for 0 <= a < 2^20, 0 < b: the rounding of the float quotient cannot reach the next integer. */
__device__ __forceinline__ int qf_divide_small(int a, int b)
{
    return (int)__fdividef((float)a + 0.5f, (float)b);
}

/* Copies 16 bytes of weights to a shared address, bringing what stands beside them into L2. */
__device__ __forceinline__ void qf_copy_16_stream(uint32_t shared, const void *global)
{
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

/* ldmatrix by shared address. */
__device__ __forceinline__ void qf_ldmatrix_x4_at(uint32_t (&r)[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}

/* c = a b: the first product of a scale group, whose accumulator is not set to zero first. */
__device__ __forceinline__ void qf_mma_bf16_first(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%10,%10,%10,%10};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

/* acc += scale * c: rows lane / 4 (c[0], c[1]) and lane / 4 + 8 (c[2], c[3]). */
__device__ __forceinline__ void qf_add_scaled(float (&acc)[4], const float (&scale)[2], const float (&c)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        acc[i] = fmaf(scale[i / 2], c[i], acc[i]);
    }
}

/* The A fragment of k16 step `step` of a lane's words, as they lie in memory (4 words for 4 bits are 4 steps, for
 * 8 bits 2, for 16 bits 1). */
template <int bits, int words>
__device__ __forceinline__ void qf_fragment(uint32_t (&a)[4], const uint32_t (&w)[words], int step,
                                            const qf_row_scales &scales)
{
    if constexpr (bits == 4) {
        qf_dequant_4(w[step], scales, a);
    } else if constexpr (bits == 8) {
        qf_dequant_8(w[2 * step], w[2 * step + 1], scales, a);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i] = w[4 * step + i];
        }
    }
}

/* a * b + c of bf16 pairs. */
__device__ __forceinline__ uint32_t qf_fma_bf16(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

/* qf_dequant_4 with one shift for four registers, where integer work is the bound: row g + 8's nibbles stay 4 bits up.
 * Below 2^-125 bf16 is evenly spaced by 2^-133, so that the bits 16 q are the number q 2^-129: times 2^127, less
 * zero / 4, it is (q - zero) / 4, exact. `scales`: of qf_quick_scales. */
__device__ __forceinline__ void qf_quick_dequant_4(uint32_t word, const qf_row_scales &scales, uint32_t (&a)[4])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t w = half == 0 ? word : word >> 8, v;
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(w), "r"(0x000f000fu), "r"(0x43004300u));
        a[2 * half] = qf_sub_bf16(v, scales.zero[0]);
        a[2 * half + 1] = qf_fma_bf16(w & 0x00f000f0u, 0x7f007f00u, scales.zero[1]);
    }
}

/* From qf_unpack_scales' for 4 bits: row g + 8's zero point as -zero / 4 and its scale times 4. */
__device__ __forceinline__ void qf_quick_scales(qf_row_scales &scales, uint32_t row8)
{
    const float zero = qf_bf16_high(row8) * -0.25f;
    scales.scale[1] *= 4.0f;
    scales.zero[1] = qf_pack_bf16(zero, zero);
}

__device__ __forceinline__ float qf_silu_mul(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

/* A finished sum over a share of k. */
__device__ __forceinline__ float qf_finish(float sum, float multiplier, const float *bias, int row, bool first_share)
{
    sum *= multiplier;
    return bias != nullptr && first_share ? sum + bias[row] : sum;
}

#endif
