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

/* Exchanges the bytes of `mask`, shifted up in *low, with those in *high. */
static inline void exchange(uint64_t *low, uint64_t *high, int shift, uint64_t mask)
{
    uint64_t changed = ((*low >> shift) ^ *high) & mask;
    *high ^= changed;
    *low ^= changed << shift;
}

/* 8 x 8 bytes: byte j of x[i] changes places with byte i of x[j]; by halves, quarters, single bytes. Written out,
 * because the compiler does not unroll it. */
static inline void transpose_bytes(uint64_t x[8])
{
    const uint64_t halves = 0x00000000ffffffffu;
    const uint64_t quarters = 0x0000ffff0000ffffu;
    const uint64_t single = 0x00ff00ff00ff00ffu;
    exchange(&x[0], &x[4], 32, halves);
    exchange(&x[1], &x[5], 32, halves);
    exchange(&x[2], &x[6], 32, halves);
    exchange(&x[3], &x[7], 32, halves);
    exchange(&x[0], &x[2], 16, quarters);
    exchange(&x[1], &x[3], 16, quarters);
    exchange(&x[4], &x[6], 16, quarters);
    exchange(&x[5], &x[7], 16, quarters);
    exchange(&x[0], &x[1], 8, single);
    exchange(&x[2], &x[3], 8, single);
    exchange(&x[4], &x[5], 8, single);
    exchange(&x[6], &x[7], 8, single);
}

void qf_awq_unpack(const qf_linear_source *self, int32_t n0, int32_t rows, int32_t i0, int32_t cols, qf_tile *out)
{
    size_t row_words = (size_t)qf_linear_whole(self)->n / 8;
    /* Columns outside: eight cache lines, each in use until all of its words are read. */
    for (int32_t i = 0; i < cols; i += 8) {
        for (int32_t n = n0 - n0 % 8; n < n0 + rows; n += 8) {
            uint64_t bytes[8] = {0}; /* by k; after the transposition by n */
            for (int32_t j = 0; j < 8 && i + j < cols; j++) {
                uint32_t word = qf_load_u32(self->weight.data, (size_t)(i0 + i + j) * row_words + (size_t)n / 8);
                bytes[j] = spread_half(word & 0xffffu) | (spread_half(word >> 16) << 8);
            }
            transpose_bytes(bytes);
            for (int32_t j = 0; j < 8; j++) {
                int32_t r = n + j - n0;
                if (r >= 0 && r < rows) {
                    memcpy(&out->q[r][i], &bytes[j], sizeof bytes[j]);
                }
            }
        }
    }
}

uint8_t qf_awq_zero(const qf_linear_source *self, int32_t n, int32_t g)
{
    size_t row_words = (size_t)qf_linear_whole(self)->n / 8;
    uint32_t word = qf_load_u32(self->zeros.data, (size_t)g * row_words + (size_t)n / 8);
    uint32_t column = (uint32_t)n % 8;
    uint32_t nibble = column / 2 + 4 * (column % 2);
    return (uint8_t)((word >> (4 * nibble)) & 15u);
}
