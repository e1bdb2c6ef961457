/* The type Layers: a qf_layers, and the Python function that sees the inputs of linear layers. */
#include "python/convert.h"

#include <string.h>

#define NUM_LINEARS 7

typedef struct qf_py_layers {
    PyObject_HEAD
    qf_layers *layers; /* NULL: closed */
    bool busy;         /* a thread is in forward() */
    /* During a tap the object is a buffer: the rows, in memory of the layers. */
    const float *rows; /* (shape[0], shape[1]); NULL: there are none */
    Py_ssize_t shape[2], strides[2];
    Py_ssize_t exports; /* buffers in use: while there are any the layers are not freed */
} qf_py_layers;

static const char *const linear_names[NUM_LINEARS] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                      "gate_proj", "up_proj", "down_proj"};

typedef struct layers_arguments {
    qf_layers_options options; /* strings borrowed */
    qf_py_arguments arguments;
} layers_arguments;

#define OPTION(name, kind) {#name, kind, offsetof(layers_arguments, options.name)}

static const qf_py_field layers_fields[] = {
    OPTION(model_dir, QF_PY_STRING),    OPTION(device, QF_PY_STRING),     OPTION(dtype, QF_PY_STRING),
    OPTION(max_tokens, QF_PY_INT32),    OPTION(num_threads, QF_PY_INT32), OPTION(isa, QF_PY_STRING),
    OPTION(tensor_parallel_size, QF_PY_INT32),
};

static PyObject *layers_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    qf_py_layers *self = NULL;
    layers_arguments parsed = {0};
    qf_layers_options_init(&parsed.options);
    if (qf_py_arguments_parse(&parsed.arguments, "Layers", layers_fields, Py_ARRAY_LENGTH(layers_fields), args, kwargs,
                              &parsed) < 0) {
        goto done;
    }
    self = PyObject_GC_New(qf_py_layers, type);
    if (self == NULL) {
        goto done;
    }
    self->layers = NULL;
    self->busy = false;
    self->rows = NULL;
    self->exports = 0;
    PyObject_GC_Track(self);
    qf_error err = {0};
    qf_status status = QF_OK;
    qf_layers *layers = NULL;
    Py_BEGIN_ALLOW_THREADS
    status = qf_layers_create(&parsed.options, &layers, &err);
    Py_END_ALLOW_THREADS
    self->layers = layers;
    if (status != QF_OK) {
        (void)qf_py_raise(PyType_GetModuleState(type), &err);
        Py_CLEAR(self);
    }
done:
    qf_py_arguments_deinit(&parsed.arguments);
    return (PyObject *)self;
}

static void layers_dealloc(PyObject *object)
{
    qf_py_layers *self = (qf_py_layers *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    qf_layers *layers = self->layers;
    self->layers = NULL;
    Py_BEGIN_ALLOW_THREADS
    qf_layers_destroy(layers);
    Py_END_ALLOW_THREADS
    type->tp_free(object);
    Py_DECREF(type);
}

static int layers_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

/* The layers for one call, to be given back by leave; NULL and EngineError. */
static qf_layers *enter(qf_py_layers *self)
{
    qf_layers *layers = NULL;
    bool busy = false;
    Py_BEGIN_CRITICAL_SECTION(self);
    busy = self->busy;
    if (!busy) {
        layers = self->layers;
        self->busy = layers != NULL;
    }
    Py_END_CRITICAL_SECTION();
    if (layers == NULL) {
        PyErr_SetString(qf_py_object_state((PyObject *)self)->engine_error,
                        busy ? "another call of the layers is in progress" : "the layers are closed");
    }
    return layers;
}

static void leave(qf_py_layers *self)
{
    Py_BEGIN_CRITICAL_SECTION(self);
    self->busy = false;
    Py_END_CRITICAL_SECTION();
}

/* --- forward ------------------------------------------------------------------------------------------- */

static int get_rows(PyObject *object, Py_buffer *view, int flags)
{
    qf_py_layers *self = (qf_py_layers *)object;
    static const char format[] = "f";
    view->obj = NULL;
    if (self->rows == NULL || (flags & PyBUF_WRITABLE) != 0 || (flags & PyBUF_STRIDES) != PyBUF_STRIDES) {
        PyErr_SetString(PyExc_BufferError, "layers are a read-only buffer with strides, and only for the tap's memoryview");
        return -1;
    }
    *view = (Py_buffer){.obj = Py_NewRef(object),
                        .buf = (void *)(uintptr_t)self->rows,
                        .len = self->shape[0] * self->strides[0],
                        .itemsize = (Py_ssize_t)sizeof(float),
                        .readonly = 1,
                        .ndim = 2,
                        .format = (flags & PyBUF_FORMAT) != 0 ? (char *)(uintptr_t)format : NULL,
                        .shape = self->shape,
                        .strides = self->strides};
    self->exports++;
    return 0;
}

static void release_rows(PyObject *object, Py_buffer *Py_UNUSED(view)) { ((qf_py_layers *)object)->exports--; }

/* After a tap that raised, for its traceback still holds the memoryview. The exception stays. */
static void release_after_error(PyObject *rows)
{
#if PY_VERSION_HEX >= 0x030c0000
    PyObject *raised = PyErr_GetRaisedException();
#else
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
#endif
    PyObject *result = PyObject_CallMethod(rows, "release", NULL);
    if (result == NULL) {
        PyErr_Clear(); /* something made of it is still in use: close() says so */
    }
    Py_XDECREF(result);
#if PY_VERSION_HEX >= 0x030c0000
    PyErr_SetRaisedException(raised);
#else
    PyErr_Restore(type, value, traceback);
#endif
}

/* Calls tap(layer, linear, rows). The rows are the layers' own memory: what still uses them after the call is refused,
 * and keeps the layers alive. 0, or -1 with an exception. */
static int call_tap(qf_py_layers *self, PyObject *callable, int32_t layer, const char *linear, const float *x,
                    int32_t num_tokens, int32_t k)
{
    self->rows = x;
    self->shape[0] = num_tokens;
    self->shape[1] = k;
    self->strides[0] = (Py_ssize_t)k * (Py_ssize_t)sizeof(float);
    self->strides[1] = (Py_ssize_t)sizeof(float);
    PyObject *rows = PyMemoryView_FromObject((PyObject *)self);
    PyObject *result = rows != NULL ? PyObject_CallFunction(callable, "isO", (int)layer, linear, rows) : NULL;
    self->rows = NULL;
    bool done = result != NULL;
    Py_XDECREF(result);
    if (done) {
        result = PyObject_CallMethod(rows, "release", NULL);
        if (result == NULL || self->exports > 0) {
            PyErr_SetString(PyExc_BufferError, "the tap kept its rows, which are only there during the call: copy them");
            done = false;
        }
        Py_XDECREF(result);
    } else if (rows != NULL) {
        release_after_error(rows);
    }
    Py_XDECREF(rows);
    return done ? 0 : -1;
}

typedef struct tap_call {
    qf_py_layers *layers;
    PyObject *callable;
    PyThreadState *thread; /* while the GIL is released */
    bool failed;           /* the callable raised: its exception waits in the thread state */
} tap_call;

static bool on_tap(void *arg, int32_t layer, const char *linear, const float *x, int32_t num_tokens, int32_t k)
{
    tap_call *call = arg;
    PyEval_RestoreThread(call->thread);
    call->failed = call_tap(call->layers, call->callable, layer, linear, x, num_tokens, k) < 0;
    call->thread = PyEval_SaveThread();
    return !call->failed;
}

/* Bits by name; None is all. 0, or -1 with an exception. */
static int parse_linears(PyObject *value, uint32_t *out)
{
    *out = (1u << NUM_LINEARS) - 1u;
    if (value == NULL || value == Py_None) {
        return 0;
    }
    PyObject *items = PySequence_Tuple(value);
    if (items == NULL) {
        return -1;
    }
    *out = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items); i++) {
        const char *name;
        int id = 0;
        if (qf_py_to_utf8(PyTuple_GET_ITEM(items, i), "linears", &name) < 0) {
            Py_DECREF(items);
            return -1;
        }
        while (id < NUM_LINEARS && strcmp(name, linear_names[id]) != 0) {
            id++;
        }
        if (id == NUM_LINEARS) {
            PyErr_Format(PyExc_ValueError, "linears holds '%.40s'; expected q_proj, k_proj, v_proj, o_proj, gate_proj, "
                         "up_proj or down_proj", name);
            Py_DECREF(items);
            return -1;
        }
        *out |= 1u << id;
    }
    Py_DECREF(items);
    return 0;
}

typedef struct forward_arguments {
    int32_t first, last;
    Py_buffer hidden;
    int32_t *seq_lens; /* (num_seqs) */
    int32_t num_seqs;
    uint32_t linears;
    tap_call tap;
} forward_arguments;

static int check_hidden(const Py_buffer *view, int32_t hidden_size)
{
    if (view->readonly) {
        PyErr_SetString(PyExc_ValueError, "hidden is read-only; it is changed in place");
        return -1;
    }
    if (view->shape[1] != hidden_size || view->shape[0] < 1 || view->shape[0] > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "hidden has shape (%zd, %zd); expected (tokens, %d)", view->shape[0],
                     view->shape[1], (int)hidden_size);
        return -1;
    }
    return 0;
}

static int run_forward(const qf_py_state *state, qf_layers *layers, forward_arguments *in)
{
    qf_layers_info info;
    qf_error err = {0};
    qf_layers_get_info(layers, &info);
    if (check_hidden(&in->hidden, info.hidden_size) < 0) {
        return -1;
    }
    in->tap.thread = PyEval_SaveThread();
    qf_status status =
        qf_layers_forward(layers, in->first, in->last, in->hidden.buf, (int32_t)in->hidden.shape[0], in->seq_lens,
                          in->num_seqs, in->linears, in->tap.callable != NULL ? on_tap : NULL, &in->tap, &err);
    PyEval_RestoreThread(in->tap.thread);
    if (in->tap.failed) {
        return -1;
    }
    return status == QF_OK ? 0 : qf_py_raise(state, &err);
}

PyDoc_STRVAR(forward_doc,
"forward($self, /, first, last, hidden, seq_lens, tap=None, linears=None)\n--\n\n"
"Run layers first .. last - 1 over whole sequences. hidden: float32 (tokens, hidden_size), C-contiguous, changed in place;\n"
"seq_lens: the sequences' lengths, adding up to its rows. tap(layer, linear, x) sees the input of each linear layer named\n"
"in linears (None: all): x is a memoryview, float32 (rows, inputs), valid during the call (BufferError if it is kept);\n"
"a layer's rows may come in several calls, in order.\n"
"An exception in tap ends the call and is raised.\n\n"
"Raises TypeError, ValueError, EngineError (closed, or another call is in progress), MemoryError.");

static PyObject *layers_forward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"first", "last", "hidden", "seq_lens", "tap", "linears", NULL};
    qf_py_layers *self = (qf_py_layers *)object;
    PyObject *first, *last, *hidden, *seq_lens;
    PyObject *tap = Py_None;
    PyObject *linears = Py_None;
    forward_arguments parsed = {0};
    PyObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OO:forward", (char **)names, &first, &last, &hidden, &seq_lens,
                                     &tap, &linears) ||
        qf_py_to_int32(first, "first", 0, INT32_MAX, &parsed.first) < 0 ||
        qf_py_to_int32(last, "last", 0, INT32_MAX, &parsed.last) < 0 || parse_linears(linears, &parsed.linears) < 0) {
        return NULL;
    }
    if (tap != Py_None && !PyCallable_Check(tap)) {
        PyErr_Format(PyExc_TypeError, "tap must be callable or None, not %s", Py_TYPE(tap)->tp_name);
        return NULL;
    }
    parsed.tap.callable = tap != Py_None ? tap : NULL;
    parsed.tap.layers = self;
    if (qf_py_to_int32_array(seq_lens, "seq_lens", &parsed.seq_lens, &parsed.num_seqs) < 0) {
        return NULL;
    }
    if (qf_py_to_words(hidden, "hidden", "f", 2, &parsed.hidden) == 0) {
        qf_layers *layers = enter(self);
        if (layers != NULL) {
            if (run_forward(qf_py_object_state(object), layers, &parsed) == 0) {
                result = Py_NewRef(Py_None);
            }
            leave(self);
        }
        PyBuffer_Release(&parsed.hidden);
    }
    PyMem_Free(parsed.seq_lens);
    return result;
}

/* --- the rest ------------------------------------------------------------------------------------------ */

PyDoc_STRVAR(info_doc,
"info($self, /)\n--\n\n"
"backend, description, dtype, num_layers, hidden_size, intermediate_size, max_tokens and max_seqs (in a call), max_seq_len.\n"
"Raises EngineError if closed or while another call is in progress.");

static const qf_py_field info_fields[] = {
    {"num_layers", QF_PY_INT32, offsetof(qf_layers_info, num_layers)},
    {"hidden_size", QF_PY_INT32, offsetof(qf_layers_info, hidden_size)},
    {"intermediate_size", QF_PY_INT32, offsetof(qf_layers_info, intermediate_size)},
    {"max_tokens", QF_PY_INT32, offsetof(qf_layers_info, max_tokens)},
    {"max_seqs", QF_PY_INT32, offsetof(qf_layers_info, max_seqs)},
    {"max_seq_len", QF_PY_INT32, offsetof(qf_layers_info, max_seq_len)},
};

static PyObject *layers_info(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    qf_py_layers *self = (qf_py_layers *)object;
    const qf_layers *layers = enter(self);
    if (layers == NULL) {
        return NULL;
    }
    qf_layers_info info;
    qf_layers_get_info(layers, &info);
    PyObject *dict = PyDict_New();
    if (dict == NULL || qf_py_set(dict, "backend", qf_py_from_string(info.backend)) < 0 ||
        qf_py_set(dict, "description", qf_py_from_string(info.description)) < 0 ||
        qf_py_set(dict, "dtype", qf_py_from_string(info.dtype)) < 0 ||
        qf_py_set_fields(dict, info_fields, Py_ARRAY_LENGTH(info_fields), &info) < 0) {
        Py_CLEAR(dict);
    }
    leave(self);
    return dict;
}

PyDoc_STRVAR(close_doc,
"close($self, /)\n--\n\n"
"Free the weights. May be called again. Raises EngineError while another call is in progress, BufferError while rows that\n"
"a tap kept are in use.");

static PyObject *layers_close(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    qf_py_layers *self = (qf_py_layers *)object;
    qf_layers *layers = NULL;
    bool busy = false;
    bool kept = false;
    Py_BEGIN_CRITICAL_SECTION(self);
    busy = self->busy;
    kept = self->exports > 0;
    if (!busy && !kept) {
        layers = self->layers;
        self->layers = NULL;
    }
    Py_END_CRITICAL_SECTION();
    if (kept && !busy) {
        PyErr_SetString(PyExc_BufferError, "rows that a tap kept are still in use");
        return NULL;
    }
    if (busy) {
        PyErr_SetString(qf_py_object_state(object)->engine_error, "another call of the layers is in progress");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    qf_layers_destroy(layers);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef layers_methods[] = {
    {"forward", (PyCFunction)(void (*)(void))layers_forward, METH_VARARGS | METH_KEYWORDS, forward_doc},
    {"info", layers_info, METH_NOARGS, info_doc},
    {"close", layers_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(layers_doc,
"Layers(model_dir, *, device='auto', dtype='auto', max_tokens=2048, num_threads=0, isa='auto', tensor_parallel_size=1)\n--\n\n"
"The layers of a checkpoint without the machinery of requests, for calibration: see forward(). Activations are never int8.\n"
"max_tokens is the most in one call. tensor_parallel_size above 1 is refused: a tap sees the whole input of a linear, and\n"
"of o_proj's and down_proj's each rank would have only its part.\n\n"
"Raises ValueError, ModelError, OSError, MemoryError, NotImplementedError, EngineError as Engine does.");

static PyType_Slot layers_slots[] = {
    {Py_tp_doc, (void *)layers_doc},
    {Py_tp_new, layers_new},
    {Py_tp_dealloc, layers_dealloc},
    {Py_tp_traverse, layers_traverse},
    {Py_tp_methods, layers_methods},
    {Py_bf_getbuffer, get_rows},
    {Py_bf_releasebuffer, release_rows},
    {0, NULL},
};

PyType_Spec qf_py_layers_spec = {
    .name = "qwen_fast._engine.Layers",
    .basicsize = sizeof(qf_py_layers),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = layers_slots,
};
