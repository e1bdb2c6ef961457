/* Checked reading of JSON members. A JSON null counts as an absent member, as in transformers. Every message
 * names the file, the key, the value found and what was expected. */
#ifndef QF_MODEL_FIELDS_H
#define QF_MODEL_FIELDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/json.h"
#include "base/status.h"

typedef struct qf_fields {
    const qf_json_value *object;    /* an object */
    const qf_json_value *overrides; /* an object whose members replace those of `object`, or NULL */
    const char *what;               /* opens every message: "config.json", say */
} qf_fields;

/* The member, or NULL if it is absent or null. */
const qf_json_value *qf_fields_get(const qf_fields *self, const char *key);

/* A NULL `fallback` makes the member required. The ranges are inclusive. */
qf_status qf_fields_int(const qf_fields *self, const char *key, int32_t min, int32_t max, const int32_t *fallback,
                        int32_t *out, qf_error *err);
qf_status qf_fields_double(const qf_fields *self, const char *key, double min, double max, const double *fallback,
                           double *out, qf_error *err);
qf_status qf_fields_bool(const qf_fields *self, const char *key, bool fallback, bool *out, qf_error *err);
/* A string without inner NULs; valid as long as the document. */
qf_status qf_fields_string(const qf_fields *self, const char *key, const char *fallback, const char **out,
                           qf_error *err);

/* Fails with `what: "key" is VALUE; expected EXPECTED`; `value` may be NULL (missing). */
qf_status qf_fields_fail(const qf_fields *self, const char *key, const qf_json_value *value, const char *expected,
                         qf_error *err);

/* Writes a short printable form of `value` ("missing" for NULL) and returns `buffer`. */
const char *qf_json_describe(const qf_json_value *value, char *buffer, size_t size);
/* The same for bytes that may be no printable text; at most `size` - 1 of them. */
const char *qf_printable(const char *text, size_t length, char *buffer, size_t size);

#endif
