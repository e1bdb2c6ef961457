/* Engine.submit: some forty arguments into one qf_request_options. */
#include "python/convert.h"

#include <float.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

const char qf_py_submit_doc[] =
    "submit($self, /, prompt_token_ids, *, max_tokens=-1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, "
    "repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, seed=None, sample_index=0, min_tokens=0, "
    "logprobs=None, prompt_logprobs=None, logit_bias=None, allowed_token_ids=None, bad_words=None, stop=(), "
    "stop_token_ids=(), eos_token_ids=(), ignore_eos=False, include_stop_str_in_output=False, "
    "skip_special_tokens=True, logits_start=0, logits_stop=0, priority=0, cache_salt=0, leader=None, guided=False, "
    "mask_timeout=60.0, max_unread_tokens=0, notify=False, tag=0)\n--\n\n"
    "Start one sequence and return its Request.\n\n"
    "prompt_token_ids: at least one token id, as a sequence of int or a buffer of int32 or int64; other sequences of ids\n"
    "may be given so too. max_tokens: -1 is as many as fit into max_model_len, 0 computes the prompt alone. temperature 0\n"
    "is greedy; top_k 0 or -1 is off. seed: None draws one, which the last output reports. logprobs: None is none, 0 the\n"
    "sampled token's alone, n the n most likely too; prompt_logprobs likewise. allowed_token_ids: None is all.\n"
    "bad_words: token sequences that must not appear. logits_start, logits_stop: positions whose raw logits the last\n"
    "output carries. priority: lower goes first. leader: a Request with the same prompt, waited for so that its prompt\n"
    "can be reused. guided: each token waits for Request.set_mask, at most mask_timeout seconds. max_unread_tokens:\n"
    "generation pauses while this many tokens are unread, 0 never. notify, tag: see take_ready.\n\n"
    "Raises TypeError, ValueError naming argument, value and limit (also when the request can never fit, or too many are\n"
    "waiting), MemoryError, EngineError (closed or failed).";

typedef struct submit_arguments {
    qf_request_options options;
    qf_py_arguments arguments;
    /* borrowed from `arguments`, NULL if not given */
    PyObject *prompt, *seed, *logit_bias, *allowed, *bad_words, *stop, *stop_token_ids, *eos_token_ids, *leader;
    double mask_timeout; /* seconds */
    /* owned */
    int32_t *prompt_ids, *allowed_ids, *stop_ids, *eos_ids;
    qf_logit_bias *biases;
    qf_bad_words *words;
    PyObject *stop_tuple;
    const char **stop_strings;
} submit_arguments;

#define OPTION(kind, member) {#member, kind, offsetof(submit_arguments, options.member)}
#define SAMPLING(name, kind, member) {name, kind, offsetof(submit_arguments, options.sampling.member)}
#define OBJECT(name, member) {name, QF_PY_OBJECT, offsetof(submit_arguments, member)}

static const qf_py_field submit_fields[] = {
    OBJECT("prompt_token_ids", prompt),
    OPTION(QF_PY_INT32, max_tokens),
    SAMPLING("temperature", QF_PY_FLOAT, temperature),
    SAMPLING("top_k", QF_PY_INT32, top_k),
    SAMPLING("top_p", QF_PY_FLOAT, top_p),
    SAMPLING("min_p", QF_PY_FLOAT, min_p),
    SAMPLING("repetition_penalty", QF_PY_FLOAT, repetition_penalty),
    SAMPLING("presence_penalty", QF_PY_FLOAT, presence_penalty),
    SAMPLING("frequency_penalty", QF_PY_FLOAT, frequency_penalty),
    OBJECT("seed", seed),
    SAMPLING("sample_index", QF_PY_UINT32, sample_index),
    SAMPLING("min_tokens", QF_PY_INT32, min_tokens),
    SAMPLING("logprobs", QF_PY_COUNT_OR_NONE, num_logprobs),
    {"prompt_logprobs", QF_PY_COUNT_OR_NONE, offsetof(submit_arguments, options.num_prompt_logprobs)},
    OBJECT("logit_bias", logit_bias),
    OBJECT("allowed_token_ids", allowed),
    OBJECT("bad_words", bad_words),
    OBJECT("stop", stop),
    OBJECT("stop_token_ids", stop_token_ids),
    OBJECT("eos_token_ids", eos_token_ids),
    OPTION(QF_PY_BOOL, ignore_eos),
    OPTION(QF_PY_BOOL, include_stop_str_in_output),
    OPTION(QF_PY_BOOL, skip_special_tokens),
    OPTION(QF_PY_INT32, logits_start),
    OPTION(QF_PY_INT32, logits_stop),
    OPTION(QF_PY_INT32, priority),
    OPTION(QF_PY_UINT64, cache_salt),
    OBJECT("leader", leader),
    OPTION(QF_PY_BOOL, guided),
    {"mask_timeout", QF_PY_DOUBLE, offsetof(submit_arguments, mask_timeout)},
    OPTION(QF_PY_INT32, max_unread_tokens),
    OPTION(QF_PY_BOOL, notify),
    OPTION(QF_PY_UINT64, tag),
};

static bool given(PyObject *value) { return value != NULL && value != Py_None; }

static int convert_logit_bias(submit_arguments *self)
{
    if (!PyDict_Check(self->logit_bias)) {
        PyErr_Format(PyExc_TypeError, "logit_bias must be dict, not %s", Py_TYPE(self->logit_bias)->tp_name);
        return -1;
    }
    PyObject *items = PyDict_Items(self->logit_bias); /* a key's __index__ may change the dict, not this list */
    if (items == NULL) {
        return -1;
    }
    int result = -1;
    Py_ssize_t count = PyList_GET_SIZE(items);
    self->biases = PyMem_New(qf_logit_bias, (size_t)count + 1);
    if (self->biases == NULL || count > INT32_MAX) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyList_GET_ITEM(items, i);
        double bias = 0;
        char name[64];
        if (qf_py_to_int32(PyTuple_GET_ITEM(item, 0), "logit_bias key", INT32_MIN, INT32_MAX,
                           &self->biases[i].token_id) < 0) {
            goto done;
        }
        (void)snprintf(name, sizeof name, "logit_bias[%d]", (int)self->biases[i].token_id);
        if (qf_py_to_double(PyTuple_GET_ITEM(item, 1), name, -(double)FLT_MAX, (double)FLT_MAX, &bias) < 0) {
            goto done;
        }
        self->biases[i].bias = (float)bias;
    }
    self->options.sampling.logit_bias = self->biases;
    self->options.sampling.num_logit_bias = (int32_t)count;
    result = 0;
done:
    Py_DECREF(items);
    return result;
}

/* A tuple of the items of a sequence that is not a string; NULL with TypeError. */
static PyObject *tuple_of(PyObject *value, const char *name, const char *of)
{
    if (!PySequence_Check(value) || PyUnicode_Check(value) || PyBytes_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s must be a sequence of %s, not %s", name, of, Py_TYPE(value)->tp_name);
        return NULL;
    }
    PyObject *items = PySequence_Tuple(value);
    if (items != NULL && PyTuple_GET_SIZE(items) > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s must have at most %d items, got %zd", name, INT32_MAX, PyTuple_GET_SIZE(items));
        Py_CLEAR(items);
    }
    return items;
}

static int convert_bad_words(submit_arguments *self)
{
    PyObject *items = tuple_of(self->bad_words, "bad_words", "token id sequences");
    if (items == NULL) {
        return -1;
    }
    int result = 0;
    Py_ssize_t count = PyTuple_GET_SIZE(items);
    self->words = PyMem_Calloc((size_t)count + 1, sizeof *self->words);
    if (self->words == NULL) {
        PyErr_NoMemory();
        result = -1;
    }
    for (Py_ssize_t i = 0; i < count && result == 0; i++) {
        char name[64];
        int32_t *ids = NULL;
        (void)snprintf(name, sizeof name, "bad_words[%lld]", (long long)i);
        result = qf_py_to_int32_array(PyTuple_GET_ITEM(items, i), name, &ids, &self->words[i].length);
        if (result == 0) {
            self->words[i].token_ids = ids;
            self->options.sampling.num_bad_words = (int32_t)(i + 1);
        }
    }
    self->options.sampling.bad_words = self->words;
    Py_DECREF(items);
    return result;
}

static int convert_stop(submit_arguments *self)
{
    self->stop_tuple = self->stop != NULL ? tuple_of(self->stop, "stop", "str") : PyTuple_New(0);
    if (self->stop_tuple == NULL) {
        return -1;
    }
    Py_ssize_t count = PyTuple_GET_SIZE(self->stop_tuple);
    self->stop_strings = PyMem_New(const char *, (size_t)count + 1);
    if (self->stop_strings == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        char name[64];
        (void)snprintf(name, sizeof name, "stop[%lld]", (long long)i);
        if (qf_py_to_utf8(PyTuple_GET_ITEM(self->stop_tuple, i), name, &self->stop_strings[i]) < 0) {
            return -1;
        }
    }
    self->options.stop = self->stop_strings;
    self->options.num_stop = (int32_t)count;
    return 0;
}

static int convert_ids(submit_arguments *self)
{
    qf_request_options *options = &self->options;
    if (qf_py_to_int32_array(self->prompt, "prompt_token_ids", &self->prompt_ids, &options->num_prompt_tokens) < 0) {
        return -1;
    }
    if (given(self->allowed) && qf_py_to_int32_array(self->allowed, "allowed_token_ids", &self->allowed_ids,
                                                     &options->sampling.num_allowed_token_ids) < 0) {
        return -1;
    }
    if (self->stop_token_ids != NULL && qf_py_to_int32_array(self->stop_token_ids, "stop_token_ids", &self->stop_ids,
                                                             &options->sampling.num_stop_token_ids) < 0) {
        return -1;
    }
    if (self->eos_token_ids != NULL && qf_py_to_int32_array(self->eos_token_ids, "eos_token_ids", &self->eos_ids,
                                                            &options->num_eos_token_ids) < 0) {
        return -1;
    }
    options->prompt_token_ids = self->prompt_ids;
    options->sampling.allowed_token_ids = self->allowed_ids;
    options->sampling.stop_token_ids = self->stop_ids;
    options->eos_token_ids = self->eos_ids;
    return 0;
}

static int convert_leader(submit_arguments *self, const qf_py_state *state, const qf_py_engine *engine)
{
    if (!given(self->leader)) {
        return 0;
    }
    if (!Py_IS_TYPE(self->leader, state->request_type)) {
        PyErr_Format(PyExc_TypeError, "leader must be Request or None, not %s", Py_TYPE(self->leader)->tp_name);
        return -1;
    }
    qf_py_request *leader = (qf_py_request *)self->leader;
    if (leader->owner != engine) {
        PyErr_SetString(PyExc_ValueError, "leader must be a Request of this engine, got one of another");
        return -1;
    }
    self->options.leader = leader->request;
    return 0;
}

static int convert_all(submit_arguments *self, const qf_py_state *state, const qf_py_engine *engine)
{
    double mask_timeout = 0;
    PyObject *seconds = PyFloat_FromDouble(self->mask_timeout);
    int in_range = seconds != NULL ? qf_py_to_double(seconds, "mask_timeout", 1e-6, 1e9, &mask_timeout) : -1;
    Py_XDECREF(seconds);
    if (in_range < 0) {
        return -1;
    }
    self->options.mask_timeout_us = (int64_t)(mask_timeout * 1e6);
    if (given(self->seed)) {
        self->options.has_seed = true;
        if (qf_py_to_uint64(self->seed, "seed", &self->options.sampling.seed) < 0) {
            return -1;
        }
    }
    if (given(self->logit_bias) && convert_logit_bias(self) < 0) {
        return -1;
    }
    if (given(self->bad_words) && convert_bad_words(self) < 0) {
        return -1;
    }
    if (convert_stop(self) < 0 || convert_ids(self) < 0) {
        return -1;
    }
    return convert_leader(self, state, engine);
}

static void submit_arguments_deinit(submit_arguments *self)
{
    for (int32_t i = 0; i < self->options.sampling.num_bad_words; i++) {
        PyMem_Free((void *)self->words[i].token_ids);
    }
    PyMem_Free(self->words);
    PyMem_Free(self->biases);
    PyMem_Free(self->prompt_ids);
    PyMem_Free(self->allowed_ids);
    PyMem_Free(self->stop_ids);
    PyMem_Free(self->eos_ids);
    PyMem_Free(self->stop_strings);
    Py_CLEAR(self->stop_tuple);
    qf_py_arguments_deinit(&self->arguments);
}

/* The Request exists before the sequence starts, so that nothing can fail after. */
static PyObject *start(qf_py_engine *engine, const qf_py_state *state, const submit_arguments *parsed)
{
    qf_py_request *request = PyObject_GC_New(qf_py_request, state->request_type);
    if (request == NULL) {
        return NULL;
    }
    request->owner = NULL;
    request->request = NULL;
    request->stop = Py_NewRef(parsed->stop_tuple);
    request->tag = parsed->options.tag;
    request->reading = false;
    request->finished = false;
    qf_engine *native = qf_py_engine_enter(engine);
    if (native == NULL) {
        Py_DECREF(request);
        return NULL;
    }
    /* From here on the request is the user that has entered: its dealloc leaves. */
    request->owner = (qf_py_engine *)Py_NewRef((PyObject *)engine);
    qf_error err = {0};
    qf_status status = QF_OK;
    Py_BEGIN_ALLOW_THREADS
    status = qf_engine_submit(native, &parsed->options, &request->request, &err);
    Py_END_ALLOW_THREADS
    if (status != QF_OK) {
        Py_DECREF(request);
        (void)qf_py_raise(state, &err);
        return NULL;
    }
    PyObject_GC_Track(request);
    return (PyObject *)request;
}

PyObject *qf_py_engine_submit(PyObject *self, PyObject *args, PyObject *kwargs)
{
    const qf_py_state *state = qf_py_object_state(self);
    submit_arguments parsed;
    memset(&parsed, 0, sizeof parsed);
    qf_request_options_init(&parsed.options);
    parsed.mask_timeout = 60.0;
    PyObject *request = NULL;
    if (qf_py_arguments_parse(&parsed.arguments, "submit", submit_fields, Py_ARRAY_LENGTH(submit_fields), args, kwargs,
                              &parsed) == 0 &&
        convert_all(&parsed, state, (qf_py_engine *)self) == 0) {
        request = start((qf_py_engine *)self, state, &parsed);
    }
    submit_arguments_deinit(&parsed);
    return request;
}
