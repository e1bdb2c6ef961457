/* Structs of numbers to dicts, by table. */
#include "python/convert.h"

#include <stddef.h>

#define FIELD(kind, member) {#member, kind, offsetof(qf_memory_report, member)}

static const qf_py_field memory_fields[] = {
    FIELD(QF_PY_UINT64, embedding_bytes),
    FIELD(QF_PY_UINT64, layers_bytes),
    FIELD(QF_PY_UINT64, head_bytes),
    FIELD(QF_PY_UINT64, workspace_bytes),
    FIELD(QF_PY_UINT64, kv_cache_bytes),
    FIELD(QF_PY_UINT64, kv_block_bytes),
    FIELD(QF_PY_UINT64, kv_window_bytes),
    FIELD(QF_PY_INT32, num_blocks),
    FIELD(QF_PY_INT32, block_size),
    FIELD(QF_PY_INT32, max_model_len),
    FIELD(QF_PY_UINT64, available_bytes),
    FIELD(QF_PY_UINT64, device_overhead_bytes),
    FIELD(QF_PY_UINT64, device_total_bytes),
};

#undef FIELD
#define FIELD(kind, member) {#member, kind, offsetof(qf_engine_info, member)}

static const qf_py_field info_fields[] = {
    FIELD(QF_PY_STRING, backend),
    FIELD(QF_PY_STRING, description),
    FIELD(QF_PY_STRING, isa),
    FIELD(QF_PY_INT32, vocab_size),
    FIELD(QF_PY_INT32, hidden_size),
    FIELD(QF_PY_INT32, intermediate_size),
    FIELD(QF_PY_INT32, num_layers),
    FIELD(QF_PY_INT32, num_heads),
    FIELD(QF_PY_INT32, num_kv_heads),
    FIELD(QF_PY_INT32, head_dim),
    FIELD(QF_PY_INT32, max_position_embeddings),
    FIELD(QF_PY_INT32, max_model_len),
    FIELD(QF_PY_INT32, block_size),
    FIELD(QF_PY_INT32, num_blocks),
    FIELD(QF_PY_INT32, max_num_seqs),
    FIELD(QF_PY_INT32, max_num_batched_tokens),
    FIELD(QF_PY_INT32, max_steps_in_flight),
    FIELD(QF_PY_STRING, dtype),
    FIELD(QF_PY_STRING, activation_dtype),
    FIELD(QF_PY_STRING, quantization),
    FIELD(QF_PY_STRING, lm_head_dtype),
    FIELD(QF_PY_STRING, kv_cache_dtype),
    FIELD(QF_PY_INT32, kv_cache_16bit_window),
    FIELD(QF_PY_INT32, num_threads),
    FIELD(QF_PY_INT32, tensor_parallel_size),
    FIELD(QF_PY_DOUBLE, load_seconds),
};

#undef FIELD
#define FIELD(kind, member) {#member, kind, offsetof(qf_engine_stats, member)}

static const qf_py_field stats_fields[] = {
    FIELD(QF_PY_INT32, num_running),
    FIELD(QF_PY_INT32, num_waiting),
    FIELD(QF_PY_INT32, num_paused),
    FIELD(QF_PY_INT32, num_free_blocks),
    FIELD(QF_PY_INT32, num_cached_blocks),
    FIELD(QF_PY_UINT64, num_steps),
    FIELD(QF_PY_UINT64, num_prompt_tokens),
    FIELD(QF_PY_UINT64, num_generated_tokens),
    FIELD(QF_PY_UINT64, prefix_queried_tokens),
    FIELD(QF_PY_UINT64, prefix_hit_tokens),
    FIELD(QF_PY_UINT64, num_preemptions),
    FIELD(QF_PY_UINT64, num_finished_stop),
    FIELD(QF_PY_UINT64, num_finished_length),
    FIELD(QF_PY_UINT64, num_finished_abort),
    FIELD(QF_PY_UINT64, num_finished_error),
    FIELD(QF_PY_UINT64, busy_ns),
    FIELD(QF_PY_BOOL, failed),
};

#undef FIELD

static PyObject *from_struct(const qf_py_field *fields, size_t num_fields, const void *values)
{
    PyObject *dict = PyDict_New();
    if (dict != NULL && qf_py_set_fields(dict, fields, num_fields, values) < 0) {
        Py_CLEAR(dict);
    }
    return dict;
}

PyObject *qf_py_from_memory_report(const qf_memory_report *report)
{
    return from_struct(memory_fields, Py_ARRAY_LENGTH(memory_fields), report);
}

PyObject *qf_py_from_engine_info(const qf_engine_info *info)
{
    PyObject *dict = from_struct(info_fields, Py_ARRAY_LENGTH(info_fields), info);
    if (dict != NULL &&
        qf_py_set(dict, "kv_cache_16bit_layers",
                  qf_py_from_int32_array(info->kv_cache_16bit_layers, info->num_kv_cache_16bit_layers)) < 0) {
        Py_CLEAR(dict);
    }
    return dict;
}

PyObject *qf_py_from_engine_stats(const qf_engine_stats *stats)
{
    PyObject *dict = from_struct(stats_fields, Py_ARRAY_LENGTH(stats_fields), stats);
    if (dict != NULL && qf_py_set(dict, "memory", qf_py_from_memory_report(&stats->memory)) < 0) {
        Py_CLEAR(dict);
    }
    return dict;
}
