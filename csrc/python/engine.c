/* The type Engine: a qf_engine and who uses it.
 *
 * close() may come while other threads are inside a call, and while requests live. Each of them counts as a user;
 * a closed engine is freed by whoever leaves last. The counter is read and written only with the GIL (or the
 * object's lock) held and no Python call in between. */
#include "python/options.h"

#include <unistd.h>

qf_engine *qf_py_engine_enter(qf_py_engine *self)
{
    if (self->process != getpid()) {
        PyErr_SetString(qf_py_object_state((PyObject *)self)->engine_error,
                        "the engine belongs to the process that created it and does not work in a forked child");
        return NULL;
    }
    qf_engine *engine = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (!self->closed) {
        engine = self->engine;
        self->users++;
    }
    Py_END_CRITICAL_SECTION();
    if (engine == NULL) {
        PyErr_SetString(qf_py_object_state((PyObject *)self)->engine_error, "the engine is closed");
    }
    return engine;
}

void qf_py_engine_leave(qf_py_engine *self)
{
    qf_engine *unused = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    self->users--;
    if (self->closed && self->users == 0) {
        unused = self->engine;
        self->engine = NULL;
    }
    Py_END_CRITICAL_SECTION();
    if (unused != NULL && self->process == getpid()) {
        Py_BEGIN_ALLOW_THREADS
        qf_engine_destroy(unused);
        Py_END_ALLOW_THREADS
    }
}

/* --- creation ------------------------------------------------------------------------------------------ */

typedef struct progress_context {
    PyObject *callable;
    PyThreadState *thread; /* while the GIL is released */
    bool failed;           /* the callable raised: its exception waits in the thread state */
} progress_context;

static bool on_progress(void *arg, size_t done_bytes, size_t total_bytes)
{
    progress_context *context = arg;
    PyEval_RestoreThread(context->thread);
    PyObject *result = PyObject_CallFunction(context->callable, "nn", (Py_ssize_t)done_bytes, (Py_ssize_t)total_bytes);
    context->failed = result == NULL;
    Py_XDECREF(result);
    context->thread = PyEval_SaveThread();
    return !context->failed;
}

/* NULL with an exception. */
static qf_engine *create_engine(const qf_py_state *state, qf_py_engine_options *parsed)
{
    progress_context context = {.callable = parsed->progress};
    if (parsed->progress != NULL) {
        parsed->options.progress = on_progress;
        parsed->options.progress_arg = &context;
    }
    qf_engine *engine = NULL;
    qf_error err = {0};
    context.thread = PyEval_SaveThread();
    qf_status status = qf_engine_create(&parsed->options, &engine, &err);
    PyEval_RestoreThread(context.thread);
    if (status != QF_OK && !context.failed) {
        (void)qf_py_raise(state, &err);
    }
    return engine;
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    const qf_py_state *state = PyType_GetModuleState(type);
    qf_py_engine *self = NULL;
    qf_py_engine_options parsed;
    if (qf_py_engine_options_parse(&parsed, "Engine", args, kwargs) < 0) {
        goto done;
    }
    self = PyObject_GC_New(qf_py_engine, type);
    if (self == NULL) {
        goto done;
    }
    self->users = 0;
    self->closed = false;
    self->process = getpid();
    self->engine = create_engine(state, &parsed);
    if (self->engine == NULL) {
        Py_CLEAR(self);
        goto done;
    }
    PyObject_GC_Track(self);
done:
    qf_py_engine_options_deinit(&parsed);
    return (PyObject *)self;
}

static void engine_dealloc(PyObject *object)
{
    qf_py_engine *self = (qf_py_engine *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    qf_engine *engine = self->engine;
    self->engine = NULL;
    if (engine != NULL && self->process == getpid()) {
        Py_BEGIN_ALLOW_THREADS
        qf_engine_destroy(engine);
        Py_END_ALLOW_THREADS
    }
    type->tp_free(object);
    Py_DECREF(type);
}

static int engine_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

/* --- methods ------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(close_doc,
"close($self, /)\n--\n\n"
"Stop the engine: unfinished requests end with finish_reason \"abort\", and every other method raises EngineError\n"
"from now on. The memory is freed here, or with the last Request. May be called again, and from any thread.");

static PyObject *engine_close(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    qf_py_engine *self = (qf_py_engine *)object;
    if (self->process != getpid()) {
        self->closed = true;
        Py_RETURN_NONE;
    }
    qf_engine *engine = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    self->closed = true;
    engine = self->engine;
    if (engine != NULL) {
        self->users++;
    }
    Py_END_CRITICAL_SECTION();
    if (engine != NULL) {
        Py_BEGIN_ALLOW_THREADS
        qf_engine_stop(engine);
        Py_END_ALLOW_THREADS
        qf_py_engine_leave(self);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(info_doc,
"info($self, /)\n--\n\n"
"What was loaded and how the options were resolved: the fields of qf_engine_info. Raises EngineError if closed.");

static PyObject *engine_info(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    qf_py_engine *self = (qf_py_engine *)object;
    const qf_engine *engine = qf_py_engine_enter(self);
    if (engine == NULL) {
        return NULL;
    }
    qf_engine_info info = {0};
    qf_engine_get_info(engine, &info);
    /* The strings belong to the engine: build before leaving. */
    PyObject *result = qf_py_from_engine_info(&info);
    qf_py_engine_leave(self);
    return result;
}

PyDoc_STRVAR(stats_doc,
"stats($self, /)\n--\n\n"
"Counters since the start and gauges of this moment: the fields of qf_engine_stats; \"memory\" is a dict in bytes,\n"
"\"busy_ns\" nanoseconds with a step in flight, \"meter\" what was moved, computed and taken: see _engine.pyi.\n"
"Raises EngineError if closed.");

static PyObject *engine_stats(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    qf_py_engine *self = (qf_py_engine *)object;
    qf_engine *engine = qf_py_engine_enter(self);
    if (engine == NULL) {
        return NULL;
    }
    qf_engine_stats stats = {0};
    qf_meter_stats meter = {0};
    Py_BEGIN_ALLOW_THREADS
    qf_engine_get_stats(engine, &stats);
    qf_engine_get_meter(engine, &meter);
    Py_END_ALLOW_THREADS
    qf_py_engine_leave(self);
    PyObject *result = qf_py_from_engine_stats(&stats);
    if (result != NULL && qf_py_set(result, "meter", qf_py_from_meter(&meter)) < 0) {
        Py_CLEAR(result);
    }
    return result;
}

PyDoc_STRVAR(event_fd_doc,
"event_fd($self, /)\n--\n\n"
"A file descriptor that is readable while take_ready() has something. It belongs to the engine: do not close it, and\n"
"stop watching it before close(). Raises EngineError if closed.");

static PyObject *engine_event_fd(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    qf_py_engine *self = (qf_py_engine *)object;
    const qf_engine *engine = qf_py_engine_enter(self);
    if (engine == NULL) {
        return NULL;
    }
    int fd = qf_engine_event_fd(engine);
    qf_py_engine_leave(self);
    return PyLong_FromLong(fd);
}

PyDoc_STRVAR(take_ready_doc,
"take_ready($self, /)\n--\n\n"
"Tags of the requests submitted with notify=True that have something to read, each once until it is read again.\n"
"Never waits. Raises EngineError if closed.");

static PyObject *engine_take_ready(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    qf_py_engine *self = (qf_py_engine *)object;
    qf_engine *engine = qf_py_engine_enter(self);
    if (engine == NULL) {
        return NULL;
    }
    uint64_t tags[256];
    const int32_t capacity = (int32_t)Py_ARRAY_LENGTH(tags);
    PyObject *list = PyList_New(0);
    int32_t count = capacity;
    while (list != NULL && count == capacity) {
        count = qf_engine_take_ready(engine, tags, capacity);
        for (int32_t i = 0; list != NULL && i < count; i++) {
            PyObject *tag = PyLong_FromUnsignedLongLong(tags[i]);
            if (tag == NULL || PyList_Append(list, tag) < 0) {
                Py_CLEAR(list);
            }
            Py_XDECREF(tag);
        }
    }
    qf_py_engine_leave(self);
    return list;
}

PyDoc_STRVAR(reset_prefix_cache_doc,
"reset_prefix_cache($self, /)\n--\n\n"
"Forget cached prefixes; running requests keep their blocks. Raises EngineError if closed.");

static PyObject *engine_reset_prefix_cache(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    qf_py_engine *self = (qf_py_engine *)object;
    qf_engine *engine = qf_py_engine_enter(self);
    if (engine == NULL) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    qf_engine_reset_prefix_cache(engine);
    Py_END_ALLOW_THREADS
    qf_py_engine_leave(self);
    Py_RETURN_NONE;
}

static PyObject *engine_closed(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((qf_py_engine *)object)->closed);
}

static PyMethodDef engine_methods[] = {
    {"set_vocabulary", (PyCFunction)(void (*)(void))qf_py_engine_set_vocabulary, METH_VARARGS | METH_KEYWORDS,
     qf_py_set_vocabulary_doc},
    {"submit", (PyCFunction)(void (*)(void))qf_py_engine_submit, METH_VARARGS | METH_KEYWORDS, qf_py_submit_doc},
    {"info", engine_info, METH_NOARGS, info_doc},
    {"stats", engine_stats, METH_NOARGS, stats_doc},
    {"event_fd", engine_event_fd, METH_NOARGS, event_fd_doc},
    {"take_ready", engine_take_ready, METH_NOARGS, take_ready_doc},
    {"reset_prefix_cache", engine_reset_prefix_cache, METH_NOARGS, reset_prefix_cache_doc},
    {"close", engine_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef engine_getset[] = {
    {"closed", engine_closed, NULL, "Whether close() was called.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(engine_doc,
"Engine(model_dir, *, hf_overrides=None, load_format='auto', device='auto', dtype='auto', activation_dtype='auto', "
"quantization='auto', quantization_group_size=128, lm_head_dtype='auto', kv_cache_dtype='auto', "
"kv_cache_16bit_window=0, kv_cache_16bit_layers=(), block_size=32, max_model_len=0, max_num_seqs=256, max_num_batched_tokens=2048, tensor_parallel_size=1, "
"tensor_parallel_comm='auto', nccl_library=None, watchdog_seconds=-1.0, kv_cache_memory=0, "
"kv_cache_tokens=0, memory_utilization=0.0, memory_bytes=0, cpu_offload=None, cpu_offload_gb=0.0, "
"batch_invariant=False, enforce_eager=False, enable_prefix_caching=True, num_threads=0, isa='auto', "
"max_steps_in_flight=0, max_waiting_requests=0, dummy_seed=0, meter=True, progress=None)\n--\n\n"
"A loaded model with its KV cache and its driver thread. Every method may be called from any thread.\n\n"
"model_dir is a Hugging Face checkpoint directory. Sizes are in bytes (kv_cache_memory) or tokens (kv_cache_tokens,\n"
"block_size, max_model_len, max_num_batched_tokens); 0 lets the engine choose. memory_utilization is the share of the\n"
"free memory that engine and cache may use; 0 is half of it, with a cache of bounded size. hf_overrides is a JSON object merged over config.json.\n"
"tensor_parallel_comm: how GPUs reach each other: 'auto', 'peer', 'nccl'. nccl_library: a file of NCCL, for where the\n"
"loader finds none. watchdog_seconds: with several ranks the engine fails after so long a step; negative is 120 on GPUs,\n"
"1800 on the CPU, 0 is no limit.\n"
"meter=False counts tokens only: it is there to measure what metering costs.\n"
"progress(done_bytes, total_bytes) is called while weights load; if it raises, no engine is created.\n\n"
"Raises ValueError (an option), ModelError (a checkpoint file), OSError (a file that cannot be read), MemoryError,\n"
"NotImplementedError (an option that is known but not built), EngineError (a device).");

static PyType_Slot engine_slots[] = {
    {Py_tp_doc, (void *)engine_doc},
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_traverse, engine_traverse},
    {Py_tp_methods, engine_methods},
    {Py_tp_getset, engine_getset},
    {0, NULL},
};

PyType_Spec qf_py_engine_spec = {
    .name = "qwen_fast._engine.Engine",
    .basicsize = sizeof(qf_py_engine),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = engine_slots,
};
