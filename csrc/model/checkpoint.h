/* A Hugging Face checkpoint directory, opened and checked: config.json, safetensors shards (memory-mapped), the
 * name table, and every linear layer as the file stores it. Backends read rows from it once, at load, and pack
 * them into their own layout. Nothing here depends on a device. Reading is thread-safe after open. */
#ifndef QF_MODEL_CHECKPOINT_H
#define QF_MODEL_CHECKPOINT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/status.h"
#include "model/config.h"

typedef struct qf_checkpoint qf_checkpoint;

typedef enum qf_linear_id {
    QF_Q_PROJ = 0,
    QF_K_PROJ,
    QF_V_PROJ,
    QF_O_PROJ,
    QF_GATE_PROJ,
    QF_UP_PROJ,
    QF_DOWN_PROJ,
    QF_LINEARS_PER_LAYER,
    QF_LM_HEAD = QF_LINEARS_PER_LAYER
} qf_linear_id;

/* A tensor where it lies in the mapped file. */
typedef struct qf_tensor {
    const char *name; /* NUL-terminated, owned by the checkpoint */
    const void *data; /* NULL for a dummy checkpoint */
    qf_dtype dtype;
    int32_t rank;
    int64_t shape[4];
    size_t size_bytes;
} qf_tensor;

typedef enum qf_linear_format {
    QF_LINEAR_DENSE = 0, /* weight (n, k) in F32, BF16 or F16 */
    QF_LINEAR_AWQ,
    QF_LINEAR_GPTQ,
    QF_LINEAR_COMPRESSED_TENSORS,
    QF_LINEAR_DUMMY /* random, made up from the seed and the position */
} qf_linear_format;

/* One linear layer y = x W^T + b, W of shape (n, k): out features by in features. */
typedef struct qf_linear_source {
    qf_linear_format format;
    char name[96];      /* "model.layers.3.self_attn.q_proj": for messages */
    int32_t n, k;
    int32_t bits;       /* 4 or 8; 16 or 32 for DENSE */
    int32_t group_size; /* columns per scale, in the order of qf_linear_source_read_quantized; k if per channel */
    int32_t num_groups; /* ceil(k / group_size) */
    bool gptq_v1;       /* zero points are stored one less */
    bool symmetric;
    qf_tensor weight;   /* DENSE weight, or qweight / weight_packed */
    qf_tensor scales;
    qf_tensor zeros;    /* data == NULL: none stored, the zero point is 8 (4 bits) or 128 (8 bits) */
    const float *bias;  /* (n) or NULL; converted at open, owned by the checkpoint */
    const int32_t *perm; /* (k) or NULL: column i of the quantised matrix multiplies x[perm[i]] (act-order, sorted
                            by group); owned by the checkpoint */
    uint64_t dummy_seed;
    /* A rank's part (model/parallel.h): n, k and bias are the part's own, the tensors the whole layer's. */
    const struct qf_linear_source *whole; /* NULL: this is the whole */
    int32_t first_row, first_column;      /* of the part, in the whole */
    const int32_t *column_groups; /* (k) or NULL: the stored group of each column, where columns of an act-order layer
                                     were cut; they stand in the model's order then, each a group of its own */
} qf_linear_source;

typedef struct qf_checkpoint_options {
    const char *dir;                 /* local directory */
    const char *hf_overrides_json;   /* JSON object or NULL */
    bool dummy;                      /* load_format="dummy": only config.json is read */
    uint64_t dummy_seed;
    int32_t dummy_bits;              /* DUMMY linears: 16 (bf16 values) or 4 (random nibbles, group 128) */
} qf_checkpoint_options;

/* Opens and checks everything: every tensor that the model needs exists, with the right dtype and shape, inside
 * its file. QF_ERROR_MODEL: the checkpoint is wrong, or a file of it is missing; QF_ERROR_IO: the directory is missing,
 * or a file cannot be read. Both name the file and the tensor or key. */
qf_status qf_checkpoint_open(const qf_checkpoint_options *options, qf_checkpoint **out, qf_error *err);
void qf_checkpoint_close(qf_checkpoint *self); /* NULL-safe; unmaps */

const qf_model_config *qf_checkpoint_config(const qf_checkpoint *self);

/* layer is ignored for QF_LM_HEAD (with tied embeddings its weight is embed_tokens). */
const qf_linear_source *qf_checkpoint_linear(const qf_checkpoint *self, int32_t layer, qf_linear_id id);

/* embed_tokens: (vocab_size, hidden_size); F32, BF16 or F16. Rows are copied as they are (dummy: made up). */
qf_dtype qf_checkpoint_embedding_dtype(const qf_checkpoint *self);
void qf_checkpoint_read_embedding(const qf_checkpoint *self, int32_t row0, int32_t count, void *out);

typedef enum qf_norm_id { QF_INPUT_NORM = 0, QF_POST_ATTENTION_NORM, QF_FINAL_NORM } qf_norm_id;

/* out: (hidden_size) float32. layer is ignored for QF_FINAL_NORM. */
void qf_checkpoint_read_norm(const qf_checkpoint *self, int32_t layer, qf_norm_id id, float *out);

/* Rows n0 .. n0 + count - 1 as float32, by the format's own formula (dequantised, columns in the model's order).
 * out: (count, k). The scale is converted exactly; the product is one float32 rounding. */
void qf_linear_source_read_f32(const qf_linear_source *self, int32_t n0, int32_t count, float *out);

/* The same rows as integers, for a format with 4 or 8 bits: w = scales * (q - zeros). Columns in the stored
 * (sorted) order: see perm. q: (count, k) one value per byte; scales, zeros: (count, num_groups). */
void qf_linear_source_read_quantized(const qf_linear_source *self, int32_t n0, int32_t count, uint8_t *q,
                                     float *scales, uint8_t *zeros);

#endif
