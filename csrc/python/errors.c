#include "python/module.h"

#include <string.h>

/* The one mapping of qf_status to exceptions. A borrowed reference. */
static PyObject *exception_type(const qf_py_state *state, qf_status status)
{
    switch (status) {
    case QF_ERROR_INVALID_ARGUMENT: return PyExc_ValueError;
    case QF_ERROR_MODEL: return state->model_error;
    case QF_ERROR_OUT_OF_MEMORY: return PyExc_MemoryError;
    case QF_ERROR_IO: return PyExc_OSError;
    case QF_ERROR_NOT_IMPLEMENTED: return PyExc_NotImplementedError;
    case QF_ERROR_STATE:
    case QF_ERROR_BACKEND:
    case QF_ERROR_INTERNAL:
    case QF_OK: break;
    }
    return state->engine_error;
}

PyObject *qf_py_exception(const qf_py_state *state, const qf_error *err)
{
    /* The message may quote a file's bytes, and may have been cut inside a character. */
    size_t size_bytes = strnlen(err->message, sizeof err->message);
    PyObject *message = PyUnicode_DecodeUTF8(err->message, (Py_ssize_t)size_bytes, "replace");
    if (message == NULL) {
        return NULL;
    }
    PyObject *exception = PyObject_CallOneArg(exception_type(state, err->status), message);
    Py_DECREF(message);
    return exception;
}

int qf_py_raise(const qf_py_state *state, const qf_error *err)
{
    PyObject *exception = qf_py_exception(state, err);
    if (exception != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
        Py_DECREF(exception);
    }
    return -1;
}
