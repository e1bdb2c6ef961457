/* GPTQ, 4 and 8 bits: W (n, k) stored transposed, words along k.
 *
 *   qweight I32 (k * bits / 32, n), qzeros I32 (groups, n * bits / 32), scales F16 (groups, n), g_idx I32 (k)
 *   w[n][k] = scales[g_idx[k]][n] * (q - zero)
 *
 * Version 1 stores the zero point less one (mod 2^bits); "gptq_v2" stores it as it is. With act-order g_idx is no
 * longer k / group_size: columns are then read sorted by group, and `perm` says where each came from. */
#include "base/alloc.h"
#include "model/linear_formats.h"

qf_status qf_gptq_bind(const qf_shards *shards, const qf_quant_config *config, qf_linear_source *self, qf_error *err)
{
    int32_t per_word = 32 / config->bits;
    if (self->n % per_word != 0 || self->k % per_word != 0) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: shape (%d, %d); GPTQ with %d bits packs multiples of %d", self->name,
                       self->n, self->k, config->bits, per_word);
    }
    self->format = QF_LINEAR_GPTQ;
    self->bits = config->bits;
    self->symmetric = config->symmetric;
    self->gptq_v1 = !config->gptq_v2;
    qf_set_groups(self, config->group_size);
    uint32_t i32 = QF_DTYPE_BIT(QF_DTYPE_I32);
    qf_tensor_spec weight = {self->name, ".qweight", i32, self->k / per_word, self->n};
    qf_tensor_spec zeros = {self->name, ".qzeros", i32, self->num_groups, self->n / per_word};
    qf_tensor_spec scales = {self->name, ".scales", QF_FLOAT_DTYPES, self->num_groups, self->n};
    qf_tensor_spec groups = {self->name, ".g_idx", i32, self->k, -1};
    qf_tensor g_idx;
    QF_TRY(qf_find_tensor(shards, &weight, true, &self->weight, err));
    QF_TRY(qf_find_tensor(shards, &zeros, true, &self->zeros, err));
    QF_TRY(qf_find_tensor(shards, &scales, true, &self->scales, err));
    QF_TRY(qf_find_tensor(shards, &groups, config->desc_act, &g_idx, err));
    QF_TRY(qf_check_scales(&self->scales, err));
    return g_idx.data != NULL ? qf_group_order(&g_idx, self, &self->perm, err) : QF_OK;
}

void qf_gptq_unpack(const qf_linear_source *self, int32_t n0, int32_t rows, int32_t i0, int32_t cols, qf_tile *out)
{
    qf_unpack_k_words(self, (size_t)qf_linear_whole(self)->n, 1, n0, rows, i0, cols, out);
}

uint8_t qf_gptq_zero(const qf_linear_source *self, int32_t n, int32_t g)
{
    uint32_t bits = (uint32_t)self->bits;
    uint32_t per_word = 32 / bits;
    uint32_t max = (1u << bits) - 1u;
    uint32_t column = (uint32_t)n;
    size_t row_words = (size_t)qf_linear_whole(self)->n / per_word;
    uint32_t word = qf_load_u32(self->zeros.data, (size_t)g * row_words + column / per_word);
    uint32_t stored = (word >> (bits * (column % per_word))) & max;
    return (uint8_t)((stored + (self->gptq_v1 ? 1u : 0u)) & max);
}
