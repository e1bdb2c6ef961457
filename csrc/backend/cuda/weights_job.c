/* Which bytes of the files a job needs, and where they stand on the device. */
#include "backend/cuda/weights_job.h"

#include <string.h>

/* AWQ and GPTQ store W transposed: some rows of it are a strip of every line of the file, and it is read fastest
 * whole. */
#define TRANSPOSED_JOB_BYTES ((size_t)96 << 20)
#define JOB_BYTES ((size_t)32 << 20)

static int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }

static int32_t max_i32(int32_t a, int32_t b) { return a > b ? a : b; }

void qf_cuda_fused_get(const qf_checkpoint *checkpoint, int32_t layer, qf_cuda_linear_id id, bool float32,
                       qf_cuda_fused *out)
{
    static const struct {
        int32_t num_parts;
        qf_linear_id parts[QF_REPACK_MAX_PARTS];
    } table[] = {
        [QF_CUDA_QKV] = {3, {QF_Q_PROJ, QF_K_PROJ, QF_V_PROJ}},
        [QF_CUDA_O] = {1, {QF_O_PROJ}},
        [QF_CUDA_GATE_UP] = {2, {QF_GATE_PROJ, QF_UP_PROJ}},
        [QF_CUDA_DOWN] = {1, {QF_DOWN_PROJ}},
        [QF_CUDA_HEAD] = {1, {QF_LM_HEAD}},
    };
    *out = (qf_cuda_fused){.num_parts = table[id].num_parts, .interleave = id == QF_CUDA_GATE_UP && !float32};
    for (int32_t i = 0; i < out->num_parts; i++) {
        out->parts[i] = qf_checkpoint_linear(checkpoint, layer, table[id].parts[i]);
    }
}

qf_cuda_linear_layout *qf_cuda_layer_linear(qf_cuda_layer_layout *layer, qf_cuda_linear_id id)
{
    switch (id) {
    case QF_CUDA_QKV: return &layer->qkv;
    case QF_CUDA_O: return &layer->o;
    case QF_CUDA_GATE_UP: return &layer->gate_up;
    default: return &layer->down;
    }
}

static int32_t row_start(const qf_cuda_fused *fused, int32_t part)
{
    int32_t start = 0;
    for (int32_t i = 0; i < part; i++) {
        start += fused->parts[i]->n;
    }
    return start;
}

int32_t qf_cuda_fused_row(const qf_cuda_fused *fused, int32_t part, int32_t row)
{
    return fused->interleave ? row / 8 * 16 + 8 * part + row % 8 : row_start(fused, part) + row;
}

bool qf_cuda_needs_groups(const qf_linear_source *part, const qf_cuda_linear_layout *linear)
{
    return (part->perm != NULL || part->column_groups != NULL) && linear->bits > 8;
}

/* --- sizes ---------------------------------------------------------------------------------------------- */

static size_t float_bytes(const qf_tensor *tensor) { return qf_dtype_size(tensor->dtype); }

/* Bytes of a row of the file, about. */
static size_t raw_row_bytes(const qf_linear_source *part)
{
    size_t k = (size_t)part->k;
    switch (part->format) {
    case QF_LINEAR_DUMMY: return 0;
    case QF_LINEAR_DENSE: return k * float_bytes(&part->weight);
    default: break;
    }
    size_t group_bytes = float_bytes(&part->scales) + (part->zeros.data != NULL ? 1 : 0);
    return (k * (size_t)part->bits + 31) / 32 * 4 + (size_t)part->num_groups * group_bytes;
}

static bool is_transposed(const qf_linear_source *part)
{
    return part->format == QF_LINEAR_AWQ || part->format == QF_LINEAR_GPTQ;
}

int32_t qf_cuda_job_rows(const qf_cuda_fused *fused, const qf_cuda_linear_layout *linear)
{
    size_t total = 0, tile_bytes = 0, limit = JOB_BYTES;
    for (int32_t i = 0; i < fused->num_parts; i++) {
        const qf_linear_source *part = fused->parts[i];
        size_t bytes = raw_row_bytes(part);
        total += (size_t)part->n * bytes;
        if (fused->interleave) {
            tile_bytes += 8 * bytes;
        } else if (16 * bytes > tile_bytes) {
            tile_bytes = 16 * bytes;
        }
        limit = is_transposed(part) ? TRANSPOSED_JOB_BYTES : limit;
    }
    int32_t tiles = (linear->n + 15) / 16;
    if (total > limit) {
        int32_t most = max_i32(1, (int32_t)(limit / tile_bytes));
        int32_t jobs = (tiles + most - 1) / most;
        tiles = (tiles + jobs - 1) / jobs;
    }
    return 16 * tiles;
}

/* --- a job ---------------------------------------------------------------------------------------------- */

/* Appends num_rows rows of row_bytes, stride_bytes apart, to the slot. Returns where they will be. */
static const void *add(qf_cuda_job *job, char *slot, const void *source, size_t row_bytes, size_t num_rows,
                       size_t stride_bytes)
{
    if (row_bytes == stride_bytes) { /* one run */
        row_bytes *= num_rows;
        stride_bytes = row_bytes;
        num_rows = 1;
    }
    size_t offset = job->bytes;
    job->segments[job->num_segments++] = (qf_cuda_segment){.source = source,
                                                           .row_bytes = row_bytes,
                                                           .num_rows = num_rows,
                                                           .stride_bytes = stride_bytes,
                                                           .piece_bytes = row_bytes,
                                                           .repeat = 1,
                                                           .offset = offset};
    job->bytes += qf_cuda_align(row_bytes * num_rows);
    return slot != NULL ? slot + offset : NULL;
}

static const qf_linear_source *whole_of(const qf_linear_source *part) { return part->whole != NULL ? part->whole : part; }

/* Where the groups of a part stand among the whole's: group j is number first + (j + phase) / repeat. */
typedef struct group_map {
    size_t first, phase, repeat, count;
} group_map;

static group_map map_groups(const qf_linear_source *part)
{
    const qf_linear_source *whole = whole_of(part);
    if (part->column_groups != NULL) { /* any of them */
        return (group_map){.repeat = 1, .count = (size_t)whole->num_groups};
    }
    group_map map = {.repeat = 1, .count = (size_t)part->num_groups};
    if (whole->num_groups > 1) {
        const size_t column = (size_t)part->first_column, size = (size_t)part->group_size;
        const size_t whole_size = (size_t)whole->group_size;
        map.first = column / whole_size;
        map.phase = column % whole_size / size;
        map.repeat = whole_size / size;
    }
    return map;
}

/* Appends what a part has of each group: num_rows rows, in each a piece for every group. */
static const void *add_groups(qf_cuda_job *job, char *slot, const char *source, const group_map *map, size_t piece_bytes,
                              size_t piece_stride_bytes, size_t num_rows, size_t stride_bytes)
{
    source += map->first * piece_stride_bytes;
    if (map->repeat == 1 && piece_bytes == piece_stride_bytes) {
        return add(job, slot, source, map->count * piece_bytes, num_rows, stride_bytes);
    }
    if (map->repeat == 1 && num_rows == 1) {
        return add(job, slot, source, piece_bytes, map->count, piece_stride_bytes);
    }
    const void *there = add(job, slot, source, map->count * piece_bytes, num_rows, SIZE_MAX);
    qf_cuda_segment *segment = &job->segments[job->num_segments - 1];
    segment->stride_bytes = stride_bytes;
    segment->piece_bytes = piece_bytes;
    segment->piece_stride_bytes = piece_stride_bytes;
    segment->repeat = map->repeat;
    segment->phase = map->phase;
    return there;
}

static const char *bytes_of(const qf_tensor *tensor, size_t offset) { return (const char *)tensor->data + offset; }

/* Rows are columns of the file: groups and k run down. */
static void add_transposed(qf_cuda_job *job, const qf_linear_source *part, char *slot, qf_repack_part *out)
{
    const size_t n = (size_t)whole_of(part)->n, first = (size_t)(part->first_row + out->first_row);
    const size_t rows = (size_t)out->num_rows, column = (size_t)(part->first_column - out->columns_before);
    const size_t bits = (size_t)part->bits, per_word = 32 / bits;
    const size_t scale_bytes = float_bytes(&part->scales);
    const group_map map = map_groups(part);
    if (part->format == QF_LINEAR_AWQ) {
        out->weight = add(job, slot, bytes_of(&part->weight, (column * n + first) / 2), rows / 2, (size_t)part->k, n / 2);
    } else {
        out->weight = add(job, slot, bytes_of(&part->weight, 4 * (column / per_word * n + first)), 4 * rows,
                          ((size_t)out->num_columns + per_word - 1) / per_word, 4 * n);
    }
    out->scales = add_groups(job, slot, bytes_of(&part->scales, first * scale_bytes), &map, rows * scale_bytes,
                             n * scale_bytes, 1, 0);
    if (part->zeros.data != NULL) {
        out->zeros = add_groups(job, slot, bytes_of(&part->zeros, first * bits / 8), &map, rows * bits / 8, n * bits / 8,
                                1, 0);
    }
}

static void add_row_major(qf_cuda_job *job, const qf_linear_source *part, char *slot, qf_repack_part *out)
{
    const qf_linear_source *whole = whole_of(part);
    const size_t first = (size_t)(part->first_row + out->first_row), rows = (size_t)out->num_rows;
    const size_t column = (size_t)(part->first_column - out->columns_before), columns = (size_t)out->num_columns;
    if (part->format == QF_LINEAR_DENSE) {
        const size_t width = float_bytes(&part->weight), stride = (size_t)whole->k * width;
        out->weight = add(job, slot, bytes_of(&part->weight, first * stride + column * width), columns * width, rows,
                          stride);
        return;
    }
    const size_t per_word = 32 / (size_t)part->bits;
    const size_t row_bytes = 4 * ((columns + per_word - 1) / per_word);
    const size_t stride = 4 * (((size_t)whole->k + per_word - 1) / per_word);
    const size_t scale_bytes = float_bytes(&part->scales), groups = (size_t)whole->num_groups;
    const size_t zero_rows = (rows + per_word - 1) / per_word;
    const group_map map = map_groups(part);
    out->weight = add(job, slot, bytes_of(&part->weight, first * stride + 4 * (column / per_word)), row_bytes, rows,
                      stride);
    out->scales = add_groups(job, slot, bytes_of(&part->scales, first * groups * scale_bytes), &map, scale_bytes,
                             scale_bytes, rows, groups * scale_bytes);
    if (part->zeros.data != NULL) {
        out->zeros = add_groups(job, slot, bytes_of(&part->zeros, first / per_word * groups * 4), &map, 4, 4, zero_rows,
                                groups * 4);
    }
}

/* Which rows of the part the job needs, from and up to a multiple of 8 in the file as far as there are rows: words of
 * packed zero points are never cut. */
static void choose_rows(const qf_cuda_fused *fused, const qf_linear_source *source, int32_t first_row, int32_t num_rows,
                        qf_repack_part *part)
{
    const int32_t skew = source->first_row % 8, rows_from_first = whole_of(source)->n - source->first_row;
    int32_t begin = first_row - part->row_start, end = first_row + num_rows - part->row_start;
    if (fused->interleave) {
        begin = first_row / 2;
        end = (first_row + num_rows) / 2;
    }
    begin = max_i32(begin, 0);
    begin -= (begin + skew) % 8;
    end = min_i32((max_i32(end, 0) + skew + 7) / 8 * 8 - skew, rows_from_first);
    part->first_row = begin;
    part->num_rows = max_i32(end - begin, 0);
}

/* Which columns: the part's own, and the others of the first word, or of groups that are rounded whole. */
static void choose_columns(const qf_linear_source *source, const qf_cuda_linear_layout *linear, qf_repack_part *part)
{
    const bool words = source->format == QF_LINEAR_GPTQ || source->format == QF_LINEAR_COMPRESSED_TENSORS;
    const int32_t begin = source->first_column;
    int32_t unit = words ? 32 / source->bits : 1, end = begin + source->k;
    if (linear->quantize_bits != 0) {
        unit = linear->quantize_group_size;
        end = min_i32((end + unit - 1) / unit * unit, whole_of(source)->k);
    }
    part->columns_before = begin % unit;
    part->num_columns = end - begin + part->columns_before;
}

static qf_repack_format format_of(const qf_linear_source *part)
{
    switch (part->format) {
    case QF_LINEAR_AWQ: return QF_REPACK_AWQ;
    case QF_LINEAR_GPTQ: return QF_REPACK_GPTQ;
    case QF_LINEAR_COMPRESSED_TENSORS: return QF_REPACK_COMPRESSED;
    case QF_LINEAR_DUMMY: return QF_REPACK_DUMMY;
    default: return qf_cuda_float_format(part->weight.dtype);
    }
}

static void add_part(const qf_cuda_fused *fused, const qf_cuda_linear_layout *linear, int32_t index,
                     const int32_t *const *groups, char *slot, qf_cuda_job *job)
{
    const qf_linear_source *part = fused->parts[index];
    qf_repack_part *out = &job->args.parts[index];
    *out = (qf_repack_part){.dummy_seed = part->dummy_seed,
                            .dummy_row = part->first_row,
                            .dummy_column = part->first_column,
                            .format = format_of(part),
                            .bits = part->bits,
                            .scale_format = qf_cuda_float_format(part->scales.dtype),
                            .row_start = row_start(fused, index),
                            .n = part->n,
                            .group_size = part->group_size,
                            .num_groups = (int32_t)map_groups(part).count,
                            .zero_bias = part->format == QF_LINEAR_GPTQ && part->gptq_v1 ? 1 : 0};
    choose_rows(fused, part, job->args.first_row, job->args.num_rows, out);
    choose_columns(part, linear, out);
    if (out->num_rows == 0 || part->format == QF_LINEAR_DUMMY) {
        return;
    }
    if (is_transposed(part)) {
        add_transposed(job, part, slot, out);
    } else {
        add_row_major(job, part, slot, out);
    }
    if (part->perm != NULL || part->column_groups != NULL) {
        const bool needs_groups = qf_cuda_needs_groups(part, linear);
        const void *columns = !needs_groups ? part->perm : groups != NULL ? groups[index] : NULL;
        const size_t columns_bytes = (size_t)part->k * sizeof(int32_t);
        out->columns = add(job, slot, columns, columns_bytes, 1, columns_bytes);
    }
}

void qf_cuda_job_make(const qf_cuda_fused *fused, const qf_cuda_linear_layout *linear, int32_t first_row,
                      const int32_t *const *groups, char *slot, qf_cuda_job *out)
{
    out->num_segments = 0;
    out->bytes = 0;
    out->args = (qf_repack_args){.num_parts = fused->num_parts,
                                 .interleave = fused->interleave,
                                 .rows = linear->bits == 32,
                                 .quantize_bits = linear->quantize_bits,
                                 .quantize_group_size = linear->quantize_group_size,
                                 .bits = linear->bits,
                                 .group_size = linear->group_size,
                                 .k = linear->real_k,
                                 .k_packed = linear->k,
                                 .first_row = first_row,
                                 .num_rows = min_i32(qf_cuda_job_rows(fused, linear), linear->n - first_row),
                                 .inverse_multiplier = 1.0f};
    for (int32_t i = 0; i < fused->num_parts; i++) {
        add_part(fused, linear, i, groups, slot, out);
    }
}

/* --- reading -------------------------------------------------------------------------------------------- */

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

void qf_cuda_job_read(const qf_cuda_job *job, size_t begin, size_t end, char *out)
{
    for (int32_t i = 0; i < job->num_segments; i++) {
        const qf_cuda_segment *s = &job->segments[i];
        const size_t stop = min_size(end, s->offset + s->row_bytes * s->num_rows);
        size_t at = begin > s->offset ? begin : s->offset;
        while (at < stop) {
            const size_t row = (at - s->offset) / s->row_bytes, column = (at - s->offset) % s->row_bytes;
            const size_t piece = column / s->piece_bytes, inside = column % s->piece_bytes;
            const size_t bytes = min_size(s->piece_bytes - inside, stop - at);
            const size_t from = row * s->stride_bytes + (piece + s->phase) / s->repeat * s->piece_stride_bytes + inside;
            memcpy(out + (at - begin), s->source + from, bytes);
            at += bytes;
        }
    }
}
