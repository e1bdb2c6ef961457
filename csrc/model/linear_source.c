/* Reading rows of a linear layer, whatever its format: tiles of QF_TILE rows and columns are unpacked to bytes and
 * then copied or scaled. */
#include "model/linear_formats.h"

static int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }

void qf_unpack_k_words(const qf_linear_source *self, size_t word_stride, size_t row_stride, int32_t n0, int32_t rows,
                       int32_t i0, int32_t cols, qf_tile *out)
{
    uint32_t bits = (uint32_t)self->bits;
    uint32_t log2_per_word = bits == 4 ? 3 : 2;
    uint32_t per_word = 1u << log2_per_word;
    uint32_t mask = (1u << bits) - 1u;
    for (int32_t r = 0; r < rows; r++) {
        size_t at = (size_t)(n0 + r) * row_stride;
        uint8_t *q = out->q[r];
        if (self->perm != NULL || (uint32_t)i0 % per_word != 0) {
            for (int32_t i = 0; i < cols; i++) {
                uint32_t column = (uint32_t)(self->perm != NULL ? self->perm[i0 + i] : i0 + i);
                uint32_t word = qf_load_u32(self->weight.data, at + (column >> log2_per_word) * word_stride);
                q[i] = (uint8_t)((word >> (bits * (column & (per_word - 1)))) & mask);
            }
            continue;
        }
        at += ((size_t)i0 >> log2_per_word) * word_stride;
        /* A tile's width is a whole number of words, so the last word of a row may be written whole. */
        for (uint32_t i = 0; i < (uint32_t)cols; i += per_word, at += word_stride) {
            uint32_t word = qf_load_u32(self->weight.data, at);
            if (bits == 4) {
                uint64_t bytes = qf_spread_nibbles(word);
                memcpy(q + i, &bytes, sizeof bytes);
            } else {
                memcpy(q + i, &word, sizeof word);
            }
        }
    }
}

/* Columns i0 .. i0 + cols - 1 of rows n0 .. n0 + rows - 1, counted from the part's first. */
static void unpack(const qf_linear_source *self, int32_t n0, int32_t rows, int32_t i0, int32_t cols, qf_tile *out)
{
    n0 += self->first_row;
    i0 += self->first_column;
    switch (self->format) {
    case QF_LINEAR_AWQ: qf_awq_unpack(self, n0, rows, i0, cols, out); break;
    case QF_LINEAR_GPTQ: qf_gptq_unpack(self, n0, rows, i0, cols, out); break;
    case QF_LINEAR_COMPRESSED_TENSORS: qf_compressed_tensors_unpack(self, n0, rows, i0, cols, out); break;
    case QF_LINEAR_DUMMY: qf_dummy_unpack(self, n0, rows, i0, cols, out); break;
    case QF_LINEAR_DENSE: break; /* has no integers */
    }
}

/* Where the scale of the part's group g is stored. A part's groups are never cut by the whole's. */
static int32_t stored_group(const qf_linear_source *self, int32_t g)
{
    if (self->column_groups != NULL) {
        return self->column_groups[g];
    }
    return self->whole != NULL ? (self->first_column + g * self->group_size) / self->whole->group_size : g;
}

static float scale_of(const qf_linear_source *self, int32_t n, int32_t g)
{
    if (self->format == QF_LINEAR_DUMMY) {
        return QF_DUMMY_SCALE;
    }
    const qf_linear_source *whole = qf_linear_whole(self);
    size_t row = (size_t)n + (size_t)self->first_row, group = (size_t)stored_group(self, g);
    bool by_row = self->format == QF_LINEAR_COMPRESSED_TENSORS;
    size_t index = by_row ? row * (size_t)whole->num_groups + group : group * (size_t)whole->n + row;
    return qf_tensor_f32(&self->scales, index);
}

static uint8_t zero_of(const qf_linear_source *self, int32_t n, int32_t g)
{
    if (self->zeros.data == NULL) {
        return (uint8_t)(1u << (self->bits - 1));
    }
    n += self->first_row;
    g = stored_group(self, g);
    switch (self->format) {
    case QF_LINEAR_AWQ: return qf_awq_zero(self, n, g);
    case QF_LINEAR_GPTQ: return qf_gptq_zero(self, n, g);
    default: return qf_compressed_tensors_zero(self, n, g);
    }
}

/* One row of a tile as float32. out: (k), the whole row. */
static void scale_row(const qf_linear_source *self, int32_t n, int32_t i0, int32_t cols, const uint8_t *q, float *out)
{
    int32_t i = 0;
    while (i < cols) {
        int32_t g = (i0 + i) / self->group_size;
        int32_t end = min_i32(cols, (g + 1) * self->group_size - i0);
        float scale = scale_of(self, n, g);
        int32_t zero = zero_of(self, n, g);
        if (self->perm != NULL) {
            for (; i < end; i++) {
                out[self->perm[i0 + i]] = scale * (float)(q[i] - zero);
            }
        }
        for (; i < end; i++) {
            out[i0 + i] = scale * (float)(q[i] - zero);
        }
    }
}

static void read_dense(const qf_linear_source *self, int32_t n0, int32_t count, float *out)
{
    size_t k = (size_t)self->k, stride = (size_t)qf_linear_whole(self)->k;
    size_t row = (size_t)n0 + (size_t)self->first_row, column = (size_t)self->first_column;
    if (self->format == QF_LINEAR_DENSE && k == stride) {
        qf_tensor_read_f32(&self->weight, row * k, (size_t)count * k, out);
        return;
    }
    for (int32_t r = 0; r < count; r++, row++, out += k) {
        if (self->format == QF_LINEAR_DENSE) {
            qf_tensor_read_f32(&self->weight, row * stride + column, k, out);
        } else {
            qf_dummy_f32(self->dummy_seed, (int32_t)row, self->first_column, self->first_column + self->k, out);
        }
    }
}

void qf_linear_source_read_f32(const qf_linear_source *self, int32_t n0, int32_t count, float *out)
{
    size_t k = (size_t)self->k;
    if (self->bits > 8) {
        read_dense(self, n0, count, out);
        return;
    }
    qf_tile tile;
    for (int32_t r0 = 0; r0 < count; r0 += QF_TILE) {
        int32_t rows = min_i32(QF_TILE, count - r0);
        for (int32_t i0 = 0; i0 < self->k; i0 += QF_TILE) {
            int32_t cols = min_i32(QF_TILE, self->k - i0);
            unpack(self, n0 + r0, rows, i0, cols, &tile);
            for (int32_t r = 0; r < rows; r++) {
                scale_row(self, n0 + r0 + r, i0, cols, tile.q[r], out + (size_t)(r0 + r) * k);
            }
        }
    }
}

void qf_linear_source_read_quantized(const qf_linear_source *self, int32_t n0, int32_t count, uint8_t *q,
                                     float *scales, uint8_t *zeros)
{
    size_t k = (size_t)self->k;
    size_t groups = (size_t)self->num_groups;
    qf_tile tile;
    for (int32_t r0 = 0; r0 < count; r0 += QF_TILE) {
        int32_t rows = min_i32(QF_TILE, count - r0);
        for (int32_t i0 = 0; i0 < self->k; i0 += QF_TILE) {
            int32_t cols = min_i32(QF_TILE, self->k - i0);
            unpack(self, n0 + r0, rows, i0, cols, &tile);
            for (int32_t r = 0; r < rows; r++) {
                memcpy(q + (size_t)(r0 + r) * k + (size_t)i0, tile.q[r], (size_t)cols);
            }
        }
        /* Groups outside: AWQ and GPTQ keep the scales of neighbouring rows side by side. */
        for (int32_t g = 0; g < self->num_groups; g++) {
            for (int32_t r = r0; r < r0 + rows; r++) {
                scales[(size_t)r * groups + (size_t)g] = scale_of(self, n0 + r, g);
                zeros[(size_t)r * groups + (size_t)g] = zero_of(self, n0 + r, g);
            }
        }
    }
}
