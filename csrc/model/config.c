/* config.json of the dense Qwen2 and Qwen2.5 models, in the old and the new spelling of transformers.
 *
 * Required: model_type, vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
 * max_position_embeddings, rope_theta (there or in rope_parameters); with YaRN also factor and
 * original_max_position_embeddings; with use_sliding_window also max_window_layers.
 * Optional, with the default of transformers: num_key_value_heads (= heads), head_dim (= hidden / heads),
 * rms_norm_eps 1e-6, tie_word_embeddings false, use_sliding_window false, hidden_act silu, dtype float32,
 * beta_fast 32, beta_slow 1, truncate true, attention_factor 0.1 ln(factor) + 1. */
#include "model/config.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/fields.h"

#define MAX_VOCAB 4194304
#define MAX_WIDTH 1048576
#define MAX_HEADS 4096
#define MAX_HEAD_DIM 256

/* Models of other families share most keys and would load to nonsense: the type decides. */
static qf_status check_family(const qf_fields *fields, qf_error *err)
{
    const qf_json_value *type = qf_fields_get(fields, "model_type");
    if (!qf_json_is_string(type, "qwen2")) {
        return qf_fields_fail(fields, "model_type", type, "\"qwen2\"", err);
    }
    const qf_json_value *architectures = qf_fields_get(fields, "architectures");
    if (architectures != NULL) {
        bool known = architectures->type == QF_JSON_ARRAY && architectures->length == 1;
        const qf_json_value *first = known ? &architectures->items[0] : architectures;
        if (!known || !qf_json_is_string(first, "Qwen2ForCausalLM")) {
            return qf_fields_fail(fields, "architectures", first, "[\"Qwen2ForCausalLM\"]", err);
        }
    }
    const qf_json_value *auto_map = qf_fields_get(fields, "auto_map");
    if (auto_map != NULL) {
        return qf_fields_fail(fields, "auto_map", auto_map, "no such key: code from a checkpoint is never run", err);
    }
    bool flag;
    QF_TRY(qf_fields_bool(fields, "trust_remote_code", false, &flag, err));
    if (flag) {
        return qf_fields_fail(fields, "trust_remote_code", qf_fields_get(fields, "trust_remote_code"),
                              "false: code from a checkpoint is never run", err);
    }
    QF_TRY(qf_fields_bool(fields, "use_mrope", false, &flag, err));
    if (flag) {
        return qf_fields_fail(fields, "use_mrope", qf_fields_get(fields, "use_mrope"), "false", err);
    }
    const qf_json_value *act = qf_fields_get(fields, "hidden_act");
    if (act != NULL && !qf_json_is_string(act, "silu")) {
        return qf_fields_fail(fields, "hidden_act", act, "\"silu\"", err);
    }
    return QF_OK;
}

static qf_status parse_heads(const qf_fields *fields, qf_model_config *out, qf_error *err)
{
    QF_TRY(qf_fields_int(fields, "num_attention_heads", 1, MAX_HEADS, NULL, &out->num_heads, err));
    QF_TRY(qf_fields_int(fields, "num_key_value_heads", 1, MAX_HEADS, &out->num_heads, &out->num_kv_heads, err));
    if (out->num_heads % out->num_kv_heads != 0) {
        return QF_FAIL(err, QF_ERROR_MODEL,
                       "%s: \"num_key_value_heads\" is %d; expected a divisor of \"num_attention_heads\", %d",
                       fields->what, out->num_kv_heads, out->num_heads);
    }
    int32_t head_dim = out->hidden_size / out->num_heads;
    if (qf_fields_get(fields, "head_dim") == NULL && out->hidden_size % out->num_heads != 0) {
        return QF_FAIL(err, QF_ERROR_MODEL,
                       "%s: \"hidden_size\" is %d; expected a multiple of \"num_attention_heads\", %d, where "
                       "\"head_dim\" is missing",
                       fields->what, out->hidden_size, out->num_heads);
    }
    if (qf_fields_get(fields, "head_dim") != NULL) {
        QF_TRY(qf_fields_int(fields, "head_dim", 2, MAX_HEAD_DIM, NULL, &head_dim, err));
    }
    if (head_dim < 2 || head_dim > MAX_HEAD_DIM || head_dim % 2 != 0) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: the head size is %d (\"head_dim\", or \"hidden_size\" %d / "
                       "\"num_attention_heads\" %d); expected an even number from 2 to %d",
                       fields->what, head_dim, out->hidden_size, out->num_heads, MAX_HEAD_DIM);
    }
    out->head_dim = head_dim;
    return QF_OK;
}

static qf_status parse_sizes(const qf_fields *fields, qf_model_config *out, qf_error *err)
{
    QF_TRY(qf_fields_int(fields, "vocab_size", 1, MAX_VOCAB, NULL, &out->vocab_size, err));
    QF_TRY(qf_fields_int(fields, "hidden_size", 1, MAX_WIDTH, NULL, &out->hidden_size, err));
    QF_TRY(qf_fields_int(fields, "intermediate_size", 1, MAX_WIDTH, NULL, &out->intermediate_size, err));
    QF_TRY(qf_fields_int(fields, "num_hidden_layers", 1, QF_MAX_LAYERS, NULL, &out->num_layers, err));
    QF_TRY(parse_heads(fields, out, err));
    QF_TRY(qf_fields_int(fields, "max_position_embeddings", 1, INT32_MAX, NULL, &out->max_position_embeddings, err));
    double eps = 1e-6;
    QF_TRY(qf_fields_double(fields, "rms_norm_eps", 1e-12, 1.0, &eps, &eps, err));
    out->rms_norm_eps = (float)eps;
    return qf_fields_bool(fields, "tie_word_embeddings", false, &out->tie_word_embeddings, err);
}

/* Of two spellings of one setting, one from the overrides beats both from the file. */
static const qf_json_value *get_either(const qf_fields *fields, const char *key, const char *other_key,
                                       const char **used)
{
    qf_fields layers[2] = {{fields->overrides, NULL, fields->what}, {fields->object, NULL, fields->what}};
    for (int i = 0; i < 2; i++) {
        const char *keys[2] = {key, other_key};
        for (int j = 0; j < 2; j++) {
            const qf_json_value *value = qf_fields_get(&layers[i], keys[j]);
            if (value != NULL) {
                *used = keys[j];
                return value;
            }
        }
        if (qf_json_get(layers[i].object, key) != NULL || qf_json_get(layers[i].object, other_key) != NULL) {
            break; /* null: removed */
        }
    }
    *used = key;
    return NULL;
}

static qf_status parse_dtype(const qf_fields *fields, qf_model_config *out, qf_error *err)
{
    static const struct {
        const char *name;
        qf_dtype dtype;
    } names[] = {{"bfloat16", QF_DTYPE_BF16}, {"float16", QF_DTYPE_F16}, {"float32", QF_DTYPE_F32}};
    const char *key;
    const qf_json_value *value = get_either(fields, "dtype", "torch_dtype", &key);
    out->dtype = QF_DTYPE_F32;
    if (value == NULL) {
        return QF_OK;
    }
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (qf_json_is_string(value, names[i].name)) {
            out->dtype = names[i].dtype;
            return QF_OK;
        }
    }
    return qf_fields_fail(fields, key, value, "\"bfloat16\", \"float16\" or \"float32\"", err);
}

static double yarn_mscale(double factor, double mscale)
{
    return factor <= 1.0 ? 1.0 : 0.1 * mscale * log(factor) + 1.0;
}

/* `factor` is taken as written: it is never replaced by a ratio of context lengths. */
static qf_status parse_yarn(const qf_fields *rope, qf_model_config *out, qf_error *err)
{
    qf_rope_config *yarn = &out->rope;
    int32_t original;
    double fast = 32.0;
    double slow = 1.0;
    double none = 0.0;
    double mscale, mscale_all_dim;
    yarn->yarn = true;
    QF_TRY(qf_fields_double(rope, "factor", 1.0, 65536.0, NULL, &yarn->factor, err));
    QF_TRY(qf_fields_int(rope, "original_max_position_embeddings", 1, INT32_MAX, NULL, &original, err));
    yarn->original_max_position_embeddings = original;
    QF_TRY(qf_fields_double(rope, "beta_fast", 1e-3, 1e6, &fast, &yarn->beta_fast, err));
    QF_TRY(qf_fields_double(rope, "beta_slow", 1e-3, 1e6, &slow, &yarn->beta_slow, err));
    if (yarn->beta_fast < yarn->beta_slow) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: \"beta_fast\" is %g; expected at least \"beta_slow\", %g", rope->what,
                       yarn->beta_fast, yarn->beta_slow);
    }
    QF_TRY(qf_fields_bool(rope, "truncate", true, &yarn->truncate, err));
    QF_TRY(qf_fields_double(rope, "mscale", 0.0, 1e3, &none, &mscale, err));
    QF_TRY(qf_fields_double(rope, "mscale_all_dim", 0.0, 1e3, &none, &mscale_all_dim, err));
    double attention = yarn_mscale(yarn->factor, 1.0);
    if (mscale > 0.0 && mscale_all_dim > 0.0) {
        attention = yarn_mscale(yarn->factor, mscale) / yarn_mscale(yarn->factor, mscale_all_dim);
    }
    QF_TRY(qf_fields_double(rope, "attention_factor", 1e-6, 1e6, &attention, &yarn->attention_factor, err));
    double positions = floor(yarn->factor * (double)original);
    if (positions > (double)INT32_MAX) {
        return QF_FAIL(err, QF_ERROR_MODEL,
                       "%s: \"factor\" %g times \"original_max_position_embeddings\" %d is more than %d positions",
                       rope->what, yarn->factor, original, INT32_MAX);
    }
    out->max_position_embeddings = (int32_t)positions;
    return QF_OK;
}

static qf_status parse_rope_scaling(const qf_fields *rope, qf_model_config *out, qf_error *err)
{
    const qf_json_value *type = qf_fields_get(rope, "rope_type");
    const qf_json_value *old_type = qf_fields_get(rope, "type");
    const char *key = type != NULL ? "rope_type" : "type";
    if (type != NULL && old_type != NULL &&
        (old_type->type != QF_JSON_STRING || !qf_json_is_string(type, old_type->string))) {
        return qf_fields_fail(rope, "type", old_type, "the same as \"rope_type\"", err);
    }
    type = type != NULL ? type : old_type;
    double rotary = 1.0;
    QF_TRY(qf_fields_double(rope, "partial_rotary_factor", 1.0, 1.0, &rotary, &rotary, err));
    if (type == NULL || qf_json_is_string(type, "default")) {
        return QF_OK;
    }
    if (!qf_json_is_string(type, "yarn")) {
        return qf_fields_fail(rope, key, type, "\"default\" or \"yarn\"", err);
    }
    return parse_yarn(rope, out, err);
}

/* The base frequency may stand at the top level or inside the rope object; `layer` is the file or the overrides.
 * Both in one layer must agree. *theta stays as it is if there is none. */
static qf_status read_theta(const qf_json_value *layer, const char *what, double *theta, qf_error *err)
{
    const double min_theta = 1.0 + 1e-6; /* log(theta) divides */
    const double max_theta = 1e12;
    const char *const keys[2] = {"rope_parameters", "rope_scaling"};
    bool found = false;
    if (layer == NULL) {
        return QF_OK;
    }
    qf_fields fields = {layer, NULL, what};
    if (qf_fields_get(&fields, "rope_theta") != NULL) {
        QF_TRY(qf_fields_double(&fields, "rope_theta", min_theta, max_theta, NULL, theta, err));
        found = true;
    }
    for (int i = 0; i < 2; i++) {
        char inner_what[64];
        (void)snprintf(inner_what, sizeof inner_what, "%s %s", what, keys[i]);
        qf_fields rope = {qf_json_get(layer, keys[i]), NULL, inner_what};
        if (qf_fields_get(&rope, "rope_theta") == NULL) {
            continue;
        }
        double value;
        QF_TRY(qf_fields_double(&rope, "rope_theta", min_theta, max_theta, NULL, &value, err));
        if (found && value != *theta) {
            return QF_FAIL(err, QF_ERROR_MODEL, "%s: \"rope_theta\" is %g but %g elsewhere in the file; expected one "
                           "value", inner_what, value, *theta);
        }
        *theta = value;
        found = true;
    }
    return QF_OK;
}

static qf_status parse_rope(const qf_fields *fields, qf_model_config *out, qf_error *err)
{
    const char *key;
    char what[64];
    out->rope.attention_factor = 1.0;
    out->rope.factor = 1.0;
    out->rope.theta = 0.0;
    QF_TRY(read_theta(fields->object, fields->what, &out->rope.theta, err));
    QF_TRY(read_theta(fields->overrides, "hf_overrides", &out->rope.theta, err));
    if (!(out->rope.theta > 0.0)) {
        return qf_fields_fail(fields, "rope_theta", NULL, "a number, here or in \"rope_parameters\"", err);
    }
    const qf_json_value *scaling = get_either(fields, "rope_parameters", "rope_scaling", &key);
    if (scaling == NULL) {
        return QF_OK;
    }
    if (scaling->type != QF_JSON_OBJECT) {
        return qf_fields_fail(fields, key, scaling, "an object or null", err);
    }
    (void)snprintf(what, sizeof what, "%s %s", fields->what, key);
    qf_fields rope = {scaling, NULL, what};
    return parse_rope_scaling(&rope, out, err);
}

/* The 1M models attend densely up to the length they were trained with; beyond it they need dual chunk attention,
 * which is not built: the context ends there. */
static qf_status parse_dual_chunk(const qf_fields *fields, qf_model_config *out, qf_error *err)
{
    const qf_json_value *chunk = qf_fields_get(fields, "dual_chunk_attention_config");
    if (chunk == NULL) {
        return QF_OK;
    }
    if (chunk->type != QF_JSON_OBJECT) {
        return qf_fields_fail(fields, "dual_chunk_attention_config", chunk, "an object or null", err);
    }
    qf_fields inner = {chunk, NULL, "config.json dual_chunk_attention_config"};
    int32_t original;
    QF_TRY(qf_fields_int(&inner, "original_max_position_embeddings", 1, INT32_MAX, NULL, &original, err));
    if (out->max_position_embeddings > original) {
        out->max_position_embeddings = original;
    }
    return QF_OK;
}

/* `layer_types` repeats what the window keys say; a contradiction is an error. */
static qf_status check_layer_types(const qf_fields *fields, const qf_model_config *config, qf_error *err)
{
    const qf_json_value *types = qf_fields_get(fields, "layer_types");
    if (types == NULL) {
        return QF_OK;
    }
    if (types->type != QF_JSON_ARRAY || types->length != (size_t)config->num_layers) {
        return qf_fields_fail(fields, "layer_types", types, "a list with one entry per layer", err);
    }
    for (int32_t i = 0; i < config->num_layers; i++) {
        const char *expected = qf_model_config_layer_slides(config, i) ? "sliding_attention" : "full_attention";
        if (!qf_json_is_string(&types->items[i], expected)) {
            char text[80];
            return QF_FAIL(err, QF_ERROR_MODEL,
                           "%s: \"layer_types\" has %s for layer %d; expected \"%s\" by the sliding window keys",
                           fields->what, qf_json_describe(&types->items[i], text, sizeof text), i, expected);
        }
    }
    return QF_OK;
}

/* Most files carry a `sliding_window` that is off: only use_sliding_window turns it on. */
static qf_status parse_window(const qf_fields *fields, qf_model_config *out, qf_error *err)
{
    bool use;
    out->sliding_window = 0;
    out->max_window_layers = out->num_layers;
    QF_TRY(qf_fields_bool(fields, "use_sliding_window", false, &use, err));
    if (use && qf_fields_get(fields, "sliding_window") != NULL) {
        QF_TRY(qf_fields_int(fields, "sliding_window", 1, INT32_MAX, NULL, &out->sliding_window, err));
        QF_TRY(qf_fields_int(fields, "max_window_layers", 0, INT32_MAX, NULL, &out->max_window_layers, err));
    }
    return check_layer_types(fields, out, err);
}

static qf_status parse_quantization(const qf_fields *fields, qf_model_config *out, qf_error *err)
{
    const char *key;
    const qf_json_value *quant = get_either(fields, "quantization_config", "compression_config", &key);
    if (quant == NULL) {
        return QF_OK;
    }
    if (quant->type != QF_JSON_OBJECT) {
        return qf_fields_fail(fields, key, quant, "an object or null", err);
    }
    return qf_quant_config_parse(quant, &out->quant, err);
}

qf_status qf_model_config_parse(const qf_json_value *root, const qf_json_value *overrides, qf_model_config *out,
                                qf_error *err)
{
    char text[80];
    memset(out, 0, sizeof *out);
    if (root == NULL || root->type != QF_JSON_OBJECT) {
        return QF_FAIL(err, QF_ERROR_MODEL, "config.json holds %s; expected an object",
                       qf_json_describe(root, text, sizeof text));
    }
    if (overrides != NULL && overrides->type != QF_JSON_OBJECT) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "hf_overrides is %s; expected an object",
                       qf_json_describe(overrides, text, sizeof text));
    }
    qf_fields fields = {root, overrides, "config.json"};
    QF_TRY(check_family(&fields, err));
    QF_TRY(parse_sizes(&fields, out, err));
    QF_TRY(parse_dtype(&fields, out, err));
    QF_TRY(parse_rope(&fields, out, err));
    QF_TRY(parse_dual_chunk(&fields, out, err));
    QF_TRY(parse_window(&fields, out, err));
    return parse_quantization(&fields, out, err);
}

bool qf_model_config_layer_slides(const qf_model_config *self, int32_t layer)
{
    return self->sliding_window > 0 && layer >= self->max_window_layers;
}
