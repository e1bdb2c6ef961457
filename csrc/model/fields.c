#include "model/fields.h"

#include <stdio.h>
#include <string.h>

const char *qf_printable(const char *text, size_t length, char *buffer, size_t size)
{
    size_t n = length < size - 1 ? length : size - 1;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        buffer[i] = c >= 0x20 && c < 0x7f ? text[i] : '?';
    }
    buffer[n] = '\0';
    return buffer;
}

const char *qf_json_describe(const qf_json_value *value, char *buffer, size_t size)
{
    char text[49];
    if (value == NULL) {
        (void)snprintf(buffer, size, "missing");
        return buffer;
    }
    switch (value->type) {
    case QF_JSON_NULL: (void)snprintf(buffer, size, "null"); break;
    case QF_JSON_BOOL: (void)snprintf(buffer, size, "%s", value->boolean ? "true" : "false"); break;
    case QF_JSON_INT: (void)snprintf(buffer, size, "%lld", (long long)value->integer); break;
    case QF_JSON_DOUBLE: (void)snprintf(buffer, size, "%.17g", value->number); break;
    case QF_JSON_STRING:
        (void)snprintf(buffer, size, "\"%s\"%s", qf_printable(value->string, value->length, text, sizeof text),
                       value->length >= sizeof text ? "..." : "");
        break;
    case QF_JSON_ARRAY: (void)snprintf(buffer, size, "a list of %zu", value->length); break;
    case QF_JSON_OBJECT: (void)snprintf(buffer, size, "an object of %zu", value->length); break;
    }
    return buffer;
}

const qf_json_value *qf_fields_get(const qf_fields *self, const char *key)
{
    const qf_json_value *value = qf_json_get(self->overrides, key);
    if (value == NULL) {
        value = qf_json_get(self->object, key);
    }
    return value != NULL && value->type != QF_JSON_NULL ? value : NULL;
}

qf_status qf_fields_fail(const qf_fields *self, const char *key, const qf_json_value *value, const char *expected,
                         qf_error *err)
{
    char text[80];
    return QF_FAIL(err, QF_ERROR_MODEL, "%s: \"%s\" is %s; expected %s", self->what, key,
                   qf_json_describe(value, text, sizeof text), expected);
}

qf_status qf_fields_int(const qf_fields *self, const char *key, int32_t min, int32_t max, const int32_t *fallback,
                        int32_t *out, qf_error *err)
{
    const qf_json_value *value = qf_fields_get(self, key);
    if (value == NULL && fallback != NULL) {
        *out = *fallback;
        return QF_OK;
    }
    if (value == NULL || value->type != QF_JSON_INT || value->integer < min || value->integer > max) {
        char expected[64];
        (void)snprintf(expected, sizeof expected, "an integer from %d to %d", min, max);
        return qf_fields_fail(self, key, value, expected, err);
    }
    *out = (int32_t)value->integer;
    return QF_OK;
}

qf_status qf_fields_double(const qf_fields *self, const char *key, double min, double max, const double *fallback,
                           double *out, qf_error *err)
{
    const qf_json_value *value = qf_fields_get(self, key);
    if (value == NULL && fallback != NULL) {
        *out = *fallback;
        return QF_OK;
    }
    bool is_number = value != NULL && (value->type == QF_JSON_INT || value->type == QF_JSON_DOUBLE);
    if (!is_number || !(value->number >= min && value->number <= max)) {
        char expected[96];
        (void)snprintf(expected, sizeof expected, "a number from %g to %g", min, max);
        return qf_fields_fail(self, key, value, expected, err);
    }
    *out = value->number;
    return QF_OK;
}

qf_status qf_fields_bool(const qf_fields *self, const char *key, bool fallback, bool *out, qf_error *err)
{
    const qf_json_value *value = qf_fields_get(self, key);
    if (value == NULL) {
        *out = fallback;
        return QF_OK;
    }
    if (value->type != QF_JSON_BOOL) {
        return qf_fields_fail(self, key, value, "true or false", err);
    }
    *out = value->boolean;
    return QF_OK;
}

qf_status qf_fields_string(const qf_fields *self, const char *key, const char *fallback, const char **out,
                           qf_error *err)
{
    const qf_json_value *value = qf_fields_get(self, key);
    if (value == NULL && fallback != NULL) {
        *out = fallback;
        return QF_OK;
    }
    if (value == NULL || value->type != QF_JSON_STRING || strlen(value->string) != value->length) {
        return qf_fields_fail(self, key, value, "a string", err);
    }
    *out = value->string;
    return QF_OK;
}
