/* The functions of the module. */
#include "python/options.h"

#include <string.h>

PyDoc_STRVAR(estimate_doc,
"estimate($module, /, model_dir, **options)\n--\n\n"
"What Engine with the same arguments would allocate, as a dict in bytes, blocks and tokens. Reads file headers only;\n"
"`progress` is not called. Raises what Engine raises.");

static PyObject *estimate(PyObject *module, PyObject *args, PyObject *kwargs)
{
    PyObject *result = NULL;
    qf_py_engine_options parsed;
    if (qf_py_engine_options_parse(&parsed, "estimate", args, kwargs) == 0) {
        qf_memory_report report = {0};
        qf_error err = {0};
        qf_status status = QF_OK;
        Py_BEGIN_ALLOW_THREADS
        status = qf_engine_estimate(&parsed.options, &report, &err);
        Py_END_ALLOW_THREADS
        if (status == QF_OK) {
            result = qf_py_from_memory_report(&report);
        } else {
            (void)qf_py_raise(qf_py_module_state(module), &err);
        }
    }
    qf_py_engine_options_deinit(&parsed);
    return result;
}

PyDoc_STRVAR(build_info_doc,
"build_info($module, /)\n--\n\n"
"What this module was built with and what this machine offers: version, compiler, cuda (built with), cuda_archs, isa (the\n"
"best that is supported here), isas (all of them), cpu_count.");

static PyObject *build_info(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    char text[2048] = "";
    qf_build_info(text, sizeof text);
    PyObject *json = PyImport_ImportModule("json");
    if (json == NULL) {
        return NULL;
    }
    PyObject *result = PyObject_CallMethod(json, "loads", "s", text);
    Py_DECREF(json);
    return result;
}

PyDoc_STRVAR(device_info_doc,
"device_info($module, /)\n--\n\n"
"The GPUs that the driver shows, a dict each: name, index, compute_capability (90 for 9.0), total_bytes, free_bytes,\n"
"usable, reason (why it is not). Empty without a GPU, a driver, or CUDA in this build.");

#define MAX_DEVICES 16

static const qf_py_field device_fields[] = {
    {"index", QF_PY_INT32, offsetof(qf_device_info, index)},
    {"compute_capability", QF_PY_INT32, offsetof(qf_device_info, compute_capability)},
    {"total_bytes", QF_PY_UINT64, offsetof(qf_device_info, total_bytes)},
    {"free_bytes", QF_PY_UINT64, offsetof(qf_device_info, free_bytes)},
    {"usable", QF_PY_BOOL, offsetof(qf_device_info, usable)},
};

static PyObject *device_to_dict(const qf_device_info *info)
{
    PyObject *dict = PyDict_New();
    if (dict == NULL || qf_py_set(dict, "name", PyUnicode_FromString(info->name)) < 0 ||
        qf_py_set_fields(dict, device_fields, Py_ARRAY_LENGTH(device_fields), info) < 0 ||
        qf_py_set(dict, "reason", PyUnicode_FromString(info->reason)) < 0) {
        Py_CLEAR(dict);
    }
    return dict;
}

static PyObject *device_info(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    qf_device_info devices[MAX_DEVICES];
    int32_t count;
    Py_BEGIN_ALLOW_THREADS
    count = qf_list_devices(devices, MAX_DEVICES);
    Py_END_ALLOW_THREADS
    PyObject *list = PyList_New(0);
    for (int32_t i = 0; list != NULL && i < count && i < MAX_DEVICES; i++) {
        PyObject *dict = device_to_dict(&devices[i]);
        if (dict == NULL || PyList_Append(list, dict) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(dict);
    }
    return list;
}

PyDoc_STRVAR(dequantize_doc,
"dequantize($module, /, model_dir, module)\n--\n\n"
"The weights of one linear layer (\"model.layers.0.self_attn.q_proj\", \"lm_head\") by the checkpoint format's formula:\n"
"float32, shape (n, k) = (outputs, inputs). Raises ModelError, OSError, ValueError, MemoryError.");

typedef struct dequantize_arguments {
    const char *model_dir, *module;
} dequantize_arguments;

static PyObject *dequantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"model_dir", "module", NULL};
    PyObject *dir_argument = NULL;
    PyObject *name_argument = NULL;
    dequantize_arguments parsed = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:dequantize", (char **)names, &dir_argument, &name_argument) ||
        qf_py_to_utf8(dir_argument, "model_dir", &parsed.model_dir) < 0 ||
        qf_py_to_utf8(name_argument, "module", &parsed.module) < 0) {
        return NULL;
    }
    float *values = NULL;
    int32_t n = 0;
    int32_t k = 0;
    qf_error err = {0};
    qf_status status = QF_OK;
    Py_BEGIN_ALLOW_THREADS
    status = qf_checkpoint_dequantize(parsed.model_dir, parsed.module, &values, &n, &k, &err);
    Py_END_ALLOW_THREADS
    if (status != QF_OK) {
        (void)qf_py_raise(qf_py_module_state(module), &err);
        return NULL;
    }
    PyObject *result = qf_py_from_matrix(values, n, k);
    qf_buffer_free(values);
    return result;
}

PyDoc_STRVAR(quantize_rtn_doc,
"quantize_rtn($module, /, weights, bits, group_size)\n--\n\n"
"Round float32 weights (n, k), C-contiguous, to codes of 4 or 8 bits in groups along k. Returns bytes of the codes (n, k)\n"
"uint8, the scales (n, groups) float32 and the zero points (n, groups) uint8; w is about scale * (code - zero).\n\n"
"Raises TypeError (not such a buffer), ValueError (shape, bits, group_size), MemoryError.");

/* view: float32 (n, k), k >= 1. */
static PyObject *quantize_view(const qf_py_state *state, const Py_buffer *view, int32_t bits, int32_t group_size)
{
    int32_t n = (int32_t)view->shape[0];
    int32_t k = (int32_t)view->shape[1];
    Py_ssize_t num_groups = (Py_ssize_t)n * ((k - 1) / group_size + 1);
    PyObject *codes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n * k);
    PyObject *scales = PyBytes_FromStringAndSize(NULL, num_groups * (Py_ssize_t)sizeof(float));
    PyObject *zeros = PyBytes_FromStringAndSize(NULL, num_groups);
    float *aligned_scales = PyMem_New(float, (size_t)num_groups + 1); /* bytes need not be aligned for floats */
    PyObject *result = NULL;
    if (codes == NULL || scales == NULL || zeros == NULL || aligned_scales == NULL) {
        if (!PyErr_Occurred()) {
            PyErr_NoMemory();
        }
        goto done;
    }
    qf_error err = {0};
    qf_status status = QF_OK;
    Py_BEGIN_ALLOW_THREADS
    status = qf_quantize_rtn(view->buf, n, k, bits, group_size, (uint8_t *)PyBytes_AS_STRING(codes), aligned_scales,
                             (uint8_t *)PyBytes_AS_STRING(zeros), &err);
    Py_END_ALLOW_THREADS
    if (status != QF_OK) {
        (void)qf_py_raise(state, &err);
        goto done;
    }
    memcpy(PyBytes_AS_STRING(scales), aligned_scales, (size_t)num_groups * sizeof(float));
    result = PyTuple_Pack(3, codes, scales, zeros);
done:
    PyMem_Free(aligned_scales);
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(zeros);
    return result;
}

static PyObject *quantize_rtn(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"weights", "bits", "group_size", NULL};
    PyObject *weights = NULL;
    PyObject *bits_argument = NULL;
    PyObject *group_size_argument = NULL;
    int32_t bits = 0;
    int32_t group_size = 0;
    Py_buffer view;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:quantize_rtn", (char **)names, &weights, &bits_argument,
                                     &group_size_argument) ||
        qf_py_to_int32(bits_argument, "bits", 1, 8, &bits) < 0 ||
        qf_py_to_int32(group_size_argument, "group_size", 1, INT32_MAX, &group_size) < 0 ||
        qf_py_to_words(weights, "weights", "f", 2, &view) < 0) {
        return NULL;
    }
    PyObject *result = NULL;
    if (view.shape[0] < 1 || view.shape[1] < 1 || view.shape[0] > INT32_MAX || view.shape[1] > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "weights must have 1 .. %d rows and columns, got shape (%zd, %zd)", INT32_MAX,
                     view.shape[0], view.shape[1]);
    } else {
        result = quantize_view(qf_py_module_state(module), &view, bits, group_size);
    }
    PyBuffer_Release(&view);
    return result;
}

PyMethodDef qf_py_functions[] = {
    {"estimate", (PyCFunction)(void (*)(void))estimate, METH_VARARGS | METH_KEYWORDS, estimate_doc},
    {"build_info", build_info, METH_NOARGS, build_info_doc},
    {"device_info", device_info, METH_NOARGS, device_info_doc},
    {"dequantize", (PyCFunction)(void (*)(void))dequantize, METH_VARARGS | METH_KEYWORDS, dequantize_doc},
    {"quantize_rtn", (PyCFunction)(void (*)(void))quantize_rtn, METH_VARARGS | METH_KEYWORDS, quantize_rtn_doc},
    {NULL, NULL, 0, NULL},
};
