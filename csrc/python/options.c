#include "python/options.h"

#include <stddef.h>
#include <string.h>

#define OPTION(name, kind, member) {name, kind, offsetof(qf_py_engine_options, options.member)}

static const qf_py_field engine_fields[] = {
    OPTION("model_dir", QF_PY_STRING, model_dir),
    OPTION("hf_overrides", QF_PY_STRING_OR_NONE, hf_overrides_json),
    OPTION("load_format", QF_PY_STRING, load_format),
    OPTION("device", QF_PY_STRING, device),
    OPTION("dtype", QF_PY_STRING, dtype),
    OPTION("activation_dtype", QF_PY_STRING, activation_dtype),
    OPTION("quantization", QF_PY_STRING, quantization),
    OPTION("quantization_group_size", QF_PY_INT32, quantization_group_size),
    OPTION("lm_head_dtype", QF_PY_STRING, lm_head_dtype),
    OPTION("kv_cache_dtype", QF_PY_STRING, kv_cache_dtype),
    OPTION("kv_cache_16bit_window", QF_PY_INT32, kv_cache_16bit_window),
    {"kv_cache_16bit_layers", QF_PY_OBJECT, offsetof(qf_py_engine_options, kv_cache_16bit_layers)},
    OPTION("block_size", QF_PY_INT32, block_size),
    OPTION("max_model_len", QF_PY_INT32, max_model_len),
    OPTION("max_num_seqs", QF_PY_INT32, max_num_seqs),
    OPTION("max_num_batched_tokens", QF_PY_INT32, max_num_batched_tokens),
    OPTION("tensor_parallel_size", QF_PY_INT32, tensor_parallel_size),
    OPTION("tensor_parallel_comm", QF_PY_STRING, tensor_parallel_comm),
    OPTION("nccl_library", QF_PY_STRING_OR_NONE, nccl_library),
    OPTION("watchdog_seconds", QF_PY_DOUBLE, watchdog_seconds),
    OPTION("kv_cache_memory", QF_PY_UINT64, kv_cache_memory_bytes),
    OPTION("kv_cache_tokens", QF_PY_INT64, kv_cache_tokens),
    OPTION("memory_utilization", QF_PY_DOUBLE, memory_utilization),
    OPTION("memory_bytes", QF_PY_UINT64, memory_bytes),
    OPTION("cpu_offload", QF_PY_STRING_OR_NONE, cpu_offload),
    OPTION("cpu_offload_gb", QF_PY_DOUBLE, cpu_offload_gb),
    OPTION("batch_invariant", QF_PY_BOOL, batch_invariant),
    OPTION("enforce_eager", QF_PY_BOOL, enforce_eager),
    OPTION("enable_prefix_caching", QF_PY_BOOL, enable_prefix_caching),
    OPTION("num_threads", QF_PY_INT32, num_threads),
    OPTION("isa", QF_PY_STRING, isa),
    OPTION("max_steps_in_flight", QF_PY_INT32, max_steps_in_flight),
    OPTION("max_waiting_requests", QF_PY_INT32, max_waiting_requests),
    OPTION("dummy_seed", QF_PY_UINT64, dummy_seed),
    OPTION("meter", QF_PY_BOOL, meter),
    {"progress", QF_PY_OBJECT, offsetof(qf_py_engine_options, progress)},
};

int qf_py_engine_options_parse(qf_py_engine_options *self, const char *function, PyObject *args, PyObject *kwargs)
{
    memset(self, 0, sizeof *self);
    qf_engine_options_init(&self->options);
    if (qf_py_arguments_parse(&self->arguments, function, engine_fields, Py_ARRAY_LENGTH(engine_fields), args, kwargs,
                              self) < 0) {
        return -1;
    }
    if (self->progress == Py_None) {
        self->progress = NULL;
    }
    if (self->progress != NULL && !PyCallable_Check(self->progress)) {
        PyErr_Format(PyExc_TypeError, "progress must be callable or None, not %s", Py_TYPE(self->progress)->tp_name);
        return -1;
    }
    if (self->kv_cache_16bit_layers != NULL && self->kv_cache_16bit_layers != Py_None) {
        int32_t count = 0;
        if (qf_py_to_int32_array(self->kv_cache_16bit_layers, "kv_cache_16bit_layers", &self->layers, &count) < 0) {
            return -1;
        }
        self->options.kv_cache_16bit_layers = self->layers;
        self->options.num_kv_cache_16bit_layers = count;
    }
    return 0;
}

void qf_py_engine_options_deinit(qf_py_engine_options *self)
{
    PyMem_Free(self->layers);
    qf_py_arguments_deinit(&self->arguments);
}
