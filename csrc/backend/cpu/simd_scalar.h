/* Sixteen lanes in plain C: the reference that every instruction set is compared with, bit for bit.
 *
 * The kernels (*_body.h) are written once over two types, vf (16 float32 lanes) and vi (16 int32 lanes, also seen
 * as 64 bytes), and compiled once per instruction set. Every operation below is either exact or rounded once
 * (fused multiply-add included: fmaf), so all instruction sets give the same bits. */
#ifndef QF_BACKEND_CPU_SIMD_SCALAR_H
#define QF_BACKEND_CPU_SIMD_SCALAR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "base/dtype.h"

#define QF_INLINE static inline /* the compiler may choose: this is the reference, not the fast path */
#define QF_UNROLL
#define QF_LANES for (int i = 0; i < 16; i++)

typedef struct vf { float v[16]; } vf;
typedef struct vi { int32_t v[16]; } vi;

QF_INLINE vf vf_set1(float x) { vf r; QF_LANES r.v[i] = x; return r; }
QF_INLINE vf vf_load(const float *p) { vf r; memcpy(r.v, p, sizeof r.v); return r; }
QF_INLINE void vf_store(float *p, vf a) { memcpy(p, a.v, sizeof a.v); }
QF_INLINE vf vf_load_part(const float *p, int n) { vf r; QF_LANES r.v[i] = i < n ? p[i] : 0.0f; return r; }
QF_INLINE void vf_store_part(float *p, vf a, int n) { memcpy(p, a.v, (size_t)n * sizeof *p); }
QF_INLINE vf vf_load_bf16(const uint16_t *p) { vf r; QF_LANES r.v[i] = qf_bf16_to_f32(p[i]); return r; }
QF_INLINE vf vf_load_f16(const uint16_t *p) { vf r; QF_LANES r.v[i] = qf_f16_to_f32(p[i]); return r; }
QF_INLINE vf vf_add(vf a, vf b) { QF_LANES a.v[i] += b.v[i]; return a; }
QF_INLINE vf vf_sub(vf a, vf b) { QF_LANES a.v[i] -= b.v[i]; return a; }
QF_INLINE vf vf_mul(vf a, vf b) { QF_LANES a.v[i] *= b.v[i]; return a; }
QF_INLINE vf vf_div(vf a, vf b) { QF_LANES a.v[i] /= b.v[i]; return a; }
QF_INLINE vf vf_fma(vf a, vf b, vf c) { QF_LANES c.v[i] = fmaf(a.v[i], b.v[i], c.v[i]); return c; }
QF_INLINE vf vf_fnma(vf a, vf b, vf c) { QF_LANES c.v[i] = fmaf(-a.v[i], b.v[i], c.v[i]); return c; }
/* a > b ? a : b, so that b comes back where either is not a number. */
QF_INLINE vf vf_max(vf a, vf b) { QF_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
/* a < b ? x : y, per lane (y where either is not a number). */
QF_INLINE vf vf_select_lt(vf a, vf b, vf x, vf y) { QF_LANES x.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i]; return x; }
/* Lanes lo <= i < hi keep a; the others become `other`. */
QF_INLINE vf vf_select_range(vf a, int lo, int hi, float other)
{
    QF_LANES a.v[i] = i >= lo && i < hi ? a.v[i] : other;
    return a;
}
/* Lane i + lane i + 8, then + 4, + 2, + 1: one order everywhere. */
QF_INLINE float vf_reduce_add(vf a)
{
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) {
            a.v[i] += a.v[i + width];
        }
    }
    return a.v[0];
}
QF_INLINE float vf_reduce_max(vf a)
{
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) {
            a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
        }
    }
    return a.v[0];
}

QF_INLINE vi vi_set1(int32_t x) { vi r; QF_LANES r.v[i] = x; return r; }
QF_INLINE vi vi_load(const void *p) { vi r; memcpy(r.v, p, sizeof r.v); return r; }
QF_INLINE vi vi_set1_4u8(const void *p) { int32_t x; memcpy(&x, p, sizeof x); return vi_set1(x); }
QF_INLINE vi vi_load_u8(const uint8_t *p) { vi r; QF_LANES r.v[i] = p[i]; return r; }
QF_INLINE void vi_store(int32_t *p, vi a) { memcpy(p, a.v, sizeof a.v); }
QF_INLINE vi vi_load_s8(const int8_t *p) { vi r; QF_LANES r.v[i] = p[i]; return r; }
/* e4m3 numbers times 2^-8, as float16 holds them; the code of NaN is not among them. */
QF_INLINE vf vf_load_e4m3(const uint8_t *p)
{
    vf r;
    QF_LANES r.v[i] = qf_f16_to_f32((uint16_t)((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7));
    return r;
}
/* table[index], index 0 .. 15 */
QF_INLINE vf vf_lookup(vf table, vi index) { vf r; QF_LANES r.v[i] = table.v[index.v[i]]; return r; }
QF_INLINE vi vi_add(vi a, vi b) { QF_LANES a.v[i] += b.v[i]; return a; }
QF_INLINE vi vi_sub(vi a, vi b) { QF_LANES a.v[i] -= b.v[i]; return a; }
QF_INLINE vi vi_mul(vi a, vi b) { QF_LANES a.v[i] *= b.v[i]; return a; }
QF_INLINE vi vi_and(vi a, vi b) { QF_LANES a.v[i] &= b.v[i]; return a; }
QF_INLINE vi vi_max(vi a, vi b) { QF_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
QF_INLINE vi vi_srl(vi a, int n) { QF_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] >> n); return a; }
QF_INLINE vi vi_sll(vi a, int n) { QF_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] << n); return a; }
QF_INLINE int32_t vi_reduce_max(vi a)
{
    int32_t m = a.v[0];
    QF_LANES m = a.v[i] > m ? a.v[i] : m;
    return m;
}
QF_INLINE vf vf_from_vi(vi a) { vf r; QF_LANES r.v[i] = (float)a.v[i]; return r; }
/* To nearest even, for |a| < 2^22: the constant pushes the fraction out of the significand. */
QF_INLINE vi vi_round_vf(vf a)
{
    vi r;
    QF_LANES {
        volatile float pushed = a.v[i] + 12582912.0f;
        float rounded = pushed - 12582912.0f;
        r.v[i] = rounded >= -4194304.0f && rounded <= 4194304.0f ? (int32_t)rounded : 0;
    }
    return r;
}
QF_INLINE vi vi_bits(vf a) { vi r; memcpy(r.v, a.v, sizeof r.v); return r; }
QF_INLINE vf vf_bits(vi a) { vf r; memcpy(r.v, a.v, sizeof r.v); return r; }
QF_INLINE void vi_store_s8(int8_t *p, vi a) { QF_LANES p[i] = (int8_t)a.v[i]; }

/* acc += sum of four products of unsigned weight bytes and signed activation bytes, per lane; exact. */
QF_INLINE vi vi_dot_u8(vi acc, vi w, vi x)
{
    uint8_t wb[64];
    int8_t xb[64];
    memcpy(wb, w.v, sizeof wb);
    memcpy(xb, x.v, sizeof xb);
    QF_LANES for (int b = 0; b < 4; b++) {
        acc.v[i] += (int32_t)wb[4 * i + b] * xb[4 * i + b];
    }
    return acc;
}
/* Two of them for weights of at most 15; acc_hi may be acc_lo, and only the sum of both is defined. */
QF_INLINE void vi_dot_u4(vi *acc_lo, vi *acc_hi, vi lo, vi x_lo, vi hi, vi x_hi)
{
    *acc_lo = vi_dot_u8(*acc_lo, lo, x_lo);
    *acc_hi = vi_dot_u8(*acc_hi, hi, x_hi);
}
QF_INLINE void v_prefetch(const void *p) { __builtin_prefetch(p); }

#endif
