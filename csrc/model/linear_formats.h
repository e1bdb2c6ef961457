/* What the formats of a linear layer have in common; internal to csrc/model.
 *
 * bind: finds the layer's tensors, checks dtype and shape, and fills the source, whose name, n and k are set.
 * unpack: columns i0 .. i0 + cols - 1 (stored order: see perm) of rows n0 .. n0 + rows - 1 as one byte each, into
 * a tile of QF_TILE x QF_TILE.
 * scale, zero: of row n and group g; zero is the effective zero point, whatever the file's convention.
 * Rows, columns and groups are counted in the whole layer, also where the source is a part of it. */
#ifndef QF_MODEL_LINEAR_FORMATS_H
#define QF_MODEL_LINEAR_FORMATS_H

#include <string.h>

#include "model/checkpoint.h"
#include "model/shards.h"

#define QF_TILE 64

typedef struct qf_tile {
    uint8_t q[QF_TILE][QF_TILE]; /* (row, column) */
} qf_tile;

/* Sets of dtypes. */
#define QF_DTYPE_BIT(dtype) (1u << (unsigned)(dtype))
#define QF_FLOAT_DTYPES (QF_DTYPE_BIT(QF_DTYPE_F32) | QF_DTYPE_BIT(QF_DTYPE_BF16) | QF_DTYPE_BIT(QF_DTYPE_F16))

/* A tensor `name` + `suffix`, of one of `dtypes`, with the given shape (dim1 < 0: rank 1). */
typedef struct qf_tensor_spec {
    const char *name;
    const char *suffix; /* ".weight", say, or "" */
    uint32_t dtypes;
    int64_t dim0, dim1;
} qf_tensor_spec;

qf_status qf_find_tensor(const qf_shards *shards, const qf_tensor_spec *spec, bool required, qf_tensor *out,
                         qf_error *err);
bool qf_has_tensor(const qf_shards *shards, const char *name, const char *suffix);

/* Fails if a scale is infinite or NaN: it would spoil every output of the layer. */
qf_status qf_check_scales(const qf_tensor *scales, qf_error *err);

/* Sorts columns stably by group. *perm stays NULL if they are in order already; every group must have exactly
 * group_size columns, the last one the rest. g_idx: (k) I32. */
qf_status qf_group_order(const qf_tensor *g_idx, const qf_linear_source *self, const int32_t **perm, qf_error *err);

/* Group size and number of groups for a row of self->k; group_size -1 means one group. */
void qf_set_groups(qf_linear_source *self, int32_t group_size);

qf_status qf_awq_bind(const qf_shards *shards, const qf_quant_config *config, qf_linear_source *self, qf_error *err);
void qf_awq_unpack(const qf_linear_source *self, int32_t n0, int32_t rows, int32_t i0, int32_t cols, qf_tile *out);
uint8_t qf_awq_zero(const qf_linear_source *self, int32_t n, int32_t g);

qf_status qf_gptq_bind(const qf_shards *shards, const qf_quant_config *config, qf_linear_source *self, qf_error *err);
void qf_gptq_unpack(const qf_linear_source *self, int32_t n0, int32_t rows, int32_t i0, int32_t cols, qf_tile *out);
uint8_t qf_gptq_zero(const qf_linear_source *self, int32_t n, int32_t g);

qf_status qf_compressed_tensors_bind(const qf_shards *shards, const qf_quant_config *config, qf_linear_source *self,
                                     qf_error *err);
void qf_compressed_tensors_unpack(const qf_linear_source *self, int32_t n0, int32_t rows, int32_t i0, int32_t cols,
                                  qf_tile *out);
uint8_t qf_compressed_tensors_zero(const qf_linear_source *self, int32_t n, int32_t g);

/* Words packed along k: word w of row n is words[w * word_stride + n * row_stride], value i of it column
 * (32 / bits) * w + i, low bits first. */
void qf_unpack_k_words(const qf_linear_source *self, size_t word_stride, size_t row_stride, int32_t n0, int32_t rows,
                       int32_t i0, int32_t cols, qf_tile *out);

/* Made-up values of a dummy checkpoint: 16 nibbles (1..15, mean 8), or 8 bf16 values of mean 0. */
uint64_t qf_dummy_seed(uint64_t seed, int32_t layer, int32_t tensor);
void qf_dummy_unpack(const qf_linear_source *self, int32_t n0, int32_t rows, int32_t i0, int32_t cols, qf_tile *out);
void qf_dummy_bf16(uint64_t seed, int32_t row, int32_t k, uint16_t *out);
/* Columns begin .. end - 1. */
void qf_dummy_f32(uint64_t seed, int32_t row, int32_t begin, int32_t end, float *out);
#define QF_DUMMY_SCALE 0x1p-8f /* of 4-bit dummy linears: a standard deviation near 0.02 */

/* The layer as it is stored. */
static inline const qf_linear_source *qf_linear_whole(const qf_linear_source *self)
{
    return self->whole != NULL ? self->whole : self;
}

/* Tensor data may lie at odd addresses. */
static inline uint32_t qf_load_u32(const void *base, size_t index)
{
    uint32_t value;
    memcpy(&value, (const uint8_t *)base + 4 * index, sizeof value);
    return value;
}

static inline uint16_t qf_load_u16(const void *base, size_t index)
{
    uint16_t value;
    memcpy(&value, (const uint8_t *)base + 2 * index, sizeof value);
    return value;
}

/* Byte i of the result is nibble i of `word`. */
static inline uint64_t qf_spread_nibbles(uint32_t word)
{
    uint64_t x = word;
    x = (x | (x << 16)) & 0x0000ffff0000ffffu;
    x = (x | (x << 8)) & 0x00ff00ff00ff00ffu;
    return (x | (x << 4)) & 0x0f0f0f0f0f0f0f0fu;
}

/* One element of a float tensor as float32, exactly. */
float qf_tensor_f32(const qf_tensor *tensor, size_t index);
/* `count` elements from `first` on. */
void qf_tensor_read_f32(const qf_tensor *tensor, size_t first, size_t count, float *out);

#endif
