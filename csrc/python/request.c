/* The type Request. */
#include "python/convert.h"

#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#define MAIN_THREAD_WAIT_US 50000    /* how late Ctrl-C may be */
#define OTHER_THREAD_WAIT_US 1000000 /* Python's main thread need not be the process's, when it is embedded */

static int64_t now_us(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Signals are handled on the main thread alone: no other needs to wake for them. */
static int64_t longest_wait_us(void)
{
#ifdef __linux__
    return syscall(SYS_gettid) == getpid() ? MAIN_THREAD_WAIT_US : OTHER_THREAD_WAIT_US;
#else
    return MAIN_THREAD_WAIT_US;
#endif
}

/* 1: something to read; 0: the time is over; -1: a signal handler raised. */
static int wait_ready(qf_py_request *self, int64_t timeout_us)
{
    bool ready = qf_request_wait(self->request, 0); /* does not block: keeps the GIL */
    if (ready || timeout_us == 0) {
        return ready;
    }
    const int64_t longest_us = longest_wait_us();
    const int64_t deadline_us = timeout_us < 0 ? INT64_MAX : now_us() + timeout_us;
    for (;;) {
        int64_t left_us = deadline_us - now_us();
        if (left_us <= 0) {
            return 0;
        }
        Py_BEGIN_ALLOW_THREADS
        ready = qf_request_wait(self->request, left_us < longest_us ? left_us : longest_us);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0) {
            return -1;
        }
        if (ready) {
            return 1;
        }
    }
}

static PyObject *read_output(qf_py_request *self, int64_t timeout_us)
{
    const qf_py_state *state = qf_py_object_state((PyObject *)self);
    int ready = wait_ready(self, timeout_us);
    if (ready < 0) {
        return NULL;
    }
    if (ready == 0) {
        Py_RETURN_NONE;
    }
    qf_output output = {0};
    qf_error err = {0};
    if (qf_request_read(self->request, &output, &err) != QF_OK) {
        (void)qf_py_raise(state, &err);
        return NULL;
    }
    PyObject *result = qf_py_from_output(state, &output, self->stop);
    if (result != NULL && output.finished && qf_py_set(result, "usage", qf_py_from_usage(self->request)) < 0) {
        Py_CLEAR(result);
    }
    self->finished = output.finished;
    qf_output_deinit(&output);
    return result;
}

static int check_process(const qf_py_request *self)
{
    if (self->owner->process == getpid()) {
        return 0;
    }
    PyErr_SetString(qf_py_object_state((PyObject *)self)->engine_error,
                    "the request belongs to the process that created it and does not work in a forked child");
    return -1;
}

PyDoc_STRVAR(read_doc,
"read($self, /, timeout=None)\n--\n\n"
"Wait up to timeout seconds (None: for ever, 0: not at all) and return what is new since the last read as a dict, or\n"
"None if nothing came. Its keys: token_ids, text, logprobs, mask_position, finished; once finished is True also\n"
"finish_reason, stop_reason, error (an exception that is not raised), seed, num_prompt_tokens, num_output_tokens,\n"
"num_cached_tokens, num_preemptions, times in seconds of the monotonic clock, prompt_logprobs, logits (float32, rows x\n"
"vocab_size), usage (see usage()). After that output it returns None at once. Signal handlers run while it waits: Ctrl-C raises\n"
"KeyboardInterrupt and leaves the request running.\n\n"
"Raises ValueError (timeout), RuntimeError (another thread is reading this request), EngineError.");

static PyObject *request_read(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"timeout", NULL};
    qf_py_request *self = (qf_py_request *)object;
    PyObject *timeout = Py_None;
    int64_t timeout_us = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:read", (char **)names, &timeout) ||
        qf_py_to_timeout_us(timeout, "timeout", &timeout_us) < 0 || check_process(self) < 0) {
        return NULL;
    }
    bool busy = false;
    bool finished = false;
    Py_BEGIN_CRITICAL_SECTION(self);
    busy = self->reading;
    finished = self->finished;
    self->reading = true;
    Py_END_CRITICAL_SECTION();
    if (busy) {
        PyErr_SetString(PyExc_RuntimeError, "another thread is in read() of this request: one reader at a time");
        return NULL;
    }
    PyObject *result = finished ? Py_NewRef(Py_None) : read_output(self, timeout_us);
    Py_BEGIN_CRITICAL_SECTION(self);
    self->reading = false;
    Py_END_CRITICAL_SECTION();
    return result;
}

PyDoc_STRVAR(cancel_doc,
"cancel($self, /)\n--\n\n"
"End the request with finish_reason \"abort\", within a step; nothing happens if it has ended. Never waits.");

static PyObject *request_cancel(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    qf_py_request *self = (qf_py_request *)object;
    if (check_process(self) < 0) {
        return NULL;
    }
    qf_request_cancel(self->request);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(usage_doc,
"usage($self, /)\n--\n\n"
"What the request took up to now, as the dict Usage of _engine.pyi. After the end it may still change while\n"
"energy_provisional is True: within a second. Works after the engine was closed.");

static PyObject *request_usage(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    qf_py_request *self = (qf_py_request *)object;
    return check_process(self) < 0 ? NULL : qf_py_from_usage(self->request);
}

PyDoc_STRVAR(set_mask_doc,
"set_mask($self, /, position, words)\n--\n\n"
"Say which tokens may come at output position `position` of a guided request, which must be the mask_position of its\n"
"last output. words: a buffer of 32-bit integers, ceil(vocab_size / 32) of them; token t may come if bit t % 32 of\n"
"words[t // 32] is 1.\n\n"
"Raises TypeError (not such a buffer), ValueError (position, number of words), EngineError.");

static PyObject *request_set_mask(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"position", "words", NULL};
    qf_py_request *self = (qf_py_request *)object;
    PyObject *position_argument = NULL;
    PyObject *words = NULL;
    int32_t position = 0;
    Py_buffer view;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:set_mask", (char **)names, &position_argument, &words) ||
        qf_py_to_int32(position_argument, "position", 0, INT32_MAX, &position) < 0 || check_process(self) < 0 ||
        qf_py_to_words(words, "words", "IiLl", 1, &view) < 0) {
        return NULL;
    }
    qf_error err = {0};
    qf_status status = QF_OK;
    if (view.shape[0] > INT32_MAX) {
        status = QF_FAIL(&err, QF_ERROR_INVALID_ARGUMENT, "words must have at most %d items, got %lld", INT32_MAX,
                         (long long)view.shape[0]);
    } else {
        status = qf_request_set_mask(self->request, position, view.buf, (int32_t)view.shape[0], &err);
    }
    PyBuffer_Release(&view);
    if (status != QF_OK) {
        (void)qf_py_raise(qf_py_object_state(object), &err);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *request_tag(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(((qf_py_request *)object)->tag);
}

static int request_traverse(PyObject *object, visitproc visit, void *arg)
{
    qf_py_request *self = (qf_py_request *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT((PyObject *)self->owner);
    Py_VISIT(self->stop);
    return 0;
}

/* No tp_clear: an engine and a tuple of strings refer to nothing that could close a cycle. */
static void request_dealloc(PyObject *object)
{
    qf_py_request *self = (qf_py_request *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->request != NULL && self->owner->process == getpid()) {
        qf_request_release(self->request);
    }
    self->request = NULL;
    if (self->owner != NULL) {
        qf_py_engine_leave(self->owner);
        Py_CLEAR(self->owner);
    }
    Py_CLEAR(self->stop);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyMethodDef request_methods[] = {
    {"read", (PyCFunction)(void (*)(void))request_read, METH_VARARGS | METH_KEYWORDS, read_doc},
    {"cancel", request_cancel, METH_NOARGS, cancel_doc},
    {"usage", request_usage, METH_NOARGS, usage_doc},
    {"set_mask", (PyCFunction)(void (*)(void))request_set_mask, METH_VARARGS | METH_KEYWORDS, set_mask_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef request_getset[] = {
    {"tag", request_tag, NULL, "The number that take_ready() reports: submit's `tag`.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(request_doc,
"One sequence, made by Engine.submit. Dropping the last reference cancels it.");

static PyType_Slot request_slots[] = {
    {Py_tp_doc, (void *)request_doc},
    {Py_tp_dealloc, request_dealloc},
    {Py_tp_traverse, request_traverse},
    {Py_tp_methods, request_methods},
    {Py_tp_getset, request_getset},
    {0, NULL},
};

PyType_Spec qf_py_request_spec = {
    .name = "qwen_fast._engine.Request",
    .basicsize = sizeof(qf_py_request),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = request_slots,
};
