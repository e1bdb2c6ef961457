/* What this process holds on a device, as NVML counts it: the arena, and what the driver takes for context, modules and
 * graphs. The library belongs to the driver and is opened when it is asked, so a machine without one still imports. */
#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

#include "backend/cuda/cuda_backend.h"

#define MAX_PROCESSES 256
#define NVML_SUCCESS 0

typedef struct nvml_process { /* nvmlProcessInfo_t, version 2 and 3 */
    unsigned int pid;
    unsigned long long used_bytes;
    unsigned int gpu_instance, compute_instance;
} nvml_process;

typedef struct nvml_library {
    void *handle;
    int (*init)(void);
    int (*shutdown)(void);
    int (*device_by_bus_id)(const char *, void **);
    int (*processes)(void *, unsigned int *, nvml_process *);
} nvml_library;

/* dlsym's result is an object pointer; a function pointer of the same size is behind it. */
static void find(void *handle, const char *name, void *out) { *(void **)out = dlsym(handle, name); }

static bool open_library(nvml_library *out)
{
    *out = (nvml_library){.handle = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)};
    if (out->handle == NULL) {
        return false;
    }
    find(out->handle, "nvmlInit_v2", &out->init);
    find(out->handle, "nvmlShutdown", &out->shutdown);
    find(out->handle, "nvmlDeviceGetHandleByPciBusId_v2", &out->device_by_bus_id);
    find(out->handle, "nvmlDeviceGetComputeRunningProcesses_v3", &out->processes);
    return out->init != NULL && out->shutdown != NULL && out->device_by_bus_id != NULL && out->processes != NULL;
}

static uint64_t own_bytes(const nvml_library *nvml, const char *bus_id)
{
    void *device;
    nvml_process list[MAX_PROCESSES];
    unsigned int count = MAX_PROCESSES;
    if (nvml->device_by_bus_id(bus_id, &device) != NVML_SUCCESS ||
        nvml->processes(device, &count, list) != NVML_SUCCESS) {
        return 0;
    }
    for (unsigned int i = 0; i < count && i < MAX_PROCESSES; i++) {
        if (list[i].pid == (unsigned int)getpid() && list[i].used_bytes != ~0ull) {
            return list[i].used_bytes;
        }
    }
    return 0;
}

uint64_t qf_cuda_process_bytes(int32_t ordinal)
{
    char bus_id[32];
    nvml_library nvml;
    uint64_t bytes = 0;
    if (cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, ordinal) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    if (open_library(&nvml) && nvml.init() == NVML_SUCCESS) {
        bytes = own_bytes(&nvml, bus_id);
        (void)nvml.shutdown();
    }
    if (nvml.handle != NULL) {
        (void)dlclose(nvml.handle);
    }
    return bytes;
}
