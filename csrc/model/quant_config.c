/* How a checkpoint says that its linears are quantised: "quantization_config" in config.json, or the files of the
 * first AutoGPTQ and AutoAWQ versions.
 *
 * The list of modules left in 16 bits is kept for reports only: what a module's tensors are decides how it is read. */
#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "model/config.h"
#include "model/fields.h"

static qf_status check_choice(const qf_fields *fields, const char *key, int32_t value, const int32_t *choices,
                              size_t count, const char *expected, qf_error *err)
{
    for (size_t i = 0; i < count; i++) {
        if (value == choices[i]) {
            return QF_OK;
        }
    }
    return QF_FAIL(err, QF_ERROR_MODEL, "%s: \"%s\" is %d; expected %s", fields->what, key, value, expected);
}

static qf_status parse_group_size(const qf_fields *fields, const char *key, qf_quant_config *out, qf_error *err)
{
    static const int32_t choices[] = {-1, 32, 64, 128};
    QF_TRY(qf_fields_int(fields, key, INT32_MIN, INT32_MAX, NULL, &out->group_size, err));
    return check_choice(fields, key, out->group_size, choices, 4, "-1, 32, 64 or 128", err);
}

static qf_status parse_bits(const qf_fields *fields, const char *key, bool eight, qf_quant_config *out, qf_error *err)
{
    static const int32_t choices[] = {4, 8};
    QF_TRY(qf_fields_int(fields, key, INT32_MIN, INT32_MAX, NULL, &out->bits, err));
    return check_choice(fields, key, out->bits, choices, eight ? 2 : 1, eight ? "4 or 8" : "4", err);
}

/* A value that other engines obey and that would change what the tensors mean: it must be absent, null, false or
 * empty. */
static qf_status reject_key(const qf_fields *fields, const char *key, const char *reason, qf_error *err)
{
    const qf_json_value *value = qf_fields_get(fields, key);
    if (value == NULL || (value->type == QF_JSON_BOOL && !value->boolean)) {
        return QF_OK;
    }
    bool container = value->type == QF_JSON_OBJECT || value->type == QF_JSON_ARRAY;
    if (container && value->length == 0) {
        return QF_OK;
    }
    return qf_fields_fail(fields, key, value, reason, err);
}

static qf_status parse_ignore(const qf_fields *fields, const char *key, qf_quant_config *out, qf_error *err)
{
    const qf_json_value *list = qf_fields_get(fields, key);
    if (list == NULL) {
        return QF_OK;
    }
    if (list->type != QF_JSON_ARRAY || list->length > QF_QUANT_MAX_IGNORE) {
        char expected[64];
        (void)snprintf(expected, sizeof expected, "a list of at most %d strings", QF_QUANT_MAX_IGNORE);
        return qf_fields_fail(fields, key, list, expected, err);
    }
    for (size_t i = 0; i < list->length; i++) {
        const qf_json_value *item = &list->items[i];
        if (item->type != QF_JSON_STRING || item->length >= QF_QUANT_MAX_PATTERN ||
            strlen(item->string) != item->length) {
            char expected[64];
            (void)snprintf(expected, sizeof expected, "strings of at most %d bytes", QF_QUANT_MAX_PATTERN - 1);
            return qf_fields_fail(fields, key, item, expected, err);
        }
        memcpy(out->ignore[i], item->string, item->length + 1);
    }
    out->num_ignore = (int32_t)list->length;
    return QF_OK;
}

/* Compares without regard to case: AutoAWQ wrote "GEMM" and "gemm". */
static bool equals_lower(const char *text, const char *lower)
{
    size_t i = 0;
    while (text[i] != '\0' && tolower((unsigned char)text[i]) == lower[i]) {
        i++;
    }
    return text[i] == '\0' && lower[i] == '\0';
}

static qf_status parse_awq(const qf_fields *fields, qf_quant_config *out, qf_error *err)
{
    bool old = qf_fields_get(fields, "w_bit") != NULL || qf_fields_get(fields, "q_group_size") != NULL;
    const char *version;
    bool zero_point;
    out->method = QF_QUANT_AWQ;
    QF_TRY(parse_bits(fields, old ? "w_bit" : "bits", false, out, err));
    QF_TRY(parse_group_size(fields, old ? "q_group_size" : "group_size", out, err));
    QF_TRY(qf_fields_string(fields, "version", "gemm", &version, err));
    if (!equals_lower(version, "gemm")) {
        return qf_fields_fail(fields, "version", qf_fields_get(fields, "version"), "\"gemm\"", err);
    }
    QF_TRY(qf_fields_bool(fields, "zero_point", true, &zero_point, err));
    out->symmetric = !zero_point;
    return parse_ignore(fields, "modules_to_not_convert", out, err);
}

/* GPTQModel writes the format under two names. */
static qf_status parse_gptq_format(const qf_fields *fields, qf_quant_config *out, qf_error *err)
{
    static const char *const keys[2] = {"checkpoint_format", "format"};
    const char *first = NULL;
    for (int i = 0; i < 2; i++) {
        const qf_json_value *value = qf_fields_get(fields, keys[i]);
        if (value == NULL) {
            continue;
        }
        out->gptq_v2 = qf_json_is_string(value, "gptq_v2");
        if (!out->gptq_v2 && !qf_json_is_string(value, "gptq")) {
            return qf_fields_fail(fields, keys[i], value, "\"gptq\" or \"gptq_v2\"", err);
        }
        if (first != NULL && !qf_json_is_string(value, first)) {
            return qf_fields_fail(fields, keys[i], value, "the same as \"checkpoint_format\"", err);
        }
        first = value->string;
    }
    return QF_OK;
}

static qf_status parse_gptq(const qf_fields *fields, qf_quant_config *out, qf_error *err)
{
    out->method = QF_QUANT_GPTQ;
    QF_TRY(parse_bits(fields, "bits", true, out, err));
    QF_TRY(parse_group_size(fields, "group_size", out, err));
    QF_TRY(qf_fields_bool(fields, "sym", true, &out->symmetric, err));
    QF_TRY(qf_fields_bool(fields, "desc_act", false, &out->desc_act, err));
    QF_TRY(parse_gptq_format(fields, out, err));
    QF_TRY(reject_key(fields, "is_marlin_format", "false: the marlin layout is not read", err));
    QF_TRY(reject_key(fields, "dynamic", "none: settings per module are not read", err));
    const qf_json_value *pack = qf_fields_get(fields, "pack_dtype");
    if (pack != NULL && !qf_json_is_string(pack, "int32")) {
        return qf_fields_fail(fields, "pack_dtype", pack, "\"int32\"", err);
    }
    return parse_ignore(fields, "modules_to_not_convert", out, err);
}

static qf_status parse_actorder(const qf_fields *weights, qf_quant_config *out, qf_error *err)
{
    static const struct {
        const char *name;
        bool by_group;
    } names[] = {{"group", true}, {"dynamic", true}, {"weight", false}, {"static", false}};
    const qf_json_value *value = qf_fields_get(weights, "actorder");
    if (value == NULL) {
        return QF_OK;
    }
    if (value->type == QF_JSON_BOOL) {
        out->desc_act = value->boolean;
        return QF_OK;
    }
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (qf_json_is_string(value, names[i].name)) {
            out->desc_act = names[i].by_group;
            return QF_OK;
        }
    }
    return qf_fields_fail(weights, "actorder", value, "\"group\", \"weight\", \"static\" or null", err);
}

/* The "weights" object of a config group. */
static qf_status parse_weights(const qf_fields *weights, qf_quant_config *out, qf_error *err)
{
    const char *text;
    bool dynamic;
    QF_TRY(parse_bits(weights, "num_bits", true, out, err));
    QF_TRY(qf_fields_string(weights, "type", "int", &text, err));
    if (strcmp(text, "int") != 0) {
        return qf_fields_fail(weights, "type", qf_fields_get(weights, "type"), "\"int\"", err);
    }
    QF_TRY(qf_fields_bool(weights, "symmetric", true, &out->symmetric, err));
    QF_TRY(qf_fields_bool(weights, "dynamic", false, &dynamic, err));
    if (dynamic) {
        return qf_fields_fail(weights, "dynamic", qf_fields_get(weights, "dynamic"), "false", err);
    }
    out->group_size = -1;
    const qf_json_value *strategy = qf_fields_get(weights, "strategy");
    bool has_group_size = qf_fields_get(weights, "group_size") != NULL;
    if (qf_json_is_string(strategy, "group") || (strategy == NULL && has_group_size)) {
        QF_TRY(parse_group_size(weights, "group_size", out, err));
    } else if (!qf_json_is_string(strategy, "channel")) {
        return qf_fields_fail(weights, "strategy", strategy, "\"group\" or \"channel\"", err);
    } else if (has_group_size) {
        QF_TRY(parse_group_size(weights, "group_size", out, err));
        if (out->group_size != -1) {
            return qf_fields_fail(weights, "group_size", qf_fields_get(weights, "group_size"),
                                  "null or -1 with strategy \"channel\"", err);
        }
    }
    QF_TRY(reject_key(weights, "block_structure", "null", err));
    return parse_actorder(weights, out, err);
}

static bool targets_one(const qf_json_value *targets, const char *name)
{
    return targets != NULL && targets->type == QF_JSON_ARRAY && targets->length == 1 &&
           qf_json_is_string(&targets->items[0], name);
}

static bool targets_linears(const qf_json_value *targets) { return targets_one(targets, "Linear"); }

/* The head by its name, in the ways of writing that there are. */
static bool targets_head(const qf_json_value *targets)
{
    static const char *const names[] = {"lm_head", "re:lm_head", "re:lm_head$", "re:^lm_head$", "re:.*lm_head",
                                        "re:.*lm_head$"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (targets_one(targets, names[i])) {
            return true;
        }
    }
    return false;
}

/* A preset's name stands for a whole group; its value is the list of targets. */
static bool parse_preset(const char *name, qf_quant_config *out)
{
    static const struct {
        const char *name;
        int32_t bits, group_size;
        bool symmetric;
    } presets[] = {{"W4A16", 4, 128, true}, {"W4A16_ASYM", 4, 128, false}, {"W8A16", 8, -1, true}};
    for (size_t i = 0; i < sizeof presets / sizeof presets[0]; i++) {
        if (strcmp(name, presets[i].name) == 0) {
            out->bits = presets[i].bits;
            out->group_size = presets[i].group_size;
            out->symmetric = presets[i].symmetric;
            return true;
        }
    }
    return false;
}

static qf_status parse_group(const qf_fields *groups, const qf_json_value *group, qf_quant_config *out, qf_error *err)
{
    char what[128], key[64];
    (void)qf_printable(group->key, group->key_length, key, sizeof key);
    if (group->type == QF_JSON_ARRAY) {
        if (!targets_linears(group)) {
            return qf_fields_fail(groups, key, group, "[\"Linear\"]", err);
        }
        if (!parse_preset(key, out)) {
            return qf_fields_fail(groups, key, group, "an object, or a list for W4A16, W4A16_ASYM or W8A16", err);
        }
        return QF_OK;
    }
    if (group->type != QF_JSON_OBJECT) {
        return qf_fields_fail(groups, key, group, "an object", err);
    }
    (void)snprintf(what, sizeof what, "%s.%s", groups->what, key);
    qf_fields fields = {group, NULL, what};
    const qf_json_value *targets = qf_fields_get(&fields, "targets");
    if (!targets_linears(targets) && !targets_head(targets)) {
        const qf_json_value *shown = targets;
        if (targets != NULL && targets->type == QF_JSON_ARRAY && targets->length == 1) {
            shown = &targets->items[0];
        }
        return qf_fields_fail(&fields, "targets", shown, "[\"Linear\"], or \"re:.*lm_head$\" alone", err);
    }
    QF_TRY(reject_key(&fields, "input_activations", "null: only weights are read in low precision", err));
    QF_TRY(reject_key(&fields, "output_activations", "null: only weights are read in low precision", err));
    const qf_json_value *format = qf_fields_get(&fields, "format");
    if (format != NULL && !qf_json_is_string(format, "pack-quantized")) {
        return qf_fields_fail(&fields, "format", format, "\"pack-quantized\"", err);
    }
    const qf_json_value *weights = qf_fields_get(&fields, "weights");
    if (weights == NULL || weights->type != QF_JSON_OBJECT) {
        return qf_fields_fail(&fields, "weights", weights, "an object", err);
    }
    qf_fields inner = {weights, NULL, what};
    return parse_weights(&inner, out, err);
}

/* One setting for all linears of the layers, and perhaps another for the head. */
static qf_status parse_groups(const qf_json_value *groups, qf_quant_config *out, qf_error *err)
{
    qf_fields fields = {groups, NULL, "quantization_config.config_groups"};
    bool found = false;
    for (size_t i = 0; i < groups->length; i++) {
        const qf_json_value *group = &groups->items[i];
        qf_quant_config one = {0};
        QF_TRY(parse_group(&fields, group, &one, err));
        if (targets_head(qf_json_get(group, "targets"))) {
            out->head = (qf_quant_head){one.bits, one.group_size, one.symmetric, one.desc_act};
        } else if (!found) {
            out->bits = one.bits;
            out->group_size = one.group_size;
            out->symmetric = one.symmetric;
            out->desc_act = one.desc_act;
            found = true;
        } else if (one.bits != out->bits || one.group_size != out->group_size || one.symmetric != out->symmetric ||
                   one.desc_act != out->desc_act) {
            return QF_FAIL(err, QF_ERROR_MODEL,
                           "%s: group %zu (%d bits, group size %d) differs from the first (%d bits, group size %d); "
                           "expected one setting for all linears",
                           fields.what, i, one.bits, one.group_size, out->bits, out->group_size);
        }
    }
    if (!found) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: no group has the targets [\"Linear\"]", fields.what);
    }
    return QF_OK;
}

static qf_status parse_compressed_tensors(const qf_fields *fields, qf_quant_config *out, qf_error *err)
{
    out->method = QF_QUANT_COMPRESSED_TENSORS;
    const qf_json_value *format = qf_fields_get(fields, "format");
    if (!qf_json_is_string(format, "pack-quantized")) {
        return qf_fields_fail(fields, "format", format, "\"pack-quantized\"", err);
    }
    const qf_json_value *status = qf_fields_get(fields, "quantization_status");
    if (status != NULL && !qf_json_is_string(status, "compressed")) {
        return qf_fields_fail(fields, "quantization_status", status, "\"compressed\"", err);
    }
    QF_TRY(reject_key(fields, "kv_cache_scheme", "null: scales for the KV cache are not read", err));
    QF_TRY(reject_key(fields, "transform_config", "null: transforms are not read", err));
    const qf_json_value *sparsity = qf_fields_get(fields, "sparsity_config");
    const qf_json_value *sparse_format = qf_json_get(sparsity, "format");
    if (sparse_format != NULL && !qf_json_is_string(sparse_format, "dense")) {
        return qf_fields_fail(fields, "sparsity_config", sparse_format, "null or the format \"dense\"", err);
    }
    const qf_json_value *groups = qf_fields_get(fields, "config_groups");
    if (groups == NULL || groups->type != QF_JSON_OBJECT || groups->length == 0) {
        return qf_fields_fail(fields, "config_groups", groups, "an object with a group", err);
    }
    QF_TRY(parse_groups(groups, out, err));
    return parse_ignore(fields, "ignore", out, err);
}

qf_status qf_quant_config_parse(const qf_json_value *object, qf_quant_config *out, qf_error *err)
{
    qf_fields fields = {object, NULL, "quantization_config"};
    memset(out, 0, sizeof *out);
    if (object == NULL || object->type != QF_JSON_OBJECT) {
        return QF_FAIL(err, QF_ERROR_MODEL, "quantization_config is no object");
    }
    const qf_json_value *method = qf_fields_get(&fields, "quant_method");
    if (qf_json_is_string(method, "awq")) {
        return parse_awq(&fields, out, err);
    }
    if (qf_json_is_string(method, "gptq")) {
        return parse_gptq(&fields, out, err);
    }
    if (qf_json_is_string(method, "compressed-tensors")) {
        return parse_compressed_tensors(&fields, out, err);
    }
    if (method == NULL) {
        /* The files of the first versions do not say who wrote them; their keys do. */
        if (qf_fields_get(&fields, "w_bit") != NULL) {
            return parse_awq(&fields, out, err);
        }
        if (qf_fields_get(&fields, "bits") != NULL && qf_fields_get(&fields, "desc_act") != NULL) {
            return parse_gptq(&fields, out, err);
        }
    }
    return qf_fields_fail(&fields, "quant_method", method, "\"awq\", \"gptq\" or \"compressed-tensors\"", err);
}
