/* compressed-tensors "pack-quantized", 4 and 8 bits: W (n, k) row by row, words along k.
 *
 *   weight_packed I32 (n, ceil(k * bits / 32)), weight_scale (n, groups), weight_zero_point I32
 *   (ceil(n * bits / 32), groups) where asymmetric, weight_g_idx I32 (k) with act-order, weight_shape I64 (2)
 *   w[n][k] = weight_scale[n][group of k] * (q - zero), both stored as signed + 2^(bits - 1)
 *
 * Zero points are packed along n, the first axis. */
#include "base/alloc.h"
#include "model/linear_formats.h"

static qf_status check_shape_tensor(const qf_shards *shards, const qf_linear_source *self, qf_error *err)
{
    qf_tensor_spec spec = {self->name, ".weight_shape", QF_DTYPE_BIT(QF_DTYPE_I64) | QF_DTYPE_BIT(QF_DTYPE_I32), 2, -1};
    qf_tensor shape;
    QF_TRY(qf_find_tensor(shards, &spec, false, &shape, err));
    if (shape.data == NULL) {
        return QF_OK;
    }
    int64_t dims[2];
    if (shape.dtype == QF_DTYPE_I64) {
        memcpy(dims, shape.data, sizeof dims);
    } else {
        dims[0] = (int32_t)qf_load_u32(shape.data, 0);
        dims[1] = (int32_t)qf_load_u32(shape.data, 1);
    }
    if (dims[0] != self->n || dims[1] != self->k) {
        return QF_FAIL(err, QF_ERROR_MODEL, "tensor \"%s\" says (%lld, %lld); expected (%d, %d) by config.json",
                       shape.name, (long long)dims[0], (long long)dims[1], self->n, self->k);
    }
    return QF_OK;
}

qf_status qf_compressed_tensors_bind(const qf_shards *shards, const qf_quant_config *config, qf_linear_source *self,
                                     qf_error *err)
{
    int32_t per_word = 32 / config->bits;
    self->format = QF_LINEAR_COMPRESSED_TENSORS;
    self->bits = config->bits;
    self->symmetric = config->symmetric;
    qf_set_groups(self, config->group_size);
    uint32_t i32 = QF_DTYPE_BIT(QF_DTYPE_I32);
    int64_t row_words = (self->k + per_word - 1) / per_word;
    int64_t zero_words = (self->n + per_word - 1) / per_word;
    qf_tensor_spec weight = {self->name, ".weight_packed", i32, self->n, row_words};
    qf_tensor_spec zeros = {self->name, ".weight_zero_point", i32, zero_words, self->num_groups};
    qf_tensor_spec scales = {self->name, ".weight_scale", QF_FLOAT_DTYPES, self->n, self->num_groups};
    qf_tensor_spec groups = {self->name, ".weight_g_idx", i32, self->k, -1};
    qf_tensor g_idx;
    QF_TRY(check_shape_tensor(shards, self, err));
    QF_TRY(qf_find_tensor(shards, &weight, true, &self->weight, err));
    QF_TRY(qf_find_tensor(shards, &scales, true, &self->scales, err));
    if (!config->symmetric) {
        QF_TRY(qf_find_tensor(shards, &zeros, true, &self->zeros, err));
    }
    QF_TRY(qf_find_tensor(shards, &groups, config->desc_act, &g_idx, err));
    QF_TRY(qf_check_scales(&self->scales, err));
    return g_idx.data != NULL ? qf_group_order(&g_idx, self, &self->perm, err) : QF_OK;
}

void qf_compressed_tensors_unpack(const qf_linear_source *self, int32_t n0, int32_t rows, int32_t i0, int32_t cols,
                                  qf_tile *out)
{
    qf_unpack_k_words(self, 1, (size_t)self->weight.shape[1], n0, rows, i0, cols, out);
}

uint8_t qf_compressed_tensors_zero(const qf_linear_source *self, int32_t n, int32_t g)
{
    uint32_t bits = (uint32_t)self->bits;
    uint32_t per_word = 32 / bits;
    uint32_t row = (uint32_t)n;
    size_t groups = (size_t)qf_linear_whole(self)->num_groups;
    uint32_t word = qf_load_u32(self->zeros.data, (size_t)(row / per_word) * groups + (size_t)g);
    return (uint8_t)((word >> (bits * (row % per_word))) & ((1u << bits) - 1u));
}
