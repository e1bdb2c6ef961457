/* Which backend an engine gets, and what this build offers. The only engine file that knows a backend by name. */
#include <stdio.h>
#include <string.h>

#include "backend/cpu/cpu.h"
#ifdef QF_WITH_CUDA
#include "backend/cuda/cuda.h"
#endif
#include "base/threads.h"
#include "engine/engine.h"

#ifndef QF_VERSION
#define QF_VERSION "0"
#endif

#if defined(__clang__)
#define COMPILER __VERSION__ /* names clang itself */
#else
#define COMPILER "gcc " __VERSION__
#endif

#ifndef QF_CUDA_ARCHS
#define QF_CUDA_ARCHS ""
#endif

#ifdef QF_WITH_CUDA
#define WITH_CUDA "true"
#define MAX_DEVICES 16
#else
#define WITH_CUDA "false"
#endif

int32_t qf_list_devices(qf_device_info *out, int32_t capacity)
{
#ifdef QF_WITH_CUDA
    qf_cuda_device_info devices[MAX_DEVICES];
    int32_t count = qf_cuda_list_devices(devices, MAX_DEVICES, true);
    count = count < MAX_DEVICES ? count : MAX_DEVICES;
    for (int32_t i = 0; i < count && i < capacity; i++) {
        out[i] = (qf_device_info){.index = devices[i].ordinal,
                                  .compute_capability = devices[i].compute_capability,
                                  .total_bytes = devices[i].total_bytes,
                                  .free_bytes = devices[i].free_bytes,
                                  .usable = devices[i].usable};
        (void)snprintf(out[i].name, sizeof out[i].name, "%s", devices[i].name);
        (void)snprintf(out[i].reason, sizeof out[i].reason, "%s", devices[i].reason);
    }
    return count;
#else
    (void)out;
    (void)capacity;
    return 0;
#endif
}

/* "auto" is the first usable GPU if there is one, else the CPU. */
qf_status qf_engine_choose_backend(const qf_engine_options *options, const qf_backend_vtable **out, qf_error *err)
{
    qf_device_choice choice;
    QF_TRY(qf_device_parse(options->device, &choice, err));
    *out = qf_cpu_backend_vtable();
#ifdef QF_WITH_CUDA
    if (choice.kind == QF_DEVICE_CUDA) {
        *out = qf_cuda_backend_vtable();
    } else if (choice.kind == QF_DEVICE_AUTO) {
        qf_cuda_device_info first;
        if (qf_cuda_list_devices(&first, 1, false) > 0 && first.usable) {
            *out = qf_cuda_backend_vtable();
        }
    }
    return QF_OK;
#else
    if (choice.kind == QF_DEVICE_CUDA) {
        return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                       "device=\"%.20s\": this build has no CUDA backend; install from source where nvcc is found",
                       options->device);
    }
    return QF_OK;
#endif
}

qf_status qf_engine_create(const qf_engine_options *options, qf_engine **out, qf_error *err)
{
    const qf_backend_vtable *backend;
    *out = NULL;
    QF_TRY(qf_engine_choose_backend(options, &backend, err));
    return qf_engine_create_with(options, backend, out, err);
}

qf_status qf_engine_estimate(const qf_engine_options *options, qf_memory_report *out, qf_error *err)
{
    qf_checkpoint *checkpoint;
    qf_resolved_options resolved;
    const qf_backend_vtable *backend;
    QF_TRY(qf_engine_choose_backend(options, &backend, err));
    QF_TRY(qf_options_resolve(options, backend, &checkpoint, &resolved, err));
    qf_checkpoint_close(checkpoint);
    qf_memory_report_fill(&resolved, out);
    return QF_OK;
}

void qf_build_info(char *buffer, size_t size_bytes)
{
    char isas[128] = "";
    qf_isa best = qf_isa_detect();
    for (int isa = 0; isa <= (int)best; isa++) {
        size_t used = strlen(isas);
        (void)snprintf(isas + used, sizeof isas - used, "%s\"%s\"", isa > 0 ? ", " : "", qf_isa_name((qf_isa)isa));
    }
    (void)snprintf(buffer, size_bytes,
                   "{\"version\": \"%s\", \"compiler\": \"%s\", \"cuda\": %s, \"cuda_archs\": \"%s\", \"isa\": \"%s\", \"isas\": [%s], "
                   "\"cpu_count\": %d}",
                   QF_VERSION, COMPILER, WITH_CUDA, QF_CUDA_ARCHS, qf_isa_name(best), isas, qf_cpu_count());
}
