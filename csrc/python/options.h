/* The arguments that Engine and estimate share. */
#ifndef QF_PYTHON_OPTIONS_H
#define QF_PYTHON_OPTIONS_H

#include "python/convert.h"

typedef struct qf_py_engine_options {
    qf_engine_options options; /* its strings are borrowed from `arguments` */
    PyObject *progress;        /* borrowed; NULL if not given or None */
    PyObject *kv_cache_16bit_layers; /* the same */
    int32_t *layers;           /* what options.kv_cache_16bit_layers points to; PyMem */
    qf_py_arguments arguments;
} qf_py_engine_options;

/* 0, or -1 with an exception; deinit in both cases. */
int qf_py_engine_options_parse(qf_py_engine_options *self, const char *function, PyObject *args, PyObject *kwargs);
void qf_py_engine_options_deinit(qf_py_engine_options *self);

#endif
