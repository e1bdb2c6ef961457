#include "python/module.h"

PyDoc_STRVAR(module_doc,
"The native engine: a thin binding over csrc/include/qf.h. Use qwen_fast.LLM and AsyncLLM instead.");

PyDoc_STRVAR(model_error_doc,
"A checkpoint file is malformed or does not fit; the message names file, tensor or key, value and expectation.");

PyDoc_STRVAR(engine_error_doc, "The engine is closed or failed, or a device reported a failure.");

/* A new type of the module, added to it; NULL with an exception. The reference is the caller's. */
static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type != NULL && PyModule_AddType(module, type) < 0) {
        Py_CLEAR(type);
    }
    return type;
}

static int module_exec(PyObject *module)
{
    qf_py_state *state = qf_py_module_state(module);
    state->model_error =
        PyErr_NewExceptionWithDoc("qwen_fast._engine.ModelError", model_error_doc, PyExc_ValueError, NULL);
    if (state->model_error == NULL || PyModule_AddObjectRef(module, "ModelError", state->model_error) < 0) {
        return -1;
    }
    state->engine_error =
        PyErr_NewExceptionWithDoc("qwen_fast._engine.EngineError", engine_error_doc, PyExc_RuntimeError, NULL);
    if (state->engine_error == NULL || PyModule_AddObjectRef(module, "EngineError", state->engine_error) < 0) {
        return -1;
    }
    state->engine_type = add_type(module, &qf_py_engine_spec);
    if (state->engine_type == NULL) {
        return -1;
    }
    state->request_type = add_type(module, &qf_py_request_spec);
    if (state->request_type == NULL) {
        return -1;
    }
    state->layers_type = add_type(module, &qf_py_layers_spec);
    if (state->layers_type == NULL) {
        return -1;
    }
    return PyModule_AddStringConstant(module, "__version__", QF_VERSION);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    qf_py_state *state = qf_py_module_state(module);
    Py_VISIT(state->engine_type);
    Py_VISIT(state->request_type);
    Py_VISIT(state->layers_type);
    Py_VISIT(state->model_error);
    Py_VISIT(state->engine_error);
    return 0;
}

static int module_clear(PyObject *module)
{
    qf_py_state *state = qf_py_module_state(module);
    Py_CLEAR(state->engine_type);
    Py_CLEAR(state->request_type);
    Py_CLEAR(state->layers_type);
    Py_CLEAR(state->model_error);
    Py_CLEAR(state->engine_error);
    return 0;
}

static void module_free(void *module) { (void)module_clear((PyObject *)module); }

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qwen_fast._engine",
    .m_doc = module_doc,
    .m_size = sizeof(qf_py_state),
    .m_methods = qf_py_functions,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__engine(void) { return PyModuleDef_Init(&module_def); }
