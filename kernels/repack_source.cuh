/* Single elements of a linear layer as a checkpoint stores it: the formulas of csrc/model, one thread at a time. */
#ifndef QF_REPACK_SOURCE_CUH
#define QF_REPACK_SOURCE_CUH

#include <cuda_fp16.h>

#include "qf_repack.h"

/* What all elements of one row share. */
struct qf_repack_row {
    const void *weight, *scales;
    const uint32_t *zeros;
    const int32_t *columns;
    uint64_t seed; /* DUMMY: of this row */
    uint32_t dummy_column;
    qf_repack_format format, scale_format;
    uint32_t k, row, num_rows; /* row: among those in memory */
    uint32_t before, num_columns; /* columns in memory, and those of them before the part's */
    uint32_t log2_per_word, bits, group_size, num_groups, zero_bias;
    bool valid; /* false: padding */
};

/* --- made-up weights: the finaliser of SplitMix64 over a counter, as in csrc/model/dummy.c ------------------- */

#define QF_REPACK_STEP 0x9e3779b97f4a7c15ull
#define QF_REPACK_DUMMY_SCALE 0x1p-8f

__device__ __forceinline__ uint64_t qf_repack_mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* 16 nibbles a draw; a zero becomes 8. */
__device__ __forceinline__ uint32_t qf_repack_dummy_nibble(const qf_repack_row &r, uint32_t column)
{
    column += r.dummy_column;
    uint64_t bits = qf_repack_mix(r.seed + (uint64_t)(column / 16) * QF_REPACK_STEP);
    uint32_t nibble = (uint32_t)(bits >> (4 * (column % 16))) & 15u;
    return nibble == 0 ? 8u : nibble;
}

/* Eight values a draw: an odd number of at most 8 bits, times 2^-13. */
__device__ __forceinline__ float qf_repack_dummy_value(const qf_repack_row &r, uint32_t column)
{
    column += r.dummy_column;
    uint64_t bits = qf_repack_mix(r.seed + (uint64_t)(column / 8) * QF_REPACK_STEP);
    int32_t byte = (int8_t)(uint8_t)(bits >> (8 * (column % 8)));
    return (float)(2 * byte + 1) * 0x1p-13f;
}

/* --- rows --------------------------------------------------------------------------------------------------- */

/* The source of a fused row. */
__device__ __forceinline__ qf_repack_row qf_repack_find_row(const qf_repack_args &args, int32_t fused)
{
    int32_t index = 0, row = fused;
    if (args.interleave) {
        index = (fused / 8) % 2;
        row = fused / 16 * 8 + fused % 8;
    } else {
#pragma unroll
        for (int32_t i = 1; i < QF_REPACK_MAX_PARTS; i++) {
            index = i < args.num_parts && fused >= args.parts[i].row_start ? i : index;
        }
        row = fused - args.parts[index].row_start;
    }
    const qf_repack_part &part = args.parts[index];
    qf_repack_row r;
    r.weight = part.weight;
    r.scales = part.scales;
    r.zeros = part.zeros;
    r.columns = part.columns;
    r.seed = qf_repack_mix(part.dummy_seed + (uint64_t)(uint32_t)(row + part.dummy_row) * QF_REPACK_STEP);
    r.dummy_column = (uint32_t)part.dummy_column;
    r.format = part.format;
    r.scale_format = part.scale_format;
    r.k = (uint32_t)args.k;
    r.row = (uint32_t)(row - part.first_row);
    r.num_rows = (uint32_t)part.num_rows;
    r.before = (uint32_t)part.columns_before;
    r.num_columns = (uint32_t)part.num_columns;
    r.bits = (uint32_t)part.bits;
    r.log2_per_word = part.bits == 4 ? 3 : 2;
    r.group_size = (uint32_t)part.group_size;
    r.num_groups = (uint32_t)part.num_groups;
    r.zero_bias = (uint32_t)part.zero_bias;
    r.valid = row < part.n;
    return r;
}

/* --- elements ----------------------------------------------------------------------------------------------- */

__device__ __forceinline__ float qf_repack_f32(const void *values, qf_repack_format format, uint32_t index)
{
    switch (format) {
    case QF_REPACK_F32: return ((const float *)values)[index];
    case QF_REPACK_BF16: return __uint_as_float((uint32_t)((const uint16_t *)values)[index] << 16);
    default: return __half2float(__ushort_as_half(((const uint16_t *)values)[index]));
    }
}

/* Value i of a word whose values stand in `log2_per_word` equal shares, the lowest bits first. */
__device__ __forceinline__ uint32_t qf_repack_field(const qf_repack_row &r, uint32_t word, uint32_t i)
{
    uint32_t in_word = i & ((1u << r.log2_per_word) - 1u);
    return (word >> (r.bits * in_word)) & ((1u << r.bits) - 1u);
}

/* AWQ: column 2j of eight is nibble j of a word, column 2j + 1 nibble 4 + j. */
__device__ __forceinline__ uint32_t qf_repack_awq_field(uint32_t word, uint32_t i)
{
    uint32_t nibble = (i % 8) / 2 + 4 * (i % 2);
    return (word >> (4 * nibble)) & 15u;
}

/* The stored integer at a column of the part, in the order of the file. */
__device__ __forceinline__ uint32_t qf_repack_integer(const qf_repack_row &r, uint32_t column)
{
    const uint32_t *words = (const uint32_t *)r.weight;
    const uint32_t at = r.before + column;
    switch (r.format) {
    case QF_REPACK_AWQ: return qf_repack_awq_field(words[at * (r.num_rows / 8) + r.row / 8], r.row);
    case QF_REPACK_GPTQ: return qf_repack_field(r, words[(at >> r.log2_per_word) * r.num_rows + r.row], at);
    case QF_REPACK_COMPRESSED: {
        uint32_t row_words = (r.num_columns + (1u << r.log2_per_word) - 1u) >> r.log2_per_word;
        return qf_repack_field(r, words[r.row * row_words + (at >> r.log2_per_word)], at);
    }
    default: return qf_repack_dummy_nibble(r, column);
    }
}

__device__ __forceinline__ float qf_repack_scale(const qf_repack_row &r, uint32_t group)
{
    if (r.format == QF_REPACK_DUMMY) {
        return QF_REPACK_DUMMY_SCALE;
    }
    uint32_t index = r.format == QF_REPACK_COMPRESSED ? r.row * r.num_groups + group : group * r.num_rows + r.row;
    return qf_repack_f32(r.scales, r.scale_format, index);
}

__device__ __forceinline__ uint32_t qf_repack_zero(const qf_repack_row &r, uint32_t group)
{
    if (r.zeros == nullptr) {
        return 1u << (r.bits - 1u);
    }
    switch (r.format) {
    case QF_REPACK_AWQ: return qf_repack_awq_field(r.zeros[group * (r.num_rows / 8) + r.row / 8], r.row);
    case QF_REPACK_GPTQ: {
        uint32_t word = r.zeros[group * (r.num_rows >> r.log2_per_word) + (r.row >> r.log2_per_word)];
        return (qf_repack_field(r, word, r.row) + r.zero_bias) & ((1u << r.bits) - 1u);
    }
    default: return qf_repack_field(r, r.zeros[(r.row >> r.log2_per_word) * r.num_groups + group], r.row);
    }
}

/* The weight at a column of the model, as qf_linear_source_read_f32() gives it: one rounding. Any column in memory: those
 * before the part's are negative. */
__device__ __forceinline__ float qf_repack_value(const qf_repack_row &r, uint32_t column)
{
    if (r.format <= QF_REPACK_F16) {
        return qf_repack_f32(r.weight, r.format, r.row * r.num_columns + r.before + column);
    }
    if (r.format == QF_REPACK_DUMMY && r.bits == 16) {
        return qf_repack_dummy_value(r, column);
    }
    uint32_t group = r.columns != nullptr ? (uint32_t)r.columns[column] : column / r.group_size;
    int32_t difference = (int32_t)qf_repack_integer(r, column) - (int32_t)qf_repack_zero(r, group);
    return __fmul_rn(qf_repack_scale(r, group), (float)difference);
}

/* Round to nearest even; NaN stays NaN: bit by bit what the host does. */
__device__ __forceinline__ uint32_t qf_repack_bf16(float value)
{
    uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (bits >> 16) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

/* Columns `column` (even) and the next as a pair of bf16; zeros from k on and in padding rows. */
__device__ __forceinline__ uint32_t qf_repack_bf16_pair(const qf_repack_row &r, uint32_t column)
{
    if (!r.valid || column >= r.k) {
        return 0;
    }
    if (r.format == QF_REPACK_BF16 && (r.k | r.num_columns | r.before) % 2 == 0) {
        return ((const uint32_t *)r.weight)[(r.row * r.num_columns + r.before + column) / 2];
    }
    uint32_t low = qf_repack_bf16(qf_repack_value(r, column));
    uint32_t high = column + 1 < r.k ? qf_repack_bf16(qf_repack_value(r, column + 1)) : 0u;
    return low | (high << 16);
}

/* The integer at stored column i of a row that is packed as it is. Padding columns get the zero point: weight 0. */
__device__ __forceinline__ uint32_t qf_repack_packed(const qf_repack_row &r, uint32_t i)
{
    if (!r.valid) {
        return 0;
    }
    if (i >= r.k) {
        return qf_repack_zero(r, r.num_groups - 1);
    }
    return qf_repack_integer(r, r.columns != nullptr ? (uint32_t)r.columns[i] : i);
}

/* fp16 scale in the lower half, bf16 zero point (at most 255: exact) in the upper. */
__device__ __forceinline__ uint32_t qf_repack_scale_word(float scale, uint32_t zero)
{
    return (uint32_t)__half_as_ushort(__float2half_rn(scale)) | (__float_as_uint((float)zero) & 0xffff0000u);
}

#endif
