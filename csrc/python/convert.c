#include "python/convert.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

int qf_py_to_int64(PyObject *value, const char *name, int64_t min, int64_t max, int64_t *out)
{
    if (!PyIndex_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s must be int, not %s", name, Py_TYPE(value)->tp_name);
        return -1;
    }
    PyObject *number = PyNumber_Index(value);
    if (number == NULL) {
        return -1;
    }
    int overflow = 0;
    long long result = PyLong_AsLongLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    if (result == -1 && overflow == 0 && PyErr_Occurred()) {
        return -1;
    }
    if (overflow != 0) {
        PyErr_Format(PyExc_ValueError, "%s must be %lld .. %lld, got an int %s", name, (long long)min, (long long)max,
                     overflow > 0 ? "above 2**63 - 1" : "below -2**63");
        return -1;
    }
    if (result < min || result > max) {
        PyErr_Format(PyExc_ValueError, "%s must be %lld .. %lld, got %lld", name, (long long)min, (long long)max,
                     result);
        return -1;
    }
    *out = result;
    return 0;
}

int qf_py_to_int32(PyObject *value, const char *name, int32_t min, int32_t max, int32_t *out)
{
    int64_t wide = 0;
    if (qf_py_to_int64(value, name, min, max, &wide) < 0) {
        return -1;
    }
    *out = (int32_t)wide;
    return 0;
}

int qf_py_to_uint64(PyObject *value, const char *name, uint64_t *out)
{
    if (!PyIndex_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s must be int, not %s", name, Py_TYPE(value)->tp_name);
        return -1;
    }
    PyObject *number = PyNumber_Index(value);
    if (number == NULL) {
        return -1;
    }
    int overflow = 0;
    long long low = PyLong_AsLongLongAndOverflow(number, &overflow);
    unsigned long long result = low >= 0 ? (unsigned long long)low : 0;
    if (overflow > 0) {
        result = PyLong_AsUnsignedLongLong(number);
    }
    Py_DECREF(number);
    if (overflow > 0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Format(PyExc_ValueError, "%s must be 0 .. 2**64 - 1, got an int above that", name);
        }
        return -1;
    }
    if (overflow < 0) {
        PyErr_Format(PyExc_ValueError, "%s must be 0 .. 2**64 - 1, got an int below -2**63", name);
        return -1;
    }
    if (overflow == 0 && low < 0) {
        PyErr_Format(PyExc_ValueError, "%s must be 0 .. 2**64 - 1, got %lld", name, low);
        return -1;
    }
    *out = result;
    return 0;
}

/* "%s must be MIN .. MAX, got VALUE" for numbers that PyErr_Format cannot print. */
static int refuse_double(const char *name, double min, double max, double value)
{
    char message[256];
    (void)snprintf(message, sizeof message, "%.100s must be a finite number, %g .. %g, got %g", name, min, max, value);
    PyErr_SetString(PyExc_ValueError, message);
    return -1;
}

int qf_py_to_double(PyObject *value, const char *name, double min, double max, double *out)
{
    if (!PyFloat_Check(value) && !PyNumber_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s must be float, not %s", name, Py_TYPE(value)->tp_name);
        return -1;
    }
    double result = PyFloat_AsDouble(value);
    if (result == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) { /* an int beyond DBL_MAX */
            PyErr_Clear();
            return refuse_double(name, min, max, (double)INFINITY);
        }
        return -1;
    }
    if (!isfinite(result) || result < min || result > max) {
        return refuse_double(name, min, max, result);
    }
    *out = result;
    return 0;
}

int qf_py_to_utf8(PyObject *value, const char *name, const char **out)
{
    if (!PyUnicode_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s must be str, not %s", name, Py_TYPE(value)->tp_name);
        return -1;
    }
    Py_ssize_t size_bytes = 0;
    const char *text = PyUnicode_AsUTF8AndSize(value, &size_bytes);
    if (text == NULL) {
        return -1;
    }
    const char *nul = memchr(text, 0, (size_t)size_bytes);
    if (nul != NULL) {
        PyErr_Format(PyExc_ValueError, "%s must not contain a NUL character, got one at byte %zd of %zd", name,
                     (Py_ssize_t)(nul - text), size_bytes);
        return -1;
    }
    *out = text;
    return 0;
}

int qf_py_to_timeout_us(PyObject *value, const char *name, int64_t *out)
{
    if (value == Py_None) {
        *out = -1;
        return 0;
    }
    double seconds = 0;
    if (qf_py_to_double(value, name, 0, 1e9, &seconds) < 0) {
        return -1;
    }
    *out = (int64_t)ceil(seconds * 1e6);
    return 0;
}

static int32_t *new_int32_array(const char *name, Py_ssize_t length)
{
    if (length > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s must have at most %d items, got %zd", name, INT32_MAX, length);
        return NULL;
    }
    int32_t *values = PyMem_New(int32_t, (size_t)length + 1);
    if (values == NULL) {
        PyErr_NoMemory();
    }
    return values;
}

/* items: a tuple. A value's __index__ may run any code, which cannot change a tuple. */
static int int32_array_from_tuple(PyObject *items, const char *name, int32_t **out, int32_t *length)
{
    Py_ssize_t count = PyTuple_GET_SIZE(items);
    int32_t *values = new_int32_array(name, count);
    if (values == NULL) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GET_ITEM(items, i);
        if (PyLong_CheckExact(item)) {
            int overflow = 0;
            long value = PyLong_AsLongAndOverflow(item, &overflow);
            if (overflow == 0 && value >= INT32_MIN && value <= INT32_MAX) {
                values[i] = (int32_t)value;
                continue;
            }
        }
        char item_name[96];
        (void)snprintf(item_name, sizeof item_name, "%.60s[%lld]", name, (long long)i);
        if (qf_py_to_int32(item, item_name, INT32_MIN, INT32_MAX, &values[i]) < 0) {
            PyMem_Free(values);
            return -1;
        }
    }
    *out = values;
    *length = (int32_t)count;
    return 0;
}

/* The format's letter if it is one item in this machine's byte order, else 0. */
static char format_code(const char *format)
{
    if (format == NULL) {
        return 'B';
    }
    if (*format == '@' || *format == '=' || *format == (PY_LITTLE_ENDIAN ? '<' : '>')) {
        format++;
    }
    return format[0] != 0 && format[1] == 0 ? format[0] : 0;
}

static int int32_array_from_view(const Py_buffer *view, const char *name, int32_t **out, int32_t *length)
{
    char code = format_code(view->format);
    bool is_int = (code == 'i' || code == 'l' || code == 'q') && (view->itemsize == 4 || view->itemsize == 8);
    if (!is_int || view->ndim != 1) {
        PyErr_Format(PyExc_TypeError, "%s must be a sequence of int or a one-dimensional buffer of int32 or int64, got "
                     "a buffer with %d dimensions of format '%s'", name, view->ndim,
                     view->format != NULL ? view->format : "B");
        return -1;
    }
    Py_ssize_t count = view->shape[0];
    int32_t *values = new_int32_array(name, count);
    if (values == NULL) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        const char *item = (const char *)view->buf + i * view->strides[0];
        int64_t value = 0;
        if (view->itemsize == 4) {
            memcpy(&values[i], item, 4);
            continue;
        }
        memcpy(&value, item, 8);
        if (value < INT32_MIN || value > INT32_MAX) {
            PyErr_Format(PyExc_ValueError, "%s[%zd] must be %d .. %d, got %lld", name, i, INT32_MIN, INT32_MAX,
                         (long long)value);
            PyMem_Free(values);
            return -1;
        }
        values[i] = (int32_t)value;
    }
    *out = values;
    *length = (int32_t)count;
    return 0;
}

int qf_py_to_int32_array(PyObject *value, const char *name, int32_t **out, int32_t *length)
{
    if (!PyList_Check(value) && !PyTuple_Check(value) && PyObject_CheckBuffer(value)) {
        Py_buffer view;
        if (PyObject_GetBuffer(value, &view, PyBUF_STRIDED_RO | PyBUF_FORMAT) < 0) {
            return -1;
        }
        int result = int32_array_from_view(&view, name, out, length);
        PyBuffer_Release(&view);
        return result;
    }
    if (!PySequence_Check(value) || PyUnicode_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s must be a sequence of int, not %s", name, Py_TYPE(value)->tp_name);
        return -1;
    }
    PyObject *items = PySequence_Tuple(value);
    if (items == NULL) {
        return -1;
    }
    int result = int32_array_from_tuple(items, name, out, length);
    Py_DECREF(items);
    return result;
}

int qf_py_to_words(PyObject *value, const char *name, const char *codes, int num_dims, Py_buffer *out)
{
    if (!PyObject_CheckBuffer(value)) {
        PyErr_Format(PyExc_TypeError, "%s must be a buffer (an array), not %s", name, Py_TYPE(value)->tp_name);
        return -1;
    }
    if (PyObject_GetBuffer(value, out, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) {
        return -1;
    }
    char code = format_code(out->format);
    const char *got = out->format != NULL ? out->format : "B";
    if (code == 0 || strchr(codes, code) == NULL || out->itemsize != 4 || out->ndim != num_dims) {
        PyErr_Format(PyExc_TypeError, "%s must have %d dimension(s) of 4-byte items of format %s, got %d of format '%s'",
                     name, num_dims, codes, out->ndim, got);
    } else if ((uintptr_t)out->buf % 4 != 0) {
        PyErr_Format(PyExc_ValueError, "%s must be aligned to 4 bytes, got address %p", name, out->buf);
    } else {
        return 0;
    }
    PyBuffer_Release(out);
    return -1;
}
