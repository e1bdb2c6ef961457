/* Loading is cut into jobs: some rows of a fused linear, small enough for one slot of raw tensors on the device. A job
 * is a list of byte ranges of the mapped files, and the arguments of the kernel that repacks them. All pure. */
#ifndef QF_BACKEND_CUDA_WEIGHTS_JOB_H
#define QF_BACKEND_CUDA_WEIGHTS_JOB_H

#include "backend/cuda/weights.h"
#include "qf_repack.h"

typedef enum qf_cuda_linear_id {
    QF_CUDA_QKV = 0,
    QF_CUDA_O,
    QF_CUDA_GATE_UP,
    QF_CUDA_DOWN,
    QF_CUDA_LINEARS_PER_LAYER,
    QF_CUDA_HEAD = QF_CUDA_LINEARS_PER_LAYER
} qf_cuda_linear_id;

/* The linears that become one. */
typedef struct qf_cuda_fused {
    const qf_linear_source *parts[QF_REPACK_MAX_PARTS];
    int32_t num_parts;
    bool interleave;
} qf_cuda_fused;

void qf_cuda_fused_get(const qf_checkpoint *checkpoint, int32_t layer, qf_cuda_linear_id id, bool float32,
                       qf_cuda_fused *out);
qf_cuda_linear_layout *qf_cuda_layer_linear(qf_cuda_layer_layout *layer, qf_cuda_linear_id id);

/* The linear's pointers, with the blob that its offsets are relative to at `base`. */
qf_cuda_weight qf_cuda_weight_at(const qf_cuda_linear_layout *linear, const void *base);

/* Where row `row` of part `part` stands among the fused rows as packed. */
int32_t qf_cuda_fused_row(const qf_cuda_fused *fused, int32_t part, int32_t row);

/* Bytes of host memory: num_rows rows of row_bytes, stride_bytes apart; in the slot at `offset`, without gaps. A row is
 * pieces of piece_bytes (a row of one piece: row_bytes): piece j is number (j + phase) / repeat of those that stand
 * piece_stride_bytes apart in the file. */
typedef struct qf_cuda_segment {
    const char *source;
    size_t row_bytes, num_rows, stride_bytes;
    size_t piece_bytes, piece_stride_bytes, repeat, phase;
    size_t offset; /* a multiple of 256 */
} qf_cuda_segment;

#define QF_CUDA_MAX_SEGMENTS (4 * QF_REPACK_MAX_PARTS)

typedef struct qf_cuda_job {
    qf_cuda_segment segments[QF_CUDA_MAX_SEGMENTS]; /* in order of offset */
    int32_t num_segments;
    size_t bytes; /* of the slot */
    qf_repack_args args; /* without data, scales and inverse_multiplier */
} qf_cuda_job;

/* Fused rows a job takes at most: a multiple of 16. */
int32_t qf_cuda_job_rows(const qf_cuda_fused *fused, const qf_cuda_linear_layout *linear);

/* Rows first_row .. of the fused linear, with the raw tensors at `slot` (NULL: only sizes are wanted). groups: for
 * parts in act-order that are dequantised, the group of each column; else not read. */
void qf_cuda_job_make(const qf_cuda_fused *fused, const qf_cuda_linear_layout *linear, int32_t first_row,
                      const int32_t *const *groups, char *slot, qf_cuda_job *out);

/* Bytes begin .. end - 1 of the slot, to out; gaps between segments are left as they are. */
void qf_cuda_job_read(const qf_cuda_job *job, size_t begin, size_t end, char *out);

/* A part's columns are dequantised in act-order: the kernel needs the group of each. */
bool qf_cuda_needs_groups(const qf_linear_source *part, const qf_cuda_linear_layout *linear);

#define QF_CUDA_ALIGN ((size_t)256)
static inline size_t qf_cuda_align(size_t bytes) { return (bytes + QF_CUDA_ALIGN - 1) / QF_CUDA_ALIGN * QF_CUDA_ALIGN; }

/* Raw bytes of embedding rows that are converted on the device at a time. */
#define QF_CUDA_EMBEDDING_CHUNK ((size_t)8 << 20)
/* The embedding as the layout wants it, BF16 or F32. */
static inline qf_dtype qf_cuda_embedding_dtype(const qf_cuda_weights_layout *layout)
{
    return layout->embedding_bits == 32 ? QF_DTYPE_F32 : QF_DTYPE_BF16;
}
/* What it takes as rows, wherever they are. */
static inline size_t qf_cuda_embedding_rows_bytes(const qf_cuda_weights_layout *layout, const qf_model_config *config)
{
    return qf_cuda_align((size_t)config->vocab_size * (size_t)config->hidden_size *
                         qf_dtype_size(qf_cuda_embedding_dtype(layout)));
}

static inline qf_repack_format qf_cuda_float_format(qf_dtype dtype)
{
    return dtype == QF_DTYPE_F32 ? QF_REPACK_F32 : dtype == QF_DTYPE_BF16 ? QF_REPACK_BF16 : QF_REPACK_F16;
}

#endif
