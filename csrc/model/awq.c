/* AutoAWQ "gemm": W (n, k) stored transposed, words along n.
 *
 *   qweight I32 (k, n / 8), qzeros I32 (k / group_size, n / 8), scales F16 (k / group_size, n)
 *   w[n][k] = scales[k / g][n] * (q - zero), both 0..15
 *
 * The eight columns of a word are interleaved: even columns in the low half, odd ones in the high half, so column
 * 2j is nibble j and column 2j + 1 nibble 4 + j. */
#include "model/linear_formats.h"

qf_status qf_awq_bind(const qf_shards *shards, const qf_quant_config *config, qf_linear_source *self, qf_error *err)
{
    if (self->n % 8 != 0) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: %d output features; AWQ packs multiples of 8", self->name, self->n);
    }
    self->format = QF_LINEAR_AWQ;
    self->bits = config->bits;
    self->symmetric = config->symmetric;
    qf_set_groups(self, config->group_size);
    uint32_t i32 = QF_DTYPE_BIT(QF_DTYPE_I32);
    qf_tensor_spec weight = {self->name, ".qweight", i32, self->k, self->n / 8};
    qf_tensor_spec zeros = {self->name, ".qzeros", i32, self->num_groups, self->n / 8};
    qf_tensor_spec scales = {self->name, ".scales", QF_FLOAT_DTYPES, self->num_groups, self->n};
    QF_TRY(qf_find_tensor(shards, &weight, true, &self->weight, err));
    QF_TRY(qf_find_tensor(shards, &zeros, !config->symmetric, &self->zeros, err));
    QF_TRY(qf_find_tensor(shards, &scales, true, &self->scales, err));
    return qf_check_scales(&self->scales, err);
}

/* Four nibbles to the low bytes of four 16-bit lanes. */
static uint64_t spread_half(uint32_t half)
{
    uint64_t x = half;
    x = (x | (x << 24)) & 0x000000ff000000ffu;
    return (x | (x << 12)) & 0x000f000f000f000fu;
}

void qf_awq_unpack(const qf_linear_source *self, int32_t n0, int32_t rows, int32_t i0, int32_t cols, qf_tile *out)
{
    uint8_t by_column[QF_TILE][QF_TILE + 8]; /* (k, n), from the multiple of 8 at or before n0 on */
    size_t row_words = (size_t)self->n / 8;
    size_t word0 = (size_t)n0 / 8;
    size_t words = ((size_t)(n0 + rows) + 7) / 8 - word0;
    size_t shift = (size_t)n0 % 8;
    for (int32_t i = 0; i < cols; i++) {
        size_t at = (size_t)(i0 + i) * row_words + word0;
        for (size_t c = 0; c < words; c++) {
            uint32_t word = qf_load_u32(self->weight.data, at + c);
            uint64_t bytes = spread_half(word & 0xffffu) | (spread_half(word >> 16) << 8);
            memcpy(&by_column[i][8 * c], &bytes, sizeof bytes);
        }
    }
    for (int32_t r = 0; r < rows; r++) {
        for (int32_t i = 0; i < cols; i++) {
            out->q[r][i] = by_column[i][shift + (size_t)r];
        }
    }
}

uint8_t qf_awq_zero(const qf_linear_source *self, int32_t n, int32_t g)
{
    uint32_t word = qf_load_u32(self->zeros.data, (size_t)g * ((size_t)self->n / 8) + (size_t)n / 8);
    uint32_t column = (uint32_t)n % 8;
    uint32_t nibble = column / 2 + 4 * (column % 2);
    return (uint8_t)((word >> (4 * nibble)) & 15u);
}
