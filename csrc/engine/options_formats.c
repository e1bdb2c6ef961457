/* The numeric formats among the engine's options: strings against the checkpoint and the device. */
#include "engine/options.h"

#include <stdio.h>
#include <string.h>

#include "engine/engine.h"

/* --- choices ------------------------------------------------------------------------------------------- */

qf_status qf_choose(const char *option, const char *text, const qf_choice *choices, int *out, qf_error *err)
{
    char known[256] = "";
    for (const qf_choice *c = choices; c->name != NULL; c++) {
        if (text != NULL && strcmp(text, c->name) == 0) {
            if (c->value == QF_NOT_BUILT) {
                return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED, "%s=\"%s\" is not implemented yet", option, text);
            }
            *out = c->value;
            return QF_OK;
        }
        size_t used = strlen(known);
        (void)snprintf(known + used, sizeof known - used, "%s%s", used > 0 ? ", " : "", c->name);
    }
    return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s must be one of %s; got \"%.40s\"", option, known,
                   text != NULL ? text : "(null)");
}

/* --- numeric formats ----------------------------------------------------------------------------------- */

enum { AS_IS = 0, WANT_NONE, WANT_W4, WANT_AWQ, WANT_GPTQ, WANT_COMPRESSED_TENSORS };

static const char *method_name(qf_quant_method method)
{
    switch (method) {
    case QF_QUANT_NONE: return "none";
    case QF_QUANT_AWQ: return "awq";
    case QF_QUANT_GPTQ: return "gptq";
    case QF_QUANT_COMPRESSED_TENSORS: return "compressed-tensors";
    }
    return "?";
}

static qf_status resolve_quantization(const qf_engine_options *o, const qf_model_config *config,
                                      qf_resolved_options *out, bool *quantized, qf_error *err)
{
    static const qf_choice choices[] = {{"auto", AS_IS},       {"none", WANT_NONE},
                                     {"w4", WANT_W4},       {"awq", WANT_AWQ},
                                     {"gptq", WANT_GPTQ},   {"compressed-tensors", WANT_COMPRESSED_TENSORS},
                                     {"w8", QF_NOT_BUILT},     {"fp8", QF_NOT_BUILT},
                                     {NULL, 0}};
    static const int wanted_for[] = {WANT_NONE, WANT_AWQ, WANT_GPTQ, WANT_COMPRESSED_TENSORS};
    int want;
    QF_TRY(qf_choose("quantization", o->quantization, choices, &want, err));
    qf_quant_method method = config->quant.method;
    if (want == WANT_W4) {
        if (method != QF_QUANT_NONE) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                           "quantization=\"w4\" quantises a 16- or 32-bit checkpoint; this one is %s already",
                           method_name(method));
        }
        out->backend.quantize_bits = 4;
        out->quantization = "w4";
    } else {
        if (want != AS_IS && want != wanted_for[method]) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                           "quantization=\"%s\" does not fit the checkpoint, which is \"%s\"", o->quantization,
                           method_name(method));
        }
        out->quantization = method_name(method);
    }
    out->backend.quantize_group_size = o->quantization_group_size;
    *quantized = want == WANT_W4 || method != QF_QUANT_NONE;
    return QF_OK;
}

/* --- the KV cache ---------------------------------------------------------------------------------------- */

static qf_status check_layers(const qf_engine_options *o, const qf_model_config *config, qf_error *err)
{
    for (int32_t i = 0; i < o->num_kv_cache_16bit_layers; i++) {
        const int32_t layer = o->kv_cache_16bit_layers[i];
        if (layer < 0 || layer >= config->num_layers) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "kv_cache_16bit_layers[%d] must be 0 to %d; got %d", i,
                           config->num_layers - 1, layer);
        }
    }
    return QF_OK;
}

/* The layers in order, each once; how many there are. */
static int32_t list_layers(const qf_engine_options *o, const qf_model_config *config, qf_resolved_options *out)
{
    int32_t count = 0;
    for (int32_t i = 0; i < o->num_kv_cache_16bit_layers; i++) {
        out->kv_16bit_layers[o->kv_cache_16bit_layers[i]] = 1;
    }
    for (int32_t i = 0; i < config->num_layers; i++) {
        if (out->kv_16bit_layers[i] != 0) {
            out->kv_cache_16bit_layers[count++] = i;
        }
    }
    return count;
}

/* What a 16- or 32-bit cache makes of the window and the layers: nothing, they change nothing there. */
static qf_status resolve_kv_cache(const qf_engine_options *o, const qf_model_config *config, bool on_device,
                                  bool float32, qf_resolved_options *out, qf_error *err)
{
    static const qf_choice formats[] = {
        {"auto", QF_KV_AUTO}, {"bfloat16", QF_KV_BF16}, {"float32", QF_KV_F32}, {"fp8_e4m3", QF_KV_FP8_E4M3},
        {"fp8", QF_KV_FP8_E4M3}, {"int8", QF_KV_INT8},  {"int4", QF_KV_INT4},   {"nf4", QF_KV_NF4},
        {"fp8_e5m2", QF_NOT_BUILT}, {NULL, 0}};
    int format;
    QF_TRY(qf_choose("kv_cache_dtype", o->kv_cache_dtype, formats, &format, err));
    QF_TRY(check_layers(o, config, err));
    if (format == QF_KV_AUTO) {
        format = float32 ? QF_KV_F32 : QF_KV_BF16;
    }
    out->kv_cache_dtype = qf_kv_format_name((qf_kv_format)format);
    out->backend.float32 = format == QF_KV_F32;
    if (!qf_kv_is_low_bit((qf_kv_format)format)) {
        if (on_device && out->backend.float32 != float32) {
            return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                           "kv_cache_dtype=\"%s\" with dtype=\"%s\" is not implemented on the GPU; leave it at \"auto\"",
                           o->kv_cache_dtype, float32 ? "float32" : "bfloat16");
        }
        return QF_OK;
    }
    if (config->head_dim % QF_KV_GROUP != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "kv_cache_dtype=\"%s\" needs a head_dim that is a multiple of %d; the model's is %d",
                       o->kv_cache_dtype, QF_KV_GROUP, config->head_dim);
    }
    out->backend.float32 = float32;
    out->backend.kv_format = (qf_kv_format)format;
    out->num_kv_cache_16bit_layers = list_layers(o, config, out);
    if (out->num_kv_cache_16bit_layers > 0) {
        out->backend.kv_16bit_layers = out->kv_16bit_layers;
    }
    if (out->num_kv_cache_16bit_layers < config->num_layers) {
        out->backend.kv_window_tokens = o->kv_cache_16bit_window;
    }
    return QF_OK;
}

/* --- all of them ------------------------------------------------------------------------------------------- */

qf_status qf_options_resolve_formats(const qf_engine_options *o, const qf_model_config *config, bool on_device,
                                     qf_resolved_options *out, qf_error *err)
{
    enum { AUTO = 0, BF16, F32, I8 };
    static const qf_choice dtypes[] = {{"auto", AUTO}, {"bfloat16", BF16}, {"float16", BF16},
                                    {"half", BF16}, {"float32", F32},   {"float", F32}, {NULL, 0}};
    static const qf_choice activations[] = {{"auto", AUTO}, {"int8", I8}, {"float32", F32}, {NULL, 0}};
    static const qf_choice heads[] = {{"auto", QF_HEAD_AUTO}, {"model", QF_HEAD_16}, {"int8", QF_HEAD_8},
                                   {"int4", QF_HEAD_4}, {NULL, 0}};
    int dtype, activation, head;
    bool quantized = false;
    QF_TRY(qf_choose("dtype", o->dtype, dtypes, &dtype, err));
    QF_TRY(qf_choose("activation_dtype", o->activation_dtype, activations, &activation, err));
    QF_TRY(qf_choose("lm_head_dtype", o->lm_head_dtype, heads, &head, err));
    QF_TRY(resolve_quantization(o, config, out, &quantized, err));

    bool float32 = dtype == F32 || (dtype == AUTO && config->dtype == QF_DTYPE_F32);
    bool int8 = activation == I8 || (activation == AUTO && quantized && dtype != F32);
    QF_TRY(resolve_kv_cache(o, config, on_device, float32, out, err));
    if (on_device) {
        if (activation == I8) {
            return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                           "activation_dtype=\"int8\" is not implemented on the GPU; leave it at \"auto\"");
        }
        int8 = false;
    }
    if (head == QF_HEAD_AUTO) {
        /* A tied 16-bit head is the embedding: kept on the GPU, it would make offloading save nothing. */
        bool apart = on_device && o->cpu_offload != NULL && config->tie_word_embeddings && !float32;
        head = (quantized && int8) || apart ? QF_HEAD_8 : QF_HEAD_16;
    }
    if (on_device && float32 && (head != QF_HEAD_16 || out->backend.quantize_bits != 0)) {
        return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                       "dtype=\"float32\" on the GPU is the reference and takes weights as they are: no "
                       "quantization=\"w4\", no lm_head_dtype=\"%s\"", o->lm_head_dtype);
    }
    out->backend.int8_activations = int8;
    out->backend.head_bits = head;
    out->dtype = float32 ? "float32" : "bfloat16";
    out->activation_dtype = int8 ? "int8" : on_device && !float32 ? "bfloat16" : "float32";
    out->lm_head_dtype = head == QF_HEAD_8 ? "int8" : head == QF_HEAD_4 ? "int4" : "model";
    return QF_OK;
}

