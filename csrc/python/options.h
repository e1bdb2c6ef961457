/* The arguments that Engine and estimate share. */
#ifndef QF_PYTHON_OPTIONS_H
#define QF_PYTHON_OPTIONS_H

#include "python/convert.h"

/* Both take these; the text is the signature that inspect reads. */
#define QF_PY_ENGINE_SIGNATURE                                                                                       \
    "(model_dir, *, hf_overrides=None, load_format='auto', device='auto', dtype='auto', activation_dtype='auto', "   \
    "quantization='auto', quantization_group_size=128, lm_head_dtype='auto', kv_cache_dtype='auto', block_size=32, " \
    "max_model_len=0, max_num_seqs=256, max_num_batched_tokens=2048, tensor_parallel_size=1, kv_cache_memory=0, "    \
    "kv_cache_tokens=0, memory_utilization=0.5, enable_prefix_caching=True, num_threads=0, isa='auto', "             \
    "max_steps_in_flight=0, max_waiting_requests=0, dummy_seed=0, progress=None)\n--\n\n"

typedef struct qf_py_engine_options {
    qf_engine_options options; /* its strings are borrowed from `arguments` */
    PyObject *progress;        /* borrowed; NULL if not given or None */
    qf_py_arguments arguments;
} qf_py_engine_options;

/* 0, or -1 with an exception; deinit in both cases. */
int qf_py_engine_options_parse(qf_py_engine_options *self, const char *function, PyObject *args, PyObject *kwargs);
void qf_py_engine_options_deinit(qf_py_engine_options *self);

#endif
