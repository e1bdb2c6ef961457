/* What NVML counts: the memory that this process holds on a device (the arena, and what the driver takes for context,
 * modules and graphs), and the energy that the device took. The library belongs to the driver and is opened when it is asked, so a machine without one still imports. */
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

/* --- energy ---------------------------------------------------------------------------------------------- */

/* Opens the library and finds the device; a reason if that, or the first reading, fails. */
static bool open_energy(qf_cuda_energy *self, int32_t ordinal)
{
    char bus_id[32];
    nvml_library nvml;
    unsigned long long millijoules;
    const char *(*error_string)(int) = NULL;
    const char *failed = NULL;
    int code = NVML_SUCCESS;
    bool open = open_library(&nvml), ready = false;
    if (open) {
        find(nvml.handle, "nvmlDeviceGetTotalEnergyConsumption", &self->total);
        find(nvml.handle, "nvmlErrorString", &error_string);
    }
    if (!open || self->total == NULL || error_string == NULL) {
        failed = "libnvidia-ml.so.1 cannot be loaded, or lacks a function";
    } else if (cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, ordinal) != cudaSuccess) {
        (void)cudaGetLastError();
        failed = "the device has no PCI address";
    } else if ((code = nvml.init()) != NVML_SUCCESS) {
        failed = "nvmlInit";
    } else {
        ready = true;
        code = nvml.device_by_bus_id(bus_id, &self->device);
        failed = code != NVML_SUCCESS ? "nvmlDeviceGetHandleByPciBusId" : NULL;
        if (failed == NULL && (code = self->total(self->device, &millijoules)) != NVML_SUCCESS) {
            failed = "nvmlDeviceGetTotalEnergyConsumption";
        }
    }
    if (failed == NULL) {
        self->library = nvml.handle;
        self->shutdown = nvml.shutdown;
        return true;
    }
    (void)snprintf(self->reason, sizeof self->reason, "%s%s%.80s", failed, code != NVML_SUCCESS ? ": " : "",
                   code != NVML_SUCCESS ? error_string(code) : "");
    if (ready) {
        (void)nvml.shutdown();
    }
    if (nvml.handle != NULL) {
        (void)dlclose(nvml.handle);
    }
    return false;
}

bool qf_cuda_energy_read(qf_backend *base, uint64_t *energy_uj, char *note, size_t note_bytes)
{
    qf_cuda_backend *backend = (qf_cuda_backend *)base;
    qf_cuda_energy *self = &backend->energy;
    unsigned long long millijoules;
    if (self->library == NULL && (self->reason[0] != '\0' || !open_energy(self, backend->device.ordinal))) {
        (void)snprintf(note, note_bytes, "%s", self->reason);
        return false;
    }
    if (self->total(self->device, &millijoules) != NVML_SUCCESS) {
        (void)snprintf(note, note_bytes, "nvmlDeviceGetTotalEnergyConsumption has failed");
        return false;
    }
    (void)snprintf(note, note_bytes, "the whole board, by NVML's energy counter: other processes on it too");
    *energy_uj = (uint64_t)millijoules * 1000u;
    return true;
}

void qf_cuda_energy_deinit(qf_cuda_energy *self)
{
    if (self->library != NULL) {
        (void)self->shutdown();
        (void)dlclose(self->library);
    }
    *self = (qf_cuda_energy){0};
}
