/* Engine.set_vocabulary. */
#include "python/convert.h"

#include <string.h>

const char qf_py_set_vocabulary_doc[] =
    "set_vocabulary($self, /, tokens, special)\n--\n\n"
    "Give the engine the text of its tokens; once, before the first request with text. tokens[i] is the bytes of token i,\n"
    "and ids from len(tokens) on are never sampled. special: the ids of special tokens, or one byte per token that is\n"
    "not 0 for special ones; skip_special_tokens leaves their text out.\n\n"
    "Raises TypeError, ValueError (an id outside the tokens, too many tokens, more than 4 GiB), EngineError.";

typedef struct vocabulary_arrays {
    uint8_t *bytes;
    uint32_t *offsets; /* (num_tokens + 1) */
    uint8_t *special;  /* (num_tokens) */
    int32_t num_tokens;
} vocabulary_arrays;

/* tokens: a tuple. */
static int fill_tokens(vocabulary_arrays *self, PyObject *tokens)
{
    Py_ssize_t count = PyTuple_GET_SIZE(tokens);
    if (count >= INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "tokens must have fewer than %d items, got %zd", INT32_MAX, count);
        return -1;
    }
    uint64_t total_bytes = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *token = PyTuple_GET_ITEM(tokens, i);
        if (!PyBytes_Check(token)) {
            PyErr_Format(PyExc_TypeError, "tokens[%zd] must be bytes, not %s", i, Py_TYPE(token)->tp_name);
            return -1;
        }
        total_bytes += (uint64_t)PyBytes_GET_SIZE(token);
        if (total_bytes > UINT32_MAX) {
            PyErr_Format(PyExc_ValueError, "tokens must have at most %u bytes in all, got more at tokens[%zd]", UINT32_MAX,
                         i);
            return -1;
        }
    }
    self->bytes = PyMem_New(uint8_t, total_bytes + 1);
    self->offsets = PyMem_New(uint32_t, (size_t)count + 1);
    self->special = PyMem_Calloc((size_t)count + 1, 1);
    if (self->bytes == NULL || self->offsets == NULL || self->special == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    uint32_t offset = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *token = PyTuple_GET_ITEM(tokens, i);
        memcpy(self->bytes + offset, PyBytes_AS_STRING(token), (size_t)PyBytes_GET_SIZE(token));
        self->offsets[i] = offset;
        offset += (uint32_t)PyBytes_GET_SIZE(token);
    }
    self->offsets[count] = offset;
    self->num_tokens = (int32_t)count;
    return 0;
}

static int fill_special(vocabulary_arrays *self, PyObject *special)
{
    if (PyBytes_Check(special)) {
        if (PyBytes_GET_SIZE(special) != self->num_tokens) {
            PyErr_Format(PyExc_ValueError, "special must have one byte for each of the %d tokens, got %zd",
                         (int)self->num_tokens, PyBytes_GET_SIZE(special));
            return -1;
        }
        for (int32_t i = 0; i < self->num_tokens; i++) {
            self->special[i] = PyBytes_AS_STRING(special)[i] != 0;
        }
        return 0;
    }
    int32_t *ids = NULL;
    int32_t length = 0;
    if (qf_py_to_int32_array(special, "special", &ids, &length) < 0) {
        return -1;
    }
    int result = 0;
    for (int32_t i = 0; i < length && result == 0; i++) {
        if (ids[i] < 0 || ids[i] >= self->num_tokens) {
            PyErr_Format(PyExc_ValueError, "special[%d] must be a token id below %d, got %d", (int)i,
                         (int)self->num_tokens, (int)ids[i]);
            result = -1;
        } else {
            self->special[ids[i]] = 1;
        }
    }
    PyMem_Free(ids);
    return result;
}

static int set_vocabulary(qf_py_engine *self, const vocabulary_arrays *arrays)
{
    qf_engine *engine = qf_py_engine_enter(self);
    if (engine == NULL) {
        return -1;
    }
    qf_error err = {0};
    qf_status status = QF_OK;
    Py_BEGIN_ALLOW_THREADS
    status = qf_engine_set_vocabulary(engine, arrays->bytes, arrays->offsets, arrays->special, arrays->num_tokens, &err);
    Py_END_ALLOW_THREADS
    qf_py_engine_leave(self);
    return status == QF_OK ? 0 : qf_py_raise(qf_py_object_state((PyObject *)self), &err);
}

PyObject *qf_py_engine_set_vocabulary(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"tokens", "special", NULL};
    PyObject *tokens_argument = NULL;
    PyObject *special = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:set_vocabulary", (char **)names, &tokens_argument, &special)) {
        return NULL;
    }
    if (!PySequence_Check(tokens_argument) || PyUnicode_Check(tokens_argument) || PyBytes_Check(tokens_argument)) {
        PyErr_Format(PyExc_TypeError, "tokens must be a sequence of bytes, not %s", Py_TYPE(tokens_argument)->tp_name);
        return NULL;
    }
    PyObject *tokens = PySequence_Tuple(tokens_argument);
    if (tokens == NULL) {
        return NULL;
    }
    vocabulary_arrays arrays = {0};
    int result = fill_tokens(&arrays, tokens);
    Py_DECREF(tokens);
    if (result == 0) {
        result = fill_special(&arrays, special);
    }
    if (result == 0) {
        result = set_vocabulary((qf_py_engine *)self, &arrays);
    }
    PyMem_Free(arrays.bytes);
    PyMem_Free(arrays.offsets);
    PyMem_Free(arrays.special);
    if (result < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}
