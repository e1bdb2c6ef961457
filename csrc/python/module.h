/* The CPython module qwen_fast._engine: what its files share.
 *
 * Multi-phase initialisation, heap types, everything in the module's state: no static objects, so each interpreter
 * has its own. Functions follow the C API's habit: a pointer or 0 on success, NULL or -1 with an exception set.
 * Only these files include Python.h, and of the engine they include qf.h alone. */
#ifndef QF_PYTHON_MODULE_H
#define QF_PYTHON_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "include/qf.h"

/* With the GIL a section without Python calls is atomic anyway; without it these lock the object. */
#ifndef Py_BEGIN_CRITICAL_SECTION
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

typedef struct qf_py_state {
    PyTypeObject *engine_type;
    PyTypeObject *request_type;
    PyTypeObject *layers_type;
    PyObject *model_error;
    PyObject *engine_error;
} qf_py_state;

static inline qf_py_state *qf_py_module_state(PyObject *module) { return (qf_py_state *)PyModule_GetState(module); }

/* The types are final, so an object's type is the module's own. */
static inline qf_py_state *qf_py_object_state(PyObject *self)
{
    return (qf_py_state *)PyType_GetModuleState(Py_TYPE(self));
}

/* --- engine.c ------------------------------------------------------------------------------------------ */

typedef struct qf_py_engine {
    PyObject_HEAD
    qf_engine *engine; /* NULL once closed and unused */
    Py_ssize_t users;  /* calls in progress and live requests: the engine's memory stays while there are any */
    bool closed;
    pid_t process;     /* a forked child has no driver thread and must not wait for one */
} qf_py_engine;

extern PyType_Spec qf_py_engine_spec;

/* The engine for one call, to be given back by qf_py_engine_leave; NULL and EngineError if it is closed, or if
 * this is a forked child. */
qf_engine *qf_py_engine_enter(qf_py_engine *self);
/* Frees the engine if it is closed and this was its last user. */
void qf_py_engine_leave(qf_py_engine *self);

/* --- request.c ----------------------------------------------------------------------------------------- */

typedef struct qf_py_request {
    PyObject_HEAD
    qf_py_engine *owner; /* counts as one of its users */
    qf_request *request;
    PyObject *stop;      /* tuple of the stop strings */
    uint64_t tag;
    bool reading;        /* a thread is in read() */
    bool finished;       /* the output with finished=True was returned */
} qf_py_request;

extern PyType_Spec qf_py_request_spec;

extern PyType_Spec qf_py_layers_spec; /* layers.c */

/* Methods of Engine in files of their own: vocabulary.c, submit.c. */
PyObject *qf_py_engine_set_vocabulary(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *qf_py_engine_submit(PyObject *self, PyObject *args, PyObject *kwargs);
extern const char qf_py_set_vocabulary_doc[];
extern const char qf_py_submit_doc[];

/* Functions of the module: functions.c. */
extern PyMethodDef qf_py_functions[];

/* --- errors.c ------------------------------------------------------------------------------------------ */

/* A new exception for a failure of the engine; NULL with another exception set if there is no memory for it. */
PyObject *qf_py_exception(const qf_py_state *state, const qf_error *err);
/* Raises it. Always -1. */
int qf_py_raise(const qf_py_state *state, const qf_error *err);

#endif
