/* Packing a linear layer's weights, once, at load.
 *
 * W is (n, k). Sixteen rows of it (sixteen outputs) make a tile, so that one vector register holds sixteen outputs and
 * no product ever needs a sum across lanes. The last tile is filled up with zero rows.
 *
 * 4 and 8 bits: two tiles are a pair, and a pair is a sequence of records, one per group of G values of k (G = 8, 16,
 * 32, 64 or 128; larger groups, and a scale for the whole row, are cut into groups of 128 with the same scale). A
 * kernel that takes both tiles at once reads one stream from end to end; one that takes a single tile skips every
 * other line. A tile of zeros makes the number of tiles even.
 *
 *   byte 0               64                  128             192              256
 *        | header tile 0 | header tile 1     | line 0 tile 0 | line 0 tile 1 | line 1 tile 0 | ... G / 8 lines per tile
 *
 *   header:          16 scales (float16, 32 bytes), 16 zeros (u8), 16 bytes unused
 *   line, 4 bits:    lane c = 4 bytes of output c; byte b: low nibble q[8 i + b], high nibble q[8 i + 4 + b]
 *   line, 8 bits:    lane c = 4 bytes of output c; byte b: q[4 i + b]                        (G / 4 lines per tile)
 *
 * w = scale * (q - zero). Where a scale is not a float16 value the whole layer has headers of 128 bytes: 16 float32
 * scales, 16 zeros, 48 unused. k is filled up to whole groups; the activations are zero there.
 *
 * 16 and 32 bits: (tiles, k, 16) in the source's type.
 *
 * A group size that is no multiple of 8 cannot be packed so: those layers are dequantised to float32. The same goes for
 * a rank's columns (model/parallel.h) that cut groups into such pieces, or cut an act-order layer. */
#include "backend/cpu/kernels.h"

#include <string.h>

#include "base/alloc.h"
#include "model/quantize.h"

#define QF_QUANTIZED_ROWS 64 /* rows read at a time */
#define QF_FLOAT_ROWS 16

int32_t qf_cpu_packed_group(int32_t group_size, int32_t num_groups)
{
    if (num_groups <= 1) {
        return 128;
    }
    for (int32_t group = 128; group >= 8; group /= 2) {
        if (group_size % group == 0) {
            return group;
        }
    }
    return 0;
}

/* What will be built from a source: every size, before any allocation. */
typedef struct pack_plan {
    qf_weight_kind kind;
    int32_t round_bits;       /* 4, 8: round float rows here */
    bool wide_scales;
    int32_t group_size, num_groups;               /* packed */
    int32_t source_group_size, source_num_groups; /* of the rows as read or as rounded */
    int32_t read_k, skip; /* columns read, to round whole groups of the layer; those before the first that is packed */
    int32_t num_tiles;
    size_t header_bytes, record_bytes, tile_bytes, weights_bytes, bias_bytes, perm_bytes;
} pack_plan;

static bool is_f16(float value) { return qf_f16_to_f32(qf_f32_to_f16(value)) == value; }

static bool scales_fit_f16(const qf_tensor *scales)
{
    const size_t count = scales->size_bytes / (scales->dtype == QF_DTYPE_F32 ? 4 : 2);
    if (scales->data == NULL || (scales->dtype != QF_DTYPE_F32 && scales->dtype != QF_DTYPE_BF16)) {
        return true;
    }
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        float value;
        if (scales->dtype == QF_DTYPE_BF16) {
            memcpy(&half, (const char *)scales->data + 2 * i, sizeof half);
            value = qf_bf16_to_f32(half);
        } else {
            memcpy(&value, (const char *)scales->data + 4 * i, sizeof value);
        }
        if (!is_f16(value)) {
            return false;
        }
    }
    return true;
}

static qf_weight_kind dense_kind(const qf_linear_source *source)
{
    if (source->format == QF_LINEAR_DUMMY) {
        return QF_WEIGHT_BF16;
    }
    return source->weight.dtype == QF_DTYPE_BF16  ? QF_WEIGHT_BF16
           : source->weight.dtype == QF_DTYPE_F16 ? QF_WEIGHT_F16
                                                  : QF_WEIGHT_F32;
}

static int32_t gcd(int32_t a, int32_t b) { return b == 0 ? a : gcd(b, a % b); }

/* A rank's columns may begin and end inside a group: it is rounded whole, as on one device. Returns the largest group
 * that never lies in two. */
static int32_t widen(const qf_linear_source *source, int32_t group_size, pack_plan *plan)
{
    plan->read_k = source->k;
    if (source->whole != NULL) {
        const int32_t left = source->whole->k - source->first_column;
        plan->skip = source->first_column % group_size;
        const int32_t end = (plan->skip + source->k + group_size - 1) / group_size * group_size - plan->skip;
        plan->read_k = plan->skip + (end < left ? end : left);
    }
    plan->source_group_size = group_size;
    plan->source_num_groups = (plan->read_k + group_size - 1) / group_size;
    return gcd(group_size, plan->skip);
}

static pack_plan make_plan(const qf_linear_source *source, const qf_cpu_linear_options *options)
{
    pack_plan plan = {.num_tiles = (source->n + QF_TILE - 1) / QF_TILE, .read_k = source->k};
    const bool dense = source->bits > 8;
    plan.round_bits = dense && options != NULL ? options->quantize_bits : 0;
    int32_t bits = 0, group_size = 0;
    if (plan.round_bits != 0) {
        bits = plan.round_bits;
        group_size = widen(source, options->group_size, &plan);
    } else if (!dense) {
        bits = source->bits;
        plan.source_group_size = source->group_size;
        plan.source_num_groups = source->num_groups;
        group_size = source->group_size;
    }
    plan.group_size = bits != 0 ? qf_cpu_packed_group(group_size, plan.source_num_groups) : 0;
    if (plan.group_size != 0) {
        plan.kind = bits == 4 ? QF_WEIGHT_W4 : QF_WEIGHT_W8;
        plan.wide_scales = plan.round_bits == 0 && !scales_fit_f16(&source->scales);
        plan.num_groups = (source->k + plan.group_size - 1) / plan.group_size;
        plan.header_bytes = plan.wide_scales ? 128 : 64;
        plan.tile_bytes = plan.header_bytes + (size_t)plan.group_size * QF_TILE / (plan.kind == QF_WEIGHT_W4 ? 2 : 1);
        plan.record_bytes = 2 * plan.tile_bytes;
        plan.tile_bytes *= (size_t)plan.num_groups;
        plan.num_tiles = (plan.num_tiles + 1) / 2 * 2;
    } else {
        plan.kind = dense && plan.round_bits == 0 ? dense_kind(source) : QF_WEIGHT_F32;
        plan.tile_bytes = (size_t)source->k * QF_TILE * (plan.kind == QF_WEIGHT_F32 ? 4 : 2);
    }
    plan.weights_bytes = (size_t)plan.num_tiles * plan.tile_bytes;
    plan.bias_bytes = source->bias != NULL ? (size_t)plan.num_tiles * QF_TILE * sizeof(float) : 0;
    plan.perm_bytes = source->perm != NULL && plan.group_size != 0 ? (size_t)source->k * sizeof(int32_t) : 0;
    return plan;
}

/* --- packing -------------------------------------------------------------------------------------------- */

typedef struct pack_scratch {
    float *rows;    /* (rows, k) or NULL */
    uint8_t *q;     /* (rows, k) or NULL */
    float *scales;  /* (rows, source_num_groups) */
    uint8_t *zeros; /* (rows, source_num_groups) */
} pack_scratch;

typedef struct pack_task {
    const qf_linear_source *source;
    const pack_plan *plan;
    uint8_t *weights;
    int32_t rows_at_once;
    char *scratch; /* (num_threads, scratch_bytes) */
    size_t scratch_bytes;
} pack_task;

static size_t round_up_64(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Parts of one worker's scratch; with base NULL only its size. */
static size_t carve_scratch(const pack_plan *plan, int32_t k, int32_t rows_at_once, char *base, pack_scratch *out)
{
    const size_t rows = (size_t)rows_at_once, values = rows * (size_t)k;
    const bool quantized = plan->group_size != 0 || plan->round_bits != 0;
    const size_t rows_bytes = !quantized || plan->round_bits != 0 ? round_up_64(values * sizeof(float)) : 0;
    const size_t q_bytes = quantized ? round_up_64(values) : 0;
    const size_t groups = quantized ? rows * (size_t)plan->source_num_groups : 0;
    if (base != NULL) {
        out->rows = rows_bytes > 0 ? (float *)(void *)base : NULL;
        out->q = (uint8_t *)base + rows_bytes;
        out->scales = (float *)(void *)(base + rows_bytes + q_bytes);
        out->zeros = (uint8_t *)(base + rows_bytes + q_bytes + round_up_64(groups * sizeof(float)));
    }
    return rows_bytes + q_bytes + round_up_64(groups * sizeof(float)) + round_up_64(groups);
}

/* One row of q into lane `lane` of its tile's lines, which lie 128 bytes apart. */
static void pack_lines(const uint8_t *q, int32_t count, bool four_bits, int32_t lane, uint8_t *lines)
{
    lines += 4 * lane;
    if (four_bits) {
        for (int32_t i = 0; i < count; i++) {
            uint8_t *byte = lines + (size_t)(i / 8) * 128 + (size_t)(i % 4);
            *byte = (uint8_t)(*byte | (i % 8 < 4 ? q[i] & 15 : (q[i] & 15) << 4));
        }
        return;
    }
    for (int32_t i = 0; i < count; i += 4) {
        memcpy(lines + (size_t)(i / 4) * 128, q + i, (size_t)(count - i < 4 ? count - i : 4));
    }
}

static void pack_quantized_row(const pack_task *task, const pack_scratch *s, int32_t row, int32_t n)
{
    const pack_plan *plan = task->plan;
    const int32_t k = task->source->k, lane = n % QF_TILE, tile = n / QF_TILE;
    const size_t odd = (size_t)(tile % 2);
    uint8_t *record = task->weights + (size_t)(tile / 2) * 2 * plan->tile_bytes;
    for (int32_t g = 0; g < plan->num_groups; g++, record += plan->record_bytes) {
        const int32_t begin = g * plan->group_size;
        const int32_t count = k - begin < plan->group_size ? k - begin : plan->group_size;
        const int32_t source_begin = plan->skip + begin;
        const int32_t source_group = plan->source_num_groups <= 1 ? 0 : source_begin / plan->source_group_size;
        const size_t at = (size_t)row * (size_t)plan->source_num_groups + (size_t)source_group;
        uint8_t *header = record + odd * plan->header_bytes;
        if (plan->wide_scales) {
            memcpy(header + 4 * lane, &s->scales[at], 4);
        } else {
            const uint16_t half = qf_f32_to_f16(s->scales[at]);
            memcpy(header + 2 * lane, &half, 2);
        }
        header[plan->header_bytes / 2 + (size_t)lane] = s->zeros[at];
        pack_lines(s->q + (size_t)row * (size_t)plan->read_k + source_begin, count, plan->kind == QF_WEIGHT_W4, lane,
                   record + 2 * plan->header_bytes + 64 * odd);
    }
}

static void pack_float_row(const pack_task *task, const float *values, int32_t n)
{
    const qf_weight_kind kind = task->plan->kind;
    const size_t size = kind == QF_WEIGHT_F32 ? 4 : 2;
    uint8_t *out = task->weights + (size_t)(n / QF_TILE) * task->plan->tile_bytes + (size_t)(n % QF_TILE) * size;
    for (int32_t i = 0; i < task->source->k; i++, out += QF_TILE * size) {
        if (kind == QF_WEIGHT_F32) {
            memcpy(out, &values[i], sizeof(float));
        } else {
            const uint16_t half = kind == QF_WEIGHT_BF16 ? qf_f32_to_bf16(values[i]) : qf_f32_to_f16(values[i]);
            memcpy(out, &half, sizeof half);
        }
    }
}

/* Rounded rows, in s->rows again as what they stand for: of the part's columns alone, (count, k). */
static void dequantize_rows(const pack_plan *plan, int32_t k, int32_t count, const pack_scratch *s)
{
    float *out = s->rows;
    for (size_t row = 0; row < (size_t)count; row++) {
        const uint8_t *q = s->q + row * (size_t)plan->read_k + plan->skip;
        const size_t groups = row * (size_t)plan->source_num_groups;
        for (int32_t i = 0; i < k; i++) {
            const size_t at = groups + (size_t)((plan->skip + i) / plan->source_group_size);
            *out++ = s->scales[at] * (float)(q[i] - s->zeros[at]);
        }
    }
}

/* Units are rows_at_once rows: whole tiles, so that each byte is written by one thread. */
static void pack_units(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    const pack_task *task = arg;
    const pack_plan *plan = task->plan;
    const qf_linear_source *source = task->source;
    qf_linear_source wide = *source;
    pack_scratch s = {0};
    wide.first_column -= plan->skip;
    wide.k = plan->read_k;
    carve_scratch(plan, plan->read_k, task->rows_at_once, task->scratch + (size_t)worker * task->scratch_bytes, &s);
    for (int64_t unit = begin; unit < end; unit++) {
        const int32_t n0 = (int32_t)unit * task->rows_at_once;
        const int32_t count = source->n - n0 < task->rows_at_once ? source->n - n0 : task->rows_at_once;
        if (plan->round_bits != 0) {
            qf_linear_source_read_f32(plan->read_k == source->k ? source : &wide, n0, count, s.rows);
            qf_quantize_rows(s.rows, count, plan->read_k, plan->round_bits, plan->source_group_size, s.q, s.scales,
                             s.zeros);
            if (plan->group_size == 0) {
                dequantize_rows(plan, source->k, count, &s);
            }
        } else if (plan->group_size == 0) {
            qf_linear_source_read_f32(source, n0, count, s.rows);
        } else {
            qf_linear_source_read_quantized(source, n0, count, s.q, s.scales, s.zeros);
        }
        for (int32_t row = 0; row < count; row++) {
            if (plan->group_size == 0) {
                pack_float_row(task, s.rows + (size_t)row * (size_t)source->k, n0 + row);
            } else {
                pack_quantized_row(task, &s, row, n0 + row);
            }
        }
    }
}

/* --- interface ------------------------------------------------------------------------------------------ */

static qf_status check_options(const qf_linear_source *source, const qf_cpu_linear_options *options, qf_error *err)
{
    if (source->n < 1 || source->k < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s: %d x %d weights: each must be at least 1", source->name,
                       source->n, source->k);
    }
    if (options == NULL || options->quantize_bits == 0) {
        return QF_OK;
    }
    if (options->quantize_bits != 4 && options->quantize_bits != 8) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "quantize_bits: %d, must be 0, 4 or 8", options->quantize_bits);
    }
    if (options->group_size != 32 && options->group_size != 64 && options->group_size != 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "group_size: %d, must be 32, 64 or 128", options->group_size);
    }
    return QF_OK;
}

size_t qf_cpu_linear_bytes(const qf_linear_source *source, const qf_cpu_linear_options *options)
{
    const pack_plan plan = make_plan(source, options);
    return plan.weights_bytes + plan.bias_bytes + plan.perm_bytes;
}

qf_status qf_cpu_linear_create(const qf_linear_source *source, const qf_cpu_linear_options *options,
                               qf_thread_pool *pool, qf_cpu_linear **out, qf_error *err)
{
    *out = NULL;
    QF_TRY(check_options(source, options, err));
    const pack_plan plan = make_plan(source, options);
    pack_task task = {.source = source, .plan = &plan,
                      .rows_at_once = plan.group_size != 0 && plan.round_bits == 0 ? QF_QUANTIZED_ROWS : QF_FLOAT_ROWS};
    void *scratch = NULL;
    qf_status status;
    qf_cpu_linear *self = qf_calloc(1, sizeof *self);
    if (self == NULL) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot allocate %s: %zu bytes", source->name, sizeof *self);
    }
    self->pages_bytes = plan.weights_bytes + plan.bias_bytes + plan.perm_bytes;
    QF_TRY_GOTO(qf_pages_alloc(&self->pages, self->pages_bytes, source->name, err), fail);
    task.scratch_bytes = carve_scratch(&plan, plan.read_k, task.rows_at_once, NULL, NULL);
    QF_TRY_GOTO(qf_alloc(&scratch, (size_t)qf_thread_pool_size(pool), task.scratch_bytes, "packing scratch", err), fail);
    task.scratch = scratch;
    task.weights = self->pages;
    qf_thread_pool_run(pool, pack_units, &task, (source->n + (int64_t)task.rows_at_once - 1) / task.rows_at_once, 1);
    qf_free(scratch);

    self->kind = plan.kind;
    self->n = source->n;
    self->k = source->k;
    self->num_tiles = plan.num_tiles;
    self->group_size = plan.group_size;
    self->num_groups = plan.num_groups;
    self->wide_scales = plan.wide_scales;
    self->header_bytes = plan.header_bytes;
    self->record_bytes = plan.record_bytes;
    self->tile_bytes = plan.tile_bytes;
    self->weights = self->pages;
    if (plan.bias_bytes > 0) {
        float *bias = (float *)(void *)((char *)self->pages + plan.weights_bytes);
        memcpy(bias, source->bias, (size_t)source->n * sizeof *bias);
        self->bias = bias;
    }
    if (plan.perm_bytes > 0) {
        int32_t *perm = (int32_t *)(void *)((char *)self->pages + plan.weights_bytes + plan.bias_bytes);
        memcpy(perm, source->perm, plan.perm_bytes);
        self->perm = perm;
    }
    *out = self;
    return QF_OK;

fail:
    qf_cpu_linear_destroy(self);
    return status;
}

void qf_cpu_linear_destroy(qf_cpu_linear *self)
{
    if (self != NULL) {
        qf_pages_free(self->pages, self->pages_bytes);
        qf_free(self);
    }
}

qf_weight_kind qf_cpu_linear_kind(const qf_cpu_linear *self) { return self->kind; }

bool qf_cpu_linear_is_widened(const qf_cpu_linear *self, const qf_linear_source *source,
                              const qf_cpu_linear_options *options)
{
    return self->group_size == 0 && source->whole != NULL && make_plan(source->whole, options).group_size != 0;
}
