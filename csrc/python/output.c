#include "python/convert.h"

#include <stddef.h>
#include <string.h>

int qf_py_set(PyObject *dict, const char *name, PyObject *value)
{
    if (value == NULL) {
        return -1;
    }
    int result = PyDict_SetItemString(dict, name, value);
    Py_DECREF(value);
    return result;
}

static PyObject *from_field(const qf_py_field *field, const void *slot)
{
    switch (field->kind) {
    case QF_PY_STRING:
    case QF_PY_STRING_OR_NONE: return qf_py_from_string(*(const char *const *)slot);
    case QF_PY_BOOL: return PyBool_FromLong(*(const bool *)slot);
    case QF_PY_INT32:
    case QF_PY_COUNT_OR_NONE: return PyLong_FromLong(*(const int32_t *)slot);
    case QF_PY_INT64: return PyLong_FromLongLong(*(const int64_t *)slot);
    case QF_PY_UINT32: return PyLong_FromUnsignedLong(*(const uint32_t *)slot);
    case QF_PY_UINT64: return PyLong_FromUnsignedLongLong(*(const uint64_t *)slot);
    case QF_PY_FLOAT: return PyFloat_FromDouble((double)*(const float *)slot);
    case QF_PY_DOUBLE: return PyFloat_FromDouble(*(const double *)slot);
    case QF_PY_OBJECT: return Py_NewRef(*(PyObject *const *)slot);
    }
    Py_UNREACHABLE();
}

int qf_py_set_fields(PyObject *dict, const qf_py_field *fields, size_t num_fields, const void *values)
{
    for (size_t i = 0; i < num_fields; i++) {
        if (qf_py_set(dict, fields[i].name, from_field(&fields[i], (const char *)values + fields[i].offset)) < 0) {
            return -1;
        }
    }
    return 0;
}

PyObject *qf_py_from_string(const char *text)
{
    if (text == NULL) {
        return Py_NewRef(Py_None);
    }
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

PyObject *qf_py_from_int32_array(const int32_t *values, int32_t length)
{
    PyObject *list = PyList_New(length);
    for (int32_t i = 0; list != NULL && i < length; i++) {
        PyObject *value = PyLong_FromLong(values[i]);
        if (value == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, value);
    }
    return list;
}

PyObject *qf_py_from_matrix(const float *values, int32_t rows, int32_t columns)
{
    if (values == NULL || rows <= 0 || columns <= 0) {
        return Py_NewRef(Py_None);
    }
    PyObject *result = NULL;
    PyObject *view = NULL;
    /* rows * columns floats exist in memory, so their size fits. */
    Py_ssize_t size_bytes = (Py_ssize_t)rows * columns * (Py_ssize_t)sizeof(float);
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)values, size_bytes);
    if (bytes != NULL) {
        view = PyMemoryView_FromObject(bytes);
    }
    if (view != NULL) {
        result = PyObject_CallMethod(view, "cast", "s(ii)", "f", (int)rows, (int)columns);
    }
    Py_XDECREF(view);
    Py_XDECREF(bytes);
    return result;
}

/* [(token_id, logprob, rank), ...] of one row. row: (stride) */
static PyObject *from_logprob_row(const qf_logprob *row, int32_t stride)
{
    PyObject *list = PyList_New(stride);
    for (int32_t i = 0; list != NULL && i < stride; i++) {
        PyObject *entry = Py_BuildValue("(idi)", (int)row[i].token_id, (double)row[i].logprob, (int)row[i].rank);
        if (entry == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, entry);
    }
    return list;
}

/* One list per row; the first `num_unused` rows are None. values: (rows, stride), or NULL: None. */
static PyObject *from_logprobs(const qf_logprob *values, int32_t rows, int32_t stride, int32_t num_unused)
{
    if (values == NULL) {
        return Py_NewRef(Py_None);
    }
    PyObject *list = PyList_New(rows);
    for (int32_t i = 0; list != NULL && i < rows; i++) {
        PyObject *row = NULL;
        if (i < num_unused) {
            row = Py_NewRef(Py_None);
        } else {
            row = from_logprob_row(values + (size_t)i * (size_t)stride, stride);
        }
        if (row == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, row);
    }
    return list;
}

static const char *finish_reason_name(qf_finish_reason reason)
{
    switch (reason) {
    case QF_FINISH_STOP: return "stop";
    case QF_FINISH_LENGTH: return "length";
    case QF_FINISH_ABORT: return "abort";
    case QF_FINISH_ERROR: return "error";
    case QF_FINISH_NONE: break;
    }
    return NULL;
}

static PyObject *stop_reason(const qf_output *output, PyObject *stop)
{
    if (output->stop_token_id >= 0) {
        return PyLong_FromLong(output->stop_token_id);
    }
    if (output->stop_index >= 0 && output->stop_index < PyTuple_GET_SIZE(stop)) {
        return Py_NewRef(PyTuple_GET_ITEM(stop, output->stop_index));
    }
    return Py_NewRef(Py_None);
}

#define FIELD(kind, member) {#member, kind, offsetof(qf_output, member)}

static const qf_py_field final_fields[] = {
    FIELD(QF_PY_UINT64, seed),
    FIELD(QF_PY_INT32, num_prompt_tokens),
    FIELD(QF_PY_INT32, num_output_tokens),
    FIELD(QF_PY_INT32, num_cached_tokens),
    FIELD(QF_PY_INT32, num_preemptions),
    FIELD(QF_PY_DOUBLE, arrival_time),
    FIELD(QF_PY_DOUBLE, first_scheduled_time),
    FIELD(QF_PY_DOUBLE, first_token_time),
    FIELD(QF_PY_DOUBLE, last_token_time),
    FIELD(QF_PY_DOUBLE, finished_time),
};

#undef FIELD

static int set_final(const qf_py_state *state, PyObject *dict, const qf_output *output, PyObject *stop)
{
    bool failed = output->finish_reason == QF_FINISH_ERROR;
    if (qf_py_set(dict, "finish_reason", qf_py_from_string(finish_reason_name(output->finish_reason))) < 0 ||
        qf_py_set(dict, "stop_reason", stop_reason(output, stop)) < 0 ||
        qf_py_set(dict, "error", failed ? qf_py_exception(state, &output->error) : Py_NewRef(Py_None)) < 0 ||
        qf_py_set_fields(dict, final_fields, Py_ARRAY_LENGTH(final_fields), output) < 0) {
        return -1;
    }
    PyObject *prompt_logprobs =
        from_logprobs(output->prompt_logprobs, output->num_prompt_tokens, output->prompt_logprobs_stride, 1);
    if (qf_py_set(dict, "prompt_logprobs", prompt_logprobs) < 0) {
        return -1;
    }
    return qf_py_set(dict, "logits", qf_py_from_matrix(output->logits, output->num_logits_rows, output->vocab_size));
}

PyObject *qf_py_from_output(const qf_py_state *state, const qf_output *output, PyObject *stop)
{
    PyObject *dict = PyDict_New();
    if (dict == NULL) {
        return NULL;
    }
    const char *text = output->text != NULL ? output->text : "";
    if (qf_py_set(dict, "token_ids", qf_py_from_int32_array(output->token_ids, output->num_tokens)) < 0 ||
        qf_py_set(dict, "text", PyUnicode_DecodeUTF8(text, (Py_ssize_t)output->text_bytes, NULL)) < 0 ||
        qf_py_set(dict, "logprobs", from_logprobs(output->logprobs, output->num_tokens, output->logprobs_stride, 0)) < 0 ||
        qf_py_set(dict, "mask_position", PyLong_FromLong(output->mask_position)) < 0 ||
        qf_py_set(dict, "finished", PyBool_FromLong(output->finished)) < 0 ||
        (output->finished && set_final(state, dict, output, stop) < 0)) {
        Py_DECREF(dict);
        return NULL;
    }
    return dict;
}
