/* The lexical half of the JSON reader: strings and numbers. Private to json.c, which builds values of them. */
#ifndef QF_BASE_JSON_SCAN_H
#define QF_BASE_JSON_SCAN_H

#include "base/json.h"

typedef struct qf_json_scanner {
    const char *text; /* (size) bytes, not NUL-terminated */
    size_t size;
    size_t at;           /* bytes consumed */
    char *strings;       /* (size + 1): decoded strings; none is longer than its text, quotes for the NUL */
    size_t string_bytes; /* used of `strings` */
    const char *what;    /* opens every message */
    qf_error *err;
} qf_json_scanner;

/* "what: byte offset: reason" as QF_ERROR_MODEL. */
qf_status qf_json_fail_at(const qf_json_scanner *s, const char *file, int line, size_t offset, const char *reason);
#define QF_JSON_FAIL(s, offset, reason) qf_json_fail_at((s), __FILE__, __LINE__, (offset), (reason))

/* The next byte, or -1 at the end. */
static inline int qf_json_peek(const qf_json_scanner *s)
{
    return s->at == s->size ? -1 : (unsigned char)s->text[s->at];
}

/* At the opening quote: decodes and NUL-terminates. *out_length excludes the NUL. */
qf_status qf_json_scan_string(qf_json_scanner *s, const char **out, size_t *out_length);

/* At "-" or a digit: sets type (QF_JSON_INT or QF_JSON_DOUBLE), integer and number. */
qf_status qf_json_scan_number(qf_json_scanner *s, qf_json_value *value);

#endif
