/* The CPU backend's ops. One scalar reference per op; AVX2, AVX-512 and AVX-512 VNNI versions chosen at run time.
 * Every op runs over the thread pool; each output element is computed by one thread in an order fixed by shapes,
 * so results do not depend on the batch, the chunking or the number of threads (per instruction-set path). */
#ifndef QF_BACKEND_CPU_CPU_H
#define QF_BACKEND_CPU_CPU_H

#include "backend/ops.h"
#include "base/status.h"
#include "base/threads.h"
#include "model/checkpoint.h"

typedef enum qf_isa {
    QF_ISA_SCALAR = 0,
    QF_ISA_AVX2,        /* AVX2, FMA, F16C */
    QF_ISA_AVX512,      /* AVX-512 F, BW, DQ, VL */
    QF_ISA_AVX512_VNNI, /* and VNNI */
    QF_ISA_COUNT
} qf_isa;

qf_isa qf_isa_detect(void); /* the best that this processor and operating system support */
const char *qf_isa_name(qf_isa isa); /* "scalar", "avx2", "avx512", "avx512_vnni" */
/* false if unknown name */
bool qf_isa_parse(const char *name, qf_isa *out);

/* What an op needs beside its arguments: threads, kernels, scratch. */
typedef struct qf_cpu_context qf_cpu_context;
qf_status qf_cpu_context_create(qf_isa isa, qf_thread_pool *pool, int32_t max_num_tokens, int32_t max_features,
                                qf_cpu_context **out, qf_error *err); /* isa beyond the machine's: invalid argument */
void qf_cpu_context_destroy(qf_cpu_context *self); /* NULL-safe; the pool is borrowed */
/* Bytes of scratch memory that qf_cpu_context_create reserves: exact, before allocation. */
size_t qf_cpu_context_bytes(int32_t num_threads, int32_t max_num_tokens, int32_t max_features);

void qf_cpu_embedding(qf_cpu_context *ctx, const qf_embedding_args *args);
void qf_cpu_rmsnorm(qf_cpu_context *ctx, const qf_rmsnorm_args *args);
void qf_cpu_silu_mul(qf_cpu_context *ctx, const qf_silu_mul_args *args);
void qf_cpu_rope_kv_write(qf_cpu_context *ctx, const qf_rope_kv_write_args *args);
void qf_cpu_attention(qf_cpu_context *ctx, const qf_attention_args *args);
/* Bytes of one of k and v for one layer. Not for QF_KV_AUTO. */
size_t qf_cpu_kv_cache_bytes(int32_t num_blocks, int32_t block_size, int32_t num_kv_heads, int32_t head_dim,
                             qf_kv_format format);
/* The tables of qf_key_bias: floats, and their content. Sequences may have max_model_len positions. */
size_t qf_cpu_tile_turn_floats(int32_t head_dim, int32_t max_model_len);
size_t qf_cpu_step_turn_floats(int32_t head_dim);
void qf_cpu_fill_turns(const float *inv_freq, float attention_factor, int32_t head_dim, int32_t max_model_len,
                       float *tile_turn, float *step_turn);

/* --- linear layers ------------------------------------------------------------------------------------- */

typedef enum qf_weight_kind { QF_WEIGHT_F32 = 0, QF_WEIGHT_BF16, QF_WEIGHT_F16, QF_WEIGHT_W8, QF_WEIGHT_W4 } qf_weight_kind;

typedef struct qf_cpu_linear_options {
    int32_t quantize_bits;     /* 0: as the source is; 4 or 8: round a 16/32-bit source to that many bits */
    int32_t group_size;        /* for quantize_bits: 32, 64 or 128 */
} qf_cpu_linear_options;

typedef struct qf_cpu_linear qf_cpu_linear; /* packed weights, bias, permutation */

/* Packs in parallel over the pool. The layout is documented at the top of cpu/linear_pack.c. */
qf_status qf_cpu_linear_create(const qf_linear_source *source, const qf_cpu_linear_options *options,
                               qf_thread_pool *pool, qf_cpu_linear **out, qf_error *err);
void qf_cpu_linear_destroy(qf_cpu_linear *self); /* NULL-safe */
/* Bytes that qf_cpu_linear_create will allocate for the packed weights: exact, before allocation. */
size_t qf_cpu_linear_bytes(const qf_linear_source *source, const qf_cpu_linear_options *options);
qf_weight_kind qf_cpu_linear_kind(const qf_cpu_linear *self);
/* Made of a rank's part, and not packed in 4 or 8 bits as the whole would be: see num_widened in backend.h. */
bool qf_cpu_linear_is_widened(const qf_cpu_linear *self, const qf_linear_source *source,
                              const qf_cpu_linear_options *options);

typedef enum qf_activation { QF_ACTIVATION_F32 = 0, QF_ACTIVATION_I8 } qf_activation;

#define QF_CPU_MAX_FUSED_LINEARS 3

/* Up to three linears over the same input in one parallel region: outs[i] = x W_i^T + b_i. */
typedef struct qf_cpu_linear_args {
    const float *x;                                            /* (num_tokens, k) */
    const qf_cpu_linear *linears[QF_CPU_MAX_FUSED_LINEARS];    /* each (n_i, k) */
    float *outs[QF_CPU_MAX_FUSED_LINEARS];                     /* each (num_tokens, n_i) */
    int32_t num_linears;
    int32_t num_tokens;
    qf_activation activation; /* I8: x is rounded to int8 per block of the weight's group (W4A8); ignored for
                                 16- and 32-bit weights, which always use float32 activations */
} qf_cpu_linear_args;

void qf_cpu_linear_run(qf_cpu_context *ctx, const qf_cpu_linear_args *args);

#endif
