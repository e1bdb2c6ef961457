/* The CUDA kernels' plain-C launchers: the narrow waist between the CUDA backend and the kernels.
 *
 * Every launcher is asynchronous on `stream`, checks its arguments and the launch, allocates nothing, and may be
 * captured into a graph. All pointers are device pointers unless a comment says host. Storage is bf16 as uint16_t.
 *
 * Two layouts are shared by all kernels.
 *
 * Tiled activations ("x"): bf16, the B operand of the tensor cores. For num_tokens > 8 a tile holds 8 tokens; for
 * fewer it holds tile_tokens = 1, 2, 4 or 8, the least power of two that is enough, and there is one tile. With
 * num_tiles = ceil(num_tokens / 8), element (k, t) of a (k, num_tokens) matrix stands at
 *     ((((k / 64) * num_tiles + t / 8) * 8 + (k / 8) % 8) * tile_tokens + t % 8) * 8 + k % 8
 * so that 64 k of one tile are contiguous, eight 8 x 8 core matrices of 128 bytes. k is a multiple of 128; what lies
 * beyond the model's k is zero; rows of tokens beyond num_tokens are undefined and are never stored anywhere else.
 *
 * Weights ("fragments"): the A operand of mma.m16n8k16 (and, warp by warp, of wgmma.m64nNk16), packed at load. n is
 * padded to 16 and k to 128. A row tile is 16 rows, a k block 128 columns; blocks are ordered (row tile, k block). In a
 * lane's fragment of one k16 step, with g = lane / 4 and t = lane % 4, register 0 holds (row g, k 2t and 2t + 1),
 * register 1 (row g + 8, the same k), registers 2 and 3 the same rows at k + 8; the lower k is the lower half.
 *   4 bits:  1,024 bytes a block: (2 halves, 32 lanes, 4 words): word j of half h is step 4h + j; the pair of register
 *            i stands in bits 4i .. 4i + 3 (lower k) and 16 + 4i .. 19 + 4i.
 *   8 bits:  2,048 bytes a block: (4 quarters, 32 lanes, 16 bytes): steps 2q and 2q + 1, 8 bytes each, registers 0..3,
 *            the lower k first.
 *   16 bits: 4,096 bytes a block: (8 steps, 32 lanes, 4 registers).
 * Scales of 4 and 8 bits: (row tile, k block, 128 / group_size, 16 rows) words: fp16 scale in the lower half, bf16 zero
 * point (an integer) in the upper. weight = scale_multiplier * scale * (q - zero). group_size is 32, 64 or 128 (larger
 * groups are repeated). Padding has scale 0.
 * "gate_up" interleaves: row tile i holds rows 8i .. 8i + 7 of gate_proj, then the same rows of up_proj. */
#ifndef QF_KERNELS_H
#define QF_KERNELS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "base/status.h"
#include "qf_kv_cache.h"

typedef struct qf_cuda_device {
    int32_t ordinal;
    int32_t sm_count;
    int32_t compute_capability; /* 80, 86, 89, 90, ... */
    int32_t max_shared_bytes;   /* a block's, after opting in */
    bool hopper;                /* wgmma and bulk copies: compute capability 9.0 and code for sm_90a; false forces the
                                   code path of sm_80 */
    bool dependent_launch;      /* programmatic dependent launch: compute capability 9.0 and later */
} qf_cuda_device;

/* Fills `out` for the current device. QF_ERROR_BACKEND without one, or with one that no code here was made for. */
qf_status qf_cuda_device_get(int32_t ordinal, qf_cuda_device *out, qf_error *err);

/* Token tiles of the tiled layout. */
static inline int32_t qf_cuda_tile_tokens(int32_t num_tokens)
{
    return num_tokens > 4 ? 8 : num_tokens > 2 ? 4 : num_tokens > 1 ? 2 : 1;
}
static inline int32_t qf_cuda_num_tiles(int32_t num_tokens) { return (num_tokens + 7) / 8; }
/* Elements of a tiled (k, num_tokens) matrix. */
static inline int64_t qf_cuda_tiled_size(int32_t k, int32_t num_tokens)
{
    return (int64_t)k * qf_cuda_num_tiles(num_tokens) * qf_cuda_tile_tokens(num_tokens);
}

typedef struct qf_cuda_weight {
    const void *data;
    const uint32_t *scales; /* NULL for 16 bits */
    const float *bias;      /* (n) or NULL */
    const int32_t *perm;    /* (k) or NULL: column i multiplies x[perm[i]]; the caller permutes x first */
    int32_t n, k;           /* as packed: multiples of 16 and 128 */
    int32_t bits;           /* 4, 8, 16 */
    int32_t group_size;     /* 32, 64, 128 */
    float scale_multiplier; /* a power of two */
} qf_cuda_weight;

/* ---- float32 reference kernels: one per op, plain loops, fixed order; dtype="float32" runs on them -------- */

/* out[t][j] = sum over k of x[t][k] * w[j][k] + bias[j] */
typedef struct qf_cuda_linear_f32_args {
    const float *x;    /* (num_tokens, k) */
    const float *w;    /* (n, k) row by row */
    const float *bias; /* (n) or NULL */
    float *out;        /* (num_tokens, n) */
    int32_t num_tokens, n, k;
} qf_cuda_linear_f32_args;
qf_status qf_cuda_linear_f32(const qf_cuda_linear_f32_args *args, cudaStream_t stream, qf_error *err);

/* residual += delta (if any); out = residual / sqrt(mean(residual^2) + eps) * weight */
typedef struct qf_cuda_rmsnorm_f32_args {
    float *residual;     /* (num_tokens, hidden_size) */
    const float *delta;  /* (num_tokens, hidden_size) or NULL */
    const float *weight; /* (hidden_size) */
    float *out;          /* (num_rows, hidden_size) or NULL: only the addition */
    const int32_t *rows; /* (num_rows) rows to take, residual not changed, or NULL: all */
    int32_t num_rows, hidden_size;
    float eps;
} qf_cuda_rmsnorm_f32_args;
qf_status qf_cuda_rmsnorm_f32(const qf_cuda_rmsnorm_f32_args *args, cudaStream_t stream, qf_error *err);

/* gate[t][j] = silu(gate[t][j]) * up[t][j] */
qf_status qf_cuda_silu_mul_f32(float *gate, const float *up, int64_t size, cudaStream_t stream, qf_error *err);

/* ---- embedding ------------------------------------------------------------------------------------------- */

/* Resolves token ids (a negative id -1 - slot is last_token[slot]; below 0 there: 0) and gathers rows. */
typedef struct qf_cuda_embedding_args {
    const void *table; /* device memory, or pinned host memory as the device sees it */
    int32_t table_bits; /* 32: float32 rows; 16: bf16 rows; -16: bf16 fragments (a tied head's) */
    int32_t k_padded;   /* for fragments: k as packed */
    const int32_t *token_ids;  /* (num_tokens) */
    const int32_t *last_token; /* (max_num_seqs) */
    float *out;                /* (num_tokens, hidden_size) */
    int32_t num_tokens, hidden_size;
    int32_t first_id, num_ids; /* num_ids > 0: the table's rows are those of ids first_id .. ; all others are zeros */
} qf_cuda_embedding_args;

/* ---- norms and small things ------------------------------------------------------------------------------ */

/* h = residual[row] + sum of the num_splits deltas, added in order; residual[row] = h (unless rows is given);
 * out = tiled bf16 of h / sqrt(mean(h^2) + eps) * weight, zero beyond hidden_size. The sum over a row has one order
 * whatever num_rows is. */
typedef struct qf_cuda_rmsnorm_args {
    float *residual;       /* (num_tokens, hidden_size) */
    const float *delta;    /* (num_splits, num_tokens, delta_stride) or NULL */
    int32_t num_splits;    /* 0 with delta NULL */
    int32_t delta_stride;  /* n of the linear that made it: >= hidden_size */
    const float *weight;   /* (hidden_size) */
    uint16_t *out;         /* tiled (k_padded, num_rows), or NULL: only the addition */
    const int32_t *rows;   /* (num_rows) or NULL: all tokens */
    int32_t num_tokens, num_rows, hidden_size, k_padded;
    float eps;
} qf_cuda_rmsnorm_args;
qf_status qf_cuda_rmsnorm(const qf_cuda_rmsnorm_args *args, const qf_cuda_device *device, cudaStream_t stream,
                          qf_error *err);

/* out(i, t) = x(perm[i], t), both tiled. For act-order checkpoints. */
qf_status qf_cuda_permute(const uint16_t *x, const int32_t *perm, uint16_t *out, int32_t k, int32_t num_tokens,
                          cudaStream_t stream, qf_error *err);

/* Tiled bf16 to and from rows of float32: taps, tests. rows: (num_tokens, width), width <= k; zeros beyond. */
qf_status qf_cuda_untile(const uint16_t *x, float *rows, int32_t width, int32_t k, int32_t num_tokens,
                         cudaStream_t stream, qf_error *err);
qf_status qf_cuda_tile(const float *rows, uint16_t *x, int32_t width, int32_t k, int32_t num_tokens,
                       cudaStream_t stream, qf_error *err);

/* ---- linear layers --------------------------------------------------------------------------------------- */

typedef enum qf_cuda_epilogue {
    QF_CUDA_STORE = 0, /* float32 partial sums, bias in split 0 */
    QF_CUDA_SILU_MUL   /* gate_up: tiled bf16 of silu(gate) * up; num_splits must be 1 */
} qf_cuda_epilogue;

/* An RMS norm between two linear layers of few tokens, without a kernel of its own. The first one adds its sums to the
 * residual and leaves the second one residual * weight, with the sums of squares by which the second divides what it
 * makes of them. */
typedef struct qf_cuda_linear_norm {
    float *residual;     /* (num_tokens, n): += out; NULL: no norm */
    const float *weight; /* (n) */
    uint16_t *x;         /* tiled (n, num_tokens) */
    float *squares;      /* (num_tokens, n / 16) */
    float *exchange;     /* num_splits > 1: (num_splits - 1, num_tokens, n), all zero before and behind */
} qf_cuda_linear_norm;

/* out = x W^T + bias. The order of the sum over k is fixed by (n, k, bits, group_size, num_splits) and, unless
 * `batch_invariant`, by the kernel that num_tokens chooses. */
typedef struct qf_cuda_linear_args {
    qf_cuda_weight weight;
    const uint16_t *x; /* tiled (weight.k, num_tokens) */
    qf_cuda_epilogue epilogue;
    float *out;        /* STORE: (num_splits, num_tokens, weight.n) */
    uint16_t *act;     /* SILU_MUL: tiled (act_k, num_tokens), act_k = weight.n / 2 up to the next 128; zeros beyond n / 2 */
    int32_t num_tokens;
    int32_t num_splits; /* shares of k, each a run of k blocks: the kernel says which */
    bool batch_invariant; /* one order of sums for every num_tokens */
    /* STORE, where qf_cuda_linear_norm_fits: out is not written */
    qf_cuda_linear_norm norm;
    const float *squares; /* where it fits: (num_tokens, weight.k / 16), of the norm that x is of; NULL: x is normed */
    float eps;            /* of that norm */
} qf_cuda_linear_args;

/* mma.sync: every GPU; the GEMV of 1 to 8 rows, the GEMM up to 32, and all sizes before Hopper. */
qf_status qf_cuda_linear_mma(const qf_cuda_linear_args *args, const qf_cuda_device *device, cudaStream_t stream,
                             qf_error *err);
int32_t qf_cuda_linear_mma_splits(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits, int32_t num_tokens,
                                  qf_cuda_epilogue epilogue, bool batch_invariant);
/* wgmma and bulk copies: sm_90a. */
qf_status qf_cuda_linear_wgmma(const qf_cuda_linear_args *args, const qf_cuda_device *device, cudaStream_t stream,
                               qf_error *err);
int32_t qf_cuda_linear_wgmma_splits(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits,
                                    int32_t num_tokens, qf_cuda_epilogue epilogue, bool batch_invariant);
/* wgmma for weights of 4 and 8 bits in groups of 128, 5 to 64 tokens, not batch_invariant: sm_90a. */
qf_status qf_cuda_linear_wgmma_batch(const qf_cuda_linear_args *args, const qf_cuda_device *device,
                                     cudaStream_t stream, qf_error *err);
int32_t qf_cuda_linear_wgmma_batch_splits(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits,
                                          int32_t num_tokens, qf_cuda_epilogue epilogue);
/* Chooses between them. */
qf_status qf_cuda_linear(const qf_cuda_linear_args *args, const qf_cuda_device *device, cudaStream_t stream,
                         qf_error *err);
int32_t qf_cuda_linear_splits(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits, int32_t num_tokens,
                              qf_cuda_epilogue epilogue, bool batch_invariant);
#define QF_CUDA_MAX_SPLITS 8
#define QF_CUDA_NORM_TOKENS 8     /* norms made by linears: tokens, at most */
#define QF_CUDA_MAX_SQUARES 8192 /* the same: hidden_size */
/* Whether the kernel that qf_cuda_linear chooses takes `norm` (n = hidden_size) or `squares` (k = hidden_size). */
bool qf_cuda_linear_norm_fits(const qf_cuda_device *device, int32_t n, int32_t k, int32_t bits, int32_t num_tokens,
                              int32_t num_splits, bool batch_invariant);

/* ---- sampling -------------------------------------------------------------------------------------------- */

typedef struct qf_cuda_logit_bias {
    int32_t token_id;
    float bias; /* -inf masks */
} qf_cuda_logit_bias;

/* One row: the host sampler's rules (csrc/sample/sampler.h), in its order. */
typedef struct qf_cuda_sample_row {
    int32_t slot;               /* last_token[slot] = token; -1: no token is drawn, only logprobs of target */
    int32_t real_vocab_size;    /* ids from here on are never sampled */
    float temperature, top_p, min_p;
    int32_t top_k;              /* 0: off */
    float repetition_penalty, presence_penalty, frequency_penalty;
    int32_t uses_counts;        /* 1: the penalties read counts[slot]; the token drawn is added there */
    uint32_t seed_low, seed_high, sample_index, position; /* Philox key and counter */
    int32_t bitmask_offset;     /* words into bitmasks, or -1 */
    int32_t bias_offset, num_bias; /* into biases: added in order, after bitmask */
    int32_t num_logprobs;       /* -1: none; of the sampled token and the top ones */
    int32_t target_id, num_target_logprobs; /* prompt logprobs; target_id -1: none */
    int32_t logprobs_offset, target_logprobs_offset; /* entries into logprobs */
} qf_cuda_sample_row;

typedef struct qf_cuda_logprob {
    int32_t token_id, rank;
    float logprob;
} qf_cuda_logprob;

typedef struct qf_cuda_step_io qf_cuda_step_io; /* below */

/* counts: per slot a word per token: bit 15: in the prompt or the output; the lower 15: times in the output
 * (saturating). */
typedef struct qf_cuda_sample_args {
    const float *logits;             /* (num_rows, logits_stride), not changed */
    int32_t logits_stride, vocab_size, num_rows;
    const qf_cuda_sample_row *rows;  /* (num_rows) */
    const uint32_t *bitmasks;
    const qf_cuda_logit_bias *biases;
    uint16_t *counts;                /* (max_num_seqs, vocab_size) or NULL if no row uses it */
    int32_t *last_token;             /* (max_num_seqs) */
    int32_t *token_ids;              /* (num_rows) the token, or -1 if the logits are not finite or all are masked */
    qf_cuda_logprob *logprobs;
    void *workspace;
    bool all_greedy;                 /* host's promise: every row has temperature 0, no edits, no logprobs */
    const qf_cuda_step_io *publish; /* host; NULL, or these are all of a step's rows: its results go out too */
} qf_cuda_sample_args;
/* Of the workspace, zeroed once by the caller; the kernels leave them zero. */
#define QF_CUDA_SAMPLE_ZEROED_BYTES 256
qf_status qf_cuda_sample(const qf_cuda_sample_args *args, const qf_cuda_device *device, cudaStream_t stream,
                         qf_error *err);
size_t qf_cuda_sample_workspace_bytes(int32_t vocab_size, int32_t max_rows);

/* counts[slot] = 0, then += the listed tokens: (token_id, word to add) pairs. */
typedef struct qf_cuda_token_count {
    int32_t token_id;
    uint32_t count; /* as stored */
} qf_cuda_token_count;
qf_status qf_cuda_reset_counts(uint16_t *counts, int32_t slot, int32_t vocab_size, const qf_cuda_token_count *list,
                               int32_t num, cudaStream_t stream, qf_error *err);

/* ---- a step's way in and out -------------------------------------------------------------------------------- */

/* The first bytes of a step's metadata. The host sends what is in use, in one piece:
 *     fixed part (header included) | items | sliding items | the rest
 * On the device items and sliding items have room for as many as there can be, and what follows them stands behind. */
typedef struct qf_cuda_step_header {
    uint32_t meta_bytes;   /* of the whole as sent */
    uint32_t items_end, sliding_end; /* of the two lists of items as sent; these three are multiples of 16 */
    uint32_t sequence;     /* the steps before this one */
    uint32_t num_results;  /* token ids */
    uint32_t num_logprobs; /* entries */
    uint32_t reserved[2];
} qf_cuda_step_header;

/* In pinned host memory. */
typedef struct qf_cuda_step_result {
    uint64_t begin_ns, end_ns; /* the device's clock */
    uint32_t number;           /* sequence + 1, written when everything else has been */
} qf_cuda_step_result;

/* On the device; zeroed once. */
typedef struct qf_cuda_step_state {
    uint64_t begin_ns;
    uint32_t counter;  /* steps published so far: whose turn it is */
    uint32_t arrivals; /* of a kernel's blocks, to find the last; left zero */
} qf_cuda_step_state;

struct qf_cuda_step_io {
    const void *staging[2];             /* device: metadata as sent, 16-byte aligned; steps take turns */
    void *device_meta;                  /* where kernels find it */
    const int32_t *token_ids;           /* device */
    const qf_cuda_logprob *logprobs;    /* device */
    qf_cuda_step_state *state;          /* device */
    int32_t *host_token_ids[2];         /* pinned */
    qf_cuda_logprob *host_logprobs[2];  /* pinned */
    qf_cuda_step_result *host_results[2]; /* pinned */
};

/* A step's first kernel: metadata to its place, rows of cosines and sines, embedding rows. */
typedef struct qf_cuda_step_begin_args {
    qf_cuda_step_io io;
    size_t fixed_bytes;                /* of the fixed part: a multiple of 16, as are the next two */
    size_t items_bytes, sliding_bytes; /* room on the device */
    qf_cuda_embedding_args embedding;  /* token_ids: in the fixed part of device_meta. table NULL: none */
    const int32_t *positions;          /* in the fixed part of device_meta */
    const float *inv_freq;             /* (head_dim / 2) */
    double factor;
    float *cos_sin;                    /* (num_tokens, head_dim): cos(angle) | sin(angle), times factor, where
                                          angle = float32(position * inv_freq[j]), taken in double */
    int32_t num_tokens, head_dim;
} qf_cuda_step_begin_args;
qf_status qf_cuda_step_begin(const qf_cuda_step_begin_args *args, cudaStream_t stream, qf_error *err);

/* The results' way out, after all else on the stream. The bounds size the grid; the header has the true numbers. */
qf_status qf_cuda_step_publish(const qf_cuda_step_io *io, int32_t max_results, int32_t max_logprobs,
                               const qf_cuda_device *device, cudaStream_t stream, qf_error *err);

#ifdef __cplusplus
}
#endif

#endif
