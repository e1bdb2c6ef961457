/* A small strict JSON reader (RFC 8259) for config files: a pure function over bytes, no recursion, every limit
 * checked. Numbers keep their text's exact integer value where it fits. Duplicate keys are an error. */
#ifndef QF_BASE_JSON_H
#define QF_BASE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef enum qf_json_type {
    QF_JSON_NULL = 0,
    QF_JSON_BOOL,
    QF_JSON_INT,    /* an integer that fits int64 */
    QF_JSON_DOUBLE, /* any other number; finite */
    QF_JSON_STRING,
    QF_JSON_ARRAY,
    QF_JSON_OBJECT
} qf_json_type;

typedef struct qf_json qf_json; /* the document: owns everything below */

/* A value inside a document; valid as long as the document. */
typedef struct qf_json_value {
    qf_json_type type;
    bool boolean;
    int64_t integer;
    double number;                          /* also set for QF_JSON_INT */
    const char *string;                     /* UTF-8, NUL-terminated; may hold inner NULs: see length */
    size_t length;                          /* bytes of string; items of an array; members of an object */
    const char *key;                        /* the member's name inside an object, or NULL */
    size_t key_length;
    const struct qf_json_value *items;      /* (length) elements of an array or members of an object */
} qf_json_value;

typedef struct qf_json_limits {
    size_t max_bytes; /* of the text */
    int32_t max_depth;
    size_t max_values;
} qf_json_limits;

/* 64 MiB of text, depth 32, 4 million values. */
qf_json_limits qf_json_default_limits(void);

/* `what` (a file name, say) opens every message; errors are QF_ERROR_MODEL with byte offset and reason. The text is
 * not needed afterwards. limits may be NULL: the default ones. */
qf_status qf_json_parse(const char *text, size_t size, const qf_json_limits *limits, const char *what, qf_json **out,
                        qf_error *err);
void qf_json_destroy(qf_json *self); /* NULL-safe */
const qf_json_value *qf_json_root(const qf_json *self);

/* The member called `key`, or NULL if there is none or `object` is NULL or no object. Large objects are searched
 * in better than linear time. */
const qf_json_value *qf_json_get(const qf_json_value *object, const char *key);
bool qf_json_is_string(const qf_json_value *value, const char *text); /* NULL-safe */

#endif
