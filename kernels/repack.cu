/* Raw tensors of a checkpoint -> what the kernels read, once, at load.
 *
 *   fragments:  (row tile, k block) units of 16 x 128 weights in 4, 8 or 16 bits, and their scales (qf_kernels.h)
 *   rows:       (rows, k) of float32 or bf16: the reference's weights, the embedding
 *   quantize:   fragments of 4 or 8 bits from float weights, by the search of csrc/model/quantize.c
 *
 *   w = scale * (q - zero), in float32, then rounded where the output has 16 bits
 *
 * Layouts of the input: qf_repack.h. Fused rows are looked up one by one: a row tile may hold rows of several linears.
 *
 * Roofline: input and output are read and written once; at 4.4 TB/s a 7B model in 4 bits (3.8 GB, twice) takes 1.7 ms.
 * It arrives over PCIe at 50 GB/s at best, so repacking is hidden behind the copies if it reaches a few times that:
 * the target is 300 GB/s of raw bytes, and code that reads like the formats' own formulas. Quantising costs some 20
 * passes over registers (0.2 ms a million groups); its raw bytes are those of 16 bits.
 *
 * The plan: fragments: a warp makes one unit, 8 row tiles a block, so that neighbouring words along n are read by the
 * same block; each lane fetches the values of its own registers, one at a time, and stores 16 bytes.
 *
 *        k block = blockIdx.x
 *       +-----------+
 *       |  warp 0   |  row tile 8 * blockIdx.y
 *       |  ...      |
 *       |  warp 7   |  row tile 8 * blockIdx.y + 7
 *       +-----------+
 *
 * quantize: a block makes one unit: 16 threads search the grid of one (row, group); the codes meet in shared memory,
 * from where they are stored as fragments. A rank's columns may begin and end inside a group, which is rounded whole, so
 * a unit may lie in one group more than it has columns for. rows: a block makes one row.
 *
 * Measured: see PERF.md. */
#include "common/launch.cuh"
#include "qf_repack.h"
#include "repack_quantize.cuh"
#include "repack_source.cuh"

#define QF_REPACK_WARPS 8

/* --- fragments ---------------------------------------------------------------------------------------------- */

/* k within a block of the lower value of register i of a lane (t = lane % 4) in k16 step `step`. */
__device__ __forceinline__ uint32_t qf_repack_column(uint32_t step, uint32_t t, uint32_t i)
{
    return 16 * step + 2 * t + 8 * (i / 2);
}

/* Word j of four, chosen without indexing. */
__device__ __forceinline__ void qf_repack_put(uint4 &v, uint32_t j, uint32_t word)
{
    v.x = j == 0 ? word : v.x;
    v.y = j == 1 ? word : v.y;
    v.z = j == 2 ? word : v.z;
    v.w = j == 3 ? word : v.w;
}

__device__ __forceinline__ void qf_repack_unit_4(const qf_repack_row (&rows)[2], uint32_t k0, uint32_t lane, uint4 *out)
{
#pragma unroll 1
    for (uint32_t half = 0; half < 2; half++) {
        uint4 v = {};
#pragma unroll 1
        for (uint32_t j = 0; j < 4; j++) {
            uint32_t word = 0;
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                uint32_t column = k0 + qf_repack_column(4 * half + j, lane % 4, i);
                word |= qf_repack_packed(rows[i % 2], column) << (4 * i);
                word |= qf_repack_packed(rows[i % 2], column + 1) << (4 * i + 16);
            }
            qf_repack_put(v, j, word);
        }
        out[half * 32 + lane] = v;
    }
}

__device__ __forceinline__ void qf_repack_unit_8(const qf_repack_row (&rows)[2], uint32_t k0, uint32_t lane, uint4 *out)
{
#pragma unroll 1
    for (uint32_t quarter = 0; quarter < 4; quarter++) {
        uint4 v = {};
#pragma unroll 1
        for (uint32_t j = 0; j < 4; j++) { /* two registers a word */
            uint32_t word = 0;
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                uint32_t column = k0 + qf_repack_column(2 * quarter + j / 2, lane % 4, 2 * (j % 2) + i);
                word |= qf_repack_packed(rows[i], column) << (16 * i);
                word |= qf_repack_packed(rows[i], column + 1) << (16 * i + 8);
            }
            qf_repack_put(v, j, word);
        }
        out[quarter * 32 + lane] = v;
    }
}

__device__ __forceinline__ void qf_repack_unit_16(const qf_repack_row (&rows)[2], uint32_t k0, uint32_t lane,
                                                  uint4 *out)
{
#pragma unroll 1
    for (uint32_t step = 0; step < 8; step++) {
        uint4 v;
        v.x = qf_repack_bf16_pair(rows[0], k0 + qf_repack_column(step, lane % 4, 0));
        v.y = qf_repack_bf16_pair(rows[1], k0 + qf_repack_column(step, lane % 4, 1));
        v.z = qf_repack_bf16_pair(rows[0], k0 + qf_repack_column(step, lane % 4, 2));
        v.w = qf_repack_bf16_pair(rows[1], k0 + qf_repack_column(step, lane % 4, 3));
        out[step * 32 + lane] = v;
    }
}

/* The scale words of a unit: (128 / group_size, 16 rows). */
__device__ __forceinline__ void qf_repack_unit_scales(const qf_repack_args &args, uint32_t tile, uint32_t k0,
                                                      uint32_t lane, uint32_t *out)
{
    uint32_t count = 16 * (128 / (uint32_t)args.group_size);
    for (uint32_t i = lane; i < count; i += 32) {
        qf_repack_row r = qf_repack_find_row(args, (int32_t)(16 * tile + i % 16));
        uint32_t column = k0 + i / 16 * (uint32_t)args.group_size;
        uint32_t word = 0;
        if (r.valid && column < r.k) {
            uint32_t group = column / r.group_size;
            word = qf_repack_scale_word(__fmul_rn(qf_repack_scale(r, group), args.inverse_multiplier),
                                        qf_repack_zero(r, group));
        }
        out[i] = word;
    }
}

template <int bits>
static __global__ void __launch_bounds__(32 * QF_REPACK_WARPS, 2)
    qf_repack_kernel(const __grid_constant__ qf_repack_args args)
{
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t tile_of_call = blockIdx.y * QF_REPACK_WARPS + warp;
    if (tile_of_call >= (uint32_t)args.num_rows / 16) {
        return;
    }
    uint32_t tile = (uint32_t)args.first_row / 16 + tile_of_call;
    uint32_t k0 = 128 * blockIdx.x;
    size_t unit = (size_t)tile * ((uint32_t)args.k_packed / 128) + blockIdx.x;
    const qf_repack_row rows[2] = {qf_repack_find_row(args, (int32_t)(16 * tile + lane / 4)),
                                   qf_repack_find_row(args, (int32_t)(16 * tile + lane / 4 + 8))};
    uint4 *out = (uint4 *)args.data + unit * (16 * bits);
    if (bits == 4) {
        qf_repack_unit_4(rows, k0, lane, out);
    } else if (bits == 8) {
        qf_repack_unit_8(rows, k0, lane, out);
    } else {
        qf_repack_unit_16(rows, k0, lane, out);
    }
    if (bits <= 8) {
        uint32_t words = 16 * (128 / (uint32_t)args.group_size);
        qf_repack_unit_scales(args, tile, k0, lane, args.scales + unit * words);
    }
}

/* --- quantising --------------------------------------------------------------------------------------------- */

/* 4 and 8 bits: integers; 16: bf16. */
template <int bits> struct qf_repack_codes {
    typedef uint8_t type;
};
template <> struct qf_repack_codes<16> {
    typedef uint16_t type;
};
#define QF_REPACK_CODES_WIDTH (128 + 4) /* four more: rows start in different banks */

/* Fragments from the codes of a unit. */
template <int bits, typename code_type>
__device__ __forceinline__ void qf_repack_store_codes(const code_type (&q)[16][QF_REPACK_CODES_WIDTH], uint32_t thread,
                                                      uint4 *out)
{
    uint32_t lane = thread % 32, part = thread / 32; /* half, quarter or eighth */
    if (part >= bits / 2) {
        return;
    }
    uint32_t word[4];
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
        word[j] = 0;
#pragma unroll
        for (uint32_t i = 0; i < 16 / bits; i++) {
            uint32_t step = bits == 4 ? 4 * part + j : bits == 8 ? 2 * part + j / 2 : part;
            uint32_t reg = bits == 4 ? i : bits == 8 ? 2 * (j % 2) + i : j;
            uint32_t column = qf_repack_column(step, lane % 4, reg);
            const code_type *code = &q[lane / 4 + 8 * (reg % 2)][column];
            word[j] |= bits == 4   ? (uint32_t)code[0] << (4 * i) | (uint32_t)code[1] << (4 * i + 16)
                       : bits == 8 ? (uint32_t)code[0] << (16 * i) | (uint32_t)code[1] << (16 * i + 8)
                                   : (uint32_t)code[0] | (uint32_t)code[1] << 16;
        }
    }
    out[part * 32 + lane] = make_uint4(word[0], word[1], word[2], word[3]);
}

/* What a rounded weight is stored as. */
template <int bits>
__device__ __forceinline__ typename qf_repack_codes<bits>::type qf_repack_round(const qf_quantize_grid &g, float w)
{
    const float nearest = qf_quantize_nearest(g, w);
    return bits == 16 ? (typename qf_repack_codes<bits>::type)qf_repack_bf16(__fmul_rn(nearest, g.scale))
                      : (typename qf_repack_codes<bits>::type)__fsub_rn(nearest, g.low);
}

/* The block's, of a kernel whose blocks make one each. */
__device__ __forceinline__ size_t qf_repack_unit_of(const qf_repack_args &args)
{
    return (size_t)((uint32_t)args.first_row / 16 + blockIdx.y) * ((uint32_t)args.k_packed / 128) + blockIdx.x;
}

template <int bits>
static __global__ void __launch_bounds__(256) qf_repack_quantize_kernel(const __grid_constant__ qf_repack_args args)
{
    __shared__ typename qf_repack_codes<bits>::type q[16][QF_REPACK_CODES_WIDTH];
    const uint32_t member = threadIdx.x % QF_QUANTIZE_THREADS;
    const uint32_t k0 = 128 * blockIdx.x, group_size = (uint32_t)args.quantize_group_size;
    /* The first column of the unit's first group, in the unit: 0 or before it. */
    const int32_t first = -(int32_t)((k0 + (uint32_t)args.parts[0].columns_before) % group_size);
    qf_quantize_group group;
    group.count = (int32_t)(group_size / QF_QUANTIZE_THREADS);
    group.mask = 0xffffu << (threadIdx.x & 16u);
    group.max = (float)((1 << args.quantize_bits) - 1);
#pragma unroll 1
    for (uint32_t item = threadIdx.x / QF_QUANTIZE_THREADS;; item += 256 / QF_QUANTIZE_THREADS) {
        const int32_t begin = first + (int32_t)(item / 16 * group_size); /* of the group, in the unit */
        if (begin >= 128) {
            break;
        }
        const qf_repack_row r = qf_repack_find_row(args, args.first_row + 16 * (int32_t)blockIdx.y + (int32_t)(item % 16));
#pragma unroll
        for (int i = 0; i < QF_QUANTIZE_VALUES; i++) {
            const uint32_t column = k0 + (uint32_t)(begin + i * QF_QUANTIZE_THREADS) + member;
            const bool there = i < group.count && r.valid && column + r.before < r.num_columns;
            group.w[i] = there ? qf_repack_value(r, column) : 0.0f;
        }
        const qf_quantize_grid g = qf_quantize_search(group);
#pragma unroll
        for (int i = 0; i < QF_QUANTIZE_VALUES; i++) {
            const uint32_t column = (uint32_t)(begin + i * QF_QUANTIZE_THREADS) + member;
            if (i < group.count && column < 128) {
                q[item % 16][column] = qf_repack_round<bits>(g, k0 + column < (uint32_t)args.k ? group.w[i] : 0.0f);
            }
        }
        /* Each packed group's scale by a thread of its own. */
        const uint32_t packed_size = (uint32_t)args.group_size, column = (uint32_t)begin + member * packed_size;
        if (bits <= 8 && column < 128 && member * packed_size < group_size) {
            const bool padding = !r.valid || k0 + column >= (uint32_t)args.k;
            args.scales[qf_repack_unit_of(args) * (2048 / packed_size) + column / packed_size * 16 + item % 16] =
                padding ? 0u : qf_repack_scale_word(g.scale, (uint32_t)-g.low);
        }
    }
    __syncthreads();
    qf_repack_store_codes<bits>(q, threadIdx.x, (uint4 *)args.data + qf_repack_unit_of(args) * (16 * bits));
}

/* --- rows --------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(256) qf_repack_rows_kernel(const __grid_constant__ qf_repack_args args)
{
    uint32_t row = (uint32_t)args.first_row + blockIdx.x;
    const qf_repack_row r = qf_repack_find_row(args, (int32_t)row);
    for (uint32_t column = threadIdx.x; column < r.k; column += blockDim.x) {
        float value = qf_repack_value(r, column);
        if (args.bits == 32) {
            ((float *)args.data)[(size_t)row * r.k + column] = value;
        } else {
            ((uint16_t *)args.data)[(size_t)row * r.k + column] = (uint16_t)qf_repack_bf16(value);
        }
    }
}

/* --- dispatch ----------------------------------------------------------------------------------------------- */

static qf_status qf_repack_check_part(const qf_repack_args *args, int32_t index, qf_error *err)
{
    const qf_repack_part *part = &args->parts[index];
    bool dense = part->format <= QF_REPACK_F16;
    bool floats = dense || (part->format == QF_REPACK_DUMMY && part->bits == 16);
    if (part->format < QF_REPACK_F32 || part->format > QF_REPACK_DUMMY || part->scale_format > QF_REPACK_F16) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: part %d has format %d, scales %d: 0 to %d, 0 to %d",
                       index, (int)part->format, (int)part->scale_format, (int)QF_REPACK_DUMMY, (int)QF_REPACK_F16);
    }
    if (!floats && part->bits != 4 && (part->bits != 8 || part->format == QF_REPACK_DUMMY)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: part %d of format %d has %d bits: 4 or 8", index,
                       (int)part->format, part->bits);
    }
    if (!floats && (part->group_size < 1 || part->num_groups < 1)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: part %d has %d groups of %d: at least 1", index,
                       part->num_groups, part->group_size);
    }
    if (part->columns_before < 0 || part->num_columns - part->columns_before < args->k) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: part %d has %d columns, %d of them before its own %d", index,
                       part->num_columns, part->columns_before, args->k);
    }
    if (part->n < 1 || part->first_row < -7 || part->num_rows < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: part %d has rows %d + %d of %d: from a multiple of 8",
                       index, part->first_row, part->num_rows, part->n);
    }
    if ((int64_t)part->num_rows * part->num_columns > INT32_MAX && part->format != QF_REPACK_DUMMY) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: part %d has %d x %d weights at once: fewer than 2^31",
                       index, part->num_rows, part->num_columns);
    }
    bool has_memory = part->weight != NULL && (dense || part->scales != NULL);
    if (part->num_rows > 0 && part->format != QF_REPACK_DUMMY && !has_memory) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: part %d has a null pointer", index);
    }
    if (args->quantize_bits != 0 && (!floats || part->columns_before != args->parts[0].columns_before)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "repack: part %d of format %d with %d columns before its own cannot be rounded: dense, with %d", index,
                       (int)part->format, part->columns_before, args->parts[0].columns_before);
    }
    if (args->rows || args->bits == 16) {
        return QF_OK; /* from anything */
    }
    if (floats != (args->quantize_bits != 0) || (!floats && part->bits != args->bits)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: part %d of format %d and %d bits cannot become %d bits",
                       index, (int)part->format, part->bits, args->bits);
    }
    if (!floats && part->num_groups > 1 && part->group_size % args->group_size != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: part %d has groups of %d, not multiples of %d", index,
                       part->group_size, args->group_size);
    }
    return QF_OK;
}

static qf_status qf_repack_check_rounding(const qf_repack_args *args, qf_error *err)
{
    const int32_t bits = args->quantize_bits, group = args->quantize_group_size;
    if (bits == 0) {
        return QF_OK;
    }
    if ((bits != 4 && bits != 8) || args->rows || (args->bits != bits && args->bits != 16)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "repack: rounded to %d bits and stored in %d, in rows: %d; 4 or 8, stored so or in 16, in fragments",
                       bits, args->bits, args->rows ? 1 : 0);
    }
    if ((group != 32 && group != 64 && group != 128) ||
        (args->bits <= 8 && (group % args->group_size != 0 || args->parts[0].columns_before % args->group_size != 0))) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "repack: rounded in groups of %d from %d columns before, stored in groups of %d: 32, 64 or 128, "
                       "whole ones", group, args->parts[0].columns_before, args->group_size);
    }
    return QF_OK;
}

static qf_status qf_repack_check(const qf_repack_args *args, qf_error *err)
{
    bool fragments = !args->rows;
    bool packed = fragments && (args->bits == 4 || args->bits == 8);
    if (args->num_parts < 1 || args->num_parts > QF_REPACK_MAX_PARTS || (args->interleave && args->num_parts != 2) ||
        (args->interleave && args->rows)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: %d parts, interleaved: %d; 1 to %d, two interleaved",
                       args->num_parts, args->interleave ? 1 : 0, QF_REPACK_MAX_PARTS);
    }
    if (!packed && args->bits != 16 && (fragments || args->bits != 32)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: %d bits: 4, 8, 16 in fragments, 16, 32 in rows",
                       args->bits);
    }
    if (packed && args->group_size != 32 && args->group_size != 64 && args->group_size != 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: group size %d: 32, 64 or 128", args->group_size);
    }
    if (args->k < 1 || (fragments && (args->k_packed < args->k || args->k_packed % 128 != 0))) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: k is %d, %d as packed: a multiple of 128", args->k,
                       args->k_packed);
    }
    QF_TRY(qf_repack_check_rounding(args, err));
    int32_t unit = fragments ? 16 : 1;
    if (args->first_row < 0 || args->num_rows < 0 || args->first_row % unit != 0 || args->num_rows % unit != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: rows %d + %d: multiples of %d", args->first_row,
                       args->num_rows, unit);
    }
    if (args->data == NULL || (packed && args->scales == NULL) || (uintptr_t)args->data % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "repack: output %p, scales %p: not null, aligned to 16 bytes",
                       args->data, (const void *)args->scales);
    }
    for (int32_t i = 0; i < args->num_parts; i++) {
        QF_TRY(qf_repack_check_part(args, i, err));
    }
    return QF_OK;
}

static qf_status qf_repack_launch(const qf_repack_args *args, cudaStream_t stream, qf_error *err)
{
    unsigned tiles = (unsigned)args->num_rows / 16, blocks = (unsigned)args->k_packed / 128;
    if (args->rows) {
        return qf_launch("repack rows", qf_repack_rows_kernel, dim3((unsigned)args->num_rows), dim3(256), 0, false,
                         stream, err, *args);
    }
    if (args->quantize_bits != 0) {
        return qf_launch("repack quantize",
                         args->bits == 4   ? qf_repack_quantize_kernel<4>
                         : args->bits == 8 ? qf_repack_quantize_kernel<8>
                                           : qf_repack_quantize_kernel<16>,
                         dim3(blocks, tiles), dim3(256), 0, false, stream, err, *args);
    }
    return qf_launch("repack",
                     args->bits == 4   ? qf_repack_kernel<4>
                     : args->bits == 8 ? qf_repack_kernel<8>
                                       : qf_repack_kernel<16>,
                     dim3(blocks, (tiles + QF_REPACK_WARPS - 1) / QF_REPACK_WARPS), dim3(32 * QF_REPACK_WARPS), 0,
                     false, stream, err, *args);
}

extern "C" qf_status qf_cuda_repack(const qf_repack_args *args, cudaStream_t stream, qf_error *err)
{
    QF_TRY(qf_repack_check(args, err));
    return args->num_rows == 0 ? QF_OK : qf_repack_launch(args, stream, err);
}
