/* What config.json of a dense Qwen2 / Qwen2.5 checkpoint says, checked. */
#ifndef QF_MODEL_CONFIG_H
#define QF_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/json.h"
#include "base/status.h"

#define QF_MAX_LAYERS 1024

typedef enum qf_quant_method {
    QF_QUANT_NONE = 0,
    QF_QUANT_AWQ,               /* AutoAWQ "gemm" */
    QF_QUANT_GPTQ,              /* AutoGPTQ v1, or v2 where gptq_v2 is set */
    QF_QUANT_COMPRESSED_TENSORS /* pack-quantized, weights only */
} qf_quant_method;

#define QF_QUANT_MAX_IGNORE 64
#define QF_QUANT_MAX_PATTERN 128

/* An output head that is quantised otherwise than the layers. */
typedef struct qf_quant_head {
    int32_t bits;       /* 0: there is no such head */
    int32_t group_size; /* as in qf_quant_config */
    bool symmetric, desc_act;
} qf_quant_head;

typedef struct qf_quant_config {
    qf_quant_method method;
    int32_t bits;       /* 4 or 8 */
    int32_t group_size; /* input columns that share a scale; -1: the whole row */
    bool symmetric;     /* no zero points stored, or all alike */
    bool desc_act;      /* GPTQ act-order: g_idx is a permutation of groups */
    bool gptq_v2;       /* stored zero points are exact, not one less */
    qf_quant_head head;
    int32_t num_ignore; /* modules left in 16 bits: names, "re:" patterns, or substrings (AWQ) */
    char ignore[QF_QUANT_MAX_IGNORE][QF_QUANT_MAX_PATTERN];
} qf_quant_config;

typedef struct qf_rope_config {
    double theta;
    bool yarn;
    double factor; /* as written in the file */
    int64_t original_max_position_embeddings;
    double beta_fast, beta_slow;
    bool truncate;
    double attention_factor; /* multiplies cos and sin; 1 without YaRN */
} qf_rope_config;

typedef struct qf_model_config {
    int32_t vocab_size;
    int32_t hidden_size;
    int32_t intermediate_size;
    int32_t num_layers;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim; /* 64 or 128; an even number up to 256 runs too */
    int32_t max_position_embeddings; /* effective: with YaRN, factor * original */
    float rms_norm_eps;
    bool tie_word_embeddings;
    int32_t sliding_window;    /* tokens; 0 where use_sliding_window is not true */
    int32_t max_window_layers; /* layers with index >= this one slide */
    qf_dtype dtype;            /* of the checkpoint as config.json says it: F32, BF16 or F16 */
    qf_rope_config rope;
    qf_quant_config quant;
} qf_model_config;

/* `root` is the parsed config.json; `overrides` (or NULL) an object whose members replace those of the same name
 * at the top level before anything is read ("rope_scaling": null removes one). */
qf_status qf_model_config_parse(const qf_json_value *root, const qf_json_value *overrides, qf_model_config *out,
                                qf_error *err);

/* Reads quantize_config.json (GPTQ) or quant_config.json (AWQ) for old checkpoints without quantization_config. */
qf_status qf_quant_config_parse(const qf_json_value *object, qf_quant_config *out, qf_error *err);

/* inv_freq: (head_dim / 2). The plain or YaRN frequencies, computed in double (Peng et al., 2023, as implemented
 * by transformers and vLLM). */
void qf_rope_inv_freq(const qf_rope_config *rope, int32_t head_dim, float *inv_freq);

/* True if layer `layer` attends only to the newest `sliding_window` tokens. */
bool qf_model_config_layer_slides(const qf_model_config *self, int32_t layer);

#endif
