/* Sixteen lanes in one zmm register. The contract of each function is in simd_scalar.h. */
#ifndef QF_BACKEND_CPU_SIMD_AVX512_H
#define QF_BACKEND_CPU_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define QF_INLINE static inline __attribute__((always_inline))
/* The loops over rows and tiles of a register block must vanish, or its accumulators would live in memory. */
#if defined(__clang__)
#define QF_UNROLL _Pragma("clang loop unroll(full)")
#else
#define QF_UNROLL _Pragma("GCC unroll 16")
#endif

typedef __m512 vf;
typedef __m512i vi;

QF_INLINE __mmask16 v_mask(int n) { return (__mmask16)((1u << n) - 1u); }

QF_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
QF_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
QF_INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
QF_INLINE vf vf_load_part(const float *p, int n) { return _mm512_maskz_loadu_ps(v_mask(n), p); }
QF_INLINE void vf_store_part(float *p, vf a, int n) { _mm512_mask_storeu_ps(p, v_mask(n), a); }
QF_INLINE vf vf_load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
QF_INLINE vf vf_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
QF_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
QF_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
QF_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
QF_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
QF_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
QF_INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
QF_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
QF_INLINE vf vf_select_lt(vf a, vf b, vf x, vf y)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
QF_INLINE vf vf_select_range(vf a, int lo, int hi, float other)
{
    int from = lo < 0 ? 0 : lo > 16 ? 16 : lo;
    int to = hi < from ? from : hi > 16 ? 16 : hi;
    return _mm512_mask_blend_ps((__mmask16)(v_mask(to) & ~v_mask(from)), _mm512_set1_ps(other), a);
}
QF_INLINE float vf_reduce_add(vf a)
{
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
QF_INLINE float vf_reduce_max(vf a)
{
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

QF_INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
QF_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
QF_INLINE vi vi_set1_4u8(const void *p)
{
    int32_t x;
    memcpy(&x, p, sizeof x);
    return _mm512_set1_epi32(x);
}
QF_INLINE vi vi_load_u8(const uint8_t *p)
{
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}
QF_INLINE void vi_store(int32_t *p, vi a) { _mm512_storeu_si512(p, a); }
QF_INLINE vi vi_load_s8(const int8_t *p)
{
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}
QF_INLINE vf vf_load_e4m3(const uint8_t *p)
{
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((int16_t)0xbf80)));
}
QF_INLINE vf vf_lookup(vf table, vi index) { return _mm512_permutexvar_ps(index, table); }
QF_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
QF_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
QF_INLINE vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
QF_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
QF_INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
/* Macros, because the count must be a literal. */
#define vi_srl(A, N) _mm512_srli_epi32((A), (N))
#define vi_sll(A, N) _mm512_slli_epi32((A), (N))
QF_INLINE int32_t vi_reduce_max(vi a) { return _mm512_reduce_max_epi32(a); }
QF_INLINE vf vf_from_vi(vi a) { return _mm512_cvtepi32_ps(a); }
QF_INLINE vi vi_round_vf(vf a)
{
    return _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
QF_INLINE vi vi_bits(vf a) { return _mm512_castps_si512(a); }
QF_INLINE vf vf_bits(vi a) { return _mm512_castsi512_ps(a); }
QF_INLINE void vi_store_s8(int8_t *p, vi a)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(a));
}

#ifdef QF_SIMD_VNNI
/* In assembly because gcc 12 copies and spills the accumulators of the intrinsic around a loop, which cost a fifth of
 * the speed of a 512-row product. */
QF_INLINE vi vi_dot_u8(vi acc, vi w, vi x)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}
QF_INLINE void vi_dot_u4(vi *acc_lo, vi *acc_hi, vi lo, vi x_lo, vi hi, vi x_hi)
{
    *acc_lo = vi_dot_u8(*acc_lo, lo, x_lo);
    *acc_hi = vi_dot_u8(*acc_hi, hi, x_hi);
}
#else
/* vpmaddubsw would saturate on weights above 128, so bytes are widened: even and odd ones apart. */
QF_INLINE vi vi_dot_u8(vi acc, vi w, vi x)
{
    vi w_even = _mm512_and_si512(w, _mm512_set1_epi16(0xff));
    vi x_even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8);
    vi odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
    return _mm512_add_epi32(acc, _mm512_add_epi32(_mm512_madd_epi16(w_even, x_even), odd));
}
/* 4 * 15 * 127 fits 16 bits. */
QF_INLINE void vi_dot_u4(vi *acc_lo, vi *acc_hi, vi lo, vi x_lo, vi hi, vi x_hi)
{
    (void)acc_hi;
    vi words = _mm512_add_epi16(_mm512_maddubs_epi16(lo, x_lo), _mm512_maddubs_epi16(hi, x_hi));
    *acc_lo = _mm512_add_epi32(*acc_lo, _mm512_madd_epi16(words, _mm512_set1_epi16(1)));
}
#endif
QF_INLINE void v_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

#endif
