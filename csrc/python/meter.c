/* The meter's figures as dicts. */
#include "python/convert.h"

#include <stddef.h>
#include <string.h>

#define FIELD(member) {#member, QF_PY_UINT64, offsetof(qf_usage, member)}

/* In the order of qf_usage: the first ones may have a second word. */
static const qf_py_field usage_fields[] = {
    FIELD(prompt_tokens),
    FIELD(cached_tokens),
    FIELD(output_tokens),
    FIELD(computed_prompt_tokens),
    FIELD(weight_bytes),
    FIELD(head_bytes),
    FIELD(embedding_bytes),
    FIELD(kv_read_bytes),
    FIELD(kv_write_bytes),
    FIELD(activation_bytes),
    FIELD(host_bytes),
    FIELD(flops),
    FIELD(device_ns),
    FIELD(prefill_device_ns),
    FIELD(decode_device_ns),
};

#undef FIELD

#define NUM_WIDE Py_ARRAY_LENGTH(((qf_meter_stats *)0)->total_high)

/* high * 2^64 + low */
static PyObject *from_wide(uint64_t high, uint64_t low)
{
    PyObject *upper = PyLong_FromUnsignedLongLong(high);
    PyObject *lower = PyLong_FromUnsignedLongLong(low);
    PyObject *shift = PyLong_FromLong(64);
    PyObject *shifted = upper != NULL && shift != NULL ? PyNumber_Lshift(upper, shift) : NULL;
    PyObject *sum = shifted != NULL && lower != NULL ? PyNumber_Or(shifted, lower) : NULL;
    Py_XDECREF(shifted);
    Py_XDECREF(shift);
    Py_XDECREF(lower);
    Py_XDECREF(upper);
    return sum;
}

/* A source that was measured once has an account. */
static bool has_account(const qf_energy_source *source) { return source->measured || source->total_uj > 0; }

typedef uint64_t (*amount_fn)(const qf_energy_source *source, const qf_usage *usage, int32_t index);

static uint64_t used(const qf_energy_source *source, const qf_usage *usage, int32_t index)
{
    (void)source;
    return usage->energy_uj[index];
}

static uint64_t idle(const qf_energy_source *source, const qf_usage *usage, int32_t index)
{
    (void)usage;
    (void)index;
    return source->idle_uj;
}

static uint64_t unsettled(const qf_energy_source *source, const qf_usage *usage, int32_t index)
{
    (void)usage;
    (void)index;
    return source->unsettled_uj;
}

/* {name: microjoules} of the sources that have an account. */
static PyObject *from_energy(const qf_energy_source *sources, int32_t count, const qf_usage *usage, amount_fn amount)
{
    PyObject *dict = PyDict_New();
    for (int32_t k = 0; dict != NULL && k < count; k++) {
        if (has_account(&sources[k]) &&
            qf_py_set(dict, sources[k].name, PyLong_FromUnsignedLongLong(amount(&sources[k], usage, k))) < 0) {
            Py_CLEAR(dict);
        }
    }
    return dict;
}

/* high: (NUM_WIDE) or NULL */
static PyObject *from_amounts(const qf_usage *usage, const uint64_t *high, const qf_energy_source *sources,
                              int32_t num_sources)
{
    PyObject *dict = PyDict_New();
    if (dict == NULL || qf_py_set_fields(dict, usage_fields, Py_ARRAY_LENGTH(usage_fields), usage) < 0) {
        Py_XDECREF(dict);
        return NULL;
    }
    for (size_t i = 0; high != NULL && i < NUM_WIDE; i++) {
        uint64_t low;
        memcpy(&low, (const char *)usage + usage_fields[i].offset, sizeof low);
        if (high[i] > 0 && qf_py_set(dict, usage_fields[i].name, from_wide(high[i], low)) < 0) {
            Py_DECREF(dict);
            return NULL;
        }
    }
    if (qf_py_set(dict, "energy_uj", from_energy(sources, num_sources, usage, used)) < 0) {
        Py_CLEAR(dict);
    }
    return dict;
}

PyObject *qf_py_from_usage(qf_request *request)
{
    qf_usage usage;
    qf_energy_source sources[QF_MAX_ENERGY_SOURCES];
    int32_t num_sources;
    bool final = qf_request_usage(request, &usage, sources, &num_sources);
    PyObject *dict = from_amounts(&usage, NULL, sources, num_sources);
    const char *note = "";
    for (int32_t k = num_sources - 1; k >= 0 && note != NULL; k--) {
        note = sources[k].measured ? NULL : sources[k].note; /* the first source's, the device's */
    }
    if (num_sources == 0) {
        note = "the engine was loaded with meter=False";
    }
    if (dict != NULL && (qf_py_set(dict, "energy_provisional", PyBool_FromLong(!final)) < 0 ||
                         qf_py_set(dict, "energy_note", qf_py_from_string(note != NULL ? note : "")) < 0)) {
        Py_CLEAR(dict);
    }
    return dict;
}

static PyObject *from_source(const qf_energy_source *source)
{
    PyObject *dict = PyDict_New();
    if (dict == NULL) {
        return NULL;
    }
    PyObject *watts = source->has_idle_watts ? PyFloat_FromDouble(source->idle_watts) : Py_NewRef(Py_None);
    if (qf_py_set(dict, "idle_watts", watts) < 0 ||
        qf_py_set(dict, "name", qf_py_from_string(source->name)) < 0 ||
        qf_py_set(dict, "kind", qf_py_from_string(source->kind)) < 0 ||
        qf_py_set(dict, "measured", PyBool_FromLong(source->measured)) < 0 ||
        qf_py_set(dict, "note", qf_py_from_string(source->note)) < 0) {
        Py_CLEAR(dict);
    }
    return dict;
}

static PyObject *from_sources(const qf_meter_stats *stats)
{
    PyObject *list = PyList_New(stats->num_sources);
    for (int32_t k = 0; list != NULL && k < stats->num_sources; k++) {
        PyObject *source = from_source(&stats->sources[k]);
        if (source == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, k, source);
    }
    return list;
}

/* {first: number, "energy_uj": ...} */
static PyObject *from_rest(const qf_meter_stats *stats, const char *first, uint64_t number, amount_fn amount)
{
    PyObject *dict = PyDict_New();
    if (dict != NULL &&
        (qf_py_set(dict, first, PyLong_FromUnsignedLongLong(number)) < 0 ||
         qf_py_set(dict, "energy_uj", from_energy(stats->sources, stats->num_sources, NULL, amount)) < 0)) {
        Py_CLEAR(dict);
    }
    return dict;
}

PyObject *qf_py_from_meter(const qf_meter_stats *stats)
{
    PyObject *dict = PyDict_New();
    if (dict == NULL) {
        return NULL;
    }
    int32_t count = stats->num_sources;
    uint64_t idle_ns = stats->wall_ns > stats->busy_ns ? stats->wall_ns - stats->busy_ns : 0;
    uint64_t unsettled_ns = stats->total.device_ns - stats->requests.device_ns;
    if (qf_py_set(dict, "enabled", PyBool_FromLong(stats->enabled)) < 0 ||
        qf_py_set(dict, "total", from_amounts(&stats->total, stats->total_high, stats->sources, count)) < 0 ||
        qf_py_set(dict, "requests", from_amounts(&stats->requests, stats->requests_high, stats->sources, count)) < 0 ||
        qf_py_set(dict, "idle", from_rest(stats, "wall_ns", idle_ns, idle)) < 0 ||
        qf_py_set(dict, "unsettled", from_rest(stats, "device_ns", unsettled_ns, unsettled)) < 0 ||
        qf_py_set(dict, "sources", from_sources(stats)) < 0 ||
        qf_py_set(dict, "wall_ns", PyLong_FromUnsignedLongLong(stats->wall_ns)) < 0 ||
        qf_py_set(dict, "busy_ns", PyLong_FromUnsignedLongLong(stats->busy_ns)) < 0 ||
        qf_py_set(dict, "num_steps", PyLong_FromUnsignedLongLong(stats->num_steps)) < 0 ||
        qf_py_set(dict, "peak_kv_bytes", PyLong_FromUnsignedLongLong(stats->peak_kv_bytes)) < 0) {
        Py_CLEAR(dict);
    }
    return dict;
}
