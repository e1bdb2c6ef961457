#include "python/convert.h"

#include <float.h>
#include <string.h>

static int parse_int(const qf_py_field *field, PyObject *value, void *slot)
{
    int64_t wide = 0;
    switch (field->kind) {
    case QF_PY_INT64: return qf_py_to_int64(value, field->name, INT64_MIN, INT64_MAX, (int64_t *)slot);
    case QF_PY_UINT64: return qf_py_to_uint64(value, field->name, (uint64_t *)slot);
    case QF_PY_UINT32:
        if (qf_py_to_int64(value, field->name, 0, UINT32_MAX, &wide) < 0) {
            return -1;
        }
        *(uint32_t *)slot = (uint32_t)wide;
        return 0;
    case QF_PY_COUNT_OR_NONE:
        if (value == Py_None) {
            *(int32_t *)slot = -1;
            return 0;
        }
        return qf_py_to_int32(value, field->name, 0, INT32_MAX, (int32_t *)slot);
    default: return qf_py_to_int32(value, field->name, INT32_MIN, INT32_MAX, (int32_t *)slot);
    }
}

static int parse_value(const qf_py_field *field, PyObject *value, void *out)
{
    void *slot = (char *)out + field->offset;
    double number = 0;
    switch (field->kind) {
    case QF_PY_STRING_OR_NONE:
        if (value == Py_None) {
            *(const char **)slot = NULL;
            return 0;
        }
        return qf_py_to_utf8(value, field->name, (const char **)slot);
    case QF_PY_STRING: return qf_py_to_utf8(value, field->name, (const char **)slot);
    case QF_PY_BOOL:
        if (!PyBool_Check(value)) {
            PyErr_Format(PyExc_TypeError, "%s must be bool, not %s", field->name, Py_TYPE(value)->tp_name);
            return -1;
        }
        *(bool *)slot = value == Py_True;
        return 0;
    case QF_PY_FLOAT:
        if (qf_py_to_double(value, field->name, -(double)FLT_MAX, (double)FLT_MAX, &number) < 0) {
            return -1;
        }
        *(float *)slot = (float)number;
        return 0;
    case QF_PY_DOUBLE: return qf_py_to_double(value, field->name, -DBL_MAX, DBL_MAX, (double *)slot);
    case QF_PY_OBJECT: *(PyObject **)slot = value; return 0;
    default: return parse_int(field, value, slot);
    }
}

static const qf_py_field *find_field(const qf_py_field *fields, size_t num_fields, PyObject *name)
{
    for (size_t i = 0; i < num_fields; i++) {
        if (PyUnicode_CompareWithASCIIString(name, fields[i].name) == 0) {
            return &fields[i];
        }
    }
    return NULL;
}

int qf_py_arguments_parse(qf_py_arguments *self, const char *function, const qf_py_field *fields, size_t num_fields,
                          PyObject *args, PyObject *kwargs, void *out)
{
    /* A copy: converting a value may run Python code, which must not reach the dict that is walked. */
    self->kwargs = kwargs != NULL ? PyDict_Copy(kwargs) : NULL;
    self->args = Py_NewRef(args);
    if (kwargs != NULL && self->kwargs == NULL) {
        return -1;
    }
    Py_ssize_t num_positional = PyTuple_GET_SIZE(args);
    if (num_positional > 1) {
        PyErr_Format(PyExc_TypeError, "%s() takes 1 positional argument but %zd were given", function, num_positional);
        return -1;
    }
    bool has_first = num_positional == 1;
    if (has_first && parse_value(&fields[0], PyTuple_GET_ITEM(args, 0), out) < 0) {
        return -1;
    }
    PyObject *name = NULL;
    PyObject *value = NULL;
    Py_ssize_t position = 0;
    while (self->kwargs != NULL && PyDict_Next(self->kwargs, &position, &name, &value)) {
        const qf_py_field *field = PyUnicode_Check(name) ? find_field(fields, num_fields, name) : NULL;
        if (field == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument %R", function, name);
            return -1;
        }
        if (field == &fields[0] && has_first) {
            PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%s'", function, field->name);
            return -1;
        }
        has_first = has_first || field == &fields[0];
        if (parse_value(field, value, out) < 0) {
            return -1;
        }
    }
    if (!has_first) {
        PyErr_Format(PyExc_TypeError, "%s() is missing the required argument '%s'", function, fields[0].name);
        return -1;
    }
    return 0;
}

void qf_py_arguments_deinit(qf_py_arguments *self)
{
    Py_CLEAR(self->args);
    Py_CLEAR(self->kwargs);
}
