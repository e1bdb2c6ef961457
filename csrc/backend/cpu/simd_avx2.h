/* Sixteen lanes in two ymm registers. The contract of each function is in simd_scalar.h. */
#ifndef QF_BACKEND_CPU_SIMD_AVX2_H
#define QF_BACKEND_CPU_SIMD_AVX2_H

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

typedef struct vf { __m256 a, b; } vf;
typedef struct vi { __m256i a, b; } vi;

#define VF(A, B) ((vf){(A), (B)})
#define VI(A, B) ((vi){(A), (B)})

QF_INLINE vf vf_set1(float x) { __m256 v = _mm256_set1_ps(x); return VF(v, v); }
QF_INLINE vf vf_load(const float *p) { return VF(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
QF_INLINE void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
QF_INLINE vf vf_load_part(const float *p, int n)
{
    float lanes[16] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return vf_load(lanes);
}
QF_INLINE void vf_store_part(float *p, vf x, int n)
{
    float lanes[16];
    vf_store(lanes, x);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}
QF_INLINE __m256 v_widen_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
QF_INLINE vf vf_load_bf16(const uint16_t *p) { return VF(v_widen_bf16(p), v_widen_bf16(p + 8)); }
QF_INLINE vf vf_load_f16(const uint16_t *p)
{
    return VF(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)),
              _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p + 8))));
}
QF_INLINE vf vf_add(vf x, vf y) { return VF(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
QF_INLINE vf vf_sub(vf x, vf y) { return VF(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
QF_INLINE vf vf_mul(vf x, vf y) { return VF(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
QF_INLINE vf vf_div(vf x, vf y) { return VF(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
QF_INLINE vf vf_fma(vf x, vf y, vf z)
{
    return VF(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
QF_INLINE vf vf_fnma(vf x, vf y, vf z)
{
    return VF(_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b));
}
QF_INLINE vf vf_max(vf x, vf y) { return VF(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
QF_INLINE vf vf_select_lt(vf p, vf q, vf x, vf y)
{
    return VF(_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(p.a, q.a, _CMP_LT_OQ)),
              _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(p.b, q.b, _CMP_LT_OQ)));
}
QF_INLINE __m256 v_range(__m256 x, __m256i lane, int lo, int hi, float other)
{
    __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane);
    __m256i inside = _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane));
    return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(inside));
}
QF_INLINE vf vf_select_range(vf x, int lo, int hi, float other)
{
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return VF(v_range(x.a, lane, lo, hi, other), v_range(x.b, lane, lo - 8, hi - 8, other));
}
QF_INLINE float vf_reduce_add(vf x)
{
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
QF_INLINE float vf_reduce_max(vf x)
{
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

QF_INLINE __m256i v_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
QF_INLINE vi vi_set1(int32_t x) { __m256i v = _mm256_set1_epi32(x); return VI(v, v); }
QF_INLINE vi vi_load(const void *p) { return VI(v_load(p), v_load((const char *)p + 32)); }
QF_INLINE vi vi_set1_4u8(const void *p)
{
    int32_t x;
    memcpy(&x, p, sizeof x);
    return vi_set1(x);
}
QF_INLINE vi vi_load_u8(const uint8_t *p)
{
    return VI(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)),
              _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p + 8))));
}
QF_INLINE void vi_store(int32_t *p, vi x)
{
    _mm256_storeu_si256((__m256i *)(void *)p, x.a);
    _mm256_storeu_si256((__m256i *)(void *)(p + 8), x.b);
}
QF_INLINE vi vi_load_s8(const int8_t *p)
{
    return VI(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)),
              _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p + 8))));
}
QF_INLINE vf vf_load_e4m3(const uint8_t *p)
{
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
    __m256i halves = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((int16_t)0xbf80));
    return VF(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
}
QF_INLINE __m256 v_lookup(__m256 low, __m256 high, __m256i index)
{
    __m256 from_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), from_high);
}
QF_INLINE vf vf_lookup(vf table, vi index)
{
    return VF(v_lookup(table.a, table.b, index.a), v_lookup(table.a, table.b, index.b));
}
QF_INLINE vi vi_add(vi x, vi y) { return VI(_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
QF_INLINE vi vi_sub(vi x, vi y) { return VI(_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)); }
QF_INLINE vi vi_mul(vi x, vi y) { return VI(_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)); }
QF_INLINE vi vi_and(vi x, vi y) { return VI(_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)); }
QF_INLINE vi vi_max(vi x, vi y) { return VI(_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)); }
QF_INLINE vi vi_srl(vi x, int n) { return VI(_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)); }
QF_INLINE vi vi_sll(vi x, int n) { return VI(_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)); }
QF_INLINE int32_t vi_reduce_max(vi x)
{
    __m256i eight = _mm256_max_epi32(x.a, x.b);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
QF_INLINE vf vf_from_vi(vi x) { return VF(_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
QF_INLINE vi vi_round_vf(vf x)
{
    return VI(_mm256_cvttps_epi32(_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)),
              _mm256_cvttps_epi32(_mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
}
QF_INLINE vi vi_bits(vf x) { return VI(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)); }
QF_INLINE vf vf_bits(vi x) { return VF(_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)); }
QF_INLINE void vi_store_s8(int8_t *p, vi x)
{
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)(void *)p, bytes);
}

/* vpmaddubsw would saturate on weights above 128, so bytes are widened: even and odd ones apart. */
QF_INLINE __m256i v_dot_u8(__m256i acc, __m256i w, __m256i x)
{
    __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff));
    __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(w_even, x_even), odd));
}
QF_INLINE vi vi_dot_u8(vi acc, vi w, vi x) { return VI(v_dot_u8(acc.a, w.a, x.a), v_dot_u8(acc.b, w.b, x.b)); }
/* 4 * 15 * 127 fits 16 bits. */
QF_INLINE __m256i v_dot_u4(__m256i acc, __m256i lo, __m256i x_lo, __m256i hi, __m256i x_hi)
{
    __m256i words = _mm256_add_epi16(_mm256_maddubs_epi16(lo, x_lo), _mm256_maddubs_epi16(hi, x_hi));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
QF_INLINE void vi_dot_u4(vi *acc_lo, vi *acc_hi, vi lo, vi x_lo, vi hi, vi x_hi)
{
    (void)acc_hi;
    *acc_lo = VI(v_dot_u4(acc_lo->a, lo.a, x_lo.a, hi.a, x_hi.a), v_dot_u4(acc_lo->b, lo.b, x_lo.b, hi.b, x_hi.b));
}
QF_INLINE void v_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

#endif
