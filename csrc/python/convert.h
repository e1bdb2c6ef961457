/* Python values to C, checked, and back. Every refusal names the argument, its value and the limit. */
#ifndef QF_PYTHON_CONVERT_H
#define QF_PYTHON_CONVERT_H

#include "python/module.h"

/* --- one value: 0, or -1 with TypeError (wrong type) or ValueError (out of range) ------------------------- */

int qf_py_to_int64(PyObject *value, const char *name, int64_t min, int64_t max, int64_t *out);
int qf_py_to_int32(PyObject *value, const char *name, int32_t min, int32_t max, int32_t *out);
int qf_py_to_uint64(PyObject *value, const char *name, uint64_t *out);
/* Finite, and min <= value <= max. */
int qf_py_to_double(PyObject *value, const char *name, double min, double max, double *out);
/* UTF-8 that lives as long as `value`; a NUL inside is refused. */
int qf_py_to_utf8(PyObject *value, const char *name, const char **out);
/* timeout: None (for ever) is -1; else seconds >= 0 as microseconds. */
int qf_py_to_timeout_us(PyObject *value, const char *name, int64_t *out);

/* --- keyword arguments by table (and structs back to dicts: qf_py_set_fields) -------------------------------------------------------------------------- */

typedef enum qf_py_kind {
    QF_PY_STRING,   /* const char * */
    QF_PY_STRING_OR_NONE,
    QF_PY_BOOL,     /* bool; True or False only */
    QF_PY_INT32,    /* int32_t */
    QF_PY_INT64,
    QF_PY_UINT32,
    QF_PY_UINT64,
    QF_PY_COUNT_OR_NONE, /* int32_t >= 0, None is -1 */
    QF_PY_FLOAT,    /* float */
    QF_PY_DOUBLE,   /* double */
    QF_PY_OBJECT    /* PyObject *, borrowed from the arguments; converted by the caller */
} qf_py_kind;

typedef struct qf_py_field {
    const char *name;
    qf_py_kind kind;
    size_t offset; /* in the struct that is filled or read */
} qf_py_field;

/* The arguments of one call. Strings and objects that were parsed from it are borrowed until deinit. */
typedef struct qf_py_arguments {
    PyObject *args;
    PyObject *kwargs; /* a private copy, or NULL */
} qf_py_arguments;

/* Fills `out` from a call whose first argument (fields[0]) is required and may be positional; the others are by
 * keyword and keep what `out` holds. 0, or -1 with an exception; qf_py_arguments_deinit in both cases. */
int qf_py_arguments_parse(qf_py_arguments *self, const char *function, const qf_py_field *fields, size_t num_fields,
                          PyObject *args, PyObject *kwargs, void *out);
void qf_py_arguments_deinit(qf_py_arguments *self);

/* --- arrays: allocated with PyMem_Malloc, freed by the caller with PyMem_Free ----------------------------- */

/* A list, tuple or other sequence of int, or a one-dimensional buffer of int32 or int64. *out is never NULL on
 * success, even when *length is 0. */
int qf_py_to_int32_array(PyObject *value, const char *name, int32_t **out, int32_t *length);

/* A C-contiguous buffer of 4-byte items whose format is one of `codes`, aligned. num_dims 1 or 2. Release with
 * PyBuffer_Release. */
int qf_py_to_words(PyObject *value, const char *name, const char *codes, int num_dims, Py_buffer *out);

/* --- back ------------------------------------------------------------------------------------------------ */

/* dict[name] = value; takes the reference to `value`, which may be NULL (then an exception is set). */
int qf_py_set(PyObject *dict, const char *name, PyObject *value);
/* dict[field.name] for each field of the struct `values`. */
int qf_py_set_fields(PyObject *dict, const qf_py_field *fields, size_t num_fields, const void *values);
PyObject *qf_py_from_string(const char *text); /* None for NULL */
PyObject *qf_py_from_int32_array(const int32_t *values, int32_t length);
/* float32, shape (rows, columns): a read-only memoryview over a copy; None if rows or columns is 0. */
PyObject *qf_py_from_matrix(const float *values, int32_t rows, int32_t columns);
/* The dict Output of _engine.pyi. stop: the request's tuple of stop strings. */
PyObject *qf_py_from_output(const qf_py_state *state, const qf_output *output, PyObject *stop);
/* The dicts of _engine.pyi: report.c. */
PyObject *qf_py_from_memory_report(const qf_memory_report *report);
PyObject *qf_py_from_engine_info(const qf_engine_info *info);
PyObject *qf_py_from_engine_stats(const qf_engine_stats *stats);
/* The same: meter.c. */
PyObject *qf_py_from_usage(qf_request *request);
PyObject *qf_py_from_meter(const qf_meter_stats *stats);

#endif
