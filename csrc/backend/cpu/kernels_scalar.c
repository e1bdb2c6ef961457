/* The scalar reference: the same kernels over sixteen lanes of plain C. */
#include "backend/cpu/kernels.h"

#include "backend/cpu/simd_scalar.h"

#define QF_KERNELS_NAME qf_cpu_kernels_scalar
#define QF_ROWS_PER_BLOCK 2
#define QF_TWO_TILE_ROWS 0
#define QF_FOR_EACH_ROW_COUNT(F) F(1) F(2)

#include "backend/cpu/linear_body.h"
#include "backend/cpu/math_body.h"
#include "backend/cpu/elementwise_body.h"
#include "backend/cpu/unpack_body.h"
#include "backend/cpu/attention_body.h"
#include "backend/cpu/kernels_table.h"
