/* The launcher that the weights' loader needs: raw tensors of a checkpoint to the kernels' layouts (qf_kernels.h). */
#ifndef QF_REPACK_H
#define QF_REPACK_H

#include "qf_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum qf_repack_format {
    QF_REPACK_F32 = 0, /* (num_rows, num_columns) */
    QF_REPACK_BF16,
    QF_REPACK_F16,
    QF_REPACK_AWQ,        /* words (num_columns, num_rows / 8); scales (num_groups, num_rows),
                             zeros (num_groups, num_rows / 8) */
    QF_REPACK_GPTQ,       /* words (ceil(num_columns / per_word), num_rows), per_word = 32 / bits;
                             scales (num_groups, num_rows), zeros (num_groups, num_rows / per_word) */
    QF_REPACK_COMPRESSED, /* words (num_rows, ceil(num_columns / per_word)); scales (num_rows, num_groups),
                             zeros (ceil(num_rows / per_word), num_groups) */
    QF_REPACK_DUMMY       /* no memory: made up from the seed and the position */
} qf_repack_format;

#define QF_REPACK_MAX_PARTS 3

/* One linear of a fused one, or a part of it. Rows first_row .. first_row + num_rows - 1 of it are in device memory, as the
 * file has them, without the others; the first one's number in the file is a multiple of 8, so a part's first_row may be
 * as little as -7. Of the columns there are num_columns, of which the first columns_before come before the part's own:
 * words of the file are never cut, nor groups that are to be rounded. */
typedef struct qf_repack_part {
    const void *weight;     /* aligned to 4 bytes, like all of these */
    const void *scales;
    const uint32_t *zeros;  /* NULL: every zero point is 8 (4 bits) or 128 (8 bits) */
    const int32_t *columns; /* (k) or NULL. To 4 or 8 bits: column i of the output is column columns[i] of the file.
                               Else: the group of each column, which is otherwise column / group_size */
    uint64_t dummy_seed;
    int32_t dummy_row, dummy_column; /* where the part begins in what is made up */
    qf_repack_format format;
    int32_t bits;                  /* 4 or 8; DUMMY also 16; 16 or 32 for dense formats */
    qf_repack_format scale_format; /* F32, BF16 or F16 */
    int32_t row_start;             /* where its rows begin among the fused rows, unless interleaved */
    int32_t n;                     /* all rows */
    int32_t first_row, num_rows;
    int32_t columns_before, num_columns;
    int32_t group_size, num_groups;
    int32_t zero_bias; /* GPTQ version 1: 1 is added to each stored zero point */
} qf_repack_part;

typedef struct qf_repack_args {
    qf_repack_part parts[QF_REPACK_MAX_PARTS];
    int32_t num_parts;
    bool interleave; /* two parts: row tile i is rows 8i .. 8i + 7 of the first, then of the second */
    bool rows;       /* row by row, (rows, k), not fragments: bits 16 (bf16) or 32 (float32) */
    int32_t quantize_bits;       /* 4, 8: round dense parts to so many bits, as qf_quantize_rows() does; 0: do not */
    int32_t quantize_group_size; /* in groups of 32, 64, 128 columns, counted from the first in memory */
    int32_t bits;    /* of the output: with quantize_bits the same, or 16: what the rounded weights stand for */
    int32_t group_size; /* of the output: 32, 64, 128 (4 and 8 bits); each lies in one of the source */
    int32_t k, k_packed;
    int32_t first_row, num_rows; /* fused rows to write; fragments: multiples of 16, padding included */
    float inverse_multiplier;    /* scales are stored times this; 1 with quantize_bits, whose scales are fp16 values */
    void *data;       /* of the whole fused linear: 16-byte aligned */
    uint32_t *scales; /* of the whole fused linear, for 4 and 8 bits */
} qf_repack_args;

qf_status qf_cuda_repack(const qf_repack_args *args, cudaStream_t stream, qf_error *err);

#ifdef __cplusplus
}
#endif

#endif
