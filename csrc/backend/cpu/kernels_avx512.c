/* The kernels for AVX-512 F, BW, DQ, VL without VNNI. */
#include "backend/cpu/kernels.h"

#if QF_CPU_X86

#include <immintrin.h>

#include "base/dtype.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "backend/cpu/simd_avx512.h"

#define QF_KERNELS_NAME qf_cpu_kernels_avx512
#define QF_ROWS_PER_BLOCK 8
#define QF_TWO_TILE_ROWS 8
#define QF_FOR_EACH_ROW_COUNT(F) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8)

#include "backend/cpu/linear_body.h"
#include "backend/cpu/math_body.h"
#include "backend/cpu/elementwise_body.h"
#include "backend/cpu/unpack_body.h"
#include "backend/cpu/attention_body.h"
#include "backend/cpu/kernels_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
